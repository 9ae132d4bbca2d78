//! MMX and SSE instructions that run in thunks.
#![expect(unsafe_code, reason = "calls thunks with pointers into the FP state")]

use std::arch::x86_64::__m128i;

use iced_x86::{CpuidFeature, Instruction, Mnemonic, OpKind};

use super::mxcsr::Results;
use super::state::{Operand, words};
use super::thunk::{ARITHMETIC_FLAGS, Shape, Thunks, thunk};
use super::{float, packed};
use crate::soft::cpu::op::{Flow, Op, Selected, Stop};
use crate::soft::cpu::{Cpu, RAX, RCX, RDX};

/// Where an operand is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    None,
    Xmm,
    Mmx,
    General,
    Memory,
}

impl Place {
    fn of(instruction: &Instruction, n: u32) -> Option<Self> {
        if n >= instruction.op_count() {
            return Some(Place::None);
        }
        Some(match instruction.op_kind(n) {
            OpKind::Register => match instruction.op_register(n) {
                r if r.is_xmm() => Place::Xmm,
                r if r.is_mm() => Place::Mmx,
                r if r.is_gpr32() || r.is_gpr64() => Place::General,
                _ => return None,
            },
            OpKind::Memory => Place::Memory,
            OpKind::Immediate8 => Place::None,
            _ => return None,
        })
    }

    fn from_bits(bits: u32) -> Self {
        match bits & 7 {
            1 => Place::Xmm,
            2 => Place::Mmx,
            3 => Place::General,
            4 => Place::Memory,
            _ => Place::None,
        }
    }
}

const ALIGNED: u32 = 1 << 6;
const FLOAT: u32 = 1 << 7;
const FLAGS: u32 = 1 << 8;
const STRING: u32 = 1 << 9;
const LONG_LENGTHS: u32 = 1 << 10;
const INDEX: u32 = 1 << 11;
const MMX: u32 = 1 << 12;
const SSE: u32 = 1 << 13;

/// What a handler must know of an instruction, packed into [`Op::extra`].
#[derive(Clone, Copy)]
struct Form(u32);

impl Form {
    fn target(self) -> Place {
        Place::from_bits(self.0)
    }
    fn source(self) -> Place {
        Place::from_bits(self.0 >> 3)
    }
    fn has(self, bit: u32) -> bool {
        self.0 & bit != 0
    }
    fn results(self) -> Results {
        match self.0 >> 16 & 7 {
            1 => Results::Singles,
            2 => Results::Single,
            3 => Results::Doubles,
            4 => Results::Double,
            _ => Results::None,
        }
    }
    /// Size of the memory operand in bytes.
    fn size(self) -> u64 {
        u64::from(self.0 >> 24)
    }
}

/// The handler of an MMX or SSE instruction that a thunk can run.
pub(super) fn select(i: &Instruction, thunks: &Thunks) -> Option<Selected> {
    let (target, source) = (Place::of(i, 0)?, Place::of(i, 1)?);
    let is = |place| target == place || source == place;
    // Memory to a general register: no vector register to tell them by.
    let scalar_to_integer = matches!(
        i.mnemonic(),
        Mnemonic::Cvtsd2si | Mnemonic::Cvtss2si | Mnemonic::Cvttsd2si | Mnemonic::Cvttss2si
    );
    if !is(Place::Xmm) && !is(Place::Mmx) && !scalar_to_integer {
        return None;
    }
    let results = float_results(i.mnemonic());
    let string = string_compare(i.mnemonic());
    let shape = Shape {
        float: results.is_some(),
        flags_out: i.rflags_modified() & ARITHMETIC_FLAGS != 0,
        xmm0: matches!(
            i.mnemonic(),
            Mnemonic::Blendvps | Mnemonic::Blendvpd | Mnemonic::Pblendvb | Mnemonic::Sha256rnds2
        ),
        string,
        ..Shape::default()
    };
    let at = thunks.get(i, shape)?;
    let size = if is(Place::Memory) { u32::try_from(i.memory_size().size()).ok()? } else { 0 };
    let flag = |set, bit| if set { bit } else { 0 };
    let form = target as u32
        | (source as u32) << 3
        | flag(size == 16 && !unaligned(i), ALIGNED)
        | flag(shape.float, FLOAT)
        | flag(shape.flags_out, FLAGS)
        | flag(string, STRING)
        | flag(matches!(i.mnemonic(), Mnemonic::Pcmpestri64 | Mnemonic::Pcmpestrm64), LONG_LENGTHS)
        | flag(
            matches!(i.mnemonic(), Mnemonic::Pcmpestri | Mnemonic::Pcmpestri64 | Mnemonic::Pcmpistri),
            INDEX,
        )
        | flag(is(Place::Mmx), MMX)
        | flag(is(Place::Xmm) || scalar_to_integer, SSE)
        | results.map_or(0, |results| results as u32) << 16
        | size << 24;
    let plain = !shape.flags_out && !string && target == Place::Xmm;
    let run = match (plain, source, shape.float, size) {
        _ if let Some(run) = float::select(i).or_else(|| packed::select(i)) => run,
        (true, Place::Xmm, false, _) => registers::<false>,
        (true, Place::Xmm, true, _) => registers::<true>,
        (true, Place::Memory, false, 16) if form & ALIGNED != 0 => with_memory::<false, 16>,
        (true, Place::Memory, true, 16) if form & ALIGNED != 0 => with_memory::<true, 16>,
        (true, Place::Memory, true, 8) => with_memory::<true, 8>,
        (true, Place::Memory, true, 4) => with_memory::<true, 4>,
        _ => general,
    };
    Some(Selected::plain(run).with(form).with_target(at))
}

/// PCMPESTRI and its relatives.
fn string_compare(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Pcmpestri
            | Mnemonic::Pcmpestri64
            | Mnemonic::Pcmpestrm
            | Mnemonic::Pcmpestrm64
            | Mnemonic::Pcmpistri
            | Mnemonic::Pcmpistrm
    )
}

/// Whether a 16-byte memory operand needs no alignment. (The manual wants it for SHA; AMD's processors
/// do not, and programs have been tested on those.)
fn unaligned(i: &Instruction) -> bool {
    string_compare(i.mnemonic()) || i.cpuid_features().contains(&CpuidFeature::SHA)
}

/// Of the instructions that use MXCSR: which results can underflow.
fn float_results(mnemonic: Mnemonic) -> Option<Results> {
    use Mnemonic::{
        Addpd, Addps, Addsd, Addss, Addsubpd, Addsubps, Cmppd, Cmpps, Cmpsd, Cmpss, Comisd, Comiss, Cvtdq2pd,
        Cvtdq2ps, Cvtpd2dq, Cvtpd2pi, Cvtpd2ps, Cvtpi2pd, Cvtpi2ps, Cvtps2dq, Cvtps2pd, Cvtps2pi, Cvtsd2si,
        Cvtsd2ss, Cvtsi2sd, Cvtsi2ss, Cvtss2sd, Cvtss2si, Cvttpd2dq, Cvttpd2pi, Cvttps2dq, Cvttps2pi,
        Cvttsd2si, Cvttss2si, Divpd, Divps, Divsd, Divss, Dppd, Dpps, Haddpd, Haddps, Hsubpd, Hsubps, Maxpd,
        Maxps, Maxsd, Maxss, Minpd, Minps, Minsd, Minss, Mulpd, Mulps, Mulsd, Mulss, Roundpd, Roundps,
        Roundsd, Roundss, Sqrtpd, Sqrtps, Sqrtsd, Sqrtss, Subpd, Subps, Subsd, Subss, Ucomisd, Ucomiss,
    };
    Some(match mnemonic {
        Addps | Subps | Mulps | Divps | Addsubps | Haddps | Hsubps | Dpps | Cvtpd2ps => Results::Singles,
        Addss | Subss | Mulss | Divss | Cvtsd2ss => Results::Single,
        Addpd | Subpd | Mulpd | Divpd | Addsubpd | Haddpd | Hsubpd | Dppd => Results::Doubles,
        Addsd | Subsd | Mulsd | Divsd => Results::Double,
        Cmppd | Cmpps | Cmpsd | Cmpss | Comisd | Comiss | Ucomisd | Ucomiss | Maxpd | Maxps | Maxsd
        | Maxss | Minpd | Minps | Minsd | Minss | Roundpd | Roundps | Roundsd | Roundss | Sqrtpd | Sqrtps
        | Sqrtsd | Sqrtss | Cvtdq2pd | Cvtdq2ps | Cvtpd2dq | Cvtpd2pi | Cvtpi2pd | Cvtpi2ps | Cvtps2dq
        | Cvtps2pd | Cvtps2pi | Cvtsd2si | Cvtsi2sd | Cvtsi2ss | Cvtss2sd | Cvtss2si | Cvttpd2dq
        | Cvttpd2pi | Cvttps2dq | Cvttps2pi | Cvttsd2si | Cvttss2si => Results::None,
        _ => return None,
    })
}

/// Pointers to XMM registers, to be used before anything else uses the state.
fn xmm_pointer(cpu: &mut Cpu, n: u8) -> *mut u8 {
    (&raw mut cpu.fp.xmm[usize::from(n & 15)]).cast()
}

/// `op xmm, xmm`.
fn registers<const FLOAT: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse()?;
    let source = xmm_pointer(cpu, op.src);
    call::<FLOAT>(cpu, op, source)
}

/// `op xmm, m`: on the guest's memory itself where it is plain memory within a page, else on a copy.
fn with_memory<const FLOAT: bool, const SIZE: u64>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse()?;
    let at = if SIZE == 16 { cpu.vector_address(op, true, false)? } else { cpu.address(op, SIZE, false)? };
    if let Some(source) = cpu.readable(at, SIZE) {
        return call::<FLOAT>(cpu, op, source);
    }
    cpu.fp.source = Operand(cpu.load_part(at, SIZE)?);
    let source = (&raw const cpu.fp.source).cast();
    call::<FLOAT>(cpu, op, source)
}

/// An instruction that uses MXCSR, on an XMM register and `value`.
#[cold]
pub(super) fn operation(cpu: &mut Cpu, op: &Op, value: __m128i) -> Flow {
    cpu.fp.source = Operand(words(value));
    let source = (&raw const cpu.fp.source).cast();
    call::<true>(cpu, op, source)
}

/// The same with a scalar.
#[cold]
pub(super) fn scalar_operation(cpu: &mut Cpu, op: &Op, value: u64) -> Flow {
    cpu.fp.source = Operand([value, 0]);
    let source = (&raw const cpu.fp.source).cast();
    call::<true>(cpu, op, source)
}

/// A conversion of a scalar to a general-purpose register.
#[cold]
pub(super) fn scalar_conversion(cpu: &mut Cpu, op: &Op, value: u64) -> Flow {
    cpu.fp.source = Operand([value, 0]);
    let (target, source) = ((&raw mut cpu.fp.target).cast(), (&raw const cpu.fp.source).cast());
    // SAFETY: as in `call`.
    unsafe { cpu.run_float(op.imm, target, source, || Results::None) }?;
    let result = cpu.fp.target.0[0];
    cpu.set_r64(op.dst.into(), result);
    Ok(())
}

/// COMISD and its relatives with the scalar `value`.
#[cold]
pub(super) fn scalar_comparison(cpu: &mut Cpu, op: &Op, value: u64) -> Flow {
    cpu.fp.source = Operand([value, 0]);
    let (target, source) = (xmm_pointer(cpu, op.dst), (&raw mut cpu.fp.source).cast());
    // SAFETY: as in `call`.
    let flags = unsafe { cpu.run_float(op.imm, target, source, || Results::None) }?;
    cpu.flags.set_bits(flags);
    Ok(())
}

#[inline(always)]
fn call<const FLOAT: bool>(cpu: &mut Cpu, op: &Op, source: *const u8) -> Flow {
    let target = xmm_pointer(cpu, op.dst);
    if FLOAT {
        // SAFETY: `select` has put a thunk's address into `imm`, and the VM outlives its vCPUs; the
        // operands are 16 bytes in the state, or as much of the guest's memory as the thunk reads.
        unsafe { cpu.run_float(op.imm, target, source, || Form(op.extra).results()) }?;
    } else {
        // SAFETY: as above.
        let thunk = unsafe { thunk(op.imm) };
        thunk(target, source, &raw mut *cpu.fp);
    }
    Ok(())
}

/// Any of the instructions.
fn general(cpu: &mut Cpu, op: &Op) -> Flow {
    let form = Form(op.extra);
    if form.has(SSE) {
        cpu.sse()?;
    }
    if form.has(MMX) {
        cpu.mmx()?;
    }
    let mut store_at = 0;
    // The register operand behind a memory operand is the first one.
    let mut source_register = op.src;
    if form.target() == Place::Memory {
        store_at = operand_address(cpu, op, form, true)?;
        cpu.check_write(store_at, form.size())?;
        source_register = op.dst;
    } else if form.source() == Place::Memory {
        let at = operand_address(cpu, op, form, false)?;
        cpu.fp.source = Operand(cpu.load_part(at, form.size())?);
    }
    if form.has(STRING) {
        return string(cpu, op, form);
    }
    if form.source() == Place::General {
        cpu.fp.source = Operand([cpu.r64(source_register.into()), 0]);
    }
    if form.has(MMX) {
        // Also where the instruction is about to raise #XM.
        cpu.fp.enter_mmx();
    }
    let source: *const u8 = match form.source() {
        Place::Xmm => xmm_pointer(cpu, source_register),
        Place::Mmx => (&raw const cpu.fp.st[usize::from(source_register & 7)]).cast(),
        _ => (&raw const cpu.fp.source).cast(),
    };
    let target: *mut u8 = match form.target() {
        Place::Xmm => xmm_pointer(cpu, op.dst),
        Place::Mmx => (&raw mut cpu.fp.st[usize::from(op.dst & 7)]).cast(),
        _ => (&raw mut cpu.fp.target).cast(),
    };
    let flags = if form.has(FLOAT) {
        // SAFETY: as in `call`.
        unsafe { cpu.run_float(op.imm, target, source, || form.results()) }?
    } else {
        // SAFETY: as in `call`.
        let thunk = unsafe { thunk(op.imm) };
        thunk(target, source, &raw mut *cpu.fp)
    };
    match form.target() {
        Place::Mmx => cpu.fp.st[usize::from(op.dst & 7)][1] = 0xffff,
        Place::General => cpu.set_r64(op.dst.into(), cpu.fp.target.0[0]),
        Place::Memory => cpu.store_part(store_at, form.size(), cpu.fp.target.0)?,
        Place::Xmm | Place::None => {}
    }
    if form.has(FLAGS) {
        cpu.flags.set_bits(flags);
    }
    Ok(())
}

fn operand_address(cpu: &mut Cpu, op: &Op, form: Form, write: bool) -> Result<u64, Stop> {
    if form.size() == 16 {
        return cpu.vector_address(op, form.has(ALIGNED), write);
    }
    cpu.address(op, form.size(), write)
}

/// PCMPESTRI, PCMPESTRM, PCMPISTRI, PCMPISTRM (SDM vol. 2B, 4.1).
fn string(cpu: &mut Cpu, op: &Op, form: Form) -> Flow {
    let mask = if form.has(LONG_LENGTHS) { u64::MAX } else { 0xffff_ffff };
    cpu.fp.lengths = [cpu.r64(RAX) & mask, cpu.r64(RDX) & mask];
    let target = xmm_pointer(cpu, op.dst);
    let source = if form.source() == Place::Memory {
        (&raw mut cpu.fp.source).cast()
    } else {
        xmm_pointer(cpu, op.src)
    };
    // SAFETY: as in `call`.
    let thunk = unsafe { thunk(op.imm) };
    let flags = thunk(target, source, &raw mut *cpu.fp);
    if form.has(INDEX) {
        cpu.set_r64(RCX, cpu.fp.index);
    }
    cpu.flags.set_bits(flags);
    Ok(())
}
