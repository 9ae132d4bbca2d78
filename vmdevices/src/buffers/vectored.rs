//! Vectored system calls straight into and out of guest memory.
#![expect(unsafe_code, reason = "readv and writev on pieces of guest memory")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use vm_memory::bitmap::Bitmap;

use super::Buffers;

/// Most pieces one system call takes (`IOV_MAX` in limits.h of Linux).
pub(crate) const MOST_PIECES: usize = 1024;

/// Up to this many pieces need no allocation.
const FEW_PIECES: usize = 32;

const EMPTY: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

impl Buffers<'_> {
    /// Reads from `fd` at `offset` bytes (`preadv`, one call) and consumes what was filled.
    ///
    /// # Errors
    /// What the operating system says; 0 means the end of the file.
    pub fn fill_from_at(&mut self, fd: impl AsFd, offset: u64) -> io::Result<usize> {
        let (fd, offset) = (fd.as_fd(), file_offset(offset)?);
        // SAFETY: the vectors describe memory that stays mapped for the call (see `vectors`), and
        // the kernel writes only there.
        let fill =
            |iov: &[libc::iovec]| unsafe { libc::preadv(fd.as_raw_fd(), iov.as_ptr(), count(iov), offset) };
        self.fill(&[], fill)
    }

    /// Writes to `fd` at `offset` bytes (`pwritev`, one call) and consumes what was written.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn drain_to_at(&mut self, fd: impl AsFd, offset: u64) -> io::Result<usize> {
        let (fd, offset) = (fd.as_fd(), file_offset(offset)?);
        // SAFETY: the vectors describe memory that stays mapped for the call (see `vectors`), and
        // the kernel only reads it.
        let drain =
            |iov: &[libc::iovec]| unsafe { libc::pwritev(fd.as_raw_fd(), iov.as_ptr(), count(iov), offset) };
        self.drain(drain)
    }

    /// Reads from `fd` (`readv`, one call) and consumes what was filled. What does not fit goes on
    /// in `spill`: a result beyond [`Buffers::len`] as it was says so. Returns the bytes read.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn fill_from(&mut self, fd: impl AsFd, spill: &mut [u8]) -> io::Result<usize> {
        let fd = fd.as_fd();
        let spill = [libc::iovec { iov_base: spill.as_mut_ptr().cast(), iov_len: spill.len() }];
        // SAFETY: the vectors describe memory that stays mapped for the call (see `vectors`) and
        // `spill`, which is borrowed exclusively; the kernel writes only there.
        let fill = |iov: &[libc::iovec]| unsafe { libc::readv(fd.as_raw_fd(), iov.as_ptr(), count(iov)) };
        self.fill(&spill, fill)
    }

    /// Writes to `fd` (`writev`, one call) and consumes what was written. Returns how many bytes.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn drain_to(&mut self, fd: impl AsFd) -> io::Result<usize> {
        let fd = fd.as_fd();
        // SAFETY: the vectors describe memory that stays mapped for the call (see `vectors`), and
        // the kernel only reads it.
        let drain = |iov: &[libc::iovec]| unsafe { libc::writev(fd.as_raw_fd(), iov.as_ptr(), count(iov)) };
        self.drain(drain)
    }

    /// Sends to `socket` (`sendmsg`, one call, without waiting and without SIGPIPE) and consumes what
    /// was sent. Returns how many bytes.
    ///
    /// # Errors
    /// What the operating system says; `WouldBlock` where nothing can be sent now.
    pub fn send_to(&mut self, socket: impl AsFd) -> io::Result<usize> {
        let socket = socket.as_fd();
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the vectors describe memory that stays mapped for the call (see `vectors`), and
        // the kernel only reads it.
        self.drain(|iov| unsafe { libc::sendmsg(socket.as_raw_fd(), &message(iov), flags) })
    }

    /// Fills from the data that `socket` has received, behind the first bytes, which go to `skip`,
    /// and leaves all of it there (`recvmsg` with `MSG_PEEK`, one call, without waiting). Consumes
    /// what was filled. Returns how many bytes, `skip` included.
    ///
    /// # Errors
    /// What the operating system says; `WouldBlock` where there is none now.
    pub fn peek_from(&mut self, socket: impl AsFd, skip: &mut [u8]) -> io::Result<usize> {
        let socket = socket.as_fd();
        let head = [libc::iovec { iov_base: skip.as_mut_ptr().cast(), iov_len: skip.len() }];
        let head = if skip.is_empty() { &[][..] } else { &head };
        let flags = libc::MSG_DONTWAIT | libc::MSG_PEEK;
        // SAFETY: the vectors describe `skip`, which is borrowed exclusively, and memory that stays
        // mapped for the call (see `vectors`); the kernel writes only there.
        let call =
            |iov: &[libc::iovec]| unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message(iov), flags) };
        let done = self.vectors(head, &[], |iov| retry(|| call(iov)))?;
        self.filled(done.saturating_sub(skip.len()));
        Ok(done)
    }

    /// Whether every piece begins and ends at a multiple of `align` bytes of host memory.
    pub(crate) fn aligned(&self, align: usize) -> bool {
        align <= 1
            || self
                .slices()
                .iter()
                .all(|slice| (slice.ptr_guard().as_ptr().addr() | slice.len()).is_multiple_of(align))
    }

    /// The pieces that are left as vectors for the kernel; good for as long as the memory is mapped.
    pub(crate) fn to_vectors(&self) -> Vec<libc::iovec> {
        self.pieces().collect()
    }

    fn pieces(&self) -> impl Iterator<Item = libc::iovec> {
        self.slices().iter().map(|slice| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        })
    }

    fn fill(&mut self, tail: &[libc::iovec], call: impl Fn(&[libc::iovec]) -> isize) -> io::Result<usize> {
        let done = self.vectors(&[], tail, |iov| retry(|| call(iov)))?;
        self.filled(done);
        Ok(done)
    }

    /// Consumes `count` bytes that the kernel has written.
    fn filled(&mut self, count: usize) {
        let mut rest = count;
        for slice in self.slices() {
            let here = rest.min(slice.len());
            slice.bitmap().mark_dirty(0, here);
            rest -= here;
            if rest == 0 {
                break;
            }
        }
        self.advance(count);
    }

    fn drain(&mut self, call: impl Fn(&[libc::iovec]) -> isize) -> io::Result<usize> {
        let done = self.vectors(&[], &[], |iov| retry(|| call(iov)))?;
        self.advance(done);
        Ok(done)
    }

    /// Calls `call` with the vectors `head`, those of the pieces that are left, and `tail`; at most
    /// `IOV_MAX` in all.
    ///
    /// The memory is valid for the call: a `VolatileSlice<'m>` refers to mapped memory for `'m`,
    /// and `self` lives through the call. No Rust reference to it exists, so that the guest and the
    /// kernel may change it at any time.
    fn vectors<R>(
        &self,
        head: &[libc::iovec],
        tail: &[libc::iovec],
        call: impl FnOnce(&[libc::iovec]) -> R,
    ) -> R {
        let others = head.len() + tail.len();
        let pieces = self.pieces().take(MOST_PIECES - others);
        let all = head.iter().copied().chain(pieces).chain(tail.iter().copied());
        if self.slices().len() + others <= FEW_PIECES {
            let mut few = [EMPTY; FEW_PIECES];
            let count = few.iter_mut().zip(all).map(|(slot, iov)| *slot = iov).count();
            call(&few[..count])
        } else {
            call(&all.collect::<Vec<_>>())
        }
    }
}

/// A message of the data in `iov` alone.
fn message(iov: &[libc::iovec]) -> libc::msghdr {
    // SAFETY: a msghdr is plain data, for which zeroes are valid: no name, no control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iov.as_ptr().cast_mut();
    message.msg_iovlen = iov.len();
    message
}

fn retry(call: impl Fn() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(done) => return Ok(done),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

fn file_offset(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

fn count(iov: &[libc::iovec]) -> libc::c_int {
    // At most MOST_PIECES.
    libc::c_int::try_from(iov.len()).unwrap_or(libc::c_int::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{buffers, memory};
    use std::io::{Read, Seek, SeekFrom, Write};
    use vmcore::GuestAddress;

    #[test]
    fn files_are_read_and_written_in_place() {
        let memory = memory();
        let map = memory.snapshot();
        let mut file = tempfile::tempfile().unwrap();
        let text = (0..=255).cycle().take(5000).collect::<Vec<u8>>();
        file.write_all(&text).unwrap();

        let ranges = [(0x7ff0, 0x20), (0x100, 1000)];
        let mut into = buffers(&map, &ranges);
        assert_eq!(into.fill_from_at(&file, 8).unwrap(), 1032);
        assert!(into.is_empty());
        let mut edge = [0; 0x20];
        memory.read(GuestAddress(0x7ff0), &mut edge).unwrap();
        assert_eq!(edge, text[8..40]);

        assert_eq!(buffers(&map, &ranges).drain_to_at(&file, 6000).unwrap(), 1032);
        let mut back = Vec::new();
        file.seek(SeekFrom::Start(6000)).unwrap();
        file.read_to_end(&mut back).unwrap();
        assert_eq!(back, text[8..1040]);
        // The end of the file, and an offset no file has.
        assert_eq!(buffers(&map, &ranges).fill_from_at(&file, 1 << 40).unwrap(), 0);
        assert!(buffers(&map, &ranges).fill_from_at(&file, u64::MAX).is_err());
    }

    #[test]
    fn many_pieces_and_the_spill_are_filled_in_order() {
        let memory = memory();
        let map = memory.snapshot();
        let (mut a, b) = std::os::unix::net::UnixStream::pair().unwrap();
        a.write_all(&(0..120).collect::<Vec<u8>>()).unwrap();
        let ranges = (0..100).map(|n| (n * 7, 1)).collect::<Vec<_>>();
        let mut spill = [0; 30];
        let mut into = buffers(&map, &ranges);
        assert_eq!(into.fill_from(&b, &mut spill).unwrap(), 120);
        assert_eq!(spill[..20], (100..120).collect::<Vec<u8>>());
        let mut last = [0];
        memory.read(GuestAddress(99 * 7), &mut last).unwrap();
        assert_eq!(last, [99]);
        assert_eq!(buffers(&map, &ranges).drain_to(&b).unwrap(), 100);
        let mut back = [0; 100];
        a.read_exact(&mut back).unwrap();
        assert!(back.iter().copied().eq(0..100));
    }

    #[test]
    fn sockets_are_peeked_behind_what_is_skipped_and_sent_to() {
        let memory = memory();
        let map = memory.snapshot();
        let (mut a, mut b) = std::os::unix::net::UnixStream::pair().unwrap();
        a.write_all(&(0..100).collect::<Vec<u8>>()).unwrap();
        for skip in [0, 10, 100] {
            let mut into = buffers(&map, &[(0x7ff0, 0x20), (0x100, 200)]);
            let room = into.len();
            assert_eq!(into.peek_from(&b, &mut vec![0; skip]).unwrap(), 100);
            assert_eq!(into.len(), room - (100 - skip));
        }
        let mut edge = [0; 1];
        memory.read(GuestAddress(0x8000), &mut edge).unwrap();
        assert_eq!(edge, [26]);
        let mut rest = [0; 100];
        b.read_exact(&mut rest).unwrap();
        assert!(rest.iter().copied().eq(0..100));
        let none = buffers(&map, &[(0, 10)]).peek_from(&b, &mut []).unwrap_err();
        assert_eq!(none.kind(), std::io::ErrorKind::WouldBlock);
        assert_eq!(buffers(&map, &[(0x7ff0, 0x20)]).send_to(&b).unwrap(), 0x20);
        drop(a);
        let broken = buffers(&map, &[(0, 10)]).send_to(&b).unwrap_err();
        assert_eq!(broken.kind(), std::io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn written_bytes_mark_dirty_pages() {
        let region = vmcore::MemoryRegion::builder(GuestAddress(0), 0x4000).track_dirty().build().unwrap();
        let memory = vmcore::GuestMemory::new();
        memory.insert(region.clone().into()).unwrap();
        let map = memory.snapshot();
        let mut into = buffers(&map, &[(0x1000, 64)]);
        assert_eq!(into.write(&[7; 64]), 64);
        let mut bytes = [0; 64];
        memory.read(GuestAddress(0x1000), &mut bytes).unwrap();
        assert_eq!(bytes, [7; 64]);
        let dirty = region.take_host_dirty().unwrap();
        assert_eq!(dirty.dirty_offsets().collect::<Vec<_>>(), [0x1000]);
    }
}
