//! When a driver is told of requests that have ended: at once, or together with those to come.
//!
//! An interrupt costs a guest more than the rest of a small request. A guest that has many requests under way
//! goes on adding to them while it is not told of those that ended; one that waits for its only request adds
//! none. Which of the two it is shows when its answer is held back for a moment, and only then: so a driver is
//! tried now and then, less and less often where that brought nothing.

use std::time::{Duration, Instant};

/// Answers of which a driver is told without delay: half of what a deep queue has under way, so that it
/// has the other half to go on with.
const MOST: u16 = 16;

/// How long the first of them may wait. A guest of the software CPU adds a request every 200 µs, a fast one
/// every 3 µs.
const SHORTEST: Duration = Duration::from_micros(25);
const LONGEST: Duration = Duration::from_micros(400);

/// Interrupts between two tries that brought nothing: as a try lasts about as long as such a request, a guest
/// that waits for each of its requests loses one in this many.
const MOST_SKIPPED: u32 = 256;

/// Interrupts before the first try, which show how fast the guest is.
const FIRST: u32 = 8;

/// What to do with answers that the driver has not been told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Tell it.
    Tell,
    /// Ask again after this time, or when there is more.
    Wait(Duration),
    /// As said before.
    Waiting,
}

/// Answers that wait.
#[derive(Clone, Copy, Debug)]
struct Held {
    since: Instant,
    /// When the driver added a request for the last time, since then.
    added: Option<Instant>,
}

/// Of one queue.
#[derive(Debug)]
pub(super) struct Coalescing {
    held: Option<Held>,
    wait: Duration,
    /// Interrupts until it is tried again.
    skip: u32,
    /// How many those were the last time.
    skipped: u32,
    /// From one request to the next where each is told of at once, on average.
    interval: Duration,
    last: Option<Instant>,
}

impl Coalescing {
    pub(super) fn new() -> Self {
        Self {
            held: None,
            wait: Duration::ZERO,
            skip: FIRST,
            skipped: 0,
            interval: Duration::ZERO,
            last: None,
        }
    }

    /// `untold` answers are in the ring that the driver has not been told of, and no more requests; `added`
    /// says whether there were some since the last call.
    pub(super) fn judge(&mut self, untold: u16, added: bool, now: Instant) -> Verdict {
        if untold == 0 {
            return Verdict::Tell;
        }
        let Some(held) = &mut self.held else {
            if untold >= MOST || self.skip > 0 {
                self.skip = self.skip.saturating_sub(1);
                if added && let Some(last) = self.last.replace(now) {
                    let interval = now.saturating_duration_since(last).min(2 * LONGEST);
                    self.interval = (7 * self.interval + interval) / 8;
                }
                return Verdict::Tell;
            }
            self.last = None;
            if self.skipped > 0 || self.wait.is_zero() {
                // Long enough for one more, if the guest is at it.
                self.wait = (self.interval * 5 / 4).clamp(SHORTEST, LONGEST);
            }
            self.held = Some(Held { since: now, added: None });
            return Verdict::Wait(self.wait);
        };
        if added {
            held.added = Some(now);
        }
        let left = self.wait.saturating_sub(now.saturating_duration_since(held.since));
        if untold < MOST && !left.is_zero() {
            return Verdict::Waiting;
        }
        match held.added {
            None => {
                self.skipped = (2 * self.skipped).clamp(1, MOST_SKIPPED);
            }
            Some(added) => {
                self.skipped = 0;
                // Whether it still was at it when the time was over.
                let idle = now.saturating_duration_since(added);
                if untold >= MOST || idle > self.wait / 2 {
                    self.wait = (self.wait / 2).max(SHORTEST);
                } else if idle < self.wait / 4 {
                    self.wait = (self.wait * 2).min(LONGEST);
                }
            }
        }
        self.told();
        self.skip = self.skipped;
        Verdict::Tell
    }

    /// The driver has been told, for whatever reason.
    pub(super) fn told(&mut self) {
        self.held = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest that adds requests every `gap`, up to `depth` of them, each of which ends at once; and is told
    /// when it is said to be. Gives interrupts and requests in `time`.
    fn run(depth: u16, gap: Duration, time: Duration) -> (u32, u32) {
        let (begin, mut coalescing) = (Instant::now(), Coalescing::new());
        let (mut now, mut untold, mut rings) = (begin, 0, None::<Instant>);
        let (mut told, mut requests) = (0, 0);
        while now.saturating_duration_since(begin) < time {
            let next = now + gap;
            let adds = untold < depth;
            let verdict = match rings {
                Some(at) if !adds || at < next => {
                    (now, rings) = (at, None);
                    coalescing.judge(untold, false, now)
                }
                _ => {
                    assert!(adds, "nobody tells the guest");
                    now = next;
                    (untold, requests) = (untold + 1, requests + 1);
                    coalescing.judge(untold, true, now)
                }
            };
            match verdict {
                Verdict::Tell => (untold, told, rings) = (0, told + 1, None),
                Verdict::Wait(time) => rings = Some(now + time),
                Verdict::Waiting => assert!(rings.is_some(), "waits for nothing"),
            }
        }
        (told, requests)
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_guest_that_waits_for_each_request_hardly_notices() {
        let gap = Duration::from_micros(20);
        let (told, requests) = run(1, gap, SECOND);
        assert_eq!(told, requests);
        assert!(requests > 49_000, "{requests} instead of 50,000");
    }

    #[test]
    fn a_guest_with_many_requests_is_told_of_several_at_once() {
        for gap in [3, 20, 100].map(Duration::from_micros) {
            let (told, requests) = run(32, gap, SECOND);
            assert!(told * 3 < requests, "{told} interrupts for {requests} requests, one every {gap:?}");
            let possible = u32::try_from(SECOND.as_nanos() / gap.as_nanos()).unwrap();
            assert!(requests * 100 > possible * 95, "{requests} of {possible} requests, one every {gap:?}");
        }
    }

    #[test]
    fn answers_wait_no_longer_than_is_said() {
        let (begin, mut coalescing) = (Instant::now(), Coalescing::new());
        for round in 0..2000_u32 {
            let at = begin + Duration::from_millis(round.into());
            // As busy as can be, so that it waits as long as it ever does.
            let Verdict::Wait(time) = coalescing.judge(1, true, at) else { continue };
            assert!(time <= LONGEST, "{time:?}");
            assert_eq!(coalescing.judge(2, true, at + time - Duration::from_nanos(1)), Verdict::Waiting);
            assert_eq!(coalescing.judge(2, false, at + time), Verdict::Tell);
        }
        assert_eq!(coalescing.wait, LONGEST);
        // As many as it ever holds back.
        assert!(matches!(coalescing.judge(MOST - 1, true, begin), Verdict::Wait(_)));
        assert_eq!(coalescing.judge(MOST, true, begin), Verdict::Tell);
        assert_eq!(coalescing.judge(MOST, true, begin), Verdict::Tell);
    }

    #[test]
    fn few_requests_at_once_are_not_slowed_by_much() {
        // Two to four that wait for each other: 20 µs each.
        for depth in 2..=4 {
            let (_, requests) = run(depth, Duration::from_micros(20), SECOND);
            assert!(requests > 25_000, "depth {depth}: {requests} instead of 50,000");
        }
    }
}
