//! A console that is two.

use std::io::{self, ErrorKind};
use std::time::Duration;

use super::{Console, Descriptor, Input, Link};

/// Gives output to two consoles, and takes input from the first.
///
/// The first sets the pace; what the second does not take in time is kept and counted for it by a
/// [`Link`] of its own.
#[derive(Debug)]
pub struct Tee<C> {
    first: C,
    /// The first takes no more output: the second goes on alone.
    closed: bool,
    second: Link,
}

impl<C: Console> Tee<C> {
    /// Joins `first` and `second`: `Tee::new(Stdio::new()?, File::create("console.log")?)`.
    pub fn new(first: C, second: impl Console + 'static) -> Self {
        Self { first, closed: false, second: Link::new(second) }
    }
}

impl<C: Console> Console for Tee<C> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let answer = if self.closed { Ok(bytes.len()) } else { self.first.write(bytes) };
        let (taken, answer) = match answer {
            Ok(taken) => (taken, Ok(taken)),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return Err(e),
            Err(e) if e.kind() == ErrorKind::BrokenPipe => {
                log::warn!("the host has closed one of two consoles, its output is lost from now on");
                self.closed = true;
                (bytes.len(), Ok(bytes.len()))
            }
            Err(e) => (bytes.len(), Err(e)),
        };
        self.second.write(bytes.get(..taken).unwrap_or(bytes));
        answer
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<Input> {
        self.first.read(buffer)
    }

    fn input(&self) -> Option<Descriptor> {
        self.first.input()
    }

    fn output(&self) -> Option<Descriptor> {
        self.first.output()
    }

    fn size(&self) -> Option<(u16, u16)> {
        self.first.size()
    }

    fn patience(&self) -> Duration {
        self.first.patience()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console::memory;

    struct Picky(ErrorKind);

    impl Console for Picky {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if bytes.len() > 2 { Ok(2) } else { Err(self.0.into()) }
        }
    }

    #[test]
    fn both_get_the_same_and_the_first_gives_input() {
        let ((first, script), (second, copy)) = (memory().unwrap(), memory().unwrap());
        let mut tee = Tee::new(first, second);
        assert_eq!(tee.write(b"hello").unwrap(), 5);
        assert_eq!((script.transcript(), copy.transcript()), ("hello".into(), "hello".into()));
        copy.send("no").unwrap();
        script.send("yes").unwrap();
        let mut buffer = [0; 8];
        assert_eq!(tee.read(&mut buffer).unwrap(), Input::Bytes(3));
        assert_eq!(&buffer[..3], b"yes");
    }

    #[test]
    fn a_slow_first_does_not_make_the_second_get_bytes_twice() {
        let (second, copy) = memory().unwrap();
        let mut tee = Tee::new(Picky(ErrorKind::WouldBlock), second);
        assert_eq!(tee.write(b"hello").unwrap(), 2);
        assert!(tee.write(b"l").is_err());
        assert_eq!(copy.transcript(), "he");
    }

    #[test]
    fn the_second_goes_on_when_the_first_is_closed() {
        let (second, copy) = memory().unwrap();
        let mut link = Link::new(Tee::new(Picky(ErrorKind::BrokenPipe), second));
        link.write(b"abc");
        link.write(b"d");
        assert_eq!(copy.transcript(), "abcd");
    }
}
