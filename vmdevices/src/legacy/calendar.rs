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
const DAYS_IN_400_YEARS: i64 = 146_097;

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
        // Every 400 years, 146,097 days, the calendar repeats. Without the leap days that went before it (each
        // the last of its 4, 100 or 400 years), a day tells its year by 365.
        let day = since_march_0.rem_euclid(DAYS_IN_400_YEARS);
        let leap_days = day / 1460 - day / 36_524 + day / (DAYS_IN_400_YEARS - 1);
        let year = since_march_0.div_euclid(DAYS_IN_400_YEARS) * 400 + (day - leap_days) / 365;
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

    /// All of the days of the years -220 to 10183, which is more than the 400 years after which they repeat.
    #[test]
    fn days_follow_each_other() {
        let mut date = DateTime::from_unix(-800_000 * SECONDS_A_DAY - 1);
        for day in -800_000..3_000_000i64 {
            let unix = day * SECONDS_A_DAY + (day * 7919).rem_euclid(SECONDS_A_DAY);
            let next = DateTime::from_unix(unix);
            assert_eq!(next.to_unix(), unix);
            assert!((1..=12).contains(&next.month) && (1..=31).contains(&next.day), "{next:?}");
            let same_month = next.day == date.day + 1 && next.month == date.month && next.year == date.year;
            let next_month = next.day == 1
                && date.day >= 28
                && next.month == date.month % 12 + 1
                && next.year == date.year + i64::from(date.month == 12);
            assert!(same_month || next_month, "{date:?} {next:?}");
            assert_eq!(next.weekday, date.weekday % 7 + 1);
            date = next;
        }
    }
}
