//! Single bits and counts of bits: BT and its relatives, BSF, BSR, POPCNT, TZCNT, LZCNT, CRC32.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::{in_memory, of_size, size_of_operand};
use crate::soft::cpu::Cpu;
use crate::soft::cpu::flags::{CF, OF, PF, ZF};
use crate::soft::cpu::op::{Flow, Handler, Op, Selected, Stop};
use crate::soft::cpu::word::Word;

/// What becomes of the bit.
trait Change {
    fn apply(value: u64, bit: u64) -> u64;
    const STORES: bool = true;
}

struct Keep;
impl Change for Keep {
    fn apply(value: u64, _: u64) -> u64 {
        value
    }
    const STORES: bool = false;
}

struct Set;
impl Change for Set {
    #[inline(always)]
    fn apply(value: u64, bit: u64) -> u64 {
        value | bit
    }
}

struct Reset;
impl Change for Reset {
    #[inline(always)]
    fn apply(value: u64, bit: u64) -> u64 {
        value & !bit
    }
}

struct Flip;
impl Change for Flip {
    #[inline(always)]
    fn apply(value: u64, bit: u64) -> u64 {
        value ^ bit
    }
}

#[inline(always)]
fn mask<W: Word>(number: u64) -> u64 {
    1 << (number & u64::from(W::BITS - 1))
}

#[inline(always)]
fn register<C: Change, W: Word>(cpu: &mut Cpu, op: &Op, number: u64) {
    let value = cpu.reg::<W>(op.dst).zext();
    let bit = mask::<W>(number);
    cpu.flags.set_cf(value & bit != 0);
    if C::STORES {
        cpu.set_reg(op.dst, W::cut(C::apply(value, bit)));
    }
}

fn register_register<C: Change, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let number = cpu.reg::<W>(op.src).zext();
    register::<C, W>(cpu, op, number);
    cpu.go_on(op)
}

fn register_immediate<C: Change, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    register::<C, W>(cpu, op, op.imm);
    cpu.go_on(op)
}

#[inline(always)]
fn at_address<C: Change, W: Word>(cpu: &mut Cpu, op: &Op, at: u64, bit: u64) -> Flow {
    let mut old = 0;
    let change = |value: W| {
        old = value.zext();
        W::cut(C::apply(old, bit))
    };
    if !C::STORES {
        old = cpu.load::<W>(at)?.zext();
    } else if op.locked() {
        cpu.modify_atomic(at, change)?;
    } else {
        cpu.modify(at, change)?;
    }
    cpu.flags.set_cf(old & bit != 0);
    Ok(())
}

/// The bit's number is signed and reaches beyond the operand.
fn memory_register<C: Change, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let number = cpu.reg::<W>(op.dst).sext();
    let words = (number.cast_signed() >> W::BITS.trailing_zeros()).cast_unsigned();
    let offset = cpu.offset(op).wrapping_add(words.wrapping_mul(W::SIZE)) & (u64::MAX >> (op.ashift & 63));
    let at = cpu.linear(op, op.seg, offset, W::SIZE, C::STORES)?;
    at_address::<C, W>(cpu, op, at, mask::<W>(number))
}

fn memory_immediate<C: Change, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let at = cpu.address(op, W::SIZE, C::STORES)?;
    at_address::<C, W>(cpu, op, at, mask::<W>(op.imm))
}

fn test<C: Change>(i: &Instruction) -> Handler {
    let size = size_of_operand(i, 0);
    match (in_memory(i, 0), i.op1_kind()) {
        (false, OpKind::Register) => of_size!(size, register_register, C),
        (false, _) => of_size!(size, register_immediate, C),
        (true, OpKind::Register) => of_size!(size, memory_register, C),
        (true, _) => of_size!(size, memory_immediate, C),
    }
}

/// An operation from one operand to a register.
trait Count {
    /// Changes the flags; returns the result where the register is to be written.
    fn count<W: Word>(cpu: &mut Cpu, value: W) -> Option<W>;
}

/// The flags of BSF and BSR for `count`, the result. All but ZF are undefined; AMD's processors give the
/// parity of the result, even where there is none, and clear the others.
#[inline(always)]
fn set_scan_flags(cpu: &mut Cpu, count: Option<u32>) {
    let flags = match count {
        None => ZF | PF,
        Some(count) if count.count_ones() & 1 == 0 => PF,
        Some(_) => 0,
    };
    cpu.flags.set_bits(flags);
}

struct Bsf;
impl Count for Bsf {
    #[inline(always)]
    fn count<W: Word>(cpu: &mut Cpu, value: W) -> Option<W> {
        let value = value.zext();
        let count = (value != 0).then(|| value.trailing_zeros());
        set_scan_flags(cpu, count);
        count.map(|n| W::cut(n.into()))
    }
}

struct Bsr;
impl Count for Bsr {
    #[inline(always)]
    fn count<W: Word>(cpu: &mut Cpu, value: W) -> Option<W> {
        let count = value.zext().checked_ilog2();
        set_scan_flags(cpu, count);
        count.map(|n| W::cut(n.into()))
    }
}

/// The flags of TZCNT and LZCNT. All but CF and ZF are undefined; AMD's processors keep OF and clear
/// the others.
#[inline(always)]
fn set_count_flags<W: Word>(cpu: &mut Cpu, value: W, count: u32) {
    let of = if cpu.flags.of() { OF } else { 0 };
    let cf = if value.zext() == 0 { CF } else { 0 };
    cpu.flags.set_bits(of | cf | if count == 0 { ZF } else { 0 });
}

struct Tzcnt;
impl Count for Tzcnt {
    #[inline(always)]
    fn count<W: Word>(cpu: &mut Cpu, value: W) -> Option<W> {
        let count = value.zext().trailing_zeros().min(W::BITS);
        set_count_flags(cpu, value, count);
        Some(W::cut(count.into()))
    }
}

struct Lzcnt;
impl Count for Lzcnt {
    #[inline(always)]
    fn count<W: Word>(cpu: &mut Cpu, value: W) -> Option<W> {
        let count = value.zext().leading_zeros() - (64 - W::BITS);
        set_count_flags(cpu, value, count);
        Some(W::cut(count.into()))
    }
}

struct Popcnt;
impl Count for Popcnt {
    #[inline(always)]
    fn count<W: Word>(cpu: &mut Cpu, value: W) -> Option<W> {
        cpu.flags.set_bits(if value.zext() == 0 { ZF } else { 0 });
        Some(W::cut(value.zext().count_ones().into()))
    }
}

#[inline(always)]
fn count<C: Count, W: Word>(cpu: &mut Cpu, op: &Op, value: W) {
    if let Some(result) = C::count(cpu, value) {
        cpu.set_reg(op.dst, result);
    }
}

fn count_register<C: Count, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = cpu.reg(op.src);
    count::<C, W>(cpu, op, value);
    cpu.go_on(op)
}

fn count_memory<C: Count, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = cpu.load_operand(op)?;
    count::<C, W>(cpu, op, value);
    Ok(())
}

fn counting<C: Count>(i: &Instruction) -> Handler {
    let size = size_of_operand(i, 0);
    if in_memory(i, 1) { of_size!(size, count_memory, C) } else { of_size!(size, count_register, C) }
}

/// The remainders of the bytes by the polynomial 0x11edc6f41, all bits reflected.
const CRC: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0u32;
    while byte < 256 {
        let mut rest = byte;
        let mut bit = 0;
        while bit < 8 {
            rest = rest >> 1 ^ if rest & 1 != 0 { 0x82f6_3b78 } else { 0 };
            bit += 1;
        }
        table[byte as usize] = rest;
        byte += 1;
    }
    table
};

#[inline(always)]
fn crc<W: Word>(cpu: &mut Cpu, op: &Op, data: W) {
    let mut rest = cpu.reg::<u32>(op.dst);
    for byte in &data.zext().to_le_bytes()[..W::BITS as usize / 8] {
        rest = rest >> 8 ^ CRC[usize::from(u8::cut(rest.zext()) ^ byte)];
    }
    cpu.set_reg(op.dst, rest);
}

fn crc_register<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let data = cpu.reg::<W>(op.src);
    crc(cpu, op, data);
    Ok(())
}

fn crc_memory<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let data: Result<W, Stop> = cpu.load_operand(op);
    crc(cpu, op, data?);
    Ok(())
}

pub(super) fn select(i: &Instruction) -> Option<Selected> {
    let handler = match i.mnemonic() {
        Mnemonic::Bt => test::<Keep>(i),
        Mnemonic::Bts => test::<Set>(i),
        Mnemonic::Btr => test::<Reset>(i),
        Mnemonic::Btc => test::<Flip>(i),
        Mnemonic::Bsf => counting::<Bsf>(i),
        Mnemonic::Bsr => counting::<Bsr>(i),
        Mnemonic::Tzcnt => counting::<Tzcnt>(i),
        Mnemonic::Lzcnt => counting::<Lzcnt>(i),
        Mnemonic::Popcnt => counting::<Popcnt>(i),
        Mnemonic::Crc32 if in_memory(i, 1) => of_size!(size_of_operand(i, 1), crc_memory),
        Mnemonic::Crc32 => of_size!(size_of_operand(i, 1), crc_register),
        _ => return None,
    };
    Some(Selected::plain(handler))
}
