//! A card under a driver of its own, which writes every ring and header by hand.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmcore::{BusDevice, GuestAddress, GuestMemory, IrqLine, IrqSink, MemoryRegion, Msi};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::buffers::Buffers;
use crate::net::{HEADER, MOST_PACKET};
use crate::virtio::{Interrupt, Threading, VirtioMmio};

const OWN: Mac = [2, 0, 0, 0, 0, 1];
const OTHER: Mac = [2, 0, 0, 0, 0, 2];
const GROUP: Mac = [0x33, 0x33, 0, 0, 0, 1];
const BROADCAST: Mac = [0xff; 6];

/// With indirect descriptors, which this driver uses.
const VERSION_1: u64 = 1 << 32 | 1 << 28;
/// All that a card without offloads offers, but merged buffers.
const PLAIN: u64 = VERSION_1 | 1 << 5 | 0x3f << 16 | 1 << 23;
const MULTIQUEUE: u64 = 1 << 22;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const TO_INDIRECT: u16 = 4;
const SIZE: u16 = 16;

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

/// What the test's network has seen, and what it has to say.
#[derive(Default)]
struct Wire {
    to_guest: VecDeque<Vec<u8>>,
    from_guest: Vec<Vec<u8>>,
    features: u64,
    enabled: bool,
    /// How many packets it has room for, if that counts.
    room: Option<usize>,
    state: Vec<u8>,
}

#[derive(Clone)]
struct Wires(Arc<Mutex<Wire>>, u64);

impl Wires {
    fn new(features: u64) -> Self {
        Self(Arc::default(), features)
    }

    fn with<R>(&self, act: impl FnOnce(&mut Wire) -> R) -> R {
        act(&mut self.0.lock().unwrap())
    }

    /// The frames that came from the guest since the last time.
    fn sent(&self) -> Vec<Vec<u8>> {
        self.with(|wire| std::mem::take(&mut wire.from_guest))
    }
}

impl NetBackend for Wires {
    fn features(&self) -> u64 {
        self.1
    }
    fn set_features(&mut self, features: u64) -> io::Result<()> {
        self.with(|wire| wire.features = features);
        Ok(())
    }
    fn set_enabled(&mut self, enabled: bool) -> io::Result<()> {
        self.with(|wire| wire.enabled = enabled);
        Ok(())
    }
    fn source(&self) -> Option<Arc<dyn AsRawFd + Send + Sync>> {
        Some(Arc::new(EventFd::new(0).unwrap()))
    }
    fn holds_back(&self) -> bool {
        self.with(|wire| wire.room.is_some())
    }
    fn send(&mut self, packet: &mut Buffers<'_>) -> io::Result<()> {
        let mut bytes = vec![0; packet.len()];
        packet.read(&mut bytes);
        self.with(|wire| {
            if let Some(room) = &mut wire.room {
                *room = room.checked_sub(1).ok_or(io::ErrorKind::WouldBlock)?;
            }
            wire.from_guest.push(bytes);
            Ok(())
        })
    }
    fn receive(&mut self, into: &mut Buffers<'_>, spill: &mut [u8]) -> io::Result<usize> {
        let packet = self.with(|wire| wire.to_guest.pop_front()).ok_or(io::ErrorKind::WouldBlock)?;
        let room = into.write(&packet);
        spill[..packet.len() - room].copy_from_slice(&packet[room..]);
        Ok(packet.len())
    }
    fn save_state(&self) -> io::Result<Vec<u8>> {
        Ok(self.with(|wire| wire.state.clone()))
    }
    fn restore_state(&mut self, state: &[u8]) -> io::Result<()> {
        if state == b"refused" {
            return Err(io::ErrorKind::InvalidData.into());
        }
        self.with(|wire| wire.state = state.to_vec());
        Ok(())
    }
}

/// A packet of `len` bytes behind a header of zeroes.
fn packet(to: Mac, len: usize) -> Vec<u8> {
    let mut packet = vec![0x5a; HEADER + len];
    packet[..HEADER].fill(0);
    packet[HEADER..HEADER + 6].copy_from_slice(&to);
    packet[HEADER + 12..HEADER + 14].copy_from_slice(&[8, 0]);
    packet
}

fn tagged(to: Mac, vlan: u16) -> Vec<u8> {
    let mut packet = packet(to, 64);
    packet[HEADER + 12..HEADER + 14].copy_from_slice(&[0x81, 0]);
    packet[HEADER + 14..HEADER + 16].copy_from_slice(&vlan.to_be_bytes());
    packet
}

/// `packet` with a header of flags, type, and the four fields behind.
fn with_header(mut packet: Vec<u8>, flags: u8, kind: u8, fields: [u16; 4]) -> Vec<u8> {
    packet[..2].copy_from_slice(&[flags, kind]);
    for (place, field) in packet[2..10].chunks_exact_mut(2).zip(fields) {
        place.copy_from_slice(&field.to_le_bytes());
    }
    packet
}

struct Driver {
    memory: GuestMemory,
    device: VirtioMmio,
    edges: Arc<Edges>,
    /// Per queue: chains offered, and used ones looked at.
    rings: Vec<(u16, u16)>,
    control: usize,
}

impl Driver {
    fn new(card: Net) -> Self {
        let memory = GuestMemory::new();
        memory.insert(MemoryRegion::anonymous(GuestAddress(0), 8 << 20).unwrap().into()).unwrap();
        let queues = card.queue_sizes().len();
        let (edges, device) = Self::device(card, &memory);
        Self { memory, device, edges, rings: vec![(0, 0); queues], control: queues - 1 }
    }

    fn device(card: Net, memory: &GuestMemory) -> (Arc<Edges>, VirtioMmio) {
        let edges = Arc::new(Edges::default());
        let interrupt = Interrupt::Line(IrqLine::new(edges.clone(), 5));
        (edges, VirtioMmio::new("test", card, memory.clone(), interrupt, Threading::Vcpu).unwrap())
    }

    fn read<const N: usize>(&mut self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.device.read(offset, &mut data);
        data
    }

    fn register(&mut self, offset: u64) -> u32 {
        u32::from_le_bytes(self.read(offset))
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.device.write(offset, &value.to_le_bytes());
    }

    fn offered(&mut self) -> u64 {
        self.write(0x14, 0);
        let low = self.register(0x10);
        self.write(0x14, 1);
        u64::from(self.register(0x10)) << 32 | u64::from(low)
    }

    /// Resets the device and starts it with `features`.
    fn start(&mut self, features: u64) {
        for (register, value) in [(0x70, 0), (0x70, 1), (0x70, 3)] {
            self.write(register, value);
        }
        for (bank, bits) in [features & 0xffff_ffff, features >> 32].into_iter().enumerate() {
            self.write(0x24, u32::try_from(bank).unwrap());
            self.write(0x20, u32::try_from(bits).unwrap());
        }
        self.write(0x70, 11);
        assert_eq!(self.register(0x70), 11, "features {features:#x} are refused");
        for queue in 0..self.rings.len() {
            let at = u32::try_from(ring(queue)).unwrap();
            self.memory.zero(GuestAddress(at.into()), 0x3000).unwrap();
            for (register, value) in [
                (0x30, u32::try_from(queue).unwrap()),
                (0x38, SIZE.into()),
                (0x80, at),
                (0x90, at + 0x1000),
                (0xa0, at + 0x2000),
                (0x44, 1),
            ] {
                self.write(register, value);
            }
        }
        self.rings.fill((0, 0));
        self.control = if features & MULTIQUEUE == 0 { 2 } else { self.rings.len() - 1 };
        self.write(0x70, 15);
        assert_eq!(self.register(0x70), 15);
    }

    fn broken(&mut self) -> bool {
        self.register(0x70) & 64 != 0
    }

    fn descriptor(&self, table: u64, index: u16, (at, len, flags): (u64, u32, u16), next: u16) {
        let fields = [&at.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()];
        self.memory.write(GuestAddress(table + 16 * u64::from(index)), &fields.concat()).unwrap();
    }

    /// Makes a chain of `pieces`, three at most, available.
    fn offer(&mut self, queue: usize, pieces: &[(u64, u32, u16)]) {
        let table = ring(queue) + 0x400 + 0x40 * u64::from(self.rings[queue].0 % SIZE);
        for (n, &(to, len, flags)) in (0..).zip(pieces) {
            let more = usize::from(n) + 1 < pieces.len();
            self.descriptor(table, n, (to, len, flags | if more { NEXT } else { 0 }), n + 1);
        }
        self.offer_table(queue, table, u16::try_from(pieces.len()).unwrap());
    }

    /// Makes the chain of `count` descriptors at `table` available.
    fn offer_table(&mut self, queue: usize, table: u64, count: u16) {
        let (offered, _) = &mut self.rings[queue];
        let (slot, at) = (*offered % SIZE, ring(queue));
        *offered += 1;
        let index = *offered;
        self.descriptor(at, slot, (table, 16 * u32::from(count), TO_INDIRECT), 0);
        self.memory.store(GuestAddress(at + 0x1004 + 2 * u64::from(slot)), &slot).unwrap();
        self.memory.store(GuestAddress(at + 0x1002), &index).unwrap();
        self.write(0x50, u32::try_from(queue).unwrap());
    }

    /// Length and slot of the next used chain.
    fn used(&mut self, queue: usize) -> Option<(u16, usize)> {
        let at = ring(queue) + 0x2000;
        let index: u16 = self.memory.load(GuestAddress(at + 2)).unwrap();
        let (_, seen) = &mut self.rings[queue];
        if *seen == index {
            return None;
        }
        let [slot, len] =
            self.memory.load::<[u32; 2]>(GuestAddress(at + 4 + 8 * u64::from(*seen % SIZE))).unwrap();
        *seen += 1;
        Some((u16::try_from(slot).unwrap(), usize::try_from(len).unwrap()))
    }

    fn give_buffer(&mut self, pair: usize) {
        let slot = self.rings[2 * pair].0 % SIZE;
        self.offer(2 * pair, &[(buffer(2 * pair, slot), 0x4000, WRITE)]);
    }

    /// The packets that were received by `pair` since the last time; each buffer is given again.
    fn received(&mut self, pair: usize) -> Vec<Vec<u8>> {
        self.device.poll();
        let mut packets = Vec::new();
        while let Some((slot, len)) = self.used(2 * pair) {
            let mut packet = vec![0; len];
            self.memory.read(GuestAddress(buffer(2 * pair, slot)), &mut packet).unwrap();
            packets.push(packet);
            self.give_buffer(pair);
        }
        packets
    }

    /// Offers `packet` on the transmit queue of `pair`: header and frame in buffers of their own.
    fn send(&mut self, pair: usize, packet: &[u8]) {
        let queue = 2 * pair + 1;
        let at = buffer(queue, self.rings[queue].0 % SIZE);
        self.memory.write(GuestAddress(at), packet).unwrap();
        let rest = u32::try_from(packet.len() - HEADER).unwrap();
        self.offer(queue, &[(at, 12, 0), (at + 12, rest, 0)]);
    }

    /// The answer to a command.
    fn command(&mut self, class: u8, command: u8, data: &[u8]) -> Option<u8> {
        let at = buffer(self.control, 0);
        self.memory.write(GuestAddress(at), &[&[class, command], data].concat()).unwrap();
        self.memory.write(GuestAddress(at + 0x3fff), &[0xcc]).unwrap();
        let len = u32::try_from(data.len()).unwrap();
        self.offer(self.control, &[(at, 2, 0), (at + 2, len, 0), (at + 0x3fff, 1, WRITE)]);
        assert_eq!(self.used(self.control)?.1, 1);
        let mut answer = [0];
        self.memory.read(GuestAddress(at + 0x3fff), &mut answer).unwrap();
        Some(answer[0])
    }

    fn status(&mut self) -> u16 {
        u16::from_le_bytes(self.read(0x106))
    }

    /// Whether the driver was told of a new configuration since the last time.
    fn told(&mut self) -> bool {
        let pending = self.register(0x60);
        self.write(0x64, pending);
        pending & 2 != 0
    }

    /// As after a move to a machine with `card`.
    fn move_to(&mut self, card: Net) -> vmcore::Result<()> {
        let state = self.device.save().unwrap();
        (self.edges, self.device) = Self::device(card, &self.memory);
        self.device.restore(&state)
    }
}

fn ring(queue: usize) -> u64 {
    0x1_0000 * (queue as u64 + 1)
}

fn buffer(queue: usize, slot: u16) -> u64 {
    0x10_0000 + 0x4_0000 * queue as u64 + 0x4000 * u64::from(slot)
}

fn single(features: u64) -> (Wires, Driver, NetHandle) {
    let wires = Wires::new(features);
    let card = Net::new(wires.clone()).unwrap().mac(OWN).unwrap();
    let handle = card.handle();
    (wires, Driver::new(card), handle)
}

#[test]
fn a_card_is_recorded_by_all_its_queues() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let capture = Capture::create(file.path(), Capture::WHOLE).unwrap();
    let wires = [Wires::new(1), Wires::new(3)];
    let card = Net::multiqueue(wires.clone()).unwrap().mac(OWN).unwrap().record(&capture);
    assert_eq!(card.features & OFFLOADS, 1, "those of the back ends");
    let mut driver = Driver::new(card);
    driver.start(PLAIN | MULTIQUEUE);
    assert_eq!(driver.command(4, 0, &[2, 0]), Some(0));
    for (pair, wire) in wires.iter().enumerate() {
        driver.send(pair, &packet(OTHER, 60 + pair));
        assert_eq!(wire.sent().len(), 1);
        driver.give_buffer(pair);
        wire.with(|wire| wire.to_guest.extend([packet(OWN, 70)]));
        assert_eq!(driver.received(pair).len(), 1);
    }
    // The file's header, and that of each packet.
    let packets = [60, 70, 61, 70].map(|len| 16 + len);
    assert_eq!(file.as_file().metadata().unwrap().len(), 24 + packets.iter().sum::<u64>());
}

/// Which of packets to these go to the guest, by their addresses.
fn taken(wires: &Wires, driver: &mut Driver) -> Vec<Mac> {
    wires.with(|wire| wire.to_guest.extend([OWN, OTHER, GROUP, BROADCAST].map(|to| packet(to, 60))));
    driver.received(0).iter().map(|packet| packet[HEADER..HEADER + 6].try_into().unwrap()).collect()
}

#[test]
fn the_configuration_says_what_the_card_is() {
    let cards = (0..3).map(|_| Wires::new(0));
    let card = Net::multiqueue(cards).unwrap().mac(OWN).unwrap().mtu(9000).unwrap().speed(10_000);
    let mut driver = Driver::new(card);
    assert_eq!(driver.read::<6>(0x100), OWN);
    assert_eq!(
        (driver.status(), driver.read(0x108), driver.read(0x10a)),
        (1, [3, 0], 9000_u16.to_le_bytes())
    );
    assert_eq!((driver.register(0x10c), driver.read(0x110)), (10_000, [1]));
    let offered = driver.offered();
    for bit in [3, 22, 63] {
        assert_eq!(offered >> bit & 1, 1, "{bit}");
    }
    let (_, mut driver, _) = single(0);
    let offered = driver.offered();
    for bit in [0, 1, 2, 3, 7, 11, 22, 54, 56, 63] {
        assert_eq!(offered >> bit & 1, 0, "{bit}");
    }
    assert_eq!((driver.register(0x10c), driver.read(0x110)), (u32::MAX, [0xff]));

    let refused = |error: vmcore::Error| error.to_string();
    let wires = || Net::new(Wires::new(0)).unwrap();
    assert!(refused(wires().mtu(67).unwrap_err()).contains("68"));
    assert!(refused(wires().mac(GROUP).unwrap_err()).contains("single station"));
    assert!(refused(Net::multiqueue(Vec::<Wires>::new()).unwrap_err()).contains("1 to 256"));
}

#[test]
fn the_driver_filters_by_address() {
    let (wires, mut driver, handle) = single(0);
    driver.start(PLAIN);
    (0..SIZE).for_each(|_| driver.give_buffer(0));
    assert_eq!(taken(&wires, &mut driver), [OWN, OTHER, GROUP, BROADCAST], "promiscuous from the start");
    assert_eq!(driver.command(0, 0, &[0]), Some(0));
    assert_eq!(taken(&wires, &mut driver), [OWN, BROADCAST]);
    // Tables of one unicast and one multicast address.
    let table = [&[1, 0, 0, 0], &OTHER[..], &[1, 0, 0, 0], &GROUP].concat();
    assert_eq!(driver.command(1, 0, &table), Some(0));
    assert_eq!(taken(&wires, &mut driver), [OWN, OTHER, GROUP, BROADCAST]);
    assert_eq!(driver.command(1, 0, &[0; 8]), Some(0));
    for (mode, expected) in [
        (1, &[OWN, GROUP, BROADCAST][..]),
        (2, &[OWN, OTHER, BROADCAST]),
        (3, &[OWN, BROADCAST]),
        (4, &[BROADCAST]),
        (5, &[OWN]),
        (0, &[OWN, OTHER, GROUP, BROADCAST]),
    ] {
        assert_eq!(driver.command(0, mode, &[1]), Some(0));
        assert_eq!(taken(&wires, &mut driver), expected, "{mode}");
        assert_eq!(driver.command(0, mode, &[0]), Some(0));
    }
    let new = [2, 0, 0, 0, 0, 9];
    assert_eq!(driver.command(1, 1, &new), Some(0));
    assert_eq!((driver.read::<6>(0x100), handle.mac()), (new, new));
    assert_eq!(taken(&wires, &mut driver), [BROADCAST]);
    for bad in [GROUP, [0; 6]] {
        assert_eq!(driver.command(1, 1, &bad), Some(1), "{bad:x?}");
    }
    let counters = handle.counters();
    assert_eq!(counters.received_filtered, 4 * 10 - counters.received_packets);
    assert_eq!((counters.received_bytes, counters.received_dropped), (60 * counters.received_packets, 0));

    // What a driver asked for ends with it.
    driver.start(PLAIN);
    assert_eq!((driver.read::<6>(0x100), handle.mac()), (OWN, OWN));
    (0..SIZE).for_each(|_| driver.give_buffer(0));
    assert_eq!(taken(&wires, &mut driver), [OWN, OTHER, GROUP, BROADCAST]);
}

#[test]
fn the_driver_filters_by_vlan() {
    let (wires, mut driver, _) = single(0);
    driver.start(PLAIN);
    (0..SIZE).for_each(|_| driver.give_buffer(0));
    driver.command(0, 0, &[0]);
    let taken = |driver: &mut Driver| {
        wires.with(|wire| wire.to_guest.extend([0, 5, 6].map(|vlan| tagged(OWN, vlan))));
        driver.received(0).iter().map(|packet| packet[HEADER + 15]).collect::<Vec<_>>()
    };
    assert_eq!(taken(&mut driver), [0]);
    assert_eq!(driver.command(2, 0, &[5, 0]), Some(0));
    assert_eq!(taken(&mut driver), [0, 5]);
    assert_eq!(driver.command(2, 1, &[5, 0]), Some(0));
    assert_eq!(taken(&mut driver), [0]);
    assert_eq!(driver.command(2, 0, &[0, 0x10]), Some(1), "there is no VLAN 4096");
    // Who did not agree to filter VLANs gets them all.
    driver.start(PLAIN & !(1 << 19));
    (0..SIZE).for_each(|_| driver.give_buffer(0));
    driver.command(0, 0, &[0]);
    assert_eq!(driver.command(2, 0, &[5, 0]), Some(1));
    assert_eq!(taken(&mut driver), [0, 5, 6]);
}

#[test]
fn commands_have_the_length_they_must_have() {
    let (_, mut driver, _) = single(1 << 1 | 1 << 7);
    driver.start(PLAIN | 1 << 1 | 1 << 2 | 1 << 7);
    let mut right = Vec::new();
    for class in 0..8 {
        for command in 0..8 {
            for len in (0..20).chain([255, 1000, 0x3000]) {
                let answer = driver.command(class, command, &vec![0; len]);
                match answer {
                    Some(0) => right.push((class, command, len)),
                    answer => assert_eq!(answer, Some(1), "{class} {command} {len}"),
                }
            }
        }
    }
    let modes = (0..6).map(|mode| (0, mode, 1));
    // Two empty tables, two VLAN commands, an acknowledgement, offloads; an address of zeroes is none.
    let others = [(1, 0, 8), (2, 0, 2), (2, 1, 2), (3, 0, 0), (5, 0, 8)];
    assert_eq!(right, modes.chain(others).collect::<Vec<_>>());
    assert_eq!(driver.command(0, 0, &[2]), Some(1), "neither on nor off");

    // Half a command, none at all, and no room for an answer.
    let at = buffer(driver.control, 0);
    for pieces in [&[(at, 1, 0), (at + 0x100, 1, WRITE)][..], &[(at + 0x100, 1, WRITE)]] {
        driver.offer(driver.control, pieces);
        assert_eq!((driver.used(driver.control).unwrap().1, driver.broken()), (1, false));
        assert_eq!(driver.memory.load::<u8>(GuestAddress(at + 0x100)).unwrap(), 1);
    }
    driver.offer(driver.control, &[(at, 2, 0), (at + 2, 1, 0)]);
    assert!(driver.broken());

    // What was not agreed on is not there.
    driver.start(VERSION_1 | 1 << 5 | 1 << 17);
    for (class, command, len) in right {
        assert_eq!(driver.command(class, command, &vec![0; len]), Some(1), "{class} {command}");
    }
    // Nor is the queue itself.
    driver.start(VERSION_1);
    assert_eq!(driver.command(0, 0, &[0]), None);
}

#[test]
fn tables_of_any_size_are_read_or_refused_at_once() {
    let (wires, mut driver, _) = single(0);
    driver.start(PLAIN);
    (0..SIZE).for_each(|_| driver.give_buffer(0));
    driver.command(0, 0, &[0]);
    for count in [1, 2, 0x2aaa_aaab, 0x8000_0000, u32::MAX] {
        assert_eq!(driver.command(1, 0, &count.to_le_bytes()), Some(1), "{count:#x}");
        let second = [&[0; 4][..], &count.to_le_bytes()].concat();
        assert_eq!(driver.command(1, 0, &second), Some(1), "{count:#x}");
        let short = [&count.to_le_bytes()[..], &[2; 5]].concat();
        assert_eq!(driver.command(1, 0, &short), Some(1), "{count:#x}");
    }
    assert_eq!(taken(&wires, &mut driver), [OWN, BROADCAST], "nothing of those is kept");
    // Sixty-five addresses overflow the table.
    let table = [&65_u32.to_le_bytes()[..], &[2; 65 * 6], &[0; 4]].concat();
    assert_eq!(driver.command(1, 0, &table), Some(0));
    assert_eq!(taken(&wires, &mut driver), [OWN, OTHER, BROADCAST]);

    // Nearly 4 GiB of addresses, over and over the same memory, and as many as the count says.
    let (at, table, queue) = (buffer(driver.control, 0), 0x60_0000, driver.control);
    let (len, pieces) = (6 << 20, 60_u16);
    let count = len / 6 * u32::from(pieces);
    driver.memory.write(GuestAddress(at), &[&[1, 0], &count.to_le_bytes()[..]].concat()).unwrap();
    driver.memory.write(GuestAddress(at + 0x100), &[0, 0, 0, 0, 0xcc]).unwrap();
    driver.descriptor(table, 0, (at, 6, NEXT), 1);
    (1..=pieces).for_each(|n| driver.descriptor(table, n, (0, len, NEXT), n + 1));
    driver.descriptor(table, pieces + 1, (at + 0x100, 4, NEXT), pieces + 2);
    driver.descriptor(table, pieces + 2, (at + 0x104, 1, WRITE), 0);
    let begin = Instant::now();
    driver.offer_table(queue, table, pieces + 3);
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    assert_eq!((driver.used(queue).unwrap().1, driver.broken()), (1, false));
    assert_eq!(driver.memory.load::<u8>(GuestAddress(at + 0x104)).unwrap(), 0);
}

#[test]
fn packets_come_by_the_pairs_that_the_driver_uses() {
    let wires = [(); 4].map(|()| Wires::new(0));
    let card = Net::multiqueue(wires.clone()).unwrap().mac(OWN).unwrap();
    assert_eq!((card.threads(), card.queue_sizes().len()), (4, 9));
    let mut driver = Driver::new(card);
    driver.start(PLAIN | MULTIQUEUE);
    assert_eq!(driver.control, 8);
    (0..4).for_each(|pair| driver.give_buffer(pair));
    let enabled = || wires.each_ref().map(|wire| wire.with(|wire| wire.enabled));
    let arrive = |driver: &mut Driver| {
        wires.iter().for_each(|wire| wire.with(|wire| wire.to_guest.push_back(packet(OWN, 60))));
        std::array::from_fn(|pair| driver.received(pair).len())
    };
    assert_eq!((enabled(), arrive(&mut driver)), ([true, false, false, false], [1, 0, 0, 0]));
    for bad in [0, 5, 0x8000, 0xffff_u16] {
        assert_eq!(driver.command(4, 0, &bad.to_le_bytes()), Some(1), "{bad}");
    }
    assert_eq!(driver.command(4, 0, &[3, 0]), Some(0));
    assert_eq!((enabled(), arrive(&mut driver)), ([true, true, true, false], [1, 1, 1, 0]));
    assert_eq!(driver.command(4, 0, &[2, 0]), Some(0));
    assert_eq!((enabled(), arrive(&mut driver)), ([true, true, false, false], [1, 1, 0, 0]));
    // By which queue the driver sends is its own business.
    (0..4).for_each(|pair| driver.send(pair, &packet(OTHER, 60 + pair)));
    assert_eq!(wires.each_ref().map(|wire| wire.sent().len()), [1, 1, 1, 1]);

    let other = [(); 4].map(|()| Wires::new(0));
    driver.move_to(Net::multiqueue(other.clone()).unwrap()).unwrap();
    assert_eq!(other.each_ref().map(|wire| wire.with(|wire| wire.enabled)), [true, true, false, false]);
    // Fewer pairs are another card.
    let text =
        driver.move_to(Net::multiqueue([Wires::new(0), Wires::new(0)]).unwrap()).unwrap_err().to_string();
    assert!(text.contains("queues"), "{text}");

    // Without the feature there is one pair, and the control queue behind it.
    let (wires, mut driver) = {
        let wires = [Wires::new(0), Wires::new(0)];
        (wires.clone(), Driver::new(Net::multiqueue(wires).unwrap()))
    };
    driver.start(PLAIN);
    assert_eq!(
        (driver.control, driver.command(0, 0, &[0]), driver.command(4, 0, &[1, 0])),
        (2, Some(0), Some(1))
    );
    assert_eq!(wires.each_ref().map(|wire| wire.with(|wire| wire.enabled)), [true, false]);
}

#[test]
fn the_link_goes_down_and_up() {
    let (wires, mut driver, handle) = single(0);
    handle.set_link(false);
    assert_eq!((driver.status(), driver.told()), (0, false), "nobody is there to be told");
    handle.set_link(true);
    driver.start(PLAIN);
    driver.give_buffer(0);
    driver.told();
    handle.set_link(false);
    assert_eq!((driver.status(), driver.told(), handle.link()), (0, true, false));
    wires.with(|wire| wire.to_guest.extend([packet(OWN, 60), packet(OWN, 61)]));
    driver.send(0, &packet(OTHER, 60));
    assert_eq!((driver.received(0).len(), wires.sent().len()), (0, 0));
    assert_eq!(driver.used(1), Some((0, 0)), "a packet that goes nowhere is done");
    let counters = handle.counters();
    assert_eq!((counters.received_dropped, counters.sent_dropped), (2, 1));
    handle.set_link(false);
    assert!(!driver.told(), "nothing new");
    handle.set_link(true);
    assert_eq!((driver.status(), driver.told()), (1, true));
    // What came meanwhile is gone.
    wires.with(|wire| wire.to_guest.push_back(packet(OWN, 62)));
    driver.send(0, &packet(OTHER, 60));
    assert_eq!(driver.received(0), [with_count(packet(OWN, 62), 1)]);
    assert_eq!(wires.sent(), [packet(OTHER, 60)]);
}

/// `packet` as it is received in `count` buffers.
fn with_count(mut packet: Vec<u8>, count: u8) -> Vec<u8> {
    packet[10] = count;
    packet
}

#[test]
fn a_card_that_was_moved_announces_itself() {
    let (_, mut driver, _) = single(0);
    driver.start(PLAIN);
    let card = || Net::new(Wires::new(0)).unwrap();
    driver.move_to(card()).unwrap();
    assert_eq!((driver.status(), driver.told(), driver.edges.0.load(Ordering::SeqCst) > 0), (3, true, true));
    assert_eq!((driver.command(3, 0, &[]), driver.status()), (Some(0), 1));
    let card = card();
    let handle = card.handle();
    driver.move_to(card).unwrap();
    driver.command(3, 0, &[]);
    driver.told();
    handle.announce();
    assert_eq!((driver.status(), driver.told()), (3, true));
    // A driver that cannot is not asked.
    driver.start(PLAIN & !(1 << 21));
    driver.told();
    handle.announce();
    assert_eq!((driver.status(), driver.told()), (1, false));
    driver.move_to(Net::new(Wires::new(0)).unwrap()).unwrap();
    assert_eq!(driver.status(), 1);
}

#[test]
fn all_that_a_driver_asked_for_moves_with_the_machine() {
    let (wires, mut driver, handle) = single(1 << 1 | 1 << 7);
    driver.start(PLAIN | 1 << 1 | 1 << 2 | 1 << 7);
    driver.command(0, 0, &[0]);
    driver.command(1, 0, &[&[0, 0, 0, 0, 1, 0, 0, 0], &GROUP[..]].concat());
    driver.command(1, 1, &OTHER);
    driver.command(2, 0, &[5, 0]);
    assert_eq!(driver.command(5, 0, &2_u64.to_le_bytes()), Some(0));
    handle.set_link(false);
    wires.with(|wire| wire.state = b"connections".to_vec());
    (0..SIZE).for_each(|_| driver.give_buffer(0));

    let wires = Wires::new(1 << 1 | 1 << 7);
    let card = Net::new(wires.clone()).unwrap();
    let handle = card.handle();
    driver.move_to(card).unwrap();
    assert_eq!((handle.link(), handle.mac(), driver.status() & 1), (false, OTHER, 0));
    assert_eq!(
        wires.with(|wire| (wire.state.clone(), wire.features & OFFLOADS)),
        (b"connections".to_vec(), 2)
    );
    handle.set_link(true);
    assert_eq!(taken(&wires, &mut driver), [OTHER, GROUP, BROADCAST]);
    wires.with(|wire| wire.to_guest.extend([5, 6].map(|vlan| tagged(OTHER, vlan))));
    assert_eq!(driver.received(0).len(), 1);

    // Other bytes are refused, and do no harm.
    let card = || Net::new(Wires::new(0)).unwrap();
    let state = card().save().unwrap();
    for cut in 0..state.len() {
        assert!(card().restore(&state[..cut]).is_err(), "{cut}");
    }
    for at in 0..state.len() {
        for bit in 0..8 {
            let mut state = state.clone();
            state[at] ^= 1 << bit;
            drop(card().restore(&state));
        }
    }
    let other = Net::new(wires.clone()).unwrap();
    wires.with(|wire| wire.state = b"refused".to_vec());
    let state = other.save().unwrap();
    let text = card().restore(&state).unwrap_err().to_string();
    assert!(text.contains("equal back end"), "{text}");
    assert!(
        Net::multiqueue([Wires::new(0), Wires::new(0)]).unwrap().restore(&card().save().unwrap()).is_err()
    );
}

#[test]
fn headers_are_checked_before_the_host_sees_them() {
    let (wires, mut driver, handle) = single(0x7f83);
    let checksum = |flags, fields| with_header(packet(OTHER, 100), flags, 0, fields);
    let segments = |flags, kind, fields| with_header(packet(OTHER, 3000), flags, kind, fields);
    let tcp = [54, 1448, 34, 16];
    // Nothing was agreed on: only whole packets go out.
    driver.start(PLAIN);
    for bad in [checksum(1, [0, 0, 34, 16]), segments(1, 1, tcp), segments(1, 3, tcp), segments(0, 0x80, tcp)]
    {
        driver.send(0, &bad);
    }
    assert_eq!((wires.sent().len(), handle.counters().sent_dropped, driver.broken()), (0, 4, false));
    // What means nothing to the receiver is not passed on.
    driver.send(0, &with_header(packet(OTHER, 60), 6, 0, [1, 2, 3, 4]));
    assert_eq!(wires.sent(), [packet(OTHER, 60)]);

    driver.start(PLAIN | 0x7801);
    for (n, bad) in [
        checksum(1, [0, 0, 84, 16]),
        checksum(1, [0, 0, 0xffff, 0xffff]),
        checksum(1, [0, 0, 0, 16]),
        segments(1, 1, [54, 0, 34, 16]),
        segments(0, 1, tcp),
        segments(1, 1, [3001, 1448, 34, 16]),
        segments(1, 2, tcp),
        segments(1, 5, tcp),
        segments(1, 0x83, tcp),
        vec![0; HEADER + 13],
    ]
    .iter()
    .enumerate()
    {
        driver.send(0, bad);
        assert_eq!(wires.sent().len(), 0, "{n}");
    }
    for good in
        [checksum(1, [0, 0, 82, 16]), segments(1, 1, tcp), segments(1, 0x84, tcp), segments(1, 3, tcp)]
    {
        driver.send(0, &good);
        assert_eq!(wires.sent(), [good]);
    }
    assert!(!driver.broken());
    // The longest packet, and one byte more.
    let queue = 1;
    for (len, count) in [(MOST_PACKET, 1), (MOST_PACKET + 1, 0)] {
        let len = u32::try_from(len).unwrap();
        driver.memory.zero(GuestAddress(buffer(queue, 0)), len.into()).unwrap();
        driver.offer(queue, &[(buffer(queue, 0), len, 0)]);
        assert_eq!(wires.sent().len(), count);
    }
}

#[test]
fn packets_with_offloads_that_the_driver_does_not_want_do_not_get_to_it() {
    let (wires, mut driver, handle) = single(1 << 1 | 1 << 7 | 1 << 54);
    let checksum = with_header(packet(OWN, 100), 1, 0, [0, 0, 34, 16]);
    let segments = with_header(packet(OWN, 3000), 1, 1, [54, 1448, 34, 16]);
    let arrive = |driver: &mut Driver| {
        wires.with(|wire| wire.to_guest.extend([checksum.clone(), segments.clone(), packet(OWN, 60)]));
        driver.received(0).len()
    };
    let guest = 1 << 1 | 1 << 7;
    driver.start(PLAIN | guest | 1 << 2);
    assert_eq!(wires.with(|wire| wire.features & OFFLOADS), guest);
    (0..SIZE).for_each(|_| driver.give_buffer(0));
    assert_eq!(arrive(&mut driver), 3);
    assert_eq!(driver.command(5, 0, &(1_u64 << 54).to_le_bytes()), Some(1), "not agreed on");
    assert_eq!(driver.command(5, 0, &1_u64.to_le_bytes()), Some(1), "not of this direction");
    assert_eq!(driver.command(5, 0, &2_u64.to_le_bytes()), Some(0));
    assert_eq!((wires.with(|wire| wire.features & OFFLOADS), arrive(&mut driver)), (2, 2));
    // Segments need checksums.
    assert_eq!(driver.command(5, 0, &(1_u64 << 7).to_le_bytes()), Some(0));
    assert_eq!((wires.with(|wire| wire.features & OFFLOADS), arrive(&mut driver)), (0, 1));
    assert_eq!(driver.command(5, 0, &guest.to_le_bytes()), Some(0));
    assert_eq!((wires.with(|wire| wire.features & OFFLOADS), arrive(&mut driver)), (guest, 3));
    assert_eq!(handle.counters().received_dropped, 3);
    // Without what it needs an offload is not asked of the host either.
    driver.start(PLAIN | 1 << 7);
    assert_eq!(wires.with(|wire| wire.features & OFFLOADS), 0);
}

#[test]
fn packets_longer_than_the_mtu_or_shorter_than_a_header_are_dropped() {
    let wires = Wires::new(1 << 1 | 1 << 7);
    let card = Net::new(wires.clone()).unwrap().mtu(1500).unwrap();
    let mut driver = Driver::new(card);
    driver.start(PLAIN | 1 << 3 | 1 << 1 | 1 << 7);
    (0..SIZE).for_each(|_| driver.give_buffer(0));
    let lengths = [13, 14, 1514, 1518, 1519, 0x4000 - HEADER + 1];
    wires.with(|wire| {
        wire.to_guest.extend(lengths.map(|len| {
            let mut packet = packet(OWN, len.max(14));
            packet.truncate(HEADER + len);
            packet
        }))
    });
    let large = with_header(packet(OWN, 9000), 1, 1, [54, 1448, 34, 16]);
    wires.with(|wire| wire.to_guest.push_back(large));
    let got = driver.received(0).iter().map(|packet| packet.len() - HEADER).collect::<Vec<_>>();
    assert_eq!(got, [14, 1514, 1518, 9000]);
}

#[test]
fn a_back_end_without_room_loses_nothing() {
    let (wires, mut driver, handle) = single(0);
    wires.with(|wire| wire.room = Some(2));
    driver.start(PLAIN);
    (0..5).for_each(|n| driver.send(0, &packet(OTHER, 60 + n)));
    let lengths = |wires: &Wires| wires.sent().iter().map(|packet| packet.len() - HEADER).collect::<Vec<_>>();
    assert_eq!(lengths(&wires), [60, 61]);
    // Notifications do not help; that there is room does.
    driver.write(0x50, 1);
    assert!(lengths(&wires).is_empty());
    wires.with(|wire| wire.room = Some(1));
    driver.device.poll();
    assert_eq!((lengths(&wires), handle.counters().sent_dropped), (vec![62], 0));
    // What waits moves with the machine, and is sent once.
    let other = Wires::new(0);
    other.with(|wire| wire.room = Some(10));
    driver.move_to(Net::new(other.clone()).unwrap()).unwrap();
    assert_eq!((lengths(&other), lengths(&wires)), (vec![63, 64], vec![]));
    let used = std::iter::from_fn(|| driver.used(1)).count();
    assert_eq!(used, 5);
}
