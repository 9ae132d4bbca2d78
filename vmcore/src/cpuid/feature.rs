//! The feature bits of CPUID that named CPU models are made of.

use super::Cpuid;

/// A register of CPUID's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// One feature bit. Names are those of Linux's `/proc/cpuinfo` where it has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Feature {
    pub(super) name: &'static str,
    pub(super) leaf: u32,
    pub(super) subleaf: u32,
    pub(super) register: Register,
    pub(super) bit: u32,
}

impl Feature {
    /// Whether `cpuid` has the feature.
    pub(super) fn is_in(&self, cpuid: &Cpuid) -> bool {
        cpuid.get(self.leaf, self.subleaf).is_some_and(|entry| {
            let value = match self.register {
                Register::Eax => entry.eax,
                Register::Ebx => entry.ebx,
                Register::Ecx => entry.ecx,
                Register::Edx => entry.edx,
            };
            value & 1 << self.bit != 0
        })
    }
}

/// Features of one register of one leaf: `features! { leaf [subleaf] Register: name bit, ...; }`.
macro_rules! features {
    ($($leaf:literal [$subleaf:literal] $register:ident: $($name:ident $bit:literal),*;)*) => {
        &[$($(Feature {
            name: stringify!($name),
            leaf: $leaf,
            subleaf: $subleaf,
            register: Register::$register,
            bit: $bit,
        }),*),*]
    };
}

/// What x86-64-v1 requires (System V psABI for x86-64, "Micro-architecture levels"), with the system
/// features of long mode without which no kernel runs.
pub(super) const V1: &[Feature] = features! {
    0x1 [0] Edx: fpu 0, tsc 4, msr 5, pae 6, cx8 8, pge 13, cmov 15, mmx 23, fxsr 24, sse 25, sse2 26;
    0x8000_0001 [0] Edx: syscall 11, nx 20, lm 29;
};

/// What x86-64-v2 adds.
pub(super) const V2: &[Feature] = features! {
    0x1 [0] Ecx: sse3 0, ssse3 9, cx16 13, sse4_1 19, sse4_2 20, popcnt 23;
    0x8000_0001 [0] Ecx: lahf_lm 0;
};

/// What x86-64-v3 adds.
pub(super) const V3: &[Feature] = features! {
    0x1 [0] Ecx: fma 12, movbe 22, xsave 26, avx 28, f16c 29;
    0x7 [0] Ebx: bmi1 3, avx2 5, bmi2 8;
    0x8000_0001 [0] Ecx: lzcnt 5;
};

/// What x86-64-v4 adds.
pub(super) const V4: &[Feature] = features! {
    0x7 [0] Ebx: avx512f 16, avx512dq 17, avx512cd 28, avx512bw 30, avx512vl 31;
};

/// What every model shows where the host has it: system features, the hypervisor's, and the bits by
/// which a kernel chooses its mitigations, which must be the truth about the CPU below.
pub(super) const OFFERED_V1: &[Feature] = features! {
    0x1 [0] Ecx: x2apic 21, tsc_deadline_timer 24, hypervisor 31;
    0x1 [0] Edx: vme 1, de 2, pse 3, mce 7, apic 9, sep 11, mtrr 12, mca 14, pat 16, pse36 17, clflush 19;
    0x6 [0] Eax: arat 2;
    0x7 [0] Ebx: tsc_adjust 1;
    0x7 [0] Edx: md_clear 10, serialize 14, spec_ctrl 26, intel_stibp 27, flush_l1d 28, arch_capabilities 29,
        spec_ctrl_ssbd 31;
    0x8000_0001 [0] Ecx: cmp_legacy 1, cr8_legacy 4, prefetchw 8, topoext 22;
    0x8000_0001 [0] Edx: fpu 0, vme 1, de 2, pse 3, tsc 4, msr 5, pae 6, mce 7, cx8 8, apic 9, mtrr 12, pge 13,
        mca 14, cmov 15, pat 16, pse36 17, mmxext 22, mmx 23, fxsr 24, fxsr_opt 25, pdpe1gb 26, rdtscp 27;
    0x8000_0007 [0] Edx: constant_tsc 8;
    0x8000_0008 [0] Ebx: clzero 0, xsaveerptr 2, amd_ibpb 12, amd_ibrs 14, amd_stibp 15, stibp_always_on 17,
        amd_ssbd 24, virt_ssbd 25, amd_ssb_no 26, amd_psfd 28, btc_no 29;
    0x8000_0021 [0] Eax: no_nested_data_bp 0, lfence_rdtsc 2, verw_clear 5, null_sel_clr_base 6, auto_ibrs 8,
        sbpb 27, ibpb_brtype 28, srso_no 29;
    0x8000_0021 [0] Ecx: tsa_sq_no 1, tsa_l1_no 2;
    0x4000_0001 [0] Eax: kvmclock_old 0, nop_io_delay 1, kvmclock 3, steal_time 5, pv_eoi 6, pv_unhalt 7,
        pv_tlb_flush 9, pv_send_ipi 11, poll_control 12, pv_sched_yield 13, kvmclock_stable 24;
};

/// Page sizes that not every processor has.
pub(super) const PAGES: &[Feature] = features! {
    0x8000_0001 [0] Edx: pdpe1gb 26;
};

/// What models from v2 on show where the host has it.
pub(super) const OFFERED_V2: &[Feature] = features! {
    0x1 [0] Ecx: pclmulqdq 1, pcid 17, aes 25;
};

/// What models from v3 on show where the host has it: what came with or soon after AVX2.
pub(super) const OFFERED_V3: &[Feature] = features! {
    0x1 [0] Ecx: rdrand 30;
    0x7 [0] Ebx: fsgsbase 0, smep 7, erms 9, invpcid 10, rdseed 18, adx 19, smap 20, clflushopt 23, sha_ni 29;
    0x7 [0] Ecx: umip 2, rdpid 22;
    0x7 [0] Edx: fsrm 4;
    0xd [1] Eax: xsaveopt 0, xsavec 1, xgetbv1 2;
};

/// What v4 shows where the host has it.
pub(super) const OFFERED_V4: &[Feature] = features! {
    0x7 [0] Ebx: avx512ifma 21, clwb 24;
    0x7 [0] Ecx: avx512vbmi 1, avx512_vbmi2 6, gfni 8, vaes 9, vpclmulqdq 10, avx512_vnni 11, avx512_bitalg 12,
        avx512_vpopcntdq 14;
};

/// What needs a local APIC.
pub(super) const LAPIC: &[Feature] = features! {
    0x1 [0] Ecx: x2apic 21, tsc_deadline_timer 24;
    0x1 [0] Edx: apic 9;
    0x6 [0] Eax: arat 2;
    0x8000_0001 [0] Edx: apic 9;
    0x4000_0001 [0] Eax: pv_eoi 6, pv_unhalt 7, pv_send_ipi 11, pv_sched_yield 13;
};

/// What has a guest make hypercalls.
pub(super) const HYPERCALLS: &[Feature] = features! {
    0x4000_0001 [0] Eax: pv_unhalt 7, pv_send_ipi 11, pv_sched_yield 13;
};

/// Asynchronous page faults, by which KVM makes guests wait for what the host swaps: the
/// guest would have to be told of each fault by memory that snapshots do not know.
pub(super) const ASYNC_PF: &[Feature] = features! {
    0x4000_0001 [0] Eax: async_pf 4, async_pf_vmexit 10, async_pf_int 14;
};
