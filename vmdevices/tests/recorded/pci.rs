//! A PCI bus like the fuzz target's, which writes down how its guest reaches it.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use vmcore::boot::acpi::PciHost;
use vmcore::boot::layout::{ECAM, PCI_GSIS, PCI_WINDOW};
use vmcore::memory::GpaRange;
use vmcore::{
    Bus, BusDevice, GuestAddress, GuestMemory, IrqSink, Machine, Msi, Platform, Result, SharedDevice,
};
use vmdevices::Rng;
use vmdevices::pci::PciBus;
use vmdevices::virtio::{Threading, VirtioPci};

use super::fuzz::STEP;
use super::recorder::pieces;
use super::seeds::MOST;

/// Slots of the bus that are worth it: those of the bridge and of the two devices, and an empty one.
const SLOTS: u64 = 4;

/// Kinds of step (`fuzz/src/pci.rs`).
const CONFIG_WRITE: u8 = 0;
const ADDRESS: u8 = 2;
const DATA_WRITE: u8 = 3;
const BAR_WRITE: u8 = 5;
const MEMORY: u8 = 7;

/// Registers of virtio's common configuration (virtio 1.2, section 4.1.4.3).
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_DESC: u64 = 0x20;
const QUEUE_END: u64 = 0x38;
const NOTIFICATIONS: std::ops::Range<u64> = 0x3000..0x4000;

/// What the guest did, as steps of the fuzz target.
#[derive(Clone, Default)]
pub struct Log(Arc<Mutex<Steps>>);

#[derive(Default)]
struct Steps {
    bytes: Vec<u8>,
    /// CONFIG_ADDRESS.
    address: u32,
    queues: [Queue; SLOTS as usize],
}

/// The queue of an entropy source: table and rings as the guest has them.
#[derive(Clone, Copy, Default)]
struct Queue {
    size: u16,
    addresses: [u64; 3],
    offered: u16,
}

impl Log {
    /// An input of what was recorded up to now, with one of each read or without.
    pub fn input(&self, reads: bool) -> Vec<u8> {
        let steps = self.0.lock().unwrap();
        let (mut input, mut seen) = (Vec::new(), BTreeSet::new());
        // What CONFIG_ADDRESS is in the input, and is to be before the next access to CONFIG_DATA.
        let (mut selected, mut wanted) = (&[][..], &[][..]);
        for step in steps.bytes.chunks_exact(STEP) {
            let what = step[0];
            if what == ADDRESS {
                wanted = step;
                continue;
            }
            let data = [DATA_WRITE, DATA_WRITE + 1].contains(&what);
            let read = [CONFIG_WRITE + 1, DATA_WRITE + 1, BAR_WRITE + 1].contains(&what);
            if read && !(reads && seen.insert((data.then_some(wanted), step))) {
                continue;
            }
            if data && selected != wanted {
                input.extend(wanted);
                selected = wanted;
            }
            input.extend(step);
        }
        input.truncate(MOST);
        input
    }
}

impl Steps {
    fn push(&mut self, what: u8, slot: u64, offset: u64, data: &[u8]) {
        let mut step = [0; STEP];
        let [low, high, ..] = offset.to_le_bytes();
        let width = u8::try_from(data.len().trailing_zeros()).unwrap();
        step[..4].copy_from_slice(&[what, u8::try_from(slot).unwrap() | width << 2, low, high]);
        let len = data.len().min(4);
        step[4..4 + len].copy_from_slice(&data[..len]);
        // Over and over while it waits.
        if self.bytes.len() < 4 * STEP || !self.bytes.rchunks_exact(STEP).take(4).any(|last| last == step) {
            self.bytes.extend(step);
        }
    }

    /// An access to the BAR of the function in `slot`. Its queue lies elsewhere in the fuzz target.
    fn bar(&mut self, memory: &GuestMemory, slot: u64, offset: u64, data: &[u8], write: bool) {
        let queue = &mut self.queues[usize::try_from(slot).unwrap()];
        let mut value = data.to_vec();
        if write && offset == QUEUE_SIZE {
            queue.size = u16::from_le_bytes([data[0], data[1]]);
            *queue = Queue { size: queue.size, ..Queue::default() };
        } else if write && (QUEUE_DESC..QUEUE_END).contains(&offset) {
            let which = (offset - QUEUE_DESC) / 8;
            let part = u64::from(u32::from_le_bytes(data.try_into().unwrap()));
            let address = &mut queue.addresses[usize::try_from(which).unwrap()];
            *address |= part << (offset % 8 * 8);
            let low = u32::try_from(ours(slot, which)).unwrap();
            value = if offset.is_multiple_of(8) { low.to_le_bytes() } else { [0; 4] }.to_vec();
        } else if write && NOTIFICATIONS.contains(&offset) {
            self.offered(memory, slot);
        }
        self.push(if write { BAR_WRITE } else { BAR_WRITE + 1 }, slot, offset, &value);
    }

    /// The guest's chains, written to where the fuzz target has them.
    fn offered(&mut self, memory: &GuestMemory, slot: u64) {
        let queue = self.queues[usize::try_from(slot).unwrap()];
        let [table, available, _] = queue.addresses;
        let index: u16 = memory.load(GuestAddress(available + 2)).unwrap();
        let mut at = queue.offered;
        while at != index {
            let place = 4 + 2 * u64::from(at % queue.size);
            let head: u16 = memory.load(GuestAddress(available + place)).unwrap();
            let (_, pieces) = pieces(memory, table, head);
            let buffer = u32::try_from(ours(slot, 3)).unwrap();
            let descriptor = [buffer, 0, pieces[0].len, 2];
            for (word, value) in (0..).zip(descriptor) {
                self.push(MEMORY, 0, ours(slot, 0) + 16 * u64::from(head) + 4 * word, &value.to_le_bytes());
            }
            self.push(MEMORY, 0, ours(slot, 1) + place, &[head.to_le_bytes(), [0; 2]].concat());
            at = at.wrapping_add(1);
            self.push(MEMORY, 0, ours(slot, 1), &[[0; 2], at.to_le_bytes()].concat());
        }
        self.queues[usize::try_from(slot).unwrap()].offered = index;
    }
}

/// Where the fuzz target has the table, the rings and the buffer of a slot's queue.
fn ours(slot: u64, which: u64) -> u64 {
    0x1000 * (1 + which) + 0x4000 * (slot - 1)
}

/// Interrupts of the machine, for a platform whose bus is another one.
struct Sink(Platform);

impl IrqSink for Sink {
    fn set_irq(&self, gsi: u32, high: bool) -> Result<()> {
        // Pulses are all there is: messages are used.
        if high {
            self.0.irq_line(gsi).pulse();
        }
        Ok(())
    }
    fn send_msi(&self, msi: Msi) -> Result<()> {
        self.0.send_msi(msi)
    }
}

/// Puts a bus with two entropy sources on a machine, as the fuzz target has them, and records into `log`.
pub fn attach(log: &Log) -> impl FnOnce(&mut Machine) -> Result<()> + Send + use<> {
    let log = log.clone();
    move |machine: &mut Machine| {
        let bars = Bus::new("MMIO window");
        let sink = Arc::new(Sink(machine.platform()));
        let platform = Platform::new(machine.memory().clone(), &bars, sink);
        let bus = PciBus::new(platform.clone(), &[PCI_WINDOW], PCI_GSIS)?;
        for name in ["first", "second"] {
            bus.add(None, Box::new(VirtioPci::new(name, Rng::new(), &platform, Threading::Vcpu)?))?;
        }
        let ecam = GpaRange { base: ECAM.base, len: 1 << 20 };
        let (address, data) = bus.type1();
        let memory = machine.memory().clone();
        let shared = |what, device| -> SharedDevice {
            let (log, memory) = (log.clone(), memory.clone());
            Arc::new(Mutex::new(Recorder { what, device, log, memory }))
        };
        machine.ports(0xcf8, 1, shared(What::Address, address))?;
        machine.ports(0xcfc, 4, shared(What::Data, data))?;
        machine.mmio(GuestAddress(ecam.base), ecam.len, shared(What::Ecam, bus.ecam()))?;
        let config = bus.ecam();
        let window = Arc::new(Mutex::new(Window(bars)));
        let window = shared(What::Bars(config), window);
        machine.mmio(GuestAddress(PCI_WINDOW.base), PCI_WINDOW.len, window)?;
        machine.describe_pci(PciHost {
            ecam,
            last_bus: 0,
            memory: vec![PCI_WINDOW],
            ports: None,
            gsis: PCI_GSIS,
        })
    }
}

/// All addresses that BARs may have.
struct Window(Bus);

impl BusDevice for Window {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if !self.0.reader().read(PCI_WINDOW.base + offset, data) {
            data.fill(0xff);
        }
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        self.0.reader().write(PCI_WINDOW.base + offset, data);
    }
}

enum What {
    Address,
    Data,
    Ecam,
    /// With a way to configuration space, to find whose BAR it is.
    Bars(SharedDevice),
}

/// In front of one of the ways to the bus.
struct Recorder {
    what: What,
    device: SharedDevice,
    log: Log,
    memory: GuestMemory,
}

impl Recorder {
    fn record(&self, offset: u64, data: &[u8], write: bool) {
        // Reads follow writes in the numbers of steps.
        let way = |what: u8| if write { what } else { what + 1 };
        match &self.what {
            What::Bars(config) => {
                let found = (1..=2).find_map(|slot| {
                    let at = bar(config, slot);
                    let offset = (PCI_WINDOW.base + offset).checked_sub(at)?;
                    (offset < 0x8000).then_some((slot, offset))
                });
                let Some((slot, offset)) = found else { return };
                self.log.0.lock().unwrap().bar(&self.memory, slot, offset, data, write);
            }
            What::Address => {
                let mut steps = self.log.0.lock().unwrap();
                if let (true, Ok(value)) = (write, <[u8; 4]>::try_from(data)) {
                    steps.address = u32::from_le_bytes(value);
                    if u64::from(steps.address >> 11 & 31) < SLOTS {
                        steps.push(ADDRESS, 0, 0, data);
                    }
                }
            }
            What::Data => {
                let mut steps = self.log.0.lock().unwrap();
                if u64::from(steps.address >> 11 & 31) < SLOTS {
                    steps.push(way(DATA_WRITE), 0, offset, data);
                }
            }
            What::Ecam => {
                let (slot, function, at) = (offset >> 15 & 31, offset >> 12 & 7, offset & 0xfff);
                if slot < SLOTS && function == 0 && at < 0x110 {
                    self.log.0.lock().unwrap().push(way(CONFIG_WRITE), slot, at, data);
                }
            }
        }
    }
}

impl BusDevice for Recorder {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.record(offset, data, false);
        self.device.lock().unwrap().read(offset, data);
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        self.record(offset, data, true);
        self.device.lock().unwrap().write(offset, data);
    }
}

/// Where the BAR of the function in `slot` is programmed to be.
fn bar(config: &SharedDevice, slot: u64) -> u64 {
    let mut bytes = [0; 8];
    let (low, high) = bytes.split_at_mut(4);
    let mut config = config.lock().unwrap();
    config.read((slot << 15) + 0x10, low);
    config.read((slot << 15) + 0x14, high);
    u64::from_le_bytes(bytes) & !15
}
