//! Guest memory by address: what a request keeps while it is in flight.

use std::collections::VecDeque;
use std::io;

use vm_memory::{GuestMemory as _, Permissions};
use vmcore::GuestAddress;
use vmcore::memory::MemoryMap;

use super::Buffers;

/// A sequence of ranges of guest memory. Other than [`Buffers`] it borrows nothing, so that a
/// request can be handed to another thread, along with the snapshot of memory it refers to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuestRanges {
    /// None is empty.
    ranges: VecDeque<(GuestAddress, usize)>,
    len: usize,
}

impl GuestRanges {
    /// Appends `len` bytes from `at`. The sum of all lengths saturates, which no real address space
    /// reaches.
    pub fn push(&mut self, at: GuestAddress, len: usize) {
        if len > 0 {
            self.ranges.push_back((at, len));
            self.len = self.len.saturating_add(len);
        }
    }

    /// Appends all of `other`.
    pub fn append(&mut self, other: GuestRanges) {
        other.ranges.into_iter().for_each(|(at, len)| self.push(at, len));
    }

    /// All bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many pieces there are.
    pub fn pieces(&self) -> usize {
        self.ranges.len()
    }

    /// Takes the first `count` bytes (or all) off as ranges of their own.
    pub fn take_front(&mut self, count: usize) -> GuestRanges {
        let mut front = GuestRanges::default();
        while front.len < count {
            let Some((at, len)) = self.ranges.pop_front() else { break };
            let here = len.min(count - front.len);
            front.push(at, here);
            self.len -= len;
            if here < len {
                // Cannot wrap: the range was within memory, or is refused when it is looked at.
                self.ranges.push_front((GuestAddress(at.0.wrapping_add(here as u64)), len - here));
                self.len += len - here;
            }
        }
        front
    }

    /// Takes the last byte off: its address, unless there is none.
    pub fn take_last(&mut self) -> Option<GuestAddress> {
        let (at, len) = self.ranges.back_mut()?;
        *len -= 1;
        let (last, empty) = (GuestAddress(at.0.wrapping_add(*len as u64)), *len == 0);
        if empty {
            self.ranges.pop_back();
        }
        self.len -= 1;
        Some(last)
    }

    /// The memory itself, in `map`, for reading or writing.
    ///
    /// # Errors
    /// Where part of it is not there, or cannot be written.
    pub fn buffers<'m>(&self, map: &'m MemoryMap, access: Permissions) -> io::Result<Buffers<'m>> {
        let mut buffers = Buffers::default();
        self.add_to(&mut buffers, map, access)?;
        Ok(buffers)
    }

    /// As [`GuestRanges::buffers`], appended to `buffers`.
    ///
    /// # Errors
    /// As [`GuestRanges::buffers`].
    pub fn add_to<'m>(
        &self,
        buffers: &mut Buffers<'m>,
        map: &'m MemoryMap,
        access: Permissions,
    ) -> io::Result<()> {
        for &(at, len) in &self.ranges {
            for slice in map.get_slices(at, len, access).map_err(io::Error::other)? {
                buffers.push(slice.map_err(io::Error::other)?);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::memory;
    use super::*;

    #[test]
    fn ranges_are_cut_and_looked_at() {
        let memory = memory();
        let map = memory.snapshot();
        let mut all = GuestRanges::default();
        for (at, len) in [(0x100, 10), (0x900, 0), (0x7ffe, 4), (0x300, 1)] {
            all.push(GuestAddress(at), len);
        }
        assert_eq!((all.len(), all.pieces()), (15, 3));
        memory.write(GuestAddress(0x108), &[1, 2]).unwrap();
        memory.write(GuestAddress(0x7ffe), &[3, 4, 5, 6]).unwrap();
        let front = all.take_front(8);
        assert_eq!((front.len(), all.len(), all.pieces()), (8, 7, 3));
        assert_eq!((all.take_last(), all.len(), all.pieces()), (Some(GuestAddress(0x300)), 6, 2));
        assert_eq!(all.take_last(), Some(GuestAddress(0x8001)));
        let mut bytes = [0; 9];
        assert_eq!(all.buffers(&map, Permissions::Read).unwrap().read(&mut bytes), 5);
        assert_eq!(bytes, [1, 2, 3, 4, 5, 0, 0, 0, 0]);
        assert_eq!(all.take_front(usize::MAX).len(), 5);
        assert!(all.is_empty() && all.take_last().is_none() && all.take_front(1).is_empty());
        all.push(GuestAddress(u64::MAX - 3), 4);
        all.push(GuestAddress(0xffff), 2);
        assert!(all.buffers(&map, Permissions::Read).is_err());
    }
}
