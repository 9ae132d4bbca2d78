//! virtio-rng: the host's random numbers (virtio 1.2, section 5.4).

use std::sync::Arc;
use std::time::{Duration, Instant};

use vmcore::{Entropy, Error, EventSet, GuestMemory, Machine, Result};

use super::device::{Activation, DeviceType, Progress, Source, VirtioDevice, Worker};
use super::queue::{QueueError, VirtQueue};
use crate::rate::TokenBucket;
use crate::timer::Timer;

/// Requests served before others have a turn.
const TURN: usize = 16;

/// Most bytes for one request. The device may give less than was asked for, and a driver comes
/// again.
const MOST_BYTES: usize = 4096;

/// An entropy source that hands out what `getrandom(2)` gives (virtio 1.2, section 5.4), or on a
/// deterministic machine that one's numbers.
#[derive(Debug, Default)]
pub struct Rng {
    entropy: Entropy,
    limit: Option<(u64, Duration)>,
}

impl Rng {
    /// An entropy source.
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives at most `bytes` in each `period`, with as many at once. A guest that wants more waits for
    /// its numbers, and nobody else does. Not on a deterministic machine.
    pub fn limit(mut self, bytes: u64, period: Duration) -> Self {
        self.limit = Some((bytes, period));
        self
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> DeviceType {
        DeviceType::ENTROPY
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![64]
    }

    fn read_config(&self, _: u64, _: &mut [u8]) {}

    fn attached(&mut self, machine: &mut Machine) -> Result<()> {
        if let (true, Some((bytes, period))) = (machine.is_deterministic(), self.limit) {
            return Err(Error::Config {
                what: "limit of the entropy source",
                value: format!("{bytes} bytes in {period:?} on a deterministic VM"),
                fix: "leave it out: the host's time is none of such a VM's".into(),
            });
        }
        self.entropy = machine.entropy();
        Ok(())
    }

    fn activate(&mut self, activation: Activation) -> Result<Vec<Box<dyn Worker>>> {
        let Activation { memory, queues, .. } = activation;
        let limit = self.limit.map(|(bytes, period)| Limit::new(bytes, period)).transpose()?;
        Ok(vec![Box::new(RngWorker { memory, queues, entropy: self.entropy.clone(), limit })])
    }
}

/// A rate, and the timer that says when there is more.
struct Limit {
    bucket: TokenBucket,
    begin: Instant,
    timer: Timer,
}

impl Limit {
    fn new(bytes: u64, period: Duration) -> Result<Self> {
        let timer =
            Timer::new().map_err(|e| Error::os("timerfd_create", "limit of the entropy source", e))?;
        let bucket = TokenBucket::new(bytes, period);
        Ok(Self { bucket, begin: Instant::now(), timer })
    }

    /// How many of `most` bytes may be given now. Where none may, the timer is set.
    fn take(&mut self, most: usize) -> usize {
        let now = self.begin.elapsed();
        let most = u64::try_from(most).unwrap_or(u64::MAX);
        let some = most.min(self.bucket.available(now)).max(1);
        match self.bucket.take(some, now) {
            Ok(()) => usize::try_from(some).unwrap_or(0),
            Err(wait) => {
                if let Err(error) = self.timer.set(wait) {
                    log::error!("virtio-rng: the guest waits: timerfd_settime: {error}");
                }
                0
            }
        }
    }
}

struct RngWorker {
    memory: GuestMemory,
    queues: Vec<VirtQueue>,
    entropy: Entropy,
    limit: Option<Limit>,
}

impl RngWorker {
    /// Serves one request, if there is one and the limit allows it; whether it did.
    fn serve_one(&mut self) -> Result<bool, QueueError> {
        let map = self.memory.snapshot();
        let Some(queue) = self.queues.first_mut() else { return Ok(false) };
        let mut chain = loop {
            match queue.pop(&map)? {
                Some(chain) => break chain,
                None if queue.enable_notifications(&map)? => queue.disable_notifications(&map)?,
                None => return Ok(false),
            }
        };
        if !chain.readable.is_empty() {
            log::debug!("virtio-rng: the driver sent bytes, which are ignored");
        }
        let wanted = chain.writable.len().min(MOST_BYTES);
        let allowed = match &mut self.limit {
            Some(limit) if wanted > 0 => limit.take(wanted),
            _ => wanted,
        };
        if allowed == 0 && wanted > 0 {
            // It stays in the ring until the timer says that there is more.
            queue.unpop(1);
            return Ok(false);
        }
        let mut into = chain.writable.take(allowed);
        let mut written = 0;
        let mut bytes = [0; 256];
        while !into.is_empty() {
            let bytes = &mut bytes[..into.len().min(256)];
            if let Err(error) = self.entropy.fill(bytes) {
                log::error!("virtio-rng: {error}");
                break;
            }
            written += u32::try_from(into.write(bytes)).unwrap_or(u32::MAX);
        }
        queue.push(&map, chain.head, written)?;
        queue.signal(&map)?;
        Ok(true)
    }

    fn serve(&mut self) -> Result<Progress, QueueError> {
        for _ in 0..TURN {
            if !self.serve_one()? {
                return Ok(Progress::Idle);
            }
        }
        Ok(Progress::More)
    }
}

impl Worker for RngWorker {
    fn queues(&mut self) -> &mut [VirtQueue] {
        &mut self.queues
    }

    fn notify(&mut self, _: u16) -> Result<Progress, QueueError> {
        self.serve()
    }

    fn sources(&self) -> Vec<Source> {
        let timer = self.limit.iter().map(|limit| limit.timer.clone());
        timer.map(|timer| Source { fd: Arc::new(timer), events: EventSet::IN }).collect()
    }

    fn ready(&mut self, _: usize) -> Result<Progress, QueueError> {
        self.serve()
    }
}
