//! Limits of rates, by token buckets.

use std::time::Duration;

/// So many (bytes, requests) each second in the long run, and up to `burst` at once after a time of few.
/// Of both, zero counts as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// How many each second.
    pub per_second: u64,
    /// How many at once.
    pub burst: u64,
}

impl Rate {
    /// `per_second` with a burst of as many.
    pub fn new(per_second: u64) -> Self {
        Self { per_second, burst: per_second }
    }
}

/// A bucket of tokens (bytes, requests) that fills evenly: what it lets through in a period is at most its
/// size more than the rate allows, and over time no more than that.
///
/// It reads no clock: callers say what time it is, as a duration since some beginning that never goes back.
/// A request larger than the bucket passes when that is full, and is paid for afterwards.
///
/// ```
/// use std::time::Duration;
/// use vmdevices::rate::TokenBucket;
///
/// // 1000 bytes a second.
/// let mut bucket = TokenBucket::new(1000, Duration::from_secs(1));
/// assert_eq!(bucket.take(600, Duration::ZERO), Ok(()));
/// assert_eq!(bucket.take(600, Duration::ZERO), Err(Duration::from_millis(200)));
/// assert_eq!(bucket.take(600, Duration::from_millis(200)), Ok(()));
/// ```
#[derive(Clone, Debug)]
pub struct TokenBucket {
    /// Tokens that it holds.
    size: u64,
    /// Tokens that come in each period.
    gain: u64,
    /// In nanoseconds.
    period: u128,
    /// What is in it, in tokens times nanoseconds of the period, so that nothing is lost by rounding;
    /// below zero where a large request is being paid for.
    level: i128,
    /// When it was filled last, in nanoseconds.
    filled: u128,
}

impl TokenBucket {
    /// A full bucket of `tokens`, which fills up in `period`. No tokens or no time mean one of each: one
    /// token, one nanosecond.
    pub fn new(tokens: u64, period: Duration) -> Self {
        Self::full(tokens, tokens, period.as_nanos())
    }

    /// A full bucket of the burst of `rate`, which fills as that says.
    pub fn with_rate(rate: Rate) -> Self {
        Self::full(rate.burst, rate.per_second, Duration::from_secs(1).as_nanos())
    }

    fn full(size: u64, gain: u64, period: u128) -> Self {
        let (size, gain, period) = (size.max(1), gain.max(1), period.max(1));
        Self { size, gain, period, level: units(size, period), filled: 0 }
    }

    /// Takes `tokens` at the time `now`.
    ///
    /// # Errors
    /// How long it takes until they can be had, where they are not there: nothing is taken.
    pub fn take(&mut self, tokens: u64, now: Duration) -> Result<(), Duration> {
        let wait = self.wait(tokens, now);
        if !wait.is_zero() {
            return Err(wait);
        }
        self.spend(tokens);
        Ok(())
    }

    /// How long it is from `now` until it has `tokens`, or as many as it holds; zero where it has them.
    pub fn wait(&mut self, tokens: u64, now: Duration) -> Duration {
        let now = now.as_nanos();
        let gained = i128::try_from(now.saturating_sub(self.filled)).unwrap_or(i128::MAX);
        // Each nanosecond brings as many units as tokens come in a period.
        let level = self.level.saturating_add(gained.saturating_mul(self.gain.into()));
        self.level = level.min(units(self.size, self.period));
        self.filled = self.filled.max(now);
        let missing = units(tokens.min(self.size), self.period).saturating_sub(self.level);
        nanos(u128::try_from(missing).unwrap_or(0).div_ceil(self.gain.into()))
    }

    /// Takes `tokens`, whether they are there or not: what is not is paid for before others can be had.
    pub fn spend(&mut self, tokens: u64) {
        self.level = self.level.saturating_sub(units(tokens, self.period));
    }

    /// How many tokens can be taken at the time `now`: at least 1 whenever [`TokenBucket::take`] of one
    /// succeeds.
    pub fn available(&mut self, now: Duration) -> u64 {
        // It fills.
        self.wait(0, now);
        let tokens = u128::try_from(self.level).unwrap_or(0) / self.period;
        u64::try_from(tokens).unwrap_or(u64::MAX)
    }
}

fn units(tokens: u64, period: u128) -> i128 {
    i128::try_from(u128::from(tokens).saturating_mul(period)).unwrap_or(i128::MAX)
}

fn nanos(nanos: u128) -> Duration {
    u64::try_from(nanos).map_or(Duration::from_nanos(u64::MAX), Duration::from_nanos)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_bucket_fills_evenly_and_not_over() {
        let mut bucket = TokenBucket::new(10, SECOND);
        assert_eq!(bucket.take(10, Duration::ZERO), Ok(()));
        assert_eq!(bucket.take(1, Duration::ZERO), Err(Duration::from_millis(100)));
        assert_eq!((bucket.available(SECOND / 2), bucket.available(SECOND * 1000)), (5, 10));
        assert_eq!(bucket.take(11, SECOND * 1000), Ok(()), "more than it holds, when it is full");
        assert_eq!(bucket.take(1, SECOND * 1000), Err(Duration::from_millis(200)), "and is paid for");
        assert_eq!(bucket.take(1, SECOND * 1000 + Duration::from_millis(200)), Ok(()));
        // A clock that goes back brings nothing, and takes nothing.
        assert_eq!(bucket.take(1, SECOND), Err(Duration::from_millis(100)));
    }

    #[test]
    fn a_rate_has_a_burst_and_debts() {
        let mut bucket = TokenBucket::with_rate(Rate { per_second: 100, burst: 5 });
        assert_eq!(bucket.take(5, Duration::ZERO), Ok(()));
        bucket.spend(2);
        assert_eq!(bucket.wait(1, Duration::ZERO), Duration::from_millis(30));
        assert_eq!(bucket.wait(1, Duration::from_millis(30)), Duration::ZERO);
        assert_eq!(
            bucket.wait(1000, Duration::from_millis(30)),
            Duration::from_millis(40),
            "no more than it holds"
        );
        assert_eq!(bucket.available(SECOND), 5);
    }

    #[test]
    fn extremes_are_no_trouble() {
        for (tokens, period) in [(0, Duration::ZERO), (u64::MAX, Duration::MAX), (1, Duration::MAX)] {
            let mut bucket = TokenBucket::new(tokens, period);
            assert_eq!(bucket.take(u64::MAX, Duration::ZERO), Ok(()));
            bucket.take(u64::MAX, Duration::MAX).ok();
            bucket.available(Duration::MAX);
        }
    }

    proptest! {
        /// Never more than bucket and rate allow, and who waits as long as it is told gets its tokens.
        #[test]
        fn a_rate_is_kept(
            size in 1u64..10_000,
            millis in 1u64..10_000,
            requests in prop::collection::vec((0u64..20_000, 0u64..1_000_000_000), 1..100),
        ) {
            let mut bucket = TokenBucket::new(size, Duration::from_millis(millis));
            let mut now = Duration::ZERO;
            let mut taken = 0u128;
            for (tokens, pause) in requests {
                now += Duration::from_nanos(pause);
                if let Err(wait) = bucket.take(tokens, now) {
                    prop_assert!(bucket.take(tokens, now + wait - Duration::from_nanos(1)).is_err());
                    now += wait;
                    prop_assert_eq!(bucket.take(tokens, now), Ok(()));
                }
                // What a large request takes beyond the bucket is paid for before the next one.
                let beyond = u128::from(tokens.saturating_sub(size));
                taken += u128::from(tokens);
                let allowed = u128::from(size) + now.as_nanos() * u128::from(size) / (u128::from(millis) * 1_000_000);
                prop_assert!(taken <= allowed + beyond, "{} of {}", taken, allowed);
            }
        }
    }
}
