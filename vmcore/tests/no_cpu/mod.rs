//! A backend without a CPU: VMs that have memory slots and nothing else.

use std::sync::Arc;

use vmcore::backend::{
    Backend, BackendConfig, BackendVcpu, BackendVm, Capability, DoorbellConfig, IrqRoute, Registration, Slot,
};
use vmcore::cpuid::{Cpuid, CpuidEntry};
use vmcore::memory::DirtyBitmap;
use vmcore::state::MachineState;
use vmcore::{Error, IrqSink, MemoryRegion, Msi, Result};
use vmm_sys_util::eventfd::EventFd;

/// Memory slots of a VM.
pub const SLOTS: u32 = 3;

/// The backend; guest-physical addresses have 39 bits.
#[derive(Debug)]
pub struct NoCpu;

#[derive(Debug)]
struct NoCpuVm;

fn refuse<T>(what: &str) -> Result<T> {
    Err(Error::Unsupported { what: what.into(), backend: "no-cpu", fix: "use another backend".into() })
}

impl Backend for NoCpu {
    fn name(&self) -> &'static str {
        "no-cpu"
    }
    fn supports(&self, _: Capability) -> bool {
        false
    }
    fn supported_cpuid(&self) -> Result<Cpuid> {
        Ok(Cpuid::new([CpuidEntry { leaf: 0x8000_0008, eax: 39, ..Default::default() }]))
    }
    fn max_vcpus(&self) -> u32 {
        1
    }
    fn create_vm(&self, _: &BackendConfig) -> Result<Arc<dyn BackendVm>> {
        Ok(Arc::new(NoCpuVm))
    }
}

impl IrqSink for NoCpuVm {
    fn set_irq(&self, _: u32, _: bool) -> Result<()> {
        refuse("an interrupt")
    }
    fn send_msi(&self, _: Msi) -> Result<()> {
        refuse("an interrupt")
    }
}

impl BackendVm for NoCpuVm {
    fn name(&self) -> &'static str {
        "no-cpu"
    }
    fn max_slots(&self) -> u32 {
        SLOTS
    }
    fn map(&self, _: Slot, _: Arc<MemoryRegion>) -> Result<()> {
        Ok(())
    }
    fn unmap(&self, _: Slot) -> Result<()> {
        Ok(())
    }
    fn take_dirty(&self, _: Slot) -> Result<DirtyBitmap> {
        refuse("the dirty log")
    }
    fn doorbell_on(&self, _: DoorbellConfig, _: Arc<EventFd>) -> Result<Registration> {
        refuse("a doorbell")
    }
    fn set_level_triggered(&self, _: u16) -> Result<()> {
        refuse("interrupts")
    }
    fn irq_event(&self, _: IrqRoute) -> Result<Registration> {
        refuse("an interrupt event")
    }
    fn create_vcpu(&self, _: u32) -> Result<Box<dyn BackendVcpu>> {
        refuse("a vCPU")
    }
    fn save(&self) -> Result<MachineState> {
        refuse("saving")
    }
    fn restore(&self, _: &MachineState) -> Result<()> {
        refuse("restoring")
    }
}
