//! IRET in all its forms (SDM vol. 2, "IRET/IRETD/IRETQ").

use iced_x86::{Code, Instruction};

use super::descriptor::{null, rpl};
use super::segment::null_stack;
use crate::soft::cpu::flags::{AC, ARITHMETIC, DF, ID, IF, IOPL, NT, RF, TF, VIF, VIP, VM};
use crate::soft::cpu::op::{Flow, Op, Selected, Stop};
use crate::soft::cpu::word::Word;
use crate::soft::cpu::{CS, Cpu, DS, ES, FS, GS, RSP, SS, canonical, cr0, cr4, vector};
use crate::state::Segment;

impl Cpu {
    /// The code segment that a far return goes to, its descriptor marked.
    ///
    /// # Errors
    /// #GP and #NP by the descriptor.
    pub(super) fn return_code(&mut self, selector: u16) -> Result<Segment, Stop> {
        if null(selector) {
            return Err(self.gp(0));
        }
        let code = self.descriptor(selector, vector::GP)?;
        let to = rpl(selector);
        let level = if code.conforming() { code.dpl() <= to } else { code.dpl() == to };
        let wide = self.ia32e() && code.long() && code.big();
        if !code.is_code() || to < self.mode.cpl || !level || wide {
            return Err(self.gp_selector(selector));
        }
        if !code.present() {
            return Err(self.np(selector));
        }
        self.mark_accessed(selector, code)?;
        Ok(code.segment(selector))
    }

    /// The stack segment that a far return to `code` restores, its descriptor marked.
    ///
    /// # Errors
    /// #GP and #SS by the descriptor.
    pub(super) fn return_stack(&mut self, selector: u16, code: &Segment) -> Result<Segment, Stop> {
        let to = rpl(code.selector);
        if null(selector) {
            if self.ia32e() && code.long && to != 3 && rpl(selector) == to {
                return Ok(null_stack(selector));
            }
            return Err(self.gp(0));
        }
        self.stack_segment(selector, to, vector::GP, vector::SS)
    }

    /// Whether `rip` is an address in `code`.
    ///
    /// # Errors
    /// #GP(0) where it is not.
    pub(super) fn check_target(&mut self, code: &Segment, rip: u64) -> Flow {
        let inside = if self.ia32e() && code.long { canonical(rip) } else { rip <= code.limit.into() };
        if inside { Ok(()) } else { Err(self.gp(0)) }
    }

    /// Sets those flags of `mask` to what they are in `image`. RF of the image is kept only while
    /// there are instruction breakpoints that it could suppress.
    pub(super) fn merge_flags(&mut self, image: u64, mask: u64) {
        let breakpoints = self.debug.dr7 & 0xff != 0;
        let mask = if breakpoints { mask } else { mask & !RF };
        let merged = self.rflags() & !(mask | RF) | image & mask;
        self.set_rflags(merged);
        if merged & IF != 0 {
            self.events_may_come();
        }
    }

    /// Flags that an IRET of `size` bytes changes at the present privilege level.
    fn returned_flags(&self, size: u64) -> u64 {
        let mut mask = ARITHMETIC | TF | DF | NT;
        if size > 2 {
            mask |= RF | AC | ID;
        }
        if self.mode.cpl <= self.iopl() {
            mask |= IF;
        }
        if self.mode.cpl == 0 {
            mask |= IOPL | if size > 2 { VIF | VIP } else { 0 };
        }
        mask
    }

    fn iret_real<W: Word>(&mut self) -> Flow {
        let size = W::SIZE;
        let rip = self.peek::<W>(0)?.zext();
        let selector = u16::cut(self.peek::<W>(size)?.zext());
        let image = self.peek::<W>(2 * size)?.zext();
        if rip > self.segment(CS).limit.into() {
            return Err(self.gp(0));
        }
        let mut mask = self.returned_flags(size) & !(VIF | VIP);
        let mut image = image;
        if self.mode.v86 && self.iopl() < 3 {
            // With virtual-mode extensions the virtual interrupt flag stands for IF.
            let pending = image & IF != 0 && self.flag(VIP);
            if self.cr4 & cr4::VME == 0 || size != 2 || pending || image & TF != 0 {
                return Err(self.gp(0));
            }
            mask = mask & !IF | VIF;
            image = image & !VIF | if image & IF != 0 { VIF } else { 0 };
        }
        self.set_stack_pointer(self.r64(RSP).wrapping_add(3 * size));
        self.load_real_segment(CS, selector);
        self.set_rip(rip);
        self.merge_flags(image, mask);
        Err(Stop::Next)
    }

    fn iret_protected<W: Word>(&mut self, next: u64) -> Flow {
        let size = W::SIZE;
        if self.flag(NT) {
            return if self.ia32e() { Err(self.gp(0)) } else { self.task_return(next) };
        }
        let rip = self.peek::<W>(0)?.zext();
        let selector = u16::cut(self.peek::<W>(size)?.zext());
        let image = self.peek::<W>(2 * size)?.zext();
        if image & VM != 0 && size == 4 && self.mode.cpl == 0 && !self.ia32e() {
            return self.iret_to_v86(rip, selector, image);
        }
        let code = self.return_code(selector)?;
        let outer = rpl(selector) > self.mode.cpl;
        let (stack, sp) = if outer || self.mode.long {
            let sp = self.peek::<W>(3 * size)?.zext();
            let selector = u16::cut(self.peek::<W>(4 * size)?.zext());
            (self.return_stack(selector, &code)?, sp)
        } else {
            (*self.segment(SS), self.r64(RSP).wrapping_add(3 * size))
        };
        self.check_target(&code, rip)?;
        let mask = self.returned_flags(size);
        self.set_code_and_stack(code, stack);
        self.set_stack_pointer(sp);
        self.set_rip(rip);
        if outer {
            self.drop_inner_segments();
        }
        self.merge_flags(image, mask);
        Err(Stop::Next)
    }

    fn iret_to_v86(&mut self, rip: u64, code: u16, image: u64) -> Flow {
        let mut words = [0u32; 6];
        for (word, n) in words.iter_mut().zip(3..) {
            *word = self.peek(4 * n)?;
        }
        let [sp, ss, es, ds, fs, gs] = words;
        self.set_rflags(image & !RF);
        for (n, selector) in [(CS, u32::from(code)), (SS, ss), (ES, es), (DS, ds), (FS, fs), (GS, gs)] {
            self.load_real_segment(n, selector as u16);
        }
        self.set_r64(RSP, sp.into());
        self.set_rip(rip & 0xffff);
        if self.flag(IF) {
            self.events_may_come();
        }
        Err(Stop::Next)
    }
}

fn iret<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    // Also where it faults (SDM vol. 3A, 6.7.1).
    if std::mem::take(&mut cpu.nmi_masked) {
        cpu.events_may_come();
    }
    if cpu.cr0 & cr0::PE == 0 || cpu.mode.v86 {
        cpu.iret_real::<W>()
    } else {
        let next = cpu.next_rip(op);
        cpu.iret_protected::<W>(next)
    }
}

pub(super) fn select(i: &Instruction) -> Option<Selected> {
    Some(Selected::last(match i.code() {
        Code::Iretw => iret::<u16>,
        Code::Iretd => iret::<u32>,
        Code::Iretq => iret::<u64>,
        _ => return None,
    }))
}
