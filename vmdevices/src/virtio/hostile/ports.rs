//! A guest that says nonsense about ports.

use super::*;
use crate::console::{self, Script};

/// Rings of the queues for messages, and buffers.
const FROM_DEVICE: [u64; 3] = [0x2_0000, 0x2_1000, 0x2_2000];
const BUFFERS: u64 = 0x3_0000;
const MULTIPORT: u64 = 1 << 1;

struct Guest {
    driver: Driver,
    handle: ConsoleHandle,
    script: Script,
    given: u16,
    taken: u16,
}

impl Guest {
    /// A console with a named port, whose driver has the queues for messages.
    fn new() -> Self {
        let (agent, script) = console::memory().unwrap();
        let device = VirtioConsole::new(console::Null).port("agent", agent).unwrap();
        let handle = device.handle().unwrap();
        let mut driver = Driver::new(device, Threading::Vcpu);
        driver.queue = 3;
        let mut guest = Self { driver, handle, script, given: 0, taken: 0 };
        guest.start();
        guest
    }

    fn start(&mut self) {
        (self.given, self.taken) = (0, 0);
        self.driver.negotiate(features::VERSION_1 | MULTIPORT);
        for at in FROM_DEVICE {
            self.driver.memory.zero(GuestAddress(at), 0x1000).unwrap();
        }
        self.driver.queue(2, SIZE, FROM_DEVICE);
        self.driver.queue(3, SIZE, [TABLE, AVAILABLE, USED]);
        self.driver.write(0x70, 15);
    }

    fn say(&mut self, port: u32, event: u16, value: u16) {
        let bytes = [&port.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat();
        self.driver.memory.write(GuestAddress(DATA), &bytes).unwrap();
        self.driver.descriptor(TABLE, 0, DATA, 8, 0, 0);
        self.driver.offer(0);
    }

    fn give(&mut self, len: u32) {
        let slot = self.given % SIZE;
        self.driver.descriptor(FROM_DEVICE[0], slot, BUFFERS + 0x100 * u64::from(slot), len, WRITE, 0);
        self.driver.memory.store(GuestAddress(FROM_DEVICE[1] + 4 + 2 * u64::from(slot)), &slot).unwrap();
        self.given += 1;
        self.driver.memory.store(GuestAddress(FROM_DEVICE[1] + 2), &self.given).unwrap();
        self.driver.write(0x50, 2);
    }

    /// The next message: port, event, value, and what follows.
    fn heard(&mut self) -> Option<(u32, u16, u16, Vec<u8>)> {
        if self.given == self.taken {
            self.give(0x100);
        }
        self.driver.device.poll();
        if self.driver.memory.load::<u16>(GuestAddress(FROM_DEVICE[2] + 2)).unwrap() == self.taken {
            return None;
        }
        let at = GuestAddress(FROM_DEVICE[2] + 4 + 8 * u64::from(self.taken % SIZE));
        let [slot, written]: [u32; 2] = self.driver.memory.load(at).unwrap();
        self.taken += 1;
        let mut bytes = vec![0; written.try_into().unwrap()];
        self.driver.memory.read(GuestAddress(BUFFERS + 0x100 * u64::from(slot)), &mut bytes).unwrap();
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Some((u32::from(half(0)) | u32::from(half(2)) << 16, half(4), half(6), bytes[8..].to_vec()))
    }

    fn all(&mut self) -> Vec<(u32, u16, u16, Vec<u8>)> {
        std::iter::from_fn(|| self.heard()).collect()
    }
}

#[test]
fn ports_are_introduced_when_the_driver_is_ready() {
    let mut guest = Guest::new();
    assert_eq!(guest.all(), []);
    guest.say(0xffff_ffff, 0, 1);
    assert_eq!(guest.all(), [(0, 1, 1, vec![]), (1, 1, 1, vec![])]);
    guest.handle.set_size(0, 80, 25).unwrap();
    guest.say(0, 3, 1);
    guest.say(1, 3, 1);
    let columns_first = vec![80, 0, 25, 0];
    assert_eq!(
        guest.all(),
        [
            (0, 4, 1, vec![]),
            (0, 5, 0, columns_first),
            (0, 6, 1, vec![]),
            (1, 7, 1, b"agent".to_vec()),
            (1, 6, 1, vec![]),
        ]
    );
    // Ports that there are not, events that there are not, and a driver that gives up.
    for (port, event, value) in [(2, 3, 1), (u32::MAX, 6, 1), (1, 99, 1), (1, 3, 0), (0, 0, 0)] {
        guest.say(port, event, value);
    }
    assert_eq!((guest.all(), guest.driver.broken()), (vec![], false));
    // Many changes are told as one.
    for open in [false, true, false] {
        guest.handle.set_open(1, open).unwrap();
    }
    assert_eq!(guest.all(), [(1, 6, 0, vec![])]);
    for wrong in
        [guest.handle.set_open(2, true), guest.handle.set_size(2, 1, 1), guest.handle.set_size(1, 1, 1)]
    {
        assert!(wrong.unwrap_err().to_string().contains("port"));
    }
    // A state taken now goes on where it was.
    guest.say(1, 6, 1);
    let state = guest.driver.device.save().unwrap();
    guest.handle.set_open(1, true).unwrap();
    guest.driver.device.restore(&state).unwrap();
    assert!(guest.handle.is_open(1));
    guest.handle.set_open(1, true).unwrap();
    assert_eq!(guest.all(), [(1, 6, 1, vec![])]);
    guest.start();
    assert!(!guest.handle.is_open(1), "another driver has opened nothing");
    guest.handle.set_open(1, false).unwrap();
    assert_eq!(guest.all(), [], "it does not know the port yet");
}

#[test]
fn a_driver_that_takes_no_messages_is_heard_no_more() {
    let mut guest = Guest::new();
    while guest.driver.available - guest.driver.used() < SIZE {
        guest.say(0, 0, 1);
        assert!(guest.driver.available < 1000, "there is no end");
    }
    let used = guest.driver.used();
    assert_eq!(used, 64);
    let told = guest.all();
    assert_eq!(told.len(), 2 * usize::from(used + SIZE));
    assert_eq!(guest.driver.used(), used + SIZE);
}

#[test]
fn messages_too_short_and_buffers_without_room_stop_the_device() {
    let mut guest = Guest::new();
    guest.driver.descriptor(TABLE, 0, DATA, 7, 0, 0);
    guest.driver.offer(0);
    assert!(guest.driver.broken());
    guest.start();
    guest.give(12);
    guest.say(1, 3, 1);
    assert!(guest.driver.broken(), "a name has no room");
    guest.start();
    guest.say(0, 0, 1);
    assert_eq!(guest.all().len(), 2);
}

#[test]
fn input_waits_until_the_port_is_open() {
    let mut guest = Guest::new();
    // Queue 4 is where port 1 receives.
    const RECEIVE: [u64; 3] = [0x4_0000, 0x4_1000, 0x4_2000];
    guest.driver.write(0x70, 0);
    guest.script.send("words").unwrap();
    guest.driver.negotiate(features::VERSION_1 | MULTIPORT);
    guest.driver.queue(3, SIZE, [TABLE, AVAILABLE, USED]);
    guest.driver.queue(4, SIZE, RECEIVE);
    guest.driver.descriptor(RECEIVE[0], 0, BUFFERS, 64, WRITE, 0);
    guest.driver.memory.store(GuestAddress(RECEIVE[1] + 2), &1_u16).unwrap();
    guest.driver.write(0x70, 15);
    guest.driver.write(0x50, 4);
    let received = |guest: &Guest| guest.driver.memory.load::<u16>(GuestAddress(RECEIVE[2] + 2)).unwrap();
    assert_eq!(received(&guest), 0);
    guest.say(1, 6, 1);
    assert_eq!(received(&guest), 1);
    let mut words = [0; 5];
    guest.driver.memory.read(GuestAddress(BUFFERS), &mut words).unwrap();
    assert_eq!(&words, b"words");
}
