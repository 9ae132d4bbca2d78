//! One descriptor that stands for several.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vmcore::EventSet;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};

use crate::timer::Timer;

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

    /// A timer whose ring is waited for too.
    pub(super) fn timer(&self) -> io::Result<Timer> {
        let timer = Timer::new()?;
        self.add(timer.as_raw_fd(), EventSet::IN)?;
        Ok(timer)
    }

    pub(super) fn remove(&self, fd: RawFd) -> io::Result<()> {
        self.0.ctl(ControlOperation::Delete, fd, EpollEvent::default())
    }

    pub(super) fn source(&self) -> Arc<dyn AsRawFd + Send + Sync> {
        self.0.clone()
    }
}
