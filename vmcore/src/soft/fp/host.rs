//! The floating-point environment of the thread that runs a vCPU: the embedder's outside of guest code,
//! and its default while guest code is executed, which Rust's arithmetic and thunks begin with. So no
//! rounding mode, flush to zero or unmasked exception of the embedder's reaches the guest, and none of the
//! guest's, nor the flags that it raises, reaches the embedder: also not in the callbacks of a run.
#![expect(unsafe_code, reason = "control registers of the processor are read and written")]

use std::arch::asm;

use super::state::{EXCEPTIONS, FCW_DEFAULT, MXCSR_DEFAULT};

/// What the embedder's thread has in MXCSR and the x87 registers that are not data.
#[derive(Clone, Copy, Debug)]
pub(in crate::soft) struct HostFloat {
    mxcsr: u32,
    /// The environment in the layout of FNSTENV, where it is not as Rust's runtime leaves it.
    x87: Option<[u32; 7]>,
}

fn mxcsr() -> u32 {
    let mut value = 0u32;
    // SAFETY: writes four bytes to a local variable.
    unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut value, options(nostack, preserves_flags)) };
    value
}

fn set_mxcsr(value: u32) {
    // SAFETY: the value is one that the register had, or its default: no reserved bit is set.
    unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const value, options(nostack, preserves_flags)) };
}

fn status() -> u16 {
    let value: u16;
    // SAFETY: reads a register that is not data.
    unsafe { asm!("fnstsw ax", out("ax") value, options(nomem, nostack, preserves_flags)) };
    value
}

fn control() -> u16 {
    let mut value = 0u16;
    // SAFETY: writes two bytes to a local variable.
    unsafe { asm!("fnstcw [{}]", in(reg) &raw mut value, options(nostack, preserves_flags)) };
    value
}

impl HostFloat {
    /// Takes the embedder's environment away, and makes it the default.
    pub(in crate::soft) fn put_aside() -> Self {
        let host = mxcsr();
        set_mxcsr(MXCSR_DEFAULT);
        if control() == FCW_DEFAULT && status() & EXCEPTIONS == 0 {
            return Self { mxcsr: host, x87: None };
        }
        let mut environment = [0u32; 7];
        // SAFETY: FNSTENV writes 28 bytes, which the array has, and FNINIT drops what they hold. There are
        // no data in the registers, by the calling convention.
        unsafe { asm!("fnstenv [{}]", "fninit", in(reg) environment.as_mut_ptr(), options(nostack)) };
        Self { mxcsr: host, x87: Some(environment) }
    }

    /// Gives the embedder its environment back.
    pub(in crate::soft) fn give_back(self) {
        set_mxcsr(self.mxcsr);
        match self.x87 {
            // SAFETY: FLDENV reads what FNSTENV has written. An exception that was pending then is again.
            Some(environment) => unsafe {
                asm!("fldenv [{}]", in(reg) environment.as_ptr(), options(nostack))
            },
            None if status() & EXCEPTIONS != 0 => {
                // SAFETY: drops exception flags, and touches nothing else.
                unsafe { asm!("fnclex", options(nomem, nostack)) }
            }
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_comes_back_as_it_was() {
        // Round up, an inexact result seen, division by zero unmasked; x87 in double precision, with a flag.
        let (mine, word) = (0x1f80 | 2 << 13 | 0x20 & !(1 << 9), 0x27fu16);
        set_mxcsr(mine);
        // SAFETY: every exception stays masked; 1 / 3 is inexact.
        unsafe {
            asm!("fldcw [{}]", "fld1", "fldpi", "fdivp", "fstp st(0)", in(reg) &raw const word, options(nostack));
        }
        let (flags, before) = (status(), HostFloat::put_aside());
        assert_ne!(flags & EXCEPTIONS, 0);
        assert_eq!((mxcsr(), control(), status() & EXCEPTIONS), (MXCSR_DEFAULT, FCW_DEFAULT, 0));
        // SAFETY: as above.
        unsafe { asm!("fld1", "fldpi", "fdivp", "fstp st(0)", options(nomem, nostack)) };
        before.give_back();
        assert_eq!((mxcsr(), control(), status()), (mine, word, flags));
        // SAFETY: back to the default.
        unsafe { asm!("fninit", options(nomem, nostack)) };
        set_mxcsr(MXCSR_DEFAULT);
        let clean = HostFloat::put_aside();
        // SAFETY: as above.
        unsafe { asm!("fld1", "fldpi", "fdivp", "fstp st(0)", options(nomem, nostack)) };
        clean.give_back();
        assert_eq!((control(), status() & EXCEPTIONS), (FCW_DEFAULT, 0));
    }
}
