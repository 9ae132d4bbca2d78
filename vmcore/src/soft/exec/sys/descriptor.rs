//! Segment descriptors and gates (SDM vol. 3A, 3.4.5, 5.8.3 and 6.11), and the tables they are in.

use crate::soft::cpu::op::{Flow, Stop};
use crate::soft::cpu::{Cpu, vector};
use crate::state::Segment;

/// The first eight bytes of a descriptor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Descriptor(pub(super) u64);

/// A bit of the type field of code and data segments.
const ACCESSED: u8 = 1;
const READABLE_OR_WRITABLE: u8 = 2;
const CONFORMING_OR_DOWN: u8 = 4;
const CODE: u8 = 8;

/// Types of system descriptors (SDM vol. 3A, table 3-2).
pub(super) mod system {
    pub(in crate::soft::exec::sys) const TSS16: u8 = 1;
    pub(in crate::soft::exec::sys) const LDT: u8 = 2;
    pub(in crate::soft::exec::sys) const TSS16_BUSY: u8 = 3;
    pub(in crate::soft::exec::sys) const CALL_GATE16: u8 = 4;
    pub(in crate::soft::exec::sys) const TASK_GATE: u8 = 5;
    pub(in crate::soft::exec::sys) const INTERRUPT_GATE16: u8 = 6;
    pub(in crate::soft::exec::sys) const TRAP_GATE16: u8 = 7;
    pub(in crate::soft::exec::sys) const TSS: u8 = 9;
    pub(in crate::soft::exec::sys) const TSS_BUSY: u8 = 0xb;
    pub(in crate::soft::exec::sys) const CALL_GATE: u8 = 0xc;
    pub(in crate::soft::exec::sys) const INTERRUPT_GATE: u8 = 0xe;
    pub(in crate::soft::exec::sys) const TRAP_GATE: u8 = 0xf;
}

impl Descriptor {
    fn bit(self, n: u32) -> bool {
        self.0 >> n & 1 != 0
    }

    fn bits(self, at: u32, count: u32) -> u64 {
        self.0 >> at & ((1 << count) - 1)
    }

    /// Base, 32 bits.
    pub(super) fn base(self) -> u64 {
        self.bits(16, 24) | self.bits(56, 8) << 24
    }

    /// Last valid offset in bytes.
    pub(super) fn limit(self) -> u32 {
        let raw = (self.bits(0, 16) | self.bits(48, 4) << 16) as u32;
        if self.bit(55) { raw << 12 | 0xfff } else { raw }
    }

    /// The type field, 4 bits.
    pub(super) fn kind(self) -> u8 {
        self.bits(40, 4) as u8
    }

    /// Code or data, and no system descriptor.
    pub(super) fn code_or_data(self) -> bool {
        self.bit(44)
    }

    pub(super) fn dpl(self) -> u8 {
        self.bits(45, 2) as u8
    }

    pub(super) fn present(self) -> bool {
        self.bit(47)
    }

    /// L.
    pub(super) fn long(self) -> bool {
        self.bit(53)
    }

    /// D/B.
    pub(super) fn big(self) -> bool {
        self.bit(54)
    }

    /// The type of a system descriptor; none of code and data.
    pub(super) fn system(self) -> Option<u8> {
        (!self.code_or_data()).then(|| self.kind())
    }

    pub(super) fn is_code(self) -> bool {
        self.code_or_data() && self.kind() & CODE != 0
    }

    pub(super) fn conforming(self) -> bool {
        self.is_code() && self.kind() & CONFORMING_OR_DOWN != 0
    }

    pub(super) fn readable(self) -> bool {
        self.code_or_data() && (self.kind() & CODE == 0 || self.kind() & READABLE_OR_WRITABLE != 0)
    }

    pub(super) fn writable_data(self) -> bool {
        self.code_or_data() && self.kind() & (CODE | READABLE_OR_WRITABLE) == READABLE_OR_WRITABLE
    }

    /// Of a gate: the selector.
    pub(super) fn gate_selector(self) -> u16 {
        self.bits(16, 16) as u16
    }

    /// Of a gate: the low 32 bits of the offset. 16-bit gates have 16.
    pub(super) fn gate_offset(self) -> u64 {
        let wide = self.kind() & 8 != 0;
        self.bits(0, 16) | if wide { self.bits(48, 16) << 16 } else { 0 }
    }

    /// Of a call gate: how many parameters are copied.
    pub(super) fn gate_parameters(self) -> u64 {
        self.bits(32, 5)
    }

    /// Of a 64-bit gate: the interrupt stack, or 0.
    pub(super) fn gate_stack(self) -> u64 {
        self.bits(32, 3)
    }

    /// The segment register's contents after `selector` was loaded, accessed.
    pub(super) fn segment(self, selector: u16) -> Segment {
        Segment {
            selector,
            base: self.base(),
            limit: self.limit(),
            kind: self.kind() | if self.code_or_data() { ACCESSED } else { 0 },
            present: self.present(),
            code_or_data: self.code_or_data(),
            dpl: self.dpl(),
            big: self.big(),
            long: self.long(),
            granular: self.bit(55),
            available: self.bit(52),
            unusable: false,
        }
    }
}

/// Whether `selector` is null.
pub(super) fn null(selector: u16) -> bool {
    selector & 0xfffc == 0
}

/// The requested privilege level of `selector`.
pub(super) fn rpl(selector: u16) -> u8 {
    (selector & 3) as u8
}

impl Cpu {
    /// Exception `vector` with `selector` as its error code.
    #[cold]
    pub(super) fn selector_fault(&mut self, vector: u8, selector: u16) -> Stop {
        self.raise(vector, Some((selector & 0xfffc).into()))
    }

    /// #NP for `selector`.
    #[cold]
    pub(super) fn np(&mut self, selector: u16) -> Stop {
        self.selector_fault(vector::NP, selector)
    }

    /// #TS for `selector`.
    #[cold]
    pub(super) fn ts(&mut self, selector: u16) -> Stop {
        self.selector_fault(vector::TS, selector)
    }

    /// #GP for `selector`.
    #[cold]
    pub(super) fn gp_selector(&mut self, selector: u16) -> Stop {
        self.selector_fault(vector::GP, selector)
    }

    /// Linear address of the descriptor that `selector` names, where all of it is in its table.
    pub(super) fn descriptor_address(&self, selector: u16) -> Option<u64> {
        let (base, limit) = if selector & 4 == 0 {
            (self.gdt.base, u32::from(self.gdt.limit))
        } else if self.ldt.unusable || !self.ldt.present {
            return None;
        } else {
            (self.ldt.base, self.ldt.limit)
        };
        let offset = u32::from(selector & 0xfff8);
        (offset + 7 <= limit).then(|| self.wrap_system(base.wrapping_add(offset.into())))
    }

    /// Reads the descriptor that `selector` names.
    ///
    /// # Errors
    /// `vector` with the selector where it is outside of its table, and page faults.
    pub(super) fn descriptor(&mut self, selector: u16, vector: u8) -> Result<Descriptor, Stop> {
        match self.descriptor_address(selector) {
            Some(at) => Ok(Descriptor(self.load_system(at)?)),
            None => Err(self.selector_fault(vector, selector)),
        }
    }

    /// The upper eight bytes of a 16-byte descriptor.
    ///
    /// # Errors
    /// `vector` with the selector where they are outside of the table, or their type field is not
    /// zero; page faults.
    pub(super) fn descriptor_top(&mut self, selector: u16, vector: u8) -> Result<u64, Stop> {
        let at = self.descriptor_address(selector);
        let Some(at) = at.filter(|_| self.descriptor_address(selector.saturating_add(8)).is_some()) else {
            return Err(self.selector_fault(vector, selector));
        };
        let top: u64 = self.load_system(at.wrapping_add(8))?;
        if top >> 40 & 0x1f != 0 {
            return Err(self.selector_fault(vector, selector));
        }
        Ok(top & 0xffff_ffff)
    }

    /// Sets the accessed bit of code and data.
    ///
    /// # Errors
    /// Page faults.
    pub(super) fn mark_accessed(&mut self, selector: u16, descriptor: Descriptor) -> Flow {
        if descriptor.kind() & ACCESSED != 0 {
            return Ok(());
        }
        let Some(at) = self.descriptor_address(selector) else { return Ok(()) };
        self.as_supervisor(|cpu| cpu.modify_atomic(at.wrapping_add(5), |byte: u8| byte | ACCESSED))
    }

    /// Linear addresses are 32 bits wide outside of IA-32e mode.
    pub(super) fn wrap_system(&self, at: u64) -> u64 {
        if self.ia32e() { at } else { at & 0xffff_ffff }
    }

    /// Reads `W` at `offset` of the current TSS.
    ///
    /// # Errors
    /// #TS with TR's selector where the TSS is too short; page faults.
    pub(super) fn tss_field<W: crate::soft::cpu::word::Word>(&mut self, offset: u64) -> Result<W, Stop> {
        if offset + W::SIZE - 1 > u64::from(self.tr.limit) {
            return Err(self.ts(self.tr.selector));
        }
        self.load_system(self.wrap_system(self.tr.base.wrapping_add(offset)))
    }
}

/// Whether `size` bytes at `offset` are within the limits of `segment` as a stack.
pub(super) fn within(segment: &Segment, offset: u64, size: u64) -> bool {
    let last = offset + (size - 1);
    let limit = u64::from(segment.limit);
    if segment.kind & (CODE | CONFORMING_OR_DOWN) == CONFORMING_OR_DOWN {
        let top = if segment.big { 0xffff_ffff } else { 0xffff };
        offset > limit && last <= top
    } else {
        last <= limit
    }
}
