//! vmcore's errors as the exceptions of `vmcore._errors`.

use std::io;

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyDict;
use vmdevices::console::ExpectError;

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
    let code = error.code();
    // Nobody but the host can say that a file is in use.
    let errno = error.errno().or((code == "disk.locked").then_some(libc::EBUSY));
    let attributes = |dict: &Bound<'_, PyDict>| attributes(dict, error);
    make(class(code, errno.is_some()), code, &error.to_string(), error.fix(), errno, attributes)
}

/// The exception for a console that did not say what was expected.
pub fn expect_exception(error: &ExpectError) -> PyErr {
    let class = match error {
        ExpectError::Timeout { .. } => "ExpectTimeoutError",
        _ => "ConsoleClosedError",
    };
    make(class, error.code(), &error.to_string(), None, None, |_| Ok(()))
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

/// The class for an error, which is chosen by its code. Where the host has a say the class is an OSError.
fn class(code: &str, has_errno: bool) -> &'static str {
    match (code.split('.').next().unwrap_or(code), has_errno) {
        ("memory", _) if code == "memory.not_mapped" => "NotMappedError",
        ("memory", true) => "HostMemoryError",
        ("memory", false) => "GuestMemoryError",
        ("boot", true) => "BootFileError",
        ("boot", false) => "BootError",
        ("os", _) => "SystemCallError",
        ("disk", true) => "DiskFileError",
        ("disk", false) => "DiskError",
        ("nat", true) => "NatHostError",
        ("nat", false) => "NatError",
        ("device" | "tap", true) => "DeviceHostError",
        ("device" | "tap", false) => "DeviceError",
        ("backend_unusable", _) => "BackendUnusableError",
        ("unsupported", _) => "UnsupportedError",
        ("config", _) => "ConfigError",
        ("conflict", _) => "ConflictError",
        ("emulation", _) => "EmulationError",
        ("entry_failed", _) => "EntryFailedError",
        ("state", _) => "StateError",
        ("wrong_state", _) => "WrongStateError",
        _ => "Error",
    }
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
