//! Disks, request by request: queues, cache modes, sizes, limits, faults.

use std::io;
use std::sync::atomic::AtomicUsize;
use std::time::Instant;

use super::*;
use crate::block::{Effect, Fault, Faulty, Limits, Operation, RawFile, RawOptions, Topology};
use crate::rate::Rate;
use crate::virtio::block::{CacheMode, Disk, DiskHandle};

pub(super) const FLUSH: u64 = 1 << 9;
const CONFIG_WCE: u64 = 1 << 11;
const MQ: u64 = 1 << 12;

pub(super) const READ: u32 = 0;
pub(super) const OUT: u32 = 1;
pub(super) const SYNC: u32 = 4;

pub(super) fn threads() -> Threading {
    Threading::IoThreads(vec![IoThread::new("disks").unwrap()])
}

pub(super) fn both() -> [Threading; 2] {
    [Threading::Vcpu, threads()]
}

pub(super) fn eventually(mut true_at_last: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !true_at_last() {
        assert!(Instant::now() < end, "it never came");
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// A disk in memory that counts how often it is flushed and called.
#[derive(Default)]
struct Counted {
    bytes: Mutex<Vec<u8>>,
    flushes: AtomicUsize,
    transfers: AtomicUsize,
}

impl Counted {
    fn new(sectors: usize) -> Arc<Self> {
        Arc::new(Self { bytes: Mutex::new(vec![0x22; sectors * 512]), ..Self::default() })
    }
}

impl BlockBackend for Counted {
    fn len(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read_at(&self, into: &mut Buffers<'_>, offset: u64) -> io::Result<()> {
        self.transfers.fetch_add(1, Ordering::SeqCst);
        into.write(&self.bytes.lock().unwrap()[usize::try_from(offset).unwrap()..]);
        Ok(())
    }
    fn write_at(&self, from: &mut Buffers<'_>, offset: u64) -> io::Result<()> {
        self.transfers.fetch_add(1, Ordering::SeqCst);
        let (at, len) = (usize::try_from(offset).unwrap(), from.len());
        from.read(&mut self.bytes.lock().unwrap()[at..at + len]);
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Ok(())
    }
    fn topology(&self) -> Topology {
        Topology { physical: 4096, discard: 65536, optimal: 1 << 20 }
    }
    fn resize(&self, len: u64) -> io::Result<()> {
        self.bytes.lock().unwrap().resize(usize::try_from(len).unwrap(), 0);
        Ok(())
    }
}

impl Driver {
    /// Starts the device with these features of its own.
    pub(super) fn start_with(&mut self, own: u64) {
        self.negotiate(features::VERSION_1 | features::INDIRECT_DESC | features::RING_RESET | own);
        self.queue(self.queue, SIZE, [TABLE, AVAILABLE, USED]);
        self.write(0x70, 15);
    }

    /// A request on its own descriptors, 0 to 2 of them, and its own page of data; not waited for.
    pub(super) fn begin(&mut self, slot: u16, kind: u32, sector: u64, len: u32) {
        let page = 0x1_0000 + 0x4000 * u64::from(slot);
        let (header, status, data) = (page, page + 0x20, page + 0x1000);
        let bytes = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        self.memory.write(GuestAddress(header), &bytes).unwrap();
        self.memory.store(GuestAddress(status), &0xff_u8).unwrap();
        // Of an indirect table, so that there is room for eight requests.
        let table = page + 0x100;
        let direction = if kind == READ { WRITE } else { 0 };
        self.descriptor(table, 0, header, 16, NEXT, 1);
        self.descriptor(table, 1, data, len, NEXT | direction, 2);
        self.descriptor(table, 2, status, 1, WRITE, 0);
        let skip = u16::from(len == 0);
        self.descriptor(table, 0, header, 16, NEXT, 1 + skip);
        self.descriptor(TABLE, slot, table, 48, TO_INDIRECT, 0);
        self.memory.store(GuestAddress(AVAILABLE + 4 + 2 * u64::from(self.available % SIZE)), &slot).unwrap();
        self.available = self.available.wrapping_add(1);
        self.memory.store(GuestAddress(AVAILABLE + 2), &self.available).unwrap();
    }

    pub(super) fn ring(&mut self) {
        self.write(0x50, self.queue);
    }

    pub(super) fn status_of(&self, slot: u16) -> u8 {
        self.memory.load(GuestAddress(0x1_0020 + 0x4000 * u64::from(slot))).unwrap()
    }

    pub(super) fn data_of(&self, slot: u16, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read(GuestAddress(0x1_1000 + 0x4000 * u64::from(slot)), &mut bytes).unwrap();
        bytes
    }

    /// A request, to its end: the status.
    pub(super) fn does(&mut self, kind: u32, sector: u64, len: u32) -> u8 {
        let before = self.used();
        self.begin(0, kind, sector, len);
        self.ring();
        eventually(|| self.used() != before);
        self.status_of(0)
    }
}

#[test]
fn writes_are_flushed_as_the_cache_mode_says() {
    for threading in both() {
        for (mode, features, flushed) in [
            (CacheMode::WriteBack, FLUSH, 0),
            (CacheMode::WriteBack, FLUSH | CONFIG_WCE, 0),
            // Who cannot flush is written through.
            (CacheMode::WriteBack, 0, 1),
            (CacheMode::WriteThrough, FLUSH, 1),
            (CacheMode::WriteThrough, FLUSH | CONFIG_WCE, 1),
            (CacheMode::Unsafe, FLUSH | CONFIG_WCE, 0),
            (CacheMode::Unsafe, 0, 0),
        ] {
            let backend = Counted::new(64);
            let mut driver = Driver::new(Disk::new(backend.clone()).cache(mode), threading.clone());
            driver.start_with(features);
            let flushes = || backend.flushes.load(Ordering::SeqCst);
            assert_eq!((driver.does(OUT, 1, 512), flushes()), (0, flushed), "{mode:?} {features:#x}");
            assert_eq!(driver.does(READ, 1, 512), 0);
            assert_eq!(driver.does(SYNC, 0, 0), 0);
            let flushed = flushed + usize::from(mode != CacheMode::Unsafe);
            assert_eq!(flushes(), flushed, "{mode:?} {features:#x}");
        }
    }
}

#[test]
fn the_guest_toggles_the_cache_mode_and_a_reset_and_a_restore_put_it_right() {
    let backend = Counted::new(64);
    let mut driver = Driver::new(Disk::new(backend.clone()), Threading::Vcpu);
    let flushes = || backend.flushes.load(Ordering::SeqCst);
    let mode = |driver: &mut Driver| {
        let mut byte = [9];
        driver.device.read(0x120, &mut byte);
        byte[0]
    };
    driver.start_with(FLUSH | CONFIG_WCE);
    assert_eq!(mode(&mut driver), 1);
    driver.device.write(0x120, &[0]);
    assert_eq!((mode(&mut driver), driver.does(OUT, 0, 512), flushes()), (0, 0, 1));
    let saved = driver.device.save().unwrap();
    driver.device.write(0x120, &[1]);
    assert_eq!((mode(&mut driver), driver.does(OUT, 0, 512), flushes()), (1, 0, 1));
    driver.device.write(0x120, &[0]);
    driver.start_with(FLUSH | CONFIG_WCE);
    assert_eq!((mode(&mut driver), driver.does(OUT, 0, 512), flushes()), (1, 0, 1));
    driver.device.restore(&saved).unwrap();
    assert_eq!(mode(&mut driver), 0);
}

#[test]
fn the_configuration_tells_sizes_shape_and_queues() {
    let disk = Disk::new(Counted::new(1 << 16)).queues(4);
    let mut driver = Driver::new(disk, Threading::Vcpu);
    let mut config = [0; 60];
    driver.device.read(0x100, &mut config);
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    let half = |at: usize| u16::from_le_bytes(config[at..at + 2].try_into().unwrap());
    assert_eq!((word(0), word(4), word(8), word(12)), (1 << 16, 0, 4 << 20, 254));
    assert_eq!((half(16), config[18], config[19]), (65, 16, 63), "geometry");
    // 512 << 3 bytes physical, the least 8 blocks, the best 2048.
    assert_eq!((word(20), config[24], half(26), word(28)), (512, 3, 8, 2048), "topology");
    assert_eq!((config[32], half(34)), (1, 4), "cache, queues");
    assert_eq!((word(44), config[56]), (128, 1), "discard, unmap");
    let offered = driver.read(0x10);
    // SIZE_MAX, SEG_MAX, GEOMETRY, BLK_SIZE, FLUSH, TOPOLOGY, CONFIG_WCE, MQ, DISCARD, WRITE_ZEROES.
    assert_eq!(offered & 0xff_ffff, 0x7e56, "{offered:#x}");
    let mut one = Driver::new(Disk::new(Counted::new(8)), Threading::Vcpu);
    assert_eq!(u64::from(one.read(0x10)) & MQ, 0);
}

#[test]
fn every_queue_works_and_a_slow_one_does_not_hold_up_another() {
    let backend = Arc::new(Faulty::new(Counted::new(64)));
    let mut driver = Driver::new(Disk::new(backend.clone()).queues(4), threads());
    for queue in 0..4 {
        driver.queue = queue;
        driver.start_with(MQ);
        assert_eq!((driver.does(READ, 1, 512), driver.data_of(0, 4)), (0, vec![0x22; 4]));
    }
    // Two queues at once: the first is stuck in the host, the second is served meanwhile.
    let slow = Effect::Delay(Duration::from_millis(500));
    backend.inject(Fault { operation: Operation::Read, range: 0..512, effect: slow, times: 1 });
    driver.queue = 0;
    driver.start_with(MQ);
    let (table, available, used) = (0x5000, 0x6000, 0x7000);
    driver.memory.zero(GuestAddress(table), 0x3000).unwrap();
    driver.write(0xc0, 0);
    driver.negotiate(features::VERSION_1 | features::INDIRECT_DESC | MQ);
    driver.queue(0, SIZE, [TABLE, AVAILABLE, USED]);
    driver.queue(1, SIZE, [table, available, used]);
    driver.write(0x70, 15);
    let begin = Instant::now();
    driver.begin(0, READ, 0, 512);
    driver.ring();
    driver.header(READ, 5);
    driver.descriptor(table, 0, HEADER, 16, NEXT, 1);
    driver.descriptor(table, 1, DATA, 512, NEXT | WRITE, 2);
    driver.descriptor(table, 2, STATUS, 1, WRITE, 0);
    driver.memory.store(GuestAddress(available + 2), &1u16).unwrap();
    driver.write(0x50, 1);
    assert!(begin.elapsed() < Duration::from_millis(250), "the vCPU waited: {:?}", begin.elapsed());
    eventually(|| driver.memory.load::<u16>(GuestAddress(used + 2)).unwrap() == 1);
    assert_eq!((driver.used(), driver.request_status()), (0, 0), "the fast one first");
    eventually(|| driver.used() == 1);
    assert_eq!(driver.status_of(0), 0);
}

#[test]
fn neighbours_go_to_the_host_together() {
    for threading in both() {
        let backend = Counted::new(256);
        let disk = Disk::new(backend.clone());
        let handle = disk.handle();
        let mut driver = Driver::new(disk, threading);
        driver.start_with(FLUSH);
        for slot in 0..8 {
            driver.begin(slot, OUT, 10 + 2 * u64::from(slot), 1024);
            driver
                .memory
                .write(GuestAddress(0x1_1000 + 0x4000 * u64::from(slot)), &[slot.to_le_bytes()[0]; 1024])
                .unwrap();
        }
        driver.ring();
        eventually(|| driver.used() == 8);
        assert!((0..8).all(|slot| driver.status_of(slot) == 0));
        assert_eq!((backend.transfers.load(Ordering::SeqCst), handle.stats().merged), (1, 7));
        let stored = backend.bytes.lock().unwrap()[10 * 512..].to_vec();
        assert!((0..8u8).all(|n| stored[usize::from(n) * 1024..][..1024] == [n; 1024]));
        assert_eq!((handle.stats().writes, handle.stats().bytes_written), (8, 8192));
        // Not neighbours.
        for slot in 0..4 {
            driver.begin(slot, READ, 5 * u64::from(slot), 512);
        }
        driver.ring();
        eventually(|| driver.used() == 12);
        assert_eq!((handle.stats().merged, handle.stats().reads, handle.stats().bytes_read), (7, 4, 2048));
    }
}

#[test]
fn faults_are_errors_of_their_requests_alone() {
    for threading in both() {
        let backend = Arc::new(Faulty::new(Counted::new(256)));
        let disk = Disk::new(backend.clone());
        let handle = disk.handle();
        let mut driver = Driver::new(disk, threading);
        driver.start_with(FLUSH);
        let fault = |operation, effect| Fault { operation, range: 0x2000..0x2200, effect, times: u32::MAX };
        backend.inject(fault(Operation::Write, Effect::Short(100, libc::ENOSPC)));
        backend.inject(fault(Operation::Read, Effect::Error(libc::EIO)));
        backend.inject(fault(Operation::Flush, Effect::Error(libc::EIO)));
        // Sectors 14 to 18 in one: the one at 16 fails, its neighbours do not.
        for slot in 0..5 {
            driver.begin(slot, READ, 14 + u64::from(slot), 512);
        }
        driver.ring();
        eventually(|| driver.used() == 5);
        assert_eq!([0, 1, 2, 3, 4].map(|slot| driver.status_of(slot)), [0, 0, 1, 0, 0]);
        assert_eq!([driver.does(OUT, 16, 512), driver.does(SYNC, 0, 0)], [1, 1]);
        assert_eq!((handle.stats().errors, handle.stats().reads), (3, 4));
        assert_eq!((driver.does(OUT, 17, 512), driver.status()), (0, 15));
        backend.heal();
        assert_eq!([driver.does(OUT, 16, 512), driver.does(SYNC, 0, 0)], [0, 0]);
    }
}

struct Panics;

impl BlockBackend for Panics {
    fn len(&self) -> u64 {
        4096
    }
    fn read_only(&self) -> bool {
        true
    }
    fn read_at(&self, _: &mut Buffers<'_>, _: u64) -> io::Result<()> {
        panic!("an image that nobody thought of")
    }
    fn write_at(&self, _: &mut Buffers<'_>, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_back_end_that_panics_is_an_io_error() {
    for threading in both() {
        let mut driver = Driver::new(Disk::new(Arc::new(Panics)), threading);
        driver.start_with(0);
        assert_eq!([driver.does(READ, 0, 512), driver.does(OUT, 0, 512), driver.does(READ, 1, 512)], [1; 3]);
        assert_eq!(driver.status(), 15);
    }
}

#[test]
fn a_disk_grows_and_shrinks_while_the_guest_uses_it() {
    for threading in both() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(64 * 512).unwrap();
        let disk = Disk::open(image.path()).unwrap();
        let handle = disk.handle();
        let mut driver = Driver::new(disk, threading);
        // Before there is a driver there is nobody to tell.
        handle.resize(65 * 512).unwrap();
        assert_eq!((driver.read(0x100), driver.read(0x60)), (65, 0));
        driver.start_with(FLUSH);
        assert_eq!(driver.does(READ, 100, 512), 1);
        driver.write(0x64, 1);
        let generation = driver.read(0xfc);
        handle.resize(128 * 512).unwrap();
        assert_eq!((driver.read(0x100), driver.read(0x60)), (128, 2));
        assert_ne!(driver.read(0xfc), generation);
        assert_eq!((driver.does(READ, 100, 512), driver.data_of(0, 1)), (0, vec![0]));
        assert_eq!((driver.does(OUT, 127, 512), handle.len()), (0, 128 * 512));
        for (bad, words) in [(64 * 512, "shrink()"), (200 * 512 + 1, "multiple of 512")] {
            let text = handle.resize(bad).unwrap_err().to_string();
            assert!(text.contains(words) && text.contains(&bad.to_string()), "{text}");
        }
        assert!(handle.shrink(0).is_err());
        handle.shrink(64 * 512).unwrap();
        assert_eq!([driver.does(READ, 64, 512), driver.does(READ, 63, 512)], [1, 0]);
        assert_eq!(image.as_file().metadata().unwrap().len(), 64 * 512);
    }
}

/// What the kernel does at once and what threads do, past the page cache and through it: the same.
#[test]
fn files_are_read_and_written_whatever_the_way_there() {
    for direct in [false, true] {
        // Not in memory: a file system there may have no O_DIRECT.
        let image = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        image.as_file().set_len(256 * 512).unwrap();
        let file = match RawFile::open_with(image.path(), RawOptions { direct, ..RawOptions::default() }) {
            Err(error) if direct => {
                println!("skipped: {error}");
                continue;
            }
            file => file.unwrap(),
        };
        let disk = Disk::new(Arc::new(file)).cache(CacheMode::WriteThrough);
        let handle = disk.handle();
        let mut driver = Driver::new(disk, threads());
        driver.start_with(FLUSH);
        let mut expected = vec![0; 256 * 512];
        for round in 0..50u8 {
            for slot in 0..8u16 {
                let sector = (u64::from(round) * 37 + u64::from(slot) * 29) % 248;
                let data = vec![round ^ slot.to_le_bytes()[0] << 4; 4 * 512];
                // Not aligned to anything but 16 bytes, now and then.
                driver.begin(slot, OUT, sector, 2048);
                let page = 0x1_0000 + 0x4000 * u64::from(slot);
                let at = page + 0x1000 + if round % 2 == 1 { 16 } else { 0 };
                driver.descriptor(page + 0x100, 1, at, 2048, NEXT, 2);
                driver.memory.write(GuestAddress(at), &data).unwrap();
                expected[usize::try_from(sector).unwrap() * 512..][..2048].copy_from_slice(&data);
                // One at a time: what overlaps has no order otherwise.
                driver.ring();
                let (available, device) = (driver.available, &driver);
                eventually(|| device.used() == available);
                assert_eq!(driver.status_of(slot), 0);
            }
        }
        let before = driver.available;
        for slot in 0..8 {
            driver.begin(slot, READ, 30 * u64::from(slot), 4096);
        }
        driver.ring();
        eventually(|| driver.used() == before + 8);
        for slot in 0..8 {
            let at = 30 * 512 * usize::from(slot);
            assert!(driver.data_of(slot, 4096) == expected[at..at + 4096], "direct: {direct}, slot {slot}");
        }
        assert_eq!((handle.stats().errors, handle.stats().writes), (0, 400));
        assert!(std::fs::read(image.path()).unwrap() == expected);
        // Somebody cuts the file short: an error, and not zeroes.
        image.as_file().set_len(128 * 512).unwrap();
        assert_eq!([driver.does(READ, 127, 1024), driver.does(READ, 127, 512)], [1, 0]);
    }
}

#[test]
fn limits_hold_and_delay_nobody_else() {
    let disk = Disk::new(Counted::new(64))
        .limits(Limits { operations: Some(Rate { per_second: 50, burst: 5 }), ..Limits::default() });
    let handle: DiskHandle = disk.handle();
    let mut driver = Driver::new(disk, threads());
    driver.start_with(FLUSH);
    let begin = Instant::now();
    (0..15).for_each(|_| assert_eq!(driver.does(READ, 0, 512), 0));
    // Five at once, and the debt of a sixth; then one each 20 ms.
    assert!(begin.elapsed() >= Duration::from_millis(170), "{:?}", begin.elapsed());
    assert!(handle.stats().throttled > 0);
    // Those that wait are not in flight: a reset does not wait for them, and a notification costs nothing.
    handle.set_limits(Limits { bytes: Some(Rate { per_second: 512, burst: 1 }), ..Limits::default() });
    (0..4).for_each(|slot| driver.begin(slot, READ, 0, 512));
    let begin = Instant::now();
    driver.ring();
    driver.start_with(FLUSH);
    assert!(begin.elapsed() < Duration::from_millis(500), "{:?}", begin.elapsed());
    handle.set_limits(Limits::default());
    assert_eq!(driver.does(READ, 0, 512), 0);
    // And those that wait come when the limit goes, at the next occasion.
    handle.set_limits(Limits { operations: Some(Rate { per_second: 1, burst: 1 }), ..Limits::default() });
    driver.begin(0, READ, 0, 512);
    driver.ring();
    eventually(|| driver.used() == 2);
}

#[test]
fn a_state_is_saved_with_requests_in_flight() {
    let backend = Arc::new(Faulty::new(Counted::new(64)));
    let slow = Effect::Delay(Duration::from_millis(20));
    backend.inject(Fault { operation: Operation::Read, range: 0..1 << 20, effect: slow, times: u32::MAX });
    let mut driver = Driver::new(Disk::new(backend), threads());
    driver.start_with(FLUSH);
    for slot in 0..8 {
        // Every other one: none are merged.
        driver.begin(slot, READ, 2 * u64::from(slot), 512);
    }
    driver.ring();
    std::thread::sleep(Duration::from_millis(5));
    driver.device.save().unwrap();
    // Whatever was in flight has been answered; what was not begun is still to come.
    let used = driver.used();
    assert!((0..8).all(|slot| (driver.status_of(slot) == 0) == (slot < used)) || used == 8);
    eventually(|| driver.used() == 8);
    assert!((0..8).all(|slot| driver.status_of(slot) == 0));
}

/// One head, offered again before it was given back: the device has no more in flight than entries.
#[test]
fn a_request_that_is_offered_again_and_again_is_no_flood() {
    let backend = Arc::new(Faulty::new(Counted::new(64)));
    let slow = Effect::Delay(Duration::from_millis(2));
    backend.inject(Fault { operation: Operation::Read, range: 0..512, effect: slow, times: u32::MAX });
    let mut driver = Driver::new(Disk::new(backend), threads());
    driver.start_with(FLUSH);
    for _ in 0..64 {
        driver.begin(0, READ, 0, 512);
        driver.ring();
        eventually(|| driver.available.wrapping_sub(driver.used()) < SIZE);
    }
    eventually(|| driver.used() == 64);
    assert!(!driver.broken());
}
