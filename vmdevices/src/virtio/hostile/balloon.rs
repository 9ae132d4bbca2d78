//! A guest that gives away what it has not, and more than that.

use super::*;
use crate::virtio::balloon::BalloonStatistics;

const INFLATE: u32 = 0;
const STATISTICS: u32 = 2;
const REPORT: u32 = 4;
const STATS: u64 = 1 << 1;
const POISON: u64 = 1 << 4;
const REPORTING: u64 = 1 << 5;

const PAGE: u64 = 0x1000;
/// Where pages are to give away, each with a mark.
const PAGES: u64 = 0x40;

struct Guest {
    driver: Driver,
    handle: BalloonHandle,
}

impl Guest {
    fn new(features: u64) -> Self {
        let device = Balloon::new().unwrap();
        let handle = device.handle();
        let mut driver = Driver::new(device, Threading::Vcpu);
        driver.negotiate(features::VERSION_1 | features);
        Self { driver, handle }
    }

    fn start(&mut self, queue: u32) {
        self.driver.queue = queue;
        self.driver.queue(queue, SIZE, [TABLE, AVAILABLE, USED]);
        self.driver.write(0x70, 15);
        for page in PAGES..PAGES + 16 {
            self.driver.memory.store(GuestAddress(page * PAGE), &page).unwrap();
        }
    }

    /// The numbers of the marked pages that have lost their marks.
    fn gone(&self) -> Vec<u64> {
        let mark = |page: &u64| self.driver.memory.load::<u64>(GuestAddress(page * PAGE)).unwrap();
        (PAGES..PAGES + 16).filter(|page| mark(page) != *page).collect()
    }

    /// Puts `list` into the balloon.
    fn inflate(&mut self, list: &[u32]) {
        let bytes = list.iter().flat_map(|page| page.to_le_bytes()).collect::<Vec<_>>();
        self.driver.memory.write(GuestAddress(DATA), &bytes).unwrap();
        self.driver.descriptor(TABLE, 0, DATA, bytes.len().try_into().unwrap(), 0, 0);
        self.driver.offer(0);
    }
}

#[test]
fn pages_are_given_back_and_others_left_alone() {
    let mut guest = Guest::new(0);
    guest.start(INFLATE);
    // Upwards, downwards, twice, and where there is nothing, on both sides of the end and beyond all.
    guest.inflate(&[0x41, 0x42, 0x43, 0x4a, 0x49, 0x48, 0x4c, 0x4c, 0x102, 0xffff_ffff, 0xfee00]);
    assert_eq!(guest.gone(), [0x41, 0x42, 0x43, 0x48, 0x49, 0x4a, 0x4c]);
    // Read-only memory stays, and what is in a run with it.
    let rom = ROM / PAGE;
    guest.driver.memory.store(GuestAddress(ROM - PAGE), &1_u64).unwrap();
    guest.inflate(&[rom - 1, rom, rom + 1].map(|page| page.try_into().unwrap()));
    assert_eq!(guest.driver.memory.load::<u64>(GuestAddress(ROM - PAGE)).unwrap(), 0);
    assert_eq!((guest.driver.used(), guest.driver.broken()), (2, false));
    let pin = guest.driver.memory.snapshot().regions()[0].pin();
    guest.inflate(&[0x45]);
    assert!(!guest.gone().contains(&0x45), "a pinned page is gone");
    drop(pin);
    guest.inflate(&[0x45]);
    assert!(guest.gone().contains(&0x45));
}

#[test]
fn free_pages_are_given_back_unless_the_guest_checks_them() {
    for (features, poison, gone) in
        [(REPORTING, 0, true), (REPORTING | POISON, 0, true), (REPORTING | POISON, 0xaa, false)]
    {
        // Number 3 is what Linux takes, which counts no queue that was not agreed on.
        for queue in [3, REPORT] {
            let mut guest = Guest::new(features);
            guest.driver.device.write(0x10c, &u32::to_le_bytes(poison));
            guest.start(queue);
            guest.driver.descriptor(TABLE, 0, 0x41 * PAGE, 0x2000, WRITE | NEXT, 1);
            guest.driver.descriptor(TABLE, 1, 0x48 * PAGE + 8, 0x1000, WRITE | NEXT, 2);
            guest.driver.descriptor(TABLE, 2, 0x4f * PAGE - 8, 0x1008, WRITE, 0);
            guest.driver.offer(0);
            assert_eq!((guest.driver.used(), guest.driver.broken()), (1, false));
            assert_eq!(guest.gone(), if gone { vec![0x41, 0x42, 0x4f] } else { vec![] });
        }
    }
    let mut guest = Guest::new(0);
    guest.driver.device.write(0x104, &[0, 0, 1]);
    guest.driver.device.write(0x104, &[0, 1, 0, 0]);
    assert_eq!((guest.handle.actual(), guest.driver.read(0x104)), (0x100 * PAGE, 0x100));
    guest.driver.write(0x100, 7);
    assert_eq!(guest.driver.read(0x100), 0, "the target is the host's");
}

#[test]
fn the_target_is_the_hosts_and_the_driver_is_told() {
    let mut guest = Guest::new(0);
    guest.handle.set_target(0x1_0000).unwrap();
    assert_eq!((guest.driver.read(0x100), guest.driver.edges.0.load(Ordering::SeqCst)), (16, 0));
    guest.start(INFLATE);
    let generation = guest.driver.read(0xfc);
    guest.handle.set_target(0x2_0fff).unwrap();
    assert_eq!((guest.driver.read(0x100), guest.handle.target()), (32, 0x2_0000));
    assert_eq!((guest.driver.read(0x60), guest.driver.edges.0.load(Ordering::SeqCst)), (2, 1));
    assert_ne!(guest.driver.read(0xfc), generation);
    let error = guest.handle.set_target(1 << 44).unwrap_err();
    assert!(error.to_string().contains("17592186044416"), "{error}");
    // A driver that was reset is not interrupted.
    guest.driver.write(0x70, 0);
    guest.handle.set_target(0).unwrap();
    assert_eq!(guest.driver.edges.0.load(Ordering::SeqCst), 1);
}

/// Writes statistics with these tags and values, and gives the buffer to the device.
fn offer_statistics(driver: &mut Driver, list: &[(u16, u64)]) {
    let bytes = list.iter().flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat());
    let mut bytes = bytes.collect::<Vec<_>>();
    // Half of one more.
    bytes.extend([4, 0, 9, 9]);
    driver.memory.write(GuestAddress(DATA), &bytes).unwrap();
    driver.descriptor(TABLE, 0, DATA, bytes.len().try_into().unwrap(), 0, 0);
    driver.offer(0);
}

#[test]
fn statistics_come_when_they_are_asked_for() {
    let mut guest = Guest::new(STATS);
    guest.start(STATISTICS);
    offer_statistics(&mut guest.driver, &[(4, 1)]);
    assert_eq!(guest.driver.used(), 0, "the device keeps the buffer");
    let answers = |guest: &mut Guest, list: &[(u16, u64)]| -> BalloonStatistics {
        let handle = guest.handle.clone();
        let asker = std::thread::spawn(move || handle.statistics(Duration::from_secs(10)));
        let used = guest.driver.used();
        while guest.driver.used() == used {
            guest.driver.device.poll();
        }
        offer_statistics(&mut guest.driver, list);
        asker.join().unwrap().unwrap()
    };
    let mut many = (0..10).map(|tag| (tag, 100 + u64::from(tag))).collect::<Vec<_>>();
    many.extend((0..100).map(|n| (1000 + n, 7)));
    let all = answers(&mut guest, &many);
    assert_eq!((all.swap_in, all.free, all.hugetlb_failures), (Some(100), Some(104), Some(109)));
    assert_eq!(all.others.len(), 64);
    let one = answers(&mut guest, &[(6, u64::MAX), (6, 5)]);
    assert_eq!(one, BalloonStatistics { available: Some(5), ..BalloonStatistics::default() });

    // A snapshot finds the buffer in the ring, and both go on with it.
    let state = guest.driver.device.save().unwrap();
    assert_eq!(answers(&mut guest, &[(5, 1)]).total, Some(1));
    guest.driver.available -= 1;
    let used = guest.driver.used() - 1;
    guest.driver.memory.store(GuestAddress(USED + 2), &used).unwrap();
    guest.driver.memory.store(GuestAddress(AVAILABLE + 2), &guest.driver.available).unwrap();
    guest.driver.device.restore(&state).unwrap();
    assert_eq!(answers(&mut guest, &[(5, 2)]).total, Some(2));

    guest.driver.write(0x70, 0);
    assert_eq!(guest.handle.statistics(Duration::ZERO).unwrap_err().kind(), io::ErrorKind::TimedOut);
    let Guest { driver, handle } = guest;
    drop(driver);
    assert_eq!(handle.statistics(Duration::MAX).unwrap_err().kind(), io::ErrorKind::NotConnected);
}

/// The buffer that the device keeps is not the last of which it wants to hear.
#[test]
fn new_statistics_are_waited_for_with_event_indices() {
    let mut guest = Guest::new(STATS | features::EVENT_IDX);
    guest.start(STATISTICS);
    let event = |guest: &Guest| guest.driver.memory.load::<u16>(GuestAddress(USED + 4 + 64)).unwrap();
    for n in 1..4 {
        offer_statistics(&mut guest.driver, &[(4, 1)]);
        assert_eq!((event(&guest), guest.driver.used()), (n, n - 1));
        guest.handle.statistics(Duration::ZERO).unwrap_err();
        guest.driver.device.poll();
    }
}
