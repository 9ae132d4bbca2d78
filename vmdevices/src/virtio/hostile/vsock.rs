//! A guest that breaks the rules of sockets.

use std::io::{Read, Write};

use super::*;
use crate::virtio::vsock::VsockListener;

const CID: u64 = 3;
const PORT: u32 = 50;

/// Where the device's packets to the guest go: rings, and buffers of 4 KiB.
const RX: [u64; 3] = [0x2_0000, 0x2_1000, 0x2_2000];
const BUFFERS: u64 = 0x3_0000;
const EVENTS: [u64; 3] = [0x2_4000, 0x2_5000, 0x2_6000];
const EVENT: u64 = 0x2_7000;

const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

/// A guest with all three queues, and a port of the host to connect to.
struct Guest {
    driver: Driver,
    handle: VsockHandle,
    listener: VsockListener,
    given: u16,
    taken: u16,
}

/// A packet: operation, ports of guest and host, flags, length, and all the rest.
#[derive(Clone, Copy)]
struct Sent {
    cids: (u64, u64),
    ports: (u32, u32),
    len: u32,
    kind: u16,
    op: u16,
    flags: u32,
    room: u32,
    took: u32,
}

const GOOD: Sent =
    Sent { cids: (CID, 2), ports: (9, PORT), len: 0, kind: 1, op: 0, flags: 0, room: 0x1_0000, took: 0 };

/// A packet of the device, without what does not matter here.
#[derive(Debug, PartialEq, Eq)]
struct Got {
    op: u16,
    ports: (u32, u32),
    flags: u32,
    data: Vec<u8>,
}

impl Guest {
    fn new() -> Self {
        let device = Vsock::new(CID.try_into().unwrap()).unwrap();
        let handle = device.handle();
        let listener = handle.listen(PORT).unwrap();
        let driver = Driver::new(device, Threading::Vcpu);
        let mut guest = Self { driver, handle, listener, given: 0, taken: 0 };
        guest.start();
        guest
    }

    fn start(&mut self) {
        (self.given, self.taken) = (0, 0);
        self.driver.queue = 1;
        self.driver.negotiate(features::VERSION_1 | 1);
        for [table, available, used] in [RX, EVENTS] {
            for at in [table, available, used] {
                self.driver.memory.zero(GuestAddress(at), 0x1000).unwrap();
            }
        }
        self.driver.queue(0, SIZE, RX);
        self.driver.queue(1, SIZE, [TABLE, AVAILABLE, USED]);
        self.driver.queue(2, SIZE, EVENTS);
        self.driver.write(0x70, 15);
    }

    /// Gives the device a buffer of `len` bytes for a packet.
    fn give(&mut self, len: u32, flags: u16) {
        let slot = self.given % SIZE;
        self.driver.descriptor(RX[0], slot, BUFFERS + 0x1000 * u64::from(slot), len, flags, 0);
        let at = GuestAddress(RX[1] + 4 + 2 * u64::from(slot));
        self.driver.memory.store(at, &slot).unwrap();
        self.given += 1;
        self.driver.memory.store(GuestAddress(RX[1] + 2), &self.given).unwrap();
        self.driver.write(0x50, 0);
    }

    fn send(&mut self, packet: Sent, data: &[u8]) {
        let bytes = [
            &packet.cids.0.to_le_bytes()[..],
            &packet.cids.1.to_le_bytes(),
            &packet.ports.0.to_le_bytes(),
            &packet.ports.1.to_le_bytes(),
            &packet.len.to_le_bytes(),
            &packet.kind.to_le_bytes(),
            &packet.op.to_le_bytes(),
            &packet.flags.to_le_bytes(),
            &packet.room.to_le_bytes(),
            &packet.took.to_le_bytes(),
            data,
        ]
        .concat();
        self.driver.memory.write(GuestAddress(0x4_0000), &bytes).unwrap();
        self.driver.descriptor(TABLE, 0, 0x4_0000, bytes.len().try_into().unwrap(), 0, 0);
        self.driver.offer(0);
    }

    fn send_op(&mut self, op: u16) {
        self.send(Sent { op, ..GOOD }, &[]);
    }

    fn received(&self) -> u16 {
        self.driver.memory.load(GuestAddress(RX[2] + 2)).unwrap()
    }

    /// The next packet of the device, for which it gets a buffer.
    fn packet(&mut self) -> Option<Got> {
        if self.given == self.taken {
            self.give(0x1000, WRITE);
        }
        self.driver.device.poll();
        if self.received() == self.taken {
            return None;
        }
        let at = RX[2] + 4 + 8 * u64::from(self.taken % SIZE);
        let [slot, written]: [u32; 2] = self.driver.memory.load(GuestAddress(at)).unwrap();
        self.taken += 1;
        let mut bytes = vec![0; written.try_into().unwrap()];
        self.driver.memory.read(GuestAddress(BUFFERS + 0x1000 * u64::from(slot)), &mut bytes).unwrap();
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(8)), (2, 3));
        assert_eq!(word(24) as usize, bytes.len() - 44);
        assert_eq!(bytes[28], 1);
        let op = u16::from_le_bytes([bytes[30], bytes[31]]);
        Some(Got { op, ports: (word(20), word(16)), flags: word(32), data: bytes[44..].to_vec() })
    }

    fn op(&mut self) -> Option<u16> {
        self.packet().map(|packet| packet.op)
    }

    /// A stream to the host's port.
    fn connect(&mut self) -> std::os::unix::net::UnixStream {
        self.send_op(REQUEST);
        assert_eq!(self.op(), Some(RESPONSE));
        self.listener.accept(Duration::from_secs(10)).unwrap()
    }
}

#[test]
fn packets_of_no_stream_are_reset_and_of_others_discarded() {
    let mut guest = Guest::new();
    for op in [0, RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, 8, u16::MAX] {
        guest.send_op(op);
        let reset = Got { op: RST, ports: (9, PORT), flags: 0, data: Vec::new() };
        assert_eq!(guest.packet(), Some(reset), "{op}");
    }
    guest.send_op(RST);
    assert_eq!(guest.packet(), None);
    for refused in [Sent { ports: (9, PORT + 1), ..GOOD }, Sent { ports: (9, u32::MAX), ..GOOD }] {
        guest.send(Sent { op: REQUEST, ..refused }, &[]);
        assert_eq!(guest.op(), Some(RST));
    }
    for cid in [0, 2, 4, u64::MAX] {
        guest.send(Sent { op: REQUEST, cids: (cid, 2), ..GOOD }, &[]);
        assert_eq!(guest.packet(), None, "from {cid}");
    }
    assert!(!guest.driver.broken());
}

#[test]
fn lengths_that_are_not_true_stop_the_device() {
    for (len, data) in [(1, 0), (100, 99), (u32::MAX, 10)] {
        let mut guest = Guest::new();
        guest.send(Sent { op: RW, len, ..GOOD }, &vec![0; data]);
        assert!(guest.driver.broken(), "{len} {data}");
        guest.start();
        guest.connect();
    }
    for len in [0, 1, 43] {
        let mut guest = Guest::new();
        guest.driver.descriptor(TABLE, 0, 0x4_0000, len, 0, 0);
        guest.driver.offer(0);
        assert!(guest.driver.broken(), "{len}");
    }
}

#[test]
fn buffers_without_room_stop_the_device() {
    for (len, flags) in [(43, WRITE), (0, WRITE), (0x1000, 0)] {
        let mut guest = Guest::new();
        guest.give(len, flags);
        assert!(!guest.driver.broken(), "there is nothing to put in");
        guest.send_op(RW);
        assert!(guest.driver.broken(), "{len}");
        guest.start();
        guest.connect();
    }
    // Room for a header alone: there is no data, and no end of the stream either.
    let mut guest = Guest::new();
    let mut host = guest.connect();
    host.write_all(b"data").unwrap();
    guest.give(44, WRITE);
    guest.driver.device.poll();
    assert_eq!((guest.received(), guest.driver.broken()), (1, false));
}

#[test]
fn a_guest_that_takes_no_answers_is_heard_no_more() {
    let mut guest = Guest::new();
    for _ in 0..1000 {
        guest.send_op(RW);
        if guest.driver.available - guest.driver.used() >= SIZE {
            break;
        }
    }
    assert_eq!(guest.driver.used(), 256);
    let waiting = guest.driver.available - guest.driver.used();
    let mut resets = 0;
    while guest.op() == Some(RST) {
        resets += 1;
    }
    assert_eq!((resets, guest.driver.used()), (256 + waiting, 256 + waiting));
}

#[test]
fn more_than_there_is_room_for_is_a_reset() {
    let mut guest = Guest::new();
    let mut host = guest.connect();
    let piece = vec![7; 0x4000];
    let mut sent = 0;
    let reset = loop {
        guest.send(Sent { op: RW, len: 0x4000, ..GOOD }, &piece);
        match guest.op() {
            Some(CREDIT_UPDATE) | None => sent += piece.len(),
            other => break other,
        }
        assert!(sent < 64 << 20, "there is no end");
    };
    assert_eq!(reset, Some(RST));
    // What the host had taken until then it has.
    let mut all = Vec::new();
    host.read_to_end(&mut all).unwrap();
    assert!(all.len() <= sent && all.iter().all(|&byte| byte == 7));
    assert!(!guest.driver.broken());
}

#[test]
fn credit_that_is_not_there_is_not_used() {
    let mut guest = Guest::new();
    // Nothing, and nonsense: as if more had been taken than was sent.
    for (room, took) in [(0, 0), (100, 200), (u32::MAX, 0xffff_0000), (5, u32::MAX)] {
        guest.send(Sent { op: REQUEST, room, took, ..GOOD }, &[]);
        assert_eq!(guest.op(), Some(RESPONSE));
        let mut host = guest.listener.accept(Duration::from_secs(10)).unwrap();
        host.write_all(&[1; 1000]).unwrap();
        let mut got = 0;
        let mut asked = 0;
        while let Some(packet) = guest.packet() {
            got += packet.data.len();
            asked += u32::from(packet.op == CREDIT_REQUEST);
        }
        let right = room.saturating_sub(0_u32.wrapping_sub(took)).min(1000);
        assert_eq!((got, asked), (right as usize, u32::from(right < 1000)), "{room} {took}");
        // An answer of nothing is taken for one.
        if right < 1000 {
            guest.send(Sent { op: CREDIT_UPDATE, room, took, ..GOOD }, &[]);
            assert_eq!(guest.packet(), None);
        }
        // Then it says how much it is.
        let took = u32::try_from(got).unwrap();
        guest.send(Sent { op: CREDIT_UPDATE, room: 0x1_0000, took, ..GOOD }, &[]);
        while let Some(packet) = guest.packet() {
            got += packet.data.len();
        }
        assert_eq!(got, 1000);
        guest.send_op(RST);
    }
}

/// A stream that had nothing to say once took the buffer's room from those behind it in line.
#[test]
fn streams_without_data_do_not_hold_up_others() {
    let mut guest = Guest::new();
    let mut hosts = Vec::new();
    for port in 0..4 {
        guest.send(Sent { op: REQUEST, ports: (port, PORT), ..GOOD }, &[]);
        hosts.push(guest.listener.accept(Duration::from_secs(10)).unwrap());
    }
    hosts[3].write_all(b"from the last").unwrap();
    guest.driver.device.poll();
    let mut said = Vec::new();
    while let Some(packet) = guest.packet() {
        said.extend((packet.op == RW).then_some((packet.ports.0, packet.data)));
    }
    assert_eq!(said, [(3, b"from the last".to_vec())]);
}

#[test]
fn a_closed_stream_answers_with_a_reset_when_all_is_taken() {
    let mut guest = Guest::new();
    let mut host = guest.connect();
    guest.send(Sent { op: RW, len: 4, ..GOOD }, b"last");
    guest.send(Sent { op: SHUTDOWN, flags: 2, ..GOOD }, &[]);
    assert_eq!(guest.packet(), None);
    let mut text = String::new();
    host.read_to_string(&mut text).unwrap();
    assert_eq!(text, "last");
    // The other direction goes on, to its own end.
    host.write_all(b"answer").unwrap();
    let data = |data: &[u8]| Got { op: RW, ports: (9, PORT), flags: 0, data: data.to_vec() };
    assert_eq!(guest.packet(), Some(data(b"answer")));
    guest.send(Sent { op: RW, len: 4, ..GOOD }, b"more");
    assert_eq!(guest.op(), Some(RST), "data behind the end");

    let mut host = guest.connect();
    host.write_all(b"bye").unwrap();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.packet(), Some(data(b"bye")));
    assert_eq!(guest.packet(), Some(Got { op: SHUTDOWN, ports: (9, PORT), flags: 2, data: Vec::new() }));
    drop(host);
    assert_eq!(guest.packet().map(|p| (p.op, p.flags)), Some((SHUTDOWN, 3)));
    guest.send(Sent { op: SHUTDOWN, flags: 3, ..GOOD }, &[]);
    assert_eq!(guest.op(), Some(RST));
    assert_eq!(guest.packet(), None);
}

#[test]
fn a_reset_closes_streams_and_a_restored_device_says_so() {
    let mut guest = Guest::new();
    let mut host = guest.connect();
    guest.driver.descriptor(EVENTS[0], 0, EVENT, 4, WRITE, 0);
    guest.driver.memory.write(GuestAddress(EVENT), &[0xff; 4]).unwrap();
    guest.driver.memory.store(GuestAddress(EVENTS[1] + 2), &1_u16).unwrap();
    guest.driver.write(0x50, 2);
    let events = |guest: &Guest| guest.driver.memory.load::<u16>(GuestAddress(EVENTS[2] + 2)).unwrap();
    assert_eq!(events(&guest), 0);
    let state = guest.driver.device.save().unwrap();
    // Saving alone does nothing to it.
    host.write_all(b"x").unwrap();
    assert_eq!(guest.op(), Some(RW));
    let memory = guest.driver.memory.clone();
    guest.driver.device.restore(&state).unwrap();
    assert_eq!((events(&guest), memory.load::<u32>(GuestAddress(EVENT)).unwrap()), (1, 0));
    assert_eq!(host.read(&mut [0]).unwrap(), 0, "the stream is closed");
    guest.start();
    let mut host = guest.connect();
    guest.driver.write(0x70, 0);
    assert_eq!(host.read(&mut [0]).unwrap(), 0, "the stream is closed");
}

#[test]
fn streams_are_bounded_and_ports_are_not_used_twice() {
    let mut guest = Guest::new();
    let mut hosts = Vec::new();
    for port in 0..1024 {
        guest.send(Sent { op: REQUEST, ports: (port, PORT), ..GOOD }, &[]);
        assert_eq!(guest.op(), Some(RESPONSE), "{port}");
        hosts.push(guest.listener.accept(Duration::from_secs(10)).unwrap());
    }
    guest.send(Sent { op: REQUEST, ports: (5000, PORT), ..GOOD }, &[]);
    assert_eq!(guest.op(), Some(RST));
    // A request for a stream that there is ends it.
    guest.send(Sent { op: REQUEST, ports: (5, PORT), ..GOOD }, &[]);
    assert_eq!(guest.packet().map(|p| (p.op, p.ports)), Some((RST, (5, PORT))));
    assert_eq!(hosts[5].read(&mut [0]).unwrap(), 0);
    guest.send(Sent { op: REQUEST, ports: (5000, PORT), ..GOOD }, &[]);
    while guest.packet().is_some_and(|p| p.ports.0 != 5000) {}
    assert!(!guest.driver.broken());
}

#[test]
fn an_embedder_that_does_not_wait_leaves_nothing() {
    let mut guest = Guest::new();
    let error = guest.handle.connect(1, Duration::ZERO).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    // It may be asked for or not; in the end the guest knows that it is gone.
    let mut last = None;
    while let Some(packet) = guest.packet() {
        assert!([REQUEST, RST].contains(&packet.op), "{packet:?}");
        last = Some(packet.op);
    }
    assert_eq!(last, Some(RST));
    // 128 wait for a driver that never comes, and no more.
    guest.driver.write(0x70, 0);
    for _ in 0..128 {
        assert_eq!(guest.handle.connect(1, Duration::ZERO).unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
    assert_eq!(guest.handle.connect(1, Duration::ZERO).unwrap_err().kind(), io::ErrorKind::WouldBlock);
}
