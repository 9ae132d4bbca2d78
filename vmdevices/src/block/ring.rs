//! io_uring: the kernel works on many requests of a disk at once, straight in guest memory.
#![expect(unsafe_code, reason = "submission queue entries hold addresses")]

use std::collections::HashMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::squeue::Entry;
use io_uring::{IoUring, opcode, types};
use vm_memory::Permissions;
use vm_memory::bitmap::Bitmap;
use vmcore::memory::MemoryMap;

use super::BlockBackend;
use crate::buffers::{Buffers, GuestRanges, MOST_PIECES};

/// What the kernel is to do with a request's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transfer {
    /// From the file to the guest.
    Read,
    /// From the guest to the file; `durable`: to stable storage at once.
    Write { durable: bool },
}

/// A ring and what is in flight on it. `T` is whatever the owner wants back with each result.
pub(crate) struct Ring<T> {
    ring: IoUring,
    /// Where the file is. It stays open while requests on it may be queued.
    backend: Arc<dyn BlockBackend>,
    in_flight: HashMap<u64, InFlight<T>>,
    next: u64,
    /// Entries that the kernel has not been told of.
    queued: usize,
}

/// A request that the kernel works on. Its memory and its vectors stay where they are meanwhile.
struct InFlight<T> {
    owner: T,
    /// Keeps the guest memory of the vectors mapped.
    map: Arc<MemoryMap>,
    filled: Option<GuestRanges>,
    /// Read by the kernel until the entry is submitted, on older kernels until it completes.
    _vectors: Vec<libc::iovec>,
}

// SAFETY: the vectors are what keeps it from being Send by itself. They are addresses for the kernel,
// which nothing here follows, and are valid on any thread.
unsafe impl<T: Send> Send for InFlight<T> {}

impl<T> std::fmt::Debug for Ring<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("in_flight", &self.in_flight.len()).finish_non_exhaustive()
    }
}

impl<T> Ring<T> {
    /// A ring of `entries` requests for the file behind `backend`, which signals `event` when one ends.
    ///
    /// # Errors
    /// Where the kernel has no io_uring, or does not allow it.
    pub(crate) fn new(
        backend: Arc<dyn BlockBackend>,
        entries: u32,
        event: &impl AsRawFd,
    ) -> io::Result<Self> {
        let ring = IoUring::builder().dontfork().build(entries)?;
        // Older kernels may drop completions, and what is in flight would never end.
        if !ring.params().is_feature_nodrop() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        Ok(Self { ring, backend, in_flight: HashMap::new(), next: 0, queued: 0 })
    }

    /// How many requests the kernel works on.
    pub(crate) fn len(&self) -> usize {
        self.in_flight.len()
    }

    /// Queues a transfer between `parts` of the memory in `map` and the file at `offset` (bytes).
    ///
    /// # Errors
    /// Gives `owner` back where this cannot be done here: there is no file, no room, or the memory is
    /// not aligned as the file wants it.
    pub(crate) fn transfer(
        &mut self,
        what: Transfer,
        map: &Arc<MemoryMap>,
        parts: Vec<GuestRanges>,
        offset: u64,
        owner: T,
    ) -> Result<(), T> {
        let access = if what == Transfer::Read { Permissions::Write } else { Permissions::Read };
        let mut buffers = Buffers::default();
        if !parts.iter().all(|part| part.add_to(&mut buffers, map, access).is_ok()) {
            return Err(owner);
        }
        let backend = self.backend.clone();
        let Some(file) = backend.kernel_file() else { return Err(owner) };
        let pieces = buffers.slices().len();
        if pieces > MOST_PIECES
            || !buffers.aligned(file.memory_align)
            || !offset.is_multiple_of(file.offset_align)
        {
            return Err(owner);
        }
        let vectors = buffers.to_vectors();
        let (fd, pointer) = (types::Fd(file.fd.as_raw_fd()), vectors.as_ptr());
        // At most MOST_PIECES.
        let count = u32::try_from(vectors.len()).unwrap_or(u32::MAX);
        let entry = match what {
            Transfer::Read => opcode::Readv::new(fd, pointer, count).offset(offset).build(),
            Transfer::Write { durable } => opcode::Writev::new(fd, pointer, count)
                .offset(offset)
                .rw_flags(if durable { libc::RWF_DSYNC } else { 0 })
                .build(),
        };
        let filled = (what == Transfer::Read).then(|| {
            let mut all = GuestRanges::default();
            parts.into_iter().for_each(|part| all.append(part));
            all
        });
        self.push(entry, InFlight { owner, map: map.clone(), filled, _vectors: vectors })
    }

    /// Queues a flush of what was written and completed before.
    ///
    /// # Errors
    /// As [`Ring::transfer`].
    pub(crate) fn flush(&mut self, map: &Arc<MemoryMap>, owner: T) -> Result<(), T> {
        let backend = self.backend.clone();
        let Some(file) = backend.kernel_file() else { return Err(owner) };
        let entry =
            opcode::Fsync::new(types::Fd(file.fd.as_raw_fd())).flags(types::FsyncFlags::DATASYNC).build();
        self.push(entry, InFlight { owner, map: map.clone(), filled: None, _vectors: Vec::new() })
    }

    fn push(&mut self, entry: Entry, request: InFlight<T>) -> Result<(), T> {
        let token = self.next;
        // SAFETY: what the entry refers to lives in `in_flight` until its completion: the vectors, whose
        // heap memory does not move with them, and through `map` the guest memory they name. Both are
        // given up by `take` alone, after the kernel's completion, and Drop waits for all of these.
        if unsafe { self.ring.submission().push(&entry.user_data(token)) }.is_err() {
            return Err(request.owner);
        }
        self.next = self.next.wrapping_add(1);
        self.in_flight.insert(token, request);
        self.queued += 1;
        Ok(())
    }

    /// Tells the kernel about what was queued.
    pub(crate) fn submit(&mut self) {
        if self.queued > 0 {
            self.enter(0);
        }
    }

    /// `io_uring_enter`, until the kernel has taken all that was queued, waiting for `want` completions.
    fn enter(&mut self, want: usize) {
        loop {
            match self.ring.submit_and_wait(want) {
                Ok(count) => self.queued = self.queued.saturating_sub(count),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                // EBUSY and EAGAIN: it wants completions to be taken, or memory, first. What is queued
                // goes with the next call.
                Err(e) => {
                    log::debug!("io_uring_enter: {e}");
                    return;
                }
            }
            if self.queued == 0 || self.ring.submission().is_empty() {
                self.queued = 0;
                return;
            }
        }
    }

    /// Whether the kernel did not take all that was queued, so that [`Ring::submit`] is due again.
    pub(crate) fn is_backed_up(&self) -> bool {
        self.queued > 0
    }

    /// The next result there is: bytes transferred, or what the kernel said.
    pub(crate) fn take(&mut self) -> Option<(T, io::Result<usize>)> {
        loop {
            let completion = self.ring.completion().next()?;
            let result = completion.result();
            let Some(request) = self.in_flight.remove(&completion.user_data()) else { continue };
            let result = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
            if let (Ok(count), Some(filled)) = (&result, &request.filled) {
                mark_dirty(filled, &request.map, *count);
            }
            return Some((request.owner, result));
        }
    }

    /// Waits until there is a result to [`Ring::take`], if anything is in flight.
    pub(crate) fn wait(&mut self) {
        if self.len() > 0 && self.ring.completion().is_empty() {
            self.enter(1);
        }
    }
}

/// The kernel wrote the first `count` bytes of `ranges`.
fn mark_dirty(ranges: &GuestRanges, map: &MemoryMap, mut count: usize) {
    let Ok(buffers) = ranges.buffers(map, Permissions::Write) else { return };
    for slice in buffers.slices() {
        let here = count.min(slice.len());
        slice.bitmap().mark_dirty(0, here);
        count -= here;
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        while self.len() > 0 {
            self.wait();
            while self.take().is_some() {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::RawFile;
    use std::os::unix::fs::FileExt;
    use vmcore::{GuestAddress, GuestMemory, MemoryRegion};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    /// A ring on an image of 64 KiB, unless the kernel has none.
    fn ring(image: &tempfile::NamedTempFile) -> Option<(Ring<u32>, EventFd)> {
        image.as_file().set_len(1 << 16).unwrap();
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        match Ring::new(Arc::new(RawFile::open(image.path(), false).unwrap()), 4, &event) {
            Ok(ring) => Some((ring, event)),
            Err(error) => {
                println!("skipped: no io_uring here: {error}");
                None
            }
        }
    }

    fn ranges(all: &[(u64, usize)]) -> GuestRanges {
        let mut ranges = GuestRanges::default();
        all.iter().for_each(|&(at, len)| ranges.push(GuestAddress(at), len));
        ranges
    }

    #[test]
    fn transfers_go_between_memory_and_file_and_mark_what_they_fill() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let Some((mut ring, event)) = ring(&image) else { return };
        let region = MemoryRegion::builder(GuestAddress(0), 0x1_0000).track_dirty().build().unwrap();
        let memory = GuestMemory::new();
        memory.insert(region.clone().into()).unwrap();
        memory.write(GuestAddress(0x100), &[7; 300]).unwrap();
        region.take_host_dirty().unwrap();
        let map = memory.snapshot();
        // Two parts of one transfer, with a piece of another length.
        let parts = || vec![ranges(&[(0x100, 100), (0x180, 10)]), ranges(&[(0x190, 60)])];
        ring.transfer(Transfer::Write { durable: true }, &map, parts(), 512, 1).unwrap();
        ring.flush(&map, 2).unwrap();
        // Past the end: short, of which the first bytes count.
        let end = vec![ranges(&[(0x5000, 0x1000), (0x7000, 0x1000)])];
        ring.transfer(Transfer::Read, &map, end, (1 << 16) - 0x1800, 3).unwrap();
        let nowhere = vec![ranges(&[(1 << 40, 1)])];
        assert_eq!(ring.transfer(Transfer::Read, &map, nowhere, 0, 4), Err(4));
        ring.submit();
        // The memory may be taken from the guest meanwhile.
        memory.remove(GuestAddress(0)).unwrap();
        drop(map);
        let mut results = Vec::new();
        while ring.len() > 0 {
            ring.wait();
            results.extend(std::iter::from_fn(|| ring.take()).map(|(n, result)| (n, result.unwrap())));
        }
        results.sort_unstable();
        assert_eq!(results, [(1, 170), (2, 0), (3, 0x1800)]);
        assert!(event.read().unwrap() >= 1);
        let mut stored = [0; 180];
        image.as_file().read_exact_at(&mut stored, 512).unwrap();
        assert!(stored[..170] == [7; 170] && stored[170..] == [0; 10]);
        let dirty = region.take_host_dirty().unwrap();
        assert_eq!(dirty.dirty_offsets().collect::<Vec<_>>(), [0x5000, 0x7000]);
    }

    #[test]
    fn a_full_ring_gives_back_and_one_that_is_dropped_waits() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let Some((mut ring, _)) = ring(&image) else { return };
        let memory = crate::buffers::tests::memory();
        let map = memory.snapshot();
        let queued = (0..10).filter(|&n| {
            let parts = vec![ranges(&[(u64::from(n) * 0x100, 0x100)])];
            ring.transfer(Transfer::Read, &map, parts, 0, n).is_ok()
        });
        assert_eq!(queued.count(), 4);
        ring.submit();
        assert!(!ring.is_backed_up());
        drop(ring);
        assert_eq!(Arc::strong_count(&map), 2, "a request is in flight still");
    }
}
