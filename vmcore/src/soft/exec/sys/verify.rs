//! Looking at descriptors without loading them: LAR, LSL, VERR, VERW, ARPL.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::descriptor::{Descriptor, null, rpl, system};
use crate::soft::cpu::Cpu;
use crate::soft::cpu::flags::ZF;
use crate::soft::cpu::op::{Flow, Op, Selected, Stop};
use crate::soft::cpu::vector;

impl Cpu {
    fn set_zf(&mut self, on: bool) {
        let bits = self.flags.bits() & !ZF | if on { ZF } else { 0 };
        self.flags.set_bits(bits);
    }

    /// The descriptor that `selector` names where the present privilege may see it.
    fn visible(&mut self, selector: u16) -> Result<Option<Descriptor>, Stop> {
        if null(selector) || self.descriptor_address(selector).is_none() {
            return Ok(None);
        }
        let descriptor = self.descriptor(selector, vector::GP)?;
        let level = descriptor.dpl() >= self.mode.cpl.max(rpl(selector));
        Ok(Some(descriptor).filter(|d| level || d.conforming()))
    }
}

fn selector<const MEMORY: bool>(cpu: &mut Cpu, op: &Op, register: u8) -> Result<u16, Stop> {
    cpu.only_protected()?;
    if MEMORY { cpu.load_operand(op) } else { Ok(cpu.reg(register)) }
}

fn set_sized(cpu: &mut Cpu, op: &Op, value: u64) {
    match op.size {
        2 => cpu.set_reg(op.dst, value as u16),
        4 => cpu.set_reg(op.dst, value as u32),
        _ => cpu.set_reg(op.dst, value),
    }
}

fn lar<const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    let selector = selector::<MEMORY>(cpu, op, op.src)?;
    let long = cpu.ia32e();
    let found = cpu.visible(selector)?.filter(|d| match d.system() {
        None => true,
        Some(system::LDT | system::TSS | system::TSS_BUSY | system::CALL_GATE) => true,
        Some(system::TSS16 | system::TSS16_BUSY | system::CALL_GATE16 | system::TASK_GATE) => !long,
        Some(_) => false,
    });
    if let Some(descriptor) = found {
        set_sized(cpu, op, descriptor.0 >> 32 & 0x00ff_ff00);
    }
    cpu.set_zf(found.is_some());
    Ok(())
}

fn lsl<const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    let selector = selector::<MEMORY>(cpu, op, op.src)?;
    let long = cpu.ia32e();
    let found = cpu.visible(selector)?.filter(|d| match d.system() {
        None | Some(system::LDT | system::TSS | system::TSS_BUSY) => true,
        Some(system::TSS16 | system::TSS16_BUSY) => !long,
        Some(_) => false,
    });
    if let Some(descriptor) = found {
        set_sized(cpu, op, descriptor.limit().into());
    }
    cpu.set_zf(found.is_some());
    Ok(())
}

fn verify<const WRITE: bool, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    let selector = selector::<MEMORY>(cpu, op, op.dst)?;
    let found = cpu.visible(selector)?;
    let good = found.is_some_and(|d| if WRITE { d.writable_data() } else { d.readable() });
    cpu.set_zf(good);
    Ok(())
}

fn arpl<const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.only_protected()?;
    let adjust = |to: u16, from: u16| if to & 3 < from & 3 { Some(to & !3 | from & 3) } else { None };
    let adjusted = if MEMORY {
        let from: u16 = cpu.reg(op.dst);
        let at = cpu.address(op, 2, true)?;
        let mut adjusted = None;
        cpu.modify(at, |to: u16| {
            adjusted = adjust(to, from);
            adjusted.unwrap_or(to)
        })?;
        adjusted
    } else {
        let adjusted = adjust(cpu.reg(op.dst), cpu.reg(op.src));
        if let Some(value) = adjusted {
            cpu.set_reg(op.dst, value);
        }
        adjusted
    };
    cpu.set_zf(adjusted.is_some());
    Ok(())
}

pub(super) fn select(i: &Instruction) -> Option<Selected> {
    let memory = i.op0_kind() == OpKind::Memory || i.op1_kind() == OpKind::Memory;
    Some(Selected::plain(match (i.mnemonic(), memory) {
        (Mnemonic::Lar, false) => lar::<false>,
        (Mnemonic::Lar, true) => lar::<true>,
        (Mnemonic::Lsl, false) => lsl::<false>,
        (Mnemonic::Lsl, true) => lsl::<true>,
        (Mnemonic::Verr, false) => verify::<false, false>,
        (Mnemonic::Verr, true) => verify::<false, true>,
        (Mnemonic::Verw, false) => verify::<true, false>,
        (Mnemonic::Verw, true) => verify::<true, true>,
        (Mnemonic::Arpl, false) => arpl::<false>,
        (Mnemonic::Arpl, true) => arpl::<true>,
        _ => return None,
    }))
}
