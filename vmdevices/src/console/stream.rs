//! Reading and writing the host's descriptors without ever waiting for them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::net::{RecvFlags, SendFlags};
use vmm_sys_util::signal;

use super::{Descriptor, Input};

/// Most bytes that are written at once where the host says only *that* it takes some.
const POLLED: usize = 128;

/// One direction of a terminal, pipe, socket or file.
///
/// `O_NONBLOCK` belongs to what a descriptor refers to, which standard input and output share with
/// other programs and with the embedder's own `println!`. So it is set on a reopened one only.
#[derive(Debug)]
pub(super) struct Stream {
    fd: Descriptor,
    way: Way,
    /// A pipe: writing raises SIGPIPE when its reader is gone.
    pipe: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// A terminal, port or pipe, opened anew and non-blocking.
    NonBlocking,
    /// A socket: each call says that it must not wait.
    Socket,
    /// A file or a device that is always ready.
    Ready,
    /// One that cannot be opened anew: it is asked before each call.
    Polled,
}

impl Stream {
    /// The direction of `fd` that `access` names (`RDONLY` or `WRONLY`). `fd` itself stays as it is.
    pub(super) fn share(fd: impl AsFd, access: OFlags) -> io::Result<Self> {
        let fd = fd.as_fd();
        let kind = FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode);
        let way = match kind {
            FileType::Socket => Way::Socket,
            FileType::Fifo => Way::Polled,
            FileType::CharacterDevice if can_be_waited_for(fd) => Way::Polled,
            _ => Way::Ready,
        };
        let pipe = kind == FileType::Fifo;
        if way == Way::Polled
            && let Ok(fd) = Self::reopen(fd, access)
        {
            return Ok(Self { fd, way: Way::NonBlocking, pipe });
        }
        let fd = Arc::new(rustix::io::fcntl_dupfd_cloexec(fd, 0)?);
        Ok(Self { fd, way, pipe })
    }

    fn reopen(fd: BorrowedFd<'_>, access: OFlags) -> io::Result<Descriptor> {
        use std::os::fd::AsRawFd;
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        Ok(Arc::new(rustix::fs::open(path, flags, Mode::empty())?))
    }

    /// A terminal that is non-blocking already and this program's own.
    pub(super) fn terminal(fd: Descriptor) -> Self {
        Self { fd, way: Way::NonBlocking, pipe: false }
    }

    /// A connected socket of this program's own.
    pub(super) fn socket(fd: Descriptor) -> Self {
        Self { fd, way: Way::Socket, pipe: false }
    }

    /// What to wait for; `None` where it is always ready.
    pub(super) fn descriptor(&self) -> Option<Descriptor> {
        (self.way != Way::Ready).then(|| self.fd.clone())
    }

    /// Takes what is there, without waiting.
    pub(super) fn read(&self, buffer: &mut [u8]) -> io::Result<Input> {
        let count = match self.way {
            Way::Socket => rustix::net::recv(&self.fd, &mut *buffer, RecvFlags::DONTWAIT)?.0,
            Way::Polled if !self.is_ready(PollFlags::IN)? => return Ok(Input::Nothing),
            _ => rustix::io::read(&self.fd, &mut *buffer)?,
        };
        Ok(if count == 0 { Input::End } else { Input::Bytes(count) })
    }

    /// Writes what is taken now. Never raises SIGPIPE.
    pub(super) fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let bytes = match self.way {
            Way::Socket => {
                return Ok(rustix::net::send(&self.fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?);
            }
            Way::Polled if !self.is_ready(PollFlags::OUT)? => return Err(io::ErrorKind::WouldBlock.into()),
            Way::Polled => bytes.get(..POLLED).unwrap_or(bytes),
            Way::NonBlocking | Way::Ready => bytes,
        };
        if self.pipe {
            without_sigpipe(|| Ok(rustix::io::write(&self.fd, bytes)?))
        } else {
            Ok(rustix::io::write(&self.fd, bytes)?)
        }
    }

    fn is_ready(&self, events: PollFlags) -> io::Result<bool> {
        let mut wait = [PollFd::new(&*self.fd, events)];
        Ok(poll(&mut wait, Some(&Timespec::default()))? > 0)
    }
}

/// Calls `write` with SIGPIPE blocked, and takes away the one that it raises: the signal goes to the
/// thread that writes. A VM's own threads block it anyway; this is for the embedder's.
fn without_sigpipe<T>(write: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    // An error means that it was blocked before, and stays so.
    let blocked = signal::block_signal(libc::SIGPIPE).is_ok();
    let result = write();
    if result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
        && let Err(e) = signal::clear_signal(libc::SIGPIPE)
    {
        log::warn!("a SIGPIPE stays pending: {e}");
    }
    if blocked && let Err(e) = signal::unblock_signal(libc::SIGPIPE) {
        log::warn!("SIGPIPE stays blocked: {e}");
    }
    result
}

/// Whether a device can say when it is ready: terminals and virtio ports can, `/dev/null` need not.
fn can_be_waited_for(fd: BorrowedFd<'_>) -> bool {
    use rustix::event::epoll;
    epoll::create(epoll::CreateFlags::CLOEXEC)
        .and_then(|wait| epoll::add(&wait, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN))
        .is_ok()
}
