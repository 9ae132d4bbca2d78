//! Delivery of exceptions and interrupts (SDM vol. 3A, chapter 6), INT n and its relatives.

use iced_x86::{Instruction, Mnemonic};

use super::descriptor::{Descriptor, null, system, within};
use super::segment::null_stack;
use crate::soft::cpu::flags::{AC, IF, NT, RF, TF, VIF, VIP, VM};
use crate::soft::cpu::op::{Flow, Op, Selected, Stop};
use crate::soft::cpu::{CS, Cpu, DS, ES, FS, Fault, GS, Leave, RSP, SS, Shadow, canonical, cr0, cr4, vector};
use crate::state::Segment;

/// Where an event comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// The processor itself, a device, or INT1: gates' DPL does not matter, and faults that its
    /// delivery makes have EXT set in their error codes.
    External,
    /// INT n, INT3 and INTO.
    Software,
}

/// What is to be delivered.
#[derive(Clone, Copy, Debug)]
struct Event {
    vector: u8,
    code: Option<u32>,
    source: Source,
    /// Where its handler shall return to.
    rip: u64,
    /// RF shall be set in the saved flags.
    rf: bool,
}

/// DR6.B0 to B3.
const DR6_BREAKPOINTS: u64 = 0xf;
/// DR6.BS, BT and B0 to B3: traps, and breakpoints on execution, which leave RF to their handler (SDM
/// vol. 3B, 18.3.1.1).
const DR6_TRAPS: u64 = 1 << 14 | 1 << 15 | DR6_BREAKPOINTS;

/// DR7.GD.
const DR7_GD: u64 = 1 << 13;

/// What comes of exception `second` during the delivery of `first` (SDM vol. 3A, table 6-5): `None` is
/// shutdown.
fn combined(first: u8, second: Fault) -> Option<Fault> {
    let contributory = |v| matches!(v, vector::DE | vector::TS | vector::NP | vector::SS | vector::GP);
    let double = match first {
        vector::DF => return None,
        vector::PF => contributory(second.vector) || second.vector == vector::PF,
        first => contributory(first) && contributory(second.vector),
    };
    Some(if double { Fault { vector: vector::DF, code: Some(0), payload: 0 } } else { second })
}

impl Cpu {
    /// Delivers the exception in `Cpu::fault`. RIP is the address that its handler shall return to.
    ///
    /// # Errors
    /// [`Stop::Leave`] with [`Leave::TripleFault`] where it cannot be delivered, nor a double fault.
    pub(in crate::soft) fn deliver_fault(&mut self) -> Flow {
        let mut fault = self.fault;
        loop {
            let rf = match fault.vector {
                vector::DB => fault.payload & DR6_TRAPS == 0,
                vector::BP | vector::OF => false,
                _ => true,
            };
            match fault.vector {
                vector::PF => self.cr2 = fault.payload,
                vector::DB => {
                    self.debug.dr6 = self.debug.dr6 & !DR6_BREAKPOINTS | fault.payload;
                    self.debug.dr7 &= !DR7_GD;
                }
                _ => {}
            }
            let event = Event {
                vector: fault.vector,
                code: fault.code,
                source: Source::External,
                rip: self.rip(),
                rf,
            };
            match self.deliver(&event) {
                Err(Stop::Fault) => {
                    // CR2 tells the last page fault, also where it is part of a double fault.
                    if self.fault.vector == vector::PF {
                        self.cr2 = self.fault.payload;
                    }
                    match combined(fault.vector, self.fault) {
                        Some(next) => fault = next,
                        None => return Err(self.leave(Leave::TripleFault)),
                    }
                }
                other => return other,
            }
        }
    }

    /// Delivers an external interrupt: `vector` has been acknowledged.
    ///
    /// # Errors
    /// As [`Cpu::deliver_fault`].
    pub(in crate::soft) fn deliver_interrupt(&mut self, vector: u8) -> Flow {
        let event = Event { vector, code: None, source: Source::External, rip: self.rip(), rf: false };
        match self.deliver(&event) {
            Err(Stop::Fault) => self.deliver_fault(),
            other => other,
        }
    }

    /// Delivers a non-maskable interrupt, and masks further ones.
    ///
    /// # Errors
    /// As [`Cpu::deliver_fault`].
    pub(in crate::soft) fn deliver_nmi(&mut self) -> Flow {
        self.nmi_masked = true;
        self.deliver_interrupt(vector::NMI)
    }

    fn deliver(&mut self, event: &Event) -> Flow {
        let result = if self.cr0 & cr0::PE == 0 {
            self.deliver_real(event.vector, event.rip)
        } else if self.ia32e() {
            self.deliver_long(event)
        } else {
            self.deliver_protected(event)
        };
        match result {
            Ok(()) => {
                self.shadow = Shadow::default();
                self.no_step = true;
            }
            Err(Stop::Fault) if event.source == Source::External => {
                let selector_codes = matches!(self.fault.vector, vector::TS..=vector::GP);
                if let (true, Some(code)) = (selector_codes, &mut self.fault.code) {
                    *code |= 1;
                }
            }
            Err(_) => {}
        }
        result
    }

    /// By the vector table of real mode (SDM vol. 3B, 20.1.4).
    fn deliver_real(&mut self, vector: u8, rip: u64) -> Flow {
        let offset = u64::from(vector) * 4;
        if offset + 3 > u64::from(self.idt.limit) {
            return Err(self.gp(0));
        }
        let entry: u32 = self.load_system(self.wrap_system(self.idt.base.wrapping_add(offset)))?;
        self.enter_real(entry, rip, self.rflags())
    }

    /// Pushes `saved` flags, CS and `rip` as 16-bit values, and goes to the far address `entry`.
    fn enter_real(&mut self, entry: u32, rip: u64, saved: u64) -> Flow {
        let stack = *self.segment(SS);
        let values = [saved & 0xffff, self.segment(CS).selector.into(), rip & 0xffff];
        let sp = self.r64(RSP);
        let frame = Frame { stack: &stack, sp, mask: self.stack_mask(), size: 2, fault: 0 };
        let sp = self.push_frame(&frame, &values, self.mode.cpl)?;
        self.set_stack_pointer(sp);
        self.load_real_segment(CS, (entry >> 16) as u16);
        self.set_rip((entry & 0xffff).into());
        self.set_rflags(self.rflags() & !(IF | TF | AC | RF));
        Ok(())
    }

    /// The gate of `event` and its error code's index part.
    fn gate(&mut self, event: &Event, size: u64) -> Result<(u64, u16), Stop> {
        let index = u16::from(event.vector) << 3 | 2;
        let offset = u64::from(event.vector) * size;
        if offset + (size - 1) > u64::from(self.idt.limit) {
            return Err(self.gp(index));
        }
        Ok((self.wrap_system(self.idt.base.wrapping_add(offset)), index))
    }

    /// The code segment that a gate leads to: its descriptor and the new privilege level.
    fn gate_code(&mut self, selector: u16) -> Result<(Descriptor, u8), Stop> {
        if null(selector) {
            return Err(self.gp(0));
        }
        let code = self.descriptor(selector, vector::GP)?;
        if !code.is_code() || code.dpl() > self.mode.cpl {
            return Err(self.gp_selector(selector));
        }
        if !code.present() {
            return Err(self.np(selector));
        }
        Ok((code, if code.conforming() { self.mode.cpl } else { code.dpl() }))
    }

    /// By a 64-bit gate (SDM vol. 3A, 6.14).
    fn deliver_long(&mut self, event: &Event) -> Flow {
        let (at, index) = self.gate(event, 16)?;
        let gate = Descriptor(self.load_system(at)?);
        let high: u64 = self.load_system(at.wrapping_add(8))?;
        let interrupt = match gate.system() {
            Some(system::INTERRUPT_GATE) => true,
            Some(system::TRAP_GATE) => false,
            _ => return Err(self.gp(index)),
        };
        if event.source == Source::Software && gate.dpl() < self.mode.cpl {
            return Err(self.gp(index));
        }
        if !gate.present() {
            return Err(self.raise(vector::NP, Some(index.into())));
        }
        let selector = gate.gate_selector();
        let (code, cpl) = self.gate_code(selector)?;
        if !code.long() || code.big() {
            return Err(self.gp_selector(selector));
        }
        let inner = cpl < self.mode.cpl;
        let rsp = match gate.gate_stack() {
            0 if !inner => self.r64(RSP),
            0 => self.tss_field(4 + 8 * u64::from(cpl))?,
            stack => self.tss_field(28 + 8 * stack)?,
        };
        if !canonical(rsp) {
            return Err(self.ss(0));
        }
        let target = gate.gate_offset() | high << 32;
        if !canonical(target) {
            return Err(self.gp(0));
        }
        let values = [
            event.code.unwrap_or(0).into(),
            event.rip,
            self.segment(CS).selector.into(),
            self.rflags() | if event.rf { RF } else { 0 },
            self.r64(RSP),
            self.segment(SS).selector.into(),
        ];
        let values = if event.code.is_some() { &values[..] } else { &values[1..] };
        let rsp = (rsp & !15).wrapping_sub(8 * values.len() as u64);
        let write = |cpu: &mut Self| {
            cpu.check_write(rsp, 8 * values.len() as u64)?;
            (0..).zip(values).try_for_each(|(n, &value)| cpu.store(rsp.wrapping_add(8 * n), value))
        };
        if cpl < 3 {
            self.as_supervisor(write)?
        } else {
            write(self)?
        }
        self.mark_accessed(selector, code)?;
        let cleared = TF | NT | RF | VM | if interrupt { IF } else { 0 };
        self.set_rflags(self.rflags() & !cleared);
        self.set_r64(RSP, rsp);
        let stack = if inner { null_stack(cpl.into()) } else { *self.segment(SS) };
        self.set_code_and_stack(code.segment(selector & !3 | u16::from(cpl)), stack);
        self.set_rip(target);
        Ok(())
    }

    /// By a gate of protected mode (SDM vol. 3A, 6.11 and 6.12).
    fn deliver_protected(&mut self, event: &Event) -> Flow {
        let (at, index) = self.gate(event, 8)?;
        let gate = Descriptor(self.load_system(at)?);
        let kind = gate.system();
        if !matches!(kind, Some(system::TASK_GATE..=system::TRAP_GATE16 | system::INTERRUPT_GATE..)) {
            return Err(self.gp(index));
        }
        if event.source == Source::Software && gate.dpl() < self.mode.cpl {
            return Err(self.gp(index));
        }
        if !gate.present() {
            return Err(self.raise(vector::NP, Some(index.into())));
        }
        let selector = gate.gate_selector();
        if kind == Some(system::TASK_GATE) {
            return self.task_of_gate(selector, event.rip, event.rf, event.code);
        }
        let interrupt = matches!(kind, Some(system::INTERRUPT_GATE | system::INTERRUPT_GATE16));
        let size = if gate.kind() & 8 != 0 { 4 } else { 2 };
        let (code, cpl) = self.gate_code(selector)?;
        let v86 = self.mode.v86;
        if v86 && cpl != 0 {
            return Err(self.gp_selector(selector));
        }
        let inner = cpl < self.mode.cpl;
        let old_stack = *self.segment(SS);
        let (stack, sp, fault) = if inner {
            let (selector, sp) = self.inner_stack_pointer(cpl)?;
            if null(selector) {
                return Err(self.ts(0));
            }
            (self.stack_segment(selector, cpl, vector::TS, vector::SS)?, sp, selector)
        } else {
            (old_stack, self.r64(RSP), 0)
        };
        let mask = if stack.big { 0xffff_ffff } else { 0xffff };
        let target = gate.gate_offset();
        if target > u64::from(code.limit()) {
            return Err(self.gp(0));
        }
        let sel = |cpu: &Self, n: usize| u64::from(cpu.segment(n).selector);
        let mut values = [0; 10];
        let mut count = 0;
        let mut add = |value| {
            values[count] = value;
            count += 1;
        };
        if v86 {
            [GS, FS, DS, ES].into_iter().for_each(|n| add(sel(self, n)));
        }
        if inner {
            add(sel(self, SS));
            add(self.r64(RSP));
        }
        add(self.rflags() | if event.rf { RF } else { 0 });
        add(sel(self, CS));
        add(event.rip);
        if let Some(code) = event.code {
            add(code.into());
        }
        let frame = Frame { stack: &stack, sp, mask, size, fault };
        let sp = self.push_frame(&frame, &values[..count], cpl)?;
        self.mark_accessed(selector, code)?;
        if v86 {
            for n in [ES, DS, FS, GS] {
                self.set_segment(n, Segment { unusable: true, ..Segment::default() });
            }
        }
        let cleared = TF | NT | RF | VM | if interrupt { IF } else { 0 };
        self.set_rflags(self.rflags() & !cleared);
        self.set_code_and_stack(code.segment(selector & !3 | u16::from(cpl)), stack);
        self.set_stack_pointer(sp);
        self.set_rip(target);
        Ok(())
    }

    /// SS and ESP of privilege level `cpl` in the TSS of protected mode.
    ///
    /// # Errors
    /// #TS where the TSS is too short.
    pub(super) fn inner_stack_pointer(&mut self, cpl: u8) -> Result<(u16, u64), Stop> {
        let level = u64::from(cpl);
        if self.tr.kind & 8 != 0 {
            let selector = self.tss_field::<u16>(8 + 8 * level)?;
            Ok((selector, self.tss_field::<u32>(4 + 8 * level)?.into()))
        } else {
            let selector = self.tss_field::<u16>(4 + 4 * level)?;
            Ok((selector, self.tss_field::<u16>(2 + 4 * level)?.into()))
        }
    }

    /// Pushes `values` in their order on a stack that need not be the current one, with the rights of
    /// level `cpl`. Returns the stack pointer's bits that count. Nothing is written where it faults.
    ///
    /// # Errors
    /// #SS by the segment's limit; page faults.
    pub(super) fn push_frame(&mut self, frame: &Frame<'_>, values: &[u64], cpl: u8) -> Result<u64, Stop> {
        let Frame { stack, sp, mask, size, fault } = *frame;
        let offset = |n: usize| sp.wrapping_sub(size * (n as u64 + 1)) & mask;
        for n in 0..values.len() {
            if !within(stack, offset(n), size) {
                return Err(self.selector_fault(vector::SS, fault));
            }
        }
        let write = |cpu: &mut Self| {
            let at = |n| stack.base.wrapping_add(offset(n)) & 0xffff_ffff;
            (0..values.len()).try_for_each(|n| cpu.check_write(at(n), size))?;
            (0..values.len()).try_for_each(|n| match size {
                2 => cpu.store(at(n), values[n] as u16),
                _ => cpu.store(at(n), values[n] as u32),
            })
        };
        if cpl < 3 {
            self.as_supervisor(write)?
        } else {
            write(self)?
        }
        Ok(sp.wrapping_sub(size * values.len() as u64) & mask)
    }

    /// INT n and its relatives: a trap that returns to `rip`.
    fn software(&mut self, vector: u8, source: Source, rip: u64) -> Flow {
        self.deliver(&Event { vector, code: None, source, rip, rf: false })?;
        Err(Stop::Next)
    }

    /// INT n in virtual-8086 mode (SDM vol. 3B, 20.3.3). `None`: as in protected mode.
    fn software_v86(&mut self, vector: u8, rip: u64) -> Option<Flow> {
        if self.cr4 & cr4::VME != 0 {
            match self.redirected(vector) {
                Ok(true) => return Some(self.enter_v86(vector, rip)),
                Ok(false) => {}
                Err(stop) => return Some(Err(stop)),
            }
        }
        (self.iopl() < 3).then(|| Err(self.gp(0)))
    }

    /// Whether the TSS's bitmap sends `vector` to the handler in virtual-8086 mode.
    fn redirected(&mut self, vector: u8) -> Result<bool, Stop> {
        let map: u16 = self.tss_field(102)?;
        let at = u64::from(map).wrapping_sub(32).wrapping_add(u64::from(vector) / 8);
        if at > u64::from(self.tr.limit) {
            return Err(self.gp(0));
        }
        let byte: u8 = self.tss_field(at)?;
        Ok(byte >> (vector % 8) & 1 == 0)
    }

    /// By the vector table at linear address 0. Without IOPL 3 the virtual interrupt flag stands for
    /// IF.
    fn enter_v86(&mut self, vector: u8, rip: u64) -> Flow {
        let entry: u32 = self.load(u64::from(vector) * 4)?;
        let flags = self.rflags();
        let saved = if self.iopl() == 3 {
            flags
        } else {
            flags & !IF | if flags & VIF != 0 { IF } else { 0 } | 3 << 12
        };
        self.enter_real(entry, rip, saved)?;
        // `enter_real` has cleared IF; with a virtual interrupt flag that is the one that goes.
        if self.iopl() < 3 {
            let keep = flags & (IF | AC);
            self.set_rflags(self.rflags() & !VIF | keep);
        } else {
            self.set_rflags(self.rflags() | flags & AC);
        }
        debug_assert_eq!(self.rflags() & VIP, flags & VIP);
        Err(Stop::Next)
    }
}

/// Where [`Cpu::push_frame`] pushes.
pub(super) struct Frame<'a> {
    pub(super) stack: &'a Segment,
    pub(super) sp: u64,
    /// The bits of the stack pointer that count.
    pub(super) mask: u64,
    /// Bytes of a value: 2 or 4.
    pub(super) size: u64,
    /// Selector for the error code of #SS.
    pub(super) fault: u16,
}

fn int_n(cpu: &mut Cpu, op: &Op) -> Flow {
    let (vector, rip) = (op.imm as u8, cpu.next_rip(op));
    if cpu.mode.v86
        && let Some(result) = cpu.software_v86(vector, rip)
    {
        return result;
    }
    cpu.software(vector, Source::Software, rip)
}

fn int3(cpu: &mut Cpu, op: &Op) -> Flow {
    let rip = cpu.next_rip(op);
    if cpu.break_on_int3 {
        cpu.set_rip(cpu.wrap_rip(rip.wrapping_sub(op.len.into())));
        return Err(cpu.leave(Leave::Debug { dr6: 0, exception: vector::BP }));
    }
    cpu.software(vector::BP, Source::Software, rip)
}

fn into(cpu: &mut Cpu, op: &Op) -> Flow {
    if !cpu.flags.of() {
        return Ok(());
    }
    let rip = cpu.next_rip(op);
    cpu.software(vector::OF, Source::Software, rip)
}

/// INT1: as if the processor had raised #DB.
fn int1(cpu: &mut Cpu, op: &Op) -> Flow {
    let rip = cpu.next_rip(op);
    cpu.debug.dr7 &= !DR7_GD;
    cpu.software(vector::DB, Source::External, rip)
}

pub(super) fn select(i: &Instruction) -> Option<Selected> {
    Some(match i.mnemonic() {
        Mnemonic::Int => Selected::last(int_n),
        Mnemonic::Int3 => Selected::last(int3),
        Mnemonic::Into => Selected::plain(into),
        Mnemonic::Int1 => Selected::last(int1),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exceptions_combine_as_the_manual_has_it() {
        let fault = |vector| Fault { vector, code: Some(0), payload: 0 };
        let vector_of = |first, second| combined(first, fault(second)).map(|f| f.vector);
        assert_eq!(vector_of(vector::UD, vector::GP), Some(vector::GP));
        assert_eq!(vector_of(vector::GP, vector::NP), Some(vector::DF));
        assert_eq!(vector_of(vector::GP, vector::PF), Some(vector::PF));
        assert_eq!(vector_of(vector::PF, vector::PF), Some(vector::DF));
        assert_eq!(vector_of(vector::PF, vector::SS), Some(vector::DF));
        assert_eq!(vector_of(vector::PF, vector::DB), Some(vector::DB));
        assert_eq!(vector_of(vector::DF, vector::GP), None);
        assert_eq!(vector_of(vector::DF, vector::PF), None);
    }
}
