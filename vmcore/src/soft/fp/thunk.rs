//! Thunks: small functions that run one instruction of the guest's on the host's own CPU.
//!
//! A thunk belongs to an instruction's opcode, form and immediate, not to its registers: operands are
//! passed by pointers and loaded into fixed registers, so that a guest can make only so many. It is
//! found or made when the instruction is decoded; calling it takes no lock.
#![expect(unsafe_code, reason = "turns addresses of generated code into functions")]
#![expect(clippy::cast_possible_truncation, reason = "addresses of the host's have 64 bits")]

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use iced_x86::{Encoder, Instruction, OpKind, Register, RflagsBits};

use super::exec_memory::ExecMemory;
use super::state::FpState;
use super::x87_thunk::{self, Quick};
use crate::error::Result;

/// A thunk: `target` is where operand 0 is (and stays), `source` operand 1. Both are aligned to 16 bytes.
/// Returns RFLAGS for those that were made to.
pub(super) type Thunk = extern "sysv64" fn(target: *mut u8, source: *const u8, state: *mut FpState) -> u64;

/// The bits of RFLAGS in iced's sets of flags, which also name x87's condition codes.
pub(super) const ARITHMETIC_FLAGS: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// Room for thunks, in bytes: more than all opcodes with all their immediates need.
const ROOM: usize = 8 << 20;

/// What to make a thunk from, besides the instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    /// It uses MXCSR.
    pub(super) float: bool,
    /// It sets RFLAGS.
    pub(super) flags_out: bool,
    /// It reads RFLAGS (FCMOVcc), which come as `source`'s first word.
    pub(super) flags_in: bool,
    /// It has XMM0 as an implicit operand.
    pub(super) xmm0: bool,
    /// PCMPESTRI and its relatives: lengths, index and XMM0.
    pub(super) string: bool,
    /// It is an x87 instruction.
    pub(super) x87: bool,
    /// An x87 instruction that has a quick form too.
    pub(super) quick: Option<Quick>,
}

/// Instruction, operand form, immediate or x87 register, shape.
type Key = (u16, u8, u8, Shape);

/// The thunks of a VM.
#[derive(Debug)]
pub(in crate::soft) struct Thunks {
    made: Mutex<Made>,
}

#[derive(Debug)]
struct Made {
    memory: ExecMemory,
    known: HashMap<Key, usize>,
}

impl Thunks {
    /// Prepares memory for thunks.
    ///
    /// # Errors
    /// [`crate::Error::BackendUnusable`] where the host does not let this process execute generated code.
    pub(in crate::soft) fn new() -> Result<Self> {
        let memory = ExecMemory::new(ROOM)?;
        Ok(Self { made: Mutex::new(Made { memory, known: HashMap::new() }) })
    }

    /// The address of the thunk for `instruction`, for [`thunk`]. `None` where it cannot be encoded for
    /// 64-bit code.
    pub(super) fn get(&self, instruction: &Instruction, shape: Shape) -> Option<u64> {
        let form = (0..instruction.op_count()).fold(0, |form, n| {
            let register = instruction.op_kind(n) == OpKind::Register;
            form << 1 | u8::from(register)
        });
        let number = if shape.x87 { x87_register(instruction) } else { last_immediate(instruction) };
        let key = (instruction.code() as u16, form, number, shape);
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&at) = made.known.get(&key) {
            return Some(at as u64);
        }
        let code = generate(instruction, shape)?;
        let Some(at) = made.memory.add(&code) else {
            log::error!("soft: no room for the thunk of {:?}", instruction.code());
            return None;
        };
        made.known.insert(key, at);
        Some(at as u64)
    }
}

/// The function at `at`, which [`Thunks::get`] has returned.
///
/// # Safety
/// `at` is from [`Thunks::get`] of a `Thunks` that is alive.
#[inline(always)]
pub(super) unsafe fn thunk(at: u64) -> Thunk {
    let at = std::ptr::with_exposed_provenance::<()>(at as usize);
    // SAFETY: the caller's promise: there is a function of this type.
    unsafe { std::mem::transmute::<*const (), Thunk>(at) }
}

fn last_immediate(instruction: &Instruction) -> u8 {
    let n = instruction.op_count().saturating_sub(1);
    if instruction.op_count() > 0 && instruction.op_kind(n) == OpKind::Immediate8 {
        instruction.immediate8()
    } else {
        0
    }
}

/// The ST(i) of an x87 instruction that is not ST(0), or the one there is.
fn x87_register(instruction: &Instruction) -> u8 {
    let registers = (0..instruction.op_count()).filter(|&n| instruction.op_kind(n) == OpKind::Register);
    registers
        .map(|n| instruction.op_register(n))
        .filter(|r| r.is_st())
        .map(|r| r as u8 - Register::ST0 as u8)
        .max()
        .unwrap_or(0)
}

/// The host's register for operand `n` in the place of `register`.
fn fixed(n: u32, register: Register) -> Register {
    if register.is_xmm() {
        if n == 0 { Register::XMM1 } else { Register::XMM2 }
    } else if register.is_mm() {
        if n == 0 { Register::MM1 } else { Register::MM2 }
    } else if register.is_gpr32() {
        Register::EAX
    } else if register.is_gpr64() {
        Register::RAX
    } else {
        register
    }
}

/// The instruction with fixed registers, operand 0 in memory at RDI and others at RSI.
fn rewrite(instruction: &Instruction, shape: Shape) -> Option<Vec<u8>> {
    let mut copy = *instruction;
    copy.set_segment_prefix(Register::None);
    copy.set_has_lock_prefix(false);
    copy.set_has_repe_prefix(false);
    copy.set_has_repne_prefix(false);
    for n in 0..copy.op_count() {
        match copy.op_kind(n) {
            OpKind::Register => copy.set_op_register(n, fixed(n, copy.op_register(n))),
            OpKind::Memory => {
                let base = if n == 0 && !shape.x87 { Register::RDI } else { Register::RSI };
                copy.set_memory_base(base);
                copy.set_memory_index(Register::None);
                copy.set_memory_index_scale(1);
                copy.set_memory_displacement64(0);
                copy.set_memory_displ_size(0);
            }
            _ => {}
        }
    }
    encode(&copy)
}

/// The bytes of an instruction in 64-bit code.
pub(super) fn encode(instruction: &Instruction) -> Option<Vec<u8>> {
    let mut encoder = Encoder::new(64);
    encoder.encode(instruction, 0).ok()?;
    Some(encoder.take_buffer())
}

/// Offsets in [`FpState`] as 32-bit displacements.
pub(super) const fn offset(of: usize) -> [u8; 4] {
    let bytes = of.to_le_bytes();
    [bytes[0], bytes[1], bytes[2], bytes[3]]
}
const MXCSR: [u8; 4] = offset(std::mem::offset_of!(FpState, mxcsr));
pub(super) const HOST_MXCSR: [u8; 4] = offset(std::mem::offset_of!(FpState, host_mxcsr));
const XMM0: [u8; 4] = offset(std::mem::offset_of!(FpState, xmm));
const INDEX: [u8; 4] = offset(std::mem::offset_of!(FpState, index));
const LENGTH1: [u8; 4] = offset(std::mem::offset_of!(FpState, lengths));
const LENGTH2: [u8; 4] = offset(std::mem::offset_of!(FpState, lengths) + 8);

/// Code under construction.
#[derive(Default)]
pub(super) struct Code(pub(super) Vec<u8>);

impl Code {
    pub(super) fn put(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// An instruction whose memory operand is `[rdx + offset]`; its ModRM byte comes last in `bytes`.
    pub(super) fn state(&mut self, bytes: &[u8], offset: [u8; 4]) {
        self.put(bytes);
        self.put(&offset);
    }
}

/// RDI: operand 0, RSI: operand 1, RDX: the state.
fn generate(instruction: &Instruction, shape: Shape) -> Option<Vec<u8>> {
    let body = rewrite(instruction, shape)?;
    let mut code = Code::default();
    if shape.x87 {
        x87_thunk::generate(&mut code, &body, shape)?;
    } else {
        generate_vector(&mut code, &body, instruction, shape);
    }
    Some(code.0)
}

/// An MMX or SSE instruction. Where it uses MXCSR, the guest's must have all exceptions masked when the
/// thunk is called. The host's comes back in its control bits; the status bits are the callee's to
/// change by the calling convention, and differ from the guest's only after other code has run: so a
/// sequence of such instructions loads MXCSR once.
fn generate_vector(code: &mut Code, body: &[u8], instruction: &Instruction, shape: Shape) {
    let register = |n: u32| match instruction.op_count() {
        count if n < count && instruction.op_kind(n) == OpKind::Register => instruction.op_register(n),
        _ => Register::None,
    };
    let (target, source) = (register(0), register(1));
    if shape.string {
        // PCMPESTRI has RDX as an operand.
        code.put(&[0x49, 0x89, 0xd0]); // mov r8, rdx
    }
    if shape.float {
        code.state(&[0x0f, 0xae, 0x9a], HOST_MXCSR); // stmxcsr [rdx + host]
        code.state(&[0x44, 0x8b, 0x82], HOST_MXCSR); // mov r8d, [rdx + host]
        code.state(&[0x44, 0x3b, 0x82], MXCSR); // cmp r8d, [rdx + guest]
        code.put(&[0x74, 7]); // je past
        code.state(&[0x0f, 0xae, 0x92], MXCSR); // ldmxcsr [rdx + guest]
    }
    if shape.xmm0 || shape.string {
        code.state(&[0x0f, 0x28, 0x82], XMM0); // movaps xmm0, [rdx + xmm0]
    }
    if target.is_xmm() {
        code.put(&[0x0f, 0x28, 0x0f]); // movaps xmm1, [rdi]
    } else if target.is_mm() {
        code.put(&[0x0f, 0x6f, 0x0f]); // movq mm1, [rdi]
    }
    if source.is_xmm() {
        code.put(&[0x0f, 0x28, 0x16]); // movaps xmm2, [rsi]
    } else if source.is_mm() {
        code.put(&[0x0f, 0x6f, 0x16]); // movq mm2, [rsi]
    } else if source.is_gpr() {
        code.put(&[0x48, 0x8b, 0x06]); // mov rax, [rsi]
    }
    if shape.string {
        code.state(&[0x48, 0x8b, 0x82], LENGTH1); // mov rax, [rdx + length 1]
        code.state(&[0x48, 0x8b, 0x92], LENGTH2); // mov rdx, [rdx + length 2]
    }
    code.put(body);
    if shape.string {
        code.put(&[0x4c, 0x89, 0xc2]); // mov rdx, r8
        code.put(&[0x89, 0xc9]); // mov ecx, ecx
        code.state(&[0x48, 0x89, 0x8a], INDEX); // mov [rdx + index], rcx
        code.state(&[0x0f, 0x29, 0x82], XMM0); // movaps [rdx + xmm0], xmm0
    }
    if target.is_gpr() {
        code.put(&[0x48, 0x89, 0x07]); // mov [rdi], rax
    } else if target.is_xmm() && !shape.flags_out {
        code.put(&[0x0f, 0x29, 0x0f]); // movaps [rdi], xmm1
    } else if target.is_mm() {
        code.put(&[0x0f, 0x7f, 0x0f]); // movq [rdi], mm1
    }
    if shape.flags_out {
        code.put(&[0x9c, 0x58]); // pushfq; pop rax
    }
    if shape.float {
        code.state(&[0x0f, 0xae, 0x9a], MXCSR); // stmxcsr [rdx + guest]
        code.state(&[0x44, 0x33, 0x82], MXCSR); // xor r8d, [rdx + guest]
        code.put(&[0x41, 0xf7, 0xc0, 0xc0, 0xff, 0, 0]); // test r8d, 0xffc0
        code.put(&[0x74, 7]); // jz past
        code.state(&[0x0f, 0xae, 0x92], HOST_MXCSR); // ldmxcsr [rdx + host]
    }
    if target.is_mm() || source.is_mm() {
        code.put(&[0x0f, 0x77]); // emms
    }
    code.put(&[0xc3]); // ret
}
