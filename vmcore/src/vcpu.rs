//! A vCPU in the embedder's own hands.

use std::fmt;
use std::sync::Arc;

use crate::backend::{BackendVcpu, BackendVm, DebugConfig, VcpuExit, VcpuHandle, VcpuIo, VcpuStats};
use crate::bus::BusReader;
use crate::cpuid::Cpuid;
use crate::error::Result;
use crate::memory::GuestAddress;
use crate::state::{Regs, RunState, Segment, Sregs, VcpuState};

/// One access of the guest to a port or to an address without memory.
#[derive(Debug)]
pub enum Io<'a> {
    /// IN: fill `data` (1, 2 or 4 bytes). It holds ones on entry, what an empty bus reads as.
    PortRead {
        /// The port.
        port: u16,
        /// The bytes of the answer.
        data: &'a mut [u8],
    },
    /// OUT: take `data` (1, 2 or 4 bytes).
    PortWrite {
        /// The port.
        port: u16,
        /// The bytes that the guest wrote.
        data: &'a [u8],
    },
    /// A read: fill `data` (1 to 8 bytes). It holds ones on entry.
    MmioRead {
        /// Guest-physical address.
        at: GuestAddress,
        /// The bytes of the answer.
        data: &'a mut [u8],
    },
    /// A write: take `data` (1 to 8 bytes).
    MmioWrite {
        /// Guest-physical address.
        at: GuestAddress,
        /// The bytes that the guest wrote.
        data: &'a [u8],
    },
}

/// A virtual CPU.
///
/// It can be sent to another thread, and runs the guest on the thread that calls
/// [`Vcpu::run`] or [`Vcpu::run_with`]. Stop it from any other by its [`VcpuHandle`].
pub struct Vcpu {
    id: u32,
    /// Before `vm`, so that the vCPU goes first.
    inner: Box<dyn BackendVcpu>,
    buses: Buses,
    _vm: Arc<dyn BackendVm>,
}

/// Answers I/O from the VM's buses.
#[derive(Clone)]
pub(crate) struct Buses {
    pub(crate) ports: BusReader,
    pub(crate) mmio: BusReader,
}

impl VcpuIo for Buses {
    fn port_read(&mut self, port: u16, data: &mut [u8]) {
        if !self.ports.read(port.into(), data) {
            data.fill(0xff);
        }
    }

    fn port_write(&mut self, port: u16, data: &[u8]) {
        self.ports.write(port.into(), data);
    }

    fn mmio_read(&mut self, at: GuestAddress, data: &mut [u8]) {
        if !self.mmio.read(at.0, data) {
            data.fill(0xff);
        }
    }

    fn mmio_write(&mut self, at: GuestAddress, data: &[u8]) {
        self.mmio.write(at.0, data);
    }
}

/// Answers I/O from a closure.
struct Closure<F>(F);

impl<F: FnMut(Io<'_>)> VcpuIo for Closure<F> {
    fn port_read(&mut self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        (self.0)(Io::PortRead { port, data });
    }

    fn port_write(&mut self, port: u16, data: &[u8]) {
        (self.0)(Io::PortWrite { port, data });
    }

    fn mmio_read(&mut self, at: GuestAddress, data: &mut [u8]) {
        data.fill(0xff);
        (self.0)(Io::MmioRead { at, data });
    }

    fn mmio_write(&mut self, at: GuestAddress, data: &[u8]) {
        (self.0)(Io::MmioWrite { at, data });
    }
}

impl Vcpu {
    pub(crate) fn new(id: u32, inner: Box<dyn BackendVcpu>, buses: Buses, vm: Arc<dyn BackendVm>) -> Self {
        Self { id, inner, buses, _vm: vm }
    }

    /// The vCPU's number, which is its APIC id.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Runs the guest; devices on the VM's buses answer its I/O, and what none claims reads as ones.
    ///
    /// # Errors
    /// As [`BackendVcpu::run`].
    pub fn run(&mut self) -> Result<VcpuExit> {
        self.inner.run(&mut self.buses)
    }

    /// Runs the guest; `io` answers all of its I/O, the VM's buses none. To stop from inside, kick
    /// the vCPU's [`Vcpu::handle`].
    ///
    /// # Errors
    /// As [`BackendVcpu::run`].
    pub fn run_with(&mut self, io: impl FnMut(Io<'_>)) -> Result<VcpuExit> {
        self.inner.run(&mut Closure(io))
    }

    /// As [`Vcpu::run`] on a deterministic VM, for at most `count` instructions: see
    /// [`BackendVcpu::run_instructions`].
    ///
    /// # Errors
    /// As [`BackendVcpu::run_instructions`].
    pub fn run_instructions(&mut self, count: u64) -> Result<VcpuExit> {
        self.inner.run_instructions(count, &mut self.buses)
    }

    /// When a timer of this vCPU wants attention next, in ns of the machine's time.
    pub(crate) fn timer_deadline(&self) -> Option<u64> {
        self.inner.timer_deadline()
    }

    /// A handle that stops the run from any thread.
    pub fn handle(&self) -> VcpuHandle {
        self.inner.handle()
    }

    /// General-purpose registers, RIP and RFLAGS.
    ///
    /// # Errors
    /// Where the host refuses.
    pub fn regs(&self) -> Result<Regs> {
        self.inner.regs()
    }

    /// Sets what [`Vcpu::regs`] tells.
    ///
    /// # Errors
    /// Where the host refuses.
    pub fn set_regs(&mut self, regs: &Regs) -> Result<()> {
        self.inner.set_regs(regs)
    }

    /// Segments, descriptor tables, control registers.
    ///
    /// # Errors
    /// Where the host refuses.
    pub fn sregs(&self) -> Result<Sregs> {
        self.inner.sregs()
    }

    /// Sets what [`Vcpu::sregs`] tells.
    ///
    /// # Errors
    /// Where the combination is invalid.
    pub fn set_sregs(&mut self, sregs: &Sregs) -> Result<()> {
        self.inner.set_sregs(sregs)
    }

    /// Sets the vCPU to run 16-bit real-mode code at the guest-physical address `at` (below 1 MiB),
    /// with all segments at `at` rounded down to 16 and a stack that grows down from `at`.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for an address real mode cannot reach.
    pub fn enter_real_mode(&mut self, at: GuestAddress) -> Result<()> {
        let selector = u16::try_from(at.0 >> 4).map_err(|_| crate::Error::Config {
            what: "real-mode entry",
            value: format!("{:#x}", at.0),
            fix: "put the code below 1 MiB".into(),
        })?;
        let mut sregs = self.inner.sregs()?;
        sregs.cs = Segment::real_mode(selector, true);
        for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs] {
            *segment = Segment::real_mode(selector, false);
        }
        // A stack of up to 64 KiB below the code.
        sregs.ss = Segment::real_mode(selector.saturating_sub(0x1000), false);
        let rsp = at.0 - sregs.ss.base;
        self.inner.set_sregs(&sregs)?;
        self.inner.set_regs(&Regs { rip: at.0 & 0xf, rsp: rsp & 0xfff0, rflags: 2, ..Regs::default() })
    }

    /// Sets what CPUID tells the guest; before the first run.
    ///
    /// # Errors
    /// Where the backend cannot present it.
    pub fn set_cpuid(&mut self, cpuid: &Cpuid) -> Result<()> {
        self.inner.set_cpuid(cpuid)
    }

    /// What CPUID tells the guest.
    ///
    /// # Errors
    /// Where the host refuses.
    pub fn cpuid(&self) -> Result<Cpuid> {
        Ok(self.save()?.cpuid)
    }

    /// Frequency of the guest's TSC in kHz, where it is known.
    pub fn tsc_khz(&self) -> Option<u32> {
        self.inner.tsc_khz()
    }

    /// Sets the frequency of the guest's TSC in kHz; before the first run, and the same for all vCPUs of
    /// a VM.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) where the backend cannot make it so: KVM needs
    /// a processor that scales the TSC, but for a frequency within 250 ppm of the host's.
    pub fn set_tsc_khz(&mut self, khz: u32) -> Result<()> {
        self.inner.set_tsc_khz(khz)
    }

    /// Sets what the vCPU stops for.
    ///
    /// # Errors
    /// Where the backend or host cannot.
    pub fn set_debug(&mut self, config: &DebugConfig) -> Result<()> {
        self.inner.set_debug(config)
    }

    /// Translates a guest virtual address; `None` where nothing is mapped.
    ///
    /// # Errors
    /// Where the host refuses.
    pub fn translate(&self, gva: u64) -> Result<Option<GuestAddress>> {
        self.inner.translate(gva)
    }

    /// Raises a non-maskable interrupt.
    ///
    /// # Errors
    /// Where the host refuses.
    pub fn inject_nmi(&mut self) -> Result<()> {
        self.inner.inject_nmi()
    }

    /// How often the vCPU left the guest, by reason.
    pub fn stats(&self) -> VcpuStats {
        self.inner.stats()
    }

    /// The backend's own statistics of this vCPU, as name and value; empty where it has none.
    pub fn backend_stats(&self) -> Vec<(String, u64)> {
        self.inner.backend_stats()
    }

    /// Running, halted or waiting.
    ///
    /// # Errors
    /// Where the host refuses.
    pub fn run_state(&self) -> Result<RunState> {
        self.inner.run_state()
    }

    /// All of the vCPU's state.
    ///
    /// # Errors
    /// Where the host refuses.
    pub fn save(&self) -> Result<VcpuState> {
        self.inner.save()
    }

    /// Takes over a state from [`Vcpu::save`], of any backend.
    ///
    /// # Errors
    /// [`Error::State`](crate::Error::State) where this host or VM cannot hold it.
    pub fn restore(&mut self, state: &VcpuState) -> Result<()> {
        self.inner.restore(state)
    }

    /// Whether only a reset can wake the vCPU: halted with interrupts off, or an application
    /// processor that nobody has started.
    pub(crate) fn sleeps_for_good(&self) -> Result<bool> {
        const IF: u64 = 1 << 9;
        Ok(match self.inner.run_state()? {
            RunState::Running => false,
            RunState::Halted => self.inner.regs()?.rflags & IF == 0,
            RunState::WaitForInit | RunState::WaitForSipi => true,
        })
    }
}

impl fmt::Debug for Vcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vcpu").field("id", &self.id).finish_non_exhaustive()
    }
}
