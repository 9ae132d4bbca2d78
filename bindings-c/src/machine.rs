//! The machine while devices are attached to it.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ptr::NonNull;

use vmcore::{GuestAddress, Machine};

use crate::control::vmcore_control;
use crate::device::vmcore_device;
use crate::error::{Result, give, guard, need, put, vmcore_error};
use crate::irq::vmcore_irq;
use crate::memory::vmcore_memory;

/// The machine while it is being built: valid during a vmcore_attach_fn alone.
pub struct vmcore_machine {
    machine: NonNull<Machine>,
}

/// Puts devices of the program's on a machine that is being built. An error that it returns is that of the build.
pub type vmcore_attach_fn = Option<
    unsafe extern "C" fn(user: *mut c_void, machine: *mut vmcore_machine) -> Option<Box<vmcore_error>>,
>;

impl vmcore_machine {
    pub(crate) fn new(machine: &mut Machine) -> Self {
        Self { machine: NonNull::from(machine) }
    }

    fn get(&mut self) -> &mut Machine {
        // SAFETY: it lives during the attach function, on whose thread alone this is used.
        unsafe { self.machine.as_mut() }
    }
}

fn get(machine: Option<&mut vmcore_machine>) -> Result<&mut Machine> {
    Ok(need(machine, "machine")?.get())
}

/// Puts a device at `len` I/O ports from `base`. The device stays the caller's too.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_machine_insert_ports(
    machine: Option<&mut vmcore_machine>,
    base: u16,
    len: u16,
    device: Option<&vmcore_device>,
) -> Option<Box<vmcore_error>> {
    guard(|| Ok(get(machine)?.ports(base, len, need(device, "device")?.shared.clone())?))
}

/// Puts a device at `len` addresses from `base`. The device stays the caller's too.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_machine_insert_mmio(
    machine: Option<&mut vmcore_machine>,
    base: u64,
    len: u64,
    device: Option<&vmcore_device>,
) -> Option<Box<vmcore_error>> {
    guard(|| Ok(get(machine)?.mmio(GuestAddress(base), len, need(device, "device")?.shared.clone())?))
}

/// Sets aside `len` addresses that neither memory nor another device uses, and tells the first.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_machine_mmio_window(
    machine: Option<&mut vmcore_machine>,
    len: u64,
    out: Option<&mut MaybeUninit<u64>>,
) -> Option<Box<vmcore_error>> {
    guard(|| put(out, get(machine)?.mmio_window(len)?.0))
}

/// Gives out the number of a global system interrupt; devices share them when all are given out.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_machine_allocate_gsi(
    machine: Option<&mut vmcore_machine>,
    out: Option<&mut MaybeUninit<u32>>,
) -> Option<Box<vmcore_error>> {
    guard(|| put(out, get(machine)?.allocate_gsi()))
}

/// The wire into global system interrupt `gsi`. It may outlive the machine.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_machine_irq(
    machine: Option<&mut vmcore_machine>,
    gsi: u32,
    out: Option<&mut MaybeUninit<*mut vmcore_irq>>,
) -> Option<Box<vmcore_error>> {
    guard(|| give(out, vmcore_irq { line: get(machine)?.irq_line(gsi) }))
}

/// The machine's off switch, for devices to keep.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_machine_control(
    machine: Option<&mut vmcore_machine>,
    out: Option<&mut MaybeUninit<*mut vmcore_control>>,
) -> Option<Box<vmcore_error>> {
    guard(|| give(out, vmcore_control { control: get(machine)?.control() }))
}

/// The guest's memory.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_machine_memory(
    machine: Option<&mut vmcore_machine>,
    out: Option<&mut MaybeUninit<*mut vmcore_memory>>,
) -> Option<Box<vmcore_error>> {
    guard(|| give(out, vmcore_memory { memory: get(machine)?.memory().clone() }))
}
