//! A vCPU in Python's own hands.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::Instant;

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use vmcore::backend::DebugConfig;
use vmcore::{GuestAddress, Io, VcpuExit as Exit};

use crate::callback::{self, Sink, Stopper};
use crate::cpuid;
use crate::error::{self, Raise};
use crate::outcome::VcpuExit;
use crate::stats;
use crate::ticker::Ticks;
use crate::wait;

/// Instructions between looks for signals.
const TURN: u64 = 10_000_000;

/// A virtual CPU, whose registers are its attributes. It runs on the thread that calls `run`.
#[pyclass(frozen, module = "vmcore")]
pub struct Vcpu {
    vcpu: Mutex<vmcore::Vcpu>,
    stopper: Stopper,
    sink: Arc<Sink>,
    closed: Arc<AtomicBool>,
    id: u32,
}

/// Python's answers to the guest's I/O.
#[derive(Default)]
struct Handlers {
    port_read: Option<Py<PyAny>>,
    port_write: Option<Py<PyAny>>,
    mmio_read: Option<Py<PyAny>>,
    mmio_write: Option<Py<PyAny>>,
}

impl Handlers {
    fn any(&self) -> bool {
        [&self.port_read, &self.port_write, &self.mmio_read, &self.mmio_write].iter().any(|h| h.is_some())
    }

    fn answer(&self, sink: &Sink, io: Io<'_>) {
        match io {
            Io::PortRead { port, data } => read(sink, self.port_read.as_ref(), port.into(), data),
            Io::PortWrite { port, data } => write(sink, self.port_write.as_ref(), port.into(), data),
            Io::MmioRead { at, data } => read(sink, self.mmio_read.as_ref(), at.0, data),
            Io::MmioWrite { at, data } => write(sink, self.mmio_write.as_ref(), at.0, data),
        }
    }
}

fn read(sink: &Sink, handler: Option<&Py<PyAny>>, at: u64, data: &mut [u8]) {
    let Some(handler) = handler else { return };
    sink.call(|py| callback::fill(data, handler.bind(py).call1((at, data.len()))?.as_any()));
}

fn write(sink: &Sink, handler: Option<&Py<PyAny>>, at: u64, data: &[u8]) {
    let Some(handler) = handler else { return };
    sink.call(|py| handler.bind(py).call1((at, PyBytes::new(py, data))).map(drop));
}

impl Vcpu {
    pub fn new(vcpu: vmcore::Vcpu, sink: Arc<Sink>, closed: Arc<AtomicBool>) -> Self {
        let stopper = Stopper { handle: vcpu.handle(), asked: Arc::default() };
        sink.add_vcpu(stopper.clone());
        let id = vcpu.id();
        Self { vcpu: Mutex::new(vcpu), stopper, sink, closed, id }
    }

    /// The vCPU, where it does not run.
    pub fn lock(&self) -> PyResult<MutexGuard<'_, vmcore::Vcpu>> {
        if self.closed.load(Ordering::Acquire) {
            return Err(error::closed("a vCPU"));
        }
        match self.vcpu.try_lock() {
            Ok(vcpu) => Ok(vcpu),
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => {
                Err(error::wrong_state("use a vCPU", "running it", "wait for its run to end, or kick it"))
            }
        }
    }

    /// Runs until something happens that is not a look for signals, or `due`.
    fn run_until(
        &self,
        py: Python<'_>,
        due: Option<Instant>,
        mut run: impl FnMut(&mut vmcore::Vcpu) -> vmcore::Result<Exit> + Send,
    ) -> PyResult<VcpuExit> {
        let mut vcpu = self.lock()?;
        let ticks = if due.is_some() || wait::handles_signals(py)? {
            Some(Ticks::of(self.stopper.handle.clone(), due).raise()?)
        } else {
            None
        };
        let exit = loop {
            let vcpu = &mut *vcpu;
            let exit = py.detach(|| run(vcpu));
            if let Some(error) = self.sink.take() {
                self.stopper.asked.store(false, Ordering::SeqCst);
                return Err(error);
            }
            let exit = exit.raise()?;
            py.check_signals()?;
            if exit != Exit::Kicked || self.stopper.asked.swap(false, Ordering::SeqCst) {
                break exit;
            }
            if due.is_some_and(|due| due <= Instant::now()) {
                break exit;
            }
        };
        drop(ticks);
        Ok(VcpuExit(exit))
    }
}

#[pymethods]
impl Vcpu {
    /// The vCPU's number, which is its APIC id.
    #[getter]
    fn id(&self) -> u32 {
        self.id
    }

    /// Runs the guest on this thread, without the GIL, until it halts (without interrupt controllers), is
    /// kicked, or stops for another reason. The functions answer all of its I/O: `port_read(port, size)` and
    /// `mmio_read(address, size)` give a number, `size` bytes or None for all ones, `port_write(port, data)`
    /// and `mmio_write(address, data)` take bytes. Without any of them the VM's devices answer. What one
    /// raises ends the run and comes out of it. After `timeout` seconds it is kicked.
    #[pyo3(signature = (timeout=None, *, port_read=None, port_write=None, mmio_read=None, mmio_write=None))]
    fn run(
        &self,
        py: Python<'_>,
        timeout: Option<f64>,
        port_read: Option<Py<PyAny>>,
        port_write: Option<Py<PyAny>>,
        mmio_read: Option<Py<PyAny>>,
        mmio_write: Option<Py<PyAny>>,
    ) -> PyResult<VcpuExit> {
        let handlers = Handlers { port_read, port_write, mmio_read, mmio_write };
        let (sink, due) = (&self.sink, wait::deadline(timeout)?);
        if handlers.any() {
            self.run_until(py, due, |vcpu| vcpu.run_with(|io| handlers.answer(sink, io)))
        } else {
            self.run_until(py, due, vmcore::Vcpu::run)
        }
    }

    /// Runs the guest of a deterministic VM for at most `count` instructions; the VM's devices answer its I/O.
    fn run_instructions(&self, py: Python<'_>, count: u64) -> PyResult<VcpuExit> {
        let mut vcpu = self.lock()?;
        let mut left = count;
        loop {
            let turn = left.min(TURN);
            let vcpu = &mut *vcpu;
            let exit = py.detach(|| vcpu.run_instructions(turn));
            if let Some(error) = self.sink.take() {
                return Err(error);
            }
            let exit = exit.raise()?;
            py.check_signals()?;
            left -= turn;
            if exit != Exit::InstructionLimit || left == 0 {
                return Ok(VcpuExit(exit));
            }
        }
    }

    /// Ends the run that is under way, or the next one at its begin, with `VcpuExit.KICKED`. From any thread.
    fn kick(&self) {
        self.stopper.stop();
    }

    /// Sets the vCPU to run 16-bit real-mode code at the guest-physical address `at`, below 1 MiB.
    fn enter_real_mode(&self, at: u64) -> PyResult<()> {
        self.lock()?.enter_real_mode(GuestAddress(at)).raise()
    }

    /// What the vCPU stops for: every instruction, INT3.
    #[pyo3(signature = (*, single_step=false, software_breakpoints=false))]
    fn set_debug(&self, single_step: bool, software_breakpoints: bool) -> PyResult<()> {
        self.lock()?.set_debug(&DebugConfig { single_step, software_breakpoints, hardware: None }).raise()
    }

    /// What CPUID tells the guest: by leaf and subleaf, which is None of a leaf without, EAX, EBX, ECX and EDX.
    /// Set it before the first run.
    #[getter]
    fn cpuid(&self) -> PyResult<cpuid::Table> {
        Ok(cpuid::table(&self.lock()?.cpuid().raise()?))
    }

    #[setter]
    fn set_cpuid(&self, table: cpuid::Table) -> PyResult<()> {
        self.lock()?.set_cpuid(&cpuid::cpuid(table)).raise()
    }

    /// The guest-physical address of a guest-virtual one; None where nothing is mapped.
    fn translate(&self, gva: u64) -> PyResult<Option<u64>> {
        Ok(self.lock()?.translate(gva).raise()?.map(|at| at.0))
    }

    /// Raises a non-maskable interrupt.
    fn inject_nmi(&self) -> PyResult<()> {
        self.lock()?.inject_nmi().raise()
    }

    /// How often the vCPU left the guest, by reason.
    fn stats(&self) -> PyResult<std::collections::BTreeMap<&'static str, u64>> {
        Ok(stats::counts(&self.lock()?.stats()))
    }

    /// All of the vCPU's state as JSON.
    fn save(&self) -> PyResult<String> {
        let state = self.lock()?.save().raise()?;
        serde_json::to_string(&state).map_err(|e| crate::state::invalid("a vCPU", &e))
    }

    /// Takes over a state from `save`, of any backend.
    fn restore(&self, state: &str) -> PyResult<()> {
        let state = serde_json::from_str(state).map_err(|e| crate::state::invalid("a vCPU", &e))?;
        self.lock()?.restore(&state).raise()
    }

    fn __repr__(&self) -> String {
        format!("<Vcpu {}>", self.id)
    }
}
