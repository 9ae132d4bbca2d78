//! Integer and logical instructions on SSE registers that compile to one instruction of every x86-64
//! host (SSE2), so that they need no thunk.
#![expect(unsafe_code, reason = "vector intrinsics, which SSE2 makes sound")]

use std::arch::x86_64::*;

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::soft::cpu::Cpu;
use crate::soft::cpu::op::{Flow, Handler, Op, Selected};

/// An operation on two vectors.
trait Lanes {
    fn apply(a: __m128i, b: __m128i) -> __m128i;
}

fn registers<L: Lanes>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse()?;
    let result = L::apply(cpu.fp.xmm(op.dst), cpu.fp.xmm(op.src));
    cpu.fp.set_xmm(op.dst, result);
    cpu.go_on(op)
}

fn with_memory<L: Lanes>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse()?;
    let at = cpu.vector_address(op, true, false)?;
    let Some(value) = cpu.load_vector_fast(at) else { return with_memory_slow::<L>(cpu, op, at) };
    let result = L::apply(cpu.fp.xmm(op.dst), value);
    cpu.fp.set_xmm(op.dst, result);
    cpu.go_on(op)
}

#[cold]
fn with_memory_slow<L: Lanes>(cpu: &mut Cpu, op: &Op, at: u64) -> Flow {
    let value = cpu.load_vector(at)?;
    let result = L::apply(cpu.fp.xmm(op.dst), value);
    cpu.fp.set_xmm(op.dst, result);
    Ok(())
}

/// PMOVMSKB.
fn byte_mask(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse()?;
    // SAFETY: every x86-64 CPU has SSE2.
    let mask = unsafe { _mm_movemask_epi8(cpu.fp.xmm(op.src)) };
    cpu.set_r64(op.dst.into(), u64::from(mask.cast_unsigned()));
    cpu.go_on(op)
}

macro_rules! lanes {
    ($($mnemonic:ident $(| $other:ident)* => $operation:expr;)*) => {
        /// Both forms of the handler for an SSE instruction.
        fn handlers(mnemonic: Mnemonic) -> Option<[Handler; 2]> {
            match mnemonic {
                $(Mnemonic::$mnemonic $(| Mnemonic::$other)* => {
                    struct $mnemonic;
                    impl Lanes for $mnemonic {
                        #[inline(always)]
                        fn apply(a: __m128i, b: __m128i) -> __m128i {
                            // SAFETY: the operation needs SSE2, which every x86-64 CPU has.
                            unsafe { $operation(a, b) }
                        }
                    }
                    Some([registers::<$mnemonic>, with_memory::<$mnemonic>])
                })*
                _ => None,
            }
        }
    };
}

lanes! {
    Pand | Andps | Andpd => _mm_and_si128;
    Pandn | Andnps | Andnpd => _mm_andnot_si128;
    Por | Orps | Orpd => _mm_or_si128;
    Pxor | Xorps | Xorpd => _mm_xor_si128;
    Paddb => _mm_add_epi8;
    Paddw => _mm_add_epi16;
    Paddd => _mm_add_epi32;
    Paddq => _mm_add_epi64;
    Psubb => _mm_sub_epi8;
    Psubw => _mm_sub_epi16;
    Psubd => _mm_sub_epi32;
    Psubq => _mm_sub_epi64;
    Pcmpeqb => _mm_cmpeq_epi8;
    Pcmpeqw => _mm_cmpeq_epi16;
    Pcmpeqd => _mm_cmpeq_epi32;
    Pcmpgtb => _mm_cmpgt_epi8;
    Pcmpgtw => _mm_cmpgt_epi16;
    Pcmpgtd => _mm_cmpgt_epi32;
    Pminub => _mm_min_epu8;
    Pmaxub => _mm_max_epu8;
    Pminsw => _mm_min_epi16;
    Pmaxsw => _mm_max_epi16;
    Pmullw => _mm_mullo_epi16;
    Pmulhw => _mm_mulhi_epi16;
    Pmulhuw => _mm_mulhi_epu16;
    Pmuludq => _mm_mul_epu32;
    Pmaddwd => _mm_madd_epi16;
    Punpcklbw => _mm_unpacklo_epi8;
    Punpcklwd => _mm_unpacklo_epi16;
    Punpckldq => _mm_unpacklo_epi32;
    Punpcklqdq => _mm_unpacklo_epi64;
    Punpckhbw => _mm_unpackhi_epi8;
    Punpckhwd => _mm_unpackhi_epi16;
    Punpckhdq => _mm_unpackhi_epi32;
    Punpckhqdq => _mm_unpackhi_epi64;
    Packuswb => _mm_packus_epi16;
    Packsswb => _mm_packs_epi16;
    Packssdw => _mm_packs_epi32;
}

/// The handler of an integer or logical instruction on SSE registers.
pub(super) fn select(i: &Instruction) -> Option<Selected> {
    let xmm = |n: u32| i.op_kind(n) == OpKind::Register && i.op_register(n).is_xmm();
    if i.mnemonic() == Mnemonic::Pmovmskb && xmm(1) {
        return Some(Selected::plain(byte_mask));
    }
    if i.op_count() != 2 || !xmm(0) {
        return None;
    }
    let [register, memory] = handlers(i.mnemonic())?;
    match i.op1_kind() {
        OpKind::Register if xmm(1) => Some(Selected::plain(register)),
        OpKind::Memory => Some(Selected::plain(memory)),
        _ => None,
    }
}
