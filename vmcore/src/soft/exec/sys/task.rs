//! Hardware task switches (SDM vol. 3A, chapter 7).

use super::descriptor::{null, rpl, system};
use super::interrupt::Frame;
use crate::soft::cpu::flags::{NT, RF, VM};
use crate::soft::cpu::op::{Flow, Stop};
use crate::soft::cpu::word::Word;
use crate::soft::cpu::{CS, Cpu, DS, ES, FS, Fault, GS, RSP, SS, cr0, vector};
use crate::state::Segment;

/// What makes the switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Switch {
    Jump,
    /// A call, exception or interrupt: the new task returns to the old one.
    Call,
    /// IRET with NT.
    Return,
}

/// DR6.BT: a switch to a task whose TSS has the T flag.
const DR6_BT: u64 = 1 << 15;
/// DR7's local enables, which are a task's.
const DR7_LOCAL: u64 = 0x155;

/// A task's registers as a TSS has them.
#[derive(Clone, Copy, Debug, Default)]
struct TaskState {
    cr3: Option<u32>,
    rip: u64,
    flags: u64,
    gpr: [u64; 8],
    /// ES, CS, SS, DS, FS, GS.
    segments: [u16; 6],
    ldt: u16,
    trap: bool,
}

/// Whether a TSS of type `kind` is a 32-bit one.
fn wide(kind: u8) -> bool {
    kind & 8 != 0
}

impl Cpu {
    /// The task switch that an interrupt's task gate makes. `rip` and `rf` are the old task's.
    pub(super) fn task_of_gate(&mut self, selector: u16, rip: u64, rf: bool, code: Option<u32>) -> Flow {
        self.switch_task(selector, Switch::Call, rip, rf, code)
    }

    /// IRET with NT: back to the task that the TSS's link names.
    pub(super) fn task_return(&mut self, next: u64) -> Flow {
        let selector = self.tss_field(0)?;
        self.switch_task(selector, Switch::Return, next, false, None)?;
        Err(Stop::Next)
    }

    /// Switches to the task `selector`; the old one goes on at `rip`. `code` is pushed on the new
    /// task's stack.
    ///
    /// # Errors
    /// Faults in the old task: nothing has changed. Faults in the new one have been delivered.
    pub(super) fn switch_task(
        &mut self,
        selector: u16,
        how: Switch,
        rip: u64,
        rf: bool,
        code: Option<u32>,
    ) -> Flow {
        let bad = if how == Switch::Return { vector::TS } else { vector::GP };
        if null(selector) || selector & 4 != 0 {
            return Err(self.selector_fault(bad, selector));
        }
        let descriptor = self.descriptor(selector, bad)?;
        let (available, busy) = (
            matches!(descriptor.system(), Some(system::TSS | system::TSS16)),
            matches!(descriptor.system(), Some(system::TSS_BUSY | system::TSS16_BUSY)),
        );
        if !(if how == Switch::Return { busy } else { available }) {
            return Err(self.selector_fault(bad, selector));
        }
        if !descriptor.present() {
            return Err(self.np(selector));
        }
        let mut new = descriptor.segment(selector);
        if new.limit < if wide(new.kind) { 0x67 } else { 0x2b } {
            return Err(self.ts(selector));
        }
        new.kind |= 2;
        let state = self.load_task_state(&new)?;
        let old = self.tr;
        let flags = self.rflags() | if rf { RF } else { 0 };
        self.check_task_store(&old)?;
        self.as_supervisor(|cpu| cpu.check_write(new.base, 2))?;
        let flags = if how == Switch::Return { flags & !NT } else { flags };
        self.store_task_state(&old, rip, flags)?;
        if how != Switch::Call {
            self.set_busy(old.selector, false)?;
        } else {
            self.store_system(new.base, old.selector)?;
        }
        if how != Switch::Return {
            self.set_busy(selector, true)?;
        }
        self.tr = new;
        self.cr0 |= cr0::TS;
        if self.debug.dr7 & DR7_LOCAL != 0 {
            self.debug.dr7 &= !DR7_LOCAL;
            self.arm_breakpoints();
        }
        let nested = if how == Switch::Call { NT } else { 0 };
        let result = self.enter_task(&state, nested, &new, code);
        match result {
            Err(Stop::Fault) => self.deliver_fault(),
            other => other,
        }
    }

    fn load_task_state(&mut self, tss: &Segment) -> Result<TaskState, Stop> {
        let mut state = TaskState::default();
        if wide(tss.kind) {
            let mut words = [0u32; 26];
            for (n, word) in (0..).zip(&mut words) {
                *word = self.load_system(self.wrap_system(tss.base + 4 * n))?;
            }
            state.cr3 = Some(words[7]);
            (state.rip, state.flags) = (words[8].into(), words[9].into());
            state.gpr = std::array::from_fn(|n| words[10 + n].into());
            state.segments = std::array::from_fn(|n| words[18 + n] as u16);
            state.ldt = words[24] as u16;
            state.trap = words[25] & 1 != 0;
        } else {
            let mut words = [0u16; 22];
            for (n, word) in (0..).zip(&mut words) {
                *word = self.load_system(self.wrap_system(tss.base + 2 * n))?;
            }
            (state.rip, state.flags) = (words[7].into(), words[8].into());
            state.gpr = std::array::from_fn(|n| 0xffff_0000 | u64::from(words[9 + n]));
            state.segments[..4].copy_from_slice(&words[17..21]);
            state.ldt = words[21];
        }
        Ok(state)
    }

    /// Makes the faults that [`Cpu::store_task_state`] would make.
    fn check_task_store(&mut self, tss: &Segment) -> Flow {
        let size = if wide(tss.kind) { 0x68 } else { 0x2c };
        if u64::from(tss.limit) + 1 < size {
            return Err(self.ts(tss.selector));
        }
        self.as_supervisor(|cpu| cpu.check_write(tss.base, size))
    }

    fn store_task_state(&mut self, tss: &Segment, rip: u64, flags: u64) -> Flow {
        let gpr: [u64; 8] = std::array::from_fn(|n| self.r64(n));
        let selectors = [ES, CS, SS, DS, FS, GS].map(|n| u64::from(self.segment(n).selector));
        let (first, count, size) = if wide(tss.kind) { (0x20, 6, 4) } else { (0x0e, 4, 2) };
        let values = [rip, flags].into_iter().chain(gpr).chain(selectors[..count].iter().copied());
        for (n, value) in (0..).zip(values) {
            let at = self.wrap_system(tss.base + first + size * n);
            match size {
                4 => self.store_system(at, u32::cut(value))?,
                _ => self.store_system(at, u16::cut(value))?,
            }
        }
        Ok(())
    }

    /// Takes over the registers of the new task. Faults are the new task's.
    fn enter_task(&mut self, state: &TaskState, nested: u64, tss: &Segment, code: Option<u32>) -> Flow {
        let [es, cs, ss, ds, fs, gs] = state.segments;
        if let Some(cr3) = state.cr3.filter(|_| self.cr0 & cr0::PG != 0) {
            self.cr3 = cr3.into();
            self.mmu.set_cr3(self.cr3, false);
        }
        (0..8).zip(state.gpr).for_each(|(n, value)| self.set_r64(n, value));
        self.set_rip(state.rip);
        self.set_rflags(state.flags & !RF | nested);
        // Until they are loaded the segments cannot be used, and the level is that of CS.
        let unusable = |selector, dpl| Segment { selector, dpl, unusable: true, ..Segment::default() };
        for (n, selector) in [(ES, es), (CS, cs), (SS, ss), (DS, ds), (FS, fs), (GS, gs)] {
            self.set_segment(n, unusable(selector, rpl(cs)));
        }
        self.ldt = Segment { kind: system::LDT, ..unusable(state.ldt, 0) };
        self.select_bank();
        self.ldt = self.ldt_segment(state.ldt, vector::TS)?;
        if state.flags & VM != 0 {
            for (n, selector) in [(CS, cs), (SS, ss), (ES, es), (DS, ds), (FS, fs), (GS, gs)] {
                self.load_real_segment(n, selector);
            }
        } else {
            self.load_task_segments(state)?;
        }
        if state.rip > self.segment(CS).limit.into() {
            return Err(self.gp(0));
        }
        if let Some(code) = code {
            let stack = *self.segment(SS);
            let (sp, mask) = (self.r64(RSP), self.stack_mask());
            let size = if wide(tss.kind) { 4 } else { 2 };
            let frame = Frame { stack: &stack, sp, mask, size, fault: 0 };
            let sp = self.push_frame(&frame, &[code.into()], self.mode.cpl)?;
            self.set_stack_pointer(sp);
        }
        if state.trap {
            self.fault = Fault { vector: vector::DB, code: None, payload: DR6_BT };
            return Err(Stop::Fault);
        }
        Ok(())
    }

    fn load_task_segments(&mut self, state: &TaskState) -> Flow {
        let [es, cs, ss, ds, fs, gs] = state.segments;
        if null(cs) {
            return Err(self.ts(0));
        }
        let code = self.descriptor(cs, vector::TS)?;
        let level = if code.conforming() { code.dpl() <= rpl(cs) } else { code.dpl() == rpl(cs) };
        if !code.is_code() || !level {
            return Err(self.ts(cs));
        }
        if !code.present() {
            return Err(self.np(cs));
        }
        self.mark_accessed(cs, code)?;
        if null(ss) {
            return Err(self.ts(ss));
        }
        let stack = self.stack_segment(ss, rpl(cs), vector::TS, vector::SS)?;
        self.set_code_and_stack(code.segment(cs), stack);
        for (n, selector) in [(DS, ds), (ES, es), (FS, fs), (GS, gs)] {
            match self.data_segment(n, selector) {
                Ok(segment) => self.set_segment(n, segment),
                Err(Stop::Fault) => {
                    // What is #GP for a load is #TS here.
                    if self.fault.vector == vector::GP {
                        self.fault.vector = vector::TS;
                    }
                    return Err(Stop::Fault);
                }
                Err(stop) => return Err(stop),
            }
        }
        Ok(())
    }
}
