//! KVM's structures to and from the backend-neutral state.

use kvm_bindings as k;

use crate::cpuid::{Cpuid, CpuidEntry};
use crate::error::{Error, Result};
use crate::state::{
    DebugRegs, DescriptorTable, Events, ExceptionEvent, InterruptEvent, IoapicState, LapicState, PicState,
    PitChannelState, PitState, Regs, RunState, Segment, Sregs,
};

macro_rules! same_fields {
    ($kvm:ty, $ours:ty, $($field:ident),*) => {
        impl From<$kvm> for $ours {
            fn from(r: $kvm) -> Self {
                Self { $($field: r.$field),* }
            }
        }

        impl From<&$ours> for $kvm {
            fn from(r: &$ours) -> Self {
                Self { $($field: r.$field),* }
            }
        }
    };
}

same_fields!(
    k::kvm_regs,
    Regs,
    rax,
    rbx,
    rcx,
    rdx,
    rsi,
    rdi,
    rsp,
    rbp,
    r8,
    r9,
    r10,
    r11,
    r12,
    r13,
    r14,
    r15,
    rip,
    rflags
);

impl From<k::kvm_segment> for Segment {
    fn from(s: k::kvm_segment) -> Self {
        Self {
            selector: s.selector,
            base: s.base,
            limit: s.limit,
            kind: s.type_,
            present: s.present != 0,
            code_or_data: s.s != 0,
            dpl: s.dpl,
            big: s.db != 0,
            long: s.l != 0,
            granular: s.g != 0,
            available: s.avl != 0,
            unusable: s.unusable != 0,
        }
    }
}

impl From<&Segment> for k::kvm_segment {
    fn from(s: &Segment) -> Self {
        Self {
            base: s.base,
            limit: s.limit,
            selector: s.selector,
            type_: s.kind,
            present: s.present.into(),
            dpl: s.dpl,
            db: s.big.into(),
            s: s.code_or_data.into(),
            l: s.long.into(),
            g: s.granular.into(),
            avl: s.available.into(),
            unusable: s.unusable.into(),
            padding: 0,
        }
    }
}

impl From<k::kvm_dtable> for DescriptorTable {
    fn from(t: k::kvm_dtable) -> Self {
        Self { base: t.base, limit: t.limit }
    }
}

impl From<&DescriptorTable> for k::kvm_dtable {
    fn from(t: &DescriptorTable) -> Self {
        Self { base: t.base, limit: t.limit, ..Self::default() }
    }
}

impl From<k::kvm_sregs> for Sregs {
    fn from(s: k::kvm_sregs) -> Self {
        Self {
            cs: s.cs.into(),
            ds: s.ds.into(),
            es: s.es.into(),
            fs: s.fs.into(),
            gs: s.gs.into(),
            ss: s.ss.into(),
            tr: s.tr.into(),
            ldt: s.ldt.into(),
            gdt: s.gdt.into(),
            idt: s.idt.into(),
            cr0: s.cr0,
            cr2: s.cr2,
            cr3: s.cr3,
            cr4: s.cr4,
            cr8: s.cr8,
            efer: s.efer,
            apic_base: s.apic_base,
        }
    }
}

impl From<&Sregs> for k::kvm_sregs {
    fn from(s: &Sregs) -> Self {
        Self {
            cs: (&s.cs).into(),
            ds: (&s.ds).into(),
            es: (&s.es).into(),
            fs: (&s.fs).into(),
            gs: (&s.gs).into(),
            ss: (&s.ss).into(),
            tr: (&s.tr).into(),
            ldt: (&s.ldt).into(),
            gdt: (&s.gdt).into(),
            idt: (&s.idt).into(),
            cr0: s.cr0,
            cr2: s.cr2,
            cr3: s.cr3,
            cr4: s.cr4,
            cr8: s.cr8,
            efer: s.efer,
            apic_base: s.apic_base,
            // An accepted interrupt is part of the events.
            interrupt_bitmap: [0; 4],
        }
    }
}

impl From<k::kvm_debugregs> for DebugRegs {
    fn from(d: k::kvm_debugregs) -> Self {
        Self { addresses: d.db, dr6: d.dr6, dr7: d.dr7 }
    }
}

impl From<&DebugRegs> for k::kvm_debugregs {
    fn from(d: &DebugRegs) -> Self {
        Self { db: d.addresses, dr6: d.dr6, dr7: d.dr7, ..Self::default() }
    }
}

/// Bits of `kvm_vcpu_events::interrupt::shadow`.
const SHADOW_MOV_SS: u8 = 1;
const SHADOW_STI: u8 = 2;

impl From<k::kvm_vcpu_events> for Events {
    fn from(e: k::kvm_vcpu_events) -> Self {
        let present = e.exception.pending != 0 || e.exception.injected != 0;
        let exception = ExceptionEvent {
            pending: e.exception.pending != 0,
            injected: e.exception.injected != 0,
            vector: e.exception.nr,
            error_code: (e.exception.has_error_code != 0).then_some(e.exception.error_code),
            payload: (e.exception_has_payload != 0).then_some(e.exception_payload),
        };
        Self {
            // KVM leaves the details of the last exception behind.
            exception: if present { exception } else { ExceptionEvent::default() },
            interrupt: (e.interrupt.injected != 0)
                .then_some(InterruptEvent { vector: e.interrupt.nr, software: e.interrupt.soft != 0 }),
            sti_shadow: e.interrupt.shadow & SHADOW_STI != 0,
            mov_ss_shadow: e.interrupt.shadow & SHADOW_MOV_SS != 0,
            nmi_injected: e.nmi.injected != 0,
            nmi_pending: e.nmi.pending != 0,
            nmi_masked: e.nmi.masked != 0,
            sipi_vector: e.sipi_vector,
            smm: e.smi.smm != 0,
            smi_pending: e.smi.pending != 0,
            init_latched: e.smi.latched_init != 0,
        }
    }
}

impl Events {
    /// KVM's structure. `with_payload` tells whether the VM has KVM_CAP_EXCEPTION_PAYLOAD enabled,
    /// `with_smm` whether it has SMM; without them KVM refuses the fields.
    pub(super) fn to_kvm(self, with_payload: bool, with_smm: bool) -> k::kvm_vcpu_events {
        let mut flags = k::KVM_VCPUEVENT_VALID_NMI_PENDING
            | k::KVM_VCPUEVENT_VALID_SIPI_VECTOR
            | k::KVM_VCPUEVENT_VALID_SHADOW;
        if with_payload {
            flags |= k::KVM_VCPUEVENT_VALID_PAYLOAD;
        }
        if with_smm {
            flags |= k::KVM_VCPUEVENT_VALID_SMM;
        }
        let mut events = k::kvm_vcpu_events { flags, sipi_vector: self.sipi_vector, ..Default::default() };
        // Without payloads KVM has one flag for both, and delivers the exception again.
        let injected = self.exception.injected || self.exception.pending && !with_payload;
        events.exception.injected = injected.into();
        events.exception.pending = (self.exception.pending && with_payload).into();
        events.exception.nr = self.exception.vector;
        events.exception.has_error_code = self.exception.error_code.is_some().into();
        events.exception.error_code = self.exception.error_code.unwrap_or(0);
        if with_payload {
            events.exception_has_payload = self.exception.payload.is_some().into();
            events.exception_payload = self.exception.payload.unwrap_or(0);
        }
        if let Some(interrupt) = self.interrupt {
            events.interrupt.injected = 1;
            events.interrupt.nr = interrupt.vector;
            events.interrupt.soft = interrupt.software.into();
        }
        let shadow = |on, bit| if on { bit } else { 0 };
        events.interrupt.shadow =
            shadow(self.sti_shadow, SHADOW_STI) | shadow(self.mov_ss_shadow, SHADOW_MOV_SS);
        events.nmi.injected = self.nmi_injected.into();
        events.nmi.pending = self.nmi_pending.into();
        events.nmi.masked = self.nmi_masked.into();
        events.smi.smm = self.smm.into();
        events.smi.pending = self.smi_pending.into();
        events.smi.latched_init = self.init_latched.into();
        events
    }
}

impl TryFrom<k::kvm_mp_state> for RunState {
    type Error = Error;

    fn try_from(state: k::kvm_mp_state) -> Result<Self> {
        Ok(match state.mp_state {
            k::KVM_MP_STATE_RUNNABLE => Self::Running,
            k::KVM_MP_STATE_UNINITIALIZED => Self::WaitForInit,
            k::KVM_MP_STATE_INIT_RECEIVED | k::KVM_MP_STATE_SIPI_RECEIVED => Self::WaitForSipi,
            k::KVM_MP_STATE_HALTED => Self::Halted,
            other => {
                return Err(Error::State {
                    what: "the run state of a vCPU",
                    expected: "running, halted or waiting for INIT or SIPI".into(),
                    found: format!("KVM's mp_state {other}"),
                });
            }
        })
    }
}

impl From<RunState> for k::kvm_mp_state {
    fn from(state: RunState) -> Self {
        let mp_state = match state {
            RunState::Running => k::KVM_MP_STATE_RUNNABLE,
            RunState::WaitForInit => k::KVM_MP_STATE_UNINITIALIZED,
            RunState::WaitForSipi => k::KVM_MP_STATE_INIT_RECEIVED,
            RunState::Halted => k::KVM_MP_STATE_HALTED,
        };
        Self { mp_state }
    }
}

/// Registers of a LAPIC, each in 16 bytes of its page.
const LAPIC_REGISTERS: usize = 64;

impl From<&k::kvm_lapic_state> for LapicState {
    fn from(lapic: &k::kvm_lapic_state) -> Self {
        let register = |at: &[i8]| u32::from_le_bytes([0, 1, 2, 3].map(|i| at[i].cast_unsigned()));
        Self { registers: lapic.regs.chunks_exact(16).map(register).collect() }
    }
}

impl TryFrom<&LapicState> for k::kvm_lapic_state {
    type Error = Error;

    fn try_from(lapic: &LapicState) -> Result<Self> {
        if lapic.registers.len() != LAPIC_REGISTERS {
            return Err(Error::State {
                what: "a local APIC",
                expected: format!("{LAPIC_REGISTERS} registers"),
                found: format!("{}", lapic.registers.len()),
            });
        }
        let mut regs = [0; 1024];
        for (at, register) in regs.chunks_exact_mut(16).zip(&lapic.registers) {
            at[..4].copy_from_slice(&register.to_le_bytes().map(u8::cast_signed));
        }
        Ok(Self { regs })
    }
}

impl From<k::kvm_pic_state> for PicState {
    fn from(p: k::kvm_pic_state) -> Self {
        Self {
            last_irr: p.last_irr,
            irr: p.irr,
            imr: p.imr,
            isr: p.isr,
            priority_add: p.priority_add,
            irq_base: p.irq_base,
            read_isr: p.read_reg_select != 0,
            poll: p.poll != 0,
            special_mask: p.special_mask != 0,
            init_state: p.init_state,
            auto_eoi: p.auto_eoi != 0,
            rotate_on_auto_eoi: p.rotate_on_auto_eoi != 0,
            special_fully_nested: p.special_fully_nested_mode != 0,
            init4: p.init4 != 0,
            elcr: p.elcr,
            elcr_mask: p.elcr_mask,
        }
    }
}

impl From<&PicState> for k::kvm_pic_state {
    fn from(p: &PicState) -> Self {
        Self {
            last_irr: p.last_irr,
            irr: p.irr,
            imr: p.imr,
            isr: p.isr,
            priority_add: p.priority_add,
            irq_base: p.irq_base,
            read_reg_select: p.read_isr.into(),
            poll: p.poll.into(),
            special_mask: p.special_mask.into(),
            init_state: p.init_state,
            auto_eoi: p.auto_eoi.into(),
            rotate_on_auto_eoi: p.rotate_on_auto_eoi.into(),
            special_fully_nested_mode: p.special_fully_nested.into(),
            init4: p.init4.into(),
            elcr: p.elcr,
            elcr_mask: p.elcr_mask,
        }
    }
}

impl IoapicState {
    /// From KVM's structure, the redirection entries given apart: they are a union there.
    pub(super) fn from_kvm(ioapic: &k::kvm_ioapic_state, redirection: Vec<u64>) -> Self {
        Self {
            base: ioapic.base_address,
            ioregsel: ioapic.ioregsel,
            id: ioapic.id,
            irr: ioapic.irr,
            redirection,
        }
    }
}

impl TryFrom<&IoapicState> for k::kvm_ioapic_state {
    type Error = Error;

    fn try_from(ioapic: &IoapicState) -> Result<Self> {
        let mut state = Self {
            base_address: ioapic.base,
            ioregsel: ioapic.ioregsel,
            id: ioapic.id,
            irr: ioapic.irr,
            ..Self::default()
        };
        if ioapic.redirection.len() != state.redirtbl.len() {
            return Err(Error::State {
                what: "the I/O APIC",
                expected: format!("{} redirection entries", state.redirtbl.len()),
                found: format!("{}", ioapic.redirection.len()),
            });
        }
        for (entry, bits) in state.redirtbl.iter_mut().zip(&ioapic.redirection) {
            entry.bits = *bits;
        }
        Ok(state)
    }
}

impl From<k::kvm_pit_channel_state> for PitChannelState {
    fn from(c: k::kvm_pit_channel_state) -> Self {
        Self {
            count: c.count,
            latched_count: c.latched_count,
            count_latched: c.count_latched,
            status: c.status,
            status_latched: c.status_latched != 0,
            read_state: c.read_state,
            write_state: c.write_state,
            write_latch: c.write_latch,
            rw_mode: c.rw_mode,
            mode: c.mode,
            bcd: c.bcd != 0,
            gate: c.gate != 0,
            count_load_time_ns: c.count_load_time,
        }
    }
}

impl From<&PitChannelState> for k::kvm_pit_channel_state {
    fn from(c: &PitChannelState) -> Self {
        Self {
            count: c.count,
            latched_count: c.latched_count,
            count_latched: c.count_latched,
            status_latched: c.status_latched.into(),
            status: c.status,
            read_state: c.read_state,
            write_state: c.write_state,
            write_latch: c.write_latch,
            rw_mode: c.rw_mode,
            mode: c.mode,
            bcd: c.bcd.into(),
            gate: c.gate.into(),
            count_load_time: c.count_load_time_ns,
        }
    }
}

impl From<k::kvm_pit_state2> for PitState {
    fn from(p: k::kvm_pit_state2) -> Self {
        Self {
            channels: p.channels.map(PitChannelState::from),
            speaker_data_on: p.flags & k::KVM_PIT_FLAGS_SPEAKER_DATA_ON != 0,
            hpet_legacy: p.flags & k::KVM_PIT_FLAGS_HPET_LEGACY != 0,
        }
    }
}

impl From<&PitState> for k::kvm_pit_state2 {
    fn from(p: &PitState) -> Self {
        let flag = |on, bit| if on { bit } else { 0 };
        Self {
            channels: [0, 1, 2].map(|i| (&p.channels[i]).into()),
            flags: flag(p.speaker_data_on, k::KVM_PIT_FLAGS_SPEAKER_DATA_ON)
                | flag(p.hpet_legacy, k::KVM_PIT_FLAGS_HPET_LEGACY),
            ..Self::default()
        }
    }
}

impl From<&k::CpuId> for Cpuid {
    fn from(cpuid: &k::CpuId) -> Self {
        Cpuid::new(cpuid.as_slice().iter().map(|e| CpuidEntry {
            leaf: e.function,
            subleaf: (e.flags & k::KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0).then_some(e.index),
            eax: e.eax,
            ebx: e.ebx,
            ecx: e.ecx,
            edx: e.edx,
        }))
    }
}

/// KVM's table for KVM_SET_CPUID2.
pub(super) fn cpuid_to_kvm(cpuid: &Cpuid) -> Result<k::CpuId> {
    let entries: Vec<_> = cpuid
        .entries()
        .iter()
        .map(|e| k::kvm_cpuid_entry2 {
            function: e.leaf,
            index: e.subleaf.unwrap_or(0),
            flags: if e.subleaf.is_some() { k::KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
            eax: e.eax,
            ebx: e.ebx,
            ecx: e.ecx,
            edx: e.edx,
            padding: [0; 3],
        })
        .collect();
    k::CpuId::from_entries(&entries).map_err(|_| Error::Config {
        what: "CPUID",
        value: format!("{} entries", entries.len()),
        fix: format!("KVM takes at most {}", k::KVM_MAX_CPUID_ENTRIES),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A value that differs in every field, so that a field that is forgotten or exchanged shows.
    fn segment() -> Segment {
        Segment {
            selector: 0x18,
            base: 0x1234_5678,
            limit: 0xf_ffff,
            kind: 0xb,
            present: true,
            code_or_data: true,
            dpl: 3,
            big: true,
            long: false,
            granular: true,
            available: false,
            unusable: false,
        }
    }

    #[test]
    fn segments_and_sregs_survive_both_ways() {
        let mut sregs =
            Sregs { cr0: 1, cr2: 2, cr3: 3, cr4: 4, cr8: 5, efer: 6, apic_base: 7, ..Default::default() };
        sregs.cs = segment();
        sregs.ds = Segment { big: false, long: true, ..segment() };
        sregs.es = Segment { granular: false, available: true, ..segment() };
        sregs.fs = Segment { present: false, unusable: true, ..segment() };
        sregs.gs = Segment { code_or_data: false, ..segment() };
        sregs.ss = Segment { dpl: 1, ..segment() };
        sregs.tr = Segment { selector: 0x28, ..segment() };
        sregs.ldt = Segment { selector: 0x30, ..segment() };
        sregs.gdt = DescriptorTable { base: 0x1000, limit: 0x37 };
        sregs.idt = DescriptorTable { base: 0x2000, limit: 0xfff };
        assert_eq!(Sregs::from(k::kvm_sregs::from(&sregs)), sregs);
    }

    #[test]
    fn events_survive_both_ways() {
        let events = Events {
            exception: ExceptionEvent {
                pending: true,
                injected: false,
                vector: 14,
                error_code: Some(2),
                payload: Some(0xdead_b000),
            },
            interrupt: Some(InterruptEvent { vector: 0x31, software: true }),
            sti_shadow: true,
            mov_ss_shadow: false,
            nmi_injected: true,
            nmi_pending: false,
            nmi_masked: true,
            sipi_vector: 0x9f,
            smm: false,
            smi_pending: true,
            init_latched: true,
        };
        assert_eq!(Events::from(events.to_kvm(true, true)), events);
        assert_eq!(Events::from(Events::default().to_kvm(true, true)), Events::default());
        // Where payloads cannot be told, the exception is at least delivered.
        assert!(Events::from(events.to_kvm(false, true)).exception.injected);
    }

    #[test]
    fn lapic_registers_are_at_multiples_of_16_bytes() {
        let lapic = LapicState { registers: (0..64).map(|n| n * 0x0101_0101).collect() };
        let kvm = k::kvm_lapic_state::try_from(&lapic).unwrap();
        assert_eq!(kvm.regs[0x20], 2);
        assert_eq!(LapicState::from(&kvm), lapic);
        let short = LapicState { registers: vec![0; 3] };
        assert!(k::kvm_lapic_state::try_from(&short).unwrap_err().to_string().contains("64 registers"));
    }

    #[test]
    fn timer_and_controllers_survive_both_ways() {
        let channel = PitChannelState {
            count: 65536,
            latched_count: 2,
            count_latched: 3,
            status: 4,
            status_latched: true,
            read_state: 5,
            write_state: 6,
            write_latch: 7,
            rw_mode: 3,
            mode: 2,
            bcd: true,
            gate: true,
            count_load_time_ns: -9,
        };
        let pit = PitState { channels: [channel; 3], speaker_data_on: true, hpet_legacy: false };
        assert_eq!(PitState::from(k::kvm_pit_state2::from(&pit)), pit);
        let pic = PicState {
            last_irr: 1,
            irr: 2,
            imr: 3,
            isr: 4,
            poll: true,
            elcr_mask: 0xde,
            ..Default::default()
        };
        assert_eq!(PicState::from(k::kvm_pic_state::from(&pic)), pic);
    }
}
