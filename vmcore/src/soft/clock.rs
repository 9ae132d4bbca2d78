//! The machine's time. One clock serves kvmclock, the PIT, the LAPIC timers and the TSC, so that the
//! guest's clocks never drift apart.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::deterministic::World;

/// Frequency of the guest's TSC in kHz where no saved state asks for another: one tick a nanosecond,
/// so that nothing needs to be calibrated.
pub(in crate::soft) const TSC_KHZ: u32 = 1_000_000;

/// Frequencies in kHz that a TSC may have.
pub(in crate::soft) const TSC_KHZ_RANGE: std::ops::RangeInclusive<u32> = 1_000..=100_000_000;

/// Nanoseconds since the machine was made.
#[derive(Debug)]
pub(in crate::soft) struct Clock {
    source: Source,
    /// Added to the source's time, modulo 2^64: a restored machine goes on from its saved time.
    offset: AtomicU64,
    /// What the vCPUs' TSCs are ahead of the time's ticks by, before their own IA32_TSC_ADJUST: 0, or
    /// what restored vCPUs brought along. Modulo 2^64.
    tsc_base: AtomicU64,
    /// A vCPU has been restored since the machine was.
    tsc_known: AtomicBool,
}

/// What drives the clock.
#[derive(Debug)]
enum Source {
    /// The host's time, since then.
    Host(Instant),
    /// The instructions that the guest executes.
    World(Arc<World>),
    /// Nothing: [`Clock::set`].
    #[cfg(test)]
    Hand,
}

impl Clock {
    /// A clock that goes with the host's time, from 0.
    pub(in crate::soft) fn new() -> Self {
        Self::starting(Source::Host(Instant::now()))
    }

    /// A clock that goes with the instructions executed.
    pub(in crate::soft) fn counting(world: Arc<World>) -> Self {
        Self::starting(Source::World(world))
    }

    /// Time and random numbers, where the VM is deterministic.
    #[inline]
    pub(in crate::soft) fn world(&self) -> Option<&Arc<World>> {
        match &self.source {
            Source::World(world) => Some(world),
            _ => None,
        }
    }

    /// A clock that stands still but for [`Clock::set`].
    #[cfg(test)]
    pub(in crate::soft) fn manual() -> Self {
        Self::starting(Source::Hand)
    }

    fn starting(source: Source) -> Self {
        let (offset, tsc_base) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { source, offset, tsc_base, tsc_known: AtomicBool::new(false) }
    }

    fn elapsed(&self) -> u64 {
        match &self.source {
            Source::Host(start) => u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX),
            Source::World(world) => world.now(),
            #[cfg(test)]
            Source::Hand => 0,
        }
    }

    /// The machine's time in ns.
    pub(in crate::soft) fn now(&self) -> u64 {
        self.elapsed().wrapping_add(self.offset.load(Ordering::Relaxed))
    }

    /// Makes the machine's time `now` ns.
    pub(in crate::soft) fn set(&self, now: u64) {
        match self.world() {
            Some(world) => world.set_now(now),
            None => self.offset.store(now.wrapping_sub(self.elapsed()), Ordering::Relaxed),
        }
        self.tsc_known.store(false, Ordering::SeqCst);
    }

    /// The time of day at which the machine's time was 0, since 1970 in UTC.
    pub(in crate::soft) fn epoch(&self) -> Duration {
        let time_of_day = match self.world() {
            Some(world) => world.time_of_day(),
            None => SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
        };
        time_of_day.saturating_sub(Duration::from_nanos(self.now()))
    }

    /// What is added to the time's ticks to make every vCPU's TSC, before its IA32_TSC_ADJUST.
    pub(in crate::soft) fn tsc_base(&self) -> u64 {
        self.tsc_base.load(Ordering::SeqCst)
    }

    /// Takes over the base that a restored vCPU would need so that its TSC does not go back. The vCPUs
    /// of a machine were saved one after the other: what the last needs serves all.
    pub(in crate::soft) fn restore_tsc_base(&self, base: u64) {
        if !self.tsc_known.swap(true, Ordering::SeqCst) {
            self.tsc_base.store(base, Ordering::SeqCst);
            return;
        }
        let later = |now: u64| (base.wrapping_sub(now).cast_signed() > 0).then_some(base);
        // Refused where the base is late enough already.
        let _ = self.tsc_base.fetch_update(Ordering::SeqCst, Ordering::SeqCst, later);
    }
}
