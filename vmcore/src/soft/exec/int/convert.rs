//! Sign extensions within the accumulator, XLAT, and the instructions that set single flags.

use iced_x86::{Instruction, Mnemonic};

use super::{AH, AX, DX};
use crate::soft::cpu::Cpu;
use crate::soft::cpu::flags::{AF, CF, DF, OF, PF, SF, ZF};
use crate::soft::cpu::op::{FlagUse, Flow, Handler, Op, Selected};
use crate::soft::cpu::word::Word;

/// CBW, CWDE, CDQE: the accumulator's lower half to all of it.
fn widen<From: Word, W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = cpu.reg::<From>(AX).sext();
    cpu.set_reg(AX, W::cut(value));
    cpu.go_on(op)
}

/// CWD, CDQ, CQO: the accumulator's sign to the data register.
fn spread<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let sign = cpu.reg::<W>(AX).sext().cast_signed() >> 63;
    cpu.set_reg(DX, W::cut(sign.cast_unsigned()));
    cpu.go_on(op)
}

fn xlat(cpu: &mut Cpu, op: &Op) -> Flow {
    // The decoder gives AL as index, which would be all of RAX.
    let base = cpu.r64(usize::from(op.base));
    let offset = base.wrapping_add(cpu.reg::<u8>(AX).zext()) & (u64::MAX >> (op.ashift & 63));
    let at = cpu.linear(op, op.seg, offset, 1, false)?;
    let value = cpu.load::<u8>(at)?;
    cpu.set_reg(AX, value);
    Ok(())
}

fn lahf(cpu: &mut Cpu, _: &Op) -> Flow {
    let flags = cpu.flags.bits() & (SF | ZF | AF | PF | CF) | 2;
    cpu.set_reg(AH, u8::cut(flags));
    Ok(())
}

fn sahf(cpu: &mut Cpu, _: &Op) -> Flow {
    let of = cpu.flags.bits() & OF;
    let flags = cpu.reg::<u8>(AH).zext();
    cpu.flags.set_bits(flags & (SF | ZF | AF | PF | CF) | of);
    Ok(())
}

/// SALC, which no manual has: AL from CF.
fn salc(cpu: &mut Cpu, _: &Op) -> Flow {
    let value = if cpu.flags.cf() { 0xff } else { 0u8 };
    cpu.set_reg(AX, value);
    Ok(())
}

fn clc(cpu: &mut Cpu, _: &Op) -> Flow {
    cpu.flags.set_cf(false);
    Ok(())
}

fn stc(cpu: &mut Cpu, _: &Op) -> Flow {
    cpu.flags.set_cf(true);
    Ok(())
}

fn cmc(cpu: &mut Cpu, _: &Op) -> Flow {
    let cf = cpu.flags.cf();
    cpu.flags.set_cf(!cf);
    Ok(())
}

fn cld(cpu: &mut Cpu, _: &Op) -> Flow {
    cpu.system_flags &= !DF;
    Ok(())
}

fn std(cpu: &mut Cpu, _: &Op) -> Flow {
    cpu.system_flags |= DF;
    Ok(())
}

pub(super) fn select(i: &Instruction) -> Option<Selected> {
    let handler: Handler = match i.mnemonic() {
        Mnemonic::Cbw => widen::<u8, u16>,
        Mnemonic::Cwde => widen::<u16, u32>,
        Mnemonic::Cdqe => widen::<u32, u64>,
        Mnemonic::Cwd => spread::<u16>,
        Mnemonic::Cdq => spread::<u32>,
        Mnemonic::Cqo => spread::<u64>,
        Mnemonic::Xlatb => xlat,
        Mnemonic::Lahf => lahf,
        Mnemonic::Sahf => sahf,
        Mnemonic::Salc => salc,
        Mnemonic::Clc => clc,
        Mnemonic::Stc => stc,
        Mnemonic::Cmc => cmc,
        Mnemonic::Cld => cld,
        Mnemonic::Std => std,
        _ => return None,
    };
    Some(match i.mnemonic() {
        Mnemonic::Cbw | Mnemonic::Cwde | Mnemonic::Cdqe | Mnemonic::Cwd | Mnemonic::Cdq | Mnemonic::Cqo => {
            Selected::flagged(handler, FlagUse::Ignores)
        }
        _ => Selected::plain(handler),
    })
}
