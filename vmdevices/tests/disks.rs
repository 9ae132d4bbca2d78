//! Disks of every format under a driver we did not write: the `virtio-drivers` crate, in process.
#![cfg(test)]
#![expect(unsafe_code, reason = "the Hal trait is unsafe to implement")]

mod driver;
#[path = "images/mod.rs"]
mod tool;

use driver::Machine;
use tool::{create, qemu_img};
use virtio_drivers::device::blk::{SECTOR_SIZE, VirtIOBlk};
use vmcore::boot::{Raw, RawMode};
use vmcore::{Accel, Deterministic, Vm};
use vmdevices::block::{DiskStats, Format, Image, Limits};
use vmdevices::rate::Rate;
use vmdevices::virtio::{CacheMode, Disk};

const SECTORS: usize = 2048;

fn pattern(seed: usize) -> Vec<u8> {
    (0..SECTORS * SECTOR_SIZE).map(|n| (n.wrapping_mul(seed | 1) >> 5).to_le_bytes()[0]).collect()
}

#[test]
fn written_disks_of_every_format_and_cache_mode_read_back() {
    let Some(directory) = tool::directory() else { return };
    let directory = directory.path();
    let base = create(directory, "base", "raw", "", "1M");
    std::fs::write(&base, pattern(3)).unwrap();
    let mut number = 0;
    for machine in Machine::both() {
        for mode in [CacheMode::WriteBack, CacheMode::WriteThrough, CacheMode::Unsafe] {
            for kind in ["raw", "direct", "qcow2", "over"] {
                number += 1;
                let options = match kind {
                    "over" => format!("backing_file={},backing_fmt=raw", base.display()),
                    _ => String::new(),
                };
                let format = if ["qcow2", "over"].contains(&kind) { Format::Qcow2 } else { Format::Raw };
                let path = create(directory, &number.to_string(), format.name(), &options, "1M");
                let mut image = Image::new(&path, format);
                let mut expected = vec![0; SECTORS * SECTOR_SIZE];
                if kind == "direct" {
                    image = image.direct();
                } else if kind == "over" {
                    image = image.backing(Image::raw(&base));
                    expected = pattern(3);
                }
                let disk = Disk::image(image).unwrap().cache(mode);
                let handle = disk.handle();
                let transport = machine.device(disk);
                {
                    let mut driver = VirtIOBlk::<driver::Memory, _>::new(transport.clone()).unwrap();
                    assert_eq!(driver.capacity(), SECTORS as u64);
                    let data = pattern(number);
                    for n in 0..40 {
                        let (sector, count) = (n * 797 % (SECTORS - 64), 1 + n * 7 % 64);
                        let range = sector * SECTOR_SIZE..(sector + count) * SECTOR_SIZE;
                        driver.write_blocks(sector, &data[range.clone()]).unwrap();
                        expected[range.clone()].copy_from_slice(&data[range]);
                        if n % 8 == 0 {
                            driver.flush().unwrap();
                        }
                    }
                    let mut all = vec![0; SECTORS * SECTOR_SIZE];
                    for (n, part) in all.chunks_mut(64 * SECTOR_SIZE).enumerate() {
                        driver.read_blocks(n * 64, part).unwrap();
                    }
                    assert!(all == expected, "{kind} {mode:?}");
                }
                let DiskStats { reads, writes, errors, .. } = handle.stats();
                assert_eq!((reads, writes, errors), (32, 40, 0));
                assert!(transport.was_told());
                // Nothing is left to be done when a machine without threads looks.
                transport.poll();
                // The device goes, and the image is whole.
                drop((handle, transport));
                std::fs::write(directory.join("expected"), &expected).unwrap();
                let (path, expected) = (path.display(), directory.join("expected"));
                assert!(format == Format::Raw || qemu_img(&format!("check -q {path}")), "{kind} {mode:?}");
                assert!(
                    qemu_img(&format!("compare -q -f {format} -F raw {path} {}", expected.display())),
                    "{kind} {mode:?}"
                );
            }
        }
    }
}

#[test]
fn read_only_formats_refuse_writes() {
    let Some(directory) = tool::directory() else { return };
    let directory = directory.path();
    let raw = directory.join("raw");
    std::fs::write(&raw, pattern(5)).unwrap();
    for machine in Machine::both() {
        for format in [Format::Vmdk, Format::Vhdx, Format::Vdi, Format::Qcow2] {
            let path = directory.join(format.name());
            assert!(qemu_img(&format!("convert -f raw -O {format} {} {}", raw.display(), path.display())));
            let disk = Disk::image(Image::new(path, format).read_only()).unwrap();
            let mut driver = VirtIOBlk::<driver::Memory, _>::new(machine.device(disk)).unwrap();
            assert!(driver.readonly());
            let mut part = vec![0; 100 * SECTOR_SIZE];
            driver.read_blocks(1000, &mut part).unwrap();
            assert!(part == pattern(5)[1000 * SECTOR_SIZE..1100 * SECTOR_SIZE], "{format}");
            assert!(driver.write_blocks(0, &part).is_err());
        }
    }
}

#[test]
fn a_deterministic_machine_takes_no_limits() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4096).unwrap();
    let limits = Limits { operations: Some(Rate::new(10)), ..Limits::default() };
    let disk = Disk::open(file.path()).unwrap().limits(limits);
    let built = Vm::builder()
        .accel(Accel::Soft)
        .deterministic(Deterministic::seeded(0))
        .memory(1 << 20)
        .boot(Raw::new(vec![0xf4], RawMode::Real16))
        .attach(disk)
        .build();
    let text = built.map(|_| ()).unwrap_err().to_string();
    assert!(text.contains("limits of a disk"), "{text}");
}
