//! A vCPU in the program's own hands.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::sync::{Mutex, MutexGuard, TryLockError};

use vmcore::backend::{DebugConfig, HardwareBreakpoints};
use vmcore::{Error, GuestAddress, Io, Vcpu, VcpuExit, VcpuHandle};

use crate::callback::required;
use crate::cpuid::vmcore_cpuid;
use crate::error::{Result, give, guard, need, put, vmcore_error};
use crate::registers::{vmcore_regs, vmcore_sregs};
use crate::state::vmcore_state;
use crate::stats::vmcore_vcpu_stats;

/// A virtual CPU. It keeps its VM. Calls other than vmcore_vcpu_kick fail with VMCORE_ERROR_WRONG_STATE while it runs.
pub struct vmcore_vcpu {
    vcpu: Mutex<Vcpu>,
    handle: VcpuHandle,
    id: u32,
}

/// Stops a vCPU from any thread; it may outlive it, and then does nothing.
pub struct vmcore_kick {
    handle: VcpuHandle,
}

impl vmcore_vcpu {
    pub(crate) fn new(vcpu: Vcpu) -> Self {
        Self { handle: vcpu.handle(), id: vcpu.id(), vcpu: Mutex::new(vcpu) }
    }

    fn use_it(&self, op: &'static str) -> Result<MutexGuard<'_, Vcpu>> {
        match self.vcpu.try_lock() {
            Ok(vcpu) => Ok(vcpu),
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => {
                let fix = "kick the vCPU and wait until its run has returned";
                Err(Error::WrongState { op, state: "running this vCPU", fix }.into())
            }
        }
    }
}

/// Kinds of exits of a vCPU.
pub type vmcore_exit_kind = u32;
/// HLT on a VM without interrupt controllers.
pub const VMCORE_EXIT_HALTED: vmcore_exit_kind = 0;
/// It was kicked.
pub const VMCORE_EXIT_KICKED: vmcore_exit_kind = 1;
/// As many instructions are executed as were to be.
pub const VMCORE_EXIT_INSTRUCTION_LIMIT: vmcore_exit_kind = 2;
/// A deterministic vCPU is halted or not started, and nothing is there to wake it.
pub const VMCORE_EXIT_WAITING: vmcore_exit_kind = 3;
/// A triple fault.
pub const VMCORE_EXIT_TRIPLE_FAULT: vmcore_exit_kind = 4;
/// A breakpoint, watchpoint or single step that vmcore_vcpu_set_debug asked for.
pub const VMCORE_EXIT_DEBUG: vmcore_exit_kind = 5;
/// In a way that this version of the bindings has no number for.
pub const VMCORE_EXIT_OTHER: vmcore_exit_kind = 99;

/// Why a vCPU's run returned.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct vmcore_exit {
    /// In which way.
    pub kind: vmcore_exit_kind,
    /// Of VMCORE_EXIT_DEBUG: vector of the exception, 1 or 3.
    pub exception: u32,
    /// Of VMCORE_EXIT_DEBUG: address of the next instruction.
    pub rip: u64,
    /// Of VMCORE_EXIT_DEBUG: what hit, in the layout of DR6.
    pub dr6: u64,
}

impl From<VcpuExit> for vmcore_exit {
    fn from(exit: VcpuExit) -> Self {
        let kind = match exit {
            VcpuExit::Halted => VMCORE_EXIT_HALTED,
            VcpuExit::Kicked => VMCORE_EXIT_KICKED,
            VcpuExit::InstructionLimit => VMCORE_EXIT_INSTRUCTION_LIMIT,
            VcpuExit::Waiting => VMCORE_EXIT_WAITING,
            VcpuExit::TripleFault => VMCORE_EXIT_TRIPLE_FAULT,
            VcpuExit::Debug { rip, dr6, exception } => {
                return Self { kind: VMCORE_EXIT_DEBUG, exception: exception.into(), rip, dr6 };
            }
            _ => VMCORE_EXIT_OTHER,
        };
        Self { kind, exception: 0, rip: 0, dr6: 0 }
    }
}

/// Kinds of accesses.
pub type vmcore_io_kind = u32;
/// IN: fill the data.
pub const VMCORE_IO_PORT_READ: vmcore_io_kind = 0;
/// OUT: take the data.
pub const VMCORE_IO_PORT_WRITE: vmcore_io_kind = 1;
/// A read from an address without memory: fill the data.
pub const VMCORE_IO_MMIO_READ: vmcore_io_kind = 2;
/// A write to an address without memory: take the data.
pub const VMCORE_IO_MMIO_WRITE: vmcore_io_kind = 3;

/// One access of the guest to a port or to an address without memory.
#[repr(C)]
#[derive(Debug)]
pub struct vmcore_io {
    /// Which way, and where.
    pub kind: vmcore_io_kind,
    /// How many bytes: 1, 2 or 4 of a port, 1 to 8 of an address.
    pub len: u32,
    /// The port or address.
    pub address: u64,
    /// The bytes, for the call. Those of a read are ones, to be overwritten; those of a write are not to be
    /// changed.
    pub data: *mut u8,
}

/// Answers an access; called on the thread that runs the vCPU.
pub type vmcore_io_fn = Option<unsafe extern "C" fn(user: *mut c_void, io: *const vmcore_io)>;

/// Its number, which is its APIC id.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_vcpu_id(vcpu: Option<&vmcore_vcpu>) -> u32 {
    vcpu.map_or(0, |vcpu| vcpu.id)
}

/// Runs the guest on this thread; devices on the VM answer its I/O, and what none claims reads as ones.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vcpu_run(
    vcpu: Option<&vmcore_vcpu>,
    out: Option<&mut MaybeUninit<vmcore_exit>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let exit = need(vcpu, "vcpu")?.use_it("run")?.run()?;
        put(out, exit.into())
    })
}

/// Runs the guest on this thread; `io` answers all of its I/O, the VM's devices none. To stop from inside, kick
/// the vCPU. `user` is the caller's, and used until this returns.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vcpu_run_with(
    vcpu: Option<&vmcore_vcpu>,
    io: vmcore_io_fn,
    user: *mut c_void,
    out: Option<&mut MaybeUninit<vmcore_exit>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let answer = required(io, "io")?;
        let mut vcpu = need(vcpu, "vcpu")?.use_it("run")?;
        let exit = vcpu.run_with(|access| {
            let (kind, address, len, data) = match access {
                Io::PortRead { port, data } => {
                    (VMCORE_IO_PORT_READ, u64::from(port), data.len(), data.as_mut_ptr())
                }
                Io::PortWrite { port, data } => {
                    (VMCORE_IO_PORT_WRITE, u64::from(port), data.len(), data.as_ptr().cast_mut())
                }
                Io::MmioRead { at, data } => (VMCORE_IO_MMIO_READ, at.0, data.len(), data.as_mut_ptr()),
                Io::MmioWrite { at, data } => {
                    (VMCORE_IO_MMIO_WRITE, at.0, data.len(), data.as_ptr().cast_mut())
                }
            };
            #[expect(clippy::cast_possible_truncation, reason = "at most 8")]
            let access = vmcore_io { kind, len: len as u32, address, data };
            // SAFETY: the program's function, with its own pointer, and an access that lives for the call.
            unsafe { answer(user, &raw const access) }
        })?;
        drop(vcpu);
        put(out, exit.into())
    })
}

/// As vmcore_vcpu_run on a deterministic VM, for at most `count` instructions.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vcpu_run_instructions(
    vcpu: Option<&vmcore_vcpu>,
    count: u64,
    out: Option<&mut MaybeUninit<vmcore_exit>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let exit = need(vcpu, "vcpu")?.use_it("run")?.run_instructions(count)?;
        put(out, exit.into())
    })
}

/// Makes the current or next run return VMCORE_EXIT_KICKED. From any thread, callbacks included.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_vcpu_kick(vcpu: Option<&vmcore_vcpu>) {
    if let Some(vcpu) = vcpu {
        vcpu.handle.kick();
    }
}

/// A handle that stops the vCPU and may outlive it.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_kick_new(
    vcpu: Option<&vmcore_vcpu>,
    out: Option<&mut MaybeUninit<*mut vmcore_kick>>,
) -> Option<Box<vmcore_error>> {
    guard(|| give(out, vmcore_kick { handle: need(vcpu, "vcpu")?.handle.clone() }))
}

/// As vmcore_vcpu_kick.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_kick_now(kick: Option<&vmcore_kick>) {
    if let Some(kick) = kick {
        kick.handle.kick();
    }
}

/// Frees it.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_kick_delete(kick: Option<Box<vmcore_kick>>) {
    drop(kick);
}

/// General-purpose registers, RIP and RFLAGS.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vcpu_regs(
    vcpu: Option<&vmcore_vcpu>,
    out: Option<&mut MaybeUninit<vmcore_regs>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let regs = need(vcpu, "vcpu")?.use_it("read registers")?.regs()?;
        put(out, regs.into())
    })
}

/// Sets what vmcore_vcpu_regs tells.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vcpu_set_regs(
    vcpu: Option<&vmcore_vcpu>,
    regs: Option<&vmcore_regs>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let regs = *need(regs, "regs")?;
        Ok(need(vcpu, "vcpu")?.use_it("set registers")?.set_regs(&regs.into())?)
    })
}

/// Segments, descriptor tables, control registers.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vcpu_sregs(
    vcpu: Option<&vmcore_vcpu>,
    out: Option<&mut MaybeUninit<vmcore_sregs>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let sregs = need(vcpu, "vcpu")?.use_it("read registers")?.sregs()?;
        put(out, sregs.into())
    })
}

/// Sets what vmcore_vcpu_sregs tells.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vcpu_set_sregs(
    vcpu: Option<&vmcore_vcpu>,
    sregs: Option<&vmcore_sregs>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let sregs = *need(sregs, "sregs")?;
        Ok(need(vcpu, "vcpu")?.use_it("set registers")?.set_sregs(&sregs.into())?)
    })
}

/// Sets the vCPU to run 16-bit code at the address `at` below 1 MiB, with all segments there and a stack that
/// grows down from it.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vcpu_enter_real_mode(
    vcpu: Option<&vmcore_vcpu>,
    at: u64,
) -> Option<Box<vmcore_error>> {
    guard(|| Ok(need(vcpu, "vcpu")?.use_it("set registers")?.enter_real_mode(GuestAddress(at))?))
}

/// Translates a guest virtual address; `mapped` tells whether anything is there.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vcpu_translate(
    vcpu: Option<&vmcore_vcpu>,
    gva: u64,
    out: Option<&mut MaybeUninit<u64>>,
    mapped: Option<&mut MaybeUninit<bool>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let at = need(vcpu, "vcpu")?.use_it("translate")?.translate(gva)?;
        need(mapped, "mapped")?.write(at.is_some());
        put(out, at.map_or(0, |at| at.0))
    })
}

/// Sets what the vCPU stops for: after every instruction, at INT3, and at the addresses and conditions of
/// `dr`, DR0 to DR3 and DR7 in the hardware's layout; `dr` may be NULL.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vcpu_set_debug(
    vcpu: Option<&vmcore_vcpu>,
    single_step: bool,
    software_breakpoints: bool,
    dr: Option<&[u64; 5]>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let hardware =
            dr.map(|&[dr0, dr1, dr2, dr3, dr7]| HardwareBreakpoints { addresses: [dr0, dr1, dr2, dr3], dr7 });
        let config = DebugConfig { single_step, software_breakpoints, hardware };
        Ok(need(vcpu, "vcpu")?.use_it("set breakpoints")?.set_debug(&config)?)
    })
}

/// Raises a non-maskable interrupt.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vcpu_inject_nmi(vcpu: Option<&vmcore_vcpu>) -> Option<Box<vmcore_error>> {
    guard(|| Ok(need(vcpu, "vcpu")?.use_it("inject an NMI")?.inject_nmi()?))
}

/// What CPUID tells the guest.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vcpu_cpuid(
    vcpu: Option<&vmcore_vcpu>,
    out: Option<&mut MaybeUninit<*mut vmcore_cpuid>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let table = need(vcpu, "vcpu")?.use_it("read CPUID")?.cpuid()?;
        give(out, vmcore_cpuid { table })
    })
}

/// Sets what CPUID tells the guest, before the first run.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vcpu_set_cpuid(
    vcpu: Option<&vmcore_vcpu>,
    cpuid: Option<&vmcore_cpuid>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let table = &need(cpuid, "cpuid")?.table;
        Ok(need(vcpu, "vcpu")?.use_it("set CPUID")?.set_cpuid(table)?)
    })
}

/// Sets the frequency of the guest's TSC in kHz, before the first run.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vcpu_set_tsc_khz(vcpu: Option<&vmcore_vcpu>, khz: u32) -> Option<Box<vmcore_error>> {
    guard(|| Ok(need(vcpu, "vcpu")?.use_it("set the TSC's frequency")?.set_tsc_khz(khz)?))
}

/// How often the vCPU left the guest, by reason.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vcpu_get_stats(
    vcpu: Option<&vmcore_vcpu>,
    out: Option<&mut MaybeUninit<vmcore_vcpu_stats>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let stats = need(vcpu, "vcpu")?.use_it("read statistics")?.stats();
        put(out, stats.into())
    })
}

/// All of the vCPU's state.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vcpu_save(
    vcpu: Option<&vmcore_vcpu>,
    out: Option<&mut MaybeUninit<*mut vmcore_state>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let state = need(vcpu, "vcpu")?.use_it("save")?.save()?;
        give(out, vmcore_state::of_vcpu(state))
    })
}

/// Takes over a state from vmcore_vcpu_save, of any backend.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vcpu_restore(
    vcpu: Option<&vmcore_vcpu>,
    state: Option<&vmcore_state>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let state = need(state, "state")?.vcpu()?;
        Ok(need(vcpu, "vcpu")?.use_it("restore")?.restore(state)?)
    })
}

/// Frees it. It must not be running.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_vcpu_delete(vcpu: Option<Box<vmcore_vcpu>>) {
    drop(vcpu);
}
