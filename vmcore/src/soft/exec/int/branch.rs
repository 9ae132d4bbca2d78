//! Near branches: JMP, Jcc, JCXZ, LOOP, CALL, RET.
//!
//! The word of a handler is the branch's operand size, which cuts the target. In 64-bit code it is
//! always 64 bits, and a target must be canonical; elsewhere it must be within the code segment.

use iced_x86::{Code, FlowControl, Instruction, Mnemonic, OpKind};

use super::address::{Address, Base, Full, Shape, long, shape};
use super::condition::{self, Condition, If, on_condition};
use super::{CX, SP, in_memory, of_size};
use crate::soft::cpu::op::{Flow, Handler, Op, Selected, Stop};
use crate::soft::cpu::word::Word;
use crate::soft::cpu::{CS, Cpu, canonical};

/// Address of the next instruction, where the operand size is `W`.
#[inline(always)]
fn next<W: Word>(cpu: &Cpu, op: &Op) -> u64 {
    if W::BITS == 64 { cpu.rip().wrapping_add(op.end.into()) } else { cpu.next_rip(op) }
}

/// Target of a relative branch.
#[inline(always)]
fn relative<W: Word>(cpu: &Cpu, op: &Op) -> u64 {
    W::cut(next::<W>(cpu, op).wrapping_add(op.imm)).zext()
}

/// Checks that there may be code at `target`.
#[inline(always)]
fn check<W: Word>(cpu: &mut Cpu, target: u64) -> Flow {
    let good = if W::BITS == 64 { canonical(target) } else { target <= u64::from(cpu.segment(CS).limit) };
    if good { Ok(()) } else { Err(cpu.gp(0)) }
}

#[inline(always)]
fn go<W: Word>(cpu: &mut Cpu, op: &Op, target: u64) -> Flow {
    check::<W>(cpu, target)?;
    cpu.set_rip(target);
    cpu.follow(op)
}

/// Goes to the relative target where `taken`, else on within the block.
#[inline(always)]
fn branch<W: Word>(cpu: &mut Cpu, op: &Op, taken: bool) -> Flow {
    if !taken {
        return cpu.go_on(op);
    }
    let target = relative::<W>(cpu, op);
    go::<W>(cpu, op, target)
}

/// Does what the conditional branch behind `op` does in 64-bit code, where its condition holds if `taken`.
#[inline(always)]
pub(super) fn branch_behind(cpu: &mut Cpu, op: &Op, taken: bool) -> Flow {
    let jump = cpu.behind(op);
    branch::<u64>(cpu, jump, taken)
}

fn jump<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let target = relative::<W>(cpu, op);
    go::<W>(cpu, op, target)
}

fn jump_register<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let target = cpu.reg::<W>(op.dst).zext();
    go::<W>(cpu, op, target)
}

#[inline(never)]
fn jump_memory<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let target = cpu.load_operand::<W>(op)?.zext();
    go::<W>(cpu, op, target)
}

fn jump_if<W: Word, C: Condition>(cpu: &mut Cpu, op: &Op) -> Flow {
    let taken = C::holds(&cpu.flags);
    branch::<W>(cpu, op, taken)
}

fn jump_memory_fast<A: Address>(cpu: &mut Cpu, op: &Op) -> Flow {
    match cpu.load_fast(A::linear(cpu, op)) {
        Some(target) if canonical(target) => {
            cpu.set_rip(target);
            cpu.follow(op)
        }
        _ => jump_memory::<u64>(cpu, op),
    }
}

/// In 64-bit code, where it can be done at once: pushes the return address and goes to `target`.
/// Returns whether it did.
#[inline(always)]
fn enter_fast(cpu: &mut Cpu, op: &Op, target: u64) -> bool {
    let sp = cpu.r64(SP.into()).wrapping_sub(8);
    if !canonical(target) || !cpu.store_fast(sp, next::<u64>(cpu, op)) {
        return false;
    }
    cpu.set_r64(SP.into(), sp);
    cpu.set_rip(target);
    true
}

fn call_fast(cpu: &mut Cpu, op: &Op) -> Flow {
    let target = relative::<u64>(cpu, op);
    if enter_fast(cpu, op, target) { cpu.follow(op) } else { call::<u64>(cpu, op) }
}

fn call_register_fast(cpu: &mut Cpu, op: &Op) -> Flow {
    let target = cpu.reg(op.dst);
    if enter_fast(cpu, op, target) { cpu.follow(op) } else { call_register::<u64>(cpu, op) }
}

fn call_memory_fast<A: Address>(cpu: &mut Cpu, op: &Op) -> Flow {
    match cpu.load_fast(A::linear(cpu, op)) {
        Some(target) if enter_fast(cpu, op, target) => cpu.follow(op),
        _ => call_memory::<u64>(cpu, op),
    }
}

fn ret_fast(cpu: &mut Cpu, op: &Op) -> Flow {
    let sp = cpu.r64(SP.into());
    match cpu.load_fast(sp) {
        Some(target) if canonical(target) => {
            cpu.set_r64(SP.into(), sp.wrapping_add(8).wrapping_add(op.imm));
            cpu.set_rip(target);
            cpu.follow(op)
        }
        _ => ret::<u64>(cpu, op),
    }
}

/// Pushes the return address and goes to `target`, once both are known to be possible.
#[inline(always)]
fn enter<W: Word>(cpu: &mut Cpu, op: &Op, target: u64) -> Flow {
    check::<W>(cpu, target)?;
    cpu.push(W::cut(next::<W>(cpu, op)))?;
    cpu.set_rip(target);
    Err(Stop::Next)
}

#[inline(never)]
fn call<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let target = relative::<W>(cpu, op);
    enter::<W>(cpu, op, target)
}

#[inline(never)]
fn call_register<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let target = cpu.reg::<W>(op.dst).zext();
    enter::<W>(cpu, op, target)
}

#[inline(never)]
fn call_memory<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let target = cpu.load_operand::<W>(op)?.zext();
    enter::<W>(cpu, op, target)
}

/// RET; the immediate operand, where there is one, is how many bytes of parameters go too.
#[inline(never)]
fn ret<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let target = cpu.peek::<W>(0)?.zext();
    check::<W>(cpu, target)?;
    let sp = cpu.r64(SP.into()).wrapping_add(W::SIZE).wrapping_add(op.imm);
    cpu.set_stack_pointer(sp);
    cpu.set_rip(target);
    Err(Stop::Next)
}

/// JCXZ and its relatives: `Counter` is the size of the counter.
fn jump_if_counter_zero<Counter: Word, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let taken = cpu.reg::<Counter>(CX).zext() == 0;
    branch::<W>(cpu, op, taken)
}

/// What LOOP looks at besides its counter.
trait LoopCondition {
    fn holds(cpu: &Cpu) -> bool;
}

struct Always;
impl LoopCondition for Always {
    fn holds(_: &Cpu) -> bool {
        true
    }
}

impl<const CODE: u8> LoopCondition for If<CODE> {
    fn holds(cpu: &Cpu) -> bool {
        <Self as Condition>::holds(&cpu.flags)
    }
}

fn count_down<C: LoopCondition, Counter: Word, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let count = Counter::cut(cpu.reg::<Counter>(CX).zext().wrapping_sub(1));
    let taken = count.zext() != 0 && C::holds(cpu);
    if taken {
        let target = relative::<W>(cpu, op);
        check::<W>(cpu, target)?;
    }
    cpu.set_reg(CX, count);
    branch::<W>(cpu, op, taken)
}

fn of_loop<C: LoopCondition>(i: &Instruction) -> Handler {
    let size = branch_size(i);
    match i.code() {
        Code::Loop_rel8_16_CX
        | Code::Loop_rel8_32_CX
        | Code::Loope_rel8_16_CX
        | Code::Loope_rel8_32_CX
        | Code::Loopne_rel8_16_CX
        | Code::Loopne_rel8_32_CX => of_size!(size, count_down, C, u16),
        Code::Loop_rel8_16_RCX
        | Code::Loop_rel8_64_RCX
        | Code::Loope_rel8_16_RCX
        | Code::Loope_rel8_64_RCX
        | Code::Loopne_rel8_16_RCX
        | Code::Loopne_rel8_64_RCX => of_size!(size, count_down, C, u64),
        _ => of_size!(size, count_down, C, u32),
    }
}

/// Operand size of a relative branch in bytes.
fn branch_size(i: &Instruction) -> u32 {
    match i.op0_kind() {
        OpKind::NearBranch16 => 2,
        OpKind::NearBranch32 => 4,
        _ => 8,
    }
}

/// Operand size of an indirect branch in bytes.
fn indirect_size(i: &Instruction) -> usize {
    super::size_of_operand(i, 0)
}

fn conditional(i: &Instruction) -> Option<Handler> {
    let code = condition::code(i)?;
    Some(match branch_size(i) {
        2 => on_condition!(code, jump_if, u16),
        4 => on_condition!(code, jump_if, u32),
        _ => on_condition!(code, jump_if, u64),
    })
}

pub(super) fn select(i: &Instruction) -> Option<Selected> {
    let handler = match i.mnemonic() {
        Mnemonic::Jmp if i.is_jmp_short_or_near() => of_size!(branch_size(i), jump),
        Mnemonic::Jmp if i.is_jmp_near_indirect() && in_memory(i, 0) => match shape(i) {
            Shape::Base => jump_memory_fast::<Base>,
            Shape::Full => jump_memory_fast::<Full>,
            Shape::General => of_size!(indirect_size(i), jump_memory),
        },
        Mnemonic::Jmp if i.is_jmp_near_indirect() => of_size!(indirect_size(i), jump_register),
        Mnemonic::Call if i.is_call_near() && long(i) => call_fast,
        Mnemonic::Call if i.is_call_near() => of_size!(branch_size(i), call),
        Mnemonic::Call if i.is_call_near_indirect() && in_memory(i, 0) => match shape(i) {
            Shape::Base => call_memory_fast::<Base>,
            Shape::Full => call_memory_fast::<Full>,
            Shape::General => of_size!(indirect_size(i), call_memory),
        },
        Mnemonic::Call if i.is_call_near_indirect() && long(i) => call_register_fast,
        Mnemonic::Call if i.is_call_near_indirect() => of_size!(indirect_size(i), call_register),
        Mnemonic::Ret => match i.code() {
            Code::Retnw | Code::Retnw_imm16 => ret::<u16>,
            Code::Retnd | Code::Retnd_imm16 => ret::<u32>,
            _ => ret_fast,
        },
        Mnemonic::Jcxz => of_size!(branch_size(i), jump_if_counter_zero, u16),
        Mnemonic::Jecxz => of_size!(branch_size(i), jump_if_counter_zero, u32),
        Mnemonic::Jrcxz => of_size!(branch_size(i), jump_if_counter_zero, u64),
        Mnemonic::Loop => of_loop::<Always>(i),
        Mnemonic::Loope => of_loop::<If<4>>(i),
        Mnemonic::Loopne => of_loop::<If<5>>(i),
        _ if i.flow_control() == FlowControl::ConditionalBranch && i.is_jcc_short_or_near() => {
            conditional(i)?
        }
        _ => return None,
    };
    // Where it is not taken a conditional branch goes on within the block.
    let conditional = !matches!(i.mnemonic(), Mnemonic::Jmp | Mnemonic::Call | Mnemonic::Ret);
    Some(if conditional {
        Selected { condition: condition::code(i).filter(|_| branch_size(i) == 8), ..Selected::plain(handler) }
    } else {
        Selected::last(handler)
    })
}
