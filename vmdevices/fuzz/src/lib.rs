//! A driver made of fuzzing input, for each virtio device behind virtio-mmio, and for a PCI bus.
//!
//! `make fuzz` runs every target for ten minutes, `vmdevices/fuzz/run SECONDS TARGET...` some of them, and
//! `cargo fuzz run TARGET` from `vmdevices/` works as well. `tests/any_driver.rs` runs the same drivers on
//! what is in `corpus/`, and on a few fixed inputs.
//!
//! `corpus/*/linux-*` is what a stock Debian kernel did. To record it anew (a minute or two):
//! `VMCORE_FUZZ_CORPUS=vmdevices/fuzz/corpus cargo test -p vmdevices --test boot -- --ignored fuzz_seeds`.

mod chain;
pub mod nat;
mod pci;

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::net::{RecvFlags, SendFlags, recv, send};
use vmcore::{BusDevice, GuestAddress, GuestMemory, IrqLine, MemoryRegion};
use vmdevices::block::{BlockBackend, DiskStats};
use vmdevices::buffers::Buffers;
use vmdevices::net::{HEADER, MOST_PACKET, NetBackend};
use vmdevices::virtio::{Interrupt, Threading, VirtioDevice, VirtioMmio};
use vmdevices::{Balloon, Disk, Net, Rng, VirtioConsole, Vsock, console};

pub use chain::{CHAIN, INDIRECT, NOTIFY, WRITABLE};
pub use pci::pci;

/// Guest memory: 64 KiB in two regions that touch, and behind it a page that the guest cannot write.
const HALF: u64 = 0x8000;
const ROM: u64 = 2 * HALF;

/// Queue `n` has the page behind this plus `n` pages: its table, and its rings at these offsets.
/// The rest of the page is for indirect tables; headers and data lie wherever the input says.
const QUEUES: u64 = 0x1000;
pub const PAGE: u64 = 0x1000;
const AVAILABLE: u64 = 0x100;
const USED: u64 = 0x200;
/// Entries of a queue.
pub const SIZE: u16 = 8;
/// Bytes of the input that are laid over each queue's page before the driver is ready.
pub const LAYOUT: usize = 0x400;
/// Bytes of the input before the layout: a mask of the features to leave out.
pub const MASK: usize = 4;
/// The bit of the mask that leaves out the layout. (It means no feature of a device.)
pub const BARE: u32 = 1 << 31;
/// Bytes of each step of the script behind the layout, but for those that [`CHAIN`] is.
pub const STEP: usize = 8;
/// The most queues a device here has.
pub const MOST_QUEUES: usize = 6;

/// What a driver has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// The device status before the last reset.
    pub status: u32,
    /// The index of each queue's available ring: how many chains were offered.
    pub offered: [u16; MOST_QUEUES],
    /// The index of each queue's used ring: how many of them were answered.
    pub used: [u16; MOST_QUEUES],
}

/// Drives a disk of 16 KiB.
pub fn block(input: &[u8]) -> End {
    drive(disk(), input)
}

/// What the disk has done in the end, where [`block`] tells how its driver has fared.
pub fn requests(input: &[u8]) -> DiskStats {
    let disk = disk();
    let handle = disk.handle();
    drive(disk, input);
    handle.stats()
}

/// The disk of [`block`].
pub fn disk() -> Disk {
    Disk::new(Arc::new(Memory(Mutex::new(vec![0x5a; DISK]))))
}

/// Drives a network card, whose network sends packets back, and a large one now and then.
pub fn net(input: &[u8]) -> End {
    drive(card(), input)
}

/// The card of [`net`] and [`net_commands`].
pub fn card() -> Net {
    Net::multiqueue([Echo::default(), Echo::default()]).expect("random numbers")
}

/// Where the commands and packets of [`net_commands`] lie, received packets, and answers: on places of their
/// own, as a packet may come at any moment.
const OUT: u64 = 0x8000;
const IN: u64 = 0xc000;
const ANSWER: u64 = 0xf000;

/// Sends a network card well-formed chains of whatever content: commands, packets, and packets that
/// come. Each step is a byte that chooses, a length in 16 bits, and as many bytes. Returns how many
/// commands were done.
pub fn net_commands(mut input: &[u8]) -> u32 {
    let memory = memory();
    let card = card();
    let features = card.features() | RING_FEATURES;
    let interrupt = Interrupt::Line(IrqLine::detached());
    let device = VirtioMmio::new("fuzz", card, memory.clone(), interrupt, Threading::Vcpu);
    let mut device = device.expect("events");
    negotiate(&mut device, features & u64::from(u32::MAX), 5);
    write(&mut device, 0x70, 15);
    // A chain of one piece to read and one to write, either of which may be missing.
    let chain = |device: &mut VirtioMmio, queue: usize, read: usize, to: u64, write: u32| {
        let table = QUEUES + queue as u64 * PAGE;
        let index = |ring: u64| memory.load::<u16>(GuestAddress(table + ring + 2)).expect("memory");
        // All entries are with the device: one more would break the rules.
        if index(AVAILABLE).wrapping_sub(index(USED)) >= SIZE {
            return;
        }
        let mut pieces = Vec::new();
        for (at, len, flags) in [(OUT, read as u32, 0), (to, write, 2)] {
            if len > 0 {
                pieces.push((at, len, flags));
            }
        }
        let count = pieces.len();
        for (n, (at, len, flags)) in pieces.into_iter().enumerate() {
            let next = n + 1 < count;
            let fields =
                [&at.to_le_bytes()[..], &len.to_le_bytes(), &[flags | u8::from(next), 0], &[n as u8 + 1, 0]];
            memory.write(GuestAddress(table + 16 * n as u64), &fields.concat()).expect("memory");
        }
        offer(&memory, device, queue, 0);
    };
    let mut done = 0;
    while let Some((&[what, low, high], rest)) = input.split_first_chunk() {
        let len = (usize::from(u16::from_le_bytes([low, high])) % 0x3000).min(rest.len());
        let (data, rest) = rest.split_at(len);
        input = rest;
        memory.write(GuestAddress(OUT), data).expect("memory");
        match what % 8 {
            0..3 => {
                memory.write(GuestAddress(ANSWER), &[0xcc]).expect("memory");
                chain(&mut device, 4, len, ANSWER, 1);
                let answer: u8 = memory.load(GuestAddress(ANSWER)).expect("memory");
                assert!(answer <= 1, "{answer}: no answer to a command");
                done += u32::from(answer == 0);
            }
            3 | 4 => chain(&mut device, usize::from(1 + what / 8 % 2 * 2), len.max(1), IN, 0),
            5 => chain(&mut device, usize::from(what / 8 % 2 * 2), 0, IN, 0x3000),
            6 => device.read(0x100 + u64::from(low % 24), &mut [0; 8][..1 << (high % 4)]),
            _ => {
                let state = device.save().expect("nothing is in flight");
                device.restore(&state).expect("its own state");
            }
        }
        assert_eq!(read(&mut device, 0x70), 15, "well-formed chains stop the device");
    }
    done
}

/// Drives an entropy source.
pub fn rng(input: &[u8]) -> End {
    drive(Rng::new(), input)
}

/// Drives a console on which somebody has typed more than one buffer takes.
pub fn console(input: &[u8]) -> End {
    let (terminal, script) = console::memory().expect("an event");
    script.send("typed before ".repeat(100)).expect("the device is there");
    drive(VirtioConsole::new(terminal), input)
}

/// Drives sockets of guest 3: the host listens on port 1, connects to port 2 of the guest and does not
/// wait.
pub fn vsock(input: &[u8]) -> End {
    sockets(input).0
}

/// As [`vsock`], with how many bytes the server on port 1 has got. It knows the newest stream only, of which it
/// takes a little at a time, and to which it gives as much as there is room for. Others it closes.
pub fn sockets(input: &[u8]) -> (End, usize) {
    let device = Vsock::new(3).expect("events");
    let handle = device.handle();
    let listener = handle.listen(1).expect("an event");
    handle.connect(2, Duration::ZERO).expect_err("nobody is there");
    let (mut stream, mut taken) = (None, 0);
    let end = drive_beside(device, input, || {
        stream = listener.accept(Duration::ZERO).ok().or_else(|| stream.take());
        let Some(stream) = &stream else { return };
        let mut piece = [0; 500];
        taken += recv(stream, &mut piece, RecvFlags::DONTWAIT).map_or(0, |(count, _)| count);
        send(stream, &[0x5a; 20_000], SendFlags::DONTWAIT | SendFlags::NOSIGNAL).ok();
    });
    (end, taken)
}

/// Drives a console with two ports, on the second of which somebody has typed.
pub fn ports(input: &[u8]) -> End {
    let (terminal, script) = console::memory().expect("an event");
    script.send("typed before ".repeat(100)).expect("the device is there");
    let device = VirtioConsole::new(console::Null).port("agent", terminal).expect("a good name");
    device.handle().expect("an event").set_size(0, 80, 25).expect("it is a console");
    drive(device, input)
}

/// Drives a balloon that is to hold four pages.
pub fn balloon(input: &[u8]) -> End {
    let device = Balloon::new().expect("an event");
    let handle = device.handle();
    handle.set_target(4 * PAGE).expect("a few pages");
    handle.statistics(Duration::ZERO).expect_err("nobody is there");
    drive(device, input)
}

/// Accepts the offered features but those that `input` masks, sets up the queues, lays `input` over
/// them, and then does what it says: registers read and written, memory changed, queues notified, chains
/// offered.
fn drive(device: impl VirtioDevice + 'static, input: &[u8]) -> End {
    drive_beside(device, input, || ())
}

/// As [`drive`], where `host` has a turn before each step.
fn drive_beside(device: impl VirtioDevice + 'static, input: &[u8], mut host: impl FnMut()) -> End {
    let memory = memory();
    let queues = device.queue_sizes().len();
    let features = device.features() | RING_FEATURES;
    let interrupt = Interrupt::Line(IrqLine::detached());
    let device = VirtioMmio::new("fuzz", device, memory.clone(), interrupt, Threading::Vcpu);
    let mut device = device.expect("events");
    let (mask, input) = input.split_first_chunk::<MASK>().unwrap_or((&[0; MASK], &[]));
    let mask = u32::from_le_bytes(*mask);
    negotiate(&mut device, features & !u64::from(mask), queues);
    let layout = if mask & BARE == 0 { LAYOUT * queues } else { 0 };
    let (layout, mut script) = input.split_at(input.len().min(layout));
    for (page, part) in (QUEUES..).step_by(0x1000).zip(layout.chunks(LAYOUT)) {
        memory.write(GuestAddress(page), part).expect("memory");
    }
    write(&mut device, 0x70, 15);

    let mut chains = chain::Chains::new(memory.clone(), queues);
    while let Some((&[what, a, b, c], rest)) = script.split_first_chunk() {
        host();
        if what == CHAIN {
            script = chains.offer(&mut device, [a, b, c], rest);
            continue;
        }
        let Some((&value, rest)) = rest.split_first_chunk::<4>() else { break };
        script = rest;
        let at = u64::from(u16::from_le_bytes([a, b]));
        match what % 8 {
            0 => write(&mut device, 0x50, u32::from_le_bytes(value)),
            1 => write(&mut device, 0x50, a.into()),
            2 => drop(memory.write(GuestAddress(QUEUES + at % 0x5000), &value)),
            3 => offer(&memory, &mut device, usize::from(a) % queues.max(1), u16::from(b) % (SIZE + 1)),
            4 => device.write(at % 0x140, &value[..1 << (c % 3)]),
            5 => device.read(at % 0x140, &mut [0; 8][..1 << (c % 4)]),
            6 => device.poll(),
            _ => {
                // A snapshot goes on as it was, or is refused.
                let state = device.save().expect("nothing is in flight");
                device.restore(&state).ok();
            }
        }
    }

    let rings = |ring: u64| {
        let mut indices = [0; MOST_QUEUES];
        for (page, to) in (QUEUES..).step_by(0x1000).zip(&mut indices[..queues]) {
            *to = memory.load(GuestAddress(page + ring + 2)).expect("memory");
        }
        indices
    };
    let end = End { status: read(&mut device, 0x70), offered: rings(AVAILABLE), used: rings(USED) };
    if end.status & 64 != 0 {
        // A device that needs a reset touches nothing.
        (0..queues).for_each(|queue| offer(&memory, &mut device, queue, 0));
        device.poll();
        assert_eq!(rings(USED), end.used, "it goes on");
    }
    write(&mut device, 0x70, 0);
    assert_eq!(read(&mut device, 0x70), 0, "it is not reset");
    let mut rom = [0; PAGE as usize];
    memory.read(GuestAddress(ROM), &mut rom).expect("memory");
    assert!(rom.iter().all(|&byte| byte == 0), "read-only memory was written");
    end
}

fn memory() -> GuestMemory {
    let memory = GuestMemory::new();
    for base in [0, HALF] {
        let region = MemoryRegion::anonymous(GuestAddress(base), HALF).expect("memory");
        memory.insert(Arc::new(region)).expect("no overlap");
    }
    let rom = MemoryRegion::builder(GuestAddress(ROM), PAGE).read_only().build().expect("memory");
    memory.insert(Arc::new(rom)).expect("no overlap");
    memory
}

/// INDIRECT_DESC and EVENT_IDX, which the transport adds to what a device offers.
const RING_FEATURES: u64 = 3 << 28;

/// Brings the device to where its queues are set up and the driver is not ready yet.
fn negotiate(device: &mut VirtioMmio, features: u64, queues: usize) {
    let [a, b, c, d, ..] = features.to_le_bytes();
    for (register, value) in [
        (0x70, 1),
        (0x70, 3),
        (0x20, u32::from_le_bytes([a, b, c, d])),
        (0x24, 1),
        // VERSION_1 and RING_RESET.
        (0x20, 1 | 1 << 8),
        (0x70, 11),
    ] {
        write(device, register, value);
    }
    for (queue, page) in (0..queues as u32).zip((QUEUES as u32..).step_by(PAGE as usize)) {
        for (register, value) in [
            (0x30, queue),
            (0x38, SIZE.into()),
            (0x80, page),
            (0x90, page + AVAILABLE as u32),
            (0xa0, page + USED as u32),
            (0x44, 1),
        ] {
            write(device, register, value);
        }
    }
}

fn write(device: &mut VirtioMmio, register: u64, value: u32) {
    device.write(register, &value.to_le_bytes());
}

fn read(device: &mut VirtioMmio, register: u64) -> u32 {
    let mut value = [0; 4];
    device.read(register, &mut value);
    u32::from_le_bytes(value)
}

/// Makes the chain at `head` available on `queue` and notifies.
fn offer(memory: &GuestMemory, device: &mut VirtioMmio, queue: usize, head: u16) {
    publish(memory, queue, head);
    write(device, 0x50, queue as u32);
}

/// Makes the chain at `head` available on `queue`.
fn publish(memory: &GuestMemory, queue: usize, head: u16) {
    let ring = QUEUES + queue as u64 * PAGE + AVAILABLE;
    let index: u16 = memory.load(GuestAddress(ring + 2)).expect("memory");
    memory.store(GuestAddress(ring + 4 + 2 * u64::from(index % SIZE)), &head).expect("memory");
    memory.store(GuestAddress(ring + 2), &index.wrapping_add(1)).expect("memory");
}

const DISK: usize = 16384;

/// A disk in memory: panics where a range is not within it.
struct Memory(Mutex<Vec<u8>>);

impl Memory {
    fn with(&self, offset: u64, len: u64, act: impl FnOnce(&mut [u8])) -> io::Result<()> {
        let mut bytes = self.0.lock().expect("no panic before");
        act(&mut bytes[offset as usize..][..len as usize]);
        Ok(())
    }
}

impl BlockBackend for Memory {
    fn len(&self) -> u64 {
        DISK as u64
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read_at(&self, into: &mut Buffers<'_>, offset: u64) -> io::Result<()> {
        let len = into.len();
        self.with(offset, len as u64, |bytes| assert_eq!(into.write(bytes), len))
    }
    fn write_at(&self, from: &mut Buffers<'_>, offset: u64) -> io::Result<()> {
        let len = from.len();
        self.with(offset, len as u64, |bytes| assert_eq!(from.read(bytes), len))
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.with(offset, len, |bytes| bytes.fill(0xdd))
    }
    fn write_zeroes(&self, offset: u64, len: u64, _: bool) -> io::Result<()> {
        self.with(offset, len, |bytes| bytes.fill(0))
    }
}

#[derive(Default)]
struct Echo(VecDeque<Vec<u8>>);

impl NetBackend for Echo {
    fn features(&self) -> u64 {
        0x7f83
    }
    fn source(&self) -> Option<Arc<dyn AsRawFd + Send + Sync>> {
        Some(Arc::new(io::stdin()))
    }
    fn send(&mut self, packet: &mut Buffers<'_>) -> io::Result<()> {
        assert!((HEADER + 14..=MOST_PACKET).contains(&packet.len()));
        let mut bytes = vec![0; packet.len()];
        packet.read(&mut bytes);
        // What the host would act on is within the packet.
        let field = |at: usize| usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
        assert!(bytes[0] & 1 == 0 || HEADER + field(6) + field(8) + 2 <= bytes.len(), "checksum");
        assert!(
            bytes[1] == 0 || bytes[0] == 1 && field(4) > 0 && HEADER + field(2) <= bytes.len(),
            "segments"
        );
        if bytes.last().is_some_and(|last| last & 1 == 1) {
            bytes.resize(MOST_PACKET, 0);
        }
        if self.0.len() < 16 {
            self.0.push_back(bytes);
        }
        Ok(())
    }
    fn receive(&mut self, into: &mut Buffers<'_>, spill: &mut [u8]) -> io::Result<usize> {
        let packet = self.0.pop_front().ok_or(io::ErrorKind::WouldBlock)?;
        let room = into.write(&packet);
        spill[..packet.len() - room].copy_from_slice(&packet[room..]);
        Ok(packet.len())
    }
}
