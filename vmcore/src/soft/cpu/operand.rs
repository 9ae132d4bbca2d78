//! Register operands and the addresses of memory operands.

use super::op::{self, Flow, Op};
use super::word::Word;
use super::{Cpu, SS, Stop};

impl Cpu {
    /// Register operand `r` ([`Op::dst`], [`Op::src`]) of `W`'s size.
    #[inline(always)]
    pub(in crate::soft) fn reg<W: Word>(&self, r: u8) -> W {
        // AH to BH are marked; the mark becomes a shift of 8.
        if W::BITS == 8 {
            return W::cut(self.gpr[usize::from(r & 31)] >> (r >> 4 & 8));
        }
        W::cut(self.gpr[usize::from(r)])
    }

    /// Sets register operand `r`. 32-bit writes clear the upper half, smaller ones leave the rest.
    #[inline(always)]
    pub(in crate::soft) fn set_reg<W: Word>(&mut self, r: u8, value: W) {
        let register = &mut self.gpr[usize::from(if W::BITS == 8 { r & 31 } else { r })];
        match W::BITS {
            64 | 32 => *register = value.zext(),
            16 => *register = *register & !0xffff | value.zext(),
            _ => {
                let shift = r >> 4 & 8;
                *register = *register & !(0xff << shift) | value.zext() << shift;
            }
        }
    }

    /// Offset of the memory operand within its segment: base plus scaled index plus displacement, cut
    /// to the address size.
    #[inline(always)]
    pub(in crate::soft) fn offset(&self, op: &Op) -> u64 {
        let base = self.gpr[usize::from(op.base)];
        let index = self.gpr[usize::from(op.index)] << (op.scale & 3);
        let sum = base.wrapping_add(index).wrapping_add(op.disp);
        u64::MAX >> (op.ashift & 63) & sum
    }

    /// Base plus displacement of the memory operand.
    #[inline(always)]
    pub(in crate::soft) fn base_offset(&self, op: &Op) -> u64 {
        self.gpr[usize::from(op.base)].wrapping_add(op.disp)
    }

    /// Base plus scaled index plus displacement of the memory operand, not cut to the address size.
    #[inline(always)]
    pub(in crate::soft) fn index_offset(&self, op: &Op) -> u64 {
        self.base_offset(op).wrapping_add(self.gpr[usize::from(op.index)] << (op.scale & 63))
    }

    /// Linear address of the memory operand of `size` bytes. In 64-bit code that is arithmetic only;
    /// elsewhere segment rights and limit are checked.
    ///
    /// # Errors
    /// #GP or #SS by the segment.
    #[inline(always)]
    pub(in crate::soft) fn address(&mut self, op: &Op, size: u64, write: bool) -> Result<u64, Stop> {
        let offset = self.offset(op);
        if op.long() {
            return Ok(self.seg_base[usize::from(op.seg & 7)].wrapping_add(offset));
        }
        self.segmented(usize::from(op.seg), offset, size, write)
    }

    /// Linear address of `size` bytes at `offset` in segment `n`, outside of 64-bit code.
    ///
    /// # Errors
    /// #GP or #SS by the segment's rights and limit.
    #[inline(always)]
    pub(in crate::soft) fn segmented(
        &mut self,
        n: usize,
        offset: u64,
        size: u64,
        write: bool,
    ) -> Result<u64, Stop> {
        if self.flat >> (n & 7) & 1 != 0 && offset + (size - 1) <= 0xffff_ffff {
            return Ok(offset);
        }
        self.check_segment(n, offset, size, write)
    }

    #[cold]
    fn check_segment(&mut self, n: usize, offset: u64, size: u64, write: bool) -> Result<u64, Stop> {
        let segment = *self.segment(n);
        let last = offset.wrapping_add(size - 1);
        let code = segment.kind & 8 != 0;
        let bad_rights = self.mode.protected
            && (segment.unusable
                || !segment.present
                // Code is never written, and read where its type says so; data are written likewise.
                || (write || code) && segment.kind & 2 == 0
                || write && code);
        let limit = u64::from(segment.limit);
        let bad_limit = if !code && segment.kind & 4 != 0 {
            // Expand-down: what is above the limit, up to 64 KiB or 4 GiB (SDM vol. 3A, 5.3).
            let top = if segment.big { 0xffff_ffff } else { 0xffff };
            offset <= limit || last > top || last < offset
        } else {
            last > limit || last < offset
        };
        if bad_rights || bad_limit {
            return Err(if n == SS { self.ss(0) } else { self.gp(0) });
        }
        Ok(segment.base.wrapping_add(offset) & 0xffff_ffff)
    }

    /// Linear address of `offset` in any segment and any mode, for instructions with implicit operands
    /// (strings, XLAT): `n` as [`Op::seg`].
    ///
    /// # Errors
    /// As [`Cpu::address`].
    #[inline(always)]
    pub(in crate::soft) fn linear(
        &mut self,
        op: &Op,
        n: u8,
        offset: u64,
        size: u64,
        write: bool,
    ) -> Result<u64, Stop> {
        if op.long() {
            return Ok(self.seg_base[usize::from(n & 7)].wrapping_add(offset));
        }
        self.segmented(usize::from(n), offset, size, write)
    }

    /// Loads the memory operand.
    ///
    /// # Errors
    /// Segment and page faults.
    #[inline(always)]
    pub(in crate::soft) fn load_operand<W: Word>(&mut self, op: &Op) -> Result<W, Stop> {
        let at = self.address(op, W::SIZE, false)?;
        self.load(at)
    }

    /// Stores the memory operand.
    ///
    /// # Errors
    /// Segment and page faults.
    #[inline(always)]
    pub(in crate::soft) fn store_operand<W: Word>(&mut self, op: &Op, value: W) -> Flow {
        let at = self.address(op, W::SIZE, true)?;
        self.store(at, value)
    }

    /// Changes the memory operand from the value that `change` is given to the one it returns,
    /// atomically where the instruction is locked. `change` may be called several times then, and only
    /// what it did last must count; flags are for the caller to set afterwards, from what it captured.
    ///
    /// # Errors
    /// Segment and page faults, before `change` is called.
    #[inline(always)]
    pub(in crate::soft) fn modify_operand<W: Word>(&mut self, op: &Op, change: impl FnMut(W) -> W) -> Flow {
        let at = self.address(op, W::SIZE, true)?;
        if op.locked() { self.modify_atomic(at, change) } else { self.modify(at, change) }
    }

    /// Base of segment `n` as it counts in the present mode.
    #[inline(always)]
    pub(in crate::soft) fn base(&self, n: usize) -> u64 {
        self.seg_base[n & 7]
    }
}

/// Whether the upper 17 bits of a linear address are equal (SDM vol. 1, 3.3.7.1).
#[inline(always)]
pub(in crate::soft) fn canonical(address: u64) -> bool {
    (address.cast_signed() << 16 >> 16).cast_unsigned() == address
}

const _: () = assert!(op::ZERO < 32 && op::RIP < 32);
