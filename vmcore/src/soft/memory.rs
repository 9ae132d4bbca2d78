//! Guest-physical memory as the software CPU sees it: memory slots with what it must know of each
//! page besides its bytes, namely whether there is translated code in it, and whether it was written.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use zerocopy::FromZeros;

use super::link::Link;
use crate::memory::{DirtyBitmap, MemoryRegion, PAGE_SIZE, WriteObserver};

/// The part of a page that one bit of the code map stands for, in bytes.
const GRANULE_SHIFT: u64 = 6;

/// One memory slot.
#[derive(Debug)]
pub(in crate::soft) struct SlotMemory {
    pub(in crate::soft) region: Arc<MemoryRegion>,
    base: u64,
    len: u64,
    pub(in crate::soft) writable: bool,
    /// One word a page: which of its 64 granules blocks were translated from.
    code: Vec<AtomicU64>,
    /// One bit a page: written by the guest. Empty where writes are not tracked.
    dirty: Vec<AtomicU64>,
    /// The vCPUs, who have blocks.
    links: Arc<ArcSwap<Vec<Arc<Link>>>>,
}

/// Zeroed words that take memory only where they are used.
fn words(count: u64) -> Vec<AtomicU64> {
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    AtomicU64::new_vec_zeroed(count).unwrap_or_default()
}

impl SlotMemory {
    pub(in crate::soft) fn new(region: Arc<MemoryRegion>, links: Arc<ArcSwap<Vec<Arc<Link>>>>) -> Arc<Self> {
        let pages = region.len() / PAGE_SIZE;
        let slot = Arc::new(Self {
            base: region.base().0,
            len: region.len(),
            writable: !region.is_read_only(),
            code: words(pages),
            dirty: if region.tracks_dirty() { words(pages.div_ceil(64)) } else { Vec::new() },
            links,
            region,
        });
        slot.region.observe(&slot);
        slot
    }

    /// Host address of guest-physical `gpa`, which must be in the slot.
    pub(in crate::soft) fn host(&self, gpa: u64) -> *mut u8 {
        debug_assert!(gpa - self.base < self.len);
        self.region.host_address().wrapping_add(usize::try_from(gpa - self.base).unwrap_or(0))
    }

    fn page(&self, gpa: u64) -> usize {
        usize::try_from((gpa - self.base) / PAGE_SIZE).unwrap_or(usize::MAX)
    }

    /// The code word of the page of `gpa`.
    pub(in crate::soft) fn code(&self, gpa: u64) -> Option<&AtomicU64> {
        self.code.get(self.page(gpa))
    }

    /// Records a write to the page of `gpa` by the guest.
    pub(in crate::soft) fn mark_dirty(&self, gpa: u64) {
        let page = self.page(gpa);
        if let Some(word) = self.dirty.get(page / 64) {
            word.fetch_or(1 << (page % 64), Ordering::SeqCst);
        }
    }

    /// Takes the pages that the guest wrote.
    pub(in crate::soft) fn take_dirty(&self) -> DirtyBitmap {
        let words = self.dirty.iter().map(|word| word.swap(0, Ordering::SeqCst)).collect();
        DirtyBitmap::from_words(words, self.len / PAGE_SIZE)
    }
}

impl WriteObserver for SlotMemory {
    fn written(&self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.len);
        let mut at = offset;
        while at < end {
            let next = ((at | (PAGE_SIZE - 1)) + 1).min(end);
            let gpa = self.base + at;
            if let Some(word) = self.code(gpa)
                && word.load(Ordering::SeqCst) & granules(at, next - at) != 0
            {
                word.store(0, Ordering::SeqCst);
                self.links.load().iter().for_each(|link| link.post_stale(gpa & !(PAGE_SIZE - 1)));
            }
            at = next;
        }
    }
}

/// Bits of the code word for `len` bytes at `at`, which do not leave their page.
pub(in crate::soft) fn granules(at: u64, len: u64) -> u64 {
    let first = (at & (PAGE_SIZE - 1)) >> GRANULE_SHIFT;
    let last = ((at & (PAGE_SIZE - 1)) + len.max(1) - 1).min(PAGE_SIZE - 1) >> GRANULE_SHIFT;
    u64::MAX >> (63 - (last - first)) << first
}

/// An immutable map of the slots. A vCPU keeps one while its translations point into it.
#[derive(Debug, Default)]
pub(in crate::soft) struct PhysMap {
    /// Sorted by base, without overlaps.
    sorted: Vec<(u32, Arc<SlotMemory>)>,
}

impl PhysMap {
    /// The slot that covers `gpa`.
    pub(in crate::soft) fn find(&self, gpa: u64) -> Option<&Arc<SlotMemory>> {
        // A few slots: a linear search is the quickest.
        self.sorted.iter().map(|(_, slot)| slot).find(|slot| gpa.wrapping_sub(slot.base) < slot.len)
    }
}

/// The changing map of a VM.
#[derive(Debug, Default)]
pub(in crate::soft) struct Memory {
    map: ArcSwap<PhysMap>,
}

impl Memory {
    /// The map as it is now.
    pub(in crate::soft) fn snapshot(&self) -> Arc<PhysMap> {
        self.map.load_full()
    }

    /// Replaces the slots; the caller serializes changes, and makes the vCPUs take notice.
    pub(in crate::soft) fn replace(&self, slots: &BTreeMap<u32, Arc<SlotMemory>>) {
        let mut sorted: Vec<_> = slots.iter().map(|(&n, slot)| (n, slot.clone())).collect();
        sorted.sort_by_key(|(_, slot)| slot.base);
        self.map.store(Arc::new(PhysMap { sorted }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestAddress;

    #[test]
    fn granules_are_sixty_four_bytes() {
        assert_eq!(granules(0, 1), 1);
        assert_eq!(granules(0x103f, 2), 0b11);
        assert_eq!(granules(0x1fc0, 64), 1 << 63);
        assert_eq!(granules(0x1000, 4096), u64::MAX);
    }

    #[test]
    fn slots_are_found_by_address_and_forget_what_was_taken() {
        let region = |base, len| {
            let region = MemoryRegion::builder(GuestAddress(base), len).track_dirty().build().unwrap();
            SlotMemory::new(Arc::new(region), Arc::default())
        };
        let memory = Memory::default();
        memory.replace(&BTreeMap::from([(3, region(0x10_0000, 0x2000)), (1, region(0, 0x1000))]));
        let map = memory.snapshot();
        assert!(map.find(0x1000).is_none() && map.find(0x10_2000).is_none() && map.find(u64::MAX).is_none());
        let slot = map.find(0x10_1fff).unwrap();
        slot.mark_dirty(0x10_1fff);
        assert_eq!(slot.take_dirty().dirty_offsets().collect::<Vec<_>>(), [0x1000]);
        assert_eq!(slot.take_dirty().count(), 0);
    }
}
