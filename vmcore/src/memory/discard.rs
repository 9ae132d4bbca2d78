//! Memory that a guest does not need, returned to the host.
#![expect(unsafe_code, reason = "madvise and fallocate on the pages of a region")]

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::bitmap::Bitmap as _;

use super::{MemoryError, MemoryRegion};

/// How pages are returned to the host, in whole pages of `page` bytes.
#[derive(Clone, Copy, Debug)]
pub(super) enum ReturnBy {
    /// `MADV_DONTNEED`: pages are zero afterwards, or what the file has.
    Advice {
        page: u64,
        zeroes: bool,
    },
    /// A hole in the file: the mapping's pages go with the file's.
    Hole {
        page: u64,
    },
    Nothing,
}

/// Keeps the pages of a region with it while it lives: for devices of the host that access them by
/// physical address, and so do not notice when one is replaced. See [`MemoryRegion::pin`].
#[derive(Debug)]
#[must_use = "the pages are kept while it lives"]
pub struct MemoryPin(Arc<Mutex<usize>>);

impl Drop for MemoryPin {
    fn drop(&mut self) {
        *count(&self.0) -= 1;
    }
}

fn count(pins: &Mutex<usize>) -> MutexGuard<'_, usize> {
    pins.lock().unwrap_or_else(PoisonError::into_inner)
}

impl MemoryRegion {
    /// Returns to the host the memory of the pages that lie in `len` bytes from `offset` (bytes from the
    /// base) as a whole, and gives the bytes of these pages. The guest keeps the addresses: they read as
    /// zero until they are written ([`MemoryRegion::discards_to_zero`] tells of the exception), and
    /// count as written by the host.
    ///
    /// 0 where this region's memory is not to be had: a shared file's, which others may see; read-only
    /// memory's; pages that are locked (`mlock(2)`) or pinned ([`MemoryRegion::pin`]); a part of a
    /// reserved huge page.
    ///
    /// # Errors
    /// [`MemoryError::NotMapped`] where the range is not in the region, [`MemoryError::Host`] where the
    /// host refuses.
    pub fn discard(&self, offset: u64, len: u64) -> Result<u64, MemoryError> {
        let base = self.base().0.saturating_add(offset);
        let end = offset.checked_add(len).filter(|&end| end <= self.len());
        let Some(end) = end else {
            return Err(MemoryError::NotMapped { base, len, mapped_end: self.range().end() });
        };
        let (ReturnBy::Advice { page, .. } | ReturnBy::Hole { page }) = self.return_by else { return Ok(0) };
        let (first, last) = (offset.next_multiple_of(page), end - end % page);
        let Some(bytes) = last.checked_sub(first).filter(|&bytes| bytes > 0) else { return Ok(0) };
        // Held while it happens: who pins in the meantime finds pages that stay.
        let pins = count(&self.pins);
        if *pins > 0 {
            return Ok(0);
        }
        let too_large = |_| MemoryError::NotMapped { base, len, mapped_end: self.range().end() };
        let (at, size) =
            (usize::try_from(first).map_err(too_large)?, usize::try_from(bytes).map_err(too_large)?);
        let (done, backing) = match self.return_by {
            ReturnBy::Hole { .. } => (self.punch(first, bytes), "memfd"),
            _ => (self.forget(at, size), "private"),
        };
        match done {
            Ok(()) => {
                self.mapping.bitmap().mark_dirty(at, size);
                Ok(bytes)
            }
            // Locked pages, and reserved huge pages before Linux 5.18.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(0),
            Err(source) => Err(MemoryError::Host {
                op: "discard",
                backing,
                len: bytes,
                source,
                hint: "the guest goes on with its memory; see what the host says",
            }),
        }
    }

    /// Whether pages that [`MemoryRegion::discard`] returned read as zero: all but those of private
    /// files, which have the file's bytes again.
    pub fn discards_to_zero(&self) -> bool {
        !matches!(self.return_by, ReturnBy::Advice { zeroes: false, .. })
    }

    /// Keeps [`MemoryRegion::discard`] from returning pages while the result lives.
    pub fn pin(&self) -> MemoryPin {
        *count(&self.pins) += 1;
        MemoryPin(self.pins.clone())
    }

    /// `MADV_DONTNEED` for `size` bytes at `offset`.
    fn forget(&self, offset: usize, size: usize) -> io::Result<()> {
        let at = self.mapping.as_ptr().wrapping_add(offset);
        // SAFETY: the caller has checked that the range lies in the mapping that `self` owns. Its pages
        // are replaced by others at the same addresses; their bytes may change at any time as far as Rust
        // is concerned, as a guest does that too: there are no references to them.
        match unsafe { libc::madvise(at.cast(), size, libc::MADV_DONTNEED) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Makes a hole of `len` bytes at `offset` in the region's file.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let Some((file, start)) = self.file() else { return Err(io::ErrorKind::InvalidInput.into()) };
        let (Ok(offset), Ok(len)) = (i64::try_from(start + offset), i64::try_from(len)) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: the descriptor is open, and the call touches no memory but that of the file, whose
        // bytes may change at any time as far as Rust is concerned.
        match unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}
