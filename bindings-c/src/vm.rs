//! Virtual machines: bare and built.

use std::ffi::c_char;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use vmcore::backend::BackendConfig;
use vmcore::{
    Accel, Control, Deterministic, Error, GuestAddress, GuestMemory, MemoryRegion, Msi, Outcome, Vm,
    VmHandle, host,
};
use vmdevices::legacy::PowerButton;

use crate::bytes::vmcore_bytes;
use crate::control::vmcore_control;
use crate::device::vmcore_device;
use crate::error::{Result, give, guard, need, put, vmcore_error};
use crate::host::{accel, vmcore_accel};
use crate::irq::vmcore_irq;
use crate::memory::vmcore_memory;
use crate::outcome::vmcore_outcome;
use crate::region::vmcore_region;
use crate::stats::vmcore_vcpu_stats;
use crate::vcpu::vmcore_vcpu;

/// A virtual machine.
pub struct vmcore_vm {
    vm: RwLock<Vm>,
    running: AtomicBool,
    pub(crate) handle: VmHandle,
    control: Control,
    memory: GuestMemory,
    button: Option<PowerButton>,
    backend: std::ffi::CString,
}

impl vmcore_vm {
    pub(crate) fn new(vm: Vm, button: Option<PowerButton>) -> Self {
        Self {
            handle: vm.handle(),
            control: vm.control(),
            memory: vm.memory().clone(),
            button,
            backend: std::ffi::CString::new(vm.backend()).unwrap_or_default(),
            running: AtomicBool::new(false),
            vm: RwLock::new(vm),
        }
    }

    /// The VM, while it does not run.
    fn still(&self, op: &'static str) -> Result<RwLockReadGuard<'_, Vm>> {
        let busy = || Error::WrongState { op, state: "running", fix: "wait until its run has returned" };
        if self.running.load(Ordering::Acquire) {
            return Err(busy().into());
        }
        // Where a run begins at this very moment it is as if that had come first.
        Ok(self.vm.try_read().map_err(|_| busy())?)
    }

    fn run(&self, run: impl FnOnce(&mut Vm) -> vmcore::Result<Outcome>) -> Result<vmcore_outcome> {
        if self.running.swap(true, Ordering::AcqRel) {
            let fix = "wait until the other run has returned";
            return Err(Error::WrongState { op: "run", state: "running", fix }.into());
        }
        let outcome = run(&mut self.vm.write().unwrap_or_else(PoisonError::into_inner));
        self.running.store(false, Ordering::Release);
        Ok(outcome?.into())
    }
}

/// A VM without memory, devices and vCPUs, for programs that do it all themselves.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vm_bare(
    kind: vmcore_accel,
    out: Option<&mut MaybeUninit<*mut vmcore_vm>>,
) -> Option<Box<vmcore_error>> {
    guard(|| give(out, vmcore_vm::new(Vm::bare(accel(kind)?)?, None)))
}

/// As vmcore_vm_bare, with interrupt controllers and a PIT.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vm_bare_with_irqchip(
    kind: vmcore_accel,
    out: Option<&mut MaybeUninit<*mut vmcore_vm>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let (backend, _) = host::choose(accel(kind)?)?;
        let vm = Vm::bare_on(backend, &BackendConfig { irqchip: true })?;
        give(out, vmcore_vm::new(vm, None))
    })
}

/// A VM that does the same in every run, on the software CPU; with interrupt controllers and a PIT where `irqchip`.
/// vmcore_vcpu_run_instructions runs its vCPUs, one at a time. `seed` is where its random numbers begin.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vm_bare_deterministic(
    seed: u64,
    irqchip: bool,
    out: Option<&mut MaybeUninit<*mut vmcore_vm>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let (backend, _) = host::choose(Accel::Soft)?;
        let vm = Vm::bare_deterministic(backend, &BackendConfig { irqchip }, Deterministic::seeded(seed))?;
        give(out, vmcore_vm::new(vm, None))
    })
}

/// Name of the backend that runs it: "kvm", "soft". It lives as long as the VM.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_vm_backend(vm: Option<&vmcore_vm>) -> *const c_char {
    vm.map_or(c"".as_ptr(), |vm| vm.backend.as_ptr())
}

/// The guest's memory.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vm_memory(
    vm: Option<&vmcore_vm>,
    out: Option<&mut MaybeUninit<*mut vmcore_memory>>,
) -> Option<Box<vmcore_error>> {
    guard(|| give(out, vmcore_memory { memory: need(vm, "vm")?.memory.clone() }))
}

/// Makes `len` bytes of anonymous memory at `base` the guest's, both multiples of 4096.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vm_map(vm: Option<&vmcore_vm>, base: u64, len: u64) -> Option<Box<vmcore_error>> {
    guard(|| {
        let vm = need(vm, "vm")?.still("map memory")?;
        Ok(vm.map(MemoryRegion::anonymous(GuestAddress(base), len)?)?)
    })
}

/// Makes a region the guest's memory. `region` is taken.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vm_map_region(
    vm: Option<&vmcore_vm>,
    region: Option<Box<vmcore_region>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let region = need(region, "region")?;
        let vm = need(vm, "vm")?.still("map memory")?;
        Ok(vm.map(region.build()?)?)
    })
}

/// Takes the memory that begins at `base` away from the guest.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vm_unmap(vm: Option<&vmcore_vm>, base: u64) -> Option<Box<vmcore_error>> {
    guard(|| {
        need(vm, "vm")?.still("unmap memory")?.unmap(GuestAddress(base))?;
        Ok(())
    })
}

/// Takes the pages of the region at `base` that were written since the last call, a bit a page from the lowest bit
/// of the first byte on, and clears them.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vm_take_dirty(
    vm: Option<&vmcore_vm>,
    base: u64,
    out: Option<&mut MaybeUninit<*mut vmcore_bytes>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let dirty = need(vm, "vm")?.still("take dirty pages")?.take_dirty(GuestAddress(base))?;
        let mut bits = vec![0; usize::try_from(dirty.pages().div_ceil(8)).unwrap_or(0)];
        for page in (0..dirty.pages()).filter(|&page| dirty.is_dirty(page)) {
            if let Some(byte) = usize::try_from(page / 8).ok().and_then(|at| bits.get_mut(at)) {
                *byte |= 1 << (page % 8);
            }
        }
        give(out, vmcore_bytes::new(bits))
    })
}

/// Makes vCPU number `id`, to be run by the caller.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vm_create_vcpu(
    vm: Option<&vmcore_vm>,
    id: u32,
    out: Option<&mut MaybeUninit<*mut vmcore_vcpu>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let vcpu = need(vm, "vm")?.still("make a vCPU")?.create_vcpu(id)?;
        give(out, vmcore_vcpu::new(vcpu))
    })
}

/// Puts a device at `len` I/O ports from `base`. The device stays the caller's too.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vm_insert_ports(
    vm: Option<&vmcore_vm>,
    base: u16,
    len: u16,
    device: Option<&vmcore_device>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let device = need(device, "device")?.shared.clone();
        Ok(need(vm, "vm")?.still("add a device")?.ports().insert(base.into(), len.into(), device)?)
    })
}

/// Puts a device at `len` addresses from `base`. The device stays the caller's too.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vm_insert_mmio(
    vm: Option<&vmcore_vm>,
    base: u64,
    len: u64,
    device: Option<&vmcore_device>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let device = need(device, "device")?.shared.clone();
        Ok(need(vm, "vm")?.still("add a device")?.mmio().insert(base, len, device)?)
    })
}

/// Takes the device whose ports begin at `base` away, and tells whether there was one.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vm_remove_ports(
    vm: Option<&vmcore_vm>,
    base: u16,
    out: Option<&mut MaybeUninit<bool>>,
) -> Option<Box<vmcore_error>> {
    guard(|| put(out, need(vm, "vm")?.still("remove a device")?.ports().remove(base.into()).is_some()))
}

/// Takes the device whose addresses begin at `base` away, and tells whether there was one.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vm_remove_mmio(
    vm: Option<&vmcore_vm>,
    base: u64,
    out: Option<&mut MaybeUninit<bool>>,
) -> Option<Box<vmcore_error>> {
    guard(|| put(out, need(vm, "vm")?.still("remove a device")?.mmio().remove(base).is_some()))
}

/// The wire into global system interrupt `gsi`, 0 to 23, of a VM with interrupt controllers.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vm_irq(
    vm: Option<&vmcore_vm>,
    gsi: u32,
    out: Option<&mut MaybeUninit<*mut vmcore_irq>>,
) -> Option<Box<vmcore_error>> {
    guard(|| give(out, vmcore_irq { line: need(vm, "vm")?.still("make a wire")?.irq_line(gsi) }))
}

/// Delivers a message-signalled interrupt.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vm_send_msi(
    vm: Option<&vmcore_vm>,
    address: u64,
    data: u32,
) -> Option<Box<vmcore_error>> {
    guard(|| Ok(need(vm, "vm")?.still("send a message")?.send_msi(Msi { address, data })?))
}

/// Runs the guest until it ends or is stopped, and tells how it ended.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vm_run(
    vm: Option<&vmcore_vm>,
    out: Option<&mut MaybeUninit<vmcore_outcome>>,
) -> Option<Box<vmcore_error>> {
    guard(|| put(out, need(vm, "vm")?.run(Vm::run)?))
}

/// As vmcore_vm_run, for `milliseconds` at most: another run goes on where this one stopped.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vm_run_for(
    vm: Option<&vmcore_vm>,
    milliseconds: u64,
    out: Option<&mut MaybeUninit<vmcore_outcome>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let limit = Duration::from_millis(milliseconds);
        put(out, need(vm, "vm")?.run(|vm| vm.run_for(limit))?)
    })
}

/// As vmcore_vm_run of a deterministic VM, for `count` instructions of all its vCPUs together.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vm_run_instructions(
    vm: Option<&vmcore_vm>,
    count: u64,
    out: Option<&mut MaybeUninit<vmcore_outcome>>,
) -> Option<Box<vmcore_error>> {
    guard(|| put(out, need(vm, "vm")?.run(|vm| vm.run_instructions(count))?))
}

/// How many instructions the vCPUs of a deterministic VM have executed; 0 of another.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vm_instructions(
    vm: Option<&vmcore_vm>,
    out: Option<&mut MaybeUninit<u64>>,
) -> Option<Box<vmcore_error>> {
    guard(|| put(out, need(vm, "vm")?.still("count instructions")?.instructions().unwrap_or(0)))
}

/// Ends the run that is under way, or the next one at its begin, with VMCORE_OUTCOME_STOPPED. From any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_vm_stop(vm: Option<&vmcore_vm>) {
    if let Some(vm) = vm {
        vm.handle.stop();
    }
}

/// Presses the power button of a VM with a PC board; whether it has one.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_vm_press_power_button(vm: Option<&vmcore_vm>) -> bool {
    vm.and_then(|vm| vm.button.as_ref()).is_some_and(PowerButton::press)
}

/// The machine's off switch. It may outlive the VM.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vm_control(
    vm: Option<&vmcore_vm>,
    out: Option<&mut MaybeUninit<*mut vmcore_control>>,
) -> Option<Box<vmcore_error>> {
    guard(|| give(out, vmcore_control { control: need(vm, "vm")?.control.clone() }))
}

/// The sums of what all vCPUs did so far.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vm_get_stats(
    vm: Option<&vmcore_vm>,
    out: Option<&mut MaybeUninit<vmcore_vcpu_stats>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let stats = need(vm, "vm")?.still("read statistics")?.stats()?;
        put(out, vmcore_vcpu_stats::sum(&stats.vcpus))
    })
}

/// Frees the VM, and stops its threads. It must not be running. Its memory stays while views and handles of it
/// are there.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_vm_delete(vm: Option<Box<vmcore_vm>>) {
    drop(vm);
}
