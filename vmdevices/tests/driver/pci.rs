//! A virtio-pci device in the shape of virtio-mmio's registers (virtio 1.2, table 4.1), so that whatever drives
//! the one drives the other. It is found and set up by the bus code of the `virtio-drivers` crate.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use virtio_drivers::transport::pci::bus::{Command, ConfigurationAccess, DeviceFunction, PciRoot};
use virtio_drivers::transport::pci::virtio_device_type;
use vmcore::memory::GpaRange;
use vmcore::{Bus, BusDevice, GuestMemory, IrqSink, Msi, Platform, Result};
use vmdevices::pci::PciBus;
use vmdevices::virtio::{Threading, VirtioDevice, VirtioPci};

const WINDOW: GpaRange = GpaRange { base: 0xc000_0000, len: 0x1000_0000 };

/// What a message says besides "used buffers".
const CONFIG_VECTOR: u16 = 0;

/// How the device interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interrupts {
    Pin,
    Messages,
}

/// The device and its driver's view of it.
pub struct PciRegisters {
    access: Access,
    device: Arc<Mutex<VirtioPci>>,
    mmio: Bus,
    interrupts: Interrupts,
    sink: Arc<Sink>,
    /// Device type.
    kind: u32,
    /// Addresses of the parts.
    common: u64,
    notify: u64,
    multiplier: u32,
    isr: u64,
    config: u64,
    bar: u64,
}

/// Counts a message as an edge of a wire, and remembers what it was about.
struct Sink {
    to: Arc<dyn IrqSink>,
    pending: AtomicU32,
}

impl IrqSink for Sink {
    fn set_irq(&self, gsi: u32, high: bool) -> Result<()> {
        self.to.set_irq(gsi, high)
    }
    fn send_msi(&self, msi: Msi) -> Result<()> {
        assert_eq!(msi.address, 0xfee0_0000);
        self.pending.fetch_or(if msi.data == u32::from(CONFIG_VECTOR) { 2 } else { 1 }, Ordering::SeqCst);
        self.to.set_irq(5, true)?;
        self.to.set_irq(5, false)
    }
}

/// Configuration space by ports 0xCF8 and 0xCFC.
#[derive(Clone)]
struct Access(Bus);

impl Access {
    fn select(&self, function: DeviceFunction, register: u8) {
        let DeviceFunction { bus, device, function } = function;
        let number = u32::from(bus) << 16 | u32::from(device) << 11 | u32::from(function) << 8;
        assert!(self.0.reader().write(0xcf8, &(1 << 31 | number | u32::from(register & !3)).to_le_bytes()));
    }
}

impl ConfigurationAccess for Access {
    fn read_word(&self, function: DeviceFunction, register: u8) -> u32 {
        self.select(function, register);
        let mut data = [0; 4];
        assert!(self.0.reader().read(0xcfc, &mut data));
        u32::from_le_bytes(data)
    }
    fn write_word(&mut self, function: DeviceFunction, register: u8, data: u32) {
        self.select(function, register);
        assert!(self.0.reader().write(0xcfc, &data.to_le_bytes()));
    }
    #[expect(unsafe_code, reason = "the trait says so; it does nothing of the kind")]
    unsafe fn unsafe_clone(&self) -> Self {
        self.clone()
    }
}

impl PciRegisters {
    /// `device` on a bus of its own. It interrupts by edges of a wire of `sink`.
    pub fn new(
        device: impl VirtioDevice + 'static,
        memory: GuestMemory,
        sink: Arc<dyn IrqSink>,
        threading: Threading,
        interrupts: Interrupts,
    ) -> Self {
        let (ports, mmio) = (Bus::new("port range"), Bus::new("MMIO window"));
        let sink = Arc::new(Sink { to: sink, pending: AtomicU32::new(0) });
        let platform = Platform::new(memory, &mmio, sink.clone());
        let bus = PciBus::new(platform.clone(), &[WINDOW], [5; 4]).unwrap();
        let (address, data) = bus.type1();
        ports.insert(0xcf8, 1, address).unwrap();
        ports.insert(0xcfc, 4, data).unwrap();
        let device = Arc::new(Mutex::new(VirtioPci::new("test", device, &platform, threading).unwrap()));
        bus.add(None, Box::new(device.clone())).unwrap();

        let mut root = PciRoot::new(Access(ports.clone()));
        let mut found = root.enumerate_bus(0).filter(|(_, info)| virtio_device_type(info).is_some());
        let (function, info) = found.next().unwrap();
        assert!(found.next().is_none() && info.revision >= 1);
        let (bar, len) = root.bar_info(function, 0).unwrap().unwrap().memory_address_size().unwrap();
        assert!(bar >= WINDOW.base && bar.is_multiple_of(len));
        root.set_command(function, Command::MEMORY_SPACE | Command::BUS_MASTER);

        let mut access = Access(ports);
        let (mut parts, mut multiplier) = ([0; 6], 0);
        for capability in root.capabilities(function).filter(|capability| capability.id == 9) {
            let at = capability.offset;
            let kind = usize::from(capability.private_header >> 8);
            assert_eq!(access.read_word(function, at + 4) & 0xff, 0, "BAR");
            parts[kind] = bar + u64::from(access.read_word(function, at + 8));
            if kind == 2 {
                multiplier = access.read_word(function, at + 16);
            }
        }
        if interrupts == Interrupts::Messages {
            let msix = root.capabilities(function).find(|capability| capability.id == 0x11).unwrap();
            let vectors = u32::from(msix.private_header & 0x7ff) + 1;
            let table = bar + u64::from(access.read_word(function, msix.offset + 4) & !7);
            for vector in 0..vectors {
                let at = table + 16 * u64::from(vector);
                for (offset, value) in [(0, 0xfee0_0000), (4, 0), (8, vector), (12, 0)] {
                    assert!(mmio.reader().write(at + offset, &u32::to_le_bytes(value)));
                }
            }
            access.write_word(function, msix.offset, 1 << 31);
        }
        let [_, common, notify, isr, config, _] = parts;
        let kind = u32::from(info.device_id - 0x1040);
        Self { access, device, mmio, interrupts, sink, kind, common, notify, multiplier, isr, config, bar }
    }

    /// Has a device without thread look at its host descriptors.
    pub fn poll(&self) {
        self.device.lock().unwrap().poll();
    }

    fn load<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut data = [0; N];
        assert!(self.mmio.reader().read(at, &mut data));
        data
    }

    fn store(&self, at: u64, data: &[u8]) {
        assert!(self.mmio.reader().write(at, data));
    }

    fn word(&self, offset: u64) -> u32 {
        u16::from_le_bytes(self.load(self.common + offset)).into()
    }

    fn set_word(&self, offset: u64, value: u32) {
        let value = u16::try_from(value).unwrap_or(u16::MAX);
        self.store(self.common + offset, &value.to_le_bytes());
    }

    fn register(&self, register: u64) -> u32 {
        match register {
            0x00 => 0x7472_6976,
            0x04 => 2,
            0x08 => self.kind,
            0x10 => u32::from_le_bytes(self.load(self.common + 4)),
            // No queue, or the size that was set last: the largest, after a reset.
            0x34 => self.word(0x18),
            0x44 => self.word(0x1c),
            0x60 => {
                let isr = u32::from(self.load::<1>(self.isr)[0]);
                assert!(isr == 0 || self.interrupts == Interrupts::Pin);
                self.sink.pending.fetch_or(isr, Ordering::SeqCst) | isr
            }
            0x70 => self.load::<1>(self.common + 0x14)[0].into(),
            0xfc => self.load::<1>(self.common + 0x15)[0].into(),
            _ => 0,
        }
    }

    fn set_register(&self, register: u64, value: u32) {
        match register {
            0x14 => self.store(self.common, &value.to_le_bytes()),
            0x20 => self.store(self.common + 0xc, &value.to_le_bytes()),
            0x24 => self.store(self.common + 8, &value.to_le_bytes()),
            0x30 => self.set_word(0x16, value),
            0x38 => self.set_word(0x18, u16::try_from(value).unwrap_or(0).into()),
            0x44 if value & 1 == 1 => {
                self.set_word(0x1a, self.word(0x16) + 1);
                self.set_word(0x1c, 1);
            }
            0x44 | 0xc0 => self.set_word(0x3a, 1),
            0x50 => {
                let at = self.notify + u64::from(value) * u64::from(self.multiplier);
                let value = value.to_le_bytes();
                self.mmio.reader().write(at, &value[..2]);
            }
            0x64 => {
                self.sink.pending.fetch_and(!value, Ordering::SeqCst);
            }
            0x70 => {
                self.set_word(0x10, CONFIG_VECTOR.into());
                self.store(self.common + 0x14, &value.to_le_bytes()[..1]);
                if value == 0 {
                    self.sink.pending.store(0, Ordering::SeqCst);
                }
            }
            0x80 | 0x84 => self.store(self.common + 0x20 + (register & 4), &value.to_le_bytes()),
            0x90 | 0x94 => self.store(self.common + 0x28 + (register & 4), &value.to_le_bytes()),
            0xa0 | 0xa4 => self.store(self.common + 0x30 + (register & 4), &value.to_le_bytes()),
            _ => {}
        }
    }
}

/// Registers at multiples of 4 below 0x100, the configuration from there; other accesses go to the same offsets
/// of the common configuration.
impl BusDevice for PciRegisters {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match offset {
            0x100.. => drop(self.mmio.reader().read(self.config + offset - 0x100, data)),
            _ if data.len() == 4 && offset.is_multiple_of(4) => {
                data.copy_from_slice(&self.register(offset).to_le_bytes());
            }
            _ => drop(self.mmio.reader().read(self.bar + offset, data)),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, <[u8; 4]>::try_from(data)) {
            (0x100.., _) => drop(self.mmio.reader().write(self.config + offset - 0x100, data)),
            (_, Ok(data)) if offset.is_multiple_of(4) => self.set_register(offset, u32::from_le_bytes(data)),
            _ => drop(self.mmio.reader().write(self.bar + offset, data)),
        }
    }

    fn retry(&mut self) {
        self.host(|host| host.retry());
    }

    fn save(&self) -> Result<Vec<u8>> {
        self.host(|host| host.save())
    }

    fn restore(&mut self, state: &[u8]) -> Result<()> {
        self.host(|host| host.restore(state))
    }
}

impl PciRegisters {
    /// The device that has the state of the bus.
    fn host<R>(&self, act: impl FnOnce(&mut dyn BusDevice) -> R) -> R {
        let devices = self.access.0.devices();
        let (_, host) = devices.iter().find(|(port, _)| *port == 0xcf8).unwrap();
        act(&mut *host.lock().unwrap())
    }
}
