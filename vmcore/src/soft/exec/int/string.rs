//! MOVS, STOS, LODS, CMPS, SCAS, and their repetition.

use iced_x86::{Instruction, Mnemonic};

use super::{AX, CX, DI, SI, of_size};
use crate::soft::cpu::Cpu;
use crate::soft::cpu::flags::{DF, Flags, TF};
use crate::soft::cpu::op::{Flow, Handler, NO_SEG, Op, REPE, Selected, Stop};
use crate::soft::cpu::word::Word;
use crate::soft::link::attention;

/// The number of ES.
const ES: u8 = 0;

/// What is done at one go, in bytes: some microseconds.
const GO: u64 = 64 << 10;

/// What an element counts for that is not part of a bulk operation, in bytes.
const ELEMENT: u64 = 16;

/// Fewer bytes than this are not worth looking for a bulk operation.
const BULK: u64 = 32;

/// A string instruction.
pub(in crate::soft) trait StringOp {
    /// Whether REPE and REPNE look at ZF.
    const COMPARES: bool = false;

    /// Does the first element, and moves the pointers.
    ///
    /// # Errors
    /// Faults; nothing is changed then.
    fn one<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow;

    /// Does as many of the first `count` elements as there is a fast way for, and moves the pointers.
    /// Returns how many: 0 if there is none.
    ///
    /// # Errors
    /// Faults; nothing is changed then.
    #[inline(always)]
    fn many<W: Word>(_: &mut Cpu, _: &Op, _count: u64) -> Result<u64, Stop> {
        Ok(0)
    }
}

/// Bits of the pointers and the counter that the address size uses.
#[inline(always)]
fn mask(op: &Op) -> u64 {
    u64::MAX >> (op.ashift & 63)
}

/// Pointer or counter `r`.
#[inline(always)]
pub(in crate::soft) fn pointer(cpu: &Cpu, op: &Op, r: u8) -> u64 {
    cpu.r64(r.into()) & mask(op)
}

/// Sets pointer or counter `r`, as a register of the address size is set.
#[inline(always)]
fn set_pointer(cpu: &mut Cpu, op: &Op, r: u8, value: u64) {
    match op.ashift {
        0 => cpu.set_reg(r, value),
        32 => cpu.set_reg(r, u32::cut(value)),
        _ => cpu.set_reg(r, u16::cut(value)),
    }
}

/// Moves pointer `r` by `count` elements, the way that DF says.
#[inline(always)]
pub(in crate::soft) fn advance<W: Word>(cpu: &mut Cpu, op: &Op, r: u8, count: u64) {
    let distance = W::SIZE.wrapping_mul(count);
    let distance = if cpu.flag(DF) { distance.wrapping_neg() } else { distance };
    let value = cpu.r64(r.into()).wrapping_add(distance);
    set_pointer(cpu, op, r, value);
}

/// The destination's segment, which no prefix changes.
#[inline(always)]
pub(in crate::soft) fn destination_segment(op: &Op) -> u8 {
    if op.long() { NO_SEG } else { ES }
}

/// Linear address of the element at the source pointer.
///
/// # Errors
/// By the segment.
#[inline(always)]
pub(in crate::soft) fn source<W: Word>(cpu: &mut Cpu, op: &Op) -> Result<u64, Stop> {
    let offset = pointer(cpu, op, SI);
    cpu.linear(op, op.seg, offset, W::SIZE, false)
}

/// Linear address of the element at the destination pointer.
///
/// # Errors
/// By the segment.
#[inline(always)]
pub(in crate::soft) fn destination<W: Word>(cpu: &mut Cpu, op: &Op, write: bool) -> Result<u64, Stop> {
    let offset = pointer(cpu, op, DI);
    cpu.linear(op, destination_segment(op), offset, W::SIZE, write)
}

/// Linear address of up to `count` elements upwards from the offset in pointer `r`, and how many of
/// them: none that wraps around or exceeds the segment.
fn run<W: Word>(
    cpu: &mut Cpu,
    op: &Op,
    (r, segment): (u8, u8),
    count: u64,
    write: bool,
) -> Option<(u64, u64)> {
    let offset = pointer(cpu, op, r);
    let room = (mask(op) - offset) / W::SIZE;
    // No more than a page is done at a time.
    let count = count.min(room).min(0x1000 / W::SIZE);
    let at = cpu.linear(op, segment, offset, (count * W::SIZE).max(1), write).ok()?;
    (count != 0).then_some((at, count))
}

struct Movs;
impl StringOp for Movs {
    #[inline(always)]
    fn one<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
        let from = source::<W>(cpu, op)?;
        let value = cpu.load::<W>(from)?;
        let to = destination::<W>(cpu, op, true)?;
        cpu.store(to, value)?;
        advance::<W>(cpu, op, SI, 1);
        advance::<W>(cpu, op, DI, 1);
        Ok(())
    }

    fn many<W: Word>(cpu: &mut Cpu, op: &Op, count: u64) -> Result<u64, Stop> {
        let Some((from, count)) = run::<W>(cpu, op, (SI, op.seg), count, false) else { return Ok(0) };
        let Some((to, count)) = run::<W>(cpu, op, (DI, destination_segment(op)), count, true) else {
            return Ok(0);
        };
        let done = cpu.copy_forward::<W>(to, from, count)?;
        advance::<W>(cpu, op, SI, done);
        advance::<W>(cpu, op, DI, done);
        Ok(done)
    }
}

struct Stos;
impl StringOp for Stos {
    #[inline(always)]
    fn one<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
        let value = cpu.reg::<W>(AX);
        let to = destination::<W>(cpu, op, true)?;
        cpu.store(to, value)?;
        advance::<W>(cpu, op, DI, 1);
        Ok(())
    }

    fn many<W: Word>(cpu: &mut Cpu, op: &Op, count: u64) -> Result<u64, Stop> {
        let Some((to, count)) = run::<W>(cpu, op, (DI, destination_segment(op)), count, true) else {
            return Ok(0);
        };
        let value = cpu.reg::<W>(AX);
        let done = cpu.fill_forward(to, value, count)?;
        advance::<W>(cpu, op, DI, done);
        Ok(done)
    }
}

struct Lods;
impl StringOp for Lods {
    #[inline(always)]
    fn one<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
        let from = source::<W>(cpu, op)?;
        let value = cpu.load::<W>(from)?;
        cpu.set_reg(AX, value);
        advance::<W>(cpu, op, SI, 1);
        Ok(())
    }
}

#[inline(always)]
fn compare<W: Word>(flags: &mut Flags, a: W, b: W) {
    flags.set_sub(a, b, W::cut(a.zext().wrapping_sub(b.zext())));
}

struct Cmps;
impl StringOp for Cmps {
    const COMPARES: bool = true;

    #[inline(always)]
    fn one<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
        let first = source::<W>(cpu, op)?;
        let a = cpu.load::<W>(first)?;
        let second = destination::<W>(cpu, op, false)?;
        let b = cpu.load::<W>(second)?;
        compare(&mut cpu.flags, a, b);
        advance::<W>(cpu, op, SI, 1);
        advance::<W>(cpu, op, DI, 1);
        Ok(())
    }
}

struct Scas;
impl StringOp for Scas {
    const COMPARES: bool = true;

    #[inline(always)]
    fn one<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
        let at = destination::<W>(cpu, op, false)?;
        let b = cpu.load::<W>(at)?;
        let a = cpu.reg::<W>(AX);
        compare(&mut cpu.flags, a, b);
        advance::<W>(cpu, op, DI, 1);
        Ok(())
    }
}

fn once<S: StringOp, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    S::one::<W>(cpu, op)
}

/// Repeats `S` by the counter. Where it stops before the end the counter and the pointers are those
/// of what is left; and comparisons' flags, which nobody has seen yet, as they were (SDM vol. 2B,
/// "REP").
///
/// # Errors
/// Faults; [`Stop::Again`] to let interrupts and debug traps come.
pub(in crate::soft) fn repeat<S: StringOp, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let flags = cpu.flags;
    let mut left = GO;
    loop {
        let count = pointer(cpu, op, CX);
        if count == 0 {
            return Ok(());
        }
        if left == 0 {
            cpu.flags = flags;
            cpu.link.demand_own(attention::TIMER);
            cpu.repeating = true;
            return Err(Stop::Again);
        }
        let bulk = !S::COMPARES && count >= BULK / W::SIZE && !cpu.flag(DF | TF);
        let result = if bulk { S::many::<W>(cpu, op, count.min(left / W::SIZE)) } else { Ok(0) };
        let result = match result {
            Ok(0) => S::one::<W>(cpu, op).map(|()| 0),
            other => other,
        };
        match result {
            Ok(0) => {
                set_pointer(cpu, op, CX, count - 1);
                left = left.saturating_sub(ELEMENT);
                if S::COMPARES && cpu.flags.zf() != (op.prefix & REPE != 0) {
                    return Ok(());
                }
                if (cpu.flag(TF) || cpu.breakpoints.hits != 0) && count > 1 {
                    // Debug traps come after every element, and return to the instruction.
                    return Err(Stop::Again);
                }
            }
            Ok(done) => {
                set_pointer(cpu, op, CX, count - done);
                left = left.saturating_sub((done * W::SIZE).max(ELEMENT));
            }
            Err(stop) => {
                cpu.flags = flags;
                return Err(stop);
            }
        }
    }
}

fn of<S: StringOp>(i: &Instruction, size: u32) -> Handler {
    if i.has_rep_prefix() || i.has_repne_prefix() {
        of_size!(size, repeat, S)
    } else {
        of_size!(size, once, S)
    }
}

pub(super) fn select(i: &Instruction) -> Option<Selected> {
    if !i.is_string_instruction() {
        return None;
    }
    let handler = match i.mnemonic() {
        Mnemonic::Movsb => of::<Movs>(i, 1),
        Mnemonic::Movsw => of::<Movs>(i, 2),
        Mnemonic::Movsd => of::<Movs>(i, 4),
        Mnemonic::Movsq => of::<Movs>(i, 8),
        Mnemonic::Stosb => of::<Stos>(i, 1),
        Mnemonic::Stosw => of::<Stos>(i, 2),
        Mnemonic::Stosd => of::<Stos>(i, 4),
        Mnemonic::Stosq => of::<Stos>(i, 8),
        Mnemonic::Lodsb => of::<Lods>(i, 1),
        Mnemonic::Lodsw => of::<Lods>(i, 2),
        Mnemonic::Lodsd => of::<Lods>(i, 4),
        Mnemonic::Lodsq => of::<Lods>(i, 8),
        Mnemonic::Cmpsb => of::<Cmps>(i, 1),
        Mnemonic::Cmpsw => of::<Cmps>(i, 2),
        Mnemonic::Cmpsd => of::<Cmps>(i, 4),
        Mnemonic::Cmpsq => of::<Cmps>(i, 8),
        Mnemonic::Scasb => of::<Scas>(i, 1),
        Mnemonic::Scasw => of::<Scas>(i, 2),
        Mnemonic::Scasd => of::<Scas>(i, 4),
        Mnemonic::Scasq => of::<Scas>(i, 8),
        _ => return None,
    };
    Some(Selected::plain(handler))
}
