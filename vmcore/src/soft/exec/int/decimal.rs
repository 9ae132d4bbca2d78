//! Decimal adjustments, which 64-bit code does not have (SDM vol. 2A).

use iced_x86::{Instruction, Mnemonic};

use super::{AH, AX};
use crate::soft::cpu::op::{Flow, Handler, Op, Selected};
use crate::soft::cpu::{Cpu, vector};

/// SF, ZF and PF of `al`, the given CF and AF, and OF clear.
fn set_flags(cpu: &mut Cpu, al: u8, cf: bool, af: bool) {
    cpu.flags.set_with(al, cf, false, af);
}

/// DAA and DAS: `adjust` adds or subtracts.
fn packed(cpu: &mut Cpu, adjust: impl Fn(u8, u8) -> u8, borrow: impl FnOnce(u8) -> bool) {
    let (old, old_cf) = (cpu.reg::<u8>(AX), cpu.flags.cf());
    let (mut al, mut cf) = (old, false);
    let af = old & 15 > 9 || cpu.flags.af();
    if af {
        al = adjust(al, 6);
        cf = old_cf || borrow(old);
    }
    if old > 0x99 || old_cf {
        al = adjust(al, 0x60);
        cf = true;
    }
    cpu.set_reg(AX, al);
    set_flags(cpu, al, cf, af);
}

fn daa(cpu: &mut Cpu, _: &Op) -> Flow {
    packed(cpu, u8::wrapping_add, |al| al > 0xf9);
    Ok(())
}

fn das(cpu: &mut Cpu, _: &Op) -> Flow {
    packed(cpu, u8::wrapping_sub, |al| al < 6);
    Ok(())
}

/// AAA and AAS: `adjust` adds or subtracts 0x106.
fn unpacked(cpu: &mut Cpu, adjust: impl FnOnce(u16) -> u16) {
    let ax = cpu.reg::<u16>(AX);
    let af = ax & 15 > 9 || cpu.flags.af();
    let ax = (if af { adjust(ax) } else { ax }) & 0xff0f;
    cpu.set_reg(AX, ax);
    let al = cpu.reg::<u8>(AX);
    set_flags(cpu, al, af, af);
}

fn aaa(cpu: &mut Cpu, _: &Op) -> Flow {
    unpacked(cpu, |ax| ax.wrapping_add(0x106));
    Ok(())
}

fn aas(cpu: &mut Cpu, _: &Op) -> Flow {
    unpacked(cpu, |ax| ax.wrapping_sub(0x106));
    Ok(())
}

/// AAM; the operand is the base.
fn aam(cpu: &mut Cpu, op: &Op) -> Flow {
    let [base, ..] = op.imm.to_le_bytes();
    let al = cpu.reg::<u8>(AX);
    let (Some(high), Some(low)) = (al.checked_div(base), al.checked_rem(base)) else {
        return Err(cpu.raise(vector::DE, None));
    };
    cpu.set_reg(AX, low);
    cpu.set_reg(AH, high);
    set_flags(cpu, low, false, false);
    Ok(())
}

/// AAD; the operand is the base.
fn aad(cpu: &mut Cpu, op: &Op) -> Flow {
    let [base, ..] = op.imm.to_le_bytes();
    let al = cpu.reg::<u8>(AX).wrapping_add(cpu.reg::<u8>(AH).wrapping_mul(base));
    cpu.set_reg(AX, u16::from(al));
    set_flags(cpu, al, false, false);
    Ok(())
}

pub(super) fn select(i: &Instruction) -> Option<Selected> {
    let handler: Handler = match i.mnemonic() {
        Mnemonic::Daa => daa,
        Mnemonic::Das => das,
        Mnemonic::Aaa => aaa,
        Mnemonic::Aas => aas,
        Mnemonic::Aam => aam,
        Mnemonic::Aad => aad,
        _ => return None,
    };
    Some(Selected::plain(handler))
}
