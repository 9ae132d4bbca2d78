//! A VM that stands still.

use std::mem::MaybeUninit;

use vmcore::Paused;

use crate::bytes::vmcore_bytes;
use crate::error::{give, guard, need, vmcore_error};
use crate::state::vmcore_state;
use crate::vm::vmcore_vm;

/// A VM that stands still until this is deleted. It keeps what the VM consists of.
pub struct vmcore_pause {
    paused: Paused,
}

/// Holds all vCPUs and device threads, running or not, and returns once they stand still. From any thread but the VM's
/// own: not from callbacks of devices.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vm_pause(
    vm: Option<&vmcore_vm>,
    out: Option<&mut MaybeUninit<*mut vmcore_pause>>,
) -> Option<Box<vmcore_error>> {
    guard(|| give(out, vmcore_pause { paused: need(vm, "vm")?.handle.pause()? }))
}

/// The state of vCPUs and machine. Memory can be read meanwhile; devices are not part of it.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_pause_save(
    pause: Option<&vmcore_pause>,
    out: Option<&mut MaybeUninit<*mut vmcore_state>>,
) -> Option<Box<vmcore_error>> {
    guard(|| give(out, vmcore_state::of_vm(need(pause, "pause")?.paused.save()?)))
}

/// Takes over a state from vmcore_pause_save, of this VM or of one built alike.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_pause_restore(
    pause: Option<&mut vmcore_pause>,
    state: Option<&vmcore_state>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let state = need(state, "state")?.vm()?;
        Ok(need(pause, "pause")?.paused.restore(state)?)
    })
}

/// A fingerprint of the state of vCPUs, machine, memory and devices: 64 hexadecimal digits.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_pause_hash(
    pause: Option<&vmcore_pause>,
    out: Option<&mut MaybeUninit<*mut vmcore_bytes>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let hash = need(pause, "pause")?.paused.state_hash()?;
        give(out, vmcore_bytes::new(hash.to_string()))
    })
}

/// Lets the VM go on, where no other pause holds it.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_pause_delete(pause: Option<Box<vmcore_pause>>) {
    drop(pause);
}
