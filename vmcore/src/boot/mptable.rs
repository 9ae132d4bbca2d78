//! The MP table (Intel MultiProcessor Specification 1.4): what guests without ACPI ("acpi=off")
//! learn about CPUs and interrupts.

use zerocopy::{Immutable, IntoBytes};

use super::BootError;
use super::acpi::PciHost;
use super::layout::{IOAPIC, LAPIC, MP_TABLE};
use crate::memory::{GuestAddress, GuestMemory};

/// Version 1.4 of the specification.
const REVISION: u8 = 4;
/// Version field of an integrated APIC.
const APIC_VERSION: u8 = 0x14;
/// Version of the 82093AA.
const IOAPIC_VERSION: u8 = 0x11;
/// Family 6: any CPU of today. Guests read CPUID instead.
const SIGNATURE: u32 = 0x600;
/// CPUID.1:EDX bits for FPU and APIC (MP 1.4, table 4-6).
const FEATURES: u32 = 0x201;
/// The feature byte that says the machine begins in virtual-wire mode, without IMCR.
const VIRTUAL_WIRE: u8 = 0;

/// Entry types (MP 1.4, table 4-3).
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

/// Interrupt types (MP 1.4, table 4-11).
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;

/// Polarity and trigger (MP 1.4, table 4-10): as the bus has it; active high and level.
const CONFORMS: u16 = 0;
const HIGH_LEVEL: u16 = 0b1101;

/// PCI buses have the numbers that configuration space gives them (MP 1.4, D.3).
const PCI_BUS: u8 = 0;
/// All local APICs.
const EVERY: u8 = 0xff;

#[derive(IntoBytes, Immutable)]
#[repr(C, packed)]
struct FloatingPointer {
    signature: [u8; 4],
    table: u32,
    /// In units of 16 bytes.
    len: u8,
    revision: u8,
    checksum: u8,
    features: [u8; 5],
}

#[derive(IntoBytes, Immutable)]
#[repr(C, packed)]
struct Header {
    signature: [u8; 4],
    len: u16,
    revision: u8,
    checksum: u8,
    oem: [u8; 8],
    product: [u8; 12],
    oem_table: u32,
    oem_table_len: u16,
    entries: u16,
    lapic: u32,
    extended_len: u16,
    extended_checksum: u8,
    reserved: u8,
}

#[derive(IntoBytes, Immutable)]
#[repr(C, packed)]
struct Processor {
    kind: u8,
    id: u8,
    version: u8,
    flags: u8,
    signature: u32,
    features: u32,
    reserved: [u32; 2],
}

#[derive(IntoBytes, Immutable)]
#[repr(C, packed)]
struct Bus {
    kind: u8,
    id: u8,
    name: [u8; 6],
}

#[derive(IntoBytes, Immutable)]
#[repr(C, packed)]
struct IoApic {
    kind: u8,
    id: u8,
    version: u8,
    flags: u8,
    address: u32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C, packed)]
struct Interrupt {
    kind: u8,
    what: u8,
    flags: u16,
    bus: u8,
    source: u8,
    apic: u8,
    pin: u8,
}

/// Writes the table to `memory` from `at` (16-byte aligned): the floating pointer, then the table.
/// Guests find it where `at` is in [`MP_TABLE`]. `cpus` are the APIC ids, the bootstrap processor
/// first; the table can name ids up to 254 only, and leaves out the rest. `levels` are the ISA
/// interrupts that are level-triggered and active high (the ACPI interrupt, 9). `pci` is the PCI host
/// bridge, if there is one: its interrupts are not ISA ones then.
///
/// # Errors
/// [`BootError::Table`] without a CPU that can be named, or for a misplaced table.
pub fn build_table(
    cpus: &[u32],
    levels: &[u8],
    pci: Option<&PciHost>,
    at: GuestAddress,
    memory: &GuestMemory,
) -> Result<(), BootError> {
    let refused =
        |value: String, fix| BootError::Table { what: "the machine".into(), table: "MP table", value, fix };
    let cpus: Vec<u8> =
        cpus.iter().filter_map(|&id| u8::try_from(id).ok().filter(|&id| id < EVERY)).collect();
    if cpus.is_empty() {
        return Err(refused("no CPU with an APIC id below 255".into(), "give the boot CPU APIC id 0"));
    }
    let pointer = size_of::<FloatingPointer>() as u64;
    let base = u32::try_from(at.0 + pointer)
        .ok()
        .filter(|_| at.0.is_multiple_of(16))
        .ok_or_else(|| refused(format!("address {at:?}"), "put it on a multiple of 16 below 4 GiB"))?;
    let table = table(&cpus, levels, pci);
    if at.0 == MP_TABLE.base && pointer + table.len() as u64 > MP_TABLE.len {
        return Err(refused(format!("{:#x} bytes", table.len()), "leave the table out"));
    }
    let mut floating = FloatingPointer {
        signature: *b"_MP_",
        table: base,
        len: 1,
        revision: REVISION,
        checksum: 0,
        features: [0, VIRTUAL_WIRE, 0, 0, 0],
    };
    floating.checksum = checksum(floating.as_bytes());
    let bytes = [floating.as_bytes(), &table].concat();
    super::entry::store(memory, "the MP table", at.0, &bytes)
}

/// The configuration table (MP 1.4, 4.2).
fn table(cpus: &[u8], levels: &[u8], pci: Option<&PciHost>) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut count = 0;
    let mut add = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };
    for (index, &id) in cpus.iter().enumerate() {
        // Enabled; the first is the bootstrap processor.
        let flags = if index == 0 { 0b11 } else { 0b01 };
        let entry = Processor {
            kind: PROCESSOR,
            id,
            version: APIC_VERSION,
            flags,
            signature: SIGNATURE,
            features: FEATURES,
            reserved: [0; 2],
        };
        add(entry.as_bytes());
    }
    let isa = u8::from(pci.is_some());
    if pci.is_some() {
        add(Bus { kind: BUS, id: PCI_BUS, name: *b"PCI   " }.as_bytes());
    }
    add(Bus { kind: BUS, id: isa, name: *b"ISA   " }.as_bytes());
    // Any id that no CPU has; KVM's I/O APIC takes the one that the guest writes.
    let ioapic = (0..EVERY).find(|id| !cpus.contains(id)).unwrap_or(0);
    let address = u32::try_from(IOAPIC.base).unwrap_or(0);
    add(IoApic { kind: IO_APIC, id: ioapic, version: IOAPIC_VERSION, flags: 1, address }.as_bytes());
    // Each is on the pin of its number, the PIT's too, as KVM has it; 2 is the cascade of the 8259A.
    let of_pci = |irq: u8| pci.is_some_and(|pci| pci.gsis.contains(&irq.into()));
    for source in (0..16).filter(|&source| source != 2 && !of_pci(source)) {
        let flags = if levels.contains(&source) { HIGH_LEVEL } else { CONFORMS };
        let (kind, pin) = (IO_INTERRUPT, source);
        add(Interrupt { kind, what: INT, flags, bus: isa, source, apic: ioapic, pin }.as_bytes());
    }
    for (slot, input, gsi) in pci.into_iter().flat_map(PciHost::interrupts) {
        let Ok(pin) = u8::try_from(gsi) else { continue };
        // Bits 2 to 6 are the slot, 0 and 1 the pin (MP 1.4, table D-3).
        let (kind, flags, source) = (IO_INTERRUPT, HIGH_LEVEL, slot << 2 | input);
        add(Interrupt { kind, what: INT, flags, bus: PCI_BUS, source, apic: ioapic, pin }.as_bytes());
    }
    for (what, pin) in [(EXT_INT, 0), (NMI, 1)] {
        let kind = LOCAL_INTERRUPT;
        add(Interrupt { kind, what, flags: CONFORMS, bus: isa, source: 0, apic: EVERY, pin }.as_bytes());
    }
    let len = size_of::<Header>() + entries.len();
    let mut header = Header {
        signature: *b"PCMP",
        // 254 CPUs take 5,080 bytes, PCI 1,024.
        len: u16::try_from(len).unwrap_or(u16::MAX),
        revision: REVISION,
        checksum: 0,
        oem: *b"VMCORE  ",
        product: *b"VMCORE PC   ",
        oem_table: 0,
        oem_table_len: 0,
        entries: count,
        lapic: u32::try_from(LAPIC.base).unwrap_or(0),
        extended_len: 0,
        extended_checksum: 0,
        reserved: 0,
    };
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(&entries);
    header.checksum = checksum(&bytes);
    bytes[..size_of::<Header>()].copy_from_slice(header.as_bytes());
    bytes
}

/// What makes the sum of all bytes 0.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryRegion;

    #[test]
    fn the_table_names_cpus_pins_and_sums_to_zero() {
        let memory = GuestMemory::new();
        memory.insert(MemoryRegion::anonymous(GuestAddress(0), 1 << 20).unwrap().into()).unwrap();
        let at = GuestAddress(MP_TABLE.base);
        build_table(&[0, 1, 300], &[9], None, at, &memory).unwrap();
        let mut bytes = [0; 2048];
        memory.read(at, &mut bytes).unwrap();
        assert_eq!(&bytes[..4], b"_MP_");
        assert_eq!(checksum(&bytes[..16]), 0);
        let table = &bytes[16..];
        assert_eq!(&table[..4], b"PCMP");
        let len = usize::from(u16::from_le_bytes([table[4], table[5]]));
        assert_eq!(checksum(&table[..len]), 0);
        let (mut rest, mut kinds, mut pins) = (&table[44..len], [0; 5], vec![]);
        while let [kind, ..] = *rest {
            kinds[usize::from(kind)] += 1;
            if kind == IO_INTERRUPT {
                pins.push((rest[5], rest[7], rest[2]));
            }
            rest = &rest[if kind == PROCESSOR { 20 } else { 8 }..];
        }
        assert_eq!(kinds, [2, 1, 1, 15, 2]);
        assert_eq!(u16::from_le_bytes([table[34], table[35]]), 21);
        assert!(pins.contains(&(0, 0, 0)) && pins.contains(&(9, 9, 0b1101)) && pins.contains(&(4, 4, 0)));
    }

    #[test]
    fn pci_pins_have_their_own_entries_and_no_isa_ones() {
        let range = crate::memory::GpaRange { base: 0xe000_0000, len: 1 << 20 };
        let gsis = [10, 11, 5, 10];
        let pci = PciHost { ecam: range, last_bus: 0, memory: vec![], ports: None, gsis };
        let table = table(&[0], &[9], Some(&pci));
        assert_eq!(checksum(&table), 0);
        let (mut rest, mut pins, mut buses) = (&table[44..], vec![], vec![]);
        while let [kind, ..] = *rest {
            match kind {
                BUS => buses.push((rest[1], &rest[2..5])),
                IO_INTERRUPT => pins.push((rest[4], rest[5], rest[7], rest[2])),
                _ => {}
            }
            rest = &rest[if kind == PROCESSOR { 20 } else { 8 }..];
        }
        assert_eq!(buses, [(0, &b"PCI"[..]), (1, &b"ISA"[..])]);
        assert_eq!(pins.len(), 12 + 128);
        // Slot 3, INTB.
        assert!(pins.contains(&(0, 3 << 2 | 1, 10, 0b1101)) && pins.contains(&(1, 9, 9, 0b1101)));
        assert!(!pins.iter().any(|&(bus, source, ..)| bus == 1 && [5, 10, 11].contains(&source)));
    }

    #[test]
    fn a_misplaced_table_or_one_without_a_cpu_is_refused() {
        let memory = GuestMemory::new();
        for (cpus, at) in [(&[][..], 0xf_0000), (&[300], 0xf_0000), (&[0], 0xf_0001), (&[0], 1 << 32)] {
            let error = build_table(cpus, &[], None, GuestAddress(at), &memory).unwrap_err();
            assert!(matches!(error, BootError::Table { .. }), "{error}");
        }
    }
}
