//! What CPUID tells a guest, as a dict.

use std::collections::BTreeMap;

use pyo3::prelude::*;
use vmcore::cpuid::{CpuConfig, Cpuid, CpuidEntry, Topology};
use vmcore::{Accel, host};

use crate::error::Raise;

/// EAX, EBX, ECX and EDX by leaf and subleaf.
pub type Table = BTreeMap<(u32, Option<u32>), (u32, u32, u32, u32)>;

/// As Python has it.
pub fn table(cpuid: &Cpuid) -> Table {
    let pair = |e: &CpuidEntry| ((e.leaf, e.subleaf), (e.eax, e.ebx, e.ecx, e.edx));
    cpuid.entries().iter().map(pair).collect()
}

/// As Rust has it.
pub fn cpuid(table: Table) -> Cpuid {
    let entry = |((leaf, subleaf), (eax, ebx, ecx, edx))| CpuidEntry { leaf, subleaf, eax, ebx, ecx, edx };
    Cpuid::new(table.into_iter().map(entry))
}

/// What CPUID can tell on a backend of this host: all that it can present, or where `model` is given, what vCPU
/// number `id` of a VM with `cpus` cores is told. `irqchip` is whether that has interrupt controllers.
#[pyfunction]
#[pyo3(name = "cpuid", signature = (accel="auto", *, model=None, cpus=1, id=0, irqchip=false))]
pub fn of_host(
    py: Python<'_>,
    accel: &str,
    model: Option<&str>,
    cpus: u32,
    id: u32,
    irqchip: bool,
) -> PyResult<Table> {
    let accel: Accel = accel.parse().raise()?;
    let model = model.map(|model| model.parse().raise()).transpose()?;
    let cpuid = py.detach(|| {
        let supported = host::choose(accel)?.0.supported_cpuid()?;
        let topology = Topology::of_cores(cpus);
        match model {
            None => Ok(supported),
            Some(model) => CpuConfig { model, topology, lapic: irqchip, tsc_khz: None }
                .cpuid(&supported, topology.apic_id(id)),
        }
    });
    Ok(table(&cpuid.raise()?))
}
