//! A vCPU's state as plain data, and back.

use super::clock::TSC_KHZ_RANGE;
use super::cpu::op::RIP;
use super::cpu::{CS, Cpu, DS, ES, FS, GS, SS, cr0, efer};
use super::link::attention;
use super::vcpu::SoftVcpu;
use crate::error::{Error, Result};
use crate::state::{
    Events, InterruptEvent, Msr, Regs, RunState, Segment, Sregs, VcpuState, describes_processor,
};

/// The standard XSAVE area of x87 and SSE, without and with its header, in bytes.
const FXSAVE_LEN: usize = 512;
const XSAVE_LEN: usize = 576;

impl Cpu {
    pub(in crate::soft) fn save_regs(&self) -> Regs {
        let r = |n| self.r64(n);
        Regs {
            rax: r(0),
            rcx: r(1),
            rdx: r(2),
            rbx: r(3),
            rsp: r(4),
            rbp: r(5),
            rsi: r(6),
            rdi: r(7),
            r8: r(8),
            r9: r(9),
            r10: r(10),
            r11: r(11),
            r12: r(12),
            r13: r(13),
            r14: r(14),
            r15: r(15),
            rip: r(RIP.into()),
            rflags: self.rflags(),
        }
    }

    pub(in crate::soft) fn restore_regs(&mut self, regs: &Regs) {
        let Regs {
            rax,
            rcx,
            rdx,
            rbx,
            rsp,
            rbp,
            rsi,
            rdi,
            r8,
            r9,
            r10,
            r11,
            r12,
            r13,
            r14,
            r15,
            rip,
            rflags,
        } = *regs;
        let values = [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];
        values.into_iter().enumerate().for_each(|(n, value)| self.set_r64(n, value));
        self.set_rip(rip);
        self.set_rflags(rflags);
    }

    pub(in crate::soft) fn save_sregs(&self) -> Sregs {
        let lapic = self.lapic.as_ref();
        Sregs {
            cs: *self.segment(CS),
            ds: *self.segment(DS),
            es: *self.segment(ES),
            fs: *self.segment(FS),
            gs: *self.segment(GS),
            ss: *self.segment(SS),
            tr: self.tr,
            ldt: self.ldt,
            gdt: self.gdt,
            idt: self.idt,
            cr0: self.cr0,
            cr2: self.cr2,
            cr3: self.cr3,
            cr4: self.cr4,
            cr8: lapic.map_or(self.cr8, |lapic| lapic.cr8()),
            efer: self.efer,
            apic_base: lapic.map_or(0xfee0_0900, |lapic| lapic.base()),
        }
    }

    pub(in crate::soft) fn restore_sregs(&mut self, sregs: &Sregs) -> Result<()> {
        let paged = sregs.cr0 & cr0::PG != 0;
        let long = sregs.efer & efer::LME != 0 && paged;
        if paged && sregs.cr0 & cr0::PE == 0 || long != (sregs.efer & efer::LMA != 0) {
            return Err(Error::Config {
                what: "special registers",
                value: format!("cr0 {:#x}, cr4 {:#x}, efer {:#x}", sregs.cr0, sregs.cr4, sregs.efer),
                fix: "CR0.PG needs CR0.PE, and EFER.LMA is EFER.LME with CR0.PG".into(),
            });
        }
        (self.tr, self.ldt, self.gdt, self.idt) = (sregs.tr, sregs.ldt, sregs.gdt, sregs.idt);
        (self.cr0, self.cr2, self.cr3, self.cr4) = (sregs.cr0 | cr0::ET, sregs.cr2, sregs.cr3, sregs.cr4);
        self.efer = sregs.efer;
        self.cr8 = sregs.cr8;
        if let Some(lapic) = &mut self.lapic {
            if !lapic.force_base(sregs.apic_base) {
                return Err(Error::Config {
                    what: "IA32_APIC_BASE",
                    value: format!("{:#x}", sregs.apic_base),
                    fix: "reserved bits must be clear, and x2APIC mode needs the APIC enabled".into(),
                });
            }
            lapic.set_cr8(sregs.cr8);
        }
        let segments = [(ES, sregs.es), (SS, sregs.ss), (DS, sregs.ds), (FS, sregs.fs), (GS, sregs.gs)];
        segments.into_iter().for_each(|(n, segment)| self.set_segment(n, segment));
        self.set_segment(CS, sregs.cs);
        self.arm_breakpoints();
        self.paging_changed();
        Ok(())
    }
}

impl SoftVcpu {
    pub(in crate::soft) fn save_state(&self) -> VcpuState {
        let cpu = &self.cpu;
        let mut xsave = vec![0; XSAVE_LEN];
        xsave[..FXSAVE_LEN].copy_from_slice(&cpu.fp.bytes());
        // XSTATE_BV: both components are present.
        xsave[FXSAVE_LEN] = 3;
        // What others have sent and this vCPU has not looked at.
        let posted = cpu.link.posted.signals();
        let mut state = VcpuState {
            id: cpu.link.id,
            regs: cpu.save_regs(),
            sregs: cpu.save_sregs(),
            debug: cpu.debug,
            xcr0: cpu.xcr0,
            xsave,
            msrs: cpu.saved_msrs(),
            events: Events {
                interrupt: self.accepted.map(|vector| InterruptEvent { vector, software: false }),
                sti_shadow: cpu.shadow.sti,
                mov_ss_shadow: cpu.shadow.mov_ss,
                nmi_pending: self.nmi_pending || posted.nmi,
                nmi_masked: cpu.nmi_masked,
                init_latched: posted.init,
                ..Events::default()
            },
            run_state: match self.run_state {
                RunState::Halted if self.unhalted || cpu.link.asked(attention::UNHALT) != 0 => {
                    RunState::Running
                }
                other => other,
            },
            lapic: cpu.lapic.as_ref().map(|lapic| lapic.save()),
            cpuid: cpu.cpuid.clone(),
            tsc_khz: Some(cpu.msrs.tsc_khz),
        };
        if let (Some(page), RunState::WaitForSipi, false) = (posted.sipi, self.run_state, posted.init) {
            // As `Cpu::start_at`: there is nothing else that a saved SIPI could wait in.
            state.regs.rip = 0;
            state.sregs.cs = Segment::real_mode(u16::from(page) << 8, true);
            state.run_state = RunState::Running;
        }
        state
    }

    /// Checks everything first, so that what does not fit changes nothing.
    pub(in crate::soft) fn restore_state(&mut self, state: &VcpuState) -> Result<()> {
        let mismatch = |what, expected: String, found: String| Err(Error::State { what, expected, found });
        let cpu = &mut self.cpu;
        if state.id != cpu.link.id {
            return mismatch("a vCPU", format!("vCPU {}", cpu.link.id), format!("vCPU {}", state.id));
        }
        if state.lapic.is_some() != cpu.lapic.is_some() {
            let name = |has| if has { "a vCPU that has a local APIC" } else { "a vCPU with no local APIC" };
            return mismatch("a vCPU", name(cpu.lapic.is_some()).into(), name(state.lapic.is_some()).into());
        }
        if state.lapic.is_none()
            && state.run_state != RunState::Running
            && state.run_state != RunState::Halted
        {
            return mismatch(
                "a vCPU",
                "a vCPU that is running or halted".into(),
                format!("{:?}", state.run_state),
            );
        }
        if state.xcr0 & !0b11 != 0 || state.xcr0 & 1 == 0 {
            return mismatch(
                "extended registers",
                "XCR0 of x87 and SSE".into(),
                format!("XCR0 {:#x}", state.xcr0),
            );
        }
        if state.xsave.len() < XSAVE_LEN {
            return mismatch(
                "extended registers",
                format!("at least {XSAVE_LEN} bytes"),
                format!("{} bytes", state.xsave.len()),
            );
        }
        if let Some(khz) = state.tsc_khz.filter(|khz| !TSC_KHZ_RANGE.contains(khz)) {
            return mismatch("the TSC's frequency", format!("{TSC_KHZ_RANGE:?} kHz"), format!("{khz} kHz"));
        }
        if let Some(msr) = state.msrs.iter().find(|msr| !cpu.takes_msr(msr)) {
            return mismatch(
                "a model-specific register",
                format!("no MSR {:#x}, which the software CPU does not have", msr.index),
                format!("{:#x}", msr.value),
            );
        }
        if state.cpuid != cpu.cpuid {
            state.cpuid.check_offered_by(&super::features::supported())?;
        }
        cpu.set_cpuid(&state.cpuid);
        // Neither what was posted nor what was asked for of the old state counts any more.
        cpu.restore_sregs(&state.sregs)?;
        if let (Some(lapic), Some(saved)) = (&mut cpu.lapic, &state.lapic) {
            lapic.restore(saved, state.sregs.apic_base)?;
        }
        cpu.repeating = false;
        // RF is kept where there are breakpoints.
        cpu.debug = state.debug;
        cpu.breakpoints.hits = 0;
        cpu.arm_breakpoints();
        cpu.restore_regs(&state.regs);
        cpu.xcr0 = state.xcr0;
        let mut fx = [0; FXSAVE_LEN];
        fx.copy_from_slice(&state.xsave[..FXSAVE_LEN]);
        cpu.fp.set_bytes(&fx);
        if let Some(khz) = state.tsc_khz.filter(|&khz| khz != 0) {
            cpu.msrs.tsc_khz = khz;
        }
        cpu.restore_msrs(&state.msrs);
        cpu.shadow.sti = state.events.sti_shadow;
        cpu.shadow.mov_ss = state.events.mov_ss_shadow;
        cpu.nmi_masked = state.events.nmi_masked;
        self.nmi_pending = state.events.nmi_pending || state.events.nmi_injected;
        if state.events.init_latched && cpu.lapic.is_some() {
            cpu.link.posted.post_init();
            cpu.link.demand(attention::INTERRUPT);
        }
        self.accepted = state.events.interrupt.filter(|event| !event.software).map(|event| event.vector);
        self.run_state = state.run_state;
        self.unhalted = false;
        Ok(())
    }
}

impl Cpu {
    /// The model-specific registers that make up the state.
    pub(in crate::soft) fn saved_msrs(&self) -> Vec<Msr> {
        self.state_msrs()
            .iter()
            .filter_map(|&index| Some(Msr { index, value: self.msr_value(index)? }))
            .collect()
    }

    /// Whether a saved register can be taken over, or need not be: it is zero, or only describes the
    /// processor that it was saved on.
    fn takes_msr(&self, msr: &Msr) -> bool {
        msr.value == 0 || describes_processor(msr.index) || self.msr_value(msr.index).is_some()
    }

    /// Takes over those registers that there are here.
    pub(in crate::soft) fn restore_msrs(&mut self, msrs: &[Msr]) {
        for msr in msrs {
            if !self.set_msr_value(msr.index, msr.value) {
                log::debug!("soft: the saved MSR {:#x} has no place here", msr.index);
            }
        }
    }
}
