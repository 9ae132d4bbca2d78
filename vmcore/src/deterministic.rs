//! The deterministic mode: a VM whose every step follows from its inputs alone.
//!
//! Time is a function of the instructions that the guest has executed, vCPUs take turns on one host
//! thread, devices work on that thread inside the guest's own accesses, and random numbers come from a
//! seed. Two runs with the same inputs are equal, instruction by instruction, and so are their
//! [`StateHash`]es at equal counts. Where runs stop in between, are paused, or are hashed changes nothing.
//!
//! # What counts as an instruction
//! An instruction that has come to its end, also where a trap follows it, and an instruction that faults
//! (so that a guest whose handler cannot even be fetched does not stop time). A repeated string instruction is one, however many
//! elements it has; no interrupt comes inside of it. Where the guest steps itself by RFLAGS.TF each
//! element is one, with its trap.
//!
//! # When events come
//! Between two instructions, at the first boundary where they are due and allowed: an interrupt that an
//! instruction causes (by a device it accesses, an IPI to itself) right after that instruction, a timer
//! at the first count whose time is not before its deadline. What concerns another vCPU reaches it when
//! its turn comes. Nothing of this depends on how guest code is cut into blocks.
//!
//! # Inputs
//! The guest's images and disks, the settings of the VM, [`Deterministic`], and the CPUID that the guest
//! sees: [`CpuModel::Best`](crate::cpuid::CpuModel) is the host's, so name a model to compare hosts. x87
//! and SSE instructions that approximate (RCPPS, FSIN) are the host processor's. What other threads of the
//! host do to a VM that runs (raise interrupts, press its power button, write its memory) are inputs too,
//! which this mode does not record. Count, turns and random numbers are not part of a
//! [`VmState`](crate::VmState): a VM that takes one over goes on with its own.
//!
//! # Devices
//! There are no I/O threads, interrupt events and doorbells: a device that asks for one gets
//! [`Error::Unsupported`](crate::Error::Unsupported), and the build fails. It works inside the guest's
//! accesses instead, and goes by [`Machine::clock`](crate::Machine::clock),
//! [`Machine::timer`](crate::Machine::timer) and [`Machine::entropy`](crate::Machine::entropy).

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Nanoseconds of a second.
const SECOND: u128 = 1_000_000_000;

/// Settings of the deterministic mode: see [the module](self).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "give it to VmBuilder::deterministic"]
pub struct Deterministic {
    seed: u64,
    instructions_per_second: u64,
    quantum: u64,
    start_time: Duration,
}

impl Default for Deterministic {
    /// Seed 0, a nanosecond an instruction, turns of 20,000 instructions, from 2024-01-01 00:00 UTC.
    fn default() -> Self {
        Self {
            seed: 0,
            instructions_per_second: 1_000_000_000,
            quantum: 20_000,
            start_time: Duration::from_secs(1_704_067_200),
        }
    }
}

impl Deterministic {
    /// The defaults with `seed`.
    pub fn seeded(seed: u64) -> Self {
        Self { seed, ..Self::default() }
    }

    /// What all random numbers follow from: RDRAND, RDSEED, virtio-rng, the seed that a Linux guest is
    /// given. Whoever knows it knows the guest's keys.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// How many instructions take a second of the guest's time, all vCPUs together; at least 1.
    pub fn instructions_per_second(mut self, count: u64) -> Self {
        self.instructions_per_second = count.max(1);
        self
    }

    /// How many instructions a vCPU executes before the next one has its turn; at least 1.
    pub fn quantum(mut self, instructions: u64) -> Self {
        self.quantum = instructions.max(1);
        self
    }

    /// The time of day at which the VM is made, since 1970 in UTC.
    pub fn start_time(mut self, since_1970: Duration) -> Self {
        self.start_time = since_1970;
        self
    }
}

/// The time and the random numbers of one deterministic VM.
///
/// Only the thread that runs its vCPUs changes it; others may look.
#[derive(Debug)]
pub struct World {
    config: Deterministic,
    /// Instructions that all vCPUs have executed.
    instructions: AtomicU64,
    /// Nanoseconds that nobody executed anything in, modulo 2^64.
    skipped: AtomicU64,
    random: AtomicU64,
}

impl World {
    #[cfg(any(feature = "soft", test))]
    pub(crate) fn new(config: Deterministic) -> Self {
        Self {
            config,
            instructions: AtomicU64::new(0),
            skipped: AtomicU64::new(0),
            random: AtomicU64::new(config.seed),
        }
    }

    /// Instructions executed so far, by all vCPUs.
    pub fn instructions(&self) -> u64 {
        self.instructions.load(Ordering::Relaxed)
    }

    #[cfg(any(feature = "soft", test))]
    pub(crate) fn set_instructions(&self, count: u64) {
        self.instructions.store(count, Ordering::Relaxed);
    }

    pub(crate) fn quantum(&self) -> u64 {
        self.config.quantum
    }

    /// Time that `count` instructions take, in ns.
    fn duration(&self, count: u64) -> u64 {
        match self.config.instructions_per_second {
            1_000_000_000 => count,
            rate => saturated(u128::from(count) * SECOND / u128::from(rate)),
        }
    }

    /// The machine's time in ns.
    pub fn now(&self) -> u64 {
        self.duration(self.instructions()).wrapping_add(self.skipped.load(Ordering::Relaxed))
    }

    /// Makes the machine's time `now` ns, and the count stay: nobody has anything to do until then.
    pub(crate) fn set_now(&self, now: u64) {
        let executed = self.duration(self.instructions());
        self.skipped.store(now.wrapping_sub(executed), Ordering::Relaxed);
    }

    /// The first count of instructions at which the machine's time is not before `at` ns, if nothing is
    /// skipped until then.
    pub(crate) fn instructions_at(&self, at: u64) -> u64 {
        let Some(left) = at.checked_sub(self.now()).filter(|&left| left != 0) else {
            return self.instructions();
        };
        // Rounded up, from the exact time of the present count.
        let (rate, count) = (u128::from(self.config.instructions_per_second), self.instructions());
        let target = u128::from(self.duration(count)) + u128::from(left);
        saturated((target * rate).div_ceil(SECOND)).max(count.saturating_add(1))
    }

    /// The time of day, since 1970 in UTC.
    pub(crate) fn time_of_day(&self) -> Duration {
        self.config.start_time.saturating_add(Duration::from_nanos(self.now()))
    }

    /// The next random number (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
    /// 2014: SplitMix64). Good numbers, and no secret.
    pub(crate) fn random(&self) -> u64 {
        const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;
        let mut z = self.random.fetch_add(GAMMA, Ordering::Relaxed).wrapping_add(GAMMA);
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Fills `bytes` with random numbers.
    pub(crate) fn fill_random(&self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.random().to_le_bytes()[..chunk.len()]);
        }
    }

    /// All of it, for the hash of a state.
    pub(crate) fn state(&self) -> [u64; 3] {
        [self.instructions(), self.skipped.load(Ordering::Relaxed), self.random.load(Ordering::Relaxed)]
    }
}

fn saturated(value: u128) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}

/// A fingerprint of all of a VM's state: equal states have equal ones, and others in practice have not.
///
/// It covers vCPUs, interrupt controllers and timers, the contents of guest memory, and the devices that
/// save a state; of a deterministic VM its time, turns and random numbers too. It does not cover what is
/// on disks. It is comparable between VMs that were made alike by the same version of this library.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct StateHash([u8; 32]);

impl StateHash {
    pub(crate) fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes of it.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for StateHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for StateHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn random_numbers_are_those_of_splitmix64() {
        // The first outputs for seed 1234567, as published with the reference implementation.
        let world = World::new(Deterministic::seeded(1_234_567));
        let numbers = [(); 3].map(|()| world.random());
        assert_eq!(
            numbers,
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]
        );
        let mut bytes = [0; 11];
        let world = World::new(Deterministic::seeded(1_234_567));
        world.fill_random(&mut bytes);
        assert_eq!(bytes[..8], numbers[0].to_le_bytes());
        assert_eq!(bytes[8..], numbers[1].to_le_bytes()[..3]);
    }

    proptest! {
        #[test]
        fn a_deadline_is_met_by_the_first_count_that_is_not_before_it(
            rate in 1u64..10_000_000_000,
            count in 0u64..1 << 40,
            skip in 0u64..1 << 40,
            wait in 0u64..1 << 40,
        ) {
            let world = World::new(Deterministic::default().instructions_per_second(rate));
            world.set_instructions(count);
            world.set_now(world.now() + skip);
            let at = world.now() + wait;
            let due = world.instructions_at(at);
            world.set_instructions(due);
            prop_assert!(world.now() >= at);
            if due > count {
                world.set_instructions(due - 1);
                prop_assert!(world.now() < at || due - 1 == count);
            }
        }
    }
}
