//! The most common x87 instructions, without loading the whole state: while every exception is masked,
//! and the registers that are used are not empty (or are, where one is pushed), an instruction can run
//! on copies of its one or two operands, or is only a copy. In every other case its handler hands over
//! to that of `x87`.
#![expect(unsafe_code, reason = "calls thunks with pointers into the FP state")]

use iced_x86::{Code, Instruction};

use super::state::EXCEPTIONS;
use super::thunk::thunk;
use super::x87::{self, SIZE_SHIFT};
use super::x87_thunk::{QUICK, Quick};
use crate::soft::cpu::op::{Flow, Handler, Op};
use crate::soft::cpu::{Cpu, cr0};

/// FSW: C1, which tells of rounding up; and all four condition codes.
const C1: u16 = 1 << 9;
const CONDITIONS: u16 = 0x4700;

/// What can be done quickly, and by which handler.
pub(super) fn select(i: &Instruction) -> Option<(Option<Quick>, Handler)> {
    change(i).or_else(|| compare_forms(i)).or_else(|| moves(i))
}

/// Arithmetic.
fn change(i: &Instruction) -> Option<(Option<Quick>, Handler)> {
    let code = i.code();
    Some(match code {
        Code::Fadd_st0_sti
        | Code::Fmul_st0_sti
        | Code::Fsub_st0_sti
        | Code::Fsubr_st0_sti
        | Code::Fdiv_st0_sti
        | Code::Fdivr_st0_sti => (Some(Quick::Both(code)), both),
        Code::Fadd_sti_st0
        | Code::Fmul_sti_st0
        | Code::Fsub_sti_st0
        | Code::Fsubr_sti_st0
        | Code::Fdiv_sti_st0
        | Code::Fdivr_sti_st0 => (Some(Quick::Reverse(code)), reverse::<false>),
        Code::Faddp_sti_st0 => (Some(Quick::Reverse(Code::Fadd_sti_st0)), reverse::<true>),
        Code::Fmulp_sti_st0 => (Some(Quick::Reverse(Code::Fmul_sti_st0)), reverse::<true>),
        Code::Fsubp_sti_st0 => (Some(Quick::Reverse(Code::Fsub_sti_st0)), reverse::<true>),
        Code::Fsubrp_sti_st0 => (Some(Quick::Reverse(Code::Fsubr_sti_st0)), reverse::<true>),
        Code::Fdivp_sti_st0 => (Some(Quick::Reverse(Code::Fdiv_sti_st0)), reverse::<true>),
        Code::Fdivrp_sti_st0 => (Some(Quick::Reverse(Code::Fdivr_sti_st0)), reverse::<true>),
        Code::Fadd_m32fp
        | Code::Fmul_m32fp
        | Code::Fsub_m32fp
        | Code::Fsubr_m32fp
        | Code::Fdiv_m32fp
        | Code::Fdivr_m32fp
        | Code::Fadd_m64fp
        | Code::Fmul_m64fp
        | Code::Fsub_m64fp
        | Code::Fsubr_m64fp
        | Code::Fdiv_m64fp
        | Code::Fdivr_m64fp
        | Code::Fiadd_m32int
        | Code::Fimul_m32int
        | Code::Fisub_m32int
        | Code::Fisubr_m32int
        | Code::Fidiv_m32int
        | Code::Fidivr_m32int
        | Code::Fiadd_m16int
        | Code::Fimul_m16int
        | Code::Fisub_m16int
        | Code::Fisubr_m16int
        | Code::Fidiv_m16int
        | Code::Fidivr_m16int => (Some(Quick::ChangeByMemory(code)), by_memory),
        Code::Fsqrt | Code::Frndint | Code::Fchs | Code::Fabs | Code::F2xm1 => {
            (Some(Quick::Change(code)), unary::<C1>)
        }
        Code::Fxam | Code::Ftst => (Some(Quick::Change(code)), unary::<CONDITIONS>),
        _ => return None,
    })
}

/// Comparisons; those that pop are run without.
fn compare_forms(i: &Instruction) -> Option<(Option<Quick>, Handler)> {
    let code = i.code();
    Some(match code {
        Code::Fcom_st0_sti => (Some(Quick::Compare(code)), compare::<0>),
        Code::Fcomp_st0_sti => (Some(Quick::Compare(Code::Fcom_st0_sti)), compare::<1>),
        Code::Fcompp => (Some(Quick::Compare(Code::Fcom_st0_sti)), compare::<2>),
        Code::Fucom_st0_sti => (Some(Quick::Compare(code)), compare::<0>),
        Code::Fucomp_st0_sti => (Some(Quick::Compare(Code::Fucom_st0_sti)), compare::<1>),
        Code::Fucompp => (Some(Quick::Compare(Code::Fucom_st0_sti)), compare::<2>),
        Code::Fcomi_st0_sti => (Some(Quick::Compare(code)), compare_flags::<0>),
        Code::Fcomip_st0_sti => (Some(Quick::Compare(Code::Fcomi_st0_sti)), compare_flags::<1>),
        Code::Fucomi_st0_sti => (Some(Quick::Compare(code)), compare_flags::<0>),
        Code::Fucomip_st0_sti => (Some(Quick::Compare(Code::Fucomi_st0_sti)), compare_flags::<1>),
        Code::Fcom_m32fp | Code::Fcom_m64fp | Code::Ficom_m16int | Code::Ficom_m32int => {
            (Some(Quick::CompareMemory(code)), compare_memory::<0>)
        }
        Code::Fcomp_m32fp => (Some(Quick::CompareMemory(Code::Fcom_m32fp)), compare_memory::<1>),
        Code::Fcomp_m64fp => (Some(Quick::CompareMemory(Code::Fcom_m64fp)), compare_memory::<1>),
        Code::Ficomp_m16int => (Some(Quick::CompareMemory(Code::Ficom_m16int)), compare_memory::<1>),
        Code::Ficomp_m32int => (Some(Quick::CompareMemory(Code::Ficom_m32int)), compare_memory::<1>),
        _ => return None,
    })
}

/// Loads, stores, copies.
fn moves(i: &Instruction) -> Option<(Option<Quick>, Handler)> {
    let code = i.code();
    Some(match code {
        Code::Fld_m32fp | Code::Fld_m64fp | Code::Fild_m16int | Code::Fild_m32int | Code::Fild_m64int => {
            (Some(Quick::PushMemory(code)), push_memory)
        }
        Code::Fld1 | Code::Fldz | Code::Fldpi | Code::Fldl2e | Code::Fldl2t | Code::Fldlg2 | Code::Fldln2 => {
            (Some(Quick::Push(code)), push)
        }
        Code::Fst_m32fp | Code::Fst_m64fp | Code::Fist_m16int | Code::Fist_m32int => {
            (Some(Quick::Store(code)), store::<false>)
        }
        Code::Fstp_m32fp
        | Code::Fstp_m64fp
        | Code::Fistp_m16int
        | Code::Fistp_m32int
        | Code::Fistp_m64int
        | Code::Fisttp_m16int
        | Code::Fisttp_m32int
        | Code::Fisttp_m64int => (Some(Quick::StorePop(code)), store::<true>),
        Code::Fld_m80fp => (None, load_whole),
        Code::Fstp_m80fp => (None, store_whole),
        Code::Fld_sti => (None, push_copy),
        Code::Fst_sti => (None, copy::<false>),
        Code::Fstp_sti => (None, copy::<true>),
        Code::Fxch_st0_sti => (None, exchange),
        _ => return None,
    })
}

/// Everything is masked, and x87 may be used.
#[inline(always)]
fn ready(cpu: &Cpu) -> bool {
    cpu.cr0 & (cr0::EM | cr0::TS) == 0 && cpu.fp.fcw & EXCEPTIONS == EXCEPTIONS
}

/// ST(`i`) is not empty.
#[inline(always)]
fn full(cpu: &Cpu, i: u8) -> bool {
    cpu.fp.ftw >> cpu.fp.physical(i) & 1 != 0
}

/// The number of the ST(i) of an instruction with one of them besides ST(0): its operands are in either
/// order, or there is none, and it is ST(1).
#[inline(always)]
fn other(op: &Op) -> u8 {
    op.dst | op.src
}

/// The memory operand's size in bytes.
#[inline(always)]
fn size(op: &Op) -> u64 {
    u64::from(op.extra >> SIZE_SHIFT)
}

/// Runs the quick thunk on physical register `target` and a source; sets the flags and those of the
/// condition codes in `conditions`. Returns FSW and RFLAGS.
#[inline(always)]
fn run(cpu: &mut Cpu, op: &Op, target: usize, source: *const u8, conditions: u16) -> u64 {
    let target = (&raw mut cpu.fp.st[target & 7]).cast::<u8>();
    // SAFETY: `imm` is the address of a thunk, which has a quick one behind it, as this handler was
    // chosen; the VM outlives its vCPUs.
    let thunk = unsafe { thunk(op.imm + QUICK as u64) };
    let status = thunk(target, source, &raw mut *cpu.fp);
    let taken = (status & 0xffff) as u16 & (conditions | EXCEPTIONS);
    cpu.fp.fsw = cpu.fp.fsw & !conditions | taken;
    status
}

#[inline(always)]
fn register(cpu: &mut Cpu, i: u8) -> *const u8 {
    let n = cpu.fp.physical(i);
    (&raw const cpu.fp.st[n]).cast()
}

#[inline(always)]
fn pop(cpu: &mut Cpu) {
    let top = cpu.fp.top();
    cpu.fp.ftw &= !(1 << top);
    cpu.fp.set_top(top.wrapping_add(1));
}

/// Pushes an undefined value; its physical register.
#[inline(always)]
fn grow(cpu: &mut Cpu) -> usize {
    let top = cpu.fp.top().wrapping_sub(1) & 7;
    cpu.fp.set_top(top);
    cpu.fp.ftw |= 1 << top;
    top.into()
}

fn both(cpu: &mut Cpu, op: &Op) -> Flow {
    if !ready(cpu) || !full(cpu, 0) || !full(cpu, op.src) {
        return x87::registers(cpu, op);
    }
    let (target, source) = (cpu.fp.physical(0), register(cpu, op.src));
    run(cpu, op, target, source, C1);
    x87::note(cpu, op);
    Ok(())
}

fn reverse<const POP: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    if !ready(cpu) || !full(cpu, 0) || !full(cpu, op.dst) {
        return x87::registers(cpu, op);
    }
    let (target, source) = (cpu.fp.physical(op.dst), register(cpu, 0));
    run(cpu, op, target, source, C1);
    if POP {
        pop(cpu);
    }
    x87::note(cpu, op);
    Ok(())
}

fn unary<const CONDITIONS: u16>(cpu: &mut Cpu, op: &Op) -> Flow {
    if !ready(cpu) || !full(cpu, 0) {
        return x87::registers(cpu, op);
    }
    let target = cpu.fp.physical(0);
    run(cpu, op, target, std::ptr::null(), CONDITIONS);
    x87::note(cpu, op);
    Ok(())
}

fn by_memory(cpu: &mut Cpu, op: &Op) -> Flow {
    if !ready(cpu) || !full(cpu, 0) {
        return x87::load(cpu, op);
    }
    load_source(cpu, op)?;
    let (target, source) = (cpu.fp.physical(0), (&raw const cpu.fp.source).cast());
    run(cpu, op, target, source, C1);
    x87::note_memory(cpu, op);
    Ok(())
}

#[inline(always)]
fn load_source(cpu: &mut Cpu, op: &Op) -> Flow {
    let at = cpu.address(op, size(op), false)?;
    cpu.fp.source.0 = cpu.load_part(at, size(op))?;
    Ok(())
}

fn compare<const POPS: u8>(cpu: &mut Cpu, op: &Op) -> Flow {
    let i = if POPS == 2 { 1 } else { op.src };
    if !ready(cpu) || !full(cpu, 0) || !full(cpu, i) {
        return x87::registers(cpu, op);
    }
    let (target, source) = (cpu.fp.physical(0), register(cpu, i));
    run(cpu, op, target, source, CONDITIONS);
    (0..POPS).for_each(|_| pop(cpu));
    x87::note(cpu, op);
    Ok(())
}

fn compare_flags<const POPS: u8>(cpu: &mut Cpu, op: &Op) -> Flow {
    if !ready(cpu) || !full(cpu, 0) || !full(cpu, op.src) {
        return x87::compare(cpu, op);
    }
    let (target, source) = (cpu.fp.physical(0), register(cpu, op.src));
    // C1 stays as it is (AMD's processors; Intel's clear it).
    let status = run(cpu, op, target, source, 0);
    (0..POPS).for_each(|_| pop(cpu));
    x87::note(cpu, op);
    cpu.flags.set_bits(status >> 16);
    Ok(())
}

fn compare_memory<const POPS: u8>(cpu: &mut Cpu, op: &Op) -> Flow {
    if !ready(cpu) || !full(cpu, 0) {
        return x87::load(cpu, op);
    }
    load_source(cpu, op)?;
    let (target, source) = (cpu.fp.physical(0), (&raw const cpu.fp.source).cast());
    run(cpu, op, target, source, CONDITIONS);
    (0..POPS).for_each(|_| pop(cpu));
    x87::note_memory(cpu, op);
    Ok(())
}

fn push(cpu: &mut Cpu, op: &Op) -> Flow {
    if !ready(cpu) || full(cpu, 7) {
        return x87::registers(cpu, op);
    }
    let target = grow(cpu);
    run(cpu, op, target, std::ptr::null(), C1);
    x87::note(cpu, op);
    Ok(())
}

fn push_memory(cpu: &mut Cpu, op: &Op) -> Flow {
    if !ready(cpu) || full(cpu, 7) {
        return x87::load(cpu, op);
    }
    load_source(cpu, op)?;
    let target = grow(cpu);
    run(cpu, op, target, (&raw const cpu.fp.source).cast(), C1);
    x87::note_memory(cpu, op);
    Ok(())
}

fn store<const POP: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    if !ready(cpu) || !full(cpu, 0) {
        return x87::store(cpu, op);
    }
    let at = cpu.address(op, size(op), true)?;
    // The flags change only where the store succeeds.
    let before = cpu.fp.fsw;
    let (target, source) = (cpu.fp.physical(0), (&raw mut cpu.fp.source).cast::<u8>());
    run(cpu, op, target, source, C1);
    if let Err(stop) = cpu.store_part(at, size(op), cpu.fp.source.0) {
        cpu.fp.fsw = before;
        return Err(stop);
    }
    if POP {
        pop(cpu);
    }
    x87::note_memory(cpu, op);
    Ok(())
}

fn load_whole(cpu: &mut Cpu, op: &Op) -> Flow {
    if !ready(cpu) || full(cpu, 7) {
        return x87::load(cpu, op);
    }
    load_source(cpu, op)?;
    let target = grow(cpu);
    cpu.fp.st[target] = cpu.fp.source.0;
    cpu.fp.fsw &= !C1;
    x87::note_memory(cpu, op);
    Ok(())
}

fn store_whole(cpu: &mut Cpu, op: &Op) -> Flow {
    if !ready(cpu) || !full(cpu, 0) {
        return x87::store(cpu, op);
    }
    let at = cpu.address(op, 10, true)?;
    cpu.store_part(at, 10, cpu.fp.st(0))?;
    cpu.fp.fsw &= !C1;
    pop(cpu);
    x87::note_memory(cpu, op);
    Ok(())
}

/// FLD ST(i).
fn push_copy(cpu: &mut Cpu, op: &Op) -> Flow {
    if !ready(cpu) || full(cpu, 7) || !full(cpu, other(op)) {
        return x87::registers(cpu, op);
    }
    let value = cpu.fp.st(other(op));
    let target = grow(cpu);
    cpu.fp.st[target] = value;
    cpu.fp.fsw &= !C1;
    x87::note(cpu, op);
    Ok(())
}

/// FST ST(i), FSTP ST(i).
fn copy<const POP: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    if !ready(cpu) || !full(cpu, 0) {
        return x87::registers(cpu, op);
    }
    let target = cpu.fp.physical(other(op));
    cpu.fp.st[target] = cpu.fp.st(0);
    cpu.fp.ftw |= 1 << target;
    cpu.fp.fsw &= !C1;
    if POP {
        pop(cpu);
    }
    x87::note(cpu, op);
    Ok(())
}

fn exchange(cpu: &mut Cpu, op: &Op) -> Flow {
    if !ready(cpu) || !full(cpu, 0) || !full(cpu, other(op)) {
        return x87::registers(cpu, op);
    }
    let (a, b) = (cpu.fp.physical(0), cpu.fp.physical(other(op)));
    cpu.fp.st.swap(a, b);
    cpu.fp.fsw &= !C1;
    x87::note(cpu, op);
    Ok(())
}
