//! A pseudo-terminal for the user to connect to.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{OFlags, fcntl_setfl};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcgetwinsize, tcsetattr};
use vmcore::{Error, Result};

use super::stream::Stream;
use super::{Console, Descriptor, Input};

/// A console on a new pseudo-terminal: connect to [`Pty::path`] with `screen`, `picocom`, `minicom`.
///
/// The guest runs whether or not somebody is connected. Output that nobody reads is kept, the first
/// 4 KiB or so by the host's kernel and the last 64 KiB by the device's [`Link`](super::Link); the
/// next reader gets both.
#[derive(Debug)]
pub struct Pty {
    stream: Stream,
    /// For waiting by another descriptor than that of the input.
    output: Descriptor,
    path: PathBuf,
    /// Kept open, so that the terminal outlives its users' connections.
    user_side: OwnedFd,
}

impl Pty {
    /// A new pseudo-terminal, in raw mode.
    ///
    /// # Errors
    /// [`Error::Os`] where the host has none left, or no devpts is mounted.
    pub fn new() -> Result<Self> {
        let os = |op| move |e: rustix::io::Errno| Error::os(op, "a console", e);
        let fd = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
            .map_err(os("posix_openpt"))?;
        grantpt(&fd).map_err(os("grantpt"))?;
        unlockpt(&fd).map_err(os("unlockpt"))?;
        let path = ptsname(&fd, Vec::new()).map_err(os("ptsname"))?;
        let path = PathBuf::from(std::ffi::OsString::from_vec(path.into_bytes()));
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let user_side = ioctl_tiocgptpeer(&fd, flags).map_err(os("ioctl(TIOCGPTPEER)"))?;
        // Echo would send the guest's own output back to it.
        let mut modes = tcgetattr(&user_side).map_err(os("tcgetattr"))?;
        modes.make_raw();
        tcsetattr(&user_side, OptionalActions::Now, &modes).map_err(os("tcsetattr"))?;
        fcntl_setfl(&fd, OFlags::NONBLOCK).map_err(os("fcntl(F_SETFL)"))?;
        let output = rustix::io::fcntl_dupfd_cloexec(&fd, 0).map_err(os("fcntl(F_DUPFD)"))?;
        let stream = Stream::terminal(Arc::new(fd));
        Ok(Self { stream, output: Arc::new(output), path, user_side })
    }

    /// The terminal to connect to, like "/dev/pts/7".
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Console for Pty {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.write(bytes)
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<Input> {
        self.stream.read(buffer)
    }

    fn input(&self) -> Option<Descriptor> {
        self.stream.descriptor()
    }

    fn output(&self) -> Option<Descriptor> {
        Some(self.output.clone())
    }

    fn size(&self) -> Option<(u16, u16)> {
        let size = tcgetwinsize(&self.user_side).ok()?;
        Some((size.ws_col, size.ws_row)).filter(|&(columns, rows)| columns > 0 && rows > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console::Link;
    use std::fs::{File, OpenOptions};
    use std::io::{Read, Write};
    use std::sync::{Mutex, mpsc};
    use std::time::{Duration, Instant};
    use vmcore::IoThread;

    fn connect(path: &Path) -> File {
        OpenOptions::new().read(true).write(true).open(path).unwrap()
    }

    /// `len` bytes without a pattern that could hide a gap.
    fn text(len: u32) -> Vec<u8> {
        (0..len).map(|i| i.wrapping_mul(0x9e37_79b9).to_be_bytes()[0]).collect()
    }

    #[test]
    fn both_directions_are_raw() {
        let mut console = Pty::new().unwrap();
        let mut user = connect(console.path());
        let all: Vec<u8> = (0..=255).collect();
        console.write(&all).unwrap();
        let mut got = [0; 256];
        user.read_exact(&mut got).unwrap();
        assert_eq!(got, *all);
        user.write_all(&all).unwrap();
        assert_eq!(console.read(&mut got).unwrap(), Input::Bytes(256));
        assert_eq!(got, *all);
        let error = console.read(&mut got).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "no echo");
    }

    #[test]
    fn users_may_leave_and_come_back() {
        let mut console = Pty::new().unwrap();
        drop(connect(console.path()));
        assert_eq!(console.read(&mut [0; 8]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let mut user = connect(console.path());
        console.write(b"again").unwrap();
        let mut got = [0; 5];
        user.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"again");
    }

    #[test]
    fn without_a_reader_the_guest_goes_on_and_the_newest_is_kept() {
        let console = Pty::new().unwrap();
        let mut user = connect(console.path());
        let link = Arc::new(Mutex::new(Link::new(console)));
        let begin = Instant::now();
        let said = text(1 << 20);
        said.chunks(100).for_each(|piece| link.lock().unwrap().write(piece));
        assert!(begin.elapsed() < Duration::from_secs(10));
        let lost = usize::try_from(link.lock().unwrap().lost()).unwrap();
        assert!(lost > 800_000, "{lost}");
        // A reader who comes then gets all that is kept, without the guest writing again.
        let thread = IoThread::new("console").unwrap();
        let ready = {
            let link = link.clone();
            move || link.lock().unwrap().ready()
        };
        let _watches = link.lock().unwrap().watch(&thread, ready).unwrap();
        let (done, finished) = mpsc::channel();
        let left = said.len() - lost;
        std::thread::spawn(move || {
            let mut got = vec![0; left];
            user.read_exact(&mut got).unwrap();
            done.send(got).unwrap();
        });
        let got = finished.recv_timeout(Duration::from_secs(20)).unwrap();
        assert!(got.ends_with(&said[said.len() - (60 << 10)..]));
    }
}
