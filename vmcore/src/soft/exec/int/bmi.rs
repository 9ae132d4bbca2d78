//! BMI1, BMI2 and ADX.

use iced_x86::{Instruction, Mnemonic, Register};

use super::{DX, in_memory, size_of_operand};
use crate::soft::cpu::Cpu;
use crate::soft::cpu::flags::SF;
use crate::soft::cpu::op::{Flow, Handler, Op, Selected, Stop};
use crate::soft::cpu::word::Word;

/// An operation of a register or memory operand and a register, with a register for its result.
trait Operation {
    /// `a` is the operand that may be in memory.
    fn result<W: Word>(cpu: &mut Cpu, a: W, b: W) -> W;
}

macro_rules! operation {
    ($($name:ident, |$cpu:ident, $a:ident, $b:ident, $word:ident| $result:expr;)*) => { $(
        struct $name;
        impl Operation for $name {
            #[inline(always)]
            fn result<$word: Word>($cpu: &mut Cpu, $a: $word, $b: $word) -> $word {
                $result
            }
        }
    )* };
}

/// The low `n` bits set.
#[inline(always)]
fn ones(n: u64) -> u64 {
    if n >= 64 { u64::MAX } else { (1 << n) - 1 }
}

#[inline(always)]
fn places<W: Word>(b: W) -> u64 {
    b.zext() & u64::from(W::BITS - 1)
}

/// SF and ZF of `result`, CF as told, the rest clear. PF and AF are undefined.
#[inline(always)]
fn set_flags<W: Word>(cpu: &mut Cpu, result: W, cf: bool) {
    cpu.flags.set_with(result, cf, false, false);
}

operation! {
    Andn, |cpu, a, b, W| {
        let result = W::cut(a.zext() & !b.zext());
        cpu.flags.set_logic(result);
        result
    };
    Bextr, |cpu, a, b, W| {
        let [start, length, ..] = b.zext().to_le_bytes();
        let result = W::cut(a.zext().unbounded_shr(start.into()) & ones(length.into()));
        // SF and AF are undefined.
        cpu.flags.set_with(result, false, false, true);
        let flags = cpu.flags.bits() & !SF;
        cpu.flags.set_bits(flags);
        result
    };
    Blsi, |cpu, a, _b, W| {
        let result = W::cut(a.zext() & a.zext().wrapping_neg());
        set_flags(cpu, result, a.zext() != 0);
        result
    };
    Blsmsk, |cpu, a, _b, W| {
        let result = W::cut(a.zext() ^ a.zext().wrapping_sub(1));
        set_flags(cpu, result, a.zext() == 0);
        result
    };
    Blsr, |cpu, a, _b, W| {
        let result = W::cut(a.zext() & a.zext().wrapping_sub(1));
        set_flags(cpu, result, a.zext() == 0);
        result
    };
    Bzhi, |cpu, a, b, W| {
        let from = b.zext() & 0xff;
        let result = W::cut(a.zext() & ones(from));
        set_flags(cpu, result, from >= W::BITS.into());
        result
    };
    Pdep, |_cpu, a, b, W| {
        let (mut mask, mut result) = (a.zext(), 0);
        let mut source = b.zext();
        while mask != 0 {
            let lowest = mask & mask.wrapping_neg();
            if source & 1 != 0 {
                result |= lowest;
            }
            source >>= 1;
            mask ^= lowest;
        }
        W::cut(result)
    };
    Pext, |_cpu, a, b, W| {
        let (mut mask, mut result) = (a.zext(), 0);
        let mut bit = 1;
        while mask != 0 {
            let lowest = mask & mask.wrapping_neg();
            if b.zext() & lowest != 0 {
                result |= bit;
            }
            bit <<= 1;
            mask ^= lowest;
        }
        W::cut(result)
    };
    Shlx, |_cpu, a, b, W| W::cut(a.zext() << places(b));
    Shrx, |_cpu, a, b, W| W::cut(a.zext() >> places(b));
    Sarx, |_cpu, a, b, W| W::cut((a.sext().cast_signed() >> places(b)).cast_unsigned());
    Rorx, |_cpu, a, b, W| {
        let n = places(b);
        let left = (u64::from(W::BITS) - n) & u64::from(W::BITS - 1);
        W::cut(a.zext() >> n | a.zext() << left)
    };
    Adcx, |cpu, a, b, W| {
        let (result, carry) = sum(a, b, cpu.flags.cf());
        cpu.flags.set_cf(carry);
        result
    };
    Adox, |cpu, a, b, W| {
        let (result, carry) = sum(a, b, cpu.flags.of());
        let cf = cpu.flags.cf();
        cpu.flags.set_cf_of(cf, carry);
        result
    };
}

#[inline(always)]
fn sum<W: Word>(a: W, b: W, carry: bool) -> (W, bool) {
    let all = u128::from(a.zext()) + u128::from(b.zext()) + u128::from(carry);
    let result = W::cut(a.zext().wrapping_add(b.zext()).wrapping_add(carry.into()));
    (result, all >> W::BITS != 0)
}

/// Where the two operands are. [`Op::extra`] is the number of the register that is `b`, or of the
/// last register operand; see `form`.
fn register<O: Operation, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let [a, b, ..] = op.extra.to_le_bytes();
    let (a, b) = (cpu.reg(a), cpu.reg(b));
    let result = O::result::<W>(cpu, a, b);
    cpu.set_reg(op.dst, result);
    Ok(())
}

fn memory<O: Operation, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let [_, b, ..] = op.extra.to_le_bytes();
    let a: Result<W, Stop> = cpu.load_operand(op);
    let (a, b) = (a?, cpu.reg(b));
    let result = O::result::<W>(cpu, a, b);
    cpu.set_reg(op.dst, result);
    Ok(())
}

fn register_immediate<O: Operation, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let a = cpu.reg(op.src);
    let result = O::result::<W>(cpu, a, W::cut(op.imm));
    cpu.set_reg(op.dst, result);
    Ok(())
}

fn memory_immediate<O: Operation, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let a: Result<W, Stop> = cpu.load_operand(op);
    let result = O::result::<W>(cpu, a?, W::cut(op.imm));
    cpu.set_reg(op.dst, result);
    Ok(())
}

/// MULX: the product of RDX and `a`, high half to the first operand, low half to the second, and if
/// they are the same, the high half stays.
#[inline(always)]
fn multiply<W: Word>(cpu: &mut Cpu, op: &Op, a: W) {
    let all = u128::from(a.zext()) * u128::from(cpu.reg::<W>(DX).zext());
    let [_, low, ..] = op.extra.to_le_bytes();
    cpu.set_reg(low, W::cut(half(all)));
    cpu.set_reg(op.dst, W::cut(half(all >> W::BITS)));
}

#[expect(clippy::cast_possible_truncation, reason = "the low half is what is asked for")]
fn half(value: u128) -> u64 {
    value as u64
}

fn mulx_register<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let [a, ..] = op.extra.to_le_bytes();
    let a = cpu.reg::<W>(a);
    multiply(cpu, op, a);
    Ok(())
}

fn mulx_memory<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let a = cpu.load_operand::<W>(op)?;
    multiply(cpu, op, a);
    Ok(())
}

fn number(register: Register) -> u32 {
    u32::try_from(register.full_register().number()).unwrap_or(0)
}

/// The instance of `$handler` for 32- or 64-bit operands.
macro_rules! of_long {
    ($i:expr, $handler:ident $(, $kind:ty)*) => {
        if size_of_operand($i, 0) == 4 { $handler::<$($kind,)* u32> as Handler } else { $handler::<$($kind,)* u64> }
    };
}

/// An operation whose operand `a` is number `a` of the instruction's, and `b` number `b`.
fn form<O: Operation>(i: &Instruction, a: u32, b: u32) -> Selected {
    let extra = number(i.op_register(b)) << 8;
    if in_memory(i, a) {
        return Selected::plain(of_long!(i, memory, O)).with(extra);
    }
    Selected::plain(of_long!(i, register, O)).with(extra | number(i.op_register(a)))
}

pub(super) fn select(i: &Instruction) -> Option<Selected> {
    Some(match i.mnemonic() {
        Mnemonic::Andn => form::<Andn>(i, 2, 1),
        Mnemonic::Bextr => form::<Bextr>(i, 1, 2),
        Mnemonic::Blsi => form::<Blsi>(i, 1, 0),
        Mnemonic::Blsmsk => form::<Blsmsk>(i, 1, 0),
        Mnemonic::Blsr => form::<Blsr>(i, 1, 0),
        Mnemonic::Bzhi => form::<Bzhi>(i, 1, 2),
        Mnemonic::Pdep => form::<Pdep>(i, 2, 1),
        Mnemonic::Pext => form::<Pext>(i, 2, 1),
        Mnemonic::Shlx => form::<Shlx>(i, 1, 2),
        Mnemonic::Shrx => form::<Shrx>(i, 1, 2),
        Mnemonic::Sarx => form::<Sarx>(i, 1, 2),
        Mnemonic::Adcx => form::<Adcx>(i, 1, 0),
        Mnemonic::Adox => form::<Adox>(i, 1, 0),
        Mnemonic::Rorx if in_memory(i, 1) => Selected::plain(of_long!(i, memory_immediate, Rorx)),
        Mnemonic::Rorx => Selected::plain(of_long!(i, register_immediate, Rorx)),
        Mnemonic::Mulx if in_memory(i, 2) => {
            Selected::plain(of_long!(i, mulx_memory)).with(number(i.op1_register()) << 8)
        }
        Mnemonic::Mulx => Selected::plain(of_long!(i, mulx_register))
            .with(number(i.op1_register()) << 8 | number(i.op2_register())),
        _ => return None,
    })
}
