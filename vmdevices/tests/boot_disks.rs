//! Disks of every kind under a stock Debian kernel: file systems made, filled, checked; fio's verified
//! writes; and what goes wrong underneath, seen as errors inside.
//!
//! Needs what `tests/boot.rs` does, `disks.ext4` of `examples/guest/build`, and `qemu-img`.
#![expect(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "these are tests")]

#[path = "images/mod.rs"]
mod tool;
mod transport;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tool::{create, qemu_img};
use transport::virtio;
use vmcore::boot::Linux;
use vmcore::host::{self, Status};
use vmcore::{Accel, Outcome, Vm};
use vmdevices::block::{Effect, Fault, Faulty, Image, Limits, Operation};
use vmdevices::console::Script;
use vmdevices::rate::Rate;
use vmdevices::virtio::{CacheMode, OnError};
use vmdevices::{Disk, Pc, console};

/// Long enough for a guest on an emulated processor on a busy machine; a hang ends the test.
const LIMIT: Duration = Duration::from_secs(900);

/// The backend to boot on: `VMCORE_ACCEL`, or the best there is.
fn accel() -> Accel {
    std::env::var("VMCORE_ACCEL").map_or(Accel::Auto, |name| name.parse().unwrap())
}

/// Where the guests are and a directory for images, or `None` after saying why the test is skipped.
fn prepared() -> Option<(PathBuf, tempfile::TempDir)> {
    let guests = std::env::var_os("VMCORE_GUESTS")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guests"), PathBuf::from);
    let usable = host::check().backends.iter().any(|backend| backend.status == Status::Usable);
    let needed = ["disks.ext4", "cloud/initrd.img"].iter().all(|name| guests.join(name).exists());
    if !usable || !needed {
        let reason = format!("no backend runs kernels, or no guests in {}", guests.display());
        assert!(std::env::var_os("VMCORE_REQUIRE_BOOT").is_none(), "boot tests are required, but {reason}");
        println!("skipped: {reason}");
        return None;
    }
    Some((guests, tool::directory()?))
}

/// Boots the guest from an overlay over its root, with `disks` from /dev/vdb on, and has `user` type.
fn boot(guests: &Path, directory: &Path, disks: Vec<Disk>, user: impl FnOnce(&Script) + Send + 'static) {
    boot_again(guests, directory, disks, || panic!("no disk may stop it"), user);
}

/// As [`boot`], and calls `stopped` whenever a disk stops the VM, which then runs again.
fn boot_again(
    guests: &Path,
    directory: &Path,
    disks: Vec<Disk>,
    mut stopped: impl FnMut(),
    user: impl FnOnce(&Script) + Send + 'static,
) {
    let root = guests.join("disks.ext4");
    let options = format!("backing_file={},backing_fmt=raw", root.canonicalize().unwrap().display());
    let overlay = create(directory, "root.qcow2", "qcow2", &options, "");
    let (serial, script) = console::memory().unwrap();
    let linux = Linux::new(guests.join("cloud/vmlinuz"))
        .initrd(guests.join("cloud/initrd.img"))
        .cmdline("console=ttyS0 panic=-1 quiet root=/dev/vda rw vmtest=shell");
    let mut builder = Vm::builder()
        .accel(accel())
        .cpus(2)
        .memory(512 << 20)
        .boot(linux)
        .attach(Pc::new().serial(serial))
        .attach(virtio(Disk::image(Image::qcow2(&overlay).backing(Image::raw(root))).unwrap()));
    for disk in disks {
        builder = builder.attach(virtio(disk));
    }
    let mut vm = builder.build().unwrap();
    script.send("stty -echo; PS1=; echo re''ady\n").unwrap();
    let typist = std::thread::spawn({
        let script = script.clone();
        move || {
            script.expect("ready", LIMIT).unwrap();
            user(&script);
            script.send("exit\n").unwrap();
        }
    });
    let outcome = loop {
        match vm.run_for(LIMIT) {
            Ok(Outcome::IoError) => stopped(),
            outcome => break outcome,
        }
    };
    drop(vm);
    let typed = typist.join();
    let ended = typed.is_ok() && matches!(outcome, Ok(Outcome::PowerOff));
    assert!(ended, "{outcome:?}\n{}", script.transcript());
    assert!(qemu_img(&format!("check -q {}", overlay.display())), "the root");
}

/// Types `command`, and gives what it puts out; its last line says how it ended.
fn ask(script: &Script, command: &str) -> String {
    script.send(format!("{{ {command}; }} 2>&1; echo \"status=$?\" END''MARK\n")).unwrap();
    script.expect("ENDMARK", LIMIT).unwrap_or_else(|error| panic!("{command}: {error}"))
}

#[track_caller]
fn works(script: &Script, command: &str) -> String {
    let answer = ask(script, command);
    assert!(answer.contains("status=0"), "{command}: {answer}");
    answer
}

/// Makes a file system, has fio write and verify in it and beside it, fills it, checks it.
fn work(script: &Script, disk: &str) {
    let begin = Instant::now();
    let fio = "fio --minimal --output=/tmp/fio --size=3M --bsrange=4k-64k --verify=crc32c --verify_fatal=1";
    works(script, &format!("mkfs.ext4 -q -E discard {disk} && mount -o discard {disk} /data"));
    works(
        script,
        &format!("{fio} --name=a --filename=/data/a --rw=randwrite --ioengine=psync --end_fsync=1"),
    );
    works(
        script,
        &format!(
            "{fio} --name=b --filename=/data/b --rw=randrw --direct=1 --ioengine=libaio --iodepth=16 --bs_unaligned=0"
        ),
    );
    // Full to the brim, and a hole where it was.
    let full = ask(script, "dd if=/dev/urandom of=/data/fill bs=1M");
    assert!(full.contains("No space left"), "{full}");
    works(script, "md5sum /data/a /data/b /data/fill >/tmp/sums; sync; echo 3 >/proc/sys/vm/drop_caches");
    works(script, "md5sum -c --quiet /tmp/sums && rm /data/fill && fstrim /data");
    works(
        script,
        "echo 3 >/proc/sys/vm/drop_caches; cmp /data/a /data/a && cp /data/b /data/c && umount /data",
    );
    works(script, &format!("e2fsck -fn {disk}"));
    println!("{disk}: {:?}", begin.elapsed());
}

#[test]
fn file_systems_on_every_format_and_cache_mode_are_sound() {
    let Some((guests, directory)) = prepared() else { return };
    let path = directory.path().to_path_buf();
    let over = |name: &str, base: &str| {
        let options = format!("backing_file={},backing_fmt=qcow2", path.join(base).display());
        create(&path, name, "qcow2", &options, "")
    };
    for name in ["raw", "direct"] {
        create(&path, name, "raw", "", "24M");
    }
    for name in ["plain", "through", "base"] {
        create(&path, name, "qcow2", "", "24M");
    }
    let (middle, top) = (over("middle", "base"), over("top", "middle"));
    let chain = Image::qcow2(top).backing(Image::qcow2(middle).backing(Image::qcow2(path.join("base"))));
    let image = |name: &str| path.join(name);
    let disk = |image: Image, mode| Disk::image(image).unwrap().cache(mode).queues(2);
    let disks = vec![
        disk(Image::raw(image("raw")), CacheMode::WriteBack),
        disk(Image::raw(image("direct")).direct(), CacheMode::WriteThrough),
        disk(Image::qcow2(image("plain")), CacheMode::Unsafe),
        disk(Image::qcow2(image("through")), CacheMode::WriteThrough),
        disk(chain, CacheMode::WriteBack),
    ];
    let handles = disks.iter().map(Disk::handle).collect::<Vec<_>>();
    boot(&guests, &path, disks, |script| {
        works(script, "mkdir -p /data; ls /sys/block/vdb/mq | wc -l | grep -x 2");
        for disk in ["/dev/vdb", "/dev/vdc", "/dev/vdd", "/dev/vde", "/dev/vdf"] {
            work(script, disk);
        }
    });
    for handle in handles {
        let stats = handle.stats();
        println!("{stats:?}");
        assert!(stats.errors == 0 && stats.cleared > 0 && stats.bytes_written > 20 << 20, "{stats:?}");
    }
    for (name, format) in
        [("raw", "raw"), ("direct", "raw"), ("plain", "qcow2"), ("through", "qcow2"), ("top", "qcow2")]
    {
        let (file, copy) = (path.join(name), path.join("copy"));
        assert!(format == "raw" || qemu_img(&format!("check -q {}", file.display())), "{name}");
        assert!(qemu_img(&format!("convert -f {format} -O raw {} {}", file.display(), copy.display())));
        let fsck = Command::new("e2fsck").arg("-fn").arg(&copy).output().unwrap();
        assert!(fsck.status.success(), "{name}: {fsck:?}");
    }
}

#[test]
fn what_goes_wrong_underneath_is_an_error_inside_and_the_guest_goes_on() {
    let Some((guests, directory)) = prepared() else { return };
    let path = directory.path().to_path_buf();
    create(&path, "raw", "raw", "", "16M");
    let faulty = Arc::new(Faulty::new(Image::raw(path.join("raw")).open().unwrap()));
    let disk = Disk::new(faulty.clone()).id("trusted").unwrap();
    let handle = disk.handle();
    let plain = Disk::open(create(&path, "second", "raw", "", "16M")).unwrap().queues(4);
    let other = plain.handle();
    let cut = path.join("second");
    boot(&guests, &path, vec![disk, plain], move |script| {
        works(script, "cat /sys/block/vdb/serial | grep -x trusted");
        works(script, "dd if=/dev/urandom of=/dev/vdb bs=1M count=16 oflag=direct status=none");
        let fault = |operation, effect| Fault {
            operation,
            range: 1 << 20..(1 << 20) + 4096,
            effect,
            times: u32::MAX,
        };
        faulty.inject(fault(Operation::Read, Effect::Short(512, libc::EIO)));
        faulty.inject(fault(Operation::Write, Effect::Error(libc::ENOSPC)));
        faulty.inject(fault(Operation::Flush, Effect::Error(libc::EIO)));
        let fails = |command: &str| {
            let answer = ask(script, command);
            assert!(answer.contains("Input/output error"), "{command}: {answer}");
        };
        fails("dd if=/dev/vdb of=/dev/null bs=4k skip=256 count=1 iflag=direct");
        fails("dd if=/dev/zero of=/dev/vdb bs=4k seek=256 count=1 oflag=direct");
        works(script, "dd if=/dev/vdb of=/dev/null bs=4k skip=257 count=256 iflag=direct status=none");
        fails("dd if=/dev/zero of=/dev/vdb bs=4k seek=0 count=1 conv=fsync");
        faulty.heal();
        works(script, "dd if=/dev/zero of=/dev/vdb bs=1M count=16 oflag=direct conv=fsync status=none");
        works(script, "cmp -n 16777216 /dev/vdb /dev/zero && dmesg | grep 'I/O error, dev vdb'");
        assert!(handle.stats().errors >= 3);

        // A slow disk holds up neither the other one nor the machine.
        let slow = Effect::Delay(Duration::from_millis(1500));
        faulty.inject(Fault { operation: Operation::Read, range: 0..1 << 24, effect: slow, times: 1 });
        let answer = works(
            script,
            "(dd if=/dev/vdb of=/dev/null bs=4k count=1 iflag=direct status=none; echo slow) & \
             dd if=/dev/vdc of=/dev/null bs=4k count=100 iflag=direct status=none; echo quick; wait",
        );
        assert!(answer.find("quick").unwrap() < answer.find("slow").unwrap(), "{answer}");

        // Larger and smaller while it runs.
        handle.resize(24 << 20).unwrap();
        works(script, "sleep 1; grep -x 49152 /sys/block/vdb/size");
        works(script, "dd if=/dev/zero of=/dev/vdb bs=1M seek=23 count=1 oflag=direct status=none");
        handle.shrink(8 << 20).unwrap();
        works(script, "sleep 1; grep -x 16384 /sys/block/vdb/size");
        // A file cut short by somebody else.
        std::fs::OpenOptions::new().write(true).open(&cut).unwrap().set_len(8 << 20).unwrap();
        fails("dd if=/dev/vdc of=/dev/null bs=64k skip=127 count=2 iflag=direct");

        // Queues and cache mode, as Linux sees them.
        works(script, "ls /sys/block/vdc/mq | wc -l | grep -x 2");
        works(script, "grep -x 'write back' /sys/block/vdc/cache_type");
        works(
            script,
            "echo 'write through' >/sys/block/vdc/cache_type; grep -x 'write through' /sys/block/vdc/cache_type",
        );
        works(script, "dd if=/dev/zero of=/dev/vdc bs=4k count=10 oflag=direct status=none");

        // 20 operations a second, and five at once.
        let rate = Rate { per_second: 20, burst: 5 };
        other.set_limits(Limits { operations: Some(rate), ..Limits::default() });
        let begin = Instant::now();
        works(script, "dd if=/dev/vdc of=/dev/null bs=4k count=45 iflag=direct status=none");
        assert!(begin.elapsed() >= Duration::from_millis(1900), "{:?}", begin.elapsed());
        assert!(other.stats().throttled > 0);
    });
}

#[test]
fn a_guest_whose_disk_waits_for_room_on_the_host_does_not_notice() {
    let Some((guests, directory)) = prepared() else { return };
    let path = directory.path().to_path_buf();
    let image = Image::raw(create(&path, "raw", "raw", "", "16M")).open().unwrap();
    let faulty = Arc::new(Faulty::new(image));
    let disk = Disk::new(faulty.clone()).queues(2).on_error(OnError::Stop, OnError::StopIfFull);
    let handle = disk.handle();
    let fault =
        |operation, range, number| Fault { operation, range, effect: Effect::Error(number), times: u32::MAX };
    let full = fault(Operation::Write, 4 << 20..8 << 20, libc::ENOSPC);
    faulty.inject(full);
    faulty.inject(fault(Operation::Write, 15 << 20..(15 << 20) + 4096, libc::EIO));
    let mut stops = Vec::new();
    let stopped = || {
        let stop = handle.stopped().unwrap();
        stops.push((stop.writing, stop.kind));
        // Not the first time: it tries in vain once.
        match stops.len() {
            1 => {}
            2 => {
                faulty.heal();
                faulty.inject(fault(Operation::Read, 0..4096, libc::EIO));
                faulty.inject(fault(Operation::Write, 15 << 20..(15 << 20) + 4096, libc::EIO));
            }
            _ => {
                faulty.heal();
                faulty.inject(fault(Operation::Write, 15 << 20..(15 << 20) + 4096, libc::EIO));
            }
        }
    };
    boot_again(&guests, &path, vec![disk], stopped, |script| {
        works(
            script,
            "dd if=/dev/urandom of=/tmp/noise bs=1M count=12 status=none && \
             dd if=/tmp/noise of=/dev/vdb bs=1M oflag=direct conv=fsync status=none",
        );
        works(script, "echo 3 >/proc/sys/vm/drop_caches; cmp -n 12582912 /tmp/noise /dev/vdb");
        assert!(!ask(script, "dmesg").contains("I/O error"));
        // Another error than that is one inside.
        let answer = ask(script, "dd if=/dev/zero of=/dev/vdb bs=4k seek=3840 count=1 oflag=direct");
        assert!(answer.contains("Input/output error"), "{answer}");
    });
    use std::io::ErrorKind::StorageFull;
    assert_eq!(stops[..2], [(true, StorageFull), (true, StorageFull)]);
    assert!(stops.len() >= 3 && stops[2..].iter().all(|(writing, _)| !writing), "{stops:?}");
    println!("{stops:?} {:?}", handle.stats());
}
