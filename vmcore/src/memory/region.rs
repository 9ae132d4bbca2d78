//! One host mapping at one guest-physical base.
#![expect(unsafe_code, reason = "mbind and madvise on a mapping this module owns")]

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::FromRawFd;
use std::sync::{Arc, Mutex};

use vm_memory::bitmap::{AtomicBitmap, Bitmap as _};
use vm_memory::{FileOffset, VolatileMemory, VolatileSlice};

use super::discard::ReturnBy;
use super::mapping::{Bitmap, Mapping, Request};
use super::track::{Tracker, WriteObserver};
use super::{DirtyBitmap, GpaRange, GuestAddress, MemoryError, PAGE_SIZE};

/// What a region's bytes live in.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub enum Backing {
    /// Private anonymous memory: zero-filled on first touch, gone with the region.
    #[default]
    Anonymous,
    /// An unnamed shared file in memory, whose descriptor other processes may map.
    Memfd,
    /// A file from `offset` (bytes, page-aligned). `shared` writes go to the file; otherwise they
    /// stay in this region (copy-on-write).
    File {
        /// The open file. It must be open for writing where `shared` and not read-only.
        file: Arc<File>,
        /// Where in the file the region begins, in bytes.
        offset: u64,
        /// Whether writes reach the file.
        shared: bool,
    },
}

impl Backing {
    fn name(&self) -> &'static str {
        match self {
            Backing::Anonymous => "anonymous",
            Backing::Memfd => "memfd",
            Backing::File { .. } => "file-backed",
        }
    }
}

/// Which host pages back a region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum HugePages {
    /// Whatever the host's settings give.
    #[default]
    Default,
    /// Ask for transparent huge pages (a hint: `MADV_HUGEPAGE`). The guest profits where a region
    /// has 2 MiB and more; its address in this process is aligned so that KVM can use them too.
    Transparent,
    /// Ask for none (`MADV_NOHUGEPAGE`), for guests that are forked or paged finely.
    Never,
    /// Reserved 2 MiB pages from hugetlbfs.
    Size2M,
    /// Reserved 1 GiB pages from hugetlbfs.
    Size1G,
}

impl HugePages {
    /// Page size in bytes where the pages are reserved ones.
    fn hugetlb_size(self) -> Option<u64> {
        match self {
            HugePages::Size2M => Some(2 << 20),
            HugePages::Size1G => Some(1 << 30),
            _ => None,
        }
    }
}

/// On which host NUMA nodes a region's pages are placed (`mbind(2)`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum NumaPolicy {
    /// The calling thread's policy.
    #[default]
    Default,
    /// Only these nodes; allocation fails where they are full.
    Bind(Vec<u32>),
    /// This node while it has room, others after.
    Preferred(u32),
    /// Round-robin over these nodes.
    Interleave(Vec<u32>),
}

/// Settings of a region to be made; see [`MemoryRegion::builder`].
#[derive(Clone, Debug)]
#[must_use = "a builder does nothing until build()"]
pub struct RegionBuilder {
    base: u64,
    len: u64,
    backing: Backing,
    huge_pages: HugePages,
    numa: NumaPolicy,
    read_only: bool,
    mergeable: bool,
    track_dirty: bool,
    prefault: bool,
}

impl RegionBuilder {
    /// What the bytes live in; anonymous memory unless said.
    pub fn backing(mut self, backing: Backing) -> Self {
        self.backing = backing;
        self
    }

    /// Which host pages to use.
    pub fn huge_pages(mut self, huge_pages: HugePages) -> Self {
        self.huge_pages = huge_pages;
        self
    }

    /// On which NUMA nodes to place the pages.
    pub fn numa(mut self, policy: NumaPolicy) -> Self {
        self.numa = policy;
        self
    }

    /// The guest (and devices) cannot write the region: a guest's write goes to the bus instead.
    /// Fill it before mapping with [`MemoryRegion::fill`].
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// Let the kernel merge equal pages of several guests (`MADV_MERGEABLE`, KSM). It does so only
    /// while `/sys/kernel/mm/ksm/run` is 1, and with private pages: anonymous memory, or a file that
    /// is not shared. Merging lets guests find out by timing whether another has an equal page.
    pub fn mergeable(mut self) -> Self {
        self.mergeable = true;
        self
    }

    /// Record which pages are written, by the guest and by devices. Costs one bit a page.
    pub fn track_dirty(mut self) -> Self {
        self.track_dirty = true;
        self
    }

    /// Allocate every page now instead of at first touch.
    pub fn prefault(mut self) -> Self {
        self.prefault = true;
        self
    }

    /// Makes the region. The host memory is mapped here; the guest sees it once it is added to a VM.
    ///
    /// # Errors
    /// [`MemoryError`] for a base or length that is not page-aligned, empty or wraps, a file that
    /// is too short, settings that exclude each other, and what the host refuses.
    pub fn build(self) -> Result<MemoryRegion, MemoryError> {
        let shared = matches!(self.backing, Backing::Memfd | Backing::File { shared: true, .. });
        if self.mergeable && (shared || self.huge_pages.hugetlb_size().is_some()) {
            // The kernel would take the advice and never follow it.
            return Err(MemoryError::Unsupported {
                what: "mergeable memory that is shared or of reserved huge pages",
                fix: "use Backing::Anonymous or a private file with ordinary pages, or leave mergeable() out",
            });
        }
        let align = self.huge_pages.hugetlb_size().unwrap_or(PAGE_SIZE);
        let (base, len) = (self.base, self.len);
        let aligned = |what, value: u64, align: u64| {
            if value.is_multiple_of(align) {
                Ok(())
            } else {
                Err(MemoryError::Misaligned { what, value, align })
            }
        };
        aligned("base", base, PAGE_SIZE)?;
        aligned("length", len, align)?;
        if len == 0 {
            return Err(MemoryError::Empty { base });
        }
        // x86-64 guest-physical addresses have at most 52 bits (SDM vol. 3A, 4.1.4).
        let overflow = MemoryError::Overflow { base, len, bits: 52 };
        if base.checked_add(len).is_none_or(|end| end > 1 << 52) {
            return Err(overflow);
        }
        let size = usize::try_from(len).map_err(|_| overflow)?;

        let (flags, file) = self.host_mapping(len)?;
        let host_read_only = self.read_only && matches!(&self.backing, Backing::File { shared: true, .. });
        let prot = if host_read_only { libc::PROT_READ } else { libc::PROT_READ | libc::PROT_WRITE };
        let page = NonZeroUsize::MIN.saturating_add(4095);
        let bitmap = Tracker::new(self.track_dirty.then(|| AtomicBitmap::new(size, page)));
        let (flags, hugetlb) = (flags | libc::MAP_NORESERVE, self.huge_pages.hugetlb_size().is_some());
        let request = Request { base, size, prot, flags, file, bitmap, hugetlb };
        let mapping = Mapping::new(request).map_err(|e| self.host_error("map", e))?;
        let region = MemoryRegion {
            base: GuestAddress(base),
            mapping: Arc::new(mapping),
            read_only: self.read_only,
            host_read_only,
            return_by: self.return_by(),
            pins: Arc::default(),
        };
        self.advise(&region)?;
        Ok(region)
    }

    /// How pages of the region can be returned to the host.
    fn return_by(&self) -> ReturnBy {
        let page = self.huge_pages.hugetlb_size().unwrap_or(PAGE_SIZE);
        match &self.backing {
            _ if self.read_only => ReturnBy::Nothing,
            // What others see in a file is not the guest's to throw away.
            Backing::File { shared: true, .. } => ReturnBy::Nothing,
            Backing::Memfd => ReturnBy::Hole { page },
            Backing::Anonymous => ReturnBy::Advice { page, zeroes: true },
            Backing::File { .. } => ReturnBy::Advice { page, zeroes: false },
        }
    }

    /// The `mmap` flags, and the file for all but anonymous memory.
    fn host_mapping(&self, len: u64) -> Result<(i32, Option<FileOffset>), MemoryError> {
        let hugetlb = match self.huge_pages {
            HugePages::Size2M => {
                Some((libc::MAP_HUGETLB | libc::MAP_HUGE_2MB, libc::MFD_HUGETLB | libc::MFD_HUGE_2MB))
            }
            HugePages::Size1G => {
                Some((libc::MAP_HUGETLB | libc::MAP_HUGE_1GB, libc::MFD_HUGETLB | libc::MFD_HUGE_1GB))
            }
            _ => None,
        };
        match &self.backing {
            Backing::Anonymous => {
                let huge = hugetlb.map_or(0, |(flags, _)| flags);
                Ok((libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | huge, None))
            }
            Backing::Memfd => {
                let flags = libc::MFD_CLOEXEC | hugetlb.map_or(0, |(_, flags)| flags);
                // SAFETY: the name is a valid C string; the call touches no other memory of ours.
                let fd = unsafe { libc::memfd_create(c"vmcore-ram".as_ptr(), flags) };
                if fd < 0 {
                    return Err(self.host_error("create a memfd of", io::Error::last_os_error()));
                }
                // SAFETY: memfd_create just returned this descriptor and nothing else owns it.
                let file = unsafe { File::from_raw_fd(fd) };
                file.set_len(len).map_err(|e| self.host_error("size a memfd of", e))?;
                Ok((libc::MAP_SHARED, Some(FileOffset::new(file, 0))))
            }
            Backing::File { file, offset, shared } => {
                if hugetlb.is_some() {
                    return Err(MemoryError::Unsupported {
                        what: "reserved huge pages for a file-backed region",
                        fix: "put the file on a hugetlbfs mount, or use Backing::Memfd",
                    });
                }
                if !offset.is_multiple_of(PAGE_SIZE) {
                    return Err(MemoryError::Misaligned {
                        what: "file offset",
                        value: *offset,
                        align: PAGE_SIZE,
                    });
                }
                let size = file.metadata().map_err(|e| self.host_error("look at the file of", e))?.len();
                let available = size.saturating_sub(*offset);
                if available < len {
                    return Err(MemoryError::FileTooShort { offset: *offset, available, needed: len });
                }
                let flags = if *shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
                Ok((flags, Some(FileOffset::from_arc(file.clone(), *offset))))
            }
        }
    }

    /// Applies NUMA policy, huge-page and merge hints, and prefaulting, in the order that makes
    /// the first ones hold for the pages that the last one allocates.
    fn advise(&self, region: &MemoryRegion) -> Result<(), MemoryError> {
        let (mode, nodes): (i32, &[u32]) = match &self.numa {
            NumaPolicy::Default => (libc::MPOL_DEFAULT, &[]),
            NumaPolicy::Preferred(node) => (libc::MPOL_PREFERRED, std::slice::from_ref(node)),
            NumaPolicy::Bind(nodes) => (libc::MPOL_BIND, nodes),
            NumaPolicy::Interleave(nodes) => (libc::MPOL_INTERLEAVE, nodes),
        };
        if self.numa != NumaPolicy::Default {
            region.mbind(mode, nodes).map_err(|e| match e.raw_os_error() {
                Some(libc::EINVAL) => MemoryError::NumaNodes {
                    len: self.len,
                    nodes: nodes.to_vec(),
                    available: nodes_with_memory(),
                },
                _ => self.host_error("set the NUMA policy of", e),
            })?;
        }
        let advice = match self.huge_pages {
            HugePages::Transparent => Some(libc::MADV_HUGEPAGE),
            HugePages::Never => Some(libc::MADV_NOHUGEPAGE),
            _ => None,
        };
        if let Some(advice) = advice {
            region.madvise(advice).map_err(|e| self.host_error(SET_HUGE, e))?;
        }
        if self.mergeable {
            region.madvise(libc::MADV_MERGEABLE).map_err(|e| self.host_error(MERGE, e))?;
        }
        if self.prefault {
            let advice =
                if region.host_read_only { libc::MADV_POPULATE_READ } else { libc::MADV_POPULATE_WRITE };
            region.madvise(advice).map_err(|e| self.host_error("prefault", e))?;
        }
        Ok(())
    }

    fn host_error(&self, op: &'static str, source: io::Error) -> MemoryError {
        let hint = match (source.raw_os_error(), self.huge_pages.hugetlb_size()) {
            (_, Some(_)) => "reserve huge pages first (/sys/kernel/mm/hugepages/*/nr_hugepages)",
            (Some(libc::ENOMEM), _) => {
                "ask for less memory, or raise the limit (ulimit -v, cgroup, vm.max_map_count)"
            }
            (Some(libc::EINVAL), _) if op == MERGE => "the host's kernel has no KSM: leave mergeable() out",
            (Some(libc::EINVAL), _) if op == SET_HUGE => {
                "the host's kernel has no transparent huge pages: use HugePages::Default"
            }
            (Some(libc::ENOSYS), _) => "the host's kernel lacks it: leave the setting out",
            (Some(libc::EACCES), _) => {
                "open the file for reading and writing, or make the region private or read-only"
            }
            _ => "check the settings of the region and the host's limits",
        };
        MemoryError::Host { op, backing: self.backing.name(), len: self.len, source, hint }
    }
}

/// The operations whose failure has a meaning of its own.
const MERGE: &str = "make mergeable";
const SET_HUGE: &str = "set the huge-page policy of";

/// The NUMA nodes with memory, as the host lists them.
fn nodes_with_memory() -> String {
    std::fs::read_to_string("/sys/devices/system/node/has_memory")
        .map_or_else(|_| "nodes that it does not tell".into(), |list| format!("nodes {}", list.trim()))
}

/// A piece of host memory that backs guest-physical addresses from a base.
///
/// It is unmapped when the last owner drops it: the VM it was added to, its clones, or a device
/// that holds a [`MemoryMap`](super::MemoryMap). All methods may be called from any thread.
#[derive(Clone, Debug)]
pub struct MemoryRegion {
    base: GuestAddress,
    pub(super) mapping: Arc<Mapping>,
    read_only: bool,
    /// The host mapping itself is `PROT_READ`: even [`MemoryRegion::fill`] must not write it.
    host_read_only: bool,
    pub(super) return_by: ReturnBy,
    /// How many [`MemoryPin`](super::MemoryPin)s there are.
    pub(super) pins: Arc<Mutex<usize>>,
}

impl MemoryRegion {
    /// Begins a region of `len` bytes at guest-physical `base`; both multiples of 4096.
    pub fn builder(base: GuestAddress, len: u64) -> RegionBuilder {
        RegionBuilder {
            base: base.0,
            len,
            backing: Backing::default(),
            huge_pages: HugePages::default(),
            numa: NumaPolicy::default(),
            read_only: false,
            mergeable: false,
            track_dirty: false,
            prefault: false,
        }
    }

    /// Plain anonymous memory of `len` bytes at guest-physical `base`.
    ///
    /// # Errors
    /// As [`RegionBuilder::build`].
    pub fn anonymous(base: GuestAddress, len: u64) -> Result<Self, MemoryError> {
        Self::builder(base, len).build()
    }

    /// First guest-physical address.
    pub fn base(&self) -> GuestAddress {
        self.base
    }

    /// Length in bytes.
    #[expect(clippy::len_without_is_empty, reason = "a region is never empty")]
    pub fn len(&self) -> u64 {
        self.mapping.size() as u64
    }

    /// The guest-physical addresses covered.
    pub fn range(&self) -> GpaRange {
        GpaRange { base: self.base.0, len: self.len() }
    }

    /// Whether guest and devices are kept from writing.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Whether written pages are recorded.
    pub fn tracks_dirty(&self) -> bool {
        self.mapping.bitmap().dirty.is_some()
    }

    /// The file behind the region and the offset of its first byte in it: `None` for anonymous memory.
    pub fn file(&self) -> Option<(&File, u64)> {
        self.mapping.file_offset().map(|f| (f.file(), f.start()))
    }

    /// Host virtual address (HVA) of the first byte, for backends that map memory by address.
    /// It stays valid while the region lives; the guest may change the bytes at any time. Who writes there
    /// says so by [`MemoryRegion::written`].
    pub fn host_address(&self) -> *mut u8 {
        self.mapping.as_ptr()
    }

    /// Copies `bytes` to `offset` (bytes from the base), even where the region is read-only to the
    /// guest: this is how a ROM gets its contents.
    ///
    /// # Errors
    /// [`MemoryError::NotMapped`] where the bytes do not fit; [`MemoryError::ReadOnly`] where the
    /// host mapping itself cannot be written (a read-only shared file).
    pub fn fill(&self, offset: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let base = self.base.0.saturating_add(offset);
        let len = bytes.len() as u64;
        if self.host_read_only {
            return Err(MemoryError::ReadOnly { base, len, region: self.range() });
        }
        let slice = self.slice(offset, bytes.len()).ok_or(MemoryError::NotMapped {
            base,
            len,
            mapped_end: self.range().end(),
        })?;
        slice.copy_from(bytes);
        Ok(())
    }

    /// Says that `len` bytes at `offset` (bytes from the base) were written by way of
    /// [`MemoryRegion::host_address`], which nobody else sees: dirty tracking counts them, and the software
    /// CPU decodes them anew. What is beyond the region's end is left out.
    pub fn written(&self, offset: u64, len: u64) {
        let len = len.min(self.len().saturating_sub(offset));
        if let (Ok(offset), Ok(len @ 1..)) = (usize::try_from(offset), usize::try_from(len)) {
            self.mapping.bitmap().mark_dirty(offset, len);
        }
    }

    /// Copies `buf.len()` bytes from `offset` (bytes from the base).
    pub(crate) fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
        let slice = self.slice(offset, buf.len()).ok_or(MemoryError::NotMapped {
            base: self.base.0.saturating_add(offset),
            len: buf.len() as u64,
            mapped_end: self.range().end(),
        })?;
        slice.copy_to(buf);
        Ok(())
    }

    /// Takes the pages that the host and devices wrote since the last call, and clears them.
    /// What the guest wrote is the backend's to tell. `None` where writes are not tracked.
    pub fn take_host_dirty(&self) -> Option<DirtyBitmap> {
        let words = self.mapping.bitmap().dirty.as_ref()?.get_and_reset();
        Some(DirtyBitmap::from_words(words, self.len() / PAGE_SIZE))
    }

    /// Tells `observer` of every write by the host and devices from now on, while it lives.
    #[cfg_attr(not(any(feature = "soft", test)), expect(dead_code, reason = "the software CPU observes"))]
    pub(crate) fn observe(&self, observer: &Arc<impl WriteObserver + 'static>) {
        self.mapping.bitmap().observe(observer);
    }

    pub(super) fn slice(
        &self,
        offset: u64,
        len: usize,
    ) -> Option<VolatileSlice<'_, vm_memory::bitmap::BS<'_, Bitmap>>> {
        self.mapping.get_slice(usize::try_from(offset).ok()?, len).ok()
    }

    fn madvise(&self, advice: i32) -> io::Result<()> {
        // SAFETY: address and length are those of the mapping that `self` owns, and none of the
        // advice given here discards pages or unmaps them.
        match unsafe { libc::madvise(self.mapping.as_ptr().cast(), self.mapping.size(), advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn mbind(&self, mode: i32, nodes: &[u32]) -> io::Result<()> {
        let mut mask = [0u64; 16];
        for &node in nodes {
            let word =
                mask.get_mut(node as usize / 64).ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
            *word |= 1 << (node % 64);
        }
        // SAFETY: address and length are those of the mapping that `self` owns, and the mask lives
        // through the call and has at least the bits announced.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                self.mapping.as_ptr(),
                self.mapping.size(),
                mode,
                mask.as_ptr(),
                mask.len() * 64,
                0u32,
            )
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}
