//! Where things are in the guest-physical address space of a PC. Addresses and lengths are bytes.

use crate::memory::{GpaRange, PAGE_SIZE};

/// Where the hole below 4 GiB begins: RAM ends here and goes on at 4 GiB. Bytes.
pub const HOLE_BASE: u64 = 0xC000_0000;
/// First address above 4 GiB.
pub const HIGH_RAM_BASE: u64 = 1 << 32;
/// Windows of virtio-mmio and other small devices, 0x1000 bytes each by convention.
pub const MMIO_DEVICES: GpaRange = GpaRange { base: 0xD000_0000, len: 0x1000_0000 };
/// Memory that PCI functions' 32-bit BARs are given from.
pub const PCI_WINDOW: GpaRange = GpaRange { base: 0xC000_0000, len: 0x1000_0000 };
/// Interrupts of PCI pins INTA to INTD, as [`PciHost::gsis`](super::acpi::PciHost::gsis): ISA ones, so that
/// guests without a description of the I/O APIC get them from the 8259As.
pub const PCI_GSIS: [u32; 4] = [10, 11, 5, 10];
/// PCI Express enhanced configuration space: 1 MiB for each of 256 buses.
pub const ECAM: GpaRange = GpaRange { base: 0xE000_0000, len: 0x1000_0000 };
/// The first I/O APIC (Intel 82093AA data sheet).
pub const IOAPIC: GpaRange = GpaRange { base: 0xFEC0_0000, len: 0x1000 };
/// The local APICs (SDM vol. 3A, 11.4.1).
pub const LAPIC: GpaRange = GpaRange { base: 0xFEE0_0000, len: 0x1000 };
/// One page of identity map and three of TSS that KVM wants for real mode on Intel hosts
/// (`KVM_SET_IDENTITY_MAP_ADDR`, `KVM_SET_TSS_ADDR`).
pub const KVM_PAGES: GpaRange = GpaRange { base: 0xFFFB_C000, len: 4 * PAGE_SIZE };
/// The BIOS data area, 256 bytes that firmware leaves for programs (IBM PC/AT Technical Reference).
pub const BIOS_DATA: GpaRange = GpaRange { base: 0x400, len: 0x100 };
/// The extended BIOS data area, at the end of base memory.
pub const EBDA: GpaRange = GpaRange { base: 0x9_FC00, len: 0x400 };
/// Video memory and option ROMs: never given out as RAM.
pub const VIDEO: GpaRange = GpaRange { base: 0xA_0000, len: 0x4_0000 };
/// Where ACPI tables go; the RSDP is at the beginning. Guests scan here (ACPI 6.5, 5.2.5.1).
pub const ACPI_TABLES: GpaRange = GpaRange { base: 0xE_0000, len: 0x1_0000 };
/// Where the MP table goes; guests scan here (MultiProcessor Specification 1.4, 4).
pub const MP_TABLE: GpaRange = GpaRange { base: 0xF_0000, len: 0xF000 };
/// Interrupt services for images that begin in real mode.
pub const BIOS_SERVICES: GpaRange = GpaRange { base: 0xF_F000, len: 0x1000 };
/// Where memory begins that is not the PC's first mebibyte.
pub const ONE_MIB: u64 = 0x10_0000;

/// What a range is, in the numbering of the BIOS's E820 call (ACPI 6.5, table 15.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum E820Kind {
    /// Usable memory.
    Ram = 1,
    /// Neither memory nor free: devices, firmware.
    Reserved = 2,
    /// ACPI tables, memory after they have been read.
    Acpi = 3,
    /// ACPI data to be kept over sleep.
    AcpiNvs = 4,
}

/// One entry of the memory map that guests get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct E820Entry {
    /// The addresses.
    pub range: GpaRange,
    /// What they are.
    pub kind: E820Kind,
}

/// Which guest-physical addresses are RAM and which the guest must leave alone.
///
/// Loaders place images in RAM beside what is reserved, and build the guest's memory map from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryLayout {
    ram: Vec<GpaRange>,
    reserved: Vec<(GpaRange, E820Kind, &'static str)>,
}

impl MemoryLayout {
    /// The layout of a PC with `bytes` of RAM: from 0 up to the hole below 4 GiB, the rest above
    /// 4 GiB; firmware areas and KVM's pages reserved.
    pub fn pc(bytes: u64) -> Self {
        Self::new(ram_ranges(bytes))
    }

    /// A PC with RAM at `ram`.
    pub fn new(ram: Vec<GpaRange>) -> Self {
        let mut layout = Self::bare(ram);
        for (range, what) in [
            (BIOS_DATA, "the BIOS data area"),
            (EBDA, "the extended BIOS data area"),
            (VIDEO, "the video memory area"),
            (ACPI_TABLES, "the ACPI table area"),
            (MP_TABLE, "the MP table area"),
            (BIOS_SERVICES, "the BIOS services"),
            (KVM_PAGES, "KVM's real-mode pages"),
        ] {
            layout.reserve(range, E820Kind::Reserved, what);
        }
        layout
    }

    /// RAM at `ram` and nothing reserved, for images that bring their own machine with them.
    pub fn bare(mut ram: Vec<GpaRange>) -> Self {
        ram.sort_by_key(|range| range.base);
        ram.dedup_by(|next, last| {
            let adjacent = last.end() == Some(next.base);
            if adjacent {
                last.len += next.len;
            }
            adjacent
        });
        Self { ram, reserved: Vec::new() }
    }

    /// Keeps images away from `range` and shows it to the guest as `kind`. `what` names it in errors.
    pub fn reserve(&mut self, range: GpaRange, kind: E820Kind, what: &'static str) {
        self.reserved.push((range, kind, what));
    }

    /// The ranges of RAM, sorted by base, neighbours joined.
    pub fn ram(&self) -> &[GpaRange] {
        &self.ram
    }

    /// What is reserved: the range, its kind and its name.
    pub fn reserved(&self) -> &[(GpaRange, E820Kind, &'static str)] {
        &self.reserved
    }

    /// The guest's memory map: RAM without what is reserved, and what is reserved, sorted, without
    /// overlaps. The first page counts as RAM though it holds the BIOS data area, as on any PC.
    pub fn e820(&self) -> Vec<E820Entry> {
        let reserved = self.reserved.iter().filter(|(range, ..)| *range != BIOS_DATA);
        let mut entries: Vec<E820Entry> =
            reserved.clone().map(|&(range, kind, _)| E820Entry { range, kind }).collect();
        for ram in &self.ram {
            let mut next = ram.base;
            let end = ram.base.saturating_add(ram.len);
            let mut holes: Vec<_> = reserved.clone().map(|(range, ..)| *range).collect();
            holes.sort_by_key(|hole| hole.base);
            for hole in holes {
                if hole.base >= end || hole.base.saturating_add(hole.len) <= next {
                    continue;
                }
                if hole.base > next {
                    let range = GpaRange { base: next, len: hole.base - next };
                    entries.push(E820Entry { range, kind: E820Kind::Ram });
                }
                next = hole.base.saturating_add(hole.len);
            }
            if next < end {
                let range = GpaRange { base: next, len: end - next };
                entries.push(E820Entry { range, kind: E820Kind::Ram });
            }
        }
        entries.sort_by_key(|entry| entry.range.base);
        entries.dedup_by(|next, last| {
            let adjacent = last.kind == next.kind && last.range.end() == Some(next.range.base);
            if adjacent {
                last.range.len += next.range.len;
            }
            adjacent
        });
        entries
    }

    /// All RAM in bytes.
    pub fn total_ram(&self) -> u64 {
        self.ram.iter().fold(0, |sum: u64, range| sum.saturating_add(range.len))
    }
}

/// Where `bytes` of RAM go: from 0 to the hole below 4 GiB ([`HOLE_BASE`]), the rest above 4 GiB.
pub fn ram_ranges(bytes: u64) -> Vec<GpaRange> {
    let low = bytes.min(HOLE_BASE);
    let high = bytes - low;
    let mut ranges = Vec::new();
    if low > 0 {
        ranges.push(GpaRange { base: 0, len: low });
    }
    if high > 0 {
        ranges.push(GpaRange { base: HIGH_RAM_BASE, len: high });
    }
    ranges
}
