//! Waiting without the GIL, with an eye on signals.

use std::time::{Duration, Instant};

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use crate::error;

/// How long the thread that handles Python's signals waits before it looks for some.
pub const LOOK: Duration = Duration::from_millis(50);

/// Whether this is the thread on which Python runs its signal handlers.
pub fn handles_signals(py: Python<'_>) -> PyResult<bool> {
    static CURRENT: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    static MAIN: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let current = CURRENT.import(py, "threading", "get_ident")?.call0()?;
    let main = MAIN.import(py, "threading", "main_thread")?.call0()?.getattr("ident")?;
    current.eq(main)
}

/// `timeout` as Python has it: seconds, or no limit.
pub fn seconds(timeout: Option<f64>) -> PyResult<Option<Duration>> {
    let Some(timeout) = timeout else { return Ok(None) };
    // As everywhere in Python: a time that is over already.
    let duration = Duration::try_from_secs_f64(timeout.max(0.0));
    duration
        .map(Some)
        .map_err(|why| error::config("timeout", timeout.to_string(), format!("give seconds ({why})")))
}

/// When a wait that begins now is over.
pub fn deadline(timeout: Option<f64>) -> PyResult<Option<Instant>> {
    Ok(seconds(timeout)?.and_then(|timeout| Instant::now().checked_add(timeout)))
}

/// Calls `step` without the GIL until it gives something; `None` when `deadline` has passed. Each call
/// waits for what it is given at most, which is `patience` where that is shorter.
///
/// # Errors
/// What a signal handler raises, KeyboardInterrupt for one.
pub fn until<T: Send>(
    py: Python<'_>,
    deadline: Option<Instant>,
    patience: Duration,
    mut step: impl FnMut(Duration) -> Option<T> + Send,
) -> PyResult<Option<T>> {
    let slice = if handles_signals(py)? { LOOK.min(patience) } else { patience };
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let slice = left.map_or(slice, |left| left.min(slice));
        if let Some(value) = py.detach(|| step(slice)) {
            return Ok(Some(value));
        }
        py.check_signals()?;
        if left == Some(Duration::ZERO) {
            return Ok(None);
        }
    }
}
