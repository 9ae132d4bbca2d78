//! SHLD and SHRD.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::{CX, in_memory, of_size, size_of_operand};
use crate::soft::cpu::Cpu;
use crate::soft::cpu::op::{Flow, Handler, Op, Selected};
use crate::soft::cpu::word::Word;

/// Which way the bits go. Counts are below 32, of 64-bit operands below 64.
trait Direction {
    /// `a` moved by `count`, filled up from `b`.
    fn result<W: Word>(a: W, b: W, count: u32) -> W;
    /// CF, the last bit moved out, and OF, which is undefined but for one place, and then says whether
    /// the sign changed.
    fn flags<W: Word>(a: W, b: W, count: u32, result: W) -> (bool, bool);
}

/// What a count beyond a 16-bit operand does is undefined; AMD's processors go on with the second
/// operand again, and clear CF.
struct Left;
impl Direction for Left {
    #[inline(always)]
    fn result<W: Word>(a: W, b: W, count: u32) -> W {
        let (a, b) = (a.zext(), b.zext());
        match W::BITS {
            16 => W::cut((a << 32 | b << 16 | b) << count >> 32),
            32 => W::cut((a << 32 | b) << count >> 32),
            _ => W::cut(a << count | b.unbounded_shr(64 - count)),
        }
    }
    #[inline(always)]
    fn flags<W: Word>(a: W, b: W, count: u32, result: W) -> (bool, bool) {
        let out = count <= W::BITS && sign(Self::result(a, b, count - 1));
        (out, count <= W::BITS && out ^ sign(result))
    }
}

struct Right;
impl Direction for Right {
    #[inline(always)]
    fn result<W: Word>(a: W, b: W, count: u32) -> W {
        let (a, b) = (a.zext(), b.zext());
        match W::BITS {
            16 => W::cut((b << 32 | b << 16 | a) >> count),
            32 => W::cut((b << 32 | a) >> count),
            _ => W::cut(a >> count | b.unbounded_shl(64 - count)),
        }
    }
    #[inline(always)]
    fn flags<W: Word>(a: W, b: W, count: u32, result: W) -> (bool, bool) {
        let before = Self::result(a, b, count - 1);
        (count <= W::BITS && before.zext() & 1 != 0, sign(result) ^ sign(before))
    }
}

#[inline(always)]
fn sign<W: Word>(value: W) -> bool {
    value.zext() >> (W::BITS - 1) & 1 != 0
}

/// Where the count comes from.
trait Count {
    fn count(cpu: &Cpu, op: &Op) -> u64;
}

struct Immediate;
impl Count for Immediate {
    #[inline(always)]
    fn count(_: &Cpu, op: &Op) -> u64 {
        op.imm
    }
}

struct Counter;
impl Count for Counter {
    #[inline(always)]
    fn count(cpu: &Cpu, _: &Op) -> u64 {
        cpu.r64(CX.into())
    }
}

#[inline(always)]
fn masked<C: Count, W: Word>(cpu: &Cpu, op: &Op) -> u32 {
    u32::from(u8::cut(C::count(cpu, op))) & if W::BITS == 64 { 63 } else { 31 }
}

#[inline(always)]
fn flags<D: Direction, W: Word>(cpu: &mut Cpu, a: W, b: W, count: u32, result: W) {
    let (cf, of) = D::flags(a, b, count, result);
    cpu.flags.set_with(result, cf, of, true);
}

fn register<D: Direction, C: Count, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let count = masked::<C, W>(cpu, op);
    let (a, b) = (cpu.reg::<W>(op.dst), cpu.reg::<W>(op.src));
    let result = D::result(a, b, count);
    if count != 0 {
        flags::<D, W>(cpu, a, b, count, result);
    }
    cpu.set_reg(op.dst, result);
    Ok(())
}

fn memory<D: Direction, C: Count, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let count = masked::<C, W>(cpu, op);
    let b = cpu.reg::<W>(op.dst);
    let mut a = W::default();
    cpu.modify_operand(op, |old: W| {
        a = old;
        D::result(old, b, count)
    })?;
    if count != 0 {
        flags::<D, W>(cpu, a, b, count, D::result(a, b, count));
    }
    Ok(())
}

fn of<D: Direction>(i: &Instruction) -> Handler {
    let size = size_of_operand(i, 0);
    match (in_memory(i, 0), i.op2_kind()) {
        (false, OpKind::Register) => of_size!(size, register, D, Counter),
        (false, _) => of_size!(size, register, D, Immediate),
        (true, OpKind::Register) => of_size!(size, memory, D, Counter),
        (true, _) => of_size!(size, memory, D, Immediate),
    }
}

pub(super) fn select(i: &Instruction) -> Option<Selected> {
    let handler = match i.mnemonic() {
        Mnemonic::Shld => of::<Left>(i),
        Mnemonic::Shrd => of::<Right>(i),
        _ => return None,
    };
    Some(Selected::plain(handler))
}
