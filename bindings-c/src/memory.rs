//! The guest's memory, from the host's side.

use std::mem::MaybeUninit;
use std::sync::Arc;

use vmcore::memory::MemoryError;
use vmcore::{GuestAddress, GuestMemory, MemoryRegion};

use crate::bytes::{bytes, bytes_mut};
use crate::error::{give, guard, need, put, vmcore_error};

/// A VM's guest-physical memory. It may outlive the VM. All of it may be used while the guest runs.
pub struct vmcore_memory {
    pub(crate) memory: GuestMemory,
}

/// A piece of guest memory without a copy, which stays where it is while this lives.
pub struct vmcore_view {
    region: Arc<MemoryRegion>,
    offset: usize,
    len: usize,
}

/// Copies `len` bytes of guest memory from `at` into `data`.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_memory_read(
    memory: Option<&vmcore_memory>,
    at: u64,
    data: *mut u8,
    len: usize,
) -> Option<Box<vmcore_error>> {
    guard(|| Ok(need(memory, "memory")?.memory.read(GuestAddress(at), bytes_mut!(data, len))?))
}

/// Copies `len` bytes from `data` to guest memory at `at`: all of them, or where it fails none.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_memory_write(
    memory: Option<&vmcore_memory>,
    at: u64,
    data: *const u8,
    len: usize,
) -> Option<Box<vmcore_error>> {
    guard(|| Ok(need(memory, "memory")?.memory.write(GuestAddress(at), bytes!(data, len))?))
}

/// Sets `len` bytes from `at` to zero.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_memory_zero(
    memory: Option<&vmcore_memory>,
    at: u64,
    len: u64,
) -> Option<Box<vmcore_error>> {
    guard(|| Ok(need(memory, "memory")?.memory.zero(GuestAddress(at), len)?))
}

/// Sum of the lengths of all regions.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_memory_total(memory: Option<&vmcore_memory>) -> u64 {
    memory.map_or(0, |memory| memory.memory.total_bytes())
}

/// Whether all of `len` bytes from `at` are memory.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_memory_contains(memory: Option<&vmcore_memory>, at: u64, len: u64) -> bool {
    memory.is_some_and(|memory| memory.memory.contains(GuestAddress(at), len))
}

/// How many regions there are.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_memory_regions(memory: Option<&vmcore_memory>) -> usize {
    memory.map_or(0, |memory| memory.memory.ranges().len())
}

/// Base and length of region number `index`, in the order of their bases.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_memory_region(
    memory: Option<&vmcore_memory>,
    index: usize,
    base: Option<&mut MaybeUninit<u64>>,
    len: Option<&mut MaybeUninit<u64>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let ranges = need(memory, "memory")?.memory.ranges();
        let range = ranges.get(index).ok_or_else(|| {
            vmcore_error::argument("index", index, &format!("there are {} regions", ranges.len()))
        })?;
        let base = need(base, "base")?;
        put(len, range.len)?;
        base.write(range.base);
        Ok(())
    })
}

/// A view of `len` bytes from `at`, which must be in one region that the guest can write. What is written through it is
/// not seen by dirty tracking, nor by a vCPU of the software CPU that has run code there: write code by
/// vmcore_memory_write. The guest may change the bytes at any moment.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_memory_view(
    memory: Option<&vmcore_memory>,
    at: u64,
    len: usize,
    out: Option<&mut MaybeUninit<*mut vmcore_view>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let map = need(memory, "memory")?.memory.snapshot();
        let missing = |end| MemoryError::NotMapped { base: at, len: len as u64, mapped_end: end };
        let region = map.find(GuestAddress(at)).ok_or_else(|| missing(None))?;
        let offset = at - region.base().0;
        if len as u64 > region.len() - offset {
            return Err(missing(region.range().end()).into());
        }
        if region.is_read_only() {
            let region = region.range();
            return Err(MemoryError::ReadOnly { base: at, len: len as u64, region }.into());
        }
        let offset = usize::try_from(offset).map_err(|_| missing(None))?;
        give(out, vmcore_view { region: region.clone(), offset, len })
    })
}

/// The first byte. It lives as long as the view, also where the VM does not.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_view_data(view: Option<&vmcore_view>) -> *mut u8 {
    view.map_or(std::ptr::null_mut(), |view| view.region.host_address().wrapping_add(view.offset))
}

/// How many bytes it has.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_view_len(view: Option<&vmcore_view>) -> usize {
    view.map_or(0, |view| view.len)
}

/// Frees it.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_view_delete(view: Option<Box<vmcore_view>>) {
    drop(view);
}

/// Frees the handle; the memory is the VM's.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_memory_delete(memory: Option<Box<vmcore_memory>>) {
    drop(memory);
}
