//! What is virtio-pci's alone: capabilities, vectors, the interrupt status, access through configuration space,
//! doorbells that move.

use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;

use vmcore::memory::GpaRange;
use vmcore::{Bus, GuestMemory, IrqSink, MemoryRegion, Msi};

use super::*;
use crate::pci::PciBus;
use crate::virtio::Rng;

#[derive(Default)]
struct Recorder {
    messages: Mutex<Vec<u32>>,
    level: AtomicUsize,
}

impl IrqSink for Recorder {
    fn set_irq(&self, _: u32, high: bool) -> Result<()> {
        self.level.store(high.into(), Ordering::SeqCst);
        Ok(())
    }
    fn send_msi(&self, msi: Msi) -> Result<()> {
        self.messages.lock().unwrap().push(msi.data);
        Ok(())
    }
}

const BAR_AT: u64 = 0xc000_0000;
const ECAM: u64 = 0xe000_0000 + (1 << 15);
/// Where the capability for access through configuration space is, behind five of 16 to 20 bytes.
const ACCESS_AT: u64 = ECAM + 0x40 + 3 * 16 + 20;
const MSIX_AT: u64 = ACCESS_AT + 20;

struct Guest {
    mmio: Bus,
    bus: PciBus,
    recorder: Arc<Recorder>,
    memory: GuestMemory,
}

impl Guest {
    fn new() -> Self {
        let (mmio, recorder, memory) =
            (Bus::new("MMIO window"), Arc::new(Recorder::default()), GuestMemory::new());
        memory.insert(MemoryRegion::anonymous(GuestAddress(0), 0x1_0000).unwrap().into()).unwrap();
        let platform = Platform::new(memory.clone(), &mmio, recorder.clone());
        let window = GpaRange { base: BAR_AT, len: 0x1000_0000 };
        let bus = PciBus::new(platform.clone(), &[window], [5; 4]).unwrap();
        mmio.insert(0xe000_0000, 1 << 20, bus.ecam()).unwrap();
        let device = VirtioPci::new("test", Rng::new(), &platform, Threading::Vcpu).unwrap();
        bus.add(None, Box::new(device)).unwrap();
        Self { mmio, bus, recorder, memory }
    }

    fn load<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut data = [0x77; N];
        assert!(self.mmio.reader().read(at, &mut data), "{at:#x}");
        data
    }

    fn store(&self, at: u64, data: &[u8]) {
        assert!(self.mmio.reader().write(at, data), "{at:#x}");
    }

    fn word(&self, offset: u64) -> u16 {
        u16::from_le_bytes(self.load(BAR_AT + offset))
    }

    fn set_word(&self, offset: u64, value: u16) {
        self.store(BAR_AT + offset, &value.to_le_bytes());
    }

    fn status(&self, value: u8) -> u8 {
        self.store(BAR_AT + register::STATUS, &[value]);
        self.load::<1>(BAR_AT + register::STATUS)[0]
    }

    /// Accepts VERSION_1 and RING_RESET, and sets the queue up.
    fn start(&self, vector: u16) {
        assert_eq!(self.status(0), 0);
        assert_eq!((self.status(1), self.status(3)), (1, 3));
        self.store(BAR_AT + register::DRIVER_FEATURE_SELECT, &[1, 0, 0, 0]);
        self.store(BAR_AT + register::DRIVER_FEATURE, &[1, 1, 0, 0]);
        assert_eq!(self.status(11), 11);
        self.queue(vector);
        assert_eq!(self.status(15), 15);
    }

    fn queue(&self, vector: u16) {
        self.memory.zero(GuestAddress(0x2000), 0x2000).unwrap();
        self.set_word(register::QUEUE_SELECT, 0);
        self.set_word(register::QUEUE_SIZE, 8);
        self.set_word(register::QUEUE_VECTOR, vector);
        // In one piece, in halves, and in one piece again.
        self.store(BAR_AT + register::QUEUE_DESC, &0x1000_u64.to_le_bytes());
        self.store(BAR_AT + register::QUEUE_DRIVER, &0x2000_u32.to_le_bytes());
        self.store(BAR_AT + register::QUEUE_DRIVER + 4, &0_u32.to_le_bytes());
        self.store(BAR_AT + register::QUEUE_DEVICE, &0x3000_u64.to_le_bytes());
        self.set_word(register::QUEUE_ENABLE, 1);
        assert_eq!(self.word(register::QUEUE_ENABLE), 1);
    }

    /// Asks for 16 random bytes; how many requests have been served.
    fn ask(&self, notify_at: u64) -> u16 {
        let descriptor =
            [&0x4000_u64.to_le_bytes()[..], &16_u32.to_le_bytes(), &2_u16.to_le_bytes(), &[0; 2]];
        self.memory.write(GuestAddress(0x1000), &descriptor.concat()).unwrap();
        let available: u16 = self.memory.load(GuestAddress(0x2002)).unwrap();
        self.memory.store(GuestAddress(0x2002), &(available + 1)).unwrap();
        self.store(notify_at, &[0, 0]);
        self.memory.load(GuestAddress(0x3002)).unwrap()
    }

    /// Message `n` has data `0x40 + n`.
    fn messages_on(&self) {
        self.store(ECAM + 4, &[6, 0]);
        let table = BAR_AT + 0x4000;
        for vector in 0..2 {
            for (offset, value) in [(0, 0xfee0_0000), (8, 0x40 + vector), (12, 0)] {
                self.store(table + 16 * u64::from(vector) + offset, &u32::to_le_bytes(value));
            }
        }
        self.store(MSIX_AT + 2, &[1, 0x80]);
    }

    fn messages(&self) -> Vec<u32> {
        std::mem::take(&mut *self.recorder.messages.lock().unwrap())
    }

    fn level(&self) -> usize {
        self.recorder.level.load(Ordering::SeqCst)
    }
}

#[test]
fn capabilities_say_where_everything_is() {
    let guest = Guest::new();
    assert_eq!(guest.load(ECAM), [0xf4, 0x1a, 0x44, 0x10]);
    assert_eq!(guest.load(ECAM + 8), [1, 0, 0, 0xff]);
    assert_eq!(guest.load(ECAM + 0x2c), [0xf4, 0x1a, 0x44, 0]);
    let parts = [(0x40, 16, 1, 0, 0x3c), (0x50, 16, 3, 0x1000, 1), (0x60, 16, 4, 0x2000, 0x1000)];
    for (at, len, kind, offset, size) in [&parts[..], &[(0x70, 20, 2, 0x3000, 4)]].concat() {
        assert_eq!(guest.load::<1>(ECAM + at), [9]);
        assert_eq!(guest.load(ECAM + at + 2), [len, kind, 0, 0, 0, 0]);
        assert_eq!(
            guest.load::<8>(ECAM + at + 8),
            [u32::to_le_bytes(offset), u32::to_le_bytes(size)].concat()[..]
        );
    }
    assert_eq!(guest.load(ECAM + 0x80), 4_u32.to_le_bytes());
    assert_eq!(guest.load(ACCESS_AT), [9, MSIX_AT.to_le_bytes()[0], 20, 5]);
    assert_eq!(guest.load(MSIX_AT), [0x11, 0, 1, 0, 0, 0x40, 0, 0]);
    assert_eq!(guest.load(MSIX_AT + 8), [0, 0x50, 0, 0]);
    // One queue of 64, and none behind it.
    assert_eq!((guest.word(register::NUM_QUEUES), guest.word(register::QUEUE_SIZE)), (1, 64));
    for queue in [1, 2, 0x8000, 0xffff] {
        guest.set_word(register::QUEUE_SELECT, queue);
        assert_eq!(guest.load(BAR_AT + register::QUEUE_SIZE), [0; 8]);
        guest.store(BAR_AT + register::QUEUE_DESC, &[0xff; 8]);
        guest.set_word(register::QUEUE_ENABLE, 1);
        guest.set_word(register::QUEUE_RESET, 1);
        assert_eq!(guest.load(BAR_AT + register::QUEUE_SIZE), [0; 8]);
    }
}

#[test]
fn vectors_that_there_are_not_cannot_be_mapped() {
    let guest = Guest::new();
    for register in [register::CONFIG_VECTOR, register::QUEUE_VECTOR] {
        assert_eq!(guest.word(register), NO_VECTOR);
        for (vector, expected) in [
            (0, 0),
            (1, 1),
            (2, NO_VECTOR),
            (1, 1),
            (2047, NO_VECTOR),
            (0x8000, NO_VECTOR),
            (0, 0),
            (0xffff, 0xffff),
        ] {
            guest.set_word(register, vector);
            assert_eq!(guest.word(register), expected);
        }
        guest.set_word(register, 1);
    }
    guest.status(0);
    assert_eq!(
        (guest.word(register::CONFIG_VECTOR), guest.word(register::QUEUE_VECTOR)),
        (NO_VECTOR, NO_VECTOR)
    );
}

#[test]
fn a_device_interrupts_by_message_or_by_pin() {
    let guest = Guest::new();
    guest.messages_on();
    guest.start(1);
    assert_eq!(guest.ask(BAR_AT + NOTIFY), 1);
    // The interrupt status is for pins alone.
    assert_eq!((guest.messages(), guest.level(), guest.load::<1>(BAR_AT + ISR.start)), (vec![0x41], 0, [0]));
    // Without a vector there is no interrupt, and none that waits.
    guest.set_word(register::QUEUE_VECTOR, NO_VECTOR);
    assert_eq!((guest.ask(BAR_AT + NOTIFY), guest.messages(), guest.level()), (2, vec![], 0));
    // A ring that is not: the device says so by the vector of the configuration.
    guest.set_word(register::CONFIG_VECTOR, 0);
    let generation = guest.load::<1>(BAR_AT + register::CONFIG_GENERATION)[0];
    guest.memory.store(GuestAddress(0x2002), &0x4000_u16).unwrap();
    guest.store(BAR_AT + NOTIFY, &[0, 0]);
    assert_eq!(guest.messages(), [0x40]);
    assert_eq!(guest.load(BAR_AT + register::STATUS), [15 | 64, generation + 1]);

    // The pin: high until the status is read.
    guest.store(MSIX_AT + 2, &[1, 0]);
    guest.start(NO_VECTOR);
    assert_eq!((guest.ask(BAR_AT + NOTIFY), guest.level()), (1, 1));
    assert_eq!(guest.load::<1>(ECAM + 6)[0] & 8, 8);
    assert_eq!((guest.load::<1>(BAR_AT + ISR.start), guest.level()), ([1], 0));
    assert_eq!((guest.load::<4>(BAR_AT + ISR.start), guest.messages()), ([0; 4], vec![]));
    // A reset lowers it too.
    assert_eq!((guest.ask(BAR_AT + NOTIFY), guest.level()), (2, 1));
    guest.status(0);
    assert_eq!((guest.level(), guest.load::<1>(BAR_AT + ISR.start)), (0, [0]));
}

#[test]
fn a_function_that_is_no_bus_master_leaves_memory_alone() {
    let guest = Guest::new();
    guest.messages_on();
    guest.store(ECAM + 4, &[2, 0]);
    guest.start(1);
    assert_eq!((guest.ask(BAR_AT + NOTIFY), guest.ask(BAR_AT + NOTIFY)), (0, 0));
    // What was asked for meanwhile is served when it may be.
    guest.store(ECAM + 4, &[6, 0]);
    assert_eq!(
        (guest.memory.load::<u16>(GuestAddress(0x3002)).unwrap(), guest.messages()),
        (2, vec![0x41; 2])
    );
    guest.store(ECAM + 4, &[2, 0]);
    assert_eq!(guest.ask(BAR_AT + NOTIFY), 2);
    // A reset does not change it.
    guest.start(1);
    assert_eq!((guest.ask(BAR_AT + NOTIFY), guest.messages()), (0, vec![]));
    guest.store(ECAM + 4, &[6, 0]);
    assert_eq!(guest.memory.load::<u16>(GuestAddress(0x3002)).unwrap(), 1);
}

#[test]
fn a_queue_is_reset_alone_and_set_up_again() {
    let guest = Guest::new();
    guest.messages_on();
    guest.start(1);
    assert_eq!(guest.ask(BAR_AT + NOTIFY), 1);
    // Only 1 means something, in these two registers.
    for value in [0, 2, 0x101] {
        guest.set_word(register::QUEUE_RESET, value);
        guest.set_word(register::QUEUE_ENABLE, value);
        assert_eq!(guest.word(register::QUEUE_ENABLE), 1);
    }
    // While it is enabled nothing can be set.
    guest.set_word(register::QUEUE_SIZE, 4);
    guest.store(BAR_AT + register::QUEUE_DESC, &0x5000_u64.to_le_bytes());
    assert_eq!(guest.word(register::QUEUE_SIZE), 8);
    assert_eq!(guest.load(BAR_AT + register::QUEUE_DESC), 0x1000_u64.to_le_bytes());
    guest.set_word(register::QUEUE_RESET, 1);
    let after = [register::QUEUE_ENABLE, register::QUEUE_RESET, register::QUEUE_VECTOR, register::QUEUE_SIZE];
    assert_eq!(after.map(|register| guest.word(register)), [0, 0, NO_VECTOR, 64]);
    assert_eq!(guest.ask(BAR_AT + NOTIFY), 1);
    guest.queue(0);
    assert_eq!((guest.ask(BAR_AT + NOTIFY), guest.messages()), (1, vec![0x41, 0x40]));
}

#[test]
fn configuration_space_gives_access_to_the_bar() {
    let guest = Guest::new();
    let access = |bar: u8, offset: u32, len: u32| {
        guest.store(ACCESS_AT + 4, &[bar]);
        guest.store(ACCESS_AT + 8, &offset.to_le_bytes());
        guest.store(ACCESS_AT + 12, &len.to_le_bytes());
    };
    access(0, 0x18, 2);
    assert_eq!(guest.load(ACCESS_AT + 8), [0x18, 0, 0, 0, 2, 0, 0, 0]);
    assert_eq!(guest.load(ACCESS_AT + 16), [64, 0, 0, 0]);
    guest.store(ACCESS_AT + 16, &[16, 0, 0xff, 0xff]);
    assert_eq!(guest.word(register::QUEUE_SIZE), 16);
    // By type 1 too, in the widths of configuration space.
    access(0, 0x14, 1);
    guest.store(ACCESS_AT + 16, &[1]);
    assert_eq!((guest.load(ACCESS_AT + 16), guest.load(BAR_AT + register::STATUS)), ([1], [1]));
    access(0, 0x20, 4);
    guest.store(ACCESS_AT + 16, &[0, 0x10, 0, 0]);
    // Less than the access has, and what is no access.
    guest.store(ACCESS_AT + 16, &[9]);
    guest.store(ACCESS_AT + 17, &[9, 9]);
    for (bar, offset, len) in [
        (0, 0x21, 4),
        (0, 0x22, 4),
        (0, 0x20, 3),
        (0, 0x20, 8),
        (0, 0x20, 0),
        (0, 0x20, u32::MAX),
        (1, 0x20, 4),
        (255, 0x20, 4),
        (0, u32::MAX - 3, 4),
        // MSI-X has no part in it.
        (0, 0x4000, 4),
    ] {
        access(bar, offset, len);
        guest.store(ACCESS_AT + 16, &[0xee; 4]);
        assert_eq!(guest.load(ACCESS_AT + 16), [0; 4], "{bar} {offset:#x} {len}");
    }
    assert_eq!(guest.load(BAR_AT + register::QUEUE_DESC), 0x1000_u64.to_le_bytes());
    assert_eq!(guest.load(BAR_AT + 0x4000), [0; 4]);
}

#[test]
fn accesses_of_other_widths_are_nothing() {
    let guest = Guest::new();
    guest.status(3);
    for offset in 0..COMMON_LEN as u64 + 8 {
        let before = guest.load::<{ COMMON_LEN }>(BAR_AT);
        for len in [1, 2, 3, 4, 5, 8] {
            let natural = matches!((offset, len), (0x14, 1) | (0x10 | 0x16 | 0x18 | 0x1a | 0x1c | 0x3a, 2));
            let natural = natural || matches!((offset, len), (0 | 8 | 0xc | 0x20..=0x34, 4 | 8));
            if !natural {
                guest.store(BAR_AT + offset, &[0xa5; 8][..len]);
                assert_eq!(guest.load::<{ COMMON_LEN }>(BAR_AT), before, "{offset:#x} {len}");
            }
        }
    }
    // Reads of any width are parts of the same.
    let all = guest.load::<{ COMMON_LEN }>(BAR_AT);
    assert_eq!(guest.load::<8>(BAR_AT + 0x13), all[0x13..0x1b]);
    assert_eq!(guest.load(BAR_AT + COMMON_LEN as u64 - 2), [all[0x3a], all[0x3b], 0, 0]);
}

#[test]
fn a_device_works_on_where_its_bar_is_moved_to_and_in_a_snapshot() {
    let guest = Guest::new();
    guest.messages_on();
    guest.start(1);
    assert_eq!(guest.ask(BAR_AT + NOTIFY), 1);
    let moved = 0xc800_0000;
    guest.store(ECAM + 0x10, &0xc800_0000_u32.to_le_bytes());
    assert_eq!(guest.ask(moved + NOTIFY), 2);
    assert!(!guest.mmio.reader().write(BAR_AT + NOTIFY, &[0, 0]));

    let state = guest.bus.type1().0.lock().unwrap().save().unwrap();
    let mut other = Guest::new();
    let mut bytes = vec![0; 0x1_0000];
    guest.memory.read(GuestAddress(0), &mut bytes).unwrap();
    other.memory.write(GuestAddress(0), &bytes).unwrap();
    other.bus.type1().0.lock().unwrap().restore(&state).unwrap();
    assert_eq!(other.ask(moved + NOTIFY), 3);
    assert_eq!(other.messages(), [0x41]);
    other = Guest::new();
    // Half of a state, and one that another device type has.
    for len in 0..state.len() {
        assert!(other.bus.type1().0.lock().unwrap().restore(&state[..len]).is_err());
    }
}
