//! Events whose writing raises an interrupt: what KVM calls irqfd.
//!
//! All vCPUs may be asleep when an event is written, so somebody else must wait for it: one thread a VM,
//! which there is only while events are registered. The registration that comes first starts it, and
//! the last one to end, or the VM, ends and joins it.

use std::collections::HashMap;
use std::fmt;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::chip::{Chipset, check_gsi};
use crate::backend::{IrqRoute, Registration};
use crate::error::{Error, Result};

/// Events taken from the host at once.
const BATCH: usize = 32;

/// Token of the event that ends the thread; those of registrations count up from the next.
const STOP: u64 = 0;

/// The interrupt events of one VM.
#[derive(Debug)]
pub(in crate::soft) struct IrqEvents {
    chipset: Arc<Chipset>,
    /// Held while the thread is started or ended. The thread itself never takes it.
    worker: Mutex<Option<Worker>>,
}

/// The thread, and what it shares with those who register.
struct Worker {
    shared: Arc<Shared>,
    next_token: u64,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    epoll: Epoll,
    stop: EventFd,
    /// Held while an interrupt is raised: what is not here raises none.
    routes: Mutex<HashMap<u64, (Arc<EventFd>, IrqRoute)>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl IrqEvents {
    pub(in crate::soft) fn new(chipset: Arc<Chipset>) -> Arc<Self> {
        Arc::new(Self { chipset, worker: Mutex::default() })
    }

    /// Makes writing the event of the registration returned raise what `route` says.
    ///
    /// # Errors
    /// Where there is no such input, or the host refuses.
    pub(in crate::soft) fn register(self: &Arc<Self>, route: IrqRoute) -> Result<Registration> {
        if let IrqRoute::Gsi(gsi) = route {
            check_gsi(gsi)?;
        }
        let event = Arc::new(event()?);
        let mut slot = lock(&self.worker);
        let worker = match &mut *slot {
            Some(worker) => worker,
            none => none.insert(Worker::start(self.chipset.clone())?),
        };
        let token = worker.next_token;
        worker.next_token += 1;
        if let Err(error) = worker.shared.add(token, &event, route) {
            if lock(&worker.shared.routes).is_empty() {
                *slot = None;
            }
            return Err(error);
        }
        let weak = Arc::downgrade(self);
        Ok(Registration::new(event, move || {
            // With the VM its registrations are gone too.
            if let Some(events) = Weak::upgrade(&weak) {
                events.unregister(token);
            }
        }))
    }

    /// Raises what events have been written for and the thread has not yet come to.
    pub(in crate::soft) fn settle(&self) {
        if let Some(worker) = &*lock(&self.worker) {
            let tokens: Vec<_> = lock(&worker.shared.routes).keys().copied().collect();
            tokens.into_iter().for_each(|token| worker.shared.raise(token, &self.chipset));
        }
    }

    /// Ends a registration. No interrupt of it is raised after this.
    fn unregister(&self, token: u64) {
        let mut slot = lock(&self.worker);
        if slot.as_ref().is_some_and(|worker| worker.shared.remove(token)) {
            // The last one: the thread ends here.
            *slot = None;
        }
    }
}

impl Worker {
    fn start(chipset: Arc<Chipset>) -> Result<Self> {
        let shared = Arc::new(Shared {
            epoll: Epoll::new().map_err(|e| Error::os("epoll_create1", "interrupt events", e))?,
            stop: event()?,
            routes: Mutex::default(),
        });
        shared.control(ControlOperation::Add, &shared.stop, STOP)?;
        let own = shared.clone();
        let thread = thread::Builder::new()
            .name("vmcore-irq".into())
            .spawn(move || own.serve(&chipset))
            .map_err(|e| Error::os("pthread_create", "interrupt events", e))?;
        Ok(Self { shared, next_token: STOP + 1, thread: Some(thread) })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It cannot be full: it is written once.
        if let Err(error) = self.shared.stop.write(1) {
            log::error!("the thread of interrupt events could not be ended: {error}");
            return;
        }
        let Some(thread) = self.thread.take() else { return };
        if thread.join().is_err() {
            log::error!("the thread of interrupt events has panicked");
        }
    }
}

impl Shared {
    fn control(&self, operation: ControlOperation, event: &EventFd, token: u64) -> Result<()> {
        self.epoll
            .ctl(operation, event.as_raw_fd(), EpollEvent::new(EventSet::IN, token))
            .map_err(|e| Error::os("epoll_ctl", "an interrupt event", e))
    }

    fn add(&self, token: u64, event: &Arc<EventFd>, route: IrqRoute) -> Result<()> {
        lock(&self.routes).insert(token, (event.clone(), route));
        self.control(ControlOperation::Add, event, token).inspect_err(|_| {
            lock(&self.routes).remove(&token);
        })
    }

    /// Whether it was the last.
    fn remove(&self, token: u64) -> bool {
        let mut routes = lock(&self.routes);
        if let Some((event, _)) = routes.remove(&token)
            && let Err(error) = self.control(ControlOperation::Delete, &event, token)
        {
            log::error!("an interrupt event could not be removed: {error}");
        }
        routes.is_empty()
    }

    /// What the thread does.
    fn serve(&self, chipset: &Chipset) {
        let mut events = [EpollEvent::default(); BATCH];
        loop {
            let ready = match self.epoll.wait(-1, &mut events) {
                Ok(ready) => ready,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    log::error!("interrupt events are no longer served: epoll_wait: {error}");
                    return;
                }
            };
            for event in &events[..ready.min(BATCH)] {
                if event.data() == STOP {
                    return;
                }
                self.raise(event.data(), chipset);
            }
        }
    }

    /// The event of `token` has been written.
    fn raise(&self, token: u64, chipset: &Chipset) {
        let routes = lock(&self.routes);
        let Some((event, route)) = routes.get(&token) else { return };
        // Writes come together as they do on KVM; EAGAIN: somebody else has read the event.
        if event.read().is_err() {
            return;
        }
        match *route {
            IrqRoute::Msi(msi) => chipset.send_msi(msi),
            IrqRoute::Gsi(gsi) => {
                for high in [true, false] {
                    if let Err(error) = chipset.set_irq(gsi, high) {
                        log::error!("interrupt {gsi} lost: {error}");
                    }
                }
            }
        }
    }
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let registered = lock(&self.shared.routes).len();
        f.debug_struct("Worker").field("registered", &registered).finish_non_exhaustive()
    }
}

fn event() -> Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|e| Error::os("eventfd", "", e))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::{Duration, Instant};

    use super::*;
    use crate::irq::Msi;
    use crate::soft::clock::Clock;

    fn events() -> (Arc<Chipset>, Arc<IrqEvents>) {
        let chipset = Arc::new(Chipset::new(Arc::new(Clock::manual())));
        (chipset.clone(), IrqEvents::new(chipset))
    }

    /// Which inputs of the master PIC have seen an edge.
    fn requests(chipset: &Chipset) -> u8 {
        chipset.save().pics[0].irr
    }

    fn wait_for(chipset: &Chipset, expected: u8) {
        let start = Instant::now();
        while requests(chipset) != expected {
            assert!(start.elapsed() < Duration::from_secs(10), "{:#x}", requests(chipset));
            thread::sleep(Duration::from_micros(50));
        }
    }

    fn runs(events: &IrqEvents) -> bool {
        lock(&events.worker).is_some()
    }

    #[test]
    fn the_thread_lives_as_long_as_the_registrations() {
        let (chipset, events) = events();
        for _ in 0..3 {
            assert!(!runs(&events));
            let first = events.register(IrqRoute::Gsi(3)).unwrap();
            let second = events.register(IrqRoute::Gsi(5)).unwrap();
            drop(first);
            assert!(runs(&events));
            second.event().write(1).unwrap();
            wait_for(&chipset, 0x20);
            drop(second);
            // ICW1 forgets the edge.
            chipset.port_write(0x20, 0x11);
        }
        assert!(!runs(&events));
        assert!(events.register(IrqRoute::Gsi(24)).unwrap_err().to_string().contains("GSI 24"));
        assert!(!runs(&events), "what is refused starts nothing");
        // With the VM the thread ends, and the registrations that are left do nothing.
        let left = events.register(IrqRoute::Gsi(5)).unwrap();
        let held = Arc::downgrade(&chipset);
        drop((events, chipset));
        assert!(held.upgrade().is_none());
        left.event().write(1).unwrap();
        drop(left);
    }

    #[test]
    fn more_events_than_are_taken_at_once() {
        let (chipset, events) = events();
        let msi = IrqRoute::Msi(Msi { address: 0xfee0_0000, data: 0x31 });
        let many: Vec<_> = (0..4 * BATCH).map(|_| events.register(msi).unwrap()).collect();
        let last = events.register(IrqRoute::Gsi(7)).unwrap();
        many.iter().for_each(|event| event.event().write(1).unwrap());
        last.event().write(1).unwrap();
        wait_for(&chipset, 0x80);
        for event in &many {
            // All of them are taken in the end: nothing is left to read.
            let start = Instant::now();
            while !is_drained(event.event()) {
                assert!(start.elapsed() < Duration::from_secs(10));
                thread::yield_now();
            }
        }
    }

    /// Whether there is nothing to read.
    fn is_drained(event: &EventFd) -> bool {
        let epoll = Epoll::new().unwrap();
        epoll.ctl(ControlOperation::Add, event.as_raw_fd(), EpollEvent::new(EventSet::IN, 0)).unwrap();
        epoll.wait(0, &mut [EpollEvent::default()]).unwrap() == 0
    }

    #[test]
    fn nothing_is_raised_after_the_end_of_a_registration() {
        let (chipset, events) = events();
        let _other = events.register(IrqRoute::Gsi(3)).unwrap();
        let stop = AtomicBool::new(false);
        for _ in 0..200 {
            let registration = events.register(IrqRoute::Gsi(5)).unwrap();
            let event = registration.event().clone();
            stop.store(false, Ordering::SeqCst);
            thread::scope(|scope| {
                scope.spawn(|| {
                    while !stop.load(Ordering::SeqCst) {
                        let _ = event.write(1);
                    }
                });
                wait_for(&chipset, 0x20);
                drop(registration);
                chipset.port_write(0x20, 0x11);
                thread::sleep(Duration::from_micros(100));
                assert_eq!(requests(&chipset), 0);
                stop.store(true, Ordering::SeqCst);
            });
        }
    }

    #[test]
    fn a_save_finds_what_has_been_written() {
        let (chipset, events) = events();
        let registrations = [3, 4, 5].map(|gsi| events.register(IrqRoute::Gsi(gsi)).unwrap());
        for _ in 0..200 {
            registrations.iter().for_each(|event| event.event().write(1).unwrap());
            events.settle();
            assert_eq!(requests(&chipset), 0x38);
            chipset.port_write(0x20, 0x11);
        }
    }
}
