//! A guest's ports for the program that embeds the VM.

use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// Most streams that wait for the guest's driver, or in one listener for [`VsockListener::accept`].
const MOST_WAITING: usize = 128;

/// The ports of one guest, for connections without a file on the host.
///
/// Clones are the same ports. May be used from any thread but those of the VM, which would wait for
/// itself.
#[derive(Clone, Debug)]
pub struct VsockHandle(Arc<Shared>);

/// A counter of events to wait for.
#[derive(Debug)]
pub(super) struct Event(OwnedFd);

impl Event {
    fn new(flags: EventfdFlags) -> io::Result<Self> {
        Ok(Self(eventfd(0, flags | EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    fn ring(&self) {
        // It fails where the counter is full, and then it rings already.
        rustix::io::write(&self.0, &1_u64.to_ne_bytes()).ok();
    }

    /// Clears it, or takes one off where it is a semaphore.
    pub(super) fn take(&self) {
        rustix::io::read(&self.0, &mut [0; 8]).ok();
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What device, worker and handles share.
#[derive(Debug)]
pub(super) struct Shared {
    /// Rings when there are requests.
    pub(super) wake: Event,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    requests: VecDeque<Request>,
    listeners: HashMap<u32, Arc<Backlog>>,
    /// The device is gone.
    closed: bool,
}

/// A stream that the embedder asked for.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) port: u32,
    pub(super) stream: UnixStream,
    pub(super) answer: SyncSender<bool>,
}

/// Streams that the guest has opened and nobody has accepted.
#[derive(Debug)]
struct Backlog {
    streams: Mutex<Option<VecDeque<UnixStream>>>,
    /// Counts them.
    filled: Event,
}

impl Backlog {
    fn streams(&self) -> MutexGuard<'_, Option<VecDeque<UnixStream>>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        *self.streams() = None;
        self.filled.ring();
    }
}

impl Shared {
    pub(super) fn new() -> io::Result<Arc<Self>> {
        let wake = Event::new(EventfdFlags::empty())?;
        Ok(Arc::new(Self { wake, state: Mutex::default() }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn handle(self: &Arc<Self>) -> VsockHandle {
        VsockHandle(self.clone())
    }

    /// Takes the oldest request.
    pub(super) fn request(&self) -> Option<Request> {
        self.state().requests.pop_front()
    }

    /// Gives a listener of `port` a new stream, and the other end of it: `None` where nobody listens,
    /// or takes no more.
    pub(super) fn open(&self, port: u32) -> Option<io::Result<UnixStream>> {
        let backlog = self.state().listeners.get(&port)?.clone();
        let mut streams = backlog.streams();
        let streams = streams.as_mut()?;
        if streams.len() >= MOST_WAITING {
            return Some(Err(ErrorKind::WouldBlock.into()));
        }
        Some(UnixStream::pair().and_then(|(ours, theirs)| {
            ours.set_nonblocking(true)?;
            backlog.filled.ring();
            streams.push_back(theirs);
            Ok(ours)
        }))
    }

    /// The device is gone: who waits learns it.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        state.requests.clear();
        state.listeners.drain().for_each(|(_, backlog)| backlog.close());
    }
}

fn error(kind: ErrorKind, what: &str, port: u32, fix: &str) -> io::Error {
    io::Error::new(kind, format!("vsock port {port}: {what}; {fix}"))
}

const GONE: (&str, &str) = ("the device is gone", "use it while the VM is there");

impl VsockHandle {
    /// Connects to `port` of the guest, and waits for at most `limit` until the guest accepts: as long
    /// as its driver takes too, where the guest is still booting.
    ///
    /// # Errors
    /// `ConnectionRefused` where nobody listens there in the guest, `TimedOut`, `ConnectionReset` where
    /// the driver reset the device meanwhile, `WouldBlock` where 128 others wait for the driver,
    /// `NotConnected` where the VM is gone, and what the host says.
    pub fn connect(&self, port: u32, limit: Duration) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        theirs.set_nonblocking(true)?;
        let (answer, answered) = sync_channel(1);
        {
            let mut state = self.0.state();
            if state.closed {
                return Err(error(ErrorKind::NotConnected, GONE.0, port, GONE.1));
            }
            if state.requests.len() >= MOST_WAITING {
                let what = "128 connections wait for the guest's driver";
                return Err(error(ErrorKind::WouldBlock, what, port, "wait until the guest has booted"));
            }
            state.requests.push_back(Request { port, stream: theirs, answer });
        }
        self.0.wake.ring();
        match answered.recv_timeout(limit) {
            Ok(true) => Ok(ours),
            Ok(false) => {
                let fix = "start the guest's program first";
                Err(error(ErrorKind::ConnectionRefused, "nobody listens there in the guest", port, fix))
            }
            Err(RecvTimeoutError::Timeout) => {
                let what = format!("the guest did not answer within {limit:?}");
                Err(error(
                    ErrorKind::TimedOut,
                    &what,
                    port,
                    "see whether it has a vsock driver, or wait longer",
                ))
            }
            Err(RecvTimeoutError::Disconnected) => {
                let what = "the connection ended before the guest answered";
                Err(error(ErrorKind::ConnectionReset, what, port, "connect again"))
            }
        }
    }

    /// Listens on `port` of the host (CID 2): the guest's connections to it come here, and to no Unix
    /// socket.
    ///
    /// # Errors
    /// `AddrInUse` where a listener has this port, `NotConnected` where the VM is gone, and what the
    /// host says.
    pub fn listen(&self, port: u32) -> io::Result<VsockListener> {
        let filled = Event::new(EventfdFlags::SEMAPHORE)?;
        let backlog = Arc::new(Backlog { streams: Mutex::new(Some(VecDeque::new())), filled });
        let mut state = self.0.state();
        if state.closed {
            return Err(error(ErrorKind::NotConnected, GONE.0, port, GONE.1));
        }
        if state.listeners.contains_key(&port) {
            let fix = "drop that listener, or choose another port";
            return Err(error(ErrorKind::AddrInUse, "another listener has it", port, fix));
        }
        state.listeners.insert(port, backlog.clone());
        drop(state);
        Ok(VsockListener { shared: self.0.clone(), backlog, port })
    }
}

/// A port of the host that the guest can connect to; see [`VsockHandle::listen`]. Dropping it frees the
/// port.
///
/// Up to 128 connections wait to be accepted; those beyond are refused. Its descriptor is readable
/// while one waits.
#[derive(Debug)]
pub struct VsockListener {
    shared: Arc<Shared>,
    backlog: Arc<Backlog>,
    port: u32,
}

impl VsockListener {
    /// The port.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// Waits for the guest's next connection, at most for `limit`.
    ///
    /// # Errors
    /// `TimedOut`, `NotConnected` where the VM is gone, and what the host says.
    pub fn accept(&self, limit: Duration) -> io::Result<UnixStream> {
        let end = Instant::now().checked_add(limit);
        loop {
            match self.backlog.streams().as_mut() {
                None => return Err(error(ErrorKind::NotConnected, GONE.0, self.port, GONE.1)),
                Some(streams) => {
                    if let Some(stream) = streams.pop_front() {
                        self.backlog.filled.take();
                        return Ok(stream);
                    }
                }
            }
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                let what = format!("the guest did not connect within {limit:?}");
                return Err(error(ErrorKind::TimedOut, &what, self.port, "wait longer"));
            }
            let timeout = left.and_then(|left| Timespec::try_from(left).ok());
            match poll(&mut [PollFd::new(&self.backlog.filled, PollFlags::IN)], timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

impl AsFd for VsockListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.backlog.filled.as_fd()
    }
}

impl Drop for VsockListener {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        // After the VM's end another one may not have it: then it is not in the map.
        state.listeners.remove(&self.port);
        self.backlog.close();
    }
}
