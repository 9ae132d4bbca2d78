//! Images of every format against a model, and what `qemu-img` says of them afterwards.
#![expect(clippy::unwrap_used, clippy::print_stdout, clippy::cast_possible_truncation, reason = "tests")]

#[path = "images/mod.rs"]
mod tool;

use std::path::Path;
use std::sync::Arc;

use tool::{create, qemu_img};
use vm_memory::{GuestMemory as _, Permissions};
use vmcore::{GuestAddress, GuestMemory, MemoryRegion};
use vmdevices::block::{BlockBackend, DiskError, Format, Image};
use vmdevices::buffers::Buffers;

const LEN: usize = 4 << 20;

/// Steele and others' splitmix64: the same on every run.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ mixed >> 31) % end as u64) as usize
    }
}

/// A disk and what it should hold.
struct Modelled {
    disk: Arc<dyn BlockBackend>,
    model: Vec<u8>,
    memory: GuestMemory,
    random: Random,
}

impl Modelled {
    fn new(disk: Arc<dyn BlockBackend>, model: Vec<u8>) -> Self {
        let memory = GuestMemory::new();
        for base in [0, 0x10_0000] {
            memory.insert(MemoryRegion::anonymous(GuestAddress(base), 0x10_0000).unwrap().into()).unwrap();
        }
        assert_eq!(disk.len(), model.len() as u64);
        Self { disk, model, memory, random: Random(7) }
    }

    /// Calls `act` with `len` bytes of guest memory in pieces, over both regions now and then.
    fn with<R>(&mut self, len: usize, act: impl FnOnce(&dyn BlockBackend, &mut Buffers<'_>) -> R) -> R {
        let at = self.random.below(0x20_0000 - len) as u64 & !0xf;
        let cut = self.random.below(len);
        let map = self.memory.snapshot();
        let mut buffers = Buffers::default();
        for (at, len) in [(at, cut), (at + cut as u64, len - cut)] {
            if len > 0 {
                let slices = map.get_slices(GuestAddress(at), len, Permissions::Write).unwrap();
                slices.for_each(|slice| buffers.push(slice.unwrap()));
            }
        }
        act(&*self.disk, &mut buffers)
    }

    fn read(&mut self, at: usize, len: usize) -> Vec<u8> {
        let map = self.memory.snapshot();
        let place = self.random.below(0x20_0000 - len) as u64 & !0xf;
        let slices = || {
            let mut buffers = Buffers::default();
            let slices = map.get_slices(GuestAddress(place), len, Permissions::Write).unwrap();
            slices.for_each(|slice| buffers.push(slice.unwrap()));
            buffers
        };
        self.disk.read_at(&mut slices(), at as u64).unwrap();
        let mut bytes = vec![0; len];
        slices().read(&mut bytes);
        bytes
    }

    /// Some sectors of the disk.
    fn range(&mut self) -> (usize, usize) {
        let sectors = self.model.len() / 512;
        let most = [1, 8, 130, 700][self.random.below(4)];
        let count = 1 + self.random.below(most.min(sectors));
        (self.random.below(sectors - count + 1) * 512, count * 512)
    }

    fn step(&mut self) {
        let ((at, len), what) = (self.range(), self.random.below(10));
        match what {
            0..=3 => {
                let seed = self.random.below(1 << 30);
                let data = (0..len).map(|n| (n.wrapping_mul(seed | 1) >> 7) as u8).collect::<Vec<_>>();
                self.with(len, |disk, buffers| {
                    let map = buffers.slices().iter().map(|s| s.len()).sum::<usize>();
                    assert_eq!(map, len);
                    // The model's bytes into guest memory, then from there to the disk.
                    let mut rest = &data[..];
                    for slice in buffers.slices() {
                        slice.copy_from(&rest[..slice.len()]);
                        rest = &rest[slice.len()..];
                    }
                    disk.write_at(buffers, at as u64).unwrap();
                });
                self.model[at..at + len].copy_from_slice(&data);
            }
            4 | 5 => {
                self.disk.write_zeroes(at as u64, len as u64, what == 4).unwrap();
                self.model[at..at + len].fill(0);
            }
            6 => {
                self.disk.discard(at as u64, len as u64).unwrap();
                // Anything may be there; what is there stays.
                let now = self.read(at, len);
                self.model[at..at + len].copy_from_slice(&now);
            }
            7 => self.disk.flush().unwrap(),
            _ => assert!(self.read(at, len) == self.model[at..at + len], "{at:#x} {len:#x}"),
        }
    }

    fn same(&mut self) {
        for at in (0..self.model.len()).step_by(1 << 16) {
            let len = (self.model.len() - at).min(1 << 16);
            assert!(self.read(at, len) == self.model[at..at + len], "{at:#x}");
        }
    }
}

/// Works on `image`, opens it again, and has `qemu-img` check and compare it.
fn modelled(directory: &Path, image: Image, model: Vec<u8>, steps: usize) {
    let mut disk = Modelled::new(image.clone().open().unwrap(), model);
    for step in 0..steps {
        disk.step();
        if step == steps / 2 && image.format() == Format::Qcow2 {
            disk.disk.flush().unwrap();
        }
    }
    let len = disk.model.len() + (1 << 20);
    disk.disk.resize(len as u64).unwrap();
    disk.model.resize(len, 0);
    (0..steps / 4).for_each(|_| disk.step());
    disk.disk.flush().unwrap();
    let model = disk.model;
    drop(disk.disk);

    let raw = directory.join("model");
    std::fs::write(&raw, &model).unwrap();
    let (path, format) = (image.path().display(), image.format());
    assert!(format == Format::Raw || qemu_img(&format!("check -q -f {format} {path}")), "{image:?}");
    assert!(qemu_img(&format!("compare -q -f {format} -F raw {path} {}", raw.display())), "{image:?}");
    Modelled::new(image.read_only().open().unwrap(), model).same();
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n >> 9) as u8 ^ (n as u8).wrapping_mul(3)).collect()
}

#[test]
fn raw_images_hold_what_is_written() {
    let Some(directory) = tool::directory() else { return };
    let directory = directory.path();
    for direct in [false, true] {
        let path = directory.join(format!("raw-{direct}"));
        std::fs::write(&path, pattern(LEN)).unwrap();
        let image = if direct { Image::raw(&path).direct() } else { Image::raw(&path) };
        modelled(directory, image, pattern(LEN), 400);
    }
}

/// Fuzzing found that zeroing a part of one panicked, and without checks of arithmetic zeroed all of it.
#[test]
fn qcow2_images_smaller_than_a_cluster_hold_what_is_written() {
    let Some(directory) = tool::directory() else { return };
    let directory = directory.path();
    for (n, (cluster, len)) in [("64k", 48 << 10), ("64k", 512), ("2M", 300 << 10)].into_iter().enumerate() {
        let options = format!("cluster_size={cluster}");
        let path = create(directory, &format!("tiny-{n}"), "qcow2", &options, &len.to_string());
        modelled(directory, Image::qcow2(path), vec![0; len], 200);
    }
}

#[test]
fn qcow2_images_hold_what_is_written_and_are_sound() {
    let Some(directory) = tool::directory() else { return };
    let directory = directory.path();
    for (n, (options, direct)) in [
        ("", false),
        ("cluster_size=512", false),
        ("cluster_size=2M", false),
        ("compat=0.10", false),
        ("refcount_bits=1,cluster_size=4k", false),
        ("refcount_bits=64", false),
        ("", true),
        ("preallocation=metadata", false),
    ]
    .into_iter()
    .enumerate()
    {
        println!("{options:?} direct: {direct}");
        let path = create(directory, &format!("{n}.qcow2"), "qcow2", options, "4M");
        let image = Image::qcow2(path);
        modelled(directory, if direct { image.direct() } else { image }, vec![0; LEN], 300);
    }
}

#[test]
fn chains_of_three_with_compressed_clusters_and_discards_are_sound() {
    let Some(directory) = tool::directory() else { return };
    let directory = directory.path();
    let path = |name: &str| directory.join(name);
    std::fs::write(path("golden"), pattern(LEN)).unwrap();
    let (golden, packed) = (path("golden"), path("packed.qcow2"));
    assert!(qemu_img(&format!("convert -c -f raw -O qcow2 {} {}", golden.display(), packed.display())));
    let over = |name: &str, base: &str, format: &str| {
        create(
            directory,
            name,
            "qcow2",
            &format!("backing_file={},backing_fmt={format}", path(base).display()),
            "",
        )
    };
    let middle = over("middle.qcow2", "packed.qcow2", "qcow2");
    let chain = Image::qcow2(&middle).backing(Image::qcow2(&packed));
    // Written themselves, too: a compressed cluster is replaced.
    modelled(directory, Image::qcow2(&middle).backing(Image::qcow2(&packed)), pattern(LEN), 100);
    let base = std::fs::read(path("model")).unwrap();
    // Made now: one that is made larger later does not show what is below its new part.
    let top = over("top.qcow2", "middle.qcow2", "qcow2");
    modelled(directory, Image::qcow2(&top).backing(chain), base.clone(), 300);
    // What is below was not touched.
    assert!(qemu_img(&format!("compare -q -f raw -F qcow2 {} {}", golden.display(), packed.display())));
    std::fs::write(path("model"), &base).unwrap();
    assert!(qemu_img(&format!(
        "compare -q -f raw -F qcow2 {} {}",
        path("model").display(),
        middle.display()
    )));
    // A chain of raw and two more, where the middle one is longer than the base.
    let short = over("short.qcow2", "golden", "raw");
    assert!(qemu_img(&format!("resize -q {} 5M", short.display())));
    let last = over("last.qcow2", "short.qcow2", "qcow2");
    let mut model = pattern(LEN);
    model.resize(5 << 20, 0);
    modelled(
        directory,
        Image::qcow2(last).backing(Image::qcow2(short).backing(Image::raw(golden))),
        model,
        200,
    );
}

#[test]
fn internal_snapshots_stay_as_they_were() {
    let Some(directory) = tool::directory() else { return };
    let directory = directory.path();
    let path = create(directory, "snapshot.qcow2", "qcow2", "", "4M");
    let image = Image::qcow2(&path);
    modelled(directory, image.clone(), vec![0; LEN], 100);
    let before = std::fs::read(directory.join("model")).unwrap();
    assert!(qemu_img(&format!("snapshot -c before {}", path.display())));
    let disk = image.open().unwrap();
    let mut disk = Modelled::new(disk, before.clone());
    (0..200).for_each(|_| disk.step());
    disk.same();
    drop(disk);
    assert!(qemu_img(&format!("check -q {}", path.display())));
    let old = directory.join("old");
    assert!(qemu_img(&format!("convert -l before -O raw {} {}", path.display(), old.display())));
    assert!(std::fs::read(old).unwrap() == before, "the snapshot has changed");
}

#[test]
fn nothing_is_opened_on_an_images_word() {
    let Some(directory) = tool::directory() else { return };
    let directory = directory.path();
    std::fs::write(directory.join("secret"), pattern(1 << 20)).unwrap();
    let secret = directory.join("secret");
    let options = format!("backing_file={},backing_fmt=raw", secret.display());
    let path = create(directory, "nosy.qcow2", "qcow2", &options, "");
    let refused = |image: Image| image.open().err().unwrap();
    let error = refused(Image::qcow2(&path));
    assert!(matches!(&error, DiskError::Backing { named, .. } if *named == secret.to_string_lossy()));
    assert!(error.to_string().contains("Image::backing"), "{error}");
    // Below what the caller names, just the same.
    let options = format!("backing_file={},backing_fmt=qcow2", path.display());
    let top = create(directory, "top.qcow2", "qcow2", &options, "");
    assert!(matches!(refused(Image::qcow2(&top).backing(Image::qcow2(&path))), DiskError::Backing { .. }));
    // The caller's word counts, and not the name in the image.
    std::fs::write(directory.join("other"), vec![0x44; 1 << 20]).unwrap();
    let image = Image::qcow2(&path).backing(Image::raw(directory.join("other")));
    Modelled::new(image.open().unwrap(), vec![0x44; 1 << 20]).same();
    // A file beside the image, and one too many.
    let path = create(
        directory,
        "data.qcow2",
        "qcow2",
        &format!("data_file={}", directory.join("data.raw").display()),
        "1M",
    );
    assert!(refused(Image::qcow2(&path)).to_string().contains("another file"));
    let plain = create(directory, "plain.qcow2", "qcow2", "", "1M");
    let image = Image::qcow2(&plain).backing(Image::raw(&secret));
    assert!(refused(image).to_string().contains("no backing file"));
}

#[test]
fn one_writer_or_many_readers_of_every_file_of_a_chain() {
    let Some(directory) = tool::directory() else { return };
    let directory = directory.path();
    let base = create(directory, "base.qcow2", "qcow2", "", "1M");
    let options = format!("backing_file={},backing_fmt=qcow2", base.display());
    let [a, b] = ["a.qcow2", "b.qcow2"].map(|name| create(directory, name, "qcow2", &options, ""));
    let over = |path: &Path| Image::qcow2(path).backing(Image::qcow2(&base));
    // Two disks share what is below them; nobody writes that meanwhile, QEMU no more than we.
    let disks = [&a, &b].map(|path| over(path).open().unwrap());
    let locked = |image: Image| matches!(image.open(), Err(DiskError::Locked { .. }));
    assert!(locked(over(&a)) && locked(Image::qcow2(&base)) && locked(over(&a).read_only()));
    assert!(!qemu_img(&format!("resize -q {} 2M", base.display())));
    drop(disks);
    let writer = Image::qcow2(&base).open().unwrap();
    assert!(locked(over(&a)));
    drop(writer);
    over(&a).open().unwrap();
}

/// The host's file system has no room left: an error for the write, and nothing lost; with room again it goes on.
#[test]
fn a_full_file_system_costs_nothing_but_the_write() {
    const MARK: &str = "VMCORE_FULL_FILE_SYSTEM";
    let Some(directory) = tool::directory() else { return };
    let Some(full) = std::env::var_os(MARK) else {
        // A file system of 3 MiB, in a namespace of its own.
        let mount = "mount -t tmpfs -o size=3m none \"$0\" && exec \"$@\"";
        let name = "a_full_file_system_costs_nothing_but_the_write";
        let run = |program: &std::ffi::OsStr, name: &[&str]| {
            let mut command = std::process::Command::new("unshare");
            command.args(["-rm", "sh", "-c", mount]).arg(directory.path()).arg(program).args(name);
            command.env(MARK, directory.path()).status().is_ok_and(|status| status.success())
        };
        if !run("true".as_ref(), &[]) {
            println!("skipped: no file system may be mounted here");
            return;
        }
        assert!(run(std::env::current_exe().unwrap().as_os_str(), &[name, "--exact", "--nocapture"]));
        return;
    };
    let full = Path::new(&full);
    for (format, options) in [("raw", ""), ("qcow2", ""), ("qcow2", "cluster_size=512")] {
        let path = create(full, "disk", format, options, "4M");
        std::fs::write(full.join("ballast"), vec![1; 1 << 20]).unwrap();
        let image = Image::new(&path, format.parse().unwrap());
        let mut disk = Modelled::new(image.clone().open().unwrap(), vec![0; LEN]);
        let data = pattern(1 << 16);
        let (mut failed, mut at) = (0, 0);
        while at < LEN {
            let result = disk.with(1 << 16, |disk, buffers| {
                let mut rest = &data[..];
                for slice in buffers.slices() {
                    slice.copy_from(&rest[..slice.len()]);
                    rest = &rest[slice.len()..];
                }
                disk.write_at(buffers, at as u64)
            });
            match result {
                Ok(()) => disk.model[at..at + (1 << 16)].copy_from_slice(&data),
                Err(error) => {
                    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull, "{error}");
                    // Part of it may be there.
                    let now = disk.read(at, 1 << 16);
                    disk.model[at..at + (1 << 16)].copy_from_slice(&now);
                    failed += 1;
                }
            }
            at += 1 << 16;
        }
        println!("{format} {options}: {failed} writes failed");
        assert!((20..60).contains(&failed), "{format} {options}: {failed}");
        disk.same();
        // Room again.
        std::fs::remove_file(full.join("ballast")).unwrap();
        disk.disk.flush().unwrap();
        (0..10).for_each(|_| disk.disk.discard(2 << 20, 1 << 20).unwrap());
        disk.disk.write_zeroes(0, 1 << 16, false).unwrap();
        disk.model[..1 << 16].fill(0);
        let now = [disk.read(2 << 20, 1 << 19), disk.read(5 << 19, 1 << 19)].concat();
        disk.model[2 << 20..3 << 20].copy_from_slice(&now);
        disk.same();
        disk.disk.flush().unwrap();
        let model = disk.model;
        drop(disk.disk);
        assert!(format == "raw" || qemu_img(&format!("check -q -f {format} {}", path.display())));
        Modelled::new(image.read_only().open().unwrap(), model).same();
        std::fs::remove_file(path).unwrap();
    }
}

/// An image of any bytes, or a real one with any bytes changed, is opened or refused, read or not.
#[test]
fn damaged_images_do_no_harm() {
    let Some(directory) = tool::directory() else { return };
    let directory = directory.path();
    let path = create(directory, "good.qcow2", "qcow2", "cluster_size=4k", "1M");
    modelled(directory, Image::qcow2(&path), vec![0; 1 << 20], 60);
    let good = std::fs::read(&path).unwrap();
    let damaged = directory.join("damaged.qcow2");
    let mut random = Random(99);
    let (mut opened, mut failed) = (0, 0);
    for round in 0..150 {
        let mut bytes = good.clone();
        for _ in 0..1 + random.below(8) {
            // Headers and tables, mostly.
            let end = [120, 4096 * 5, bytes.len()][random.below(3)];
            let at = random.below(end);
            bytes[at] = random.below(256) as u8;
        }
        if round % 5 == 0 {
            bytes.truncate(random.below(bytes.len()));
        }
        std::fs::write(&damaged, &bytes).unwrap();
        let Ok(disk) = Image::qcow2(&damaged).open() else { continue };
        opened += 1;
        let memory = GuestMemory::new();
        memory.insert(MemoryRegion::anonymous(GuestAddress(0), 1 << 16).unwrap().into()).unwrap();
        let map = memory.snapshot();
        for at in (0..disk.len().min(2 << 20)).step_by(1 << 16) {
            let len = (disk.len() - at).min(1 << 16) as usize;
            let mut buffers = Buffers::default();
            let slices = map.get_slices(GuestAddress(0), len, Permissions::Write).unwrap();
            slices.for_each(|slice| buffers.push(slice.unwrap()));
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                let read = disk.read_at(&mut buffers, at);
                let mut buffers = Buffers::default();
                let slices = map.get_slices(GuestAddress(0), 4096.min(len), Permissions::Write).unwrap();
                slices.for_each(|slice| buffers.push(slice.unwrap()));
                read.and(disk.write_at(&mut buffers, at))
            }));
            // A panic is an I/O error to the guest; it is counted, for it should not be.
            failed += usize::from(result.is_err());
        }
    }
    assert!(opened > 20, "{opened}");
    assert_eq!(failed, 0, "panics in {opened} images");
}

/// A disk with something in it, with holes, and its image in `format`.
fn converted(directory: &Path, name: &str, format: &str, options: &str) -> (std::path::PathBuf, Vec<u8>) {
    let mut model = pattern(5 << 20);
    model[0x1_2000..0x20_0000].fill(0);
    model.truncate(model.len() - 1024);
    let raw = directory.join("source");
    std::fs::write(&raw, &model).unwrap();
    let path = directory.join(name);
    assert!(qemu_img(&format!("convert -f raw -O {format} {options} {} {}", raw.display(), path.display())));
    (path, model)
}

#[test]
fn images_of_other_formats_are_read() {
    let Some(directory) = tool::directory() else { return };
    let directory = directory.path();
    for (n, (format, options)) in [
        (Format::Vdi, ""),
        (Format::Vdi, "-o static=on"),
        (Format::Vmdk, ""),
        (Format::Vmdk, "-o subformat=streamOptimized"),
        (Format::Vmdk, "-o zeroed_grain=on"),
        (Format::Vhdx, ""),
        (Format::Vhdx, "-o subformat=fixed"),
        (Format::Vhdx, "-o block_size=2M"),
    ]
    .into_iter()
    .enumerate()
    {
        println!("{format} {options}");
        let (path, mut model) = converted(directory, &format!("{n}"), format.name(), options);
        let image = Image::probe(&path, true).unwrap();
        assert_eq!(image.format(), format);
        let disk = image.clone().open().unwrap();
        // Some formats know only whole tracks or megabytes.
        assert!(disk.read_only() && (disk.len() as usize) >= model.len(), "{}", disk.len());
        model.resize(disk.len() as usize, 0);
        let mut disk = Modelled::new(disk, model);
        disk.same();
        for _ in 0..100 {
            let (at, len) = disk.range();
            assert!(disk.read(at, len) == disk.model[at..at + len], "{at:#x} {len:#x}");
        }
        assert!(disk.disk.write_zeroes(0, 512, false).is_err());
        let writable = Image::new(&path, format).open().err().unwrap().to_string();
        assert!(writable.contains("read-only"), "{writable}");
        // Others read too, and nobody writes.
        image.open().unwrap();
    }
}

#[test]
fn vmdk_extents_are_opened_where_the_caller_names_them() {
    let Some(directory) = tool::directory() else { return };
    let directory = directory.path();
    for (name, kind) in [("sparse", "twoGbMaxExtentSparse"), ("flat", "monolithicFlat")] {
        let (path, model) =
            converted(directory, &format!("{name}.vmdk"), "vmdk", &format!("-o subformat={kind}"));
        let image = Image::vmdk(&path).read_only();
        let error = image.clone().open().err().unwrap();
        let DiskError::Extent { named, .. } = &error else { panic!("{error}") };
        assert!(error.to_string().contains("Image::extent"), "{error}");
        let disk = image.extent(directory.join(named)).open().unwrap();
        Modelled::new(disk, model).same();
    }
    // A name in an image leads nowhere by itself.
    let path = directory.join("nosy.vmdk");
    let text = "# Disk DescriptorFile\nversion=1\nRW 1 FLAT \"/etc/passwd\" 0\n";
    std::fs::write(&path, text).unwrap();
    let image = Image::vmdk(&path).read_only().extent(directory.join("sparse.vmdk"));
    assert!(matches!(image.open(), Err(DiskError::Extent { .. })));
}

/// Real images with any bytes changed are opened or refused, read or not; nothing else happens.
#[test]
fn damaged_images_of_other_formats_do_no_harm() {
    let Some(directory) = tool::directory() else { return };
    let directory = directory.path();
    let mut random = Random(5);
    for (format, options, tables) in [
        (Format::Vdi, "", 0x1000),
        (Format::Vmdk, "", 0x3_0000),
        (Format::Vmdk, "-o subformat=streamOptimized", 0x3_0000),
        (Format::Vhdx, "", 0x50_0000),
    ] {
        let (path, _) = converted(directory, "good", format.name(), options);
        let good = std::fs::read(&path).unwrap();
        let damaged = directory.join("damaged");
        let (mut opened, mut refused) = (0, 0);
        for round in 0..60 {
            let mut bytes = good.clone();
            for _ in 0..1 + random.below(6) {
                let end = [600, tables.min(bytes.len()), bytes.len()][random.below(3)];
                let at = random.below(end);
                bytes[at] = [random.below(256) as u8, 0xff][random.below(2)];
            }
            if round % 5 == 0 {
                bytes.truncate(random.below(bytes.len()));
            }
            std::fs::write(&damaged, &bytes).unwrap();
            let Ok(disk) = Image::new(&damaged, format).read_only().open() else {
                refused += 1;
                continue;
            };
            opened += 1;
            let memory = GuestMemory::new();
            memory.insert(MemoryRegion::anonymous(GuestAddress(0), 1 << 16).unwrap().into()).unwrap();
            let map = memory.snapshot();
            for n in 0..90 {
                let at = if n < 80 { n << 16 } else { random.below(1 << 40) as u64 };
                let Some(len) = disk.len().checked_sub(at).map(|len| len.min(1 << 16) & !511) else {
                    continue;
                };
                let mut buffers = Buffers::default();
                let slices = map.get_slices(GuestAddress(0), len as usize, Permissions::Write).unwrap();
                slices.for_each(|slice| buffers.push(slice.unwrap()));
                let _ = disk.read_at(&mut buffers, at);
            }
        }
        println!("{format} {options}: {opened} opened, {refused} refused");
        assert!(opened > 5 && refused > 2, "{format} {options}: {opened} {refused}");
    }
}
