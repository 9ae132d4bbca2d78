//! A virtio-mmio device that writes down what its driver does.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use vmcore::boot::acpi::{AcpiDevice, AcpiHid, AcpiResource};
use vmcore::{BusDevice, GuestAddress, GuestMemory, Machine, Result};
use vmdevices::virtio::{Interrupt, Threading, VirtioDevice, VirtioMmio};

/// A piece of a chain as it was when the chain was offered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    pub len: u32,
    /// What the device reads; `None` where it writes.
    pub content: Option<Vec<u8>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    pub queue: u16,
    pub indirect: bool,
    pub pieces: Vec<Piece>,
}

#[derive(Clone, Debug)]
pub enum Event {
    /// What comes now belongs to this part of the recording.
    Part(&'static str),
    /// The driver is ready, with these features.
    Ready(u64),
    Offered(Chain),
    Notified(u16),
    /// So many chains of a queue were answered.
    Answered(u16, u16),
    /// What the host had to say was looked at, and some chain answered with it.
    Polled,
    /// The configuration was read, or written: where, and how much or what.
    Read(u16, usize),
    Write(u16, Vec<u8>),
}

/// The recording of one device.
#[derive(Clone, Default)]
pub struct Log(Arc<Mutex<Vec<Event>>>);

impl Log {
    pub fn part(&self, name: &'static str) {
        self.push(Event::Part(name));
    }

    pub fn events(&self) -> Vec<Event> {
        self.0.lock().unwrap().clone()
    }

    fn push(&self, event: Event) {
        self.0.lock().unwrap().push(event);
    }
}

/// Puts `device` on a machine and records into `log`. It is served on the vCPU's thread, so that a chain is
/// seen before it is answered; what the host has to say is looked at once in a while.
pub fn attach<D: VirtioDevice + 'static>(
    device: D,
    log: &Log,
) -> impl FnOnce(&mut Machine) -> Result<()> + Send + use<D> {
    let log = log.clone();
    move |machine: &mut Machine| {
        let (base, gsi) = (machine.mmio_window(0x1000)?, machine.allocate_gsi());
        let (memory, interrupt) = (machine.memory().clone(), Interrupt::Line(machine.irq_line(gsi)));
        let device = VirtioMmio::new("recorded", device, memory.clone(), interrupt, Threading::Vcpu)?;
        let recorder =
            Recorder { device, memory, log, features: 0, high: false, selected: 0, queues: Vec::new() };
        let recorder = Arc::new(Mutex::new(recorder));
        let polled = Arc::downgrade(&recorder);
        std::thread::spawn(move || poll(&polled));
        machine.mmio(base, 0x1000, recorder)?;
        let number = machine.described("LNRO0005");
        machine.describe(AcpiDevice {
            name: format!("VR{number:02X}"),
            hid: AcpiHid::Text("LNRO0005".into()),
            uid: number,
            resources: vec![
                AcpiResource::Memory { base: base.0, len: 0x1000 },
                AcpiResource::Irq { gsi, level: false, shared: true },
            ],
        });
        Ok(())
    }
}

fn poll(recorder: &Weak<Mutex<Recorder>>) {
    while let Some(recorder) = recorder.upgrade() {
        let mut guard = recorder.lock().unwrap_or_else(PoisonError::into_inner);
        guard.look();
        guard.device.poll();
        if guard.answered() {
            guard.log.push(Event::Polled);
        }
        drop(guard);
        drop(recorder);
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[derive(Clone, Copy, Default)]
struct Queue {
    size: u16,
    ready: bool,
    table: u64,
    available: u64,
    used: u64,
    /// How far the rings have been looked at.
    offered: u16,
    answered: u16,
}

struct Recorder {
    device: VirtioMmio,
    memory: GuestMemory,
    log: Log,
    features: u64,
    high: bool,
    selected: usize,
    queues: Vec<Queue>,
}

impl Recorder {
    /// Writes down the chains that were offered since.
    fn look(&mut self) {
        for (number, queue) in self.queues.iter_mut().enumerate().filter(|(_, queue)| queue.ready) {
            let index: u16 = self.memory.load(GuestAddress(queue.available + 2)).unwrap();
            while queue.offered != index {
                let slot = u64::from(queue.offered % queue.size);
                let head = self.memory.load(GuestAddress(queue.available + 4 + 2 * slot)).unwrap();
                let (indirect, pieces) = pieces(&self.memory, queue.table, head);
                let queue_number = u16::try_from(number).unwrap();
                self.log.push(Event::Offered(Chain { queue: queue_number, indirect, pieces }));
                queue.offered = queue.offered.wrapping_add(1);
            }
        }
    }

    /// Writes down how many chains were answered since; `true` where there are some.
    fn answered(&mut self) -> bool {
        let mut any = false;
        for (number, queue) in self.queues.iter_mut().enumerate().filter(|(_, queue)| queue.ready) {
            let index: u16 = self.memory.load(GuestAddress(queue.used + 2)).unwrap();
            if index != queue.answered {
                let count = index.wrapping_sub(queue.answered);
                self.log.push(Event::Answered(u16::try_from(number).unwrap(), count));
                (queue.answered, any) = (index, true);
            }
        }
        any
    }

    /// Learns where the queues are (virtio 1.2, table 4.1).
    fn register(&mut self, offset: u64, value: u32) {
        let wide = u64::from(value);
        match offset {
            0x20 if self.high => self.features = self.features & 0xffff_ffff | wide << 32,
            0x20 => self.features = self.features & !0xffff_ffff | wide,
            0x24 => self.high = value == 1,
            0x30 => self.selected = usize::try_from(value).unwrap(),
            0x70 if value == 0 => self.queues.clear(),
            0x70 if value & 4 != 0 => self.log.push(Event::Ready(self.features)),
            _ => {}
        }
        if self.selected >= self.queues.len() {
            self.queues.resize(self.selected + 1, Queue::default());
        }
        let queue = &mut self.queues[self.selected];
        match offset {
            0x38 => queue.size = u16::try_from(value).unwrap(),
            0x44 => queue.ready = value == 1,
            0x80 => queue.table |= wide,
            0x84 => queue.table |= wide << 32,
            0x90 => queue.available |= wide,
            0x94 => queue.available |= wide << 32,
            0xa0 => queue.used |= wide,
            0xa4 => queue.used |= wide << 32,
            _ => {}
        }
    }
}

impl BusDevice for Recorder {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if offset >= 0x100 {
            self.log.push(Event::Read(u16::try_from(offset).unwrap(), data.len()));
        }
        self.device.read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset >= 0x100 {
            self.log.push(Event::Write(u16::try_from(offset).unwrap(), data.to_vec()));
        } else {
            self.register(offset, u32::from_le_bytes(data.try_into().unwrap()));
        }
        self.look();
        if offset == 0x50 {
            self.log.push(Event::Notified(u16::from_le_bytes([data[0], data[1]])));
        }
        self.device.write(offset, data);
        self.answered();
    }
}

/// The chain at `head` of the table at `table`: whether it has a table of its own, and its pieces.
pub fn pieces(memory: &GuestMemory, table: u64, head: u16) -> (bool, Vec<Piece>) {
    let mut pieces = Vec::new();
    let (mut table, mut entry, mut indirect) = (table, head, false);
    loop {
        let mut bytes = [0; 16];
        memory.read(GuestAddress(table + 16 * u64::from(entry)), &mut bytes).unwrap();
        let at = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        let len = u32::from_le_bytes(bytes[8..12].try_into().unwrap());
        let flags = bytes[12];
        if flags & 4 != 0 {
            (table, entry, indirect) = (at, 0, true);
            continue;
        }
        let content = (flags & 2 == 0).then(|| {
            let mut content = vec![0; usize::try_from(len).unwrap()];
            memory.read(GuestAddress(at), &mut content).unwrap();
            content
        });
        pieces.push(Piece { len, content });
        if flags & 1 == 0 {
            return (indirect, pieces);
        }
        entry = u16::from_le_bytes([bytes[14], bytes[15]]);
    }
}
