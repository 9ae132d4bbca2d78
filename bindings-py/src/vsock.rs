//! Sockets to the guest.

use std::os::fd::IntoRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use pyo3::prelude::*;
use vmdevices::virtio::VsockHandle;

use crate::error::{self, Raise};
use crate::wait;

/// Sockets to the guest, by the number `cid` (3 and up). Programs of this host reach the guest by the Unix
/// socket `path`, as with Firecracker.
#[pyclass(frozen, module = "vmcore")]
pub struct Vsock {
    vsock: Mutex<Option<vmdevices::Vsock>>,
    handle: VsockHandle,
}

impl Vsock {
    pub fn take(&self) -> PyResult<vmdevices::Vsock> {
        let vsock = self.vsock.lock().unwrap_or_else(PoisonError::into_inner).take();
        vsock.ok_or_else(|| error::wrong_state("attach a vsock", "using it already", "make another"))
    }
}

/// `stream` as a socket of Python's.
fn socket(py: Python<'_>, stream: UnixStream) -> PyResult<Bound<'_, PyAny>> {
    stream.set_nonblocking(false).map_err(|e| error::io("ioctl", "of a socket to the guest", e))?;
    let kwargs = pyo3::types::PyDict::new(py);
    // Whoever fails to make an object of it leaks a descriptor; there is nothing that would close it.
    kwargs.set_item("fileno", stream.into_raw_fd())?;
    py.import("socket")?.call_method("socket", (), Some(&kwargs))
}

fn limit(timeout: Option<f64>) -> PyResult<Duration> {
    // Half a century is "no limit".
    Ok(wait::seconds(timeout)?.unwrap_or(Duration::from_secs(1 << 30)))
}

#[pymethods]
impl Vsock {
    #[new]
    #[pyo3(signature = (cid, path=None))]
    fn new(cid: u32, path: Option<PathBuf>) -> PyResult<Self> {
        let mut vsock = vmdevices::Vsock::new(cid).raise()?;
        if let Some(path) = path {
            vsock = vsock.socket(path).raise()?;
        }
        let handle = vsock.handle();
        Ok(Self { vsock: Mutex::new(Some(vsock)), handle })
    }

    /// Connects to `port` of the guest, and gives the connection as a socket. Waits until the guest accepts.
    #[pyo3(signature = (port, timeout=30.0))]
    fn connect<'py>(&self, py: Python<'py>, port: u32, timeout: Option<f64>) -> PyResult<Bound<'py, PyAny>> {
        let limit = limit(timeout)?;
        let stream = py.detach(|| self.handle.connect(port, limit));
        socket(py, stream.map_err(|e| error::io("connect", format!("to port {port} of the guest"), e))?)
    }

    /// Listens on `port` of the host (CID 2).
    fn listen(&self, port: u32) -> PyResult<VsockListener> {
        let listener = self.handle.listen(port);
        let listener =
            listener.map_err(|e| error::io("listen", format!("on port {port} for the guest"), e))?;
        Ok(VsockListener(Mutex::new(Some(listener))))
    }
}

/// A port of the host that the guest can connect to.
#[pyclass(frozen, module = "vmcore")]
pub struct VsockListener(Mutex<Option<vmdevices::virtio::VsockListener>>);

#[pymethods]
impl VsockListener {
    /// The next connection, as a socket.
    #[pyo3(signature = (timeout=30.0))]
    fn accept<'py>(&self, py: Python<'py>, timeout: Option<f64>) -> PyResult<Bound<'py, PyAny>> {
        let limit = limit(timeout)?;
        let stream = py.detach(|| {
            let listener = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            listener.as_ref().map(|listener| listener.accept(limit))
        });
        let stream = stream.ok_or_else(|| error::closed("a listener"))?;
        socket(py, stream.map_err(|e| error::io("accept", "a connection of the guest", e))?)
    }

    /// Frees the port. More than once does nothing.
    fn close(&self, py: Python<'_>) {
        py.detach(|| drop(self.0.lock().unwrap_or_else(PoisonError::into_inner).take()));
    }
}
