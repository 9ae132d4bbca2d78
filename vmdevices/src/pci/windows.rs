//! The guest-physical addresses that the host bridge forwards, and where BARs are put at first.
//!
//! Guests are told of windows, and those with ACPI stay in them. Others (Linux with `pci=noacpi`) put BARs wherever
//! they know of nothing else, hence the bridge forwards, as a PC's does, all that is not somebody else's.

use vmcore::boot::layout;
use vmcore::memory::GpaRange;
use vmcore::{Error, GuestAddress, Result};

use super::device::Bar;

/// BARs of this length and more go above 4 GiB, where they can.
const LARGE: u64 = 16 << 20;

/// Below is what a PC keeps for its own devices and firmware, whatever is there.
const FIRST: u64 = layout::ONE_MIB;

/// Interrupt controllers and firmware: the backend answers here itself, in part.
const PLATFORM: GpaRange = GpaRange { base: layout::IOAPIC.base, len: (1 << 32) - layout::IOAPIC.base };

/// Whether the bridge forwards the `len` addresses from `base`, unless memory or another device is there.
pub(super) fn forwards(base: u64, len: u64) -> bool {
    let range = GpaRange { base, len };
    base >= FIRST && range.end().is_some() && !range.overlaps(&PLATFORM)
}

/// The windows of a bridge, which BARs are put into.
#[derive(Clone, Debug)]
pub(super) struct Windows(Vec<Window>);

#[derive(Clone, Copy, Debug)]
struct Window {
    all: GpaRange,
    /// The first address that was not given out.
    next: u64,
}

impl Windows {
    pub(super) fn new(ranges: &[GpaRange]) -> Self {
        Self(ranges.iter().map(|&all| Window { all, next: all.base }).collect())
    }

    /// Gives out addresses for `bar`.
    ///
    /// # Errors
    /// [`Error::Config`] where no window has room.
    pub(super) fn allocate(&mut self, bar: &Bar) -> Result<GuestAddress> {
        let is_high = |window: &Window| window.all.base >> 32 != 0;
        let mut order: Vec<&mut Window> =
            self.0.iter_mut().filter(|window| bar.wide || !is_high(window)).collect();
        order.sort_by_key(|window| is_high(window) != (bar.len >= LARGE));
        let room = order.into_iter().find_map(|window| window.take(bar.len));
        room.map(GuestAddress).ok_or_else(|| Error::Config {
            what: "PCI BAR",
            value: format!("{:#x} bytes with {} bits", bar.len, if bar.wide { 64 } else { 32 }),
            fix: "the windows of the bridge have no room left: attach fewer devices, or let the BAR be wide"
                .into(),
        })
    }
}

impl Window {
    fn take(&mut self, len: u64) -> Option<u64> {
        let at = self.next.checked_next_multiple_of(len)?;
        let end = at.checked_add(len).filter(|&end| self.all.end().is_some_and(|all| end <= all))?;
        self.next = end;
        Some(at)
    }
}
