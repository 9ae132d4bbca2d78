//! Runs a device's workers: on I/O threads, or on the vCPU's.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmcore::{Error, EventSet, IoThread, Result, Watch};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::{Progress, Source, Transport, Worker, causes};
use super::queue::{Position, QueueError, VirtQueue};
use super::status;
use crate::complaints::Complaints;

/// Where a device's requests are served.
#[derive(Clone, Debug)]
pub enum Threading {
    /// On the thread of the vCPU that notifies, before its write returns: for determinism, and for
    /// tests. Host descriptors are looked at when the guest notifies and when the embedder calls
    /// [`VirtioMmio::poll`](super::VirtioMmio::poll).
    Vcpu,
    /// On these I/O threads, the device's workers in turn. At least one.
    IoThreads(Vec<IoThread>),
}

/// How often a notification on the vCPU's thread goes on while there is more, before the vCPU runs
/// again. Other vCPUs may add requests all the time.
const MOST_TURNS: usize = 1024;

/// The device status (virtio 1.2, section 2.1), which workers change too when they fail.
#[derive(Debug)]
pub(super) struct Status {
    name: String,
    bits: AtomicU32,
    complaints: Complaints,
}

impl Status {
    pub(super) fn new(name: String) -> Self {
        Self { name, bits: AtomicU32::new(0), complaints: Complaints::default() }
    }

    pub(super) fn get(&self) -> u32 {
        self.bits.load(Ordering::Acquire)
    }

    pub(super) fn has(&self, bits: u32) -> bool {
        self.get() & bits == bits
    }

    pub(super) fn set(&self, bits: u32) {
        self.bits.fetch_or(bits, Ordering::AcqRel);
    }

    pub(super) fn replace(&self, bits: u32) {
        self.bits.store(bits, Ordering::Release);
    }

    /// Says what the driver did wrong, but not without end.
    pub(super) fn complain(&self, what: std::fmt::Arguments<'_>) {
        self.complaints.warn(&self.name, what);
    }

    /// The device cannot go on until the driver resets it (virtio 1.2, section 2.1.2).
    pub(super) fn fail(&self, error: &dyn std::error::Error, transport: &dyn Transport) {
        self.complain(format_args!("stopped until its driver resets it: {}", causes(error)));
        self.set(status::NEEDS_RESET);
        transport.config_changed();
    }
}

/// A worker and what its calls need; shared with the callbacks on I/O threads.
struct Slot {
    /// `None` once the device has been reset: a callback that comes late finds nothing to do.
    worker: Mutex<Option<Box<dyn Worker>>>,
    status: Arc<Status>,
    transport: Arc<dyn Transport>,
}

/// What a worker is called for.
#[derive(Clone, Copy)]
enum Event {
    Queue(u16),
    Source(usize),
}

impl Slot {
    fn lock(&self) -> MutexGuard<'_, Option<Box<dyn Worker>>> {
        // A worker that panicked is used on as it is.
        self.worker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, event: Event) -> Progress {
        let mut guard = self.lock();
        let Some(worker) = guard.as_mut() else { return Progress::Idle };
        if self.status.has(status::NEEDS_RESET) {
            return Progress::Idle;
        }
        let result = match event {
            Event::Queue(queue) => worker.notify(queue),
            Event::Source(source) => worker.ready(source),
        };
        result.unwrap_or_else(|error: QueueError| {
            self.status.fail(&error, &*self.transport);
            Progress::Idle
        })
    }

    /// Runs to the end, within reason, on the caller's thread.
    fn run_here(&self, event: Event) {
        for _ in 0..MOST_TURNS {
            if self.run(event) == Progress::Idle {
                return;
            }
        }
    }
}

/// The workers of an active device. Dropping it stops them, waiting for a call that is under way.
pub(super) struct Runner {
    slots: Vec<Arc<Slot>>,
    /// Which slot serves each queue.
    routes: Vec<Option<usize>>,
    /// Host descriptors of each slot, looked at on the vCPU's thread where there is no other.
    polled: Vec<usize>,
    doorbells: Option<Vec<Arc<EventFd>>>,
    watches: Vec<Watch>,
}

impl Runner {
    /// Starts `workers`; `doorbells` has one event for each queue.
    pub(super) fn start(
        workers: Vec<Box<dyn Worker>>,
        doorbells: &[Arc<EventFd>],
        threading: &Threading,
        status: &Arc<Status>,
        transport: &Arc<dyn Transport>,
    ) -> Result<Self> {
        let mut runner = Self {
            slots: Vec::new(),
            routes: vec![None; doorbells.len()],
            polled: Vec::new(),
            doorbells: matches!(threading, Threading::IoThreads(_)).then(|| doorbells.to_vec()),
            watches: Vec::new(),
        };
        for (number, mut worker) in workers.into_iter().enumerate() {
            let queues = worker.queues().iter().map(VirtQueue::index).collect::<Vec<_>>();
            let sources = worker.sources();
            let (status, transport) = (status.clone(), transport.clone());
            let slot = Arc::new(Slot { worker: Mutex::new(Some(worker)), status, transport });
            for &queue in &queues {
                if let Some(route) = runner.routes.get_mut(usize::from(queue)) {
                    *route = Some(number);
                }
            }
            runner.polled.push(sources.len());
            runner.slots.push(slot.clone());
            if let Threading::IoThreads(threads) = threading {
                let thread = threads.get(number % threads.len().max(1)).ok_or_else(|| Error::Config {
                    what: "threading of a virtio device",
                    value: "no I/O thread".into(),
                    fix: "give at least one, or Threading::Vcpu".into(),
                })?;
                runner.watch(thread, &slot, &queues, doorbells, &sources)?;
            }
        }
        Ok(runner)
    }

    fn watch(
        &mut self,
        thread: &IoThread,
        slot: &Arc<Slot>,
        queues: &[u16],
        doorbells: &[Arc<EventFd>],
        sources: &[Source],
    ) -> Result<()> {
        for &queue in queues {
            let Some(doorbell) = doorbells.get(usize::from(queue)) else { continue };
            let watch = watch_event(thread, doorbell, slot.clone(), Event::Queue(queue))?;
            self.watches.push(watch);
        }
        for (number, source) in sources.iter().enumerate() {
            let event = Event::Source(number);
            let again =
                Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|e| Error::os("eventfd", "", e))?);
            self.watches.push(watch_event(thread, &again, slot.clone(), event)?);
            let slot = slot.clone();
            let events = source.events | EventSet::EDGE_TRIGGERED;
            let call = move |_| {
                if slot.run(event) == Progress::More {
                    ring(&again);
                }
            };
            self.watches.push(thread.watch(source.fd.clone(), events, call)?);
        }
        Ok(())
    }

    /// The driver notified `queue`.
    pub(super) fn notify(&self, queue: u16) {
        let at = usize::from(queue);
        if let Some(doorbells) = &self.doorbells {
            if let Some(doorbell) = doorbells.get(at) {
                ring(doorbell);
            }
        } else if let Some(slot) = self.slot(queue) {
            slot.run_here(Event::Queue(queue));
            self.poll();
        }
    }

    /// Looks at host descriptors on the caller's thread.
    pub(super) fn poll(&self) {
        for (slot, &sources) in self.slots.iter().zip(&self.polled) {
            (0..sources).for_each(|source| slot.run_here(Event::Source(source)));
        }
    }

    /// Has every queue looked at: requests may have come before the device was active.
    pub(super) fn notify_all(&self) {
        (0..self.routes.len()).filter_map(|queue| u16::try_from(queue).ok()).for_each(|q| self.notify(q));
    }

    /// Calls `act` with queue number `queue` while its worker is idle.
    pub(super) fn with_queue<R>(&self, queue: u16, act: impl FnOnce(&mut VirtQueue) -> R) -> Option<R> {
        let mut guard = self.slot(queue)?.lock();
        let worker = guard.as_mut()?;
        worker.drain();
        worker.queues().iter_mut().find(|q| q.index() == queue).map(act)
    }

    /// Where each queue stands.
    pub(super) fn positions(&self) -> Vec<Position> {
        let queues = (0..self.routes.len()).filter_map(|queue| u16::try_from(queue).ok());
        queues.map(|q| self.with_queue(q, |queue| queue.position()).unwrap_or_default()).collect()
    }

    fn slot(&self, queue: u16) -> Option<&Arc<Slot>> {
        self.slots.get((*self.routes.get(usize::from(queue))?)?)
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        self.watches.clear();
        for slot in &self.slots {
            let worker = slot.lock().take();
            if let Some(mut worker) = worker {
                worker.drain();
            }
        }
    }
}

fn watch_event(thread: &IoThread, bell: &Arc<EventFd>, slot: Arc<Slot>, event: Event) -> Result<Watch> {
    let again = bell.clone();
    thread.watch_event(bell, move || {
        if slot.run(event) == Progress::More {
            ring(&again);
        }
    })
}

fn ring(bell: &EventFd) {
    // Full means that it rings already.
    if let Err(e) = bell.write(1)
        && e.kind() != std::io::ErrorKind::WouldBlock
    {
        log::error!("cannot write event {}: {e}", bell.as_raw_fd());
    }
}
