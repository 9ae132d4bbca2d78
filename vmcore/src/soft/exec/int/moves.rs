//! MOV and what else moves data without arithmetic: extensions, LEA, CMOVcc, SETcc.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::address::{Address, of_shape};
use super::condition::{self, Condition, on_condition};
use super::{in_memory, of_size, size_of_operand};
use crate::soft::cpu::Cpu;
use crate::soft::cpu::op::{FlagUse, Flow, Handler, Op, Selected};
use crate::soft::cpu::word::Word;

fn register_register<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = cpu.reg::<W>(op.src);
    cpu.set_reg(op.dst, value);
    cpu.go_on(op)
}

fn register_immediate<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.set_reg(op.dst, W::cut(op.imm));
    cpu.go_on(op)
}

fn register_memory_fast<A: Address, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let Some(value) = cpu.load_fast::<W>(A::linear(cpu, op)) else { return register_memory::<W>(cpu, op) };
    cpu.set_reg(op.dst, value);
    cpu.go_on(op)
}

fn memory_register_fast<A: Address, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = cpu.reg::<W>(op.dst);
    if cpu.store_fast(A::linear(cpu, op), value) { cpu.go_on(op) } else { memory_register::<W>(cpu, op) }
}

fn memory_immediate_fast<A: Address, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    if cpu.store_fast(A::linear(cpu, op), W::cut(op.imm)) {
        cpu.go_on(op)
    } else {
        memory_immediate::<W>(cpu, op)
    }
}

#[inline(never)]
fn register_memory<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = cpu.load_operand::<W>(op)?;
    cpu.set_reg(op.dst, value);
    Ok(())
}

#[inline(never)]
fn memory_register<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = cpu.reg::<W>(op.dst);
    cpu.store_operand(op, value)
}

#[inline(never)]
fn memory_immediate<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.store_operand(op, W::cut(op.imm))
}

fn mov(i: &Instruction) -> Option<Handler> {
    let other = |n| i.op_kind(n) == OpKind::Register && !i.op_register(n).is_gpr();
    if other(0) || other(1) {
        // Segment, control and debug registers are system instructions.
        return None;
    }
    let size = size_of_operand(i, 0);
    Some(match (i.op0_kind(), i.op1_kind()) {
        (OpKind::Register, OpKind::Register) => of_size!(size, register_register),
        (OpKind::Register, OpKind::Memory) => of_shape!(i, size, register_memory_fast, register_memory),
        (OpKind::Register, _) => of_size!(size, register_immediate),
        (_, OpKind::Register) => of_shape!(i, size, memory_register_fast, memory_register),
        _ => of_shape!(i, size, memory_immediate_fast, memory_immediate),
    })
}

/// Zero- or sign-extension.
trait Extension {
    fn extend<W: Word>(value: W) -> u64;
}

struct Zero;
impl Extension for Zero {
    #[inline(always)]
    fn extend<W: Word>(value: W) -> u64 {
        value.zext()
    }
}

struct Sign;
impl Extension for Sign {
    #[inline(always)]
    fn extend<W: Word>(value: W) -> u64 {
        value.sext()
    }
}

fn extend_register<E: Extension, From: Word, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = E::extend(cpu.reg::<From>(op.src));
    cpu.set_reg(op.dst, W::cut(value));
    cpu.go_on(op)
}

fn extend_memory_fast<A: Address, E: Extension, From: Word, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let Some(value) = cpu.load_fast::<From>(A::linear(cpu, op)) else {
        return extend_memory::<E, From, W>(cpu, op);
    };
    cpu.set_reg(op.dst, W::cut(E::extend(value)));
    cpu.go_on(op)
}

#[inline(never)]
fn extend_memory<E: Extension, From: Word, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = E::extend(cpu.load_operand::<From>(op)?);
    cpu.set_reg(op.dst, W::cut(value));
    Ok(())
}

fn extend<E: Extension>(i: &Instruction) -> Handler {
    let to = size_of_operand(i, 0);
    match (in_memory(i, 1), size_of_operand(i, 1)) {
        (false, 1) => of_size!(to, extend_register, E, u8),
        (false, 2) => of_size!(to, extend_register, E, u16),
        (false, _) => of_size!(to, extend_register, E, u32),
        (true, 1) => of_shape!(i, to, extend_memory_fast, extend_memory, E, u8),
        (true, 2) => of_shape!(i, to, extend_memory_fast, extend_memory, E, u16),
        (true, _) => of_shape!(i, to, extend_memory_fast, extend_memory, E, u32),
    }
}

/// The bytes of `value` in the other order.
#[inline(always)]
fn swap<W: Word>(value: W) -> W {
    W::cut(value.zext().swap_bytes() >> (64 - W::BITS))
}

fn load_swapped<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = cpu.load_operand::<W>(op)?;
    cpu.set_reg(op.dst, swap(value));
    Ok(())
}

fn store_swapped<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = cpu.reg::<W>(op.dst);
    cpu.store_operand(op, swap(value))
}

fn bswap<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = cpu.reg::<W>(op.dst);
    cpu.set_reg(op.dst, swap(value));
    cpu.go_on(op)
}

/// BSWAP of 16 bits is undefined; processors clear the register.
fn bswap16(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.set_reg(op.dst, 0u16);
    Ok(())
}

fn lea_fast<A: Address, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let offset = A::offset(cpu, op);
    cpu.set_reg(op.dst, W::cut(offset));
    cpu.go_on(op)
}

fn lea<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let offset = cpu.offset(op);
    cpu.set_reg(op.dst, W::cut(offset));
    Ok(())
}

#[inline(always)]
fn conditional_move<C: Condition, W: Word>(cpu: &mut Cpu, op: &Op, value: W) {
    // A 32-bit one clears the upper half of the register either way.
    let old = cpu.reg::<W>(op.dst);
    let new = if C::holds(&cpu.flags) { value } else { old };
    cpu.set_reg(op.dst, new);
}

fn cmov_register<W: Word, C: Condition>(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = cpu.reg::<W>(op.src);
    conditional_move::<C, W>(cpu, op, value);
    cpu.go_on(op)
}

fn cmov_memory<W: Word, C: Condition>(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = cpu.load_operand::<W>(op)?;
    conditional_move::<C, W>(cpu, op, value);
    Ok(())
}

fn cmov(i: &Instruction) -> Option<Handler> {
    let code = condition::code(i)?;
    Some(match (in_memory(i, 1), size_of_operand(i, 0)) {
        (false, 2) => on_condition!(code, cmov_register, u16),
        (false, 4) => on_condition!(code, cmov_register, u32),
        (false, _) => on_condition!(code, cmov_register, u64),
        (true, 2) => on_condition!(code, cmov_memory, u16),
        (true, 4) => on_condition!(code, cmov_memory, u32),
        (true, _) => on_condition!(code, cmov_memory, u64),
    })
}

fn set_register<W: Word, C: Condition>(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = C::holds(&cpu.flags);
    cpu.set_reg(op.dst, W::cut(value.into()));
    cpu.go_on(op)
}

fn set_memory<W: Word, C: Condition>(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = C::holds(&cpu.flags);
    cpu.store_operand(op, W::cut(value.into()))
}

fn set(i: &Instruction) -> Option<Handler> {
    let code = condition::code(i)?;
    Some(if in_memory(i, 0) {
        on_condition!(code, set_memory, u8)
    } else {
        on_condition!(code, set_register, u8)
    })
}

pub(super) fn select(i: &Instruction) -> Option<Selected> {
    let handler = match i.mnemonic() {
        Mnemonic::Mov => mov(i)?,
        Mnemonic::Movnti => of_size!(size_of_operand(i, 0), memory_register),
        Mnemonic::Movzx => extend::<Zero>(i),
        Mnemonic::Movsx | Mnemonic::Movsxd => extend::<Sign>(i),
        Mnemonic::Movbe if in_memory(i, 0) => of_size!(size_of_operand(i, 0), store_swapped),
        Mnemonic::Movbe => of_size!(size_of_operand(i, 0), load_swapped),
        Mnemonic::Bswap if size_of_operand(i, 0) == 2 => bswap16,
        Mnemonic::Bswap => of_size!(size_of_operand(i, 0), bswap),
        Mnemonic::Lea => of_shape!(i, size_of_operand(i, 0), lea_fast, lea),
        Mnemonic::Cmova
        | Mnemonic::Cmovae
        | Mnemonic::Cmovb
        | Mnemonic::Cmovbe
        | Mnemonic::Cmove
        | Mnemonic::Cmovg
        | Mnemonic::Cmovge
        | Mnemonic::Cmovl
        | Mnemonic::Cmovle
        | Mnemonic::Cmovne
        | Mnemonic::Cmovno
        | Mnemonic::Cmovnp
        | Mnemonic::Cmovns
        | Mnemonic::Cmovo
        | Mnemonic::Cmovp
        | Mnemonic::Cmovs => cmov(i)?,
        Mnemonic::Seta
        | Mnemonic::Setae
        | Mnemonic::Setb
        | Mnemonic::Setbe
        | Mnemonic::Sete
        | Mnemonic::Setg
        | Mnemonic::Setge
        | Mnemonic::Setl
        | Mnemonic::Setle
        | Mnemonic::Setne
        | Mnemonic::Setno
        | Mnemonic::Setnp
        | Mnemonic::Setns
        | Mnemonic::Seto
        | Mnemonic::Setp
        | Mnemonic::Sets => set(i)?,
        _ => return None,
    };
    let always_goes_on = match i.mnemonic() {
        Mnemonic::Lea | Mnemonic::Bswap => true,
        Mnemonic::Mov | Mnemonic::Movzx | Mnemonic::Movsx | Mnemonic::Movsxd => {
            !in_memory(i, 0) && !in_memory(i, 1)
        }
        _ => false,
    };
    Some(Selected::flagged(handler, if always_goes_on { FlagUse::Ignores } else { FlagUse::Sees }))
}
