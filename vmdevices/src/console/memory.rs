//! A console in memory, and the script that talks to the guest through it.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use vmcore::{Error, Result};

use super::{Console, Descriptor, Input};

/// How much output [`memory()`] keeps, in bytes.
const TRANSCRIPT: usize = 1 << 20;

/// How much of the output an error shows, in bytes.
const TAIL: usize = 512;

/// A console in memory and the script that talks through it, with the last MiB of output kept.
///
/// ```
/// use std::time::Duration;
/// use vmdevices::console::{self, Console};
///
/// let (mut console, script) = console::memory()?;
/// // Done by the guest, through the device that has the console:
/// console.write(b"Debian GNU/Linux 12\r\nlogin: ")?;
///
/// let before = script.expect("login: ", Duration::from_secs(30))?;
/// assert!(before.starts_with("Debian"));
/// script.send("root\n")?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`Error::Os`] where the host refuses a descriptor.
pub fn memory() -> Result<(Memory, Script)> {
    memory_with_limit(TRANSCRIPT)
}

/// As [`memory()`], with the last `limit` bytes of output kept: older ones are forgotten, even if no
/// [`Script::expect`] has looked at them.
///
/// # Errors
/// [`Error::Os`] where the host refuses a descriptor.
pub fn memory_with_limit(limit: usize) -> Result<(Memory, Script)> {
    let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map_err(|e| Error::os("eventfd", "a console in memory", e))?;
    let inner = Arc::new(Inner {
        state: Mutex::new(State { limit, ..State::default() }),
        changed: Condvar::new(),
        event: Arc::new(event),
    });
    Ok((Memory(inner.clone()), Script(inner)))
}

#[derive(Default)]
struct State {
    /// The last `limit` bytes of output.
    output: VecDeque<u8>,
    limit: usize,
    /// How many bytes of output came before those.
    forgotten: u64,
    /// Behind the last match: where the next `expect` begins, in bytes since the beginning.
    cursor: u64,
    input: VecDeque<u8>,
    /// How many threads wait for output.
    waiting: usize,
    /// The script sends no more.
    input_closed: bool,
    /// The device is gone.
    closed: bool,
}

struct Inner {
    state: Mutex<State>,
    changed: Condvar,
    event: Descriptor,
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ring(&self) {
        // Fails only when the count is at its maximum: then it is readable anyway.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }
}

/// The device's side of a console in memory; made by [`memory()`].
pub struct Memory(Arc<Inner>);

impl Console for Memory {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.0.state();
        state.output.extend(bytes);
        let excess = state.output.len().saturating_sub(state.limit);
        state.output.drain(..excess);
        state.forgotten = state.forgotten.saturating_add(count(excess));
        // Telling nobody would be a system call for each byte.
        let waiting = state.waiting > 0;
        drop(state);
        if waiting {
            self.0.changed.notify_all();
        }
        Ok(bytes.len())
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<Input> {
        let mut state = self.0.state();
        let taken = state.input.len().min(buffer.len());
        for (to, byte) in buffer.iter_mut().zip(state.input.drain(..taken)) {
            *to = byte;
        }
        Ok(match taken {
            0 if state.input_closed => Input::End,
            0 => Input::Nothing,
            taken => Input::Bytes(taken),
        })
    }

    fn input(&self) -> Option<Descriptor> {
        Some(self.0.event.clone())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.0.state().closed = true;
        self.0.changed.notify_all();
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Memory")
    }
}

/// Talks to the guest through a console in memory; made by [`memory()`].
///
/// Clones are the same script; it may be used from any thread while the VM runs.
#[derive(Clone)]
pub struct Script(Arc<Inner>);

/// Why a guest did not say what was expected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ExpectError {
    /// Time is over.
    #[error("no {pattern:?} from the guest in {waited:.1?}; its last output:\n{tail}")]
    Timeout {
        /// How long it was waited for.
        waited: Duration,
        /// What was waited for.
        pattern: String,
        /// The end of the output so far.
        tail: String,
    },
    /// The device is gone: the VM was dropped.
    #[error("no {pattern:?} from the guest before its VM was dropped; its last output:\n{tail}")]
    Closed {
        /// What was waited for, or was to be sent.
        pattern: String,
        /// The end of the output.
        tail: String,
    },
}

impl ExpectError {
    /// Its code, in the manner of [`vmcore::Error::code`].
    pub fn code(&self) -> &'static str {
        match self {
            Self::Timeout { .. } => "expect.timeout",
            Self::Closed { .. } => "expect.closed",
        }
    }
}

impl Script {
    /// Waits until the guest has put out `pattern`, and returns all it put out since the last match
    /// up to and with the pattern. What is not UTF-8 comes as U+FFFD.
    ///
    /// # Errors
    /// [`ExpectError::Timeout`] when `timeout` is over, [`ExpectError::Closed`] when the VM is
    /// dropped. The next call then looks at the same output again.
    pub fn expect(&self, pattern: &str, timeout: Duration) -> Result<String, ExpectError> {
        // Bytes before this were looked at, in bytes since the beginning.
        let mut looked: u64 = 0;
        let find = |from: u64, output: &[u8]| {
            let skip = usize::try_from(looked.saturating_sub(from)).unwrap_or(usize::MAX).min(output.len());
            looked = from + count(output.len().saturating_sub(pattern.len().saturating_sub(1)));
            find(pattern.as_bytes(), &output[skip..]).map(|end| skip + end)
        };
        self.search(find, pattern, timeout)
    }

    /// As [`Script::expect`], with what is waited for found by `find`: it is given all output since the last
    /// match, again whenever there is more, and says where its match ends. `what` is for messages. No other
    /// call of the script goes on meanwhile, nor does the guest's output.
    ///
    /// # Errors
    /// As [`Script::expect`].
    pub fn expect_with(
        &self,
        mut find: impl FnMut(&[u8]) -> Option<usize>,
        what: &str,
        timeout: Duration,
    ) -> Result<String, ExpectError> {
        self.search(|_, output| find(output), what, timeout)
    }

    /// Waits until `find`, given the number of the first byte behind the last match and the output from there,
    /// says where a match ends.
    fn search(
        &self,
        mut find: impl FnMut(u64, &[u8]) -> Option<usize>,
        what: &str,
        timeout: Duration,
    ) -> Result<String, ExpectError> {
        let begin = Instant::now();
        let mut state = self.0.state();
        loop {
            let from = state.cursor.max(state.forgotten);
            if let Some(len) = find(from, state.since(from)) {
                let end = from.saturating_add(count(len)).min(state.end());
                let text = state.text(from, end);
                state.cursor = end;
                return Ok(text);
            }
            let waited = begin.elapsed();
            if state.closed {
                return Err(ExpectError::Closed { pattern: what.to_owned(), tail: state.tail() });
            }
            let Some(left) = timeout.checked_sub(waited).filter(|left| !left.is_zero()) else {
                let (pattern, tail) = (what.to_owned(), state.tail());
                return Err(ExpectError::Timeout { waited, pattern, tail });
            };
            state.waiting += 1;
            let woken = self.0.changed.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
            state.waiting -= 1;
        }
    }

    /// Types `text`. It waits in line until the guest reads it.
    ///
    /// # Errors
    /// [`ExpectError::Closed`] where the VM is gone.
    pub fn send(&self, text: impl AsRef<[u8]>) -> Result<(), ExpectError> {
        let text = text.as_ref();
        let mut state = self.0.state();
        if state.closed {
            let pattern = String::from_utf8_lossy(text).into_owned();
            return Err(ExpectError::Closed { pattern, tail: state.tail() });
        }
        state.input.extend(text);
        drop(state);
        self.0.ring();
        Ok(())
    }

    /// Ends the input: the guest gets what was sent, and nothing more.
    pub fn close_input(&self) {
        self.0.state().input_closed = true;
        self.0.ring();
    }

    /// How many bytes that were sent wait here; the device reads up to 4 KiB ahead of the guest.
    pub fn unread(&self) -> usize {
        self.0.state().input.len()
    }

    /// All output so far, as far as it is kept.
    pub fn transcript(&self) -> String {
        let state = self.0.state();
        state.text(0, state.end())
    }

    /// All output so far as bytes, as far as it is kept.
    pub fn bytes(&self) -> Vec<u8> {
        self.0.state().output.iter().copied().collect()
    }
}

impl fmt::Debug for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Script")
    }
}

impl State {
    /// Where the output ends, in bytes since the beginning.
    fn end(&self) -> u64 {
        self.forgotten + count(self.output.len())
    }

    /// The output from byte `from` on, which is counted from the beginning.
    fn since(&mut self, from: u64) -> &[u8] {
        let index = self.index(from);
        &self.output.make_contiguous()[index..]
    }

    fn text(&self, from: u64, to: u64) -> String {
        let (from, to) = (self.index(from), self.index(to));
        let bytes: Vec<u8> = self.output.range(from..to).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn tail(&self) -> String {
        self.text(self.end().saturating_sub(count(TAIL)), self.end())
    }

    /// The place in `output` of a byte, by its number since the beginning.
    fn index(&self, number: u64) -> usize {
        let index = usize::try_from(number.saturating_sub(self.forgotten)).unwrap_or(usize::MAX);
        index.min(self.output.len())
    }
}

/// Where the first `pattern` in `output` ends.
fn find(pattern: &[u8], output: &[u8]) -> Option<usize> {
    if pattern.is_empty() {
        return Some(0);
    }
    let at = output.windows(pattern.len()).position(|window| window == pattern)?;
    Some(at + pattern.len())
}

fn count(bytes: usize) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::thread;

    const SOON: Duration = Duration::from_millis(20);
    const LONG: Duration = Duration::from_secs(30);

    #[test]
    fn matches_come_one_after_the_other() {
        let (mut console, script) = memory().unwrap();
        console.write(b"one, two, two, \xff").unwrap();
        assert_eq!(script.expect("two", SOON).unwrap(), "one, two");
        assert_eq!(script.expect("two", SOON).unwrap(), ", two");
        let error = script.expect("two", SOON).unwrap_err();
        assert!(error.to_string().ends_with("one, two, two, \u{fffd}"), "{error}");
        assert_eq!(script.expect(", ", SOON).unwrap(), ", ");
        assert_eq!(script.expect("", SOON).unwrap(), "");
        assert_eq!(script.transcript(), "one, two, two, \u{fffd}");
    }

    #[test]
    fn what_is_waited_for_can_be_found_by_a_closure() {
        let (mut console, script) = memory().unwrap();
        console.write(b"a1b22c").unwrap();
        let digit = |output: &[u8]| output.iter().position(u8::is_ascii_digit).map(|at| at + 1);
        assert_eq!(script.expect_with(digit, "a digit", SOON).unwrap(), "a1");
        assert_eq!(script.expect_with(digit, "a digit", SOON).unwrap(), "b2");
        assert_eq!(script.expect_with(|_| Some(usize::MAX), "the rest", SOON).unwrap(), "2c");
        let error = script.expect_with(digit, "a digit", SOON).unwrap_err();
        assert!(error.to_string().starts_with("no \"a digit\" from the guest"), "{error}");
    }

    #[test]
    fn a_timeout_says_how_long_and_what() {
        let (_console, script) = memory().unwrap();
        let Err(ExpectError::Timeout { waited, pattern, tail }) = script.expect("login: ", SOON) else {
            panic!("no timeout");
        };
        assert!(waited >= SOON && pattern == "login: " && tail.is_empty());
    }

    #[test]
    fn a_dropped_device_ends_the_wait() {
        let (mut console, script) = memory().unwrap();
        let waiting = script.clone();
        let thread = thread::spawn(move || waiting.expect("never", LONG));
        console.write(b"last words").unwrap();
        drop(console);
        let error = thread.join().unwrap().unwrap_err();
        assert!(matches!(&error, ExpectError::Closed { tail, .. } if tail == "last words"), "{error}");
        assert_eq!(script.expect("words", SOON).unwrap(), "last words");
        assert!(matches!(script.send("x"), Err(ExpectError::Closed { .. })));
    }

    #[test]
    fn only_the_limit_is_kept() {
        let (mut console, script) = memory_with_limit(8).unwrap();
        for _ in 0..1000 {
            console.write(b"abc").unwrap();
        }
        assert_eq!(script.transcript(), "bcabcabc");
        assert_eq!(script.expect("cab", SOON).unwrap(), "bcab");
        console.write(b"0123456789").unwrap();
        assert_eq!(script.expect("3", SOON).unwrap(), "23");
    }

    #[test]
    fn input_waits_in_line_and_ends() {
        let (mut console, script) = memory().unwrap();
        let mut buffer = [0; 4];
        assert_eq!(console.read(&mut buffer).unwrap(), Input::Nothing);
        script.send("hello").unwrap();
        assert_eq!(console.read(&mut buffer).unwrap(), Input::Bytes(4));
        assert_eq!((&buffer, script.unread()), (b"hell", 1));
        script.close_input();
        assert_eq!(console.read(&mut buffer).unwrap(), Input::Bytes(1));
        assert_eq!(console.read(&mut buffer).unwrap(), Input::End);
    }

    proptest! {
        #[test]
        fn a_pattern_is_found_however_it_is_split(
            text in "[ab]{0,40}", pattern in "[ab]{1,4}", cuts in prop::collection::vec(1..5usize, 0..40),
        ) {
            let (mut console, script) = memory_with_limit(1000).unwrap();
            let (waiting, wanted) = (script.clone(), pattern.clone());
            let thread = thread::spawn(move || waiting.expect(&wanted, LONG));
            let mut rest = text.as_bytes();
            for cut in cuts {
                let (piece, others) = rest.split_at(cut.min(rest.len()));
                console.write(piece).unwrap();
                thread::yield_now();
                rest = others;
            }
            console.write(rest).unwrap();
            drop(console);
            let found = thread.join().unwrap().ok();
            let whole = text.find(&pattern).map(|at| text[..at + pattern.len()].to_owned());
            prop_assert_eq!(found, whole);
        }
    }
}
