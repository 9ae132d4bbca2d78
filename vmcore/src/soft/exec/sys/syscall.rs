//! SYSCALL, SYSENTER and their returns, SWAPGS, and the bases of FS and GS (SDM vol. 3A, 5.8.7 and
//! 5.8.8; APM vol. 2, 6.1).

use iced_x86::{Code, Instruction, Mnemonic};

use crate::soft::cpu::flags::{IF, RF, TF, VM};
use crate::soft::cpu::op::{Flow, Op, Selected, Stop};
use crate::soft::cpu::word::Word;
use crate::soft::cpu::{Cpu, FS, GS, RCX, RDX, RSP, canonical, cr0, cr4, efer};
use crate::state::Segment;

/// R11, where SYSCALL leaves RFLAGS.
const R11: usize = 11;

/// RFLAGS as SYSRET takes it from R11.
const SYSRET_FLAGS: u64 = 0x003c_7fd7;

/// A flat code segment of level `dpl`, 64-bit where `long`.
fn flat_code(selector: u16, dpl: u8, long: bool) -> Segment {
    Segment { dpl, big: !long, long, ..Segment::flat(selector, true) }
}

fn flat_stack(selector: u16, dpl: u8) -> Segment {
    Segment { dpl, ..Segment::flat(selector, false) }
}

impl Cpu {
    /// Whether CPUID names AMD or who took over its ways.
    pub(super) fn is_amd(&self) -> bool {
        let vendor = self.cpuid.get(0, 0).map(|leaf| leaf.ebx.to_le_bytes());
        matches!(vendor.as_ref(), Some(b"Auth" | b"Hygo"))
    }
}

fn syscall(cpu: &mut Cpu, op: &Op) -> Flow {
    // Intel's has it in 64-bit code only.
    if cpu.efer & efer::SCE == 0 || !cpu.mode.long && (!cpu.mode.protected || !cpu.is_amd()) {
        return Err(cpu.ud());
    }
    let next = cpu.next_rip(op);
    let selector = (cpu.msrs.star >> 32) as u16 & 0xfffc;
    let flags = cpu.rflags();
    cpu.set_r64(RCX, next);
    if cpu.ia32e() {
        cpu.set_r64(R11, flags & !RF);
        let target = if cpu.mode.long { cpu.msrs.lstar } else { cpu.msrs.cstar };
        cpu.set_rflags(flags & !cpu.msrs.fmask & !RF);
        cpu.no_step = !cpu.flag(TF);
        cpu.set_code_and_stack(flat_code(selector, 0, true), flat_stack(selector.wrapping_add(8), 0));
        cpu.set_rip(target);
    } else {
        cpu.set_rflags(flags & !(IF | VM | RF));
        cpu.set_code_and_stack(flat_code(selector, 0, false), flat_stack(selector.wrapping_add(8), 0));
        cpu.set_rip(cpu.msrs.star & 0xffff_ffff);
    }
    Err(Stop::Next)
}

fn sysret<const WIDE: bool>(cpu: &mut Cpu, _: &Op) -> Flow {
    if cpu.efer & efer::SCE == 0 || !cpu.mode.long && (!cpu.mode.protected || !cpu.is_amd()) {
        return Err(cpu.ud());
    }
    cpu.only_kernel()?;
    let target = cpu.r64(RCX);
    if WIDE && !canonical(target) {
        return Err(cpu.gp(0));
    }
    let base = (cpu.msrs.star >> 48) as u16;
    let code = if WIDE { base.wrapping_add(16) } else { base };
    let flags = if cpu.ia32e() { cpu.r64(R11) & SYSRET_FLAGS } else { cpu.rflags() | IF };
    cpu.set_code_and_stack(flat_code(code | 3, 3, WIDE), flat_stack(base.wrapping_add(8) | 3, 3));
    cpu.set_rflags(flags & !(RF | VM));
    cpu.set_rip(if WIDE { target } else { target & 0xffff_ffff });
    if flags & IF != 0 {
        cpu.events_may_come();
    }
    Err(Stop::Next)
}

fn sysenter(cpu: &mut Cpu, _: &Op) -> Flow {
    if cpu.ia32e() && cpu.is_amd() {
        return Err(cpu.ud());
    }
    let selector = cpu.msrs.sysenter_cs as u16 & 0xfffc;
    if cpu.cr0 & cr0::PE == 0 || selector == 0 {
        return Err(cpu.gp(0));
    }
    let long = cpu.ia32e();
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    cpu.set_rflags(cpu.rflags() & !(VM | IF | RF));
    cpu.set_code_and_stack(flat_code(selector, 0, long), flat_stack(selector.wrapping_add(8), 0));
    cpu.set_r64(RSP, cpu.msrs.sysenter_esp & mask);
    cpu.set_rip(cpu.msrs.sysenter_eip & mask);
    Err(Stop::Next)
}

fn sysexit<const WIDE: bool>(cpu: &mut Cpu, _: &Op) -> Flow {
    if cpu.ia32e() && cpu.is_amd() {
        return Err(cpu.ud());
    }
    let selector = cpu.msrs.sysenter_cs as u16 & 0xfffc;
    if cpu.cr0 & cr0::PE == 0 || selector == 0 || cpu.mode.cpl != 0 {
        return Err(cpu.gp(0));
    }
    let (rip, rsp) = (cpu.r64(RDX), cpu.r64(RCX));
    if WIDE && !(canonical(rip) && canonical(rsp)) {
        return Err(cpu.gp(0));
    }
    let mask = if WIDE { u64::MAX } else { 0xffff_ffff };
    let code = selector.wrapping_add(if WIDE { 32 } else { 16 });
    cpu.set_code_and_stack(flat_code(code | 3, 3, WIDE), flat_stack(code.wrapping_add(8) | 3, 3));
    cpu.set_r64(RSP, rsp & mask);
    cpu.set_rip(rip & mask);
    Err(Stop::Next)
}

fn swapgs(cpu: &mut Cpu, _: &Op) -> Flow {
    cpu.only_kernel()?;
    let base = cpu.base(GS);
    let kernel = std::mem::replace(&mut cpu.msrs.kernel_gs_base, base);
    cpu.set_segment_base(GS, kernel);
    Ok(())
}

fn read_base<const N: usize, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    if cpu.cr4 & cr4::FSGSBASE == 0 {
        return Err(cpu.ud());
    }
    cpu.set_reg(op.dst, W::cut(cpu.base(N)));
    Ok(())
}

fn write_base<const N: usize, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    if cpu.cr4 & cr4::FSGSBASE == 0 {
        return Err(cpu.ud());
    }
    let base = cpu.reg::<W>(op.dst).zext();
    if !canonical(base) {
        return Err(cpu.gp(0));
    }
    cpu.set_segment_base(N, base);
    Ok(())
}

pub(super) fn select(i: &Instruction) -> Option<Selected> {
    Some(match i.code() {
        Code::Sysretd => Selected::last(sysret::<false>),
        Code::Sysretq => Selected::last(sysret::<true>),
        Code::Sysexitd => Selected::last(sysexit::<false>),
        Code::Sysexitq => Selected::last(sysexit::<true>),
        Code::Rdfsbase_r32 => Selected::plain(read_base::<FS, u32>),
        Code::Rdfsbase_r64 => Selected::plain(read_base::<FS, u64>),
        Code::Rdgsbase_r32 => Selected::plain(read_base::<GS, u32>),
        Code::Rdgsbase_r64 => Selected::plain(read_base::<GS, u64>),
        Code::Wrfsbase_r32 => Selected::plain(write_base::<FS, u32>),
        Code::Wrfsbase_r64 => Selected::plain(write_base::<FS, u64>),
        Code::Wrgsbase_r32 => Selected::plain(write_base::<GS, u32>),
        Code::Wrgsbase_r64 => Selected::plain(write_base::<GS, u64>),
        _ => match i.mnemonic() {
            Mnemonic::Syscall => Selected::last(syscall),
            Mnemonic::Sysenter => Selected::last(sysenter),
            Mnemonic::Swapgs => Selected::plain(swapgs),
            _ => return None,
        },
    })
}
