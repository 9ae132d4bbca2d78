//! The virtio-mmio transport, version 2 (virtio 1.2, section 4.2).

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Serialize};
use vmcore::backend::Registration;
use vmcore::{BusDevice, GuestMemory, IrqLine, Machine, Result};
use vmm_sys_util::eventfd::EventFd;

use super::device::{Transport, VirtioDevice};
use super::lifecycle::{self, Lifecycle};
use super::runner::{Status, Threading};
use super::{features, set_high, set_low, status};
use crate::saved;

/// Register offsets in bytes (virtio 1.2, table 4.1).
mod register {
    pub(super) const MAGIC: u64 = 0x000;
    pub(super) const VERSION: u64 = 0x004;
    pub(super) const DEVICE_ID: u64 = 0x008;
    pub(super) const VENDOR_ID: u64 = 0x00c;
    pub(super) const DEVICE_FEATURES: u64 = 0x010;
    pub(super) const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub(super) const DRIVER_FEATURES: u64 = 0x020;
    pub(super) const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub(super) const QUEUE_SEL: u64 = 0x030;
    pub(super) const QUEUE_SIZE_MAX: u64 = 0x034;
    pub(super) const QUEUE_SIZE: u64 = 0x038;
    pub(super) const QUEUE_READY: u64 = 0x044;
    pub(super) const QUEUE_NOTIFY: u64 = 0x050;
    pub(super) const INTERRUPT_STATUS: u64 = 0x060;
    pub(super) const INTERRUPT_ACK: u64 = 0x064;
    pub(super) const STATUS: u64 = 0x070;
    pub(super) const QUEUE_DESC_LOW: u64 = 0x080;
    pub(super) const QUEUE_DESC_HIGH: u64 = 0x084;
    pub(super) const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub(super) const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub(super) const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub(super) const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub(super) const SHM_LEN_LOW: u64 = 0x0b0;
    pub(super) const SHM_BASE_HIGH: u64 = 0x0bc;
    pub(super) const QUEUE_RESET: u64 = 0x0c0;
    pub(super) const CONFIG_GENERATION: u64 = 0x0fc;
    pub(super) const CONFIG: u64 = 0x100;
}

/// "virt".
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "vmco".
const VENDOR: u32 = u32::from_le_bytes(*b"vmco");

const WHAT: &str = "a virtio-mmio device";
const STATE_VERSION: u8 = 2;

const USED_BUFFER: u32 = 1;
const CONFIG_CHANGE: u32 = 2;

/// The offset of the register that notifies, for doorbells.
pub(super) const NOTIFY: u64 = register::QUEUE_NOTIFY;

/// How a device interrupts its driver. Either way it is an edge.
#[derive(Debug)]
pub enum Interrupt {
    /// Pulses a wire.
    Line(IrqLine),
    /// Writes an event ([`vmcore::Machine::irq_event`]), where that pays.
    Event(Registration),
}

impl Interrupt {
    fn raise(&self) {
        match self {
            Interrupt::Line(line) => line.pulse(),
            Interrupt::Event(event) => {
                if let Err(error) = event.event().write(1) {
                    log::error!("virtio interrupt lost: {error}");
                }
            }
        }
    }
}

/// What vCPUs and workers share of the transport.
#[derive(Debug)]
struct Signals {
    status: Arc<Status>,
    pending: AtomicU32,
    generation: AtomicU32,
    interrupt: Interrupt,
}

impl Signals {
    fn raise(&self, reason: u32) {
        self.pending.fetch_or(reason, Ordering::AcqRel);
        self.interrupt.raise();
    }
}

impl Transport for Signals {
    fn used(&self, _: u16) {
        self.raise(USED_BUFFER);
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        // A driver that is not ready yet must not be interrupted (virtio 1.2, section 3.1.1).
        if self.status.has(status::DRIVER_OK) {
            self.raise(CONFIG_CHANGE);
        }
    }
}

/// A virtio device behind the registers of virtio-mmio: a device of 0x1000 bytes for the MMIO bus.
///
/// Register accesses wait for each other, and never for a request, with two exceptions the
/// specification asks for: resetting the device or a queue waits for the request in service.
#[derive(Debug)]
pub struct VirtioMmio {
    lifecycle: Lifecycle,
    signals: Arc<Signals>,
    device_features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
}

#[derive(Debug, Serialize, Deserialize)]
struct State {
    lifecycle: lifecycle::State,
    pending: u32,
    generation: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
}

impl VirtioMmio {
    /// `device` with its own notification events: writes of QueueNotify reach it through the bus.
    /// `name` is for messages.
    ///
    /// # Errors
    /// Where the host is out of descriptors.
    pub fn new(
        name: impl Into<String>,
        device: impl VirtioDevice + 'static,
        memory: GuestMemory,
        interrupt: Interrupt,
        threading: Threading,
    ) -> Result<Self> {
        let doorbells = super::events(device.queue_sizes().len())?;
        Ok(Self::with_doorbells(name.into(), Box::new(device), memory, interrupt, threading, doorbells))
    }

    /// `device`, whose queue `n` is notified by `doorbells[n]`, which must be as many as queues.
    pub(super) fn with_doorbells(
        name: String,
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        interrupt: Interrupt,
        threading: Threading,
        doorbells: Vec<Arc<EventFd>>,
    ) -> Self {
        let status = Arc::new(Status::new(name));
        let (pending, generation) = (AtomicU32::new(0), AtomicU32::new(0));
        let signals = Arc::new(Signals { status: status.clone(), pending, generation, interrupt });
        let lifecycle = Lifecycle::new(device, memory, status, signals.clone(), threading, doorbells);
        Self { lifecycle, signals, device_features_sel: 0, driver_features_sel: 0, queue_sel: 0 }
    }

    /// Offers ACCESS_PLATFORM and ORDER_PLATFORM (virtio 1.2, section 6): a driver that accepts them treats the
    /// device as hardware. It reaches memory by the guest's DMA interface, with bounce buffers where the guest
    /// wants those, and orders accesses by barriers for devices. Both cost the guest time, and neither is needed
    /// by a guest that trusts the host with its memory.
    pub fn access_platform(mut self) -> Self {
        self.lifecycle.offer(features::OF_PLATFORM);
        self
    }

    /// Has the device look at its host descriptors, on the caller's thread: for
    /// [`Threading::Vcpu`], where nobody else does.
    pub fn poll(&self) {
        self.lifecycle.poll();
    }

    /// Lets the device look at the machine it is put on.
    pub(super) fn attached(&mut self, machine: &mut Machine) -> Result<()> {
        self.lifecycle.attached(machine)
    }

    fn register(&self, offset: u64) -> u32 {
        let device = &self.lifecycle;
        match offset {
            register::MAGIC => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => device.device_type(),
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => device.offered(self.device_features_sel),
            register::QUEUE_SIZE_MAX => device.most(self.queue_sel).into(),
            register::QUEUE_READY => device.queue(self.queue_sel).is_some_and(|queue| queue.ready).into(),
            register::INTERRUPT_STATUS => self.signals.pending.load(Ordering::Acquire),
            register::STATUS => device.status(),
            // There are no shared memory regions: length and base are all ones (section 4.2.2.1).
            register::SHM_LEN_LOW..=register::SHM_BASE_HIGH => u32::MAX,
            register::CONFIG_GENERATION => self.signals.generation.load(Ordering::Acquire),
            // QueueReset reads 1 only while a reset is under way, which ends before it returns.
            _ => 0,
        }
    }

    fn set_register(&mut self, offset: u64, value: u32) {
        let device = &mut self.lifecycle;
        match offset {
            register::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            register::DRIVER_FEATURES => device.accept(self.driver_features_sel, value),
            register::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            register::QUEUE_SEL => self.queue_sel = value,
            register::QUEUE_READY => device.set_ready(self.queue_sel, value & 1 == 1),
            register::QUEUE_NOTIFY => device.notify(value),
            register::INTERRUPT_ACK => {
                self.signals.pending.fetch_and(!value, Ordering::AcqRel);
            }
            register::STATUS => {
                device.set_status(value);
                if value == 0 {
                    self.signals.pending.store(0, Ordering::Release);
                }
            }
            register::QUEUE_RESET if value & 1 == 1 => device.reset_queue(self.queue_sel),
            _ => self.set_queue_register(offset, value),
        }
    }

    fn set_queue_register(&mut self, offset: u64, value: u32) {
        // A queue that is in use keeps its settings, whatever the driver writes.
        let Some(queue) = self.lifecycle.queue_mut(self.queue_sel) else { return };
        match offset {
            // Sizes beyond 16 bits are as invalid as 0, and found out when the queue is used.
            register::QUEUE_SIZE => queue.size = u16::try_from(value).unwrap_or(0),
            register::QUEUE_DESC_LOW => set_low(&mut queue.descriptors, value),
            register::QUEUE_DESC_HIGH => set_high(&mut queue.descriptors, value),
            register::QUEUE_DRIVER_LOW => set_low(&mut queue.driver, value),
            register::QUEUE_DRIVER_HIGH => set_high(&mut queue.driver, value),
            register::QUEUE_DEVICE_LOW => set_low(&mut queue.device, value),
            register::QUEUE_DEVICE_HIGH => set_high(&mut queue.device, value),
            _ => {}
        }
    }
}

impl BusDevice for VirtioMmio {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            self.lifecycle.read_config(offset, data);
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            // Drivers must use aligned accesses of 32 bits here (section 4.2.2.2); others read 0.
            data.copy_from_slice(&self.register(offset).to_le_bytes());
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            self.lifecycle.write_config(offset, data);
        } else if let (Ok(bytes), true) = (<[u8; 4]>::try_from(data), offset.is_multiple_of(4)) {
            self.set_register(offset, u32::from_le_bytes(bytes));
        }
    }

    fn retry(&mut self) {
        self.lifecycle.retry();
    }

    fn save(&self) -> Result<Vec<u8>> {
        let state = State {
            lifecycle: self.lifecycle.save()?,
            pending: self.signals.pending.load(Ordering::Acquire),
            generation: self.signals.generation.load(Ordering::Acquire),
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            queue_sel: self.queue_sel,
        };
        saved::save(WHAT, STATE_VERSION, &state)
    }

    fn restore(&mut self, state: &[u8]) -> Result<()> {
        let state: State = saved::restore(WHAT, STATE_VERSION, state)?;
        self.signals.generation.store(state.generation, Ordering::Release);
        self.signals.pending.store(state.pending, Ordering::Release);
        self.device_features_sel = state.device_features_sel;
        self.driver_features_sel = state.driver_features_sel;
        self.queue_sel = state.queue_sel;
        self.lifecycle.restore(state.lifecycle)?;
        if state.pending != 0 {
            // The edge may have been on its way.
            self.signals.interrupt.raise();
        }
        Ok(())
    }
}
