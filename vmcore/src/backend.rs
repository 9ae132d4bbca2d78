//! The backend contract: what KVM and the software CPU implement, and all that the rest of the
//! engine may know of them.
//!
//! A [`Backend`] makes [`BackendVm`]s, a VM makes [`BackendVcpu`]s. Everything here is safe:
//! [`BackendVm::map`] takes shared ownership of the memory, and state crosses as plain data
//! ([`crate::state`]). One test suite, `tests/contract`, runs on every backend.
//!
//! I/O is a callback ([`VcpuIo`]) and not an exit: a backend finishes the instruction before
//! [`BackendVcpu::run`] returns, so that [`BackendVcpu::save`] always sees a consistent vCPU.
//!
//! Interrupts: GSI `n` is IOAPIC pin `n`, ISA IRQ 0 (the PIT's) is pin 0, no override. [`IrqSink`]
//! says more.

use std::fmt;
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::cpuid::Cpuid;
use crate::deterministic::{Deterministic, World};
use crate::error::{Error, Result};
use crate::irq::{IrqSink, Msi};
use crate::memory::{DirtyBitmap, GuestAddress, MemoryRegion};
use crate::state::{MachineState, Regs, RunState, Sregs, VcpuState};

/// Something a backend may or may not offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Capability {
    /// LAPICs, IOAPIC, PICs and PIT inside the backend ([`BackendConfig::irqchip`]).
    Irqchip,
    /// [`BackendVm::take_dirty`].
    DirtyLog,
    /// [`BackendVm::doorbell`] without waking the vCPU's thread (ioeventfd).
    Doorbell,
    /// Memory regions that the guest cannot write.
    ReadOnlyMemory,
    /// [`BackendVcpu::set_debug`].
    Debug,
    /// [`BackendVcpu::save`] and [`BackendVm::save`] with restore.
    SaveRestore,
    /// Guest code runs at hardware speed in every privilege level.
    Hardware,
}

/// A kind of CPU: KVM or the software one. Methods may be called from any thread.
pub trait Backend: Send + Sync + fmt::Debug {
    /// Short lower-case name: "kvm", "soft".
    fn name(&self) -> &'static str;

    /// Whether the backend offers `capability` on this host.
    fn supports(&self, capability: Capability) -> bool;

    /// The CPUID leaves that the backend can present; profiles are cut to it. Only the first call
    /// asks the host.
    ///
    /// # Errors
    /// Where the host cannot be asked.
    fn supported_cpuid(&self) -> Result<Cpuid>;

    /// Most vCPUs a VM can have.
    fn max_vcpus(&self) -> u32;

    /// Makes a VM without memory and vCPUs.
    ///
    /// # Errors
    /// Where the host refuses: out of descriptors, memory, or rights.
    fn create_vm(&self, config: &BackendConfig) -> Result<Arc<dyn BackendVm>>;

    /// As [`Backend::create_vm`], a VM that does the same in every run: see [`crate::deterministic`].
    ///
    /// # Errors
    /// [`Error::Unsupported`] where guest code runs on a processor that nobody can count the instructions
    /// of.
    fn create_deterministic_vm(
        &self,
        config: &BackendConfig,
        deterministic: Deterministic,
    ) -> Result<Arc<dyn BackendVm>> {
        let _ = (config, deterministic);
        Err(not_deterministic(self.name()))
    }
}

fn not_deterministic(backend: &'static str) -> Error {
    Error::Unsupported {
        what: "the deterministic mode".into(),
        backend,
        fix: "use the software CPU: Accel::Soft".into(),
    }
}

/// What a backend must know before it makes a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackendConfig {
    /// Give the VM interrupt controllers and a PIT. Without them a vCPU's HLT ends
    /// [`BackendVcpu::run`], and interrupts are the caller's to inject. They may be made as late as
    /// with the first vCPU: memory that is mapped before costs less.
    pub irqchip: bool,
}

/// Number of a memory slot. Slots are the caller's to number, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub u32);

/// Where a doorbell is: a port or a guest-physical address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoAddress {
    /// An I/O port.
    Port(u16),
    /// A guest-physical address that no memory covers.
    Mmio(GuestAddress),
}

/// The write that rings a doorbell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DoorbellConfig {
    /// Where the guest writes.
    pub at: IoAddress,
    /// Width of the write in bytes: 1, 2, 4 or 8. 0 on MMIO means any width.
    pub width: u8,
    /// The value that rings, or any.
    pub value: Option<u64>,
}

/// A registered doorbell or interrupt event: what it stands for ends when it is dropped, on any
/// thread. It may outlive its VM.
pub struct Registration {
    event: Arc<EventFd>,
    undo: Option<Box<dyn FnOnce() + Send + Sync>>,
}

impl Registration {
    /// Ties `event` to `undo`, which runs when the registration is dropped.
    pub fn new(event: Arc<EventFd>, undo: impl FnOnce() + Send + Sync + 'static) -> Self {
        Self { event, undo: Some(Box::new(undo)) }
    }

    /// The event descriptor: readable when a doorbell rang, to be written to raise an interrupt.
    pub fn event(&self) -> &Arc<EventFd> {
        &self.event
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if let Some(undo) = self.undo.take() {
            undo();
        }
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration").field("event", &self.event).finish_non_exhaustive()
    }
}

/// What an interrupt event raises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IrqRoute {
    /// An edge on a global system interrupt, numbered as [`IrqSink`] says.
    Gsi(u32),
    /// A message.
    Msi(Msi),
}

/// One virtual machine of a backend. Methods may be called from any thread while vCPUs run.
pub trait BackendVm: IrqSink + fmt::Debug {
    /// Name of the backend.
    fn name(&self) -> &'static str;

    /// Most memory slots the VM can have.
    fn max_slots(&self) -> u32;

    /// Makes `region` guest memory at its base. The VM shares ownership until [`BackendVm::unmap`].
    ///
    /// # Errors
    /// Where the slot is taken, the region overlaps another slot's, or the host refuses.
    fn map(&self, slot: Slot, region: Arc<MemoryRegion>) -> Result<()>;

    /// Takes the memory of `slot` away from the guest.
    ///
    /// # Errors
    /// Where the slot is empty.
    fn unmap(&self, slot: Slot) -> Result<()>;

    /// Takes the pages of `slot` that the guest wrote since the last call, and clears them. What the
    /// host wrote is [`MemoryRegion::take_host_dirty`].
    ///
    /// # Errors
    /// Where the slot is empty or its region does not track writes.
    fn take_dirty(&self, slot: Slot) -> Result<DirtyBitmap>;

    /// Makes a guest write signal `event` instead of calling [`VcpuIo`], until the registration is
    /// dropped. One event may have several doorbells.
    ///
    /// # Errors
    /// Where the width is not one of those in [`DoorbellConfig`], or the place is taken.
    fn doorbell_on(&self, config: DoorbellConfig, event: Arc<EventFd>) -> Result<Registration>;

    /// As [`BackendVm::doorbell_on`], with an event of its own.
    ///
    /// # Errors
    /// As [`BackendVm::doorbell_on`], and where the host is out of descriptors.
    fn doorbell(&self, config: DoorbellConfig) -> Result<Registration> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let event = event.map_err(|error| Error::os("eventfd", "a doorbell", error))?;
        self.doorbell_on(config, Arc::new(event))
    }

    /// Makes writing an event raise an interrupt, until the registration is dropped.
    ///
    /// # Errors
    /// Where the VM has no interrupt controllers or no such input, or routes are used up.
    fn irq_event(&self, route: IrqRoute) -> Result<Registration>;

    /// Whether the event of [`BackendVm::irq_event`] is the shorter way for who is on a thread of this process:
    /// the kernel takes it from there. Otherwise a thread waits for it, and [`IrqSink::set_irq`] saves the
    /// detour.
    fn irq_events_pay(&self) -> bool {
        true
    }

    /// Makes ISA interrupts level-triggered at the 8259As, as a PC's firmware does by their edge/level
    /// registers (ports 0x4D0 and 0x4D1) for those that PCI functions share. Bit `n` of `irqs` stands for
    /// interrupt `n`; those that no PC can make so stay edge-triggered. The I/O APIC's pins are the guest's
    /// to set.
    ///
    /// # Errors
    /// Where the VM has no interrupt controllers.
    fn set_level_triggered(&self, irqs: u16) -> Result<()>;

    /// Makes vCPU number `id` (its APIC id). vCPU 0 is the bootstrap processor; with
    /// interrupt controllers the others wait for INIT and SIPI.
    ///
    /// # Errors
    /// Where the id is taken or too large, or the host refuses.
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn BackendVcpu>>;

    /// Counters that the backend keeps by itself, by the names it gives them; for people and
    /// graphs, not for decisions. Empty where there are none.
    fn backend_stats(&self) -> Vec<(String, u64)> {
        Vec::new()
    }

    /// Time and random numbers, of a VM from [`Backend::create_deterministic_vm`]. Its vCPUs are run by
    /// [`BackendVcpu::run_instructions`], one at a time.
    fn world(&self) -> Option<&Arc<World>> {
        None
    }

    /// The state of everything but vCPUs and memory. vCPUs must not be running.
    ///
    /// # Errors
    /// Where the host refuses.
    fn save(&self) -> Result<MachineState>;

    /// Takes over a state from [`BackendVm::save`] of a VM made alike, on any backend. The machine
    /// comes first, then its vCPUs.
    ///
    /// # Errors
    /// [`Error::State`] where the VM was made differently.
    fn restore(&self, state: &MachineState) -> Result<()>;
}

/// The answers to a vCPU's I/O. Called on the thread that runs the vCPU, in program order, once for
/// each access of the instruction's operand size: a repeated string instruction calls many times.
pub trait VcpuIo {
    /// IN, INS: fill `data` (1, 2 or 4 bytes).
    fn port_read(&mut self, port: u16, data: &mut [u8]);
    /// OUT, OUTS: take `data` (1, 2 or 4 bytes).
    fn port_write(&mut self, port: u16, data: &[u8]);
    /// A read from an address without memory: fill `data` (1 to 8 bytes).
    fn mmio_read(&mut self, at: GuestAddress, data: &mut [u8]);
    /// A write to an address without (writable) memory: take `data` (1 to 8 bytes).
    fn mmio_write(&mut self, at: GuestAddress, data: &[u8]);
}

/// Why [`BackendVcpu::run`] gave control back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum VcpuExit {
    /// HLT on a VM without interrupt controllers.
    Halted,
    /// [`VcpuHandle::kick`] was called.
    Kicked,
    /// [`BackendVcpu::run_instructions`] has executed as many as it was to.
    InstructionLimit,
    /// [`BackendVcpu::run_instructions`]: halted, or not started, and nothing is there to wake it.
    Waiting,
    /// A triple fault: the vCPU entered shutdown state (SDM vol. 3A, 6.15, "Interrupt 8").
    TripleFault,
    /// A breakpoint, watchpoint or single step that [`BackendVcpu::set_debug`] asked for.
    Debug {
        /// Address of the next instruction to run.
        rip: u64,
        /// What hit, in the layout of DR6 (SDM vol. 3B, 18.2.3).
        dr6: u64,
        /// Vector of the exception: 1 (#DB) or 3 (#BP).
        exception: u8,
    },
}

/// Stops a vCPU's [`BackendVcpu::run`] from another thread, or from an I/O callback.
///
/// Clones mean the same vCPU. A kick is never lost: where the vCPU is not running, its next run
/// returns at once. It outlives the vCPU, and then does nothing.
#[derive(Clone)]
pub struct VcpuHandle(Arc<dyn Kick>);

/// How a backend interrupts a vCPU; [`VcpuHandle`] is the public face. Called from any thread, the
/// vCPU's own included (inside an I/O callback).
pub trait Kick: Send + Sync {
    /// Makes the current or next run return [`VcpuExit::Kicked`], and soon: without waiting for the
    /// guest to exit by itself.
    fn kick(&self);
}

impl VcpuHandle {
    /// A handle that kicks through `kick`.
    pub fn new(kick: Arc<dyn Kick>) -> Self {
        Self(kick)
    }

    /// Makes the vCPU's current or next run return [`VcpuExit::Kicked`].
    pub fn kick(&self) {
        self.0.kick();
    }
}

impl fmt::Debug for VcpuHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VcpuHandle").finish_non_exhaustive()
    }
}

/// What a vCPU stops for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DebugConfig {
    /// Stop after every instruction.
    pub single_step: bool,
    /// Stop at INT3 in the guest instead of delivering #BP to it.
    pub software_breakpoints: bool,
    /// Addresses and conditions for DR0 to DR3, with DR7 in its own layout (SDM vol. 3B, 18.2.4).
    pub hardware: Option<HardwareBreakpoints>,
}

/// Debug registers for the host's use, in the hardware's layout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HardwareBreakpoints {
    /// DR0 to DR3: linear addresses.
    pub addresses: [u64; 4],
    /// DR7: which are enabled, their kinds and lengths.
    pub dr7: u64,
}

/// How often a vCPU left the guest, by reason. Each field is a count since the vCPU was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct VcpuStats {
    /// Number of all returns from the guest to the backend.
    pub exits: u64,
    /// Port accesses, one for each operand.
    pub port: u64,
    /// MMIO accesses, one for each of at most 8 bytes.
    pub mmio: u64,
    /// Number of HLTs without interrupt controllers.
    pub halt: u64,
    /// Number of kicks and host signals.
    pub interrupted: u64,
    /// Number of debug stops.
    pub debug: u64,
    /// Triple faults.
    pub shutdown: u64,
}

/// One virtual CPU of a backend. It may move between threads, and is cheapest on one.
pub trait BackendVcpu: Send {
    /// Runs the guest until something in [`VcpuExit`] happens. Port and MMIO accesses call `io`;
    /// an access that was begun is finished before this returns.
    ///
    /// # Errors
    /// [`Error::Emulation`] where the backend cannot execute an
    /// instruction, [`Error::EntryFailed`] for invalid state. The vCPU
    /// can still be looked at.
    fn run(&mut self, io: &mut dyn VcpuIo) -> Result<VcpuExit>;

    /// As [`BackendVcpu::run`], on a VM from [`Backend::create_deterministic_vm`] and for at most `count`
    /// instructions: then it ends with [`VcpuExit::InstructionLimit`], before the next. Where the vCPU has
    /// nothing to execute it ends with [`VcpuExit::Waiting`] instead of waiting. Of the vCPUs of a VM one
    /// may run at a time.
    ///
    /// # Errors
    /// As [`BackendVcpu::run`], and [`Error::Unsupported`] where the VM was not made for it.
    fn run_instructions(&mut self, count: u64, io: &mut dyn VcpuIo) -> Result<VcpuExit> {
        let _ = (count, io);
        Err(Error::Unsupported {
            what: "counting instructions on this VM".into(),
            backend: "this",
            fix: "make the VM with Backend::create_deterministic_vm, on the software CPU".into(),
        })
    }

    /// When a timer of this vCPU (with vCPU 0's, those of the machine) wants attention next, in ns of the
    /// machine's clock; of a deterministic VM.
    fn timer_deadline(&self) -> Option<u64> {
        None
    }

    /// A handle that stops [`BackendVcpu::run`] from any thread.
    fn handle(&self) -> VcpuHandle;

    /// General-purpose registers, RIP and RFLAGS.
    ///
    /// # Errors
    /// Where the host refuses.
    fn regs(&self) -> Result<Regs>;

    /// Sets what [`BackendVcpu::regs`] tells.
    ///
    /// # Errors
    /// Where the host refuses.
    fn set_regs(&mut self, regs: &Regs) -> Result<()>;

    /// Segments, descriptor tables, control registers and EFER.
    ///
    /// # Errors
    /// Where the host refuses.
    fn sregs(&self) -> Result<Sregs>;

    /// Sets what [`BackendVcpu::sregs`] tells.
    ///
    /// # Errors
    /// Where the combination is invalid.
    fn set_sregs(&mut self, sregs: &Sregs) -> Result<()>;

    /// Sets what CPUID tells the guest. To be called before the vCPU first runs.
    ///
    /// # Errors
    /// Where the backend cannot present it.
    fn set_cpuid(&mut self, cpuid: &Cpuid) -> Result<()>;

    /// Frequency of the guest's TSC in kHz, where it is known.
    fn tsc_khz(&self) -> Option<u32> {
        None
    }

    /// Sets the frequency of the guest's TSC in kHz. To be called before the vCPU first runs, and to be
    /// the same for all vCPUs of a VM.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the backend cannot make it so: KVM needs
    /// a processor that scales the TSC, but for a frequency within 250 ppm of the host's.
    fn set_tsc_khz(&mut self, khz: u32) -> Result<()>;

    /// Sets what the vCPU stops for, in place of what was set before.
    ///
    /// # Errors
    /// Where the backend or host cannot.
    fn set_debug(&mut self, config: &DebugConfig) -> Result<()>;

    /// Translates a guest virtual address through the vCPU's page tables: `None` where nothing is
    /// mapped.
    ///
    /// # Errors
    /// Where the host refuses.
    fn translate(&self, gva: u64) -> Result<Option<GuestAddress>>;

    /// Raises a non-maskable interrupt.
    ///
    /// # Errors
    /// Where the host refuses.
    fn inject_nmi(&mut self) -> Result<()>;

    /// Running, halted or waiting; cheaper than [`BackendVcpu::save`].
    ///
    /// # Errors
    /// Where the host refuses.
    fn run_state(&self) -> Result<RunState>;

    /// How often the vCPU left the guest.
    fn stats(&self) -> VcpuStats;

    /// As [`BackendVm::backend_stats`], of this vCPU.
    fn backend_stats(&self) -> Vec<(String, u64)> {
        Vec::new()
    }

    /// All of the vCPU's state.
    ///
    /// # Errors
    /// Where the host refuses.
    fn save(&self) -> Result<VcpuState>;

    /// Takes over a state from [`BackendVcpu::save`], of any backend.
    ///
    /// # Errors
    /// [`Error::State`] where this host or VM cannot hold it.
    fn restore(&mut self, state: &VcpuState) -> Result<()>;
}
