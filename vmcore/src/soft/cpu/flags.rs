//! The arithmetic flags, kept so that an instruction that sets them costs three stores and one that
//! tests them a few operations, whatever set them.
//!
//! After an operation on `n` bits the result and the carries out of every bit position are kept,
//! moved up so that bit `n - 1` is bit 63 ("left-aligned"), with the number of places moved. CF is
//! then the top carry, OF the difference of the two top carries, AF the carry out of bit 3; ZF and
//! SF are the result's. What no result can show (SF of a zero, a chosen parity) is kept as a
//! difference in the two low bits of the carries, which no operation's carries reach: carries out of
//! bits 0 and 1 mean nothing to anybody.
#![expect(clippy::cast_possible_truncation, reason = "the host is a 64-bit one, and low bits are meant")]

use super::word::Word;

/// Carry (SDM vol. 1, 3.4.3.1).
pub(in crate::soft) const CF: u64 = 1;
/// Parity of the low byte.
pub(in crate::soft) const PF: u64 = 1 << 2;
/// Carry out of bit 3.
pub(in crate::soft) const AF: u64 = 1 << 4;
/// Zero.
pub(in crate::soft) const ZF: u64 = 1 << 6;
/// Sign.
pub(in crate::soft) const SF: u64 = 1 << 7;
/// Trap: single step.
pub(in crate::soft) const TF: u64 = 1 << 8;
/// Interrupts enabled.
pub(in crate::soft) const IF: u64 = 1 << 9;
/// Direction of string instructions.
pub(in crate::soft) const DF: u64 = 1 << 10;
/// Signed overflow.
pub(in crate::soft) const OF: u64 = 1 << 11;
/// I/O privilege level.
pub(in crate::soft) const IOPL: u64 = 3 << 12;
/// Nested task.
pub(in crate::soft) const NT: u64 = 1 << 14;
/// Resume: no instruction breakpoints.
pub(in crate::soft) const RF: u64 = 1 << 16;
/// Virtual-8086 mode.
pub(in crate::soft) const VM: u64 = 1 << 17;
/// Alignment check, and access to user pages under SMAP.
pub(in crate::soft) const AC: u64 = 1 << 18;
/// Virtual interrupt flag.
pub(in crate::soft) const VIF: u64 = 1 << 19;
/// Virtual interrupt pending.
pub(in crate::soft) const VIP: u64 = 1 << 20;
/// CPUID can be used.
pub(in crate::soft) const ID: u64 = 1 << 21;
/// The flags of arithmetic.
pub(in crate::soft) const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;

const SF_DIFFERS: u64 = 1;
const PF_DIFFERS: u64 = 2;
const LOW: u64 = SF_DIFFERS | PF_DIFFERS;

/// The six arithmetic flags.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::soft) struct Flags {
    /// Left-aligned result.
    result: u64,
    /// Left-aligned carries; the two low bits are the differences.
    carries: u64,
    /// Places moved: 64 less the operation's width.
    shift: u8,
}

impl Flags {
    /// After a logical operation: CF, OF and AF clear.
    #[inline(always)]
    pub(in crate::soft) fn set_logic<W: Word>(&mut self, result: W) {
        self.set::<W>(result, 0);
    }

    /// After `a + b (+ carry) = result`.
    #[inline(always)]
    pub(in crate::soft) fn set_add<W: Word>(&mut self, a: W, b: W, result: W) {
        let (a, b, r) = (a.zext(), b.zext(), result.zext());
        self.set(result, (a & b) | ((a | b) & !r));
    }

    /// After `a - b (- borrow) = result`.
    #[inline(always)]
    pub(in crate::soft) fn set_sub<W: Word>(&mut self, a: W, b: W, result: W) {
        let (a, b, r) = (a.zext(), b.zext(), result.zext());
        self.set(result, (!a & b) | (!(a ^ b) & r));
    }

    /// After INC: as after the addition of 1, but CF stays.
    #[inline(always)]
    pub(in crate::soft) fn set_inc<W: Word>(&mut self, result: W) {
        // Everything is carried from below what became zeros.
        let r = result.zext();
        self.set_step(result, r == 1 << (W::BITS - 1), r & 15 == 0);
    }

    /// After DEC: as after the subtraction of 1, but CF stays.
    #[inline(always)]
    pub(in crate::soft) fn set_dec<W: Word>(&mut self, result: W) {
        let r = result.zext();
        self.set_step(result, r == (1 << (W::BITS - 1)) - 1, r & 15 == 15);
    }

    #[inline(always)]
    fn set_step<W: Word>(&mut self, result: W, of: bool, af: bool) {
        let cf = self.carries & 1 << 63;
        let shift = 64 - W::BITS;
        self.result = result.zext() << shift;
        self.carries = (cf | cf >> 1) ^ u64::from(of) << 62 | u64::from(af) << (shift + 3);
        self.shift = (64 - W::BITS) as u8;
    }

    /// SF, ZF and PF of `result`; CF, OF and AF as told.
    #[inline(always)]
    pub(in crate::soft) fn set_with<W: Word>(&mut self, result: W, cf: bool, of: bool, af: bool) {
        let top = (u64::from(cf) << 1 | u64::from(cf ^ of)) << (W::BITS - 2);
        self.set(result, top | u64::from(af) << 3);
    }

    #[inline(always)]
    fn set<W: Word>(&mut self, result: W, carries: u64) {
        let shift = 64 - W::BITS;
        self.result = result.zext() << shift;
        self.carries = (carries << shift) & !LOW;
        self.shift = (64 - W::BITS) as u8;
    }

    #[inline(always)]
    pub(in crate::soft) fn cf(&self) -> bool {
        self.carries.cast_signed() < 0
    }

    #[inline(always)]
    pub(in crate::soft) fn of(&self) -> bool {
        (self.carries ^ self.carries << 1).cast_signed() < 0
    }

    #[inline(always)]
    pub(in crate::soft) fn zf(&self) -> bool {
        self.result == 0
    }

    #[inline(always)]
    pub(in crate::soft) fn sf(&self) -> bool {
        (self.result ^ self.carries << 63).cast_signed() < 0
    }

    #[inline(always)]
    pub(in crate::soft) fn pf(&self) -> bool {
        let odd = (self.result >> self.shift & 0xff).count_ones() & 1 != 0;
        odd == (self.carries & PF_DIFFERS != 0)
    }

    #[inline(always)]
    pub(in crate::soft) fn af(&self) -> bool {
        self.carries >> self.shift & 8 != 0
    }

    /// Changes CF alone.
    #[inline(always)]
    pub(in crate::soft) fn set_cf(&mut self, cf: bool) {
        let of = self.of();
        self.carries = self.carries & !(3 << 62) | (u64::from(cf) << 1 | u64::from(cf ^ of)) << 62;
    }

    /// Changes CF and OF alone.
    #[inline(always)]
    pub(in crate::soft) fn set_cf_of(&mut self, cf: bool, of: bool) {
        self.carries = self.carries & !(3 << 62) | (u64::from(cf) << 1 | u64::from(cf ^ of)) << 62;
    }

    /// The flags at their places in RFLAGS, all others clear.
    pub(in crate::soft) fn bits(&self) -> u64 {
        let at = |set: bool, bit: u64| if set { bit } else { 0 };
        at(self.cf(), CF)
            | at(self.pf(), PF)
            | at(self.af(), AF)
            | at(self.zf(), ZF)
            | at(self.sf(), SF)
            | at(self.of(), OF)
    }

    /// Takes the flags from their places in RFLAGS; other bits are ignored.
    pub(in crate::soft) fn set_bits(&mut self, rflags: u64) {
        let has = |bit| rflags & bit != 0;
        // A result of 0 has even parity and no sign, one of 1 odd parity and no sign.
        let result = if has(ZF) { 0u64 } else { 1 };
        self.set_with(result, has(CF), has(OF), has(AF));
        if has(SF) {
            self.carries |= SF_DIFFERS;
        }
        if has(PF) != has(ZF) {
            self.carries |= PF_DIFFERS;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_survives() {
        let mut flags = Flags::default();
        for n in 0..64u64 {
            let spread = [CF, PF, AF, ZF, SF, OF];
            let bits =
                spread.iter().enumerate().filter(|(i, _)| n >> i & 1 != 0).map(|(_, b)| b).sum::<u64>();
            flags.set_bits(bits);
            assert_eq!(flags.bits(), bits);
            flags.set_cf(true);
            assert_eq!(flags.bits(), bits | CF);
            flags.set_cf_of(false, true);
            assert_eq!(flags.bits(), bits & !CF | OF);
        }
    }

    #[test]
    fn additions_and_subtractions_of_bytes_are_as_the_manual_defines_them() {
        let mut flags = Flags::default();
        for a in 0..=255u8 {
            for b in 0..=255u8 {
                for carry in 0..=1u8 {
                    let sum = a.wrapping_add(b).wrapping_add(carry);
                    flags.set_add(a, b, sum);
                    assert_eq!(flags.cf(), u16::from(a) + u16::from(b) + u16::from(carry) > 255);
                    assert_eq!(flags.af(), (a & 15) + (b & 15) + carry > 15);
                    let signed = i16::from(a as i8) + i16::from(b as i8) + i16::from(carry);
                    assert_eq!(flags.of(), i8::try_from(signed).is_err());
                    assert_eq!((flags.zf(), flags.sf()), (sum == 0, sum > 127));
                    assert_eq!(flags.pf(), sum.count_ones().is_multiple_of(2));

                    let difference = a.wrapping_sub(b).wrapping_sub(carry);
                    flags.set_sub(a, b, difference);
                    assert_eq!(flags.cf(), u16::from(a) < u16::from(b) + u16::from(carry));
                    assert_eq!(flags.af(), (a & 15) < (b & 15) + carry);
                    let signed = i16::from(a as i8) - i16::from(b as i8) - i16::from(carry);
                    assert_eq!(flags.of(), i8::try_from(signed).is_err());
                }
            }
        }
    }

    #[test]
    fn widths_do_not_mix() {
        let mut flags = Flags::default();
        flags.set_add(0xffff_ffffu32, 1, 0);
        assert_eq!(flags.bits(), CF | AF | ZF | PF);
        flags.set_sub(0u64, 1, u64::MAX);
        assert_eq!(flags.bits(), CF | AF | SF | PF);
        flags.set_logic(0x8000u16);
        assert_eq!(flags.bits(), SF | PF);
    }
}
