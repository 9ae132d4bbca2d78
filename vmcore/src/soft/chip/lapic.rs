//! The local APIC (SDM vol. 3A, chapter 11): an integrated one, in xAPIC or x2APIC mode.
//!
//! What others send it waits in its [`Posted`](super::Posted) until its vCPU's thread takes it over,
//! between two blocks. All else belongs to that thread alone. An interrupt is delivered in the same
//! step in which it is found to be the one with the highest priority, so that the task priority cannot
//! rise in between: no spurious interrupt ever comes.

mod access;
mod ipi;
mod register;
mod state;
#[cfg(test)]
mod tests;
mod timer;

use std::sync::Arc;

use self::register::{VERSION_VALUE, base, esr, lvt, svr};
use self::timer::Timer;
use super::bus::delivery;
use super::posted::{Address, Vectors, x2apic_logical};
use super::{Chipset, Signals};
use crate::soft::clock::Clock;
use crate::soft::link::{Link, attention};
use crate::soft::mmu::PHYSICAL_BITS;

/// One vCPU's local APIC; the vCPU's thread owns it.
#[derive(Debug)]
pub(in crate::soft) struct Lapic {
    link: Arc<Link>,
    chipset: Arc<Chipset>,
    clock: Arc<Clock>,
    /// IA32_APIC_BASE.
    base: u64,
    /// The id of xAPIC mode; that of x2APIC mode is the vCPU's number.
    id: u8,
    tpr: u8,
    /// Logical id of xAPIC mode.
    logical: u8,
    /// DFR's model.
    model: u8,
    svr: u32,
    isr: Vectors,
    /// Those of `irr` and `isr` that are level-triggered.
    tmr: Vectors,
    irr: Vectors,
    /// Error status register, as of the last write to it.
    esr: u32,
    /// Errors since then.
    errors: u32,
    /// ICR with its upper half.
    icr: u64,
    lvt: [u32; lvt::COUNT],
    timer: Timer,
}

impl Lapic {
    pub(in crate::soft) fn new(link: Arc<Link>, chipset: Arc<Chipset>, clock: Arc<Clock>) -> Self {
        let bootstrap = if link.id == 0 { base::BOOTSTRAP } else { 0 };
        let mut lapic = Self {
            id: Self::xapic_id(&link),
            link,
            chipset,
            clock,
            base: base::DEFAULT | base::ENABLED | bootstrap,
            tpr: 0,
            logical: 0,
            model: 0,
            svr: 0,
            isr: Vectors::default(),
            tmr: Vectors::default(),
            irr: Vectors::default(),
            esr: 0,
            errors: 0,
            icr: 0,
            lvt: [0; lvt::COUNT],
            timer: Timer::new(),
        };
        lapic.init();
        lapic
    }

    /// The id of xAPIC mode after reset.
    fn xapic_id(link: &Link) -> u8 {
        let [id, ..] = link.id.to_le_bytes();
        id
    }

    /// As INIT leaves it (SDM vol. 3A, 11.4.7.3): ids and mode stay.
    pub(in crate::soft) fn init(&mut self) {
        self.tpr = 0;
        self.logical = 0;
        self.model = 0xf;
        self.svr = 0xff;
        (self.isr, self.tmr, self.irr) = Default::default();
        (self.esr, self.errors, self.icr) = (0, 0, 0);
        self.lvt = [lvt::MASKED; lvt::COUNT];
        if self.link.id == 0 {
            // What a PC's firmware leaves behind: PIC mode by virtual wire (MP specification 3.6.2.2), for
            // systems that begin without firmware and do not use the APIC.
            self.lvt[lvt::LINT0] = delivery::EXTINT << 8;
        }
        self.timer.reset();
        self.publish();
    }

    /// Tells senders what has become of what they must know.
    fn publish(&self) {
        let x2apic = self.is_x2apic();
        self.link.posted.set_address(Address {
            id: if x2apic { self.link.id } else { self.id.into() },
            logical: self.logical,
            model: self.model,
            enabled: self.is_enabled(),
            x2apic,
            software_enabled: self.is_software_enabled(),
        });
        self.link.posted.set_priority(self.tpr.into());
    }

    fn is_enabled(&self) -> bool {
        self.base & base::ENABLED != 0
    }

    fn is_x2apic(&self) -> bool {
        self.base & base::X2APIC != 0
    }

    fn is_software_enabled(&self) -> bool {
        self.svr & svr::ENABLED != 0
    }

    /// IA32_APIC_BASE.
    pub(in crate::soft) fn base(&self) -> u64 {
        self.base
    }

    /// Whether IA32_APIC_BASE can be `value` at all.
    fn is_valid_base(value: u64) -> bool {
        let address = (1u64 << PHYSICAL_BITS) - 0x1000;
        let reserved = value & !(address | base::BOOTSTRAP | base::X2APIC | base::ENABLED);
        reserved == 0 && value & (base::X2APIC | base::ENABLED) != base::X2APIC
    }

    /// Sets IA32_APIC_BASE as the guest does. `false`: #GP, for what is reserved, and for the changes of
    /// mode that SDM vol. 3A, 11.12.5 excludes: from x2APIC to xAPIC and from disabled to x2APIC.
    pub(in crate::soft) fn set_base(&mut self, value: u64) -> bool {
        let x2apic = value & base::X2APIC != 0;
        let leaves = self.is_x2apic() && !x2apic && value & base::ENABLED != 0;
        let leaps = !self.is_enabled() && x2apic;
        !leaves && !leaps && self.force_base(value)
    }

    /// Sets IA32_APIC_BASE as a restored state has it, whatever it was. `false`: it cannot be `value`.
    pub(in crate::soft) fn force_base(&mut self, value: u64) -> bool {
        if !Self::is_valid_base(value) {
            return false;
        }
        let (was_enabled, was_x2apic) = (self.is_enabled(), self.is_x2apic());
        self.base = value;
        if was_enabled && !self.is_enabled() {
            // Enabled again, it is as after power-up (11.4.3).
            self.id = Self::xapic_id(&self.link);
            self.init();
        } else if was_x2apic != self.is_x2apic() {
            self.icr = 0;
        }
        self.publish();
        true
    }

    /// CR8: the task priority's upper half.
    pub(in crate::soft) fn cr8(&self) -> u64 {
        (self.tpr >> 4).into()
    }

    pub(in crate::soft) fn set_cr8(&mut self, value: u64) {
        let [low, ..] = value.to_le_bytes();
        self.set_tpr(low << 4);
    }

    fn set_tpr(&mut self, value: u8) {
        self.tpr = value;
        self.link.posted.set_priority(value.into());
        self.attend();
    }

    /// Processor priority (11.8.3.1).
    fn ppr(&self) -> u8 {
        let in_service = self.isr.highest().unwrap_or(0) & 0xf0;
        if self.tpr & 0xf0 >= in_service { self.tpr } else { in_service }
    }

    /// Gets its own CPU's attention where an interrupt has become deliverable.
    fn attend(&self) {
        if self.pending().is_some() {
            self.link.demand_own(attention::EVENT);
        }
    }

    /// Takes over what has been posted.
    pub(in crate::soft) fn take_posted(&mut self) -> Signals {
        self.take_vectors();
        self.link.posted.take_signals()
    }

    /// Takes over the interrupts that have been posted.
    fn take_vectors(&mut self) {
        let (mut vectors, levels) = self.link.posted.take_vectors();
        if vectors == Vectors::default() || !self.is_enabled() {
            return;
        }
        let illegal = vectors.remove_illegal();
        self.irr.merge(&mut self.tmr, &vectors, &levels);
        if illegal {
            self.error(esr::RECEIVE_ILLEGAL_VECTOR);
        }
    }

    /// The vector that would interrupt now: pending and above the processor priority. Also where the
    /// APIC is disabled by software: what it had accepted before stays (11.4.7.2).
    pub(in crate::soft) fn pending(&self) -> Option<u8> {
        let vector = self.irr.highest()?;
        (vector >> 4 > self.ppr() >> 4 && self.is_enabled()).then_some(vector)
    }

    /// The CPU takes interrupt `vector`: it is in service.
    pub(in crate::soft) fn accept(&mut self, vector: u8) {
        self.irr.set(vector, false);
        self.isr.set(vector, true);
    }

    fn end_of_interrupt(&mut self) {
        let Some(vector) = self.isr.highest() else { return };
        self.isr.set(vector, false);
        if self.tmr.contains(vector) {
            self.chipset.end_of_interrupt(vector);
        }
        self.attend();
    }

    /// Whether the PIC's output reaches the CPU through LINT0 (or the APIC is disabled).
    pub(in crate::soft) fn accepts_pic(&self) -> bool {
        let lint0 = self.lvt[lvt::LINT0];
        !self.is_enabled() || lint0 & (7 << 8 | lvt::MASKED) == delivery::EXTINT << 8
    }

    /// Accepts an edge-triggered interrupt from inside.
    fn raise(&mut self, vector: u8) {
        if vector < 16 {
            self.error(esr::RECEIVE_ILLEGAL_VECTOR);
            return;
        }
        self.irr.set(vector, true);
        self.tmr.set(vector, false);
        self.attend();
    }

    /// Raises what LVT register `n`, the timer's or the error's, says.
    fn raise_local(&mut self, n: usize) {
        let register = self.lvt[n];
        if register & lvt::MASKED == 0 && self.is_enabled() {
            let [vector, ..] = register.to_le_bytes();
            self.raise(vector);
        }
    }

    /// Notes errors, and raises the error interrupt for those that are new.
    fn error(&mut self, bits: u32) {
        let new = bits & !self.errors;
        self.errors |= bits;
        if new != 0 {
            self.raise_local(lvt::ERROR);
        }
    }

    /// Raises the timer's interrupt where it is due.
    pub(in crate::soft) fn poll(&mut self) {
        if self.timer.advance(self.clock.now()) {
            self.raise_local(lvt::TIMER);
        }
    }

    /// The machine's time in ns at which [`Lapic::poll`] has something to do next.
    pub(in crate::soft) fn deadline(&self) -> Option<u64> {
        self.timer.expiry().filter(|_| self.lvt[lvt::TIMER] & lvt::MASKED == 0)
    }

    /// After the timer has been set: has it looked at soon where it is due already, and where
    /// instructions are counted until it is.
    fn attend_timer(&self, now: u64) {
        let counted = self.clock.world().is_some();
        if self.deadline().is_some_and(|deadline| counted || deadline <= now) {
            self.link.demand_own(attention::TIMER);
        }
    }

    /// The guest's TSC is `ns * khz / 1_000_000 + offset`, modulo 2^64: what the deadline is in.
    pub(in crate::soft) fn set_tsc(&mut self, khz: u32, offset: u64) {
        let now = self.clock.now();
        self.timer.set_tsc(khz, offset, now);
        self.attend_timer(now);
    }
}
