//! What `virtio-drivers` needs: registers and memory.

mod pci;

use std::cell::RefCell;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use pci::{Interrupts, PciRegisters};
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};
use vmcore::{BusDevice, GuestAddress, GuestMemory, IoThread, IrqLine, IrqSink, MemoryRegion, Msi};
use vmdevices::virtio::{Interrupt, Threading, VirtioDevice, VirtioMmio};
use zerocopy::{FromBytes, Immutable, IntoBytes};

const BASE: u64 = 0x10_0000;
const PAGES: usize = 2048;

/// Guest memory and where devices run.
pub struct Machine {
    memory: GuestMemory,
    threading: Threading,
    transport: TransportKind,
}

/// What devices are behind.
#[derive(Clone, Copy, Debug)]
enum TransportKind {
    Mmio,
    Pci(Interrupts),
}

impl Machine {
    /// Machines that serve requests on the vCPU's thread and machines with an I/O thread, of every transport.
    pub fn both() -> impl Iterator<Item = Self> {
        let thread = IoThread::new("virtio test").unwrap();
        let kinds = [
            TransportKind::Mmio,
            TransportKind::Pci(Interrupts::Messages),
            TransportKind::Pci(Interrupts::Pin),
        ];
        let each = kinds.map(|kind| {
            [Threading::Vcpu, Threading::IoThreads(vec![thread.clone()])].map(|threading| (kind, threading))
        });
        each.into_iter().flatten().map(|(transport, threading)| {
            let region = MemoryRegion::anonymous(GuestAddress(BASE), (PAGES * PAGE_SIZE) as u64).unwrap();
            let memory = GuestMemory::new();
            memory.insert(Arc::new(region.clone())).unwrap();
            POOL.replace(Some(Pool { region, free: (0..PAGES).rev().collect() }));
            Self { memory, threading, transport }
        })
    }

    /// Puts `device` on the machine.
    pub fn device(&self, device: impl VirtioDevice + 'static) -> Registers {
        let counter = Arc::new(Counter::default());
        let (memory, threading) = (self.memory.clone(), self.threading.clone());
        let aside = matches!(threading, Threading::IoThreads(_));
        let device: Arc<Mutex<dyn Polled>> = match self.transport {
            TransportKind::Mmio => {
                let interrupt = Interrupt::Line(IrqLine::new(counter.clone(), 5));
                let device = VirtioMmio::new("test", device, memory, interrupt, threading);
                Arc::new(Mutex::new(device.unwrap()))
            }
            TransportKind::Pci(interrupts) => {
                let sink = counter.clone();
                Arc::new(Mutex::new(PciRegisters::new(device, memory, sink, threading, interrupts)))
            }
        };
        // On PCI only where that feature is negotiated, which the drivers do not.
        let stops_queues = matches!(self.transport, TransportKind::Mmio);
        Registers { device, counter, stops_queues, aside }
    }
}

#[derive(Default)]
struct Counter(AtomicUsize);

impl IrqSink for Counter {
    fn set_irq(&self, _: u32, high: bool) -> vmcore::Result<()> {
        self.0.fetch_add(high.into(), Ordering::SeqCst);
        Ok(())
    }
    fn send_msi(&self, _: Msi) -> vmcore::Result<()> {
        Ok(())
    }
}

/// Registers in the shape of virtio-mmio's.
trait Polled: BusDevice {
    fn poll(&self);
}

impl Polled for VirtioMmio {
    fn poll(&self) {
        VirtioMmio::poll(self);
    }
}

impl Polled for PciRegisters {
    fn poll(&self) {
        PciRegisters::poll(self);
    }
}

/// The registers of one device.
#[derive(Clone)]
pub struct Registers {
    device: Arc<Mutex<dyn Polled>>,
    stops_queues: bool,
    /// The device is on another thread.
    aside: bool,
    counter: Arc<Counter>,
}

impl Registers {
    pub fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.device.lock().unwrap().read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn write(&self, offset: u64, value: u32) {
        self.device.lock().unwrap().write(offset, &value.to_le_bytes());
    }

    /// Whether the driver was interrupted. One that polls a device on another thread may have each of its answers
    /// before it would be told of them, and then is not.
    pub fn was_told(&self) -> bool {
        self.aside || self.counter.0.load(Ordering::SeqCst) > 0
    }

    /// Has a device without thread look at its host descriptors.
    pub fn poll(&self) {
        self.device.lock().unwrap().poll();
    }

    fn write_address(&self, offset: u64, address: u64) {
        self.write(offset, (address & 0xffff_ffff) as u32);
        self.write(offset + 4, (address >> 32) as u32);
    }
}

impl Transport for Registers {
    fn device_type(&self) -> DeviceType {
        assert_eq!((self.read(0), self.read(4)), (0x7472_6976, 2));
        self.read(8).try_into().unwrap()
    }

    fn read_device_features(&mut self) -> u64 {
        self.write(0x14, 0);
        let low = self.read(0x10);
        self.write(0x14, 1);
        u64::from(self.read(0x10)) << 32 | u64::from(low)
    }

    fn write_driver_features(&mut self, features: u64) {
        self.write(0x24, 0);
        self.write(0x20, (features & 0xffff_ffff) as u32);
        self.write(0x24, 1);
        self.write(0x20, (features >> 32) as u32);
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.write(0x30, queue.into());
        self.read(0x34)
    }

    fn notify(&mut self, queue: u16) {
        self.write(0x50, queue.into());
    }

    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_retain(self.read(0x70))
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.write(0x70, status.bits());
        assert_eq!(self.get_status(), status, "the device refused a status");
    }

    fn set_guest_page_size(&mut self, _: u32) {}

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(&mut self, queue: u16, size: u32, table: PhysAddr, driver: PhysAddr, device: PhysAddr) {
        self.write(0x30, queue.into());
        self.write(0x38, size);
        self.write_address(0x80, table);
        self.write_address(0x90, driver);
        self.write_address(0xa0, device);
        self.write(0x44, 1);
        assert_eq!(self.read(0x44), 1, "queue {queue} did not become ready");
    }

    fn queue_unset(&mut self, queue: u16) {
        self.write(0x30, queue.into());
        if self.stops_queues {
            self.write(0x44, 0);
        } else {
            // All of them: the driver is about to go.
            self.write(0x70, 0);
        }
        assert_eq!(self.read(0x44), 0);
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        self.write(0x30, queue.into());
        self.read(0x44) == 1
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        let status = self.read(0x60);
        self.write(0x64, status);
        InterruptStatus::from_bits_retain(status)
    }

    fn read_config_generation(&self) -> u32 {
        self.read(0xfc)
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> virtio_drivers::Result<T> {
        let mut value = T::new_zeroed();
        self.device.lock().unwrap().read(0x100 + offset as u64, value.as_mut_bytes());
        Ok(value)
    }

    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        offset: usize,
        value: T,
    ) -> virtio_drivers::Result<()> {
        self.device.lock().unwrap().write(0x100 + offset as u64, value.as_bytes());
        Ok(())
    }
}

/// The guest memory of the machine that the test's thread uses.
struct Pool {
    region: MemoryRegion,
    free: Vec<usize>,
}

thread_local! {
    static POOL: RefCell<Option<Pool>> = const { RefCell::new(None) };
}

impl Pool {
    /// `pages` pages in a row.
    fn allocate(&mut self, pages: usize) -> (PhysAddr, NonNull<u8>) {
        self.free.sort_unstable_by(|a, b| b.cmp(a));
        let at = self.free.windows(pages).rposition(|w| w[0] - w[pages - 1] == pages - 1).unwrap();
        let first = self.free.drain(at..at + pages).next_back().unwrap();
        let address = BASE + (first * PAGE_SIZE) as u64;
        (address, self.host(address))
    }

    fn host(&self, address: PhysAddr) -> NonNull<u8> {
        let offset = usize::try_from(address - BASE).unwrap();
        assert!(offset < PAGES * PAGE_SIZE);
        NonNull::new(self.region.host_address().wrapping_add(offset)).unwrap()
    }

    fn release(&mut self, address: PhysAddr, pages: usize) {
        let first = usize::try_from(address - BASE).unwrap() / PAGE_SIZE;
        self.free.extend(first..first + pages);
    }
}

fn pool<R>(act: impl FnOnce(&mut Pool) -> R) -> R {
    POOL.with_borrow_mut(|pool| act(pool.as_mut().unwrap()))
}

/// Guest memory as the driver sees it. Buffers are copied to pages of their own.
pub struct Memory;

// SAFETY: pages are handed out once until they are given back, zeroed, aligned, and stay mapped
// while the pool of the test's thread holds the region.
unsafe impl Hal for Memory {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let (address, host) = pool(|pool| pool.allocate(pages));
        // SAFETY: `allocate` gave this many bytes to us alone.
        unsafe { host.write_bytes(0, pages * PAGE_SIZE) };
        (address, host)
    }

    unsafe fn dma_dealloc(address: PhysAddr, _: NonNull<u8>, pages: usize) -> i32 {
        pool(|pool| pool.release(address, pages));
        0
    }

    unsafe fn mmio_phys_to_virt(_: PhysAddr, _: usize) -> NonNull<u8> {
        unreachable!("BARs are reached by the bus")
    }

    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        let (address, host) = pool(|pool| pool.allocate(buffer.len().div_ceil(PAGE_SIZE)));
        // SAFETY: the caller owns `buffer`, and `allocate` gave us as many bytes.
        unsafe { host.copy_from_nonoverlapping(buffer.cast(), buffer.len()) };
        address
    }

    unsafe fn unshare(address: PhysAddr, buffer: NonNull<[u8]>, direction: BufferDirection) {
        let host = pool(|pool| pool.host(address));
        if direction != BufferDirection::DriverToDevice {
            // SAFETY: `share` copied as many bytes from this buffer.
            unsafe { buffer.cast::<u8>().copy_from_nonoverlapping(host, buffer.len()) };
        }
        pool(|pool| pool.release(address, buffer.len().div_ceil(PAGE_SIZE)));
    }
}
