//! A driver of a PCI bus made of fuzzing input: configuration space by both ways, BARs wherever they go, MSI-X.

use std::sync::{Arc, Mutex};

use vmcore::memory::GpaRange;
use vmcore::{Bus, GuestAddress, GuestMemory, IrqSink, MemoryRegion, Msi, Platform, Result};
use vmdevices::Rng;
use vmdevices::pci::PciBus;
use vmdevices::virtio::{Threading, VirtioPci};

use super::STEP;

const WINDOW: GpaRange = GpaRange { base: 0xc000_0000, len: 0x1000_0000 };
const ECAM: u64 = 0xe000_0000;
/// What is not for BARs: interrupt controllers and firmware.
const PLATFORM: std::ops::Range<u64> = 0xfec0_0000..1 << 32;
/// Memory: from 0, and in the window.
const MEMORY: [u64; 2] = [0, 0xc800_0000];
const LEN: u64 = 0x1_0000;
/// Of the command and status registers (PCI 6.2.3).
const INTERRUPT_STATUS: u32 = 1 << 19;

/// Counts what comes out.
#[derive(Default)]
struct Sink(Mutex<usize>);

impl IrqSink for Sink {
    fn set_irq(&self, gsi: u32, _: bool) -> Result<()> {
        assert!([5, 10, 11].contains(&gsi));
        Ok(())
    }
    fn send_msi(&self, _: Msi) -> Result<()> {
        *self.0.lock().expect("no panic before") += 1;
        Ok(())
    }
}

/// Two entropy sources on a bus, and their guest.
struct Guest {
    ports: Bus,
    mmio: Bus,
    memory: GuestMemory,
    bus: PciBus,
    sink: Arc<Sink>,
}

impl Guest {
    fn new() -> Self {
        let (ports, mmio, memory) = (Bus::new("port range"), Bus::new("MMIO window"), GuestMemory::new());
        for base in MEMORY {
            let region = MemoryRegion::anonymous(GuestAddress(base), LEN).expect("memory");
            memory.insert(region.into()).expect("no overlap");
        }
        let sink = Arc::new(Sink::default());
        let platform = Platform::new(memory.clone(), &mmio, sink.clone());
        let bus = PciBus::new(platform.clone(), &[WINDOW], [10, 11, 5, 10]).expect("a bus");
        let (address, data) = bus.type1();
        ports.insert(0xcf8, 1, address).expect("a free port");
        ports.insert(0xcfc, 4, data).expect("free ports");
        mmio.insert(ECAM, 1 << 20, bus.ecam()).expect("a free window");
        for name in ["first", "second"] {
            let device = VirtioPci::new(name, Rng::new(), &platform, Threading::Vcpu).expect("events");
            bus.add(None, Box::new(device)).expect("a free slot");
        }
        Self { ports, mmio, memory, bus, sink }
    }

    fn config(&self, slot: u64, offset: u64) -> u32 {
        let mut data = [0; 4];
        assert!(self.mmio.reader().read(ECAM + (slot << 15) + offset, &mut data));
        u32::from_le_bytes(data)
    }

    /// Where the BAR of the function in `slot` is programmed to be.
    fn bar(&self, slot: u64) -> u64 {
        u64::from(self.config(slot, 0x14)) << 32 | u64::from(self.config(slot, 0x10) & !15)
    }

    fn step(&self, step: [u8; STEP]) {
        let [what, a, b, c, value @ ..] = step;
        let (slot, offset) = (u64::from(a % 4), u64::from(u16::from_le_bytes([b, c])));
        let both = [value, value].concat();
        let mut wide = [0; 8];
        let (len, into) = (1 << (a >> 2 & 3), &mut wide);
        match what % 10 {
            0 => drop(self.mmio.reader().write(ECAM + (slot << 15) + offset % 0x110, &both[..len])),
            1 => drop(self.mmio.reader().read(ECAM + (slot << 15) + offset % 0x110, &mut into[..len])),
            2 => drop(self.ports.reader().write(0xcf8, &value)),
            3 => drop(self.ports.reader().write(0xcfc + offset % 4, &both[..len.min(4)])),
            4 => drop(self.ports.reader().read(0xcfc + offset % 4, &mut into[..len.min(4)])),
            5 => {
                let at = self.bar(slot.max(1)).saturating_add(offset % 0x5100);
                self.mmio.reader().write(at, &both[..len]);
            }
            6 => {
                let at = self.bar(slot.max(1)).saturating_add(offset % 0x5100);
                self.mmio.reader().read(at, &mut into[..len]);
            }
            7 => drop(self.memory.write(GuestAddress(offset), &value)),
            8 => self.start(slot.max(1)),
            _ => self.snapshot(),
        }
    }

    /// Brings the device in `slot` to where it works, if its BAR answers, and has it give random numbers.
    fn start(&self, slot: u64) {
        let bar = self.bar(slot);
        let write = |at: u64, data: &[u8]| {
            self.mmio.reader().write(bar.saturating_add(at), data);
        };
        for status in [0, 1, 3] {
            write(0x14, &[status]);
        }
        write(0x08, &[1, 0, 0, 0]);
        write(0x0c, &[1, 1, 0, 0]);
        write(0x14, &[11]);
        write(0x16, &[0, 0]);
        write(0x18, &[8, 0]);
        write(0x1a, &[1, 0]);
        for (at, value) in [(0x20, 0x1000_u64), (0x28, 0x2000), (0x30, 0x3000)] {
            write(at, &value.to_le_bytes());
        }
        write(0x1c, &[1, 0]);
        write(0x14, &[15]);
        let descriptor =
            [&0x4000_u64.to_le_bytes()[..], &16_u32.to_le_bytes(), &2_u32.to_le_bytes()].concat();
        self.memory.write(GuestAddress(0x1000), &descriptor).expect("memory");
        let available: u16 = self.memory.load(GuestAddress(0x2002)).expect("memory");
        self.memory.store(GuestAddress(0x2002), &available.wrapping_add(1)).expect("memory");
        write(0x3000, &[0, 0]);
    }

    /// A snapshot goes on as it was, or is refused. A request that the driver has not notified of may be served
    /// by then, so that an interrupt is wanted: the only thing that may come.
    fn snapshot(&self) {
        let (host, _) = self.bus.type1();
        let mut host = host.lock().expect("no panic before");
        let state = host.save().expect("nothing is in flight");
        let mut before: Vec<u32> = (0..64).map(|register| self.config(1, 4 * register)).collect();
        if host.restore(&state).is_ok() {
            let after: Vec<u32> = (0..64).map(|register| self.config(1, 4 * register)).collect();
            before[1] |= after[1] & INTERRUPT_STATUS;
            assert_eq!(before, after);
        }
    }
}

/// Does what `input` says; gives the number of messages.
pub fn pci(input: &[u8]) -> usize {
    let guest = Guest::new();
    for step in input.chunks_exact(STEP) {
        guest.step(step.try_into().expect("a step"));
    }
    for slot in [1, 2] {
        assert_eq!(guest.config(slot, 0), 0x1044_1af4);
    }
    assert_eq!(guest.config(0, 0), 0x0008_1b36);
    for (base, _) in guest.mmio.devices() {
        let elsewhere = MEMORY.iter().all(|memory| !(*memory..memory + LEN).contains(&base));
        assert!(base >= 0x10_0000 && !PLATFORM.contains(&base) && elsewhere, "a device at {base:#x}");
    }
    *guest.sink.0.lock().expect("no panic before")
}
