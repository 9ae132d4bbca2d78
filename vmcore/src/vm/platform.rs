//! What devices may still change while the guest runs: where they are, and which events they have.

use std::fmt;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::backend::{BackendVm, DoorbellConfig, Registration};
use crate::bus::{Bus, SharedDevice, WeakBus};
use crate::error::{Error, Result};
use crate::irq::{IrqLine, IrqSink, Msi};
use crate::memory::{GpaRange, GuestAddress, GuestMemory};

/// The machine for a device that moves while the guest runs: PCI functions, whose addresses the guest
/// programs and whose interrupts are messages of the guest's choice.
///
/// Clones mean the same machine. Methods may be called from any thread, from a [`BusDevice`] in its own
/// access too. It does not keep the VM's devices alive; once the VM is gone, nothing can be placed.
///
/// [`BusDevice`]: crate::BusDevice
#[derive(Clone)]
pub struct Platform {
    memory: GuestMemory,
    mmio: WeakBus,
    /// `None` on a machine without interrupt controllers.
    sink: Option<Arc<dyn IrqSink>>,
    /// `None` where there is no VM.
    vm: Option<Arc<dyn BackendVm>>,
}

impl Platform {
    /// A platform of `memory` and `mmio`, with interrupts to `sink`, and without doorbells: for bare VMs, and
    /// for tests of devices without a VM.
    pub fn new(memory: GuestMemory, mmio: &Bus, sink: Arc<dyn IrqSink>) -> Self {
        Self { memory, mmio: mmio.downgrade(), sink: Some(sink), vm: None }
    }

    pub(super) fn of(memory: GuestMemory, mmio: &Bus, vm: Arc<dyn BackendVm>, irqchip: bool) -> Self {
        let sink: Option<Arc<dyn IrqSink>> = if irqchip { Some(vm.clone()) } else { None };
        Self { memory, mmio: mmio.downgrade(), sink, vm: Some(vm) }
    }

    /// Puts `device` at `len` bytes of guest-physical addresses from `base`. Memory that is added there
    /// afterwards is refused, but for memory that is added at the very moment, which the guest then sees
    /// instead of the device.
    ///
    /// # Errors
    /// [`Error::Conflict`] where a device or memory is there, [`Error::WrongState`] when the VM is gone.
    pub fn place(&self, base: GuestAddress, len: u64, device: SharedDevice) -> Result<()> {
        let mmio = self.mmio.upgrade().ok_or(Error::WrongState {
            op: "place a device",
            state: "gone",
            fix: "keep the VM for as long as its devices move",
        })?;
        let new = GpaRange { base: base.0, len };
        if let Some(existing) = self.memory.ranges().into_iter().find(|r| r.overlaps(&new)) {
            return Err(Error::Conflict {
                kind: "MMIO window",
                new: new.to_string(),
                existing: format!("memory {existing}"),
            });
        }
        mmio.insert(base.0, len, device)
    }

    /// Takes the device that begins at `base` away. An access that is under way on another vCPU still ends
    /// on it.
    pub fn displace(&self, base: GuestAddress) -> Option<SharedDevice> {
        self.mmio.upgrade()?.remove(base.0)
    }

    /// Makes a guest's write signal `event`, until the registration is dropped.
    ///
    /// # Errors
    /// As [`BackendVm::doorbell_on`]; [`Error::Unsupported`] on a platform without a VM.
    pub fn doorbell(&self, config: DoorbellConfig, event: Arc<EventFd>) -> Result<Registration> {
        let vm = self.vm.as_ref().ok_or_else(|| Error::Unsupported {
            what: "a doorbell".into(),
            backend: "no",
            fix: "serve the write itself".into(),
        })?;
        vm.doorbell_on(config, event)
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The wire into global system interrupt `gsi`. It leads nowhere on a machine without interrupt
    /// controllers.
    pub fn irq_line(&self, gsi: u32) -> IrqLine {
        self.sink.as_ref().map_or_else(IrqLine::detached, |sink| IrqLine::new(sink.clone(), gsi))
    }

    /// Delivers a message. A machine without interrupt controllers has nobody who takes it: such a guest
    /// polls.
    ///
    /// # Errors
    /// As [`IrqSink::send_msi`].
    pub fn send_msi(&self, msi: Msi) -> Result<()> {
        self.sink.as_ref().map_or(Ok(()), |sink| sink.send_msi(msi))
    }
}

impl fmt::Debug for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Platform")
            .field("backend", &self.vm.as_ref().map(|vm| vm.name()))
            .field("irqchip", &self.sink.is_some())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::bus::BusDevice;
    use crate::memory::MemoryRegion;

    struct Device;

    impl BusDevice for Device {
        fn read(&mut self, _: u64, data: &mut [u8]) {
            data.fill(7);
        }
        fn write(&mut self, _: u64, _: &[u8]) {}
    }

    struct Nobody;

    impl IrqSink for Nobody {
        fn set_irq(&self, _: u32, _: bool) -> Result<()> {
            Ok(())
        }
        fn send_msi(&self, _: Msi) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn devices_move_but_not_over_memory_or_each_other_and_not_without_a_vm() {
        let (memory, mmio) = (GuestMemory::new(), Bus::new("MMIO window"));
        memory.insert(MemoryRegion::anonymous(GuestAddress(0x1_0000), 0x1000).unwrap().into()).unwrap();
        let platform = Platform::new(memory, &mmio, Arc::new(Nobody));
        let place = |base| platform.place(GuestAddress(base), 0x1000, Arc::new(Mutex::new(Device)));
        place(0x2_0000).unwrap();
        for taken in [0x1_0000, 0xf001, 0x1_0fff, 0x2_0000, 0x1_f001] {
            assert!(matches!(place(taken), Err(Error::Conflict { .. })), "{taken:#x}");
        }
        let mut data = [0];
        assert!(mmio.reader().read(0x2_0000, &mut data) && data == [7]);
        assert!(platform.displace(GuestAddress(0x2_0000)).is_some());
        assert!(platform.displace(GuestAddress(0x2_0000)).is_none());
        place(0x1_f001).unwrap();
        // The device on the bus has the platform, and the platform no share in the bus.
        drop(mmio);
        assert!(matches!(place(0x3_0000), Err(Error::WrongState { .. })));
        assert!(platform.displace(GuestAddress(0x1_f001)).is_none());
    }
}
