//! What backs a range of guest-physical addresses.

use std::fs::File;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use vmcore::memory::{Backing, HugePages, NumaPolicy, RegionBuilder};
use vmcore::{Error, GuestAddress, MemoryRegion};

use crate::error::{Result, give, guard, need, vmcore_error};

/// Settings of a region: anonymous memory unless said.
pub struct vmcore_region {
    base: u64,
    len: u64,
    backing: Backing,
    huge_pages: HugePages,
    numa: NumaPolicy,
    read_only: bool,
    track_dirty: bool,
    mergeable: bool,
    prefault: bool,
    contents: Vec<u8>,
}

/// Which host pages back a region.
pub type vmcore_huge_pages = u32;
/// Whatever the host's settings give.
pub const VMCORE_HUGE_PAGES_DEFAULT: vmcore_huge_pages = 0;
/// Transparent ones, where the host finds some.
pub const VMCORE_HUGE_PAGES_TRANSPARENT: vmcore_huge_pages = 1;
/// None.
pub const VMCORE_HUGE_PAGES_NEVER: vmcore_huge_pages = 2;
/// Reserved ones of 2 MiB.
pub const VMCORE_HUGE_PAGES_2M: vmcore_huge_pages = 3;
/// Reserved ones of 1 GiB.
pub const VMCORE_HUGE_PAGES_1G: vmcore_huge_pages = 4;

/// On which NUMA nodes of the host a region's pages are placed.
pub type vmcore_numa = u32;
/// As the calling thread has it.
pub const VMCORE_NUMA_DEFAULT: vmcore_numa = 0;
/// Only on these; allocation fails where they are full.
pub const VMCORE_NUMA_BIND: vmcore_numa = 1;
/// On this one while it has room, on others after.
pub const VMCORE_NUMA_PREFERRED: vmcore_numa = 2;
/// On these by turns.
pub const VMCORE_NUMA_INTERLEAVE: vmcore_numa = 3;

fn numa(policy: vmcore_numa, nodes: &[u32]) -> Result<NumaPolicy> {
    Ok(match (policy, nodes) {
        (VMCORE_NUMA_DEFAULT, []) => NumaPolicy::Default,
        (VMCORE_NUMA_BIND, nodes) => NumaPolicy::Bind(nodes.to_vec()),
        (VMCORE_NUMA_PREFERRED, &[node]) => NumaPolicy::Preferred(node),
        (VMCORE_NUMA_INTERLEAVE, nodes) => NumaPolicy::Interleave(nodes.to_vec()),
        (VMCORE_NUMA_DEFAULT | VMCORE_NUMA_PREFERRED, nodes) => {
            let fix = "give none for VMCORE_NUMA_DEFAULT, one for VMCORE_NUMA_PREFERRED";
            return Err(vmcore_error::argument("count", nodes.len(), fix));
        }
        (other, _) => return Err(vmcore_error::argument("policy", other, "give a VMCORE_NUMA_*")),
    })
}

pub(crate) fn huge_pages(kind: vmcore_huge_pages) -> Result<HugePages> {
    Ok(match kind {
        VMCORE_HUGE_PAGES_DEFAULT => HugePages::Default,
        VMCORE_HUGE_PAGES_TRANSPARENT => HugePages::Transparent,
        VMCORE_HUGE_PAGES_NEVER => HugePages::Never,
        VMCORE_HUGE_PAGES_2M => HugePages::Size2M,
        VMCORE_HUGE_PAGES_1G => HugePages::Size1G,
        other => return Err(vmcore_error::argument("kind", other, "give a VMCORE_HUGE_PAGES_*")),
    })
}

impl vmcore_region {
    /// What it says of whatever region is made by it.
    pub(crate) fn settings(&self) -> impl Fn(RegionBuilder) -> RegionBuilder + use<> {
        let (backing, huge_pages, numa) = (self.backing.clone(), self.huge_pages, self.numa.clone());
        let (track_dirty, mergeable, prefault) = (self.track_dirty, self.mergeable, self.prefault);
        move |mut builder| {
            builder = builder.backing(backing.clone()).huge_pages(huge_pages).numa(numa.clone());
            if track_dirty {
                builder = builder.track_dirty();
            }
            if mergeable {
                builder = builder.mergeable();
            }
            if prefault {
                builder = builder.prefault();
            }
            builder
        }
    }

    /// Whether it is of one place alone.
    pub(crate) fn is_particular(&self) -> bool {
        self.read_only || !self.contents.is_empty() || matches!(self.backing, Backing::File { .. })
    }

    pub(crate) fn build(self) -> Result<MemoryRegion> {
        let mut builder = self.settings()(MemoryRegion::builder(GuestAddress(self.base), self.len));
        if self.read_only {
            builder = builder.read_only();
        }
        let region = builder.build()?;
        region.fill(0, &self.contents)?;
        Ok(region)
    }
}

/// A region of `len` bytes at `base`, both multiples of 4096.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_region_new(
    base: u64,
    len: u64,
    out: Option<&mut MaybeUninit<*mut vmcore_region>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        give(
            out,
            vmcore_region {
                base,
                len,
                backing: Backing::default(),
                huge_pages: HugePages::default(),
                numa: NumaPolicy::default(),
                read_only: false,
                track_dirty: false,
                mergeable: false,
                prefault: false,
                contents: Vec::new(),
            },
        )
    })
}

/// Changes settings of a region, if there is one.
fn set(region: Option<&mut vmcore_region>, change: impl FnOnce(&mut vmcore_region)) {
    if let Some(region) = region {
        change(region);
    }
}

/// The guest cannot write it.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_region_set_read_only(region: Option<&mut vmcore_region>, yes: bool) {
    set(region, |region| region.read_only = yes);
}

/// Which pages are written is noted: vmcore_vm_take_dirty.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_region_set_track_dirty(region: Option<&mut vmcore_region>, yes: bool) {
    set(region, |region| region.track_dirty = yes);
}

/// The host may merge its pages with equal ones.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_region_set_mergeable(region: Option<&mut vmcore_region>, yes: bool) {
    set(region, |region| region.mergeable = yes);
}

/// All of it is there from the start.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_region_set_prefault(region: Option<&mut vmcore_region>, yes: bool) {
    set(region, |region| region.prefault = yes);
}

/// Which host pages back it.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_region_set_huge_pages(
    region: Option<&mut vmcore_region>,
    kind: vmcore_huge_pages,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        need(region, "region")?.huge_pages = huge_pages(kind)?;
        Ok(())
    })
}

/// On which NUMA nodes of the host its pages are placed: on the `count` of them at `nodes`, by `policy`.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_region_set_numa(
    region: Option<&mut vmcore_region>,
    policy: vmcore_numa,
    nodes: *const u32,
    count: usize,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        if nodes.is_null() && count > 0 {
            return Err(vmcore_error::argument("nodes", "NULL", "give as many numbers as the count says"));
        }
        // SAFETY: the caller gives that many numbers, which stay for the call; where there are none nothing is read.
        let nodes = if count == 0 { &[] } else { unsafe { std::slice::from_raw_parts(nodes, count) } };
        need(region, "region")?.numa = numa(policy, nodes)?;
        Ok(())
    })
}

/// Backed by an unnamed file in memory, which other processes can map.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_region_set_memfd(region: Option<&mut vmcore_region>) {
    set(region, |region| region.backing = Backing::Memfd);
}

/// Backed by the open file `fd` from `offset`. Writes reach the file where `shared`, else they stay here. The
/// descriptor is duplicated, and stays the caller's.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_region_set_file(
    region: Option<&mut vmcore_region>,
    fd: i32,
    offset: u64,
    shared: bool,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let file = Arc::new(File::from(duplicate(fd)?));
        need(region, "region")?.backing = Backing::File { file, offset, shared };
        Ok(())
    })
}

/// Its first `len` bytes are a copy of those at `data`, also where the guest cannot write it.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_region_set_contents(
    region: Option<&mut vmcore_region>,
    data: *const u8,
    len: usize,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        need(region, "region")?.contents = crate::bytes::bytes!(data, len).to_vec();
        Ok(())
    })
}

/// Frees the settings.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_region_delete(region: Option<Box<vmcore_region>>) {
    drop(region);
}

/// A descriptor of our own for the file that `fd` is.
pub(crate) fn duplicate(fd: i32) -> Result<std::os::fd::OwnedFd> {
    if fd < 0 {
        return Err(vmcore_error::argument("fd", fd, "give an open descriptor"));
    }
    // SAFETY: the caller's descriptor, for this call; where it is not open the duplicate fails.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    borrowed
        .try_clone_to_owned()
        .map_err(|error| Error::os("dup", format_args!("descriptor {fd}"), error).into())
}
