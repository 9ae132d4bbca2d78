//! What a VM did so far.

use std::collections::BTreeMap;

use pyo3::prelude::*;
use vmcore::VmStats;
use vmcore::backend::VcpuStats;

/// What a VM did so far.
#[pyclass(frozen, module = "vmcore")]
pub struct Stats(pub VmStats);

/// The counts of one vCPU by name.
pub fn counts(stats: &VcpuStats) -> BTreeMap<&'static str, u64> {
    BTreeMap::from([
        ("exits", stats.exits),
        ("port", stats.port),
        ("mmio", stats.mmio),
        ("halt", stats.halt),
        ("interrupted", stats.interrupted),
        ("debug", stats.debug),
        ("shutdown", stats.shutdown),
    ])
}

#[pymethods]
impl Stats {
    /// Exits by reason, of each vCPU.
    #[getter]
    fn vcpus(&self) -> Vec<BTreeMap<&'static str, u64>> {
        self.0.vcpus.iter().map(counts).collect()
    }

    /// Exits by reason, of all vCPUs together.
    #[getter]
    fn total(&self) -> BTreeMap<&'static str, u64> {
        let mut total = counts(&VcpuStats::default());
        for (name, count) in self.0.vcpus.iter().flat_map(counts) {
            *total.entry(name).or_default() += count;
        }
        total
    }

    /// The backend's own statistics of the VM; empty where it has none.
    #[getter]
    fn backend_vm(&self) -> BTreeMap<String, u64> {
        self.0.backend_vm.iter().cloned().collect()
    }

    /// The backend's own statistics of each vCPU.
    #[getter]
    fn backend_vcpus(&self) -> Vec<BTreeMap<String, u64>> {
        self.0.backend_vcpus.iter().map(|vcpu| vcpu.iter().cloned().collect()).collect()
    }

    fn _repr_html_(&self) -> String {
        let vcpus: Vec<_> = self.vcpus();
        let head: String = (0..vcpus.len()).map(|vcpu| format!("<th>vCPU {vcpu}</th>")).collect();
        let rows: String = self
            .total()
            .keys()
            .map(|name| {
                let cells: String = vcpus.iter().map(|vcpu| format!("<td>{}</td>", vcpu[name])).collect();
                format!("<tr><th>{name}</th>{cells}</tr>")
            })
            .collect();
        format!("<table><tr><th></th>{head}</tr>{rows}</table>")
    }

    fn __repr__(&self) -> String {
        let total: Vec<_> = self.total().iter().map(|(name, count)| format!("{name}={count}")).collect();
        format!("<Stats vcpus={} {}>", self.0.vcpus.len(), total.join(" "))
    }
}
