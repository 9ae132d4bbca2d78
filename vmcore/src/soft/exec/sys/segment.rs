//! Loading segment registers (SDM vol. 3A, 3.4.3, 5.6 and 5.7; vol. 2, "MOV", "POP", "LDS").

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::descriptor::{null, rpl};
use super::next;
use crate::soft::cpu::op::{Flow, Handler, Op, Selected, Stop};
use crate::soft::cpu::word::Word;
use crate::soft::cpu::{CS, Cpu, DS, ES, FS, GS, SS, vector};
use crate::state::Segment;

impl Cpu {
    /// Loads segment register `n`, which is not CS, with `selector`.
    ///
    /// # Errors
    /// #GP, #NP and #SS by the descriptor; page faults.
    pub(super) fn load_segment(&mut self, n: usize, selector: u16) -> Flow {
        if !self.mode.protected {
            self.load_real_segment(n, selector);
            return Ok(());
        }
        let segment = self.data_segment(n, selector)?;
        self.set_segment(n, segment);
        Ok(())
    }

    /// What `selector` makes of segment register `n` in protected mode, its descriptor marked.
    ///
    /// # Errors
    /// As [`Cpu::load_segment`].
    pub(super) fn data_segment(&mut self, n: usize, selector: u16) -> Result<Segment, Stop> {
        let cpl = self.mode.cpl;
        if n == SS {
            if null(selector) {
                if self.mode.long && cpl < 3 && rpl(selector) == cpl {
                    return Ok(null_stack(selector));
                }
                return Err(self.gp(0));
            }
            return self.stack_segment(selector, cpl, vector::GP, vector::SS);
        }
        if null(selector) {
            return Ok(Segment { selector, unusable: true, ..Segment::default() });
        }
        let descriptor = self.descriptor(selector, vector::GP)?;
        let allowed =
            descriptor.readable() && (descriptor.conforming() || descriptor.dpl() >= rpl(selector).max(cpl));
        if !allowed {
            return Err(self.gp_selector(selector));
        }
        if !descriptor.present() {
            return Err(self.np(selector));
        }
        self.mark_accessed(selector, descriptor)?;
        Ok(descriptor.segment(selector))
    }

    /// The stack segment that `selector` (not null) names, for privilege level `cpl`, its descriptor
    /// marked.
    ///
    /// # Errors
    /// `bad` with the selector where it is no stack of this level, `absent` where it is not present.
    pub(super) fn stack_segment(
        &mut self,
        selector: u16,
        cpl: u8,
        bad: u8,
        absent: u8,
    ) -> Result<Segment, Stop> {
        let descriptor = self.descriptor(selector, bad)?;
        if rpl(selector) != cpl || !descriptor.writable_data() || descriptor.dpl() != cpl {
            return Err(self.selector_fault(bad, selector));
        }
        if !descriptor.present() {
            return Err(self.selector_fault(absent, selector));
        }
        self.mark_accessed(selector, descriptor)?;
        Ok(descriptor.segment(selector))
    }

    /// Loads segment register `n` as in real or virtual-8086 mode.
    pub(super) fn load_real_segment(&mut self, n: usize, selector: u16) {
        self.set_segment(n, self.real_segment(n, selector));
    }

    /// Contents of segment register `n` with `selector` in real or virtual-8086 mode. In real mode
    /// limit and attributes stay what they were.
    pub(super) fn real_segment(&self, n: usize, selector: u16) -> Segment {
        let old = *self.segment(n);
        if self.mode.v86 {
            return Segment { dpl: 3, ..Segment::real_mode(selector, false) };
        }
        if old.unusable || !old.present {
            return Segment::real_mode(selector, n == CS);
        }
        Segment { selector, base: u64::from(selector) << 4, ..old }
    }

    /// After a return to an outer privilege level: segments that it may not use become null (SDM
    /// vol. 3A, 5.8.6).
    pub(super) fn drop_inner_segments(&mut self) {
        for n in [ES, DS, FS, GS] {
            let segment = self.segment(n);
            let conforming = segment.kind & 0b1100 == 0b1100;
            if !segment.unusable && !conforming && segment.dpl < self.mode.cpl {
                self.set_segment(n, Segment { unusable: true, ..Segment::default() });
            }
        }
    }
}

/// A null SS, as 64-bit code of the selector's privilege level may have.
pub(super) fn null_stack(selector: u16) -> Segment {
    Segment {
        selector,
        dpl: rpl(selector),
        unusable: true,
        kind: 3,
        code_or_data: true,
        big: true,
        ..Segment::default()
    }
}

/// Number of the segment register that the instruction's name tells.
fn implied(code: Code) -> Option<usize> {
    Some(match code {
        Code::Pushw_ES | Code::Pushd_ES | Code::Popw_ES | Code::Popd_ES => ES,
        Code::Pushw_CS | Code::Pushd_CS => CS,
        Code::Pushw_SS | Code::Pushd_SS | Code::Popw_SS | Code::Popd_SS => SS,
        Code::Pushw_DS | Code::Pushd_DS | Code::Popw_DS | Code::Popd_DS => DS,
        Code::Pushw_FS | Code::Pushd_FS | Code::Pushq_FS | Code::Popw_FS | Code::Popd_FS | Code::Popq_FS => {
            FS
        }
        Code::Pushw_GS | Code::Pushd_GS | Code::Pushq_GS | Code::Popw_GS | Code::Popd_GS | Code::Popq_GS => {
            GS
        }
        _ => return None,
    })
}

fn push<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let selector = cpu.segment(op.extra as usize).selector;
    cpu.push(W::cut(selector.into()))
}

fn pop_value<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let selector = u16::cut(cpu.peek::<W>(0)?.zext());
    let sp = cpu.r64(crate::soft::cpu::RSP).wrapping_add(W::SIZE);
    let before = cpu.mode;
    cpu.load_segment(op.extra as usize, selector)?;
    // The stack pointer is as wide as it was when the value was popped.
    let after = std::mem::replace(&mut cpu.mode, before);
    cpu.set_stack_pointer(sp);
    cpu.mode = after;
    Ok(())
}

fn pop_stack<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    pop_value::<W>(cpu, op)?;
    shadow(cpu);
    next(cpu, op)
}

/// After a load of SS nothing interrupts before the next instruction's end. A second load in a row
/// does not prolong that (SDM vol. 2, "MOV").
fn shadow(cpu: &mut Cpu) {
    if !cpu.shadow.mov_ss {
        cpu.shadow.mov_ss = true;
        cpu.shadow_next = true;
    }
}

fn store_register<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let selector = cpu.segment(usize::from(op.src) % 6).selector;
    cpu.set_reg(op.dst, W::cut(selector.into()));
    Ok(())
}

fn store_memory(cpu: &mut Cpu, op: &Op) -> Flow {
    let selector = cpu.segment(usize::from(op.dst) % 6).selector;
    cpu.store_operand(op, selector)
}

fn source<const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Result<u16, Stop> {
    if MEMORY { cpu.load_operand(op) } else { Ok(cpu.reg(op.src)) }
}

fn load_data<const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    let selector = source::<MEMORY>(cpu, op)?;
    cpu.load_segment(usize::from(op.dst), selector)
}

fn load_stack<const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    let selector = source::<MEMORY>(cpu, op)?;
    cpu.load_segment(SS, selector)?;
    shadow(cpu);
    next(cpu, op)
}

fn load_code(cpu: &mut Cpu, _: &Op) -> Flow {
    Err(cpu.ud())
}

/// LDS, LES, LSS, LFS, LGS.
fn load_pointer<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let at = cpu.address(op, W::SIZE + 2, false)?;
    let offset: W = cpu.load(at)?;
    let selector: u16 = cpu.load(cpu.wrap_rip(at.wrapping_add(W::SIZE)))?;
    cpu.load_segment(op.extra as usize, selector)?;
    cpu.set_reg(op.dst, offset);
    next(cpu, op)
}

pub(super) fn select(i: &Instruction) -> Option<Selected> {
    let memory = i.op0_kind() == OpKind::Memory || i.op1_kind() == OpKind::Memory;
    if i.mnemonic() == Mnemonic::Mov {
        return select_mov(i, memory);
    }
    let pointer = match i.mnemonic() {
        Mnemonic::Lds => Some(DS),
        Mnemonic::Les => Some(ES),
        Mnemonic::Lss => Some(SS),
        Mnemonic::Lfs => Some(FS),
        Mnemonic::Lgs => Some(GS),
        _ => None,
    };
    if let Some(n) = pointer {
        let run: Handler = match i.op0_register().size() {
            2 => load_pointer::<u16>,
            4 => load_pointer::<u32>,
            _ => load_pointer::<u64>,
        };
        return Some(Selected::last(run).with(n as u32));
    }
    let n = implied(i.code())?;
    let size = i.stack_pointer_increment().unsigned_abs();
    let selected = match (i.mnemonic(), size) {
        (Mnemonic::Push, 2) => Selected::plain(push::<u16>),
        (Mnemonic::Push, 4) => Selected::plain(push::<u32>),
        (Mnemonic::Push, _) => Selected::plain(push::<u64>),
        (_, 2) if n == SS => Selected::last(pop_stack::<u16>),
        (_, _) if n == SS => Selected::last(pop_stack::<u32>),
        (_, 2) => Selected::plain(pop_value::<u16>),
        (_, 4) => Selected::plain(pop_value::<u32>),
        (_, _) => Selected::plain(pop_value::<u64>),
    };
    Some(selected.with(n as u32))
}

fn select_mov(i: &Instruction, memory: bool) -> Option<Selected> {
    Some(match i.code() {
        Code::Mov_rm16_Sreg | Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg if memory => {
            Selected::plain(store_memory)
        }
        Code::Mov_rm16_Sreg => Selected::plain(store_register::<u16>),
        Code::Mov_r32m16_Sreg => Selected::plain(store_register::<u32>),
        Code::Mov_r64m16_Sreg => Selected::plain(store_register::<u64>),
        Code::Mov_Sreg_rm16 | Code::Mov_Sreg_r32m16 | Code::Mov_Sreg_r64m16 => {
            match (i.op0_register(), memory) {
                (Register::CS, _) => Selected::last(load_code),
                (Register::SS, false) => Selected::last(load_stack::<false>),
                (Register::SS, true) => Selected::last(load_stack::<true>),
                (_, false) => Selected::plain(load_data::<false>),
                (_, true) => Selected::plain(load_data::<true>),
            }
        }
        _ => return None,
    })
}
