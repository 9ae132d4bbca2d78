//! XCHG, XADD, CMPXCHG and its double forms.

use iced_x86::{Instruction, Mnemonic};

use super::{AX, BX, CX, DX, in_memory, of_size, size_of_operand};
use crate::soft::cpu::Cpu;
use crate::soft::cpu::flags::ZF;
use crate::soft::cpu::op::{Flow, Handler, Op, Selected};
use crate::soft::cpu::word::Word;

fn xchg_register<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let (a, b) = (cpu.reg::<W>(op.dst), cpu.reg::<W>(op.src));
    cpu.set_reg(op.dst, b);
    cpu.set_reg(op.src, a);
    Ok(())
}

/// With memory it is always locked.
fn xchg_memory<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let new = cpu.reg::<W>(op.dst);
    let mut old = W::default();
    let at = cpu.address(op, W::SIZE, true)?;
    cpu.modify_atomic(at, |value: W| {
        old = value;
        new
    })?;
    cpu.set_reg(op.dst, old);
    Ok(())
}

#[inline(always)]
fn sum<W: Word>(a: W, b: W) -> W {
    W::cut(a.zext().wrapping_add(b.zext()))
}

fn xadd_register<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let (a, b) = (cpu.reg::<W>(op.dst), cpu.reg::<W>(op.src));
    let result = sum(a, b);
    cpu.flags.set_add(a, b, result);
    cpu.set_reg(op.src, a);
    cpu.set_reg(op.dst, result);
    Ok(())
}

fn xadd_memory<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let b = cpu.reg::<W>(op.dst);
    let mut a = W::default();
    cpu.modify_operand(op, |old: W| {
        a = old;
        sum(old, b)
    })?;
    cpu.flags.set_add(a, b, sum(a, b));
    cpu.set_reg(op.dst, a);
    Ok(())
}

/// Sets the flags of a comparison of the accumulator with `old`. Returns whether they are equal.
#[inline(always)]
fn compare<W: Word>(cpu: &mut Cpu, old: W) -> bool {
    let accumulator = cpu.reg::<W>(AX);
    cpu.flags.set_sub(accumulator, old, W::cut(accumulator.zext().wrapping_sub(old.zext())));
    accumulator == old
}

fn cmpxchg_register<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let (old, new) = (cpu.reg::<W>(op.dst), cpu.reg::<W>(op.src));
    if compare(cpu, old) {
        cpu.set_reg(op.dst, new);
    } else {
        cpu.set_reg(AX, old);
    }
    Ok(())
}

fn cmpxchg_memory<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let (wanted, new) = (cpu.reg::<W>(AX), cpu.reg::<W>(op.dst));
    let mut old = W::default();
    // The operand is written in any case: what is not equal, as it was.
    cpu.modify_operand(op, |value: W| {
        old = value;
        if value == wanted { new } else { value }
    })?;
    if !compare(cpu, old) {
        cpu.set_reg(AX, old);
    }
    Ok(())
}

fn set_zf(cpu: &mut Cpu, zf: bool) {
    let others = cpu.flags.bits() & !ZF;
    cpu.flags.set_bits(others | if zf { ZF } else { 0 });
}

fn cmpxchg8b(cpu: &mut Cpu, op: &Op) -> Flow {
    let pair = |cpu: &Cpu, high, low| cpu.reg::<u32>(high).zext() << 32 | cpu.reg::<u32>(low).zext();
    let (wanted, new) = (pair(cpu, DX, AX), pair(cpu, CX, BX));
    let mut old = 0;
    cpu.modify_operand(op, |value: u64| {
        old = value;
        if value == wanted { new } else { value }
    })?;
    set_zf(cpu, old == wanted);
    if old != wanted {
        cpu.set_reg(AX, u32::cut(old));
        cpu.set_reg(DX, u32::cut(old >> 32));
    }
    Ok(())
}

fn cmpxchg16b(cpu: &mut Cpu, op: &Op) -> Flow {
    let pair = |cpu: &Cpu, high, low| [cpu.reg::<u64>(low), cpu.reg::<u64>(high)];
    let (wanted, new) = (pair(cpu, DX, AX), pair(cpu, CX, BX));
    let at = cpu.address(op, 16, true)?;
    if at & 15 != 0 {
        return Err(cpu.gp(0));
    }
    let old = cpu.exchange_pair(at, wanted, new)?;
    set_zf(cpu, old == wanted);
    if old != wanted {
        cpu.set_reg(AX, old[0]);
        cpu.set_reg(DX, old[1]);
    }
    Ok(())
}

pub(super) fn select(i: &Instruction) -> Option<Selected> {
    // Of XCHG either operand may be the one in memory, for the decoder.
    let memory = in_memory(i, 0) || i.op_count() > 1 && in_memory(i, 1);
    let size = size_of_operand(i, 0);
    let handler: Handler = match (i.mnemonic(), memory) {
        (Mnemonic::Xchg, false) => of_size!(size, xchg_register),
        (Mnemonic::Xchg, true) => of_size!(size, xchg_memory),
        (Mnemonic::Xadd, false) => of_size!(size, xadd_register),
        (Mnemonic::Xadd, true) => of_size!(size, xadd_memory),
        (Mnemonic::Cmpxchg, false) => of_size!(size, cmpxchg_register),
        (Mnemonic::Cmpxchg, true) => of_size!(size, cmpxchg_memory),
        (Mnemonic::Cmpxchg8b, _) => cmpxchg8b,
        (Mnemonic::Cmpxchg16b, _) => cmpxchg16b,
        _ => return None,
    };
    Some(Selected::plain(handler))
}
