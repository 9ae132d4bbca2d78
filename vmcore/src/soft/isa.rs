//! Which instructions there are for a guest: those that its CPUID shows.
//!
//! What x86-64-v1 has is always there. Of the rest an instruction that CPUID does not show is undefined,
//! or what older processors made of its bytes: TZCNT and LZCNT are BSF and BSR with a prefix that means
//! nothing, and hints do nothing. A vCPU that was given no CPUID table at all has everything.

use iced_x86::{CpuidFeature, DecoderOptions, EncodingKind, Instruction};

use super::cpu::Mode;
use crate::cpuid::{Cpuid, CpuidEntry};

/// A register of an answer.
type Register = fn(&CpuidEntry) -> u32;
const EAX: Register = |entry| entry.eax;
const EBX: Register = |entry| entry.ebx;
const ECX: Register = |entry| entry.ecx;
const EDX: Register = |entry| entry.edx;

/// Where CPUID shows what makes instructions exist: leaf, subleaf, register, bit. A feature's place here
/// is its bit in [`Isa`].
const SHOWN: [(CpuidFeature, u32, u32, Register, u32); 31] = [
    (CpuidFeature::SSE3, 1, 0, ECX, 0),
    (CpuidFeature::PCLMULQDQ, 1, 0, ECX, 1),
    (CpuidFeature::MONITOR, 1, 0, ECX, 3),
    (CpuidFeature::SSSE3, 1, 0, ECX, 9),
    (CpuidFeature::CMPXCHG16B, 1, 0, ECX, 13),
    (CpuidFeature::SSE4_1, 1, 0, ECX, 19),
    (CpuidFeature::SSE4_2, 1, 0, ECX, 20),
    (CpuidFeature::MOVBE, 1, 0, ECX, 22),
    (CpuidFeature::POPCNT, 1, 0, ECX, 23),
    (CpuidFeature::AES, 1, 0, ECX, 25),
    (CpuidFeature::XSAVE, 1, 0, ECX, 26),
    (CpuidFeature::RDRAND, 1, 0, ECX, 30),
    (CpuidFeature::SEP, 1, 0, EDX, 11),
    (CpuidFeature::CLFSH, 1, 0, EDX, 19),
    (CpuidFeature::FSGSBASE, 7, 0, EBX, 0),
    (CpuidFeature::BMI1, 7, 0, EBX, 3),
    (CpuidFeature::BMI2, 7, 0, EBX, 8),
    (CpuidFeature::INVPCID, 7, 0, EBX, 10),
    (CpuidFeature::RDSEED, 7, 0, EBX, 18),
    (CpuidFeature::ADX, 7, 0, EBX, 19),
    (CpuidFeature::SMAP, 7, 0, EBX, 20),
    (CpuidFeature::CLFLUSHOPT, 7, 0, EBX, 23),
    (CpuidFeature::CLWB, 7, 0, EBX, 24),
    (CpuidFeature::SHA, 7, 0, EBX, 29),
    (CpuidFeature::RDPID, 7, 0, ECX, 22),
    (CpuidFeature::SERIALIZE, 7, 0, EDX, 14),
    (CpuidFeature::XSAVEOPT, 0xd, 1, EAX, 0),
    (CpuidFeature::LZCNT, 0x8000_0001, 0, ECX, 5),
    (CpuidFeature::RDTSCP, 0x8000_0001, 0, EDX, 27),
    (CpuidFeature::SYSCALL, 0x8000_0001, 0, EDX, 11),
    (CpuidFeature::WBNOINVD, 0x8000_0008, 0, EBX, 9),
];

/// LAHF and SAHF in 64-bit code, which iced has no feature for: the bit in [`Isa`].
const LAHF: u32 = 1 << 31;

/// The instructions of a guest's processor, as far as they depend on CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::soft) struct Isa(u32);

impl Isa {
    /// All that there are.
    pub(in crate::soft) const ALL: Self = Self(u32::MAX);

    /// Those that `cpuid` shows.
    pub(in crate::soft) fn of(cpuid: &Cpuid) -> Self {
        if cpuid.entries().is_empty() {
            return Self::ALL;
        }
        let shown = |(_, leaf, subleaf, register, bit): &(CpuidFeature, u32, u32, Register, u32)| {
            cpuid.get(*leaf, *subleaf).is_some_and(|entry| register(entry) >> bit & 1 != 0)
        };
        let lahf = cpuid.get(0x8000_0001, 0).is_some_and(|entry| entry.ecx & 1 != 0);
        let first = if lahf { LAHF } else { 0 };
        Self((0..).zip(&SHOWN).filter(|(_, row)| shown(row)).fold(first, |all, (n, _)| all | 1 << n))
    }

    fn has(self, feature: CpuidFeature) -> bool {
        SHOWN.iter().position(|row| row.0 == feature).is_none_or(|n| self.0 >> n & 1 != 0)
    }

    /// How bytes are to be decoded.
    pub(in crate::soft) fn decoder_options(self) -> u32 {
        let without = |feature, option| if self.has(feature) { 0 } else { option };
        without(CpuidFeature::BMI1, DecoderOptions::NO_MPFX_0FBC)
            | without(CpuidFeature::LZCNT, DecoderOptions::NO_MPFX_0FBD)
            | without(CpuidFeature::WBNOINVD, DecoderOptions::NO_WBNOINVD)
            | if self.0 & LAHF == 0 { DecoderOptions::NO_LAHF_SAHF_64 } else { 0 }
    }

    /// Whether `instruction` exists in `mode`.
    pub(in crate::soft) fn offers(self, instruction: &Instruction, mode: Mode) -> bool {
        // In real and virtual-8086 mode no prefix is VEX (SDM vol. 2A, 2.3).
        let encoded = instruction.encoding() == EncodingKind::Legacy || mode.protected;
        encoded && instruction.cpuid_features().iter().all(|feature| self.has(*feature))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_feature_is_where_it_is_shown() {
        let leaf = |leaf, ecx| Cpuid::new([CpuidEntry { leaf, ecx, ..CpuidEntry::default() }]);
        let isa = Isa::of(&leaf(1, 1 << 23));
        assert!(
            isa.has(CpuidFeature::POPCNT) && !isa.has(CpuidFeature::MOVBE) && isa.has(CpuidFeature::SSE2)
        );
        assert!(Isa::of(&leaf(0x8000_0001, 1 << 5)).has(CpuidFeature::LZCNT));
        assert_eq!(Isa::of(&Cpuid::default()), Isa::ALL);
    }
}
