//! Devices written in Python, and the machine they are put on.
#![expect(unsafe_code, reason = "Python holds the machine beyond what the compiler can follow")]

use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, ThreadId};

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use vmcore::{BusDevice, Error, GuestAddress, SharedDevice};
use vmdevices::virtio;

use crate::callback::{self, Sink};
use crate::error::{self, Raise};
use crate::memory::Memory;
use crate::outcome::Outcome;
use crate::virtio::PythonVirtio;

/// A device on a bus: an object with `read(offset, size)` and `write(offset, data)`.
pub struct PythonBus {
    pub object: Py<PyAny>,
    pub sink: Arc<Sink>,
}

impl PythonBus {
    pub fn shared(object: &Bound<'_, PyAny>, sink: &Arc<Sink>) -> PyResult<SharedDevice> {
        for method in ["read", "write"] {
            if !object.hasattr(method)? {
                let fix = "give it read(offset, size) and write(offset, data)";
                return Err(error::config("device", object.repr()?.to_string(), fix));
            }
        }
        Ok(Arc::new(Mutex::new(Self { object: object.clone().unbind(), sink: sink.clone() })))
    }
}

impl BusDevice for PythonBus {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // What a bus without a device answers, should it raise.
        data.fill(0xff);
        let object = &self.object;
        self.sink.call(|py| {
            let answer = object.bind(py).call_method1("read", (offset, data.len()))?;
            callback::fill(data, &answer)
        });
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let object = &self.object;
        self.sink
            .call(|py| object.bind(py).call_method1("write", (offset, PyBytes::new(py, data))).map(drop));
    }

    fn save(&self) -> vmcore::Result<Vec<u8>> {
        ask(&self.object, |object| match object.hasattr("save")? {
            true => object.call_method0("save")?.extract(),
            false => Ok(Vec::new()),
        })
    }

    fn restore(&mut self, state: &[u8]) -> vmcore::Result<()> {
        ask(&self.object, |object| match object.hasattr("restore")? {
            true => object.call_method1("restore", (PyBytes::new(object.py(), state),)).map(drop),
            false => Ok(()),
        })
    }
}

/// Calls Python for something that can fail.
fn ask<T>(object: &Py<PyAny>, call: impl FnOnce(&Bound<'_, PyAny>) -> PyResult<T>) -> vmcore::Result<T> {
    Python::try_attach(|py| call(object.bind(py)).map_err(|error| Error::device("in Python", error)))
        .unwrap_or_else(|| Err(Error::device("in Python", "the interpreter is gone")))
}

/// The machine's off switch, for devices to keep.
#[pyclass(frozen, module = "vmcore")]
pub struct Control {
    pub control: vmcore::Control,
}

#[pymethods]
impl Control {
    /// Ends the run that is under way, or the next one at its begin, with `outcome`.
    fn end(&self, outcome: &Outcome) {
        self.control.end(outcome.0);
    }

    /// Ends the run with a DeviceError that says `text`, for a device that cannot go on.
    fn fail(&self, text: String) {
        self.control.fail(Error::device("in Python", text));
    }
}

/// A device's interrupt wire.
#[pyclass(frozen, module = "vmcore")]
pub struct IrqLine(pub vmcore::IrqLine);

#[pymethods]
impl IrqLine {
    /// Sets the level.
    fn set_level(&self, py: Python<'_>, high: bool) {
        py.detach(|| self.0.set_level(high));
    }

    /// Raises and lowers the wire: one edge.
    fn pulse(&self, py: Python<'_>) {
        py.detach(|| self.0.pulse());
    }

    /// The level the wire has.
    #[getter]
    fn level(&self) -> bool {
        self.0.level()
    }
}

/// The machine while devices are attached to it: what `attach(machine)` of a device gets. It is of no use
/// afterwards.
#[pyclass(frozen, module = "vmcore")]
pub struct Machine {
    machine: Mutex<Option<Place>>,
    sink: Arc<Sink>,
    memory: Py<Memory>,
}

/// Where the machine is, and on which thread.
struct Place {
    machine: NonNull<vmcore::Machine>,
    thread: ThreadId,
}

// SAFETY: the pointer is followed on the thread that it was made on only (`Machine::with`).
unsafe impl Send for Place {}

impl Machine {
    /// Lets `device` put itself on `machine`.
    pub fn attach(device: &Py<PyAny>, machine: &mut vmcore::Machine, sink: &Arc<Sink>) -> vmcore::Result<()> {
        let mut raised = None;
        let done = Python::try_attach(|py| -> PyResult<()> {
            let memory = Py::new(py, Memory { memory: machine.memory().clone(), closed: Arc::default() })?;
            let place = Place { machine: NonNull::from(machine), thread: thread::current().id() };
            let proxy =
                Bound::new(py, Self { machine: Mutex::new(Some(place)), sink: sink.clone(), memory })?;
            let device = device.bind(py);
            let attached = match device.hasattr("attach")? {
                true => device.call_method1("attach", (&proxy,)),
                false => device.call1((&proxy,)),
            };
            // Before the machine can be anywhere else: whoever kept the proxy has nothing.
            proxy.get().machine.lock().unwrap_or_else(PoisonError::into_inner).take();
            attached.map(drop)
        });
        match done {
            Some(Ok(())) => return Ok(()),
            Some(Err(error)) => raised = Some(error),
            None => {}
        }
        let text = "its attach raised an exception";
        if let Some(error) = raised {
            sink.keep(error);
        }
        Err(Error::device("in Python", text))
    }

    /// Does something with the machine.
    fn with<T>(&self, act: impl FnOnce(&mut vmcore::Machine) -> T) -> PyResult<T> {
        let over = || error::wrong_state("attach a device", "built", "do it inside attach(machine)");
        let mut guard = self.machine.try_lock().map_err(|_| over())?;
        let place = guard.as_mut().filter(|place| place.thread == thread::current().id()).ok_or_else(over)?;
        // SAFETY: `attach` made it of a `&mut Machine` and takes it away before that borrow ends, while its
        // caller waits and does nothing with the machine. This is that same thread, and the lock keeps a
        // call of `act` from meeting another, so the reference is the only one.
        Ok(act(unsafe { place.machine.as_mut() }))
    }
}

#[pymethods]
impl Machine {
    /// Puts `device` at `length` I/O ports from `base`.
    fn ports(&self, base: u16, length: u16, device: &Bound<'_, PyAny>) -> PyResult<()> {
        let device = PythonBus::shared(device, &self.sink)?;
        self.with(|machine| machine.ports(base, length, device))?.raise()
    }

    /// Puts `device` at `length` bytes of guest-physical addresses from `base`.
    fn mmio(&self, base: u64, length: u64, device: &Bound<'_, PyAny>) -> PyResult<()> {
        let device = PythonBus::shared(device, &self.sink)?;
        self.with(|machine| machine.mmio(GuestAddress(base), length, device))?.raise()
    }

    /// Puts `device`, a VirtioDevice, behind virtio-mmio or virtio-pci.
    #[pyo3(signature = (device, *, transport="mmio"))]
    fn virtio(&self, device: &Bound<'_, PyAny>, transport: &str) -> PyResult<()> {
        let device = PythonVirtio::new(device, &self.sink)?;
        let attached: Box<dyn vmcore::Attach> = match crate::boot::Transport::named(transport)? {
            crate::boot::Transport::Mmio => Box::new(virtio::mmio(device)),
            crate::boot::Transport::Pci => Box::new(virtio::pci(device)),
        };
        self.with(|machine| attached.attach(machine))?.raise()
    }

    /// Sets aside `length` bytes of guest-physical addresses below 4 GiB, and gives the first.
    fn mmio_window(&self, length: u64) -> PyResult<u64> {
        Ok(self.with(|machine| machine.mmio_window(length))?.raise()?.0)
    }

    /// Gives out the number of a global system interrupt that the platform's own devices do not use.
    fn allocate_gsi(&self) -> PyResult<u32> {
        self.with(vmcore::Machine::allocate_gsi)
    }

    /// The wire into global system interrupt `gsi`.
    fn irq_line(&self, gsi: u32) -> PyResult<IrqLine> {
        self.with(|machine| IrqLine(machine.irq_line(gsi)))
    }

    /// Whether the machine has interrupt controllers.
    #[getter]
    fn has_irqchip(&self) -> PyResult<bool> {
        self.with(|machine| machine.has_irqchip())
    }

    /// Whether all that devices do must follow from what the guest does.
    #[getter]
    fn is_deterministic(&self) -> PyResult<bool> {
        self.with(|machine| machine.is_deterministic())
    }

    /// The machine's off switch, for devices to keep.
    #[getter]
    fn control(&self) -> PyResult<Control> {
        self.with(|machine| Control { control: machine.control() })
    }

    /// The guest's memory, for devices to keep.
    #[getter]
    fn memory(&self, py: Python<'_>) -> Py<Memory> {
        self.memory.clone_ref(py)
    }
}
