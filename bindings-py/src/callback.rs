//! Calls of Python from the threads of a VM.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use pyo3::prelude::*;
use vmcore::{Outcome, VcpuHandle};

use crate::error;

thread_local! {
    static DEPTH: Cell<u32> = const { Cell::new(0) };
}

/// Whether Python on this thread was called by a VM, which waits for it.
pub fn called_by_vm() -> bool {
    DEPTH.get() > 0
}

/// Refuses `op`, which would wait for the guest, to Python that the guest waits for.
pub fn refuse_inside(op: &'static str) -> PyResult<()> {
    if called_by_vm() {
        return Err(error::wrong_state(op, "calling a device", "do it on a thread that is not the VM's own"));
    }
    Ok(())
}

struct Inside;

impl Inside {
    fn enter() -> Self {
        DEPTH.set(DEPTH.get() + 1);
        Self
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        DEPTH.set(DEPTH.get() - 1);
    }
}

/// How a vCPU in Python's own hands is stopped.
#[derive(Clone)]
pub struct Stopper {
    pub handle: VcpuHandle,
    /// Told from the kicks by which a run looks for signals.
    pub asked: Arc<AtomicBool>,
}

impl Stopper {
    pub fn stop(&self) {
        self.asked.store(true, Ordering::SeqCst);
        self.handle.kick();
    }
}

/// Where what callbacks raise goes: the first of it ends the VM's run and comes out of it.
#[derive(Default)]
pub struct Sink {
    raised: Mutex<Option<PyErr>>,
    control: OnceLock<vmcore::Control>,
    vcpus: Mutex<Vec<Stopper>>,
}

impl Sink {
    /// The switch of the VM whose callbacks these are.
    pub fn controls(&self, control: vmcore::Control) {
        // There is one machine, whoever says so first.
        let _ = self.control.set(control);
    }

    pub fn add_vcpu(&self, stopper: Stopper) {
        self.vcpus.lock().unwrap_or_else(PoisonError::into_inner).push(stopper);
    }

    pub fn stop_vcpus(&self) {
        self.vcpus.lock().unwrap_or_else(PoisonError::into_inner).iter().for_each(Stopper::stop);
    }

    /// What was raised since the last call.
    pub fn take(&self) -> Option<PyErr> {
        self.raised.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Keeps `error` for who ends what was begun.
    pub fn keep(&self, error: PyErr) {
        self.raised.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }

    fn raise(&self, error: PyErr) {
        self.keep(error);
        if let Some(control) = self.control.get() {
            control.end(Outcome::Stopped);
        }
        self.stop_vcpus();
    }

    /// Calls Python. `None` where it raised, or the interpreter is about to end.
    pub fn call<T>(&self, call: impl FnOnce(Python<'_>) -> PyResult<T>) -> Option<T> {
        let result = Python::try_attach(|py| {
            let _inside = Inside::enter();
            call(py)
        });
        match result {
            Some(Ok(value)) => Some(value),
            Some(Err(error)) => {
                self.raise(error);
                None
            }
            None => None,
        }
    }
}

/// Puts what a callback returned into the guest's `data`: a number in little-endian order, bytes, or all
/// ones for `None`.
///
/// # Errors
/// TypeError, ValueError, OverflowError as is fitting.
pub fn fill(data: &mut [u8], value: &Bound<'_, PyAny>) -> PyResult<()> {
    if value.is_none() {
        data.fill(0xff);
        return Ok(());
    }
    if let Ok(number) = value.extract::<u64>() {
        let bytes = number.to_le_bytes();
        if bytes[data.len().min(8)..].iter().any(|&byte| byte != 0) {
            return Err(error::config(
                "answer to the guest's read",
                format!("{number:#x}"),
                format!("give a number of {} bytes", data.len()),
            ));
        }
        let len = data.len().min(8);
        data[..len].copy_from_slice(&bytes[..len]);
        return Ok(());
    }
    let bytes: Vec<u8> = value.extract()?;
    if bytes.len() != data.len() {
        return Err(error::config(
            "answer to the guest's read",
            format!("{} bytes", bytes.len()),
            format!("give {} bytes, or a number", data.len()),
        ));
    }
    data.copy_from_slice(&bytes);
    Ok(())
}
