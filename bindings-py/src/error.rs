//! vmcore's errors as the exceptions of `vmcore._errors`.

use std::fmt::Debug;
use std::io;

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyDict;
use vmcore::boot::BootError;
use vmcore::memory::MemoryError;
use vmdevices::block::DiskError;
use vmdevices::console::ExpectError;
use vmdevices::net::{NatError, TapError};

/// `.raise()?` in place of `?`, for results of the engine.
pub trait Raise<T> {
    /// The value, or the exception that stands for the error.
    fn raise(self) -> PyResult<T>;
}

impl<T, E: Into<vmcore::Error>> Raise<T> for Result<T, E> {
    fn raise(self) -> PyResult<T> {
        self.map_err(|error| exception(&error.into()))
    }
}

/// The exception for `error`.
pub fn exception(error: &vmcore::Error) -> PyErr {
    let text = error.to_string();
    let (class, code, errno) = classify(error);
    let attributes = |dict: &Bound<'_, PyDict>| attributes(dict, error);
    make(class, &code, &text, error.fix(), errno, attributes)
}

/// The exception for a console that did not say what was expected.
pub fn expect_exception(error: &ExpectError) -> PyErr {
    let (class, code) = match error {
        ExpectError::Timeout { .. } => ("ExpectTimeoutError", "expect.timeout"),
        _ => ("ConsoleClosedError", "expect.closed"),
    };
    make(class, code, &error.to_string(), None, None, |_| Ok(()))
}

/// Something was used that is closed.
pub fn closed(what: &str) -> PyErr {
    let text = format!("cannot use {what}: it is closed");
    make("ClosedError", "closed", &text, Some("make another, and use it inside its with block"), None, |_| {
        Ok(())
    })
}

/// A setting of Python's side that cannot be.
pub fn config(what: &'static str, value: impl Into<String>, fix: impl Into<String>) -> PyErr {
    exception(&vmcore::Error::Config { what, value: value.into(), fix: fix.into() })
}

/// A call that does not fit what goes on.
pub fn wrong_state(op: &'static str, state: &'static str, fix: &'static str) -> PyErr {
    exception(&vmcore::Error::WrongState { op, state, fix })
}

/// The time that a call was given is over.
pub fn timeout(text: &str, fix: &str) -> PyErr {
    make("WaitTimeoutError", "timeout", text, Some(fix), None, |_| Ok(()))
}

/// The console ended with the guest.
pub fn guest_ended(text: &str) -> PyErr {
    make("ConsoleClosedError", "expect.closed", text, None, None, |_| Ok(()))
}

/// The exception for an I/O error of `op` with `detail`.
pub fn io(op: &'static str, detail: impl std::fmt::Display, error: io::Error) -> PyErr {
    if error.kind() == io::ErrorKind::TimedOut {
        return timeout(
            &format!("{op} {detail}: {error}"),
            "wait longer, or see whether the guest has a driver",
        );
    }
    exception(&vmcore::Error::os(op, detail, error))
}

fn make(
    class: &str,
    code: &str,
    text: &str,
    fix: Option<&str>,
    errno: Option<i32>,
    attributes: impl FnOnce(&Bound<'_, PyDict>) -> PyResult<()>,
) -> PyErr {
    static MAKE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    // The fix is a note of the exception: not twice in what a traceback shows.
    let message = fix
        .and_then(|fix| text.strip_suffix(fix))
        .map_or(text, |rest| rest.trim_end_matches([' ', ';', ':']));
    Python::attach(|py| {
        let make = || -> PyResult<Bound<'_, PyAny>> {
            let make = MAKE.import(py, "vmcore._errors", "_make")?;
            let dict = PyDict::new(py);
            attributes(&dict)?;
            make.call1((class, message, code, fix, errno, dict))
        };
        make().map_or_else(|error| error, PyErr::from_value)
    })
}

fn classify(error: &vmcore::Error) -> (&'static str, String, Option<i32>) {
    use vmcore::Error;
    let class = match error {
        Error::Memory(error) => return memory(error),
        Error::Boot(error) => return boot(error),
        Error::Os { source, .. } => return ("SystemCallError", "os".into(), source.raw_os_error()),
        Error::Device { source, .. } => return device(&**source),
        Error::BackendUnusable { .. } => "BackendUnusableError",
        Error::Unsupported { .. } => "UnsupportedError",
        Error::Config { .. } => "ConfigError",
        Error::Conflict { .. } => "ConflictError",
        Error::Emulation(_) => "EmulationError",
        Error::EntryFailed { .. } => "EntryFailedError",
        Error::State { .. } => "StateError",
        Error::WrongState { .. } => "WrongStateError",
        _ => "Error",
    };
    (class, variant(error), None)
}

fn memory(error: &MemoryError) -> (&'static str, String, Option<i32>) {
    let code = format!("memory.{}", variant(error));
    match error {
        MemoryError::Host { source, .. } => ("HostMemoryError", code, source.raw_os_error()),
        MemoryError::NotMapped { .. } => ("NotMappedError", code, None),
        _ => ("GuestMemoryError", code, None),
    }
}

fn boot(error: &BootError) -> (&'static str, String, Option<i32>) {
    let code = format!("boot.{}", variant(error));
    match error {
        BootError::Open { source, .. } | BootError::Read { source, .. } | BootError::Seed { source, .. } => {
            ("BootFileError", code, source.raw_os_error())
        }
        _ => ("BootError", code, None),
    }
}

fn device(source: &(dyn std::error::Error + Send + Sync + 'static)) -> (&'static str, String, Option<i32>) {
    if let Some(error) = source.downcast_ref::<DiskError>() {
        let errno = match error {
            DiskError::Open { source, .. } => source.raw_os_error(),
            DiskError::Locked { .. } => Some(libc::EBUSY),
            _ => None,
        };
        let class = if errno.is_some() { "DiskFileError" } else { "DiskError" };
        return (class, format!("disk.{}", variant(error)), errno);
    }
    if let Some(error) = source.downcast_ref::<NatError>() {
        let errno = match error {
            NatError::Host { source, .. } | NatError::Bind { source, .. } => source.raw_os_error(),
            _ => None,
        };
        let class = if errno.is_some() { "NatHostError" } else { "NatError" };
        return (class, format!("nat.{}", variant(error)), errno);
    }
    if let Some(error) = source.downcast_ref::<TapError>() {
        let errno = match error {
            TapError::Driver { source }
            | TapError::Unsuitable { source, .. }
            | TapError::Host { source, .. } => source.raw_os_error(),
            _ => None,
        };
        let class = if errno.is_some() { "DeviceHostError" } else { "DeviceError" };
        return (class, format!("tap.{}", variant(error)), errno);
    }
    match source.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
        Some(errno) => ("DeviceHostError", "device".into(), Some(errno)),
        None => ("DeviceError", "device".into(), None),
    }
}

/// The name of an error's variant in snake case, which is its code. By its `Debug`, so that a variant that
/// is added to an enum has its code without a line here.
fn variant(error: &impl Debug) -> String {
    let debug = format!("{error:?}");
    let name = debug.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default();
    let mut code = String::new();
    for c in name.chars() {
        if c.is_uppercase() && !code.is_empty() {
            code.push('_');
        }
        code.extend(c.to_lowercase());
    }
    code
}

/// What an exception has besides its text, by the names of the fields in Rust.
fn attributes(dict: &Bound<'_, PyDict>, error: &vmcore::Error) -> PyResult<()> {
    use vmcore::Error;
    match error {
        Error::Emulation(failure) => {
            dict.set_item("rip", failure.rip)?;
            dict.set_item("bytes", failure.bytes.as_slice())?;
            dict.set_item("instruction", &failure.instruction)
        }
        Error::EntryFailed { reason } => dict.set_item("reason", reason),
        Error::Device { id, .. } => dict.set_item("device", id),
        Error::BackendUnusable { backend, .. } | Error::Unsupported { backend, .. } => {
            dict.set_item("backend", backend)
        }
        _ => Ok(()),
    }
}
