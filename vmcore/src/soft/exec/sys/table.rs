//! Descriptor-table registers and the task register (SDM vol. 3A, 2.4).

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::descriptor::{null, system};
use super::next;
use crate::soft::cpu::op::{Flow, Op, Selected, Stop};
use crate::soft::cpu::{Cpu, canonical, cr4, vector};
use crate::state::{DescriptorTable, Segment};

impl Cpu {
    /// #GP(0) where CR4.UMIP keeps user code from SGDT, SIDT, SLDT, SMSW and STR.
    ///
    /// # Errors
    /// As said.
    pub(super) fn check_umip(&mut self) -> Flow {
        if self.cr4 & cr4::UMIP != 0 && self.mode.cpl > 0 { Err(self.gp(0)) } else { Ok(()) }
    }

    /// Loads LDTR.
    ///
    /// # Errors
    /// #GP and #NP by the descriptor; page faults.
    fn load_ldt(&mut self, selector: u16) -> Flow {
        self.only_protected()?;
        self.only_kernel()?;
        self.ldt = self.ldt_segment(selector, vector::GP)?;
        Ok(())
    }

    /// The local descriptor table that `selector` names.
    ///
    /// # Errors
    /// `bad` where it names none, #NP where it is not present; page faults.
    pub(super) fn ldt_segment(&mut self, selector: u16, bad: u8) -> Result<Segment, Stop> {
        if null(selector) {
            return Ok(Segment { selector, kind: system::LDT, unusable: true, ..Segment::default() });
        }
        if selector & 4 != 0 {
            return Err(self.selector_fault(bad, selector));
        }
        let descriptor = self.descriptor(selector, bad)?;
        if descriptor.system() != Some(system::LDT) {
            return Err(self.selector_fault(bad, selector));
        }
        if !descriptor.present() {
            return Err(self.selector_fault(if bad == vector::GP { vector::NP } else { bad }, selector));
        }
        let mut segment = descriptor.segment(selector);
        if self.ia32e() {
            segment.base |= self.descriptor_top(selector, bad)? << 32;
        }
        Ok(segment)
    }

    /// Loads TR, and marks the task busy.
    ///
    /// # Errors
    /// #GP and #NP by the descriptor; page faults.
    fn load_task(&mut self, selector: u16) -> Flow {
        self.only_protected()?;
        self.only_kernel()?;
        if null(selector) {
            return Err(self.gp(0));
        }
        if selector & 4 != 0 {
            return Err(self.gp_selector(selector));
        }
        let descriptor = self.descriptor(selector, vector::GP)?;
        match descriptor.system() {
            Some(system::TSS) => {}
            Some(system::TSS16) if !self.ia32e() => {}
            _ => return Err(self.gp_selector(selector)),
        }
        if !descriptor.present() {
            return Err(self.np(selector));
        }
        let mut segment = descriptor.segment(selector);
        if self.ia32e() {
            segment.base |= self.descriptor_top(selector, vector::GP)? << 32;
        }
        self.set_busy(selector, true)?;
        segment.kind |= 2;
        self.tr = segment;
        Ok(())
    }

    /// Sets or clears the busy bit of the TSS that `selector` names.
    ///
    /// # Errors
    /// Page faults.
    pub(super) fn set_busy(&mut self, selector: u16, busy: bool) -> Flow {
        let Some(at) = self.descriptor_address(selector) else { return Ok(()) };
        let change = |byte: u8| if busy { byte | 2 } else { byte & !2 };
        self.as_supervisor(|cpu| cpu.modify_atomic(at.wrapping_add(5), change))
    }

    fn load_table(&mut self, op: &Op) -> Result<DescriptorTable, Stop> {
        self.only_kernel()?;
        if self.mode.long {
            let at = self.address(op, 10, false)?;
            let limit = self.load(at)?;
            let base = self.load(at.wrapping_add(2))?;
            return if canonical(base) { Ok(DescriptorTable { base, limit }) } else { Err(self.gp(0)) };
        }
        let at = self.address(op, 6, false)?;
        let limit = self.load(at)?;
        let base = self.load::<u32>(self.wrap_rip(at.wrapping_add(2)))?;
        // With a 16-bit operand size the base has 24 bits.
        let mask = if op.extra == 2 { 0xff_ffff } else { u32::MAX };
        Ok(DescriptorTable { base: (base & mask).into(), limit })
    }

    fn store_table(&mut self, op: &Op, table: DescriptorTable) -> Flow {
        self.check_umip()?;
        let size = if self.mode.long { 10 } else { 6 };
        let at = self.address(op, size, true)?;
        let mut bytes = [0; 10];
        bytes[..2].copy_from_slice(&table.limit.to_le_bytes());
        bytes[2..].copy_from_slice(&table.base.to_le_bytes());
        // Hardware does not check the alignment.
        self.unaligned(|cpu| cpu.store_bytes(at, &bytes[..size as usize]))
    }
}

fn lgdt(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.gdt = cpu.load_table(op)?;
    Ok(())
}

fn lidt(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.idt = cpu.load_table(op)?;
    Ok(())
}

fn sgdt(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.store_table(op, cpu.gdt)
}

fn sidt(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.store_table(op, cpu.idt)
}

fn selector_source<const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Result<u16, Stop> {
    if MEMORY { cpu.load_operand(op) } else { Ok(cpu.reg(op.dst)) }
}

fn lldt<const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.only_protected()?;
    cpu.only_kernel()?;
    let selector = selector_source::<MEMORY>(cpu, op)?;
    cpu.load_ldt(selector)
}

fn ltr<const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.only_protected()?;
    cpu.only_kernel()?;
    let selector = selector_source::<MEMORY>(cpu, op)?;
    cpu.load_task(selector)?;
    next(cpu, op)
}

fn store_selector<const MEMORY: bool>(cpu: &mut Cpu, op: &Op, selector: u16) -> Flow {
    cpu.only_protected()?;
    cpu.check_umip()?;
    if MEMORY {
        return cpu.store_operand(op, selector);
    }
    match op.size {
        2 => cpu.set_reg(op.dst, selector),
        4 => cpu.set_reg(op.dst, u32::from(selector)),
        _ => cpu.set_reg(op.dst, u64::from(selector)),
    }
    Ok(())
}

fn sldt<const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    store_selector::<MEMORY>(cpu, op, cpu.ldt.selector)
}

fn str<const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    store_selector::<MEMORY>(cpu, op, cpu.tr.selector)
}

pub(super) fn select(i: &Instruction) -> Option<Selected> {
    let memory = i.op0_kind() == OpKind::Memory;
    let narrow = if matches!(i.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16) { 2 } else { 4 };
    Some(match (i.mnemonic(), memory) {
        (Mnemonic::Lgdt, _) => Selected::plain(lgdt).with(narrow),
        (Mnemonic::Lidt, _) => Selected::plain(lidt).with(narrow),
        (Mnemonic::Sgdt, _) => Selected::plain(sgdt),
        (Mnemonic::Sidt, _) => Selected::plain(sidt),
        (Mnemonic::Lldt, false) => Selected::plain(lldt::<false>),
        (Mnemonic::Lldt, true) => Selected::plain(lldt::<true>),
        (Mnemonic::Ltr, false) => Selected::last(ltr::<false>),
        (Mnemonic::Ltr, true) => Selected::last(ltr::<true>),
        (Mnemonic::Sldt, false) => Selected::plain(sldt::<false>),
        (Mnemonic::Sldt, true) => Selected::plain(sldt::<true>),
        (Mnemonic::Str, false) => Selected::plain(str::<false>),
        (Mnemonic::Str, true) => Selected::plain(str::<true>),
        _ => return None,
    })
}
