//! Packed floating-point arithmetic, computed here under the conditions of `float`: those that can set
//! no flags. A few integer comparisons find that out.
#![expect(unsafe_code, reason = "vector intrinsics, which SSE2 makes sound")]

use std::arch::x86_64::*;

use iced_x86::{Code, Instruction, OpKind};

use super::float::usual;
use super::vector;
use crate::soft::cpu::Cpu;
use crate::soft::cpu::op::{Flow, Handler, Op};

/// Largest magnitude of a denormal and smallest of an infinity, in the upper 32 bits of a number.
struct Limits {
    denormal: i32,
    infinity: i32,
}

const SINGLE: Limits = Limits { denormal: 0x7f_ffff, infinity: 0x7f80_0000 };
const DOUBLE: Limits = Limits { denormal: 0xf_ffff, infinity: 0x7ff0_0000 };

/// Lanes that say something of a vector of doubles: the upper halves.
const UPPER: i32 = 0b1010;
const ALL: i32 = 0b1111;

/// One bit for each 32-bit lane whose number is above `low` and below infinity in magnitude.
#[inline]
#[target_feature(enable = "sse2")]
fn between(value: __m128i, low: i32, limits: &Limits) -> i32 {
    let magnitude = _mm_and_si128(value, _mm_set1_epi32(i32::MAX));
    let large = _mm_cmpgt_epi32(magnitude, _mm_set1_epi32(low));
    let small = _mm_cmplt_epi32(magnitude, _mm_set1_epi32(limits.infinity));
    _mm_movemask_ps(_mm_castsi128_ps(_mm_and_si128(large, small)))
}

/// One bit for each 32-bit lane that is zero, but for its sign where that is in `signs`.
#[inline]
#[target_feature(enable = "sse2")]
fn zeros(value: __m128i, signs: __m128i) -> i32 {
    let zero = _mm_cmpeq_epi32(_mm_andnot_si128(signs, value), _mm_setzero_si128());
    _mm_movemask_ps(_mm_castsi128_ps(zero))
}

/// An operation on all lanes. `None` where one might set a flag.
trait Packed {
    /// # Safety
    /// The CPU has SSE2, as every x86-64 CPU.
    unsafe fn apply(a: __m128i, b: __m128i) -> Option<__m128i>;
}

/// All lanes are normal or zero.
#[inline]
#[target_feature(enable = "sse2")]
fn plain_singles(value: __m128i) -> bool {
    let signs = _mm_set1_epi32(i32::MIN);
    between(value, SINGLE.denormal, &SINGLE) | zeros(value, signs) == ALL
}

#[inline]
#[target_feature(enable = "sse2")]
fn plain_doubles(value: __m128i) -> bool {
    let signs = _mm_set_epi32(i32::MIN, 0, i32::MIN, 0);
    let zero = zeros(value, signs);
    // Both halves of a number must be.
    (between(value, DOUBLE.denormal, &DOUBLE) | zero & zero << 1) & UPPER == UPPER
}

macro_rules! packed {
    ($($name:ident, $operation:ident, $cast:ident, $back:ident, |$a:ident, $b:ident, $result:ident| $fine:expr;)*) => { $(
        struct $name;
        impl Packed for $name {
            #[inline]
            #[target_feature(enable = "sse2")]
            unsafe fn apply($a: __m128i, $b: __m128i) -> Option<__m128i> {
                let $result = $back($operation($cast($a), $cast($b)));
                ($fine).then_some($result)
            }
        }
    )* };
}

/// All lanes are normal, and greater than the smallest normal number, which may be a rounded denormal.
#[inline]
#[target_feature(enable = "sse2")]
fn well_above_singles(value: __m128i) -> bool {
    between(value, SINGLE.denormal + 1, &SINGLE) == ALL
}

#[inline]
#[target_feature(enable = "sse2")]
fn well_above_doubles(value: __m128i) -> bool {
    between(value, DOUBLE.denormal + 1, &DOUBLE) & UPPER == UPPER
}

packed! {
    AddSingles, _mm_add_ps, _mm_castsi128_ps, _mm_castps_si128,
        |a, b, r| plain_singles(a) && plain_singles(b) && plain_singles(r);
    SubtractSingles, _mm_sub_ps, _mm_castsi128_ps, _mm_castps_si128,
        |a, b, r| plain_singles(a) && plain_singles(b) && plain_singles(r);
    MultiplySingles, _mm_mul_ps, _mm_castsi128_ps, _mm_castps_si128,
        |a, b, r| plain_singles(a) && plain_singles(b) && well_above_singles(r);
    DivideSingles, _mm_div_ps, _mm_castsi128_ps, _mm_castps_si128,
        |a, b, r| plain_singles(a) && plain_singles(b) && well_above_singles(r);
    AddDoubles, _mm_add_pd, _mm_castsi128_pd, _mm_castpd_si128,
        |a, b, r| plain_doubles(a) && plain_doubles(b) && plain_doubles(r);
    SubtractDoubles, _mm_sub_pd, _mm_castsi128_pd, _mm_castpd_si128,
        |a, b, r| plain_doubles(a) && plain_doubles(b) && plain_doubles(r);
    MultiplyDoubles, _mm_mul_pd, _mm_castsi128_pd, _mm_castpd_si128,
        |a, b, r| plain_doubles(a) && plain_doubles(b) && well_above_doubles(r);
    DivideDoubles, _mm_div_pd, _mm_castsi128_pd, _mm_castpd_si128,
        |a, b, r| plain_doubles(a) && plain_doubles(b) && well_above_doubles(r);
}

fn registers<P: Packed>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse()?;
    let b = cpu.fp.xmm(op.src);
    compute::<P>(cpu, op, b)
}

fn with_memory<P: Packed>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse()?;
    let at = cpu.vector_address(op, true, false)?;
    let Some(b) = cpu.load_vector_fast(at) else { return with_memory_slow::<P>(cpu, op, at) };
    compute::<P>(cpu, op, b)
}

#[cold]
fn with_memory_slow<P: Packed>(cpu: &mut Cpu, op: &Op, at: u64) -> Flow {
    let b = cpu.load_vector(at)?;
    compute::<P>(cpu, op, b)
}

#[inline(always)]
fn compute<P: Packed>(cpu: &mut Cpu, op: &Op, b: __m128i) -> Flow {
    if usual(cpu) {
        // SAFETY: every x86-64 CPU has SSE2.
        let result = unsafe { P::apply(cpu.fp.xmm(op.dst), b) };
        if let Some(result) = result {
            cpu.fp.set_xmm(op.dst, result);
            return cpu.go_on(op);
        }
    }
    vector::operation(cpu, op, b)
}

fn both<P: Packed>() -> [Handler; 2] {
    [registers::<P>, with_memory::<P>]
}

/// The handler that computes here, where there is one.
pub(super) fn select(i: &Instruction) -> Option<Handler> {
    let [register, memory] = match i.code() {
        Code::Addps_xmm_xmmm128 => both::<AddSingles>(),
        Code::Subps_xmm_xmmm128 => both::<SubtractSingles>(),
        Code::Mulps_xmm_xmmm128 => both::<MultiplySingles>(),
        Code::Divps_xmm_xmmm128 => both::<DivideSingles>(),
        Code::Addpd_xmm_xmmm128 => both::<AddDoubles>(),
        Code::Subpd_xmm_xmmm128 => both::<SubtractDoubles>(),
        Code::Mulpd_xmm_xmmm128 => both::<MultiplyDoubles>(),
        Code::Divpd_xmm_xmmm128 => both::<DivideDoubles>(),
        _ => return None,
    };
    Some(if i.op1_kind() == OpKind::Memory { memory } else { register })
}
