//! Instructions on RFLAGS and the interrupt flag (SDM vol. 1, 3.4.3; vol. 3B, 20.3 and 20.4).

use iced_x86::{Code, Instruction, Mnemonic};

use super::next;
use crate::soft::cpu::flags::{AC, ARITHMETIC, DF, ID, IF, IOPL, NT, RF, TF, VIF, VIP, VM};
use crate::soft::cpu::op::{Flow, Op, Selected, Stop};
use crate::soft::cpu::word::Word;
use crate::soft::cpu::{Cpu, cr0, cr4};

/// What CLI and STI act on.
enum Interrupts {
    Real,
    Virtual,
}

impl Cpu {
    /// # Errors
    /// #GP(0) where the privilege level has none.
    fn interrupt_flag(&mut self) -> Result<Interrupts, Stop> {
        if self.cr0 & cr0::PE == 0 || self.iopl() >= self.mode.cpl {
            return Ok(Interrupts::Real);
        }
        let extension = if self.mode.v86 { cr4::VME } else { cr4::PVI };
        if self.mode.cpl == 3 && self.cr4 & extension != 0 {
            return Ok(Interrupts::Virtual);
        }
        Err(self.gp(0))
    }
}

fn cli(cpu: &mut Cpu, _: &Op) -> Flow {
    match cpu.interrupt_flag()? {
        Interrupts::Real => cpu.system_flags &= !IF,
        Interrupts::Virtual => cpu.system_flags &= !VIF,
    }
    Ok(())
}

fn sti(cpu: &mut Cpu, op: &Op) -> Flow {
    match cpu.interrupt_flag()? {
        Interrupts::Real if cpu.flag(IF) => return Ok(()),
        Interrupts::Real => {
            cpu.system_flags |= IF;
            cpu.shadow.sti = true;
            cpu.shadow_next = true;
            cpu.events_may_come();
        }
        Interrupts::Virtual if cpu.flag(VIP) => return Err(cpu.gp(0)),
        Interrupts::Virtual => {
            cpu.system_flags |= VIF;
            return Ok(());
        }
    }
    next(cpu, op)
}

fn pushf<W: Word>(cpu: &mut Cpu, _: &Op) -> Flow {
    let mut image = cpu.rflags() & !(VM | RF);
    if cpu.mode.v86 && cpu.iopl() < 3 {
        if cpu.cr4 & cr4::VME == 0 || W::SIZE != 2 {
            return Err(cpu.gp(0));
        }
        image = image & !IF | IOPL | if image & VIF != 0 { IF } else { 0 };
    }
    cpu.push(W::cut(image))
}

fn popf<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let mut mask = ARITHMETIC | TF | DF | NT;
    if W::SIZE > 2 {
        mask |= AC | ID;
    }
    if cpu.mode.cpl <= cpu.iopl() {
        mask |= IF;
    }
    if cpu.mode.cpl == 0 {
        mask |= IOPL;
    }
    let image = if cpu.mode.v86 && cpu.iopl() < 3 {
        if cpu.cr4 & cr4::VME == 0 || W::SIZE != 2 {
            return Err(cpu.gp(0));
        }
        let image = cpu.peek::<W>(0)?.zext();
        if image & TF != 0 || image & IF != 0 && cpu.flag(VIP) {
            return Err(cpu.gp(0));
        }
        mask = mask & !IF | VIF;
        cpu.pop::<W>()?;
        if image & IF != 0 { image | VIF } else { image & !VIF }
    } else {
        cpu.pop::<W>()?.zext()
    };
    let before = cpu.system_flags;
    cpu.set_rflags(cpu.rflags() & !(mask | RF) | image & mask);
    let set = cpu.system_flags & !before;
    if set & (IF | TF) == 0 {
        return Ok(());
    }
    if set & IF != 0 {
        cpu.events_may_come();
    }
    next(cpu, op)
}

/// STAC and CLAC.
fn set_ac<const ON: bool>(cpu: &mut Cpu, _: &Op) -> Flow {
    if cpu.mode.cpl != 0 || !cpu.mode.protected {
        return Err(cpu.ud());
    }
    cpu.system_flags = cpu.system_flags & !AC | if ON { AC } else { 0 };
    cpu.select_bank();
    Ok(())
}

pub(super) fn select(i: &Instruction) -> Option<Selected> {
    Some(Selected::plain(match i.code() {
        Code::Pushfw => pushf::<u16>,
        Code::Pushfd => pushf::<u32>,
        Code::Pushfq => pushf::<u64>,
        Code::Popfw => popf::<u16>,
        Code::Popfd => popf::<u32>,
        Code::Popfq => popf::<u64>,
        _ => match i.mnemonic() {
            Mnemonic::Cli => cli,
            Mnemonic::Sti => sti,
            Mnemonic::Stac => set_ac::<true>,
            Mnemonic::Clac => set_ac::<false>,
            _ => return None,
        },
    }))
}
