//! The vCPUs of a deterministic VM take turns on one thread: [`crate::deterministic`].

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use super::run::{Outcome, ResetCause, Shared};
use crate::backend::VcpuExit;
use crate::deterministic::World;
use crate::error::Result;
use crate::vcpu::Vcpu;

/// How often time is skipped without an instruction executed before the host is given a rest: the guest
/// sleeps, and a timer runs that does not wake it.
const SKIPS: u32 = 1000;

/// What a turn ended with.
pub(super) enum Turn {
    /// The next one can follow.
    Over,
    /// Nothing happens before the host does something.
    Idle,
    /// The guest has ended.
    Ended(Outcome),
}

/// Whose turn it is.
#[derive(Debug)]
pub(super) struct Turns {
    world: Arc<World>,
    timers: Arc<Timers>,
    current: usize,
    /// Instructions left of the turn.
    left: u64,
    /// How many vCPUs in a row have had nothing to do.
    waiting: usize,
    /// How often time was skipped since an instruction was executed.
    skips: u32,
}

impl Turns {
    pub(super) fn new(world: Arc<World>, timers: Arc<Timers>) -> Self {
        let left = world.quantum();
        Self { world, timers, current: 0, left, waiting: 0, skips: 0 }
    }

    /// What decides about the turns to come.
    pub(super) fn state(&self) -> [u64; 3] {
        // Fits: it is an index.
        [self.current as u64, self.left, self.waiting as u64]
    }

    /// Runs the vCPU whose turn it is, for no more than the turn and not beyond the count `limit`.
    ///
    /// # Errors
    /// As [`Vcpu::run`].
    pub(super) fn take(&mut self, vcpus: &mut [MutexGuard<'_, Vcpu>], limit: u64) -> Result<Turn> {
        if self.timers.call_due(self.world.now()) {
            self.waiting = 0;
        }
        let begin = self.world.instructions();
        if begin >= limit {
            return Ok(Turn::Ended(Outcome::InstructionLimit));
        }
        let timer = self.timers.next().map_or(u64::MAX, |at| self.world.instructions_at(at));
        let most = self.left.min(limit - begin).min(timer.saturating_sub(begin).max(1));
        let Some(vcpu) = vcpus.get_mut(self.current) else { return Ok(Turn::Idle) };
        let exit = vcpu.run_instructions(most)?;
        let done = self.world.instructions().wrapping_sub(begin);
        self.left = self.left.saturating_sub(done);
        if done != 0 {
            (self.waiting, self.skips) = (0, 0);
        }
        match exit {
            VcpuExit::TripleFault => return Ok(Turn::Ended(Outcome::Reset(ResetCause::TripleFault))),
            // Without interrupt controllers nothing wakes a halted vCPU.
            VcpuExit::Halted => return Ok(Turn::Ended(Outcome::Halted)),
            VcpuExit::Debug { .. } => return Ok(Turn::Ended(Outcome::Stopped)),
            VcpuExit::Waiting => {
                self.waiting += 1;
                self.left = 0;
            }
            VcpuExit::InstructionLimit | VcpuExit::Kicked => {}
        }
        if self.left == 0 {
            self.current = (self.current + 1) % vcpus.len().max(1);
            self.left = self.world.quantum();
        }
        if self.waiting >= vcpus.len() { self.sleep(vcpus) } else { Ok(Turn::Over) }
    }

    /// No vCPU has anything to do: time goes on to where one has.
    fn sleep(&mut self, vcpus: &[MutexGuard<'_, Vcpu>]) -> Result<Turn> {
        self.waiting = 0;
        let mut for_good = true;
        for vcpu in vcpus {
            for_good &= vcpu.sleeps_for_good()?;
        }
        if for_good {
            return Ok(Turn::Ended(Outcome::Halted));
        }
        let timers = vcpus.iter().filter_map(|vcpu| vcpu.timer_deadline());
        let Some(at) = timers.chain(self.timers.next()).min() else { return Ok(Turn::Idle) };
        self.world.set_now(at.max(self.world.now()));
        self.skips += 1;
        if self.skips < SKIPS {
            return Ok(Turn::Over);
        }
        self.skips = 0;
        Ok(Turn::Idle)
    }
}

/// The timers of a deterministic VM's devices.
#[derive(Debug, Default)]
pub(super) struct Timers(Mutex<Vec<Weak<Inner>>>);

/// No deadline.
const NEVER: u64 = u64::MAX;

struct Inner {
    /// In ns of the machine's time.
    at: AtomicU64,
    callback: Mutex<Box<dyn FnMut() + Send>>,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Timer").field("at", &self.at).finish_non_exhaustive()
    }
}

impl Timers {
    pub(super) fn add(&self, shared: Arc<Shared>, callback: impl FnMut() + Send + 'static) -> Timer {
        let inner = Arc::new(Inner { at: AtomicU64::new(NEVER), callback: Mutex::new(Box::new(callback)) });
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|timer| timer.strong_count() > 0);
        all.push(Arc::downgrade(&inner));
        Timer { inner, shared }
    }

    fn all(&self) -> Vec<Arc<Inner>> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().filter_map(Weak::upgrade).collect()
    }

    /// When the first is due, in ns of the machine's time.
    fn next(&self) -> Option<u64> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let times = all.iter().filter_map(Weak::upgrade).map(|timer| timer.at.load(Ordering::Relaxed));
        times.min().filter(|&at| at != NEVER)
    }

    /// Calls back those due by `now`, in the order in which they were made; whether there were any.
    fn call_due(&self, now: u64) -> bool {
        if self.next().is_none_or(|at| at > now) {
            return false;
        }
        let due = |timer: &&Arc<Inner>| timer.at.load(Ordering::Relaxed) <= now;
        for timer in self.all().iter().filter(due) {
            timer.at.store(NEVER, Ordering::Relaxed);
            // A callback that panicked is called on as it is.
            (timer.callback.lock().unwrap_or_else(PoisonError::into_inner))();
        }
        true
    }
}

/// A timer of a device on a deterministic machine; it ends when it is dropped.
#[derive(Debug)]
pub struct Timer {
    inner: Arc<Inner>,
    shared: Arc<Shared>,
}

impl Timer {
    /// Calls back once at `at` of the machine's time ([`Clock::now`](super::Clock::now)), or soon where that
    /// is over; never where it is `None`. Replaces what was set before.
    pub fn set(&self, at: Option<Duration>) {
        let at = at.map_or(NEVER, |at| u64::try_from(at.as_nanos()).unwrap_or(NEVER));
        self.inner.at.store(at, Ordering::Relaxed);
        if at != NEVER {
            // The turn that is under way may have to end earlier.
            self.shared.kick_all();
        }
    }
}
