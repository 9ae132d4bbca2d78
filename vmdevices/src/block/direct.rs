//! O_DIRECT: what it wants aligned, and copies of what is not.

use std::fs::File;
use std::ops::Range;

use rustix::fs::{AtFlags, StatxFlags, statx};

/// Most bytes copied at once.
const MOST_BOUNCED: usize = 1 << 20;

/// What a file wants multiples of, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alignment {
    /// Addresses and lengths of memory.
    pub(super) memory: usize,
    /// Offsets in the file, and lengths.
    pub(super) offset: u64,
}

impl Alignment {
    /// Nothing, without O_DIRECT.
    pub(super) const NONE: Self = Self { memory: 1, offset: 1 };

    /// Of `file`, which is open with O_DIRECT.
    pub(super) fn of(file: &File) -> Self {
        // Enough everywhere. Kernels before 6.1, and some file systems, do not tell.
        const SAFE: u32 = 4096;
        let (memory, offset) = match statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) {
            Ok(told) if told.stx_dio_offset_align.is_power_of_two() => {
                (told.stx_dio_mem_align.max(1), told.stx_dio_offset_align)
            }
            _ => (SAFE, SAFE),
        };
        Self { memory: memory.next_power_of_two() as usize, offset: offset.into() }
    }
}

/// An aligned buffer for requests that are not.
pub(super) struct Bounce {
    memory: Vec<u8>,
    begin: usize,
    alignment: Alignment,
}

/// Which bytes of a file a part of a request wants, and which must be transferred for it.
pub(super) struct Window {
    /// Where in the file the buffer begins.
    pub(super) start: u64,
    /// Bytes of the buffer.
    pub(super) outer: usize,
    /// Those of them that are wanted.
    pub(super) inner: Range<usize>,
}

impl Bounce {
    /// A buffer for a request of `len` bytes, or for the better part of it.
    pub(super) fn new(alignment: Alignment, len: usize) -> Self {
        let block = usize::try_from(alignment.offset).unwrap_or(1);
        let size = len.min(MOST_BOUNCED).next_multiple_of(block) + block;
        let memory = vec![0; size + alignment.memory];
        let begin = memory.as_ptr().align_offset(alignment.memory).min(alignment.memory);
        Self { memory, begin, alignment }
    }

    /// The first part of a request of `len` bytes at `offset` in the file.
    pub(super) fn window(&self, offset: u64, len: usize) -> Window {
        let block = self.alignment.offset;
        let start = offset - offset % block;
        // Less than a block.
        let skip = usize::try_from(offset - start).unwrap_or(0);
        let inner = skip..skip + len.min(MOST_BOUNCED);
        let outer = inner.end.next_multiple_of(usize::try_from(block).unwrap_or(1));
        Window { start, outer, inner }
    }

    /// The first `len` bytes of the buffer.
    pub(super) fn bytes(&mut self, len: usize) -> &mut [u8] {
        &mut self.memory[self.begin..][..len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn windows_are_aligned_and_within_the_buffer(
            offset in 0u64..1 << 40, len in 1usize..3 << 20, block in 0u32..13, memory in 0u32..13,
        ) {
            let alignment = Alignment { memory: 1 << memory, offset: 1 << block };
            let mut bounce = Bounce::new(alignment, len);
            let window = bounce.window(offset, len);
            prop_assert_eq!(window.start % alignment.offset, 0);
            prop_assert_eq!(window.outer as u64 % alignment.offset, 0);
            prop_assert_eq!(window.start + window.inner.start as u64, offset);
            prop_assert!(!window.inner.is_empty() && window.inner.end <= window.outer);
            prop_assert!(window.inner.len() == len || window.inner.len() == MOST_BOUNCED);
            let bytes = bounce.bytes(window.outer);
            prop_assert_eq!(bytes.as_ptr().addr() % alignment.memory, 0);
        }
    }
}
