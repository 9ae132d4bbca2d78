//! x87 control instructions and the environment in memory (SDM vol. 1, 8.1.10).

use iced_x86::{Code, Instruction};

use super::state::{EXCEPTIONS, FSW_SF, FpState};
use crate::soft::cpu::op::{Flow, Op, Selected, Stop};
use crate::soft::cpu::word::Word;
use crate::soft::cpu::{Cpu, cr0, vector};

/// RAX as an operand.
const AX: u8 = 0;

/// The handler of an x87 control instruction.
pub(super) fn select(i: &Instruction) -> Option<Selected> {
    Some(Selected::plain(match i.code() {
        Code::Wait => fwait,
        Code::Fninit => fninit,
        // The 8087's and 287's interrupts and protected mode: nothing since.
        Code::Fneni | Code::Fndisi | Code::Fnsetpm => nothing,
        Code::Fnclex => fnclex,
        Code::Fnstcw_m2byte => fnstcw,
        Code::Fldcw_m2byte => fldcw,
        Code::Fnstsw_m2byte => fnstsw,
        Code::Fnstsw_AX => fnstsw_ax,
        Code::Fnstenv_m14byte => fnstenv::<u16>,
        Code::Fnstenv_m28byte => fnstenv::<u32>,
        Code::Fldenv_m14byte => fldenv::<u16>,
        Code::Fldenv_m28byte => fldenv::<u32>,
        Code::Fnsave_m94byte => fnsave::<u16>,
        Code::Fnsave_m108byte => fnsave::<u32>,
        Code::Frstor_m94byte => frstor::<u16>,
        Code::Frstor_m108byte => frstor::<u32>,
        _ => return None,
    }))
}

fn fwait(cpu: &mut Cpu, _: &Op) -> Flow {
    if cpu.cr0 & cr0::MP != 0 && cpu.cr0 & cr0::TS != 0 {
        return Err(cpu.nm());
    }
    if cpu.fp.pending() {
        return Err(cpu.raise(vector::MF, None));
    }
    Ok(())
}

fn nothing(cpu: &mut Cpu, _: &Op) -> Flow {
    cpu.x87_control()
}

fn fninit(cpu: &mut Cpu, _: &Op) -> Flow {
    cpu.x87_control()?;
    cpu.fp.init_x87();
    Ok(())
}

fn fnclex(cpu: &mut Cpu, _: &Op) -> Flow {
    cpu.x87_control()?;
    cpu.fp.fsw &= !(EXCEPTIONS | FSW_SF);
    cpu.fp.summarise();
    Ok(())
}

fn fnstcw(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.x87_control()?;
    let value = cpu.fp.fcw;
    cpu.store_operand(op, value)
}

fn fldcw(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.x87()?;
    let value = cpu.load_operand(op)?;
    cpu.fp.set_fcw(value);
    Ok(())
}

fn fnstsw(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.x87_control()?;
    let value = cpu.fp.fsw;
    cpu.store_operand(op, value)
}

fn fnstsw_ax(cpu: &mut Cpu, _: &Op) -> Flow {
    cpu.x87_control()?;
    let value = cpu.fp.fsw;
    cpu.set_reg(AX, value);
    Ok(())
}

/// Two bits a physical register: valid, zero, special, empty.
fn full_tags(fp: &FpState) -> u16 {
    (0..8).zip(fp.st).fold(0, |tags, (n, [significand, high])| {
        let exponent = high & 0x7fff;
        let tag = if fp.ftw >> n & 1 == 0 {
            3
        } else if exponent == 0 && significand == 0 {
            1
        } else if exponent == 0 || exponent == 0x7fff || significand >> 63 == 0 {
            2
        } else {
            0
        };
        tags | tag << (2 * n)
    })
}

/// One bit a physical register.
fn short_tags(tags: u16) -> u8 {
    (0..8).fold(0, |short, n| short | u8::from(tags >> (2 * n) & 3 != 3) << n)
}

/// The seven words of the environment, in 16 or 32 bits.
fn environment<W: Word>(cpu: &Cpu) -> [u64; 7] {
    let fp = &cpu.fp;
    let (fcw, fsw, tags) = (u64::from(fp.fcw), u64::from(fp.fsw), u64::from(full_tags(fp)));
    let opcode = u64::from(fp.fop);
    let selectors = [u64::from(fp.fcs), u64::from(fp.fds)];
    let pointers = if cpu.mode.protected {
        let first = if W::BITS == 32 { opcode << 16 | selectors[0] } else { selectors[0] };
        [fp.fip, first, fp.fdp, selectors[1] | if W::BITS == 32 { 0xffff_0000 } else { 0 }]
    } else {
        // Real and virtual-8086 mode: linear addresses, of which the upper bits stand above the opcode.
        let linear = |selector: u64, offset: u64| (selector << 4).wrapping_add(offset) & 0xffff_ffff;
        let code = linear(selectors[0], fp.fip);
        let data = linear(selectors[1], fp.fdp);
        if W::BITS == 32 {
            [code | 0xffff_0000, code >> 16 << 12 | opcode, data | 0xffff_0000, data >> 16 << 12]
        } else {
            [code, (code >> 16 & 15) << 12 | opcode, data, (data >> 16 & 15) << 12]
        }
    };
    // What is left of a doubleword around a word is ones.
    let fill = if W::BITS == 32 { 0xffff_0000 } else { 0 };
    [fcw | fill, fsw | fill, tags | fill, pointers[0], pointers[1], pointers[2], pointers[3]]
}

/// Takes the environment over.
fn set_environment<W: Word>(cpu: &mut Cpu, words: [u64; 7]) {
    let protected = cpu.mode.protected;
    let [fcw, fsw, tags, w3, w4, w5, w6] = words;
    let fp = &mut cpu.fp;
    fp.fsw = u16::cut(fsw);
    fp.ftw = short_tags(u16::cut(tags));
    fp.set_fcw(u16::cut(fcw));
    let (fop, fip, fdp, selectors) = match (protected, W::BITS) {
        (true, 32) => (w4 >> 16, w3, w5, [w4, w6]),
        (true, _) => (0, w3, w5, [w4, w6]),
        (false, 32) => (w4, w3 & 0xffff | w4 >> 12 << 16, w5 & 0xffff | w6 >> 12 << 16, [0; 2]),
        (false, _) => (w4, w3 | w4 >> 12 << 16, w5 | w6 >> 12 << 16, [0; 2]),
    };
    fp.fop = u16::cut(fop) & 0x7ff;
    (fp.fip, fp.fdp) = (fip & 0xffff_ffff, fdp & 0xffff_ffff);
    (fp.fcs, fp.fds) = (u16::cut(selectors[0]), u16::cut(selectors[1]));
}

fn store_environment<W: Word>(cpu: &mut Cpu, at: u64) -> Flow {
    let words = environment::<W>(cpu);
    let mut next = at;
    for word in words {
        cpu.store(next, W::cut(word))?;
        next = cpu.after(next, W::SIZE);
    }
    Ok(())
}

fn load_environment<W: Word>(cpu: &mut Cpu, at: u64) -> Result<[u64; 7], Stop> {
    let mut words = [0; 7];
    let mut next = at;
    for word in &mut words {
        *word = cpu.load::<W>(next)?.zext();
        next = cpu.after(next, W::SIZE);
    }
    Ok(words)
}

fn fnstenv<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.x87_control()?;
    let at = cpu.address(op, 7 * W::SIZE, true)?;
    cpu.check_write(at, 7 * W::SIZE)?;
    store_environment::<W>(cpu, at)?;
    let masked = cpu.fp.fcw | EXCEPTIONS;
    cpu.fp.set_fcw(masked);
    Ok(())
}

fn fldenv<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.x87()?;
    let at = cpu.address(op, 7 * W::SIZE, false)?;
    cpu.check_read(at, 7 * W::SIZE)?;
    let words = load_environment::<W>(cpu, at)?;
    set_environment::<W>(cpu, words);
    Ok(())
}

fn fnsave<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.x87_control()?;
    let size = 7 * W::SIZE + 80;
    let at = cpu.address(op, size, true)?;
    cpu.check_aligned(at, W::SIZE)?;
    cpu.check_write(at, size)?;
    store_environment::<W>(cpu, at)?;
    cpu.unaligned(|cpu| {
        (0..8).try_for_each(|n| {
            let value = cpu.fp.st(n);
            cpu.store_part(cpu.after(at, 7 * W::SIZE + 10 * u64::from(n)), 10, value)
        })
    })?;
    cpu.fp.init_x87();
    Ok(())
}

fn frstor<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.x87()?;
    let size = 7 * W::SIZE + 80;
    let at = cpu.address(op, size, false)?;
    cpu.check_read(at, size)?;
    let words = load_environment::<W>(cpu, at)?;
    let mut st = [[0; 2]; 8];
    cpu.unaligned(|cpu| {
        (0..).zip(&mut st).try_for_each(|(n, register)| {
            *register = cpu.load_part(cpu.after(at, 7 * W::SIZE + 10 * n), 10)?;
            Ok(())
        })
    })?;
    set_environment::<W>(cpu, words);
    cpu.fp.st = st;
    cpu.fp.leave_stack_order();
    Ok(())
}
