//! The software CPU: guests run without any KVM, on an x86-64 processor and interrupt controllers made
//! of Rust.
//!
//! One host thread runs a vCPU: the thread that calls [`BackendVcpu::run`]. Guest code is decoded into
//! blocks of small operations (`block`, `decode`), which handlers execute (`exec`, `fp`); memory is
//! reached through software TLBs (`mmu`). Other threads interrupt a vCPU by its `link`. There is no
//! signal handler and nothing that VMs share; the one thread of its own that a VM may have waits for
//! interrupt events, and there is none while no such events are registered (`irq_event`).
//!
//! Besides the guest's memory a vCPU takes at most about 20 MiB: its decoded blocks 16 MiB (a cap: when
//! they take more they are dropped and made anew; blocks that wait to be freed come to 2 MiB at most),
//! what finds them half a MiB, its translations up to 1.8 MiB. A VM takes another 8 bytes for every 4 KiB
//! page of guest memory, which are resident only where code runs.
//!
//! [`BackendVcpu::run`]: crate::backend::BackendVcpu::run

mod block;
mod breakpoint;
mod chip;
mod clock;
mod counted;
mod cpu;
mod decode;
mod exec;
mod features;
mod fp;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod io;
mod irq_event;
mod isa;
mod link;
mod memory;
mod mmu;
mod peephole;
mod state;
mod vcpu;
mod vm;

use std::sync::Arc;

use crate::backend::{Backend, BackendConfig, BackendVm, Capability};
use crate::cpuid::Cpuid;
use crate::deterministic::Deterministic;
use crate::error::Result;

/// Name of the backend in messages.
const NAME: &str = "soft";

/// Most vCPUs of a VM: what 8-bit APIC ids address.
const MAX_VCPUS: u32 = 254;

/// The software CPU. It needs nothing of the host, and costs nothing to make.
#[derive(Clone, Copy, Debug, Default)]
pub struct Soft;

impl Soft {
    /// The backend.
    pub fn new() -> Self {
        Self
    }
}

impl Backend for Soft {
    fn name(&self) -> &'static str {
        NAME
    }

    fn supports(&self, capability: Capability) -> bool {
        match capability {
            Capability::Irqchip
            | Capability::DirtyLog
            | Capability::Doorbell
            | Capability::ReadOnlyMemory
            | Capability::Debug
            | Capability::SaveRestore => true,
            Capability::Hardware => false,
        }
    }

    fn supported_cpuid(&self) -> Result<Cpuid> {
        Ok(features::supported())
    }

    fn max_vcpus(&self) -> u32 {
        MAX_VCPUS
    }

    fn create_vm(&self, config: &BackendConfig) -> Result<Arc<dyn BackendVm>> {
        Ok(Arc::new(vm::SoftVm::new(config)?))
    }

    fn create_deterministic_vm(
        &self,
        config: &BackendConfig,
        deterministic: Deterministic,
    ) -> Result<Arc<dyn BackendVm>> {
        Ok(Arc::new(vm::SoftVm::deterministic(config, deterministic)?))
    }
}
