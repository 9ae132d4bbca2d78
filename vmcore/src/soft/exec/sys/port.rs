//! Input and output (SDM vol. 1, chapter 19).

use iced_x86::{Code, Instruction};

use super::next;
use crate::soft::cpu::flags::{DF, TF};
use crate::soft::cpu::op::{Flow, Handler, Op, REPE, REPNE, Selected, Stop};
use crate::soft::cpu::word::Word;
use crate::soft::cpu::{Cpu, ES, RAX, RCX, RDI, RDX, RSI, cr0};

impl Cpu {
    /// Checks that the present privilege may access `size` ports from `port` on.
    ///
    /// # Errors
    /// #GP(0) where IOPL and the TSS's bitmap forbid it.
    fn check_port(&mut self, port: u16, size: u64) -> Flow {
        if self.cr0 & cr0::PE == 0 || !self.mode.v86 && self.mode.cpl <= self.iopl() {
            return Ok(());
        }
        // Only 32- and 64-bit TSSs have a bitmap.
        if self.tr.kind & 0xd != 9 || self.tr.limit < 103 {
            return Err(self.gp(0));
        }
        let map: u16 = self.tss_field(102)?;
        let at = u64::from(map) + u64::from(port) / 8;
        // Two bytes are read whatever the size.
        if at + 1 > u64::from(self.tr.limit) {
            return Err(self.gp(0));
        }
        let bits: u16 = self.tss_field(at)?;
        let wanted = ((1 << size) - 1) << (port % 8);
        if bits & wanted == 0 { Ok(()) } else { Err(self.gp(0)) }
    }

    /// The bits of an index register or counter that an instruction with `op`'s address size uses.
    fn indexed(&self, op: &Op, n: usize) -> u64 {
        self.r64(n) & u64::MAX >> (op.ashift & 63)
    }

    /// Sets those bits; 32-bit writes clear the upper half.
    fn set_indexed(&mut self, op: &Op, n: usize, value: u64) {
        let mask = u64::MAX >> (op.ashift & 63);
        let kept = if mask == 0xffff { self.r64(n) & !mask } else { 0 };
        self.set_r64(n, kept | value & mask);
    }

    /// Runs `one` for every element of a repeated string instruction, or once. Between two, others
    /// have their turn, and debug traps come.
    fn repeat(&mut self, op: &Op, mut one: impl FnMut(&mut Self) -> Flow) -> Flow {
        if op.prefix & (REPE | REPNE) == 0 {
            one(self)?;
            return next(self, op);
        }
        loop {
            let count = self.indexed(op, RCX);
            if count == 0 {
                return next(self, op);
            }
            one(self)?;
            self.set_indexed(op, RCX, count - 1);
            if count == 1 {
                return next(self, op);
            }
            if self.link.wanted() || self.flag(TF) {
                self.repeating = !self.flag(TF);
                return Err(Stop::Again);
            }
        }
    }

    fn advance(&mut self, op: &Op, n: usize, size: u64) {
        let at = self.indexed(op, n);
        let to = if self.flag(DF) { at.wrapping_sub(size) } else { at.wrapping_add(size) };
        self.set_indexed(op, n, to);
    }
}

fn port_operand<const IMMEDIATE: bool>(cpu: &Cpu, op: &Op) -> u16 {
    if IMMEDIATE { op.imm as u16 & 0xff } else { cpu.r64(RDX) as u16 }
}

fn input<W: Word, const IMMEDIATE: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    let port = port_operand::<IMMEDIATE>(cpu, op);
    cpu.check_port(port, W::SIZE)?;
    cpu.note_port(port, W::SIZE);
    let value = cpu.port_read(port, W::SIZE as usize);
    cpu.set_reg(RAX as u8, W::cut(value.into()));
    next(cpu, op)
}

fn output<W: Word, const IMMEDIATE: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    let port = port_operand::<IMMEDIATE>(cpu, op);
    cpu.check_port(port, W::SIZE)?;
    cpu.note_port(port, W::SIZE);
    cpu.port_write(port, cpu.reg::<W>(RAX as u8).zext() as u32, W::SIZE as usize);
    next(cpu, op)
}

fn ins<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let port = cpu.r64(RDX) as u16;
    cpu.check_port(port, W::SIZE)?;
    cpu.repeat(op, |cpu| {
        let offset = cpu.indexed(op, RDI);
        let at = cpu.linear(op, ES as u8, offset, W::SIZE, true)?;
        // What was read cannot be given back.
        cpu.check_write(at, W::SIZE)?;
        cpu.note_port(port, W::SIZE);
        let value = cpu.port_read(port, W::SIZE as usize);
        cpu.store(at, W::cut(value.into()))?;
        cpu.advance(op, RDI, W::SIZE);
        Ok(())
    })
}

fn outs<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let port = cpu.r64(RDX) as u16;
    cpu.check_port(port, W::SIZE)?;
    cpu.repeat(op, |cpu| {
        let offset = cpu.indexed(op, RSI);
        let at = cpu.linear(op, op.seg, offset, W::SIZE, false)?;
        let value: W = cpu.load(at)?;
        cpu.note_port(port, W::SIZE);
        cpu.port_write(port, value.zext() as u32, W::SIZE as usize);
        cpu.advance(op, RSI, W::SIZE);
        Ok(())
    })
}

pub(super) fn select(i: &Instruction) -> Option<Selected> {
    let run: Handler = match i.code() {
        Code::In_AL_imm8 => input::<u8, true>,
        Code::In_AX_imm8 => input::<u16, true>,
        Code::In_EAX_imm8 => input::<u32, true>,
        Code::In_AL_DX => input::<u8, false>,
        Code::In_AX_DX => input::<u16, false>,
        Code::In_EAX_DX => input::<u32, false>,
        Code::Out_imm8_AL => output::<u8, true>,
        Code::Out_imm8_AX => output::<u16, true>,
        Code::Out_imm8_EAX => output::<u32, true>,
        Code::Out_DX_AL => output::<u8, false>,
        Code::Out_DX_AX => output::<u16, false>,
        Code::Out_DX_EAX => output::<u32, false>,
        Code::Insb_m8_DX => ins::<u8>,
        Code::Insw_m16_DX => ins::<u16>,
        Code::Insd_m32_DX => ins::<u32>,
        Code::Outsb_DX_m8 => outs::<u8>,
        Code::Outsw_DX_m16 => outs::<u16>,
        Code::Outsd_DX_m32 => outs::<u32>,
        _ => return None,
    };
    Some(Selected::last(run))
}
