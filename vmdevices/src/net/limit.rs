//! How much goes through a card in a time.

use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmcore::{Error, EventSet, Result};

use super::wait::Wait;
use super::{HEADER, NetBackend, forward};
use crate::buffers::Buffers;
use crate::rate::{Rate, TokenBucket};
use crate::timer::Timer;

/// Most of a second that is waited for at once, so that timers do not ring for each packet.
const GRAIN: Duration = Duration::from_millis(1);

/// Limits of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    /// Of bytes: those of Ethernet frames. A packet is let through while there are any left, and may
    /// take more than there are: the next one then waits longer.
    pub bytes: Option<Rate>,
    /// Of packets. One to be cut into segments is one.
    pub packets: Option<Rate>,
}

impl Rates {
    /// So many bytes each second, of which those of a twentieth of one may come at once, and of a few packets in any
    /// case.
    pub fn bytes(per_second: u64) -> Self {
        let burst = (per_second / 20).max(100_000);
        Self { bytes: Some(Rate { per_second, burst }), packets: None }
    }
}

/// Limits what goes through one or several back ends, all together: the queues of one card, or several
/// cards.
///
/// Packets of the guest wait in its queue; those for it wait in the back end's, which drops what it has
/// no room for. No thread waits. Clones are of the same limits.
///
/// ```no_run
/// # fn main() -> vmcore::Result<()> {
/// use vmdevices::{Net, net::{Limiter, Rates}, rate::Rate};
///
/// // 100 Mbit/s to the guest, 1 MB at once, and a tenth of that from it.
/// let bytes = Some(Rate { per_second: 12_500_000, burst: 1_000_000 });
/// let limiter = Limiter::new(Rates::bytes(1_250_000), Rates { bytes, packets: None });
/// let card = Net::tap("tap0")?.limit(&limiter)?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Limiter {
    buckets: Arc<Mutex<Buckets>>,
    clock: Arc<dyn Fn() -> Duration + Send + Sync>,
}

impl Limiter {
    /// Limits of what the guest sends and receives.
    pub fn new(sent: Rates, received: Rates) -> Self {
        let start = Instant::now();
        Self::with_clock(sent, received, move || start.elapsed())
    }

    fn with_clock(
        sent: Rates,
        received: Rates,
        clock: impl Fn() -> Duration + Send + Sync + 'static,
    ) -> Self {
        let buckets = Buckets { sent: Both::new(sent), received: Both::new(received) };
        Self { buckets: Arc::new(Mutex::new(buckets)), clock: Arc::new(clock) }
    }

    /// `backend`, limited.
    ///
    /// # Errors
    /// [`Error::Os`] where the host is out of descriptors.
    pub fn limit<B: NetBackend>(&self, backend: B) -> Result<Limited<B>> {
        let os = |error| Error::os("epoll or timerfd", "limits of a network", error);
        let wait = Wait::new().map_err(os)?;
        let source = backend.source();
        if let Some(source) = &source {
            let events = if backend.holds_back() { EventSet::IN | EventSet::OUT } else { EventSet::IN };
            wait.add(source.as_raw_fd(), events).map_err(os)?;
        }
        let timers = [wait.timer().map_err(os)?, wait.timer().map_err(os)?];
        Ok(Limited { backend, limiter: self.clone(), wait, timers, _source: source })
    }

    fn lock(&self) -> MutexGuard<'_, Buckets> {
        self.buckets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Limiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Limiter").field(&*self.lock()).finish()
    }
}

#[derive(Debug)]
struct Buckets {
    sent: Both,
    received: Both,
}

/// Bytes and packets of one direction.
#[derive(Debug)]
struct Both([Option<(Rate, TokenBucket)>; 2]);

impl Both {
    fn new(rates: Rates) -> Self {
        Self([rates.bytes, rates.packets].map(|rate| rate.map(|rate| (rate, TokenBucket::with_rate(rate)))))
    }

    /// How long the next packet has to wait, if it has.
    fn wait(&mut self, now: Duration) -> Option<Duration> {
        let waits = self.0.iter_mut().flatten().filter_map(|(rate, bucket)| {
            // A whole token: packets are not cut into parts.
            if bucket.wait(1, now).is_zero() {
                return None;
            }
            let grain = u128::from(rate.per_second) * GRAIN.as_nanos() / 1_000_000_000;
            Some(bucket.wait(u64::try_from(grain).unwrap_or(u64::MAX).max(1), now))
        });
        waits.max()
    }

    fn spend(&mut self, bytes: usize) {
        for (bucket, count) in self.0.iter_mut().zip([bytes as u64, 1]) {
            if let Some((_, bucket)) = bucket {
                bucket.spend(count);
            }
        }
    }
}

/// A back end with limits; see [`Limiter::limit`].
pub struct Limited<B> {
    backend: B,
    limiter: Limiter,
    wait: Wait,
    /// Of packets that the guest sends, and receives.
    timers: [Timer; 2],
    /// Lives as long as it is waited for.
    _source: Option<Arc<dyn AsRawFd + Send + Sync>>,
}

impl<B: fmt::Debug> fmt::Debug for Limited<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Limited")
            .field("backend", &self.backend)
            .field("limiter", &self.limiter)
            .finish_non_exhaustive()
    }
}

impl<B> Limited<B> {
    /// Has `timer` ring when there is something in the buckets again, if there is not now.
    fn admit(&self, timer: &Timer, direction: impl FnOnce(&mut Buckets) -> &mut Both) -> io::Result<()> {
        let now = (self.limiter.clock)();
        let wait = direction(&mut self.limiter.lock()).wait(now);
        wait.map_or(Ok(()), |time| {
            timer.set(time)?;
            Err(io::ErrorKind::WouldBlock.into())
        })
    }
}

impl<B: NetBackend> NetBackend for Limited<B> {
    forward!(self => self.backend);

    fn source(&self) -> Option<Arc<dyn AsRawFd + Send + Sync>> {
        Some(self.wait.source())
    }
    fn holds_back(&self) -> bool {
        true
    }

    fn send(&mut self, packet: &mut Buffers<'_>) -> io::Result<()> {
        let [timer, _] = &self.timers;
        self.admit(timer, |buckets| &mut buckets.sent)?;
        let len = packet.len().saturating_sub(HEADER);
        self.backend.send(packet).map_err(|error| match error.kind() {
            // No event would come for it.
            io::ErrorKind::WouldBlock if !self.backend.holds_back() => io::Error::other(error),
            _ => error,
        })?;
        self.limiter.lock().sent.spend(len);
        Ok(())
    }

    fn receive(&mut self, into: &mut Buffers<'_>, spill: &mut [u8]) -> io::Result<usize> {
        let [_, timer] = &self.timers;
        self.admit(timer, |buckets| &mut buckets.received)?;
        let len = self.backend.receive(into, spill)?;
        self.limiter.lock().received.spend(len.saturating_sub(HEADER));
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::net::tests::{frame, receive, send};
    use crate::net::{Port, pair};

    fn rate(per_second: u64, burst: u64) -> Option<Rate> {
        Some(Rate { per_second, burst })
    }

    const FREE: Rates = Rates { bytes: None, packets: None };

    /// A limited port, the other end, and the clock in milliseconds.
    fn limited(sent: Rates, received: Rates) -> (Limited<Port>, Port, Arc<AtomicU64>) {
        let clock = Arc::new(AtomicU64::new(0));
        let now = clock.clone();
        let limiter =
            Limiter::with_clock(sent, received, move || Duration::from_millis(now.load(Ordering::SeqCst)));
        let (near, far) = pair().unwrap();
        (limiter.limit(near).unwrap(), far, clock)
    }

    fn sends(backend: &mut dyn NetBackend, len: usize) -> usize {
        (0..1000).take_while(|_| send(backend, &frame(len, 0)).is_ok()).count()
    }

    #[test]
    fn packets_go_by_count() {
        let packets = Rates { packets: rate(100, 5), bytes: None };
        let (mut near, mut far, clock) = limited(packets, FREE);
        assert_eq!((sends(&mut near, 60), sends(&mut near, 60)), (5, 0));
        clock.store(9, Ordering::SeqCst);
        assert_eq!(sends(&mut near, 1500), 0);
        clock.store(30, Ordering::SeqCst);
        assert_eq!(sends(&mut near, 1500), 3);
        // Not more than a burst is kept.
        clock.store(1_000_000, Ordering::SeqCst);
        assert_eq!(sends(&mut near, 60), 5);
        // The other direction is free.
        assert_eq!(sends(&mut far, 60), 1000);
        assert_eq!(std::iter::from_fn(|| receive(&mut near)).count(), 1000);
    }

    #[test]
    fn bytes_leave_debts() {
        let bytes = Rates { bytes: rate(1000, 1000), packets: None };
        let (mut near, mut far, clock) = limited(FREE, bytes);
        (0..20).for_each(|_| send(&mut far, &frame(600, 0)).unwrap());
        let mut comes = || std::iter::from_fn(|| receive(&mut near)).count();
        assert_eq!(comes(), 2, "600 and 600 of 1000");
        clock.store(200, Ordering::SeqCst);
        assert_eq!(comes(), 0);
        clock.store(201, Ordering::SeqCst);
        assert_eq!(comes(), 1);
        clock.store(100_000, Ordering::SeqCst);
        assert_eq!(comes(), 2);
        assert_eq!(sends(&mut far, 600), 1000);
    }

    #[test]
    fn several_queues_share_their_limits() {
        let packets = Rates { packets: rate(1, 10), bytes: None };
        let limiter = Limiter::with_clock(packets, FREE, || Duration::ZERO);
        let ports = [(); 2].map(|()| pair().unwrap());
        let [mut a, mut b] = ports.map(|(near, _)| limiter.limit(near).unwrap());
        assert_eq!((sends(&mut a, 60), sends(&mut b, 60)), (10, 0));
    }

    #[test]
    fn a_timer_tells_when_it_goes_on() {
        let packets = Rates { packets: rate(1000, 1), bytes: None };
        let (near, _far) = pair().unwrap();
        let mut near = Limiter::new(packets, packets).limit(near).unwrap();
        let epoll = vmm_sys_util::epoll::Epoll::new().unwrap();
        let event = vmm_sys_util::epoll::EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
        let source = near.source().unwrap();
        epoll.ctl(vmm_sys_util::epoll::ControlOperation::Add, source.as_raw_fd(), event).unwrap();
        for round in 0..20 {
            while send(&mut near, &frame(60, 0)).is_ok() {}
            let count = epoll.wait(10_000, &mut [vmm_sys_util::epoll::EpollEvent::default()]).unwrap();
            assert_eq!(count, 1, "round {round}: nobody is told");
        }
    }
}
