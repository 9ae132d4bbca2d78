//! The virtio-pci transport (virtio 1.2, section 4.1), without the legacy interface.

mod signals;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use serde::{Deserialize, Serialize};
use vmcore::backend::{DoorbellConfig, IoAddress, Registration};
use vmcore::{Error, GuestAddress, Machine, Platform, Result};
use vmm_sys_util::eventfd::EventFd;

use self::signals::{NO_VECTOR, Signals};
use super::device::{DeviceType, VirtioDevice};
use super::lifecycle::{self, Lifecycle};
use super::runner::{Status, Threading};
use super::{features, set_high, set_low};
use crate::pci::{Bar, Capability, Description, Identity, Interrupts, MsixTable, PciDevice, Programmed};
use crate::saved;

const WHAT: &str = "a virtio-pci device";
const STATE_VERSION: u8 = 2;

/// Vendor and device IDs (4.1.2): the device ID is this and the virtio device type.
const VENDOR: u16 = 0x1af4;
const DEVICE: u16 = 0x1040;
/// No transitional device has it (4.1.2.1).
const REVISION: u8 = 1;
/// Subsystem IDs from here up tell drivers nothing (4.1.2.1).
const SUBSYSTEM: u16 = 0x40;

/// The BAR of everything.
const BAR: u8 = 0;
/// What is where in it. Each part has pages of its own, so that it can be mapped alone.
const COMMON: u64 = 0;
const COMMON_LEN: usize = 0x3c;
const ISR: Range<u64> = 0x1000..0x1004;
const CONFIG: Range<u64> = 0x2000..0x3000;
const NOTIFY: u64 = 0x3000;
/// Bytes of addresses for the notifications of each queue.
const NOTIFY_MULTIPLIER: u32 = 4;
const PAGE: u64 = 0x1000;

/// Capability ID of a vendor's own.
const VENDOR_SPECIFIC: u8 = 9;
/// Types of virtio's capabilities (4.1.4).
mod cap {
    pub(super) const COMMON: u8 = 1;
    pub(super) const NOTIFY: u8 = 2;
    pub(super) const ISR: u8 = 3;
    pub(super) const DEVICE: u8 = 4;
    pub(super) const PCI: u8 = 5;
}
/// Position of the PCI configuration access capability in the list, and offsets in it (4.1.4.9).
const ACCESS: usize = 4;
const ACCESS_BAR: usize = 4;
const ACCESS_OFFSET: Range<usize> = 8..12;
const ACCESS_LEN: Range<usize> = 12..16;
const ACCESS_DATA: Range<usize> = 16..20;

/// Offsets in the common configuration (4.1.4.3).
mod register {
    pub(super) const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub(super) const DEVICE_FEATURE: u64 = 0x04;
    pub(super) const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub(super) const DRIVER_FEATURE: u64 = 0x0c;
    pub(super) const CONFIG_VECTOR: u64 = 0x10;
    pub(super) const NUM_QUEUES: u64 = 0x12;
    pub(super) const STATUS: u64 = 0x14;
    pub(super) const CONFIG_GENERATION: u64 = 0x15;
    pub(super) const QUEUE_SELECT: u64 = 0x16;
    pub(super) const QUEUE_SIZE: u64 = 0x18;
    pub(super) const QUEUE_VECTOR: u64 = 0x1a;
    pub(super) const QUEUE_ENABLE: u64 = 0x1c;
    pub(super) const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub(super) const QUEUE_DESC: u64 = 0x20;
    pub(super) const QUEUE_DRIVER: u64 = 0x28;
    pub(super) const QUEUE_DEVICE: u64 = 0x30;
    pub(super) const QUEUE_RESET: u64 = 0x3a;
}

/// A virtio device behind the registers of virtio-pci: a function for a PCI bus, with a pin and an MSI-X
/// vector for each queue and one for the configuration.
///
/// Register accesses wait for each other and for requests as with [`VirtioMmio`](super::VirtioMmio).
/// Notifications ring events where the platform has doorbells, from when the driver is ready.
#[derive(Debug)]
pub struct VirtioPci {
    lifecycle: Lifecycle,
    signals: Arc<Signals>,
    select: Select,
    access: Access,
    doorbells: Vec<Arc<EventFd>>,
    /// Where doorbells are made, if they shall be.
    platform: Option<Platform>,
    /// Those that there are at present.
    registrations: Vec<Registration>,
    /// Where the BAR is.
    at: Option<GuestAddress>,
    /// The function must leave memory alone: it is no bus master.
    held: bool,
}

/// What the registers of the common configuration are about at present.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct Select {
    device_features: u32,
    driver_features: u32,
    queue: u16,
}

/// The registers of the capability by which a driver without access to BARs reaches them (4.1.4.9).
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct Access {
    bar: u8,
    offset: u32,
    len: u32,
}

#[derive(Debug, Serialize, Deserialize)]
struct State {
    lifecycle: lifecycle::State,
    generation: u8,
    isr: u8,
    vectors: Vec<u16>,
    select: Select,
    access: Access,
}

impl VirtioPci {
    /// `device` with its own notification events: notifications reach it through its BAR. `name` is for
    /// messages, `platform` has the memory.
    ///
    /// # Errors
    /// Where the host is out of descriptors.
    pub fn new(
        name: impl Into<String>,
        device: impl VirtioDevice + 'static,
        platform: &Platform,
        threading: Threading,
    ) -> Result<Self> {
        Self::with_doorbells(name.into(), Box::new(device), platform, threading, false)
    }

    /// As [`VirtioPci::new`], with notifications by doorbells of the platform where that has any, if `ring`.
    pub(super) fn with_doorbells(
        name: String,
        device: Box<dyn VirtioDevice>,
        platform: &Platform,
        threading: Threading,
        ring: bool,
    ) -> Result<Self> {
        let queues = device.queue_sizes().len();
        let doorbells = super::events(queues)?;
        let status = Arc::new(Status::new(name));
        let signals = Arc::new(Signals::new(status.clone(), queues));
        let memory = platform.memory().clone();
        let lifecycle = Lifecycle::new(device, memory, status, signals.clone(), threading, doorbells.clone());
        Ok(Self {
            lifecycle,
            signals,
            select: Select::default(),
            access: Access::default(),
            doorbells,
            platform: ring.then(|| platform.clone()),
            registrations: Vec::new(),
            at: None,
            held: false,
        })
    }

    /// Offers ACCESS_PLATFORM and ORDER_PLATFORM (virtio 1.2, section 6): a driver that accepts them treats the
    /// device as hardware. It reaches memory by the guest's DMA interface, with bounce buffers where the guest
    /// wants those, and orders accesses by barriers for devices. Both cost the guest time, and neither is needed
    /// by a guest that trusts the host with its memory.
    pub fn access_platform(mut self) -> Self {
        self.lifecycle.offer(features::OF_PLATFORM);
        self
    }

    /// Has the device look at its host descriptors, as [`VirtioMmio::poll`](super::VirtioMmio::poll).
    pub fn poll(&self) {
        self.lifecycle.poll();
    }

    /// Lets the device look at the machine it is put on.
    pub(super) fn attached(&mut self, machine: &mut Machine) -> Result<()> {
        self.lifecycle.attached(machine)
    }

    fn queues(&self) -> u64 {
        self.doorbells.len() as u64
    }

    /// How many vectors there are: one for each queue, and one.
    fn vectors(&self) -> u16 {
        u16::try_from(self.queues() + 1).unwrap_or(u16::MAX).min(2048)
    }

    /// Where MSI-X' table begins: behind the notifications.
    fn table(&self) -> u64 {
        (NOTIFY + self.notify_len()).next_multiple_of(PAGE)
    }

    fn notify_len(&self) -> u64 {
        self.queues().max(1) * u64::from(NOTIFY_MULTIPLIER)
    }

    /// Where the pending bits begin.
    fn pending(&self) -> u64 {
        (self.table() + 16 * u64::from(self.vectors())).next_multiple_of(PAGE)
    }

    /// The common configuration as it reads.
    fn common(&self) -> [u8; COMMON_LEN] {
        let device = &self.lifecycle;
        let mut bytes = [0; COMMON_LEN];
        let mut put = |at: u64, value: &[u8]| {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            if let Some(place) = bytes.get_mut(at..at.saturating_add(value.len())) {
                place.copy_from_slice(value);
            }
        };
        put(register::DEVICE_FEATURE_SELECT, &self.select.device_features.to_le_bytes());
        put(register::DEVICE_FEATURE, &device.offered(self.select.device_features).to_le_bytes());
        put(register::DRIVER_FEATURE_SELECT, &self.select.driver_features.to_le_bytes());
        put(register::DRIVER_FEATURE, &device.accepted(self.select.driver_features).to_le_bytes());
        put(register::CONFIG_VECTOR, &self.signals.config_vector.load(Ordering::Acquire).to_le_bytes());
        put(register::NUM_QUEUES, &u16::try_from(self.queues()).unwrap_or(u16::MAX).to_le_bytes());
        put(register::STATUS, &device.status().to_le_bytes()[..1]);
        put(register::CONFIG_GENERATION, &[self.signals.generation.load(Ordering::Acquire)]);
        put(register::QUEUE_SELECT, &self.select.queue.to_le_bytes());
        // Of a queue that there is not, all is 0: a size of 0 says so (4.1.4.3).
        if let Some(queue) = device.queue(self.select.queue.into()) {
            put(register::QUEUE_SIZE, &queue.size.to_le_bytes());
            let vector = self.signals.queue_vectors.get(usize::from(self.select.queue));
            let vector = vector.map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire));
            put(register::QUEUE_VECTOR, &vector.to_le_bytes());
            put(register::QUEUE_ENABLE, &u16::from(queue.ready).to_le_bytes());
            put(register::QUEUE_NOTIFY_OFF, &self.select.queue.to_le_bytes());
            put(register::QUEUE_DESC, &queue.descriptors.to_le_bytes());
            put(register::QUEUE_DRIVER, &queue.driver.to_le_bytes());
            put(register::QUEUE_DEVICE, &queue.device.to_le_bytes());
            // QUEUE_RESET reads 1 only while a reset is under way, which ends before it returns.
        }
        bytes
    }

    /// Takes a write to the common configuration. Drivers must use the width of the field, or halves of those
    /// of 64 bits (4.1.3.1); other writes are nothing.
    fn set_common(&mut self, offset: u64, data: &[u8]) {
        match *data {
            [value] if offset == register::STATUS => self.set_status(value),
            [a, b] => self.set_word(offset, u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.set_double_word(offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, ref high @ ..] if high.len() == 4 && offset >= register::QUEUE_DESC => {
                self.set_double_word(offset, u32::from_le_bytes([a, b, c, d]));
                self.set_common(offset + 4, high);
            }
            _ => {}
        }
    }

    fn set_status(&mut self, value: u8) {
        self.lifecycle.set_status(value.into());
        if value == 0 {
            self.signals.take_isr();
            self.signals.vectors().for_each(|vector| vector.store(NO_VECTOR, Ordering::Release));
        }
        self.ring_doorbells();
    }

    fn set_word(&mut self, offset: u64, value: u16) {
        let queue = u32::from(self.select.queue);
        match offset {
            register::CONFIG_VECTOR => self.set_vector(&self.signals.config_vector, value),
            register::QUEUE_SELECT => self.select.queue = value,
            register::QUEUE_SIZE => {
                if let Some(queue) = self.lifecycle.queue_mut(queue) {
                    queue.size = value;
                }
            }
            register::QUEUE_VECTOR => {
                if let Some(vector) = self.signals.queue_vectors.get(usize::from(self.select.queue)) {
                    self.set_vector(vector, value);
                }
            }
            // 0 is not for drivers to write (4.1.4.3.2).
            register::QUEUE_ENABLE if value == 1 => self.lifecycle.set_ready(queue, true),
            register::QUEUE_RESET if value == 1 => {
                self.lifecycle.reset_queue(queue);
                let vector = self.signals.queue_vectors.get(usize::from(self.select.queue));
                let stopped = self.lifecycle.queue(queue).is_some_and(|queue| !queue.ready);
                if let Some(vector) = vector.filter(|_| stopped) {
                    vector.store(NO_VECTOR, Ordering::Release);
                }
            }
            _ => {}
        }
    }

    /// A vector that there is not cannot be mapped, which the driver reads back (4.1.5.1.2.1).
    fn set_vector(&self, vector: &AtomicU16, value: u16) {
        let value = if value < self.vectors() { value } else { NO_VECTOR };
        vector.store(value, Ordering::Release);
    }

    fn set_double_word(&mut self, offset: u64, value: u32) {
        match offset {
            register::DEVICE_FEATURE_SELECT => self.select.device_features = value,
            register::DRIVER_FEATURE_SELECT => self.select.driver_features = value,
            register::DRIVER_FEATURE => self.lifecycle.accept(self.select.driver_features, value),
            _ => {
                // A queue that is in use keeps its settings, whatever the driver writes.
                let Some(queue) = self.lifecycle.queue_mut(self.select.queue.into()) else { return };
                let (field, high) = match offset & !4 {
                    register::QUEUE_DESC => (&mut queue.descriptors, offset & 4 != 0),
                    register::QUEUE_DRIVER => (&mut queue.driver, offset & 4 != 0),
                    register::QUEUE_DEVICE => (&mut queue.device, offset & 4 != 0),
                    _ => return,
                };
                if high { set_high(field, value) } else { set_low(field, value) }
            }
        }
    }

    /// Has as many doorbells as make sense: all while the device is active and its BAR somewhere, else none.
    fn ring_doorbells(&mut self) {
        let Some(at) = self.at.filter(|_| self.lifecycle.is_active()) else {
            return self.registrations.clear();
        };
        let Some(platform) = self.platform.as_ref().filter(|_| self.registrations.is_empty()) else { return };
        for (event, queue) in self.doorbells.iter().zip(0u64..) {
            let at = GuestAddress(at.0 + NOTIFY + queue * u64::from(NOTIFY_MULTIPLIER));
            // Any value: the queue follows from the address.
            let config = DoorbellConfig { at: IoAddress::Mmio(at), width: 0, value: None };
            match platform.doorbell(config, event.clone()) {
                Ok(registration) => self.registrations.push(registration),
                // Notifications come through the BAR then.
                Err(Error::Unsupported { .. }) => return,
                Err(error) => {
                    return self.signals.status.complain(format_args!("no doorbell at {:#x}: {error}", at.0));
                }
            }
        }
    }
}

impl PciDevice for VirtioPci {
    fn describe(&self) -> Description {
        let kind = self.lifecycle.device_type();
        let number = u16::try_from(kind).unwrap_or(u16::MAX - DEVICE);
        let identity = Identity {
            vendor: VENDOR,
            device: DEVICE.saturating_add(number),
            revision: REVISION,
            class: class(DeviceType(kind)),
            subsystem_vendor: VENDOR,
            subsystem: SUBSYSTEM.saturating_add(number),
        };
        let (table, pending) = (self.table(), self.pending());
        let len = pending + u64::from(self.vectors()).div_ceil(64) * 8;
        let low = |offset: u64| u32::try_from(offset).unwrap_or(u32::MAX);
        let multiplier = NOTIFY_MULTIPLIER.to_le_bytes();
        Description {
            identity,
            bars: vec![Bar::memory64(BAR, len.next_power_of_two())],
            capabilities: vec![
                capability(cap::COMMON, COMMON, COMMON_LEN as u64, &[]),
                capability(cap::ISR, ISR.start, 1, &[]),
                capability(cap::DEVICE, CONFIG.start, CONFIG.end - CONFIG.start, &[]),
                capability(cap::NOTIFY, NOTIFY, self.notify_len(), &multiplier),
                capability(cap::PCI, 0, 0, &[0; 4]),
            ],
            msix: Some(MsixTable {
                vectors: self.vectors(),
                bar: BAR,
                table: low(table),
                pending: low(pending),
            }),
            pin: true,
        }
    }

    fn connect(&mut self, interrupts: Interrupts) {
        // It is connected once.
        drop(self.signals.interrupts.set(interrupts));
    }

    fn read(&mut self, _: u8, offset: u64, data: &mut [u8]) {
        if offset < COMMON_LEN as u64 {
            let common = self.common();
            let from = usize::try_from(offset).ok().and_then(|at| common.get(at..)).unwrap_or_default();
            data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
        } else if offset == ISR.start {
            if let Some(byte) = data.first_mut() {
                *byte = self.signals.take_isr();
            }
        } else if CONFIG.contains(&offset) {
            self.lifecycle.read_config(offset - CONFIG.start, data);
        }
    }

    fn write(&mut self, _: u8, offset: u64, data: &[u8]) {
        if offset < COMMON_LEN as u64 {
            self.set_common(offset, data);
        } else if CONFIG.contains(&offset) {
            self.lifecycle.write_config(offset - CONFIG.start, data);
        } else if let Some(at) = offset.checked_sub(NOTIFY).filter(|&at| at < self.notify_len()) {
            let queue = at / u64::from(NOTIFY_MULTIPLIER);
            self.lifecycle.notify(u32::try_from(queue).unwrap_or(u32::MAX));
        }
    }

    fn read_capability(&mut self, index: usize, offset: usize, data: &mut [u8]) {
        if index != ACCESS {
            return;
        }
        let Access { bar, offset: target, len } = self.access;
        let mut bytes = [0; 20];
        bytes[ACCESS_BAR] = bar;
        bytes[ACCESS_OFFSET].copy_from_slice(&target.to_le_bytes());
        bytes[ACCESS_LEN].copy_from_slice(&len.to_le_bytes());
        let end = offset.saturating_add(data.len());
        if offset < ACCESS_DATA.end
            && end > ACCESS_DATA.start
            && let Some(len) = self.access.width()
        {
            self.read(BAR, target.into(), &mut bytes[ACCESS_DATA][..len]);
        }
        for (at, byte) in (offset..).zip(data) {
            if at == ACCESS_BAR || (ACCESS_OFFSET.start..ACCESS_DATA.end).contains(&at) {
                *byte = bytes[at];
            }
        }
    }

    fn write_capability(&mut self, index: usize, offset: usize, data: &[u8]) {
        if index != ACCESS {
            return;
        }
        let mut value = [0; 4];
        let mut count = 0;
        for (at, &byte) in (offset..).zip(data) {
            let set = |field: &mut u32, at: usize| {
                let mut bytes = field.to_le_bytes();
                bytes[at] = byte;
                *field = u32::from_le_bytes(bytes);
            };
            match at {
                ACCESS_BAR => self.access.bar = byte,
                at if ACCESS_OFFSET.contains(&at) => set(&mut self.access.offset, at - ACCESS_OFFSET.start),
                at if ACCESS_LEN.contains(&at) => set(&mut self.access.len, at - ACCESS_LEN.start),
                at if ACCESS_DATA.contains(&at) => {
                    value[at - ACCESS_DATA.start] = byte;
                    count = at + 1 - ACCESS_DATA.start;
                }
                _ => {}
            }
        }
        // A write of as many bytes as the access is to have, from the first of them.
        if let Some(len) = self.access.width().filter(|&len| count >= len && offset <= ACCESS_DATA.start) {
            self.write(BAR, self.access.offset.into(), &value[..len]);
        }
    }

    fn programmed(&mut self, what: Programmed) {
        match what {
            Programmed::Bar { at, .. } => {
                self.registrations.clear();
                self.at = at;
                self.ring_doorbells();
            }
            // Told with every write of the command register, mostly of what is so already.
            Programmed::Master(master) if master == self.held => {
                self.held = !master;
                self.lifecycle.hold(self.held);
            }
            Programmed::Master(_) => {}
        }
    }

    fn retry(&mut self) {
        self.lifecycle.retry();
    }

    fn save(&self) -> Result<Vec<u8>> {
        let state = State {
            lifecycle: self.lifecycle.save()?,
            generation: self.signals.generation.load(Ordering::Acquire),
            isr: *self.signals.isr(),
            vectors: self.signals.vectors().map(|vector| vector.load(Ordering::Acquire)).collect(),
            select: self.select,
            access: self.access,
        };
        saved::save(WHAT, STATE_VERSION, &state)
    }

    fn restore(&mut self, state: &[u8]) -> Result<()> {
        let state: State = saved::restore(WHAT, STATE_VERSION, state)?;
        let vectors = self.signals.vectors().count();
        if state.vectors.len() != vectors {
            return Err(Error::State {
                what: WHAT,
                expected: format!("{vectors} vectors"),
                found: format!("{}", state.vectors.len()),
            });
        }
        for (vector, value) in self.signals.vectors().zip(state.vectors) {
            self.set_vector(vector, value);
        }
        self.signals.generation.store(state.generation, Ordering::Release);
        *self.signals.isr() = state.isr;
        (self.select, self.access) = (state.select, state.access);
        self.lifecycle.restore(state.lifecycle)?;
        self.ring_doorbells();
        Ok(())
    }
}

impl Access {
    /// How many bytes an access has, where it is one that is allowed (4.1.4.9.1).
    fn width(&self) -> Option<usize> {
        let valid = self.bar == BAR && matches!(self.len, 1 | 2 | 4) && self.offset.is_multiple_of(self.len);
        usize::try_from(self.len).ok().filter(|_| valid)
    }
}

/// A capability of type `kind` for `len` bytes at `offset` of the BAR, without its first two bytes (4.1.4).
fn capability(kind: u8, offset: u64, len: u64, more: &[u8]) -> Capability {
    let word = |value: u64| u32::try_from(value).unwrap_or(u32::MAX).to_le_bytes();
    let whole = u8::try_from(16 + more.len()).unwrap_or(u8::MAX);
    let body = [&[whole, kind, BAR, 0, 0, 0][..], &word(offset), &word(len), more].concat();
    Capability { id: VENDOR_SPECIFIC, body }
}

/// The PCI class of a device type; for people, as drivers go by the IDs (4.1.2).
fn class(kind: DeviceType) -> u32 {
    match kind {
        DeviceType::NET => 0x02_0000,
        DeviceType::BLOCK => 0x01_0000,
        DeviceType::CONSOLE => 0x07_8000,
        _ => 0xff_0000,
    }
}
