//! The memory balloon.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use pyo3::prelude::*;
use vmdevices::virtio::BalloonHandle;

use crate::error::{self, Raise};
use crate::wait;

/// A balloon: memory that the guest does not use goes back to the host, and `target` bytes of it at once.
#[pyclass(frozen, module = "vmcore")]
pub struct Balloon {
    balloon: Mutex<Option<vmdevices::Balloon>>,
    handle: BalloonHandle,
}

impl Balloon {
    pub fn take(&self) -> PyResult<vmdevices::Balloon> {
        let balloon = self.balloon.lock().unwrap_or_else(PoisonError::into_inner).take();
        balloon.ok_or_else(|| error::wrong_state("attach a balloon", "using it already", "make another"))
    }
}

#[pymethods]
impl Balloon {
    #[new]
    #[pyo3(signature = (target=0, *, deflate_on_oom=true, free_page_reporting=true))]
    pub fn new(target: u64, deflate_on_oom: bool, free_page_reporting: bool) -> PyResult<Self> {
        let balloon = vmdevices::Balloon::new().raise()?;
        let balloon = balloon.deflate_on_oom(deflate_on_oom).free_page_reporting(free_page_reporting);
        let handle = balloon.handle();
        let made = Self { balloon: Mutex::new(Some(balloon)), handle };
        made.set_target(target)?;
        Ok(made)
    }

    /// Bytes that are wished in the balloon; set it while the guest runs.
    #[getter]
    fn target(&self) -> u64 {
        self.handle.target()
    }

    #[setter]
    fn set_target(&self, bytes: u64) -> PyResult<()> {
        self.handle
            .set_target(bytes)
            .map_err(|e| error::config("size of a balloon", bytes.to_string(), e.to_string()))
    }

    /// Bytes that the guest says are in the balloon.
    #[getter]
    fn actual(&self) -> u64 {
        self.handle.actual()
    }

    /// Asks the guest for its statistics; what it does not tell is left out.
    #[pyo3(signature = (timeout=5.0))]
    fn statistics(&self, py: Python<'_>, timeout: f64) -> PyResult<BTreeMap<&'static str, u64>> {
        let limit = wait::seconds(Some(timeout))?.unwrap_or(Duration::MAX);
        let answer = py.detach(|| self.handle.statistics(limit));
        let s = answer.map_err(|e| error::io("ask", "for the balloon's statistics", e))?;
        let all = [
            ("swap_in", s.swap_in),
            ("swap_out", s.swap_out),
            ("major_faults", s.major_faults),
            ("minor_faults", s.minor_faults),
            ("free", s.free),
            ("total", s.total),
            ("available", s.available),
            ("disk_caches", s.disk_caches),
            ("hugetlb_allocations", s.hugetlb_allocations),
            ("hugetlb_failures", s.hugetlb_failures),
        ];
        Ok(all.into_iter().filter_map(|(name, value)| Some((name, value?))).collect())
    }
}
