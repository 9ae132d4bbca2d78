//! SSE floating-point instructions with exceptions that the guest has not masked (SDM vol. 1, 11.5).
//!
//! The host's exceptions are always masked: a host that took one would send the process a signal. What
//! an instruction would have raised is seen from the flags it sets. Flags beside an exception that is
//! raised can differ from hardware's in two cases: the precision flag beside an unmasked overflow or
//! underflow (hardware's is that of the result with an unlimited exponent), and those of DPPS and DPPD,
//! which stop after the multiplication.
#![expect(unsafe_code, reason = "calls thunks")]

use super::state::{FpState, MXCSR_MASKS, Operand};
use super::thunk::thunk;
use crate::soft::cpu::op::Stop;
use crate::soft::cpu::{Cpu, cr4, vector};

/// Invalid operation, denormal operand, division by zero: found before the result is computed.
const BEFORE_RESULT: u32 = 0b111;
const UNDERFLOW: u32 = 1 << 4;
/// Flush to zero.
const FTZ: u32 = 1 << 15;
/// Rounding control and denormals are zeros.
const KEPT: u32 = 3 << 13 | 1 << 6;

/// What an instruction's result is made of, for finding underflows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Results {
    /// No result can underflow.
    None,
    /// Four of 32 bits.
    Singles,
    /// The first 32 bits.
    Single,
    /// Two of 64 bits.
    Doubles,
    /// The first 64 bits.
    Double,
}

impl Results {
    /// Whether one is denormal.
    fn tiny(self, value: [u64; 2]) -> bool {
        let single = |v: u64| v & 0x7f80_0000 == 0 && v & 0x7f_ffff != 0;
        let double = |v: u64| v & 0x7ff0_0000_0000_0000 == 0 && v & 0xf_ffff_ffff_ffff != 0;
        match self {
            Results::None => false,
            Results::Single => single(value[0]),
            Results::Singles => value.iter().any(|&v| single(v) || single(v >> 32)),
            Results::Double => double(value[0]),
            Results::Doubles => value.iter().any(|&v| double(v)),
        }
    }
}

impl Cpu {
    /// Runs the thunk at `at`, which uses MXCSR, on a target and a source in the FP state or on its
    /// own operands. Returns the flags.
    ///
    /// # Errors
    /// #XM (#UD without CR4.OSXMMEXCPT) where the guest has not masked an exception; the target is
    /// then unchanged.
    ///
    /// # Safety
    /// `at` is the address of a thunk of this VM's; `target` and `source` point to 16 bytes within
    /// `self.fp`, as far as the thunk uses them; `source` may be in mapped guest memory.
    #[inline(always)]
    pub(super) unsafe fn run_float(
        &mut self,
        at: u64,
        target: *mut u8,
        source: *const u8,
        results: impl FnOnce() -> Results,
    ) -> Result<u64, Stop> {
        let state: *mut FpState = &raw mut *self.fp;
        // SAFETY: the pointer is to the state that this vCPU owns.
        let mxcsr = unsafe { (*state).mxcsr };
        if mxcsr & MXCSR_MASKS == MXCSR_MASKS {
            // SAFETY: the caller's promise.
            let thunk = unsafe { thunk(at) };
            return Ok(thunk(target, source, state));
        }
        // SAFETY: the caller's promise.
        unsafe { self.run_unmasked(at, target, source, results()) }
    }

    #[cold]
    unsafe fn run_unmasked(
        &mut self,
        at: u64,
        target: *mut u8,
        source: *const u8,
        results: Results,
    ) -> Result<u64, Stop> {
        let guest = self.fp.mxcsr;
        let masked = guest >> 7;
        let target = target.cast::<Operand>();
        // Flushing happens only while underflow is masked.
        let flush = if masked & UNDERFLOW != 0 { guest & FTZ } else { 0 };
        let state: *mut FpState = &raw mut *self.fp;
        let mut copy = Operand::default();
        if !target.is_null() {
            // SAFETY: the caller's promise.
            copy = unsafe { *target };
        }
        // SAFETY: the state is this vCPU's.
        unsafe { (*state).mxcsr = guest & KEPT | flush | MXCSR_MASKS };
        // SAFETY: the caller's promise.
        let thunk = unsafe { thunk(at) };
        let rflags = thunk((&raw mut copy).cast(), source, state);
        let mut raised = self.fp.mxcsr & 0x3f;
        if masked & UNDERFLOW == 0 && results.tiny(copy.0) {
            // An exact denormal result raises underflow only where it is not masked.
            raised |= UNDERFLOW;
        }
        let unmasked = raised & !masked;
        if unmasked == 0 {
            self.fp.mxcsr = guest | raised;
            if !target.is_null() {
                // SAFETY: the caller's promise.
                unsafe { *target = copy };
            }
            return Ok(rflags);
        }
        if unmasked & BEFORE_RESULT != 0 {
            raised &= BEFORE_RESULT;
        }
        self.fp.mxcsr = guest | raised;
        let known = self.cr4 & cr4::OSXMMEXCPT != 0;
        Err(self.raise(if known { vector::XM } else { vector::UD }, None))
    }
}
