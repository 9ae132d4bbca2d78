//! MUL, IMUL, DIV, IDIV.

use iced_x86::{Instruction, Mnemonic};

use super::{AH, AX, DX, in_memory, of_size, size_of_operand};
use crate::soft::cpu::flags::{AF, CF, OF};
use crate::soft::cpu::op::{FlagUse, Flow, Handler, Op, Selected, Stop};
use crate::soft::cpu::word::Word;
use crate::soft::cpu::{Cpu, vector};

/// Where the operand of a one-operand form is.
trait Source {
    fn get<W: Word>(cpu: &mut Cpu, op: &Op) -> Result<W, Stop>;
}

struct Register;
impl Source for Register {
    #[inline(always)]
    fn get<W: Word>(cpu: &mut Cpu, op: &Op) -> Result<W, Stop> {
        Ok(cpu.reg(op.dst))
    }
}

struct Memory;
impl Source for Memory {
    #[inline(always)]
    fn get<W: Word>(cpu: &mut Cpu, op: &Op) -> Result<W, Stop> {
        cpu.load_operand(op)
    }
}

/// Low and high half of the product of two words.
#[inline(always)]
fn product<W: Word>(a: W, b: W) -> (W, W) {
    if W::BITS == 64 {
        let (low, high) = halves(u128::from(a.zext()) * u128::from(b.zext()));
        (W::cut(low), W::cut(high))
    } else {
        let all = a.zext() * b.zext();
        (W::cut(all), W::cut(all >> (W::BITS & 63)))
    }
}

/// The same of signed words.
#[inline(always)]
fn signed_product<W: Word>(a: W, b: W) -> (W, W) {
    let all = i128::from(a.sext().cast_signed()) * i128::from(b.sext().cast_signed());
    let (low, high) = halves(all.cast_unsigned());
    if W::BITS == 64 { (W::cut(low), W::cut(high)) } else { (W::cut(low), W::cut(low >> (W::BITS & 63))) }
}

/// Low and high half.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the halves are what is asked for")]
fn halves(value: u128) -> (u64, u64) {
    (value as u64, (value >> 64) as u64)
}

/// Whether `high` is only the sign of `low`.
#[inline(always)]
fn fits<W: Word>(low: W, high: W) -> bool {
    high.sext() == (low.sext().cast_signed() >> 63).cast_unsigned()
}

/// The upper half of an accumulator: AH for bytes, else DX and its longer forms.
#[inline(always)]
fn upper<W: Word>() -> u8 {
    if W::BITS == 8 { AH } else { DX }
}

fn mul<S: Source, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let b = S::get::<W>(cpu, op)?;
    let (low, high) = product(cpu.reg::<W>(AX), b);
    let over = high.zext() != 0;
    cpu.flags.set_cf_of(over, over);
    cpu.set_reg(AX, low);
    cpu.set_reg(upper::<W>(), high);
    Ok(())
}

fn imul<S: Source, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let b = S::get::<W>(cpu, op)?;
    let (low, high) = signed_product(cpu.reg::<W>(AX), b);
    let over = !fits(low, high);
    cpu.flags.set_cf_of(over, over);
    cpu.set_reg(AX, low);
    cpu.set_reg(upper::<W>(), high);
    Ok(())
}

#[inline(always)]
fn multiply<W: Word>(cpu: &mut Cpu, op: &Op, a: W, b: W) {
    let (low, high) = signed_product(a, b);
    let over = !fits(low, high);
    cpu.flags.set_cf_of(over, over);
    cpu.set_reg(op.dst, low);
}

fn imul_register<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let (a, b) = (cpu.reg(op.dst), cpu.reg(op.src));
    multiply::<W>(cpu, op, a, b);
    cpu.go_on(op)
}

/// The same without flags.
fn imul_register_quiet<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let (a, b) = (cpu.reg::<W>(op.dst), cpu.reg::<W>(op.src));
    cpu.set_reg(op.dst, W::cut(a.zext().wrapping_mul(b.zext())));
    cpu.go_on(op)
}

fn imul_memory<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let b = cpu.load_operand(op)?;
    let a = cpu.reg(op.dst);
    multiply::<W>(cpu, op, a, b);
    Ok(())
}

fn imul_register_immediate<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let a = cpu.reg(op.src);
    multiply::<W>(cpu, op, a, W::cut(op.imm));
    cpu.go_on(op)
}

/// The same without flags.
fn imul_register_immediate_quiet<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let a = cpu.reg::<W>(op.src);
    cpu.set_reg(op.dst, W::cut(a.zext().wrapping_mul(op.imm)));
    cpu.go_on(op)
}

fn imul_memory_immediate<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let a = cpu.load_operand(op)?;
    multiply::<W>(cpu, op, a, W::cut(op.imm));
    Ok(())
}

/// Quotient and remainder, where the divisor is not zero and the quotient fits.
#[inline(always)]
fn divide<W: Word>(low: W, high: W, by: W) -> Option<(W, W)> {
    let by = by.zext();
    if by <= high.zext() {
        // The quotient would be at least 2^BITS, or the divisor is zero.
        return None;
    }
    if W::BITS < 64 || high.zext() == 0 {
        let all = high.zext() << (W::BITS & 63) | low.zext();
        return Some((W::cut(all / by), W::cut(all % by)));
    }
    let all = u128::from(high.zext()) << 64 | u128::from(low.zext());
    let by = u128::from(by);
    Some((W::cut(halves(all / by).0), W::cut(halves(all % by).0)))
}

/// The same of signed words. Negative quotients go down to -2^(BITS - 1).
#[inline(always)]
fn signed_divide<W: Word>(low: W, high: W, by: W) -> Option<(W, W)> {
    if W::BITS < 64 {
        let all = (high.sext() << (W::BITS & 63) | low.zext()).cast_signed();
        let by = by.sext().cast_signed();
        let quotient = all.checked_div(by)?.cast_unsigned();
        let rest = all.checked_rem(by)?.cast_unsigned();
        return (W::cut(quotient).sext() == quotient).then_some((W::cut(quotient), W::cut(rest)));
    }
    let divisor = by.sext().cast_signed();
    if fits(low, high) {
        // What `checked_div` refuses, -2^63 by -1 and zero, is what does not fit.
        let all = low.zext().cast_signed();
        let quotient = all.checked_div(divisor)?.cast_unsigned();
        let rest = all.checked_rem(divisor)?.cast_unsigned();
        return Some((W::cut(quotient), W::cut(rest)));
    }
    let all = (u128::from(high.zext()) << 64 | u128::from(low.zext())).cast_signed();
    let quotient = i64::try_from(all.checked_div(divisor.into())?).ok()?.cast_unsigned();
    let rest = halves(all.checked_rem(divisor.into())?.cast_unsigned()).0;
    Some((W::cut(quotient), W::cut(rest)))
}

/// Divides the double accumulator.
#[inline(always)]
fn division<W: Word>(cpu: &mut Cpu, by: W, divide: impl FnOnce(W, W, W) -> Option<(W, W)>) -> Flow {
    let (low, high) = (cpu.reg::<W>(AX), cpu.reg::<W>(upper::<W>()));
    let Some((quotient, rest)) = divide(low, high, by) else { return Err(cpu.raise(vector::DE, None)) };
    // The flags are undefined: AMD's processors keep CF and OF.
    let kept = cpu.flags.bits() & (CF | OF);
    cpu.flags.set_bits(kept | AF);
    cpu.set_reg(AX, quotient);
    cpu.set_reg(upper::<W>(), rest);
    Ok(())
}

fn div<S: Source, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let by = S::get::<W>(cpu, op)?;
    division(cpu, by, divide)
}

fn idiv<S: Source, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let by = S::get::<W>(cpu, op)?;
    division(cpu, by, signed_divide)
}

pub(super) fn select(i: &Instruction) -> Option<Selected> {
    let size = size_of_operand(i, 0);
    let handler: Handler = match (i.mnemonic(), i.op_count(), in_memory(i, 0), in_memory(i, 1)) {
        (Mnemonic::Mul, _, false, _) => of_size!(size, mul, Register),
        (Mnemonic::Mul, ..) => of_size!(size, mul, Memory),
        (Mnemonic::Imul, 1, false, _) => of_size!(size, imul, Register),
        (Mnemonic::Imul, 1, ..) => of_size!(size, imul, Memory),
        // Only CF and OF are set.
        (Mnemonic::Imul, 2, _, false) => {
            let plain = Selected::flagged(of_size!(size, imul_register), FlagUse::Ignores);
            return Some(plain.or_quiet(of_size!(size, imul_register_quiet)));
        }
        (Mnemonic::Imul, 2, ..) => of_size!(size, imul_memory),
        (Mnemonic::Imul, _, _, false) => {
            let plain = Selected::flagged(of_size!(size, imul_register_immediate), FlagUse::Ignores);
            return Some(plain.or_quiet(of_size!(size, imul_register_immediate_quiet)));
        }
        (Mnemonic::Imul, ..) => of_size!(size, imul_memory_immediate),
        (Mnemonic::Div, _, false, _) => of_size!(size, div, Register),
        (Mnemonic::Div, ..) => of_size!(size, div, Memory),
        (Mnemonic::Idiv, _, false, _) => of_size!(size, idiv, Register),
        (Mnemonic::Idiv, ..) => of_size!(size, idiv, Memory),
        _ => return None,
    };
    Some(Selected::plain(handler))
}
