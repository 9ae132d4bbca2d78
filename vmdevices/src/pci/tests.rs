//! A driver's view of the bus, with devices made for it.

use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use vmcore::memory::GpaRange;
use vmcore::{Bus, GuestAddress, GuestMemory, IrqSink, MemoryRegion, Msi, Platform, Result};

use super::*;

const LOW: GpaRange = GpaRange { base: 0xc000_0000, len: 0x1000_0000 };
const HIGH: GpaRange = GpaRange { base: 1 << 40, len: 1 << 36 };
const ECAM: u64 = 0xe000_0000;
/// Memory in the middle of the low window, as if it had been added there.
const ISLAND: GpaRange = GpaRange { base: 0xc800_0000, len: 0x10_0000 };

/// What came out of the machine.
#[derive(Default)]
struct Recorder {
    wires: Mutex<Vec<(u32, bool)>>,
    messages: Mutex<Vec<Msi>>,
}

impl IrqSink for Recorder {
    fn set_irq(&self, gsi: u32, high: bool) -> Result<()> {
        self.wires.lock().unwrap().push((gsi, high));
        Ok(())
    }
    fn send_msi(&self, msi: Msi) -> Result<()> {
        self.messages.lock().unwrap().push(msi);
        Ok(())
    }
}

/// A machine without CPU.
struct Machine {
    ports: Bus,
    mmio: Bus,
    bus: PciBus,
    recorder: Arc<Recorder>,
}

impl Machine {
    fn new() -> Self {
        let (ports, mmio) = (Bus::new("port range"), Bus::new("MMIO window"));
        let (memory, recorder) = (GuestMemory::new(), Arc::new(Recorder::default()));
        for range in [GpaRange { base: 0, len: 0x10_0000 }, ISLAND] {
            let region = MemoryRegion::anonymous(GuestAddress(range.base), range.len).unwrap();
            memory.insert(region.into()).unwrap();
        }
        let platform = Platform::new(memory, &mmio, recorder.clone());
        let bus = PciBus::new(platform, &[LOW, HIGH], [10, 11, 5, 10]).unwrap();
        let (address, data) = bus.type1();
        ports.insert(0xcf8, 1, address).unwrap();
        ports.insert(0xcfc, 4, data).unwrap();
        mmio.insert(ECAM, 1 << 20, bus.ecam()).unwrap();
        Self { ports, mmio, bus, recorder }
    }

    fn with(devices: impl IntoIterator<Item = Probe>) -> Self {
        let machine = Self::new();
        for device in devices {
            machine.bus.add(None, Box::new(device)).unwrap();
        }
        machine
    }

    fn out(&self, port: u16, data: &[u8]) {
        assert!(self.ports.reader().write(port.into(), data));
    }

    fn inp<const N: usize>(&self, port: u16) -> [u8; N] {
        let mut data = [0x77; N];
        assert!(self.ports.reader().read(port.into(), &mut data));
        data
    }

    fn store(&self, at: u64, data: &[u8]) -> bool {
        self.mmio.reader().write(at, data)
    }

    fn load<const N: usize>(&self, at: u64) -> Option<[u8; N]> {
        let mut data = [0x77; N];
        self.mmio.reader().read(at, &mut data).then_some(data)
    }

    fn config<const N: usize>(&self, slot: u8, offset: u64) -> [u8; N] {
        self.load(ECAM + (u64::from(slot) << 15) + offset).unwrap()
    }

    fn config32(&self, slot: u8, offset: u64) -> u32 {
        u32::from_le_bytes(self.config(slot, offset))
    }

    fn set_config(&self, slot: u8, offset: u64, data: &[u8]) {
        assert!(self.store(ECAM + (u64::from(slot) << 15) + offset, data));
    }

    fn set_config32(&self, slot: u8, offset: u64, value: u32) {
        self.set_config(slot, offset, &value.to_le_bytes());
    }

    fn command(&self, slot: u8, value: u16) {
        self.set_config(slot, 4, &value.to_le_bytes());
    }

    /// Address of the BAR at `offset` of 64 bits.
    fn bar64(&self, slot: u8, offset: u64) -> u64 {
        u64::from(self.config32(slot, offset + 4)) << 32 | u64::from(self.config32(slot, offset) & !15)
    }

    fn messages(&self) -> Vec<u32> {
        std::mem::take(&mut *self.recorder.messages.lock().unwrap()).iter().map(|msi| msi.data).collect()
    }

    fn wires(&self) -> Vec<(u32, bool)> {
        std::mem::take(&mut *self.recorder.wires.lock().unwrap())
    }
}

/// What a device was told.
#[derive(Default)]
struct Log {
    interrupts: Option<Interrupts>,
    mapped: Vec<(u8, Option<u64>)>,
    writes: Vec<(u8, u64, Vec<u8>)>,
}

/// A device with a BAR of each kind, a capability with a register in it, and MSI-X in BAR 2.
#[derive(Clone, Default)]
struct Probe {
    log: Arc<Mutex<Log>>,
    register: u8,
    state: u8,
}

const VECTORS: u16 = 70;
/// Offset of MSI-X' capability: behind one of 10 bytes.
const MSIX: u64 = 0x4c;

impl Probe {
    fn interrupts(&self) -> Interrupts {
        self.log.lock().unwrap().interrupts.clone().unwrap()
    }
}

impl PciDevice for Probe {
    fn describe(&self) -> Description {
        let identity = Identity {
            vendor: 0x1234,
            device: 0x5678,
            revision: 9,
            class: 0x0c_0330,
            subsystem_vendor: 0xabcd,
            subsystem: 0xef01,
        };
        let prefetchable = Bar { prefetchable: true, ..Bar::memory64(4, 1 << 30) };
        Description {
            identity,
            bars: vec![Bar::memory32(0, 0x1000), Bar::memory64(2, 0x4000), prefetchable],
            capabilities: vec![Capability { id: 9, body: vec![10, 1, 2, 3, 4, 5, 6, 7] }],
            msix: Some(MsixTable { vectors: VECTORS, bar: 2, table: 0x1000, pending: 0x2000 }),
            pin: true,
        }
    }
    fn connect(&mut self, interrupts: Interrupts) {
        self.log.lock().unwrap().interrupts = Some(interrupts);
    }
    fn read(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill((0x10 * bar).wrapping_add(offset.to_le_bytes()[0]));
    }
    fn write(&mut self, bar: u8, offset: u64, data: &[u8]) {
        self.log.lock().unwrap().writes.push((bar, offset, data.to_vec()));
        self.state = data[0];
    }
    fn read_capability(&mut self, index: usize, offset: usize, data: &mut [u8]) {
        assert_eq!(index, 0);
        if let Some(byte) = 9usize.checked_sub(offset).and_then(|at| data.get_mut(at)) {
            *byte = self.register;
        }
    }
    fn write_capability(&mut self, index: usize, offset: usize, data: &[u8]) {
        assert_eq!(index, 0);
        if let Some(byte) = 9usize.checked_sub(offset).and_then(|at| data.get(at)) {
            self.register = *byte;
        }
    }
    fn mapped(&mut self, bar: u8, at: Option<GuestAddress>) {
        self.log.lock().unwrap().mapped.push((bar, at.map(|at| at.0)));
    }
    fn save(&self) -> Result<Vec<u8>> {
        Ok(vec![self.state, self.register])
    }
    fn restore(&mut self, state: &[u8]) -> Result<()> {
        (self.state, self.register) = (state[0], state[1]);
        Ok(())
    }
}

#[test]
fn type_1_reaches_every_lane_of_every_register() {
    let machine = Machine::with([Probe::default()]);
    let all: Vec<u8> = (0..256).map(|offset| machine.config::<1>(1, offset)[0]).collect();
    assert_eq!(all[..4], [0x34, 0x12, 0x78, 0x56]);
    assert_eq!((all[0x8], &all[0x9..0xc]), (9, &[0x30, 0x03, 0x0c][..]));
    assert_eq!(all[0x2c..0x30], [0xcd, 0xab, 0x01, 0xef]);
    for register in (0..256usize).step_by(4) {
        let address = 0x8000_0000 | 1 << 11 | u32::try_from(register).unwrap();
        machine.out(0xcf8, &address.to_le_bytes());
        assert_eq!(machine.inp(0xcf8), address.to_le_bytes());
        assert_eq!(machine.inp::<4>(0xcfc), all[register..register + 4]);
        for lane in 0..4u16 {
            let at = register + usize::from(lane);
            assert_eq!(machine.inp::<1>(0xcfc + lane), all[at..=at]);
            if lane < 3 {
                assert_eq!(machine.inp::<2>(0xcfc + lane), all[at..at + 2]);
            }
        }
        // What crosses the register's end is not there.
        assert_eq!(machine.inp::<2>(0xcff), [all[register + 3], 0xff]);
    }
    // Each lane is written alone: the interrupt line, in the lowest.
    machine.out(0xcf8, &(0x8000_0800_u32 | 0x3c).to_le_bytes());
    let pin = all[0x3d];
    machine.out(0xcfc, &[0x42]);
    assert_eq!(machine.inp::<4>(0xcfc), [0x42, pin, 0, 0]);
    machine.out(0xcfd, &[0x43, 0x44, 0x45, 0x46]);
    assert_eq!(machine.inp::<4>(0xcfc), [0x42, pin, 0, 0]);
    machine.out(0xcfc, &[0x50, 0x51]);
    assert_eq!(machine.inp::<4>(0xcfc), [0x50, pin, 0, 0]);
}

#[test]
fn config_address_is_a_double_word_and_selects_one_bus() {
    let machine = Machine::with([Probe::default()]);
    let address = 0x8000_0800_u32.to_le_bytes();
    machine.out(0xcf8, &address);
    // As Linux probes for type 1; a byte there is not the register's.
    machine.out(0xcf8, &[1]);
    machine.out(0xcf8, &[1, 2]);
    assert_eq!((machine.inp(0xcf8), machine.inp(0xcf8)), (address, [0xff; 2]));
    // Reserved bits stay zero.
    machine.out(0xcf8, &[0xff; 4]);
    assert_eq!(machine.inp(0xcf8), 0x80ff_fffc_u32.to_le_bytes());
    // Not enabled, another bus, an empty slot, a function that there is not.
    for nothing in [0x0000_0800, 0x8001_0800, 0x80ff_0800, 0x8000_f800, 0x8000_0900_u32] {
        machine.out(0xcf8, &nothing.to_le_bytes());
        machine.out(0xcfc, &[0; 4]);
        assert_eq!(machine.inp(0xcfc), [0xff; 4], "{nothing:#x}");
    }
    // The bridge, which is in a slot of its own.
    assert_eq!(machine.config32(0, 0), 0x0008_1b36);
    assert_eq!(machine.config::<4>(0, 8), [0, 0, 0, 6]);
}

#[test]
fn ecam_has_4096_bytes_a_function_of_which_256_are_used() {
    let machine = Machine::with([Probe::default()]);
    assert_eq!(machine.config(1, 0x100), [0; 4]);
    assert_eq!(machine.config(1, 0xffc), [0; 4]);
    // Over the end of the used part, and of the function.
    assert_eq!(machine.config(1, 0xfc), [0; 8]);
    assert_eq!(machine.config(1, 0xffe), [0, 0, 0xff, 0xff]);
    assert_eq!(machine.config(2, 0), [0xff; 4]);
    assert_eq!(machine.load(ECAM + (1 << 20) - 4), Some([0xff; 4]));
    machine.set_config(1, 0xfff, &[1, 2, 3, 4]);
    machine.set_config(1, 0x1000 - 4, &[0xff; 8]);
}

#[test]
fn bars_are_sized_and_moved() {
    let probe = Probe::default();
    let machine = Machine::with([probe.clone()]);
    // As firmware leaves them: programmed and decoding.
    assert_eq!(machine.config::<2>(1, 4), [2, 0]);
    let (narrow, wide, large) =
        (u64::from(machine.config32(1, 0x10)), machine.bar64(1, 0x18), machine.bar64(1, 0x20));
    assert!(LOW.base <= narrow && narrow.is_multiple_of(0x1000) && wide < 1 << 32);
    // A gigabyte does not fit below.
    assert!(HIGH.base <= large && large.is_multiple_of(1 << 30));
    assert_eq!(machine.config32(1, 0x20) & 15, 0b1100);
    assert_eq!(machine.load(narrow + 5), Some([5]));
    assert_eq!(machine.load(wide + 7), Some([0x27; 2]));
    assert_eq!(machine.load(large + (1 << 30) - 1), Some([0x3f]), "the last byte");

    // Sized as guests do it, with decoding off and on.
    for command in [0, 2] {
        machine.command(1, command);
        for (offset, size, flags) in [
            (0x10, 0xffff_f000, 0),
            (0x18, 0xffff_c000, 4),
            (0x1c, !0, 0),
            (0x20, 0xc000_0000, 12),
            (0x24, !0, 0),
        ] {
            let before = machine.config32(1, offset);
            machine.set_config32(1, offset, u32::MAX);
            assert_eq!(machine.config32(1, offset), size | flags, "{offset:#x}");
            machine.set_config32(1, offset, before);
            assert_eq!(machine.config32(1, offset), before);
        }
        // There are no others, and no ROM.
        for offset in [0x14, 0x30] {
            machine.set_config32(1, offset, u32::MAX);
            assert_eq!(machine.config32(1, offset), 0);
        }
        assert_eq!(machine.load::<1>(narrow).is_some(), command & 2 != 0);
    }

    // Moved: within the window, and above 4 GiB by halves.
    machine.set_config32(1, 0x10, 0xc123_4567);
    assert_eq!(machine.config32(1, 0x10), 0xc123_4000);
    assert_eq!((machine.load::<1>(narrow), machine.load(0xc123_4001)), (None, Some([1])));
    machine.set_config32(1, 0x1c, 0x101);
    machine.set_config32(1, 0x18, 0x2000_0000);
    assert_eq!((machine.load::<1>(wide), machine.load(0x101_2000_0003)), (None, Some([0x23])));
    let mapped = &probe.log.lock().unwrap().mapped;
    assert_eq!(mapped[..3], [(0, Some(narrow)), (2, Some(wide)), (4, Some(large))]);
    assert_eq!(mapped.last(), Some(&(2, Some(0x101_2000_0000))));
}

#[test]
fn a_bar_over_something_else_is_silent_until_it_moves() {
    let machine = Machine::with([Probe::default(), Probe::default()]);
    let (home, other) = (machine.config32(1, 0x10), u64::from(machine.config32(2, 0x10)));
    let set = |value: u32| machine.set_config32(1, 0x10, value);
    for (what, at) in [
        ("memory", 0x1_0000),
        ("the end of memory", 0xf_f000),
        ("nothing", 0),
        ("video memory", 0xa_0000),
        ("the end of the first mebibyte", 0xf_f000),
        ("memory in the window", 0xc800_0000),
        ("the end of memory in the window", 0xc80f_f000),
        ("ECAM", 0xe000_0000),
        ("its own configuration space", 0xe000_8000),
        ("the I/O APIC", 0xfec0_0000),
        ("the local APICs", 0xfee0_0000),
        ("firmware", 0xffff_0000),
        ("the top", 0xffff_f000),
        ("another's BAR", u32::try_from(other).unwrap()),
    ] {
        let before = machine.load::<1>(at.into());
        set(at);
        assert_eq!(machine.config32(1, 0x10), at, "{what}");
        if u64::from(at) != other && before.is_none() {
            assert_eq!(machine.load::<1>(at.into()), None, "{what}");
        }
        assert_eq!(machine.config32(1, 0), 0x5678_1234, "{what}");
    }
    // Whoever was there first stays, and the other comes when there is room.
    assert_eq!(machine.load(other), Some([0]));
    assert!(machine.store(other, &[1]));
    machine.set_config32(2, 0x10, 0xc700_0000);
    assert!(machine.load::<1>(0xc700_0000).is_some() && machine.load::<1>(other).is_some());
    set(home);
    assert_eq!((machine.load::<1>(other), machine.load(home.into())), (None, Some([0])));

    // Its own BARs over each other, and back.
    let wide = machine.config32(1, 0x18);
    machine.set_config32(1, 0x18, home);
    assert_eq!(machine.load(u64::from(home) + 1), Some([1]), "the first one stays");
    machine.set_config32(1, 0x18, wide);
    assert_eq!(machine.load(u64::from(wide & !15) + 1), Some([0x21]));
    // Outside of the windows, where guests without ACPI put them; up to the last address but one BAR.
    for (high, low, there) in
        [(0, 0xd000_0000, true), (1, 0, true), (0x8000_0000, 0, true), (!0, !0 << 14, false)]
    {
        machine.set_config32(1, 0x1c, high);
        machine.set_config32(1, 0x18, low);
        let at = u64::from(high) << 32 | u64::from(low);
        assert_eq!(machine.load::<1>(at).is_some(), there, "{at:#x}");
    }
}

#[test]
fn two_bars_change_places() {
    let machine = Machine::with([Probe::default(), Probe::default()]);
    let (first, second) = (machine.config32(1, 0x10), machine.config32(2, 0x10));
    machine.set_config32(1, 0x10, second);
    machine.set_config32(2, 0x10, first);
    // The second's move freed the place that the first one waited for.
    machine.store(second.into(), &[0x11]);
    machine.store(first.into(), &[0x22]);
    assert!(machine.load::<1>(first.into()).is_some() && machine.load::<1>(second.into()).is_some());
    machine.command(1, 0);
    assert!(machine.load::<1>(first.into()).is_some() && machine.load::<1>(second.into()).is_none());
}

#[test]
fn capabilities_are_linked_and_only_their_registers_are_written() {
    let probe = Probe::default();
    let machine = Machine::with([probe]);
    assert_eq!(machine.config::<1>(1, 6)[0] & 0x10, 0x10);
    assert_eq!(machine.config(1, 0x34), [0x40]);
    assert_eq!(machine.config(1, 0x40), [9, 0x4c, 10, 1, 2, 3, 4, 5]);
    // MSI-X: 70 vectors, table and pending bits in BAR 2.
    assert_eq!(machine.config(1, MSIX), [0x11, 0, 69, 0, 2, 0x10, 0, 0]);
    assert_eq!(machine.config(1, MSIX + 8), [2, 0x20, 0, 0]);
    for offset in (0x34..0x100).filter(|offset| !(0x3c..0x40).contains(offset)) {
        let before = machine.config::<1>(1, offset);
        machine.set_config(1, offset, &[0xff]);
        let expected = match offset {
            0x49 => 0xff,
            0x4f => 0xc0,
            _ => before[0],
        };
        assert_eq!(machine.config(1, offset), [expected], "{offset:#x}");
    }
    // The register is reached by accesses of any width around it.
    machine.set_config(1, 0x48, &[0, 0x5a, 0, 0]);
    assert_eq!(machine.config(1, 0x46), [4, 5, 6, 0x5a]);
    // What is not a capability's is nothing's.
    assert_eq!(machine.config(1, 0x58), [0; 8]);
    // The bridge has none.
    assert_eq!((machine.config::<1>(0, 6)[0] & 0x10, machine.config(0, 0x34)), (0, [0]));
}

/// Lets a probe's MSI-X work: `vectors` are not masked, and have their number as data.
fn msix_on(machine: &Machine, slot: u8, vectors: impl IntoIterator<Item = u16>) -> u64 {
    let bar = machine.bar64(slot, 0x18);
    machine.command(slot, 6);
    machine.set_config(slot, MSIX + 2, &0x8000_u16.to_le_bytes());
    for vector in vectors {
        let entry = bar + 0x1000 + 16 * u64::from(vector);
        machine.store(entry, &0xfee0_1003_u32.to_le_bytes());
        machine.store(entry + 4, &[0; 4]);
        machine.store(entry + 8, &[u32::from(vector).to_le_bytes(), [0; 4]].concat());
    }
    bar
}

#[test]
fn messages_are_sent_masked_and_kept_pending() {
    let probe = Probe::default();
    let machine = Machine::with([probe.clone()]);
    let interrupts = probe.interrupts();
    // Off: nothing.
    interrupts.message(0);
    assert!(!interrupts.uses_messages());
    let bar = msix_on(&machine, 1, [0, 1, 65]);
    let pending = || machine.load::<8>(bar + 0x2000).map(u64::from_le_bytes).unwrap();
    let control = |value: u16| machine.set_config(1, MSIX + 2, &value.to_le_bytes());
    assert!(interrupts.uses_messages());
    assert_eq!((machine.messages(), pending()), (vec![], 0));
    for vector in [0, 1, 65, 1] {
        interrupts.message(vector);
    }
    assert_eq!(
        *machine.recorder.messages.lock().unwrap().first().unwrap(),
        Msi { address: 0xfee0_1000, data: 0 }
    );
    assert_eq!(machine.messages(), [0, 1, 65, 1]);
    // Masked alone: from the start, and later.
    interrupts.message(2);
    assert_eq!((machine.messages(), pending()), (vec![], 4));
    machine.store(bar + 0x101c, &1u32.to_le_bytes());
    interrupts.message(1);
    interrupts.message(1);
    assert_eq!((machine.messages(), pending()), (vec![], 6));
    // It comes once, with what the table says by then.
    machine.store(bar + 0x1018, &0x99_u32.to_le_bytes());
    machine.store(bar + 0x101c, &0u32.to_le_bytes());
    assert_eq!((machine.messages(), pending()), (vec![0x99], 4));
    // The function's mask.
    control(0xc000);
    for vector in [0, 65] {
        interrupts.message(vector);
    }
    assert_eq!((machine.messages(), pending()), (vec![], 5));
    assert_eq!(machine.load(bar + 0x2008), Some(2u64.to_le_bytes()));
    control(0x8000);
    assert_eq!((machine.messages(), pending()), (vec![0, 65], 4));
    // A function that is no bus master cannot write to memory.
    machine.command(1, 2);
    interrupts.message(0);
    assert_eq!((machine.messages(), pending()), (vec![], 5));
    machine.command(1, 6);
    assert_eq!((machine.messages(), pending()), (vec![0], 4));
    // Vectors that there are not, and MSI-X off.
    for vector in [VECTORS, 71, 2048, u16::MAX] {
        interrupts.message(vector);
    }
    control(0);
    interrupts.message(0);
    assert!(machine.messages().is_empty());
}

#[test]
fn the_table_takes_whole_words_and_pending_bits_take_none() {
    let probe = Probe::default();
    let machine = Machine::with([probe.clone()]);
    let bar = machine.bar64(1, 0x18);
    let entry = bar + 0x1000 + 16 * 3;
    assert_eq!(machine.load(entry), Some([0, 0, 0, 0, 0, 0, 0, 0]));
    assert_eq!(machine.load(entry + 8), Some([0, 0, 0, 0, 1, 0, 0, 0]), "masked at first");
    machine.store(entry, &[0xff; 8]);
    machine.store(entry + 8, &[0xff; 8]);
    assert_eq!(machine.load(entry), Some([0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]));
    assert_eq!(machine.load(entry + 8), Some([0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0]));
    assert_eq!(machine.load(entry + 3), Some([0xff, 0xff]));
    for (at, data) in [(0, &[0; 1][..]), (0, &[0; 2]), (2, &[0; 4]), (4, &[0; 8]), (1, &[0])] {
        machine.store(entry + at, data);
    }
    assert_eq!(machine.load(entry), Some([0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]));
    machine.store(bar + 0x2000, &[0xff; 8]);
    assert_eq!(machine.load(bar + 0x2000), Some([0; 8]));
    // Over the ends; the device sees what is beyond them.
    let end = bar + 0x1000 + 16 * u64::from(VECTORS);
    machine.store(end - 4, &[0; 8]);
    assert_eq!(machine.load(end - 4), Some([1, 0, 0, 0, 0, 0, 0, 0]));
    assert_eq!(machine.load(end), Some([0x20_u8.wrapping_add((end - bar).to_le_bytes()[0])]));
    assert_eq!(machine.load(bar + 0x2000 + 16 - 1), Some([0; 8]));
    assert!(probe.log.lock().unwrap().writes.is_empty());
    machine.store(bar + 0xff8, &[7; 8]);
    assert_eq!(probe.log.lock().unwrap().writes, [(2, 0xff8, vec![7; 8])]);
}

#[test]
fn pins_share_wires_and_obey_the_guest() {
    let probes: [Probe; 4] = Default::default();
    let machine = Machine::with(probes.clone());
    let level = |slot: usize, high| probes[slot - 1].interrupts().level(high);
    // INTA of slots 1 to 4: GSIs 11, 5, 10, 10.
    let registers: Vec<_> = (1..5).map(|slot| machine.config(slot, 0x3c)).collect();
    assert_eq!(registers, [[11, 1], [5, 1], [10, 1], [10, 1]]);
    level(3, true);
    level(4, true);
    level(3, false);
    assert_eq!(machine.wires(), [(10, true)]);
    level(4, false);
    level(1, true);
    assert_eq!(machine.wires(), [(10, false), (11, true)]);
    // Interrupt Disable hides it from the wire, and not from the status register.
    machine.command(1, 0x402);
    assert_eq!((machine.wires(), machine.config::<1>(1, 6)[0] & 8), (vec![(11, false)], 8));
    machine.command(1, 2);
    assert_eq!(machine.wires(), [(11, true)]);
    // MSI-X takes the pin's place.
    machine.set_config(1, MSIX + 2, &[0, 0x80]);
    assert_eq!(machine.wires(), [(11, false)]);
    level(1, false);
    machine.set_config(1, MSIX + 2, &[0, 0]);
    assert_eq!((machine.wires(), machine.config::<1>(1, 6)[0] & 8), (vec![], 0));
}

#[test]
fn slots_are_chosen_or_given_out_until_they_are_used_up() {
    let machine = Machine::new();
    let add = |at: Option<PciAddress>| machine.bus.add(at, Box::new(Bridge));
    struct Bridge;
    impl PciDevice for Bridge {
        fn describe(&self) -> Description {
            Description { pin: true, ..Description::default() }
        }
        fn read(&mut self, _: u8, _: u64, _: &mut [u8]) {}
        fn write(&mut self, _: u8, _: u64, _: &[u8]) {}
    }
    assert_eq!(add(Some(PciAddress::slot(2))).unwrap().to_string(), "00:02.0");
    assert_eq!((add(None).unwrap().slot, add(None).unwrap().slot), (1, 3));
    // More functions, which function 0 tells of.
    assert_eq!(machine.config(2, 0xe), [0]);
    add(Some(PciAddress { slot: 2, function: 5 })).unwrap();
    assert_eq!((machine.config(2, 0xe), machine.config(1, 0xe)), ([0x80], [0]));
    assert_eq!(machine.config(2, 0x5000 + 0xc), [0, 0, 0, 0]);
    // Its pin is INTB, of the slot's turn.
    assert_eq!(machine.config(2, 0x5000 + 0x3c), [10, 2]);
    let refused = |slot, function| {
        let error = add(Some(PciAddress { slot, function })).unwrap_err().to_string();
        assert!(error.contains(&format!("{slot}")) || error.contains("00:"), "{error}");
    };
    for (slot, function) in [(0, 0), (2, 0), (2, 5), (9, 1), (32, 0), (255, 0), (3, 8)] {
        refused(slot, function);
    }
    for _ in 4..32 {
        add(None).unwrap();
    }
    assert!(add(None).unwrap_err().to_string().contains("fewer devices"));
}

/// A device that is nothing but its description.
struct Paper(Description);

impl PciDevice for Paper {
    fn describe(&self) -> Description {
        self.0.clone()
    }
    fn read(&mut self, _: u8, _: u64, _: &mut [u8]) {}
    fn write(&mut self, _: u8, _: u64, _: &[u8]) {}
}

#[test]
fn what_no_function_can_be_is_refused() {
    let machine = Machine::new();
    let refused = |change: &dyn Fn(&mut Description)| {
        let mut description = Probe::default().describe();
        change(&mut description);
        let error = machine.bus.add(None, Box::new(Paper(description))).unwrap_err();
        assert!(matches!(error, vmcore::Error::Config { .. }), "{error}");
    };
    refused(&|d| d.identity.vendor = 0xffff);
    refused(&|d| d.identity.class = 1 << 24);
    for bar in [
        Bar::memory32(6, 0x1000),
        Bar::memory64(5, 0x1000),
        Bar::memory32(0, 0x1000),
        Bar::memory32(3, 0x1000),
        Bar::memory32(1, 0),
        Bar::memory32(1, 8),
        Bar::memory32(1, 0x1800),
        Bar::memory32(1, 1 << 32),
        // No room in the window, though it could be.
        Bar::memory32(1, 1 << 31),
    ] {
        refused(&|d| d.bars.push(bar));
    }
    refused(&|d| d.capabilities = vec![Capability { id: 9, body: vec![0; 191] }]);
    refused(&|d| d.capabilities = (0..30).map(|_| Capability { id: 9, body: vec![0; 6] }).collect());
    for msix in [
        MsixTable { vectors: 0, bar: 2, table: 0x1000, pending: 0x2000 },
        MsixTable { vectors: 2049, bar: 2, table: 0, pending: 0x2000 },
        MsixTable { vectors: 4, bar: 1, table: 0x1000, pending: 0x2000 },
        MsixTable { vectors: 4, bar: 2, table: 0x1004, pending: 0x2000 },
        MsixTable { vectors: 4, bar: 2, table: 0x3ff0, pending: 0x2000 },
        MsixTable { vectors: 4, bar: 2, table: 0x1000, pending: 0x4000 },
        MsixTable { vectors: 4, bar: 2, table: 0x1000, pending: 0x1038 },
        MsixTable { vectors: 4, bar: 2, table: u32::MAX - 7, pending: 0 },
    ] {
        refused(&|d| d.msix = Some(msix));
    }
    assert!(machine.bus.add(None, Box::new(Paper(Probe::default().describe()))).is_ok());
}

/// Saves the bus of `machine` and restores it into one of the same devices.
fn moved(machine: &Machine, probes: [Probe; 2]) -> Machine {
    let state = machine.bus.type1().0.lock().unwrap().save().unwrap();
    let other = Machine::with(probes);
    other.bus.type1().0.lock().unwrap().restore(&state).unwrap();
    assert_eq!(other.bus.type1().0.lock().unwrap().save().unwrap(), state);
    other
}

#[test]
fn a_restored_bus_goes_on_where_it_was() {
    let probes: [Probe; 2] = Default::default();
    let machine = Machine::with(probes.clone());
    let bar = msix_on(&machine, 1, [0, 1]);
    machine.set_config(1, MSIX + 2, &[0, 0xc0]);
    probes[0].interrupts().message(1);
    probes[1].interrupts().level(true);
    // The two change places, which a restore has to get over.
    let (first, second) = (machine.config32(1, 0x10), machine.config32(2, 0x10));
    machine.set_config32(1, 0x10, 0xc700_0000);
    machine.set_config32(2, 0x10, first);
    machine.set_config32(1, 0x10, second);
    machine.set_config(1, 0x49, &[0x77]);
    machine.store(u64::from(first) + 0x10, &[0xab]);
    machine.out(0xcf8, &0x8000_0810_u32.to_le_bytes());

    let fresh: [Probe; 2] = Default::default();
    let other = moved(&machine, fresh.clone());
    assert_eq!(other.inp(0xcfc), second.to_le_bytes());
    assert_eq!(other.wires(), [(5, true)]);
    assert_eq!(fresh[0].log.lock().unwrap().mapped.last(), Some(&(4, Some(machine.bar64(1, 0x20)))));
    assert!(other.load::<1>(first.into()).is_some() && other.load::<1>(second.into()).is_some());
    assert_eq!(other.load(bar + 0x2000), Some(2u64.to_le_bytes()));
    assert!(other.messages().is_empty());
    other.set_config(1, MSIX + 2, &[0, 0x80]);
    assert_eq!(other.messages(), [1]);

    // Into another machine, and of nonsense.
    let state = machine.bus.type1().0.lock().unwrap().save().unwrap();
    for unlike in [Machine::new(), Machine::with([Probe::default(), Probe::default(), Probe::default()])] {
        assert!(unlike.bus.type1().0.lock().unwrap().restore(&state).is_err());
    }
    let unlike = Machine::with([Probe::default()]);
    let mut description = Probe::default().describe();
    description.identity.revision = 1;
    unlike.bus.add(None, Box::new(Paper(description))).unwrap();
    assert!(unlike.bus.type1().0.lock().unwrap().restore(&state).is_err());
    for len in 0..state.len() {
        assert!(other.bus.type1().0.lock().unwrap().restore(&state[..len]).is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    /// Whatever is written to configuration space and BARs: memory stays memory, interrupt controllers
    /// interrupt controllers, and the state can be moved.
    #[test]
    fn hostile_writes_do_no_harm(
        steps in prop::collection::vec((0u8..3, 0u64..0x108, 0u32..4, prop_oneof![
            any::<u32>(), Just(u32::MAX), 0u32..8, (0xc000_0000u32..0xc000_8000), Just(0xc800_0000), Just(0xfee0_0000),
        ], any::<bool>()), 1..60),
    ) {
        let probes: [Probe; 2] = Default::default();
        let machine = Machine::with(probes.clone());
        for (n, (slot, offset, width, value, config)) in steps.into_iter().enumerate() {
            let data = [value.to_le_bytes(), (!value).to_le_bytes()].concat();
            let data = &data[..1 << width];
            if config {
                machine.set_config(slot, offset, data);
            } else {
                let bar = machine.bar64(slot.max(1), 0x18);
                machine.store(bar.saturating_add(0x1000 + offset), data);
                machine.load::<8>(bar.saturating_add(0x2000 + offset));
            }
            let vector = u16::try_from(value & 0x7f).unwrap();
            probes[n % 2].interrupts().message(vector);
            probes[n % 2].interrupts().level(value & 1 == 1);
        }
        for (base, _) in machine.mmio.devices() {
            prop_assert!(base >= 0x10_0000 && !(0xfec0_0000..1 << 32).contains(&base), "{base:#x}");
            prop_assert!(!(ISLAND.base..ISLAND.base + ISLAND.len).contains(&base));
        }
        prop_assert_eq!(machine.config32(1, 0), 0x5678_1234);
        let other = moved(&machine, Default::default());
        for offset in (0..256).step_by(4) {
            prop_assert_eq!(machine.config32(1, offset), other.config32(1, offset));
        }
    }
}
