//! The state in which the first vCPU enters an image: descriptor table, page tables, registers.

use zerocopy::IntoBytes;

use super::BootError;
use super::place::Places;
use crate::memory::{GpaRange, GuestAddress, GuestMemory, PAGE_SIZE};
use crate::state::{DescriptorTable, Regs, Segment, Sregs};

/// Selector of the code segment, `__BOOT_CS` in the Linux boot protocol.
const CODE: u16 = 0x10;
/// Selector of the data segment, `__BOOT_DS` in the Linux boot protocol.
const DATA: u16 = 0x18;
/// Selector of the task-state segment.
const TASK: u16 = 0x20;

/// CR0.PE: protected mode; CR0.ET: always set (SDM vol. 3A, 2.5).
const CR0_PE_ET: u64 = 0x11;
/// CR0.PG: paging.
const CR0_PG: u64 = 1 << 31;
/// CR4.PAE: 64-bit page-table entries.
const CR4_PAE: u64 = 1 << 5;
/// EFER.LME and EFER.LMA: long mode enabled and active (SDM vol. 3A, 2.2.1).
const EFER_LME_LMA: u64 = 0x500;

/// Page-table entry bits: present, writable; and "this is a 2 MiB page" in a page directory
/// (SDM vol. 3A, 4.5.4).
const PRESENT_WRITABLE: u64 = 0x3;
const LARGE: u64 = 1 << 7;

/// Base memory, below the extended BIOS data area and without the first page.
pub(super) const LOW_MEMORY: GpaRange = GpaRange { base: 0x1000, len: 0x9_EC00 };
/// All addresses that 32-bit code reaches.
pub(super) const BELOW_4G: GpaRange = GpaRange { base: 0, len: 1 << 32 };

/// What to set on vCPU 0 before it first runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EntryState {
    /// General-purpose registers, RIP and RFLAGS.
    pub regs: Regs,
    /// Segments and control registers. [`EntryState::sregs_over`] keeps what is the vCPU's own.
    pub sregs: Sregs,
}

impl EntryState {
    /// [`EntryState::sregs`], with the APIC base and task priority of the vCPU as it was reset.
    pub fn sregs_over(&self, reset: &Sregs) -> Sregs {
        Sregs { apic_base: reset.apic_base, cr8: reset.cr8, ..self.sregs }
    }

    /// Real mode at linear address `entry` below 1 MiB, with SS 0 and SP `stack` (below 64 KiB).
    pub(super) fn real(entry: u32, stack: u16) -> Self {
        // The segment is a multiple of 64 KiB: 0000:7c00 for a boot sector, f000:fff0 for a BIOS.
        let selector = u16::try_from(entry >> 4 & 0xF000).unwrap_or(0);
        let data = Segment::real_mode(0, false);
        let sregs = Sregs {
            cs: Segment::real_mode(selector, true),
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            tr: task(0),
            ldt: no_ldt(),
            idt: DescriptorTable { base: 0, limit: 0x3ff },
            cr0: 0x10,
            ..Sregs::default()
        };
        let regs = Regs { rip: u64::from(entry & 0xFFFF), rsp: stack.into(), rflags: 2, ..Regs::default() };
        Self { regs, sregs }
    }

    /// 32-bit protected mode at `entry`, flat segments, no paging. Writes a descriptor table.
    pub(super) fn protected(
        entry: u32,
        memory: &GuestMemory,
        places: &mut Places,
    ) -> Result<Self, BootError> {
        let code = Segment::flat(CODE, true);
        let sregs = Sregs { cr0: CR0_PE_ET, ..flat(code, gdt(&code, memory, places)?) };
        let regs = Regs { rip: entry.into(), rflags: 2, ..Regs::default() };
        Ok(Self { regs, sregs })
    }

    /// 64-bit mode at `entry`, with an identity map of the first 4 GiB. Writes a descriptor table
    /// and page tables.
    pub(super) fn long(entry: u64, memory: &GuestMemory, places: &mut Places) -> Result<Self, BootError> {
        let code = Segment::long_code(CODE);
        let sregs = Sregs {
            cr0: CR0_PE_ET | CR0_PG,
            cr3: identity_map(memory, places)?,
            cr4: CR4_PAE,
            efer: EFER_LME_LMA,
            ..flat(code, gdt(&code, memory, places)?)
        };
        let regs = Regs { rip: entry, rflags: 2, ..Regs::default() };
        Ok(Self { regs, sregs })
    }
}

/// Sregs with flat data segments, `code` and an empty IDT.
fn flat(code: Segment, gdt: DescriptorTable) -> Sregs {
    let data = Segment::flat(DATA, false);
    Sregs {
        cs: code,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: task(TASK),
        ldt: no_ldt(),
        gdt,
        ..Sregs::default()
    }
}

/// A busy task-state segment: VMX demands one (SDM vol. 3C, 27.3.1.2).
fn task(selector: u16) -> Segment {
    Segment { selector, limit: 0x67, kind: 0xb, present: true, ..Segment::default() }
}

fn no_ldt() -> Segment {
    Segment { kind: 2, unusable: true, ..Segment::default() }
}

/// A segment in the layout of the descriptor table (SDM vol. 3A, 3.4.5).
fn descriptor(segment: &Segment) -> u64 {
    let limit = u64::from(if segment.granular { segment.limit >> 12 } else { segment.limit });
    let access = u64::from(segment.kind & 0xf)
        | u64::from(segment.code_or_data) << 4
        | u64::from(segment.dpl & 3) << 5
        | u64::from(segment.present) << 7
        | u64::from(segment.available) << 12
        | u64::from(segment.long) << 13
        | u64::from(segment.big) << 14
        | u64::from(segment.granular) << 15;
    let base = segment.base;
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | (base >> 24 & 0xff) << 56
}

/// Writes a descriptor table with `code` and flat data.
fn gdt(code: &Segment, memory: &GuestMemory, places: &mut Places) -> Result<DescriptorTable, BootError> {
    let table = [0, 0, descriptor(code), descriptor(&Segment::flat(DATA, false)), descriptor(&task(TASK)), 0];
    let bytes = table.as_bytes();
    let base = place(places, "the descriptor table", bytes.len() as u64, 16)?;
    store(memory, "the descriptor table", base, bytes)?;
    Ok(DescriptorTable { base, limit: 6 * 8 - 1 })
}

/// Writes page tables that map the first 4 GiB to themselves, in 2 MiB pages: a vCPU may lack
/// 1 GiB pages. Returns CR3.
fn identity_map(memory: &GuestMemory, places: &mut Places) -> Result<u64, BootError> {
    const WHAT: &str = "the page tables";
    let pml4 = place(places, WHAT, 6 * PAGE_SIZE, PAGE_SIZE)?;
    let pdpt = pml4 + PAGE_SIZE;
    let directories = pdpt + PAGE_SIZE;
    let mut tables = vec![0u64; 6 * 512];
    tables[0] = pdpt | PRESENT_WRITABLE;
    for (entry, directory) in tables[512..516].iter_mut().zip((directories..).step_by(4096)) {
        *entry = directory | PRESENT_WRITABLE;
    }
    for (entry, page) in tables[1024..].iter_mut().zip((0u64..).step_by(2 << 20)) {
        *entry = page | PRESENT_WRITABLE | LARGE;
    }
    store(memory, WHAT, pml4, tables.as_bytes())?;
    Ok(pml4)
}

/// A place for a small structure: in base memory, or anywhere below 4 GiB where an image fills that.
pub(super) fn place(places: &mut Places, what: &str, len: u64, align: u64) -> Result<u64, BootError> {
    places.lowest(what, len, align, LOW_MEMORY).or_else(|_| places.lowest(what, len, align, BELOW_4G))
}

/// Writes `bytes` of `what` to guest memory.
pub(super) fn store(
    memory: &GuestMemory,
    what: &'static str,
    at: u64,
    bytes: &[u8],
) -> Result<(), BootError> {
    memory.write(GuestAddress(at), bytes).map_err(|source| BootError::Memory { what: what.into(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::MemoryLayout;
    use crate::memory::MemoryRegion;

    #[test]
    fn descriptors_have_the_manuals_layout() {
        assert_eq!(descriptor(&Segment::flat(CODE, true)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&Segment::flat(DATA, false)), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&Segment::long_code(CODE)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&task(TASK)), 0x0000_8b00_0000_0067);
    }

    #[test]
    fn the_identity_map_translates_every_page_to_itself() {
        let memory = GuestMemory::new();
        memory.insert(MemoryRegion::anonymous(GuestAddress(0), 1 << 20).unwrap().into()).unwrap();
        let mut places = Places::new(&MemoryLayout::pc(1 << 20));
        let cr3 = EntryState::long(0, &memory, &mut places).unwrap().sregs.cr3;
        let entry = |table: u64, index: u64| -> u64 { memory.load(GuestAddress(table + index * 8)).unwrap() };
        for gva in [0, 0x20_0000, 0x1234_5678, 0x4000_0000, 0xffff_ffff] {
            let pdpt = entry(cr3, gva >> 39) & !0xfff;
            let directory = entry(pdpt, gva >> 30 & 511) & !0xfff;
            let leaf = entry(directory, gva >> 21 & 511);
            assert_eq!(leaf, gva >> 21 << 21 | 0x83);
        }
        assert_eq!(entry(cr3, 1), 0);
    }

    #[test]
    fn real_mode_entries_add_up() {
        for entry in [0x7c00, 0xffff0, 0x12345] {
            let state = EntryState::real(entry, 0x1000);
            assert_eq!(state.sregs.cs.base + state.regs.rip, u64::from(entry));
        }
    }
}
