//! Far jumps, calls and returns (SDM vol. 3A, 5.8; vol. 2, "JMP", "CALL", "RET").

use iced_x86::{Code, Instruction};

use super::descriptor::{Descriptor, null, rpl, system};
use super::interrupt::Frame;
use super::segment::null_stack;
use super::task::Switch;
use crate::soft::cpu::op::{Flow, Handler, Op, Selected, Stop};
use crate::soft::cpu::word::Word;
use crate::soft::cpu::{CS, Cpu, RSP, SS, canonical, vector};
use crate::state::Segment;

impl Cpu {
    /// Checks the code segment of a direct jump or call.
    ///
    /// # Errors
    /// #GP and #NP by the descriptor.
    fn direct_code(&mut self, selector: u16, code: Descriptor) -> Result<Segment, Stop> {
        let cpl = self.mode.cpl;
        let level =
            if code.conforming() { code.dpl() <= cpl } else { rpl(selector) <= cpl && code.dpl() == cpl };
        if !code.is_code() || !level || self.ia32e() && code.long() && code.big() {
            return Err(self.gp_selector(selector));
        }
        if !code.present() {
            return Err(self.np(selector));
        }
        self.mark_accessed(selector, code)?;
        Ok(code.segment(selector & !3 | u16::from(cpl)))
    }

    /// Checks a call gate itself, and finds the code it leads to: selector, descriptor and offset.
    ///
    /// # Errors
    /// #GP and #NP by gate and descriptor.
    fn through_gate(&mut self, selector: u16, gate: Descriptor) -> Result<(u16, Descriptor, u64), Stop> {
        if gate.dpl() < self.mode.cpl.max(rpl(selector)) {
            return Err(self.gp_selector(selector));
        }
        if !gate.present() {
            return Err(self.np(selector));
        }
        let high = if self.ia32e() { self.descriptor_top(selector, vector::GP)? << 32 } else { 0 };
        let target = gate.gate_selector();
        if null(target) {
            return Err(self.gp(0));
        }
        let code = self.descriptor(target, vector::GP)?;
        let mode = !self.ia32e() || code.long() && !code.big();
        if !code.is_code() || code.dpl() > self.mode.cpl || !mode {
            return Err(self.gp_selector(target));
        }
        if !code.present() {
            return Err(self.np(target));
        }
        Ok((target, code, gate.gate_offset() | high))
    }

    /// Whether a system descriptor is a call gate that this mode has.
    fn call_gate(&self, kind: Option<u8>) -> bool {
        kind == Some(system::CALL_GATE) || kind == Some(system::CALL_GATE16) && !self.ia32e()
    }

    fn far_jump(&mut self, selector: u16, offset: u64, next: u64) -> Flow {
        if !self.mode.protected {
            if offset > self.segment(CS).limit.into() {
                return Err(self.gp(0));
            }
            self.load_real_segment(CS, selector);
            self.set_rip(offset);
            return Err(Stop::Next);
        }
        if null(selector) {
            return Err(self.gp(0));
        }
        let descriptor = self.descriptor(selector, vector::GP)?;
        let (code, rip) = match descriptor.system() {
            None => (self.direct_code(selector, descriptor)?, offset),
            kind if self.call_gate(kind) => {
                let (target, code, rip) = self.through_gate(selector, descriptor)?;
                if !code.conforming() && code.dpl() != self.mode.cpl {
                    return Err(self.gp_selector(target));
                }
                self.mark_accessed(target, code)?;
                (code.segment(target & !3 | u16::from(self.mode.cpl)), rip)
            }
            Some(_) => return self.far_task(selector, descriptor, next, Switch::Jump),
        };
        self.check_target(&code, rip)?;
        self.set_segment(CS, code);
        self.set_rip(rip);
        Err(Stop::Next)
    }

    /// A jump or call to a TSS or through a task gate.
    fn far_task(&mut self, selector: u16, descriptor: Descriptor, next: u64, how: Switch) -> Flow {
        let gate = match descriptor.system() {
            _ if self.ia32e() => return Err(self.gp_selector(selector)),
            Some(system::TASK_GATE) => true,
            Some(system::TSS | system::TSS16) => false,
            _ => return Err(self.gp_selector(selector)),
        };
        if descriptor.dpl() < self.mode.cpl.max(rpl(selector)) {
            return Err(self.gp_selector(selector));
        }
        if !descriptor.present() {
            return Err(self.np(selector));
        }
        let task = if gate { descriptor.gate_selector() } else { selector };
        self.switch_task(task, how, next, false, None)?;
        Err(Stop::Next)
    }

    /// Pushes `values` of `size` bytes on the current stack; returns the new stack pointer.
    fn push_here(&mut self, values: &[u64], size: u64) -> Result<u64, Stop> {
        let sp = self.r64(RSP);
        if self.mode.long {
            return self.push_long(sp, values, size);
        }
        let stack = *self.segment(SS);
        let frame = Frame { stack: &stack, sp, mask: self.stack_mask(), size, fault: 0 };
        self.push_frame(&frame, values, self.mode.cpl)
    }

    /// Pushes `values` of `size` bytes at `sp` of 64-bit code.
    fn push_long(&mut self, sp: u64, values: &[u64], size: u64) -> Result<u64, Stop> {
        let low = sp.wrapping_sub(size * values.len() as u64);
        if !canonical(low) || !canonical(sp.wrapping_sub(1)) {
            return Err(self.ss(0));
        }
        self.check_write(low, size * values.len() as u64)?;
        for (n, &value) in (1..).zip(values) {
            let at = sp.wrapping_sub(size * n);
            match size {
                2 => self.store(at, value as u16)?,
                4 => self.store(at, value as u32)?,
                _ => self.store(at, value)?,
            }
        }
        Ok(low)
    }

    fn far_call(&mut self, selector: u16, offset: u64, size: u64, next: u64) -> Flow {
        let here = [self.segment(CS).selector.into(), next];
        if !self.mode.protected {
            if offset > self.segment(CS).limit.into() {
                return Err(self.gp(0));
            }
            let sp = self.push_here(&here, size)?;
            self.set_stack_pointer(sp);
            self.load_real_segment(CS, selector);
            self.set_rip(offset);
            return Err(Stop::Next);
        }
        if null(selector) {
            return Err(self.gp(0));
        }
        let descriptor = self.descriptor(selector, vector::GP)?;
        let (code, rip, size) = match descriptor.system() {
            None => (self.direct_code(selector, descriptor)?, offset, size),
            kind if self.call_gate(kind) => {
                let (target, code, rip) = self.through_gate(selector, descriptor)?;
                let size = match kind {
                    _ if self.ia32e() => 8,
                    Some(system::CALL_GATE) => 4,
                    _ => 2,
                };
                if !code.conforming() && code.dpl() < self.mode.cpl {
                    let code = code.segment(target & !3 | u16::from(code.dpl()));
                    return self.call_inner(code, rip, size, descriptor.gate_parameters(), next);
                }
                self.mark_accessed(target, code)?;
                (code.segment(target & !3 | u16::from(self.mode.cpl)), rip, size)
            }
            Some(_) => return self.far_task(selector, descriptor, next, Switch::Call),
        };
        self.check_target(&code, rip)?;
        // A 64-bit gate's frame is 64-bit also where it is called from compatibility mode.
        let sp =
            if size == 8 { self.push_long(self.r64(RSP), &here, 8)? } else { self.push_here(&here, size)? };
        self.set_segment(CS, code);
        self.set_stack_pointer(sp);
        self.set_rip(rip);
        Err(Stop::Next)
    }

    /// A call through a gate to an inner privilege level.
    fn call_inner(&mut self, code: Segment, rip: u64, size: u64, parameters: u64, next: u64) -> Flow {
        let cpl = code.dpl;
        self.check_target(&code, rip)?;
        let old = [self.segment(SS).selector.into(), self.r64(RSP)];
        let here = [self.segment(CS).selector.into(), next];
        let (stack, sp) = if self.ia32e() {
            let sp = self.tss_field::<u64>(4 + 8 * u64::from(cpl))?;
            let values = [old[0], old[1], here[0], here[1]];
            let sp = self.as_supervisor(|cpu| cpu.push_long(sp, &values, 8))?;
            (null_stack(cpl.into()), sp)
        } else {
            let (selector, sp) = self.inner_stack_pointer(cpl)?;
            if null(selector) {
                return Err(self.ts(0));
            }
            let stack = self.stack_segment(selector, cpl, vector::TS, vector::SS)?;
            let mut values = [0; 35];
            values[..2].copy_from_slice(&old);
            let count = parameters as usize;
            // The parameters are copied so that the last pushed is the lowest again.
            for n in 0..parameters {
                let value = match size {
                    2 => self.peek::<u16>(2 * n)?.into(),
                    _ => self.peek::<u32>(4 * n)?.into(),
                };
                values[1 + count - n as usize] = value;
            }
            values[2 + count..4 + count].copy_from_slice(&here);
            let mask = if stack.big { 0xffff_ffff } else { 0xffff };
            let frame = Frame { stack: &stack, sp, mask, size, fault: selector };
            let sp = self.push_frame(&frame, &values[..4 + count], cpl)?;
            (stack, sp)
        };
        self.set_code_and_stack(code, stack);
        self.set_stack_pointer(sp);
        self.set_rip(rip);
        Err(Stop::Next)
    }

    fn far_return<W: Word>(&mut self, drop: u64) -> Flow {
        let size = W::SIZE;
        let rip = self.peek::<W>(0)?.zext();
        let selector = u16::cut(self.peek::<W>(size)?.zext());
        if !self.mode.protected {
            if rip > self.segment(CS).limit.into() {
                return Err(self.gp(0));
            }
            self.set_stack_pointer(self.r64(RSP).wrapping_add(2 * size + drop));
            self.load_real_segment(CS, selector);
            self.set_rip(rip);
            return Err(Stop::Next);
        }
        let code = self.return_code(selector)?;
        self.check_target(&code, rip)?;
        if rpl(selector) == self.mode.cpl {
            self.set_stack_pointer(self.r64(RSP).wrapping_add(2 * size + drop));
            self.set_segment(CS, code);
            self.set_rip(rip);
            return Err(Stop::Next);
        }
        let sp = self.peek::<W>(2 * size + drop)?.zext();
        let selector = u16::cut(self.peek::<W>(3 * size + drop)?.zext());
        let stack = self.return_stack(selector, &code)?;
        self.set_code_and_stack(code, stack);
        self.set_stack_pointer(sp.wrapping_add(drop));
        self.set_rip(rip);
        self.drop_inner_segments();
        Err(Stop::Next)
    }

    /// Reads the far pointer in memory: selector and offset.
    fn far_pointer<W: Word>(&mut self, op: &Op) -> Result<(u16, u64), Stop> {
        let at = self.address(op, W::SIZE + 2, false)?;
        let offset = self.load::<W>(at)?.zext();
        let selector = self.load(self.wrap_rip(at.wrapping_add(W::SIZE)))?;
        Ok((selector, offset))
    }
}

/// The far pointer in the instruction.
fn immediate(op: &Op) -> (u16, u64) {
    ((op.imm >> 32) as u16, op.imm & 0xffff_ffff)
}

fn jump_direct(cpu: &mut Cpu, op: &Op) -> Flow {
    let (selector, offset) = immediate(op);
    let next = cpu.next_rip(op);
    cpu.far_jump(selector, offset, next)
}

fn jump_memory<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let (selector, offset) = cpu.far_pointer::<W>(op)?;
    let next = cpu.next_rip(op);
    cpu.far_jump(selector, offset, next)
}

fn call_direct<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let (selector, offset) = immediate(op);
    let next = cpu.next_rip(op);
    cpu.far_call(selector, offset, W::SIZE, next)
}

fn call_memory<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let (selector, offset) = cpu.far_pointer::<W>(op)?;
    let next = cpu.next_rip(op);
    cpu.far_call(selector, offset, W::SIZE, next)
}

fn ret<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.far_return::<W>(op.imm & 0xffff)
}

pub(super) fn select(i: &Instruction) -> Option<Selected> {
    let run: Handler = match i.code() {
        Code::Jmp_ptr1616 | Code::Jmp_ptr1632 => jump_direct,
        Code::Jmp_m1616 => jump_memory::<u16>,
        Code::Jmp_m1632 => jump_memory::<u32>,
        Code::Jmp_m1664 => jump_memory::<u64>,
        Code::Call_ptr1616 => call_direct::<u16>,
        Code::Call_ptr1632 => call_direct::<u32>,
        Code::Call_m1616 => call_memory::<u16>,
        Code::Call_m1632 => call_memory::<u32>,
        Code::Call_m1664 => call_memory::<u64>,
        Code::Retfw | Code::Retfw_imm16 => ret::<u16>,
        Code::Retfd | Code::Retfd_imm16 => ret::<u32>,
        Code::Retfq | Code::Retfq_imm16 => ret::<u64>,
        _ => return None,
    };
    Some(Selected::last(run))
}
