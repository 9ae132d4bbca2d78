//! A bitmap of pages that were written.

use super::PAGE_SIZE;

/// Which pages of one memory region were written since the last look.
///
/// Bit `n` stands for the page of 4096 bytes at `n * 4096` from the region's base.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DirtyBitmap {
    words: Vec<u64>,
    pages: u64,
}

impl DirtyBitmap {
    /// A bitmap of `pages` pages from its 64-page words, lowest page in the lowest bit. Missing
    /// words count as clean, bits beyond `pages` are dropped.
    pub fn from_words(mut words: Vec<u64>, pages: u64) -> Self {
        let needed = usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX);
        words.resize(needed, 0);
        if let (Some(last), tail @ 1..) = (words.last_mut(), pages % 64) {
            *last &= (1u64 << tail) - 1;
        }
        Self { words, pages }
    }

    /// How many pages the bitmap covers, dirty or not.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// How many pages are dirty.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// Whether page number `page` is dirty. Pages beyond the region are clean.
    pub fn is_dirty(&self, page: u64) -> bool {
        usize::try_from(page / 64)
            .ok()
            .and_then(|index| self.words.get(index))
            .is_some_and(|word| word & (1 << (page % 64)) != 0)
    }

    /// Byte offsets of the dirty pages from the region's base, in ascending order.
    pub fn dirty_offsets(&self) -> impl Iterator<Item = u64> + '_ {
        self.words.iter().zip(0u64..).flat_map(|(&word, index)| {
            std::iter::successors(Some(word), |w| Some(w & w.wrapping_sub(1)))
                .take_while(|&w| w != 0)
                .map(move |w| (index * 64 + u64::from(w.trailing_zeros())) * PAGE_SIZE)
        })
    }

    /// Adds the dirty pages of `other`, which covers the same region.
    pub fn merge(&mut self, other: &DirtyBitmap) {
        self.pages = self.pages.max(other.pages);
        if self.words.len() < other.words.len() {
            self.words.resize(other.words.len(), 0);
        }
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine |= theirs;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_beyond_the_region_are_dropped() {
        let map = DirtyBitmap::from_words(vec![u64::MAX, u64::MAX], 65);
        assert_eq!(map.count(), 65);
        assert!(map.is_dirty(64) && !map.is_dirty(65) && !map.is_dirty(1 << 40));
    }

    #[test]
    fn offsets_are_bytes_in_order_and_merge_is_a_union() {
        let mut map = DirtyBitmap::from_words(vec![0b101], 128);
        map.merge(&DirtyBitmap::from_words(vec![0b1, 0b10], 128));
        let offsets: Vec<u64> = map.dirty_offsets().collect();
        assert_eq!(offsets, [0, 2 * 4096, 65 * 4096]);
    }
}
