//! FXSAVE, FXRSTOR, XSAVE, XSAVEOPT, XRSTOR, XGETBV, XSETBV, LDMXCSR, STMXCSR (SDM vol. 1, 10.5 and
//! chapter 13).

use iced_x86::{Code, Instruction};

use super::state::{FpState, MXCSR_DEFAULT, MXCSR_MASK};
use crate::soft::cpu::op::{Flow, Op, Selected, Stop};
use crate::soft::cpu::{Cpu, RAX, RCX, RDX, cr4};

/// Bytes of the legacy region.
const LEGACY: usize = 512;
/// Bytes of the legacy region and the header.
const AREA: usize = 576;
/// State components: x87 and SSE.
const X87: u64 = 1;
const SSE: u64 = 2;
/// The components there are.
const COMPONENTS: u64 = X87 | SSE;
/// Where the SSE registers begin.
const XMM: usize = 160;

/// The handler of an instruction that saves or restores state.
pub(super) fn select(i: &Instruction) -> Option<Selected> {
    Some(match i.code() {
        Code::Fxsave_m512byte => Selected::plain(fxsave::<false>),
        Code::Fxsave64_m512byte => Selected::plain(fxsave::<true>),
        Code::Fxrstor_m512byte => Selected::plain(fxrstor::<false>),
        Code::Fxrstor64_m512byte => Selected::plain(fxrstor::<true>),
        // With one processor's state always in use and nothing optimised away, both are the same.
        Code::Xsave_mem | Code::Xsaveopt_mem => Selected::plain(xsave::<false>),
        Code::Xsave64_mem | Code::Xsaveopt64_mem => Selected::plain(xsave::<true>),
        Code::Xrstor_mem => Selected::plain(xrstor::<false>),
        Code::Xrstor64_mem => Selected::plain(xrstor::<true>),
        Code::Xgetbv => Selected::plain(xgetbv),
        Code::Xsetbv => Selected::plain(xsetbv),
        Code::Ldmxcsr_m32 => Selected::plain(ldmxcsr),
        Code::Stmxcsr_m32 => Selected::plain(stmxcsr),
        _ => return None,
    })
}

/// The area with 64-bit pointers, or with 32-bit ones and selectors.
fn image(fp: &FpState, wide: bool) -> [u8; LEGACY] {
    let mut area = fp.bytes();
    if !wide {
        area[12..14].copy_from_slice(&fp.fcs.to_le_bytes());
        area[14..16].fill(0);
        area[20..22].copy_from_slice(&fp.fds.to_le_bytes());
        area[22..24].fill(0);
    }
    area
}

/// Takes the x87 part of an area.
fn take_x87(fp: &mut FpState, area: &[u8; LEGACY], wide: bool) {
    let mut all = fp.bytes();
    all[..24].copy_from_slice(&area[..24]);
    all[32..XMM].copy_from_slice(&area[32..XMM]);
    let selector = |at: usize| u16::from_le_bytes([area[at], area[at + 1]]);
    let selectors = if wide { (0, 0) } else { (selector(12), selector(20)) };
    if !wide {
        all[12..16].fill(0);
        all[20..24].fill(0);
    }
    fp.set_bytes(&all);
    (fp.fcs, fp.fds) = selectors;
}

/// Takes the SSE registers of an area: the sixteen or the eight that the mode has.
fn take_sse(fp: &mut FpState, area: &[u8; LEGACY], long: bool) {
    let end = if long { 416 } else { 288 };
    let (fcs, fds) = (fp.fcs, fp.fds);
    let mut all = fp.bytes();
    all[XMM..end].copy_from_slice(&area[XMM..end]);
    fp.set_bytes(&all);
    (fp.fcs, fp.fds) = (fcs, fds);
}

fn mxcsr_of(area: &[u8]) -> u32 {
    u32::from_le_bytes([area[24], area[25], area[26], area[27]])
}

/// Address of an area that must be aligned.
fn area_address(cpu: &mut Cpu, op: &Op, size: usize, align: u64, write: bool) -> Result<u64, Stop> {
    let at = cpu.address(op, size as u64, write)?;
    if at & (align - 1) != 0 {
        return Err(cpu.gp(0));
    }
    Ok(at)
}

fn fxsave<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.x87_control()?;
    let at = area_address(cpu, op, LEGACY, 16, true)?;
    let area = image(&cpu.fp, WIDE);
    let end = if cpu.mode.long { 416 } else { 288 };
    cpu.check_write(at, LEGACY as u64)?;
    cpu.store_bytes(at, &area[..end])
}

fn fxrstor<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.x87_control()?;
    let at = area_address(cpu, op, LEGACY, 16, false)?;
    let mut area = [0; LEGACY];
    cpu.load_bytes(at, &mut area)?;
    let mxcsr = mxcsr_of(&area);
    if mxcsr & !MXCSR_MASK != 0 {
        return Err(cpu.gp(0));
    }
    take_x87(&mut cpu.fp, &area, WIDE);
    take_sse(&mut cpu.fp, &area, cpu.mode.long);
    cpu.fp.mxcsr = mxcsr;
    Ok(())
}

/// # Errors
/// #UD without CR4.OSXSAVE, #NM with CR0.TS.
fn xsave_allowed(cpu: &mut Cpu) -> Flow {
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(cpu.ud());
    }
    if cpu.cr0 & crate::soft::cpu::cr0::TS != 0 {
        return Err(cpu.nm());
    }
    Ok(())
}

/// EDX:EAX.
fn requested(cpu: &Cpu) -> u64 {
    cpu.r64(RDX) << 32 | cpu.r64(RAX) & 0xffff_ffff
}

/// All components count as in use: XINUSE is XCR0.
fn xsave<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    xsave_allowed(cpu)?;
    let at = area_address(cpu, op, AREA, 64, true)?;
    cpu.check_write(at, AREA as u64)?;
    let wanted = requested(cpu) & cpu.xcr0;
    let bitmap = cpu.after(at, LEGACY as u64);
    let old: u64 = cpu.load(bitmap)?;
    let area = image(&cpu.fp, WIDE);
    if wanted & X87 != 0 {
        cpu.store_bytes(at, &area[..24])?;
        cpu.store_bytes(cpu.after(at, 32), &area[32..XMM])?;
    }
    if wanted & SSE != 0 {
        let end = if cpu.mode.long { 416 } else { 288 };
        cpu.store_bytes(cpu.after(at, 24), &area[24..32])?;
        cpu.store_bytes(cpu.after(at, XMM as u64), &area[XMM..end])?;
    }
    cpu.store(bitmap, old & !wanted | wanted)
}

fn xrstor<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    xsave_allowed(cpu)?;
    let at = area_address(cpu, op, AREA, 64, false)?;
    let mut bytes = [0; AREA];
    cpu.load_bytes(at, &mut bytes)?;
    let mut area = [0; LEGACY];
    area.copy_from_slice(&bytes[..LEGACY]);
    let word = |n: usize| {
        let at = LEGACY + 8 * n;
        std::array::from_fn(|k| bytes[at + k])
    };
    let [present, compact, reserved] = [0, 1, 2].map(|n| u64::from_le_bytes(word(n)));
    let wanted = requested(cpu) & cpu.xcr0;
    let mxcsr = mxcsr_of(&area);
    if compact != 0
        || reserved != 0
        || present & !cpu.xcr0 != 0
        || wanted & SSE != 0 && mxcsr & !MXCSR_MASK != 0
    {
        return Err(cpu.gp(0));
    }
    let long = cpu.mode.long;
    let fp = &mut cpu.fp;
    if wanted & X87 != 0 {
        if present & X87 != 0 { take_x87(fp, &area, WIDE) } else { fp.reset_x87() }
    }
    if wanted & SSE != 0 {
        match (present & SSE != 0, long) {
            (true, _) => take_sse(fp, &area, long),
            (false, true) => fp.init_sse(),
            (false, false) => take_sse(fp, &[0; LEGACY], false),
        }
        // MXCSR is loaded whatever the header says of SSE.
        fp.mxcsr = mxcsr;
    }
    Ok(())
}

/// There is XCR0 alone.
fn xgetbv(cpu: &mut Cpu, _: &Op) -> Flow {
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(cpu.ud());
    }
    if cpu.r64(RCX) & 0xffff_ffff != 0 {
        return Err(cpu.gp(0));
    }
    let value = cpu.xcr0;
    cpu.set_r64(RAX, value & 0xffff_ffff);
    cpu.set_r64(RDX, value >> 32);
    Ok(())
}

fn xsetbv(cpu: &mut Cpu, _: &Op) -> Flow {
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(cpu.ud());
    }
    let value = requested(cpu);
    if cpu.mode.cpl != 0 || cpu.r64(RCX) & 0xffff_ffff != 0 || value & !COMPONENTS != 0 || value & X87 == 0 {
        return Err(cpu.gp(0));
    }
    cpu.xcr0 = value;
    Ok(())
}

fn ldmxcsr(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse()?;
    let value: u32 = cpu.load_operand(op)?;
    if value & !MXCSR_MASK != 0 {
        return Err(cpu.gp(0));
    }
    cpu.fp.mxcsr = value;
    Ok(())
}

fn stmxcsr(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse()?;
    let value = cpu.fp.mxcsr;
    cpu.store_operand(op, value)
}

const _: () = assert!(MXCSR_DEFAULT & !MXCSR_MASK == 0);
