//! Pieces of guest memory that a request reads or fills: what virtqueue chains, disks and networks
//! hand to each other without copying.

mod ranges;
mod vectored;

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BS;
use vmcore::memory::Tracker;

pub use ranges::GuestRanges;
pub(crate) use vectored::MOST_PIECES;

/// One piece of host memory that backs guest memory. The guest may change it at any moment.
pub type GuestSlice<'m> = VolatileSlice<'m, BS<'m, Tracker>>;

/// A sequence of pieces of guest memory, consumed from its front.
///
/// The lifetime is that of the memory snapshot the pieces lie in. Reading and writing copy from and
/// to the guest's memory; the `readv` family ([`Buffers::fill_from`] and relatives) lets the kernel
/// do so directly. Lengths and counts are bytes.
#[derive(Debug, Default)]
pub struct Buffers<'m> {
    slices: Vec<GuestSlice<'m>>,
    /// Index of the first piece that is not consumed.
    next: usize,
    /// Bytes that are not consumed.
    len: usize,
}

impl<'m> Buffers<'m> {
    /// Appends a piece. The sum of all lengths saturates, which no real address space reaches.
    pub fn push(&mut self, slice: GuestSlice<'m>) {
        self.len = self.len.saturating_add(slice.len());
        self.slices.push(slice);
    }

    /// Appends all that `other` has left.
    pub fn append(&mut self, other: Buffers<'m>) {
        for slice in other.slices.into_iter().skip(other.next) {
            self.push(slice);
        }
    }

    /// The same pieces once more, as buffers of their own.
    pub fn view(&self) -> Self {
        Self { slices: self.slices().to_vec(), next: 0, len: self.len }
    }

    /// Bytes that are left.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces that are left.
    pub fn slices(&self) -> &[GuestSlice<'m>] {
        &self.slices[self.next..]
    }

    /// Consumes `count` bytes, or what is left.
    pub fn advance(&mut self, count: usize) {
        let mut rest = count.min(self.len);
        self.len -= rest;
        while let Some(slice) = self.slices.get_mut(self.next) {
            match slice.offset(rest) {
                // An empty piece that begins where the data goes on is consumed too.
                Ok(tail) if rest < slice.len() => {
                    *slice = tail;
                    return;
                }
                _ => {
                    rest -= slice.len();
                    self.next += 1;
                }
            }
        }
    }

    /// Takes the first `count` bytes (or what is left) off as buffers of their own.
    pub fn take(&mut self, count: usize) -> Buffers<'m> {
        let front = self.first(count);
        self.advance(front.len);
        front
    }

    /// The first `count` bytes (or what is left) as buffers of their own. They stay here too.
    pub fn first(&self, count: usize) -> Buffers<'m> {
        let mut front = Buffers::default();
        for slice in self.slices() {
            let here = slice.len().min(count - front.len);
            match slice.subslice(0, here) {
                Ok(part) if here > 0 => front.push(part),
                _ => continue,
            }
            if front.len == count {
                break;
            }
        }
        front
    }

    /// Copies guest memory into `into` and consumes it; returns how many bytes there were.
    pub fn read(&mut self, into: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in self.slices() {
            done += slice.copy_to(&mut into[done..]);
            if done == into.len() {
                break;
            }
        }
        self.advance(done);
        done
    }

    /// Copies `from` to guest memory and consumes that; returns how many bytes had room.
    pub fn write(&mut self, from: &[u8]) -> usize {
        let mut done = 0;
        for slice in self.slices() {
            let here = slice.len().min(from.len() - done);
            slice.copy_from(&from[done..done + here]);
            done += here;
            if done == from.len() {
                break;
            }
        }
        self.advance(done);
        done
    }

    /// Sets the first `count` bytes (or what is left) to zero and consumes them.
    pub fn write_zeroes(&mut self, count: usize) {
        const ZEROES: [u8; 4096] = [0; 4096];
        let mut rest = count.min(self.len);
        while rest > 0 {
            rest -= self.write(&ZEROES[..rest.min(ZEROES.len())]);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use vm_memory::Permissions;
    use vmcore::{GuestAddress, GuestMemory, MemoryRegion};

    /// 64 KiB of guest memory from 0 in two regions that touch at 32 KiB.
    pub(crate) fn memory() -> GuestMemory {
        let memory = GuestMemory::new();
        for base in [0, 0x8000] {
            memory.insert(MemoryRegion::anonymous(GuestAddress(base), 0x8000).unwrap().into()).unwrap();
        }
        memory
    }

    /// The buffers that `ranges` (address, length) make up.
    pub(crate) fn buffers<'m>(map: &'m vmcore::memory::MemoryMap, ranges: &[(u64, usize)]) -> Buffers<'m> {
        let mut buffers = Buffers::default();
        for &(at, len) in ranges {
            let slices =
                vm_memory::GuestMemory::get_slices(map, GuestAddress(at), len, Permissions::Write).unwrap();
            slices.for_each(|slice| buffers.push(slice.unwrap()));
        }
        buffers
    }

    #[test]
    fn copies_cross_pieces_and_regions() {
        let memory = memory();
        let map = memory.snapshot();
        let ranges = [(0x100, 3), (0x7ffe, 4), (0x200, 0), (0x300, 100)];
        let text = (0..50).collect::<Vec<u8>>();
        let mut out = buffers(&map, &ranges);
        assert_eq!((out.len(), out.slices().len()), (107, 4));
        assert_eq!(out.write(&text), 50);
        assert_eq!(out.len(), 57);
        out.write_zeroes(1000);
        assert!(out.is_empty());

        let mut back = buffers(&map, &ranges);
        let mut front = back.take(5);
        assert_eq!((back.first(7).len(), back.first(1000).len(), back.len()), (7, 102, 102));
        let (mut a, mut b) = ([0; 9], [0; 200]);
        assert_eq!((front.read(&mut a), back.read(&mut b)), (5, 102));
        assert_eq!((&a[..5], &b[..45]), (&text[..5], &text[5..]));
        assert!(b[45..].iter().all(|&byte| byte == 0));
        let mut edge = [0; 4];
        memory.read(GuestAddress(0x7ffe), &mut edge).unwrap();
        assert_eq!(edge, [3, 4, 5, 6]);
    }

    #[test]
    fn taking_and_advancing_beyond_the_end_is_what_is_left() {
        let memory = memory();
        let map = memory.snapshot();
        let mut all = buffers(&map, &[(0, 10), (20, 10)]);
        all.advance(10);
        assert_eq!(all.slices().len(), 1);
        assert_eq!(all.take(usize::MAX).len(), 10);
        all.advance(usize::MAX);
        assert!(all.is_empty() && all.take(3).is_empty());
        assert_eq!((all.read(&mut [0; 4]), all.write(&[0; 4])), (0, 0));
    }
}
