//! The bus: its functions, and the ways to their configuration space.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vmcore::boot::acpi::PciHost;
use vmcore::boot::layout;
use vmcore::memory::GpaRange;
use vmcore::{BusDevice, Error, GuestAddress, Machine, Platform, Result, SharedDevice};

use super::config::Config;
use super::device::{Description, Identity, PciDevice};
use super::function::{self, Function, SharedFunction, lock};
use super::interrupt::{Interrupts, Pin, Wires};
use super::windows::Windows;
use crate::saved;

const WHAT: &str = "the PCI host bridge";
const STATE_VERSION: u8 = 1;

/// CONFIG_ADDRESS and CONFIG_DATA (PCI 3.2.2.3.2).
const ADDRESS_PORT: u16 = 0xcf8;
const DATA_PORT: u16 = 0xcfc;
/// CONFIG_ADDRESS: accesses to CONFIG_DATA are configuration accesses.
const ENABLE: u32 = 1 << 31;
/// The bits of CONFIG_ADDRESS that are there: enable, bus, slot, function, register.
const ADDRESS_BITS: u32 = 0x80ff_fffc;

/// Addresses of ECAM for one function and one bus.
const ECAM_FUNCTION: u64 = 1 << 12;
const ECAM_BUS: u64 = 1 << 20;

/// The host bridge's identity: Red Hat's for bridges of virtual machines, which no driver has quirks for.
const BRIDGE: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: 0x06_0000,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

/// Where a function is on the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PciAddress {
    /// Number of the slot (the device number), 0 to 31.
    pub slot: u8,
    /// Number of the function in it, 0 to 7.
    pub function: u8,
}

impl PciAddress {
    /// Function 0 of `slot`.
    pub fn slot(slot: u8) -> Self {
        Self { slot, function: 0 }
    }

    fn number(self) -> u8 {
        self.slot << 3 | self.function
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00:{:02x}.{}", self.slot, self.function)
    }
}

/// A PCI bus with its host bridge, which is function 0 of slot 0. Clones mean the same bus.
///
/// Its whole state, all functions included, is that of the device at port 0xCF8 ([`PciBus::type1`]): a snapshot
/// restores ports before it looks for devices by their addresses, which restoring the bus moves.
#[derive(Clone, Debug)]
pub struct PciBus(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    platform: Platform,
    windows: Windows,
    gsis: [u32; 4],
    wires: Arc<Wires>,
    /// By slot and function, as in configuration addresses.
    functions: BTreeMap<u8, SharedFunction>,
    /// CONFIG_ADDRESS.
    address: u32,
}

#[derive(Debug, Serialize, Deserialize)]
struct State {
    address: u32,
    functions: Vec<(u8, function::State)>,
}

impl PciBus {
    /// A bus on `platform` that puts BARs into `windows`, with the interrupt of pin `p` (0 to 3) of slot `n` at
    /// `gsis[(n + p) % 4]`. To be reached, it must be put on buses: [`PciBus::type1`], [`PciBus::ecam`].
    ///
    /// # Errors
    /// None that a caller could cause.
    pub fn new(platform: Platform, windows: &[GpaRange], gsis: [u32; 4]) -> Result<Self> {
        let wires = Arc::new(Wires::new(&platform, &gsis));
        let (windows, functions) = (Windows::new(windows), BTreeMap::new());
        let bus = Self(Arc::new(Mutex::new(Inner { platform, windows, gsis, wires, functions, address: 0 })));
        bus.add(Some(PciAddress::slot(0)), Box::new(Bridge))?;
        Ok(bus)
    }

    /// The bus of `machine`, which has one from now on.
    ///
    /// # Errors
    /// [`Error::Conflict`] where other devices have its ports or addresses.
    pub fn of(machine: &mut Machine) -> Result<Self> {
        machine.share(|machine| {
            let mut memory = vec![layout::PCI_WINDOW];
            memory.extend(machine.high_window()?);
            let bus = Self::new(machine.platform(), &memory, layout::PCI_GSIS)?;
            let ecam = GpaRange { base: layout::ECAM.base, len: ECAM_BUS };
            let (address, data) = bus.type1();
            machine.ports(ADDRESS_PORT, 1, address)?;
            machine.ports(DATA_PORT, 4, data)?;
            machine.mmio(GuestAddress(ecam.base), ecam.len, bus.ecam())?;
            machine.describe_pci(PciHost {
                ecam,
                last_bus: 0,
                memory,
                ports: None,
                gsis: layout::PCI_GSIS,
            })?;
            Ok(bus)
        })
    }

    /// Puts `device` at `address`, or into the first free slot, and says where it is.
    ///
    /// # Errors
    /// [`Error::Config`] for an address there is not, a description of what cannot be, and where slots or
    /// addresses are used up; [`Error::Conflict`] where a function is at `address`.
    pub fn add(&self, address: Option<PciAddress>, device: Box<dyn PciDevice>) -> Result<PciAddress> {
        let mut inner = self.lock();
        let address = inner.free(address)?;
        let description = device.describe();
        let pin = description.pin.then(|| {
            let input = address.function % 4;
            let gsi = inner.gsis[(usize::from(address.slot) + usize::from(input)) % 4];
            (input, Pin { wires: inner.wires.clone(), gsi, function: address.number() })
        });
        let line = |gsi: u32| u8::try_from(gsi).unwrap_or(0xff);
        let registers = pin.as_ref().map(|(input, pin)| (input + 1, line(pin.gsi)));
        let config = Config::new(&description, registers)?;
        let platform = inner.platform.clone();
        let vectors = description.msix.map(|msix| msix.vectors);
        let interrupts = Interrupts::new(platform.clone(), pin.map(|(_, pin)| pin), vectors);
        let windows = &mut inner.windows;
        let name = format!("PCI {address}");
        let function = Function::new(name, device, &description, config, interrupts, platform, windows)?;
        inner.functions.insert(address.number(), function);
        Ok(address)
    }

    /// Where a device would go that is to be at `address`, or in the first free slot.
    ///
    /// # Errors
    /// As [`PciBus::add`] for the address.
    pub fn free(&self, address: Option<PciAddress>) -> Result<PciAddress> {
        self.lock().free(address)
    }

    /// The devices of type-1 configuration accesses: a port at 0xCF8, which also has the state of the whole
    /// bus, and 4 ports at 0xCFC.
    pub fn type1(&self) -> (SharedDevice, SharedDevice) {
        (Arc::new(Mutex::new(AddressPort(self.clone()))), Arc::new(Mutex::new(DataPort(self.clone()))))
    }

    /// The device of the enhanced configuration space of this one bus, 1 MiB (PCI Express 5.0, 7.2.2).
    pub fn ecam(&self) -> SharedDevice {
        Arc::new(Mutex::new(Ecam(self.clone())))
    }

    /// Reads configuration space of function `number`; all ones where there is none.
    fn read(&self, number: u8, offset: usize, data: &mut [u8]) {
        let inner = self.lock();
        match inner.functions.get(&number) {
            Some(function) => {
                let slot = number & !7;
                let more = number == slot && inner.functions.range(slot + 1..=slot + 7).next().is_some();
                lock(function).read_config(offset, data, more);
            }
            None => data.fill(0xff),
        }
    }

    fn write(&self, number: u8, offset: usize, data: &[u8]) {
        let inner = self.lock();
        let Some(function) = inner.functions.get(&number) else { return };
        let freed = lock(function).write_config(offset, data);
        if freed {
            // Another BAR may have been programmed to be there.
            inner.functions.values().for_each(|function| {
                lock(function).map();
            });
        }
    }

    /// What CONFIG_DATA means at present: function and offset, if it means anything.
    fn selected(&self) -> Option<(u8, usize)> {
        let address = self.lock().address;
        let [register, number, bus, _] = address.to_le_bytes();
        (address & ENABLE != 0 && bus == 0).then_some((number, register.into()))
    }

    fn save(&self) -> Result<Vec<u8>> {
        let inner = self.lock();
        let functions = inner.functions.iter();
        let functions = functions
            .map(|(&number, function)| Ok((number, lock(function).save()?)))
            .collect::<Result<Vec<_>>>()?;
        saved::save(WHAT, STATE_VERSION, &State { address: inner.address, functions })
    }

    fn restore(&self, state: &[u8]) -> Result<()> {
        let state: State = saved::restore(WHAT, STATE_VERSION, state)?;
        let mut inner = self.lock();
        let saved: Vec<_> = state.functions.iter().map(|(number, _)| *number).collect();
        let ours: Vec<_> = inner.functions.keys().copied().collect();
        if saved != ours {
            return Err(Error::State {
                what: WHAT,
                expected: format!("functions {ours:x?}"),
                found: format!("functions {saved:x?}"),
            });
        }
        inner.address = state.address & ADDRESS_BITS;
        inner.functions.values().for_each(|function| lock(function).unmap());
        for (function, (_, state)) in inner.functions.values().zip(state.functions) {
            lock(function).restore(state)?;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Where a new function goes.
    fn free(&self, address: Option<PciAddress>) -> Result<PciAddress> {
        let refused =
            |value: String, fix: &str| Err(Error::Config { what: "PCI address", value, fix: fix.to_owned() });
        let Some(address) = address else {
            let free = (1..32).map(PciAddress::slot).find(|at| self.is_free(*at));
            return free.map_or_else(
                || refused("a 32nd slot".into(), "attach fewer devices, or several as functions of a slot"),
                Ok,
            );
        };
        if address.slot > 31 || address.function > 7 {
            return refused(format!("{address:?}"), "slots are 0 to 31, functions 0 to 7");
        }
        if self.functions.contains_key(&address.number()) {
            return Err(Error::Conflict {
                kind: "PCI function",
                new: address.to_string(),
                existing: "one at the same address".into(),
            });
        }
        if address.function > 0 && self.is_free(PciAddress::slot(address.slot)) {
            return refused(
                format!("{address} in an empty slot"),
                "attach function 0 first: guests look for it",
            );
        }
        Ok(address)
    }

    fn is_free(&self, address: PciAddress) -> bool {
        !self.functions.contains_key(&address.number())
    }
}

/// CONFIG_ADDRESS, which is only there as a whole: other accesses go to other devices, or nowhere.
struct AddressPort(PciBus);

impl BusDevice for AddressPort {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        match <&mut [u8; 4]>::try_from(&mut *data) {
            Ok(data) => *data = self.0.lock().address.to_le_bytes(),
            Err(_) => data.fill(0xff),
        }
    }

    fn write(&mut self, _: u64, data: &[u8]) {
        if let Ok(data) = <[u8; 4]>::try_from(data) {
            self.0.lock().address = u32::from_le_bytes(data) & ADDRESS_BITS;
        }
    }

    fn retry(&mut self) {
        let functions: Vec<_> = self.0.lock().functions.values().cloned().collect();
        functions.iter().for_each(|function| lock(function).retry());
    }

    fn save(&self) -> Result<Vec<u8>> {
        self.0.save()
    }

    fn restore(&mut self, state: &[u8]) -> Result<()> {
        self.0.restore(state)
    }
}

/// CONFIG_DATA: bytes, words and the double word within one register.
struct DataPort(PciBus);

impl DataPort {
    /// Function, offset, and how many of `len` bytes are within the register.
    fn target(&self, lane: u64, len: usize) -> Option<(u8, usize, usize)> {
        let (number, register) = self.0.selected()?;
        let lane = usize::try_from(lane).ok().filter(|&lane| lane < 4)?;
        Some((number, register + lane, len.min(4 - lane)))
    }
}

impl BusDevice for DataPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((number, at, len)) = self.target(offset, data.len()) {
            self.0.read(number, at, &mut data[..len]);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some((number, at, len)) = self.target(offset, data.len()) {
            self.0.write(number, at, &data[..len]);
        }
    }
}

/// The bus' part of ECAM.
struct Ecam(PciBus);

impl Ecam {
    /// Function, offset in its 4096 bytes, and how many of `len` bytes are its own.
    fn target(offset: u64, len: usize) -> Option<(u8, usize, usize)> {
        let number = u8::try_from(offset / ECAM_FUNCTION).ok()?;
        let (at, left) = (offset % ECAM_FUNCTION, ECAM_FUNCTION - offset % ECAM_FUNCTION);
        Some((number, usize::try_from(at).ok()?, len.min(usize::try_from(left).ok()?)))
    }
}

impl BusDevice for Ecam {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((number, at, len)) = Self::target(offset, data.len()) {
            self.0.read(number, at, &mut data[..len]);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some((number, at, len)) = Self::target(offset, data.len()) {
            self.0.write(number, at, &data[..len]);
        }
    }
}

/// The host bridge as a function: an identity, by which guests find out that there is a bus.
struct Bridge;

impl PciDevice for Bridge {
    fn describe(&self) -> Description {
        Description { identity: BRIDGE, ..Description::default() }
    }
    fn read(&mut self, _: u8, _: u64, _: &mut [u8]) {}
    fn write(&mut self, _: u8, _: u64, _: &[u8]) {}
}
