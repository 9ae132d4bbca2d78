//! What CPUID can tell guests of the software CPU (SDM vol. 2A, "CPUID").

use super::clock::TSC_KHZ;
use super::mmu::PHYSICAL_BITS;
use crate::cpuid::{Cpuid, CpuidEntry};

/// Family 6, model 0x2c, stepping 2: Westmere, the last of Intel's large cores without AVX. Programs
/// take features from the model alone: libgcc's `__builtin_cpu_is`, by which functions with
/// `target_clones("arch=...")` choose, finds AVX-512 in a Skylake that does not report it.
const SIGNATURE: u32 = 0x0002_06c2;
/// The line that CLFLUSH flushes, 64 bytes, in units of 8, in its place in EBX.
const CLFLUSH_LINE: u32 = 8 << 8;

/// `bits` of a register less those of features that only the host's own instructions can execute (see
/// `fp`), where it has not got them.
fn on_this_host(leaf: u32, bits: u32) -> u32 {
    let host_has = |bit| match (leaf, bit) {
        (1, 0) => is_x86_feature_detected!("sse3"),
        (1, 1) => is_x86_feature_detected!("pclmulqdq"),
        (1, 9) => is_x86_feature_detected!("ssse3"),
        (1, 19) => is_x86_feature_detected!("sse4.1"),
        (1, 20) => is_x86_feature_detected!("sse4.2"),
        (1, 25) => is_x86_feature_detected!("aes"),
        (7, 29) => is_x86_feature_detected!("sha"),
        _ => true,
    };
    (0..32).filter(|&bit| bits >> bit & 1 != 0 && host_has(bit)).fold(0, |all, bit| all | 1 << bit)
}

/// Every leaf that can be presented.
pub(in crate::soft) fn supported() -> Cpuid {
    let bits = |bits: &[u32]| bits.iter().fold(0, |all, bit| all | 1 << bit);
    let leaf =
        |leaf, subleaf, [eax, ebx, ecx, edx]: [u32; 4]| CpuidEntry { leaf, subleaf, eax, ebx, ecx, edx };
    let text = |text: &[u8; 12]| {
        let word = |n: usize| u32::from_le_bytes([text[n], text[n + 1], text[n + 2], text[n + 3]]);
        [word(0), word(4), word(8)]
    };
    let [v0, v1, v2] = text(b"GenuineIntel");
    let [k0, k1, k2] = text(b"KVMKVMKVM\0\0\0");
    // SSE3, PCLMULQDQ, SSSE3, CMPXCHG16B, PCID, SSE4.1, SSE4.2, x2APIC, MOVBE, POPCNT, TSC deadline,
    // AES, XSAVE, RDRAND, hypervisor.
    let ecx1 = on_this_host(1, bits(&[0, 1, 9, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 30, 31]));
    // FPU, VME, DE, PSE, TSC, MSR, PAE, MCE, CX8, APIC, SEP, MTRR, PGE, MCA, CMOV, PAT, PSE-36, CLFLUSH,
    // MMX, FXSR, SSE, SSE2, SS.
    let edx1 = bits(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26, 27]);
    // FSGSBASE, TSC_ADJUST, SMEP, ERMS, INVPCID, RDSEED, SMAP, CLFLUSHOPT, CLWB, SHA.
    let ebx7 = on_this_host(7, bits(&[0, 1, 7, 9, 10, 18, 20, 23, 24, 29]));
    // FSRM, MD_CLEAR, ARCH_CAPABILITIES.
    let edx7 = bits(&[4, 10, 29]);
    let khz = TSC_KHZ;
    let brand = b"vmcore software processor";
    let mut padded = [0u8; 48];
    padded[..brand.len()].copy_from_slice(brand);
    let words: Vec<u32> = padded.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
    let brand = |n: u32| {
        let part = &words[n as usize * 4..][..4];
        leaf(0x8000_0002 + n, None, [part[0], part[1], part[2], part[3]])
    };
    Cpuid::new([
        leaf(0, None, [0x16, v0, v2, v1]),
        leaf(1, None, [SIGNATURE, CLFLUSH_LINE, ecx1, edx1]),
        leaf(2, None, [0x00ff_ff01, 0, 0, 0]),
        leaf(4, Some(0), [0, 0, 0, 0]),
        leaf(6, None, [bits(&[2]), 0, 0, 0]),
        // UMIP and RDPID.
        leaf(7, Some(0), [0, ebx7, bits(&[2, 22]), edx7]),
        leaf(0xb, Some(0), [0, 0, 0, 0]),
        leaf(0xb, Some(1), [0, 0, 1, 0]),
        // XSAVE: x87 and SSE, 576 bytes; XSAVEOPT.
        leaf(0xd, Some(0), [0b11, 576, 576, 0]),
        leaf(0xd, Some(1), [1, 576, 0, 0]),
        // The TSC is the crystal's, and that is the LAPIC timer's.
        leaf(0x15, None, [1, 1, khz * 1000, 0]),
        leaf(0x16, None, [khz / 1000, khz / 1000, 100, 0]),
        leaf(0x4000_0000, None, [0x4000_0010, k0, k1, k2]),
        // KVM_FEATURE_CLOCKSOURCE, NOP_IO_DELAY, CLOCKSOURCE2, PV_EOI, POLL_CONTROL, CLOCKSOURCE_STABLE. Nothing
        // that has guests make hypercalls: their code then has Intel's VMCALL, and where such a guest goes on
        // under KVM on an AMD processor its first one kills it (see `Cpuid::check_hypercalls`). Those that KVM
        // showed them to make theirs here too.
        leaf(0x4000_0001, None, [bits(&[0, 1, 3, 6, 12, 24]), 0, 0, 0]),
        leaf(0x4000_0010, None, [khz, khz, 0, 0]),
        leaf(0x8000_0000, None, [0x8000_0008, 0, 0, 0]),
        // LAHF, LZCNT is not there; PREFETCHW. SYSCALL, NX, 1 GiB pages, RDTSCP, long mode.
        leaf(0x8000_0001, None, [0, 0, bits(&[0, 8]), bits(&[11, 20, 26, 27, 29])]),
        brand(0),
        brand(1),
        brand(2),
        // Invariant TSC.
        leaf(0x8000_0007, None, [0, 0, 0, bits(&[8])]),
        leaf(0x8000_0008, None, [PHYSICAL_BITS | 48 << 8, 0, 0, 0]),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpuid::{CpuConfig, CpuModel, Topology};

    #[test]
    fn a_guest_that_begins_here_goes_on_under_the_kvm_of_any_processor() {
        for vendor in [*b"GenuntelineI", *b"AuthcAMDenti"] {
            let [ebx, ecx, edx] = [0, 4, 8]
                .map(|n| u32::from_le_bytes([vendor[n], vendor[n + 1], vendor[n + 2], vendor[n + 3]]));
            let host = Cpuid::new([CpuidEntry { ebx, ecx, edx, ..CpuidEntry::default() }]);
            supported().check_hypercalls(&host).unwrap();
        }
    }

    /// What GCC's `-march=westmere` uses, beside x86-64-v1, without asking.
    #[test]
    fn the_default_model_has_all_that_its_signature_promises() {
        let topology = Topology::of_cores(1);
        let config = CpuConfig { model: CpuModel::Best, topology, lapic: true, tsc_khz: None };
        let cpuid = config.cpuid(&supported(), 0).unwrap();
        let (signature, features) = (cpuid.get(1, 0).unwrap(), cpuid.get(1, 0).unwrap().ecx);
        let (family, model) = (signature.eax >> 8 & 15, signature.eax >> 12 & 0xf0 | signature.eax >> 4 & 15);
        assert_eq!((family, model), (6, 0x2c));
        // SSE3, PCLMULQDQ, SSSE3, CMPXCHG16B, SSE4.1, SSE4.2, POPCNT, AES.
        for bit in [0, 1, 9, 13, 19, 20, 23, 25] {
            assert!(features >> bit & 1 == 1, "ECX bit {bit} of leaf 1");
        }
        // LAHF in 64-bit mode.
        assert_eq!(cpuid.get(0x8000_0001, 0).unwrap().ecx & 1, 1);
    }
}
