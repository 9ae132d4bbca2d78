//! A thread that serves devices: it waits for host descriptors and doorbells and calls back.
//!
//! Devices own no threads. Whoever attaches them decides which [`IoThread`] serves which device, so
//! that a slow disk does not hold up the console. While the VM is paused no callback runs.

use std::cell::Cell;
use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

pub use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::signal;

use crate::error::{Error, Result};

thread_local! {
    /// Whether this thread belongs to a VM, and so must not wait for VM threads.
    static OF_A_VM: Cell<bool> = const { Cell::new(false) };
}

/// Marks the calling thread as one of a VM's for as long as it lives. It gets no SIGPIPE: a device
/// that writes to a pipe or socket whose other side is gone must see an error, and not kill a
/// program that leaves the signal at its default, as C programs do.
pub(super) fn mark_vm_thread() {
    OF_A_VM.set(true);
    match signal::block_signal(libc::SIGPIPE) {
        Ok(()) | Err(signal::Error::SignalAlreadyBlocked(_)) => {}
        Err(e) => log::warn!("a VM's thread cannot block SIGPIPE: {e}"),
    }
}

/// Whether the caller is a vCPU or I/O thread, that is, a device callback.
pub(super) fn on_vm_thread() -> bool {
    OF_A_VM.get()
}

type Callback = Box<dyn FnMut(EventSet) + Send>;

struct Source {
    fd: Arc<dyn AsRawFd + Send + Sync>,
    callback: Mutex<Callback>,
}

struct Inner {
    name: String,
    epoll: Epoll,
    wake: EventFd,
    quit: AtomicBool,
    next_token: AtomicU64,
    sources: Mutex<HashMap<u64, Arc<Source>>>,
    gate: Mutex<Gate>,
    gate_changed: Condvar,
}

/// Keeps callbacks and pauses apart.
#[derive(Default)]
struct Gate {
    /// How many [`Hold`]s there are.
    holds: usize,
    /// A callback is running.
    busy: bool,
}

const WAKE_TOKEN: u64 = 0;

/// An event loop on a thread of its own. Clones mean the same thread; it ends when the last clone
/// and the VM are gone.
///
/// Its events are level-triggered: a descriptor that stays ready calls back again and again. Where
/// the events of a watch include [`EventSet::EDGE_TRIGGERED`] it calls back once for each time the
/// descriptor becomes ready; the callback must then read or write until it would block, or it is
/// not called again. [`IoThread::watch_event`] clears the event before it calls: once for any
/// number of signals that came since.
///
/// Callbacks run one at a time, and never while the VM is paused. SIGPIPE is blocked on the thread.
#[derive(Clone)]
pub struct IoThread {
    inner: Arc<Inner>,
    /// Joins the thread when the last handle goes.
    thread: Arc<JoinOnDrop>,
}

struct JoinOnDrop {
    inner: Arc<Inner>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl IoThread {
    /// Starts a thread; `name` (at most 15 bytes are shown by the host) tells it from others.
    ///
    /// # Errors
    /// Where the host refuses a descriptor or a thread.
    pub fn new(name: &str) -> Result<Self> {
        let this = Self::unstarted(name)?;
        this.start()?;
        Ok(this)
    }

    /// As [`IoThread::new`], but nothing is served before [`IoThread::start`].
    pub(super) fn unstarted(name: &str) -> Result<Self> {
        let os = |op, source| Error::os(op, format_args!("I/O thread {name}"), source);
        let epoll = Epoll::new().map_err(|e| os("epoll_create1", e))?;
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|e| os("eventfd", e))?;
        epoll
            .ctl(ControlOperation::Add, wake.as_raw_fd(), EpollEvent::new(EventSet::IN, WAKE_TOKEN))
            .map_err(|e| os("epoll_ctl", e))?;
        let inner = Arc::new(Inner {
            name: name.to_owned(),
            epoll,
            wake,
            quit: AtomicBool::new(false),
            next_token: AtomicU64::new(WAKE_TOKEN + 1),
            sources: Mutex::default(),
            gate: Mutex::default(),
            gate_changed: Condvar::new(),
        });
        let join = JoinOnDrop { inner: inner.clone(), thread: Mutex::default() };
        Ok(Self { inner, thread: Arc::new(join) })
    }

    /// Starts the thread, where it was not started or stopped before.
    pub(super) fn start(&self) -> Result<()> {
        let mut thread = self.thread.thread();
        if thread.is_none() && !self.inner.quit.load(Ordering::Acquire) {
            let inner = self.inner.clone();
            let builder = std::thread::Builder::new().name(inner.name.clone());
            let started = builder.spawn(move || inner.serve()).map_err(|e| {
                Error::os("pthread_create", format_args!("I/O thread {}", self.inner.name), e)
            })?;
            *thread = Some(started);
        }
        Ok(())
    }

    /// Calls `callback` on the I/O thread whenever `fd` is ready for one of `events`, until the
    /// watch is dropped. Readiness is level-triggered, unless `events` say otherwise: a callback that
    /// leaves data unread is called again at once.
    ///
    /// # Errors
    /// Where the host cannot wait for the descriptor (a regular file, for example).
    pub fn watch(
        &self,
        fd: Arc<dyn AsRawFd + Send + Sync>,
        events: EventSet,
        callback: impl FnMut(EventSet) + Send + 'static,
    ) -> Result<Watch> {
        let token = self.inner.next_token.fetch_add(1, Ordering::Relaxed);
        let raw = fd.as_raw_fd();
        let source = Arc::new(Source { fd, callback: Mutex::new(Box::new(callback)) });
        self.inner.sources().insert(token, source);
        if let Err(e) = self.inner.epoll.ctl(ControlOperation::Add, raw, EpollEvent::new(events, token)) {
            self.inner.sources().remove(&token);
            let detail = format!("descriptor {raw} on I/O thread {}", self.inner.name);
            return Err(Error::os("epoll_ctl(ADD)", detail, e));
        }
        Ok(Watch { inner: self.inner.clone(), token, fd: raw })
    }

    /// Calls `callback` on the I/O thread whenever `event` was signalled, which it clears first.
    ///
    /// # Errors
    /// As [`IoThread::watch`].
    pub fn watch_event(
        &self,
        event: &Arc<EventFd>,
        mut callback: impl FnMut() + Send + 'static,
    ) -> Result<Watch> {
        let readable = event.clone();
        self.watch(event.clone(), EventSet::IN, move |_| {
            // An error means somebody else has read it already: the callback still looks.
            drop(readable.read());
            callback();
        })
    }

    /// Ends the thread and drops all callbacks, even while other handles live: a callback may own
    /// one itself.
    pub(super) fn stop(&self) {
        self.thread.stop();
    }

    /// Keeps callbacks from running while the guard lives; waits for one that is running.
    pub(super) fn hold(&self) -> Hold {
        let mut gate = self.inner.gate();
        gate.holds += 1;
        while gate.busy {
            gate = self.inner.gate_changed.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        Hold(self.inner.clone())
    }
}

/// Keeps an [`IoThread`]'s callbacks from running. Several may live at once.
pub(super) struct Hold(Arc<Inner>);

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.gate().holds -= 1;
        self.0.gate_changed.notify_all();
    }
}

impl fmt::Debug for IoThread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoThread").field("name", &self.inner.name).finish_non_exhaustive()
    }
}

impl Inner {
    fn sources(&self) -> MutexGuard<'_, HashMap<u64, Arc<Source>>> {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        mark_vm_thread();
        let mut ready = [EpollEvent::default(); 32];
        while !self.quit.load(Ordering::Acquire) {
            let count = match self.epoll.wait(-1, &mut ready) {
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => {
                    log::error!("I/O thread {} ends, its devices stop: epoll_wait: {e}", self.name);
                    return;
                }
            };
            for event in &ready[..count] {
                if event.data() == WAKE_TOKEN || self.quit.load(Ordering::Acquire) {
                    continue;
                }
                self.dispatch(event);
            }
        }
    }

    fn dispatch(&self, event: &EpollEvent) {
        // A source that another callback of this batch removed is not there any more.
        let Some(source) = self.sources().get(&event.data()).cloned() else { return };
        let mut gate = self.gate();
        while gate.holds > 0 && !self.quit.load(Ordering::Acquire) {
            gate = self.gate_changed.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        if self.quit.load(Ordering::Acquire) {
            return;
        }
        gate.busy = true;
        drop(gate);
        let mut callback = source.callback.lock().unwrap_or_else(PoisonError::into_inner);
        let call = std::panic::AssertUnwindSafe(|| callback(event.event_set()));
        if std::panic::catch_unwind(call).is_err() {
            log::error!("a device callback on I/O thread {} panicked; it is not called again", self.name);
            drop(self.epoll.ctl(ControlOperation::Delete, source.fd.as_raw_fd(), EpollEvent::default()));
        }
        self.gate().busy = false;
        self.gate_changed.notify_all();
    }
}

impl JoinOnDrop {
    fn thread(&self) -> MutexGuard<'_, Option<JoinHandle<()>>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stop(&self) {
        let started = {
            let mut thread = self.thread();
            // Under the lock, so that a thread that waits at the gate cannot miss it.
            let _gate = self.inner.gate();
            self.inner.quit.store(true, Ordering::Release);
            thread.take()
        };
        if let Some(thread) = started {
            self.inner.gate_changed.notify_all();
            if let Err(e) = self.inner.wake.write(1) {
                log::error!("cannot wake I/O thread {}: {e}", self.inner.name);
            }
            // The last handle may go inside a callback; a thread cannot wait for itself.
            if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
                log::error!("I/O thread {} panicked", self.inner.name);
            }
        }
        // Callbacks may own whatever; drop them outside the lock, which their watches take.
        let sources = std::mem::take(&mut *self.inner.sources());
        drop(sources);
    }
}

impl Drop for JoinOnDrop {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A watched descriptor; dropping it ends the watch. A callback that has begun still ends.
pub struct Watch {
    inner: Arc<Inner>,
    token: u64,
    fd: RawFd,
}

impl Drop for Watch {
    fn drop(&mut self) {
        // Deleted before the source, which keeps the descriptor open, goes. An error means that the
        // thread has let go of everything already.
        let removed = self.inner.sources().remove(&self.token);
        if removed.is_some() {
            drop(self.inner.epoll.ctl(ControlOperation::Delete, self.fd, EpollEvent::default()));
        }
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("fd", &self.fd).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    fn event() -> Arc<EventFd> {
        Arc::new(EventFd::new(EFD_NONBLOCK).unwrap())
    }

    #[test]
    fn events_call_back_until_the_watch_is_dropped() {
        let thread = IoThread::new("test").unwrap();
        let bell = event();
        let (sender, receiver) = mpsc::channel();
        let watch = thread.watch_event(&bell, move || sender.send(()).unwrap()).unwrap();
        for _ in 0..3 {
            bell.write(1).unwrap();
            receiver.recv_timeout(Duration::from_secs(10)).unwrap();
        }
        drop(watch);
        bell.write(1).unwrap();
        // The sender went with the watch: nothing can call any more.
        assert!(receiver.recv_timeout(Duration::from_secs(10)).is_err());
    }

    #[test]
    fn held_threads_do_not_call_back() {
        let thread = IoThread::new("test").unwrap();
        let bell = event();
        let (sender, receiver) = mpsc::channel();
        let _watch = thread.watch_event(&bell, move || sender.send(()).unwrap()).unwrap();
        let hold = (thread.hold(), thread.hold());
        bell.write(1).unwrap();
        assert!(receiver.recv_timeout(Duration::from_millis(50)).is_err());
        drop(hold);
        receiver.recv_timeout(Duration::from_secs(10)).unwrap();
    }

    #[test]
    fn a_callback_that_panics_or_drops_the_thread_does_no_harm() {
        let thread = IoThread::new("test").unwrap();
        let (bad, good, last) = (event(), event(), event());
        let (sender, receiver) = mpsc::channel();
        let done = sender.clone();
        let _bad = thread.watch_event(&bad, || panic!("on purpose")).unwrap();
        let _good = thread.watch_event(&good, move || sender.send(()).unwrap()).unwrap();
        bad.write(1).unwrap();
        good.write(1).unwrap();
        receiver.recv_timeout(Duration::from_secs(10)).unwrap();

        let mut own = Some(thread.clone());
        let _last = thread
            .watch_event(&last, move || {
                drop(own.take());
                done.send(()).unwrap();
            })
            .unwrap();
        drop(thread);
        last.write(1).unwrap();
        receiver.recv_timeout(Duration::from_secs(10)).unwrap();
    }

    #[test]
    fn an_unstarted_thread_calls_back_once_it_is_started_and_goes_without() {
        let thread = IoThread::unstarted("test").unwrap();
        let bell = event();
        let (sender, receiver) = mpsc::channel();
        let _watch = thread.watch_event(&bell, move || sender.send(()).unwrap()).unwrap();
        bell.write(1).unwrap();
        assert!(receiver.recv_timeout(Duration::from_millis(50)).is_err());
        for _ in 0..2 {
            thread.start().unwrap();
        }
        receiver.recv_timeout(Duration::from_secs(10)).unwrap();

        let thread = IoThread::unstarted("test").unwrap();
        let (sender, receiver) = mpsc::channel::<()>();
        let _watch = thread.watch_event(&event(), move || sender.send(()).unwrap()).unwrap();
        thread.stop();
        assert!(receiver.recv().is_err(), "its callbacks are dropped");
        thread.start().unwrap();
        assert!(thread.thread.thread().is_none(), "it does not come back");
    }

    #[test]
    fn a_descriptor_that_cannot_be_waited_for_is_an_error_that_names_it() {
        let thread = IoThread::new("test").unwrap();
        let file = Arc::new(std::fs::File::open("/proc/self/exe").unwrap());
        let error = thread.watch(file, EventSet::IN, |_| ()).unwrap_err();
        assert!(error.to_string().contains("epoll_ctl"), "{error}");
    }
}
