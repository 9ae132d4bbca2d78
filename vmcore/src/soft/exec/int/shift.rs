//! Shifts and rotations of one operand.

use std::marker::PhantomData;

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::{CX, in_memory, of_size, size_of_operand};
use crate::soft::cpu::Cpu;
use crate::soft::cpu::flags::Flags;
use crate::soft::cpu::op::{FlagUse, Flow, Op, Selected};
use crate::soft::cpu::word::Word;

/// A shift or rotation by a count that is not zero and below 32, of 64-bit operands below 64.
///
/// What the manuals leave undefined is as AMD's processors have it: AF is set by shifts, and OF is by
/// the result's two highest bits whatever the count.
trait Shift {
    fn result<W: Word>(a: W, count: u32, carry: bool) -> W;
    fn flags<W: Word>(flags: &mut Flags, a: W, count: u32, result: W);
}

/// `S` without its flags.
struct Quiet<S>(PhantomData<S>);
impl<S: Shift> Shift for Quiet<S> {
    #[inline(always)]
    fn result<W: Word>(a: W, count: u32, carry: bool) -> W {
        S::result(a, count, carry)
    }
    #[inline(always)]
    fn flags<W: Word>(_: &mut Flags, _: W, _: u32, _: W) {}
}

/// Bit `n` of `value`; bits beyond 63 are clear.
#[inline(always)]
fn bit(value: u64, n: u32) -> bool {
    value.unbounded_shr(n) & 1 != 0
}

/// The highest bit of `value`.
#[inline(always)]
fn top<W: Word>(value: W) -> bool {
    bit(value.zext(), W::BITS - 1)
}

/// The second highest bit of `value`.
#[inline(always)]
fn second<W: Word>(value: W) -> bool {
    bit(value.zext(), W::BITS - 2)
}

struct Shl;
impl Shift for Shl {
    #[inline(always)]
    fn result<W: Word>(a: W, count: u32, _: bool) -> W {
        W::cut(a.zext() << (count & 63))
    }
    #[inline(always)]
    fn flags<W: Word>(flags: &mut Flags, a: W, count: u32, result: W) {
        let cf = W::BITS >= count && bit(a.zext(), W::BITS - count);
        flags.set_with(result, cf, cf ^ top(result), true);
    }
}

struct Shr;
impl Shift for Shr {
    #[inline(always)]
    fn result<W: Word>(a: W, count: u32, _: bool) -> W {
        W::cut(a.zext() >> (count & 63))
    }
    #[inline(always)]
    fn flags<W: Word>(flags: &mut Flags, a: W, count: u32, result: W) {
        let cf = bit(a.zext(), count - 1);
        flags.set_with(result, cf, second(result) ^ top(result), true);
    }
}

struct Sar;
impl Shift for Sar {
    #[inline(always)]
    fn result<W: Word>(a: W, count: u32, _: bool) -> W {
        W::cut((a.sext().cast_signed() >> (count & 63)).cast_unsigned())
    }
    #[inline(always)]
    fn flags<W: Word>(flags: &mut Flags, a: W, count: u32, result: W) {
        let cf = bit(a.sext(), count - 1);
        flags.set_with(result, cf, false, true);
    }
}

struct Rol;
impl Shift for Rol {
    #[inline(always)]
    fn result<W: Word>(a: W, count: u32, _: bool) -> W {
        let n = count % W::BITS;
        W::cut(a.zext() << n | a.zext().unbounded_shr(W::BITS - n))
    }
    #[inline(always)]
    fn flags<W: Word>(flags: &mut Flags, _: W, _: u32, result: W) {
        let cf = bit(result.zext(), 0);
        flags.set_cf_of(cf, cf ^ top(result));
    }
}

struct Ror;
impl Shift for Ror {
    #[inline(always)]
    fn result<W: Word>(a: W, count: u32, _: bool) -> W {
        let n = count % W::BITS;
        W::cut(a.zext() >> n | a.zext().unbounded_shl(W::BITS - n))
    }
    #[inline(always)]
    fn flags<W: Word>(flags: &mut Flags, _: W, _: u32, result: W) {
        flags.set_cf_of(top(result), top(result) ^ second(result));
    }
}

/// The places that a rotation through CF moves: it has one bit more than the operand.
#[inline(always)]
fn places<W: Word>(count: u32) -> u32 {
    if W::BITS < 32 { count % (W::BITS + 1) } else { count }
}

struct Rcl;
impl Shift for Rcl {
    #[inline(always)]
    fn result<W: Word>(a: W, count: u32, carry: bool) -> W {
        let n = places::<W>(count);
        if n == 0 {
            return a;
        }
        let (a, carry) = (a.zext(), u64::from(carry));
        W::cut(a.unbounded_shl(n) | carry << (n - 1) | a.unbounded_shr(W::BITS + 1 - n))
    }
    #[inline(always)]
    fn flags<W: Word>(flags: &mut Flags, a: W, count: u32, result: W) {
        let n = places::<W>(count);
        let cf = if n == 0 { flags.cf() } else { bit(a.zext(), W::BITS - n) };
        flags.set_cf_of(cf, cf ^ top(result));
    }
}

struct Rcr;
impl Shift for Rcr {
    #[inline(always)]
    fn result<W: Word>(a: W, count: u32, carry: bool) -> W {
        let n = places::<W>(count);
        if n == 0 {
            return a;
        }
        let (a, carry) = (a.zext(), u64::from(carry));
        W::cut(a.unbounded_shr(n) | carry << (W::BITS - n) | a.unbounded_shl(W::BITS + 1 - n))
    }
    #[inline(always)]
    fn flags<W: Word>(flags: &mut Flags, a: W, count: u32, result: W) {
        let n = places::<W>(count);
        let cf = if n == 0 { flags.cf() } else { bit(a.zext(), n - 1) };
        flags.set_cf_of(cf, top(result) ^ second(result));
    }
}

/// Bits of a count that matter.
#[inline(always)]
fn mask<W: Word>(count: u64) -> u32 {
    u32::from(u8::cut(count)) & if W::BITS == 64 { 63 } else { 31 }
}

#[inline(always)]
fn register<S: Shift, W: Word>(cpu: &mut Cpu, op: &Op, count: u32) -> Flow {
    let a = cpu.reg::<W>(op.dst);
    if count == 0 {
        // A 32-bit register's upper half is cleared all the same.
        cpu.set_reg(op.dst, a);
        return Ok(());
    }
    let result = S::result(a, count, cpu.flags.cf());
    S::flags(&mut cpu.flags, a, count, result);
    cpu.set_reg(op.dst, result);
    Ok(())
}

#[inline(always)]
fn memory<S: Shift, W: Word>(cpu: &mut Cpu, op: &Op, count: u32) -> Flow {
    let carry = cpu.flags.cf();
    let mut a = W::default();
    let result = |a| if count == 0 { a } else { S::result(a, count, carry) };
    cpu.modify_operand(op, |old: W| {
        a = old;
        result(old)
    })?;
    if count != 0 {
        S::flags(&mut cpu.flags, a, count, result(a));
    }
    Ok(())
}

/// By a count that needs no mask and is not zero.
fn register_by<S: Shift, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let count = u32::from(u8::cut(op.imm));
    let a = cpu.reg::<W>(op.dst);
    let result = S::result(a, count, cpu.flags.cf());
    S::flags(&mut cpu.flags, a, count, result);
    cpu.set_reg(op.dst, result);
    cpu.go_on(op)
}

fn register_immediate<S: Shift, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    register::<S, W>(cpu, op, mask::<W>(op.imm))
}

fn register_counter<S: Shift, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let count = mask::<W>(cpu.r64(CX.into()));
    register::<S, W>(cpu, op, count)
}

fn memory_immediate<S: Shift, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    memory::<S, W>(cpu, op, mask::<W>(op.imm))
}

fn memory_counter<S: Shift, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let count = mask::<W>(cpu.r64(CX.into()));
    memory::<S, W>(cpu, op, count)
}

/// `flags` is what it does, by a count that is not zero, with the flags before it.
fn of<S: Shift>(i: &Instruction, flags: FlagUse) -> Selected {
    let size = size_of_operand(i, 0);
    Selected::plain(match (in_memory(i, 0), i.op1_kind()) {
        (false, OpKind::Register) => of_size!(size, register_counter, S),
        (false, _) if (1..8 * size as u64).contains(&i.immediate(1)) => {
            return Selected::flagged(of_size!(size, register_by, S), flags).or_quiet(of_size!(
                size,
                register_by,
                Quiet<S>
            ));
        }
        (false, _) => of_size!(size, register_immediate, S),
        (true, OpKind::Register) => of_size!(size, memory_counter, S),
        (true, _) => of_size!(size, memory_immediate, S),
    })
}

pub(super) fn select(i: &Instruction) -> Option<Selected> {
    Some(match i.mnemonic() {
        Mnemonic::Shl | Mnemonic::Sal => of::<Shl>(i, FlagUse::Replaces),
        Mnemonic::Shr => of::<Shr>(i, FlagUse::Replaces),
        Mnemonic::Sar => of::<Sar>(i, FlagUse::Replaces),
        // Rotations leave all but CF and OF.
        Mnemonic::Rol => of::<Rol>(i, FlagUse::Ignores),
        Mnemonic::Ror => of::<Ror>(i, FlagUse::Ignores),
        Mnemonic::Rcl => of::<Rcl>(i, FlagUse::Sees),
        Mnemonic::Rcr => of::<Rcr>(i, FlagUse::Sees),
        _ => return None,
    })
}
