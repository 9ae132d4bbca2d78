//! System calls that rustix does not have.
#![expect(unsafe_code, reason = "setsockopt and recv as rustix does not offer them")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Has `MSG_PEEK` on `socket` read from `offset` bytes behind what is unread, and go on from there with
/// each call (`SO_PEEK_OFF`; Linux 6.9 for TCP).
pub(super) fn set_peek_offset(socket: impl AsFd, offset: i32) -> io::Result<()> {
    let len = libc::socklen_t::try_from(size_of::<i32>()).unwrap_or(4);
    // SAFETY: the option is an int, which lives for the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            std::ptr::from_ref(&offset).cast(),
            len,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Throws away the next `count` bytes that the TCP `socket` has received (tcp(7), `MSG_TRUNC`). They
/// must be there.
pub(super) fn discard(socket: impl AsFd, count: usize) -> io::Result<usize> {
    let flags = libc::MSG_TRUNC | libc::MSG_DONTWAIT;
    // SAFETY: with MSG_TRUNC on TCP the kernel writes nothing to the buffer.
    let done = unsafe { libc::recv(socket.as_fd().as_raw_fd(), std::ptr::null_mut(), count, flags) };
    usize::try_from(done).map_err(|_| io::Error::last_os_error())
}
