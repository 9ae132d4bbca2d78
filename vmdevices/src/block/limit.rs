//! How much of a disk a guest may have: operations and bytes a second, with bursts.

use std::time::{Duration, Instant};

use crate::rate::{Rate, TokenBucket};

/// What a disk's guest is held to. Each may be left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Operations: requests of any kind.
    pub operations: Option<Rate>,
    /// Bytes read and written.
    pub bytes: Option<Rate>,
}

/// Holds requests to [`Limits`]. It never sleeps: who is refused is told when to come again.
#[derive(Debug)]
pub(crate) struct Limiter {
    begin: Instant,
    operations: Option<TokenBucket>,
    bytes: Option<TokenBucket>,
}

impl Limiter {
    pub(crate) fn new(limits: Limits, now: Instant) -> Self {
        let bucket = |rate: Option<Rate>| {
            rate.map(|Rate { per_second, burst }| {
                // Less than a tenth of a second's worth at once would hold up what the rate allows.
                TokenBucket::with_rate(Rate { per_second, burst: burst.max(per_second / 10) })
            })
        };
        Self { begin: now, operations: bucket(limits.operations), bytes: bucket(limits.bytes) }
    }

    /// Lets a request of `bytes` pass at time `now`, or says how long it has to wait. While there is anything
    /// to be had a request passes, however large, and leaves a debt.
    pub(crate) fn admit(&mut self, bytes: u64, now: Instant) -> Result<(), Duration> {
        let now = now.saturating_duration_since(self.begin);
        let mut buckets = [(&mut self.operations, 1), (&mut self.bytes, bytes)];
        let waits = buckets.iter_mut().filter_map(|(bucket, _)| bucket.as_mut().map(|b| b.wait(1, now)));
        match waits.max() {
            Some(wait) if !wait.is_zero() => return Err(wait),
            _ => {}
        }
        for (bucket, cost) in buckets {
            if let Some(bucket) = bucket {
                bucket.spend(cost);
            }
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
        // What the last hundredth of a second brings comes at its end.
        assert_eq!(passed(operations(100, 100), 4096, 10), 100 + 999);
        assert_eq!(passed(operations(100, 500), 4096, 10), 500 + 999);
        let bytes = Limits { bytes: Some(Rate::new(1 << 20)), ..Limits::default() };
        assert!((256 * 11..=256 * 11 + 2).contains(&passed(bytes, 4096, 10)));
        // Larger than the burst: they pass one by one, as the rate allows.
        assert!((6..=7).contains(&passed(bytes, 2 << 20, 10)));
        let both = Limits { operations: Some(Rate::new(10)), ..bytes };
        assert_eq!(passed(both, 4096, 10), 10 + 99);
        // Nothing at all is as little as can be.
        assert_eq!(passed(operations(0, 0), 1, 10), 1 + 9);
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
