//! The page walk (SDM vol. 3A, chapter 4).
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "entries of 32-bit paging, and shifts below 64"
)]
#![expect(unsafe_code, reason = "accessed and dirty flags are set in guest memory")]

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::tlb::{self, CODE, DEVICE, PAGE, SLOW};
use super::{Mmu, Paging};

/// Kind of access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::soft) enum Access {
    Read,
    Write,
    Execute,
}

/// Width of guest-physical addresses in bits, as CPUID tells.
pub(in crate::soft) const PHYSICAL_BITS: u32 = 46;
/// The bits of an entry that hold an address.
const ADDRESS: u64 = ((1 << PHYSICAL_BITS) - 1) & PAGE;
/// Address bits that must be zero.
const TOO_HIGH: u64 = (1 << 52) - (1 << PHYSICAL_BITS);

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const GLOBAL: u64 = 1 << 8;
const NO_EXECUTE: u64 = 1 << 63;

/// Error code of #PF: protection and not absence.
const PF_PRESENT: u32 = 1;
const PF_WRITE: u32 = 2;
const PF_USER: u32 = 4;
const PF_RESERVED: u32 = 8;
const PF_FETCH: u32 = 16;

/// What a page's entry says.
#[derive(Clone, Copy, Debug)]
struct Leaf {
    /// Guest-physical address of the 4 KiB page.
    gpa: u64,
    global: bool,
    /// Size of the page as a power of two.
    size: u32,
}

/// The entries that a walk went through.
#[derive(Default)]
struct Path {
    entries: [(u64, u64); 4],
    len: usize,
}

impl Path {
    fn push(&mut self, at: u64, value: u64) {
        self.entries[self.len & 3] = (at, value);
        self.len += 1;
    }
}

impl Paging {
    /// Whether entries have 64 bits.
    fn wide(&self) -> bool {
        self.long || self.pae
    }
}

impl Mmu {
    /// Translates `at` for `access` with the rights of the active bank, and enters what was found into
    /// the bank.
    ///
    /// # Errors
    /// The error code of the page fault.
    pub(super) fn fill(&mut self, at: u64, access: Access) -> Result<(), u32> {
        let kind = self.banks.kind();
        let Leaf { gpa, global, size } = self.walk(at, access, kind)?;
        let slot = self.phys.find(gpa);
        let slow = if access != Access::Execute && self.slow_data(at) { SLOW } else { 0 };
        let bank = self.banks.active_mut();
        let (table, flags) = match (access, slot) {
            (Access::Read, slot) => (&mut bank.read, if slot.is_some() { 0 } else { DEVICE }),
            (Access::Execute, slot) => {
                bank.displace_executed(at);
                (&mut bank.execute, if slot.is_some() { 0 } else { DEVICE })
            }
            (Access::Write, Some(slot)) if slot.writable => {
                slot.mark_dirty(gpa);
                let has_code = slot.code(gpa).is_some_and(|word| word.load(Ordering::SeqCst) != 0);
                (&mut bank.write, if has_code { CODE } else { 0 })
            }
            (Access::Write, _) => (&mut bank.write, DEVICE),
        };
        let host = slot.map_or(0, |slot| slot.host(gpa) as u64);
        table.set(at, flags | slow, host, gpa, global);
        bank.note_size(at, size);
        Ok(())
    }

    /// Translates `at` for the embedder: no rights are checked and nothing is changed.
    pub(in crate::soft) fn probe(&self, at: u64) -> Option<u64> {
        let mut path = Path::default();
        let leaf = self.descend(at, &mut path).ok()?;
        Some(leaf.0.gpa | at & !PAGE)
    }

    fn walk(&self, at: u64, access: Access, kind: usize) -> Result<Leaf, u32> {
        if !self.paging.on {
            return Ok(Leaf { gpa: at & PAGE, global: false, size: 12 });
        }
        let paging = &self.paging;
        let user = matches!(kind, tlb::USER | tlb::USER_ALIGNED);
        let fetch = access == Access::Execute;
        let code = if access == Access::Write { PF_WRITE } else { 0 }
            | if user { PF_USER } else { 0 }
            | if fetch && (paging.smep || paging.nx && paging.wide()) { PF_FETCH } else { 0 };
        loop {
            let mut path = Path::default();
            let (leaf, rights) = self.descend(at, &mut path).map_err(|extra| code | extra)?;
            let (writable, for_user) = (rights & WRITABLE != 0, rights & USER != 0);
            let allowed = if user {
                for_user && (access != Access::Write || writable)
            } else {
                let smap = for_user && paging.smap && kind == tlb::SUPERVISOR;
                match access {
                    Access::Read => !smap,
                    Access::Write => !smap && (writable || !paging.write_protect),
                    Access::Execute => !(for_user && paging.smep),
                }
            };
            if !allowed || fetch && rights & NO_EXECUTE != 0 {
                return Err(code | PF_PRESENT);
            }
            if self.mark(&path, access) {
                return Ok(leaf);
            }
        }
    }

    /// Goes down the tables. Returns the page and its rights: WRITABLE and USER where every level
    /// grants them, NO_EXECUTE where one refuses.
    fn descend(&self, at: u64, path: &mut Path) -> Result<(Leaf, u64), u32> {
        let paging = &self.paging;
        if !paging.on {
            return Ok((Leaf { gpa: at & PAGE, global: false, size: 12 }, WRITABLE | USER));
        }
        let (mut table, mut level) = if paging.long {
            (paging.cr3 & ADDRESS, 3)
        } else if paging.pae {
            let pdpte = paging.pdpte[(at >> 30) as usize & 3];
            if pdpte & PRESENT == 0 {
                return Err(0);
            }
            (pdpte & ADDRESS, 1)
        } else {
            (paging.cr3 & 0xffff_f000, 1)
        };
        let mut rights = WRITABLE | USER;
        loop {
            let (shift, entry_at) = if paging.wide() {
                let shift = 12 + 9 * level;
                (shift, table + (at >> shift & 0x1ff) * 8)
            } else {
                let shift = 12 + 10 * level;
                (shift, table + (at >> shift & 0x3ff) * 4)
            };
            let entry = self.entry(entry_at);
            if entry & PRESENT == 0 {
                return Err(0);
            }
            let large = level > 0 && entry & LARGE != 0 && (paging.wide() || paging.pse);
            let mut reserved = 0;
            if paging.wide() {
                reserved |= TOO_HIGH;
                // Outside of four-level paging the available bits below NX are reserved too.
                reserved |= if paging.nx { 0 } else { NO_EXECUTE };
                reserved |= if paging.long { 0 } else { 0x7ff << 52 };
                reserved |= if level == 3 { LARGE } else { 0 };
                reserved |= if large { (1 << shift) - (1 << 13) } else { 0 };
            } else if large {
                // PSE-36: bits 20:13 are the address's bits 39:32.
                reserved |= 1 << 21;
            }
            if entry & reserved != 0 {
                return Err(PF_PRESENT | PF_RESERVED);
            }
            path.push(entry_at, entry);
            rights = rights & entry | (rights | entry) & NO_EXECUTE;
            if level == 0 || large {
                let offset_mask = (1u64 << shift) - 1;
                let frame = if paging.wide() {
                    entry & ADDRESS & !offset_mask
                } else if large {
                    entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32
                } else {
                    entry & 0xffff_f000
                };
                let leaf = Leaf {
                    gpa: (frame | at & offset_mask) & PAGE,
                    global: entry & GLOBAL != 0,
                    size: shift as u32,
                };
                return Ok((leaf, rights));
            }
            table = if paging.wide() { entry & ADDRESS } else { entry & 0xffff_f000 };
            level -= 1;
        }
    }

    /// The entry at guest-physical `at`; one that is not in memory is not present.
    fn entry(&self, at: u64) -> u64 {
        let Some(slot) = self.phys.find(at) else { return 0 };
        if self.paging.wide() {
            // SAFETY: see `wide_entry`.
            unsafe { wide_entry(slot.host(at)) }.load(Ordering::Acquire)
        } else {
            // SAFETY: see `narrow_entry`.
            unsafe { narrow_entry(slot.host(at)) }.load(Ordering::Acquire).into()
        }
    }

    /// Sets the accessed flags along `path`, and the dirty flag of its last entry for a write. `false`
    /// where an entry has changed meanwhile and the walk must be made again.
    fn mark(&self, path: &Path, access: Access) -> bool {
        for n in 0..path.len {
            let (at, value) = path.entries[n & 3];
            let last = n + 1 == path.len;
            let wanted = value | ACCESSED | if last && access == Access::Write { DIRTY } else { 0 };
            if wanted == value {
                continue;
            }
            let Some(slot) = self.phys.find(at).filter(|slot| slot.writable) else { continue };
            let host = slot.host(at);
            slot.mark_dirty(at);
            let changed = if self.paging.wide() {
                // SAFETY: see `wide_entry`.
                let entry = unsafe { wide_entry(host) };
                entry.compare_exchange(value, wanted, Ordering::AcqRel, Ordering::Relaxed).is_ok()
            } else {
                // SAFETY: see `narrow_entry`.
                let entry = unsafe { narrow_entry(host) };
                let (value, wanted) = (value as u32, wanted as u32);
                entry.compare_exchange(value, wanted, Ordering::AcqRel, Ordering::Relaxed).is_ok()
            };
            if !changed {
                return false;
            }
        }
        true
    }

    /// Reads the four entries that PAE paging keeps in registers.
    pub(super) fn load_pdptes(&mut self) {
        if self.paging.on && self.paging.pae && !self.paging.long {
            let table = self.paging.cr3 & 0xffff_ffe0;
            self.paging.pdpte = [0, 8, 16, 24].map(|offset| self.entry(table + offset));
        }
    }

    /// Whether the PAE entries that CR3's value `cr3` names have reserved bits set: loading it is #GP.
    pub(in crate::soft) fn bad_pdptes(&self, cr3: u64) -> bool {
        const RESERVED: u64 = TOO_HIGH | 0xfff << 52 | 0x1e6;
        let table = cr3 & 0xffff_ffe0;
        [0, 8, 16, 24].into_iter().any(|offset| {
            let Some(slot) = self.phys.find(table + offset) else { return false };
            // SAFETY: see `wide_entry`.
            let entry = unsafe { wide_entry(slot.host(table + offset)) }.load(Ordering::Acquire);
            entry & PRESENT != 0 && entry & RESERVED != 0
        })
    }
}

/// The 8-byte entry at `host`.
///
/// # Safety
/// `host` is the host address of a naturally aligned entry in a slot's memory, and the slot outlives
/// the reference. Others change the entry at any time, but only by accesses that are atomic or
/// volatile.
unsafe fn wide_entry<'a>(host: *mut u8) -> &'a AtomicU64 {
    // SAFETY: the caller's promise; slots begin at page boundaries, so the alignment is the guest
    // address's.
    unsafe { AtomicU64::from_ptr(host.cast()) }
}

/// The 4-byte entry at `host`.
///
/// # Safety
/// As for [`wide_entry`].
unsafe fn narrow_entry<'a>(host: *mut u8) -> &'a AtomicU32 {
    // SAFETY: as in `wide_entry`.
    unsafe { AtomicU32::from_ptr(host.cast()) }
}
