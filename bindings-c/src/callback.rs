//! The program's functions: what they are called with, and tables of them.

use std::ffi::c_void;

use crate::error::{Result, vmcore_error};

/// Called once with the user pointer when the library needs it no more.
pub type vmcore_drop_fn = Option<unsafe extern "C" fn(user: *mut c_void)>;

/// A user pointer that goes with its drop function.
#[derive(Debug)]
pub(crate) struct User {
    pointer: *mut c_void,
    drop: vmcore_drop_fn,
}

// SAFETY: the header says that callbacks come on any thread; the library itself does not look at it.
unsafe impl Send for User {}
// SAFETY: as above; where several threads may call at once the function's comment says so.
unsafe impl Sync for User {}

impl User {
    pub(crate) fn new(pointer: *mut c_void, drop: vmcore_drop_fn) -> Self {
        Self { pointer, drop }
    }

    pub(crate) fn get(&self) -> *mut c_void {
        self.pointer
    }
}

impl Drop for User {
    fn drop(&mut self) {
        if let Some(drop) = self.drop {
            // SAFETY: the program gave the two together; this is the only call.
            unsafe { drop(self.pointer) }
        }
    }
}

/// A table of functions, which begins with its size.
///
/// # Safety
/// All zeroes are a value of it.
pub(crate) unsafe trait Table: Copy {}

/// Copies the table at `table`: what it has, and zeroes for what a program of an older version does not know.
///
/// # Safety
/// NULL, or a table with as many bytes as its first field says.
pub(crate) unsafe fn table<T: Table>(table: *const T) -> Result<T> {
    if table.is_null() {
        return Err(vmcore_error::argument("ops", "NULL", "give it a table of functions"));
    }
    // SAFETY: a table begins with its size.
    let size = unsafe { table.cast::<usize>().read() };
    if !(2 * size_of::<usize>()..=4096).contains(&size) {
        let fix = "set its first field to the size of the table: sizeof(ops)";
        return Err(vmcore_error::argument("ops.size", size, fix));
    }
    let mut copy = std::mem::MaybeUninit::<T>::zeroed();
    let (from, to) = (table.cast::<u8>(), copy.as_mut_ptr().cast::<u8>());
    // SAFETY: both have that many bytes, and the copy is new.
    unsafe { std::ptr::copy_nonoverlapping(from, to, size.min(size_of::<T>())) };
    // SAFETY: zeroes are a value, and so is what the program's compiler put there.
    Ok(unsafe { copy.assume_init() })
}

/// A function of a table that cannot be left out.
pub(crate) fn required<F>(function: Option<F>, what: &str) -> Result<F> {
    function.ok_or_else(|| vmcore_error::argument(what, "NULL", "this function cannot be left out"))
}
