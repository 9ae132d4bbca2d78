//! Activation that fails, and resets at every step of the way, on both transports.

use super::*;
use crate::pci::PciDevice;
use crate::virtio::queue::VirtQueue;

/// A device of one queue that uses every buffer as it is, once it could be activated.
struct Stubborn {
    /// How often it is going to fail.
    failures: usize,
}

impl VirtioDevice for Stubborn {
    fn device_type(&self) -> DeviceType {
        DeviceType::ENTROPY
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![SIZE]
    }
    fn read_config(&self, _: u64, _: &mut [u8]) {}
    fn activate(&mut self, activation: Activation) -> vmcore::Result<Vec<Box<dyn Worker>>> {
        if self.failures > 0 {
            self.failures -= 1;
            return Err(vmcore::Error::device("stubborn device", io::Error::other("not yet")));
        }
        Ok(vec![Box::new(User { memory: activation.memory, queues: activation.queues })])
    }
}

struct User {
    memory: GuestMemory,
    queues: Vec<VirtQueue>,
}

impl Worker for User {
    fn queues(&mut self) -> &mut [VirtQueue] {
        &mut self.queues
    }
    fn notify(&mut self, _: u16) -> Result<Progress, QueueError> {
        let map = self.memory.snapshot();
        self.queues[0].serve(&map, 16, 1, |_| Ok(0))
    }
}

fn every(failures: usize) -> impl Iterator<Item = (Behind, Driver)> {
    let thread = IoThread::new("activation").unwrap();
    let threadings = [Threading::Vcpu, Threading::IoThreads(vec![thread])];
    let each = threadings.map(|threading| {
        [Behind::Mmio, Behind::Pci]
            .map(|behind| (behind, Driver::on(behind, Stubborn { failures }, threading.clone())))
    });
    each.into_iter().flatten()
}

/// Has the device use a buffer.
fn works(driver: &mut Driver) {
    driver.start();
    driver.descriptor(TABLE, 0, DATA, 64, WRITE, 0);
    driver.offer(0);
    let end = std::time::Instant::now() + Duration::from_secs(10);
    while driver.used() == 0 && std::time::Instant::now() < end {
        std::thread::yield_now();
    }
    assert_eq!((driver.status(), driver.used()), (15, 1));
}

#[test]
fn an_activation_that_fails_is_told_and_a_reset_helps() {
    for (behind, mut driver) in every(3) {
        for _ in 0..3 {
            let before = driver.edges.0.load(Ordering::SeqCst);
            driver.start();
            let edges = driver.edges.0.load(Ordering::SeqCst) - before;
            assert_eq!((driver.status(), edges), (15 | 64, 1), "{behind:?}");
            assert_eq!(driver.read(0x60), 2, "{behind:?}: of the configuration");
            // Nothing but a reset helps.
            driver.write(0x70, 15);
            driver.write(0x30, 0);
            driver.write(0xc0, 1);
            driver.queue(0, SIZE, [TABLE, AVAILABLE, USED]);
            driver.descriptor(TABLE, 0, DATA, 64, WRITE, 0);
            driver.offer(0);
            let state = driver.device.save().unwrap();
            driver.device.restore(&state).unwrap();
            assert_eq!((driver.status(), driver.used()), (15 | 64, 0), "{behind:?}");
        }
        works(&mut driver);
    }
}

#[test]
fn resets_at_every_step_leave_a_device_that_works() {
    for (behind, mut driver) in every(0) {
        // Register and value: negotiation, set-up of a queue, work, reset of the queue.
        let steps = [
            (0x70, 1),
            (0x70, 3),
            (0x24, 1),
            (0x20, 0x101),
            (0x70, 11),
            (0x30, 0),
            (0x38, SIZE.into()),
            (0x80, 0x1000),
            (0x90, 0x2000),
            (0xa0, 0x3000),
            (0x44, 1),
            (0x70, 15),
            (0x50, 0),
            (0xc0, 1),
            (0x44, 1),
        ];
        for until in 0..=steps.len() {
            driver.write(0x70, 0);
            for &(register, value) in &steps[..until] {
                driver.write(register, value);
            }
            driver.write(0x70, 0);
            assert_eq!((driver.status(), driver.read(0x44)), (0, 0), "{behind:?}: {until}");
            // A snapshot of what was reset is one of a fresh device.
            let state = driver.device.save().unwrap();
            driver.device.restore(&state).unwrap();
            works(&mut driver);
        }
    }
}

#[test]
fn platform_features_are_offered_where_they_are_asked_for() {
    const BOTH: u64 = 1 << 33 | 1 << 36;
    for (_, mut driver) in every(0) {
        driver.negotiate(features::VERSION_1 | BOTH);
        assert_eq!(driver.status(), 3, "refused");
    }
    let platform = vmcore::Platform::new(memory(), &vmcore::Bus::new("MMIO"), Arc::new(Edges::default()));
    let pci = VirtioPci::new("test", Rng::new(), &platform, Threading::Vcpu).unwrap();
    let mut pci = pci.access_platform();
    pci.write(0, 0, &[1, 0, 0, 0]);
    let mut offered = [0; 4];
    pci.read(0, 4, &mut offered);
    assert_eq!(u64::from(u32::from_le_bytes(offered)) << 32 & BOTH, BOTH);
    let interrupt = Interrupt::Line(IrqLine::detached());
    let mmio = VirtioMmio::new("test", Rng::new(), memory(), interrupt, Threading::Vcpu).unwrap();
    let mut mmio = mmio.access_platform();
    for (bank, bits) in [(0_u32, 0_u32), (1, 0x13)] {
        for (register, value) in [(0x70, 3), (0x24, bank), (0x20, bits)] {
            mmio.write(register, &value.to_le_bytes());
        }
    }
    mmio.write(0x70, &11_u32.to_le_bytes());
    let mut status = [0; 4];
    mmio.read(0x70, &mut status);
    assert_eq!(status[0], 11);
}
