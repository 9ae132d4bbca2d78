//! How much of a disk a guest may have: operations and bytes a second, with bursts.

use std::time::{Duration, Instant};

/// A rate: so much each second on average, and up to `burst` at once after a pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Units (operations or bytes) each second; at least 1.
    pub per_second: u64,
    /// Units that may be had at once; at least one tenth of a second's worth counts.
    pub burst: u64,
}

impl Rate {
    /// `per_second` with a burst of as much.
    pub fn new(per_second: u64) -> Self {
        Self { per_second, burst: per_second }
    }
}

/// What a disk's guest is held to. Each may be left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Operations: requests of any kind.
    pub operations: Option<Rate>,
    /// Bytes read and written.
    pub bytes: Option<Rate>,
}

/// A token bucket. It may go into debt for one request, so that those larger than the burst pass too.
#[derive(Debug)]
struct Bucket {
    rate: Rate,
    /// Billionths of a unit. Negative: what must be refilled before anything passes.
    tokens: i128,
    filled: Instant,
}

const SCALE: i128 = 1_000_000_000;

impl Bucket {
    fn new(rate: Rate, now: Instant) -> Self {
        let per_second = rate.per_second.max(1);
        let rate = Rate { per_second, burst: rate.burst.max(per_second / 10).max(1) };
        Self { rate, tokens: i128::from(rate.burst) * SCALE, filled: now }
    }

    fn fill(&mut self, now: Instant) {
        let passed = i128::try_from(now.saturating_duration_since(self.filled).as_nanos()).unwrap_or(SCALE);
        self.filled = self.filled.max(now);
        let more = passed.saturating_mul(self.rate.per_second.into());
        self.tokens = self.tokens.saturating_add(more).min(i128::from(self.rate.burst) * SCALE);
    }

    /// How long until the debt is paid; zero where something may pass.
    fn wait(&self) -> Duration {
        if self.tokens > 0 {
            return Duration::ZERO;
        }
        let nanoseconds = (1 - self.tokens).div_euclid(self.rate.per_second.into()) + 1;
        Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
    }
}

/// Holds requests to [`Limits`]. It never sleeps: who is refused is told when to come again.
#[derive(Debug)]
pub(crate) struct Limiter {
    operations: Option<Bucket>,
    bytes: Option<Bucket>,
}

impl Limiter {
    pub(crate) fn new(limits: Limits, now: Instant) -> Self {
        let bucket = |rate: Option<Rate>| rate.map(|rate| Bucket::new(rate, now));
        Self { operations: bucket(limits.operations), bytes: bucket(limits.bytes) }
    }

    /// Lets a request of `bytes` pass at time `now`, or says how long it has to wait.
    pub(crate) fn admit(&mut self, bytes: u64, now: Instant) -> Result<(), Duration> {
        let buckets = [(&mut self.operations, 1), (&mut self.bytes, bytes)];
        let mut longest = Duration::ZERO;
        let mut passed = buckets.map(|(bucket, cost)| {
            let bucket = bucket.as_mut();
            bucket.map(|bucket| {
                bucket.fill(now);
                longest = longest.max(bucket.wait());
                (bucket, cost)
            })
        });
        if !longest.is_zero() {
            return Err(longest);
        }
        for (bucket, cost) in passed.iter_mut().flatten() {
            bucket.tokens -= i128::from(*cost) * SCALE;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// How much passes in `seconds` of asking as soon as one may.
    fn passed(limits: Limits, size: u64, seconds: u64) -> u64 {
        let begin = Instant::now();
        let (mut limiter, mut now, mut count) = (Limiter::new(limits, begin), begin, 0);
        while now < begin + Duration::from_secs(seconds) {
            match limiter.admit(size, now) {
                Ok(()) => count += 1,
                Err(wait) => now += wait,
            }
        }
        count
    }

    #[test]
    fn the_burst_passes_at_once_and_the_rate_afterwards() {
        let operations =
            |per_second, burst| Limits { operations: Some(Rate { per_second, burst }), ..Limits::default() };
        assert!((1100..=1102).contains(&passed(operations(100, 100), 4096, 10)));
        assert!((1500..=1502).contains(&passed(operations(100, 500), 4096, 10)));
        let bytes = Limits { bytes: Some(Rate::new(1 << 20)), ..Limits::default() };
        assert!((256 * 11..=256 * 11 + 2).contains(&passed(bytes, 4096, 10)));
        // Larger than the burst: they pass one by one, as the rate allows.
        assert!((6..=7).contains(&passed(bytes, 2 << 20, 10)));
        let both = Limits { operations: Some(Rate::new(10)), ..bytes };
        assert!((110..=112).contains(&passed(both, 4096, 10)));
        // Nothing at all is as little as can be.
        assert!((1..=12).contains(&passed(operations(0, 0), 1, 10)));
    }

    proptest! {
        #[test]
        fn no_more_than_rate_and_burst_and_one_request(
            per_second in 1u64..1 << 40, burst in 0u64..1 << 40,
            steps in prop::collection::vec((0u64..1 << 32, 0u64..2_000_000_000), 1..100),
        ) {
            let begin = Instant::now();
            let limits = Limits { bytes: Some(Rate { per_second, burst }), ..Limits::default() };
            let (mut limiter, mut now, mut total, mut largest) = (Limiter::new(limits, begin), begin, 0, 0);
            for (bytes, wait) in steps {
                match limiter.admit(bytes, now) {
                    Ok(()) => total += bytes,
                    Err(wait) => {
                        prop_assert!(wait > Duration::ZERO);
                        // Who waits as long as told passes.
                        prop_assert_eq!(limiter.admit(bytes, now + wait), Ok(()));
                        now += wait;
                        total += bytes;
                    }
                }
                largest = largest.max(bytes);
                now += Duration::from_nanos(wait);
            }
            let most = (now - begin).as_secs_f64() * per_second as f64
                + burst.max(per_second / 10).max(1) as f64 + largest as f64;
            prop_assert!(total as f64 <= most * 1.000_001 + 2.0, "{} {}", total, most);
        }
    }
}
