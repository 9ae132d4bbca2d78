//! The state of a software vCPU and what every handler needs of it: registers, flags, faults,
//! operand addresses, the stack.

pub(in crate::soft) mod flags;
pub(in crate::soft) mod op;
mod operand;
mod stack;
pub(in crate::soft) mod word;

use std::sync::Arc;

pub(in crate::soft) use self::operand::canonical;

use self::flags::Flags;
use self::op::Stop;
use super::block::BlockCache;
use super::breakpoint::Breakpoints;
use super::chip::Lapic;
use super::clock::TSC_KHZ;
use super::exec::{MISC_ENABLE_RESET, PAT_RESET};
use super::fp::{FpState, HostFloat};
use super::io::Callbacks;
use super::isa::Isa;
use super::link::Link;
use super::mmu::Mmu;
use super::vm::Machine;
use crate::backend::VcpuStats;
use crate::cpuid::Cpuid;
use crate::state::{DebugRegs, DescriptorTable, Segment};

/// Numbers of the segment registers, as instructions encode them.
pub(in crate::soft) const ES: usize = 0;
pub(in crate::soft) const CS: usize = 1;
pub(in crate::soft) const SS: usize = 2;
pub(in crate::soft) const DS: usize = 3;
pub(in crate::soft) const FS: usize = 4;
pub(in crate::soft) const GS: usize = 5;

/// Numbers of the general-purpose registers.
pub(in crate::soft) const RAX: usize = 0;
pub(in crate::soft) const RCX: usize = 1;
pub(in crate::soft) const RDX: usize = 2;
pub(in crate::soft) const RBX: usize = 3;
pub(in crate::soft) const RSP: usize = 4;
pub(in crate::soft) const RBP: usize = 5;
pub(in crate::soft) const RSI: usize = 6;
pub(in crate::soft) const RDI: usize = 7;
/// RIP stands behind the sixteen and [`op::ZERO`]; handlers use [`Cpu::next_rip`] and [`Cpu::set_rip`].
const RIP: usize = op::RIP as usize;

/// CR0 (SDM vol. 3A, 2.5).
pub(in crate::soft) mod cr0 {
    pub(in crate::soft) const PE: u64 = 1;
    pub(in crate::soft) const MP: u64 = 1 << 1;
    pub(in crate::soft) const EM: u64 = 1 << 2;
    pub(in crate::soft) const TS: u64 = 1 << 3;
    pub(in crate::soft) const ET: u64 = 1 << 4;
    pub(in crate::soft) const NE: u64 = 1 << 5;
    pub(in crate::soft) const WP: u64 = 1 << 16;
    pub(in crate::soft) const AM: u64 = 1 << 18;
    pub(in crate::soft) const NW: u64 = 1 << 29;
    pub(in crate::soft) const CD: u64 = 1 << 30;
    pub(in crate::soft) const PG: u64 = 1 << 31;
}

/// CR4 (SDM vol. 3A, 2.5).
pub(in crate::soft) mod cr4 {
    pub(in crate::soft) const VME: u64 = 1;
    pub(in crate::soft) const PVI: u64 = 1 << 1;
    pub(in crate::soft) const TSD: u64 = 1 << 2;
    pub(in crate::soft) const DE: u64 = 1 << 3;
    pub(in crate::soft) const PSE: u64 = 1 << 4;
    pub(in crate::soft) const PAE: u64 = 1 << 5;
    pub(in crate::soft) const MCE: u64 = 1 << 6;
    pub(in crate::soft) const PGE: u64 = 1 << 7;
    pub(in crate::soft) const PCE: u64 = 1 << 8;
    pub(in crate::soft) const OSFXSR: u64 = 1 << 9;
    pub(in crate::soft) const OSXMMEXCPT: u64 = 1 << 10;
    pub(in crate::soft) const UMIP: u64 = 1 << 11;
    pub(in crate::soft) const FSGSBASE: u64 = 1 << 16;
    pub(in crate::soft) const PCIDE: u64 = 1 << 17;
    pub(in crate::soft) const OSXSAVE: u64 = 1 << 18;
    pub(in crate::soft) const SMEP: u64 = 1 << 20;
    pub(in crate::soft) const SMAP: u64 = 1 << 21;
}

/// EFER (SDM vol. 3A, 2.2.1).
pub(in crate::soft) mod efer {
    pub(in crate::soft) const SCE: u64 = 1;
    pub(in crate::soft) const LME: u64 = 1 << 8;
    pub(in crate::soft) const LMA: u64 = 1 << 10;
    pub(in crate::soft) const NXE: u64 = 1 << 11;
}

/// Vectors of exceptions (SDM vol. 3A, table 6-1).
pub(in crate::soft) mod vector {
    pub(in crate::soft) const DE: u8 = 0;
    pub(in crate::soft) const DB: u8 = 1;
    pub(in crate::soft) const NMI: u8 = 2;
    pub(in crate::soft) const BP: u8 = 3;
    pub(in crate::soft) const OF: u8 = 4;
    pub(in crate::soft) const BR: u8 = 5;
    pub(in crate::soft) const UD: u8 = 6;
    pub(in crate::soft) const NM: u8 = 7;
    pub(in crate::soft) const DF: u8 = 8;
    pub(in crate::soft) const TS: u8 = 10;
    pub(in crate::soft) const NP: u8 = 11;
    pub(in crate::soft) const SS: u8 = 12;
    pub(in crate::soft) const GP: u8 = 13;
    pub(in crate::soft) const PF: u8 = 14;
    pub(in crate::soft) const MF: u8 = 16;
    pub(in crate::soft) const AC: u8 = 17;
    pub(in crate::soft) const XM: u8 = 19;
}

/// An exception that an instruction raised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::soft) struct Fault {
    /// 0 to 31.
    pub(in crate::soft) vector: u8,
    /// Error code, for the vectors that have one.
    pub(in crate::soft) code: Option<u32>,
    /// #PF: the linear address, for CR2. #DB: bits for DR6.
    pub(in crate::soft) payload: u64,
}

/// [`Fault::payload`] of a #GP for an address that is not canonical.
const NOT_CANONICAL: u64 = 1;

/// Why the vCPU leaves guest code after an instruction that is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::soft) enum Leave {
    /// HLT (or MWAIT): wait for an interrupt.
    Halt,
    /// Shutdown: a fault during the delivery of a double fault.
    TripleFault,
    /// A debug stop that the embedder asked for: DR6's bits and the exception's vector.
    Debug {
        /// In the layout of DR6.
        dr6: u64,
        /// 1 or 3.
        exception: u8,
    },
    /// The instruction at RIP cannot be executed: not implemented, or fetched from a device.
    Unknown,
}

/// The parts of the mode that decide what an instruction's bytes mean and who may run them: with the
/// address space, what a decoded block is valid for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(in crate::soft) struct Mode {
    /// 64-bit code: EFER.LMA and CS.L.
    pub(in crate::soft) long: bool,
    /// 32-bit default operand and address size: CS.D. Clear in 64-bit code.
    pub(in crate::soft) code32: bool,
    /// 32-bit stack: SS.B. Meaningless in 64-bit code.
    pub(in crate::soft) stack32: bool,
    /// Protected mode, and not virtual-8086.
    pub(in crate::soft) protected: bool,
    /// Virtual-8086 mode.
    pub(in crate::soft) v86: bool,
    /// Current privilege level, 0 to 3.
    pub(in crate::soft) cpl: u8,
}

impl Mode {
    /// 16, 32 or 64: what the decoder calls the mode.
    pub(in crate::soft) fn bitness(self) -> u32 {
        match self {
            Mode { long: true, .. } => 64,
            Mode { code32: true, .. } => 32,
            _ => 16,
        }
    }

    /// All of it in seven bits.
    pub(in crate::soft) fn key(self) -> u8 {
        u8::from(self.long)
            | u8::from(self.code32) << 1
            | u8::from(self.stack32) << 2
            | u8::from(self.protected) << 3
            | u8::from(self.v86) << 4
            | self.cpl << 5
    }
}

/// Model-specific registers that are plain storage or are read by handlers; see `exec::msr`.
#[derive(Clone, Debug, Default)]
pub(in crate::soft) struct Msrs {
    pub(in crate::soft) star: u64,
    pub(in crate::soft) lstar: u64,
    pub(in crate::soft) cstar: u64,
    pub(in crate::soft) fmask: u64,
    pub(in crate::soft) kernel_gs_base: u64,
    pub(in crate::soft) tsc_aux: u64,
    pub(in crate::soft) sysenter_cs: u64,
    pub(in crate::soft) sysenter_esp: u64,
    pub(in crate::soft) sysenter_eip: u64,
    pub(in crate::soft) pat: u64,
    pub(in crate::soft) misc_enable: u64,
    pub(in crate::soft) mtrr_def_type: u64,
    pub(in crate::soft) mtrr_fixed: [u64; 11],
    pub(in crate::soft) mtrr_variable: [u64; 16],
    /// Frequency of the guest's TSC in kHz.
    pub(in crate::soft) tsc_khz: u32,
    /// The guest's TSC is `clock ns * tsc_khz / 1_000_000` plus this, modulo 2^64.
    pub(in crate::soft) tsc_offset: u64,
    /// IA32_TSC_ADJUST.
    pub(in crate::soft) tsc_adjust: u64,
    /// kvmclock: guest-physical address of the time page, with the enable bit.
    pub(in crate::soft) kvm_system_time: u64,
    pub(in crate::soft) kvm_wall_clock: u64,
    /// KVM's poll control, which is storage.
    pub(in crate::soft) kvm_poll_control: u64,
    /// Guest-physical address of the word by which KVM spares guests the EOI, with the enable bit. Here
    /// it always says that the EOI is wanted, so it is storage too.
    pub(in crate::soft) kvm_pv_eoi: u64,
    /// Guest-physical address of the steal time page, with the enable bit.
    pub(in crate::soft) kvm_steal_time: u64,
    /// The steal time page is to be written before the guest goes on.
    pub(in crate::soft) steal_time_is_new: bool,
    pub(in crate::soft) spec_ctrl: u64,
    pub(in crate::soft) xss: u64,
}

/// Interrupts are held off until after the next instruction (SDM vol. 3A, 6.8.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::soft) struct Shadow {
    /// By STI.
    pub(in crate::soft) sti: bool,
    /// By a load of SS, which holds off debug exceptions too.
    pub(in crate::soft) mov_ss: bool,
}

/// One vCPU. What handlers use most comes first, where its offset is short.
#[repr(C)]
pub(in crate::soft) struct Cpu {
    /// The arithmetic flags.
    pub(in crate::soft) flags: Flags,
    /// The sixteen registers, zero ([`op::ZERO`]), RIP ([`op::RIP`]), and unused ones that make every
    /// number of 8 bits valid without a test.
    gpr: [u64; 256],
    /// Address of the [`op::Op`] under execution, where handlers go on by themselves: see
    /// [`Cpu::go_on`].
    pub(in crate::soft) at: usize,
    /// Address of the first [`op::Op`] of the block under execution.
    pub(in crate::soft) first: usize,
    /// How many blocks may still be executed before the run loop has its turn.
    pub(in crate::soft) more: u32,
    /// RFLAGS without the arithmetic flags and bit 1. Set through [`Cpu::set_rflags`], which keeps
    /// what depends on AC, VM and TF.
    pub(in crate::soft) system_flags: u64,
    /// Bases of the segments by number, as far as they count in the present mode; [`op::NO_SEG`] and
    /// 7 are zero.
    seg_base: [u64; 8],
    /// One bit a segment: base and limit permit every 32-bit access of reading and writing.
    flat: u8,
    /// ES, CS, SS, DS, FS, GS. Set through [`Cpu::set_segment`].
    seg: [Segment; 6],
    /// Set by [`Cpu::mode_changed`].
    pub(in crate::soft) mode: Mode,

    /// Set through `exec::control`, which checks, and tells the MMU.
    pub(in crate::soft) cr0: u64,
    pub(in crate::soft) cr2: u64,
    pub(in crate::soft) cr3: u64,
    pub(in crate::soft) cr4: u64,
    pub(in crate::soft) efer: u64,
    pub(in crate::soft) xcr0: u64,
    pub(in crate::soft) gdt: DescriptorTable,
    pub(in crate::soft) idt: DescriptorTable,
    pub(in crate::soft) ldt: Segment,
    pub(in crate::soft) tr: Segment,
    /// What changes it calls [`Cpu::arm_breakpoints`].
    pub(in crate::soft) debug: DebugRegs,
    pub(in crate::soft) breakpoints: Breakpoints,
    /// The instruction under execution has delivered an event: the guest's TF, as it was before, makes no
    /// trap behind it.
    pub(in crate::soft) no_step: bool,
    pub(in crate::soft) msrs: Msrs,
    /// x87, MMX and SSE.
    pub(in crate::soft) fp: Box<FpState>,
    /// Set through [`Cpu::set_cpuid`].
    pub(in crate::soft) cpuid: Cpuid,
    /// What `cpuid` shows, for decoding.
    pub(in crate::soft) isa: Isa,

    /// With [`Stop::Fault`]: the exception.
    pub(in crate::soft) fault: Fault,
    /// With [`Stop::Leave`]: why.
    pub(in crate::soft) leave: Leave,
    /// What holds interrupts off before the next instruction.
    pub(in crate::soft) shadow: Shadow,
    /// The instruction just executed has set `shadow`: the next block's end clears it.
    pub(in crate::soft) shadow_next: bool,
    /// INT3 stops the run instead of reaching the guest.
    pub(in crate::soft) break_on_int3: bool,
    /// CR8 where there is no local APIC.
    pub(in crate::soft) cr8: u64,
    /// NMIs are blocked until IRET.
    pub(in crate::soft) nmi_masked: bool,
    /// An interrupt or NMI waits that could not be delivered when it was last looked for: what makes
    /// it possible again asks for [`attention::EVENT`](super::link::attention::EVENT).
    pub(in crate::soft) held: bool,
    /// A repeated string instruction is under way: with [`Stop::Again`].
    pub(in crate::soft) repeating: bool,
    /// Instructions completed, and exceptions raised.
    pub(in crate::soft) instructions: u64,
    /// In a deterministic VM, while the vCPU runs: the VM's instructions less this vCPU's, modulo 2^64.
    pub(in crate::soft) others: u64,

    pub(in crate::soft) stats: VcpuStats,
    pub(in crate::soft) mmu: Mmu,
    pub(in crate::soft) blocks: BlockCache,
    /// Who answers I/O, while the vCPU runs.
    pub(in crate::soft) callbacks: Option<Callbacks>,
    /// The embedder's floating-point environment, while it is put aside: in a run, outside of callbacks.
    pub(in crate::soft) host_float: Option<HostFloat>,
    /// The local APIC, where the VM has interrupt controllers.
    pub(in crate::soft) lapic: Option<Box<Lapic>>,
    /// What other threads see of this vCPU: how they interrupt it.
    pub(in crate::soft) link: Arc<Link>,
    /// What the vCPUs of the VM share.
    pub(in crate::soft) machine: Arc<Machine>,
}

impl Cpu {
    /// A vCPU after reset (SDM vol. 3A, table 9-1).
    pub(in crate::soft) fn new(machine: Arc<Machine>, link: Arc<Link>, lapic: Option<Box<Lapic>>) -> Self {
        let mut cpu = Self {
            flags: Flags::default(),
            gpr: [0; 256],
            at: 0,
            first: 0,
            more: 0,
            system_flags: 0,
            seg_base: [0; 8],
            flat: 0,
            seg: [Segment::default(); 6],
            mode: Mode::default(),
            cr0: 0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            xcr0: 1,
            gdt: DescriptorTable::default(),
            idt: DescriptorTable::default(),
            ldt: Segment::default(),
            tr: Segment::default(),
            debug: DebugRegs::default(),
            breakpoints: Breakpoints::default(),
            no_step: false,
            msrs: Msrs {
                tsc_khz: TSC_KHZ,
                pat: PAT_RESET,
                misc_enable: MISC_ENABLE_RESET,
                ..Msrs::default()
            },
            fp: Box::default(),
            cpuid: Cpuid::default(),
            isa: Isa::ALL,
            fault: Fault::default(),
            leave: Leave::Halt,
            shadow: Shadow::default(),
            shadow_next: false,
            break_on_int3: false,
            cr8: 0,
            nmi_masked: false,
            held: false,
            repeating: false,
            instructions: 0,
            others: 0,
            stats: VcpuStats::default(),
            mmu: Mmu::new(machine.memory.snapshot()),
            blocks: BlockCache::new(),
            callbacks: None,
            host_float: None,
            lapic,
            link,
            machine,
        };
        cpu.reset();
        cpu
    }

    /// As after power-on, or INIT where the architecture makes no difference that a guest of ours
    /// sees. The local APIC is not touched.
    pub(in crate::soft) fn reset(&mut self) {
        self.gpr = [0; 256];
        self.gpr[RIP] = 0xfff0;
        self.flags.set_bits(0);
        self.system_flags = 0;
        self.cr0 = cr0::ET | cr0::NW | cr0::CD;
        (self.cr2, self.cr3, self.cr4, self.efer) = (0, 0, 0, 0);
        self.debug = DebugRegs { addresses: [0; 4], dr6: 0xffff_0ff0, dr7: 0x400 };
        self.gdt = DescriptorTable { base: 0, limit: 0xffff };
        self.idt = self.gdt;
        let system = |kind| Segment { limit: 0xffff, kind, present: true, ..Segment::default() };
        (self.ldt, self.tr) = (system(2), system(0xb));
        for n in [ES, SS, DS, FS, GS] {
            self.seg[n] = Segment::real_mode(0, false);
        }
        self.seg[CS] = Segment { base: 0xffff_0000, ..Segment::real_mode(0xf000, true) };
        self.shadow = Shadow::default();
        self.nmi_masked = false;
        self.gpr[RDX] = 0x0005_0654;
        self.breakpoints.hits = 0;
        self.arm_breakpoints();
        self.segments_changed();
        self.paging_changed();
    }

    /// Takes another CPUID table. Not while a block is executed.
    pub(in crate::soft) fn set_cpuid(&mut self, cpuid: &Cpuid) {
        self.cpuid = cpuid.clone();
        let isa = Isa::of(cpuid);
        if std::mem::replace(&mut self.isa, isa) != isa {
            self.blocks.clear();
        }
    }

    /// Starts at the page that a SIPI names (SDM vol. 3A, 8.4.3).
    pub(in crate::soft) fn start_at(&mut self, page: u8) {
        let segment = Segment::real_mode(u16::from(page) << 8, true);
        self.set_rip(0);
        self.set_segment(CS, segment);
    }

    /// Linear address of the next instruction.
    pub(in crate::soft) fn linear_rip(&self) -> u64 {
        if self.mode.long { self.rip() } else { self.segment(CS).base.wrapping_add(self.rip()) & 0xffff_ffff }
    }

    // ---- registers -------------------------------------------------------------------------------

    /// General-purpose register `n`, all 64 bits.
    #[inline(always)]
    pub(in crate::soft) fn r64(&self, n: usize) -> u64 {
        self.gpr[n & 31]
    }

    /// Sets general-purpose register `n`, all 64 bits.
    #[inline(always)]
    pub(in crate::soft) fn set_r64(&mut self, n: usize, value: u64) {
        self.gpr[n & 15] = value;
    }

    /// Address of the instruction after `op`, within its segment.
    #[inline(always)]
    pub(in crate::soft) fn next_rip(&self, op: &op::Op) -> u64 {
        self.wrap_rip(self.gpr[RIP].wrapping_add(u64::from(op.end)))
    }

    /// Between blocks the address of the next instruction, in a block that of its start.
    #[inline(always)]
    pub(in crate::soft) fn rip(&self) -> u64 {
        self.gpr[RIP]
    }

    /// Sets the address of the next instruction; the handler then returns [`Stop::Next`].
    #[inline(always)]
    pub(in crate::soft) fn set_rip(&mut self, rip: u64) {
        self.gpr[RIP] = rip;
    }

    /// RIP is 32 bits wide outside of 64-bit code. (In 16-bit code it may exceed 64 KiB, and then
    /// faults by the limit.)
    #[inline(always)]
    pub(in crate::soft) fn wrap_rip(&self, rip: u64) -> u64 {
        if self.mode.long { rip } else { rip & 0xffff_ffff }
    }

    // ---- flags -----------------------------------------------------------------------------------

    /// RFLAGS, complete.
    pub(in crate::soft) fn rflags(&self) -> u64 {
        self.system_flags | self.flags.bits() | 2
    }

    /// Sets RFLAGS, complete; the caller has checked who may change what.
    pub(in crate::soft) fn set_rflags(&mut self, rflags: u64) {
        const KNOWN: u64 = flags::TF
            | flags::IF
            | flags::DF
            | flags::IOPL
            | flags::NT
            | flags::RF
            | flags::VM
            | flags::AC
            | flags::VIF
            | flags::VIP
            | flags::ID;
        let before = self.system_flags;
        self.flags.set_bits(rflags);
        self.system_flags = rflags & KNOWN;
        let changed = before ^ self.system_flags;
        if changed & self.system_flags & (flags::TF | flags::RF) != 0 {
            // Instructions are stepped from now on.
            self.link.demand_own(super::link::attention::EVENT);
        }
        if changed & flags::VM != 0 {
            self.segments_changed();
        } else if changed & flags::AC != 0 {
            self.select_bank();
        }
    }

    /// Whether `flag` (one of `flags`' system flags) is set.
    #[inline(always)]
    pub(in crate::soft) fn flag(&self, flag: u64) -> bool {
        self.system_flags & flag != 0
    }

    /// I/O privilege level, 0 to 3.
    pub(in crate::soft) fn iopl(&self) -> u8 {
        ((self.system_flags & flags::IOPL) >> 12) as u8
    }

    // ---- segments and mode -----------------------------------------------------------------------

    /// Segment register `n` ([`ES`] to [`GS`]).
    #[inline(always)]
    pub(in crate::soft) fn segment(&self, n: usize) -> &Segment {
        &self.seg[n]
    }

    /// Loads segment register `n` with its hidden part; the caller has made the checks.
    pub(in crate::soft) fn set_segment(&mut self, n: usize, segment: Segment) {
        self.seg[n] = segment;
        self.segments_changed();
    }

    /// Loads CS and SS at once: a change of privilege.
    pub(in crate::soft) fn set_code_and_stack(&mut self, code: Segment, stack: Segment) {
        (self.seg[CS], self.seg[SS]) = (code, stack);
        self.segments_changed();
    }

    /// Sets the base of FS or GS alone.
    pub(in crate::soft) fn set_segment_base(&mut self, n: usize, base: u64) {
        self.seg[n].base = base;
        self.seg_base[n & 7] = base;
        self.flat &= !(1 << n);
    }

    /// Recomputes what depends on segments, CR0.PE, EFER.LMA and RFLAGS.VM.
    pub(in crate::soft) fn segments_changed(&mut self) {
        let v86 = self.flag(flags::VM);
        let protected = self.cr0 & cr0::PE != 0;
        let long = self.efer & efer::LMA != 0 && self.seg[CS].long;
        let cpl = match (protected, v86) {
            (false, _) => 0,
            (true, true) => 3,
            // SS's, as KVM and hardware keep it: CS's may be another one's where it is conforming.
            (true, false) => self.seg[SS].dpl,
        };
        self.mode = Mode {
            long,
            code32: !long && self.seg[CS].big,
            stack32: !long && self.seg[SS].big,
            protected: protected && !v86,
            v86,
            cpl,
        };
        self.flat = 0;
        for (n, segment) in self.seg.iter().enumerate() {
            self.seg_base[n] = if long && n < FS { 0 } else { segment.base };
            // Type: data, writable, expand-up.
            let open = segment.present && !segment.unusable && segment.kind & 0b1110 == 0b0010;
            if open && segment.base == 0 && segment.limit == u32::MAX {
                self.flat |= 1 << n;
            }
        }
        self.select_bank();
    }

    /// Recomputes what depends on CR0, CR3, CR4 and EFER, and drops every translation.
    pub(in crate::soft) fn paging_changed(&mut self) {
        self.mmu.configure(self.cr0, self.cr3, self.cr4, self.efer);
        self.segments_changed();
    }

    /// Which translations apply, by privilege and SMAP.
    pub(in crate::soft) fn select_bank(&mut self) {
        let ac = self.flag(flags::AC);
        self.mmu.select(self.mode, ac);
    }

    // ---- faults ----------------------------------------------------------------------------------

    /// Raises exception `vector`, with an error code where it has one.
    #[cold]
    pub(in crate::soft) fn raise(&mut self, vector: u8, code: Option<u32>) -> Stop {
        self.fault = Fault { vector, code, payload: 0 };
        Stop::Fault
    }

    /// #UD: the instruction does not exist here.
    #[cold]
    pub(in crate::soft) fn ud(&mut self) -> Stop {
        self.raise(vector::UD, None)
    }

    /// #GP with an error code (a selector, or 0).
    #[cold]
    pub(in crate::soft) fn gp(&mut self, code: u16) -> Stop {
        self.raise(vector::GP, Some(code.into()))
    }

    /// #GP(0) for an address that is not canonical, or #SS(0) where [`Cpu::on_stack`] finds that the
    /// stack was meant (SDM vol. 1, 3.3.7.1).
    #[cold]
    pub(in crate::soft) fn not_canonical(&mut self) -> Stop {
        self.fault = Fault { vector: vector::GP, code: Some(0), payload: NOT_CANONICAL };
        Stop::Fault
    }

    /// What `stop` is where the access was to the stack.
    #[cold]
    pub(in crate::soft) fn on_stack(&mut self, stop: Stop) -> Stop {
        if stop == Stop::Fault && self.fault.vector == vector::GP && self.fault.payload == NOT_CANONICAL {
            self.fault.vector = vector::SS;
        }
        stop
    }

    /// #SS with an error code.
    #[cold]
    pub(in crate::soft) fn ss(&mut self, code: u16) -> Stop {
        self.raise(vector::SS, Some(code.into()))
    }

    /// #PF at linear address `at` with its error code (SDM vol. 3A, 4.7).
    #[cold]
    pub(in crate::soft) fn page_fault(&mut self, at: u64, code: u32) -> Stop {
        self.fault = Fault { vector: vector::PF, code: Some(code), payload: at };
        Stop::Fault
    }

    /// Leaves the guest after this instruction; RIP has been set.
    #[cold]
    pub(in crate::soft) fn leave(&mut self, why: Leave) -> Stop {
        self.leave = why;
        Stop::Leave
    }
}
