//! The time-stamp counter (SDM vol. 3B, 18.17).

use iced_x86::{Code, Instruction, Mnemonic};

use crate::soft::cpu::op::{Flow, Op, Selected};
use crate::soft::cpu::word::Word;
use crate::soft::cpu::{Cpu, RAX, RCX, RDX, cr4};

/// Ticks in `ns` at `khz`, modulo 2^64.
fn ticks(ns: u64, khz: u32) -> u64 {
    if khz == 1_000_000 {
        return ns;
    }
    (u128::from(ns) * u128::from(khz) / 1_000_000) as u64
}

impl Cpu {
    /// The guest's TSC.
    pub(in crate::soft) fn tsc(&self) -> u64 {
        self.tell_time();
        self.tsc_at(self.machine.clock.now())
    }

    /// The guest's TSC at `now` ns of the machine's time.
    pub(super) fn tsc_at(&self, now: u64) -> u64 {
        let base = self.machine.clock.tsc_base().wrapping_add(self.msrs.tsc_adjust);
        ticks(now, self.msrs.tsc_khz).wrapping_add(base)
    }

    /// Makes the TSC `value` from now on, as a guest's WRMSR does: IA32_TSC_ADJUST changes with it.
    pub(super) fn write_tsc(&mut self, value: u64) {
        let by = value.wrapping_sub(self.tsc());
        self.msrs.tsc_adjust = self.msrs.tsc_adjust.wrapping_add(by);
        self.tell_tsc();
    }

    /// Sets IA32_TSC_ADJUST, and changes the TSC with it.
    pub(super) fn write_tsc_adjust(&mut self, value: u64) {
        self.msrs.tsc_adjust = value;
        self.tell_tsc();
    }

    /// Makes the TSC go on from `value`, which was saved along with IA32_TSC_ADJUST: that must have
    /// been restored.
    pub(super) fn restore_tsc(&mut self, value: u64) {
        let now = ticks(self.machine.clock.now(), self.msrs.tsc_khz);
        self.machine.clock.restore_tsc_base(value.wrapping_sub(now).wrapping_sub(self.msrs.tsc_adjust));
        self.tell_tsc();
    }

    /// Computes the TSC's offset anew, and tells it the local APIC, whose deadlines are in ticks.
    pub(in crate::soft) fn tell_tsc(&mut self) {
        self.msrs.tsc_offset = self.machine.clock.tsc_base().wrapping_add(self.msrs.tsc_adjust);
        if let Some(lapic) = &mut self.lapic {
            lapic.set_tsc(self.msrs.tsc_khz, self.msrs.tsc_offset);
        }
    }
}

fn rdtsc(cpu: &mut Cpu, _: &Op) -> Flow {
    if cpu.cr4 & cr4::TSD != 0 && cpu.mode.cpl != 0 {
        return Err(cpu.gp(0));
    }
    let tsc = cpu.tsc();
    cpu.set_r64(RAX, tsc & 0xffff_ffff);
    cpu.set_r64(RDX, tsc >> 32);
    Ok(())
}

fn rdtscp(cpu: &mut Cpu, op: &Op) -> Flow {
    rdtsc(cpu, op)?;
    cpu.set_r64(RCX, cpu.msrs.tsc_aux & 0xffff_ffff);
    Ok(())
}

fn rdpid<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.set_reg(op.dst, W::cut(cpu.msrs.tsc_aux & 0xffff_ffff));
    Ok(())
}

pub(super) fn select(i: &Instruction) -> Option<Selected> {
    Some(Selected::plain(match i.mnemonic() {
        Mnemonic::Rdtsc => rdtsc,
        Mnemonic::Rdtscp => rdtscp,
        Mnemonic::Rdpid if i.code() == Code::Rdpid_r32 => rdpid::<u32>,
        Mnemonic::Rdpid => rdpid::<u64>,
        _ => return None,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_exact_and_wrap() {
        assert_eq!(ticks(1_000_000_000, 2_400_000), 2_400_000_000);
        assert_eq!(ticks(7, 1_000_000), 7);
        assert_eq!(ticks(u64::MAX, 2_000_000), u64::MAX << 1);
    }
}
