//! Push and pop.

use super::op::Flow;
use super::word::Word;
use super::{Cpu, RSP, SS, Stop};

impl Cpu {
    /// The stack pointer's bits that count: 64, 32 (SS.B) or 16.
    #[inline(always)]
    pub(in crate::soft) fn stack_mask(&self) -> u64 {
        if self.mode.long {
            u64::MAX
        } else if self.mode.stack32 {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    /// Sets the bits of RSP that count.
    #[inline(always)]
    pub(in crate::soft) fn set_stack_pointer(&mut self, value: u64) {
        let mask = self.stack_mask();
        let old = self.r64(RSP);
        // A 32-bit stack pointer is written as a 32-bit register is.
        let kept = if mask == 0xffff { old & !mask } else { 0 };
        self.set_r64(RSP, kept | value & mask);
    }

    /// Linear address of `size` bytes on the stack at stack pointer `sp`.
    ///
    /// # Errors
    /// #SS(0) by the segment.
    #[inline(always)]
    pub(in crate::soft) fn stack_address(&mut self, sp: u64, size: u64, write: bool) -> Result<u64, Stop> {
        if self.mode.long {
            return Ok(sp);
        }
        let sp = sp & self.stack_mask();
        self.segmented(SS, sp, size, write)
    }

    /// Pushes `value`.
    ///
    /// # Errors
    /// Stack and page faults; RSP is then unchanged.
    #[inline(always)]
    pub(in crate::soft) fn push<W: Word>(&mut self, value: W) -> Flow {
        let sp = self.r64(RSP).wrapping_sub(W::SIZE);
        let at = self.stack_address(sp, W::SIZE, true)?;
        self.store(at, value).map_err(|stop| self.on_stack(stop))?;
        self.set_stack_pointer(sp);
        Ok(())
    }

    /// Pops a value.
    ///
    /// # Errors
    /// Stack and page faults; RSP is then unchanged.
    #[inline(always)]
    pub(in crate::soft) fn pop<W: Word>(&mut self) -> Result<W, Stop> {
        let sp = self.r64(RSP);
        let at = self.stack_address(sp, W::SIZE, false)?;
        let value = self.load(at).map_err(|stop| self.on_stack(stop))?;
        self.set_stack_pointer(sp.wrapping_add(W::SIZE));
        Ok(value)
    }

    /// Reads what [`Cpu::pop`] would pop after `skip` bytes more, and leaves RSP.
    ///
    /// # Errors
    /// Stack and page faults.
    #[inline(always)]
    pub(in crate::soft) fn peek<W: Word>(&mut self, skip: u64) -> Result<W, Stop> {
        let sp = self.r64(RSP).wrapping_add(skip);
        let at = self.stack_address(sp, W::SIZE, false)?;
        self.load(at).map_err(|stop| self.on_stack(stop))
    }
}
