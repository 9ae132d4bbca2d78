//! From bytes to [`Op`]s: iced-x86 decodes, the modules of `exec` and `fp` choose the handlers.
#![expect(clippy::cast_possible_truncation, reason = "the host is a 64-bit one, and low bits are meant")]

use std::cell::Cell;

use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, Instruction, OpKind, Register};

use super::cpu::Mode;
use super::cpu::op::{HIGH, LOCK, LONG, NO_SEG, Op, REPE, REPNE, RIP, Selected, ZERO};
use super::isa::Isa;
use super::{block, exec, fp};

/// A decoded instruction.
pub(in crate::soft) struct Decoded {
    pub(in crate::soft) op: Op,
    /// What its handler was chosen by.
    pub(in crate::soft) selected: Selected,
    /// The page of its tail, where that is another one; the caller's to fill in.
    pub(in crate::soft) second: Option<u64>,
}

/// There are too few bytes.
#[derive(Debug)]
pub(in crate::soft) struct Truncated;

impl Op {
    /// An op without operands.
    pub(in crate::soft) fn nothing() -> Self {
        Self {
            run: Cell::new(block::fall_through),
            imm: 0,
            disp: 0,
            end: 0,
            len: 0,
            dst: 0,
            src: 0,
            base: ZERO,
            index: ZERO,
            scale: 0,
            seg: NO_SEG,
            ashift: 0,
            prefix: 0,
            size: 0,
            extra: 0,
        }
    }
}

/// Decodes the instruction that `bytes` begin with, at `offset` from the block's start at `block_rip`.
/// What `isa` does not offer is undefined. Code that it needs generated is found in or added to `thunks`.
pub(in crate::soft) fn decode(
    bytes: &[u8],
    block_rip: u64,
    offset: u64,
    mode: Mode,
    isa: Isa,
    thunks: &fp::Thunks,
) -> Result<Decoded, Truncated> {
    let rip = block_rip.wrapping_add(offset);
    let mut decoder = Decoder::with_ip(mode.bitness(), bytes, rip, isa.decoder_options());
    let mut instruction = decoder.decode();
    let length = instruction.len();
    if let Some(exchange) = exchange_with_rep(&instruction, bytes, mode) {
        instruction = exchange;
    }
    if instruction.is_invalid() && decoder.last_error() == DecoderError::NoMoreBytes {
        return Err(Truncated);
    }
    let exists = !instruction.is_invalid() && isa.offers(&instruction, mode);
    let selected = if exists { select(&instruction, bytes, thunks) } else { exec::undefined() };
    let mut op = operands(&instruction, block_rip, mode);
    op.run.set(selected.run);
    op.extra |= selected.extra;
    op.imm = selected.target.unwrap_or(op.imm);
    op.len = u8::try_from(length).unwrap_or(15);
    op.end = u16::try_from(offset).unwrap_or(u16::MAX).saturating_add(op.len.into());
    Ok(Decoded { op, selected, second: None })
}

/// With REX.B the bytes of PAUSE are an exchange with R8, whose F3 means nothing; iced does not say so.
fn exchange_with_rep(instruction: &Instruction, bytes: &[u8], mode: Mode) -> Option<Instruction> {
    const REX_B: u8 = 0x41;
    let [prefixes @ .., rex, _] = bytes.get(..instruction.len())? else { return None };
    if instruction.code() != Code::Pause || rex & 0xf1 != REX_B {
        return None;
    }
    let plain: Vec<u8> = prefixes.iter().filter(|&&byte| byte != 0xf3).chain([rex, &0x90]).copied().collect();
    Some(Decoder::new(mode.bitness(), &plain, DecoderOptions::NONE).decode())
}

/// The handler for `instruction`; what nobody knows is undefined.
fn select(instruction: &Instruction, bytes: &[u8], thunks: &fp::Thunks) -> Selected {
    exec::select(instruction)
        .or_else(|| fp::select(instruction, bytes, thunks))
        .unwrap_or_else(exec::undefined)
}

/// The number of `register` in [`Op::dst`] and [`Op::src`].
fn number(register: Register) -> u8 {
    let high = matches!(register, Register::AH | Register::CH | Register::DH | Register::BH);
    let number = if register.is_gpr() { register.full_register().number() } else { register.number() };
    u8::try_from(number).unwrap_or(0) | if high { HIGH } else { 0 }
}

/// Number of a general-purpose register in an address.
fn address_register(register: Register) -> u8 {
    match register {
        Register::None => ZERO,
        Register::RIP | Register::EIP => RIP,
        other => number(other),
    }
}

fn segment(register: Register, mode: Mode) -> u8 {
    match number(register) {
        n @ (4 | 5) => n,
        _ if mode.long => NO_SEG,
        n => n,
    }
}

/// Everything of the op but its handler.
fn operands(instruction: &Instruction, block_rip: u64, mode: Mode) -> Op {
    let i = instruction;
    let mut op = Op::nothing();
    let flag = |set, bit| if set { bit } else { 0 };
    op.prefix = flag(i.has_lock_prefix(), LOCK)
        | flag(i.has_repe_prefix(), REPE)
        | flag(i.has_repne_prefix(), REPNE)
        | flag(mode.long, LONG);
    let mut registers = 0;
    for n in 0..i.op_count() {
        let kind = i.op_kind(n);
        let size = match kind {
            OpKind::Register => {
                let register = i.op_register(n);
                match registers {
                    0 => op.dst = number(register),
                    1 => op.src = number(register),
                    _ => {}
                }
                registers += 1;
                register.size()
            }
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                op.imm = i.near_branch_target().wrapping_sub(i.next_ip());
                match kind {
                    OpKind::NearBranch16 => 2,
                    OpKind::NearBranch32 => 4,
                    _ => 8,
                }
            }
            OpKind::FarBranch16 => {
                op.imm = u64::from(i.far_branch16()) | u64::from(i.far_branch_selector()) << 32;
                2
            }
            OpKind::FarBranch32 => {
                op.imm = u64::from(i.far_branch32()) | u64::from(i.far_branch_selector()) << 32;
                4
            }
            OpKind::Immediate8_2nd => {
                op.extra = i.immediate8_2nd().into();
                1
            }
            kind if immediate(kind) => {
                op.imm = i.immediate(n);
                0
            }
            kind => {
                memory(i, kind, block_rip, mode, &mut op);
                i.memory_size().size()
            }
        };
        if n == 0 {
            op.size = u8::try_from(size).unwrap_or(0);
        }
    }
    op
}

fn immediate(kind: OpKind) -> bool {
    matches!(
        kind,
        OpKind::Immediate8
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64
    )
}

/// The parts of a memory operand of `kind`.
fn memory(i: &Instruction, kind: OpKind, block_rip: u64, mode: Mode, op: &mut Op) {
    op.seg = segment(i.memory_segment(), mode);
    let width = match kind {
        OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => 16,
        OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => 32,
        OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => 64,
        _ => {
            op.base = address_register(i.memory_base());
            op.index = address_register(i.memory_index());
            op.scale = u8::try_from(i.memory_index_scale().trailing_zeros()).unwrap_or(0);
            op.disp = i.memory_displacement64();
            if op.base == RIP {
                op.disp = op.disp.wrapping_sub(block_rip);
            }
            let register = if i.memory_base() == Register::None { i.memory_index() } else { i.memory_base() };
            match (register, i.memory_displ_size()) {
                (Register::None, 2) => 16,
                (Register::None, 4) => 32,
                (Register::None, _) => 64,
                (register, _) => 8 * register.size() as u32,
            }
        }
    };
    op.ashift = u8::try_from(64 - width.min(64)).unwrap_or(0);
}
