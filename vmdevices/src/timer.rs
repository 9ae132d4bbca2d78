//! A timer that rings once, as a descriptor.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

/// Becomes readable when it rings. Who waits for edges is told of each ring, and need not read it. Clones are
/// the same timer.
#[derive(Clone, Debug)]
pub(crate) struct Timer(Arc<OwnedFd>);

impl Timer {
    pub(crate) fn new() -> io::Result<Self> {
        // A clock that nobody sets.
        let fd = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        Ok(Self(Arc::new(fd)))
    }

    /// Rings after `wait`, and not when it was to ring before.
    pub(crate) fn set(&self, wait: Duration) -> io::Result<()> {
        // No time at all would stop it.
        self.arm(
            Timespec::try_from(wait.max(Duration::from_nanos(1)))
                .unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 }),
        )
    }

    /// Does not ring.
    pub(crate) fn stop(&self) -> io::Result<()> {
        self.arm(Timespec { tv_sec: 0, tv_nsec: 0 })
    }

    fn arm(&self, it_value: Timespec) -> io::Result<()> {
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
        timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &once)?;
        Ok(())
    }
}

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
