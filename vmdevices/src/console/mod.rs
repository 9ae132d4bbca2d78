//! What a character device (serial port, virtio-console) is connected to on the host.
//!
//! A back end implements [`Console`], which never blocks and needs no policy of its own; a device
//! holds it by a [`Link`], which keeps output that the host cannot take yet, counts what is lost
//! and takes input only as fast as the guest reads it.
//!
//! | back end | output goes to | input comes from |
//! |---|---|---|
//! | [`Stdio`] | standard output | standard input; Ctrl-A x stops the VM |
//! | [`Pty`] | a new pseudo-terminal | the same |
//! | [`Socket`] | who connects to a Unix socket | the same |
//! | [`Null`] | nowhere | nowhere |
//! | [`Callback`] | a closure | nowhere |
//! | [`File`] | a file | nowhere |
//! | [`memory()`] | a [`Script`], which waits for it | the same script |
//! | [`Tee`] | two consoles | the first of them |

mod link;
mod memory;
mod output;
mod pty;
pub(crate) mod socket;
mod stdio;
mod stream;
mod tee;

pub use link::Link;
pub use memory::{ExpectError, Memory, Script, memory, memory_with_limit};
pub use output::{Callback, File, Null};
pub use pty::Pty;
pub use socket::Socket;
pub use stdio::Stdio;
pub use tee::Tee;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

/// [`Console::patience`] with what a program was started with: behind a pipe there is somebody who
/// wants all of it, and may be slow.
const PATIENT: Duration = Duration::from_secs(5);

/// A descriptor to wait for.
pub type Descriptor = Arc<OwnedFd>;

/// The host's side of a character device.
///
/// Methods are called one at a time, by the thread of a vCPU and by an I/O thread in turn, and must
/// not block: they stand between the guest and its next instruction.
pub trait Console: Send {
    /// Takes output of the guest, as many bytes from the front as can be taken now.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] where none can be taken now: they are offered again.
    /// [`io::ErrorKind::BrokenPipe`] where none will ever be. Others lose these bytes, not the
    /// console.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize>;

    /// Takes bytes of input for the guest into `buffer`, which is not empty.
    ///
    /// # Errors
    /// Whatever the host says; it ends the input. `WouldBlock` and `Interrupted` mean
    /// [`Input::Nothing`].
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<Input> {
        let _ = buffer;
        Ok(Input::End)
    }

    /// What becomes readable when there is input again after [`Input::Nothing`]. `None` for a
    /// console that never says that, like a file.
    fn input(&self) -> Option<Descriptor> {
        None
    }

    /// What becomes writable when output can be taken again after `WouldBlock`: another descriptor
    /// than [`Console::input`] (a duplicate, where it is the same file). `None` for a console that
    /// never says that.
    fn output(&self) -> Option<Descriptor> {
        None
    }

    /// Columns and rows of the terminal, for devices that can tell the guest.
    fn size(&self) -> Option<(u16, u16)> {
        None
    }

    /// How long the end of a VM waits for a host that takes nothing of the output that is left. Each
    /// byte it takes begins the time anew.
    fn patience(&self) -> Duration {
        Duration::from_millis(250)
    }
}

/// What came from the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// This many bytes, at least one, are in the buffer.
    Bytes(usize),
    /// Nothing now.
    Nothing,
    /// There will be no more.
    End,
    /// The break condition of a serial line, which Linux takes for SysRq.
    Break,
    /// The user wants the VM to stop.
    Quit,
}

impl<C: Console + ?Sized> Console for Box<C> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (**self).write(bytes)
    }
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<Input> {
        (**self).read(buffer)
    }
    fn input(&self) -> Option<Descriptor> {
        (**self).input()
    }
    fn output(&self) -> Option<Descriptor> {
        (**self).output()
    }
    fn size(&self) -> Option<(u16, u16)> {
        (**self).size()
    }
    fn patience(&self) -> Duration {
        (**self).patience()
    }
}
