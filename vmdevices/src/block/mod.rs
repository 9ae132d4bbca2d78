//! What disks keep their bytes in.

mod lock;
mod raw;

use std::io;

use crate::buffers::Buffers;

pub use raw::{DiskError, RawFile};

/// The bytes behind a disk. Calls may come from several threads at once, and may block.
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

    /// The size of the blocks that it handles best, in bytes: a power of two from 512.
    fn block_size(&self) -> u32 {
        512
    }
}
