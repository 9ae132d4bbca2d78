//! When flows want to be looked at: many deadlines, one timer.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use crate::timer::Timer;

/// Deadlines of things that `T` names. A thing whose deadline moves back stays where it is, and its
/// owner puts it in again when it comes up too early: so that a flow that is busy costs nothing here.
#[derive(Debug)]
pub(super) struct Timers<T: Ord> {
    deadlines: BTreeSet<(Instant, T)>,
    timer: Timer,
    /// What the timer is set to.
    armed: Option<Instant>,
}

impl<T: Ord + Copy> Timers<T> {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self { deadlines: BTreeSet::new(), timer: Timer::new()?, armed: None })
    }

    /// What is readable when [`Timers::due`] has something.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    /// Has `thing` come up at `at`, and not at `instead_of`.
    pub(super) fn set(&mut self, instead_of: Option<Instant>, at: Instant, thing: T) {
        self.remove(instead_of, thing);
        self.deadlines.insert((at, thing));
        self.arm();
    }

    /// Has `thing` not come up at `at`.
    pub(super) fn remove(&mut self, at: Option<Instant>, thing: T) {
        at.map(|at| self.deadlines.remove(&(at, thing)));
    }

    /// A thing whose time has come.
    pub(super) fn due(&mut self, now: Instant) -> Option<T> {
        match self.deadlines.first() {
            Some((at, _)) if *at <= now => self.deadlines.pop_first().map(|(_, thing)| thing),
            _ => {
                self.armed = None;
                self.arm();
                None
            }
        }
    }

    fn arm(&mut self) {
        let Some((first, _)) = self.deadlines.first() else { return };
        if self.armed.is_some_and(|armed| armed <= *first) {
            return;
        }
        match self.timer.set(first.saturating_duration_since(Instant::now())) {
            Ok(()) => self.armed = Some(*first),
            Err(error) => log::error!("NAT: timerfd_settime: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rustix::time::Timespec;

    use super::*;

    #[test]
    fn things_come_up_in_their_order_and_the_timer_tells() {
        let mut timers = Timers::new().unwrap();
        let start = Instant::now();
        for (ms, thing) in [(30, 3), (10, 1), (20, 2), (60_000, 4), (5, 5)] {
            // Not at the time that it had first.
            timers.set(None, start, thing);
            timers.set(Some(start), start + Duration::from_millis(ms), thing);
        }
        timers.remove(Some(start + Duration::from_millis(5)), 5);
        let mut seen = Vec::new();
        while seen.len() < 3 {
            let fd = timers.fd().try_clone_to_owned().unwrap();
            let mut poll = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
            rustix::event::poll(&mut poll, Some(&Timespec { tv_sec: 10, tv_nsec: 0 })).unwrap();
            assert!(!poll[0].revents().is_empty(), "the timer does not ring");
            rustix::io::read(&fd, &mut [0; 8]).unwrap();
            while let Some(thing) = timers.due(Instant::now()) {
                seen.push(thing);
            }
        }
        assert_eq!(seen, [1, 2, 3]);
        assert!(start.elapsed() >= Duration::from_millis(30));
    }
}
