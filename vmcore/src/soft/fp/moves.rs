//! Moves between MMX and SSE registers, memory and general-purpose registers.

use iced_x86::{Code, Instruction, OpKind};

use crate::soft::cpu::op::{Flow, Handler, Op, Selected};
use crate::soft::cpu::word::Word;
use crate::soft::cpu::{Cpu, RDI};

/// The handler of a move.
pub(super) fn select(i: &Instruction) -> Option<Selected> {
    let memory = i.op0_kind() == OpKind::Memory || i.op_count() > 1 && i.op1_kind() == OpKind::Memory;
    let form = |register: Handler, in_memory: Handler| if memory { in_memory } else { register };
    let run: Handler = match i.code() {
        Code::Movaps_xmm_xmmm128 | Code::Movapd_xmm_xmmm128 | Code::Movdqa_xmm_xmmm128 => {
            form(copy, load::<true>)
        }
        Code::Movups_xmm_xmmm128 | Code::Movupd_xmm_xmmm128 | Code::Movdqu_xmm_xmmm128 => {
            form(copy, load::<false>)
        }
        Code::Lddqu_xmm_m128 => load::<false>,
        Code::Movntdqa_xmm_m128 => load::<true>,
        Code::Movaps_xmmm128_xmm | Code::Movapd_xmmm128_xmm | Code::Movdqa_xmmm128_xmm => {
            form(copy, store::<true>)
        }
        Code::Movups_xmmm128_xmm | Code::Movupd_xmmm128_xmm | Code::Movdqu_xmmm128_xmm => {
            form(copy, store::<false>)
        }
        Code::Movntps_m128_xmm | Code::Movntpd_m128_xmm | Code::Movntdq_m128_xmm => store::<true>,
        Code::Movq_xmm_xmmm64 | Code::Movq_xmmm64_xmm if !memory => copy_low,
        Code::Movq_xmm_xmmm64 | Code::Movsd_xmm_xmmm64 if memory => load_low::<u64>,
        Code::Movss_xmm_xmmm32 if memory => load_low::<u32>,
        Code::Movss_xmm_xmmm32 | Code::Movss_xmmm32_xmm if !memory => merge::<0xffff_ffff>,
        Code::Movsd_xmm_xmmm64 | Code::Movsd_xmmm64_xmm if !memory => merge::<{ u64::MAX }>,
        Code::Movq_xmmm64_xmm | Code::Movsd_xmmm64_xmm | Code::Movlps_m64_xmm | Code::Movlpd_m64_xmm => {
            store_half::<u64, 0>
        }
        Code::Movss_xmmm32_xmm => store_half::<u32, 0>,
        Code::Movhps_m64_xmm | Code::Movhpd_m64_xmm => store_half::<u64, 1>,
        Code::Movlps_xmm_m64 | Code::Movlpd_xmm_m64 => load_half::<0>,
        Code::Movhps_xmm_m64 | Code::Movhpd_xmm_m64 => load_half::<1>,
        Code::Movd_xmm_rm32 => form(from_general::<u32>, load_low::<u32>),
        Code::Movq_xmm_rm64 => form(from_general::<u64>, load_low::<u64>),
        Code::Movd_rm32_xmm => form(to_general::<u32>, store_half::<u32, 0>),
        Code::Movq_rm64_xmm => form(to_general::<u64>, store_half::<u64, 0>),
        Code::Movq_mm_mmm64 if memory => mmx_load::<u64>,
        Code::Movd_mm_rm32 if memory => mmx_load::<u32>,
        Code::Movq_mm_rm64 if memory => mmx_load::<u64>,
        Code::Movq_mmm64_mm | Code::Movq_rm64_mm | Code::Movntq_m64_mm if memory => mmx_store::<u64>,
        Code::Movd_rm32_mm if memory => mmx_store::<u32>,
        Code::Movnti_m32_r32 => store_general::<u32>,
        Code::Movnti_m64_r64 => store_general::<u64>,
        Code::Maskmovdqu_rDI_xmm_xmm => masked_store,
        Code::Maskmovq_rDI_mm_mm => mmx_masked_store,
        Code::Emms => emms,
        _ => return None,
    };
    Some(Selected::plain(run))
}

fn copy(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse()?;
    let value = cpu.fp.xmm(op.src);
    cpu.fp.set_xmm(op.dst, value);
    cpu.go_on(op)
}

fn load<const ALIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse()?;
    let at = cpu.vector_address(op, ALIGNED, false)?;
    let Some(value) = cpu.load_vector_fast(at) else { return load_slow(cpu, op, at) };
    cpu.fp.set_xmm(op.dst, value);
    cpu.go_on(op)
}

#[cold]
fn load_slow(cpu: &mut Cpu, op: &Op, at: u64) -> Flow {
    let value = cpu.load_vector(at)?;
    cpu.fp.set_xmm(op.dst, value);
    Ok(())
}

fn store<const ALIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse()?;
    let at = cpu.vector_address(op, ALIGNED, true)?;
    if !cpu.store_vector_fast(at, cpu.fp.xmm(op.dst)) {
        return cpu.store_vector(at, cpu.fp.xmm(op.dst));
    }
    cpu.go_on(op)
}

/// The low part from memory, zeros above.
fn load_low<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse()?;
    let value = cpu.load_operand::<W>(op)?;
    cpu.fp.set_xmm_words(op.dst, [value.zext(), 0]);
    cpu.go_on(op)
}

fn copy_low(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse()?;
    let value = cpu.fp.xmm_words(op.src);
    cpu.fp.set_xmm_words(op.dst, [value[0], 0]);
    cpu.go_on(op)
}

/// The bits of `MASK` from the source, the others stay.
fn merge<const MASK: u64>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse()?;
    let (source, target) = (cpu.fp.xmm_words(op.src), cpu.fp.xmm_words(op.dst));
    cpu.fp.set_xmm_words(op.dst, [source[0] & MASK | target[0] & !MASK, target[1]]);
    cpu.go_on(op)
}

fn load_half<const HALF: usize>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse()?;
    let value = cpu.load_operand::<u64>(op)?;
    let mut both = cpu.fp.xmm_words(op.dst);
    both[HALF] = value;
    cpu.fp.set_xmm_words(op.dst, both);
    cpu.go_on(op)
}

/// The low `W` of a half to memory.
fn store_half<W: Word, const HALF: usize>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse()?;
    let value = W::cut(cpu.fp.xmm_words(op.dst)[HALF]);
    cpu.store_operand(op, value)?;
    cpu.go_on(op)
}

fn from_general<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse()?;
    let value = cpu.reg::<W>(op.src).zext();
    cpu.fp.set_xmm_words(op.dst, [value, 0]);
    cpu.go_on(op)
}

fn to_general<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse()?;
    let value = W::cut(cpu.fp.xmm_words(op.src)[0]);
    cpu.set_reg(op.dst, value);
    cpu.go_on(op)
}

fn store_general<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = cpu.reg::<W>(op.dst);
    cpu.store_operand(op, value)
}

fn mmx_load<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.mmx()?;
    let value = cpu.load_operand::<W>(op)?.zext();
    cpu.fp.enter_mmx();
    cpu.fp.set_mm(op.dst, value);
    Ok(())
}

fn mmx_store<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.mmx()?;
    let value = W::cut(cpu.fp.mm(op.dst));
    cpu.store_operand(op, value)?;
    cpu.fp.enter_mmx();
    Ok(())
}

fn emms(cpu: &mut Cpu, _: &Op) -> Flow {
    cpu.mmx()?;
    cpu.fp.set_top(0);
    cpu.fp.ftw = 0;
    Ok(())
}

/// MASKMOVDQU: the bytes whose mask byte has its top bit set.
fn masked_store(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse()?;
    let (data, mask) = (cpu.fp.xmm_words(op.dst), cpu.fp.xmm_words(op.src));
    store_bytes_masked(cpu, op, data, mask, 16)
}

fn mmx_masked_store(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.mmx()?;
    let (data, mask) = (cpu.fp.mm(op.dst), cpu.fp.mm(op.src));
    store_bytes_masked(cpu, op, [data, 0], [mask, 0], 8)?;
    cpu.fp.enter_mmx();
    Ok(())
}

/// Only the bytes to be written fault; all are checked before the first is.
fn store_bytes_masked(cpu: &mut Cpu, op: &Op, data: [u64; 2], mask: [u64; 2], size: usize) -> Flow {
    let byte = |words: [u64; 2], n: usize| words[n / 8].to_le_bytes()[n % 8];
    let wanted = |n: &usize| byte(mask, *n) & 0x80 != 0;
    let (Some(first), Some(last)) = ((0..size).find(wanted), (0..size).rfind(wanted)) else { return Ok(()) };
    let start = u64::MAX >> (op.ashift & 63) & cpu.r64(RDI).wrapping_add(first as u64);
    let len = (last - first + 1) as u64;
    let at = cpu.linear(op, op.seg, start, len, true)?;
    cpu.check_write(at, len)?;
    for n in (first..=last).filter(wanted) {
        cpu.store(cpu.after(at, (n - first) as u64), byte(data, n))?;
    }
    Ok(())
}
