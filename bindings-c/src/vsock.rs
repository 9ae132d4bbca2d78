//! Sockets between host and guest.

use std::ffi::c_char;
use std::mem::MaybeUninit;
use std::os::fd::IntoRawFd;
use std::time::Duration;

use vmcore::Error;
use vmdevices::Vsock;
use vmdevices::virtio::{VsockHandle, VsockListener};

use crate::bytes::text;
use crate::disk::attached;
use crate::error::{Result, give, guard, need, put, vmcore_error};

/// Sockets to the guest: to be set up and attached to a machine, and a handle on them from then on.
pub struct vmcore_vsock {
    vsock: Option<Vsock>,
    handle: VsockHandle,
}

/// A port of the host that the guest can connect to. Deleting it frees the port.
pub struct vmcore_vsock_listener {
    listener: VsockListener,
}

impl vmcore_vsock {
    pub(crate) fn take(&mut self) -> Result<Vsock> {
        self.vsock.take().ok_or_else(|| attached("vsock"))
    }
}

/// For a guest that others know as `cid`, 3 or more.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vsock_new(
    cid: u32,
    out: Option<&mut MaybeUninit<*mut vmcore_vsock>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let vsock = Vsock::new(cid)?;
        give(out, vmcore_vsock { handle: vsock.handle(), vsock: Some(vsock) })
    })
}

/// Listens on a Unix socket at `path` for programs of the host, which send "CONNECT PORT", and connects the guest to
/// those that listen on path_PORT.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_vsock_set_socket(
    vsock: Option<&mut vmcore_vsock>,
    path: *const c_char,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let (vsock, path) = (need(vsock, "vsock")?, text!(path));
        let set = vsock.take()?.socket(path)?;
        vsock.vsock = Some(set);
        Ok(())
    })
}

/// Connects to a port of the guest, `milliseconds` at most; the descriptor of the stream is the caller's.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vsock_connect(
    vsock: Option<&vmcore_vsock>,
    port: u32,
    milliseconds: u64,
    out: Option<&mut MaybeUninit<i32>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let out = need(out, "out")?;
        let stream = need(vsock, "vsock")?
            .handle
            .connect(port, Duration::from_millis(milliseconds))
            .map_err(|error| Error::os("connect", format_args!("port {port} of the guest"), error))?;
        put(Some(out), stream.into_raw_fd())
    })
}

/// Listens on a port of the host (CID 2): the guest's connections to it come here, and to no Unix socket. Up to 128
/// wait to be accepted.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vsock_listen(
    vsock: Option<&vmcore_vsock>,
    port: u32,
    out: Option<&mut MaybeUninit<*mut vmcore_vsock_listener>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let out = need(out, "out")?;
        let listener = need(vsock, "vsock")?
            .handle
            .listen(port)
            .map_err(|error| Error::os("listen", format_args!("port {port} for the guest"), error))?;
        give(Some(out), vmcore_vsock_listener { listener })
    })
}

/// Waits for the guest's next connection, `milliseconds` at most; the descriptor of the stream is the caller's.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_vsock_listener_accept(
    listener: Option<&vmcore_vsock_listener>,
    milliseconds: u64,
    out: Option<&mut MaybeUninit<i32>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let out = need(out, "out")?;
        let listener = &need(listener, "listener")?.listener;
        let stream = listener.accept(Duration::from_millis(milliseconds)).map_err(|error| {
            Error::os("accept", format_args!("on port {} for the guest", listener.port()), error)
        })?;
        put(Some(out), stream.into_raw_fd())
    })
}

/// Frees it, and the port.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_vsock_listener_delete(listener: Option<Box<vmcore_vsock_listener>>) {
    drop(listener);
}

/// Frees the handle, and the device where no machine has it.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_vsock_delete(vsock: Option<Box<vmcore_vsock>>) {
    drop(vsock);
}
