//! One counter of an 8254 (Intel 8254 data sheet).
//!
//! A counter is not clocked: what it counts is computed from the machine's time when somebody looks.
//! A count written in modes 2 and 3 takes effect at once, not at the end of the period.

use crate::state::PitChannelState;

/// Input clock in Hz.
const FREQUENCY: u128 = 1_193_182;
const NS_PER_S: u128 = 1_000_000_000;

/// Ticks between two interrupts of a periodic counter at least, 200 us: what is asked for more often is
/// coalesced, so that a count of 1 does not keep a host processor busy.
const MIN_PERIOD: u64 = 239;

/// The mode of a counter that has not been programmed.
const UNPROGRAMMED: u8 = 0xff;

/// States of reading and writing; what is not here is the low byte alone, which is 1. The access modes
/// RW1 and RW0 of the control word are what they begin with.
mod access {
    pub(super) const HIGH: u8 = 2;
    pub(super) const BOTH: u8 = 3;
    /// The low byte is done, the high byte follows.
    pub(super) const BOTH_HIGH: u8 = 4;
}

/// Since when a counter counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Run {
    /// Waits for a count or a trigger.
    Idle,
    /// Held by its gate, this many ticks after loading.
    Held(u64),
    /// Loaded at this time in ns.
    Since(u64),
}

/// Ticks in `ns`.
fn ticks(ns: u64) -> u64 {
    u64::try_from(u128::from(ns) * FREQUENCY / NS_PER_S).unwrap_or(u64::MAX)
}

/// The first ns at which `ticks` have passed.
fn nanoseconds(ticks: u64) -> u64 {
    u64::try_from((u128::from(ticks) * NS_PER_S).div_ceil(FREQUENCY)).unwrap_or(u64::MAX)
}

#[derive(Clone, Debug)]
pub(super) struct Counter {
    state: PitChannelState,
    run: Run,
    /// When OUT rises next, in ticks after loading; `None` where it will not.
    rise: Option<u64>,
}

impl Counter {
    pub(super) fn new(gate: bool) -> Self {
        let state =
            PitChannelState { mode: UNPROGRAMMED, count: 0x1_0000, gate, ..PitChannelState::default() };
        Self { state, run: Run::Idle, rise: None }
    }

    /// The count that was loaded, 1 to 65536 ticks.
    fn period(&self) -> u64 {
        let count = u64::from(self.state.count);
        let count = match (count & 0xffff, self.state.bcd) {
            (0, true) => 10_000,
            (0, false) => 0x1_0000,
            (count, true) => (0..4).rev().fold(0, |sum, digit| sum * 10 + (count >> (4 * digit) & 0xf)),
            (count, false) => count,
        };
        count.max(1)
    }

    /// Ticks since loading.
    fn elapsed(&self, now: u64) -> Option<u64> {
        match self.run {
            Run::Idle => None,
            Run::Held(ticks) => Some(ticks),
            Run::Since(start) => Some(ticks(now.saturating_sub(start))),
        }
    }

    /// The counting element, as it is read.
    pub(super) fn count(&self, now: u64) -> u16 {
        let period = self.period();
        let elapsed = self.elapsed(now).unwrap_or(0);
        let modulus = if self.state.bcd { 10_000 } else { 0x1_0000 };
        let value = match self.state.mode {
            2 => period - elapsed % period,
            3 => {
                // Two at a time, once for each half; odd counts begin one lower.
                let (at, half) = (elapsed % period, period.div_ceil(2));
                (period & !1).saturating_sub(2 * if at < half { at } else { at - half })
            }
            // Counts through zero and on.
            _ => (period + modulus - elapsed % modulus) % modulus,
        };
        let value = value % modulus;
        #[expect(clippy::cast_possible_truncation, reason = "it is below the modulus")]
        let binary = value as u16;
        if !self.state.bcd {
            return binary;
        }
        [1000, 100, 10, 1].into_iter().fold(0, |sum, place| (sum << 4) | (binary / place % 10))
    }

    /// The level of OUT (data sheet, "Mode definitions").
    pub(super) fn out(&self, now: u64) -> bool {
        let period = self.period();
        let Some(elapsed) = self.elapsed(now) else { return self.state.mode != 0 };
        match self.state.mode {
            0 | 1 => elapsed >= period,
            2 => !self.state.gate || elapsed % period != period - 1,
            3 => !self.state.gate || elapsed % period < period.div_ceil(2),
            4 | 5 => elapsed != period,
            _ => true,
        }
    }

    /// Begins to count at `now`, as far as the gate lets it.
    fn start(&mut self, now: u64) {
        self.run = match self.state.mode {
            0 | 2..=4 if !self.state.gate => Run::Held(0),
            0..=5 => Run::Since(now),
            _ => Run::Idle,
        };
        let period = self.period();
        self.rise = match self.state.mode {
            0 | 1 => Some(period),
            2 | 3 => Some(period * self.step()),
            4 | 5 => Some(period + 1),
            _ => None,
        };
    }

    /// Periods that make up at least [`MIN_PERIOD`].
    fn step(&self) -> u64 {
        MIN_PERIOD.div_ceil(self.period())
    }

    /// When OUT rises next, in ns of the machine's time.
    pub(super) fn deadline(&self) -> Option<u64> {
        match (self.run, self.rise) {
            (Run::Since(start), Some(rise)) => Some(start.saturating_add(nanoseconds(rise))),
            _ => None,
        }
    }

    /// Whether OUT has risen since it was last asked.
    pub(super) fn take_rise(&mut self, now: u64) -> bool {
        let (Run::Since(_), Some(rise), Some(elapsed)) = (self.run, self.rise, self.elapsed(now)) else {
            return false;
        };
        if elapsed < rise {
            return false;
        }
        let period = self.period();
        let periodic = matches!(self.state.mode, 2 | 3);
        self.rise = periodic.then(|| (elapsed / period + self.step()) * period);
        true
    }

    /// Sets the level of the gate.
    pub(super) fn set_gate(&mut self, now: u64, high: bool) {
        let rises = high && !self.state.gate;
        self.state.gate = high;
        match (self.state.mode, self.run) {
            // A trigger.
            (1 | 5, _) if rises => self.start(now),
            (2 | 3, Run::Held(_)) if rises => self.start(now),
            (0 | 4, Run::Held(ticks)) if rises => {
                self.run = Run::Since(now.saturating_sub(nanoseconds(ticks)));
            }
            (0 | 2..=4, Run::Since(start)) if !high => {
                self.run = Run::Held(ticks(now.saturating_sub(start)));
            }
            _ => {}
        }
    }

    /// A control word for this counter: access mode, mode, BCD; access mode 0 latches the count.
    pub(super) fn control(&mut self, now: u64, word: u8) {
        let rw = word >> 4 & 3;
        if rw == 0 {
            self.latch_count(now);
            return;
        }
        let mode = word >> 1 & 7;
        let s = &mut self.state;
        (s.rw_mode, s.read_state, s.write_state) = (rw, rw, rw);
        s.mode = if mode > 5 { mode - 4 } else { mode };
        s.bcd = word & 1 != 0;
        (s.count_latched, s.status_latched) = (0, false);
        (self.run, self.rise) = (Run::Idle, None);
    }

    pub(super) fn latch_count(&mut self, now: u64) {
        if self.state.count_latched == 0 {
            self.state.latched_count = self.count(now);
            self.state.count_latched = self.state.rw_mode;
        }
    }

    pub(super) fn latch_status(&mut self, now: u64) {
        if !self.state.status_latched {
            // Null count: a count is awaited.
            let null = matches!(self.run, Run::Idle);
            let s = &self.state;
            self.state.status = u8::from(self.out(now)) << 7
                | u8::from(null) << 6
                | (s.rw_mode & 3) << 4
                | (s.mode & 7) << 1
                | u8::from(s.bcd);
            self.state.status_latched = true;
        }
    }

    pub(super) fn read(&mut self, now: u64) -> u8 {
        let count = self.count(now);
        let s = &mut self.state;
        if std::mem::take(&mut s.status_latched) {
            return s.status;
        }
        if s.count_latched != 0 {
            let [low, high] = s.latched_count.to_le_bytes();
            let (byte, next) = match s.count_latched {
                access::HIGH => (high, 0),
                access::BOTH => (low, access::HIGH),
                _ => (low, 0),
            };
            s.count_latched = next;
            return byte;
        }
        let [low, high] = count.to_le_bytes();
        let (byte, next) = match s.read_state {
            access::HIGH => (high, access::HIGH),
            access::BOTH => (low, access::BOTH_HIGH),
            access::BOTH_HIGH => (high, access::BOTH),
            state => (low, state),
        };
        s.read_state = next;
        byte
    }

    /// Writes a byte of the count.
    pub(super) fn write(&mut self, now: u64, value: u8) {
        let s = &mut self.state;
        let value = u32::from(value);
        let count = match s.write_state {
            access::HIGH => value << 8,
            access::BOTH => {
                [s.write_latch, ..] = value.to_le_bytes();
                s.write_state = access::BOTH_HIGH;
                if s.mode == 0 {
                    // The first byte stops the count (data sheet, "Mode 0").
                    (self.run, self.rise) = (Run::Idle, None);
                }
                return;
            }
            access::BOTH_HIGH => {
                s.write_state = access::BOTH;
                value << 8 | u32::from(s.write_latch)
            }
            _ => value,
        };
        s.count = if count == 0 { 0x1_0000 } else { count };
        // Modes 1 and 5 wait for their trigger.
        if !matches!(s.mode, 1 | 5) {
            self.start(now);
        }
    }

    pub(super) fn save(&self, now: u64) -> PitChannelState {
        let start = match self.run {
            Run::Since(start) => start,
            Run::Held(ticks) => now.saturating_sub(nanoseconds(ticks)),
            Run::Idle => now,
        };
        PitChannelState { count_load_time_ns: i64::try_from(start).unwrap_or(i64::MAX), ..self.state }
    }

    /// Takes over a state. The count begins anew: when it began is not comparable between hosts.
    pub(super) fn restore(&mut self, now: u64, state: &PitChannelState) {
        *self = Self { state: *state, run: Run::Idle, rise: None };
        if !matches!(state.mode, 1 | 5) {
            self.start(now);
        }
    }
}
