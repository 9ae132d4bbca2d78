//! Unix sockets that devices listen on.

use std::io::{self, ErrorKind};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use vmcore::{Error, Result};

/// A listening socket whose file goes with it.
#[derive(Debug)]
pub(crate) struct Listener {
    /// It does not block.
    pub(crate) socket: UnixListener,
    pub(crate) path: PathBuf,
}

impl Listener {
    /// Listens on a new socket at `path`, or in place of one that nobody listens on any more. `what` is
    /// for messages.
    ///
    /// # Errors
    /// [`Error::Config`] where another program listens there or there is another kind of file,
    /// [`Error::Os`] where the host refuses.
    pub(crate) fn bind(path: &Path, what: &'static str) -> Result<Self> {
        let socket = match UnixListener::bind(path) {
            Err(e) if e.kind() == ErrorKind::AddrInUse => {
                clear(path, what)?;
                UnixListener::bind(path)
            }
            bound => bound,
        };
        let os = |op| {
            let path = path.display();
            move |e: io::Error| Error::os(op, format_args!("the {what} {path}"), e)
        };
        let socket = socket.map_err(os("bind"))?;
        let listener = Self { socket, path: path.to_path_buf() };
        listener.socket.set_nonblocking(true).map_err(os("ioctl(FIONBIO)"))?;
        Ok(listener)
    }
}

/// Removes the socket at `path` if nobody listens on it.
fn clear(path: &Path, what: &'static str) -> Result<()> {
    let refused = |fix: &str| Error::Config { what, value: path.display().to_string(), fix: fix.into() };
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    if !is_socket {
        return Err(refused("there is another kind of file; choose another path"));
    }
    match UnixStream::connect(path) {
        Err(e) if e.kind() == ErrorKind::ConnectionRefused => {}
        _ => return Err(refused("another program listens on it; choose another path")),
    }
    std::fs::remove_file(path).map_err(|e| Error::os("unlink", path.display(), e))
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Err(e) = std::fs::remove_file(&self.path) {
            log::info!("socket {} is not removed: {e}", self.path.display());
        }
    }
}
