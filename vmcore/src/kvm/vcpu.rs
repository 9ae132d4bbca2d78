//! A KVM virtual CPU: the run loop and the registers.

use std::cell::OnceCell;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvm_bindings as k;
use kvm_ioctls::VcpuFd;

use super::NAME;
use super::kick::{KvmKick, Running};
use super::sys::{self, ImmediateExit, RunPage};
use super::vm::Shared;
use crate::backend::{BackendVcpu, DebugConfig, VcpuExit, VcpuHandle, VcpuIo, VcpuStats};
use crate::cpuid::Cpuid;
use crate::error::{Error, Result};
use crate::memory::GuestAddress;
use crate::state::{Regs, RunState, Sregs, VcpuState};

/// A vCPU of the KVM backend. The descriptor goes before the VM's memory, which `vm` keeps.
#[derive(Debug)]
pub(super) struct KvmVcpu {
    pub(super) fd: VcpuFd,
    pub(super) page: RunPage,
    immediate_exit: Arc<ImmediateExit>,
    kick: Arc<KvmKick>,
    /// The signal mask that KVM has for this vCPU.
    inside_mask: Option<u64>,
    stats: VcpuStats,
    pub(super) id: u32,
    /// What CPUID was set to: KVM changes some bits of its own copy while the guest runs.
    pub(super) cpuid: Cpuid,
    /// Those of the VM's MSRs that this vCPU has.
    pub(super) msrs: OnceCell<Vec<u32>>,
    pub(super) vm: Arc<Shared>,
}

impl KvmVcpu {
    pub(super) fn new(vm: Arc<Shared>, id: u32) -> Result<Self> {
        let fd = vm.fd.create_vcpu(id.into()).map_err(|e| match e.errno() {
            libc::EEXIST => Error::Conflict {
                kind: "vCPU",
                new: format!("{id}"),
                existing: "a vCPU with the same id".into(),
            },
            _ => Error::os("KVM_CREATE_VCPU", format_args!("vCPU {id}"), e),
        })?;
        let (page, immediate_exit) = RunPage::map(&fd, vm.fd.run_size())
            .map_err(|e| Error::os("mmap", format_args!("the run page of vCPU {id}"), e))?;
        let immediate_exit = Arc::new(immediate_exit);
        let kick = KvmKick::new(immediate_exit.clone());
        Ok(Self {
            fd,
            page,
            immediate_exit,
            kick,
            inside_mask: None,
            stats: VcpuStats::default(),
            id,
            cpuid: Cpuid::default(),
            msrs: OnceCell::new(),
            vm,
        })
    }

    /// The error of ioctl `op` on this vCPU.
    pub(super) fn error(&self, op: &'static str, source: impl Into<io::Error>) -> Error {
        Error::os(op, format_args!("vCPU {}", self.id), source)
    }

    /// What KVM_RUN's failure `errno` means, other than EINTR and EAGAIN.
    fn run_error(&self, errno: i32) -> Error {
        let source = io::Error::from_raw_os_error(errno);
        let id = self.id;
        if self.page.exit_reason() == k::KVM_EXIT_MEMORY_FAULT
            && matches!(errno, libc::EFAULT | libc::EHWPOISON)
        {
            let fault: k::kvm_run__bindgen_ty_1__bindgen_ty_27 = self.page.exit();
            let detail = format!(
                "vCPU {id}: the host memory behind guest-physical {:#x} cannot be used (its file was cut short, \
                 huge pages ran out, or the page is poisoned)",
                fault.gpa
            );
            return Error::os("KVM_RUN", detail, source);
        }
        let rip = self.fd.get_regs().map(|r| r.rip).unwrap_or_default();
        let detail = match errno {
            libc::EFAULT => format!(
                "vCPU {id} at rip {rip:#x}: host memory behind a guest address cannot be used (its file was cut \
                 short, or huge pages ran out)"
            ),
            _ => format!("vCPU {id} at rip {rip:#x}"),
        };
        Error::os("KVM_RUN", detail, source)
    }

    /// An exit that is not part of everyday's loop.
    fn rare_exit(&mut self, reason: u32) -> Result<VcpuExit> {
        match reason {
            k::KVM_EXIT_SHUTDOWN => {
                self.stats.shutdown += 1;
                Ok(VcpuExit::TripleFault)
            }
            k::KVM_EXIT_DEBUG => {
                self.stats.debug += 1;
                let debug: k::kvm_run__bindgen_ty_1__bindgen_ty_5 = self.page.exit();
                let exception = u8::try_from(debug.arch.exception).unwrap_or(1);
                Ok(VcpuExit::Debug { rip: debug.arch.pc, dr6: debug.arch.dr6, exception })
            }
            k::KVM_EXIT_FAIL_ENTRY => {
                let entry: k::kvm_run__bindgen_ty_1__bindgen_ty_2 = self.page.exit();
                Err(Error::EntryFailed { reason: entry.hardware_entry_failure_reason })
            }
            k::KVM_EXIT_INTERNAL_ERROR => Err(self.internal_error()),
            k::KVM_EXIT_UNKNOWN => {
                let hw: k::kvm_run__bindgen_ty_1__bindgen_ty_1 = self.page.exit();
                Err(Self::unexpected(&format!("hardware exit {:#x}", hw.hardware_exit_reason)))
            }
            // Hyper-V's reset and crash registers end in this one; no VM is made with them.
            k::KVM_EXIT_SYSTEM_EVENT => {
                let event: k::kvm_run__bindgen_ty_1__bindgen_ty_13 = self.page.exit();
                Err(Self::unexpected(&format!("system event {}", event.suberror)))
            }
            other => Err(Self::unexpected(&format!("exit reason {other}"))),
        }
    }

    fn unexpected(what: &str) -> Error {
        Error::Unsupported {
            what: format!("what KVM reports as {what}"),
            backend: NAME,
            fix: "nothing here asks KVM for it: report it with the kernel's version".into(),
        }
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        self.kick.disarm();
    }
}

/// The exit whose operands [`port_io`] reads.
type IoExit = k::kvm_run__bindgen_ty_1__bindgen_ty_4;

/// One KVM_EXIT_IO: `count` elements of `size` bytes, each its own access.
#[inline]
fn port_io(page: &mut RunPage, io: &mut dyn VcpuIo) -> Option<u64> {
    let exit: IoExit = page.exit();
    let size = usize::from(exit.size);
    let data = page.io_data(&exit)?;
    if size == 0 {
        return None;
    }
    let elements = data.chunks_exact_mut(size);
    if u32::from(exit.direction) == k::KVM_EXIT_IO_OUT {
        elements.for_each(|element| io.port_write(exit.port, element));
    } else {
        elements.for_each(|element| io.port_read(exit.port, element));
    }
    Some(exit.count.into())
}

/// One KVM_EXIT_MMIO.
#[inline]
fn mmio(page: &mut RunPage, io: &mut dyn VcpuIo) -> Option<()> {
    let exit: k::kvm_run__bindgen_ty_1__bindgen_ty_6 = page.exit();
    let data = page.mmio_data().get_mut(..exit.len as usize)?;
    let at = GuestAddress(exit.phys_addr);
    if exit.is_write == 0 {
        io.mmio_read(at, data);
    } else {
        io.mmio_write(at, data);
    }
    Some(())
}

impl BackendVcpu for KvmVcpu {
    fn run(&mut self, io: &mut dyn VcpuIo) -> Result<VcpuExit> {
        let Self { fd, page, immediate_exit, kick, inside_mask, stats, .. } = self;
        let running = Running::enter(kick, fd, inside_mask)?;
        // KVM finishes the I/O of the exit before when it is entered again, also where
        // `immediate_exit` or a signal then ends it at once. So a kick never leaves I/O half done:
        // it is reported only after KVM_RUN has said EINTR.
        let reason = loop {
            match sys::run(fd) {
                0 => {}
                libc::EINTR => {
                    stats.interrupted += 1;
                    let kicked = immediate_exit.byte().swap(0, Ordering::SeqCst) != 0;
                    running.interrupted();
                    if kicked {
                        return Ok(VcpuExit::Kicked);
                    }
                    continue;
                }
                // A vCPU that waited for INIT has got it.
                libc::EAGAIN => continue,
                errno => {
                    drop(running);
                    return Err(self.run_error(errno));
                }
            }
            stats.exits += 1;
            let handled = match page.exit_reason() {
                k::KVM_EXIT_IO => port_io(page, io).map(|count| stats.port += count),
                k::KVM_EXIT_MMIO => mmio(page, io).map(|()| stats.mmio += 1),
                k::KVM_EXIT_HLT => {
                    stats.halt += 1;
                    return Ok(VcpuExit::Halted);
                }
                k::KVM_EXIT_INTR | k::KVM_EXIT_IRQ_WINDOW_OPEN => Some(()),
                other => break other,
            };
            if handled.is_none() {
                return Err(Self::unexpected("an access outside of its run page"));
            }
        };
        drop(running);
        self.rare_exit(reason)
    }

    fn handle(&self) -> VcpuHandle {
        VcpuHandle::new(self.kick.clone())
    }

    fn regs(&self) -> Result<Regs> {
        self.fd.get_regs().map(Regs::from).map_err(|e| self.error("KVM_GET_REGS", e))
    }

    fn set_regs(&mut self, regs: &Regs) -> Result<()> {
        self.fd.set_regs(&regs.into()).map_err(|e| self.error("KVM_SET_REGS", e))
    }

    fn sregs(&self) -> Result<Sregs> {
        self.fd.get_sregs().map(Sregs::from).map_err(|e| self.error("KVM_GET_SREGS", e))
    }

    fn set_sregs(&mut self, sregs: &Sregs) -> Result<()> {
        self.fd.set_sregs(&sregs.into()).map_err(|e| {
            let detail = format!(
                "vCPU {}: cr0 {:#x}, cr3 {:#x}, cr4 {:#x}, efer {:#x}",
                self.id, sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer
            );
            Error::os("KVM_SET_SREGS", detail, e)
        })
    }

    fn set_cpuid(&mut self, cpuid: &Cpuid) -> Result<()> {
        let table = super::state::cpuid_to_kvm(cpuid)?;
        self.fd.set_cpuid2(&table).map_err(|e| self.error("KVM_SET_CPUID2", e))?;
        self.cpuid = cpuid.clone();
        // The features decide which MSRs there are.
        self.msrs = OnceCell::new();
        Ok(())
    }

    fn tsc_khz(&self) -> Option<u32> {
        // Fails only where the host's TSC is not usable, and then it does not matter.
        self.fd.get_tsc_khz().ok().filter(|&khz| khz != 0)
    }

    fn set_tsc_khz(&mut self, khz: u32) -> Result<()> {
        self.scale_tsc(khz).map_err(|here| Error::Unsupported {
            what: format!("a TSC of {khz} kHz"),
            backend: super::NAME,
            fix: format!(
                "this host's ticks at {here} kHz and cannot be scaled: use that, or the software CPU"
            ),
        })
    }

    fn set_debug(&mut self, config: &DebugConfig) -> Result<()> {
        let mut debug = k::kvm_guest_debug::default();
        let flag = |on, bit| if on { bit } else { 0 };
        debug.control = flag(config.single_step, k::KVM_GUESTDBG_SINGLESTEP)
            | flag(config.software_breakpoints, k::KVM_GUESTDBG_USE_SW_BP)
            | flag(config.hardware.is_some(), k::KVM_GUESTDBG_USE_HW_BP);
        if debug.control != 0 {
            debug.control |= k::KVM_GUESTDBG_ENABLE;
        }
        if let Some(hardware) = &config.hardware {
            debug.arch.debugreg[..4].copy_from_slice(&hardware.addresses);
            debug.arch.debugreg[7] = hardware.dr7;
        }
        self.fd.set_guest_debug(&debug).map_err(|e| self.error("KVM_SET_GUEST_DEBUG", e))
    }

    fn translate(&self, gva: u64) -> Result<Option<GuestAddress>> {
        let translation = self.fd.translate_gva(gva).map_err(|e| self.error("KVM_TRANSLATE", e))?;
        Ok((translation.valid != 0).then_some(GuestAddress(translation.physical_address)))
    }

    fn inject_nmi(&mut self) -> Result<()> {
        self.fd.nmi().map_err(|e| self.error("KVM_NMI", e))
    }

    fn run_state(&self) -> Result<RunState> {
        self.fd.get_mp_state().map_err(|e| self.error("KVM_GET_MP_STATE", e))?.try_into()
    }

    fn stats(&self) -> VcpuStats {
        self.stats
    }

    fn backend_stats(&self) -> Vec<(String, u64)> {
        super::stats::read(&self.fd)
    }

    fn save(&self) -> Result<VcpuState> {
        self.save_state()
    }

    fn restore(&mut self, state: &VcpuState) -> Result<()> {
        self.restore_state(state)
    }
}
