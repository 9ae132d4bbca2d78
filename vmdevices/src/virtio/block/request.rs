//! Requests of a disk (virtio 1.2, section 5.2.6): what a driver says, and what is done about it.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::Permissions;
use vmcore::GuestAddress;
use vmcore::memory::MemoryMap;

use super::{Id, MOST_DISCARDED, MOST_RANGES, MOST_ZEROED};
use crate::block::{BlockBackend, SECTOR};
use crate::buffers::{Buffers, GuestRanges, MOST_PIECES};
use crate::virtio::queue::{QueueError, RangeChain};

/// Bytes of a job that requests are merged into.
const MOST_MERGED: usize = 1 << 20;

/// What is done to the host's side.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Op {
    /// From this offset, in bytes.
    Read(u64),
    /// To this offset, in bytes.
    Write(u64),
    Flush,
    /// Ranges of bytes.
    Discard(Vec<(u64, u64)>),
    /// Ranges of bytes, and whether their space may be given back.
    Zero(Vec<(u64, u64, bool)>),
}

impl Op {
    /// For a message.
    pub(super) fn describe(&self) -> String {
        match self {
            Op::Read(offset) => format!("reading at {offset:#x}"),
            Op::Write(offset) => format!("writing at {offset:#x}"),
            Op::Flush => "flushing".into(),
            Op::Discard(ranges) => format!("discarding {ranges:x?}"),
            Op::Zero(ranges) => format!("zeroing {ranges:x?}"),
        }
    }
}

/// A driver's request, as far as its answer goes.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) head: u16,
    /// Where its data comes from or goes to.
    pub(super) data: GuestRanges,
    pub(super) answer: Answer,
}

/// Where the status of a request goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Answer {
    status: GuestAddress,
    /// Bytes in front of the status.
    room: usize,
}

/// Work for the host: one request, or several that follow each other on the disk.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) op: Op,
    pub(super) parts: Vec<Part>,
    /// The memory that the parts' ranges lie in.
    pub(super) map: Arc<MemoryMap>,
    /// Writes are to be stable when they end.
    pub(super) durable: bool,
}

/// Why a request ends without success.
#[derive(Debug)]
pub(super) enum Failure {
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

impl Failure {
    pub(super) fn status(&self) -> u8 {
        let status = match self {
            Failure::Unsupported => VIRTIO_BLK_S_UNSUPP,
            Failure::Invalid(_) | Failure::Host(_) => VIRTIO_BLK_S_IOERR,
        };
        u8::try_from(status).unwrap_or(u8::MAX)
    }
}

impl Answer {
    /// Writes the status; gives the used length where `written` bytes of data were, too.
    pub(super) fn give(self, map: &MemoryMap, status: u8, written: usize) -> u32 {
        // The place was found writable when the request came, in this same map.
        let _ = vm_memory::Bytes::write_obj(map, status, self.status);
        // The length counts from the front and must not cover bytes that were not written (section
        // 2.7.8.2), so it includes the status only where nothing before it was left out.
        let all = if written == self.room { self.room + 1 } else { written };
        u32::try_from(all).unwrap_or(u32::MAX)
    }

    /// As [`Answer::give`], for a request that ended with `result`: read requests fill their room.
    pub(super) fn end(self, map: &MemoryMap, op: &Op, result: &Result<(), Failure>) -> u32 {
        let written = if matches!((op, result), (Op::Read(_), Ok(()))) { self.room } else { 0 };
        let status = result.as_ref().map_or_else(Failure::status, |()| OK);
        self.give(map, status, written)
    }
}

const OK: u8 = VIRTIO_BLK_S_OK.to_le_bytes()[0];

/// What becomes of a request at once.
pub(super) enum Parsed {
    /// It is for the host.
    Work(Op, Part),
    /// It is done: the status has been written; the used length.
    Done(u32),
    /// It cannot be done.
    Failed(Answer, Failure),
}

/// What requests are checked against.
pub(super) struct Rules<'a> {
    pub(super) queue: u16,
    /// The disk's length in bytes.
    pub(super) len: u64,
    pub(super) read_only: bool,
    pub(super) id: &'a Id,
    /// Whether a flush does anything.
    pub(super) flushes: bool,
}

impl Rules<'_> {
    /// Looks at a request: a header, data, and a status byte to answer.
    pub(super) fn parse(&self, map: &MemoryMap, mut chain: RangeChain) -> Result<Parsed, QueueError> {
        let malformed = |what| QueueError::Request { queue: self.queue, what };
        let mut header = [0; 16];
        let front = chain.readable.take_front(header.len());
        if read(&front, map, &mut header) < header.len() {
            return Err(malformed("a disk request without header"));
        }
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let (kind, sector) = (u32::from_le_bytes([a, b, c, d]), u64::from_le_bytes(sector));
        // The status is the last byte, however the driver cut the buffers (section 2.7.4.3).
        let Some(status) = chain.writable.take_last() else {
            return Err(malformed("a disk request without room for its status"));
        };
        let answer = Answer { status, room: chain.writable.len() };
        let (head, readable, writable) = (chain.head, chain.readable, chain.writable);
        let (op, data) = match kind {
            VIRTIO_BLK_T_IN => (self.range(sector, writable.len() as u64).map(Op::Read), writable),
            VIRTIO_BLK_T_OUT => {
                let range = self.range(sector, readable.len() as u64);
                (self.writable().and(range).map(Op::Write), readable)
            }
            VIRTIO_BLK_T_FLUSH if !self.flushes => return Ok(Parsed::Done(answer.give(map, OK, 0))),
            VIRTIO_BLK_T_FLUSH => (Ok(Op::Flush), GuestRanges::default()),
            VIRTIO_BLK_T_GET_ID => {
                let written = writable
                    .buffers(map, Permissions::Write)
                    .map_or(0, |mut buffers: Buffers<'_>| buffers.write(self.id));
                return Ok(Parsed::Done(answer.give(map, OK, written)));
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                let cleared = self.writable().and_then(|()| self.clear(kind, &readable, map));
                (cleared, GuestRanges::default())
            }
            _ => (Err(Failure::Unsupported), GuestRanges::default()),
        };
        Ok(match op {
            Ok(op) => Parsed::Work(op, Part { head, data, answer }),
            Err(failure) => {
                if let Failure::Invalid(what) = failure {
                    log::debug!("virtio-blk: request type {kind} at sector {sector:#x}: {what}");
                }
                Parsed::Failed(answer, failure)
            }
        })
    }

    /// The ranges to discard or zero that are listed in `list`: sector, number of sectors and flags of
    /// 16 bytes each. One that is wrong spoils all.
    fn clear(&self, kind: u32, list: &GuestRanges, map: &MemoryMap) -> Result<Op, Failure> {
        let count = list.len() / 16;
        if !list.len().is_multiple_of(16) || count == 0 || count > MOST_RANGES as usize {
            return Err(Failure::Invalid("not 1 to 16 ranges"));
        }
        let discard = kind == VIRTIO_BLK_T_DISCARD;
        let most = if discard { MOST_DISCARDED } else { MOST_ZEROED };
        let allowed = if discard { 0 } else { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP };
        let mut bytes = vec![0; 16 * count];
        if read(list, map, &mut bytes) < bytes.len() {
            return Err(Failure::Invalid("ranges that are not in memory"));
        }
        let mut ranges = Vec::with_capacity(count);
        for range in bytes.chunks_exact(16) {
            let word = |at: usize| range[at..at + 4].try_into().map_or(0, u32::from_le_bytes);
            let sector = u64::from(word(4)) << 32 | u64::from(word(0));
            let (sectors, flags) = (word(8), word(12));
            if flags & !allowed != 0 {
                // Section 5.2.6.2: unknown flags, and unmap in a discard.
                return Err(Failure::Unsupported);
            }
            if sectors > most {
                return Err(Failure::Invalid("a range longer than the configuration allows"));
            }
            let len = u64::from(sectors) * SECTOR;
            let offset = self.range(sector, len)?;
            if len > 0 {
                ranges.push((offset, len, flags != 0));
            }
        }
        Ok(if discard {
            Op::Discard(ranges.into_iter().map(|(offset, len, _)| (offset, len)).collect())
        } else {
            Op::Zero(ranges)
        })
    }

    /// Where `len` bytes from `sector` begin, in bytes, if they are whole sectors of the disk.
    fn range(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        if !len.is_multiple_of(SECTOR) {
            return Err(Failure::Invalid("not whole sectors"));
        }
        sector
            .checked_mul(SECTOR)
            .filter(|offset| offset.checked_add(len).is_some_and(|end| end <= self.len))
            .ok_or(Failure::Invalid("beyond the end of the disk"))
    }

    fn writable(&self) -> Result<(), Failure> {
        if self.read_only { Err(Failure::Invalid("the disk is read-only")) } else { Ok(()) }
    }
}

/// Copies from guest memory; how many bytes there were.
fn read(ranges: &GuestRanges, map: &MemoryMap, into: &mut [u8]) -> usize {
    ranges.buffers(map, Permissions::Read).map_or(0, |mut buffers: Buffers<'_>| buffers.read(into))
}

impl Job {
    /// Makes what was to be read zero.
    pub(super) fn forget(&self) {
        if let Op::Read(_) = self.op {
            for part in &self.parts {
                // It was writable when the request came, in this same map.
                if let Ok(mut buffers) = part.data.buffers(&self.map, Permissions::Write) {
                    buffers.write_zeroes(part.data.len());
                }
            }
        }
    }

    /// Bytes of data.
    pub(super) fn len(&self) -> usize {
        self.parts.iter().map(|part| part.data.len()).sum()
    }

    /// Where the data of each request is.
    pub(super) fn data(&self) -> Vec<GuestRanges> {
        self.parts.iter().map(|part| part.data.clone()).collect()
    }

    /// Takes a request in that goes on where this one ends, if it does.
    pub(super) fn merge(&mut self, op: Op, part: Part) -> Result<(), (Op, Part)> {
        let (len, more) = (self.len(), part.data.len());
        let pieces = self.parts.iter().map(|part| part.data.pieces()).sum::<usize>() + part.data.pieces();
        let follows = match (&self.op, &op) {
            (Op::Read(offset), Op::Read(next)) | (Op::Write(offset), Op::Write(next)) => {
                offset + len as u64 == *next
            }
            _ => false,
        };
        if !follows || len + more > MOST_MERGED || pieces > MOST_PIECES {
            return Err((op, part));
        }
        self.parts.push(part);
        Ok(())
    }

    /// Each request by itself.
    fn split(self) -> impl Iterator<Item = Job> {
        let Job { op, parts, map, durable } = self;
        let (mut start, write) = match op {
            Op::Read(offset) => (offset, false),
            Op::Write(offset) => (offset, true),
            // Others are not merged.
            _ => (0, false),
        };
        parts.into_iter().map(move |part| {
            let op = if write { Op::Write(start) } else { Op::Read(start) };
            start += part.data.len() as u64;
            Job { op, parts: vec![part], map: map.clone(), durable }
        })
    }

    /// Does it here and now. Where several requests fail together each is tried by itself: what is
    /// wrong with one of them is not the others' fault.
    pub(super) fn perform(self, backend: &dyn BlockBackend) -> Vec<Ended> {
        match self.attempt(backend) {
            Err(_) if self.parts.len() > 1 => self
                .split()
                .map(|job| {
                    let result = job.attempt(backend).map_err(Failure::from);
                    Ended { job, result }
                })
                .collect(),
            result => vec![Ended { result: result.map_err(Failure::from), job: self }],
        }
    }

    fn attempt(&self, backend: &dyn BlockBackend) -> io::Result<()> {
        // An image may be anything; whatever goes wrong in making sense of it is an I/O error.
        catch_unwind(AssertUnwindSafe(|| self.attempt_unguarded(backend)))
            .unwrap_or_else(|_| Err(io::Error::other("the disk's back end panicked")))
    }

    fn attempt_unguarded(&self, backend: &dyn BlockBackend) -> io::Result<()> {
        let buffers = |access| {
            let mut buffers = Buffers::default();
            self.parts.iter().try_for_each(|part| part.data.add_to(&mut buffers, &self.map, access))?;
            io::Result::Ok(buffers)
        };
        match &self.op {
            Op::Read(offset) => return backend.read_at(&mut buffers(Permissions::Write)?, *offset),
            Op::Write(offset) => backend.write_at(&mut buffers(Permissions::Read)?, *offset)?,
            Op::Flush => return backend.flush(),
            Op::Discard(ranges) => {
                ranges.iter().try_for_each(|&(offset, len)| backend.discard(offset, len))?;
            }
            Op::Zero(ranges) => ranges
                .iter()
                .try_for_each(|&(offset, len, unmap)| backend.write_zeroes(offset, len, unmap))?,
        }
        if self.durable { backend.flush() } else { Ok(()) }
    }
}

/// A job that is over, and how it ended: the same for all its requests.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) job: Job,
    pub(super) result: Result<(), Failure>,
}
