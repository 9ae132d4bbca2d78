//! The local APIC's timer (SDM vol. 3A, 11.5.4).
//!
//! It counts at 1 GHz before division, so that a tick of its input is a nanosecond of the machine's
//! clock. Nothing counts in fact: the count is worked out from the time of the next expiry.

use crate::soft::clock::TSC_KHZ;

/// LVT timer register: the field of the mode, bits 17 and 18.
const MODE: u32 = 3 << 17;
const PERIODIC: u32 = 1 << 17;
const TSC_DEADLINE: u32 = 2 << 17;

/// How the guest's TSC follows from the machine's time.
#[derive(Clone, Copy, Debug)]
struct Tsc {
    khz: u32,
    offset: u64,
}

impl Tsc {
    fn ticks(self, ns: u64) -> u128 {
        u128::from(ns) * u128::from(self.khz) / 1_000_000
    }

    /// The first time, not before `now`, at which the TSC is at `deadline` or past it.
    fn time_of(self, deadline: u64, now: u64) -> u64 {
        let ticks = self.ticks(now);
        #[expect(clippy::cast_possible_truncation, reason = "the TSC wraps around")]
        let tsc = (ticks as u64).wrapping_add(self.offset);
        let Some(left) = deadline.checked_sub(tsc).filter(|&left| left != 0) else { return now };
        let at = ((ticks + u128::from(left)) * 1_000_000).div_ceil(self.khz.into());
        u64::try_from(at).unwrap_or(u64::MAX)
    }
}

/// The timer, without its LVT register's vector and mask.
#[derive(Debug)]
pub(super) struct Timer {
    /// The mode, as the LVT has it.
    mode: u32,
    /// Divide configuration register.
    divide: u32,
    /// Initial count register.
    initial: u32,
    /// IA32_TSC_DEADLINE; 0 where it is not armed.
    tsc_deadline: u64,
    tsc: Tsc,
    /// Time of the next expiry in ns.
    expiry: Option<u64>,
}

impl Timer {
    pub(super) fn new() -> Self {
        let tsc = Tsc { khz: TSC_KHZ, offset: 0 };
        Self { mode: 0, divide: 0, initial: 0, tsc_deadline: 0, tsc, expiry: None }
    }

    /// As reset leaves it.
    pub(super) fn reset(&mut self) {
        *self = Self { tsc: self.tsc, ..Self::new() };
    }

    /// Length of a tick of the count in ns: bits 0, 1 and 3 of the divide configuration.
    fn tick(&self) -> u64 {
        match self.divide & 3 | (self.divide & 8) >> 1 {
            7 => 1,
            n => 2 << n,
        }
    }

    fn period(&self) -> u64 {
        u64::from(self.initial) * self.tick()
    }

    fn counts_tsc(&self) -> bool {
        self.mode == TSC_DEADLINE
    }

    /// Lets the time until `now` pass; whether the timer has expired in it. However often it has:
    /// interrupts that nobody took in time are one.
    pub(super) fn advance(&mut self, now: u64) -> bool {
        let Some(expiry) = self.expiry.filter(|&expiry| expiry <= now) else { return false };
        self.expiry = match self.mode {
            // From the time it was due, not from now: the periods do not drift.
            PERIODIC if self.period() != 0 => {
                let missed = (now - expiry) / self.period();
                expiry.checked_add((missed + 1).saturating_mul(self.period()))
            }
            _ => None,
        };
        self.tsc_deadline = 0;
        true
    }

    /// Time of the next expiry in ns.
    pub(super) fn expiry(&self) -> Option<u64> {
        self.expiry
    }

    /// Sets the mode that LVT timer register `lvt` has. What has expired by now must have been taken.
    pub(super) fn set_mode(&mut self, lvt: u32) {
        let was_tsc = self.counts_tsc();
        self.mode = lvt & MODE;
        if was_tsc != self.counts_tsc() {
            self.expiry = None;
            self.initial = 0;
            self.tsc_deadline = 0;
        }
    }

    pub(super) fn divide(&self) -> u32 {
        self.divide
    }

    /// Sets the divide configuration; a count that runs goes on from where it is.
    pub(super) fn set_divide(&mut self, value: u32, now: u64) {
        let count = self.current(now);
        self.divide = value & 0xb;
        if self.expiry.is_some() && !self.counts_tsc() {
            self.start(count, now);
        }
    }

    pub(super) fn initial(&self) -> u32 {
        self.initial
    }

    /// Starts the count at `value`; 0 stops it.
    pub(super) fn set_initial(&mut self, value: u32, now: u64) {
        if !self.counts_tsc() {
            self.initial = value;
            self.start(value, now);
        }
    }

    fn start(&mut self, count: u32, now: u64) {
        self.expiry = (count != 0).then(|| now.saturating_add(u64::from(count) * self.tick()));
    }

    /// Current count register.
    pub(super) fn current(&self, now: u64) -> u32 {
        let (Some(expiry), false) = (self.expiry, self.counts_tsc()) else { return 0 };
        let left = match expiry.checked_sub(now) {
            Some(left) => left,
            // It has been reloaded, but for the interrupt.
            None if self.mode == PERIODIC && self.period() != 0 => {
                self.period() - (now - expiry) % self.period()
            }
            None => 0,
        };
        u32::try_from(left.div_ceil(self.tick())).unwrap_or(u32::MAX)
    }

    /// IA32_TSC_DEADLINE.
    pub(super) fn tsc_deadline(&self) -> u64 {
        self.tsc_deadline
    }

    /// Arms the timer for when the TSC is `value`; 0 disarms it. Nothing in the other modes.
    pub(super) fn set_tsc_deadline(&mut self, value: u64, now: u64) {
        if self.counts_tsc() {
            self.tsc_deadline = value;
            self.expiry = (value != 0).then(|| self.tsc.time_of(value, now));
        }
    }

    pub(super) fn set_tsc(&mut self, khz: u32, offset: u64, now: u64) {
        self.tsc = Tsc { khz: khz.max(1), offset };
        self.set_tsc_deadline(self.tsc_deadline, now);
    }

    /// Takes over saved registers, the current count among them. The deadline comes as an MSR.
    pub(super) fn restore(&mut self, lvt: u32, divide: u32, initial: u32, current: u32, now: u64) {
        self.reset();
        self.mode = lvt & MODE;
        self.divide = divide & 0xb;
        if self.counts_tsc() {
            return;
        }
        self.initial = initial;
        let count = if current == 0 && self.mode == PERIODIC { initial } else { current.min(initial) };
        self.start(count, now);
        if initial != 0 && count == 0 {
            // It has expired, and KVM may not have raised the interrupt yet: once more does no harm, and
            // KVM does the same.
            self.expiry = Some(now);
        }
    }
}
