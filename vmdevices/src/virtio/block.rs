//! virtio-blk: disks (virtio 1.2, section 5.2).

use std::io;
use std::path::Path;
use std::sync::Arc;

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vmcore::{GuestMemory, Result};

use super::device::{Activation, DeviceType, Progress, VirtioDevice, Worker, read_config_bytes};
use super::queue::{Chain, QueueError, VirtQueue};
use crate::block::{BlockBackend, DiskError, RawFile};
use crate::buffers::Buffers;
use crate::complaints::Complaints;

/// Bytes of a sector, whatever the block size (section 5.2.4).
const SECTOR: u64 = 512;

const QUEUE_SIZE: u16 = 256;

/// Data buffers of one request: a chain also has the header and the status.
const MOST_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;

/// Ranges of one discard or write-zeroes request.
const MOST_RANGES: u32 = 16;

/// Sectors of one discarded range: 2 GiB, which costs the host no more than a little.
const MOST_DISCARDED: u32 = 1 << 22;

/// Sectors of one zeroed range: 32 MiB, since zeroes may really have to be written.
const MOST_ZEROED: u32 = 1 << 16;

/// Requests served before others on the same thread have a turn, and before the driver is told.
const TURN: usize = 128;
const BATCH: usize = 16;

/// A disk (virtio 1.2, section 5.2). Requests are served on the threads that the board gives it.
pub struct Disk {
    backend: Arc<dyn BlockBackend>,
    id: [u8; VIRTIO_BLK_ID_BYTES as usize],
    complaints: Arc<Complaints>,
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk").field("len", &self.backend.len()).finish_non_exhaustive()
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

    /// A disk whose bytes are `backend`'s.
    pub fn new(backend: Arc<dyn BlockBackend>) -> Self {
        Self { backend, id: Default::default(), complaints: Arc::default() }
    }

    /// What the guest reads as the disk's serial number (`/dev/disk/by-id`): at most 20 bytes.
    ///
    /// # Errors
    /// [`DiskError::Id`] where it is longer.
    pub fn id(mut self, id: &str) -> Result<Self, DiskError> {
        let field = self.id.get_mut(..id.len()).ok_or_else(|| DiskError::Id { id: id.into() })?;
        field.copy_from_slice(id.as_bytes());
        Ok(self)
    }

    /// The configuration (section 5.2.4), with fields of features that are not offered zero.
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut put = |at: usize, value: &[u8]| config[at..at + value.len()].copy_from_slice(value);
        let block = self.backend.block_size();
        put(0, &(self.backend.len() / SECTOR).to_le_bytes());
        put(12, &MOST_SEGMENTS.to_le_bytes());
        // The logical block stays 512 bytes, so that any image can be used; the physical one is a
        // hint.
        put(20, &512u32.to_le_bytes());
        put(24, &[u8::try_from((block / 512).trailing_zeros()).unwrap_or(0), 0]);
        put(36, &MOST_DISCARDED.to_le_bytes());
        put(40, &MOST_RANGES.to_le_bytes());
        put(44, &(block / 512).to_le_bytes());
        put(48, &MOST_ZEROED.to_le_bytes());
        put(52, &MOST_RANGES.to_le_bytes());
        // write_zeroes_may_unmap.
        put(56, &[1]);
        config
    }
}

impl VirtioDevice for Disk {
    fn device_type(&self) -> DeviceType {
        DeviceType::BLOCK
    }

    fn features(&self) -> u64 {
        let always = [VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_TOPOLOGY];
        let writing = [VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES];
        let more = if self.backend.read_only() { &[VIRTIO_BLK_F_RO][..] } else { &writing };
        always.iter().chain(more).fold(0, |bits, bit| bits | 1 << bit)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<Vec<Box<dyn Worker>>> {
        let has_flush = activation.has(VIRTIO_BLK_F_FLUSH);
        let Activation { memory, queues, .. } = activation;
        let requests = Requests {
            backend: self.backend.clone(),
            id: self.id,
            write_through: !has_flush,
            complaints: self.complaints.clone(),
        };
        Ok(vec![Box::new(DiskWorker { memory, queues, requests })])
    }
}

struct DiskWorker {
    memory: GuestMemory,
    queues: Vec<VirtQueue>,
    requests: Requests,
}

impl Worker for DiskWorker {
    fn queues(&mut self) -> &mut [VirtQueue] {
        &mut self.queues
    }

    fn notify(&mut self, _: u16) -> Result<Progress, QueueError> {
        let map = self.memory.snapshot();
        let Some(queue) = self.queues.first_mut() else { return Ok(Progress::Idle) };
        let number = queue.index();
        queue.serve(&map, TURN, BATCH, |chain| self.requests.serve(number, chain))
    }
}

struct Requests {
    backend: Arc<dyn BlockBackend>,
    id: [u8; VIRTIO_BLK_ID_BYTES as usize],
    /// The driver cannot flush, so that every write must be stable when it ends (section 5.2.6.2).
    write_through: bool,
    /// Of the host's errors, which a guest may provoke: with a full disk, for example.
    complaints: Arc<Complaints>,
}

/// Why a request ends without success.
enum Failure {
    Unsupported,
    /// The request asks for something that is not there; the driver's fault.
    Invalid(&'static str),
    Host(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::Unsupported => Failure::Unsupported,
            _ => Failure::Host(error),
        }
    }
}

impl Requests {
    /// Serves the request in `chain`: a header, data, and a status byte to answer (section 5.2.6).
    fn serve(&self, queue: u16, chain: &mut Chain<'_>) -> Result<u32, QueueError> {
        let malformed = |what| QueueError::Request { queue, what };
        let mut header = [0; 16];
        if chain.readable.read(&mut header) < header.len() {
            return Err(malformed("a disk request without header"));
        }
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let (kind, sector) = (u32::from_le_bytes([a, b, c, d]), u64::from_le_bytes(sector));
        // The status is the last byte, however the driver cut the buffers (section 2.7.4.3).
        let Some(room) = chain.writable.len().checked_sub(1) else {
            return Err(malformed("a disk request without room for its status"));
        };
        let mut data = chain.writable.take(room);
        let result = self.act(kind, sector, &mut chain.readable, &mut data);
        let written = room - data.len();
        let status = match result {
            Ok(()) => VIRTIO_BLK_S_OK,
            Err(Failure::Unsupported) => VIRTIO_BLK_S_UNSUPP,
            Err(Failure::Invalid(what)) => {
                log::debug!("virtio-blk: request type {kind} at sector {sector:#x}: {what}");
                VIRTIO_BLK_S_IOERR
            }
            Err(Failure::Host(error)) => {
                self.complaints
                    .warn("virtio-blk", format_args!("request type {kind} at sector {sector:#x}: {error}"));
                VIRTIO_BLK_S_IOERR
            }
        };
        chain.writable.write(&[u8::try_from(status).unwrap_or(u8::MAX)]);
        // The length counts from the front and must not cover bytes that were not written (section
        // 2.7.8.2), so it includes the status only where nothing before it was left out.
        let all = if written == room { room + 1 } else { written };
        Ok(u32::try_from(all).unwrap_or(u32::MAX))
    }

    fn act(
        &self,
        kind: u32,
        sector: u64,
        from: &mut Buffers<'_>,
        into: &mut Buffers<'_>,
    ) -> Result<(), Failure> {
        match kind {
            VIRTIO_BLK_T_IN => {
                let offset = self.range(sector, into.len() as u64)?;
                Ok(self.backend.read_at(into, offset)?)
            }
            VIRTIO_BLK_T_OUT => {
                let offset = self.range(sector, from.len() as u64)?;
                self.writable()?;
                self.backend.write_at(from, offset)?;
                self.settle()
            }
            VIRTIO_BLK_T_FLUSH => Ok(self.backend.flush()?),
            VIRTIO_BLK_T_GET_ID => {
                into.write(&self.id);
                Ok(())
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                self.writable()?;
                self.clear(kind, from)?;
                self.settle()
            }
            _ => Err(Failure::Unsupported),
        }
    }

    /// Discards or zeroes the ranges listed in `from`: sector, number of sectors and flags of 16
    /// bytes each. All are checked before the first is touched.
    fn clear(&self, kind: u32, from: &mut Buffers<'_>) -> Result<(), Failure> {
        let count = from.len() / 16;
        if !from.len().is_multiple_of(16) || count == 0 || count > MOST_RANGES as usize {
            return Err(Failure::Invalid("not 1 to 16 ranges"));
        }
        let discard = kind == VIRTIO_BLK_T_DISCARD;
        let most = if discard { MOST_DISCARDED } else { MOST_ZEROED };
        let allowed = if discard { 0 } else { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP };
        let mut ranges = Vec::with_capacity(count);
        for _ in 0..count {
            let mut range = [0; 16];
            from.read(&mut range);
            let [a, b, c, d, e, f, g, h, i, j, k, l, flags @ ..] = range;
            let sector = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
            let sectors = u32::from_le_bytes([i, j, k, l]);
            let flags = u32::from_le_bytes(flags);
            if flags & !allowed != 0 {
                // Section 5.2.6.2: unknown flags, and unmap in a discard.
                return Err(Failure::Unsupported);
            }
            if sectors > most {
                return Err(Failure::Invalid("a range longer than the configuration allows"));
            }
            let len = u64::from(sectors) * SECTOR;
            ranges.push((self.range(sector, len)?, len, flags != 0));
        }
        for (offset, len, unmap) in ranges.into_iter().filter(|&(_, len, _)| len > 0) {
            if discard {
                self.backend.discard(offset, len)?;
            } else {
                self.backend.write_zeroes(offset, len, unmap)?;
            }
        }
        Ok(())
    }

    /// Where `len` bytes from `sector` begin, in bytes, if they are whole sectors of the disk.
    fn range(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        if !len.is_multiple_of(SECTOR) {
            return Err(Failure::Invalid("not whole sectors"));
        }
        sector
            .checked_mul(SECTOR)
            .filter(|offset| offset.checked_add(len).is_some_and(|end| end <= self.backend.len()))
            .ok_or(Failure::Invalid("beyond the end of the disk"))
    }

    fn writable(&self) -> Result<(), Failure> {
        if self.backend.read_only() { Err(Failure::Invalid("the disk is read-only")) } else { Ok(()) }
    }

    fn settle(&self) -> Result<(), Failure> {
        if self.write_through { Ok(self.backend.flush()?) } else { Ok(()) }
    }
}
