//! Tests with a driver that breaks rules: it writes registers and rings by hand.

mod activation;
mod balloon;
mod disks;
mod every;
mod on_error;
#[path = "../../tests/driver/pci.rs"]
mod pci_registers;
mod ports;
mod vsock;

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use vmcore::{BusDevice, GuestAddress, GuestMemory, IoThread, IrqLine, IrqSink, MemoryRegion, Msi};

use self::pci_registers::{Interrupts, PciRegisters};
use super::{Rng, *};
use crate::block::BlockBackend;
use crate::buffers::Buffers;
use crate::net::NetBackend;

const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const INDIRECT: u64 = 0x4000;
/// Where requests keep their parts.
const HEADER: u64 = 0x8000;
const STATUS: u64 = 0x8100;
const DATA: u64 = 0x9000;
/// A page that nobody can write.
const ROM: u64 = 0x10_0000;
const SIZE: u16 = 8;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const TO_INDIRECT: u16 = 4;

#[derive(Default)]
struct Edges(AtomicUsize);

impl IrqSink for Edges {
    fn set_irq(&self, _: u32, high: bool) -> vmcore::Result<()> {
        self.0.fetch_add(high.into(), Ordering::SeqCst);
        Ok(())
    }
    fn send_msi(&self, _: Msi) -> vmcore::Result<()> {
        Ok(())
    }
}

fn memory() -> GuestMemory {
    let memory = GuestMemory::new();
    memory.insert(MemoryRegion::anonymous(GuestAddress(0), 0x10_0000).unwrap().into()).unwrap();
    let rom = MemoryRegion::builder(GuestAddress(ROM), 0x1000).read_only().build().unwrap();
    memory.insert(rom.into()).unwrap();
    memory
}

/// A device and its driver.
struct Driver {
    memory: GuestMemory,
    device: Box<dyn Registers>,
    edges: Arc<Edges>,
    /// The queue that the rings at the constants belong to.
    queue: u32,
    available: u16,
}

/// Registers in the shape of virtio-mmio's.
trait Registers: BusDevice {
    fn poll(&self);
}

impl Registers for VirtioMmio {
    fn poll(&self) {
        VirtioMmio::poll(self);
    }
}

impl Registers for PciRegisters {
    fn poll(&self) {
        PciRegisters::poll(self);
    }
}

/// What a device is behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Behind {
    Mmio,
    Pci,
}

impl Driver {
    fn new(device: impl VirtioDevice + 'static, threading: Threading) -> Self {
        Self::on(Behind::Mmio, device, threading)
    }

    fn on(behind: Behind, device: impl VirtioDevice + 'static, threading: Threading) -> Self {
        Self::in_memory(memory(), behind, device, threading)
    }

    fn in_memory(
        memory: GuestMemory,
        behind: Behind,
        device: impl VirtioDevice + 'static,
        threading: Threading,
    ) -> Self {
        let edges = Arc::new(Edges::default());
        let (guest, sink) = (memory.clone(), edges.clone());
        let device: Box<dyn Registers> = match behind {
            Behind::Mmio => {
                let interrupt = Interrupt::Line(IrqLine::new(sink, 5));
                Box::new(VirtioMmio::new("test", device, guest, interrupt, threading).unwrap())
            }
            Behind::Pci => Box::new(PciRegisters::new(device, guest, sink, threading, Interrupts::Messages)),
        };
        Self { memory, device, edges, queue: 0, available: 0 }
    }

    /// A disk of 64 sectors that works, on the vCPU's thread.
    fn disk() -> Self {
        Self::disk_on(Behind::Mmio)
    }

    fn disk_on(behind: Behind) -> Self {
        let mut driver = Self::on(behind, Disk::new(Arc::new(Bytes::new(64))), Threading::Vcpu);
        driver.start();
        driver
    }

    fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.device.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.device.write(offset, &value.to_le_bytes());
    }

    fn status(&mut self) -> u32 {
        self.read(0x70)
    }

    fn broken(&mut self) -> bool {
        self.status() & status::NEEDS_RESET != 0
    }

    /// Resets the device and starts it without EVENT_IDX, one queue where the constants say.
    fn start(&mut self) {
        self.negotiate(features::VERSION_1 | features::INDIRECT_DESC | features::RING_RESET);
        self.queue(self.queue, SIZE, [TABLE, AVAILABLE, USED]);
        self.write(0x70, 15);
    }

    fn negotiate(&mut self, features: u64) {
        self.write(0x70, 0);
        assert_eq!(self.status(), 0);
        self.write(0x70, 1);
        self.write(0x70, 3);
        for (bank, bits) in [features & 0xffff_ffff, features >> 32].into_iter().enumerate() {
            self.write(0x24, u32::try_from(bank).unwrap());
            self.write(0x20, u32::try_from(bits).unwrap());
        }
        self.write(0x70, 11);
        for ring in [AVAILABLE, USED] {
            self.memory.zero(GuestAddress(ring), 0x1000).unwrap();
        }
        self.available = 0;
    }

    fn queue(&mut self, index: u32, size: u16, places: [u64; 3]) {
        self.write(0x30, index);
        self.write(0x38, size.into());
        for (register, place) in [0x80, 0x90, 0xa0].into_iter().zip(places) {
            self.write(register, u32::try_from(place & 0xffff_ffff).unwrap());
            self.write(register + 4, u32::try_from(place >> 32).unwrap());
        }
        self.write(0x44, 1);
    }

    fn descriptor(&self, table: u64, index: u16, at: u64, len: u32, flags: u16, next: u16) {
        let bytes = [&at.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()];
        self.memory.write(GuestAddress(table + 16 * u64::from(index)), &bytes.concat()).unwrap();
    }

    /// Writes a disk request's header.
    fn header(&self, kind: u32, sector: u64) {
        let bytes = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        self.memory.write(GuestAddress(HEADER), &bytes).unwrap();
        self.memory.write(GuestAddress(STATUS), &[0xff]).unwrap();
    }

    /// Makes `head` available and notifies.
    fn offer(&mut self, head: u16) {
        let slot = AVAILABLE + 4 + 2 * u64::from(self.available % SIZE);
        self.memory.store(GuestAddress(slot), &head).unwrap();
        self.available = self.available.wrapping_add(1);
        self.memory.store(GuestAddress(AVAILABLE + 2), &self.available).unwrap();
        self.write(0x50, self.queue);
    }

    fn used(&self) -> u16 {
        self.memory.load(GuestAddress(USED + 2)).unwrap()
    }

    fn request_status(&self) -> u8 {
        self.memory.load(GuestAddress(STATUS)).unwrap()
    }

    /// A well-formed request with one data buffer; its status.
    fn request(&mut self, kind: u32, sector: u64, data: (u64, u32), to_device: bool) -> u8 {
        self.header(kind, sector);
        self.descriptor(TABLE, 0, HEADER, 16, NEXT, 1);
        self.descriptor(TABLE, 1, data.0, data.1, NEXT | if to_device { 0 } else { WRITE }, 2);
        self.descriptor(TABLE, 2, STATUS, 1, WRITE, 0);
        self.offer(0);
        self.request_status()
    }

    /// The device still works, after a reset where it needs one.
    fn recovers(&mut self) {
        if self.broken() {
            let (used, edges) = (self.used(), self.edges.0.load(Ordering::SeqCst));
            self.write(0x50, 0);
            assert_eq!((self.used(), self.edges.0.load(Ordering::SeqCst)), (used, edges), "it goes on");
        }
        self.start();
        assert!(!self.broken());
        assert_eq!((self.request(0, 1, (DATA, 512), false), self.used()), (0, 1));
    }
}

/// Tells of a read that has begun, and waits for the word to go on.
type Gate = (Mutex<Sender<()>>, Mutex<Receiver<()>>);

/// A disk in memory. It stops in each read until it is told to go on, if it is told to.
struct Bytes {
    bytes: Mutex<Vec<u8>>,
    gate: Option<Gate>,
}

impl Bytes {
    fn new(sectors: usize) -> Self {
        Self { bytes: Mutex::new(vec![0x11; sectors * 512]), gate: None }
    }
}

impl BlockBackend for Bytes {
    fn len(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read_at(&self, into: &mut Buffers<'_>, offset: u64) -> io::Result<()> {
        if let Some((begun, go_on)) = &self.gate {
            begun.lock().unwrap().send(()).unwrap();
            go_on.lock().unwrap().recv_timeout(Duration::from_secs(10)).unwrap();
        }
        let at = usize::try_from(offset).unwrap();
        let len = into.len();
        assert_eq!(into.write(&self.bytes.lock().unwrap()[at..at + len]), len);
        Ok(())
    }
    fn write_at(&self, from: &mut Buffers<'_>, offset: u64) -> io::Result<()> {
        let at = usize::try_from(offset).unwrap();
        let len = from.len();
        from.read(&mut self.bytes.lock().unwrap()[at..at + len]);
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_zeroes(offset, len, true)
    }
    fn write_zeroes(&self, offset: u64, len: u64, _: bool) -> io::Result<()> {
        let (at, len) = (usize::try_from(offset).unwrap(), usize::try_from(len).unwrap());
        self.bytes.lock().unwrap()[at..at + len].fill(0);
        Ok(())
    }
}

#[test]
fn a_well_formed_request_works() {
    let mut driver = Driver::disk();
    assert_eq!(driver.request(0, 63, (DATA, 512), false), 0);
    assert_eq!(driver.memory.load::<u64>(GuestAddress(DATA)).unwrap(), 0x1111_1111_1111_1111);
    assert_eq!((driver.used(), driver.edges.0.load(Ordering::SeqCst)), (1, 1));
    // The used length covers data and status.
    assert_eq!(driver.memory.load::<u32>(GuestAddress(USED + 8)).unwrap(), 513);
    assert_eq!((driver.read(0x60), driver.read(0x60)), (1, 1));
    driver.write(0x64, 1);
    assert_eq!(driver.read(0x60), 0);
    // A driver that wants no interrupts gets none.
    driver.memory.store(GuestAddress(AVAILABLE), &1u16).unwrap();
    assert_eq!(driver.request(0, 0, (DATA, 1024), false), 0);
    assert_eq!((driver.used(), driver.edges.0.load(Ordering::SeqCst)), (2, 1));
}

#[test]
fn a_descriptor_loop_stops_the_device() {
    let mut driver = Driver::disk();
    driver.header(0, 0);
    driver.descriptor(TABLE, 0, HEADER, 16, NEXT, 1);
    driver.descriptor(TABLE, 1, DATA, 512, NEXT | WRITE, 1);
    driver.offer(0);
    assert!(driver.broken());
    // It says so by an interrupt about its configuration.
    assert_eq!((driver.read(0x60), driver.used()), (2, 0));
    driver.recovers();
}

#[test]
fn a_chain_that_leads_out_of_the_table_stops_the_device() {
    for (head, next) in [(0, SIZE), (0, u16::MAX), (SIZE, 0), (u16::MAX, 0)] {
        let mut driver = Driver::disk();
        driver.header(0, 0);
        driver.descriptor(TABLE, 0, HEADER, 16, NEXT, next);
        driver.offer(head);
        assert!(driver.broken(), "{head} {next}");
        driver.recovers();
    }
}

#[test]
fn buffers_outside_of_memory_stop_the_device() {
    let huge = u32::MAX;
    for (at, len) in [(DATA, huge), (0xf_ff00, 0x2200), (u64::MAX - 100, 512), (u64::MAX, 1), (1 << 60, 512)]
    {
        let mut driver = Driver::disk();
        driver.request(0, 0, (at, len), false);
        assert!(driver.broken(), "{at:#x} {len:#x}");
        driver.recovers();
    }
}

#[test]
fn a_buffer_in_rom_is_read_and_not_written() {
    let mut driver = Driver::disk();
    assert_eq!(driver.request(1, 5, (ROM, 512), true), 0);
    driver.request(0, 5, (ROM, 512), false);
    assert!(driver.broken());
    assert_eq!(driver.memory.load::<u64>(GuestAddress(ROM)).unwrap(), 0);
    driver.recovers();
}

#[test]
fn a_chain_longer_than_the_queue_stops_the_device() {
    let mut driver = Driver::disk();
    // The device's queue has 256 entries, the driver's 8: 257 descriptors in a table are too many.
    for (count, good) in [(256, true), (257, false), (4096, false)] {
        driver.start();
        driver.header(0, 0);
        driver.descriptor(TABLE, 0, INDIRECT, 16 * count, TO_INDIRECT, 0);
        for n in 0..u16::try_from(count).unwrap() {
            let (at, len, flags) = match n {
                0 => (HEADER, 16, NEXT),
                _ if u32::from(n) == count - 1 => (STATUS, 1, WRITE),
                _ => (0x5_0000, 0, NEXT | WRITE),
            };
            driver.descriptor(0x6_0000, n, at, len, flags, n + 1);
        }
        driver.descriptor(TABLE, 0, 0x6_0000, 16 * count, TO_INDIRECT, 0);
        driver.offer(0);
        assert_eq!(!driver.broken(), good, "{count}");
        driver.recovers();
    }
}

#[test]
fn bad_indirect_tables_stop_the_device() {
    let mut driver = Driver::disk();
    for (at, len, nested) in [
        (INDIRECT, 48, true),
        (INDIRECT, 0, false),
        (INDIRECT, 47, false),
        (INDIRECT, 16 * 65536, false),
        (u64::MAX - 15, 48, false),
        (1 << 52, 48, false),
    ] {
        driver.start();
        driver.header(0, 0);
        driver.descriptor(INDIRECT, 0, HEADER, 16, NEXT, 1);
        driver.descriptor(INDIRECT, 1, INDIRECT, 48, if nested { TO_INDIRECT } else { WRITE }, 0);
        driver.descriptor(TABLE, 0, at, len, TO_INDIRECT, 0);
        driver.offer(0);
        assert!(driver.broken(), "{at:#x} {len:#x} {nested}");
        driver.recovers();
    }
}

#[test]
fn zero_length_buffers_are_nothing() {
    let mut driver = Driver::disk();
    // An empty buffer need not even be anywhere.
    assert_eq!(driver.request(0, 0, (u64::MAX, 0), false), 0);
    assert_eq!((driver.used(), driver.broken()), (1, false));
    driver.recovers();
}

#[test]
fn a_readable_buffer_behind_a_writable_one_stops_the_device() {
    let mut driver = Driver::disk();
    driver.header(0, 0);
    driver.descriptor(TABLE, 0, DATA, 512, NEXT | WRITE, 1);
    driver.descriptor(TABLE, 1, HEADER, 16, NEXT, 2);
    driver.descriptor(TABLE, 2, STATUS, 1, WRITE, 0);
    driver.offer(0);
    assert!(driver.broken());
    driver.recovers();
}

#[test]
fn requests_without_header_or_status_stop_the_device() {
    for (header, status) in [(15, 1), (0, 1), (16, 0)] {
        let mut driver = Driver::disk();
        driver.header(0, 0);
        driver.descriptor(TABLE, 0, HEADER, header, NEXT, 1);
        driver.descriptor(TABLE, 1, STATUS, status, WRITE, 0);
        driver.offer(0);
        assert!(driver.broken());
        driver.recovers();
    }
}

#[test]
fn an_available_index_that_jumps_stops_the_device() {
    for jump in [SIZE + 1, 0x8000, u16::MAX] {
        let mut driver = Driver::disk();
        driver.available = jump - 1;
        driver.header(0, 0);
        driver.offer(0);
        assert!(driver.broken(), "{jump}");
        assert_eq!(driver.used(), 0);
        driver.recovers();
    }
}

#[test]
fn queues_that_overlap_rom_or_mmio_or_leave_memory_need_a_reset() {
    let rings = [TABLE, AVAILABLE, USED];
    let mut bad = Vec::new();
    // Beyond ROM, where interrupt controllers are, where PCI functions are.
    for at in [0x10_0ff0, 0x10_1000, 0xfee0_0000, 0xc000_0000, !15, 1 << 52, 0] {
        for ring in 0..3 {
            let mut places = rings;
            places[ring] = at;
            bad.push((SIZE, places));
        }
    }
    bad.extend([
        (SIZE, [TABLE, AVAILABLE, ROM]),
        (SIZE, [TABLE, AVAILABLE, ROM - 8]),
        (SIZE, [TABLE + 8, AVAILABLE, USED]),
        (SIZE, [TABLE, AVAILABLE + 1, USED]),
        (SIZE, [TABLE, AVAILABLE, USED + 2]),
        (0, rings),
        (3, rings),
        (512, rings),
        (u16::MAX, rings),
    ]);
    let both = bad.into_iter().flat_map(|case| [Behind::Mmio, Behind::Pci].map(|behind| (behind, case)));
    for (behind, (size, places)) in both {
        let mut driver = Driver::disk_on(behind);
        driver.negotiate(features::VERSION_1);
        driver.queue(0, size, places);
        driver.write(0x70, 15);
        assert!(driver.broken(), "{behind:?} {size} {places:x?}");
        assert_eq!(driver.status() & 15, 15);
        driver.write(0x50, 0);
        driver.recovers();
    }
}

#[test]
fn read_rings_may_lie_in_rom() {
    let mut driver = Driver::disk();
    driver.negotiate(features::VERSION_1);
    driver.queue(0, SIZE, [ROM, ROM + 0x100, USED]);
    driver.write(0x70, 15);
    driver.write(0x50, 0);
    assert!(!driver.broken());
}

#[test]
fn status_and_features_follow_the_order_of_the_specification() {
    let mut driver = Driver::new(Rng::new(), Threading::Vcpu);
    // Features before DRIVER.
    driver.write(0x24, 1);
    driver.write(0x20, 1);
    // DRIVER_OK and FEATURES_OK first of all.
    for value in [4, 8, 12, 0x44] {
        driver.write(0x70, value);
        assert_eq!(driver.status(), 0, "{value}");
    }
    driver.write(0x70, 3);
    driver.write(0x70, 11);
    assert_eq!(driver.status(), 3, "without VERSION_1");
    driver.write(0x20, 1);
    driver.write(0x24, 0);
    driver.write(0x20, 1);
    driver.write(0x70, 11);
    assert_eq!(driver.status(), 3, "with a bit that was not offered");
    driver.write(0x20, 0);
    for bank in [2, 3, u32::MAX] {
        driver.write(0x14, bank);
        assert_eq!(driver.read(0x10), 0);
        driver.write(0x24, bank);
        driver.write(0x20, u32::MAX);
    }
    driver.write(0x70, 11);
    assert_eq!(driver.status(), 11);
    // What was agreed stays so.
    driver.write(0x24, 1);
    driver.write(0x20, 0);
    // Bits stay set until the reset, and the device's own are not the driver's.
    driver.write(0x70, 1);
    driver.write(0x70, 64 | 32);
    assert_eq!(driver.status(), 11);
    // No queue is set up: that is the driver's affair.
    driver.write(0x70, 15);
    assert_eq!(driver.status(), 15);
    driver.queue(0, SIZE, [TABLE, AVAILABLE, USED]);
    assert_eq!(driver.read(0x44), 0, "a queue enabled behind DRIVER_OK, without RING_RESET");
    driver.write(0x70, 128 | 15);
    assert_eq!(driver.status(), 128 | 15);
    driver.write(0x70, 0);
    assert_eq!((driver.status(), driver.edges.0.load(Ordering::SeqCst)), (0, 0));
}

#[test]
fn a_queue_in_use_keeps_its_settings() {
    let mut driver = Driver::disk();
    driver.queue(0, 4, [0xdead_0000, 0xdead_1000, 0xdead_2000]);
    assert_eq!(driver.request(0, 0, (DATA, 512), false), 0);
    assert_eq!(driver.used(), 1);
}

#[test]
fn single_queues_are_reset_and_set_up_again() {
    let mut driver = Driver::disk();
    assert_eq!(driver.request(0, 0, (DATA, 512), false), 0);
    driver.write(0x30, 0);
    driver.write(0xc0, 1);
    assert_eq!((driver.read(0xc0), driver.read(0x44)), (0, 0));
    driver.write(0x50, 0);
    assert_eq!((driver.used(), driver.broken()), (1, false));
    for ring in [AVAILABLE, USED] {
        driver.memory.zero(GuestAddress(ring), 0x1000).unwrap();
    }
    driver.available = 0;
    driver.queue(0, SIZE, [TABLE, AVAILABLE, USED]);
    assert_eq!(driver.read(0x44), 1);
    assert_eq!((driver.request(0, 0, (DATA, 512), false), driver.used()), (0, 1));
    // Set up where there is nothing.
    driver.write(0xc0, 1);
    driver.queue(0, SIZE, [1 << 60, AVAILABLE, USED]);
    assert!(driver.broken());
    driver.recovers();
}

#[test]
fn requests_beyond_the_disk_or_unknown_fail_in_the_guest_alone() {
    let mut driver = Driver::disk();
    for (kind, sector, len, to_device, status) in [
        (0, 64, 512, false, 1),
        (0, 63, 1024, false, 1),
        (0, u64::MAX, 512, false, 1),
        (0, u64::MAX / 512, 512, false, 1),
        (0, 0, 511, false, 1),
        (1, 64, 512, true, 1),
        (1, 0, 513, true, 1),
        (2, 0, 512, false, 2),
        (14, 0, 512, true, 2),
        (u32::MAX, 0, 512, false, 2),
        (11, 0, 15, true, 1),
        (11, 0, 0, true, 1),
        (13, 0, 16 * 17, true, 1),
        (8, 0, 20, false, 0),
        (8, 0, 3, false, 0),
        (4, 0, 0, false, 0),
    ] {
        assert_eq!(driver.request(kind, sector, (DATA, len), to_device), status, "{kind} {sector:#x} {len}");
        assert!(!driver.broken());
    }
}

#[test]
fn ranges_are_discarded_and_zeroed_within_their_limits() {
    let mut driver = Driver::disk();
    let range = |sector: u64, count: u32, flags: u32| {
        [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
    };
    for (kind, ranges, status) in [
        (13, vec![range(1, 2, 1), range(60, 4, 0)], 0),
        (11, vec![range(3, 1, 0)], 0),
        (11, vec![range(3, 1, 1)], 2),
        (13, vec![range(3, 1, 2)], 2),
        (13, vec![range(4, 1, 0), range(64, 1, 0)], 1),
        (13, vec![range(u64::MAX, 1, 0)], 1),
        (11, vec![range(0, u32::MAX, 0)], 1),
        (13, vec![range(64, 0, 0)], 0),
    ] {
        let bytes = ranges.concat();
        driver.memory.write(GuestAddress(DATA), &bytes).unwrap();
        let len = u32::try_from(bytes.len()).unwrap();
        assert_eq!(driver.request(kind, 0, (DATA, len), true), status, "{kind} {ranges:?}");
    }
    assert_eq!(driver.request(0, 0, (DATA, 64 * 512), false), 0);
    let mut bytes = vec![0; 64 * 512];
    driver.memory.read(GuestAddress(DATA), &mut bytes).unwrap();
    let zero = (0..64).filter(|n| bytes[n * 512..][..512].iter().all(|&byte| byte == 0)).collect::<Vec<_>>();
    assert_eq!(zero, [1, 2, 3, 60, 61, 62, 63]);
}

#[test]
fn register_reads_do_not_wait_for_a_request_and_a_reset_does() {
    let (begun, begins) = channel();
    let (go_on, goes_on) = channel();
    let mut disk = Bytes::new(64);
    disk.gate = Some((Mutex::new(begun), Mutex::new(goes_on)));
    let thread = IoThread::new("hostile").unwrap();
    let mut driver = Driver::new(Disk::new(Arc::new(disk)), Threading::IoThreads(vec![thread]));
    driver.start();
    assert_eq!(driver.request(0, 0, (DATA, 512), false), 0xff);
    begins.recv_timeout(Duration::from_secs(10)).unwrap();
    // The request is under way, and stays so: whatever the driver asks is answered all the same.
    assert_eq!((driver.read(0x100), driver.read(0x60), driver.status()), (64, 0, 15));
    driver.write(0x64, 3);
    driver.write(0x50, 0);
    driver.write(0x30, 0);
    assert_eq!(driver.read(0x44), 1);
    assert_eq!(driver.used(), 0);
    let release = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        go_on.send(()).unwrap();
        go_on
    });
    driver.write(0x70, 0);
    // The reset has waited for the one request; after it the device touches nothing.
    assert_eq!((driver.used(), driver.request_status()), (1, 0));
    let go_on = release.join().unwrap();
    driver.start();
    driver.request(0, 1, (DATA, 512), false);
    go_on.send(()).unwrap();
    begins.recv_timeout(Duration::from_secs(10)).unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while driver.used() == 0 {
        assert!(std::time::Instant::now() < deadline);
    }
    assert_eq!(driver.request_status(), 0);
}

/// A packet of `len` bytes with the header in front, which is zero.
fn frame(len: usize, byte: u8) -> Vec<u8> {
    let mut packet = vec![byte; len];
    packet[..12].fill(0);
    packet
}

/// Packets for the guest.
struct Packets(Arc<Mutex<VecDeque<Vec<u8>>>>);

impl NetBackend for Packets {
    fn features(&self) -> u64 {
        // GUEST_CSUM and GUEST_TSO4.
        1 << 1 | 1 << 7
    }
    fn source(&self) -> Option<Arc<dyn AsRawFd + Send + Sync>> {
        // Readable, whatever comes.
        Some(Arc::new(
            vmm_sys_util::eventfd::EventFd::new(0).and_then(|event| event.write(1).map(|()| event)).unwrap(),
        ))
    }
    fn send(&mut self, _: &mut Buffers<'_>) -> io::Result<()> {
        Ok(())
    }
    fn receive(&mut self, into: &mut Buffers<'_>, spill: &mut [u8]) -> io::Result<usize> {
        let packet = self.0.lock().unwrap().pop_front().ok_or(io::ErrorKind::WouldBlock)?;
        let room = into.write(&packet);
        spill[..packet.len() - room].copy_from_slice(&packet[room..]);
        Ok(packet.len())
    }
}

#[test]
fn large_packets_take_several_buffers_and_wait_for_them() {
    let packets = Arc::new(Mutex::new(VecDeque::new()));
    let mut driver = Driver::new(Net::new(Packets(packets.clone())).unwrap(), Threading::Vcpu);
    let merge_and_tso = 1 << 15 | 1 << 7 | 1 << 1;
    driver.negotiate(features::VERSION_1 | merge_and_tso);
    driver.queue(0, SIZE, [TABLE, AVAILABLE, USED]);
    driver.write(0x70, 15);
    for n in 0..SIZE {
        driver.descriptor(TABLE, n, 0x2_0000 + 0x2000 * u64::from(n), 0x2000, WRITE, 0);
    }
    let mut packet = (0..20_000).map(|n| u8::try_from(n % 251).unwrap()).collect::<Vec<_>>();
    packet[..12].fill(0);
    packets.lock().unwrap().push_back(packet.clone());
    // Three buffers would do, but the driver has time to give more: the next may be larger.
    for n in 0..3 {
        driver.offer(n);
        assert_eq!((driver.used(), packets.lock().unwrap().len()), (0, 1));
    }
    driver.offer(3);
    assert_eq!((driver.used(), packets.lock().unwrap().len(), driver.broken()), (3, 0, false));
    let used = (0..3).map(|n| driver.memory.load::<[u32; 2]>(GuestAddress(USED + 4 + 8 * n)).unwrap());
    assert_eq!(used.collect::<Vec<_>>(), [[0, 0x2000], [1, 0x2000], [2, 20_000 - 0x4000]]);
    let mut received = vec![0; 20_000];
    driver.memory.read(GuestAddress(0x2_0000), &mut received).unwrap();
    assert_eq!((received[10], received[11]), (3, 0), "num_buffers");
    received[10..12].copy_from_slice(&packet[10..12]);
    assert_eq!(received, packet);
    // One that no buffers can take is dropped, and the next one comes through, into the buffer that
    // was left over.
    packets.lock().unwrap().extend([frame(66_000, 1), frame(100, 2)]);
    for n in [4, 5, 6] {
        driver.offer(n);
    }
    assert_eq!((driver.used(), packets.lock().unwrap().len()), (4, 0));
    assert_eq!(driver.memory.load::<[u32; 2]>(GuestAddress(USED + 28)).unwrap(), [3, 100]);
    // A buffer that cannot even hold a header.
    driver.descriptor(TABLE, 0, DATA, 11, WRITE, 0);
    packets.lock().unwrap().push_back(frame(100, 3));
    driver.offer(0);
    assert!(driver.broken());
}

#[test]
fn a_saved_device_goes_on_in_another() {
    let mut driver = Driver::disk();
    for sector in 0..3 {
        assert_eq!(driver.request(0, sector, (DATA, 512), false), 0);
    }
    let state = driver.device.save().unwrap();
    let mut other = Driver::new(Disk::new(Arc::new(Bytes::new(64))), Threading::Vcpu);
    other.memory = driver.memory.clone();
    let interrupt = Interrupt::Line(IrqLine::new(other.edges.clone(), 5));
    let disk = Disk::new(Arc::new(Bytes::new(64)));
    let device = VirtioMmio::new("other", disk, other.memory.clone(), interrupt, Threading::Vcpu).unwrap();
    other.device = Box::new(device);
    other.device.restore(&state).unwrap();
    other.available = driver.available;
    assert_eq!((other.status(), other.read(0x60), other.edges.0.load(Ordering::SeqCst)), (15, 1, 1));
    assert_eq!((other.request(0, 9, (DATA, 512), false), other.used()), (0, 4));
    assert_eq!(other.device.save().unwrap().len(), state.len());

    let mut rng = Driver::new(Rng::new(), Threading::Vcpu);
    assert!(rng.device.restore(&state).unwrap_err().to_string().contains("type"));
    for cut in 0..state.len() {
        assert!(other.device.restore(&state[..cut]).is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any register, any width, any value, in any order, with rings full of anything.
    #[test]
    fn random_accesses_do_no_harm(
        accesses in prop::collection::vec(
            (prop_oneof![0u64..0x110, Just(0x70), Just(0x50), Just(0x44)], 0usize..4, any::<u64>(), any::<bool>()),
            1..200,
        ),
        junk in prop::collection::vec(any::<u16>(), 64),
        which in 0..5,
        behind in prop_oneof![Just(Behind::Mmio), Just(Behind::Pci)],
    ) {
        let mut driver = match which {
            0 => Driver::on(behind, Disk::new(Arc::new(Bytes::new(64))), Threading::Vcpu),
            1 => Driver::on(behind, Rng::new(), Threading::Vcpu),
            2 => Driver::on(behind, Vsock::new(3).unwrap(), Threading::Vcpu),
            3 => Driver::on(behind, Balloon::new().unwrap(), Threading::Vcpu),
            _ => Driver::on(behind, VirtioConsole::new(crate::console::Null), Threading::Vcpu),
        };
        driver.start();
        for (n, word) in junk.iter().enumerate() {
            for ring in [TABLE, AVAILABLE, INDIRECT] {
                driver.memory.store(GuestAddress(ring + 2 * n as u64), &(word & 0x1fff)).unwrap();
            }
        }
        for (offset, width, value, write) in accesses {
            let width = 1 << width;
            if write {
                // Small values mean more.
                let value = if value & 1 == 0 { value >> 1 & 15 } else { value };
                driver.device.write(offset, &value.to_le_bytes()[..width]);
            } else {
                driver.device.read(offset, &mut [0; 8][..width]);
            }
        }
        driver.device.save().unwrap();
        driver.write(0x70, 0);
        prop_assert_eq!(driver.status(), 0);
    }

    /// Random descriptor tables: every offered chain is used, or the device stops.
    #[test]
    fn random_tables_do_no_harm(
        table in prop::collection::vec((0u64..0x10_2000, 0u32..0x3000, 0u16..8, 0u16..10), 24),
        kind in 0u32..16,
        heads in prop::collection::vec(0u16..9, 1..20),
    ) {
        let mut driver = Driver::disk();
        driver.header(kind, 1);
        for (n, &(at, len, flags, next)) in table.iter().enumerate() {
            let (table, n) = if n < 8 { (TABLE, n) } else { (INDIRECT, n - 8) };
            let at = if flags & TO_INDIRECT != 0 { INDIRECT } else if n == 0 { HEADER } else { at | 0x8000 };
            driver.descriptor(table, u16::try_from(n).unwrap(), at, len, flags, next);
        }
        for head in heads {
            let before = driver.used();
            driver.offer(head);
            if driver.broken() {
                break;
            }
            prop_assert_eq!(driver.used(), before + 1);
        }
        driver.recovers();
    }
}
