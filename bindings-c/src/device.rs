//! Devices that the program writes: at ports and at addresses.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::sync::{Arc, Mutex};

use vmcore::{BusDevice, SharedDevice};

use crate::bytes::vmcore_bytes;
use crate::callback::{Table, User, required, table, vmcore_drop_fn};
use crate::error::{give, guard, vmcore_error};

/// What a device at ports or addresses does. Called on the threads of the vCPUs, one call at a time; the vCPU waits
/// for the answer. `offset` counts from the device's base, `len` is 1, 2, 4 or 8.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct vmcore_device_ops {
    /// sizeof(vmcore_device_ops).
    pub size: usize,
    /// Answers a read.
    pub read: Option<unsafe extern "C" fn(user: *mut c_void, offset: u64, data: *mut u8, len: usize)>,
    /// Takes a write.
    pub write: Option<unsafe extern "C" fn(user: *mut c_void, offset: u64, data: *const u8, len: usize)>,
    /// The device's state, for fingerprints; NULL for a device without.
    pub save: Option<
        unsafe extern "C" fn(user: *mut c_void, state: *mut *mut vmcore_bytes) -> Option<Box<vmcore_error>>,
    >,
    /// Takes over a state; NULL for a device without.
    pub restore: Option<
        unsafe extern "C" fn(user: *mut c_void, state: *const u8, len: usize) -> Option<Box<vmcore_error>>,
    >,
    /// The device is gone from every machine and has been deleted; may be NULL.
    pub drop: vmcore_drop_fn,
}

// SAFETY: a number and functions that may be NULL.
unsafe impl Table for vmcore_device_ops {}

/// A device of the program's, which may be on several machines.
pub struct vmcore_device {
    pub(crate) shared: SharedDevice,
}

type Read = unsafe extern "C" fn(*mut c_void, u64, *mut u8, usize);
type Write = unsafe extern "C" fn(*mut c_void, u64, *const u8, usize);

struct Device {
    read: Read,
    write: Write,
    ops: vmcore_device_ops,
    user: User,
}

impl BusDevice for Device {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // SAFETY: the program's function with its pointer, and as many bytes as it is told.
        unsafe { (self.read)(self.user.get(), offset, data.as_mut_ptr(), data.len()) }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        // SAFETY: the program's function with its pointer, and as many bytes as it is told.
        unsafe { (self.write)(self.user.get(), offset, data.as_ptr(), data.len()) }
    }

    fn save(&self) -> vmcore::Result<Vec<u8>> {
        let Some(save) = self.ops.save else { return Ok(Vec::new()) };
        let mut state = std::ptr::null_mut();
        // SAFETY: the program's function with its pointer, and a place for the answer.
        if let Some(error) = unsafe { save(self.user.get(), &raw mut state) } {
            return Err(error.into_device_error("of the program"));
        }
        if state.is_null() {
            return Ok(Vec::new());
        }
        // SAFETY: the program gives what vmcore_bytes_new gave it.
        Ok(unsafe { Box::from_raw(state) }.as_slice().to_vec())
    }

    fn restore(&mut self, state: &[u8]) -> vmcore::Result<()> {
        let Some(restore) = self.ops.restore else { return Ok(()) };
        // SAFETY: the program's function with its pointer, and as many bytes as it is told.
        match unsafe { restore(self.user.get(), state.as_ptr(), state.len()) } {
            Some(error) => Err(error.into_device_error("of the program")),
            None => Ok(()),
        }
    }
}

/// A device of the functions in `ops`, which is copied. `user` is taken, where the call does not fail.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_device_new(
    ops: *const vmcore_device_ops,
    user: *mut c_void,
    out: Option<&mut MaybeUninit<*mut vmcore_device>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let out = crate::error::need(out, "out")?;
        // SAFETY: the caller gives NULL or a table that begins with its size.
        let ops = unsafe { table(ops) }?;
        let (read, write) = (required(ops.read, "ops.read")?, required(ops.write, "ops.write")?);
        let device = Device { read, write, ops, user: User::new(user, ops.drop) };
        give(Some(out), vmcore_device { shared: Arc::new(Mutex::new(device)) })
    })
}

/// Frees the handle; machines that the device is on keep it.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_device_delete(device: Option<Box<vmcore_device>>) {
    drop(device);
}
