//! What no device may do, whichever it is and whichever of its queues is abused.

use std::sync::atomic::AtomicBool;
use std::time::Instant;

use super::*;
use crate::console;

/// A descriptor: table, index, address, length, flags, next.
type Descriptor = (u64, u16, u64, u32, u16, u16);

/// A queue under test.
struct Case {
    name: &'static str,
    driver: Driver,
    /// A chain that the device serves.
    good: Vec<Descriptor>,
}

impl Case {
    fn new(name: &'static str, threading: &Threading) -> Self {
        let threading = threading.clone();
        let (mut driver, queue, data) = match name {
            "disk" => (Driver::new(Disk::new(Arc::new(Bytes::new(64))), threading), 0, WRITE),
            "rng" => (Driver::new(Rng::new(), threading), 0, WRITE),
            "vsock out" => (Driver::new(Vsock::new(3).unwrap(), threading), 1, 0),
            "console input" | "console output" => {
                let (terminal, script) = console::memory().unwrap();
                script.send("typed ".repeat(10_000)).unwrap();
                let driver = Driver::new(VirtioConsole::new(terminal), threading);
                if name == "console input" { (driver, 0, WRITE) } else { (driver, 1, 0) }
            }
            _ => {
                let packets = Arc::new(Mutex::new(vec![frame(60, 7); 10_000].into()));
                let driver = Driver::new(Net::new(Packets(packets)).unwrap(), threading);
                if name == "packets in" { (driver, 0, WRITE) } else { (driver, 1, 0) }
            }
        };
        let good = if name == "disk" {
            vec![
                (TABLE, 0, HEADER, 16, NEXT, 1),
                (TABLE, 1, DATA, 512, NEXT | WRITE, 2),
                (TABLE, 2, STATUS, 1, WRITE, 0),
            ]
        } else {
            vec![(TABLE, 0, DATA, 64, data, 0)]
        };
        driver.queue = queue;
        Self { name, driver, good }
    }

    fn every(threading: &Threading) -> impl Iterator<Item = Self> {
        let names =
            ["disk", "rng", "console input", "console output", "packets in", "packets out", "vsock out"];
        names.into_iter().map(|name| Self::new(name, threading))
    }

    fn lay(&self, descriptors: &[Descriptor]) {
        for &(table, index, at, len, flags, next) in descriptors {
            self.driver.descriptor(table, index, at, len, flags, next);
        }
    }

    /// The device serves a good chain after a reset.
    fn recovers(&mut self) {
        self.driver.start();
        self.driver.header(0, 0);
        self.lay(&self.good);
        self.driver.offer(0);
        let end = Instant::now() + Duration::from_secs(10);
        while self.driver.used() == 0 && Instant::now() < end {
            std::thread::yield_now();
        }
        assert_eq!((self.driver.status(), self.driver.used()), (15, 1), "{}", self.name);
    }
}

/// Chains that break the rules whatever the device, by the index of their heads.
fn malformed() -> Vec<(u16, Vec<Descriptor>)> {
    let one = |at, len, flags| vec![(TABLE, 0, at, len, flags, 0)];
    let indirect = |inside: &[Descriptor]| [&one(INDIRECT, 32, TO_INDIRECT), inside].concat();
    let chains = [
        // Loops.
        one(DATA, 16, NEXT),
        vec![(TABLE, 0, DATA, 16, NEXT, 1), (TABLE, 1, DATA, 16, NEXT, 0)],
        indirect(&[(INDIRECT, 0, DATA, 16, NEXT, 0)]),
        // Out of the table.
        vec![(TABLE, 0, DATA, 16, NEXT, SIZE)],
        indirect(&[(INDIRECT, 0, DATA, 16, NEXT, 2)]),
        // Tables in tables.
        indirect(&[(INDIRECT, 0, INDIRECT, 32, TO_INDIRECT, 0)]),
        one(TABLE, 128, TO_INDIRECT),
        // Tables of no length, of half an entry, of too many, and not in memory.
        one(INDIRECT, 0, TO_INDIRECT),
        one(INDIRECT, 24, TO_INDIRECT),
        one(INDIRECT, 16 << 16, TO_INDIRECT),
        one(0x10_1000, 32, TO_INDIRECT),
        one(u64::MAX - 15, 32, TO_INDIRECT),
        // Buffers over the end of memory, behind it, where there are devices, and over the top.
        one(0x10_0ff0, 32, 0),
        one(0x10_1000, 1, 0),
        one(0xfee0_0000, 4, 0),
        one(u64::MAX - 15, 32, 0),
        one(DATA, u32::MAX, 0),
        // Written where nobody can.
        one(ROM, 16, WRITE),
        // The answer before the question.
        vec![(TABLE, 0, DATA, 16, NEXT | WRITE, 1), (TABLE, 1, DATA, 16, 0, 0)],
    ];
    let mut all: Vec<_> = chains.into_iter().map(|chain| (0, chain)).collect();
    all.extend([(SIZE, Vec::new()), (u16::MAX, Vec::new())]);
    all
}

#[test]
fn malformed_chains_stop_every_device() {
    for mut case in Case::every(&Threading::Vcpu) {
        case.recovers();
        for (head, chain) in malformed() {
            case.driver.start();
            case.lay(&chain);
            case.driver.offer(head);
            let (broken, used) = (case.driver.broken(), case.driver.used());
            assert_eq!((broken, used), (true, 0), "{}: {head} {chain:x?}", case.name);
            case.recovers();
        }
        case.driver.start();
        case.driver.available = SIZE;
        case.driver.offer(0);
        assert!(case.driver.broken(), "{}: an index that jumps", case.name);
        case.recovers();
    }
}

#[test]
fn features_that_are_not_offered_are_refused_by_every_device() {
    for mut case in Case::every(&Threading::Vcpu) {
        let driver = &mut case.driver;
        driver.write(0x14, 0);
        let low = driver.read(0x10);
        driver.write(0x14, 1);
        let offered = u64::from(driver.read(0x10)) << 32 | u64::from(low);
        for bit in (0..64).filter(|bit| offered >> bit & 1 == 0) {
            driver.negotiate(features::VERSION_1 | 1 << bit);
            assert_eq!(driver.status(), 3, "{}: bit {bit}", case.name);
            // Without FEATURES_OK there are no queues and no start.
            driver.queue(driver.queue, SIZE, [TABLE, AVAILABLE, USED]);
            driver.write(0x70, 15);
            assert_eq!((driver.status(), driver.read(0x44)), (3, 0), "{}: bit {bit}", case.name);
        }
        case.recovers();
    }
}

#[test]
fn notifications_before_driver_ok_and_of_no_queue_are_nothing() {
    for mut case in Case::every(&Threading::Vcpu) {
        case.driver.write(0x50, 0);
        case.driver.negotiate(features::VERSION_1);
        case.driver.queue(case.driver.queue, SIZE, [TABLE, AVAILABLE, USED]);
        case.driver.header(0, 0);
        case.lay(&case.good);
        case.driver.offer(0);
        case.driver.device.poll();
        let edges = case.driver.edges.clone();
        assert_eq!((case.driver.used(), edges.0.load(Ordering::SeqCst)), (0, 0), "{}", case.name);
        // What was offered before is served once the driver is ready, with no further notification.
        case.driver.write(0x70, 15);
        assert_eq!((case.driver.used(), edges.0.load(Ordering::SeqCst)), (1, 1), "{}", case.name);
        for queue in [2, 7, 0xffff, 0x1_0000, u32::MAX] {
            case.driver.write(0x50, queue);
        }
        assert_eq!((case.driver.used(), case.driver.status()), (1, 15), "{}", case.name);
    }
}

#[test]
fn memory_that_goes_away_stops_every_device() {
    const HOTPLUG: u64 = 0x4000_0000;
    for mut case in Case::every(&Threading::Vcpu) {
        let plug = || MemoryRegion::anonymous(GuestAddress(HOTPLUG), 0x1000).unwrap().into();
        for gone in 0..3 {
            case.driver.memory.insert(plug()).unwrap();
            case.driver.negotiate(features::VERSION_1);
            let mut places = [TABLE, AVAILABLE, USED];
            places[gone] = HOTPLUG;
            case.driver.queue(case.driver.queue, SIZE, places);
            case.driver.write(0x70, 15);
            assert_eq!(case.driver.status(), 15);
            case.driver.memory.remove(GuestAddress(HOTPLUG)).unwrap();
            case.lay(&case.good);
            case.driver.offer(0);
            assert!(case.driver.broken(), "{}: ring {gone}", case.name);
            case.recovers();
        }
    }
}

/// Nearly 4 GiB in one chain, over and over the same memory.
#[test]
fn the_longest_chains_end_soon() {
    for mut case in Case::every(&Threading::Vcpu) {
        case.driver.start();
        case.driver.header(0, 0);
        let writable = case.good.last().unwrap().4 & WRITE;
        case.lay(&[(TABLE, 0, 0x6_0000, 16 * 256, TO_INDIRECT, 0)]);
        for n in 0..256 {
            // Past the table itself, which a device may fill.
            let (at, len) = if n == 0 { (HEADER, 16) } else { (0x7_0000, 0x9_0000) };
            let flags = if n == 255 { 0 } else { NEXT } | if n == 0 { 0 } else { writable };
            case.lay(&[(0x6_0000, n, at, len, flags, n + 1)]);
        }
        let begin = Instant::now();
        case.driver.offer(0);
        assert!(begin.elapsed() < Duration::from_secs(10), "{}: {:?}", case.name, begin.elapsed());
        assert!(case.driver.broken() || case.driver.used() == 1, "{}", case.name);
        case.recovers();
    }
}

#[test]
fn resets_find_requests_in_flight_and_leave_nothing_behind() {
    let thread = IoThread::new("hostile").unwrap();
    for mut case in Case::every(&Threading::IoThreads(vec![thread.clone()])) {
        let mut served = 0;
        for round in 0..200_u32 {
            case.driver.start();
            case.driver.header(0, 0);
            case.lay(&case.good);
            (0..3).for_each(|_| case.driver.offer(0));
            (0..round * 20).for_each(|_| std::hint::spin_loop());
            match round % 3 {
                0 => case.driver.write(0x70, 0),
                1 => {
                    case.driver.write(0x30, case.driver.queue);
                    case.driver.write(0xc0, 1);
                }
                _ => {
                    case.driver.write(0x30, case.driver.queue);
                    case.driver.write(0x44, 0);
                }
            }
            // From here on the memory is the driver's own.
            let used = case.driver.used();
            served += u32::from(used);
            case.driver.memory.zero(GuestAddress(USED), 0x1000).unwrap();
            case.driver.write(0x50, case.driver.queue);
            if round % 20 == 0 {
                std::thread::sleep(Duration::from_millis(2));
            }
            assert_eq!(case.driver.used(), 0, "{}: round {round}, {used} used before", case.name);
        }
        assert!(served > 0, "{}: nothing was ever in flight", case.name);
        case.recovers();
    }
}

/// Another processor of the guest writes into tables and rings while they are served.
#[test]
fn rings_that_change_while_they_are_read_do_no_harm() {
    let thread = IoThread::new("hostile").unwrap();
    for mut case in Case::every(&Threading::IoThreads(vec![thread.clone()])) {
        let (memory, stop) = (case.driver.memory.clone(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut state = 1_u64;
                while !stop.load(Ordering::Relaxed) {
                    // Numerical Recipes' generator: its high bits are random enough.
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let page = [TABLE, AVAILABLE, INDIRECT][usize::try_from(state >> 60).unwrap() % 3];
                    let at = page + (state >> 40 & 0x7e);
                    memory.store(GuestAddress(at), &u16::try_from(state >> 24 & 0x1fff).unwrap()).unwrap();
                }
            });
            let end = Instant::now() + Duration::from_millis(300);
            while Instant::now() < end {
                case.driver.start();
                for _ in 0..50 {
                    case.driver.write(0x50, case.driver.queue);
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
        case.recovers();
    }
}

#[test]
fn devices_know_what_their_own_buffers_must_be() {
    let driven = |name, chain: &[Descriptor]| {
        let mut case = Case::new(name, &Threading::Vcpu);
        case.driver.start();
        case.lay(chain);
        case.driver.offer(0);
        let end = (case.driver.broken(), case.driver.used());
        case.recovers();
        end
    };
    let one = |len, flags| vec![(TABLE, 0, DATA, len, flags, 0)];
    // No room for random numbers: none are given.
    assert_eq!(driven("rng", &one(64, 0)), (false, 1));
    assert_eq!(driven("rng", &one(0, WRITE)), (false, 1));
    // No room for input, or for a packet's header.
    assert_eq!(driven("console input", &one(64, 0)), (true, 0));
    assert_eq!(driven("packets in", &one(11, WRITE)), (true, 0));
    assert_eq!(driven("packets in", &one(64, 0)), (true, 0));
    // A packet without all of a header.
    assert_eq!(driven("vsock out", &one(43, 0)), (true, 0));
    assert_eq!(driven("vsock out", &one(64, WRITE)), (true, 0));
    // Output that is none, and more than anybody has to say at once.
    assert_eq!(driven("console output", &one(0, 0)), (false, 1));
    assert_eq!(driven("console output", &one(64, WRITE)), (false, 1));
    let half = |index, flags| (TABLE, index, 0x5_0000, 0x8_0001, flags, index + 1);
    assert_eq!(driven("console output", &[half(0, NEXT), half(1, 0)]), (true, 0));
    // Packets too short and too long are dropped, as on a wire.
    assert_eq!(driven("packets out", &one(11, 0)), (false, 1));
    assert_eq!(driven("packets out", &one(0x2_0000, 0)), (false, 1));
}
