//! The registers of x87, MMX and SSE.
#![expect(unsafe_code, reason = "the registers are seen as the bytes of FXSAVE's area")]

use std::arch::x86_64::{__m128i, _mm_set_epi64x};

/// The bits of MXCSR that exist here: no misaligned mode (AMD's bit 17).
pub(super) const MXCSR_MASK: u32 = 0xffff;
/// MXCSR after power-on: everything masked, round to nearest.
pub(super) const MXCSR_DEFAULT: u32 = 0x1f80;
/// MXCSR's six exception masks.
pub(super) const MXCSR_MASKS: u32 = 0x1f80;
/// FCW after FNINIT.
pub(super) const FCW_DEFAULT: u16 = 0x37f;
/// The six exception flags, in FSW and in MXCSR, and their masks in FCW.
pub(super) const EXCEPTIONS: u16 = 0x3f;
/// FSW: stack fault.
pub(super) const FSW_SF: u16 = 1 << 6;
/// FSW: an exception that is not masked is pending: ES, and B which is the same.
pub(super) const FSW_PENDING: u16 = 1 << 7 | 1 << 15;

/// The registers, in the layout of FXSAVE64's area (SDM vol. 1, 10.5.1) save for the order of x87's, and
/// what a thunk needs beside them. Thunks know the offsets.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub(in crate::soft) struct FpState {
    /// x87 control word.
    pub(super) fcw: u16,
    /// x87 status word.
    pub(super) fsw: u16,
    /// One bit a physical register: it is not empty.
    pub(super) ftw: u8,
    reserved0: u8,
    /// Last x87 instruction that was not a control instruction: its opcode,
    pub(super) fop: u16,
    /// its address,
    pub(super) fip: u64,
    /// and its memory operand's.
    pub(super) fdp: u64,
    pub(super) mxcsr: u32,
    mxcsr_mask: u32,
    /// The physical registers: 80 bits each, of which MMX has 64. ST(`i`) is number `i` + TOP. (In
    /// FXSAVE's area they are in the order of the stack.)
    pub(super) st: [[u64; 2]; 8],
    pub(super) xmm: [__m128i; 16],
    reserved1: [u8; 96],
    /// Where thunks keep the host's MXCSR.
    pub(super) host_mxcsr: u32,
    /// Segment selectors that go with `fip` and `fdp`.
    pub(super) fcs: u16,
    pub(super) fds: u16,
    /// Operands on their way between a thunk and memory or general-purpose registers.
    pub(super) source: Operand,
    pub(super) target: Operand,
    /// ECX from PCMPESTRI and PCMPISTRI; EAX and EDX to PCMPESTRI.
    pub(super) index: u64,
    pub(super) lengths: [u64; 2],
}

/// An operand of up to 16 bytes, aligned as instructions want it.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(16))]
pub(super) struct Operand(pub(super) [u64; 2]);

const _: () = {
    assert!(std::mem::offset_of!(FpState, mxcsr) == 24);
    assert!(std::mem::offset_of!(FpState, st) == 32);
    assert!(std::mem::offset_of!(FpState, xmm) == 160);
    assert!(std::mem::offset_of!(FpState, host_mxcsr) == 512);
};

/// Zero as a vector.
fn zero() -> __m128i {
    vector([0; 2])
}

impl Default for FpState {
    /// As after power-on, save that FCW is FNINIT's.
    fn default() -> Self {
        Self {
            fcw: FCW_DEFAULT,
            fsw: 0,
            ftw: 0,
            reserved0: 0,
            fop: 0,
            fip: 0,
            fdp: 0,
            mxcsr: MXCSR_DEFAULT,
            mxcsr_mask: MXCSR_MASK,
            st: [[0; 2]; 8],
            xmm: [zero(); 16],
            reserved1: [0; 96],
            host_mxcsr: 0,
            fcs: 0,
            fds: 0,
            source: Operand::default(),
            target: Operand::default(),
            index: 0,
            lengths: [0; 2],
        }
    }
}

impl FpState {
    /// The 512 bytes of FXSAVE64's area.
    pub(in crate::soft) fn bytes(&self) -> [u8; 512] {
        // SAFETY: the first 512 bytes are fields without padding between them, all initialised.
        let mut bytes: [u8; 512] = unsafe { *std::ptr::from_ref(self).cast() };
        let (registers, _) = bytes[32..160].as_chunks_mut::<16>();
        for (n, bytes) in (0..).zip(registers) {
            let [low, high] = self.st(n);
            bytes[..8].copy_from_slice(&low.to_le_bytes());
            bytes[8..].copy_from_slice(&high.to_le_bytes());
        }
        bytes
    }

    /// Takes the state over from 512 bytes of FXSAVE64's area. Reserved bits are dropped.
    pub(in crate::soft) fn set_bytes(&mut self, bytes: &[u8; 512]) {
        // SAFETY: the first 512 bytes are fields without padding that any bytes are valid for.
        unsafe { *std::ptr::from_mut(self).cast() = *bytes };
        self.leave_stack_order();
        self.mxcsr &= MXCSR_MASK;
        self.reserved1 = [0; 96];
        self.fop &= 0x7ff;
        self.st.iter_mut().for_each(|register| register[1] &= 0xffff);
        (self.fcs, self.fds) = (0, 0);
        self.set_fcw(self.fcw);
    }

    /// Brings the x87 registers into the order of FXSAVE's area, for a thunk that loads them.
    #[inline(always)]
    pub(super) fn enter_stack_order(&mut self) {
        self.st = std::array::from_fn(|n| self.st[(n + usize::from(self.top())) & 7]);
    }

    /// Brings the x87 registers from the order of FXSAVE's area, which something has written, into
    /// their own, and sets what is fixed.
    #[inline(always)]
    pub(super) fn leave_stack_order(&mut self) {
        self.st = std::array::from_fn(|n| self.st[n.wrapping_sub(self.top().into()) & 7]);
        self.mxcsr_mask = MXCSR_MASK;
        self.reserved0 = 0;
    }

    // ---- SSE -------------------------------------------------------------------------------------

    #[inline(always)]
    pub(super) fn xmm(&self, n: u8) -> __m128i {
        self.xmm[usize::from(n & 15)]
    }

    #[inline(always)]
    pub(super) fn set_xmm(&mut self, n: u8, value: __m128i) {
        self.xmm[usize::from(n & 15)] = value;
    }

    /// The two halves of XMM register `n`, low first.
    #[inline(always)]
    pub(super) fn xmm_words(&self, n: u8) -> [u64; 2] {
        words(self.xmm(n))
    }

    #[inline(always)]
    pub(super) fn set_xmm_words(&mut self, n: u8, value: [u64; 2]) {
        self.set_xmm(n, vector(value));
    }

    /// The SSE registers as after power-on; not MXCSR.
    pub(super) fn init_sse(&mut self) {
        self.xmm = [zero(); 16];
    }

    // ---- x87 -------------------------------------------------------------------------------------

    /// Number of the physical register that is ST(0).
    #[inline(always)]
    pub(super) fn top(&self) -> u8 {
        (self.fsw >> 11 & 7) as u8
    }

    /// Makes physical register `top` ST(0).
    #[inline(always)]
    pub(super) fn set_top(&mut self, top: u8) {
        self.fsw = self.fsw & !(7 << 11) | u16::from(top & 7) << 11;
    }

    /// Number of the physical register that is ST(`i`).
    #[inline(always)]
    pub(super) fn physical(&self, i: u8) -> usize {
        usize::from(self.top().wrapping_add(i) & 7)
    }

    /// ST(`i`).
    #[inline(always)]
    pub(super) fn st(&self, i: u8) -> [u64; 2] {
        self.st[self.physical(i)]
    }

    /// An x87 exception that is not masked waits for the next instruction.
    #[inline(always)]
    pub(super) fn pending(&self) -> bool {
        self.fsw & !self.fcw & EXCEPTIONS != 0
    }

    /// Sets FCW, and what FSW says of pending exceptions by it.
    pub(super) fn set_fcw(&mut self, fcw: u16) {
        // Bit 6 is set and bits 13 to 15 and 7 are clear in every x87 since the 387.
        self.fcw = fcw & 0x1f3f | 0x40;
        self.summarise();
    }

    /// ES and B by the flags and masks.
    pub(super) fn summarise(&mut self) {
        self.fsw = if self.pending() { self.fsw | FSW_PENDING } else { self.fsw & !FSW_PENDING };
    }

    /// FNINIT (SDM vol. 2A).
    pub(super) fn init_x87(&mut self) {
        self.set_top(0);
        (self.fcw, self.fsw, self.ftw) = (FCW_DEFAULT, 0, 0);
        (self.fop, self.fip, self.fdp, self.fcs, self.fds) = (0, 0, 0, 0, 0);
    }

    /// The x87 state as after power-on, registers too.
    pub(super) fn reset_x87(&mut self) {
        self.init_x87();
        self.st = [[0; 2]; 8];
    }

    /// Every MMX instruction but EMMS makes all registers valid and the stack's top 0 (SDM vol. 1,
    /// 9.5.1).
    #[inline(always)]
    pub(super) fn enter_mmx(&mut self) {
        self.set_top(0);
        self.ftw = 0xff;
    }

    /// MMX register `n`.
    #[inline(always)]
    pub(super) fn mm(&self, n: u8) -> u64 {
        self.st[usize::from(n & 7)][0]
    }

    /// Sets MMX register `n`; exponent and sign become ones.
    #[inline(always)]
    pub(super) fn set_mm(&mut self, n: u8, value: u64) {
        self.st[usize::from(n & 7)] = [value, 0xffff];
    }
}

/// The halves of a vector, low first.
#[inline(always)]
pub(super) fn words(value: __m128i) -> [u64; 2] {
    // SAFETY: both are 16 bytes that may be anything.
    unsafe { std::mem::transmute(value) }
}

/// A vector of two halves, low first.
#[inline(always)]
pub(super) fn vector(value: [u64; 2]) -> __m128i {
    // SAFETY: every x86-64 CPU has SSE2.
    unsafe { _mm_set_epi64x(value[1].cast_signed(), value[0].cast_signed()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back() {
        let mut bytes = [0; 512];
        bytes[..416].iter_mut().enumerate().for_each(|(n, byte)| *byte = n.to_le_bytes()[0]);
        let mut state = FpState::default();
        state.set_bytes(&bytes);
        let back = state.bytes();
        // Reserved: byte 5, MXCSR_MASK, the upper 48 bits of each ST.
        assert_eq!(back[160..416], bytes[160..416]);
        assert_eq!(back[32..42], bytes[32..42]);
        assert_eq!(back[8..24], bytes[8..24]);
        assert_eq!(u32::from_le_bytes(back[28..32].try_into().unwrap()), MXCSR_MASK);
    }

    #[test]
    fn the_stack_turns_over_the_physical_registers() {
        let mut state = FpState::default();
        (0..8).for_each(|n| state.st[n][0] = n as u64);
        state.set_top(3);
        let image = state.bytes();
        let low = |i: usize| image[32 + 16 * i];
        assert_eq!([0, 1, 2, 3, 4, 5, 6, 7].map(low), [3, 4, 5, 6, 7, 0, 1, 2]);
        let mut other = FpState::default();
        other.set_bytes(&image);
        assert_eq!(other.st, state.st);
        other.enter_stack_order();
        assert_eq!(other.st[0], [3, 0]);
        other.leave_stack_order();
        assert_eq!(other.st, state.st);
    }
}
