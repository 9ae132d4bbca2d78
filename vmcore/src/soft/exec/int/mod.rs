//! Integer instructions: arithmetic, logic, moves, strings, near branches.
//!
//! Every file is a group of instructions with a `select` that knows them. Handlers are compiled for
//! each operand size and form, so that nothing about an instruction is decided while it runs.

mod address;
mod alu;
mod bits;
#[cfg(test)]
mod blocks;
mod bmi;
mod branch;
mod condition;
mod convert;
mod decimal;
mod double_shift;
mod exchange;
mod hint;
mod moves;
mod muldiv;
#[cfg(test)]
mod oracle;
#[cfg(test)]
mod programs;
mod shift;
#[cfg(test)]
mod speed;
mod stack;
mod string;

use iced_x86::{Instruction, OpKind};

use crate::soft::cpu::op::{HIGH, Selected};

/// Numbers of register operands ([`crate::soft::cpu::op::Op::dst`]) that instructions imply.
const AX: u8 = 0;
const CX: u8 = 1;
const DX: u8 = 2;
const BX: u8 = 3;
const SP: u8 = 4;
const BP: u8 = 5;
const SI: u8 = 6;
const DI: u8 = 7;
const AH: u8 = HIGH;

/// The instance of a handler for operands of `$size` bytes: its last type parameter is the word.
macro_rules! of_size {
    ($size:expr, $handler:ident $(, $kind:ty)*) => {
        match $size {
            1 => $handler::<$($kind,)* u8> as $crate::soft::cpu::op::Handler,
            2 => $handler::<$($kind,)* u16>,
            4 => $handler::<$($kind,)* u32>,
            _ => $handler::<$($kind,)* u64>,
        }
    };
}
use of_size;

/// Size of operand `n` in bytes, where it is a register or memory.
fn size_of_operand(i: &Instruction, n: u32) -> usize {
    match i.op_kind(n) {
        OpKind::Register => i.op_register(n).size(),
        _ => i.memory_size().size(),
    }
}

/// Whether operand `n` is in memory, by any of the ways to address it that ModRM gives.
fn in_memory(i: &Instruction, n: u32) -> bool {
    i.op_kind(n) == OpKind::Memory
}

/// The handler of an integer instruction.
pub(super) fn select(instruction: &Instruction) -> Option<Selected> {
    let groups = [
        moves::select,
        alu::select,
        branch::select,
        stack::select,
        shift::select,
        convert::select,
        string::select,
        exchange::select,
        bits::select,
        muldiv::select,
        double_shift::select,
        hint::select,
        bmi::select,
        decimal::select,
    ];
    groups.iter().find_map(|select| select(instruction))
}
