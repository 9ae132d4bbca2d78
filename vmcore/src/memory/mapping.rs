//! The host's side of a region: a mapping placed so that huge pages can be used on both sides.
#![expect(unsafe_code, reason = "mmap at an address of our choice")]

use std::io;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::ptr::null_mut;

use vm_memory::FileOffset;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};

use super::track::Tracker;

pub(super) type Bitmap = Tracker;

/// Size of a huge page in bytes, as x86-64 and its second-level translation have it.
const HUGE: usize = 2 << 20;

/// What to map.
pub(super) struct Request {
    /// The guest-physical address of the first byte.
    pub(super) base: u64,
    /// Length in bytes.
    pub(super) size: usize,
    /// Protection and flags as of `mmap(2)`.
    pub(super) prot: i32,
    pub(super) flags: i32,
    /// The file, for all but anonymous memory.
    pub(super) file: Option<FileOffset>,
    pub(super) bitmap: Bitmap,
    /// The pages are reserved huge pages, which the kernel aligns by itself.
    pub(super) hugetlb: bool,
}

/// Memory of this process, unmapped when this is dropped.
#[derive(Debug)]
pub(super) struct Mapping(MmapRegion<Bitmap>);

impl Mapping {
    /// Maps memory. Where it holds a huge page, its address and the guest's are equal modulo the size
    /// of one: KVM uses no huge page in a memory slot where they are not, and kernels before 6.7 place
    /// mappings anywhere.
    pub(super) fn new(request: Request) -> io::Result<Self> {
        let Request { base, size, prot, flags, ref file, hugetlb, .. } = request;
        let address = if hugetlb || size < HUGE {
            map(null_mut(), size, prot, flags, file.as_ref())?
        } else {
            map_congruent(base, size, |at| map(at, size, prot, flags | libc::MAP_FIXED, file.as_ref()))?
        };
        let mut builder = MmapRegionBuilder::new_with_bitmap(size, request.bitmap)
            .with_mmap_prot(prot)
            .with_mmap_flags(flags);
        if let Some(file) = request.file {
            builder = builder.with_file_offset(file);
        }
        // SAFETY: the address is that of a mapping of `size` bytes, which lives as long as `Mapping`.
        let region = unsafe { builder.with_raw_mmap_pointer(address) }.build();
        region.map(Self).map_err(|e| {
            unmap(address, size);
            io::Error::other(e.to_string())
        })
    }
}

/// Reserves a little more than `size` bytes of addresses, has `map` use those of them that are equal to
/// `base` modulo a huge page, and gives back the rest.
fn map_congruent(
    base: u64,
    size: usize,
    map_at: impl FnOnce(*mut u8) -> io::Result<*mut u8>,
) -> io::Result<*mut u8> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let reserved = size + HUGE;
    let begin = map(null_mut(), reserved, libc::PROT_NONE, flags, None)?;
    let wanted = usize::try_from(base % HUGE as u64).unwrap_or(0);
    let head = wanted.wrapping_sub(begin as usize) % HUGE;
    let at = begin.wrapping_add(head);
    match map_at(at) {
        Ok(address) => {
            unmap(begin, head);
            unmap(at.wrapping_add(size), HUGE - head);
            Ok(address)
        }
        Err(error) => {
            unmap(begin, reserved);
            Err(error)
        }
    }
}

/// `mmap(2)`. With `MAP_FIXED`, `at` must be within a reservation of this module.
fn map(at: *mut u8, size: usize, prot: i32, flags: i32, file: Option<&FileOffset>) -> io::Result<*mut u8> {
    let (fd, offset) = file.map_or((-1, 0), |file| (file.file().as_raw_fd(), file.start()));
    let offset = libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
    // SAFETY: without MAP_FIXED the kernel chooses addresses that nothing uses. With it they are a part of
    // what `map_congruent` has just reserved, to which nobody else has a pointer.
    let address = unsafe { libc::mmap(at.cast(), size, prot, flags, fd, offset) };
    if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(address.cast()) }
}

/// Unmaps `size` bytes that this module has mapped and that nobody uses any more.
fn unmap(at: *mut u8, size: usize) {
    if size == 0 {
        return;
    }
    // SAFETY: callers pass what they own: parts of a reservation, or a mapping that ends.
    if unsafe { libc::munmap(at.cast(), size) } != 0 {
        log::error!("munmap of {size:#x} bytes at {at:p} failed: {}", io::Error::last_os_error());
    }
}

impl Deref for Mapping {
    type Target = MmapRegion<Bitmap>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        unmap(self.0.as_ptr(), self.0.size());
    }
}
