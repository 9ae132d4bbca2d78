//! Dates of the proleptic Gregorian calendar.

/// A date and time of day in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DateTime {
    pub(super) year: i64,
    /// 1 to 12.
    pub(super) month: u8,
    /// 1 to 31.
    pub(super) day: u8,
    /// 1 (Sunday) to 7.
    pub(super) weekday: u8,
    pub(super) hour: u8,
    pub(super) minute: u8,
    pub(super) second: u8,
}

/// Days of each month before its year's leap day, March first: with the leap day last, the months
/// before a month have the same days every year.
const DAYS_BEFORE: [i64; 12] = [0, 31, 61, 92, 122, 153, 184, 214, 245, 275, 306, 337];

const SECONDS_A_DAY: i64 = 86_400;
/// Days from 1 March 0000 to 1 January 1970.
const EPOCH: i64 = 719_468;

/// Days before 1 March of `year`.
fn days_before(year: i64) -> i64 {
    year * 365 + year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400)
}

fn small(value: i64) -> u8 {
    u8::try_from(value).unwrap_or(0)
}

impl DateTime {
    /// The date that is `seconds` from the beginning of 1970.
    pub(super) fn from_unix(seconds: i64) -> Self {
        let days = seconds.div_euclid(SECONDS_A_DAY);
        let time = seconds.rem_euclid(SECONDS_A_DAY);
        let since_march_0 = days + EPOCH;
        // 400 years have 146,097 days. The guess is one too high at most.
        let guess = (since_march_0 * 400 + 400).div_euclid(146_097);
        let year = if days_before(guess) > since_march_0 { guess - 1 } else { guess };
        let day_of_year = since_march_0 - days_before(year);
        let month = DAYS_BEFORE.partition_point(|before| *before <= day_of_year) - 1;
        let day = day_of_year - DAYS_BEFORE[month] + 1;
        // Counted from March: 10 and 11 are January and February of the next year.
        let month = u8::try_from(month).unwrap_or(0);
        Self {
            year: year + i64::from(month >= 10),
            month: if month >= 10 { month - 9 } else { month + 3 },
            day: small(day),
            // 1 January 1970 was a Thursday.
            weekday: small((days + 4).rem_euclid(7)) + 1,
            hour: small(time / 3600),
            minute: small(time / 60 % 60),
            second: small(time % 60),
        }
    }

    /// Seconds from the beginning of 1970. A day that its month does not have is one of the next;
    /// the weekday does not matter.
    pub(super) fn to_unix(self) -> i64 {
        let (year, month) = match self.month {
            0..=2 => (self.year - 1, self.month + 9),
            month => (self.year, month - 3),
        };
        let before = DAYS_BEFORE.get(usize::from(month)).copied().unwrap_or(0);
        let days = days_before(year) + before + i64::from(self.day) - 1 - EPOCH;
        days * SECONDS_A_DAY
            + i64::from(self.hour) * 3600
            + i64::from(self.minute) * 60
            + i64::from(self.second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_dates() {
        for (unix, date) in [
            (0, (1970, 1, 1, 5, 0, 0, 0)),
            (951_782_399, (2000, 2, 28, 2, 23, 59, 59)),
            (951_782_400, (2000, 2, 29, 3, 0, 0, 0)),
            (951_868_800, (2000, 3, 1, 4, 0, 0, 0)),
            (1_709_164_800, (2024, 2, 29, 5, 0, 0, 0)),
            (4_107_542_399, (2100, 2, 28, 1, 23, 59, 59)),
            (4_107_542_400, (2100, 3, 1, 2, 0, 0, 0)),
            (-1, (1969, 12, 31, 4, 23, 59, 59)),
        ] {
            let d = DateTime::from_unix(unix);
            assert_eq!((d.year, d.month, d.day, d.weekday, d.hour, d.minute, d.second), date);
            assert_eq!(d.to_unix(), unix);
        }
    }

    proptest! {
        #[test]
        fn days_follow_each_other(day in -800_000..3_000_000i64, second in 0..SECONDS_A_DAY) {
            let unix = day * SECONDS_A_DAY + second;
            let date = DateTime::from_unix(unix);
            prop_assert_eq!(date.to_unix(), unix);
            prop_assert!((1..=12).contains(&date.month) && (1..=31).contains(&date.day));
            let next = DateTime::from_unix(unix + SECONDS_A_DAY);
            let same_month = next.day == date.day + 1 && next.month == date.month && next.year == date.year;
            let next_month = next.day == 1 && date.day >= 28 && next.month == date.month % 12 + 1;
            prop_assert!(same_month || next_month, "{:?} {:?}", date, next);
        }
    }
}
