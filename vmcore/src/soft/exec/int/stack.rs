//! PUSH, POP, PUSHA, POPA, ENTER, LEAVE.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::address;
use super::{BP, SP, in_memory, of_size, size_of_operand};
use crate::soft::cpu::Cpu;
use crate::soft::cpu::op::{Flow, Handler, Op, Selected};
use crate::soft::cpu::word::Word;

/// Pushes in 64-bit code, where it can be done at once. Returns whether it was.
#[inline(always)]
fn push_fast(cpu: &mut Cpu, value: u64) -> bool {
    let sp = cpu.r64(SP.into()).wrapping_sub(8);
    let done = cpu.store_fast(sp, value);
    if done {
        cpu.set_r64(SP.into(), sp);
    }
    done
}

fn push_register_fast(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = cpu.reg::<u64>(op.dst);
    if push_fast(cpu, value) { cpu.go_on(op) } else { push_register::<u64>(cpu, op) }
}

fn push_immediate_fast(cpu: &mut Cpu, op: &Op) -> Flow {
    if push_fast(cpu, op.imm) { cpu.go_on(op) } else { push_immediate::<u64>(cpu, op) }
}

fn pop_register_fast(cpu: &mut Cpu, op: &Op) -> Flow {
    let sp = cpu.r64(SP.into());
    let Some(value) = cpu.load_fast::<u64>(sp) else { return pop_register::<u64>(cpu, op) };
    cpu.set_r64(SP.into(), sp.wrapping_add(8));
    cpu.set_reg(op.dst, value);
    cpu.go_on(op)
}

fn leave_fast(cpu: &mut Cpu, op: &Op) -> Flow {
    let base = cpu.r64(BP.into());
    let Some(outer) = cpu.load_fast::<u64>(base) else { return leave::<u64>(cpu, op) };
    cpu.set_r64(SP.into(), base.wrapping_add(8));
    cpu.set_r64(BP.into(), outer);
    cpu.go_on(op)
}

#[inline(never)]
fn push_register<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = cpu.reg::<W>(op.dst);
    cpu.push(value)
}

#[inline(never)]
fn push_immediate<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.push(W::cut(op.imm))
}

fn push_memory<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = cpu.load_operand::<W>(op)?;
    cpu.push(value)
}

#[inline(never)]
fn pop_register<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = cpu.pop::<W>()?;
    cpu.set_reg(op.dst, value);
    Ok(())
}

/// An address with RSP as base is computed with RSP as it is after the pop.
fn pop_memory<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let before = cpu.r64(SP.into());
    let value = cpu.pop::<W>()?;
    let stored = cpu.store_operand(op, value);
    if stored.is_err() {
        cpu.set_r64(SP.into(), before);
    }
    stored
}

/// PUSHA: all eight registers, SP as it was.
fn push_all<W: Word>(cpu: &mut Cpu, _: &Op) -> Flow {
    let top = cpu.r64(SP.into());
    let place = |n: u64| top.wrapping_sub((n + 1) * W::SIZE);
    for n in 0..8 {
        let at = cpu.stack_address(place(n), W::SIZE, true)?;
        cpu.check_write(at, W::SIZE)?;
    }
    for n in 0..8u8 {
        let value = cpu.reg::<W>(n);
        let at = cpu.stack_address(place(n.into()), W::SIZE, true)?;
        cpu.store(at, value)?;
    }
    cpu.set_stack_pointer(place(7));
    Ok(())
}

/// POPA: all but SP, whose place is passed over.
fn pop_all<W: Word>(cpu: &mut Cpu, _: &Op) -> Flow {
    let mut values = [W::default(); 8];
    for (n, value) in (0..8).zip(&mut values) {
        *value = cpu.peek::<W>(n * W::SIZE)?;
    }
    for (n, value) in (0..8u8).zip(values) {
        if 7 - n != SP {
            cpu.set_reg(7 - n, value);
        }
    }
    let top = cpu.r64(SP.into()).wrapping_add(8 * W::SIZE);
    cpu.set_stack_pointer(top);
    Ok(())
}

/// ENTER (SDM vol. 2A): a frame of `imm` bytes at nesting level `extra`.
fn enter<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let level = op.extra & 31;
    let (top, base) = (cpu.r64(SP.into()), cpu.r64(BP.into()));
    let result = enter_frame::<W>(cpu, op.imm & 0xffff, level, base);
    if result.is_err() {
        cpu.set_r64(SP.into(), top);
    }
    result
}

fn enter_frame<W: Word>(cpu: &mut Cpu, bytes: u64, level: u32, base: u64) -> Flow {
    cpu.push(W::cut(base))?;
    let frame = cpu.r64(SP.into());
    let mut outer = base;
    for _ in 1..level {
        outer = outer.wrapping_sub(W::SIZE);
        let at = cpu.stack_address(outer, W::SIZE, false)?;
        let pointer = cpu.load::<W>(at)?;
        cpu.push(pointer)?;
    }
    if level > 0 {
        cpu.push(W::cut(frame))?;
    }
    let top = cpu.r64(SP.into()).wrapping_sub(bytes);
    // The place where the stack will end must be writable.
    let at = cpu.stack_address(top, W::SIZE, true)?;
    cpu.check_write(at, W::SIZE)?;
    cpu.set_stack_pointer(top);
    // With a 16-bit stack only BP changes, whatever the operand size.
    if cpu.stack_mask() == 0xffff {
        cpu.set_reg(BP, u16::cut(frame));
    } else {
        cpu.set_reg(BP, W::cut(frame));
    }
    Ok(())
}

#[inline(never)]
fn leave<W: Word>(cpu: &mut Cpu, _: &Op) -> Flow {
    let base = cpu.r64(BP.into());
    let at = cpu.stack_address(base, W::SIZE, false)?;
    let outer = cpu.load::<W>(at)?;
    cpu.set_stack_pointer(base.wrapping_add(W::SIZE));
    cpu.set_reg(BP, outer);
    Ok(())
}

fn push(i: &Instruction) -> Option<Handler> {
    let fast = address::long(i) && i.stack_pointer_increment() == -8;
    Some(match i.op0_kind() {
        OpKind::Register if !i.op0_register().is_gpr() => return None,
        OpKind::Register if fast => push_register_fast,
        OpKind::Register => of_size!(size_of_operand(i, 0), push_register),
        OpKind::Memory => of_size!(size_of_operand(i, 0), push_memory),
        _ if fast => push_immediate_fast,
        _ => of_size!(-i.stack_pointer_increment(), push_immediate),
    })
}

fn pop(i: &Instruction) -> Option<Handler> {
    if in_memory(i, 0) {
        return Some(of_size!(size_of_operand(i, 0), pop_memory));
    }
    if address::long(i) && i.op0_register().is_gpr64() {
        return Some(pop_register_fast);
    }
    i.op0_register().is_gpr().then(|| of_size!(size_of_operand(i, 0), pop_register))
}

pub(super) fn select(i: &Instruction) -> Option<Selected> {
    let handler: Handler = match (i.mnemonic(), i.code()) {
        (Mnemonic::Push, _) => push(i)?,
        (Mnemonic::Pop, _) => pop(i)?,
        (_, Code::Pushaw) => push_all::<u16>,
        (_, Code::Pushad) => push_all::<u32>,
        (_, Code::Popaw) => pop_all::<u16>,
        (_, Code::Popad) => pop_all::<u32>,
        (_, Code::Enterw_imm16_imm8) => enter::<u16>,
        (_, Code::Enterd_imm16_imm8) => enter::<u32>,
        (_, Code::Enterq_imm16_imm8) => enter::<u64>,
        (_, Code::Leavew) => leave::<u16>,
        (_, Code::Leaved) => leave::<u32>,
        (_, Code::Leaveq) => leave_fast,
        _ => return None,
    };
    Some(Selected::plain(handler))
}
