//! One descriptor that stands for several, and timers.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use vmcore::EventSet;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};

/// Waits for descriptors that come and go: the source of a back end that has no other. It tells of
/// every event anew to who waits for edges.
#[derive(Debug)]
pub(super) struct Wait(Arc<Epoll>);

impl Wait {
    pub(super) fn new() -> io::Result<Self> {
        Epoll::new().map(|epoll| Self(Arc::new(epoll)))
    }

    /// `events` of `fd` are waited for, until it is closed or [removed](Wait::remove).
    pub(super) fn add(&self, fd: RawFd, events: EventSet) -> io::Result<()> {
        self.0.ctl(ControlOperation::Add, fd, EpollEvent::new(events, 0))
    }

    pub(super) fn remove(&self, fd: RawFd) -> io::Result<()> {
        self.0.ctl(ControlOperation::Delete, fd, EpollEvent::default())
    }

    pub(super) fn source(&self) -> Arc<dyn AsRawFd + Send + Sync> {
        self.0.clone()
    }
}

/// A timer that rings once, as a descriptor that becomes readable.
#[derive(Debug)]
pub(super) struct Timer(OwnedFd);

impl Timer {
    /// A timer that `wait` waits for.
    pub(super) fn new(wait: &Wait) -> io::Result<Self> {
        let fd = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        wait.add(fd.as_raw_fd(), EventSet::IN)?;
        Ok(Self(fd))
    }

    /// Rings after `time`, and not when it was to ring before.
    pub(super) fn set(&self, time: Duration) -> io::Result<()> {
        // Zero would stop it.
        let time = time.max(Duration::from_nanos(1));
        let value = Timespec {
            tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: time.subsec_nanos().into(),
        };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &once)?;
        Ok(())
    }
}
