//! Loads and stores of 16 bytes, as SSE has them.
#![expect(unsafe_code, reason = "a translation's host address is used as a pointer")]
#![expect(clippy::cast_possible_truncation, reason = "the host's addresses have 64 bits")]

use std::arch::x86_64::{__m128i, _mm_set_epi64x};

use super::tlb::{PAGE, index};
use crate::soft::cpu::Cpu;
use crate::soft::cpu::op::{Flow, Stop};

/// Sixteen bytes at any address, to be read and written in one access.
#[repr(C, packed)]
struct Unaligned(__m128i);

/// A vector of two words.
#[inline(always)]
fn vector(low: u64, high: u64) -> __m128i {
    // SAFETY: every x86-64 CPU has SSE2.
    unsafe { _mm_set_epi64x(high.cast_signed(), low.cast_signed()) }
}

impl Cpu {
    /// Loads 16 bytes from linear address `at` where it can be done at once; see [`Cpu::load_fast`].
    #[inline(always)]
    pub(in crate::soft) fn load_vector_fast(&self, at: u64) -> Option<__m128i> {
        let pointer = self.readable(at, 16)?.cast::<Unaligned>();
        // SAFETY: as in `load_vector`.
        Some(unsafe { pointer.read_volatile() }.0)
    }

    /// Stores 16 bytes to linear address `at` where it can be done at once; see [`Cpu::load_fast`].
    /// Returns whether it could.
    #[inline(always)]
    pub(in crate::soft) fn store_vector_fast(&mut self, at: u64, value: __m128i) -> bool {
        let entry = &self.mmu.bank().write.entries[index(at)];
        if entry.tag != at.wrapping_add(15) & PAGE {
            return false;
        }
        let host = at.wrapping_add(entry.addend);
        let pointer = std::ptr::with_exposed_provenance_mut::<Unaligned>(host as usize);
        // SAFETY: as in `store_vector`.
        unsafe { pointer.write_volatile(Unaligned(value)) };
        true
    }

    /// Loads 16 bytes from linear address `at`.
    ///
    /// # Errors
    /// As [`Cpu::load`].
    #[inline(always)]
    pub(in crate::soft) fn load_vector(&mut self, at: u64) -> Result<__m128i, Stop> {
        let entry = &self.mmu.bank().read.entries[index(at)];
        // The last byte's page: an access that crosses pages never compares equal.
        if entry.tag == at.wrapping_add(15) & PAGE {
            let host = at.wrapping_add(entry.addend);
            let pointer = std::ptr::with_exposed_provenance::<Unaligned>(host as usize);
            // SAFETY: an entry without flags is memory of a slot that `self.mmu.phys` keeps mapped, and
            // all of the access is in its page. Others may write it at the same time: the read is
            // volatile, and any value is a valid one.
            return Ok(unsafe { pointer.read_volatile() }.0);
        }
        self.load_vector_slow(at)
    }

    /// Stores 16 bytes to linear address `at`, all or none.
    ///
    /// # Errors
    /// As [`Cpu::store`].
    #[inline(always)]
    pub(in crate::soft) fn store_vector(&mut self, at: u64, value: __m128i) -> Flow {
        let entry = &self.mmu.bank().write.entries[index(at)];
        if entry.tag == at.wrapping_add(15) & PAGE {
            let host = at.wrapping_add(entry.addend);
            let pointer = std::ptr::with_exposed_provenance_mut::<Unaligned>(host as usize);
            // SAFETY: as in `load_vector`; only writable memory is entered into the table for writes.
            unsafe { pointer.write_volatile(Unaligned(value)) };
            return Ok(());
        }
        self.store_vector_slow(at, value)
    }

    /// Where the host has the `size` bytes at linear address `at`, if reading them is a fast hit. The
    /// memory stays mapped while this vCPU executes an instruction.
    #[inline(always)]
    pub(in crate::soft) fn readable(&self, at: u64, size: u64) -> Option<*const u8> {
        let entry = &self.mmu.bank().read.entries[index(at)];
        let hit = entry.tag == at.wrapping_add(size - 1) & PAGE;
        hit.then(|| std::ptr::with_exposed_provenance(at.wrapping_add(entry.addend) as usize))
    }

    #[cold]
    fn load_vector_slow(&mut self, at: u64) -> Result<__m128i, Stop> {
        self.check_aligned(at, 16)?;
        self.check_read(at, 16)?;
        Ok(vector(self.load(at)?, self.load(self.after(at, 8))?))
    }

    #[cold]
    fn store_vector_slow(&mut self, at: u64, value: __m128i) -> Flow {
        self.check_aligned(at, 16)?;
        self.check_write(at, 16)?;
        // SAFETY: both are 16 bytes that may be anything.
        let [low, high]: [u64; 2] = unsafe { std::mem::transmute(value) };
        self.store(at, low)?;
        self.store(self.after(at, 8), high)
    }

    /// Linear address `bytes` behind `at`.
    #[inline(always)]
    pub(in crate::soft) fn after(&self, at: u64, bytes: u64) -> u64 {
        let next = at.wrapping_add(bytes);
        if self.mode.long { next } else { next & 0xffff_ffff }
    }
}
