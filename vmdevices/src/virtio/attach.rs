//! Putting a virtio device on a machine.

use std::sync::{Arc, Mutex};

use vmcore::backend::{DoorbellConfig, IoAddress, IrqRoute};
use vmcore::boot::acpi::{AcpiDevice, AcpiHid, AcpiResource};
use vmcore::{Attach, Error, GuestAddress, IoThread, Machine, Result};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::balloon::Balloon;
use super::block::Disk;
use super::console::VirtioConsole;
use super::device::{Keep, VirtioDevice};
use super::mmio::{Interrupt, NOTIFY, VirtioMmio};
use super::net::Net;
use super::rng::Rng;
use super::runner::Threading;
use super::vsock::Vsock;

/// Bytes of guest-physical addresses for each device.
const WINDOW: u32 = 0x1000;

/// How ACPI names virtio-mmio devices.
const HID: &str = "LNRO0005";

/// `device` behind virtio-mmio, to be attached to a machine.
pub fn mmio(device: impl VirtioDevice + 'static) -> MmioAttach {
    MmioAttach { device: Box::new(device), threading: None }
}

/// A virtio device about to be attached; see [`mmio`]. It gets an I/O thread of its own unless told
/// otherwise, and on a deterministic machine is served on the vCPU's thread.
pub struct MmioAttach {
    device: Box<dyn VirtioDevice>,
    threading: Option<Threading>,
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
        let Self { device, threading } = *self;
        let base = machine.mmio_window(WINDOW.into())?;
        let gsi = machine.allocate_gsi();
        let number = machine.described(HID);
        let name = format!("virtio{number} (type {})", device.device_type().0);
        let threading = match threading {
            Some(Threading::IoThreads(_)) if machine.is_deterministic() => {
                return Err(Error::Config {
                    what: "threading of a virtio device",
                    value: "I/O threads on a deterministic VM".into(),
                    fix: "leave it out: the device is served on the vCPU's thread".into(),
                });
            }
            Some(threading) => threading,
            None if machine.is_deterministic() => Threading::Vcpu,
            None => Threading::IoThreads(vec![machine.io_thread(&format!("virtio{number}"))?]),
        };
        let interrupt = interrupt(machine, gsi)?;
        let queues = device.queue_sizes().len();
        let doorbells = match threading {
            Threading::IoThreads(_) => doorbells(machine, base, queues)?,
            // The write itself must reach the device.
            Threading::Vcpu => (0..queues).map(|_| event()).collect::<Result<_>>()?,
        };
        let memory = machine.memory().clone();
        let mut device = VirtioMmio::with_doorbells(name, device, memory, interrupt, threading, doorbells);
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

/// An event where the machine can take one, and a wire otherwise, which on a machine without
/// interrupt controllers leads nowhere.
fn interrupt(machine: &Machine, gsi: u32) -> Result<Interrupt> {
    if !machine.has_irqchip() {
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
    let at = IoAddress::Mmio(GuestAddress(base.0 + NOTIFY));
    let mut registrations: Vec<Keep> = Vec::new();
    let events = (0..queues as u64)
        .map(|queue| match machine.doorbell(DoorbellConfig { at, width: 4, value: Some(queue) }) {
            Ok(registration) => {
                let event = registration.event().clone();
                registrations.push(Box::new(registration));
                Ok(event)
            }
            Err(Error::Unsupported { .. }) => event(),
            Err(error) => Err(error),
        })
        .collect::<Result<_>>()?;
    machine.keep(registrations);
    Ok(events)
}

fn event() -> Result<Arc<EventFd>> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
        .map(Arc::new)
        .map_err(|error| Error::os("eventfd", "virtio notifications", error))
}
