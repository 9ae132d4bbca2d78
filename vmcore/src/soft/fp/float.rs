//! The most common scalar floating-point instructions of SSE2, computed here where that can set no
//! flags: the control bits of MXCSR are as after power-on (which are those that Rust's arithmetic runs
//! under), the operands are zero or normal, and so is the result, and its being inexact changes nothing
//! because MXCSR tells of an earlier inexact one already, as it does soon in every program. In every
//! other case the handler hands over to that of `vector`.
#![expect(clippy::cast_possible_truncation, reason = "conversions, of what has been found to fit")]

use iced_x86::{Code, Instruction, OpKind};

use super::state::{MXCSR_DEFAULT, MXCSR_MASK};
use super::vector;
use crate::soft::cpu::Cpu;
use crate::soft::cpu::flags::{CF, ZF};
use crate::soft::cpu::op::{Flow, Handler, Op, Stop};
use crate::soft::cpu::word::Word;

/// MXCSR's exception flags, and that of an inexact result.
const FLAGS: u32 = 0x3f;
const INEXACT: u32 = 0x20;

/// MXCSR is as after power-on, whatever has happened since.
#[inline(always)]
fn usual_control(cpu: &Cpu) -> bool {
    cpu.fp.mxcsr & MXCSR_MASK & !FLAGS == MXCSR_DEFAULT
}

/// The same, and inexact results have been seen.
#[inline(always)]
pub(super) fn usual(cpu: &Cpu) -> bool {
    cpu.fp.mxcsr & MXCSR_MASK & !(FLAGS & !INEXACT) == MXCSR_DEFAULT | INEXACT
}

/// A floating-point number as a register holds it.
trait Number: Copy + PartialOrd {
    type Bits: Word;
    /// The bits of the exponent, and its lowest.
    const EXPONENT: u64;
    const LOWEST: u64;
    fn from_bits(bits: Self::Bits) -> Self;
    fn bits(self) -> Self::Bits;

    fn add(self, other: Self) -> Self;
    fn subtract(self, other: Self) -> Self;
    fn multiply(self, other: Self) -> Self;
    fn divide(self, other: Self) -> Self;
    fn root(self) -> Self;
    /// Exactly the same in double precision.
    fn wide(self) -> f64;

    /// Neither zero, denormal, infinite nor NaN.
    #[inline(always)]
    fn normal(self) -> bool {
        let exponent = self.bits().zext() & Self::EXPONENT;
        exponent.wrapping_sub(Self::LOWEST) < Self::EXPONENT - Self::LOWEST
    }

    /// Normal, or zero.
    #[inline(always)]
    fn plain(self) -> bool {
        self.normal() || self.bits().zext() << (65 - Self::Bits::BITS) == 0
    }
}

macro_rules! number {
    ($float:ty, $bits:ty, $exponent:expr, $lowest:expr) => {
        impl Number for $float {
            type Bits = $bits;
            const EXPONENT: u64 = $exponent;
            const LOWEST: u64 = $lowest;
            #[inline(always)]
            fn from_bits(bits: $bits) -> Self {
                <$float>::from_bits(bits)
            }
            #[inline(always)]
            fn bits(self) -> $bits {
                self.to_bits()
            }
            #[inline(always)]
            fn add(self, other: Self) -> Self {
                self + other
            }
            #[inline(always)]
            fn subtract(self, other: Self) -> Self {
                self - other
            }
            #[inline(always)]
            fn multiply(self, other: Self) -> Self {
                self * other
            }
            #[inline(always)]
            fn divide(self, other: Self) -> Self {
                self / other
            }
            #[inline(always)]
            fn root(self) -> Self {
                self.sqrt()
            }
            #[inline(always)]
            fn wide(self) -> f64 {
                self.into()
            }
        }
    };
}

number!(f64, u64, 0x7ff0_0000_0000_0000, 0x10_0000_0000_0000);
number!(f32, u32, 0x7f80_0000, 0x80_0000);

/// An operation on two numbers. `None` where it might set a flag.
trait Arithmetic {
    fn apply<N: Number>(a: N, b: N) -> Option<N>;
}

struct Add;
impl Arithmetic for Add {
    #[inline(always)]
    fn apply<N: Number>(a: N, b: N) -> Option<N> {
        let result = a.add(b);
        // A zero is exact.
        (a.plain() && b.plain() && result.plain()).then_some(result)
    }
}

struct Subtract;
impl Arithmetic for Subtract {
    #[inline(always)]
    fn apply<N: Number>(a: N, b: N) -> Option<N> {
        let result = a.subtract(b);
        (a.plain() && b.plain() && result.plain()).then_some(result)
    }
}

struct Multiply;
impl Arithmetic for Multiply {
    #[inline(always)]
    fn apply<N: Number>(a: N, b: N) -> Option<N> {
        let result = a.multiply(b);
        // The smallest normal number may be a rounded denormal.
        let large = result.bits().zext() << (65 - N::Bits::BITS) != N::LOWEST << (65 - N::Bits::BITS);
        (a.normal() && b.normal() && result.normal() && large).then_some(result)
    }
}

struct Divide;
impl Arithmetic for Divide {
    #[inline(always)]
    fn apply<N: Number>(a: N, b: N) -> Option<N> {
        let result = a.divide(b);
        let large = result.bits().zext() << (65 - N::Bits::BITS) != N::LOWEST << (65 - N::Bits::BITS);
        (a.normal() && b.normal() && result.normal() && large).then_some(result)
    }
}

struct Root;
impl Arithmetic for Root {
    #[inline(always)]
    fn apply<N: Number>(_: N, b: N) -> Option<N> {
        let positive = b.bits().zext() >> (N::Bits::BITS - 1) == 0;
        (b.normal() && positive).then(|| b.root())
    }
}

/// The scalar in XMM register `n`.
#[inline(always)]
fn scalar<N: Number>(cpu: &Cpu, n: u8) -> N {
    N::from_bits(N::Bits::cut(cpu.fp.xmm_words(n)[0]))
}

/// Sets the scalar in XMM register `n`; the rest stays.
#[inline(always)]
fn set_scalar<N: Number>(cpu: &mut Cpu, n: u8, value: N) {
    let [low, high] = cpu.fp.xmm_words(n);
    let kept = if N::Bits::BITS == 64 { 0 } else { low >> 32 << 32 };
    cpu.fp.set_xmm_words(n, [kept | value.bits().zext(), high]);
}

/// The source operand.
#[inline(always)]
fn source<N: Number, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Result<N, Stop> {
    if MEMORY { Ok(N::from_bits(cpu.load_operand(op)?)) } else { Ok(scalar(cpu, op.src)) }
}

fn arithmetic<A: Arithmetic, N: Number, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse()?;
    let b = source::<N, MEMORY>(cpu, op)?;
    let a = scalar::<N>(cpu, op.dst);
    if usual(cpu)
        && let Some(result) = A::apply(a, b)
    {
        set_scalar(cpu, op.dst, result);
        return cpu.go_on(op);
    }
    vector::scalar_operation(cpu, op, b.bits().zext())
}

/// COMISD, UCOMISD and those for single precision: without NaNs and denormals they are the same.
fn compare<N: Number, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse()?;
    let b = source::<N, MEMORY>(cpu, op)?;
    let a = scalar::<N>(cpu, op.dst);
    if usual_control(cpu) && a.plain() && b.plain() {
        let below = if a < b { CF } else { 0 };
        cpu.flags.set_bits(if a == b { ZF } else { below });
        return cpu.go_on(op);
    }
    vector::scalar_comparison(cpu, op, b.bits().zext())
}

/// CVTSI2SD from 32 bits is exact.
fn from_int32<const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse()?;
    let value: u32 = if MEMORY { cpu.load_operand(op)? } else { cpu.reg(op.src) };
    set_scalar(cpu, op.dst, f64::from(value.cast_signed()));
    cpu.go_on(op)
}

/// CVTSI2SD from 64 bits, which small numbers make exact.
fn from_int64<const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse()?;
    let value: u64 = if MEMORY { cpu.load_operand(op)? } else { cpu.reg(op.src) };
    let exact = value.wrapping_add(1 << 53) <= 1 << 54;
    if exact || usual(cpu) {
        set_scalar(cpu, op.dst, value.cast_signed() as f64);
        return cpu.go_on(op);
    }
    vector::scalar_operation(cpu, op, value)
}

/// CVTTSD2SI and CVTTSS2SI, of what fits.
fn to_int<N: Number, W: Word, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse()?;
    let value = source::<N, MEMORY>(cpu, op)?;
    let wide = value.wide();
    // Half of the range: what is about its ends is for the other handler.
    let limit = if W::BITS == 64 { (1u64 << 62) as f64 } else { f64::from(1u32 << 30) };
    if usual(cpu) && wide.abs() < limit {
        let truncated = wide as i64;
        cpu.set_reg(op.dst, W::cut(truncated.cast_unsigned()));
        return cpu.go_on(op);
    }
    vector::scalar_conversion(cpu, op, value.bits().zext())
}

/// CVTSD2SS of what is normal before and after.
fn narrow<const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse()?;
    let value = source::<f64, MEMORY>(cpu, op)?;
    let result = value as f32;
    if usual(cpu) && value.plain() && result.normal() && result.abs() > f32::MIN_POSITIVE {
        set_scalar(cpu, op.dst, result);
        return cpu.go_on(op);
    }
    vector::scalar_operation(cpu, op, value.to_bits())
}

/// CVTSS2SD of a normal number is exact.
fn widen<const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse()?;
    let value = source::<f32, MEMORY>(cpu, op)?;
    if usual_control(cpu) && value.plain() {
        set_scalar(cpu, op.dst, f64::from(value));
        return cpu.go_on(op);
    }
    vector::scalar_operation(cpu, op, value.to_bits().into())
}

/// The handler that computes here, where there is one.
pub(super) fn select(i: &Instruction) -> Option<Handler> {
    let memory = i.op_count() > 1 && i.op1_kind() == OpKind::Memory;
    macro_rules! form {
        ($handler:ident $($parameter:ty),*) => {
            if memory { $handler::<$($parameter,)* true> } else { $handler::<$($parameter,)* false> }
        };
    }
    let handler: Handler = match i.code() {
        Code::Addsd_xmm_xmmm64 => form!(arithmetic Add, f64),
        Code::Addss_xmm_xmmm32 => form!(arithmetic Add, f32),
        Code::Subsd_xmm_xmmm64 => form!(arithmetic Subtract, f64),
        Code::Subss_xmm_xmmm32 => form!(arithmetic Subtract, f32),
        Code::Mulsd_xmm_xmmm64 => form!(arithmetic Multiply, f64),
        Code::Mulss_xmm_xmmm32 => form!(arithmetic Multiply, f32),
        Code::Divsd_xmm_xmmm64 => form!(arithmetic Divide, f64),
        Code::Divss_xmm_xmmm32 => form!(arithmetic Divide, f32),
        Code::Sqrtsd_xmm_xmmm64 => form!(arithmetic Root, f64),
        Code::Sqrtss_xmm_xmmm32 => form!(arithmetic Root, f32),
        Code::Comisd_xmm_xmmm64 | Code::Ucomisd_xmm_xmmm64 => form!(compare f64),
        Code::Comiss_xmm_xmmm32 | Code::Ucomiss_xmm_xmmm32 => form!(compare f32),
        Code::Cvtsi2sd_xmm_rm32 => form!(from_int32),
        Code::Cvtsi2sd_xmm_rm64 => form!(from_int64),
        Code::Cvttsd2si_r32_xmmm64 => form!(to_int f64, u32),
        Code::Cvttsd2si_r64_xmmm64 => form!(to_int f64, u64),
        Code::Cvttss2si_r32_xmmm32 => form!(to_int f32, u32),
        Code::Cvttss2si_r64_xmmm32 => form!(to_int f32, u64),
        Code::Cvtsd2ss_xmm_xmmm64 => form!(narrow),
        Code::Cvtss2sd_xmm_xmmm32 => form!(widen),
        _ => return None,
    };
    Some(handler)
}
