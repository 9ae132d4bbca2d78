//! Whether x87, MMX and SSE instructions may be executed now (SDM vol. 3A, 2.5 and chapter 13).

use crate::soft::cpu::op::{Flow, Stop};
use crate::soft::cpu::{Cpu, cr0, cr4, vector};

impl Cpu {
    /// For every instruction on SSE registers and MXCSR.
    ///
    /// # Errors
    /// #UD with CR0.EM or without CR4.OSFXSR, #NM with CR0.TS.
    #[inline(always)]
    pub(super) fn sse(&mut self) -> Flow {
        if self.cr0 & (cr0::EM | cr0::TS) != 0 || self.cr4 & cr4::OSFXSR == 0 {
            return Err(self.sse_refused());
        }
        Ok(())
    }

    #[cold]
    fn sse_refused(&mut self) -> Stop {
        if self.cr0 & cr0::EM != 0 || self.cr4 & cr4::OSFXSR == 0 { self.ud() } else { self.nm() }
    }

    /// For every instruction on MMX registers, which must then call `FpState::enter_mmx` when nothing
    /// can fault any more.
    ///
    /// # Errors
    /// #UD with CR0.EM, #NM with CR0.TS, #MF where an x87 exception is pending.
    #[inline(always)]
    pub(super) fn mmx(&mut self) -> Flow {
        if self.cr0 & (cr0::EM | cr0::TS) != 0 || self.fp.pending() {
            return Err(self.mmx_refused());
        }
        Ok(())
    }

    #[cold]
    fn mmx_refused(&mut self) -> Stop {
        if self.cr0 & cr0::EM != 0 {
            self.ud()
        } else if self.cr0 & cr0::TS != 0 {
            self.nm()
        } else {
            self.raise(vector::MF, None)
        }
    }

    /// For x87 instructions that do not look at pending exceptions, FXSAVE and FXRSTOR.
    ///
    /// # Errors
    /// #NM with CR0.EM or CR0.TS.
    #[inline(always)]
    pub(super) fn x87_control(&mut self) -> Flow {
        if self.cr0 & (cr0::EM | cr0::TS) != 0 {
            return Err(self.nm());
        }
        Ok(())
    }

    /// For the other x87 instructions.
    ///
    /// # Errors
    /// #NM with CR0.EM or CR0.TS, #MF where an exception is pending. (CR0.NE counts as set: the way by
    /// the interrupt controllers, for the PC/AT's BIOS, is not offered.)
    #[inline(always)]
    pub(super) fn x87(&mut self) -> Flow {
        self.x87_control()?;
        if self.fp.pending() {
            return Err(self.raise(vector::MF, None));
        }
        Ok(())
    }

    /// #NM: the registers are not this task's.
    #[cold]
    pub(super) fn nm(&mut self) -> Stop {
        self.raise(vector::NM, None)
    }
}
