//! What a fallible call returns: nothing, or an object that says what went wrong.

use std::any::Any;
use std::ffi::{CString, c_char};
use std::mem::MaybeUninit;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use vmdevices::block::DiskError;
use vmdevices::console::ExpectError;
use vmdevices::net::{NatError, TapError};

/// Kinds of errors.
pub type vmcore_error_code = u32;
/// Guest memory: layout, mapping, access.
pub const VMCORE_ERROR_MEMORY: vmcore_error_code = 1;
/// The kernel or image to boot.
pub const VMCORE_ERROR_BOOT: vmcore_error_code = 2;
/// A system call failed: see vmcore_error_errno.
pub const VMCORE_ERROR_OS: vmcore_error_code = 3;
/// The backend asked for cannot be used on this host.
pub const VMCORE_ERROR_BACKEND_UNUSABLE: vmcore_error_code = 4;
/// The backend does not offer something.
pub const VMCORE_ERROR_UNSUPPORTED: vmcore_error_code = 5;
/// A setting that makes no sense, alone or with others.
pub const VMCORE_ERROR_CONFIG: vmcore_error_code = 6;
/// Two devices want the same addresses, ports or interrupt.
pub const VMCORE_ERROR_CONFLICT: vmcore_error_code = 7;
/// The backend could not execute an instruction of the guest.
pub const VMCORE_ERROR_EMULATION: vmcore_error_code = 8;
/// The processor refused to enter the guest: the registers are invalid.
pub const VMCORE_ERROR_ENTRY_FAILED: vmcore_error_code = 9;
/// A saved state does not fit what it is restored into.
pub const VMCORE_ERROR_STATE: vmcore_error_code = 10;
/// The call does not fit what the VM is doing.
pub const VMCORE_ERROR_WRONG_STATE: vmcore_error_code = 11;
/// A device failed to attach, activate, save or restore.
pub const VMCORE_ERROR_DEVICE: vmcore_error_code = 12;
/// An argument is NULL, not UTF-8, or none of the values that are known.
pub const VMCORE_ERROR_ARGUMENT: vmcore_error_code = 100;
/// Time is over.
pub const VMCORE_ERROR_TIMEOUT: vmcore_error_code = 101;
/// What was waited for has gone.
pub const VMCORE_ERROR_CLOSED: vmcore_error_code = 102;
/// A bug of the library: please report it. The objects of the call should be deleted.
pub const VMCORE_ERROR_PANIC: vmcore_error_code = 103;
/// An error of a kind that this version of the bindings has no number for.
pub const VMCORE_ERROR_OTHER: vmcore_error_code = 199;

/// What went wrong: a code, a message of one line, errno, and what to do.
#[derive(Debug)]
pub struct vmcore_error {
    code: vmcore_error_code,
    name: CString,
    message: CString,
    fix: Option<CString>,
    errno: i32,
}

pub(crate) type Result<T> = std::result::Result<T, Box<vmcore_error>>;

/// `text` for C: what is behind a zero byte would be lost.
fn c_text(text: &str) -> CString {
    CString::new(text.replace('\0', "\u{fffd}")).unwrap_or_default()
}

impl vmcore_error {
    pub(crate) fn new(code: vmcore_error_code, message: &str, fix: Option<&str>) -> Box<Self> {
        let (name, message) = (c_text(name(code)), c_text(message));
        Box::new(Self { code, name, message, fix: fix.map(c_text), errno: 0 })
    }

    pub(crate) fn argument(what: &str, value: impl std::fmt::Display, fix: &str) -> Box<Self> {
        Self::new(VMCORE_ERROR_ARGUMENT, &format!("argument {what} is {value}; {fix}"), Some(fix))
    }

    /// As the engine sees it, where a callback of the program returned it.
    pub(crate) fn into_device_error(self, id: &str) -> vmcore::Error {
        let fix = self.fix.as_ref().map(|fix| fix.to_string_lossy().into_owned());
        vmcore::Error::device(id, self).with_fix(fix)
    }
}

impl std::fmt::Display for vmcore_error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message.to_string_lossy())
    }
}

impl std::error::Error for vmcore_error {}

fn code(error: &vmcore::Error) -> vmcore_error_code {
    match error {
        vmcore::Error::Memory(_) => VMCORE_ERROR_MEMORY,
        vmcore::Error::Boot(_) => VMCORE_ERROR_BOOT,
        vmcore::Error::Os { .. } => VMCORE_ERROR_OS,
        vmcore::Error::BackendUnusable { .. } => VMCORE_ERROR_BACKEND_UNUSABLE,
        vmcore::Error::Unsupported { .. } => VMCORE_ERROR_UNSUPPORTED,
        vmcore::Error::Config { .. } => VMCORE_ERROR_CONFIG,
        vmcore::Error::Conflict { .. } => VMCORE_ERROR_CONFLICT,
        vmcore::Error::Emulation(_) => VMCORE_ERROR_EMULATION,
        vmcore::Error::EntryFailed { .. } => VMCORE_ERROR_ENTRY_FAILED,
        vmcore::Error::State { .. } => VMCORE_ERROR_STATE,
        vmcore::Error::WrongState { .. } => VMCORE_ERROR_WRONG_STATE,
        vmcore::Error::Device { .. } => VMCORE_ERROR_DEVICE,
        _ => VMCORE_ERROR_OTHER,
    }
}

/// The name of an error of which no more than its number is known.
fn name(code: vmcore_error_code) -> &'static str {
    match code {
        VMCORE_ERROR_MEMORY => "memory",
        VMCORE_ERROR_BOOT => "boot",
        VMCORE_ERROR_OS => "os",
        VMCORE_ERROR_BACKEND_UNUSABLE => "backend_unusable",
        VMCORE_ERROR_UNSUPPORTED => "unsupported",
        VMCORE_ERROR_CONFIG => "config",
        VMCORE_ERROR_CONFLICT => "conflict",
        VMCORE_ERROR_EMULATION => "emulation",
        VMCORE_ERROR_ENTRY_FAILED => "entry_failed",
        VMCORE_ERROR_STATE => "state",
        VMCORE_ERROR_WRONG_STATE => "wrong_state",
        VMCORE_ERROR_DEVICE => "device",
        VMCORE_ERROR_ARGUMENT => "argument",
        VMCORE_ERROR_TIMEOUT => "timeout",
        VMCORE_ERROR_CLOSED => "closed",
        VMCORE_ERROR_PANIC => "panic",
        _ => "other",
    }
}

impl From<vmcore::Error> for Box<vmcore_error> {
    fn from(error: vmcore::Error) -> Self {
        let mut ours = vmcore_error::new(code(&error), &error.to_string(), error.fix());
        ours.name = c_text(error.code());
        ours.errno = error.errno().unwrap_or(0);
        if let vmcore::Error::Device { source, .. } = &error
            && let Some(inner) = source.downcast_ref::<vmcore_error>()
        {
            ours.errno = inner.errno;
        }
        ours
    }
}

macro_rules! by_way_of_the_engine {
    ($($from:ty),*) => {$(
        impl From<$from> for Box<vmcore_error> {
            fn from(error: $from) -> Self {
                vmcore::Error::from(error).into()
            }
        }
    )*};
}

by_way_of_the_engine!(DiskError, NatError, TapError, vmcore::memory::MemoryError);

impl From<ExpectError> for Box<vmcore_error> {
    fn from(error: ExpectError) -> Self {
        let code = match error {
            ExpectError::Timeout { .. } => VMCORE_ERROR_TIMEOUT,
            ExpectError::Closed { .. } => VMCORE_ERROR_CLOSED,
            _ => VMCORE_ERROR_OTHER,
        };
        let mut ours = vmcore_error::new(code, &error.to_string(), None);
        ours.name = c_text(error.code());
        ours
    }
}

/// Runs the body of a fallible call. A panic, which would be a bug, ends here.
pub(crate) fn guard(body: impl FnOnce() -> Result<()>) -> Option<Box<vmcore_error>> {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(result) => result.err(),
        Err(panic) => Some(vmcore_error::new(VMCORE_ERROR_PANIC, &said(&*panic), Some("report it"))),
    }
}

fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no text");
    format!("the library panicked, which is a bug: {text}; report it")
}

/// An argument that must not be NULL.
pub(crate) fn need<T>(argument: Option<T>, what: &str) -> Result<T> {
    argument.ok_or_else(|| vmcore_error::argument(what, "NULL", "give it an object or a place"))
}

/// Puts the result of a call at its place.
pub(crate) fn put<T>(out: Option<&mut MaybeUninit<T>>, value: T) -> Result<()> {
    need(out, "out")?.write(value);
    Ok(())
}

/// As [`put`], an object, which is the caller's from then on.
pub(crate) fn give<T>(out: Option<&mut MaybeUninit<*mut T>>, value: T) -> Result<()> {
    need(out, "out")?.write(Box::into_raw(Box::new(value)));
    Ok(())
}

/// Makes an error, for callbacks to return. `fix` may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmcore_error_new(
    code: vmcore_error_code,
    message: *const c_char,
    fix: *const c_char,
) -> Box<vmcore_error> {
    // SAFETY: the caller gives a text that ends with a zero byte, or NULL.
    let message = unsafe { crate::bytes::lossy(message) }.unwrap_or_default();
    // SAFETY: as above.
    let fix = unsafe { crate::bytes::lossy(fix) };
    vmcore_error::new(code, &message, fix.as_deref())
}

/// Which kind it is; 0 for NULL.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_error_get_code(error: Option<&vmcore_error>) -> vmcore_error_code {
    error.map_or(0, |error| error.code)
}

/// Which error it is exactly, in words that stay the same: "memory.overlap", "boot.open", "disk.locked",
/// "wrong_state"; "" for NULL. It lives as long as the error.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_error_name(error: Option<&vmcore_error>) -> *const c_char {
    error.map_or(c"".as_ptr(), |error| error.name.as_ptr())
}

/// What was tried, with which value, and what to do, in one line. It lives as long as the error.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_error_message(error: Option<&vmcore_error>) -> *const c_char {
    error.map_or(c"".as_ptr(), |error| error.message.as_ptr())
}

/// The part of the message that says what to do, or NULL where nothing is known. It lives as long as the error.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_error_fix(error: Option<&vmcore_error>) -> *const c_char {
    error.and_then(|error| error.fix.as_ref()).map_or(ptr::null(), |fix| fix.as_ptr())
}

/// The operating system's error number (errno) that is behind it, or 0.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_error_errno(error: Option<&vmcore_error>) -> i32 {
    error.map_or(0, |error| error.errno)
}

/// Frees it.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_error_delete(error: Option<Box<vmcore_error>>) {
    drop(error);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_test_in_c_can_reach_has_its_code_too() {
        let refused: Box<vmcore_error> = vmcore::Error::EntryFailed { reason: 0x8000_0021 }.into();
        assert_eq!(refused.code, VMCORE_ERROR_ENTRY_FAILED);
        assert!(refused.fix.is_some_and(|fix| fix.to_str().unwrap().contains("EFER")));
        let panicked = guard(|| panic!("on purpose")).unwrap();
        assert_eq!(panicked.code, VMCORE_ERROR_PANIC);
        assert!(panicked.to_string().contains("on purpose"));
    }
}
