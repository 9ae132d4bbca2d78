//! The registers of an MC146818 real-time clock (Motorola MC146818A data sheet, 1984).

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::calendar::DateTime;

/// Registers of the time; those between them are the alarm's.
const SECOND: u8 = 0;
const MINUTE: u8 = 2;
const HOUR: u8 = 4;
const WEEKDAY: u8 = 6;
const DAY: u8 = 7;
const MONTH: u8 = 8;
const YEAR: u8 = 9;
/// Where the century is: where the FADT says.
pub(super) const CENTURY: u8 = vmcore::boot::acpi::RTC_CENTURY;
const TIME: [u8; 8] = [SECOND, MINUTE, HOUR, WEEKDAY, DAY, MONTH, YEAR, CENTURY];
const SECOND_ALARM: u8 = 1;
const MINUTE_ALARM: u8 = 3;
const HOUR_ALARM: u8 = 5;
pub(super) const A: u8 = 0x0a;
pub(super) const B: u8 = 0x0b;
pub(super) const C: u8 = 0x0c;
pub(super) const D: u8 = 0x0d;

/// Register A: an update is under way.
const UPDATE_IN_PROGRESS: u8 = 1 << 7;
/// How long before an update that shows.
const UPDATE_TIME: Duration = Duration::from_micros(244);

/// Register B.
const SET: u8 = 1 << 7;
const BINARY: u8 = 1 << 2;
const HOURS_24: u8 = 1 << 1;

/// Registers B (enable) and C (flag).
const PERIODIC: u8 = 1 << 6;
const ALARM: u8 = 1 << 5;
const UPDATE_ENDED: u8 = 1 << 4;
/// Register C: an enabled flag is set.
const INTERRUPT: u8 = 1 << 7;

/// Register D: the battery is good.
const VALID: u8 = 1 << 7;

/// Hours in the 12-hour format: after noon.
const PM: u8 = 1 << 7;
/// The two upper bits of an alarm that matches every value.
const ANY: u8 = 0xc0;

const SECONDS_A_DAY: i64 = 86_400;
const NS_A_SECOND: u128 = 1_000_000_000;

/// How many bytes of memory there are, the registers among them.
pub(super) const MEMORY: usize = 128;

/// A real-time clock. It does not know what time it is: each call says so, as UTC since 1970.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Rtc {
    memory: Vec<u8>,
    /// What the guest's time is ahead of the host's, in seconds.
    ahead: i64,
    /// Flags of register C.
    flags: u8,
    /// Until when flags have been looked for, on the host's clock.
    looked: Duration,
}

impl Rtc {
    /// A clock that shows the host's time in BCD and 24 hours.
    pub(super) fn new(now: Duration) -> Self {
        let mut memory = vec![0; MEMORY];
        // 32.768 kHz crystal, 1024 Hz.
        memory[usize::from(A)] = 0x26;
        memory[usize::from(B)] = HOURS_24;
        Self { memory, ahead: 0, flags: 0, looked: now }
    }

    /// Whether a saved state is one that the chip can have.
    pub(super) fn is_valid(&self) -> bool {
        // Within some 30,000 years, so that no arithmetic overflows.
        self.memory.len() == MEMORY && self.ahead.unsigned_abs() < 1 << 40 && self.looked.as_secs() < 1 << 40
    }

    fn get(&self, register: u8) -> u8 {
        self.memory.get(usize::from(register)).copied().unwrap_or(0xff)
    }

    /// Sets a byte of the memory, as firmware does.
    pub(super) fn set(&mut self, register: u8, value: u8) {
        if let Some(byte) = self.memory.get_mut(usize::from(register)) {
            *byte = value;
        }
    }

    fn in_b(&self, bit: u8) -> bool {
        self.get(B) & bit != 0
    }

    /// The guest reads `register` (0 to 127).
    pub(super) fn read(&mut self, register: u8, now: Duration) -> u8 {
        match register {
            A => {
                let left =
                    Duration::from_secs(1).saturating_sub(Duration::from_nanos(now.subsec_nanos().into()));
                let updating = left <= UPDATE_TIME && !self.in_b(SET);
                self.get(A) | if updating { UPDATE_IN_PROGRESS } else { 0 }
            }
            C => {
                self.look(now);
                let flags = self.flags | if self.interrupt() { INTERRUPT } else { 0 };
                self.flags = 0;
                flags
            }
            D => VALID,
            time if TIME.contains(&time) => {
                if !self.in_b(SET) {
                    self.show(now);
                }
                self.get(time)
            }
            other => self.get(other),
        }
    }

    /// The guest writes `register` (0 to 127).
    pub(super) fn write(&mut self, register: u8, value: u8, now: Duration) {
        self.look(now);
        match register {
            A => self.set(A, value & !UPDATE_IN_PROGRESS),
            B => {
                let (before, after) = (self.in_b(SET), value & SET != 0);
                if !before && after {
                    self.show(now);
                }
                // Setting the time ends no update.
                self.set(B, if after { value & !UPDATE_ENDED } else { value });
                if before && !after {
                    self.take_time(now);
                }
            }
            C | D => {}
            time if TIME.contains(&time) && !self.in_b(SET) => {
                self.show(now);
                self.set(time, value);
                self.take_time(now);
            }
            other => self.set(other, value),
        }
    }

    /// A number as the registers have it.
    fn encode(&self, value: u8) -> u8 {
        if self.in_b(BINARY) { value } else { ((value / 10 % 10) << 4) | (value % 10) }
    }

    /// A number from a register. What is no BCD digit counts on.
    fn decode(&self, value: u8) -> u8 {
        if self.in_b(BINARY) { value } else { (value >> 4) * 10 + (value & 0xf) }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.in_b(HOURS_24) {
            return self.encode(hour);
        }
        // Twelve, one, ... eleven.
        let of_12 = (hour + 11) % 12 + 1;
        self.encode(of_12) | if hour >= 12 { PM } else { 0 }
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.in_b(HOURS_24) {
            return self.decode(value);
        }
        self.decode(value & !PM) % 12 + if value & PM != 0 { 12 } else { 0 }
    }

    fn guest_seconds(&self, now: Duration) -> i64 {
        i64::try_from(now.as_secs()).unwrap_or(0).saturating_add(self.ahead)
    }

    /// Puts the time into its registers.
    fn show(&mut self, now: Duration) {
        let time = DateTime::from_unix(self.guest_seconds(now));
        let [year, century] =
            [time.year, time.year.div_euclid(100)].map(|n| u8::try_from(n.rem_euclid(100)).unwrap_or(0));
        let values = [
            (SECOND, self.encode(time.second)),
            (MINUTE, self.encode(time.minute)),
            (HOUR, self.encode_hour(time.hour)),
            (WEEKDAY, self.encode(time.weekday)),
            (DAY, self.encode(time.day)),
            (MONTH, self.encode(time.month)),
            (YEAR, self.encode(year)),
            (CENTURY, self.encode(century)),
        ];
        values.into_iter().for_each(|(register, value)| self.set(register, value));
    }

    /// Goes on from the time in the registers. What is out of range is cut to it.
    fn take_time(&mut self, now: Duration) {
        let number = |register| self.decode(self.get(register));
        let time = DateTime {
            year: i64::from(number(CENTURY).min(99)) * 100 + i64::from(number(YEAR).min(99)),
            month: number(MONTH).clamp(1, 12),
            day: number(DAY).clamp(1, 31),
            weekday: 1,
            hour: self.decode_hour(self.get(HOUR)).min(23),
            minute: number(MINUTE).min(59),
            second: number(SECOND).min(59),
        };
        self.ahead = time.to_unix() - i64::try_from(now.as_secs()).unwrap_or(0);
    }

    /// Ticks a second of the periodic flag; 0 where it is off (data sheet, table 5).
    fn periodic_rate(&self) -> u128 {
        match self.get(A) & 0x0f {
            0 => 0,
            // The two slowest codes of the 32.768 kHz crystal come first.
            select @ (1 | 2) => 256 >> (select - 1),
            select => 32_768 >> (select - 1),
        }
    }

    /// Sets the flags of what has happened since the last look.
    pub(super) fn look(&mut self, now: Duration) {
        let before = std::mem::replace(&mut self.looked, now);
        // The host's clock can be set back; nothing has happened then.
        if now <= before {
            return;
        }
        let ticks = |at: Duration| at.as_nanos() * self.periodic_rate() / NS_A_SECOND;
        if ticks(before) != ticks(now) {
            self.flags |= PERIODIC;
        }
        if before.as_secs() != now.as_secs() && !self.in_b(SET) {
            self.flags |= UPDATE_ENDED;
            let alarm = self.next_alarm(self.guest_seconds(before));
            if alarm.is_some_and(|at| at <= self.guest_seconds(now)) {
                self.flags |= ALARM;
            }
        }
    }

    /// Whether the interrupt output is active.
    pub(super) fn interrupt(&self) -> bool {
        self.flags & self.get(B) & (PERIODIC | ALARM | UPDATE_ENDED) != 0
    }

    /// When the next enabled interrupt comes, on the host's clock.
    pub(super) fn next_event(&self, now: Duration) -> Option<Duration> {
        let seconds = i64::try_from(now.as_secs()).unwrap_or(0);
        let running = !self.in_b(SET);
        let update = (self.in_b(UPDATE_ENDED) && running).then_some(seconds + 1);
        let alarm = (self.in_b(ALARM) && running)
            .then(|| self.next_alarm(self.guest_seconds(now)))
            .flatten()
            .map(|at| at.saturating_sub(self.ahead));
        let whole = [update, alarm].into_iter().flatten().min();
        let whole = whole.and_then(|at| u64::try_from(at).ok()).map(Duration::from_secs);
        let rate = if self.in_b(PERIODIC) { self.periodic_rate() } else { 0 };
        let periodic = (rate > 0).then(|| {
            let tick = now.as_nanos() * rate / NS_A_SECOND + 1;
            let ns = (tick * NS_A_SECOND).div_ceil(rate);
            Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX))
        });
        [whole, periodic].into_iter().flatten().min()
    }

    /// The first second behind `after` that the alarm registers match, in the guest's time; `None`
    /// where they match none.
    fn next_alarm(&self, after: i64) -> Option<i64> {
        let matches = |register, value: u8, decoded: u8| self.get(register) & ANY == ANY || decoded == value;
        let mut at = after.checked_add(1)?;
        // A day has a match or no day has: at most 24 hours, 60 minutes and 60 seconds are skipped
        // over, some of them twice.
        for _ in 0..300 {
            let time = DateTime::from_unix(at);
            let of_day = at.rem_euclid(SECONDS_A_DAY);
            if !matches(HOUR_ALARM, time.hour, self.decode_hour(self.get(HOUR_ALARM))) {
                at += 3600 - of_day % 3600;
            } else if !matches(MINUTE_ALARM, time.minute, self.decode(self.get(MINUTE_ALARM))) {
                at += 60 - of_day % 60;
            } else if !matches(SECOND_ALARM, time.second, self.decode(self.get(SECOND_ALARM))) {
                at += 1;
            } else {
                return Some(at);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Thursday, 31 December 2099, 23:59:58 UTC and a half.
    const EVE: Duration = Duration::from_millis(4_102_444_798_500);

    fn clock(b: u8) -> Rtc {
        let mut rtc = Rtc::new(EVE);
        rtc.write(B, b, EVE);
        rtc
    }

    fn time(rtc: &mut Rtc, now: Duration) -> [u8; 8] {
        TIME.map(|register| rtc.read(register, now))
    }

    #[test]
    fn the_time_rolls_over_in_each_format() {
        let next = EVE + Duration::from_secs(2);
        let mut rtc = clock(HOURS_24);
        assert_eq!(time(&mut rtc, EVE), [0x58, 0x59, 0x23, 5, 0x31, 0x12, 0x99, 0x20]);
        assert_eq!(time(&mut rtc, next), [0, 0, 0, 6, 1, 1, 0, 0x21]);
        let mut rtc = clock(HOURS_24 | BINARY);
        assert_eq!(time(&mut rtc, EVE), [58, 59, 23, 5, 31, 12, 99, 20]);
        let mut rtc = clock(0);
        assert_eq!(time(&mut rtc, EVE)[2], PM | 0x11);
        assert_eq!(time(&mut rtc, next)[2], 0x12);
        assert_eq!(time(&mut rtc, next + Duration::from_secs(13 * 3600))[2], PM | 0x01);
    }

    #[test]
    fn the_time_can_be_set_and_goes_on_from_there() {
        for b in [0, HOURS_24, BINARY, HOURS_24 | BINARY] {
            let mut rtc = clock(b);
            rtc.write(B, b | SET, EVE);
            let wanted =
                DateTime { year: 1987, month: 2, day: 28, weekday: 7, hour: 12, minute: 34, second: 56 };
            let hour = rtc.encode_hour(12);
            for (register, value) in
                [(SECOND, 56), (MINUTE, 34), (WEEKDAY, 1), (DAY, 28), (MONTH, 2), (YEAR, 87), (CENTURY, 19)]
            {
                let value = rtc.encode(value);
                rtc.write(register, value, EVE);
            }
            rtc.write(HOUR, hour, EVE);
            let later = EVE + Duration::from_secs(100);
            let second = rtc.read(SECOND, later);
            assert_eq!(rtc.decode(second), 56, "it stands while it is set");
            rtc.write(B, b, later);
            assert_eq!(DateTime::from_unix(rtc.guest_seconds(later)), wanted);
            let second = rtc.read(SECOND, later + Duration::from_secs(10));
            let minute = rtc.read(MINUTE, later + Duration::from_secs(10));
            assert_eq!((rtc.decode(minute), rtc.decode(second)), (35, 6));
        }
    }

    #[test]
    fn an_update_shows_before_it_happens() {
        let mut rtc = clock(HOURS_24);
        let at = |ns| Duration::new(100, ns);
        assert_eq!(rtc.read(A, at(0)), 0x26);
        assert_eq!(rtc.read(A, at(999_000_000)), 0x26);
        assert_eq!(rtc.read(A, at(999_800_000)), 0x26 | UPDATE_IN_PROGRESS);
        rtc.write(B, SET, at(0));
        assert_eq!(rtc.read(A, at(999_800_000)), 0x26);
        assert_eq!(rtc.read(D, at(0)), VALID);
    }

    #[test]
    fn the_alarm_rings_at_its_time() {
        let mut rtc = clock(HOURS_24 | ALARM);
        for (register, value) in [(SECOND_ALARM, 0x05), (MINUTE_ALARM, 0xff), (HOUR_ALARM, 0x00)] {
            rtc.write(register, value, EVE);
        }
        // 5 seconds into the next day, 6.5 from now.
        let ring = Duration::from_secs(EVE.as_secs() + 7);
        assert_eq!(rtc.next_event(EVE), Some(ring));
        rtc.look(ring - Duration::from_nanos(1));
        assert!(!rtc.interrupt());
        rtc.look(ring);
        assert!(rtc.interrupt());
        assert_eq!(rtc.read(C, ring), INTERRUPT | ALARM | UPDATE_ENDED | PERIODIC);
        assert_eq!((rtc.read(C, ring), rtc.interrupt()), (0, false));
        assert_eq!(rtc.next_event(ring), Some(ring + Duration::from_secs(60)), "every minute of the hour");
        rtc.write(SECOND_ALARM, 0x61, ring);
        assert_eq!(rtc.next_event(ring), None);
    }

    #[test]
    fn updates_and_periods_interrupt_where_enabled() {
        let mut rtc = clock(HOURS_24 | UPDATE_ENDED);
        assert_eq!(rtc.next_event(EVE), Some(Duration::from_secs(EVE.as_secs() + 1)));
        rtc.write(B, PERIODIC, EVE);
        let tick = rtc.next_event(EVE).unwrap();
        assert!(tick > EVE && tick - EVE <= Duration::from_nanos(976_563), "{:?}", tick - EVE);
        rtc.look(tick - Duration::from_nanos(1));
        assert!(!rtc.interrupt());
        rtc.look(tick);
        assert!(rtc.interrupt());
        rtc.write(A, 0x20, tick);
        assert_eq!(rtc.next_event(tick), None);
        for (select, rate) in [(1, 256), (2, 128), (3, 8192), (6, 1024), (15, 2)] {
            rtc.write(A, 0x20 | select, tick);
            assert_eq!(rtc.periodic_rate(), rate);
        }
    }

    #[test]
    fn memory_is_kept() {
        let mut rtc = clock(HOURS_24);
        rtc.write(0x0e, 1, EVE);
        rtc.write(0x7f, 2, EVE);
        rtc.write(CENTURY, 0x19, EVE);
        assert_eq!((rtc.read(0x0e, EVE), rtc.read(0x7f, EVE), rtc.read(YEAR, EVE)), (1, 2, 0x99));
        assert_eq!(rtc.read(CENTURY, EVE + Duration::from_secs(2)), 0x20);
    }

    proptest! {
        #[test]
        fn no_access_breaks_it(
            accesses in prop::collection::vec((any::<bool>(), any::<u8>(), any::<u8>(), any::<u32>()), 0..300),
        ) {
            let (mut now, mut rtc) = (EVE, Rtc::new(EVE));
            for (write, register, value, ns) in accesses {
                // Mostly the registers, and sometimes days later.
                let register = if register < 64 { register % 14 } else { register };
                now += Duration::from_nanos(ns.into()) * if value == 0 { 100_000 } else { 1 };
                if write {
                    rtc.write(register, value, now);
                } else {
                    rtc.read(register, now);
                }
                prop_assert!(rtc.is_valid());
                prop_assert!(rtc.next_event(now).is_none_or(|at| at > now));
            }
        }
    }
}
