//! Guest memory: the regions that back guest-physical addresses, and safe access to them.
//!
//! A [`MemoryRegion`] is one host mapping at one guest-physical base. A [`GuestMemory`] is the
//! whole address space: a cheap, cloneable handle on a map of regions that can change while the
//! guest runs. Host code reaches guest memory through [`GuestMemory::read`] and its relatives, or,
//! for virtqueues, through a [`MemoryMap`] snapshot, which implements `vm_memory::GuestMemory` and
//! refuses writes to read-only regions. Guest memory is never a `&[u8]`: the guest changes it at
//! any moment.
//!
//! | a region can be | by | what it takes |
//! |---|---|---|
//! | anonymous | nothing, it is the default | host memory for the pages that are touched |
//! | a memfd | [`Backing::Memfd`] | the same; other processes can map it |
//! | a file, shared or copy-on-write | [`Backing::File`] | the host's page cache |
//! | of huge pages | [`RegionBuilder::huge_pages`] | reserved pages, or those the host finds |
//! | read-only to the guest | [`RegionBuilder::read_only`] | |
//! | merged with equal pages of others | [`RegionBuilder::mergeable`] | time of the host's KSM thread |
//! | on certain NUMA nodes | [`RegionBuilder::numa`] | |
//! | dirty-tracked | [`RegionBuilder::track_dirty`] | a bit a page, twice, and a fault at first write |
//! | there before it is touched | [`RegionBuilder::prefault`] | all its host memory at once |
//!
//! Sizes are bytes and multiples of [`PAGE_SIZE`]. Nothing is reserved that is not touched: a region
//! may be far larger than the host's memory.

mod dirty;
mod discard;
mod guest;
mod mapping;
mod region;
mod track;

pub use dirty::DirtyBitmap;
pub use discard::MemoryPin;
pub use guest::{GuestMemory, MemoryMap, SliceIter};
pub use region::{Backing, HugePages, MemoryRegion, NumaPolicy, RegionBuilder};
pub use track::Tracker;
#[cfg(feature = "soft")]
pub(crate) use track::WriteObserver;
pub use vm_memory::GuestAddress;

use std::fmt;

/// Size of a page of guest memory in bytes: the unit of memslots and of dirty tracking.
pub const PAGE_SIZE: u64 = 4096;

/// A range of guest-physical addresses, for error messages and layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GpaRange {
    /// First guest-physical address.
    pub base: u64,
    /// Length in bytes.
    pub len: u64,
}

impl GpaRange {
    /// The first address behind the range, or `None` where that is beyond 2^64.
    pub fn end(&self) -> Option<u64> {
        self.base.checked_add(self.len)
    }

    /// Whether the two ranges share an address. Ranges that wrap overlap everything behind them.
    pub fn overlaps(&self, other: &GpaRange) -> bool {
        let before = |a: &GpaRange, b: &GpaRange| a.end().is_some_and(|end| end <= b.base);
        !(before(self, other) || before(other, self))
    }
}

impl fmt::Display for GpaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let last = self.base.wrapping_add(self.len.wrapping_sub(1));
        write!(f, "[{:#x}..={:#x}]", self.base, last)
    }
}

/// What can go wrong with guest memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// A region would share addresses with one that is there already.
    #[error("guest memory {new} overlaps {existing}; unmap that region first or choose another base")]
    Overlap {
        /// The range that was to be added.
        new: GpaRange,
        /// The range that is in its way.
        existing: GpaRange,
    },
    /// A base, length or file offset is not a multiple of the page size it needs.
    #[error(
        "{what} {value:#x} is not a multiple of {align:#x} bytes; the nearest are {below:#x} and {above:#x}",
        below = .value - .value % .align,
        above = .value.saturating_add(.align - .value % .align)
    )]
    Misaligned {
        /// Which value: "base", "length" or "file offset".
        what: &'static str,
        /// The value given.
        value: u64,
        /// The alignment needed, in bytes.
        align: u64,
    },
    /// A region of no bytes.
    #[error("a memory region at {base:#x} of 0 bytes; give it at least one page (4096 bytes)")]
    Empty {
        /// Base address of the region.
        base: u64,
    },
    /// Base plus length exceeds the address space.
    #[error(
        "guest memory of {len:#x} bytes at {base:#x} reaches beyond the {bits}-bit guest-physical address space; give it less or a lower base"
    )]
    Overflow {
        /// Base address of the region.
        base: u64,
        /// Its length in bytes.
        len: u64,
        /// Width of the address space.
        bits: u32,
    },
    /// The file is shorter than the region that should map it.
    #[error(
        "the file has {available:#x} bytes from offset {offset:#x}, the region needs {needed:#x}; extend the file or map less"
    )]
    FileTooShort {
        /// Offset into the file, in bytes.
        offset: u64,
        /// Bytes the file has from there.
        available: u64,
        /// Bytes the region asked for.
        needed: u64,
    },
    /// The host refused the mapping.
    #[error("cannot {op} {len:#x} bytes of {backing} memory: {source}; {hint}")]
    Host {
        /// The operation: "map", "create a memfd of", "set the NUMA policy of", ...
        op: &'static str,
        /// The kind of memory: "anonymous", "memfd", "file-backed", "huge-page".
        backing: &'static str,
        /// Length in bytes.
        len: u64,
        /// What the operating system said.
        source: std::io::Error,
        /// What to do about it.
        hint: &'static str,
    },
    /// A NUMA policy names nodes that have no memory, or none.
    #[error(
        "cannot place {len:#x} bytes on NUMA nodes {nodes:?}: the host has memory on {available}; name some of these"
    )]
    NumaNodes {
        /// Length in bytes.
        len: u64,
        /// Numbers of the nodes that were named.
        nodes: Vec<u32>,
        /// The nodes with memory, as the host lists them ("0-3,5").
        available: String,
    },
    /// A combination of settings that cannot be had.
    #[error("{what}; {fix}")]
    Unsupported {
        /// What was asked for.
        what: &'static str,
        /// What to do instead.
        fix: &'static str,
    },
    /// No region covers all of the range.
    #[error("guest memory access of {len:#x} bytes at {base:#x} is not backed by memory{}", .mapped_end.map(|e| format!(" (memory ends at {e:#x})")).unwrap_or_default())]
    NotMapped {
        /// First address of the access.
        base: u64,
        /// Length of the access in bytes.
        len: u64,
        /// Where the memory that backs the first address ends, if it is backed.
        mapped_end: Option<u64>,
    },
    /// A write by the host or a device to a read-only region.
    #[error("write of {len:#x} bytes at {base:#x} to the read-only region {region}")]
    ReadOnly {
        /// First address of the access.
        base: u64,
        /// Length of the access in bytes.
        len: u64,
        /// The region.
        region: GpaRange,
    },
    /// There is no region at this base.
    #[error("no memory region begins at {base:#x}; regions begin at {known:#x?}")]
    NoRegion {
        /// The address that was named.
        base: u64,
        /// First addresses of the regions there are.
        known: Vec<u64>,
    },
    /// All of the backend's memory slots are taken.
    #[error(
        "cannot map {new}: all {limit} memory slots of the {backend} backend are in use; unmap a region or join neighbours"
    )]
    NoSlots {
        /// The range that was to be added.
        new: GpaRange,
        /// How many slots the backend has.
        limit: u32,
        /// Name of the backend.
        backend: &'static str,
    },
}

impl MemoryError {
    /// Its code, as [`crate::Error::code`] has it.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Overlap { .. } => "memory.overlap",
            Self::Misaligned { .. } => "memory.misaligned",
            Self::Empty { .. } => "memory.empty",
            Self::Overflow { .. } => "memory.overflow",
            Self::FileTooShort { .. } => "memory.file_too_short",
            Self::Host { .. } => "memory.host",
            Self::NumaNodes { .. } => "memory.numa_nodes",
            Self::Unsupported { .. } => "memory.unsupported",
            Self::NotMapped { .. } => "memory.not_mapped",
            Self::ReadOnly { .. } => "memory.read_only",
            Self::NoRegion { .. } => "memory.no_region",
            Self::NoSlots { .. } => "memory.no_slots",
        }
    }

    /// What to do about it, where the text says so.
    pub fn fix(&self) -> Option<&str> {
        Some(match self {
            Self::Overlap { .. } => "unmap that region first or choose another base",
            Self::Empty { .. } => "give it at least one page (4096 bytes)",
            Self::Overflow { .. } => "give it less or a lower base",
            Self::FileTooShort { .. } => "extend the file or map less",
            Self::Host { hint, .. } => hint,
            Self::NumaNodes { .. } => "name some of these",
            Self::Unsupported { fix, .. } => fix,
            Self::NoSlots { .. } => "unmap a region or join neighbours",
            Self::Misaligned { .. }
            | Self::NotMapped { .. }
            | Self::ReadOnly { .. }
            | Self::NoRegion { .. } => {
                return None;
            }
        })
    }
}
