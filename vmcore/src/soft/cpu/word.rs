//! Operand sizes as types: handlers are generic over [`Word`] and compiled once for each.
#![expect(clippy::cast_possible_truncation, reason = "the host is a 64-bit one, and low bits are meant")]
#![expect(unsafe_code, reason = "atomic operations on guest memory")]

use std::fmt::Debug;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

/// An integer operand of 8, 16, 32 or 64 bits.
pub(in crate::soft) trait Word: Copy + Default + PartialEq + Debug + Send + 'static {
    /// Width in bits.
    const BITS: u32;
    /// Width in bytes.
    const SIZE: u64;
    /// The low bits of `value`.
    fn cut(value: u64) -> Self;
    /// Zero-extended.
    fn zext(self) -> u64;
    /// Sign-extended.
    fn sext(self) -> u64;

    /// Writes the value at host address `host`, aligned or not, in one access.
    ///
    /// # Safety
    /// `host` is writable memory that others access only atomically or volatilely.
    unsafe fn store(host: u64, value: Self);

    /// Replaces the value at host address `host` by `new` where it is `old`; else returns what it is.
    ///
    /// # Safety
    /// `host` is aligned to the size, and is writable memory that others access only atomically or
    /// volatilely.
    unsafe fn compare_exchange(host: u64, old: Self, new: Self, order: Ordering) -> Result<(), Self>;
}

macro_rules! words {
    ($($word:ty, $signed:ty, $atomic:ty, $class:ident, $mov:literal;)*) => { $(
        impl Word for $word {
            const BITS: u32 = <$word>::BITS;
            const SIZE: u64 = (<$word>::BITS / 8) as u64;

            #[inline(always)]
            #[expect(clippy::allow_attributes, reason = "u64 is not truncated, the others are")]
            fn cut(value: u64) -> Self {
                #[allow(clippy::cast_possible_truncation, reason = "the low bits are what is asked for")]
                let low = value as Self;
                low
            }

            #[inline(always)]
            fn zext(self) -> u64 {
                u64::from(self)
            }

            #[inline(always)]
            fn sext(self) -> u64 {
                (self as $signed as i64).cast_unsigned()
            }

            #[inline(always)]
            unsafe fn store(host: u64, value: Self) {
                // The compiler takes a detour over the stack for a volatile write that may be unaligned.
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the caller's promise.
                unsafe {
                    std::arch::asm!(
                        $mov,
                        host = in(reg) host,
                        value = in($class) value,
                        options(nostack, preserves_flags)
                    );
                }
                #[cfg(not(target_arch = "x86_64"))]
                {
                    #[repr(C, packed)]
                    struct Unaligned($word);
                    let pointer = std::ptr::with_exposed_provenance_mut::<Unaligned>(host as usize);
                    // SAFETY: the caller's promise.
                    unsafe { pointer.write_volatile(Unaligned(value)) }
                }
            }

            #[inline(always)]
            unsafe fn compare_exchange(host: u64, old: Self, new: Self, order: Ordering) -> Result<(), Self> {
                let pointer = std::ptr::with_exposed_provenance_mut(host as usize);
                // SAFETY: the caller's promise.
                let atomic = unsafe { <$atomic>::from_ptr(pointer) };
                atomic.compare_exchange(old, new, order, Ordering::Relaxed).map(drop)
            }
        }
    )* };
}

words! {
    u8, i8, AtomicU8, reg_byte, "mov byte ptr [{host}], {value}";
    u16, i16, AtomicU16, reg, "mov word ptr [{host}], {value:x}";
    u32, i32, AtomicU32, reg, "mov dword ptr [{host}], {value:e}";
    u64, i64, AtomicU64, reg, "mov qword ptr [{host}], {value}";
}
