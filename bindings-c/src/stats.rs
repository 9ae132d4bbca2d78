//! What a vCPU did so far.

use vmcore::backend::VcpuStats;

/// How often a vCPU left the guest, by reason, since it was made.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct vmcore_vcpu_stats {
    /// All returns from the guest to the backend.
    pub exits: u64,
    /// Port accesses, one for each operand.
    pub port: u64,
    /// MMIO accesses, one for each of at most 8 bytes.
    pub mmio: u64,
    /// HLTs without interrupt controllers.
    pub halt: u64,
    /// Kicks and host signals.
    pub interrupted: u64,
    /// Debug stops.
    pub debug: u64,
    /// Triple faults.
    pub shutdown: u64,
}

impl From<VcpuStats> for vmcore_vcpu_stats {
    fn from(stats: VcpuStats) -> Self {
        let VcpuStats { exits, port, mmio, halt, interrupted, debug, shutdown, .. } = stats;
        Self { exits, port, mmio, halt, interrupted, debug, shutdown }
    }
}

impl vmcore_vcpu_stats {
    pub(crate) fn sum(all: &[VcpuStats]) -> Self {
        let sum = |count: fn(&VcpuStats) -> u64| all.iter().map(count).sum();
        Self {
            exits: sum(|s| s.exits),
            port: sum(|s| s.port),
            mmio: sum(|s| s.mmio),
            halt: sum(|s| s.halt),
            interrupted: sum(|s| s.interrupted),
            debug: sum(|s| s.debug),
            shutdown: sum(|s| s.shutdown),
        }
    }
}
