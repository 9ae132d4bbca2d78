//! Loads, stores and read-modify-writes of guest memory by linear address.
#![expect(clippy::cast_possible_truncation, reason = "the host is a 64-bit one, and low bits are meant")]
#![expect(unsafe_code, reason = "a translation's host address is used as a pointer")]

use std::sync::atomic::Ordering;

use super::Access;
use super::tlb::{CODE, DEVICE, PAGE, index};
use crate::soft::cpu::op::{Flow, Stop};
use crate::soft::cpu::word::Word;
use crate::soft::cpu::{Cpu, canonical, vector};

/// A value at any address, to be read and written in one access.
#[repr(C, packed)]
struct Unaligned<W>(W);

/// Reads guest memory.
///
/// # Safety
/// `host` points at `W::SIZE` bytes of a slot's memory that stays mapped. The guest's other vCPUs and
/// devices may write them at the same time: the read is volatile, and any value is a valid one.
#[inline(always)]
unsafe fn read<W: Word>(host: u64) -> W {
    let pointer = std::ptr::with_exposed_provenance::<Unaligned<W>>(host as usize);
    // SAFETY: the caller's promise.
    unsafe { pointer.read_volatile() }.0
}

/// Writes guest memory.
///
/// # Safety
/// As for [`read`], and the memory is writable by the host.
#[inline(always)]
unsafe fn write<W: Word>(host: u64, value: W) {
    // SAFETY: the caller's promise.
    unsafe { W::store(host, value) }
}

/// What a slow access found.
pub(super) enum Target {
    /// Host address.
    Memory(u64),
    /// Host and guest-physical address of memory that holds code.
    Code(u64, u64),
    /// Guest-physical address.
    Device(u64),
}

impl Cpu {
    /// Loads from linear address `at` where it can be done at once: plain memory of one page, whose
    /// translation is known. For handlers that leave everything else to [`Cpu::load`].
    #[inline(always)]
    pub(in crate::soft) fn load_fast<W: Word>(&self, at: u64) -> Option<W> {
        let entry = &self.mmu.bank().read.entries[index(at)];
        if entry.tag != at.wrapping_add(W::SIZE - 1) & PAGE {
            return None;
        }
        // SAFETY: as in `load`.
        Some(unsafe { read(at.wrapping_add(entry.addend)) })
    }

    /// Stores to linear address `at` where it can be done at once; see [`Cpu::load_fast`]. Returns
    /// whether it could.
    #[inline(always)]
    pub(in crate::soft) fn store_fast<W: Word>(&mut self, at: u64, value: W) -> bool {
        let Some(host) = self.fast_write(at, W::SIZE) else { return false };
        // SAFETY: as in `store`.
        unsafe { write(host, value) };
        true
    }

    /// Changes the value at linear address `at` where it can be done at once; see
    /// [`Cpu::load_fast`]. Returns whether it could.
    #[inline(always)]
    pub(in crate::soft) fn modify_fast<W: Word>(&mut self, at: u64, change: impl FnOnce(W) -> W) -> bool {
        let Some(host) = self.fast_write(at, W::SIZE) else { return false };
        // SAFETY: as in `load`.
        let old = unsafe { read(host) };
        // SAFETY: as in `store`.
        unsafe { write(host, change(old)) };
        true
    }

    /// Loads from linear address `at` with the present privilege.
    ///
    /// # Errors
    /// Page faults, #GP(0) for an address that is not canonical.
    #[inline(always)]
    pub(in crate::soft) fn load<W: Word>(&mut self, at: u64) -> Result<W, Stop> {
        let entry = &self.mmu.bank().read.entries[index(at)];
        // The last byte's page: an access that crosses pages never compares equal.
        if entry.tag == at.wrapping_add(W::SIZE - 1) & PAGE {
            // SAFETY: an entry without flags is memory of a slot that `self.mmu.phys` keeps mapped, and
            // all of the access is in its page.
            return Ok(unsafe { read(at.wrapping_add(entry.addend)) });
        }
        self.load_slow(at)
    }

    /// Stores to linear address `at` with the present privilege.
    ///
    /// # Errors
    /// As [`Cpu::load`].
    #[inline(always)]
    pub(in crate::soft) fn store<W: Word>(&mut self, at: u64, value: W) -> Flow {
        let entry = &self.mmu.bank().write.entries[index(at)];
        if entry.tag == at.wrapping_add(W::SIZE - 1) & PAGE {
            // SAFETY: as in `load`; only writable memory is entered into the table for writes.
            unsafe { write(at.wrapping_add(entry.addend), value) };
            return Ok(());
        }
        self.store_slow(at, value)
    }

    /// Changes the value at linear address `at`.
    ///
    /// # Errors
    /// As [`Cpu::load`], before `change` is called.
    #[inline(always)]
    pub(in crate::soft) fn modify<W: Word>(&mut self, at: u64, mut change: impl FnMut(W) -> W) -> Flow {
        let entry = &self.mmu.bank().write.entries[index(at)];
        if entry.tag == at.wrapping_add(W::SIZE - 1) & PAGE {
            let host = at.wrapping_add(entry.addend);
            // SAFETY: as in `load`.
            let old = unsafe { read(host) };
            // SAFETY: as in `store`.
            unsafe { write(host, change(old)) };
            return Ok(());
        }
        self.check_alignment::<W>(at)?;
        // What can be written can be read, save for a device's memory, which is not translated.
        self.check_write(at, W::SIZE)?;
        let old = self.load(at)?;
        self.store_slow(at, change(old))
    }

    /// Changes the value at linear address `at` in one atomic step, seen as such by every vCPU.
    /// `change` may be called several times.
    ///
    /// # Errors
    /// As [`Cpu::load`], before `change` is called.
    #[inline(always)]
    pub(in crate::soft) fn modify_atomic<W: Word>(
        &mut self,
        at: u64,
        mut change: impl FnMut(W) -> W,
    ) -> Flow {
        if at & (W::SIZE - 1) == 0 {
            let target = match self.fast_write(at, W::SIZE) {
                Some(host) => Target::Memory(host),
                None => {
                    let target = self.target(at, Access::Write)?;
                    self.note_access(at, W::SIZE, true);
                    target
                }
            };
            match target {
                Target::Memory(host) | Target::Code(host, _) => {
                    // SAFETY: as in `load` and `store`, and the address is aligned.
                    unsafe { exchange(host, change) };
                    if let Target::Code(_, gpa) = target {
                        self.wrote_code(gpa, W::SIZE);
                    }
                    return Ok(());
                }
                // A device sees a read and a write.
                Target::Device(_) => {}
            }
        }
        self.check_alignment::<W>(at)?;
        // A split lock is atomic against other split locks only.
        let machine = self.machine.clone();
        let _guard = machine.split_lock();
        self.check_write(at, W::SIZE)?;
        let old = self.load(at)?;
        self.store(at, change(old))
    }

    /// Loads as the processor itself does for descriptors and task state: with supervisor rights,
    /// whatever the privilege and RFLAGS.AC.
    ///
    /// # Errors
    /// As [`Cpu::load`].
    pub(in crate::soft) fn load_system<W: Word>(&mut self, at: u64) -> Result<W, Stop> {
        self.as_supervisor(|cpu| cpu.load(at))
    }

    /// Stores as the processor itself does; see [`Cpu::load_system`].
    ///
    /// # Errors
    /// As [`Cpu::load`].
    pub(in crate::soft) fn store_system<W: Word>(&mut self, at: u64, value: W) -> Flow {
        self.as_supervisor(|cpu| cpu.store(at, value))
    }

    /// Runs `act` with supervisor rights.
    pub(in crate::soft) fn as_supervisor<R>(&mut self, act: impl FnOnce(&mut Self) -> R) -> R {
        let before = self.mmu.banks.active_number();
        self.mmu.banks.select(super::tlb::SUPERVISOR);
        let result = act(self);
        self.mmu.banks.set_active_number(before);
        result
    }

    /// Makes the faults that a write of `size` bytes (at most a page) at `at` would make.
    ///
    /// # Errors
    /// As [`Cpu::load`].
    pub(in crate::soft) fn check_write(&mut self, at: u64, size: u64) -> Flow {
        self.target(at, Access::Write)?;
        let last = at.wrapping_add(size.max(1) - 1);
        if last & PAGE != at & PAGE {
            self.target(last & PAGE, Access::Write)?;
        }
        Ok(())
    }

    /// Makes the faults that a read of `size` bytes (at most a page) at `at` would make.
    ///
    /// # Errors
    /// As [`Cpu::load`].
    pub(in crate::soft) fn check_read(&mut self, at: u64, size: u64) -> Flow {
        self.target(at, Access::Read)?;
        let last = at.wrapping_add(size.max(1) - 1);
        if last & PAGE != at & PAGE {
            self.target(last & PAGE, Access::Read)?;
        }
        Ok(())
    }

    /// Loads `bytes.len()` bytes (at most a page) at `at`.
    ///
    /// # Errors
    /// As [`Cpu::load`].
    pub(in crate::soft) fn load_bytes(&mut self, at: u64, bytes: &mut [u8]) -> Flow {
        self.check_read(at, bytes.len() as u64)?;
        let (words, rest) = bytes.as_chunks_mut::<8>();
        let mut next = at;
        for word in words {
            *word = self.load::<u64>(next)?.to_le_bytes();
            next = next.wrapping_add(8);
        }
        for byte in rest {
            *byte = self.load(next)?;
            next = next.wrapping_add(1);
        }
        Ok(())
    }

    /// Stores `bytes` (at most a page) at `at`; where it faults nothing is stored.
    ///
    /// # Errors
    /// As [`Cpu::load`].
    pub(in crate::soft) fn store_bytes(&mut self, at: u64, bytes: &[u8]) -> Flow {
        self.check_write(at, bytes.len() as u64)?;
        let (words, rest) = bytes.as_chunks::<8>();
        let mut next = at;
        for word in words {
            self.store(next, u64::from_le_bytes(*word))?;
            next = next.wrapping_add(8);
        }
        for &byte in rest {
            self.store(next, byte)?;
            next = next.wrapping_add(1);
        }
        Ok(())
    }

    /// The host address of `size` aligned bytes, where writing them is a fast hit.
    #[inline(always)]
    fn fast_write(&self, at: u64, size: u64) -> Option<u64> {
        let entry = &self.mmu.bank().write.entries[index(at)];
        (entry.tag == at.wrapping_add(size - 1) & PAGE).then(|| at.wrapping_add(entry.addend))
    }

    /// Where linear address `at` leads.
    pub(super) fn target(&mut self, at: u64, access: Access) -> Result<Target, Stop> {
        loop {
            let bank = self.mmu.bank();
            let table = match access {
                Access::Read => &bank.read,
                Access::Write => &bank.write,
                Access::Execute => &bank.execute,
            };
            if let Some((entry, page)) = table.find(at) {
                let gpa = page | at & !PAGE;
                let host = at.wrapping_add(entry.addend);
                return Ok(match entry.tag & (DEVICE | CODE) {
                    DEVICE => Target::Device(gpa),
                    CODE => Target::Code(host, gpa),
                    _ => Target::Memory(host),
                });
            }
            if self.mode.long && !canonical(at) {
                return Err(self.not_canonical());
            }
            if let Err(code) = self.mmu.fill(at, access) {
                return Err(self.page_fault(at, code));
            }
        }
    }

    /// Guest-physical address that code at linear address `at` is fetched from.
    ///
    /// # Errors
    /// As [`Cpu::load`]. Code in a device's memory is `None`.
    pub(in crate::soft) fn fetch_address(&mut self, at: u64) -> Result<Option<u64>, Stop> {
        match self.target(at, Access::Execute)? {
            Target::Device(_) => Ok(None),
            Target::Memory(_) | Target::Code(..) => {
                Ok(self.mmu.bank().execute.find(at).map(|(_, page)| page | at & !PAGE))
            }
        }
    }

    /// Host address of `at` and how many bytes are left in its page, where it is plain memory.
    ///
    /// # Errors
    /// As [`Cpu::load`].
    pub(super) fn span(&mut self, at: u64, access: Access) -> Result<Option<(u64, u64)>, Stop> {
        match self.target(at, access)? {
            Target::Memory(_) if self.mmu.slow_data(at) => Ok(None),
            Target::Memory(host) => Ok(Some((host, 0x1000 - (at & !PAGE)))),
            Target::Code(..) | Target::Device(_) => Ok(None),
        }
    }

    /// # Errors
    /// #AC(0) where accesses must be aligned, and this one of `W`'s size at `at` is not. Hardware finds
    /// that before it looks for the page.
    fn check_alignment<W: Word>(&mut self, at: u64) -> Flow {
        self.check_aligned(at, W::SIZE)
    }

    /// # Errors
    /// #AC(0) where accesses must be aligned, and `at` is not a multiple of `size`.
    pub(in crate::soft) fn check_aligned(&mut self, at: u64, size: u64) -> Flow {
        if at & (size - 1) != 0 && self.mmu.checks_alignment() {
            return Err(self.raise(vector::AC, Some(0)));
        }
        Ok(())
    }

    /// Runs `act`, whose accesses need not be aligned.
    pub(in crate::soft) fn unaligned<R>(&mut self, act: impl FnOnce(&mut Self) -> R) -> R {
        if !self.mmu.checks_alignment() {
            return act(self);
        }
        let before = self.mmu.banks.active_number();
        self.mmu.banks.select(super::tlb::USER);
        let result = act(self);
        self.mmu.banks.set_active_number(before);
        result
    }

    #[cold]
    fn load_slow<W: Word>(&mut self, at: u64) -> Result<W, Stop> {
        self.check_alignment::<W>(at)?;
        if at.wrapping_add(W::SIZE - 1) & PAGE != at & PAGE {
            self.check_read(at, W::SIZE)?;
            let mut value = 0;
            for n in 0..W::SIZE {
                value |= u64::from(self.load::<u8>(self.wrap_linear(at.wrapping_add(n)))?) << (8 * n);
            }
            return Ok(W::cut(value));
        }
        let target = self.target(at, Access::Read)?;
        self.note_access(at, W::SIZE, false);
        match target {
            // SAFETY: as in `load`.
            Target::Memory(host) | Target::Code(host, _) => Ok(unsafe { read(host) }),
            Target::Device(gpa) => Ok(W::cut(self.device_read(gpa, W::SIZE as usize))),
        }
    }

    #[cold]
    fn store_slow<W: Word>(&mut self, at: u64, value: W) -> Flow {
        self.check_alignment::<W>(at)?;
        if at.wrapping_add(W::SIZE - 1) & PAGE != at & PAGE {
            self.check_write(at, W::SIZE)?;
            for n in 0..W::SIZE {
                self.store(self.wrap_linear(at.wrapping_add(n)), u8::cut(value.zext() >> (8 * n)))?;
            }
            return Ok(());
        }
        let target = self.target(at, Access::Write)?;
        self.note_access(at, W::SIZE, true);
        match target {
            // SAFETY: as in `store`.
            Target::Memory(host) => unsafe { write(host, value) },
            Target::Code(host, gpa) => {
                // SAFETY: as in `store`.
                unsafe { write(host, value) };
                self.wrote_code(gpa, W::SIZE);
            }
            Target::Device(gpa) => self.device_write(gpa, value.zext(), W::SIZE as usize),
        }
        Ok(())
    }

    /// Linear addresses are 32 bits wide outside of IA-32e mode.
    fn wrap_linear(&self, at: u64) -> u64 {
        if self.mode.long { at } else { at & 0xffff_ffff }
    }
}

/// Replaces the value at `host` by what `change` makes of it.
///
/// # Safety
/// `host` is the aligned address of writable memory of a slot.
#[inline(always)]
unsafe fn exchange<W: Word>(host: u64, mut change: impl FnMut(W) -> W) {
    // SAFETY: the caller's promise.
    let mut old = unsafe { read(host) };
    loop {
        // SAFETY: the caller's promise.
        match unsafe { W::compare_exchange(host, old, change(old), Ordering::SeqCst) } {
            Ok(()) => return,
            Err(found) => old = found,
        }
    }
}
