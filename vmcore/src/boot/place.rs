//! Finding room for images and tables in guest memory.

use super::{BootError, MemoryLayout};
use crate::memory::GpaRange;

/// Finds and remembers places in guest memory while images are loaded: nothing gets two.
#[derive(Debug)]
pub(super) struct Places {
    ram: Vec<GpaRange>,
    taken: Vec<(GpaRange, String)>,
}

impl Places {
    /// The RAM of `layout` without what is reserved there.
    pub(super) fn new(layout: &MemoryLayout) -> Self {
        let taken = layout.reserved().iter().map(|&(range, _, what)| (range, what.into())).collect();
        Self { ram: layout.ram().to_vec(), taken }
    }

    /// Takes `range` for `what`.
    pub(super) fn claim(&mut self, what: impl Into<String>, range: GpaRange) -> Result<(), BootError> {
        let what = what.into();
        if !self.is_ram(range) {
            return Err(BootError::NotInMemory {
                what,
                range,
                memory: list(self.ram.iter()),
                fix: "give the VM more memory or link the image to another address",
            });
        }
        if let Some((other_range, other)) = self.taken.iter().find(|(taken, _)| taken.overlaps(&range)) {
            let (other, other_range) = (other.clone(), *other_range);
            return Err(BootError::Overlap { what, range, other, other_range });
        }
        self.taken.push((range, what));
        Ok(())
    }

    /// Keeps everything else away from `range`, whatever is there.
    pub(super) fn block(&mut self, what: &str, range: GpaRange) {
        self.taken.push((range, what.into()));
    }

    /// Takes the lowest free `len` bytes inside `window`, `align`-ed.
    pub(super) fn lowest(
        &mut self,
        what: &str,
        len: u64,
        align: u64,
        window: GpaRange,
    ) -> Result<u64, BootError> {
        let up = |base: u64| base.checked_next_multiple_of(align);
        let base = self.edges(window).filter_map(up).filter(|&base| self.fits(base, len, window)).min();
        self.take(what, base, len, window)
    }

    /// Takes the highest free `len` bytes inside `window`, `align`-ed.
    pub(super) fn highest(
        &mut self,
        what: &str,
        len: u64,
        align: u64,
        window: GpaRange,
    ) -> Result<u64, BootError> {
        let down = |end: u64| end.checked_sub(len).map(|base| base - base % align);
        let base = self.edges(window).filter_map(down).filter(|&base| self.fits(base, len, window)).max();
        self.take(what, base, len, window)
    }

    /// Where free memory may begin or end.
    fn edges(&self, window: GpaRange) -> impl Iterator<Item = u64> {
        let taken = self.taken.iter().map(|(range, _)| *range);
        let ranges = self.ram.iter().copied().chain(taken).chain([window]);
        ranges.flat_map(|range| [Some(range.base), range.end()]).flatten()
    }

    fn is_ram(&self, range: GpaRange) -> bool {
        self.ram.iter().any(|ram| contains(ram, &range))
    }

    fn fits(&self, base: u64, len: u64, window: GpaRange) -> bool {
        let range = GpaRange { base, len };
        contains(&window, &range)
            && self.is_ram(range)
            && !self.taken.iter().any(|(taken, _)| taken.overlaps(&range))
    }

    fn take(&mut self, what: &str, base: Option<u64>, len: u64, window: GpaRange) -> Result<u64, BootError> {
        match base {
            Some(base) => {
                self.taken.push((GpaRange { base, len }, what.into()));
                Ok(base)
            }
            None => Err(BootError::NoRoom {
                what: what.into(),
                len,
                window,
                memory: list(self.ram.iter()),
                taken: list(
                    self.taken.iter().filter(|(r, _)| r.overlaps(&window)).map(|(r, w)| format!("{w} {r}")),
                ),
            }),
        }
    }
}

/// Whether `inner` is all inside `outer`.
fn contains(outer: &GpaRange, inner: &GpaRange) -> bool {
    inner.base >= outer.base
        && matches!((inner.end(), outer.end()), (Some(inner), Some(outer)) if inner <= outer)
}

fn list(items: impl Iterator<Item: ToString>) -> String {
    let list: Vec<String> = items.map(|item| item.to_string()).collect();
    if list.is_empty() { "nothing".into() } else { list.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: GpaRange = GpaRange { base: 0, len: 1 << 40 };

    #[test]
    fn lowest_and_highest_step_over_what_is_taken() {
        let mut places = Places::new(&MemoryLayout::bare(vec![GpaRange { base: 0x1000, len: 0x9000 }]));
        places.claim("a", GpaRange { base: 0x1000, len: 0x1800 }).unwrap();
        assert_eq!(places.lowest("b", 0x1000, 0x1000, ALL).unwrap(), 0x3000);
        assert_eq!(places.lowest("c", 0x800, 0x800, ALL).unwrap(), 0x2800);
        assert_eq!(places.highest("d", 0x900, 0x1000, ALL).unwrap(), 0x9000);
        assert_eq!(places.highest("e", 0x10, 0x10, ALL).unwrap(), 0x9ff0);
        let error = places.lowest("f", 0x8000, 0x1000, ALL).unwrap_err();
        assert!(matches!(error, BootError::NoRoom { len: 0x8000, .. }), "{error}");
    }

    #[test]
    fn claims_must_be_memory_and_free() {
        let mut places = Places::new(&MemoryLayout::bare(vec![GpaRange { base: 0, len: 0x4000 }]));
        places.claim("first", GpaRange { base: 0x1000, len: 0x1000 }).unwrap();
        let error = places.claim("second", GpaRange { base: 0x1fff, len: 1 }).unwrap_err();
        assert!(matches!(&error, BootError::Overlap { other, .. } if other == "first"), "{error}");
        for range in [GpaRange { base: 0x3000, len: 0x1001 }, GpaRange { base: u64::MAX, len: 2 }] {
            let error = places.claim("beyond", range).unwrap_err();
            assert!(matches!(error, BootError::NotInMemory { .. }), "{error}");
        }
    }
}
