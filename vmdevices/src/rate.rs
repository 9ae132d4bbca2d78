//! Limits of rates, by token buckets.

use std::time::Duration;

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
    /// Tokens that it holds, and that come in each period.
    size: u64,
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
        let (size, period) = (tokens.max(1), period.as_nanos().max(1));
        Self { size, period, level: units(size, period), filled: 0 }
    }

    /// Takes `tokens` at the time `now`.
    ///
    /// # Errors
    /// How long it takes until they can be had, where they are not there: nothing is taken.
    pub fn take(&mut self, tokens: u64, now: Duration) -> Result<(), Duration> {
        let now = now.as_nanos();
        let full = units(self.size, self.period);
        let gained = i128::try_from(now.saturating_sub(self.filled)).unwrap_or(i128::MAX);
        // Each nanosecond brings as many units as the bucket has tokens.
        self.level = self.level.saturating_add(gained.saturating_mul(self.size.into())).min(full);
        self.filled = self.filled.max(now);
        let cost = units(tokens, self.period);
        let needed = cost.min(full);
        if self.level >= needed {
            self.level = self.level.saturating_sub(cost);
            return Ok(());
        }
        let missing = u128::try_from(needed.saturating_sub(self.level)).unwrap_or(0);
        Err(nanos(missing.div_ceil(self.size.into())))
    }

    /// How many tokens can be taken at the time `now`: at least 1 whenever [`TokenBucket::take`] of one
    /// succeeds.
    pub fn available(&mut self, now: Duration) -> u64 {
        // Taking none fills it.
        self.take(0, now).ok();
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
