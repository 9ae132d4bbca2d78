//! virtio-blk: disks (virtio 1.2, section 5.2).
//!
//! Each queue has a worker that takes requests, puts neighbours together, and has them worked on aside: by
//! the kernel (io_uring) where the back end is a file, by a few threads of the disk's own otherwise. So a
//! slow disk holds up neither a vCPU nor the thread that serves it. Where the machine is deterministic
//! requests end in the call that takes them.

mod coalesce;
mod handle;
mod on_error;
mod request;
mod worker;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_GEOMETRY, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
};
use vmcore::{Control, Error, Machine, Result};

use super::device::{Activation, DeviceType, Transport, VirtioDevice, Worker, read_config_bytes};
use crate::block::{BlockBackend, Counters, DiskError, Image, Limiter, Limits, Pool, RawFile, SECTOR, count};
use crate::complaints::Complaints;
use crate::saved;
pub use handle::DiskHandle;
pub use on_error::{DiskStop, OnError};
use request::{Failure, Job, Op};
use worker::DiskWorker;

const QUEUE_SIZE: u16 = 256;

/// Most queues of a disk: enough for one per vCPU of large machines.
const MOST_QUEUES: u16 = 256;

/// Data buffers of one request: a chain also has the header and the status.
const MOST_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;

/// Bytes of one data buffer.
const MOST_SEGMENT: u32 = 4 << 20;

/// Ranges of one discard or write-zeroes request.
const MOST_RANGES: u32 = 16;

/// Sectors of one discarded range: 2 GiB, which costs the host no more than a little.
const MOST_DISCARDED: u32 = 1 << 22;

/// Sectors of one zeroed range: 32 MiB, since zeroes may really have to be written.
const MOST_ZEROED: u32 = 1 << 16;

/// Threads of a disk, for what the kernel does not do by itself.
const MOST_THREADS: usize = 8;

/// Offset of the cache mode in the configuration: 1 where writes may stay in a cache until a flush.
const WRITE_BACK: u64 = 32;

const WHAT: &str = "a virtio disk";
const STATE_VERSION: u8 = 1;

/// A disk's serial number.
type Id = [u8; VIRTIO_BLK_ID_BYTES as usize];

/// When what a guest writes is on stable storage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheMode {
    /// When the guest flushes. It may ask for the other mode.
    #[default]
    WriteBack,
    /// When the write ends. The guest may ask for the other mode.
    WriteThrough,
    /// When the host likes: flushes do nothing. For disks that are thrown away; a host that crashes
    /// leaves nothing to be trusted.
    Unsafe,
}

/// A disk (virtio 1.2, section 5.2). Requests are served on the threads that the board gives it.
///
/// ```no_run
/// use vmdevices::Disk;
/// use vmdevices::{block::Limits, rate::Rate};
///
/// # fn main() -> Result<(), vmdevices::block::DiskError> {
/// let limits = Limits { operations: Some(Rate::new(500)), ..Limits::default() };
/// let disk = Disk::open("root.img")?.id("system")?.queues(4).limits(limits);
/// let handle = disk.handle();
/// // Once it is attached and the guest runs:
/// handle.resize(20 << 30)?;
/// println!("{:?}", handle.stats());
/// # Ok(())
/// # }
/// ```
pub struct Disk {
    shared: Arc<Shared>,
    settings: Settings,
}

/// What stays as it was when the machine was built.
#[derive(Clone, Copy, Debug)]
struct Settings {
    id: Id,
    queues: u16,
    cache: CacheMode,
}

/// What the device, its workers and its handles share.
struct Shared {
    backend: Arc<dyn BlockBackend>,
    pool: Pool,
    /// What the driver negotiated last.
    features: AtomicU64,
    /// What the guest chose, or the cache mode at first.
    write_back: AtomicBool,
    /// Whether to ask the limiter.
    limited: AtomicBool,
    limiter: Mutex<Limiter>,
    counters: Counters,
    /// Of the host's errors, which a guest may provoke: with a full disk, for example.
    complaints: Complaints,
    /// For reading and for writing.
    on_error: Mutex<[OnError; 2]>,
    /// Of the machine that it is attached to.
    control: Mutex<Option<Control>>,
    /// While this is so no request is taken.
    stop: Mutex<Option<DiskStop>>,
    /// Of the active device.
    transport: Mutex<Option<Arc<dyn Transport>>>,
}

impl Shared {
    fn set_limits(&self, limits: Limits) {
        let mut limiter = self.limiter.lock().unwrap_or_else(PoisonError::into_inner);
        *limiter = Limiter::new(limits, Instant::now());
        self.limited.store(limits != Limits::default(), Ordering::Release);
    }

    /// Lets a request pass, or says how long it has to wait.
    fn admit(&self, bytes: u64) -> Result<(), Duration> {
        if !self.limited.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut limiter = self.limiter.lock().unwrap_or_else(PoisonError::into_inner);
        limiter.admit(bytes, Instant::now()).inspect_err(|_| count(&self.counters.throttled, 1))
    }

    /// Whether writes must be stable when they end (section 5.2.6.2).
    fn durable(&self, cache: CacheMode) -> bool {
        let features = self.features.load(Ordering::Acquire);
        let has = |bit: u32| features >> bit & 1 == 1;
        match cache {
            CacheMode::Unsafe => false,
            _ if has(VIRTIO_BLK_F_CONFIG_WCE) => !self.write_back.load(Ordering::Acquire),
            // A driver that cannot flush expects what it wrote to be there.
            CacheMode::WriteBack => !has(VIRTIO_BLK_F_FLUSH),
            CacheMode::WriteThrough => true,
        }
    }

    /// Counts the requests of `job`, and says what went wrong.
    fn account(&self, job: &Job, result: &Result<(), Failure>) {
        let requests = job.parts.len() as u64;
        match result {
            Ok(()) => {
                let (counter, bytes) = match job.op {
                    Op::Read(_) => (&self.counters.reads, Some(&self.counters.bytes_read)),
                    Op::Write(_) => (&self.counters.writes, Some(&self.counters.bytes_written)),
                    Op::Flush => (&self.counters.flushes, None),
                    Op::Discard(_) | Op::Zero(_) => (&self.counters.cleared, None),
                };
                count(counter, requests);
                if let Some(bytes) = bytes {
                    count(bytes, job.len() as u64);
                }
            }
            Err(Failure::Host(error)) => {
                count(&self.counters.errors, requests);
                let (what, len) = (job.op.describe(), job.len());
                self.complaints.warn("virtio-blk", format_args!("{what}, {len} bytes: {error}"));
            }
            Err(Failure::Unsupported | Failure::Invalid(_)) => {}
        }
    }
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk")
            .field("len", &self.shared.backend.len())
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

impl Disk {
    /// The raw image at `path`, for reading and writing. It is locked: no other user of locks can
    /// open it meanwhile.
    ///
    /// # Errors
    /// As [`RawFile::open`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, DiskError> {
        Ok(Self::new(Arc::new(RawFile::open(path, false)?)))
    }

    /// The raw image at `path`, which the guest cannot write and others may read too.
    ///
    /// # Errors
    /// As [`RawFile::open`].
    pub fn open_read_only(path: impl AsRef<Path>) -> Result<Self, DiskError> {
        Ok(Self::new(Arc::new(RawFile::open(path, true)?)))
    }

    /// The disk in `image`, of any format.
    ///
    /// # Errors
    /// As [`Image::open`].
    pub fn image(image: Image) -> Result<Self, DiskError> {
        Ok(Self::new(image.open()?))
    }

    /// A disk whose bytes are `backend`'s.
    pub fn new(backend: Arc<dyn BlockBackend>) -> Self {
        let shared = Arc::new(Shared {
            backend,
            pool: Pool::new(MOST_THREADS),
            features: AtomicU64::new(0),
            write_back: AtomicBool::new(true),
            limited: AtomicBool::new(false),
            limiter: Mutex::new(Limiter::new(Limits::default(), Instant::now())),
            counters: Counters::default(),
            complaints: Complaints::default(),
            on_error: Mutex::default(),
            control: Mutex::default(),
            stop: Mutex::default(),
            transport: Mutex::new(None),
        });
        Self { shared, settings: Settings { id: Id::default(), queues: 1, cache: CacheMode::default() } }
    }

    /// What the guest reads as the disk's serial number (`/dev/disk/by-id`): at most 20 bytes.
    ///
    /// # Errors
    /// [`DiskError::Id`] where it is longer.
    pub fn id(mut self, id: &str) -> Result<Self, DiskError> {
        let field = self.settings.id.get_mut(..id.len()).ok_or_else(|| DiskError::Id { id: id.into() })?;
        field.copy_from_slice(id.as_bytes());
        Ok(self)
    }

    /// How many queues it has: one unless said, and for heavy use one for each vCPU. At most 256 are made.
    pub fn queues(mut self, count: u16) -> Self {
        self.settings.queues = count.clamp(1, MOST_QUEUES);
        self
    }

    /// When writes are stable; [`CacheMode::WriteBack`] unless said.
    pub fn cache(mut self, mode: CacheMode) -> Self {
        self.settings.cache = mode;
        self.shared.write_back.store(self.settings.writes_back(), Ordering::Release);
        self
    }

    /// How much the guest may have of it. Requests beyond wait, and nothing else does. Not for
    /// deterministic machines, whose time is not the host's.
    pub fn limits(self, limits: Limits) -> Self {
        self.shared.set_limits(limits);
        self
    }

    /// What becomes of requests that the host fails, for `reads` and for all others; [`OnError::Report`] unless
    /// said. Where that stops the VM [`DiskHandle::stopped`] says why.
    ///
    /// ```no_run
    /// use vmcore::Outcome;
    /// use vmdevices::{Disk, virtio::OnError};
    ///
    /// # fn wait_for_room() {}
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let disk = Disk::open("root.img")?.on_error(OnError::Report, OnError::StopIfFull);
    /// let handle = disk.handle();
    /// let mut vm = vmcore::Vm::builder().attach(disk).build()?;
    /// while vm.run()? == Outcome::IoError {
    ///     println!("{:?}", handle.stopped());
    ///     wait_for_room();
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn on_error(self, reads: OnError, others: OnError) -> Self {
        *self.shared.on_error.lock().unwrap_or_else(PoisonError::into_inner) = [reads, others];
        self
    }

    /// On a machine with this off switch, which a test has instead of a VM.
    #[cfg(test)]
    pub(crate) fn controlled(self, control: Control) -> Self {
        *self.shared.control.lock().unwrap_or_else(PoisonError::into_inner) = Some(control);
        self
    }

    /// For other threads, while the guest runs: sizes, limits, statistics.
    pub fn handle(&self) -> DiskHandle {
        DiskHandle::new(self.shared.clone())
    }

    /// The configuration (section 5.2.4), with fields of features that are not offered zero.
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut put = |at: usize, value: &[u8]| config[at..at + value.len()].copy_from_slice(value);
        let (len, topology) = (self.shared.backend.len(), self.shared.backend.topology());
        let blocks = |bytes: u32| bytes / 512;
        put(0, &(len / SECTOR).to_le_bytes());
        put(8, &MOST_SEGMENT.to_le_bytes());
        put(12, &MOST_SEGMENTS.to_le_bytes());
        // Cylinders, heads, sectors: as many whole cylinders of the largest usual shape as there are.
        let cylinders = u16::try_from(len / SECTOR / (16 * 63)).map_or(16383, |count| count.min(16383));
        put(16, &cylinders.to_le_bytes());
        put(18, &[16, 63]);
        // The logical block stays 512 bytes, so that any image can be used; the others are hints.
        put(20, &512u32.to_le_bytes());
        let optimal = blocks(topology.optimal);
        put(24, &[u8::try_from(blocks(topology.physical).trailing_zeros()).unwrap_or(0), 0]);
        put(26, &u16::try_from(blocks(topology.physical)).unwrap_or(1).to_le_bytes());
        put(28, &optimal.to_le_bytes());
        put(32, &[u8::from(self.shared.write_back.load(Ordering::Acquire)), 0]);
        put(34, &self.settings.queues.to_le_bytes());
        put(36, &MOST_DISCARDED.to_le_bytes());
        put(40, &MOST_RANGES.to_le_bytes());
        put(44, &blocks(topology.discard).to_le_bytes());
        put(48, &MOST_ZEROED.to_le_bytes());
        put(52, &MOST_RANGES.to_le_bytes());
        // write_zeroes_may_unmap.
        put(56, &[1]);
        config
    }
}

impl Settings {
    /// What the guest finds in the configuration.
    fn writes_back(self) -> bool {
        self.cache != CacheMode::WriteThrough
    }
}

#[derive(Serialize, Deserialize)]
struct State {
    write_back: bool,
}

impl VirtioDevice for Disk {
    fn device_type(&self) -> DeviceType {
        DeviceType::BLOCK
    }

    fn features(&self) -> u64 {
        let always = [
            VIRTIO_BLK_F_SIZE_MAX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_GEOMETRY,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_TOPOLOGY,
        ];
        let writing = [VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES];
        let more = if self.shared.backend.read_only() { &[VIRTIO_BLK_F_RO][..] } else { &writing };
        let several = (self.settings.queues > 1).then_some(&VIRTIO_BLK_F_MQ);
        always.iter().chain(more).chain(several).fold(0, |bits, bit| bits | 1 << bit)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; self.settings.queues.into()]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (WRITE_BACK, &[mode, ..]) = (offset, data)
            && !self.shared.backend.read_only()
        {
            self.shared.write_back.store(mode != 0, Ordering::Release);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<Vec<Box<dyn Worker>>> {
        let Activation { memory, features, queues, transport, on_vcpu } = activation;
        self.shared.features.store(features, Ordering::Release);
        self.shared.go_on();
        *self.shared.transport.lock().unwrap_or_else(PoisonError::into_inner) = Some(transport);
        queues
            .into_iter()
            .map(|queue| {
                let (shared, settings) = (self.shared.clone(), self.settings);
                let worker = DiskWorker::new(memory.clone(), queue, shared, settings, on_vcpu)?;
                Ok(Box::new(worker) as Box<dyn Worker>)
            })
            .collect()
    }

    fn attached(&mut self, machine: &mut Machine) -> Result<()> {
        if machine.is_deterministic() && self.shared.limited.load(Ordering::Acquire) {
            return Err(Error::Config {
                what: "limits of a disk",
                value: "on a deterministic VM".into(),
                fix: "leave them out: the guest's time is not the host's".into(),
            });
        }
        *self.shared.control.lock().unwrap_or_else(PoisonError::into_inner) = Some(machine.control());
        Ok(())
    }

    fn retry(&mut self) {
        self.shared.go_on();
    }

    fn save(&self) -> Result<Vec<u8>> {
        let write_back = self.shared.write_back.load(Ordering::Acquire);
        saved::save(WHAT, STATE_VERSION, &State { write_back })
    }

    fn restore(&mut self, state: &[u8]) -> Result<()> {
        let State { write_back } = saved::restore(WHAT, STATE_VERSION, state)?;
        self.shared.write_back.store(write_back, Ordering::Release);
        Ok(())
    }
}
