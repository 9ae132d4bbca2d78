use super::*;
use crate::boot::MemoryLayout;
use crate::memory::MemoryRegion;

const POWER: PowerPorts = PowerPorts {
    pm1_event: 0x600,
    pm1_control: 0x604,
    pm_timer: Some(0x608),
    sci: 9,
    reset_port: 0xcf9,
    reset_value: 6,
    s5_type: 5,
};

fn com1() -> AcpiDevice {
    AcpiDevice {
        name: "COM1".into(),
        hid: AcpiHid::Eisa("PNP0501".into()),
        uid: 1,
        resources: vec![
            AcpiResource::Ports { base: 0x3f8, len: 8 },
            AcpiResource::Irq { gsi: 4, level: false, shared: false },
        ],
    }
}

fn virtio(index: u32) -> AcpiDevice {
    AcpiDevice {
        name: format!("VR{index:02X}"),
        hid: AcpiHid::Text("LNRO0005".into()),
        uid: index,
        resources: vec![
            AcpiResource::Memory { base: 0xd000_0000 + u64::from(index) * 0x1000, len: 0x1000 },
            AcpiResource::Irq { gsi: 5 + index, level: true, shared: true },
        ],
    }
}

fn host() -> PciHost {
    PciHost {
        ecam: GpaRange { base: 0xe000_0000, len: 0x1000_0000 },
        last_bus: 255,
        memory: vec![
            GpaRange { base: 0xc000_0000, len: 0x1000_0000 },
            GpaRange { base: 1 << 40, len: 1 << 36 },
        ],
        ports: Some((0xd00, 0xffff)),
        gsis: [16, 17, 18, 19],
    }
}

fn config<'a>(cpus: &'a [u32], devices: &'a [AcpiDevice], pci: Option<&'a PciHost>) -> AcpiConfig<'a> {
    AcpiConfig { cpus, devices, aml: b"", power: Some(&POWER), pci, i8042: true, rtc: true, vga: false }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Follows the pointers from the RSDP as a guest does, checks every checksum on the way, and returns
/// the tables by signature.
fn walk(area: &[u8], base: u64) -> Vec<(String, Vec<u8>)> {
    let table = |at: u64| {
        let start = usize::try_from(at - base).unwrap();
        let len = u32_at(area, start + 4) as usize;
        area[start..start + len].to_vec()
    };
    assert_eq!(&area[..8], b"RSD PTR ");
    assert_eq!((sum(&area[..20]), sum(&area[..36])), (0, 0));
    let xsdt = table(u64_at(area, 24));
    let mut tables: Vec<Vec<u8>> = xsdt[36..].chunks(8).map(|entry| table(u64_at(entry, 0))).collect();
    let fadt = tables.iter().find(|t| t.starts_with(b"FACP")).unwrap().clone();
    let facs = u64::from(u32_at(&fadt, 36));
    assert_eq!(facs % 64, 0);
    assert_eq!(table(facs)[..4], *b"FACS");
    tables.push(table(u32_at(&fadt, 40).into()));
    tables.push(xsdt);
    for table in &tables {
        assert_eq!(sum(table), 0, "checksum of {:?}", &table[..4]);
    }
    tables.into_iter().map(|t| (String::from_utf8_lossy(&t[..4]).into_owned(), t)).collect()
}

fn find<'a>(tables: &'a [(String, Vec<u8>)], signature: &str) -> &'a [u8] {
    &tables.iter().find(|(name, _)| name == signature).unwrap().1
}

#[test]
fn a_guest_finds_every_table_and_every_checksum_is_right() {
    let devices = [com1(), virtio(0), virtio(1)];
    for base in [0xe_0000, 0xe_0010, 0x7fff_0000] {
        let area = tables(&config(&[0, 1], &devices, Some(&host())), base).unwrap();
        let tables = walk(&area, base);
        assert_eq!(tables.len(), 5);
        let contains = |needle: &[u8]| find(&tables, "DSDT").windows(needle.len()).any(|w| w == needle);
        for name in [&b"COM1"[..], b"VR00", b"VR01", b"LNRO0005", b"_S5_", b"PCI0"] {
            assert!(contains(name), "{}", String::from_utf8_lossy(name));
        }
        assert_eq!(u64_at(find(&tables, "MCFG"), 44), 0xe000_0000);
    }
}

#[test]
fn a_devices_own_aml_is_in_the_scope_of_the_others() {
    let aml = b"\x08MORE\x01";
    let config = AcpiConfig { aml, ..config(&[0], &[], None) };
    let area = tables(&config, 0xe_0000).unwrap();
    assert!(find(&walk(&area, 0xe_0000), "DSDT").ends_with(aml));
}

#[test]
fn the_fadt_has_the_ports_the_reset_register_and_tells_the_truth_about_legacy_devices() {
    let mut config = config(&[0], &[], None);
    let fadt_of =
        |config: &AcpiConfig<'_>| find(&walk(&tables(config, 0xe_0000).unwrap(), 0xe_0000), "FACP").to_vec();
    let fadt = fadt_of(&config);
    assert_eq!(u32_at(&fadt, 48), 0, "SMI_CMD: in ACPI mode already");
    assert_eq!((u32_at(&fadt, 56), u32_at(&fadt, 64), u32_at(&fadt, 76)), (0x600, 0x604, 0x608));
    assert_eq!(fadt[116..128], [1, 8, 0, 1, 0xf9, 0x0c, 0, 0, 0, 0, 0, 0], "RESET_REG");
    assert_eq!(fadt[128], 6);
    let flags = u32_at(&fadt, 112);
    assert_ne!(flags & 1 << 10, 0, "RESET_REG_SUP");
    assert_eq!(flags & 1 << 20, 0, "not hardware-reduced");
    assert_eq!(fadt[109], 0b0000_0111, "legacy devices, 8042, no VGA");
    assert_eq!(fadt[106..109], [0, 0, 0x32], "DAY_ALRM and MON_ALRM are not there, CENTURY is");
    (config.i8042, config.rtc, config.vga) = (false, false, true);
    assert_eq!(fadt_of(&config)[109], 0b0010_0001);
    assert_eq!(fadt_of(&config)[108], 0);
}

#[test]
fn the_madt_lists_cpus_by_local_apic_and_beyond_254_by_x2apic() {
    let cpus: Vec<u32> = (0..300).collect();
    let area = tables(&config(&cpus, &[], None), 0xe_0000).unwrap();
    let tables = walk(&area, 0xe_0000);
    let madt = find(&tables, "APIC");
    let (mut local, mut x2, mut overrides) = (vec![], vec![], vec![]);
    let mut rest = &madt[44..];
    while let [kind, len, ..] = *rest {
        let entry = &rest[..len.into()];
        match kind {
            0 => local.push(u32::from(entry[3])),
            9 => x2.push(u32_at(entry, 4)),
            2 => overrides.push((entry[3], u32_at(entry, 4), entry[8])),
            1 => assert_eq!(u32_at(entry, 4), 0xfec0_0000),
            4 | 10 => {}
            other => panic!("structure {other}"),
        }
        rest = &rest[len.into()..];
    }
    assert_eq!(local, (0..255).collect::<Vec<_>>());
    assert_eq!(x2, (255..300).collect::<Vec<_>>());
    assert_eq!(overrides, [(9, 9, 0b1101)]);
}

#[test]
fn what_cannot_be_described_is_refused_by_name() {
    let refused = |change: &dyn Fn(&mut AcpiDevice)| {
        let mut device = com1();
        change(&mut device);
        let error = tables(&config(&[0], &[device], None), 0xe_0000).unwrap_err();
        assert!(matches!(error, BootError::Table { .. }), "{error}");
    };
    for name in ["", "COM", "COM12", "1COM", "com1", "CÖM"] {
        refused(&|device| device.name = name.into());
    }
    for id in ["", "PNP050", "pnp0501", "PNP05G1", "PÑP051", "1234567"] {
        refused(&|device| device.hid = AcpiHid::Eisa(id.into()));
    }
    for id in ["", "LNRO-005", "LNRO00056", "é0501"] {
        refused(&|device| device.hid = AcpiHid::Text(id.into()));
    }
    refused(&|d| d.resources = vec![AcpiResource::Ports { base: 0xffff, len: 2 }]);
    refused(&|d| d.resources = vec![AcpiResource::Memory { base: u64::MAX, len: 2 }]);
    refused(&|d| d.resources = vec![AcpiResource::Memory { base: 0, len: 0 }]);
    let twice = [com1(), com1()];
    assert!(tables(&config(&[0], &twice, None), 0xe_0000).is_err());
    let power = PowerPorts { sci: 0, ..POWER };
    assert!(tables(&AcpiConfig { power: Some(&power), ..config(&[0], &[], None) }, 0xe_0000).is_err());
    let bridge = PciHost { ecam: GpaRange { base: 0xe000_0000, len: 0x1000 }, ..host() };
    assert!(tables(&config(&[0], &[], Some(&bridge)), 0xe_0000).is_err());
}

#[test]
fn the_table_area_holds_a_machine_of_1024_cpus_and_refuses_more_than_it_can() {
    let memory = GuestMemory::new();
    memory.insert(MemoryRegion::anonymous(GuestAddress(0), 1 << 20).unwrap().into()).unwrap();
    let cpus: Vec<u32> = (0..1024).collect();
    let devices: Vec<_> = (0..64).map(virtio).collect();
    let at = GuestAddress(ACPI_TABLES.base);
    let rsdp = build_tables(&config(&cpus, &devices, Some(&host())), at, &memory).unwrap();
    let mut area = vec![0; 0x1_0000];
    memory.read(rsdp, &mut area).unwrap();
    walk(&area, rsdp.0);
    assert!(MemoryLayout::pc(1 << 20).reserved().iter().any(|(range, ..)| *range == ACPI_TABLES));

    let cpus: Vec<u32> = (0..10_000).collect();
    let error = build_tables(&config(&cpus, &[], None), at, &memory).unwrap_err();
    assert!(matches!(error, BootError::Table { .. }), "{error}");
}

/// The reference compiler reads the tables back without an error, where it is installed
/// (`acpica-tools`).
#[test]
fn iasl_disassembles_and_recompiles_the_tables() {
    use std::process::Command;
    if Command::new("iasl").arg("-v").output().is_err() {
        println!("skipped: no iasl");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let devices = [com1(), virtio(0)];
    let area = tables(&config(&[0, 1], &devices, Some(&host())), 0xe_0000).unwrap();
    for (name, table) in walk(&area, 0xe_0000) {
        let (aml, dsl) = (dir.path().join(format!("{name}.aml")), dir.path().join(format!("{name}.dsl")));
        std::fs::write(&aml, table).unwrap();
        for (option, file) in [("-d", &aml), ("-ve", &dsl)] {
            let out = Command::new("iasl").arg(option).arg(file).output().unwrap();
            let text = String::from_utf8_lossy(&out.stdout) + String::from_utf8_lossy(&out.stderr);
            assert!(out.status.success() && !text.contains("Error  "), "{name}: {text}");
        }
    }
}
