//! The guest-physical address space: a map of regions that can change while the guest runs.

use std::iter::FusedIterator;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use vm_memory::bitmap::BS;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::mmap::GuestRegionMmap;
use vm_memory::{Bytes, GuestMemoryError, GuestRegionCollection, Permissions, VolatileSlice};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::track::Tracker;
use super::{GpaRange, GuestAddress, MemoryError, MemoryRegion};

/// An immutable snapshot of the guest-physical address space, to be used from any thread.
///
/// It implements `vm_memory::GuestMemory` (and so `Bytes<GuestAddress>`), which is what
/// virtio-queue wants. A device takes one per batch of requests: memory that is removed meanwhile
/// stays mapped until the snapshot is dropped. Writes to read-only regions are refused.
#[derive(Clone, Debug, Default)]
pub struct MemoryMap {
    /// Sorted by base, without overlaps.
    regions: Vec<Arc<MemoryRegion>>,
}

impl MemoryMap {
    /// The regions, sorted by base.
    pub fn regions(&self) -> &[Arc<MemoryRegion>] {
        &self.regions
    }

    /// The region that covers `at`.
    pub fn find(&self, at: GuestAddress) -> Option<&Arc<MemoryRegion>> {
        let behind = self.regions.partition_point(|r| r.base() <= at);
        let region = self.regions.get(behind.checked_sub(1)?)?;
        (at.0 - region.base().0 < region.len()).then_some(region)
    }

    fn with(&self, region: Arc<MemoryRegion>) -> Result<Self, MemoryError> {
        let new = region.range();
        if let Some(existing) = self.regions.iter().map(|r| r.range()).find(|r| r.overlaps(&new)) {
            return Err(MemoryError::Overlap { new, existing });
        }
        let mut regions = self.regions.clone();
        regions.insert(regions.partition_point(|r| r.base().0 < new.base), region);
        Ok(Self { regions })
    }

    fn without(&self, base: GuestAddress) -> Result<(Self, Arc<MemoryRegion>), MemoryError> {
        let mut regions = self.regions.clone();
        match regions.iter().position(|r| r.base() == base) {
            Some(index) => {
                let region = regions.remove(index);
                Ok((Self { regions }, region))
            }
            None => Err(MemoryError::NoRegion {
                base: base.0,
                known: regions.iter().map(|r| r.base().0).collect(),
            }),
        }
    }

    /// Why an access of `len` bytes at `at` fails.
    fn explain(&self, at: GuestAddress, len: usize, access: Permissions) -> MemoryError {
        let (base, len) = (at.0, len as u64);
        let mut next = base;
        let mut mapped_end = None;
        while let Some(region) = self.find(GuestAddress(next)) {
            if access.has_write() && region.is_read_only() {
                return MemoryError::ReadOnly { base, len, region: region.range() };
            }
            mapped_end = region.range().end();
            match mapped_end {
                Some(end) => next = end,
                None => break,
            }
        }
        MemoryError::NotMapped { base, len, mapped_end }
    }
}

/// The pieces of host memory that back a range of guest addresses; ends at the first error.
#[derive(Debug)]
pub struct SliceIter<'a> {
    map: &'a MemoryMap,
    at: GuestAddress,
    remaining: usize,
    access: Permissions,
}

impl<'a> Iterator for SliceIter<'a> {
    type Item = Result<VolatileSlice<'a, BS<'a, Tracker>>, GuestMemoryError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.remaining == 0 {
            return None;
        }
        let at = self.at;
        let slice = self.map.find(at).and_then(|region| {
            if self.access.has_write() && region.is_read_only() {
                return None;
            }
            let offset = at.0 - region.base().0;
            let here = usize::try_from(region.len() - offset).unwrap_or(usize::MAX).min(self.remaining);
            region.slice(offset, here)
        });
        match slice {
            Some(slice) => {
                self.remaining -= slice.len();
                // Regions end below 2^52 (checked when they are made), so this does not wrap.
                self.at = GuestAddress(at.0 + slice.len() as u64);
                Some(Ok(slice))
            }
            None => {
                self.remaining = 0;
                Some(Err(GuestMemoryError::InvalidGuestAddress(at)))
            }
        }
    }
}

impl FusedIterator for SliceIter<'_> {}

impl<'a> GuestMemorySliceIterator<'a, BS<'a, Tracker>> for SliceIter<'a> {}

impl vm_memory::GuestMemory for MemoryMap {
    type PhysicalMemory = GuestRegionCollection<GuestRegionMmap<Tracker>>;
    type Bitmap = Tracker;

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        SliceIter { map: self, at: addr, remaining: count, access }.all(|slice| slice.is_ok())
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>, GuestMemoryError> {
        Ok(SliceIter { map: self, at: addr, remaining: count, access })
    }
}

/// A handle on a VM's guest-physical memory.
///
/// Clones share the address space. All methods may be called from any thread while the guest runs;
/// reads and writes are not atomic as a whole (the guest may see them half done).
#[derive(Clone, Debug, Default)]
pub struct GuestMemory {
    map: Arc<ArcSwap<MemoryMap>>,
    /// Serializes changes of the map; readers never take it.
    change: Arc<Mutex<()>>,
}

impl GuestMemory {
    /// An address space without memory.
    pub fn new() -> Self {
        Self::default()
    }

    /// The regions as they are now. Keep it for a batch of work, not for ever: memory removed from
    /// the VM stays allocated while a snapshot refers to it.
    pub fn snapshot(&self) -> Arc<MemoryMap> {
        self.map.load_full()
    }

    /// Adds a region to the address space. This alone does not tell a backend; VMs do both.
    ///
    /// # Errors
    /// [`MemoryError::Overlap`], naming both ranges.
    pub fn insert(&self, region: Arc<MemoryRegion>) -> Result<(), MemoryError> {
        let _guard = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let map = self.map.load().with(region)?;
        self.map.store(Arc::new(map));
        Ok(())
    }

    /// Takes the region that begins at `base` out of the address space.
    ///
    /// # Errors
    /// [`MemoryError::NoRegion`], listing the bases there are.
    pub fn remove(&self, base: GuestAddress) -> Result<Arc<MemoryRegion>, MemoryError> {
        let _guard = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let (map, region) = self.map.load().without(base)?;
        self.map.store(Arc::new(map));
        Ok(region)
    }

    /// Sum of the lengths of all regions, in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.map.load().regions.iter().map(|r| r.len()).sum()
    }

    /// Copies `buf.len()` bytes of guest memory from `at` into `buf`.
    ///
    /// # Errors
    /// [`MemoryError::NotMapped`] where part of the range has no memory; `buf` is then unspecified.
    pub fn read(&self, at: GuestAddress, buf: &mut [u8]) -> Result<(), MemoryError> {
        let map = self.map.load();
        map.read_slice(buf, at).map_err(|_| map.explain(at, buf.len(), Permissions::Read))
    }

    /// Copies the bytes of `buf` to guest memory at `at`. The range is checked first, so that a failing write
    /// changes nothing.
    ///
    /// # Errors
    /// [`MemoryError::NotMapped`] or [`MemoryError::ReadOnly`].
    pub fn write(&self, at: GuestAddress, buf: &[u8]) -> Result<(), MemoryError> {
        let map = self.map.load();
        let fits = vm_memory::GuestMemory::check_range(&**map, at, buf.len(), Permissions::Write);
        if !fits || map.write_slice(buf, at).is_err() {
            return Err(map.explain(at, buf.len(), Permissions::Write));
        }
        Ok(())
    }

    /// Sets `len` bytes from `at` to zero.
    ///
    /// # Errors
    /// As [`GuestMemory::write`].
    pub fn zero(&self, at: GuestAddress, len: u64) -> Result<(), MemoryError> {
        const ZEROES: [u8; 4096] = [0; 4096];
        let mut done = 0;
        while done < len {
            let part = usize::try_from(len - done).unwrap_or(usize::MAX).min(ZEROES.len());
            let next = at.0.checked_add(done).ok_or(MemoryError::Overflow { base: at.0, len, bits: 64 })?;
            self.write(GuestAddress(next), &ZEROES[..part])?;
            done += part as u64;
        }
        Ok(())
    }

    /// Reads one value of plain data at `at`, in the guest's (little-endian) layout.
    ///
    /// # Errors
    /// As [`GuestMemory::read`].
    pub fn load<T: FromBytes + IntoBytes>(&self, at: GuestAddress) -> Result<T, MemoryError> {
        let mut value = T::new_zeroed();
        self.read(at, value.as_mut_bytes())?;
        Ok(value)
    }

    /// Writes one value of plain data at `at`.
    ///
    /// # Errors
    /// As [`GuestMemory::write`].
    pub fn store<T: IntoBytes + Immutable>(&self, at: GuestAddress, value: &T) -> Result<(), MemoryError> {
        self.write(at, value.as_bytes())
    }

    /// Whether all of `len` bytes from `at` are memory.
    pub fn contains(&self, at: GuestAddress, len: u64) -> bool {
        usize::try_from(len).is_ok_and(|len| {
            vm_memory::GuestMemory::check_range(&**self.map.load(), at, len, Permissions::Read)
        })
    }

    /// The ranges that have memory, sorted by base.
    pub fn ranges(&self) -> Vec<GpaRange> {
        self.map.load().regions.iter().map(|r| r.range()).collect()
    }
}
