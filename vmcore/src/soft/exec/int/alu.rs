//! ADD, SUB and their relatives.

use std::marker::PhantomData;

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::address::{Address, Base, Full, Shape, of_shape, shape};
use super::branch::branch_behind;
use super::condition::{Condition, on_condition};
use super::{of_size, size_of_operand};
use crate::soft::cpu::Cpu;
use crate::soft::cpu::flags::Flags;
use crate::soft::cpu::op::{FlagUse, Flow, Op, Selected, WithBranch};
use crate::soft::cpu::word::Word;

/// An operation of two operands that sets all arithmetic flags.
trait Binary {
    /// The result of `a` and `b`, with CF as it was.
    fn result<W: Word>(a: W, b: W, carry: bool) -> W;
    /// Sets the flags after [`Binary::result`].
    fn flags<W: Word>(flags: &mut Flags, a: W, b: W, result: W);
    /// Whether condition `C` holds after it; `flags` are set.
    #[inline(always)]
    fn holds<C: Condition, W: Word>(flags: &Flags, _a: W, _b: W, _result: W) -> bool {
        C::holds(flags)
    }
    /// Whether the result goes to the first operand.
    const STORES: bool = true;
}

/// `B` without its flags.
struct Quiet<B>(PhantomData<B>);
impl<B: Binary> Binary for Quiet<B> {
    #[inline(always)]
    fn result<W: Word>(a: W, b: W, carry: bool) -> W {
        B::result(a, b, carry)
    }
    #[inline(always)]
    fn flags<W: Word>(_: &mut Flags, _: W, _: W, _: W) {}
    const STORES: bool = B::STORES;
}

macro_rules! binary {
    ($($name:ident, |$a:ident, $b:ident, $carry:pat_param| $result:expr, $flags:ident $(, $stores:literal, $holds:ident)?;)*) => { $(
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
            $(const STORES: bool = $stores;
            #[inline(always)]
            fn holds<C: Condition, W: Word>(flags: &Flags, a: W, b: W, result: W) -> bool {
                $holds::<C, W>(flags, a, b, result)
            }
            )?
        }
    )* };
}

binary! {
    Add, |a, b, _| a.wrapping_add(b), add;
    Adc, |a, b, carry| a.wrapping_add(b).wrapping_add(carry.into()), add;
    Sub, |a, b, _| a.wrapping_sub(b), sub;
    Sbb, |a, b, borrow| a.wrapping_sub(b).wrapping_sub(borrow.into()), sub;
    Cmp, |a, b, _| a.wrapping_sub(b), sub, false, compared;
    And, |a, b, _| a & b, logic;
    Test, |a, b, _| a & b, logic, false, tested;
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

/// Whether a condition holds after a comparison, without the detour over the flags where there is a way.
#[inline(always)]
fn compared<C: Condition, W: Word>(flags: &Flags, a: W, b: W, _: W) -> bool {
    let (signed_a, signed_b) = (a.sext().cast_signed(), b.sext().cast_signed());
    let positive = match C::CODE >> 1 {
        1 => a.zext() < b.zext(),
        2 => a == b,
        3 => a.zext() <= b.zext(),
        6 => signed_a < signed_b,
        7 => signed_a <= signed_b,
        _ => return C::holds(flags),
    };
    positive ^ (C::CODE & 1 != 0)
}

/// The same after a test, which clears CF and OF.
#[inline(always)]
fn tested<C: Condition, W: Word>(flags: &Flags, _: W, _: W, result: W) -> bool {
    let signed = result.sext().cast_signed();
    let positive = match C::CODE >> 1 {
        0 | 1 => false,
        2 | 3 => signed == 0,
        4 | 6 => signed < 0,
        7 => signed <= 0,
        _ => return C::holds(flags),
    };
    positive ^ (C::CODE & 1 != 0)
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

/// A comparison and the branch behind it.
#[inline(always)]
fn then_branch<B: Binary, C: Condition, W: Word>(cpu: &mut Cpu, op: &Op, a: W, b: W) -> Flow {
    let result = B::result(a, b, false);
    B::flags(&mut cpu.flags, a, b, result);
    let taken = B::holds::<C, W>(&cpu.flags, a, b, result);
    branch_behind(cpu, op, taken)
}

fn register_register_branch<B: Binary, W: Word, C: Condition>(cpu: &mut Cpu, op: &Op) -> Flow {
    let (a, b) = (cpu.reg::<W>(op.dst), cpu.reg::<W>(op.src));
    then_branch::<B, C, W>(cpu, op, a, b)
}

fn register_immediate_branch<B: Binary, W: Word, C: Condition>(cpu: &mut Cpu, op: &Op) -> Flow {
    let (a, b) = (cpu.reg::<W>(op.dst), W::cut(op.imm));
    then_branch::<B, C, W>(cpu, op, a, b)
}

fn memory_immediate_branch<A: Address, B: Binary, W: Word, C: Condition>(cpu: &mut Cpu, op: &Op) -> Flow {
    match cpu.load_fast(A::linear(cpu, op)) {
        Some(a) => then_branch::<B, C, W>(cpu, op, a, W::cut(op.imm)),
        // The branch is executed by itself.
        None => memory_immediate::<B, W>(cpu, op),
    }
}

/// The instances of a handler for the sixteen conditions, which are its last type parameter.
macro_rules! for_branches {
    ($handler:ident $(, $kind:ty)*) => {
        |condition| on_condition!(condition, $handler $(, $kind)*)
    };
}

/// What executes a comparison of operands of `size` bytes together with the branch behind it.
macro_rules! with_branch {
    ($size:expr, $handler:ident $(, $kind:ty)*) => {
        match $size {
            1 => for_branches!($handler $(, $kind)*, u8) as WithBranch,
            2 => for_branches!($handler $(, $kind)*, u16),
            4 => for_branches!($handler $(, $kind)*, u32),
            _ => for_branches!($handler $(, $kind)*, u64),
        }
    };
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

impl<U: Unary> Unary for Quiet<U> {
    #[inline(always)]
    fn result<W: Word>(a: W) -> W {
        U::result(a)
    }
    #[inline(always)]
    fn flags<W: Word>(_: &mut Flags, _: W, _: W) {}
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

/// `flags` is what the register forms do with the flags before them; the others may fault.
fn binary<B: Binary>(i: &Instruction, flags: FlagUse) -> Selected {
    let size = size_of_operand(i, 0);
    Selected::plain(match (i.op0_kind(), i.op1_kind()) {
        (OpKind::Register, OpKind::Register) => {
            return Selected::flagged(of_size!(size, register_register, B), flags).or_quiet(of_size!(
                size,
                register_register,
                Quiet<B>
            ));
        }
        (OpKind::Register, OpKind::Memory) => of_shape!(i, size, register_memory_fast, register_memory, B),
        (OpKind::Register, _) => {
            return Selected::flagged(of_size!(size, register_immediate, B), flags).or_quiet(of_size!(
                size,
                register_immediate,
                Quiet<B>
            ));
        }
        (_, OpKind::Register) if i.has_lock_prefix() => of_size!(size, memory_register, B),
        (_, OpKind::Register) => of_shape!(i, size, memory_register_fast, memory_register, B),
        _ if i.has_lock_prefix() => of_size!(size, memory_immediate, B),
        _ => of_shape!(i, size, memory_immediate_fast, memory_immediate, B),
    })
}

/// CMP and TEST.
fn comparison<B: Binary>(i: &Instruction) -> Selected {
    let size = size_of_operand(i, 0);
    let with_branch = match (i.op0_kind(), i.op1_kind(), shape(i)) {
        (OpKind::Register, OpKind::Register, _) => with_branch!(size, register_register_branch, B),
        (_, OpKind::Register, _) | (_, OpKind::Memory, _) => return binary::<B>(i, FlagUse::Replaces),
        (OpKind::Register, ..) => with_branch!(size, register_immediate_branch, B),
        (.., Shape::Base) => with_branch!(size, memory_immediate_branch, Base, B),
        (.., Shape::Full) => with_branch!(size, memory_immediate_branch, Full, B),
        (.., Shape::General) => return binary::<B>(i, FlagUse::Replaces),
    };
    Selected { with_branch: Some(with_branch), ..binary::<B>(i, FlagUse::Replaces) }
}

fn unary<U: Unary>(i: &Instruction, flags: FlagUse) -> Selected {
    let size = size_of_operand(i, 0);
    Selected::plain(match i.op0_kind() {
        OpKind::Register => {
            return Selected::flagged(of_size!(size, unary_register, U), flags).or_quiet(of_size!(
                size,
                unary_register,
                Quiet<U>
            ));
        }
        _ if i.has_lock_prefix() => of_size!(size, unary_memory, U),
        _ => of_shape!(i, size, unary_memory_fast, unary_memory, U),
    })
}

pub(super) fn select(i: &Instruction) -> Option<Selected> {
    Some(match i.mnemonic() {
        Mnemonic::Add => binary::<Add>(i, FlagUse::Replaces),
        Mnemonic::Adc => binary::<Adc>(i, FlagUse::Sees),
        Mnemonic::Sub => binary::<Sub>(i, FlagUse::Replaces),
        Mnemonic::Sbb => binary::<Sbb>(i, FlagUse::Sees),
        Mnemonic::Cmp => comparison::<Cmp>(i),
        Mnemonic::And => binary::<And>(i, FlagUse::Replaces),
        Mnemonic::Test => comparison::<Test>(i),
        Mnemonic::Or => binary::<Or>(i, FlagUse::Replaces),
        Mnemonic::Xor => binary::<Xor>(i, FlagUse::Replaces),
        // They leave CF, and NOT leaves all.
        Mnemonic::Inc => unary::<Inc>(i, FlagUse::Ignores),
        Mnemonic::Dec => unary::<Dec>(i, FlagUse::Ignores),
        Mnemonic::Neg => unary::<Neg>(i, FlagUse::Replaces),
        Mnemonic::Not => unary::<Not>(i, FlagUse::Ignores),
        _ => return None,
    })
}
