//! What computes nothing: NOP, hints, fences, cache control; and BOUND, which only checks.

use std::sync::atomic::{Ordering, fence};

use iced_x86::{Instruction, Mnemonic};

use super::size_of_operand;
use crate::soft::cpu::op::{FlagUse, Flow, Handler, Op, Selected};
use crate::soft::cpu::word::Word;
use crate::soft::cpu::{Cpu, vector};

fn nop(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.go_on(op)
}

fn pause(_: &mut Cpu, _: &Op) -> Flow {
    std::hint::spin_loop();
    Ok(())
}

fn full_fence(_: &mut Cpu, _: &Op) -> Flow {
    fence(Ordering::SeqCst);
    Ok(())
}

/// LFENCE and SFENCE: guest accesses are ordinary ones of the host, which only the compiler and
/// host processors weaker than x86 could move.
fn ordering_fence(_: &mut Cpu, _: &Op) -> Flow {
    fence(Ordering::AcqRel);
    Ok(())
}

/// CLFLUSH and its relatives: the caches are the host's, but the address must be good.
fn flush_line(cpu: &mut Cpu, op: &Op) -> Flow {
    let at = cpu.address(op, 1, false)?;
    cpu.check_read(at, 1)
}

fn bound<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let at = cpu.address(op, 2 * W::SIZE, false)?;
    let low = cpu.load::<W>(at)?.sext().cast_signed();
    let high = cpu.load::<W>(at.wrapping_add(W::SIZE))?.sext().cast_signed();
    let index = cpu.reg::<W>(op.dst).sext().cast_signed();
    if (low..=high).contains(&index) { Ok(()) } else { Err(cpu.raise(vector::BR, None)) }
}

pub(super) fn select(i: &Instruction) -> Option<Selected> {
    let handler: Handler = match i.mnemonic() {
        // RDSSP does nothing where there is no shadow stack.
        Mnemonic::Nop
        | Mnemonic::Reservednop
        | Mnemonic::Endbr32
        | Mnemonic::Endbr64
        | Mnemonic::Rdsspd
        | Mnemonic::Rdsspq
        | Mnemonic::Cldemote
        | Mnemonic::Prefetch
        | Mnemonic::Prefetchw
        | Mnemonic::Prefetchwt1
        | Mnemonic::Prefetchnta
        | Mnemonic::Prefetcht0
        | Mnemonic::Prefetcht1
        | Mnemonic::Prefetcht2
        | Mnemonic::Prefetchit0
        | Mnemonic::Prefetchit1 => return Some(Selected::flagged(nop, FlagUse::Ignores)),
        Mnemonic::Pause => pause,
        Mnemonic::Mfence => full_fence,
        Mnemonic::Lfence | Mnemonic::Sfence => ordering_fence,
        Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb => flush_line,
        Mnemonic::Bound if size_of_operand(i, 0) == 2 => bound::<u16>,
        Mnemonic::Bound => bound::<u32>,
        _ => return None,
    };
    Some(Selected::plain(handler))
}
