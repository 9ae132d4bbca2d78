//! kvmclock: the machine's time in guest memory, with what the guest needs to go on from it by the TSC
//! (Linux, Documentation/virt/kvm/x86/msr.rst, and `pvclock_vcpu_time_info`).

use crate::soft::cpu::Cpu;
use crate::soft::mmu::PHYSICAL_BITS;

/// The MSRs of the time page: enabled, and address.
const ENABLED: u64 = 1;
/// The time does not depend on the vCPU it is read on.
const TSC_STABLE: u8 = 1;

/// The factor and shift that make nanoseconds of TSC ticks at `khz`: `(ticks << shift) * factor >> 32`.
fn scale(khz: u32) -> (u32, i8) {
    let khz = u64::from(khz.max(1));
    let mut shift = 0i8;
    // The factor shall use its top bit: between 2^31 and 2^32.
    let mut factor = ((1_000_000u128 << 64) / u128::from(khz)) >> 32;
    while factor > u128::from(u32::MAX) {
        factor >>= 1;
        shift += 1;
    }
    while factor < 1 << 31 {
        factor <<= 1;
        shift -= 1;
    }
    (u32::try_from(factor).unwrap_or(u32::MAX), shift)
}

impl Cpu {
    /// Writes the time page that `msr` names, where it is enabled.
    pub(super) fn write_time_page(&mut self, msr: u64) {
        if msr & ENABLED == 0 {
            return;
        }
        let gpa = msr & !ENABLED;
        let now = self.machine.clock.now();
        let (factor, shift) = scale(self.msrs.tsc_khz);
        let mut version = [0; 4];
        self.peek_physical(gpa, &mut version);
        let version = (u32::from_le_bytes(version) & !1).wrapping_add(2);
        let mut page = [0; 32];
        page[8..16].copy_from_slice(&self.tsc_at(now).to_le_bytes());
        page[16..24].copy_from_slice(&now.to_le_bytes());
        page[24..28].copy_from_slice(&factor.to_le_bytes());
        page[28] = shift.to_le_bytes()[0];
        page[29] = TSC_STABLE;
        // Odd while it changes.
        self.poke_physical(gpa, &(version | 1).to_le_bytes());
        self.poke_physical(gpa + 4, &page[4..]);
        self.poke_physical(gpa, &version.to_le_bytes());
    }

    /// Writes the time of day at which the machine's clock was zero: version, seconds, nanoseconds.
    pub(super) fn write_wall_clock(&mut self, gpa: u64) {
        let since_epoch = self.machine.clock.epoch();
        let mut version = [0; 4];
        self.peek_physical(gpa, &mut version);
        let version = (u32::from_le_bytes(version) & !1).wrapping_add(2);
        // The seconds have 32 bits in this interface.
        let seconds = (since_epoch.as_secs() & 0xffff_ffff) as u32;
        let mut page = [0; 8];
        page[..4].copy_from_slice(&seconds.to_le_bytes());
        page[4..].copy_from_slice(&since_epoch.subsec_nanos().to_le_bytes());
        self.poke_physical(gpa, &(version | 1).to_le_bytes());
        self.poke_physical(gpa + 4, &page);
        self.poke_physical(gpa, &version.to_le_bytes());
    }

    /// Says in the steal time page, where there is one, that this vCPU has not been preempted: guests
    /// leave TLB flushes of preempted vCPUs to whoever preempts them. What is stolen is not counted.
    pub(in crate::soft) fn write_steal_time(&mut self) {
        const PREEMPTED: u64 = 16;
        self.msrs.steal_time_is_new = false;
        let msr = self.msrs.kvm_steal_time;
        if msr & ENABLED != 0 {
            self.poke_physical((msr & !ENABLED) + PREEMPTED, &[0]);
        }
    }

    /// Writes `bytes` at guest-physical `gpa` where there is writable memory.
    fn poke_physical(&mut self, gpa: u64, bytes: &[u8]) {
        if gpa >> PHYSICAL_BITS != 0 {
            return;
        }
        let Some(slot) = self.mmu.phys.find(gpa).filter(|slot| slot.writable).cloned() else { return };
        // What does not fit the slot is left out: the guest has asked for it at its end.
        let last = gpa + bytes.len() as u64 - 1;
        if slot.region.fill(gpa - slot.region.base().0, bytes).is_ok() {
            slot.mark_dirty(gpa);
            slot.mark_dirty(last);
            self.wrote_code(gpa, bytes.len() as u64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scaled_ticks_are_nanoseconds() {
        for khz in [1, 1000, 999_999, 1_000_000, 2_400_000, 3_141_593, u32::MAX] {
            let (factor, shift) = scale(khz);
            let ticks = u128::from(khz) * 1000;
            let shifted = if shift >= 0 { ticks << shift } else { ticks >> -shift };
            let ns = (shifted * u128::from(factor)) >> 32;
            // A second.
            assert!(ns.abs_diff(1_000_000_000) <= 1_000_000_000 / ticks.min(1 << 20) + 2, "{khz}: {ns}");
        }
    }
}
