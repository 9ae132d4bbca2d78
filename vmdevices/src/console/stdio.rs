//! The terminal, pipes or files that a program was started with.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::fs::OFlags;
use rustix::termios::{self, OptionalActions, SpecialCodeIndex, Termios};
use vmcore::{Error, Result};

use super::stream::Stream;
use super::{Console, Descriptor, Input, PATIENT};

/// Begins a key sequence: Ctrl-A, as with QEMU's `-nographic`.
const ESCAPE: u8 = 0x01;

/// The console on standard input and output: terminal, pipe, socket or file.
///
/// A terminal is in raw mode while this lives: each key goes to the guest, Ctrl-C included, and the
/// guest does the echo. Dropping it sets the terminal back. The keys that are not the guest's:
///
/// | keys | do |
/// |---|---|
/// | Ctrl-A x | stop the VM, which ends with `Outcome::Stopped` |
/// | Ctrl-A b | send a break, which Linux takes for SysRq |
/// | Ctrl-A Ctrl-A | send one Ctrl-A |
///
/// Input that is no terminal goes to the guest as it is, up to its end. A program that runs in the
/// background of its terminal gets no input from it. A program killed by a signal leaves the
/// terminal as it is (`reset` helps); this library installs no signal handlers.
///
/// A pipe or socket whose other side is gone takes no more output, and raises no SIGPIPE.
#[derive(Debug)]
pub struct Stdio {
    input: Option<Stream>,
    output: Stream,
    terminal: Option<Terminal>,
    keys: Keys,
    /// What was read and has not been looked at.
    typed: VecDeque<u8>,
    /// What a key sequence said, behind the bytes before it.
    said: Option<Input>,
}

impl Stdio {
    /// The console on standard input and output.
    ///
    /// # Errors
    /// [`Error::Os`] where standard output is closed, or the terminal refuses raw mode.
    pub fn new() -> Result<Self> {
        Self::on(io::stdin(), io::stdout())
    }

    /// As [`Stdio::new`], on other descriptors; they stay as they are and may be closed.
    ///
    /// # Errors
    /// [`Error::Os`] where `output` is no open descriptor, or the terminal refuses raw mode.
    pub fn on(input: impl AsFd, output: impl AsFd) -> Result<Self> {
        let output = Stream::share(&output, OFlags::WRONLY)
            .map_err(|e| Error::os("fcntl(F_DUPFD)", "the console's output", e))?;
        let mut this = Self {
            input: None,
            output,
            terminal: None,
            keys: Keys::Plain,
            typed: VecDeque::new(),
            said: None,
        };
        if in_background(&input) {
            log::info!("no console input: the program is in the background of its terminal");
            return Ok(this);
        }
        match Stream::share(&input, OFlags::RDONLY) {
            Ok(stream) => this.input = Some(stream),
            Err(e) => log::info!("no console input: {e}"),
        }
        this.terminal = Terminal::raw(&input)?;
        if this.terminal.is_some() {
            this.keys = Keys::Text;
        }
        Ok(this)
    }

    /// Leaves all keys to the guest: there is no key sequence to stop the VM then.
    pub fn without_escape(mut self) -> Self {
        self.keys = Keys::Plain;
        self
    }
}

impl Console for Stdio {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.output.write(bytes)
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<Input> {
        let Some(input) = &self.input else { return Ok(Input::End) };
        if self.keys == Keys::Plain {
            return input.read(buffer);
        }
        if let Some(said) = self.said.take() {
            return Ok(said);
        }
        loop {
            if self.typed.is_empty() {
                let mut chunk = [0; 256];
                match input.read(&mut chunk)? {
                    Input::Bytes(count) => self.typed.extend(chunk.iter().take(count)),
                    other => return Ok(other),
                }
            }
            let mut count = 0;
            while let Some(to) = buffer.get_mut(count) {
                match self.typed.pop_front().map(|key| self.keys.press(key)) {
                    Some(Some(Pressed::Byte(byte))) => {
                        *to = byte;
                        count += 1;
                    }
                    Some(Some(Pressed::Says(said))) if count > 0 => {
                        self.said = Some(said);
                        break;
                    }
                    Some(Some(Pressed::Says(said))) => return Ok(said),
                    Some(None) => {}
                    None => break,
                }
            }
            // Nothing but the begin of a sequence is no reason to stop reading.
            if count > 0 {
                return Ok(Input::Bytes(count));
            }
        }
    }

    fn input(&self) -> Option<Descriptor> {
        self.input.as_ref()?.descriptor()
    }

    fn output(&self) -> Option<Descriptor> {
        self.output.descriptor()
    }

    fn size(&self) -> Option<(u16, u16)> {
        let size = termios::tcgetwinsize(&self.terminal.as_ref()?.fd).ok()?;
        Some((size.ws_col, size.ws_row)).filter(|&(columns, rows)| columns > 0 && rows > 0)
    }

    fn patience(&self) -> Duration {
        PATIENT
    }
}

/// Where in a key sequence the user is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Keys {
    /// There are no sequences.
    Plain,
    Text,
    Escaped,
}

enum Pressed {
    Byte(u8),
    Says(Input),
}

impl Keys {
    fn press(&mut self, key: u8) -> Option<Pressed> {
        match (*self, key) {
            (Keys::Text, ESCAPE) => {
                *self = Keys::Escaped;
                None
            }
            (Keys::Plain | Keys::Text, key) => Some(Pressed::Byte(key)),
            (Keys::Escaped, key) => {
                *self = Keys::Text;
                match key {
                    ESCAPE => Some(Pressed::Byte(ESCAPE)),
                    b'x' => Some(Pressed::Says(Input::Quit)),
                    b'b' => Some(Pressed::Says(Input::Break)),
                    _ => None,
                }
            }
        }
    }
}

/// Whether reading from `terminal` would stop the program (SIGTTIN).
fn in_background(terminal: impl AsFd) -> bool {
    // An error: no terminal, or not the one that controls this program.
    termios::tcgetpgrp(terminal).is_ok_and(|foreground| foreground != rustix::process::getpgrp())
}

/// A terminal in raw mode, until this is dropped.
#[derive(Debug)]
struct Terminal {
    fd: OwnedFd,
    before: Termios,
}

impl Terminal {
    /// `None` where `fd` is no terminal.
    fn raw(fd: impl AsFd) -> Result<Option<Self>> {
        let Ok(before) = termios::tcgetattr(&fd) else { return Ok(None) };
        let os = |op, e: rustix::io::Errno| Error::os(op, "the console's terminal", e);
        let fd = rustix::io::fcntl_dupfd_cloexec(&fd, 0).map_err(|e| os("fcntl(F_DUPFD)", e))?;
        let mut raw = before.clone();
        raw.make_raw();
        // The embedder's own messages still end their lines.
        raw.output_modes = before.output_modes;
        raw.special_codes[SpecialCodeIndex::VMIN] = 1;
        raw.special_codes[SpecialCodeIndex::VTIME] = 0;
        termios::tcsetattr(&fd, OptionalActions::Now, &raw).map_err(|e| os("tcsetattr", e))?;
        Ok(Some(Self { fd, before }))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Err(e) = termios::tcsetattr(&self.fd, OptionalActions::Now, &self.before) {
            log::warn!("the terminal stays in raw mode: tcsetattr: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::termios::{LocalModes, OutputModes};
    use std::fs::{self, File};
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    /// A terminal as a shell has it: the emulator's side and the program's.
    fn terminal() -> (File, File) {
        use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let emulator = openpt(flags).unwrap();
        grantpt(&emulator).unwrap();
        unlockpt(&emulator).unwrap();
        let program = ioctl_tiocgptpeer(&emulator, flags).unwrap();
        (emulator.into(), program.into())
    }

    fn flags(file: &impl AsFd) -> OFlags {
        rustix::fs::fcntl_getfl(file).unwrap()
    }

    /// All that there is to read now: the bytes, and what ended them.
    fn drain(console: &mut Stdio) -> (Vec<u8>, Input) {
        let (mut bytes, mut buffer) = (Vec::new(), [0; 5]);
        loop {
            match console.read(&mut buffer) {
                Ok(Input::Bytes(count)) => bytes.extend(&buffer[..count]),
                Ok(other) => return (bytes, other),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return (bytes, Input::Nothing),
                Err(e) => panic!("{e}"),
            }
        }
    }

    #[test]
    fn the_terminal_is_raw_while_the_console_lives() {
        let (_emulator, program) = terminal();
        let modes = || {
            let t = termios::tcgetattr(&program).unwrap();
            (t.input_modes, t.output_modes, t.control_modes, t.local_modes)
        };
        let before = modes();
        assert!(before.3.contains(LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG));
        let console = Stdio::on(&program, &program).unwrap();
        let during = modes();
        assert!(!during.3.intersects(LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG));
        assert!(during.1.contains(OutputModes::OPOST), "the embedder's lines still end");
        drop(console);
        assert_eq!(modes(), before);
    }

    #[test]
    fn keys_reach_the_guest_and_the_sequences_do_not() {
        let (mut emulator, program) = terminal();
        let mut console = Stdio::on(&program, &program).unwrap();
        emulator.write_all(b"ls\r\x03\x01\x01\x01?\x01").unwrap();
        assert_eq!(drain(&mut console), (b"ls\r\x03\x01".to_vec(), Input::Nothing));
        emulator.write_all(b"bx\x01xmore").unwrap();
        assert_eq!(drain(&mut console), (vec![], Input::Break));
        assert_eq!(drain(&mut console), (b"x".to_vec(), Input::Quit));
        assert_eq!(drain(&mut console), (b"more".to_vec(), Input::Nothing));
        // Nothing is echoed; what the guest says is shown.
        console.write(b"hi").unwrap();
        let mut shown = [0; 2];
        emulator.read_exact(&mut shown).unwrap();
        assert_eq!(&shown, b"hi");

        let mut console = Stdio::on(&program, &program).unwrap().without_escape();
        emulator.write_all(b"\x01x").unwrap();
        assert_eq!(drain(&mut console), (b"\x01x".to_vec(), Input::Nothing));
    }

    #[test]
    fn a_stopped_terminal_does_not_block() {
        let (mut emulator, program) = terminal();
        let mut console = Stdio::on(&program, &program).unwrap();
        let mut written = 0;
        let error = loop {
            match console.write(&[b'x'; 1000]) {
                Ok(count) => written += count,
                Err(e) => break e,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        assert!(!flags(&program).contains(OFlags::NONBLOCK), "it is shared with others");
        let mut shown = vec![0; written];
        emulator.read_exact(&mut shown).unwrap();
        assert!(console.write(b"y").is_ok());
    }

    #[test]
    fn pipes_carry_everything_and_end() {
        let ((input, mut to_guest), (mut from_guest, output)) = (io::pipe().unwrap(), io::pipe().unwrap());
        let mut console = Stdio::on(&input, &output).unwrap();
        assert_eq!(drain(&mut console), (vec![], Input::Nothing));
        to_guest.write_all(b"\x01x is text here").unwrap();
        assert_eq!(drain(&mut console), (b"\x01x is text here".to_vec(), Input::Nothing));
        drop(to_guest);
        assert_eq!(drain(&mut console), (vec![], Input::End));

        while console.write(&[b'x'; 4096]).is_ok() {}
        assert_eq!(console.write(b"y").unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert!(!flags(&output).contains(OFlags::NONBLOCK), "it is shared with others");
        let mut some = [0; 8192];
        from_guest.read_exact(&mut some).unwrap();
        assert_eq!(console.write(b"y").unwrap(), 1);
        drop(from_guest);
        assert_eq!(console.write(b"z").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn sockets_do_not_block_either() {
        let (mut outside, inside) = UnixStream::pair().unwrap();
        let mut console = Stdio::on(&inside, &inside).unwrap();
        assert_eq!(drain(&mut console), (vec![], Input::Nothing));
        outside.write_all(b"hello").unwrap();
        assert_eq!(drain(&mut console), (b"hello".to_vec(), Input::Nothing));
        while console.write(&[0; 4096]).is_ok() {}
        assert_eq!(console.write(b"y").unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn files_are_read_to_their_end_and_written_where_they_stand() {
        let dir = tempfile::tempdir().unwrap();
        let (script, log) = (dir.path().join("script"), dir.path().join("log"));
        fs::write(&script, "line one\nline two\n").unwrap();
        let mut output = File::create(&log).unwrap();
        output.write_all(b"before ").unwrap();
        let mut console = Stdio::on(File::open(&script).unwrap(), &output).unwrap();
        assert!(console.input().is_none() && console.output().is_none(), "nothing to wait for");
        assert_eq!(drain(&mut console), (b"line one\nline two\n".to_vec(), Input::End));
        console.write(b"guest").unwrap();
        output.write_all(b" after").unwrap();
        assert_eq!(fs::read_to_string(&log).unwrap(), "before guest after");

        let null = File::open("/dev/null").unwrap();
        let mut console = Stdio::on(&null, &output).unwrap();
        assert!(console.input().is_none());
        assert_eq!(drain(&mut console), (vec![], Input::End));
    }
}
