//! The MADT: local APICs, I/O APIC, and how ISA interrupts are wired (ACPI 6.5, 5.2.12).

use zerocopy::{Immutable, IntoBytes};

use super::{AcpiConfig, IOAPIC, LAPIC, table};
use crate::boot::BootError;

/// Local APIC and x2APIC flags: enabled.
const ENABLED: u32 = 1;
/// MADT flags: there are two 8259A too.
const PCAT_COMPAT: u32 = 1;
/// Bus of interrupt source overrides: ISA.
const ISA: u8 = 0;
/// MPS INTI flags: as the bus has it; active high, level-triggered (ACPI 6.5, table 5.26).
const CONFORMS: u16 = 0;
const HIGH_LEVEL: u16 = 0b1101;
/// LINT1 is the NMI input on a PC.
const LINT1: u8 = 1;
/// Largest APIC id of a local APIC structure; 255 means all.
const MAX_XAPIC_ID: u32 = 254;

#[derive(IntoBytes, Immutable)]
#[repr(C, packed)]
struct LocalApic {
    kind: u8,
    len: u8,
    processor: u8,
    id: u8,
    flags: u32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C, packed)]
struct IoApic {
    kind: u8,
    len: u8,
    id: u8,
    reserved: u8,
    address: u32,
    gsi_base: u32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C, packed)]
struct SourceOverride {
    kind: u8,
    len: u8,
    bus: u8,
    source: u8,
    gsi: u32,
    flags: u16,
}

#[derive(IntoBytes, Immutable)]
#[repr(C, packed)]
struct LocalApicNmi {
    kind: u8,
    len: u8,
    processor: u8,
    flags: u16,
    lint: u8,
}

#[derive(IntoBytes, Immutable)]
#[repr(C, packed)]
struct LocalX2Apic {
    kind: u8,
    len: u8,
    reserved: u16,
    id: u32,
    flags: u32,
    processor: u32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C, packed)]
struct LocalX2ApicNmi {
    kind: u8,
    len: u8,
    flags: u16,
    processor: u32,
    lint: u8,
    reserved: [u8; 3],
}

/// The table's bytes.
pub(super) fn madt(config: &AcpiConfig<'_>) -> Result<Vec<u8>, BootError> {
    let address = |range: crate::memory::GpaRange| u32::try_from(range.base).unwrap_or(0);
    let mut body = [address(LAPIC).to_le_bytes(), PCAT_COMPAT.to_le_bytes()].concat();
    let mut x2apic = false;
    for (processor, &id) in (0u32..).zip(config.cpus) {
        match (u8::try_from(id), u8::try_from(processor)) {
            (Ok(id), Ok(processor)) if u32::from(id) <= MAX_XAPIC_ID && processor < u8::MAX => {
                body.extend_from_slice(
                    LocalApic { kind: 0, len: 8, processor, id, flags: ENABLED }.as_bytes(),
                );
            }
            _ => {
                x2apic = true;
                let entry = LocalX2Apic { kind: 9, len: 16, reserved: 0, id, flags: ENABLED, processor };
                body.extend_from_slice(entry.as_bytes());
            }
        }
    }
    // The I/O APIC's id is its own register's: 0 in KVM until the guest writes it.
    let ioapic = IoApic { kind: 1, len: 12, id: 0, reserved: 0, address: address(IOAPIC), gsi_base: 0 };
    body.extend_from_slice(ioapic.as_bytes());
    // Every ISA interrupt, the PIT's too, is wired to the pin of its number, as KVM has it.
    let mut overrides = Vec::new();
    if let Some(power) = config.power {
        let source = u8::try_from(power.sci).ok().filter(|&sci| sci < 16 && sci != 0 && sci != 2);
        let source = source.ok_or_else(|| BootError::Table {
            what: "the system control interrupt".into(),
            table: "MADT",
            value: format!("interrupt {}", power.sci),
            fix: "choose an ISA interrupt, 1 or 3 to 15; PCs have 9",
        })?;
        let entry = SourceOverride { kind: 2, len: 10, bus: ISA, source, gsi: power.sci, flags: HIGH_LEVEL };
        overrides.push(entry);
    }
    for entry in &overrides {
        body.extend_from_slice(entry.as_bytes());
    }
    let nmi = LocalApicNmi { kind: 4, len: 6, processor: u8::MAX, flags: CONFORMS, lint: LINT1 };
    body.extend_from_slice(nmi.as_bytes());
    if x2apic {
        let nmi = LocalX2ApicNmi {
            kind: 10,
            len: 12,
            flags: CONFORMS,
            processor: u32::MAX,
            lint: LINT1,
            reserved: [0; 3],
        };
        body.extend_from_slice(nmi.as_bytes());
    }
    Ok(table(*b"APIC", 5, &body))
}
