//! Putting a virtio device on a machine.

use std::sync::{Arc, Mutex};

use vmcore::backend::{DoorbellConfig, IoAddress, IrqRoute};
use vmcore::boot::acpi::{AcpiDevice, AcpiHid, AcpiResource};
use vmcore::{Attach, Error, GuestAddress, IoThread, Machine, Result};
use vmm_sys_util::eventfd::EventFd;

use super::balloon::Balloon;
use super::block::Disk;
use super::console::VirtioConsole;
use super::device::{Keep, VirtioDevice};
use super::events;
use super::mmio::{Interrupt, NOTIFY, VirtioMmio};
use super::net::Net;
use super::pci::VirtioPci;
use super::rng::Rng;
use super::runner::Threading;
use super::vsock::Vsock;
use crate::pci::{PciAddress, PciBus};

/// Bytes of guest-physical addresses for each device.
const WINDOW: u32 = 0x1000;

/// How ACPI names virtio-mmio devices.
const HID: &str = "LNRO0005";

/// `device` behind virtio-mmio, to be attached to a machine.
pub fn mmio(device: impl VirtioDevice + 'static) -> MmioAttach {
    MmioAttach { device: Box::new(device), threading: None, access_platform: false }
}

/// A virtio device about to be attached; see [`mmio`]. It gets I/O threads of its own unless told
/// otherwise, and on a deterministic machine is served on the vCPU's thread.
pub struct MmioAttach {
    device: Box<dyn VirtioDevice>,
    threading: Option<Threading>,
    access_platform: bool,
}

impl MmioAttach {
    /// Serves the device on `thread`, with others.
    pub fn on(self, thread: &IoThread) -> Self {
        self.threading(Threading::IoThreads(vec![thread.clone()]))
    }

    /// Serves the device as `threading` says.
    pub fn threading(mut self, threading: Threading) -> Self {
        self.threading = Some(threading);
        self
    }

    /// Offers ACCESS_PLATFORM and ORDER_PLATFORM, as [`VirtioMmio::access_platform`].
    pub fn access_platform(mut self) -> Self {
        self.access_platform = true;
        self
    }
}

impl std::fmt::Debug for MmioAttach {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MmioAttach")
            .field("type", &self.device.device_type())
            .field("threading", &self.threading)
            .finish_non_exhaustive()
    }
}

/// Behind virtio-mmio, with an I/O thread of its own: what [`mmio`] gives without more ado.
macro_rules! attach_by_mmio {
    ($($device:ty),*) => {$(
        impl Attach for $device {
            fn attach(self: Box<Self>, machine: &mut Machine) -> Result<()> {
                Box::new(mmio(*self)).attach(machine)
            }
        }
    )*};
}

attach_by_mmio!(Balloon, Disk, Net, Rng, VirtioConsole, Vsock);

impl Attach for MmioAttach {
    fn attach(self: Box<Self>, machine: &mut Machine) -> Result<()> {
        let Self { device, threading, access_platform } = *self;
        let base = machine.mmio_window(WINDOW.into())?;
        let gsi = machine.allocate_gsi();
        let number = machine.described(HID);
        let name = format!("virtio{number} (type {})", device.device_type().0);
        let threading = served(machine, threading, device.threads(), &format!("virtio{number}"))?;
        let interrupt = interrupt(machine, gsi)?;
        let queues = device.queue_sizes().len();
        let doorbells = match threading {
            Threading::IoThreads(_) => doorbells(machine, base, queues)?,
            // The write itself must reach the device.
            Threading::Vcpu => events(queues)?,
        };
        let memory = machine.memory().clone();
        let mut device = VirtioMmio::with_doorbells(name, device, memory, interrupt, threading, doorbells);
        if access_platform {
            device = device.access_platform();
        }
        device.attached(machine)?;
        machine.mmio(base, WINDOW.into(), Arc::new(Mutex::new(device)))?;
        machine.describe(AcpiDevice {
            name: format!("VR{:02X}", number % 0x100),
            hid: AcpiHid::Text(HID.into()),
            uid: number,
            resources: vec![
                AcpiResource::Memory { base: base.0, len: WINDOW },
                AcpiResource::Irq { gsi, level: false, shared: true },
            ],
        });
        Ok(())
    }
}

/// An event where the machine can take one and that is the shorter way, and a wire otherwise, which on a
/// machine without interrupt controllers leads nowhere.
fn interrupt(machine: &Machine, gsi: u32) -> Result<Interrupt> {
    if !machine.has_irqchip() || !machine.irq_events_pay() {
        return Ok(Interrupt::Line(machine.irq_line(gsi)));
    }
    match machine.irq_event(IrqRoute::Gsi(gsi)) {
        Ok(event) => Ok(Interrupt::Event(event)),
        Err(Error::Unsupported { .. }) => Ok(Interrupt::Line(machine.irq_line(gsi))),
        Err(error) => Err(error),
    }
}

/// One event for each queue, rung by the guest's write where the backend can, and by the device's
/// own register otherwise.
fn doorbells(machine: &mut Machine, base: GuestAddress, queues: usize) -> Result<Vec<Arc<EventFd>>> {
    let (at, platform) = (IoAddress::Mmio(GuestAddress(base.0 + NOTIFY)), machine.platform());
    let mut registrations: Vec<Keep> = Vec::new();
    let events = events(queues)?;
    for (event, queue) in events.iter().zip(0u64..) {
        match platform.doorbell(DoorbellConfig { at, width: 4, value: Some(queue) }, event.clone()) {
            Ok(registration) => registrations.push(Box::new(registration)),
            Err(Error::Unsupported { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    machine.keep(registrations);
    Ok(events)
}

/// Where a device is served: as chosen, else on I/O threads of its own, `count` and at least one, called
/// after `name`.
fn served(machine: &mut Machine, choice: Option<Threading>, count: usize, name: &str) -> Result<Threading> {
    match choice {
        Some(Threading::IoThreads(_)) if machine.is_deterministic() => Err(Error::Config {
            what: "threading of a virtio device",
            value: "I/O threads on a deterministic VM".into(),
            fix: "leave it out: the device is served on the vCPU's thread".into(),
        }),
        Some(threading) => Ok(threading),
        None if machine.is_deterministic() => Ok(Threading::Vcpu),
        None => {
            let first = machine.io_thread(name);
            let more = (1..count).map(|n| machine.io_thread(&format!("{name}.{n}")));
            std::iter::once(first).chain(more).collect::<Result<_>>().map(Threading::IoThreads)
        }
    }
}

/// `device` behind virtio-pci, to be attached to a machine, which gets a PCI bus with its first PCI device.
pub fn pci(device: impl VirtioDevice + 'static) -> PciAttach {
    PciAttach { device: Box::new(device), threading: None, access_platform: false, address: None }
}

/// A virtio device about to be attached; see [`pci`]. It gets the first free slot and is served as
/// [`MmioAttach`] says, unless told otherwise.
#[must_use = "attach it to a VmBuilder"]
pub struct PciAttach {
    device: Box<dyn VirtioDevice>,
    threading: Option<Threading>,
    access_platform: bool,
    address: Option<PciAddress>,
}

impl PciAttach {
    /// Serves the device on `thread`, with others.
    pub fn on(self, thread: &IoThread) -> Self {
        self.threading(Threading::IoThreads(vec![thread.clone()]))
    }

    /// Serves the device as `threading` says.
    pub fn threading(mut self, threading: Threading) -> Self {
        self.threading = Some(threading);
        self
    }

    /// Offers ACCESS_PLATFORM and ORDER_PLATFORM, as [`VirtioPci::access_platform`].
    pub fn access_platform(mut self) -> Self {
        self.access_platform = true;
        self
    }

    /// Puts the device into `slot`, 1 to 31, as its function 0.
    pub fn slot(self, slot: u8) -> Self {
        self.at(PciAddress::slot(slot))
    }

    /// Puts the device at `address`. Function 0 of a slot is to be attached before the others.
    pub fn at(mut self, address: PciAddress) -> Self {
        self.address = Some(address);
        self
    }
}

impl std::fmt::Debug for PciAttach {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PciAttach")
            .field("type", &self.device.device_type())
            .field("threading", &self.threading)
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl Attach for PciAttach {
    fn attach(self: Box<Self>, machine: &mut Machine) -> Result<()> {
        let Self { device, threading, access_platform, address } = *self;
        let bus = PciBus::of(machine)?;
        let address = bus.free(address)?;
        let name = format!("virtio {address} (type {})", device.device_type().0);
        let threading = served(machine, threading, device.threads(), &format!("virtio {address}"))?;
        let ring = matches!(threading, Threading::IoThreads(_));
        let mut device = VirtioPci::with_doorbells(name, device, &machine.platform(), threading, ring)?;
        if access_platform {
            device = device.access_platform();
        }
        device.attached(machine)?;
        bus.add(Some(address), Box::new(device)).map(drop)
    }
}
