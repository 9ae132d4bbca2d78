//! The registers as a saved state has them, in the layout of the page (SDM vol. 3A, table 11-1).
//!
//! In x2APIC mode too the id is in bits 24 to 31, and the upper half of ICR has a register of its own:
//! what KVM_GET_LAPIC gives where KVM_CAP_X2APIC_API is not asked for (Linux, virt/kvm/api.rst).

use super::Lapic;
use super::register::{
    CURRENT_COUNT, DFR, DIVIDE, ESR, ICR, ICR_HIGH, ID, INITIAL_COUNT, IRR, ISR, LDR, LVT_TIMER, PPR, SVR,
    TMR, TPR, VERSION, VERSION_VALUE, lvt, svr,
};
use super::x2apic_logical;
use crate::error::{Error, Result};
use crate::soft::chip::posted::Vectors;
use crate::state::LapicState;

const REGISTERS: usize = 64;

fn index(offset: u32) -> usize {
    (offset >> 4) as usize
}

impl Lapic {
    /// The registers. What has been posted counts as received.
    pub(in crate::soft) fn save(&self) -> LapicState {
        let now = self.clock.now();
        let (mut irr, mut tmr) = (self.irr, self.tmr);
        if self.is_enabled() {
            let (mut vectors, levels) = self.link.posted.vectors();
            vectors.remove_illegal();
            irr.merge(&mut tmr, &vectors, &levels);
        }
        let [vector, ..] = self.lvt[lvt::TIMER].to_le_bytes();
        // An expiry that nobody has noticed. A TSC deadline is noticed again when its MSR is restored.
        let expired = self.deadline().is_some_and(|deadline| deadline <= now);
        if expired && self.timer.tsc_deadline() == 0 && vector >= 16 && self.is_enabled() {
            irr.set(vector, true);
            tmr.set(vector, false);
        }
        let mut registers = vec![0; REGISTERS];
        let mut set = |offset, value| registers[index(offset)] = value;
        let x2apic = self.is_x2apic();
        set(ID, if x2apic { self.link.id } else { self.id.into() } << 24);
        set(VERSION, VERSION_VALUE);
        set(TPR, self.tpr.into());
        set(PPR, self.ppr().into());
        set(LDR, if x2apic { x2apic_logical(self.link.id) } else { u32::from(self.logical) << 24 });
        set(DFR, u32::from(self.model) << 28 | 0x0fff_ffff);
        set(SVR, self.svr);
        set(ESR, self.esr);
        set(ICR, self.icr_low());
        set(ICR_HIGH, self.icr_high());
        set(INITIAL_COUNT, self.timer.initial());
        set(CURRENT_COUNT, self.timer.current(now));
        set(DIVIDE, self.timer.divide());
        for (first, vectors) in [(ISR, &self.isr), (TMR, &tmr), (IRR, &irr)] {
            (0..8).for_each(|n| registers[index(first) + n] = vectors.register(n));
        }
        registers[index(LVT_TIMER)..][..lvt::COUNT].copy_from_slice(&self.lvt);
        LapicState { registers }
    }

    /// Takes over a saved state; what has been posted meanwhile is dropped. The machine's time must have
    /// been restored before. IA32_TSC_DEADLINE comes after, as an MSR.
    ///
    /// # Errors
    /// Where the state cannot be a local APIC's.
    pub(in crate::soft) fn restore(&mut self, state: &LapicState, apic_base: u64) -> Result<()> {
        let error =
            |what, expected: &str, found| Err(Error::State { what, expected: expected.into(), found });
        if state.registers.len() != REGISTERS {
            return error("a local APIC", "64 registers", state.registers.len().to_string());
        }
        if !Self::is_valid_base(apic_base) {
            let expected = "an address, and x2APIC mode only with the APIC enabled";
            return error("IA32_APIC_BASE", expected, format!("{apic_base:#x}"));
        }
        self.force_base(apic_base);
        let _ = self.link.posted.take_vectors();
        let _ = self.link.posted.take_signals();
        let get = |offset| state.registers[index(offset)];
        let upper = |offset| get(offset).to_le_bytes()[3];
        let vectors = |first| Vectors::from_registers(|n| state.registers[index(first) + n]);
        if !self.is_x2apic() {
            self.id = upper(ID);
            self.logical = upper(LDR);
        }
        [self.tpr, ..] = get(TPR).to_le_bytes();
        self.model = upper(DFR) >> 4;
        self.svr = get(SVR) & svr::WRITABLE;
        (self.isr, self.tmr, self.irr) = (vectors(ISR), vectors(TMR), vectors(IRR));
        (self.esr, self.errors) = (get(ESR), 0);
        self.icr = u64::from(get(ICR_HIGH)) << 32 | u64::from(get(ICR));
        for (n, register) in self.lvt.iter_mut().enumerate() {
            *register = state.registers[index(LVT_TIMER) + n] & lvt::WRITABLE[n];
        }
        let timer = self.lvt[lvt::TIMER];
        let now = self.clock.now();
        self.timer.restore(timer, get(DIVIDE), get(INITIAL_COUNT), get(CURRENT_COUNT), now);
        self.publish();
        Ok(())
    }
}
