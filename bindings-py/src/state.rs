//! A VM that stands still, and its state.

use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::error::{self, Raise};

/// The exception for bytes that are no state of `what`.
pub fn invalid(what: &'static str, why: &dyn std::fmt::Display) -> PyErr {
    error::exception(&vmcore::Error::State {
        what,
        expected: "what save gave".into(),
        found: why.to_string(),
    })
}

/// The state of a VM's vCPUs and machine, without its memory and devices.
#[pyclass(frozen, eq, module = "vmcore")]
#[derive(PartialEq)]
pub struct VmState(vmcore::VmState);

#[pymethods]
impl VmState {
    /// The state as bytes, for this version of vmcore.
    fn to_bytes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let bytes = postcard::to_stdvec(&self.0).map_err(|e| invalid("a VM", &e))?;
        Ok(PyBytes::new(py, &bytes))
    }

    /// The state that `to_bytes` made bytes of.
    #[staticmethod]
    fn from_bytes(data: &[u8]) -> PyResult<Self> {
        Ok(Self(postcard::from_bytes(data).map_err(|e| invalid("a VM", &e))?))
    }

    /// The state as JSON, to be looked at.
    fn to_json(&self) -> PyResult<String> {
        serde_json::to_string(&self.0).map_err(|e| invalid("a VM", &e))
    }

    fn __repr__(&self) -> String {
        format!("<VmState vcpus={}>", self.0.vcpus.len())
    }
}

/// A VM that stands still. It goes on at the end of the with block, or by `resume`.
#[pyclass(frozen, module = "vmcore")]
pub struct Paused(Mutex<Option<Arc<vmcore::Paused>>>);

impl Paused {
    pub fn new(paused: vmcore::Paused) -> Self {
        Self(Mutex::new(Some(Arc::new(paused))))
    }

    fn held(&self) -> PyResult<Arc<vmcore::Paused>> {
        let held = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        held.ok_or_else(|| error::wrong_state("use a pause", "going on again", "pause it again"))
    }
}

#[pymethods]
impl Paused {
    /// Lets the VM go on, where nothing else holds it. More than once does nothing.
    fn resume(&self, py: Python<'_>) {
        let held = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        py.detach(|| drop(held));
    }

    /// The state of vCPUs and machine. Memory can be read; devices are not part of it.
    fn save(&self, py: Python<'_>) -> PyResult<VmState> {
        let held = self.held()?;
        Ok(VmState(py.detach(move || held.save()).raise()?))
    }

    /// Takes over a state of this VM, or of one built alike.
    fn restore(&self, py: Python<'_>, state: &VmState) -> PyResult<()> {
        let held = self.held()?;
        py.detach(move || held.restore(&state.0)).raise()
    }

    /// A fingerprint of the state of vCPUs, machine, memory and devices, in hexadecimal.
    fn state_hash(&self, py: Python<'_>) -> PyResult<String> {
        let held = self.held()?;
        Ok(py.detach(move || held.state_hash()).raise()?.to_string())
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, pyo3::types::PyTuple>) {
        self.resume(py);
    }
}
