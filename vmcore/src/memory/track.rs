//! What happens on a write to guest memory by the host or a device.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use arc_swap::ArcSwap;
use vm_memory::bitmap::{AtomicBitmap, Bitmap, RefSlice, WithBitmapSlice};

/// Told of writes to a region by the host and devices, after they were made. A backend that keeps
/// something made of the bytes (decoded instructions) implements it.
pub(crate) trait WriteObserver: Send + Sync {
    /// `len` bytes at `offset` from the region's base have been written. Any thread.
    fn written(&self, offset: u64, len: u64);
}

/// The dirty bitmap of a region, where it has one, and its observers.
pub struct Tracker {
    pub(super) dirty: Option<AtomicBitmap>,
    observers: ArcSwap<Vec<Weak<dyn WriteObserver>>>,
    /// There has been an observer. On KVM there is none, and devices write a few times for each request. It is set
    /// when the region becomes a slot, long before code of that is decoded: a write at that moment is seen there.
    observed: AtomicBool,
}

impl Tracker {
    pub(super) fn new(dirty: Option<AtomicBitmap>) -> Self {
        Self { dirty, observers: ArcSwap::default(), observed: AtomicBool::new(false) }
    }

    /// Tells `observer` of every write from now on, while it lives.
    pub(super) fn observe(&self, observer: &Arc<impl WriteObserver + 'static>) {
        let observer: Weak<dyn WriteObserver> = Arc::downgrade(&(observer.clone() as Arc<dyn WriteObserver>));
        self.observers.rcu(|old| {
            let living = old.iter().filter(|o| o.strong_count() > 0).cloned();
            living.chain([observer.clone()]).collect::<Vec<_>>()
        });
        self.observed.store(true, Ordering::Release);
    }
}

impl fmt::Debug for Tracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracker").field("dirty", &self.dirty.is_some()).finish_non_exhaustive()
    }
}

impl<'a> WithBitmapSlice<'a> for Tracker {
    type S = RefSlice<'a, Tracker>;
}

impl Bitmap for Tracker {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.dirty.mark_dirty(offset, len);
        if !self.observed.load(Ordering::Acquire) {
            return;
        }
        for observer in self.observers.load().iter().filter_map(Weak::upgrade) {
            observer.written(offset as u64, len as u64);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.dirty.dirty_at(offset)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Tracker> {
        RefSlice::new(self, offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{GuestAddress, GuestMemory, MemoryRegion};
    use std::sync::Mutex;

    #[derive(Default)]
    struct Log(Mutex<Vec<(u64, u64)>>);

    impl WriteObserver for Log {
        fn written(&self, offset: u64, len: u64) {
            self.0.lock().unwrap().push((offset, len));
        }
    }

    #[test]
    fn observers_are_told_while_they_live() {
        let region = Arc::new(MemoryRegion::anonymous(GuestAddress(0x1000), 0x2000).unwrap());
        let memory = GuestMemory::default();
        memory.insert(region.clone()).unwrap();
        let log = Arc::new(Log::default());
        region.observe(&log);
        memory.write(GuestAddress(0x1ffe), &[1, 2, 3, 4]).unwrap();
        let total: u64 = log.0.lock().unwrap().iter().map(|(_, len)| len).sum();
        assert_eq!((log.0.lock().unwrap()[0].0, total), (0xffe, 4));
        drop(log);
        memory.write(GuestAddress(0x1ffe), &[1, 2, 3, 4]).unwrap();
    }

    #[test]
    fn writes_by_address_are_told_as_far_as_there_is_memory() {
        let region = Arc::new(MemoryRegion::anonymous(GuestAddress(0x1000), 0x2000).unwrap());
        let log = Arc::new(Log::default());
        region.observe(&log);
        region.written(0x10, 4);
        region.written(0x1ff0, u64::MAX);
        region.written(0x2000, 1);
        region.written(u64::MAX, u64::MAX);
        region.written(0, 0);
        assert_eq!(*log.0.lock().unwrap(), [(0x10, 4), (0x1ff0, 0x10)]);
    }
}
