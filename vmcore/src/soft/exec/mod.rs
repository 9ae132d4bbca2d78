//! The instructions' handlers, by group. Each group has a `select` that knows its instructions.

mod int;
mod sys;

use iced_x86::Instruction;

pub(in crate::soft) use self::sys::{MISC_ENABLE_RESET, PAT_RESET};

use super::cpu::Cpu;
use super::cpu::op::{Flow, Op, Selected};

/// The handler for `instruction`, where it is not of x87, MMX or SSE.
pub(in crate::soft) fn select(instruction: &Instruction) -> Option<Selected> {
    int::select(instruction).or_else(|| sys::select(instruction))
}

/// The handler of bytes that are no instruction: #UD.
pub(in crate::soft) fn undefined() -> Selected {
    Selected::last(raise_ud)
}

fn raise_ud(cpu: &mut Cpu, _: &Op) -> Flow {
    Err(cpu.ud())
}
