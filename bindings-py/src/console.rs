//! The console in memory, and the script that talks through it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use rustix::event::{EventfdFlags, eventfd};
use vmdevices::console::{self, Descriptor, ExpectError, Input, Memory, Script};

use crate::callback::Sink;
use crate::error::{self, Raise};
use crate::runner::Runner;
use crate::wait;

/// How often a wait looks whether the guest has ended.
const PATIENCE: Duration = Duration::from_millis(100);

/// Says that there is new output, to who has asked for it.
pub struct Bell {
    event: File,
    wanted: AtomicBool,
}

impl Bell {
    fn new() -> vmcore::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| vmcore::Error::os("eventfd", "the output of a console", e))?;
        Ok(Self { event: event.into(), wanted: AtomicBool::new(false) })
    }

    pub fn ring(&self) {
        // A system call for each byte would be many.
        if self.wanted.swap(false, Ordering::SeqCst) {
            // Fails only when it is readable anyway.
            let _ = (&self.event).write(&1u64.to_ne_bytes());
        }
    }
}

/// The device's side, which rings.
pub struct Ringing {
    memory: Memory,
    bell: Arc<Bell>,
}

impl console::Console for Ringing {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.memory.write(bytes);
        self.bell.ring();
        written
    }

    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<Input> {
        self.memory.read(buffer)
    }

    fn input(&self) -> Option<Descriptor> {
        self.memory.input()
    }
}

impl Drop for Ringing {
    fn drop(&mut self) {
        self.bell.ring();
    }
}

/// What a VM keeps of its console.
#[derive(Clone)]
pub struct Talk {
    script: Script,
    pub bell: Arc<Bell>,
}

/// A console in memory, its two sides.
pub fn pair() -> vmcore::Result<(Ringing, Talk)> {
    let (memory, script) = console::memory()?;
    let bell = Arc::new(Bell::new()?);
    Ok((Ringing { memory, bell: bell.clone() }, Talk { script, bell }))
}

/// A console that calls Python with the guest's output.
pub fn callback(function: Py<PyAny>, sink: Arc<Sink>) -> impl console::Console + 'static {
    console::Callback::new(move |bytes: &[u8]| {
        sink.call(|py| function.bind(py).call1((PyBytes::new(py, bytes),)).map(drop));
    })
}

/// The guest's console, to wait for what it says and to type. May be used from any thread.
#[pyclass(frozen, module = "vmcore")]
pub struct Console {
    pub talk: Talk,
    pub runner: Arc<Runner>,
}

/// What is waited for.
#[derive(Clone)]
enum Pattern {
    Text(String),
    Expression(Arc<Py<PyAny>>),
}

impl Pattern {
    fn of(pattern: &Bound<'_, PyAny>) -> PyResult<Self> {
        if let Ok(text) = pattern.extract::<String>() {
            return Ok(Self::Text(text));
        }
        if pattern.hasattr("search")? && pattern.hasattr("pattern")? {
            return Ok(Self::Expression(Arc::new(pattern.clone().unbind())));
        }
        Err(pyo3::exceptions::PyTypeError::new_err("expect takes a str, or what re.compile gives"))
    }
}

/// Where in `output` the first match of `expression` ends, in bytes.
fn search(expression: &Bound<'_, PyAny>, output: &[u8]) -> PyResult<Option<usize>> {
    let binary = expression.getattr("pattern")?.is_instance_of::<PyBytes>();
    let text = String::from_utf8_lossy(output);
    let found = match binary {
        true => expression.call_method1("search", (PyBytes::new(expression.py(), output),))?,
        false => expression.call_method1("search", (&*text,))?,
    };
    if found.is_none() {
        return Ok(None);
    }
    let end: usize = found.call_method0("end")?.extract()?;
    if binary {
        return Ok(Some(end));
    }
    // As many characters of the output; what is not UTF-8 has become one of three bytes, so it is looked for
    // where it was.
    let mut bytes = 0;
    let mut left = end;
    for chunk in output.utf8_chunks() {
        let valid = chunk.valid().chars().count();
        if left <= valid {
            return Ok(Some(bytes + chunk.valid().chars().take(left).map(char::len_utf8).sum::<usize>()));
        }
        left -= valid;
        bytes += chunk.valid().len();
        if !chunk.invalid().is_empty() {
            bytes += chunk.invalid().len();
            left -= 1;
            if left == 0 {
                return Ok(Some(bytes));
            }
        }
    }
    Ok(Some(bytes))
}

impl Talk {
    /// Looks for `pattern` for at most `limit`, without the GIL.
    fn look(&self, pattern: &Pattern, limit: Duration) -> PyResult<Result<String, ExpectError>> {
        match pattern {
            Pattern::Text(text) => Ok(self.script.expect(text, limit)),
            Pattern::Expression(expression) => {
                let mut raised = None;
                let found = self.script.expect_with(
                    |output| {
                        let found = Python::try_attach(|py| search(expression.bind(py), output));
                        match found.unwrap_or(Ok(None)) {
                            Ok(end) => end,
                            Err(error) => {
                                raised = Some(error);
                                // Ends the wait, and matches nothing.
                                Some(0)
                            }
                        }
                    },
                    "a match",
                    limit,
                );
                raised.map_or(Ok(found), Err)
            }
        }
    }

    /// All output since the last match.
    fn rest(&self) -> String {
        let all = |output: &[u8]| (!output.is_empty()).then_some(output.len());
        self.script.expect_with(all, "output", Duration::ZERO).unwrap_or_default()
    }
}

impl Console {
    fn wait_for(&self, py: Python<'_>, pattern: &Pattern, timeout: Option<f64>) -> PyResult<String> {
        let deadline = wait::deadline(timeout)?;
        let begin = Instant::now();
        let (talk, runner) = (&self.talk, &self.runner);
        let found = wait::until(py, deadline, PATIENCE, |slice| {
            // Asked before the look: all that it said is there by then.
            let ended = runner.ended();
            match talk.look(pattern, slice) {
                Ok(Err(ExpectError::Timeout { tail, .. })) => ended.map(|how| {
                    Err(error::guest_ended(&format!(
                        "no match from the guest, which has ended ({how}); its last output:\n{tail}"
                    )))
                }),
                Ok(Err(error)) => Some(Err(error::expect_exception(&error))),
                Ok(Ok(text)) => Some(Ok(text)),
                Err(raised) => Some(Err(raised)),
            }
        })?;
        found.unwrap_or_else(|| {
            let pattern = match pattern {
                Pattern::Text(text) => text.clone(),
                Pattern::Expression(expression) => expression.bind(py).to_string(),
            };
            let mut tail: Vec<char> =
                py.detach(|| talk.script.transcript()).chars().rev().take(512).collect();
            tail.reverse();
            let (waited, tail) = (begin.elapsed(), tail.into_iter().collect());
            Err(error::expect_exception(&ExpectError::Timeout { waited, pattern, tail }))
        })
    }
}

#[pymethods]
impl Console {
    /// Waits until the guest has put out `pattern`, a str or a compiled regular expression, and returns all
    /// it put out since the last match, up to and with the pattern. What is not UTF-8 comes as U+FFFD. With
    /// timeout=None it waits for as long as the guest runs.
    #[pyo3(signature = (pattern, timeout=30.0))]
    fn expect(&self, pattern: &Bound<'_, PyAny>, timeout: Option<f64>) -> PyResult<String> {
        self.wait_for(pattern.py(), &Pattern::of(pattern)?, timeout)
    }

    /// Types `text`, which waits in line until the guest reads it.
    fn send(&self, py: Python<'_>, text: &Bound<'_, PyAny>) -> PyResult<()> {
        let bytes = match text.extract::<String>() {
            Ok(text) => text.into_bytes(),
            Err(_) => text.extract()?,
        };
        py.detach(|| self.talk.script.send(bytes)).map_err(|error| error::expect_exception(&error))
    }

    /// Types `text` and a line feed.
    #[pyo3(signature = (text=""))]
    fn sendline(&self, py: Python<'_>, text: &str) -> PyResult<()> {
        let line = format!("{text}\n");
        py.detach(|| self.talk.script.send(line)).map_err(|error| error::expect_exception(&error))
    }

    /// Ends the input: the guest gets what was sent, and nothing more.
    fn close_input(&self, py: Python<'_>) {
        py.detach(|| self.talk.script.close_input());
    }

    /// All output so far; the last MiB of it is kept.
    #[getter]
    fn transcript(&self, py: Python<'_>) -> String {
        py.detach(|| self.talk.script.transcript())
    }

    /// All output so far as bytes.
    #[getter]
    fn raw_transcript<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &py.detach(|| self.talk.script.bytes()))
    }

    /// The descriptor that becomes readable when there is new output after `rearm`.
    fn fileno(&self) -> RawFd {
        self.talk.bell.event.as_raw_fd()
    }

    /// Has the descriptor become readable at the next output, and not before.
    fn rearm(&self) {
        // There is nothing to take where it did not ring.
        let _ = (&self.talk.bell.event).read(&mut [0; 8]);
        self.talk.bell.wanted.store(true, Ordering::SeqCst);
    }

    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    /// The next line of output, without its end, as soon as it is complete; ends with the guest.
    fn __next__(&self, py: Python<'_>) -> PyResult<Option<String>> {
        match self.wait_for(py, &Pattern::Text("\n".into()), None) {
            Ok(line) => Ok(Some(line.trim_end_matches(['\r', '\n']).to_owned())),
            Err(error) if error.is_instance_of::<pyo3::exceptions::PyEOFError>(py) => {
                let rest = py.detach(|| self.talk.rest());
                Ok((!rest.is_empty()).then_some(rest))
            }
            Err(error) => Err(error),
        }
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        format!("<Console of {} bytes>", py.detach(|| self.talk.script.bytes().len()))
    }
}

/// Where the guest's serial port goes, as `console=` says.
pub enum Destination {
    Memory,
    Stdio,
    Null,
    File(std::path::PathBuf),
    Unix(std::path::PathBuf),
    Python(Py<PyAny>),
}

impl Destination {
    pub fn of(value: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let Some(value) = value else { return Ok(Self::Null) };
        if value.is_callable() {
            return Ok(Self::Python(value.clone().unbind()));
        }
        if let Ok(text) = value.extract::<String>() {
            return match text.as_str() {
                "memory" => Ok(Self::Memory),
                "stdio" => Ok(Self::Stdio),
                "null" => Ok(Self::Null),
                other => match other.split_once(':') {
                    Some(("file", path)) => Ok(Self::File(path.into())),
                    Some(("unix", path)) => Ok(Self::Unix(path.into())),
                    _ => Err(error::config(
                        "console",
                        other,
                        "give memory, stdio, null, file:PATH, unix:PATH, a path object or a function",
                    )),
                },
            };
        }
        Ok(Self::File(value.extract()?))
    }

    /// The device's side, and where it is in memory the script.
    pub fn open(self, sink: &Arc<Sink>) -> PyResult<(Box<dyn console::Console>, Option<Talk>)> {
        Ok(match self {
            Self::Memory => {
                let (device, talk) = pair().raise()?;
                (Box::new(device), Some(talk))
            }
            Self::Stdio => (Box::new(console::Stdio::new().raise()?), None),
            Self::Null => (Box::new(console::Null), None),
            Self::File(path) => (Box::new(console::File::create(path).raise()?), None),
            Self::Unix(path) => (Box::new(console::Socket::listen(path).raise()?), None),
            Self::Python(function) => (Box::new(callback(function, sink.clone())), None),
        })
    }
}
