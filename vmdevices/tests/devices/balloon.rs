//! Linux' virtio_balloon: what it gives back leaves the host's memory.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use vmcore::GuestMemory;
use vmdevices::console::Script;
use vmdevices::virtio::Balloon;

use super::super::guests;
use super::super::transport::virtio;
use super::{LIMIT, at_the_shell, machine, shell};

const MIB: u64 = 1 << 20;

/// How much of the guest's memory is in the host's (proc(5), pagemap), in MiB.
fn resident(memory: &GuestMemory) -> u64 {
    const PRESENT: u64 = 1 << 63;
    let pagemap = File::open("/proc/self/pagemap").unwrap();
    let mut pages = 0;
    for region in memory.snapshot().regions() {
        let mut entries = vec![0; usize::try_from(region.len() / 4096 * 8).unwrap()];
        pagemap.read_exact_at(&mut entries, region.host_address() as u64 / 4096 * 8).unwrap();
        let entries = entries.chunks(8).map(|entry| u64::from_le_bytes(entry.try_into().unwrap()));
        pages += entries.filter(|entry| entry & PRESENT != 0).count() as u64;
    }
    pages * 4096 / MIB
}

/// Waits until `what` holds of the resident MiB; gives them.
fn settles(memory: &GuestMemory, what: impl Fn(u64) -> bool) -> u64 {
    let end = Instant::now() + LIMIT;
    loop {
        let now = resident(memory);
        if what(now) {
            return now;
        }
        assert!(Instant::now() < end, "{now} MiB are resident");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// All of the memory can be used again, and is what was written.
fn filled_again(script: &Script) {
    let fill = "dd if=/dev/zero of=/tmp/file bs=1M count=300; ls -l /tmp/file";
    let sum = shell(script, &format!("{fill}; dd if=/tmp/file bs=1M skip=280 2>/dev/null | md5sum"));
    assert!(sum.contains("314572800") && sum.contains("8f4e33f3dc3e414ff94e5fb6905cba8c"), "{sum}");
}

#[test]
fn memory_that_the_guest_gives_back_leaves_the_hosts() {
    let Some(guests) = guests() else { return };
    let balloon = Balloon::new().unwrap().free_page_reporting(false);
    let handle = balloon.handle();
    let (builder, script) = machine(&guests, "cloud", "", 512);
    let vm = builder.attach(virtio(balloon)).build().unwrap();
    let memory = vm.memory().clone();
    at_the_shell(vm, &script, || {
        shell(
            &script,
            "modprobe virtio_mmio; modprobe virtio_balloon; mount -t tmpfs -o size=400m tmpfs /tmp",
        );
        shell(&script, "dd if=/dev/zero of=/tmp/file bs=1M count=300; rm /tmp/file");
        let full = resident(&memory);
        assert!(full > 300, "{full}");
        let before = handle.statistics(LIMIT).unwrap();
        assert!(before.total.is_some_and(|total| total > 400 * MIB), "{before:?}");

        handle.set_target(300 * MIB).unwrap();
        let left = settles(&memory, |now| now + 280 <= full);
        let end = Instant::now() + LIMIT;
        while handle.actual() < 300 * MIB {
            assert!(Instant::now() < end, "{} MiB are in it", handle.actual() / MIB);
            std::thread::sleep(Duration::from_millis(50));
        }
        println!("balloon of 300 MiB: {full} MiB resident before, {left} MiB after");
        let with = handle.statistics(LIMIT).unwrap();
        let taken = before.free.unwrap() - with.free.unwrap();
        assert!((250 * MIB..350 * MIB).contains(&taken), "{before:?} {with:?}");

        // What a process would be killed for comes out of the balloon.
        let filled = shell(&script, "dd if=/dev/zero of=/tmp/file bs=1M count=300 && ls -l /tmp/file");
        assert!(filled.contains("314572800"), "{filled}");
        assert!(handle.actual() < 300 * MIB, "deflated on want of memory");
        shell(&script, "rm /tmp/file");
        handle.set_target(0).unwrap();
        let end = Instant::now() + LIMIT;
        while handle.actual() > 0 {
            assert!(Instant::now() < end, "{} MiB are in it", handle.actual() / MIB);
            std::thread::sleep(Duration::from_millis(50));
        }
        // All of it can be used again.
        filled_again(&script);
    });
}

#[test]
fn free_memory_is_reported_and_leaves_the_hosts() {
    let Some(guests) = guests() else { return };
    let (builder, script) = machine(&guests, "cloud", "", 512);
    let vm = builder.attach(virtio(Balloon::new().unwrap())).build().unwrap();
    let memory = vm.memory().clone();
    at_the_shell(vm, &script, || {
        shell(
            &script,
            "modprobe virtio_mmio; modprobe virtio_balloon; mount -t tmpfs -o size=400m tmpfs /tmp",
        );
        shell(&script, "dd if=/dev/zero of=/tmp/file bs=1M count=300");
        let full = resident(&memory);
        assert!(full > 300, "{full}");
        shell(&script, "rm /tmp/file");
        // Linux reports two seconds later.
        let left = settles(&memory, |now| now + 250 <= full);
        println!("300 MiB freed: {full} MiB resident before, {left} MiB after");
        filled_again(&script);
    });
}
