//! What a virtio device is to the transports, and what a transport is to a device.

use std::any::Any;
use std::error::Error;
use std::fmt;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vmcore::{EventSet, GuestMemory, Machine, Result};

use super::queue::{QueueError, VirtQueue};

/// A virtio device type (virtio 1.2, section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeviceType(pub u32);

impl DeviceType {
    /// Network card (5.1).
    pub const NET: Self = Self(1);
    /// Disk (5.2).
    pub const BLOCK: Self = Self(2);
    /// Console (5.3).
    pub const CONSOLE: Self = Self(3);
    /// Entropy source (5.4).
    pub const ENTROPY: Self = Self(4);
    /// Memory balloon (5.5), the one of virtio 1.
    pub const BALLOON: Self = Self(5);
    /// Sockets (5.10).
    pub const SOCKET: Self = Self(19);
}

/// A virtio device, as its driver sees it: type, features, configuration.
///
/// This is the control side. It is called on vCPU threads, one call at a time, and must answer at
/// once. The requests in the queues are the business of the [`Worker`]s that
/// [`VirtioDevice::activate`] makes, which run elsewhere and at the same time: so a register access
/// never waits for a request. What the two sides share (a cache mode, a link state) belongs into an
/// `Arc` that both hold.
///
/// A device owns no thread and knows no address, interrupt or transport.
pub trait VirtioDevice: Send {
    /// Its type.
    fn device_type(&self) -> DeviceType;

    /// The feature bits of its type that it offers (bits 0 to 23 and 50 up, virtio 1.2, section
    /// 2.2). Those of rings and transport are the transport's to offer.
    fn features(&self) -> u64 {
        0
    }

    /// The largest number of entries of each queue: powers of two up to 32768 (virtio 1.2, section
    /// 2.7). As many as there are queues.
    fn queue_sizes(&self) -> Vec<u16>;

    /// How many I/O threads it can make use of, where each attached device gets its own: as many as
    /// it has workers that do much.
    fn threads(&self) -> usize {
        1
    }

    /// Reads its configuration at `offset` bytes; what is beyond the end stays as it is (zero).
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Takes a write to its configuration at `offset` bytes, if it has fields for the driver to
    /// write. The guest chooses offset and length.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// Begins to work: the driver is ready. The workers share out the queues; each is called by one
    /// thread at a time, different workers at the same time. They are dropped when the driver
    /// resets the device, which can then be activated again.
    ///
    /// # Errors
    /// Where the device cannot work as negotiated. The driver is told that the device needs a
    /// reset; the VM goes on.
    fn activate(&mut self, activation: Activation) -> Result<Vec<Box<dyn Worker>>>;

    /// Called once when it is put on a machine, for a device that needs more of it than a transport:
    /// the off switch, for example.
    ///
    /// # Errors
    /// Whatever keeps the device from working there; the build then fails with it.
    fn attached(&mut self, machine: &mut Machine) -> Result<()> {
        let _ = machine;
        Ok(())
    }

    /// The host may have been put in order: what [`Outcome::IoError`](vmcore::Outcome::IoError) was for is to be
    /// tried again. Every queue is notified next.
    fn retry(&mut self) {}

    /// State besides features and queues, which the transport saves. Called while no worker runs.
    ///
    /// # Errors
    /// Where the state cannot be had.
    fn save(&self) -> Result<Vec<u8>> {
        Ok(Vec::new())
    }

    /// Takes over the bytes that an equal device saved; [`VirtioDevice::activate`] follows if it was active.
    ///
    /// # Errors
    /// [`vmcore::Error::State`] where the state is not one of an equal device.
    fn restore(&mut self, state: &[u8]) -> Result<()> {
        if state.is_empty() {
            return Ok(());
        }
        Err(vmcore::Error::State {
            what: "a virtio device without state of its own",
            expected: "0 bytes".into(),
            found: format!("{} bytes", state.len()),
        })
    }
}

/// What a device gets when its driver is ready.
#[derive(Debug)]
pub struct Activation {
    /// The guest's memory: take a snapshot for each batch of requests.
    pub memory: GuestMemory,
    /// The feature bits that driver and device agreed on.
    pub features: u64,
    /// All queues in order. A queue that the driver does not use is there too, and stays empty.
    pub queues: Vec<VirtQueue>,
    /// The way to the driver, for devices that have more to say than their queues do.
    pub transport: Arc<dyn Transport>,
    /// The workers run on the vCPU's thread ([`Threading::Vcpu`](super::Threading::Vcpu)): every
    /// request must have ended when the call that took it returns, since nobody waits for descriptors.
    pub on_vcpu: bool,
}

impl Activation {
    /// Whether feature bit number `bit` was agreed on.
    pub fn has(&self, bit: u32) -> bool {
        self.features >> bit & 1 == 1
    }
}

/// All that a device may ask of its transport. May be called from any thread.
pub trait Transport: Send + Sync + fmt::Debug {
    /// Tells the driver that buffers of queue number `queue` were used. [`VirtQueue::signal`] does, if the
    /// driver wants to know.
    fn used(&self, queue: u16);

    /// Tells the driver that the configuration changed.
    fn config_changed(&self);
}

/// The data side of a device: serves some of its queues, and waits for host descriptors.
///
/// Called on an I/O thread, or on the vCPU's where the board wants determinism.
pub trait Worker: Send {
    /// Its queues, for the transport to save, stop and set up anew.
    fn queues(&mut self) -> &mut [VirtQueue];

    /// The driver notified `queue` (the device's number of it): serves it, but no more than a
    /// bounded part, and says whether there is more.
    ///
    /// # Errors
    /// Where the driver broke the rules of virtqueues. The device then stops until it is reset, and
    /// the driver is told so.
    fn notify(&mut self, queue: u16) -> Result<Progress, QueueError>;

    /// The host descriptors that it waits for, asked once after activation.
    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }

    /// Descriptor number `source` became ready. It is called once for each time that happens
    /// (edge-triggered): a worker that cannot go on remembers that there is more to be had, and
    /// goes on with the next notification.
    ///
    /// # Errors
    /// As [`Worker::notify`].
    fn ready(&mut self, source: usize) -> Result<Progress, QueueError> {
        let _ = source;
        Ok(Progress::Idle)
    }

    /// Waits until no request is in flight. A worker that ends its requests before it returns has
    /// nothing to do. Called before a queue or the device is reset or saved.
    fn drain(&mut self) {}
}

/// Whether a worker has done all there was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Progress {
    /// All done: the driver will notify.
    Idle,
    /// It stopped to let others have a turn, and wants to be called again.
    More,
}

/// A host descriptor that a worker waits for.
#[derive(Clone)]
pub struct Source {
    /// The descriptor.
    pub fd: Arc<dyn AsRawFd + Send + Sync>,
    /// What to wait for.
    pub events: EventSet,
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Source").field("fd", &self.fd.as_raw_fd()).field("events", &self.events).finish()
    }
}

/// Answers a configuration read from the bytes of the configuration: [`VirtioDevice::read_config`]
/// of most devices.
pub fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    let Some(from) = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)) else { return };
    let len = from.len().min(data.len());
    data[..len].copy_from_slice(&from[..len]);
}

/// The text of a panic or error in a chain of sources, for one line of a log.
pub(super) fn causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// Something to keep alive.
pub(super) type Keep = Box<dyn Any + Send>;
