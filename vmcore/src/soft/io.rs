//! Accesses that leave guest memory: ports, and addresses without memory.
#![expect(clippy::cast_possible_truncation, reason = "the host is a 64-bit one, and low bits are meant")]
#![expect(unsafe_code, reason = "the callbacks of a run are kept by pointer while it lasts")]

use std::ptr::NonNull;

use super::chip::Chipset;
use super::cpu::Cpu;
use super::fp::HostFloat;
use super::link::attention;
use crate::backend::VcpuIo;
use crate::memory::GuestAddress;

/// Base of the IOAPIC's registers.
const IOAPIC: u64 = 0xfec0_0000;
/// Length of the IOAPIC's registers in bytes.
const IOAPIC_LEN: u64 = 0x100;

/// The callbacks of the present run.
#[derive(Clone, Copy)]
pub(in crate::soft) struct Callbacks(NonNull<dyn VcpuIo>);

// SAFETY: the pointer is only used by the thread inside `Cpu::with_io`, which has the reference that
// it was made from; between runs there is none.
unsafe impl Send for Callbacks {}

impl Cpu {
    /// Begins a run whose I/O `io` answers. It must be ended by [`Cpu::end_io`] while `io` lives.
    ///
    /// # Safety
    /// The caller keeps `io` borrowed until [`Cpu::end_io`], also when it unwinds.
    pub(in crate::soft) unsafe fn begin_io(&mut self, io: &mut dyn VcpuIo) {
        let pointer: NonNull<dyn VcpuIo + '_> = NonNull::from(io);
        // SAFETY: only the lifetime is changed, and the caller promises to keep to it.
        let pointer = unsafe {
            std::mem::transmute::<NonNull<dyn VcpuIo + '_>, NonNull<dyn VcpuIo + 'static>>(pointer)
        };
        self.callbacks = Some(Callbacks(pointer));
        self.host_float = Some(HostFloat::put_aside());
    }

    /// Ends what [`Cpu::begin_io`] began.
    pub(in crate::soft) fn end_io(&mut self) {
        self.callbacks = None;
        if let Some(host) = self.host_float.take() {
            host.give_back();
        }
    }

    /// Calls back. Meanwhile this vCPU holds nothing up that waits for it to leave guest memory alone.
    fn call(&mut self, act: impl FnOnce(&mut dyn VcpuIo)) {
        let Some(Callbacks(mut pointer)) = self.callbacks else { return };
        self.link.set_in_guest(false);
        if let Some(host) = self.host_float.take() {
            host.give_back();
        }
        // SAFETY: `with_io` has the reference on this thread's stack, and nobody else uses it: the
        // callback cannot reach this vCPU, which is borrowed.
        act(unsafe { pointer.as_mut() });
        self.host_float = Some(HostFloat::put_aside());
        self.link.set_in_guest(true);
        self.serve_memory();
        if self.link.asked(attention::KICK) != 0 {
            // Whoever kicks from here expects no further access of the guest.
            self.blocks.interrupt();
        }
    }

    /// After an access that may be in the midst of a block: in a deterministic VM, what it has asked for
    /// is served before the next instruction.
    fn end_access(&mut self) {
        if self.machine.clock.world().is_some() && self.link.wanted() {
            self.blocks.interrupt();
        }
    }

    /// Reads `size` bytes (1, 2 or 4) from `port`.
    pub(in crate::soft) fn port_read(&mut self, port: u16, size: usize) -> u32 {
        self.tell_time();
        if let Some(chipset) = self.chipset_for(port) {
            self.stats.port += 1;
            let bytes = std::array::from_fn(|n| match port.checked_add(n as u16) {
                Some(port) if n < size && Chipset::claims(port) => chipset.port_read(port),
                _ if n < size => 0xff,
                _ => 0,
            });
            return u32::from_le_bytes(bytes);
        }
        self.stats.port += 1;
        self.stats.exits += 1;
        let mut data = [0; 4];
        self.call(|io| io.port_read(port, &mut data[..size]));
        u32::from_le_bytes(data)
    }

    /// Writes the low `size` bytes (1, 2 or 4) of `value` to `port`.
    pub(in crate::soft) fn port_write(&mut self, port: u16, value: u32, size: usize) {
        self.tell_time();
        let data = value.to_le_bytes();
        if let Some(chipset) = self.chipset_for(port) {
            for (n, &byte) in (0u16..).zip(&data[..size]) {
                if let Some(port) = port.checked_add(n).filter(|&port| Chipset::claims(port)) {
                    chipset.port_write(port, byte);
                }
            }
            return;
        }
        if self.machine.ring_port(port, value, size) {
            return;
        }
        self.stats.port += 1;
        self.stats.exits += 1;
        self.call(|io| io.port_write(port, &data[..size]));
    }

    fn chipset_for(&self, port: u16) -> Option<std::sync::Arc<Chipset>> {
        if Chipset::claims(port) { self.machine.chipset.clone() } else { None }
    }

    /// Reads `size` bytes (1, 2, 4 or 8) from guest-physical `gpa`, where there is no memory.
    pub(in crate::soft) fn device_read(&mut self, gpa: u64, size: usize) -> u64 {
        self.tell_time();
        let value = self.read_device(gpa, size);
        self.end_access();
        value
    }

    fn read_device(&mut self, gpa: u64, size: usize) -> u64 {
        if let Some(offset) = self.lapic_offset(gpa) {
            let word = self.lapic.as_mut().map_or(0, |lapic| lapic.read(offset & !0xf));
            // Registers are 4 bytes at multiples of 16 (SDM vol. 3A, 11.4.1).
            let shift = 8 * (offset & 0xf);
            return if shift < 32 { u64::from(word) >> shift } else { 0 };
        }
        if let Some((chipset, offset)) = self.ioapic(gpa) {
            return chipset.ioapic_read(offset).into();
        }
        self.stats.mmio += 1;
        self.stats.exits += 1;
        let mut data = [0; 8];
        // Memory that the host can only read is read as memory.
        if let Some(slot) = self.mmu.phys.find(gpa).cloned() {
            let offset = gpa - slot.region.base().0;
            if slot.region.read(offset, &mut data[..size]).is_ok() {
                return u64::from_le_bytes(data);
            }
        }
        self.call(|io| io.mmio_read(GuestAddress(gpa), &mut data[..size]));
        u64::from_le_bytes(data)
    }

    /// Writes the low `size` bytes of `value` to guest-physical `gpa`, where there is no writable
    /// memory.
    pub(in crate::soft) fn device_write(&mut self, gpa: u64, value: u64, size: usize) {
        self.tell_time();
        self.write_device(gpa, value, size);
        self.end_access();
    }

    fn write_device(&mut self, gpa: u64, value: u64, size: usize) {
        if let Some(offset) = self.lapic_offset(gpa) {
            if let (Some(lapic), true, true) = (&mut self.lapic, offset & 0xf == 0, size >= 4) {
                lapic.write(offset, value as u32);
            }
            return;
        }
        if let Some((chipset, offset)) = self.ioapic(gpa) {
            chipset.ioapic_write(offset, value as u32);
            return;
        }
        if self.machine.ring_mmio(gpa, value, size) {
            return;
        }
        self.stats.mmio += 1;
        self.stats.exits += 1;
        let data = value.to_le_bytes();
        self.call(|io| io.mmio_write(GuestAddress(gpa), &data[..size]));
    }

    /// Offset into the local APIC's page, where `gpa` is in it and it is in xAPIC mode.
    fn lapic_offset(&self, gpa: u64) -> Option<u32> {
        const ENABLED: u64 = 1 << 11;
        const X2APIC: u64 = 1 << 10;
        let base = self.lapic.as_ref()?.base();
        let inside = gpa & !0xfff == base & !0xfff & 0xf_ffff_ffff_f000;
        (inside && base & (ENABLED | X2APIC) == ENABLED).then_some((gpa & 0xfff) as u32)
    }

    fn ioapic(&self, gpa: u64) -> Option<(std::sync::Arc<Chipset>, u64)> {
        let offset = gpa.checked_sub(IOAPIC).filter(|&offset| offset < IOAPIC_LEN)?;
        Some((self.machine.chipset.clone()?, offset))
    }

    /// Copies guest memory at guest-physical `gpa` to `bytes`, as far as there is memory.
    pub(in crate::soft) fn peek_physical(&self, gpa: u64, bytes: &mut [u8]) {
        if let Some(slot) = self.mmu.phys.find(gpa) {
            // What does not fit the slot was not asked for: callers stay within a page.
            let _ = slot.region.read(gpa - slot.region.base().0, bytes);
        }
    }
}
