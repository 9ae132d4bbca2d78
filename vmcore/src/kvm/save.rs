//! All of a vCPU's state, out of KVM and back in.
//!
//! The order of restoring matters: CPUID decides what the rest may hold, the APIC base (in the
//! special registers) the LAPIC's mode, and the LAPIC the meaning of the TSC deadline.

use std::sync::atomic::Ordering;

use kvm_bindings::{self as k, Msrs};
use kvm_ioctls::VcpuFd;

use super::sys;
use super::vcpu::KvmVcpu;
use crate::error::{Error, Result};
use crate::state::{LapicState, Msr, RunState, VcpuState, describes_processor};

/// IA32_TIME_STAMP_COUNTER.
const MSR_TSC: u32 = 0x10;
/// IA32_APIC_BASE; part of the special registers.
const MSR_APIC_BASE: u32 = 0x1b;
/// IA32_TSC_ADJUST.
const MSR_TSC_ADJUST: u32 = 0x3b;
/// IA32_TSC_DEADLINE.
const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// By how much the frequency of the TSC may differ after a restore, in parts per million: what
/// Linux guests' NTP corrects.
const TSC_TOLERANCE_PPM: u64 = 250;

/// XCR0 after reset: x87 only (SDM vol. 1, 13.3).
const XCR0_RESET: u64 = 1;

/// When an MSR is restored.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Before all others: the counter that the others refer to.
    Tsc,
    Normal,
    /// After the LAPIC, whose timer it arms.
    Deadline,
}

fn phase(index: u32) -> Phase {
    match index {
        MSR_TSC | MSR_TSC_ADJUST => Phase::Tsc,
        MSR_TSC_DEADLINE => Phase::Deadline,
        _ => Phase::Normal,
    }
}

/// Reads those of `indices` that the vCPU has.
fn read_msrs(fd: &VcpuFd, indices: &[u32]) -> std::result::Result<Vec<Msr>, kvm_ioctls::Error> {
    let mut found = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(k::KVM_MAX_MSR_ENTRIES)];
        let entries: Vec<_> =
            chunk.iter().map(|&index| k::kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))?;
        // KVM stops at the first that the vCPU does not have.
        let read = fd.get_msrs(&mut msrs)?.min(chunk.len());
        found.extend(msrs.as_slice()[..read].iter().map(|m| Msr { index: m.index, value: m.data }));
        rest = &rest[if read == chunk.len() { read } else { read + 1 }..];
    }
    Ok(found)
}

impl KvmVcpu {
    pub(super) fn save_state(&self) -> Result<VcpuState> {
        let fd = &self.fd;
        let known = self.msrs.get();
        let msrs = read_msrs(fd, known.map_or(self.vm.system.msrs.as_slice(), Vec::as_slice))
            .map_err(|e| self.error("KVM_GET_MSRS", e))?;
        if known.is_none() {
            // Another save may not have come between: `self` is not shared between threads.
            let _ = self.msrs.set(msrs.iter().map(|m| m.index).collect());
        }
        let xcrs = fd.get_xcrs().map_err(|e| self.error("KVM_GET_XCRS", e))?;
        let xcr0 = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).find(|x| x.xcr == 0).map(|x| x.value);
        let lapic = if self.vm.irqchip {
            Some(LapicState::from(&fd.get_lapic().map_err(|e| self.error("KVM_GET_LAPIC", e))?))
        } else {
            None
        };
        // First, because it lets a waiting INIT or SIPI take effect on the registers.
        let run_state = fd.get_mp_state().map_err(|e| self.error("KVM_GET_MP_STATE", e))?;
        Ok(VcpuState {
            id: self.id,
            run_state: RunState::try_from(run_state)?,
            regs: fd.get_regs().map_err(|e| self.error("KVM_GET_REGS", e))?.into(),
            sregs: fd.get_sregs().map_err(|e| self.error("KVM_GET_SREGS", e))?.into(),
            debug: fd.get_debug_regs().map_err(|e| self.error("KVM_GET_DEBUGREGS", e))?.into(),
            xcr0: xcr0.unwrap_or(XCR0_RESET),
            xsave: sys::get_xsave(fd, self.vm.xsave_size).map_err(|e| self.error("KVM_GET_XSAVE2", e))?,
            msrs,
            events: fd.get_vcpu_events().map_err(|e| self.error("KVM_GET_VCPU_EVENTS", e))?.into(),
            lapic,
            cpuid: self.cpuid.clone(),
            tsc_khz: crate::backend::BackendVcpu::tsc_khz(self),
        })
    }

    pub(super) fn restore_state(&mut self, state: &VcpuState) -> Result<()> {
        self.check_fits(state)?;
        if !state.cpuid.entries().is_empty() && state.cpuid != self.cpuid {
            crate::backend::BackendVcpu::set_cpuid(self, &state.cpuid)?;
        }
        self.restore_tsc_frequency(state.tsc_khz)?;
        // A vCPU that waits cannot have its registers' meaning changed by being made to run.
        self.fd.set_mp_state(RunState::Running.into()).map_err(|e| self.error("KVM_SET_MP_STATE", e))?;
        crate::backend::BackendVcpu::set_sregs(self, &state.sregs)?;
        self.restore_xsave(state)?;
        self.begin_tsc(state)?;
        self.restore_msrs(state, Phase::Tsc)?;
        self.restore_msrs(state, Phase::Normal)?;
        if let Some(lapic) = &state.lapic {
            let lapic = lapic.try_into()?;
            self.fd.set_lapic(&lapic).map_err(|e| self.error("KVM_SET_LAPIC", e))?;
        }
        self.restore_msrs(state, Phase::Deadline)?;
        self.fd.set_debug_regs(&(&state.debug).into()).map_err(|e| self.error("KVM_SET_DEBUGREGS", e))?;
        crate::backend::BackendVcpu::set_regs(self, &state.regs)?;
        let events = state.events.to_kvm(self.vm.exception_payload, self.vm.smm);
        self.fd.set_vcpu_events(&events).map_err(|e| self.error("KVM_SET_VCPU_EVENTS", e))?;
        self.fd.set_mp_state(state.run_state.into()).map_err(|e| self.error("KVM_SET_MP_STATE", e))
    }

    /// Compares what can be compared before anything is changed.
    fn check_fits(&self, state: &VcpuState) -> Result<()> {
        let mismatch = |what, expected, found| Err(Error::State { what, expected, found });
        if state.id != self.id {
            return mismatch("a vCPU", format!("vCPU {}", self.id), format!("vCPU {}", state.id));
        }
        let name = |has| if has { "a local APIC" } else { "no local APIC" }.to_owned();
        if state.lapic.is_some() != self.vm.irqchip {
            return mismatch("a vCPU", name(self.vm.irqchip), name(state.lapic.is_some()));
        }
        if !self.vm.irqchip && state.run_state != RunState::Running {
            return mismatch(
                "a vCPU of a VM without interrupt controllers",
                "running".into(),
                format!("{:?}", state.run_state),
            );
        }
        if !state.cpuid.entries().is_empty() && state.cpuid != self.cpuid {
            let host = self.vm.system.supported_cpuid()?;
            state.cpuid.check_offered_by(&host)?;
            state.cpuid.check_hypercalls(&host)?;
        }
        let (room, len) = (self.vm.xsave_size.bytes(), state.xsave.len());
        if state.xsave.get(room..).is_some_and(|beyond| beyond.iter().any(|&b| b != 0)) {
            return mismatch(
                "the XSAVE area",
                format!("at most {room} bytes"),
                format!("{len} bytes in use"),
            );
        }
        Ok(())
    }

    fn restore_tsc_frequency(&self, saved: Option<u32>) -> Result<()> {
        let Some(saved) = saved else { return Ok(()) };
        self.scale_tsc(saved).map_err(|here| Error::State {
            what: "the TSC",
            expected: format!("{here} kHz (this host cannot scale it)"),
            found: format!("{saved} kHz"),
        })
    }

    /// Makes the TSC tick at `khz`, or near enough. The error is what it ticks at.
    pub(super) fn scale_tsc(&self, khz: u32) -> std::result::Result<(), u32> {
        // Fails only where the host's TSC is not usable, and then it does not matter.
        let Ok(here) = self.fd.get_tsc_khz() else { return Ok(()) };
        let differs = u64::from(khz.abs_diff(here)) * 1_000_000 > u64::from(khz) * TSC_TOLERANCE_PPM;
        if !differs || self.vm.tsc_control && self.fd.set_tsc_khz(khz).is_ok() {
            return Ok(());
        }
        Err(here)
    }

    /// KVM takes a TSC that is set to within a second of where it is for an attempt to synchronize
    /// vCPUs, and gives the vCPU the offset of the last that was set. That keeps the vCPUs of a
    /// restored VM together, but the first of them would be drawn to the new VM's TSC, which begins at
    /// zero. So the first is set to minutes ahead before it is set to its value.
    fn begin_tsc(&self, state: &VcpuState) -> Result<()> {
        const FAR: u64 = 1 << 40;
        let Some(tsc) = state.msrs.iter().find(|m| m.index == MSR_TSC) else { return Ok(()) };
        if self.vm.tsc_restored.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        let entry =
            k::kvm_msr_entry { index: MSR_TSC, data: tsc.value.wrapping_add(FAR), ..Default::default() };
        let far = Msrs::from_entries(&[entry])
            .map_err(|_| self.error("KVM_SET_MSRS", std::io::Error::from_raw_os_error(libc::E2BIG)))?;
        self.fd.set_msrs(&far).map(drop).map_err(|e| self.error("KVM_SET_MSRS", e))
    }

    fn restore_xsave(&self, state: &VcpuState) -> Result<()> {
        let mut xcrs = k::kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        xcrs.xcrs[0] = k::kvm_xcr { xcr: 0, value: state.xcr0, ..Default::default() };
        let here = self.fd.get_xcrs().map_err(|e| self.error("KVM_GET_XCRS", e))?;
        if here.nr_xcrs > 0 {
            self.fd.set_xcrs(&xcrs).map_err(|_| Error::State {
                what: "XCR0",
                expected: "components that this host and the vCPU's CPUID have".into(),
                found: format!("{:#x}", state.xcr0),
            })?;
        } else if state.xcr0 > XCR0_RESET {
            return Err(Error::State {
                what: "XCR0",
                expected: "a host with XSAVE".into(),
                found: format!("{:#x}", state.xcr0),
            });
        }
        if state.xsave.is_empty() {
            return Ok(());
        }
        sys::set_xsave(&self.fd, self.vm.xsave_size, &state.xsave).map_err(|e| Error::State {
            what: "the XSAVE area",
            expected: "components that this host has".into(),
            found: format!("XSTATE_BV {:#x} ({e})", xstate_bv(&state.xsave)),
        })
    }

    fn restore_msrs(&self, state: &VcpuState, wanted: Phase) -> Result<()> {
        let entries: Vec<_> = state
            .msrs
            .iter()
            .filter(|m| phase(m.index) == wanted && m.index != MSR_APIC_BASE)
            .map(|m| k::kvm_msr_entry { index: m.index, data: m.value, ..Default::default() })
            .collect();
        let mut rest = entries.as_slice();
        while !rest.is_empty() {
            let chunk = &rest[..rest.len().min(k::KVM_MAX_MSR_ENTRIES)];
            let msrs = Msrs::from_entries(chunk)
                .map_err(|_| self.error("KVM_SET_MSRS", std::io::Error::from_raw_os_error(libc::E2BIG)))?;
            let set = self.fd.set_msrs(&msrs).map_err(|e| self.error("KVM_SET_MSRS", e))?;
            let Some(refused) = chunk.get(set) else {
                rest = &rest[chunk.len()..];
                continue;
            };
            self.refused_msr(refused.index, refused.data)?;
            rest = &rest[set + 1..];
        }
        Ok(())
    }

    /// An MSR that KVM does not take back does no harm where it has the value already (many are
    /// read-only), or where it is absent here and was zero.
    fn refused_msr(&self, index: u32, saved: u64) -> Result<()> {
        let here = read_msrs(&self.fd, &[index]).map_err(|e| self.error("KVM_GET_MSRS", e))?;
        let here = here.first().map(|m| m.value);
        if here == Some(saved) || here.is_none() && saved == 0 {
            return Ok(());
        }
        if describes_processor(index) {
            log::debug!("KVM: MSR {index:#x} stays {here:x?}, and does not become {saved:#x}");
            return Ok(());
        }
        Err(Error::State {
            what: "a model-specific register",
            expected: match here {
                Some(value) => format!("MSR {index:#x} to stay {value:#x}"),
                None => format!("no MSR {index:#x}, which this host or the vCPU's CPUID does not have"),
            },
            found: format!("{saved:#x}"),
        })
    }
}

/// Which components an XSAVE area holds (SDM vol. 1, 13.4.2: the first 8 bytes of its header).
fn xstate_bv(area: &[u8]) -> u64 {
    area.get(512..520).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}
