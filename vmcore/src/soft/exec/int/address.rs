//! Shapes of memory operands in 64-bit code, as types, for handlers that do the usual thing at once.
//!
//! Such a handler has no path but the fast one: memory of one page whose translation is known. For
//! anything else it goes over to the general handler of the same instruction, which begins anew. So it
//! needs no stack frame, and the general one need not be fast.

use iced_x86::{CodeSize, Instruction, Register};

use crate::soft::cpu::Cpu;
use crate::soft::cpu::op::Op;

/// How the address of a memory operand is made, where it is 64 bits wide.
pub(super) trait Address {
    /// Offset within the segment.
    fn offset(cpu: &Cpu, op: &Op) -> u64;
    /// Linear address.
    fn linear(cpu: &Cpu, op: &Op) -> u64;
}

/// Base register (or RIP, or none) and displacement, in a segment whose base counts as zero.
pub(super) struct Base;
impl Address for Base {
    #[inline(always)]
    fn offset(cpu: &Cpu, op: &Op) -> u64 {
        cpu.base_offset(op)
    }
    #[inline(always)]
    fn linear(cpu: &Cpu, op: &Op) -> u64 {
        cpu.base_offset(op)
    }
}

/// The same with an index register and a segment.
pub(super) struct Full;
impl Address for Full {
    #[inline(always)]
    fn offset(cpu: &Cpu, op: &Op) -> u64 {
        cpu.index_offset(op)
    }
    #[inline(always)]
    fn linear(cpu: &Cpu, op: &Op) -> u64 {
        cpu.index_offset(op).wrapping_add(cpu.base(op.seg.into()))
    }
}

/// Which of the types is that of an instruction's memory operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// [`Base`].
    Base,
    /// [`Full`].
    Full,
    /// Other code than of 64 bits, or other addresses.
    General,
}

/// Whether `i` is in 64-bit code.
pub(super) fn long(i: &Instruction) -> bool {
    i.code_size() == CodeSize::Code64
}

/// The shape of `i`'s memory operand.
pub(super) fn shape(i: &Instruction) -> Shape {
    let wide = |register: Register| register.is_gpr64() || register == Register::RIP;
    let (base, index) = (i.memory_base(), i.memory_index());
    let addressed = match (base, index) {
        (Register::None, Register::None) => i.memory_displ_size() == 8,
        (Register::None, register) | (register, _) => wide(register),
    };
    let segmented = matches!(i.memory_segment(), Register::FS | Register::GS);
    match (long(i) && addressed, index) {
        (false, _) => Shape::General,
        (true, Register::None) if !segmented => Shape::Base,
        (true, _) => Shape::Full,
    }
}

/// The instance of handler `$fast` for the shape of `$i`'s memory operand, or else of `$general`, both
/// for operands of `$size` bytes.
macro_rules! of_shape {
    ($i:expr, $size:expr, $fast:ident, $general:ident $(, $kind:ty)*) => {
        match $crate::soft::exec::int::address::shape($i) {
            $crate::soft::exec::int::address::Shape::Base => {
                $crate::soft::exec::int::of_size!($size, $fast, $crate::soft::exec::int::address::Base $(, $kind)*)
            }
            $crate::soft::exec::int::address::Shape::Full => {
                $crate::soft::exec::int::of_size!($size, $fast, $crate::soft::exec::int::address::Full $(, $kind)*)
            }
            $crate::soft::exec::int::address::Shape::General => {
                $crate::soft::exec::int::of_size!($size, $general $(, $kind)*)
            }
        }
    };
}
pub(super) use of_shape;
