//! Disks that stop their VM, or look away, where the host fails.

use vmcore::{Control, Outcome};

use super::disks::{FLUSH, OUT, READ, SYNC, both, eventually, threads};
use super::*;
use crate::block::{Effect, Fault, Faulty, Operation};
use crate::virtio::OnError;
use crate::virtio::block::{Disk, DiskHandle};

/// A disk of 256 sectors on a machine with an off switch.
struct Bench {
    backend: Arc<Faulty>,
    handle: DiskHandle,
    control: Control,
    driver: Driver,
}

fn disk(backend: &Arc<Faulty>, control: &Control, reads: OnError, others: OnError) -> Disk {
    Disk::new(backend.clone()).on_error(reads, others).controlled(control.clone())
}

impl Bench {
    fn new(behind: Behind, threading: Threading, reads: OnError, others: OnError) -> Self {
        let backend = Arc::new(Faulty::new(Arc::new(Bytes::new(256))));
        let control = Control::detached();
        let disk = disk(&backend, &control, reads, others);
        let handle = disk.handle();
        let mut driver = Driver::on(behind, disk, threading);
        driver.start_with(FLUSH);
        Self { backend, handle, control, driver }
    }

    fn inject(&self, operation: Operation, number: i32) {
        let effect = Effect::Error(number);
        self.backend.inject(Fault { operation, range: 0x2000..0x2200, effect, times: u32::MAX });
    }

    fn stops(&self) -> bool {
        eventually(|| self.control.asked().is_some());
        self.control.asked() == Some(Outcome::IoError)
    }
}

fn everywhere() -> impl Iterator<Item = (Behind, Threading)> {
    [Behind::Mmio, Behind::Pci].into_iter().flat_map(|behind| both().map(|threading| (behind, threading)))
}

#[test]
fn a_request_that_stops_the_vm_is_kept_and_tried_again_when_it_runs_again() {
    for (behind, threading) in everywhere() {
        for (kind, operation, number) in [
            (READ, Operation::Read, libc::EIO),
            (OUT, Operation::Write, libc::ENOSPC),
            (SYNC, Operation::Flush, libc::EIO),
        ] {
            let mut bench = Bench::new(behind, threading.clone(), OnError::Stop, OnError::Stop);
            bench.inject(operation, number);
            let len = if kind == SYNC { 0 } else { 512 };
            bench.driver.begin(0, kind, 16, len);
            bench.driver.ring();
            assert!(bench.stops());
            let stop = bench.handle.stopped().unwrap();
            assert_eq!((stop.writing, bench.handle.stats().errors), (kind != READ, 1));
            assert!(stop.message.contains("os error"), "{stop:?}");
            assert_eq!((bench.driver.used(), bench.driver.status_of(0)), (0, 0xff), "it is answered");

            // The next run, with nothing better: it stops again.
            bench.driver.device.retry();
            eventually(|| bench.handle.stats().errors == 2 && bench.handle.stopped().is_some());
            assert_eq!(bench.driver.used(), 0);

            bench.backend.heal();
            // What comes in between waits.
            bench.driver.begin(1, READ, 3, 512);
            bench.driver.ring();
            assert_eq!(bench.driver.used(), 0);
            bench.driver.device.retry();
            eventually(|| bench.driver.used() == 2);
            assert_eq!([bench.driver.status_of(0), bench.driver.status_of(1)], [0, 0]);
            assert_eq!((bench.handle.stopped(), bench.driver.status()), (None, 15));
        }
    }
}

#[test]
fn only_a_full_host_stops_the_vm_where_that_was_asked_for() {
    for threading in both() {
        let mut bench = Bench::new(Behind::Mmio, threading, OnError::Report, OnError::StopIfFull);
        bench.inject(Operation::Write, libc::EIO);
        bench.inject(Operation::Read, libc::ENOSPC);
        assert_eq!([bench.driver.does(OUT, 16, 512), bench.driver.does(READ, 16, 512)], [1, 1]);
        assert_eq!((bench.control.asked(), bench.handle.stopped()), (None, None));
        for number in [libc::ENOSPC, libc::EDQUOT] {
            bench.backend.heal();
            bench.inject(Operation::Write, number);
            let used = bench.driver.used();
            bench.driver.begin(0, OUT, 16, 512);
            bench.driver.ring();
            assert!(bench.stops());
            eventually(|| bench.handle.stopped().is_some());
            bench.backend.heal();
            bench.driver.device.retry();
            eventually(|| bench.driver.used() != used);
            assert_eq!(bench.driver.status_of(0), 0);
        }
    }
}

#[test]
fn errors_are_looked_away_from_where_that_was_asked_for() {
    for threading in both() {
        let mut bench = Bench::new(Behind::Mmio, threading, OnError::Ignore, OnError::Ignore);
        bench.inject(Operation::Read, libc::EIO);
        bench.inject(Operation::Write, libc::EIO);
        bench.driver.memory.write(GuestAddress(0x1_1000), &[0x77; 512]).unwrap();
        assert_eq!([bench.driver.does(OUT, 16, 512), bench.driver.does(READ, 16, 512)], [0, 0]);
        assert_eq!(bench.driver.data_of(0, 512), [0; 512]);
        assert_eq!((bench.handle.stats().errors, bench.control.asked()), (2, None));
    }
}

#[test]
fn merged_requests_are_kept_one_by_one() {
    for threading in both() {
        let at_once = matches!(threading, Threading::Vcpu);
        let mut bench = Bench::new(Behind::Mmio, threading, OnError::Stop, OnError::Stop);
        bench.inject(Operation::Read, libc::EIO);
        // Sectors 14 to 18 in one: the one at 16 fails.
        for slot in 0..5 {
            bench.driver.begin(slot, READ, 14 + u64::from(slot), 512);
        }
        bench.driver.ring();
        assert!(bench.stops());
        // An I/O thread may have looked before all five were there; it takes no more once the VM is stopped.
        if at_once {
            assert_eq!(bench.driver.used(), 4);
            assert_eq!([0, 1, 2, 3, 4].map(|slot| bench.driver.status_of(slot)), [0, 0, 0xff, 0, 0]);
        }
        assert_eq!(bench.driver.status_of(2), 0xff);
        bench.backend.heal();
        bench.driver.device.retry();
        eventually(|| bench.driver.used() == 5);
        assert_eq!([0, 1, 2, 3, 4].map(|slot| bench.driver.status_of(slot)), [0; 5]);
    }
}

#[test]
fn kept_requests_are_in_the_saved_state_and_end_where_it_is_restored() {
    for (behind, threading) in everywhere() {
        let mut bench = Bench::new(behind, threading.clone(), OnError::Stop, OnError::Stop);
        bench.inject(Operation::Write, libc::ENOSPC);
        for (slot, sector) in [(0, 16), (1, 3)] {
            bench.driver.begin(slot, OUT, sector, 512);
        }
        bench.driver.ring();
        assert!(bench.stops());
        eventually(|| bench.handle.stopped().is_some());
        let state = bench.driver.device.save().unwrap();
        let (used, memory) = (bench.driver.used(), bench.driver.memory.clone());
        assert!(used < 2);

        let healthy = Arc::new(Faulty::new(Arc::new(Bytes::new(256))));
        let disk = disk(&healthy, &Control::detached(), OnError::Stop, OnError::Stop);
        let mut other = Driver::in_memory(memory, behind, disk, threading);
        other.device.restore(&state).unwrap();
        eventually(|| other.used() == 2);
        assert_eq!([other.status_of(0), other.status_of(1)], [0, 0]);
        // The first one would not have it any more.
        drop(bench);
    }
}

#[test]
fn a_reset_forgets_kept_requests_and_a_driver_that_spoils_them_harms_itself() {
    for threading in both() {
        let mut bench = Bench::new(Behind::Mmio, threading, OnError::Stop, OnError::Stop);
        let fails = |bench: &mut Bench| {
            bench.inject(Operation::Read, libc::EIO);
            bench.driver.begin(0, READ, 16, 512);
            bench.driver.ring();
            eventually(|| bench.handle.stopped().is_some());
            bench.backend.heal();
        };
        fails(&mut bench);
        bench.driver.start_with(FLUSH);
        bench.driver.device.retry();
        assert_eq!((bench.driver.does(READ, 1, 512), bench.driver.used()), (0, 1));

        // The queue alone.
        fails(&mut bench);
        bench.driver.write(0x30, 0);
        bench.driver.write(0xc0, 1);
        bench.driver.memory.zero(GuestAddress(AVAILABLE), 0x1000).unwrap();
        bench.driver.memory.zero(GuestAddress(USED), 0x1000).unwrap();
        bench.driver.available = 0;
        bench.driver.queue(0, SIZE, [TABLE, AVAILABLE, USED]);
        bench.driver.device.retry();
        assert_eq!((bench.driver.does(READ, 1, 512), bench.driver.used()), (0, 1));

        // A kept chain that loops, has a table within a table, leads nowhere.
        for (at, len, flags, next) in [
            (0x8000, 16, NEXT, 0),
            (TABLE, 16, TO_INDIRECT, 0),
            (0x8000, 16, NEXT, SIZE),
            (u64::MAX - 7, 32, TO_INDIRECT, 0),
            (0x8000, 0, TO_INDIRECT, 0),
            (0x8000, 24, TO_INDIRECT, 0),
        ] {
            fails(&mut bench);
            bench.driver.descriptor(TABLE, 0, at, len, flags, next);
            bench.driver.device.retry();
            eventually(|| bench.driver.broken());
            bench.driver.start_with(FLUSH);
            assert_eq!(bench.driver.does(READ, 1, 512), 0);
        }
    }
}

/// Nobody would let it go on.
#[test]
fn a_disk_without_a_vm_reports_what_was_to_stop_it() {
    let backend = Arc::new(Faulty::new(Arc::new(Bytes::new(256))));
    let effect = Effect::Error(libc::EIO);
    backend.inject(Fault { operation: Operation::Read, range: 0..512, effect, times: 1 });
    let disk = Disk::new(backend).on_error(OnError::Stop, OnError::Stop);
    let mut driver = Driver::new(disk, threads());
    driver.start_with(FLUSH);
    assert_eq!([driver.does(READ, 0, 512), driver.does(READ, 0, 512)], [1, 0]);
}
