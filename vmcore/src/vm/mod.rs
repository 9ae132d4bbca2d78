//! Virtual machines: bare ones and built ones.

mod attach;
mod builder;
mod clock;
mod hash;
mod io_thread;
mod platform;
mod run;
mod thread_clock;
mod turns;

pub use attach::{Attach, Machine};
pub use builder::VmBuilder;
pub use clock::{Clock, Entropy};
pub use io_thread::{EventSet, IoThread, Watch};
pub use platform::Platform;
pub use run::{Control, Outcome, Paused, ResetCause, VmHandle, VmState};
pub use turns::Timer;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::backend::{
    Backend, BackendConfig, BackendVm, DoorbellConfig, IrqRoute, Registration, Slot, VcpuStats,
};
use crate::bus::Bus;
use crate::deterministic::{Deterministic, StateHash};
use crate::error::{Error, Result};
use crate::host::{self, Accel};
use crate::irq::{IrqLine, IrqSink, Msi};
use crate::memory::{DirtyBitmap, GuestAddress, GuestMemory, MemoryError, MemoryRegion};
use crate::vcpu::{Buses, Vcpu};
use run::{Shared, Threads};
use turns::Turns;

/// A virtual machine.
///
/// There are two levels. A *bare* VM ([`Vm::bare`]) has nothing: map memory, create vCPUs, set their
/// registers, run them on your own threads. A *built* one ([`Vm::builder`]) has memory, vCPUs,
/// devices and something to boot, and [`Vm::run`] runs all of it until the guest ends.
///
/// Many VMs can live in one process; nothing is shared between them. Dropping one at any moment
/// stops its threads and frees everything it had.
pub struct Vm {
    /// First, so that vCPU threads end before anything they use goes.
    threads: Threads,
    inside: Arc<Inside>,
}

/// What a VM consists of, besides its threads.
pub(crate) struct Inside {
    vcpus: Vec<Arc<Mutex<Vcpu>>>,
    ports: Bus,
    mmio: Bus,
    io_threads: Vec<IoThread>,
    /// Of a deterministic VM.
    turns: Option<Arc<Mutex<Turns>>>,
    kept: Mutex<Vec<attach::Kept>>,
    memory: GuestMemory,
    slots: Mutex<BTreeMap<u64, Slot>>,
    vm: Arc<dyn BackendVm>,
    backend: Arc<dyn Backend>,
    why: String,
}

impl Vm {
    /// A VM without memory, devices and interrupt controllers, for code that does it all itself.
    ///
    /// # Errors
    /// Where no backend can be used, or it refuses to make a VM.
    pub fn bare(accel: Accel) -> Result<Self> {
        let (backend, why) = host::choose(accel)?;
        Self::on(backend, why, &BackendConfig::default())
    }

    /// As [`Vm::bare`], on a backend that is open already and with its settings chosen: interrupt
    /// controllers, for example.
    ///
    /// # Errors
    /// Where the backend refuses to make a VM.
    pub fn bare_on(backend: Arc<dyn Backend>, config: &BackendConfig) -> Result<Self> {
        Self::on(backend, "chosen by the caller".into(), config)
    }

    /// As [`Vm::bare_on`], a VM that does the same in every run ([`crate::deterministic`]): its vCPUs are run
    /// by [`Vcpu::run_instructions`], one at a time.
    ///
    /// # Errors
    /// As [`Vm::bare_on`], and [`Error::Unsupported`] on another backend than the software CPU.
    pub fn bare_deterministic(
        backend: Arc<dyn Backend>,
        config: &BackendConfig,
        deterministic: Deterministic,
    ) -> Result<Self> {
        let vm = backend.create_deterministic_vm(config, deterministic)?;
        Ok(Self::assemble(Inside::new(vm, backend, "chosen by the caller".into()), Arc::default()))
    }

    fn on(backend: Arc<dyn Backend>, why: String, config: &BackendConfig) -> Result<Self> {
        let vm = backend.create_vm(config)?;
        Ok(Self::assemble(Inside::new(vm, backend, why), Arc::default()))
    }

    /// Begins a VM with devices and something to boot.
    pub fn builder() -> VmBuilder {
        VmBuilder::default()
    }

    fn assemble(inside: Inside, shared: Arc<Shared>) -> Self {
        Self { threads: Threads::new(shared, &inside.vcpus, inside.turns.clone()), inside: Arc::new(inside) }
    }

    /// Name of the backend that runs the VM.
    pub fn backend(&self) -> &'static str {
        self.inside.backend.name()
    }

    /// Why this backend was taken.
    pub fn backend_reason(&self) -> &str {
        &self.inside.why
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.inside.memory
    }

    /// The I/O ports. Devices can be added and removed while the guest runs.
    pub fn ports(&self) -> &Bus {
        &self.inside.ports
    }

    /// The addresses of devices. Devices can be added and removed while the guest runs.
    pub fn mmio(&self) -> &Bus {
        &self.inside.mmio
    }

    /// Makes `region` guest memory. May be called while the guest runs.
    ///
    /// # Errors
    /// [`MemoryError::Overlap`] with other memory, [`Error::Conflict`] with a device,
    /// [`MemoryError::NoSlots`], and what the host refuses; nothing is changed then.
    pub fn map(&self, region: MemoryRegion) -> Result<()> {
        self.inside.map(Arc::new(region))
    }

    /// Takes the memory that begins at `base` away from the guest and returns it. May be called
    /// while the guest runs: what it accesses there afterwards is I/O.
    ///
    /// # Errors
    /// [`MemoryError::NoRegion`], listing the bases there are.
    pub fn unmap(&self, base: GuestAddress) -> Result<Arc<MemoryRegion>> {
        self.inside.unmap(base)
    }

    /// Takes the pages of the region at `base` that were written since the last call, by the guest
    /// and by the host, and clears them.
    ///
    /// # Errors
    /// [`MemoryError::NoRegion`], and where the region does not track writes.
    pub fn take_dirty(&self, base: GuestAddress) -> Result<DirtyBitmap> {
        self.inside.take_dirty(base)
    }

    /// Makes vCPU number `id`, to be run by the caller.
    ///
    /// # Errors
    /// Where the id is taken or the backend refuses.
    pub fn create_vcpu(&self, id: u32) -> Result<Vcpu> {
        self.inside.create_vcpu(id)
    }

    /// The wire into global system interrupt `gsi`.
    pub fn irq_line(&self, gsi: u32) -> IrqLine {
        let sink: Arc<dyn IrqSink> = self.inside.vm.clone();
        IrqLine::new(sink, gsi)
    }

    /// Delivers a message-signalled interrupt.
    ///
    /// # Errors
    /// Where the VM has no interrupt controllers.
    pub fn send_msi(&self, msi: Msi) -> Result<()> {
        self.inside.vm.send_msi(msi)
    }

    /// An event that raises `route` when it is written.
    ///
    /// # Errors
    /// As [`BackendVm::irq_event`].
    pub fn irq_event(&self, route: IrqRoute) -> Result<Registration> {
        self.inside.vm.irq_event(route)
    }

    /// An event that a guest's write signals.
    ///
    /// # Errors
    /// As [`BackendVm::doorbell`].
    pub fn doorbell(&self, config: DoorbellConfig) -> Result<Registration> {
        self.inside.vm.doorbell(config)
    }

    /// Runs the guest until it ends, or somebody stops it. Starts one thread per vCPU at the first
    /// call; they wait between runs.
    ///
    /// # Errors
    /// What kept the guest from running on, and [`Error::WrongState`] where it has ended before or
    /// the VM is bare.
    pub fn run(&mut self) -> Result<Outcome> {
        self.run_until(None, u64::MAX)
    }

    /// As [`Vm::run`], for `limit` at most: then the outcome is [`Outcome::TimeLimit`], and another
    /// run goes on where this one stopped.
    ///
    /// # Errors
    /// As [`Vm::run`].
    pub fn run_for(&mut self, limit: Duration) -> Result<Outcome> {
        self.run_until(Instant::now().checked_add(limit), u64::MAX)
    }

    /// As [`Vm::run`] of a deterministic VM, for `count` instructions of all its vCPUs together: then the
    /// outcome is [`Outcome::InstructionLimit`], and another run goes on where this one stopped, as if it
    /// had not. A guest that sleeps for ever executes none.
    ///
    /// ```no_run
    /// # fn main() -> vmcore::Result<()> {
    /// use vmcore::boot::Linux;
    /// use vmcore::{Deterministic, Outcome, Vm};
    ///
    /// let mut vm = Vm::builder()
    ///     .deterministic(Deterministic::seeded(7))
    ///     .boot(Linux::new("vmlinuz"))
    ///     .build()?;
    /// while vm.run_instructions(100_000_000)? == Outcome::InstructionLimit {
    ///     println!("{} {}", vm.instructions().unwrap_or(0), vm.state_hash()?);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`Vm::run`], and [`Error::WrongState`] where the VM is not deterministic.
    pub fn run_instructions(&mut self, count: u64) -> Result<Outcome> {
        let Some(executed) = self.instructions() else {
            return Err(Error::WrongState {
                op: "count instructions",
                state: "one that goes with the host's time",
                fix: "build it with VmBuilder::deterministic",
            });
        };
        self.run_until(None, executed.saturating_add(count))
    }

    /// How many instructions the vCPUs of a deterministic VM have executed; `None` of another.
    pub fn instructions(&self) -> Option<u64> {
        self.inside.vm.world().map(|world| world.instructions())
    }

    /// A fingerprint of all of the VM's state, for which it stands still: see [`StateHash`].
    ///
    /// # Errors
    /// As [`VmHandle::pause`], and where the host or a device refuses to give its state.
    pub fn state_hash(&self) -> Result<StateHash> {
        self.handle().pause()?.state_hash()
    }

    fn run_until(&mut self, deadline: Option<Instant>, limit: u64) -> Result<Outcome> {
        if self.inside.vcpus.is_empty() {
            return Err(Error::WrongState {
                op: "run",
                state: "bare",
                fix: "run the vCPUs from create_vcpu yourself, or use Vm::builder",
            });
        }
        self.threads.run(deadline, limit, &self.inside.io_threads, || self.inside.retry())
    }

    /// A handle for other threads: pause, resume, stop.
    pub fn handle(&self) -> VmHandle {
        VmHandle { shared: self.threads.shared.clone(), inside: Arc::downgrade(&self.inside) }
    }

    /// The machine's off and reset switch, as devices have it.
    pub fn control(&self) -> Control {
        Control(self.threads.shared.clone())
    }

    /// What the VM did so far.
    ///
    /// # Errors
    /// Where the VM is running on another thread's account and cannot be held; see
    /// [`VmHandle::pause`].
    pub fn stats(&self) -> Result<VmStats> {
        self.handle().stats()
    }
}

/// What a VM did so far.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct VmStats {
    /// Exits by reason, of each vCPU.
    pub vcpus: Vec<VcpuStats>,
    /// When the first vCPU first entered the guest.
    pub first_entry: Option<Instant>,
    /// The backend's own statistics of the VM, as name and value; empty where it has none.
    pub backend_vm: Vec<(String, u64)>,
    /// The same of each vCPU.
    pub backend_vcpus: Vec<Vec<(String, u64)>>,
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.threads.end();
        // Callbacks may own handles on what they serve; they go here and not with the last of those.
        for thread in &self.inside.io_threads {
            thread.stop();
        }
        drop(std::mem::take(&mut *self.inside.kept.lock().unwrap_or_else(PoisonError::into_inner)));
    }
}

impl fmt::Debug for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm")
            .field("backend", &self.backend())
            .field("vcpus", &self.inside.vcpus.len())
            .field("memory", &self.inside.memory.ranges())
            .field("ports", &self.inside.ports)
            .field("mmio", &self.inside.mmio)
            .finish_non_exhaustive()
    }
}

impl Inside {
    fn new(vm: Arc<dyn BackendVm>, backend: Arc<dyn Backend>, why: String) -> Self {
        Self {
            vcpus: Vec::new(),
            ports: Bus::new("port range"),
            mmio: Bus::new("MMIO window"),
            io_threads: Vec::new(),
            turns: None,
            kept: Mutex::default(),
            memory: GuestMemory::new(),
            slots: Mutex::default(),
            vm,
            backend,
            why,
        }
    }

    /// Has every device try again what the host failed to do.
    fn retry(&self) {
        for (_, device) in self.ports.devices().into_iter().chain(self.mmio.devices()) {
            device.lock().unwrap_or_else(PoisonError::into_inner).retry();
        }
    }

    fn slots(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn map(&self, region: Arc<MemoryRegion>) -> Result<()> {
        let mut slots = self.slots();
        let new = region.range();
        if let Some((base, last)) = self.mmio.overlapping(new.base, new.len) {
            return Err(Error::Conflict {
                kind: "memory",
                new: new.to_string(),
                existing: format!("the device at [{base:#x}..={last:#x}]"),
            });
        }
        let limit = self.vm.max_slots();
        let used: BTreeSet<Slot> = slots.values().copied().collect();
        let Some(slot) = (0..limit).map(Slot).find(|slot| !used.contains(slot)) else {
            return Err(MemoryError::NoSlots { new, limit, backend: self.vm.name() }.into());
        };
        let base = region.base();
        self.memory.insert(region.clone())?;
        if let Err(error) = self.vm.map(slot, region) {
            self.memory.remove(base)?;
            return Err(error);
        }
        slots.insert(base.0, slot);
        Ok(())
    }

    fn slot(&self, slots: &BTreeMap<u64, Slot>, base: GuestAddress) -> Result<Slot, MemoryError> {
        slots
            .get(&base.0)
            .copied()
            .ok_or_else(|| MemoryError::NoRegion { base: base.0, known: slots.keys().copied().collect() })
    }

    fn unmap(&self, base: GuestAddress) -> Result<Arc<MemoryRegion>> {
        let mut slots = self.slots();
        let slot = self.slot(&slots, base)?;
        self.vm.unmap(slot)?;
        slots.remove(&base.0);
        Ok(self.memory.remove(base)?)
    }

    fn take_dirty(&self, base: GuestAddress) -> Result<DirtyBitmap> {
        let slots = self.slots();
        let slot = self.slot(&slots, base)?;
        let mut dirty = self.vm.take_dirty(slot)?;
        let map = self.memory.snapshot();
        if let Some(by_host) = map.find(base).and_then(|region| region.take_host_dirty()) {
            dirty.merge(&by_host);
        }
        Ok(dirty)
    }

    fn create_vcpu(&self, id: u32) -> Result<Vcpu> {
        let inner = self.vm.create_vcpu(id)?;
        let buses = Buses { ports: self.ports.reader(), mmio: self.mmio.reader() };
        Ok(Vcpu::new(id, inner, buses, self.vm.clone()))
    }
}
