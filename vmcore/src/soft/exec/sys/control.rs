//! Control registers and changes of mode (SDM vol. 3A, 2.5 and 9.9).

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::next;
use crate::soft::cpu::op::{Flow, Op, Selected, Stop};
use crate::soft::cpu::word::Word;
use crate::soft::cpu::{Cpu, cr0, cr4, efer};
use crate::soft::mmu::PHYSICAL_BITS;

/// The bits of CR0 there are.
const CR0_BITS: u64 = cr0::PE
    | cr0::MP
    | cr0::EM
    | cr0::TS
    | cr0::ET
    | cr0::NE
    | cr0::WP
    | cr0::AM
    | cr0::NW
    | cr0::CD
    | cr0::PG;

/// Bits of CR0 that translations depend on, or which of them apply.
const CR0_PAGING: u64 = cr0::PG | cr0::WP | cr0::AM;

/// Bits of CR4 that translations depend on.
const CR4_PAGING: u64 = cr4::PSE | cr4::PAE | cr4::PGE | cr4::PCIDE | cr4::SMEP | cr4::SMAP;

/// Bit 63 of a value for CR3: keep the process context's translations.
const KEEP: u64 = 1 << 63;

impl Cpu {
    /// The value of control register `n`.
    ///
    /// # Errors
    /// #UD where there is none.
    fn control_register(&mut self, n: u8) -> Result<u64, Stop> {
        Ok(match n {
            0 => self.cr0,
            2 => self.cr2,
            3 => self.cr3,
            4 => self.cr4,
            8 => self.lapic.as_ref().map_or(self.cr8, |lapic| lapic.cr8()),
            _ => return Err(self.ud()),
        })
    }

    /// Sets control register `n`.
    ///
    /// # Errors
    /// #UD where there is none, #GP(0) where `value` is not for it.
    fn set_control_register(&mut self, n: u8, value: u64) -> Flow {
        match n {
            0 => self.set_cr0(value),
            2 => {
                self.cr2 = value;
                Ok(())
            }
            3 => self.set_cr3(value),
            4 => self.set_cr4(value),
            8 => self.set_cr8(value),
            _ => Err(self.ud()),
        }
    }

    /// Sets CR0, and enters and leaves IA-32e mode with its PG.
    ///
    /// # Errors
    /// #GP(0) for combinations that are not allowed.
    pub(super) fn set_cr0(&mut self, value: u64) -> Flow {
        let new = value & CR0_BITS | cr0::ET;
        let has = |bit| new & bit != 0;
        let changed = new ^ self.cr0;
        let paging_on = has(cr0::PG) && changed & cr0::PG != 0;
        let paging_off = !has(cr0::PG) && changed & cr0::PG != 0;
        let lme = self.efer & efer::LME != 0;
        let pae = self.cr4 & cr4::PAE != 0;
        let refused = value >> 32 != 0
            || has(cr0::PG) && !has(cr0::PE)
            || has(cr0::NW) && !has(cr0::CD)
            || paging_on
                && lme
                && (!pae || self.segment(crate::soft::cpu::CS).long || self.tr.kind & 0xd == 1)
            || paging_off && (self.mode.long || self.cr4 & cr4::PCIDE != 0);
        let reloads = has(cr0::PG) && pae && !lme && changed & (cr0::PG | cr0::CD | cr0::NW) != 0;
        if refused || reloads && self.mmu.bad_pdptes(self.cr3) {
            return Err(self.gp(0));
        }
        self.cr0 = new;
        if paging_on && lme {
            self.efer |= efer::LMA;
        } else if paging_off {
            self.efer &= !efer::LMA;
        }
        if changed & CR0_PAGING != 0 || reloads {
            self.paging_changed();
        } else if changed & cr0::PE != 0 {
            self.segments_changed();
        }
        Ok(())
    }

    /// Sets CR3.
    ///
    /// # Errors
    /// #GP(0) for reserved bits, and PAE entries that have any.
    fn set_cr3(&mut self, value: u64) -> Flow {
        let pcid = self.cr4 & cr4::PCIDE != 0;
        let (value, keep) = if pcid { (value & !KEEP, value & KEEP != 0) } else { (value, false) };
        let pae = self.cr0 & cr0::PG != 0 && self.cr4 & cr4::PAE != 0 && !self.ia32e();
        let refused = self.ia32e() && value >> PHYSICAL_BITS != 0 || pae && self.mmu.bad_pdptes(value);
        if refused {
            return Err(self.gp(0));
        }
        self.cr3 = if self.ia32e() { value } else { value & 0xffff_ffff };
        self.mmu.set_cr3(self.cr3, keep);
        self.select_bank();
        Ok(())
    }

    /// The bits of CR4 that this CPU has.
    fn cr4_bits(&self) -> u64 {
        use cr4::{
            DE, FSGSBASE, MCE, OSFXSR, OSXMMEXCPT, OSXSAVE, PAE, PCE, PCIDE, PGE, PSE, PVI, SMAP, SMEP,
        };
        use cr4::{TSD, UMIP, VME};
        let leaf = |leaf| self.cpuid.get(leaf, 0).copied().unwrap_or_default();
        let (leaf1, leaf7) = (leaf(1), leaf(7));
        let feature = |register: u32, bit: u32, allows| if register >> bit & 1 != 0 { allows } else { 0 };
        (VME | PVI | TSD | DE | PSE | PAE | MCE | PGE | PCE | OSFXSR | OSXMMEXCPT)
            | feature(leaf1.ecx, 17, PCIDE)
            | feature(leaf1.ecx, 26, OSXSAVE)
            | feature(leaf7.ebx, 0, FSGSBASE)
            | feature(leaf7.ebx, 7, SMEP)
            | feature(leaf7.ebx, 20, SMAP)
            | feature(leaf7.ecx, 2, UMIP)
    }

    /// Sets CR4.
    ///
    /// # Errors
    /// #GP(0) for bits that this CPU has not, and combinations that are not allowed.
    fn set_cr4(&mut self, value: u64) -> Flow {
        let changed = value ^ self.cr4;
        let on = |bit| value & changed & bit != 0;
        let off = |bit| !value & changed & bit != 0;
        let refused = value & !self.cr4_bits() & changed != 0
            || off(cr4::PAE) && self.ia32e()
            || on(cr4::PCIDE) && (!self.ia32e() || self.cr3 & 0xfff != 0);
        let pae = self.cr0 & cr0::PG != 0 && value & cr4::PAE != 0 && !self.ia32e();
        let reloads = pae && changed & (cr4::PAE | cr4::PGE | cr4::PSE | cr4::SMEP) != 0;
        if refused || reloads && self.mmu.bad_pdptes(self.cr3) {
            return Err(self.gp(0));
        }
        self.cr4 = value;
        if changed & cr4::DE != 0 {
            self.arm_breakpoints();
        }
        if changed & CR4_PAGING != 0 {
            self.paging_changed();
        }
        Ok(())
    }

    /// Sets CR8: the task priority.
    ///
    /// # Errors
    /// #GP(0) for more than 4 bits.
    fn set_cr8(&mut self, value: u64) -> Flow {
        if value > 15 {
            return Err(self.gp(0));
        }
        self.cr8 = value;
        if let Some(lapic) = &mut self.lapic {
            lapic.set_cr8(value);
            if lapic.pending().is_some() {
                self.link.demand_own(crate::soft::link::attention::EVENT);
            }
        }
        Ok(())
    }

    /// Sets EFER from a WRMSR. `false`: #GP(0).
    pub(super) fn set_efer(&mut self, value: u64) -> bool {
        const BITS: u64 = efer::SCE | efer::LME | efer::LMA | efer::NXE;
        let paged = self.cr0 & cr0::PG != 0;
        if value & !BITS != 0 || paged && (value ^ self.efer) & efer::LME != 0 {
            return false;
        }
        let new = value & !efer::LMA | self.efer & efer::LMA;
        let changed = new ^ self.efer;
        self.efer = new;
        if changed & efer::NXE != 0 {
            self.paging_changed();
        }
        true
    }
}

fn read<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.only_kernel()?;
    let value = cpu.control_register(op.src)?;
    cpu.set_reg(op.dst, W::cut(value));
    Ok(())
}

fn write<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.only_kernel()?;
    let value = cpu.reg::<W>(op.src).zext();
    // The address of the next instruction is cut as in the mode that this one is in.
    let rip = cpu.next_rip(op);
    cpu.set_control_register(op.dst, value)?;
    cpu.set_rip(rip);
    Err(Stop::Next)
}

fn clts(cpu: &mut Cpu, _: &Op) -> Flow {
    cpu.only_kernel()?;
    cpu.cr0 &= !cr0::TS;
    Ok(())
}

fn smsw_register<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.check_umip()?;
    cpu.set_reg(op.dst, W::cut(cpu.cr0));
    Ok(())
}

fn smsw_memory(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.check_umip()?;
    cpu.store_operand(op, u16::cut(cpu.cr0))
}

fn lmsw<const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.only_kernel()?;
    let value: u16 = if MEMORY { cpu.load_operand(op)? } else { cpu.reg(op.dst) };
    // PE can be set, and not cleared.
    let mask = cr0::PE | cr0::MP | cr0::EM | cr0::TS;
    let new = cpu.cr0 & !(mask & !cr0::PE) | u64::from(value) & mask;
    cpu.set_cr0(new)?;
    next(cpu, op)
}

pub(super) fn select(i: &Instruction) -> Option<Selected> {
    let memory = i.op0_kind() == OpKind::Memory;
    // CR2 and CR8 change nothing that the next instructions mean, but CR8 may let interrupts in.
    let wide = i.op1_register() != Register::None && i.op1_register().size() == 8;
    Some(match i.code() {
        Code::Mov_r32_cr => Selected::plain(read::<u32>),
        Code::Mov_r64_cr => Selected::plain(read::<u64>),
        Code::Mov_cr_r32 | Code::Mov_cr_r64 if wide => Selected::last(write::<u64>),
        Code::Mov_cr_r32 | Code::Mov_cr_r64 => Selected::last(write::<u32>),
        _ => match i.mnemonic() {
            Mnemonic::Clts => Selected::plain(clts),
            Mnemonic::Smsw if memory => Selected::plain(smsw_memory),
            Mnemonic::Smsw => match i.op0_register().size() {
                2 => Selected::plain(smsw_register::<u16>),
                4 => Selected::plain(smsw_register::<u32>),
                _ => Selected::plain(smsw_register::<u64>),
            },
            Mnemonic::Lmsw if memory => Selected::last(lmsw::<true>),
            Mnemonic::Lmsw => Selected::last(lmsw::<false>),
            _ => return None,
        },
    })
}
