//! Thunks for x87 instructions: on the guest's whole state, and quick ones on copies of one or two
//! operands.

use iced_x86::{Code as Encoding, Instruction, MemoryOperand, Register};

use super::state::FpState;
use super::thunk::{Code, HOST_MXCSR, Shape, encode, offset};

/// Distance of an instruction's quick thunk from its other one, in bytes.
pub(super) const QUICK: usize = 96;

const FCW: [u8; 4] = offset(std::mem::offset_of!(FpState, fcw));
const FSW: [u8; 4] = offset(std::mem::offset_of!(FpState, fsw));

/// What a quick thunk runs, and how it uses its operands: `target` is an 80-bit value, `source`
/// another or the operand in memory. It returns FSW, and RFLAGS above it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Quick {
    /// Changes `target`.
    Change(Encoding),
    /// Changes `target` by the operand in memory.
    ChangeByMemory(Encoding),
    /// Changes `target`, which is ST(0), by `source`.
    Both(Encoding),
    /// Changes `target` by `source`, which is ST(0).
    Reverse(Encoding),
    /// Compares `target`, which is ST(0), to `source`.
    Compare(Encoding),
    /// Compares `target` to the operand in memory.
    CompareMemory(Encoding),
    /// Loads a constant into `target`.
    Push(Encoding),
    /// Loads the operand in memory into `target`.
    PushMemory(Encoding),
    /// Stores `target` to the operand in memory, and leaves it on the host's stack.
    Store(Encoding),
    /// The same with an instruction that pops.
    StorePop(Encoding),
}

/// RDI: `target`, RSI: `source` or the memory operand, RDX: the state.
pub(super) fn generate(code: &mut Code, body: &[u8], shape: Shape) -> Option<()> {
    generate_whole(code, body, shape);
    if let Some(quick) = shape.quick {
        debug_assert!(code.0.len() <= QUICK);
        code.0.resize(QUICK, 0xcc);
        generate_quick(code, quick, shape)?;
    }
    Some(())
}

/// An instruction on the whole state. It may make an exception pending that the guest has not masked:
/// nothing on the way to FNINIT, which drops it on the host, looks at it.
fn generate_whole(code: &mut Code, body: &[u8], shape: Shape) {
    code.state(&[0x0f, 0xae, 0x9a], HOST_MXCSR); // stmxcsr [rdx + host]
    code.put(&[0x48, 0x83, 0xec, 0x18]); // sub rsp, 24
    code.put(&[0xd9, 0x3c, 0x24]); // fnstcw [rsp]
    code.put(&[0x48, 0x0f, 0xae, 0x0a]); // fxrstor64 [rdx]
    if shape.flags_in {
        code.put(&[0xff, 0x36, 0x9d]); // push [rsi]; popfq
    }
    code.put(body);
    if shape.flags_out {
        code.put(&[0x9c, 0x58]); // pushfq; pop rax
    }
    code.put(&[0x48, 0x0f, 0xae, 0x02]); // fxsave64 [rdx]
    code.put(&[0xdb, 0xe3]); // fninit
    code.put(&[0xd9, 0x2c, 0x24]); // fldcw [rsp]
    code.put(&[0x48, 0x83, 0xc4, 0x18]); // add rsp, 24
    code.state(&[0x0f, 0xae, 0x92], HOST_MXCSR); // ldmxcsr [rdx + host]
    code.put(&[0xc3]); // ret
}

/// The guest must have all exceptions masked. The host's exception flags afterwards are the callee's
/// to change; before the instruction there must be none that the guest has not.
fn generate_quick(code: &mut Code, quick: Quick, shape: Shape) -> Option<()> {
    let memory = |encoding| Instruction::with1(encoding, MemoryOperand::with_base(Register::RSI));
    let stack = |encoding, a, b| Instruction::with2(encoding, a, b);
    let (st0, st1) = (Register::ST0, Register::ST1);
    let load_target: &[u8] = &[0xdb, 0x2f]; // fld tbyte [rdi]
    let load_source: &[u8] = &[0xdb, 0x2e]; // fld tbyte [rsi]
    let store_target: &[u8] = &[0xdb, 0x3f]; // fstp tbyte [rdi]
    let drop: &[u8] = &[0xdd, 0xd8]; // fstp st0
    let (loads, instruction, stores): (&[&[u8]], _, &[&[u8]]) = match quick {
        Quick::Change(e) => (&[load_target], Instruction::with(e), &[store_target]),
        Quick::ChangeByMemory(e) => (&[load_target], memory(e).ok()?, &[store_target]),
        Quick::Both(e) => (&[load_source, load_target], stack(e, st0, st1).ok()?, &[store_target, drop]),
        Quick::Reverse(e) => (&[load_target, load_source], stack(e, st1, st0).ok()?, &[drop, store_target]),
        Quick::Compare(e) => (&[load_source, load_target], stack(e, st0, st1).ok()?, &[drop, drop]),
        Quick::CompareMemory(e) => (&[load_target], memory(e).ok()?, &[drop]),
        Quick::Push(e) => (&[], Instruction::with(e), &[store_target]),
        Quick::PushMemory(e) => (&[], memory(e).ok()?, &[store_target]),
        Quick::Store(e) => (&[load_target], memory(e).ok()?, &[drop]),
        Quick::StorePop(e) => (&[load_target], memory(e).ok()?, &[]),
    };
    code.put(&[0xdf, 0xe0]); // fnstsw ax
    code.state(&[0x44, 0x0f, 0xb7, 0x82], FSW); // movzx r8d, word [rdx + fsw]
    code.put(&[0x41, 0xf7, 0xd0]); // not r8d
    code.put(&[0x44, 0x21, 0xc0]); // and eax, r8d
    code.put(&[0xa8, 0x7f]); // test al, 0x7f
    code.put(&[0x74, 2]); // jz past
    code.put(&[0xdb, 0xe2]); // fnclex
    code.put(&[0x50]); // push rax
    code.put(&[0xd9, 0x3c, 0x24]); // fnstcw [rsp]
    code.put(&[0x44, 0x0f, 0xb7, 0x0c, 0x24]); // movzx r9d, word [rsp]
    code.state(&[0x66, 0x44, 0x3b, 0x8a], FCW); // cmp r9w, [rdx + fcw]
    code.put(&[0x74, 6]); // je past
    code.state(&[0xd9, 0xaa], FCW); // fldcw [rdx + fcw]
    loads.iter().for_each(|part| code.put(part));
    code.put(&encode(&instruction)?);
    code.put(&[0xdf, 0xe0]); // fnstsw ax
    if shape.flags_out {
        code.put(&[0x9c, 0x41, 0x58]); // pushfq; pop r8
    }
    stores.iter().for_each(|part| code.put(part));
    code.put(&[0x0f, 0xb7, 0xc0]); // movzx eax, ax
    if shape.flags_out {
        code.put(&[0x49, 0xc1, 0xe0, 16]); // shl r8, 16
        code.put(&[0x4c, 0x09, 0xc0]); // or rax, r8
    }
    code.state(&[0x66, 0x44, 0x3b, 0x8a], FCW); // cmp r9w, [rdx + fcw]
    code.put(&[0x74, 3]); // je past
    code.put(&[0xd9, 0x2c, 0x24]); // fldcw [rsp]
    code.put(&[0x59]); // pop rcx
    code.put(&[0xc3]); // ret
    Some(())
}
