//! virtio-rng: the host's random numbers (virtio 1.2, section 5.4).

use vmcore::{Entropy, GuestMemory, Machine, Result};

use super::device::{Activation, DeviceType, Progress, VirtioDevice, Worker};
use super::queue::{QueueError, VirtQueue};

/// Requests served before others have a turn.
const TURN: usize = 16;

/// Most bytes for one request. The device may give less than was asked for, and a driver comes
/// again.
const MOST_BYTES: usize = 4096;

/// An entropy source that hands out what `getrandom(2)` gives (virtio 1.2, section 5.4), or on a
/// deterministic machine that one's numbers.
#[derive(Debug, Default)]
pub struct Rng(Entropy);

impl Rng {
    /// An entropy source.
    pub fn new() -> Self {
        Self::default()
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
        self.0 = machine.entropy();
        Ok(())
    }

    fn activate(&mut self, activation: Activation) -> Result<Vec<Box<dyn Worker>>> {
        let Activation { memory, queues, .. } = activation;
        Ok(vec![Box::new(RngWorker { memory, queues, entropy: self.0.clone() })])
    }
}

struct RngWorker {
    memory: GuestMemory,
    queues: Vec<VirtQueue>,
    entropy: Entropy,
}

impl Worker for RngWorker {
    fn queues(&mut self) -> &mut [VirtQueue] {
        &mut self.queues
    }

    fn notify(&mut self, _: u16) -> Result<Progress, QueueError> {
        let map = self.memory.snapshot();
        let entropy = &self.entropy;
        let Some(queue) = self.queues.first_mut() else { return Ok(Progress::Idle) };
        queue.serve(&map, TURN, 1, |chain| {
            if !chain.readable.is_empty() {
                log::debug!("virtio-rng: the driver sent bytes, which are ignored");
            }
            let mut into = chain.writable.take(MOST_BYTES);
            let mut written = 0;
            let mut bytes = [0; 256];
            while !into.is_empty() {
                let bytes = &mut bytes[..into.len().min(256)];
                if let Err(error) = entropy.fill(bytes) {
                    log::error!("virtio-rng: {error}");
                    break;
                }
                written += u32::try_from(into.write(bytes)).unwrap_or(u32::MAX);
            }
            Ok(written)
        })
    }
}
