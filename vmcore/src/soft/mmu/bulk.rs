//! Whole pieces of pages at a time, for repeated string instructions; and pairs of words exchanged
//! in one step.
#![expect(unsafe_code, reason = "a translation's host address is used as a pointer")]
#![expect(
    clippy::cast_possible_truncation,
    reason = "host addresses, and lengths within a page, are kept in u64"
)]

use super::Access;
use super::access::Target;
use crate::soft::cpu::Cpu;
use crate::soft::cpu::op::Stop;
use crate::soft::cpu::word::Word;

impl Cpu {
    /// Copies up to `count` elements from linear address `from` to `to`, ascending, as if one by one,
    /// as far as both pages go. Returns how many; 0 where the pieces are not plain memory or overlap so
    /// that it must be done element by element.
    ///
    /// # Errors
    /// The fault that the first byte makes.
    pub(in crate::soft) fn copy_forward<W: Word>(
        &mut self,
        to: u64,
        from: u64,
        count: u64,
    ) -> Result<u64, Stop> {
        let Some((source, left)) = self.span(from, Access::Read)? else { return Ok(0) };
        let Some((target, room)) = self.span(to, Access::Write)? else { return Ok(0) };
        // The second translation may have displaced nothing that the first one's memory depends on:
        // the slots stay mapped.
        let count = count.min(left / W::SIZE).min(room / W::SIZE);
        let len = count * W::SIZE;
        let distance = target.wrapping_sub(source);
        if distance != 0 && distance < W::SIZE {
            return Ok(0);
        }
        // Where the target begins within the source its beginning is repeated.
        let piece = if distance == 0 { len } else { len.min(distance) };
        let mut done = 0;
        while done < len {
            let part = piece.min(len - done) as usize;
            let source = std::ptr::with_exposed_provenance::<u8>(source.wrapping_add(done) as usize);
            let target = std::ptr::with_exposed_provenance_mut::<u8>(target.wrapping_add(done) as usize);
            // SAFETY: both pieces lie in memory of slots, which `self.mmu.phys` keeps mapped, and the
            // target in writable memory. Other vCPUs and devices may change the bytes meanwhile; any
            // bytes are valid.
            unsafe { std::ptr::copy(source, target, part) };
            done += part as u64;
        }
        Ok(count)
    }

    /// Fills up to `count` elements with `value` from linear address `to` upwards, as far as the page
    /// goes. Returns how many; 0 where it is not plain memory.
    ///
    /// # Errors
    /// The fault that the first byte makes.
    pub(in crate::soft) fn fill_forward<W: Word>(
        &mut self,
        to: u64,
        value: W,
        count: u64,
    ) -> Result<u64, Stop> {
        let Some((target, room)) = self.span(to, Access::Write)? else { return Ok(0) };
        let count = count.min(room / W::SIZE);
        let target = std::ptr::with_exposed_provenance_mut::<u8>(target as usize);
        let bytes = value.zext().to_le_bytes();
        if bytes[..W::SIZE as usize].iter().all(|byte| *byte == bytes[0]) {
            // SAFETY: as in `copy_forward`.
            unsafe { target.write_bytes(bytes[0], (count * W::SIZE) as usize) };
        } else {
            for n in 0..count as usize {
                // SAFETY: as in `copy_forward`.
                unsafe { target.cast::<W>().wrapping_add(n).write_unaligned(value) };
            }
        }
        Ok(count)
    }

    /// Replaces the two words at linear address `at`, a multiple of 16, by `new` where they are
    /// `wanted`, in one step. Returns what they were.
    ///
    /// # Errors
    /// As [`Cpu::store`].
    pub(in crate::soft) fn exchange_pair(
        &mut self,
        at: u64,
        wanted: [u64; 2],
        new: [u64; 2],
    ) -> Result<[u64; 2], Stop> {
        let target = self.target(at, Access::Write)?;
        if let (Target::Memory(host) | Target::Code(host, _), Some(exchange)) = (&target, pair::exchange()) {
            // SAFETY: the address is aligned and in writable memory of a slot, which stays mapped.
            let old = unsafe { exchange(*host, wanted, new) };
            self.note_access(at, 16, true);
            if let Target::Code(_, gpa) = target {
                self.wrote_code(gpa, 16);
            }
            return Ok(old);
        }
        // Devices, and hosts without the instruction: in one step for the other vCPUs' locked accesses
        // that come here too.
        let machine = self.machine.clone();
        let _guard = machine.split_lock();
        self.check_write(at, 16)?;
        let old = [self.load(at)?, self.load(at.wrapping_add(8))?];
        let [low, high] = if old == wanted { new } else { old };
        self.store(at, low)?;
        self.store(at.wrapping_add(8), high)?;
        Ok(old)
    }
}

#[cfg(target_arch = "x86_64")]
mod pair {
    //! The host's own CMPXCHG16B.

    use std::arch::asm;

    type Exchange = unsafe fn(u64, [u64; 2], [u64; 2]) -> [u64; 2];

    /// What exchanges two words at a host address, where the host can.
    pub(super) fn exchange() -> Option<Exchange> {
        std::arch::is_x86_feature_detected!("cmpxchg16b").then_some(host as Exchange)
    }

    /// # Safety
    /// The host has the instruction; `at` is a multiple of 16 and writable memory.
    unsafe fn host(at: u64, wanted: [u64; 2], new: [u64; 2]) -> [u64; 2] {
        let [mut low, mut high] = wanted;
        // SAFETY: the caller's promise; RBX, which the compiler keeps for itself, is put back. (The
        // function in `std::arch` needs a library call in builds that are not optimized.)
        unsafe {
            asm!(
                "xchg rbx, rsi",
                "lock cmpxchg16b [rdi]",
                "mov rbx, rsi",
                in("rdi") at,
                inout("rsi") new[0] => _,
                in("rcx") new[1],
                inout("rax") low,
                inout("rdx") high,
                options(nostack),
            );
        }
        [low, high]
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod pair {
    pub(super) fn exchange() -> Option<unsafe fn(u64, [u64; 2], [u64; 2]) -> [u64; 2]> {
        None
    }
}
