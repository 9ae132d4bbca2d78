//! Consoles that only take output.

use std::fmt;
use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use rustix::fs::OFlags;
use vmcore::{Error, Result};

use super::stream::Stream;
use super::{Console, Descriptor, PATIENT};

/// A console that leads nowhere: output is thrown away, there is no input.
#[derive(Clone, Copy, Debug, Default)]
pub struct Null;

impl Console for Null {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }
}

/// A console that gives output to a closure, in pieces as the guest writes it: bytes from a serial
/// port come one at a time.
///
/// The closure runs on a vCPU's thread, and the guest waits for it.
pub struct Callback<F>(F);

impl<F: FnMut(&[u8]) + Send> Callback<F> {
    /// A console that calls `take` with all output.
    pub fn new(take: F) -> Self {
        Self(take)
    }
}

impl<F: FnMut(&[u8]) + Send> Console for Callback<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (self.0)(bytes);
        Ok(bytes.len())
    }
}

impl<F> fmt::Debug for Callback<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Callback")
    }
}

/// A console that writes output to a file, at once: `tail -f` shows it as it comes, and it is there
/// after a crash of the host program. A named pipe or a terminal will do too.
#[derive(Debug)]
pub struct File(Stream);

impl File {
    /// Writes to a new file at `path`, or empties the one that is there.
    ///
    /// # Errors
    /// [`Error::Os`] where the file cannot be opened.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        Self::open(path.as_ref(), fs::OpenOptions::new().write(true).create(true).truncate(true))
    }

    /// Writes behind the end of the file at `path`, which is made if it is not there.
    ///
    /// # Errors
    /// [`Error::Os`] where the file cannot be opened.
    pub fn append(path: impl AsRef<Path>) -> Result<Self> {
        Self::open(path.as_ref(), fs::OpenOptions::new().append(true).create(true))
    }

    fn open(path: &Path, options: &fs::OpenOptions) -> Result<Self> {
        let stream = options.open(path).and_then(|file| Stream::share(file, OFlags::WRONLY));
        stream.map(Self).map_err(|e| Error::os("open", path.display(), e))
    }
}

impl Console for File {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn output(&self) -> Option<Descriptor> {
        self.0.descriptor()
    }

    fn patience(&self) -> Duration {
        PATIENT
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console::Link;

    #[test]
    fn files_are_emptied_or_continued() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let text = || fs::read_to_string(&path).unwrap();
        let mut link = Link::new(File::append(&path).unwrap());
        link.write(b"one");
        assert_eq!(text(), "one", "at once");
        Link::new(File::append(&path).unwrap()).write(b"two");
        assert_eq!(text(), "onetwo");
        Link::new(File::create(&path).unwrap()).write(b"three");
        assert_eq!(text(), "three");
        let error = File::create(dir.path().join("no/such")).unwrap_err().to_string();
        assert!(error.contains("no/such"), "{error}");
    }

    #[test]
    fn callbacks_get_it_all() {
        let (sender, receiver) = std::sync::mpsc::channel();
        let mut link = Link::new(Callback::new(move |bytes| sender.send(bytes.to_vec()).unwrap()));
        link.write(b"hello");
        assert!(!link.needs_thread());
        drop(link);
        assert_eq!(receiver.iter().flatten().collect::<Vec<_>>(), b"hello");
    }
}
