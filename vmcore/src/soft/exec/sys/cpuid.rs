//! CPUID: the table, with what depends on the present state (SDM vol. 2A, "CPUID").

use iced_x86::{Instruction, Mnemonic};

use crate::cpuid::CpuidEntry;
use crate::soft::cpu::op::{Flow, Op, Selected};
use crate::soft::cpu::{Cpu, RAX, RBX, RCX, RDX, cr4};

/// Leaf 1, EDX: the local APIC is enabled.
const APIC: u32 = 1 << 9;
/// Leaf 1, ECX: CR4.OSXSAVE.
const OSXSAVE: u32 = 1 << 27;
/// IA32_APIC_BASE: globally enabled.
const APIC_ENABLED: u64 = 1 << 11;
/// Where components behind x87 and SSE begin in an XSAVE area, in bytes.
const XSAVE_HEAD: u32 = 576;

impl Cpu {
    /// What CPUID answers for `leaf` and `subleaf`.
    pub(super) fn cpuid_answer(&self, leaf: u32, subleaf: u32) -> CpuidEntry {
        let Some(&entry) = self.cpuid.get(leaf, subleaf) else { return self.unknown_leaf(leaf, subleaf) };
        let mut answer = entry;
        match (leaf, subleaf) {
            (1, _) => {
                answer.ecx &= !OSXSAVE;
                if self.cr4 & cr4::OSXSAVE != 0 {
                    answer.ecx |= OSXSAVE;
                }
                if let Some(lapic) = &self.lapic {
                    answer.ebx = answer.ebx & 0x00ff_ffff | self.link.id << 24;
                    if lapic.base() & APIC_ENABLED == 0 {
                        answer.edx &= !APIC;
                    }
                }
            }
            (0xb | 0x1f, _) if self.lapic.is_some() => answer.edx = self.link.id,
            (0xd, 0) => answer.ebx = self.xsave_size(self.xcr0, false),
            (0xd, 1) if answer.eax & 0b1010 != 0 => {
                answer.ebx = self.xsave_size(self.xcr0 | self.msrs.xss, true);
            }
            _ => {}
        }
        answer
    }

    /// Bytes of an XSAVE area for the components in `mask`.
    fn xsave_size(&self, mask: u64, compacted: bool) -> u32 {
        let components = (2..63).filter(|n| mask >> n & 1 != 0);
        components.filter_map(|n| self.cpuid.get(0xd, n)).fold(XSAVE_HEAD, |end, leaf| {
            if compacted {
                let align = if leaf.ecx & 2 != 0 { 63 } else { 0 };
                (end.saturating_add(align) & !align).saturating_add(leaf.eax)
            } else {
                end.max(leaf.ebx.saturating_add(leaf.eax))
            }
        })
    }

    /// Leaves beyond the highest are, on Intel's processors, answered as the highest basic one.
    fn unknown_leaf(&self, leaf: u32, subleaf: u32) -> CpuidEntry {
        let class = leaf & 0xffff_0000;
        let highest = |class| self.cpuid.get(class, 0).map_or(0, |entry| entry.eax);
        let empty = CpuidEntry { leaf, ..CpuidEntry::default() };
        match leaf {
            0xb | 0x1f if self.cpuid.get(leaf, 0).is_some() => {
                CpuidEntry { ecx: subleaf & 0xff, edx: self.link.id, ..empty }
            }
            leaf if leaf <= highest(class) && (class == 0 || highest(class) > class) => empty,
            _ if self.is_amd() => empty,
            _ => match highest(0) {
                0 => empty,
                basic if basic == leaf => empty,
                basic => self.cpuid.get(basic, subleaf).copied().unwrap_or(empty),
            },
        }
    }
}

fn cpuid(cpu: &mut Cpu, _: &Op) -> Flow {
    let answer = cpu.cpuid_answer(cpu.r64(RAX) as u32, cpu.r64(RCX) as u32);
    for (n, value) in [(RAX, answer.eax), (RBX, answer.ebx), (RCX, answer.ecx), (RDX, answer.edx)] {
        cpu.set_r64(n, value.into());
    }
    Ok(())
}

pub(super) fn select(i: &Instruction) -> Option<Selected> {
    (i.mnemonic() == Mnemonic::Cpuid).then(|| Selected::plain(cpuid))
}
