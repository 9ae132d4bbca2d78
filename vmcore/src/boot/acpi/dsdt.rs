//! The DSDT: devices, PCI host bridge and the soft-off state, in AML (ACPI 6.5, chapter 20).

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal, IO, If,
    Interrupt, Local, Memory32Fixed, Method, Name, NotEqual, ONE, Or, Package, PackageBuilder, Path,
    ResourceTemplate, Return, Scope, Store, Uuid,
};

use super::{AcpiConfig, AcpiDevice, AcpiHid, AcpiResource, PciHost, table};
use crate::boot::BootError;
use crate::memory::GpaRange;

/// The table's bytes.
pub(super) fn dsdt(config: &AcpiConfig<'_>) -> Result<Vec<u8>, BootError> {
    let mut body = Vec::new();
    if let Some(power) = config.power {
        if power.s5_type > 7 {
            return Err(BootError::Table {
                what: "the soft-off state".into(),
                table: "DSDT",
                value: format!("SLP_TYP {}", power.s5_type),
                fix: "choose 0 to 7: the field has 3 bits",
            });
        }
        let sleep: [&dyn Aml; 4] = [&power.s5_type, &power.s5_type, &0u8, &0u8];
        Name::new("_S5_".into(), &Package::new(sleep.to_vec())).to_aml_bytes(&mut body);
    }
    let mut devices = Raw(Vec::new());
    if let Some(pci) = config.pci {
        pci_host(pci, &mut devices.0)?;
    }
    for (index, one) in config.devices.iter().enumerate() {
        if config.devices[..index].iter().any(|other| other.name == one.name) {
            return Err(refused(one, format!("the name {}", one.name), "give each device its own name"));
        }
        device(one, &mut devices.0)?;
    }
    Scope::new("_SB_".into(), vec![&devices]).to_aml_bytes(&mut body);
    Ok(table(*b"DSDT", 2, &body))
}

/// AML that is written already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

fn refused(device: &AcpiDevice, value: String, fix: &'static str) -> BootError {
    BootError::Table { what: format!("device {:?}", device.name), table: "DSDT", value, fix }
}

fn device(device: &AcpiDevice, out: &mut Vec<u8>) -> Result<(), BootError> {
    // The AML writer panics on what these checks refuse.
    let name = device.name.as_bytes();
    let segment = |byte: &u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || *byte == b'_';
    if name.len() != 4 || !name.iter().all(segment) || name[0].is_ascii_digit() {
        let fix = "use four of A-Z, 0-9 and _, not beginning with a digit";
        return Err(refused(device, format!("the name {:?}", device.name), fix));
    }
    let hid: Box<dyn Aml> = match &device.hid {
        AcpiHid::Eisa(id) if is_eisa(id) => Box::new(EISAName::new(id)),
        AcpiHid::Text(id) if is_acpi_id(id) => Box::new(id.clone()),
        AcpiHid::Eisa(id) | AcpiHid::Text(id) => {
            let fix = "a PNP id is ABC1234, an ACPI id four (or three) letters and digits and four hexadecimal ones";
            return Err(refused(device, format!("the id {id:?}"), fix));
        }
    };
    let mut resources: Vec<Box<dyn Aml>> = Vec::new();
    for resource in &device.resources {
        resources.push(descriptor(device, *resource)?);
    }
    let names = [
        Name::new("_HID".into(), &*hid),
        Name::new("_UID".into(), &device.uid),
        Name::new("_CRS".into(), &ResourceTemplate::new(resources.iter().map(|r| &**r).collect())),
    ];
    Device::new(Path::new(&device.name), refs(&names)).to_aml_bytes(out);
    Ok(())
}

/// One resource descriptor (ACPI 6.5, 6.4).
fn descriptor(device: &AcpiDevice, resource: AcpiResource) -> Result<Box<dyn Aml>, BootError> {
    Ok(match resource {
        AcpiResource::Memory { base, len } => {
            let range = GpaRange { base, len: len.into() };
            let last = range.end().filter(|_| len > 0).map(|end| end - 1);
            let Some(last) = last else {
                return Err(refused(device, format!("memory {range}"), "give it 1 byte or more, below 2^64"));
            };
            match (u32::try_from(base), u32::try_from(last)) {
                (Ok(base), Ok(_)) => Box::new(Memory32Fixed::new(true, base, len)),
                _ => Box::new(AddressSpace::new_memory(
                    AddressSpaceCacheable::NotCacheable,
                    true,
                    base,
                    last,
                    None,
                )),
            }
        }
        AcpiResource::Ports { base, len } => {
            let last = len.checked_sub(1).and_then(|more| base.checked_add(more));
            let Some(last) = last else {
                let value = format!("{len} ports from {base:#x}");
                return Err(refused(device, value, "give it 1 port or more, up to 0xffff"));
            };
            match u8::try_from(len) {
                Ok(len) => Box::new(IO::new(base, base, 1, len)),
                Err(_) => Box::new(AddressSpace::new_io(base, last, None)),
            }
        }
        // Active high: what virtual lines are.
        AcpiResource::Irq { gsi, level, shared } => {
            Box::new(Interrupt::new(true, !level, false, shared, gsi))
        }
    })
}

/// The host bridge, and a motherboard device that owns its configuration space (PCI Firmware
/// Specification 3.3, 4.1.2).
fn pci_host(pci: &PciHost, out: &mut Vec<u8>) -> Result<(), BootError> {
    let refused = |value: String, fix| {
        Err(BootError::Table { what: "the PCI host bridge".into(), table: "DSDT", value, fix })
    };
    let (Ok(ecam), Ok(ecam_len)) = (u32::try_from(pci.ecam.base), u32::try_from(pci.ecam.len)) else {
        return refused(format!("ECAM {}", pci.ecam), "put it below 4 GiB");
    };
    if u64::from(ecam_len) < (u64::from(pci.last_bus) + 1) << 20 {
        return refused(
            format!("ECAM {} for {} buses", pci.ecam, u32::from(pci.last_bus) + 1),
            "give it 1 MiB a bus",
        );
    }
    let mut resources: Vec<Box<dyn Aml>> = vec![
        Box::new(AddressSpace::new_bus_number(0u16, pci.last_bus.into())),
        Box::new(IO::new(0xCF8, 0xCF8, 1, 8)),
    ];
    if let Some((first, last)) = pci.ports {
        if first > last {
            return refused(format!("ports {first:#x} to {last:#x}"), "name the first and the last port");
        }
        resources.push(Box::new(AddressSpace::new_io(first, last, None)));
    }
    for window in &pci.memory {
        let (base, Some(last)) = (window.base, window.end().filter(|_| window.len > 0).map(|end| end - 1))
        else {
            return refused(format!("memory {window}"), "give it 1 byte or more, below 2^64");
        };
        let cacheable = AddressSpaceCacheable::NotCacheable;
        resources.push(match (u32::try_from(base), u32::try_from(last)) {
            (Ok(base), Ok(last)) => Box::new(AddressSpace::new_memory(cacheable, true, base, last, None)),
            _ => Box::new(AddressSpace::new_memory(cacheable, true, base, last, None)),
        });
    }
    let mut routes = PackageBuilder::new();
    for (slot, pin, gsi) in pci.interrupts() {
        let address = u32::from(slot) << 16 | 0xffff;
        let route: [&dyn Aml; 4] = [&address, &pin, &0u8, &gsi];
        routes.add_element(&Package::new(route.to_vec()));
    }
    let host = [
        Name::new("_HID".into(), &EISAName::new("PNP0A08")),
        Name::new("_CID".into(), &EISAName::new("PNP0A03")),
        Name::new("_SEG".into(), &0u8),
        Name::new("_BBN".into(), &0u8),
        Name::new("_UID".into(), &0u8),
        Name::new("_CRS".into(), &ResourceTemplate::new(resources.iter().map(|r| &**r).collect())),
        Name::new("_PRT".into(), &routes),
    ];
    let control = operating_system_capabilities();
    let mut children = refs(&host);
    children.push(&control);
    Device::new("PCI0".into(), children).to_aml_bytes(out);
    let ecam: [&dyn Aml; 1] = [&Memory32Fixed::new(true, ecam, ecam_len)];
    let board = [
        Name::new("_HID".into(), &EISAName::new("PNP0C02")),
        Name::new("_UID".into(), &0u8),
        Name::new("_CRS".into(), &ResourceTemplate::new(ecam.to_vec())),
    ];
    Device::new("ECAM".into(), refs(&board)).to_aml_bytes(out);
    Ok(())
}

/// _OSC: the guest asks for control of PCI Express features and gets what it asks for, as there is no
/// firmware that would keep any (PCI Firmware Specification 3.3, 4.5.1; ACPI 6.5, 6.2.11).
fn operating_system_capabilities() -> Raw {
    /// PCI host bridge devices.
    const UUID: &str = "33db4d5b-1ff7-401c-9657-7441c03dd766";
    /// Hot plug of both kinds, power events, error reporting, the capability structure.
    const GRANTED: u8 = 0x1f;
    const UNKNOWN_UUID: u8 = 1 << 2;
    const UNKNOWN_REVISION: u8 = 1 << 3;
    const MASKED: u8 = 1 << 4;
    let (uuid, revision, answer) = (Arg(0), Arg(1), Arg(3));
    let (status, control) = (Path::new("CDW1"), Path::new("CDW3"));
    let (wanted, granted) = (Local(0), Local(1));
    let say = |bit: &'static u8| Or::new(&Path::new("CDW1"), &Path::new("CDW1"), bit).bytes();
    let known = [
        CreateDWordField::new(&control, &answer, &8u8).bytes(),
        Store::new(&wanted, &control).bytes(),
        And::new(&granted, &wanted, &GRANTED).bytes(),
        If::new(&NotEqual::new(&revision, &ONE), vec![&say(&UNKNOWN_REVISION)]).bytes(),
        If::new(&NotEqual::new(&wanted, &granted), vec![&say(&MASKED)]).bytes(),
        Store::new(&control, &granted).bytes(),
    ];
    let body = [
        CreateDWordField::new(&status, &answer, &0u8).bytes(),
        If::new(&Equal::new(&uuid, &Uuid::new(UUID)), known.iter().map(|term| term as &dyn Aml).collect())
            .bytes(),
        Else::new(vec![&say(&UNKNOWN_UUID)]).bytes(),
        Return::new(&answer).bytes(),
    ];
    Method::new("_OSC".into(), 4, true, body.iter().map(|term| term as &dyn Aml).collect()).bytes()
}

/// Terms are written out at once, so that they need not be kept beside those that contain them.
trait Bytes: Aml {
    fn bytes(&self) -> Raw {
        let mut bytes = Vec::new();
        self.to_aml_bytes(&mut bytes);
        Raw(bytes)
    }
}

impl<T: Aml> Bytes for T {}

fn refs(names: &[Name]) -> Vec<&dyn Aml> {
    names.iter().map(|name| name as &dyn Aml).collect()
}

/// "PNP0501": three letters `A`-`Z`, four hexadecimal digits.
fn is_eisa(id: &str) -> bool {
    let (letters, digits) = id.as_bytes().split_at_checked(3).unwrap_or_default();
    digits.len() == 4
        && letters.iter().all(u8::is_ascii_uppercase)
        && digits.iter().all(|d| d.is_ascii_digit() || (b'A'..=b'F').contains(d))
}

/// "LNRO0005" or "PNP0501": a vendor of 4 or 3 letters and digits, four hexadecimal digits.
fn is_acpi_id(id: &str) -> bool {
    let Some((vendor, digits)) = id.len().checked_sub(4).and_then(|at| id.as_bytes().split_at_checked(at))
    else {
        return false;
    };
    matches!(vendor.len(), 3 | 4)
        && vendor.iter().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit())
        && digits.iter().all(u8::is_ascii_hexdigit)
}
