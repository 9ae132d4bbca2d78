//! ADD, SUB and their relatives.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::address::{Address, of_shape};
use super::{of_size, size_of_operand};
use crate::soft::cpu::Cpu;
use crate::soft::cpu::flags::Flags;
use crate::soft::cpu::op::{Flow, Handler, Op, Selected};
use crate::soft::cpu::word::Word;

/// An operation of two operands that sets all arithmetic flags.
trait Binary {
    /// The result of `a` and `b`, with CF as it was.
    fn result<W: Word>(a: W, b: W, carry: bool) -> W;
    /// Sets the flags after [`Binary::result`].
    fn flags<W: Word>(flags: &mut Flags, a: W, b: W, result: W);
    /// Whether the result goes to the first operand.
    const STORES: bool = true;
}

macro_rules! binary {
    ($($name:ident, |$a:ident, $b:ident, $carry:pat_param| $result:expr, $flags:ident $(, $stores:literal)?;)*) => { $(
        struct $name;
        impl Binary for $name {
            #[inline(always)]
            fn result<W: Word>(a: W, b: W, $carry: bool) -> W {
                let ($a, $b) = (a.zext(), b.zext());
                W::cut($result)
            }
            #[inline(always)]
            fn flags<W: Word>(flags: &mut Flags, a: W, b: W, result: W) {
                $flags(flags, a, b, result);
            }
            $(const STORES: bool = $stores;)?
        }
    )* };
}

binary! {
    Add, |a, b, _| a.wrapping_add(b), add;
    Adc, |a, b, carry| a.wrapping_add(b).wrapping_add(carry.into()), add;
    Sub, |a, b, _| a.wrapping_sub(b), sub;
    Sbb, |a, b, borrow| a.wrapping_sub(b).wrapping_sub(borrow.into()), sub;
    Cmp, |a, b, _| a.wrapping_sub(b), sub, false;
    And, |a, b, _| a & b, logic;
    Test, |a, b, _| a & b, logic, false;
    Or, |a, b, _| a | b, logic;
    Xor, |a, b, _| a ^ b, logic;
}

#[inline(always)]
fn add<W: Word>(flags: &mut Flags, a: W, b: W, result: W) {
    flags.set_add(a, b, result);
}

#[inline(always)]
fn sub<W: Word>(flags: &mut Flags, a: W, b: W, result: W) {
    flags.set_sub(a, b, result);
}

#[inline(always)]
fn logic<W: Word>(flags: &mut Flags, _: W, _: W, result: W) {
    flags.set_logic(result);
}

#[inline(always)]
fn register<B: Binary, W: Word>(cpu: &mut Cpu, op: &Op, b: W) {
    let a = cpu.reg::<W>(op.dst);
    let result = B::result(a, b, cpu.flags.cf());
    B::flags(&mut cpu.flags, a, b, result);
    if B::STORES {
        cpu.set_reg(op.dst, result);
    }
}

fn register_register<B: Binary, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let b = cpu.reg(op.src);
    register::<B, W>(cpu, op, b);
    cpu.go_on(op)
}

fn register_immediate<B: Binary, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    register::<B, W>(cpu, op, W::cut(op.imm));
    cpu.go_on(op)
}

fn register_memory_fast<A: Address, B: Binary, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let Some(b) = cpu.load_fast(A::linear(cpu, op)) else { return register_memory::<B, W>(cpu, op) };
    register::<B, W>(cpu, op, b);
    cpu.go_on(op)
}

#[inline(never)]
fn register_memory<B: Binary, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let b = cpu.load_operand(op)?;
    register::<B, W>(cpu, op, b);
    Ok(())
}

#[inline(always)]
fn memory<B: Binary, W: Word>(cpu: &mut Cpu, op: &Op, b: W) -> Flow {
    let carry = cpu.flags.cf();
    let mut a = W::default();
    if B::STORES {
        cpu.modify_operand(op, |old: W| {
            a = old;
            B::result(old, b, carry)
        })?;
    } else {
        a = cpu.load_operand(op)?;
    }
    B::flags(&mut cpu.flags, a, b, B::result(a, b, carry));
    Ok(())
}

/// The same where it can be done at once, and is not locked. Returns whether it was.
#[inline(always)]
fn memory_fast<A: Address, B: Binary, W: Word>(cpu: &mut Cpu, op: &Op, b: W) -> bool {
    let at = A::linear(cpu, op);
    let carry = cpu.flags.cf();
    let mut a = W::default();
    if B::STORES {
        let change = |old| {
            a = old;
            B::result(old, b, carry)
        };
        if !cpu.modify_fast(at, change) {
            return false;
        }
    } else {
        let Some(old) = cpu.load_fast(at) else { return false };
        a = old;
    }
    B::flags(&mut cpu.flags, a, b, B::result(a, b, carry));
    true
}

fn memory_register_fast<A: Address, B: Binary, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let b = cpu.reg(op.dst);
    if memory_fast::<A, B, W>(cpu, op, b) { cpu.go_on(op) } else { memory_register::<B, W>(cpu, op) }
}

fn memory_immediate_fast<A: Address, B: Binary, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    if memory_fast::<A, B, W>(cpu, op, W::cut(op.imm)) {
        cpu.go_on(op)
    } else {
        memory_immediate::<B, W>(cpu, op)
    }
}

#[inline(never)]
fn memory_register<B: Binary, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let b = cpu.reg(op.dst);
    memory::<B, W>(cpu, op, b)
}

#[inline(never)]
fn memory_immediate<B: Binary, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    memory::<B, W>(cpu, op, W::cut(op.imm))
}

/// An operation of one operand.
trait Unary {
    fn result<W: Word>(a: W) -> W;
    fn flags<W: Word>(flags: &mut Flags, a: W, result: W);
}

struct Inc;
impl Unary for Inc {
    #[inline(always)]
    fn result<W: Word>(a: W) -> W {
        W::cut(a.zext().wrapping_add(1))
    }
    #[inline(always)]
    fn flags<W: Word>(flags: &mut Flags, _: W, result: W) {
        flags.set_inc(result);
    }
}

struct Dec;
impl Unary for Dec {
    #[inline(always)]
    fn result<W: Word>(a: W) -> W {
        W::cut(a.zext().wrapping_sub(1))
    }
    #[inline(always)]
    fn flags<W: Word>(flags: &mut Flags, _: W, result: W) {
        flags.set_dec(result);
    }
}

struct Neg;
impl Unary for Neg {
    #[inline(always)]
    fn result<W: Word>(a: W) -> W {
        W::cut(a.zext().wrapping_neg())
    }
    #[inline(always)]
    fn flags<W: Word>(flags: &mut Flags, a: W, result: W) {
        flags.set_sub(W::default(), a, result);
    }
}

struct Not;
impl Unary for Not {
    #[inline(always)]
    fn result<W: Word>(a: W) -> W {
        W::cut(!a.zext())
    }
    #[inline(always)]
    fn flags<W: Word>(_: &mut Flags, _: W, _: W) {}
}

fn unary_register<U: Unary, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let a = cpu.reg::<W>(op.dst);
    let result = U::result(a);
    U::flags(&mut cpu.flags, a, result);
    cpu.set_reg(op.dst, result);
    cpu.go_on(op)
}

fn unary_memory_fast<A: Address, U: Unary, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let mut a = W::default();
    let change = |old| {
        a = old;
        U::result(old)
    };
    if !cpu.modify_fast(A::linear(cpu, op), change) {
        return unary_memory::<U, W>(cpu, op);
    }
    U::flags(&mut cpu.flags, a, U::result(a));
    cpu.go_on(op)
}

#[inline(never)]
fn unary_memory<U: Unary, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let mut a = W::default();
    cpu.modify_operand(op, |old: W| {
        a = old;
        U::result(old)
    })?;
    U::flags(&mut cpu.flags, a, U::result(a));
    Ok(())
}

fn binary<B: Binary>(i: &Instruction) -> Handler {
    let size = size_of_operand(i, 0);
    match (i.op0_kind(), i.op1_kind()) {
        (OpKind::Register, OpKind::Register) => of_size!(size, register_register, B),
        (OpKind::Register, OpKind::Memory) => of_shape!(i, size, register_memory_fast, register_memory, B),
        (OpKind::Register, _) => of_size!(size, register_immediate, B),
        (_, OpKind::Register) if i.has_lock_prefix() => of_size!(size, memory_register, B),
        (_, OpKind::Register) => of_shape!(i, size, memory_register_fast, memory_register, B),
        _ if i.has_lock_prefix() => of_size!(size, memory_immediate, B),
        _ => of_shape!(i, size, memory_immediate_fast, memory_immediate, B),
    }
}

fn unary<U: Unary>(i: &Instruction) -> Handler {
    let size = size_of_operand(i, 0);
    match i.op0_kind() {
        OpKind::Register => of_size!(size, unary_register, U),
        _ if i.has_lock_prefix() => of_size!(size, unary_memory, U),
        _ => of_shape!(i, size, unary_memory_fast, unary_memory, U),
    }
}

pub(super) fn select(i: &Instruction) -> Option<Selected> {
    let handler = match i.mnemonic() {
        Mnemonic::Add => binary::<Add>(i),
        Mnemonic::Adc => binary::<Adc>(i),
        Mnemonic::Sub => binary::<Sub>(i),
        Mnemonic::Sbb => binary::<Sbb>(i),
        Mnemonic::Cmp => binary::<Cmp>(i),
        Mnemonic::And => binary::<And>(i),
        Mnemonic::Test => binary::<Test>(i),
        Mnemonic::Or => binary::<Or>(i),
        Mnemonic::Xor => binary::<Xor>(i),
        Mnemonic::Inc => unary::<Inc>(i),
        Mnemonic::Dec => unary::<Dec>(i),
        Mnemonic::Neg => unary::<Neg>(i),
        Mnemonic::Not => unary::<Not>(i),
        _ => return None,
    };
    Some(Selected::plain(handler))
}
