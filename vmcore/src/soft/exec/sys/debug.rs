//! Debug registers (SDM vol. 3B, 18.2).

use iced_x86::{Code, Instruction};

use super::next;
use crate::soft::cpu::op::{Flow, Op, Selected, Stop};
use crate::soft::cpu::word::Word;
use crate::soft::cpu::{Cpu, Fault, cr4, vector};

/// DR6.BD: the debug registers were to be accessed.
const DR6_BD: u64 = 1 << 13;
/// DR7.GD: accesses to the debug registers raise #DB.
const DR7_GD: u64 = 1 << 13;

impl Cpu {
    /// Which debug register `n` means: 4 and 5 are other names of 6 and 7.
    ///
    /// # Errors
    /// #UD, #GP(0), and #DB by general detect.
    fn debug_register(&mut self, n: u8) -> Result<u8, Stop> {
        let n = match n {
            4 | 5 if self.cr4 & cr4::DE != 0 => return Err(self.ud()),
            4 | 5 => n + 2,
            0..=7 => n,
            _ => return Err(self.ud()),
        };
        self.only_kernel()?;
        if self.debug.dr7 & DR7_GD != 0 {
            self.fault = Fault { vector: vector::DB, code: None, payload: DR6_BD };
            return Err(Stop::Fault);
        }
        Ok(n)
    }
}

fn read<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let n = cpu.debug_register(op.src)?;
    let value = match n {
        6 => cpu.debug.dr6,
        7 => cpu.debug.dr7,
        n => cpu.debug.addresses[usize::from(n & 3)],
    };
    cpu.set_reg(op.dst, W::cut(value));
    Ok(())
}

fn write<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let n = cpu.debug_register(op.dst)?;
    let value = cpu.reg::<W>(op.src).zext();
    if n >= 6 && value >> 32 != 0 {
        return Err(cpu.gp(0));
    }
    match n {
        6 => cpu.debug.dr6 = value & 0xe00f | 0xffff_0ff0,
        7 => cpu.debug.dr7 = value & 0xffff_2bff | 0x400,
        n => cpu.debug.addresses[usize::from(n & 3)] = value,
    }
    if n != 6 {
        cpu.arm_breakpoints();
    }
    next(cpu, op)
}

pub(super) fn select(i: &Instruction) -> Option<Selected> {
    Some(match i.code() {
        Code::Mov_r32_dr => Selected::plain(read::<u32>),
        Code::Mov_r64_dr => Selected::plain(read::<u64>),
        Code::Mov_dr_r32 => Selected::last(write::<u32>),
        Code::Mov_dr_r64 => Selected::last(write::<u64>),
        _ => return None,
    })
}
