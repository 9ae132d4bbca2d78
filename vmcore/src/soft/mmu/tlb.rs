//! The translation caches.
#![expect(unsafe_code, reason = "the bank in use is referred to by pointer: every access begins with it")]

use std::ptr::NonNull;

/// Supervisor accesses; under SMAP without user pages.
pub(super) const SUPERVISOR: usize = 0;
/// Supervisor accesses with RFLAGS.AC set under SMAP.
pub(super) const SUPERVISOR_AC: usize = 1;
/// User accesses.
pub(super) const USER: usize = 2;
/// User accesses that must be aligned: none is a fast hit.
pub(super) const USER_ALIGNED: usize = 3;
const KINDS: usize = 4;

/// Process contexts kept at a time. Linux uses 6.
const PROCESSES: usize = 8;

/// Entries of a table: a power of two.
pub(super) const ENTRIES: usize = 1024;

/// Page number bits of an address.
pub(super) const PAGE: u64 = !0xfff;

/// Flag in [`Entry::tag`]: never a fast hit. The page is a device's or a ROM, and `gpa` says where.
pub(super) const DEVICE: u64 = 1;
/// Flag in [`Entry::tag`]: never a fast hit, because a write must look at the page's code map.
pub(super) const CODE: u64 = 2;
/// Flag in [`Entry::tag`]: the translation is global.
pub(super) const GLOBAL: u64 = 4;
/// Flag in [`Entry::tag`]: never a fast hit, because the access itself is looked at.
pub(super) const SLOW: u64 = 16;
/// Tag that no address has.
const EMPTY: u64 = 8;

/// One translation.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Entry {
    /// Linear address of the page, with flags. A tag with a flag other than zero never compares equal
    /// to an address: it is for the slow path.
    pub(super) tag: u64,
    /// Host address less linear address, modulo 2^64.
    pub(super) addend: u64,
}

const NOTHING: Entry = Entry { tag: EMPTY, addend: 0 };

/// Translations for one kind of access.
pub(super) struct Table {
    pub(super) entries: [Entry; ENTRIES],
    /// Guest-physical page addresses, for the slow path, with [`GLOBAL`] where it applies.
    pub(super) gpa: [u64; ENTRIES],
}

/// Index of the entry for `at` in a table.
#[inline(always)]
pub(super) fn index(at: u64) -> usize {
    (at >> 12) as usize & (ENTRIES - 1)
}

impl Table {
    const EMPTY: Self = Self { entries: [NOTHING; ENTRIES], gpa: [0; ENTRIES] };

    /// Drops everything. Returns `true`, for [`Banks::flush_bank`].
    fn clear(&mut self) -> bool {
        self.entries.fill(NOTHING);
        true
    }

    /// Drops what is not global. Returns whether that was anything.
    fn clear_unless_global(&mut self) -> bool {
        let mut dropped = false;
        for (entry, gpa) in self.entries.iter_mut().zip(&self.gpa) {
            if gpa & GLOBAL == 0 {
                dropped |= entry.tag & EMPTY == 0;
                *entry = NOTHING;
            }
        }
        dropped
    }

    fn clear_page(&mut self, at: u64) {
        let entry = &mut self.entries[index(at)];
        if entry.tag & PAGE == at & PAGE {
            *entry = NOTHING;
        }
    }

    /// The entry that covers `at`, with whatever flags, and the guest-physical page.
    pub(super) fn find(&self, at: u64) -> Option<(Entry, u64)> {
        let n = index(at);
        let entry = self.entries[n];
        (entry.tag & PAGE == at & PAGE && entry.tag & EMPTY == 0).then_some((entry, self.gpa[n] & PAGE))
    }

    pub(super) fn set(&mut self, at: u64, flags: u64, host: u64, gpa: u64, global: bool) {
        let n = index(at);
        let page = at & PAGE;
        self.entries[n] = Entry { tag: page | flags, addend: host.wrapping_sub(page) };
        self.gpa[n] = gpa | if global { GLOBAL } else { 0 };
    }
}

/// The translations of one process context for one kind of privilege.
pub(super) struct Bank {
    pub(super) read: Table,
    pub(super) write: Table,
    pub(super) execute: Table,
    /// Changes whenever a translation for execution is dropped that was used in this context.
    pub(super) context: u64,
    /// The pages whose translations for execution have been displaced since `context` changed: what they
    /// led to may still be in use, and no dropping of translations will find it.
    displaced: Pages,
    /// One of those was not global.
    displaced_local: bool,
    /// Whether anything was entered since the last clearing.
    used: bool,
    /// Which 2 MiB and 1 GiB pages parts were entered of: INVLPG of one address drops all of its page.
    large: Pages,
    huge: Pages,
}

/// A set of page numbers, which may seem to have some that it has not.
#[derive(Clone, Copy, Debug)]
struct Pages([u64; 64]);

impl Pages {
    const NONE: Self = Self([0; 64]);

    /// The word and the bit of a page number. All of its bits count: a kernel's pages are to be told from
    /// a process'.
    fn place(number: u64) -> (usize, u64) {
        let hash = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 52;
        ((hash >> 6) as usize & 63, 1 << (hash & 63))
    }

    fn insert(&mut self, number: u64) {
        let (word, bit) = Self::place(number);
        self.0[word] |= bit;
    }

    fn has(&self, number: u64) -> bool {
        let (word, bit) = Self::place(number);
        self.0[word] & bit != 0
    }
}

impl Bank {
    /// Notes that `at` lies in a page of `1 << size` bytes.
    pub(super) fn note_size(&mut self, at: u64, size: u32) {
        match size {
            // By 4 MiB, as 32-bit paging has them: INVLPG may name either half.
            13..=22 => self.large.insert(at >> 22),
            30 => self.huge.insert(at >> 30),
            _ => {}
        }
    }

    /// Notes that a translation for execution of `at` is about to be entered.
    pub(super) fn displace_executed(&mut self, at: u64) {
        let n = index(at);
        let entry = self.execute.entries[n];
        if entry.tag & EMPTY == 0 && entry.tag & PAGE != at & PAGE {
            self.displaced.insert(entry.tag >> 12);
            self.displaced_local |= self.execute.gpa[n] & GLOBAL == 0;
        }
    }

    /// Begins another context.
    fn change_context(&mut self, contexts: &mut u64) {
        self.context = Banks::next_context(contexts);
        self.displaced = Pages::NONE;
        self.displaced_local = false;
    }

    /// Drops the translations of the page of `at`, whatever its size. Returns whether one for execution
    /// may have been among them.
    fn clear_page(&mut self, at: u64) -> bool {
        let shift = if self.huge.has(at >> 30) {
            30
        } else if self.large.has(at >> 22) {
            22
        } else {
            let executed = self.displaced.has(at >> 12) || self.execute.find(at).is_some();
            for table in [&mut self.read, &mut self.write, &mut self.execute] {
                table.clear_page(at);
            }
            return executed;
        };
        for table in [&mut self.read, &mut self.write, &mut self.execute] {
            for entry in table.entries.iter_mut().filter(|entry| entry.tag >> shift == at >> shift) {
                *entry = NOTHING;
            }
        }
        true
    }

    fn boxed(context: u64) -> Box<Self> {
        Box::new(Self {
            read: Table::EMPTY,
            write: Table::EMPTY,
            execute: Table::EMPTY,
            context,
            displaced: Pages::NONE,
            displaced_local: false,
            used: false,
            large: Pages::NONE,
            huge: Pages::NONE,
        })
    }
}

/// Every bank of a vCPU.
pub(super) struct Banks {
    /// By process slot and kind. Made when first selected.
    banks: Vec<Option<Box<Bank>>>,
    /// Which process context each slot holds, and when it was last selected.
    processes: [(Option<u16>, u64); PROCESSES],
    process_slot: usize,
    active: usize,
    /// The bank number `active`.
    current: NonNull<Bank>,
    /// Source of [`Bank::context`].
    contexts: u64,
    time: u64,
}

// SAFETY: `current` points into `banks`, which moves along with it; a box's contents stay in place.
unsafe impl Send for Banks {}

impl Banks {
    pub(super) fn new() -> Self {
        let mut first = Bank::boxed(1);
        let current = NonNull::from(&mut *first);
        let others = std::iter::repeat_with(|| None).take(PROCESSES * KINDS - 1);
        let mut banks = Self {
            banks: std::iter::once(Some(first)).chain(others).collect(),
            current,
            processes: [(None, 0); PROCESSES],
            process_slot: 0,
            active: 0,
            contexts: 1,
            time: 0,
        };
        banks.select(SUPERVISOR);
        banks
    }

    /// A number that no context has had, whose low bits are far from those of the ones before it: caches
    /// choose places by them. (The multiples of an odd number come back to the first after 2^56 steps in any 56 bits.)
    fn next_context(contexts: &mut u64) -> u64 {
        *contexts = contexts.wrapping_add(0x9e37_79b9_7f4a_7c15);
        *contexts
    }

    /// Makes `process` the present process context; takes the slot that was used longest ago where it
    /// has none.
    pub(super) fn set_process(&mut self, process: u16) {
        self.time += 1;
        let slot = self.processes.iter().position(|(p, _)| *p == Some(process)).unwrap_or_else(|| {
            let slot = (0..PROCESSES).min_by_key(|&n| self.processes[n].1).unwrap_or(0);
            self.processes[slot].0 = Some(process);
            self.flush_slot(slot, Table::clear);
            slot
        });
        self.processes[slot].1 = self.time;
        self.process_slot = slot;
        self.active = slot * KINDS + self.active % KINDS;
        self.select(self.active % KINDS);
    }

    /// Makes the bank for `kind` of the present process context the active one.
    #[inline]
    pub(super) fn select(&mut self, kind: usize) {
        self.set_active_number(self.process_slot * KINDS + kind);
    }

    #[inline(always)]
    pub(super) fn active(&self) -> &Bank {
        // SAFETY: `set_active_number` has set it to a bank in a box of `banks`, which are only dropped
        // with it, and nothing else refers to the bank while `self` is borrowed.
        unsafe { self.current.as_ref() }
    }

    #[inline(always)]
    pub(super) fn active_mut(&mut self) -> &mut Bank {
        // SAFETY: as in `active`, and `self` is borrowed exclusively.
        let bank = unsafe { self.current.as_mut() };
        bank.used = true;
        bank
    }

    /// Which bank is active, to be set again by [`Banks::set_active_number`].
    pub(super) fn active_number(&self) -> usize {
        self.active
    }

    /// The kind of the active bank.
    #[inline]
    pub(super) fn kind(&self) -> usize {
        self.active % KINDS
    }

    pub(super) fn set_active_number(&mut self, number: usize) {
        self.active = number;
        let contexts = &mut self.contexts;
        let bank = self.banks[number].get_or_insert_with(|| Bank::boxed(Self::next_context(contexts)));
        self.current = NonNull::from(&mut **bank);
    }

    /// Clears a bank's tables by `clear`, which returns whether it has dropped anything.
    fn flush_bank(bank: &mut Bank, contexts: &mut u64, clear: fn(&mut Table) -> bool) {
        if !bank.used {
            return;
        }
        clear(&mut bank.read);
        clear(&mut bank.write);
        // A kernel's own code is global: its blocks stay known through changes of address space.
        if clear(&mut bank.execute) || bank.displaced_local {
            bank.change_context(contexts);
        }
    }

    fn flush_slot(&mut self, slot: usize, clear: fn(&mut Table) -> bool) {
        for bank in self.banks[slot * KINDS..][..KINDS].iter_mut().flatten() {
            Self::flush_bank(bank, &mut self.contexts, clear);
        }
    }

    pub(super) fn flush_all(&mut self) {
        for bank in self.banks.iter_mut().flatten() {
            Self::flush_bank(bank, &mut self.contexts, Table::clear);
            (bank.used, bank.large, bank.huge) = (false, Pages::NONE, Pages::NONE);
        }
    }

    pub(super) fn flush_process(&mut self, process: u16) {
        if let Some(slot) = self.processes.iter().position(|(p, _)| *p == Some(process)) {
            self.flush_slot(slot, Table::clear_unless_global);
        }
    }

    pub(super) fn flush_page(&mut self, at: u64) {
        for bank in self.banks.iter_mut().flatten() {
            if bank.clear_page(at) {
                bank.change_context(&mut self.contexts);
            }
        }
    }

    pub(super) fn flush_writes(&mut self) {
        for bank in self.banks.iter_mut().flatten() {
            bank.write.clear();
        }
    }

    pub(super) fn flush_writes_to(&mut self, gpa: u64) {
        for bank in self.banks.iter_mut().flatten().filter(|bank| bank.used) {
            let Table { entries, gpa: pages } = &mut bank.write;
            for (entry, page) in entries.iter_mut().zip(pages) {
                if *page & PAGE == gpa & PAGE {
                    *entry = NOTHING;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As far apart as entries of one index are.
    const SAME_INDEX: u64 = (ENTRIES as u64) << 12;

    fn execute(banks: &mut Banks, at: u64, global: bool) {
        let bank = banks.active_mut();
        bank.displace_executed(at);
        bank.execute.set(at, 0, 0x7000, at, global);
    }

    #[test]
    fn a_displaced_translation_is_flushed_too() {
        let mut banks = Banks::new();
        execute(&mut banks, 0x5000, false);
        let before = banks.active().context;
        banks.flush_page(0x6000);
        assert_eq!(banks.active().context, before, "nothing was there");
        execute(&mut banks, 0x5000 + SAME_INDEX, false);
        // Another page's being flushed does not matter to it.
        banks.flush_page(0x6000);
        assert_eq!(banks.active().context, before, "0x5000 was displaced, not 0x6000");
        banks.flush_page(0x5000);
        assert_ne!(banks.active().context, before, "blocks of 0x5000 would be found");
        // Once is enough.
        let before = banks.active().context;
        banks.flush_page(0x5000);
        assert_eq!(banks.active().context, before);
    }

    #[test]
    fn the_context_outlives_a_flush_that_spares_all_code() {
        let mut banks = Banks::new();
        banks.set_process(0);
        execute(&mut banks, 0x5000, true);
        let before = banks.active().context;
        banks.flush_process(0);
        assert_eq!(banks.active().context, before);
        execute(&mut banks, 0x6000, false);
        banks.flush_process(0);
        assert_ne!(banks.active().context, before);
        let before = banks.active().context;
        // What displaces may be global where the displaced one was not.
        execute(&mut banks, 0x6000, false);
        execute(&mut banks, 0x6000 + SAME_INDEX, true);
        banks.flush_process(0);
        assert_ne!(banks.active().context, before);
        assert!(banks.active().execute.find(0x5000).is_some());
        // A global one may be displaced and stays valid, until its page is flushed.
        let before = banks.active().context;
        execute(&mut banks, 0x5000 + SAME_INDEX, true);
        banks.flush_process(0);
        assert_eq!(banks.active().context, before);
        banks.flush_page(0x5000);
        assert_ne!(banks.active().context, before);
        let before = banks.active().context;
        banks.flush_all();
        assert_ne!(banks.active().context, before);
    }
}
