//! What disks keep their bytes in.
//!
//! A [`BlockBackend`] is a disk's bytes; [`Disk`](crate::Disk) shows it to a guest. [`RawFile`] keeps
//! them as they are in a file or on a block device.

mod direct;
mod error;
mod faulty;
mod limit;
mod lock;
mod pool;
mod raw;
mod ring;
mod stats;

use std::io;
use std::os::fd::BorrowedFd;

use crate::buffers::Buffers;

pub use error::DiskError;
pub use faulty::{Effect, Fault, Faulty, Operation};
pub(crate) use limit::Limiter;
pub use limit::{Limits, Rate};
pub(crate) use pool::Pool;
pub use raw::{RawFile, RawOptions};
pub(crate) use ring::{Ring, Transfer};
pub use stats::DiskStats;
pub(crate) use stats::{Counters, count};

/// Size of a sector in bytes: the unit of disks (virtio 1.2, section 5.2).
pub(crate) const SECTOR: u64 = 512;

/// The bytes behind a disk. Calls may come from several threads at once, and may block: they are made
/// on threads that nobody waits for, except where a machine is deterministic.
///
/// Errors reach the guest as I/O errors; `ErrorKind::Unsupported` as "unsupported".
pub trait BlockBackend: Send + Sync {
    /// Size in bytes, as far as the guest can use it: a multiple of 512.
    fn len(&self) -> u64;

    /// Whether there are no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether writing is refused.
    fn read_only(&self) -> bool;

    /// Fills all of `into` from `offset` (bytes). The range is within [`BlockBackend::len`].
    ///
    /// # Errors
    /// Where not all of it can be had.
    fn read_at(&self, into: &mut Buffers<'_>, offset: u64) -> io::Result<()>;

    /// Writes all of `from` at `offset` (bytes). The range is within [`BlockBackend::len`].
    ///
    /// # Errors
    /// Where not all of it could be written.
    fn write_at(&self, from: &mut Buffers<'_>, offset: u64) -> io::Result<()>;

    /// Returns once everything written before is on stable storage.
    ///
    /// # Errors
    /// Where that is not certain.
    fn flush(&self) -> io::Result<()>;

    /// The bytes are not needed any more; what they read as afterwards is unspecified.
    ///
    /// # Errors
    /// Where something went wrong; not being able to is no error.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes the bytes read as zero, giving their space back where `unmap`.
    ///
    /// # Errors
    /// Where that did not happen.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;

    /// The sizes that it handles best.
    fn topology(&self) -> Topology {
        Topology::default()
    }

    /// Makes the disk `len` bytes long (a multiple of 512). New bytes read as zero.
    ///
    /// # Errors
    /// `ErrorKind::Unsupported` where this kind of disk keeps its size; what keeps it from it otherwise.
    fn resize(&self, len: u64) -> io::Result<()> {
        let _ = len;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// The file whose bytes are the disk's at the same offsets, if there is one. The kernel may then be
    /// asked to read, write and flush there directly, beside the calls above.
    fn kernel_file(&self) -> Option<KernelFile<'_>> {
        None
    }
}

/// Sizes of a disk's blocks, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// What is written at once without reading the rest: a power of two from 512.
    pub physical: u32,
    /// What is discarded at once: a power of two from 512.
    pub discard: u32,
    /// What is best transferred at once, or 0 where it does not matter.
    pub optimal: u32,
}

impl Default for Topology {
    fn default() -> Self {
        Self { physical: 512, discard: 512, optimal: 0 }
    }
}

/// A file for the kernel to work on; see [`BlockBackend::kernel_file`].
#[derive(Clone, Copy, Debug)]
pub struct KernelFile<'a> {
    /// The file, open as long as the disk is.
    pub fd: BorrowedFd<'a>,
    /// What addresses and lengths of memory must be multiples of, in bytes; 1 for any.
    pub memory_align: usize,
    /// What offsets must be multiples of, in bytes; 1 for any. Requests come in multiples of 512.
    pub offset_align: u64,
}
