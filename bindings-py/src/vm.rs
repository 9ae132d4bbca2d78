//! Virtual machines.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use pyo3::exceptions::PyResourceWarning;
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use vmcore::backend::BackendConfig;
use vmcore::{Accel, Deterministic, GuestAddress, GuestMemory, Msi};
use vmdevices::legacy::PowerButton;
use vmdevices::{Pc, Rng};

use crate::balloon::Balloon;
use crate::boot::{self, Image, Transport, virtio_attachment};
use crate::callback::{self, Sink};
use crate::console::{Console, Destination, Talk};
use crate::device::{IrqLine, PythonBus};
use crate::disk::{Disk, Handle};
use crate::error::{self, Raise};
use crate::host::escape;
use crate::map;
use crate::memory::Memory;
use crate::net::Net;
use crate::outcome::Outcome;
use crate::plan::{BalloonArg, DiskArg, NetArg, Plan, Size};
use crate::runner::{Limit, Runner, Slot};
use crate::state::Paused;
use crate::stats::Stats;
use crate::vcpu::Vcpu;
use crate::vsock::Vsock;
use crate::wait;

/// What lives until a VM is closed, or the interpreter ends.
static ALIVE: Mutex<Vec<Weak<Inner>>> = Mutex::new(Vec::new());

/// A virtual machine.
///
/// With a kernel it is built with a PC's devices, and `run` runs it until the guest ends. `Vm.bare` makes one
/// without anything: map memory, create vCPUs, run them. Use it in a with block, or close it.
#[pyclass(frozen, weakref, module = "vmcore")]
pub struct Vm {
    inner: Arc<Inner>,
}

struct Inner {
    slot: Slot,
    handle: vmcore::VmHandle,
    control: vmcore::Control,
    memory: GuestMemory,
    /// Ports and addresses; gone with the VM, or its devices would live on.
    buses: Mutex<Option<Buses>>,
    backend: &'static str,
    reason: String,
    cpus: u32,
    runner: Arc<Runner>,
    sink: Arc<Sink>,
    talk: Option<Talk>,
    power: Option<PowerButton>,
    disks: Vec<Handle>,
    closed: Arc<AtomicBool>,
}

#[derive(Clone)]
struct Buses {
    ports: vmcore::Bus,
    mmio: vmcore::Bus,
}

impl Inner {
    fn new(
        vm: vmcore::Vm,
        sink: Arc<Sink>,
        cpus: u32,
        talk: Option<Talk>,
        power: Option<PowerButton>,
        disks: Vec<Handle>,
    ) -> Arc<Self> {
        sink.controls(vm.control());
        let inner = Arc::new(Self {
            handle: vm.handle(),
            control: vm.control(),
            memory: vm.memory().clone(),
            buses: Mutex::new(Some(Buses { ports: vm.ports().clone(), mmio: vm.mmio().clone() })),
            backend: vm.backend(),
            reason: vm.backend_reason().to_owned(),
            slot: Arc::new(Mutex::new(Some(vm))),
            cpus,
            runner: Arc::default(),
            sink,
            talk,
            power,
            disks,
            closed: Arc::default(),
        });
        let mut alive = ALIVE.lock().unwrap_or_else(PoisonError::into_inner);
        alive.retain(|one| one.strong_count() > 0);
        alive.push(Arc::downgrade(&inner));
        inner
    }

    /// Ends whatever runs, and frees everything. Without the GIL, which its threads may want.
    fn close(&self) {
        if !self.closed.swap(true, Ordering::SeqCst) {
            self.handle.stop();
            self.sink.stop_vcpus();
            self.runner.settle();
            let vm = self.slot.lock().unwrap_or_else(PoisonError::into_inner).take();
            drop(vm);
            drop(self.buses.lock().unwrap_or_else(PoisonError::into_inner).take());
            self.disks.iter().for_each(Handle::close);
            // Whoever still has this VM's memory does not keep the host's; buffers keep their region.
            for range in self.memory.ranges() {
                // It is there, and else there is nothing to free.
                let _ = self.memory.remove(GuestAddress(range.base));
            }
        }
    }

    fn buses(&self) -> PyResult<Buses> {
        let buses = self.buses.lock().unwrap_or_else(PoisonError::into_inner).clone();
        buses.ok_or_else(|| error::closed("a VM"))
    }
}

/// Closes all VMs that there are: what the interpreter does before it ends.
#[pyfunction]
#[pyo3(name = "_close_all")]
pub fn close_all(py: Python<'_>) {
    let alive = std::mem::take(&mut *ALIVE.lock().unwrap_or_else(PoisonError::into_inner));
    py.detach(|| alive.iter().filter_map(Weak::upgrade).for_each(|inner| inner.close()));
}

impl Vm {
    fn open(&self) -> PyResult<&Inner> {
        if self.inner.closed.load(Ordering::SeqCst) {
            return Err(error::closed("a VM"));
        }
        Ok(&self.inner)
    }

    /// Does something with the VM, where no run has it.
    pub fn with<T: Send>(
        &self,
        py: Python<'_>,
        op: &'static str,
        act: impl FnOnce(&vmcore::Vm) -> vmcore::Result<T> + Send,
    ) -> PyResult<T> {
        let inner = self.open()?;
        let running = || error::wrong_state(op, "running", "do it before the run or after it");
        let done = py.detach(|| {
            let slot = inner.slot.try_lock().ok()?;
            slot.as_ref().map(act)
        });
        done.ok_or_else(running)?.raise()
    }

    fn begin(&self, limit: Limit) -> PyResult<()> {
        let inner = self.open()?;
        let bell = inner.talk.as_ref().map(|talk| talk.bell.clone());
        inner.runner.start(&inner.slot, limit, &inner.sink, bell)
    }

    /// Runs to the end; what a signal handler raises stops the guest first.
    fn complete(
        &self,
        py: Python<'_>,
        limit: Limit,
        progress: Option<(Py<PyAny>, f64)>,
    ) -> PyResult<Outcome> {
        callback::refuse_inside("run")?;
        self.begin(limit)?;
        let inner = &self.inner;
        let ended = match progress {
            None => inner.runner.wait(py, None),
            Some((function, interval)) => loop {
                match inner.runner.wait(py, wait::deadline(Some(interval))?) {
                    Ok(None) => {
                        let told = self.stats(py).and_then(|stats| function.call1(py, (stats,)));
                        if let Err(error) = told {
                            break Err(error);
                        }
                    }
                    ended => break ended,
                }
            },
        };
        match ended {
            // Without a deadline there is no other end.
            Ok(outcome) => Ok(Outcome(outcome.unwrap_or(vmcore::Outcome::Stopped))),
            Err(error) => {
                if inner.runner.is_running() {
                    py.detach(|| {
                        inner.handle.stop();
                        inner.runner.settle();
                    });
                }
                Err(error)
            }
        }
    }
}

#[pymethods]
impl Vm {
    #[new]
    #[pyo3(signature = (
        *, kernel=None, initrd=None, cmdline="", entry="auto", memory=Size::Bytes(128 << 20), cpus=1, cpu="best",
        accel="auto", irqchip=true, acpi=true, huge_pages="default", numa=None, tsc_khz=None, deterministic=None, pc=true, console=None, exit_port=None,
        disks=Vec::new(), nets=Vec::new(), rng=true, balloon=None, vsock=None, transport="mmio", devices=Vec::new()
    ))]
    #[expect(clippy::too_many_arguments, reason = "keywords in Python")]
    #[expect(clippy::fn_params_excessive_bools, reason = "keywords in Python")]
    fn new(
        py: Python<'_>,
        kernel: Option<Image>,
        initrd: Option<Image>,
        cmdline: &str,
        entry: &str,
        memory: Size,
        cpus: u32,
        cpu: &str,
        accel: &str,
        irqchip: bool,
        acpi: bool,
        huge_pages: &str,
        numa: Option<(String, Vec<u32>)>,
        tsc_khz: Option<u32>,
        deterministic: Option<u64>,
        pc: bool,
        console: Option<Bound<'_, PyAny>>,
        exit_port: Option<u16>,
        disks: Vec<DiskArg>,
        nets: Vec<NetArg>,
        rng: bool,
        balloon: Option<BalloonArg>,
        vsock: Option<Py<Vsock>>,
        transport: &str,
        devices: Vec<Py<PyAny>>,
    ) -> PyResult<Self> {
        let sink = Arc::<Sink>::default();
        let memory = memory.bytes()?;
        let accel = accel.parse().raise()?;
        let cpu = cpu.parse().raise()?;
        let boot = kernel.map(|kernel| boot::boot(kernel, initrd, cmdline, entry)).transpose()?;
        let transport = Transport::named(transport)?;
        let destination = match &console {
            Some(console) => Destination::of(Some(console))?,
            None => Destination::Memory,
        };
        if !pc && (console.is_some() || exit_port.is_some()) {
            return Err(error::config(
                "console and exit_port",
                "given with pc=False",
                "leave them out, or pc",
            ));
        }
        let (mut board, mut talk, mut power) = (None, None, None);
        if pc {
            let (device, script) = destination.open(&sink)?;
            talk = script;
            let mut made = Pc::new().serial(device);
            if let Some(port) = exit_port {
                made = made.exit_port(port);
            }
            power = Some(made.power_button());
            board = Some(made);
        }
        let mut attachments = Vec::new();
        let mut held = Vec::new();
        let some_disk = !disks.is_empty();
        for disk in disks {
            let disk = match disk {
                DiskArg::Disk(disk) => {
                    let taken = disk.get().take(cpus)?;
                    held.push(disk.get().handle());
                    taken
                }
                DiskArg::Path(path) => Disk::open(py, path)?.take(cpus)?,
            };
            attachments.push(virtio_attachment(disk));
        }
        for net in nets {
            let card = match net {
                NetArg::Net(net) => net.get().take()?,
                NetArg::Name(name) if name == "nat" => Net::plain_nat()?.take()?,
                NetArg::Name(other) => {
                    return Err(error::config("network", other, "give \"nat\", or what Net or Hub makes"));
                }
            };
            attachments.push(virtio_attachment(card));
        }
        let balloon = match balloon {
            Some(BalloonArg::Balloon(balloon)) => Some(balloon.get().take()?),
            Some(BalloonArg::Wanted(true)) => Some(Balloon::new(0, true, true)?.take()?),
            _ => None,
        };
        attachments.extend(balloon.map(virtio_attachment));
        if let Some(vsock) = vsock {
            attachments.push(virtio_attachment(vsock.get().take()?));
        }
        // As vmrun: a guest with a disk is a system that wants keys.
        if rng && some_disk {
            attachments.push(virtio_attachment(Rng::new()));
        }
        let plan = Plan {
            accel,
            memory,
            backed: Box::new(map::settings(huge_pages, numa)?),
            cpus,
            cpu,
            irqchip,
            acpi,
            tsc_khz,
            deterministic,
            boot,
            pc: board,
            attachments,
            transport,
            devices,
        };
        let built = py.detach(|| plan.build(&sink));
        // What a device's attach raised says more than that it did.
        if let Some(error) = sink.take() {
            py.detach(|| drop(built));
            return Err(error);
        }
        Ok(Self { inner: Inner::new(built.raise()?, sink, cpus, talk, power, held) })
    }

    /// A VM without memory and devices, for code that does it all itself: map, create_vcpu, run.
    /// With the seed `deterministic` it does the same in every run, by `Vcpu.run_instructions`.
    #[staticmethod]
    #[pyo3(signature = (*, accel="auto", irqchip=false, deterministic=None))]
    fn bare(py: Python<'_>, accel: &str, irqchip: bool, deterministic: Option<u64>) -> PyResult<Self> {
        let accel: Accel = accel.parse().raise()?;
        let vm = py.detach(|| {
            let accel = if deterministic.is_some() && accel == Accel::Auto { Accel::Soft } else { accel };
            let (config, seeded) = (BackendConfig { irqchip }, deterministic.map(Deterministic::seeded));
            match (irqchip, seeded) {
                (false, None) => vmcore::Vm::bare(accel),
                (true, None) => vmcore::Vm::bare_on(vmcore::host::choose(accel)?.0, &config),
                (_, Some(seeded)) => {
                    vmcore::Vm::bare_deterministic(vmcore::host::choose(accel)?.0, &config, seeded)
                }
            }
        });
        Ok(Self { inner: Inner::new(vm.raise()?, Arc::default(), 0, None, None, Vec::new()) })
    }

    /// Runs the guest until it ends, or for `timeout` seconds: then the outcome is TIME_LIMIT, and another
    /// run goes on. Other threads of Python run meanwhile. What a signal handler raises (Ctrl-C:
    /// KeyboardInterrupt) and what a device's callback raises stop the guest and come out of it. Every
    /// `interval` seconds `progress` is called with the VM's Stats.
    #[pyo3(signature = (timeout=None, *, progress=None, interval=1.0))]
    fn run(
        &self,
        py: Python<'_>,
        timeout: Option<f64>,
        progress: Option<Py<PyAny>>,
        interval: f64,
    ) -> PyResult<Outcome> {
        let limit = wait::seconds(timeout)?.map_or(Limit::None, Limit::Time);
        self.complete(py, limit, progress.map(|progress| (progress, interval)))
    }

    /// As run, of a deterministic VM, for `count` instructions of all its vCPUs together.
    fn run_instructions(&self, py: Python<'_>, count: u64) -> PyResult<Outcome> {
        self.complete(py, Limit::Instructions(count), None)
    }

    /// Begins a run on a thread of its own, and returns.
    #[pyo3(signature = (timeout=None))]
    fn start(&self, timeout: Option<f64>) -> PyResult<()> {
        self.begin(wait::seconds(timeout)?.map_or(Limit::None, Limit::Time))
    }

    /// Waits for the end of the run that `start` began, and says how it ended: as often as it is asked. A
    /// signal ends the wait, not the run.
    #[pyo3(signature = (timeout=None))]
    fn wait(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<Outcome> {
        callback::refuse_inside("wait")?;
        let inner = self.open()?;
        match inner.runner.wait(py, wait::deadline(timeout)?)? {
            Some(outcome) => Ok(Outcome(outcome)),
            None => Err(error::timeout(
                &format!("the guest runs on after {} s", timeout.unwrap_or_default()),
                "wait longer, or stop it",
            )),
        }
    }

    /// Calls `function()` on another thread when the run that is under way has ended, or now where none is.
    fn when_ended(&self, py: Python<'_>, function: Py<PyAny>) -> PyResult<()> {
        match self.inner.runner.when_ended(function) {
            Some(function) => function.call0(py).map(drop),
            None => Ok(()),
        }
    }

    /// Whether a run is under way.
    #[getter]
    fn running(&self) -> bool {
        self.inner.runner.is_running()
    }

    /// Ends the run that is under way, or the next one at its begin, with STOPPED. From any thread.
    fn stop(&self, py: Python<'_>) -> PyResult<()> {
        let inner = self.open()?;
        py.detach(|| inner.control.end(vmcore::Outcome::Stopped));
        Ok(())
    }

    /// Holds all vCPUs and device threads until the pause is resumed, or its with block ends.
    fn pause(&self, py: Python<'_>) -> PyResult<Paused> {
        callback::refuse_inside("pause")?;
        let inner = self.open()?;
        Ok(Paused::new(py.detach(|| inner.handle.pause()).raise()?))
    }

    /// Presses the machine's power button; whether there is a guest to notice.
    fn press_power_button(&self) -> PyResult<bool> {
        Ok(self.open()?.power.as_ref().is_some_and(PowerButton::press))
    }

    /// What the VM did so far, also while it runs.
    fn stats(&self, py: Python<'_>) -> PyResult<Stats> {
        callback::refuse_inside("take statistics")?;
        let inner = self.open()?;
        Ok(Stats(py.detach(|| inner.handle.stats()).raise()?))
    }

    /// How many instructions a deterministic VM has executed; None of another.
    #[getter]
    fn instructions(&self, py: Python<'_>) -> PyResult<Option<u64>> {
        self.with(py, "count instructions", |vm| Ok(vm.instructions()))
    }

    /// The guest's memory.
    #[getter]
    fn memory(&self) -> Memory {
        Memory { memory: self.inner.memory.clone(), closed: self.inner.closed.clone() }
    }

    /// The guest's serial console, which is in memory unless `console=` says otherwise.
    #[getter]
    fn console(&self) -> PyResult<Console> {
        let fix = "leave out console= and pc=False";
        let talk = self.inner.talk.clone();
        let talk =
            talk.ok_or_else(|| error::wrong_state("talk to the guest", "without a console in memory", fix))?;
        Ok(Console { talk, runner: self.inner.runner.clone() })
    }

    /// Name of the backend that runs the VM.
    #[getter]
    fn backend(&self) -> &'static str {
        self.inner.backend
    }

    /// Why this backend was taken.
    #[getter]
    fn backend_reason(&self) -> &str {
        &self.inner.reason
    }

    /// How many vCPUs the VM was built with; 0 of a bare one.
    #[getter]
    fn cpus(&self) -> u32 {
        self.inner.cpus
    }

    /// Whether the VM is closed.
    #[getter]
    fn closed(&self) -> bool {
        self.inner.closed.load(Ordering::SeqCst)
    }

    /// Makes vCPU number `id`, to be run by the caller.
    #[pyo3(signature = (id=0))]
    fn create_vcpu(&self, py: Python<'_>, id: u32) -> PyResult<Vcpu> {
        let vcpu = self.with(py, "create a vCPU", |vm| vm.create_vcpu(id))?;
        Ok(Vcpu::new(vcpu, self.inner.sink.clone(), self.inner.closed.clone()))
    }

    /// Puts `device` at `length` I/O ports from `base`, while the guest runs too.
    fn add_ports(&self, base: u16, length: u16, device: &Bound<'_, PyAny>) -> PyResult<()> {
        let inner = self.open()?;
        inner
            .buses()?
            .ports
            .insert(base.into(), length.into(), PythonBus::shared(device, &inner.sink)?)
            .raise()
    }

    /// Puts `device` at `length` bytes of guest-physical addresses from `base`, while the guest runs too.
    fn add_mmio(&self, base: u64, length: u64, device: &Bound<'_, PyAny>) -> PyResult<()> {
        let inner = self.open()?;
        inner.buses()?.mmio.insert(base, length, PythonBus::shared(device, &inner.sink)?).raise()
    }

    /// Takes the device at port `base` away; whether there was one.
    fn remove_ports(&self, base: u16) -> PyResult<bool> {
        Ok(self.open()?.buses()?.ports.remove(base.into()).is_some())
    }

    /// Takes the device at address `base` away; whether there was one.
    fn remove_mmio(&self, base: u64) -> PyResult<bool> {
        Ok(self.open()?.buses()?.mmio.remove(base).is_some())
    }

    /// The wire into global system interrupt `gsi`, 0 to 23, of a VM with interrupt controllers.
    fn irq_line(&self, py: Python<'_>, gsi: u32) -> PyResult<IrqLine> {
        self.with(py, "make a wire", |vm| Ok(IrqLine(vm.irq_line(gsi))))
    }

    /// Delivers a message-signalled interrupt: a write of `data` to `address`.
    fn send_msi(&self, py: Python<'_>, address: u64, data: u32) -> PyResult<()> {
        self.with(py, "send a message", |vm| vm.send_msi(Msi { address, data }))
    }

    /// Stops the guest and frees everything. More than once does nothing.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        callback::refuse_inside("close")?;
        py.detach(|| self.inner.close());
        Ok(())
    }

    fn __enter__(slf: Bound<'_, Self>) -> PyResult<Bound<'_, Self>> {
        slf.get().open()?;
        Ok(slf)
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyTuple>) -> PyResult<()> {
        self.close(py)
    }

    fn _repr_html_(&self) -> String {
        let ranges = self.inner.memory.ranges().iter().map(ToString::to_string).collect::<Vec<_>>();
        let state = self.state();
        let rows = [
            ("state", state.as_str()),
            ("backend", self.inner.backend),
            ("why", &self.inner.reason),
            ("vCPUs", &self.inner.cpus.to_string()),
            ("memory", &ranges.join(" ")),
        ];
        let rows: String = rows
            .iter()
            .map(|(name, value)| format!("<tr><th>{name}</th><td>{}</td></tr>", escape(value)))
            .collect();
        format!("<table>{rows}</table>")
    }

    fn __repr__(&self) -> String {
        let mib = self.inner.memory.total_bytes() >> 20;
        format!("<Vm {} {} vcpus={} memory={mib}M>", self.state(), self.inner.backend, self.inner.cpus)
    }
}

impl Vm {
    /// What it is doing, for people.
    fn state(&self) -> String {
        if self.closed() {
            "closed".into()
        } else if self.running() {
            "running".into()
        } else {
            self.inner.runner.ended().unwrap_or_else(|| "new".into())
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if self.closed() {
            return;
        }
        let inner = self.inner.clone();
        // Without an interpreter nobody is told, and the VM goes with the process.
        Python::try_attach(|py| {
            let text = c"a vmcore.Vm was not closed; use it in a with block, or call close()";
            if let Err(error) = PyErr::warn(py, &py.get_type::<PyResourceWarning>(), text, 1) {
                error.write_unraisable(py, None);
            }
            if callback::called_by_vm() {
                // The guest waits for this thread: its end is another's to see.
                std::thread::spawn(move || inner.close());
            } else {
                py.detach(|| inner.close());
            }
        });
    }
}
