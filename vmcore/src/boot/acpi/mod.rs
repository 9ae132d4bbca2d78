//! ACPI tables (Advanced Configuration and Power Interface Specification 6.5): RSDP, XSDT, FADT,
//! FACS, MADT, MCFG and a DSDT that names the devices.
//!
//! The hardware described is a PC's in ACPI mode from the start (there is no SMI command), with
//! its legacy devices: two 8259A, an 8254, an RTC, an 8042.

mod dsdt;
mod madt;
#[cfg(test)]
mod tests;

use acpi_tables::Aml;
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADT, FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use super::BootError;
use super::layout::{ACPI_TABLES, IOAPIC, LAPIC};
use crate::memory::{GpaRange, GuestAddress, GuestMemory};

/// Where in the RTC's memory the century is, in BCD as the clock's other numbers may be (ACPI 6.5,
/// table 5.9, CENTURY). The tables say so; a clock has to keep to it.
pub const RTC_CENTURY: u8 = 0x32;

const OEM: [u8; 6] = *b"VMCORE";
const OEM_TABLE: [u8; 8] = *b"VMCOREPC";
const OEM_REVISION: u32 = 1;

/// What the tables say about the machine.
#[derive(Clone, Copy, Debug)]
pub struct AcpiConfig<'a> {
    /// Numbers of all vCPUs, which are their APICs' ids, the bootstrap processor first.
    pub cpus: &'a [u32],
    /// Devices to be named in the DSDT.
    pub devices: &'a [AcpiDevice],
    /// Where the power-management registers are; without them the guest cannot power off by ACPI.
    pub power: Option<&'a PowerPorts>,
    /// The PCI host bridge, if there is one.
    pub pci: Option<&'a PciHost>,
    /// There is an 8042 keyboard controller, and the guest shall look for a keyboard.
    pub i8042: bool,
    /// There is an RTC with CMOS memory, which has the century at [`RTC_CENTURY`].
    pub rtc: bool,
    /// There is VGA-compatible display hardware to probe for.
    pub vga: bool,
}

/// A device's hardware id (ACPI 6.5, 6.1.5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AcpiHid {
    /// A string: "LNRO0005" (virtio-mmio), "ACPI0010".
    Text(String),
    /// An EISA id: "PNP0501" (16550 UART).
    Eisa(String),
}

/// Something a device occupies (ACPI 6.5, 6.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AcpiResource {
    /// Guest-physical addresses.
    Memory {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u32,
    },
    /// I/O ports.
    Ports {
        /// First port.
        base: u16,
        /// How many ports.
        len: u16,
    },
    /// An interrupt.
    Irq {
        /// Its global system interrupt, numbered as [`IrqSink`](crate::IrqSink) says.
        gsi: u32,
        /// Level-triggered (`true`) or edge-triggered.
        level: bool,
        /// Whether other devices may use it too.
        shared: bool,
    },
}

/// A device that the guest shall find in the DSDT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiDevice {
    /// Four upper-case characters, unique in the machine: "COM1", "VR00".
    pub name: String,
    /// Hardware id.
    pub hid: AcpiHid,
    /// Distinguishes devices with the same hardware id.
    pub uid: u32,
    /// What it occupies.
    pub resources: Vec<AcpiResource>,
}

/// Where the ACPI fixed hardware and the reset register are (ACPI 6.5, 4.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PowerPorts {
    /// PM1a event block: 4 bytes of ports.
    pub pm1_event: u16,
    /// PM1a control block: 2 bytes of ports.
    pub pm1_control: u16,
    /// PM timer, 4 bytes of ports, 3.579545 MHz.
    pub pm_timer: Option<u16>,
    /// Global system interrupt of the SCI: an ISA one, 1 or 3 to 15; level, active high.
    pub sci: u32,
    /// The reset register: an I/O port.
    pub reset_port: u16,
    /// The value that resets.
    pub reset_value: u8,
    /// The value of SLP_TYP for S5: 3 bits.
    pub s5_type: u8,
}

/// A PCI Express host bridge with one segment (PCI Firmware Specification 3.3, 4.1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciHost {
    /// Enhanced configuration space: 1 MiB a bus, beginning with bus 0.
    pub ecam: GpaRange,
    /// Last bus number.
    pub last_bus: u8,
    /// Windows of memory for BARs.
    pub memory: Vec<GpaRange>,
    /// I/O ports for BARs: first and last. Ports 0xCF8 to 0xCFF are the bridge's own.
    pub ports: Option<(u16, u16)>,
    /// Interrupts of pins INTA to INTD of slot `n`: pin `p` has GSI `gsis[(n + p) % 4]`. Level, active
    /// high.
    pub gsis: [u32; 4],
}

impl PciHost {
    /// The interrupt of every pin: slot, pin (0 to 3), global system interrupt.
    pub(crate) fn interrupts(&self) -> impl Iterator<Item = (u8, u8, u32)> {
        (0..32u8).flat_map(move |slot| (0..4u8).map(move |pin| (slot, pin, self.gsi(slot, pin))))
    }

    /// The global system interrupt of `pin` (0 to 3 for INTA to INTD) of `slot`.
    pub fn gsi(&self, slot: u8, pin: u8) -> u32 {
        self.gsis[(usize::from(slot) + usize::from(pin)) % 4]
    }
}

/// Writes the tables to `memory` from `at` (16-byte aligned) and returns the address of the RSDP,
/// which is `at`. Guests find it by themselves where `at` is in [`ACPI_TABLES`].
///
/// # Errors
/// [`BootError::Table`] for a device that cannot be described, or tables that do not fit their area.
pub fn build_tables(
    config: &AcpiConfig<'_>,
    at: GuestAddress,
    memory: &GuestMemory,
) -> Result<GuestAddress, BootError> {
    let bytes = tables(config, at.0)?;
    if ACPI_TABLES.base == at.0 && bytes.len() as u64 > ACPI_TABLES.len {
        return Err(BootError::Table {
            what: format!("{} devices and {} vCPUs", config.devices.len(), config.cpus.len()),
            table: "ACPI table area",
            value: format!("{:#x} bytes, the area has {:#x}", bytes.len(), ACPI_TABLES.len),
            fix: "put the tables elsewhere, into reserved memory",
        });
    }
    super::entry::store(memory, "the ACPI tables", at.0, &bytes)?;
    Ok(at)
}

/// All tables, laid out from address `at`: the RSDP first.
fn tables(config: &AcpiConfig<'_>, at: u64) -> Result<Vec<u8>, BootError> {
    if !at.is_multiple_of(16) || at > u64::from(u32::MAX) - (1 << 20) {
        return Err(BootError::Table {
            what: "the RSDP".into(),
            table: "ACPI table area",
            value: format!("{at:#x}"),
            fix: "put it on a multiple of 16 below 4 GiB",
        });
    }
    let mut area = Area { base: at, bytes: vec![0; Rsdp::len()] };
    let facs = area.add(&FACS::new(), 64);
    let dsdt = area.add_bytes(&dsdt::dsdt(config)?, 16);
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(area.add(&fadt(config, facs, dsdt), 16));
    xsdt.add_entry(area.add_bytes(&madt::madt(config)?, 16));
    if let Some(pci) = config.pci {
        let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
        mcfg.add_ecam(pci.ecam.base, 0, 0, pci.last_bus);
        xsdt.add_entry(area.add(&mcfg, 16));
    }
    let xsdt = area.add(&xsdt, 16);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    area.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    Ok(area.bytes)
}

/// A table of `body` with its header and checksum.
fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    /// Length of the header in bytes.
    const HEADER: u32 = 36;
    let mut table = Sdt::new(signature, HEADER, revision, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(body);
    table.as_slice().to_vec()
}

/// Tables one behind the other.
struct Area {
    base: u64,
    bytes: Vec<u8>,
}

impl Area {
    /// Appends `table`, `align`-ed, and returns its address.
    fn add(&mut self, table: &dyn Aml, align: usize) -> u64 {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        self.add_bytes(&bytes, align)
    }

    fn add_bytes(&mut self, bytes: &[u8], align: usize) -> u64 {
        let base = usize::try_from(self.base % 64).unwrap_or(0);
        let start = (base + self.bytes.len()).next_multiple_of(align) - base;
        self.bytes.resize(start, 0);
        self.bytes.extend_from_slice(bytes);
        self.base + start as u64
    }
}

/// IAPC_BOOT_ARCH (ACPI 6.5, table 5.11).
const LEGACY_DEVICES: u16 = 1 << 0;
const I8042: u16 = 1 << 1;
const VGA_NOT_PRESENT: u16 = 1 << 2;
const CMOS_RTC_NOT_PRESENT: u16 = 1 << 5;

fn fadt(config: &AcpiConfig<'_>, facs: u64, dsdt: u64) -> FADT {
    let mut arch = LEGACY_DEVICES;
    for (flag, set) in
        [(I8042, config.i8042), (VGA_NOT_PRESENT, !config.vga), (CMOS_RTC_NOT_PRESENT, !config.rtc)]
    {
        if set {
            arch |= flag;
        }
    }
    // Addresses below 4 GiB, checked by the caller, go into the 32-bit fields, which every guest
    // reads; ACPICA warns where both are there.
    let low = |address: u64| u32::try_from(address).unwrap_or(0);
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_32(low(dsdt))
        .firmware_ctrl_32(low(facs))
        .preferred_pm_profile(PmProfile::Unspecified)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = arch.into();
    // No C2 and no C3 (ACPI 6.5, table 5.9).
    fadt.p_lvl2_lat = 0xfff.into();
    fadt.p_lvl3_lat = 0xfff.into();
    if config.rtc {
        fadt.century = RTC_CENTURY;
    } else {
        fadt = fadt.flag(Flags::FixRtc);
    }
    if let Some(power) = config.power {
        let port = |bits, size, port: u16| GAS::new(AddressSpace::SystemIo, bits, 0, size, port.into());
        fadt.sci_int = u16::try_from(power.sci).unwrap_or(0).into();
        fadt.pm1a_evt_blk = u32::from(power.pm1_event).into();
        fadt.pm1_evt_len = 4;
        fadt.pm1a_cnt_blk = u32::from(power.pm1_control).into();
        fadt.pm1_cnt_len = 2;
        fadt.x_pm1a_evt_blk = port(32, AccessSize::WordAccess, power.pm1_event);
        fadt.x_pm1a_cnt_blk = port(16, AccessSize::WordAccess, power.pm1_control);
        if let Some(timer) = power.pm_timer {
            fadt.pm_tmr_blk = u32::from(timer).into();
            fadt.pm_tmr_len = 4;
            fadt.x_pm_tmr_blk = port(32, AccessSize::DwordAccess, timer);
            fadt = fadt.flag(Flags::TmrValExt);
        }
        fadt.reset_reg = port(8, AccessSize::ByteAccess, power.reset_port);
        fadt.reset_value = power.reset_value;
        fadt = fadt.flag(Flags::ResetRegSup);
    }
    fadt.finalize()
}
