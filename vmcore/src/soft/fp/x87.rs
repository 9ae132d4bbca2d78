//! x87 instructions that run in thunks: everything but the control instructions.
//!
//! The thunk loads the guest's whole state with its own control word, masks included: the host leaves
//! an exception that is not masked pending, exactly as the guest's processor would, and the thunk drops
//! it on the host. So results, stack faults and all flags are the hardware's.
#![expect(unsafe_code, reason = "calls thunks with pointers into the FP state")]

use iced_x86::{Code, CpuidFeature, Instruction, Mnemonic, OpKind};

use super::state::Operand;
use super::thunk::{ARITHMETIC_FLAGS, Shape, Thunks, thunk};
use super::x87_quick;
use crate::soft::cpu::op::{Flow, Op, Selected};
use crate::soft::cpu::{CS, Cpu, DS};

/// In [`Op::extra`], above the 11 bits of the opcode: the memory operand's size in bytes.
pub(super) const SIZE_SHIFT: u32 = 16;

/// Exceptions after which a store to memory has not been done: invalid operation, overflow, underflow.
const NOT_STORED: u16 = 1 | 1 << 3 | 1 << 4;

/// The handler of an x87 instruction that is not a control instruction.
pub(super) fn select(i: &Instruction, bytes: &[u8], thunks: &Thunks) -> Option<Selected> {
    let fpu = |f: &CpuidFeature| matches!(f, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387);
    let features = i.cpuid_features();
    if !features.iter().any(fpu) || i.code() == Code::Wait {
        return None;
    }
    let conditional = features.contains(&CpuidFeature::CMOV) && i.rflags_read() & ARITHMETIC_FLAGS != 0;
    let quick = x87_quick::select(i);
    let shape = Shape {
        x87: true,
        quick: quick.and_then(|(quick, _)| quick),
        flags_out: i.rflags_modified() & ARITHMETIC_FLAGS != 0,
        flags_in: conditional,
        ..Shape::default()
    };
    let memory = i.op_count() > 0 && i.op0_kind() == OpKind::Memory
        || i.op_count() > 1 && i.op1_kind() == OpKind::Memory;
    let stores = matches!(
        i.mnemonic(),
        Mnemonic::Fst
            | Mnemonic::Fstp
            | Mnemonic::Fist
            | Mnemonic::Fistp
            | Mnemonic::Fisttp
            | Mnemonic::Fbstp
    );
    let at = thunks.get(i, shape)?;
    let size = if memory { u32::try_from(i.memory_size().size()).ok()? } else { 0 };
    let run = match (memory, stores) {
        _ if let Some((_, run)) = quick => run,
        (true, true) => store,
        (true, false) => load,
        _ if shape.flags_out => compare,
        _ if conditional => conditional_move,
        _ => registers,
    };
    Some(Selected::plain(run).with(size << SIZE_SHIFT | u32::from(opcode(bytes))).with_target(at))
}

/// What FOP holds: the low bits of the first byte behind the prefixes, and the second byte.
fn opcode(bytes: &[u8]) -> u16 {
    let escape = bytes.iter().position(|byte| byte & 0xf8 == 0xd8).unwrap_or(0);
    match bytes.get(escape..escape + 2) {
        Some(&[first, second]) => u16::from(first & 7) << 8 | u16::from(second),
        _ => 0,
    }
}

/// Runs the thunk with `Cpu::fp.source` as its memory operand. Returns RFLAGS.
#[inline(always)]
fn run(cpu: &mut Cpu, op: &Op) -> u64 {
    // SAFETY: `select` has put a thunk's address into `imm`, and the VM outlives its vCPUs.
    let thunk = unsafe { thunk(op.imm) };
    let source = (&raw mut cpu.fp.source).cast::<u8>();
    let pointers = (cpu.fp.fdp, cpu.fp.fds);
    cpu.fp.enter_stack_order();
    let flags = thunk(source, source, &raw mut *cpu.fp);
    cpu.fp.leave_stack_order();
    (cpu.fp.fdp, cpu.fp.fds) = pointers;
    flags
}

/// Notes the instruction as the last one, for environments.
#[inline(always)]
pub(super) fn note(cpu: &mut Cpu, op: &Op) {
    cpu.fp.fop = (op.extra & 0x7ff) as u16;
    cpu.fp.fip = cpu.next_rip(op).wrapping_sub(op.len.into());
    cpu.fp.fcs = cpu.segment(CS).selector;
}

/// The same for an instruction with a memory operand.
#[inline(always)]
pub(super) fn note_memory(cpu: &mut Cpu, op: &Op) {
    note(cpu, op);
    let segment = usize::from(op.seg);
    let segment = if segment < 6 { segment } else { DS };
    cpu.fp.fdp = cpu.offset(op);
    cpu.fp.fds = cpu.segment(segment).selector;
}

pub(super) fn registers(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.x87()?;
    run(cpu, op);
    note(cpu, op);
    Ok(())
}

/// FCOMI and its relatives.
pub(super) fn compare(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.x87()?;
    let flags = run(cpu, op);
    note(cpu, op);
    cpu.flags.set_bits(flags);
    Ok(())
}

/// FCMOVcc.
fn conditional_move(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.x87()?;
    cpu.fp.source = Operand([cpu.flags.bits() | 2, 0]);
    run(cpu, op);
    note(cpu, op);
    Ok(())
}

pub(super) fn load(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.x87()?;
    let size = u64::from(op.extra >> SIZE_SHIFT);
    let at = cpu.address(op, size, false)?;
    cpu.fp.source = Operand(cpu.load_part(at, size)?);
    run(cpu, op);
    note_memory(cpu, op);
    Ok(())
}

pub(super) fn store(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.x87()?;
    let size = u64::from(op.extra >> SIZE_SHIFT);
    let at = cpu.address(op, size, true)?;
    cpu.check_write(at, size)?;
    run(cpu, op);
    note_memory(cpu, op);
    if cpu.fp.fsw & !cpu.fp.fcw & NOT_STORED != 0 {
        return Ok(());
    }
    cpu.store_part(at, size, cpu.fp.source.0)
}
