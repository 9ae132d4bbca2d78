//! Model-specific registers (SDM vol. 4; APM vol. 2, appendix A; for KVM's, Linux,
//! Documentation/virt/kvm/x86/msr.rst).

use iced_x86::{Instruction, Mnemonic};

use super::next;
use crate::soft::cpu::op::{Flow, Op, Selected};
use crate::soft::cpu::{Cpu, FS, GS, RAX, RCX, RDX, canonical};
use crate::soft::mmu::PHYSICAL_BITS;

/// Numbers of the registers.
mod index {
    pub(super) const P5_MC_ADDR: u32 = 0;
    pub(super) const P5_MC_TYPE: u32 = 1;
    pub(super) const TSC: u32 = 0x10;
    pub(super) const KVM_WALL_CLOCK_OLD: u32 = 0x11;
    pub(super) const KVM_SYSTEM_TIME_OLD: u32 = 0x12;
    pub(super) const PLATFORM_ID: u32 = 0x17;
    pub(super) const APIC_BASE: u32 = 0x1b;
    pub(super) const EBL_CR_POWERON: u32 = 0x2a;
    pub(super) const SMI_COUNT: u32 = 0x34;
    pub(super) const FEATURE_CONTROL: u32 = 0x3a;
    pub(super) const TSC_ADJUST: u32 = 0x3b;
    pub(super) const SPEC_CTRL: u32 = 0x48;
    pub(super) const PRED_CMD: u32 = 0x49;
    pub(super) const MICROCODE_UPDATE: u32 = 0x79;
    pub(super) const MICROCODE_REVISION: u32 = 0x8b;
    pub(super) const PLATFORM_INFO: u32 = 0xce;
    pub(super) const MTRR_CAP: u32 = 0xfe;
    pub(super) const ARCH_CAPABILITIES: u32 = 0x10a;
    pub(super) const FLUSH_CMD: u32 = 0x10b;
    pub(super) const MISC_FEATURES: u32 = 0x140;
    pub(super) const SYSENTER_CS: u32 = 0x174;
    pub(super) const SYSENTER_ESP: u32 = 0x175;
    pub(super) const SYSENTER_EIP: u32 = 0x176;
    pub(super) const MCG_CAP: u32 = 0x179;
    pub(super) const MCG_STATUS: u32 = 0x17a;
    pub(super) const PERF_STATUS: u32 = 0x198;
    pub(super) const PERF_CTL: u32 = 0x199;
    pub(super) const MISC_ENABLE: u32 = 0x1a0;
    pub(super) const DEBUG_CTL: u32 = 0x1d9;
    pub(super) const MTRR_VARIABLE: u32 = 0x200;
    pub(super) const MTRR_VARIABLE_END: u32 = 0x20f;
    pub(super) const MTRR_FIXED_64K: u32 = 0x250;
    pub(super) const MTRR_FIXED_16K: u32 = 0x258;
    pub(super) const MTRR_FIXED_16K_HIGH: u32 = 0x259;
    pub(super) const MTRR_FIXED_4K: u32 = 0x268;
    pub(super) const MTRR_FIXED_4K_END: u32 = 0x26f;
    pub(super) const PAT: u32 = 0x277;
    pub(super) const MTRR_DEF_TYPE: u32 = 0x2ff;
    pub(super) const RAPL_UNIT: u32 = 0x606;
    pub(super) const RAPL_PACKAGE: u32 = 0x611;
    pub(super) const RAPL_DRAM: u32 = 0x619;
    pub(super) const RAPL_PP0: u32 = 0x639;
    pub(super) const RAPL_PP1: u32 = 0x641;
    pub(super) const TSC_DEADLINE: u32 = 0x6e0;
    pub(super) const X2APIC: u32 = 0x800;
    pub(super) const X2APIC_END: u32 = 0x8ff;
    pub(super) const XSS: u32 = 0xda0;
    pub(super) const KVM_WALL_CLOCK: u32 = 0x4b56_4d00;
    pub(super) const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;
    pub(super) const KVM_STEAL_TIME: u32 = 0x4b56_4d03;
    pub(super) const KVM_PV_EOI: u32 = 0x4b56_4d04;
    pub(super) const KVM_POLL_CONTROL: u32 = 0x4b56_4d05;
    pub(super) const EFER: u32 = 0xc000_0080;
    pub(super) const STAR: u32 = 0xc000_0081;
    pub(super) const LSTAR: u32 = 0xc000_0082;
    pub(super) const CSTAR: u32 = 0xc000_0083;
    pub(super) const FMASK: u32 = 0xc000_0084;
    pub(super) const FS_BASE: u32 = 0xc000_0100;
    pub(super) const GS_BASE: u32 = 0xc000_0101;
    pub(super) const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub(super) const TSC_AUX: u32 = 0xc000_0103;
    pub(super) const AMD_SYSCFG: u32 = 0xc001_0010;
    pub(super) const AMD_HWCR: u32 = 0xc001_0015;
    pub(super) const AMD_PATCH_LOADER: u32 = 0xc001_0020;
    pub(super) const AMD_INT_PENDING: u32 = 0xc001_0055;
    pub(super) const AMD_LS_CFG: u32 = 0xc001_1020;
    pub(super) const AMD_DC_CFG: u32 = 0xc001_1022;
    pub(super) const AMD_DE_CFG: u32 = 0xc001_1029;
    pub(super) const AMD_BU_CFG2: u32 = 0xc001_102a;
}

/// PAT after power-on (SDM vol. 3A, table 12-11).
pub(in crate::soft) const PAT_RESET: u64 = 0x0007_0406_0007_0406;
/// IA32_MISC_ENABLE: fast strings; neither branch trace storage nor precise sampling.
pub(in crate::soft) const MISC_ENABLE_RESET: u64 = 1 | 1 << 11 | 1 << 12;
/// Bits of CPUID 0x4000_0001, EAX.
const STEAL_TIME: u32 = 1 << 5;
const PV_EOI: u32 = 1 << 6;
/// IA32_FEATURE_CONTROL: locked, with nothing enabled.
const FEATURE_CONTROL: u64 = 1;
/// Microcode revision 1.
const MICROCODE: u64 = 1 << 32;
/// IA32_MTRRCAP: eight variable ranges, fixed ones, write-combining.
const MTRR_CAP: u64 = 0x508;
/// DE_CFG: LFENCE serializes.
const DE_CFG: u64 = 2;
/// IA32_ARCH_CAPABILITIES: RDCL_NO, IBRS_ALL, SKIP_L1DFL_VMENTRY, SSB_NO, MDS_NO, PSCHANGE_MC_NO,
/// TAA_NO, SBDR_SSDP_NO, FBSDP_NO, PSDP_NO, BHI_NO, PBRSB_NO, GDS_NO, RFDS_NO, ITS_NO: an interpreter
/// speculates about nothing of the guest's.
const ARCH_CAPABILITIES: u64 = 1
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 62;

/// The registers of a saved state. Those that other parts of it hold (EFER, APIC_BASE, the bases of FS
/// and GS) are not among them. The TSC follows IA32_TSC_ADJUST, on which its restoration depends.
const STATE: [u32; 56] = {
    use index::*;
    let mut all = [0; 56];
    let plain = [
        TSC_ADJUST,
        TSC,
        SPEC_CTRL,
        SYSENTER_CS,
        SYSENTER_ESP,
        SYSENTER_EIP,
        MISC_ENABLE,
        PAT,
        MTRR_DEF_TYPE,
        MTRR_FIXED_64K,
        MTRR_FIXED_16K,
        MTRR_FIXED_16K_HIGH,
        TSC_DEADLINE,
        XSS,
        KVM_WALL_CLOCK,
        KVM_SYSTEM_TIME,
        KVM_STEAL_TIME,
        KVM_PV_EOI,
        KVM_POLL_CONTROL,
        STAR,
        LSTAR,
        CSTAR,
        FMASK,
        KERNEL_GS_BASE,
        TSC_AUX,
        MCG_STATUS,
        PLATFORM_INFO,
        MICROCODE_REVISION,
        FEATURE_CONTROL,
        ARCH_CAPABILITIES,
        MCG_CAP,
        MISC_FEATURES,
    ];
    let mut n = 0;
    while n < plain.len() {
        all[n] = plain[n];
        n += 1;
    }
    let mut msr = MTRR_FIXED_4K;
    while msr <= MTRR_FIXED_4K_END {
        all[n] = msr;
        n += 1;
        msr += 1;
    }
    msr = MTRR_VARIABLE;
    while msr <= MTRR_VARIABLE_END {
        all[n] = msr;
        n += 1;
        msr += 1;
    }
    assert!(n == all.len());
    all
};

/// Place of a fixed-range MTRR among the eleven.
fn fixed(index: u32) -> Option<usize> {
    match index {
        index::MTRR_FIXED_64K => Some(0),
        index::MTRR_FIXED_16K | index::MTRR_FIXED_16K_HIGH => {
            Some((index - index::MTRR_FIXED_16K + 1) as usize)
        }
        index::MTRR_FIXED_4K..=index::MTRR_FIXED_4K_END => Some((index - index::MTRR_FIXED_4K + 3) as usize),
        _ => None,
    }
}

/// Whether every byte of `value` is a memory type that a PAT (or MTRR) may hold.
fn memory_types(value: u64, uncached_minus: bool) -> bool {
    value.to_le_bytes().iter().all(|kind| matches!(kind, 0 | 1 | 4..=6) || *kind == 7 && uncached_minus)
}

impl Cpu {
    /// The MSRs that are part of a saved state.
    pub(in crate::soft) fn state_msrs(&self) -> &'static [u32] {
        &STATE
    }

    /// The value of MSR `index` for a saved state, where there is one.
    pub(in crate::soft) fn msr_value(&self, index: u32) -> Option<u64> {
        self.plain_msr(index)
    }

    /// Sets MSR `index` from a saved state: nothing is checked but whether it exists.
    pub(in crate::soft) fn set_msr_value(&mut self, index: u32, value: u64) -> bool {
        let m = &mut self.msrs;
        match index {
            index::TSC => self.restore_tsc(value),
            index::TSC_ADJUST => m.tsc_adjust = value,
            index::KVM_SYSTEM_TIME | index::KVM_SYSTEM_TIME_OLD => m.kvm_system_time = value,
            index::KVM_WALL_CLOCK | index::KVM_WALL_CLOCK_OLD => m.kvm_wall_clock = value,
            index::TSC_DEADLINE => {
                if let Some(lapic) = &mut self.lapic {
                    lapic.msr_write(index, value);
                }
            }
            index::EFER | index::FS_BASE | index::GS_BASE | index::APIC_BASE => {}
            // What says what the processor is: it is this one now.
            index::PLATFORM_INFO
            | index::MICROCODE_REVISION
            | index::FEATURE_CONTROL
            | index::ARCH_CAPABILITIES
            | index::MCG_CAP
            | index::MCG_STATUS
            | index::MISC_FEATURES => {}
            _ => return self.store_msr(index, value),
        }
        true
    }

    /// Registers whose reading changes nothing and which every privilege may see the same of.
    fn plain_msr(&self, index: u32) -> Option<u64> {
        let m = &self.msrs;
        Some(match index {
            index::TSC => self.tsc(),
            index::TSC_ADJUST => m.tsc_adjust,
            index::TSC_DEADLINE => self.lapic.as_ref().map_or(0, |lapic| lapic.tsc_deadline()),
            index::SPEC_CTRL => m.spec_ctrl,
            index::SYSENTER_CS => m.sysenter_cs,
            index::SYSENTER_ESP => m.sysenter_esp,
            index::SYSENTER_EIP => m.sysenter_eip,
            index::MISC_ENABLE => m.misc_enable,
            index::PAT => m.pat,
            index::MTRR_DEF_TYPE => m.mtrr_def_type,
            index::MTRR_VARIABLE..=index::MTRR_VARIABLE_END => {
                m.mtrr_variable[(index - index::MTRR_VARIABLE) as usize]
            }
            index if let Some(n) = fixed(index) => m.mtrr_fixed[n],
            index::XSS => m.xss,
            index::KVM_WALL_CLOCK | index::KVM_WALL_CLOCK_OLD => m.kvm_wall_clock,
            index::KVM_SYSTEM_TIME | index::KVM_SYSTEM_TIME_OLD => m.kvm_system_time,
            index::KVM_POLL_CONTROL => m.kvm_poll_control,
            index::KVM_PV_EOI => m.kvm_pv_eoi,
            index::KVM_STEAL_TIME => m.kvm_steal_time,
            index::EFER => self.efer,
            index::STAR => m.star,
            index::LSTAR => m.lstar,
            index::CSTAR => m.cstar,
            index::FMASK => m.fmask,
            index::FS_BASE => self.segment(FS).base,
            index::GS_BASE => self.segment(GS).base,
            index::KERNEL_GS_BASE => m.kernel_gs_base,
            index::TSC_AUX => m.tsc_aux,
            index::APIC_BASE => self.lapic.as_ref().map_or(0xfee0_0900, |lapic| lapic.base()),
            index::PLATFORM_INFO | index::MISC_FEATURES | index::MCG_CAP | index::MCG_STATUS => 0,
            index::MICROCODE_REVISION => MICROCODE,
            index::FEATURE_CONTROL => FEATURE_CONTROL,
            index::ARCH_CAPABILITIES => ARCH_CAPABILITIES,
            index::MTRR_CAP => MTRR_CAP,
            _ => return None,
        })
    }

    fn read_msr(&mut self, index: u32) -> Option<u64> {
        match index {
            index::TSC_DEADLINE | index::X2APIC..=index::X2APIC_END => self.lapic.as_mut()?.msr_read(index),
            index::P5_MC_ADDR | index::P5_MC_TYPE | index::PLATFORM_ID | index::EBL_CR_POWERON => Some(0),
            index::SMI_COUNT | index::PERF_STATUS | index::PERF_CTL | index::DEBUG_CTL => Some(0),
            // Energy that is not measured.
            index::RAPL_UNIT | index::RAPL_PACKAGE | index::RAPL_DRAM | index::RAPL_PP0 | index::RAPL_PP1 => {
                Some(0)
            }
            index::AMD_SYSCFG..=index::AMD_BU_CFG2 => self.amd_msr(index),
            _ => self.plain_msr(index),
        }
    }

    /// What Linux looks at on AMD's processors.
    fn amd_msr(&self, index: u32) -> Option<u64> {
        match index {
            _ if !self.is_amd() => None,
            index::AMD_DE_CFG => Some(DE_CFG),
            index::AMD_SYSCFG
            | index::AMD_HWCR
            | index::AMD_INT_PENDING
            | index::AMD_LS_CFG
            | index::AMD_DC_CFG
            | index::AMD_BU_CFG2 => Some(0),
            _ => None,
        }
    }

    /// Sets a register that is storage. `false` where there is none.
    fn store_msr(&mut self, index: u32, value: u64) -> bool {
        let m = &mut self.msrs;
        match index {
            index::SPEC_CTRL => m.spec_ctrl = value,
            index::SYSENTER_CS => m.sysenter_cs = value,
            index::SYSENTER_ESP => m.sysenter_esp = value,
            index::SYSENTER_EIP => m.sysenter_eip = value,
            index::MISC_ENABLE => m.misc_enable = value,
            index::PAT => m.pat = value,
            index::MTRR_DEF_TYPE => m.mtrr_def_type = value,
            index::MTRR_VARIABLE..=index::MTRR_VARIABLE_END => {
                m.mtrr_variable[(index - index::MTRR_VARIABLE) as usize] = value;
            }
            index if let Some(n) = fixed(index) => m.mtrr_fixed[n] = value,
            index::XSS => m.xss = value,
            index::KVM_POLL_CONTROL => m.kvm_poll_control = value,
            index::KVM_PV_EOI => m.kvm_pv_eoi = value,
            index::KVM_STEAL_TIME => {
                m.kvm_steal_time = value;
                m.steal_time_is_new = true;
            }
            index::STAR => m.star = value,
            index::LSTAR => m.lstar = value,
            index::CSTAR => m.cstar = value,
            index::FMASK => m.fmask = value,
            index::KERNEL_GS_BASE => m.kernel_gs_base = value,
            index::TSC_AUX => m.tsc_aux = value,
            _ => return false,
        }
        true
    }

    /// Writes MSR `index` as WRMSR does. `false`: #GP(0).
    fn write_msr(&mut self, index: u32, value: u64) -> bool {
        let allowed = match index {
            index::SYSENTER_ESP
            | index::SYSENTER_EIP
            | index::LSTAR
            | index::CSTAR
            | index::FS_BASE
            | index::GS_BASE
            | index::KERNEL_GS_BASE => canonical(value),
            index::PAT => memory_types(value, true),
            index::MTRR_DEF_TYPE => value & !0xcff == 0 && memory_types(value & 0xff, false),
            index::MTRR_VARIABLE..=index::MTRR_VARIABLE_END => {
                let flags = if index & 1 == 0 { 0xff } else { 0x800 };
                let address = (1 << PHYSICAL_BITS) - 0x1000;
                value & !(address | flags) == 0 && (index & 1 != 0 || memory_types(value & 0xff, false))
            }
            index if fixed(index).is_some() => memory_types(value, false),
            index::TSC_AUX | index::FMASK => value >> 32 == 0,
            // IBRS, STIBP, SSBD, and AMD's PSFD.
            index::SPEC_CTRL => value & !0x87 == 0,
            index::XSS => value == 0,
            index::KVM_POLL_CONTROL => value >> 1 == 0,
            index::KVM_PV_EOI => self.offers(PV_EOI) && value & 2 == 0,
            index::KVM_STEAL_TIME => self.offers(STEAL_TIME) && value & 0x3e == 0,
            _ => true,
        };
        if !allowed {
            return false;
        }
        match index {
            index::TSC => self.write_tsc(value),
            index::TSC_ADJUST => self.write_tsc_adjust(value),
            index::EFER => return self.set_efer(value),
            index::FS_BASE => self.set_segment_base(FS, value),
            index::GS_BASE => self.set_segment_base(GS, value),
            index::APIC_BASE => {
                return match &mut self.lapic {
                    Some(lapic) => lapic.set_base(value),
                    None => false,
                };
            }
            index::TSC_DEADLINE | index::X2APIC..=index::X2APIC_END => {
                return self.lapic.as_mut().is_some_and(|lapic| lapic.msr_write(index, value));
            }
            index::KVM_SYSTEM_TIME | index::KVM_SYSTEM_TIME_OLD => {
                self.msrs.kvm_system_time = value;
                self.write_time_page(value);
            }
            index::KVM_WALL_CLOCK | index::KVM_WALL_CLOCK_OLD => {
                self.msrs.kvm_wall_clock = value;
                self.write_wall_clock(value);
            }
            // Prediction barriers (bit 7: AMD's SBPB) and a cache flush: nothing is there to do.
            index::PRED_CMD => return value & !0x81 == 0,
            index::FLUSH_CMD => return value & !1 == 0,
            index::P5_MC_ADDR
            | index::P5_MC_TYPE
            | index::MICROCODE_UPDATE
            | index::MICROCODE_REVISION
            | index::PERF_CTL => {}
            index::MCG_STATUS | index::MISC_FEATURES => return value == 0,
            // Branch traps and records, which are not made.
            index::DEBUG_CTL => return value & !3 == 0,
            index::AMD_PATCH_LOADER => return self.is_amd(),
            index::AMD_SYSCFG..=index::AMD_BU_CFG2 => return self.amd_msr(index).is_some(),
            index::KVM_STEAL_TIME => {
                self.msrs.kvm_steal_time = value;
                self.write_steal_time();
            }
            _ => return self.store_msr(index, value),
        }
        true
    }
}

fn rdmsr(cpu: &mut Cpu, _: &Op) -> Flow {
    cpu.only_kernel()?;
    let index = cpu.r64(RCX) as u32;
    cpu.tell_time();
    let Some(value) = cpu.read_msr(index) else {
        log::debug!("soft: vCPU {} reads the unknown MSR {index:#x}", cpu.link.id);
        return Err(cpu.gp(0));
    };
    cpu.set_r64(RAX, value & 0xffff_ffff);
    cpu.set_r64(RDX, value >> 32);
    Ok(())
}

fn wrmsr(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.only_kernel()?;
    let index = cpu.r64(RCX) as u32;
    let value = cpu.r64(RDX) << 32 | cpu.r64(RAX) & 0xffff_ffff;
    cpu.tell_time();
    if !cpu.write_msr(index, value) {
        log::debug!("soft: vCPU {} cannot write {value:#x} to MSR {index:#x}", cpu.link.id);
        return Err(cpu.gp(0));
    }
    next(cpu, op)
}

pub(super) fn select(i: &Instruction) -> Option<Selected> {
    Some(match i.mnemonic() {
        Mnemonic::Rdmsr => Selected::plain(rdmsr),
        Mnemonic::Wrmsr => Selected::last(wrmsr),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_register_of_the_state_is_another() {
        let mut sorted = STATE.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted.len(), STATE.len());
    }

    #[test]
    fn fixed_ranges_have_their_places() {
        let places: Vec<_> = STATE.iter().filter_map(|&msr| fixed(msr)).collect();
        let mut sorted = places.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..11).collect::<Vec<_>>());
    }
}
