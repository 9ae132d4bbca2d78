//! The life of a virtio device under any transport: negotiation, queues, activation, reset, state
//! (virtio 1.2, sections 2.1 and 3.1). A transport is a register layout over this.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmcore::{Error, GuestMemory, Machine, Result};
use vmm_sys_util::eventfd::EventFd;

use super::device::{Activation, Transport, VirtioDevice};
use super::queue::{Position, QueueError, QueueSetup, VirtQueue};
use super::runner::{Runner, Status, Threading};
use super::{features, status};

/// A device between its driver's register accesses and its workers.
pub(super) struct Lifecycle {
    device: Box<dyn VirtioDevice>,
    memory: GuestMemory,
    status: Arc<Status>,
    transport: Arc<dyn Transport>,
    threading: Threading,
    /// One event for each queue.
    doorbells: Vec<Arc<EventFd>>,
    /// The largest size of each queue.
    sizes: Vec<u16>,
    offered: u64,
    accepted: u64,
    queues: Vec<QueueSetup>,
    runner: Option<Runner>,
}

/// All of it that a snapshot needs.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct State {
    device_type: u32,
    status: u32,
    accepted: u64,
    queues: Vec<QueueSetup>,
    positions: Vec<Position>,
    device: Vec<u8>,
}

impl Lifecycle {
    pub(super) fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        status: Arc<Status>,
        transport: Arc<dyn Transport>,
        threading: Threading,
        doorbells: Vec<Arc<EventFd>>,
    ) -> Self {
        let sizes = device.queue_sizes();
        let queues = sizes.iter().map(|&size| QueueSetup { size, ..QueueSetup::default() }).collect();
        let offered = device.features() | features::OF_TRANSPORT;
        let accepted = 0;
        let runner = None;
        Self {
            device,
            memory,
            status,
            transport,
            threading,
            doorbells,
            sizes,
            offered,
            accepted,
            queues,
            runner,
        }
    }

    pub(super) fn attached(&mut self, machine: &mut Machine) -> Result<()> {
        self.device.attached(machine)
    }

    pub(super) fn device_type(&self) -> u32 {
        self.device.device_type().0
    }

    /// Offers `features` of the transport besides those that it always does. Before the driver looks.
    pub(super) fn offer(&mut self, features: u64) {
        self.offered |= features;
    }

    /// 32 of the offered feature bits, from bit `32 * bank`.
    pub(super) fn offered(&self, bank: u32) -> u32 {
        word(self.offered, bank)
    }

    /// 32 of the feature bits that the driver has accepted, from bit `32 * bank`.
    pub(super) fn accepted(&self, bank: u32) -> u32 {
        word(self.accepted, bank)
    }

    /// Whether workers serve the queues.
    pub(super) fn is_active(&self) -> bool {
        self.runner.is_some()
    }

    /// The driver accepts 32 feature bits, from bit `32 * bank`.
    pub(super) fn accept(&mut self, bank: u32, bits: u32) {
        let now = self.status.get();
        if now & (status::DRIVER | status::FEATURES_OK) != status::DRIVER {
            return self.status.complain(format_args!("features accepted out of order (status {now:#x})"));
        }
        match bank {
            0 => self.accepted = self.accepted & !0xffff_ffff | u64::from(bits),
            1 => self.accepted = self.accepted & 0xffff_ffff | u64::from(bits) << 32,
            // Virtio 1.2, section 2.2: there are no features beyond, so none may be accepted.
            _ if bits != 0 => self.status.complain(format_args!("feature bank {bank} does not exist")),
            _ => {}
        }
    }

    pub(super) fn status(&self) -> u32 {
        self.status.get()
    }

    /// The driver writes the status. 0 resets the device, and waits for a request that is being
    /// served: afterwards nothing of the driver's memory is touched.
    pub(super) fn set_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let old = self.status.get();
        let new = value & status::OF_DRIVER & !old;
        if new & status::FEATURES_OK != 0 {
            let unknown = self.accepted & !self.offered;
            if old & status::DRIVER == 0 && value & status::DRIVER == 0 {
                return self.status.complain(format_args!("status {value:#x} written before DRIVER"));
            }
            if unknown != 0 || self.accepted & features::VERSION_1 == 0 {
                self.status.complain(format_args!(
                    "features {:#x} refused: offered are {:#x}, and VERSION_1 (bit 32) is needed",
                    self.accepted, self.offered
                ));
                self.status.set(new & !(status::FEATURES_OK | status::DRIVER_OK));
                return;
            }
        }
        if new & status::DRIVER_OK != 0 {
            if (old | new) & status::FEATURES_OK == 0 {
                return self.status.complain(format_args!("DRIVER_OK written before FEATURES_OK"));
            }
            self.status.set(new);
            return self.activate(&[]);
        }
        self.status.set(new);
    }

    fn reset(&mut self) {
        self.runner = None;
        self.accepted = 0;
        for (setup, &size) in self.queues.iter_mut().zip(&self.sizes) {
            *setup = QueueSetup { size, ..QueueSetup::default() };
        }
        self.status.replace(0);
    }

    fn activate(&mut self, positions: &[Position]) {
        match self.start(positions) {
            Ok(runner) => self.runner.insert(runner).notify_all(),
            Err(error) => self.status.fail(&error, &*self.transport),
        }
    }

    fn start(&mut self, positions: &[Position]) -> Result<Runner> {
        let queues = (0..self.queues.len())
            .filter_map(|index| u16::try_from(index).ok())
            .map(|index| {
                self.virt_queue(index, positions.get(usize::from(index)).cloned().unwrap_or_default())
            })
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| Error::device("queue setup", error))?;
        let workers = self.device.activate(Activation {
            memory: self.memory.clone(),
            features: self.accepted,
            queues,
            transport: self.transport.clone(),
            on_vcpu: matches!(self.threading, Threading::Vcpu),
        })?;
        Runner::start(workers, &self.doorbells, &self.threading, &self.status, &self.transport)
    }

    fn virt_queue(&self, index: u16, position: Position) -> Result<VirtQueue, QueueError> {
        let (setup, most) = (&self.queues[usize::from(index)], self.sizes[usize::from(index)]);
        let event_idx = self.accepted & features::EVENT_IDX != 0;
        let map = self.memory.snapshot();
        VirtQueue::new(index, most, setup, position, event_idx, &map, self.transport.clone())
    }

    /// The largest size of queue `index`; 0 where there is no such queue.
    pub(super) fn most(&self, index: u32) -> u16 {
        usize::try_from(index).ok().and_then(|index| self.sizes.get(index)).copied().unwrap_or(0)
    }

    pub(super) fn queue(&self, index: u32) -> Option<&QueueSetup> {
        self.queues.get(usize::try_from(index).ok()?)
    }

    /// Queue `index` to be set up: not one that is in use.
    pub(super) fn queue_mut(&mut self, index: u32) -> Option<&mut QueueSetup> {
        let setup = self.queues.get_mut(usize::try_from(index).ok()?)?;
        (!setup.ready).then_some(setup)
    }

    /// The driver enables or stops queue `index`. Stopping waits for the request that is being
    /// served.
    pub(super) fn set_ready(&mut self, index: u32, ready: bool) {
        let Ok(index) = u16::try_from(index) else { return };
        let may_enable = self.may_enable();
        let Some(setup) = self.queues.get_mut(usize::from(index)) else { return };
        if setup.ready == ready {
            return;
        }
        if ready && !may_enable {
            return self.status.complain(format_args!("queue {index} enabled out of order"));
        }
        setup.ready = ready;
        let Some(runner) = &self.runner else { return };
        if ready {
            match self.virt_queue(index, Position::default()) {
                Ok(fresh) => {
                    runner.with_queue(index, |queue| *queue = fresh);
                    runner.notify(index);
                }
                Err(error) => self.status.fail(&error, &*self.transport),
            }
        } else {
            runner.with_queue(index, VirtQueue::stop);
        }
    }

    /// Queues are enabled before the device is active, and later only where single ones can be
    /// reset (virtio 1.2, sections 3.1.1 and 2.6.1).
    fn may_enable(&self) -> bool {
        let now = self.status.get();
        let setup = now & status::DRIVER_OK == 0 && now & status::FEATURES_OK != 0;
        let again = now & status::NEEDS_RESET == 0 && self.accepted & features::RING_RESET != 0;
        setup || again && self.runner.is_some()
    }

    /// The driver resets queue `index` alone (virtio 1.2, section 2.6.1).
    pub(super) fn reset_queue(&mut self, index: u32) {
        if self.accepted & features::RING_RESET == 0 {
            return self.status.complain(format_args!("queue {index} reset without RING_RESET"));
        }
        self.set_ready(index, false);
        let size = self.most(index);
        if let Some(setup) = self.queue_mut(index) {
            *setup = QueueSetup { size, ..QueueSetup::default() };
        }
    }

    /// The driver notifies queue `index`. Before DRIVER_OK nobody listens.
    pub(super) fn notify(&self, index: u32) {
        if let (Some(runner), Ok(index)) = (&self.runner, u16::try_from(index)) {
            runner.notify(index);
        }
    }

    /// Keeps the device from touching memory, from when this returns; or lets it again.
    pub(super) fn hold(&self, held: bool) {
        self.status.hold(held);
        match &self.runner {
            Some(runner) if held => runner.quiesce(),
            Some(runner) => runner.resume(),
            None => {}
        }
    }

    /// Has the device try again what the host failed to do.
    pub(super) fn retry(&mut self) {
        self.device.retry();
        if let Some(runner) = &self.runner {
            runner.resume();
        }
    }

    /// Looks at the device's host descriptors on the caller's thread.
    pub(super) fn poll(&self) {
        if let Some(runner) = &self.runner {
            runner.poll();
        }
    }

    pub(super) fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.device.read_config(offset, data);
    }

    pub(super) fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.device.write_config(offset, data);
    }

    pub(super) fn save(&self) -> Result<State> {
        let positions = match &self.runner {
            Some(runner) => runner.positions(),
            None => vec![Position::default(); self.queues.len()],
        };
        Ok(State {
            device_type: self.device_type(),
            status: self.status.get(),
            accepted: self.accepted,
            queues: self.queues.clone(),
            positions,
            device: self.device.save()?,
        })
    }

    pub(super) fn restore(&mut self, state: State) -> Result<()> {
        let (types, found) = (self.device_type(), state.device_type);
        let (queues, others) = (self.queues.len(), state.queues.len());
        if types != found || queues != others || queues != state.positions.len() {
            return Err(Error::State {
                what: "a virtio device",
                expected: format!("type {types} with {queues} queues"),
                found: format!("type {found} with {others} queues"),
            });
        }
        if state.accepted & !self.offered != 0 {
            return Err(Error::State {
                what: "a virtio device",
                expected: format!("features among {:#x}", self.offered),
                found: format!("features {:#x}", state.accepted),
            });
        }
        self.reset();
        self.device.restore(&state.device)?;
        self.accepted = state.accepted;
        self.queues = state.queues;
        self.status.replace(state.status & (status::OF_DRIVER | status::NEEDS_RESET));
        if self.status.has(status::DRIVER_OK) && !self.status.has(status::NEEDS_RESET) {
            let runner = self.start(&state.positions)?;
            self.runner.insert(runner).notify_all();
        }
        Ok(())
    }
}

impl std::fmt::Debug for Lifecycle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lifecycle")
            .field("type", &self.device_type())
            .field("status", &self.status)
            .field("accepted", &self.accepted)
            .field("queues", &self.queues)
            .field("active", &self.runner.is_some())
            .finish_non_exhaustive()
    }
}

fn word(bits: u64, bank: u32) -> u32 {
    let bytes = bits.to_le_bytes();
    let [a, b, c, d, e, f, g, h] = bytes;
    match bank {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}
