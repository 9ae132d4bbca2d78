//! Frames over a Unix datagram socket, one each, as QEMU's `-netdev dgram` speaks it.

use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vmcore::{Error, Result};

use super::{HEADER, NetBackend};
use crate::buffers::Buffers;

/// The other end of a Unix datagram socket. There are no offloads: that protocol has no place for them.
#[derive(Debug)]
pub struct Datagram {
    socket: Arc<UnixDatagram>,
    /// Where the peer is, to be looked for again when it comes back.
    remote: Option<PathBuf>,
    /// Where this socket is, to be removed at the end.
    local: Option<PathBuf>,
}

impl Datagram {
    /// A socket that receives at `local` and sends to `remote`, which need not be there yet and may go
    /// and come back: packets are lost meanwhile. Whoever may write to the file is on the guest's
    /// network. It is removed at the end.
    ///
    /// # Errors
    /// [`Error::Config`] where `local` exists, [`Error::Os`] where the host refuses.
    pub fn bind(local: impl AsRef<Path>, remote: impl AsRef<Path>) -> Result<Self> {
        let (local, remote) = (local.as_ref().to_path_buf(), remote.as_ref().to_path_buf());
        let socket = UnixDatagram::bind(&local).map_err(|error| match error.kind() {
            ErrorKind::AddrInUse => Error::Config {
                what: "network socket",
                value: local.display().to_string(),
                fix: "choose another path, or remove the file if nobody uses it".into(),
            },
            _ => Error::os("bind", local.display(), error),
        })?;
        let mut this = Self::new(socket)?;
        (this.local, this.remote) = (Some(local), Some(remote));
        drop(this.reach());
        Ok(this)
    }

    /// One end of a pair, or a socket that somebody else has bound and connected.
    ///
    /// # Errors
    /// [`Error::Os`] where the host refuses.
    pub fn new(socket: UnixDatagram) -> Result<Self> {
        socket.set_nonblocking(true).map_err(|e| Error::os("ioctl(FIONBIO)", "a network socket", e))?;
        Ok(Self { socket: Arc::new(socket), remote: None, local: None })
    }

    /// Looks for the peer again.
    fn reach(&self) -> io::Result<()> {
        let remote = self.remote.as_ref().ok_or(ErrorKind::NotConnected)?;
        self.socket.connect(remote)
    }
}

impl NetBackend for Datagram {
    fn source(&self) -> Option<Arc<dyn AsRawFd + Send + Sync>> {
        Some(self.socket.clone())
    }

    fn holds_back(&self) -> bool {
        true
    }

    fn send(&mut self, packet: &mut Buffers<'_>) -> io::Result<()> {
        packet.advance(HEADER);
        match packet.drain_to(&self.socket) {
            Err(error) if is_gone(&error) => {
                self.reach()?;
                packet.drain_to(&self.socket)
            }
            sent => sent,
        }
        .map(drop)
    }

    fn receive(&mut self, into: &mut Buffers<'_>, spill: &mut [u8]) -> io::Result<usize> {
        let header = into.write(&[0; HEADER]);
        let (header, spill) = spill.split_at_mut((HEADER - header).min(spill.len()));
        header.fill(0);
        loop {
            match into.fill_from(&self.socket, spill) {
                // Told once; packets that came before are still there.
                Err(error) if is_gone(&error) && error.kind() != ErrorKind::NotConnected => {}
                result => return result.map(|len| len + HEADER),
            }
        }
    }
}

impl Drop for Datagram {
    fn drop(&mut self) {
        if let Some(local) = &self.local
            && let Err(error) = std::fs::remove_file(local)
        {
            log::debug!("network socket {}: {error}", local.display());
        }
    }
}

/// Whether there is no peer, or no longer.
fn is_gone(error: &io::Error) -> bool {
    use ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotConnected};
    matches!(error.kind(), BrokenPipe | ConnectionRefused | ConnectionReset | NotConnected)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::tests::{frame, receive, send};

    #[test]
    fn frames_are_datagrams() {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        let mut backend = Datagram::new(ours).unwrap();
        for len in [14, 60, 9014] {
            send(&mut backend, &frame(len, 7)).unwrap();
            let mut back = vec![0; 10_000];
            let count = theirs.recv(&mut back).unwrap();
            assert_eq!(back[..count], frame(len, 7));
            theirs.send(&back[..count]).unwrap();
            assert_eq!(receive(&mut backend), Some(frame(len, 7)));
        }
        assert!(receive(&mut backend).is_none());
        // One who does not read is waited for.
        let error = (0..100_000).find_map(|_| send(&mut backend, &frame(1514, 0)).err()).unwrap();
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
        while theirs.recv(&mut [0; 2000]).is_ok_and(|len| len == 1514)
            && send(&mut backend, &frame(60, 1)).is_err()
        {}
        drop(theirs);
        assert!(send(&mut backend, &frame(60, 0)).is_err() && receive(&mut backend).is_none());
    }

    #[test]
    fn a_peer_comes_and_goes() {
        let directory = tempfile::tempdir().unwrap();
        let [a, b] = ["a", "b"].map(|name| directory.path().join(name));
        let mut ours = Datagram::bind(&a, &b).unwrap();
        let text = Datagram::bind(&a, &b).unwrap_err().to_string();
        assert!(text.contains("choose another path"), "{text}");
        assert!(send(&mut ours, &frame(60, 0)).is_err());
        for round in 1..4 {
            let mut theirs = Datagram::bind(&b, &a).unwrap();
            send(&mut ours, &frame(60, round)).unwrap();
            assert_eq!(receive(&mut theirs), Some(frame(60, round)));
            send(&mut theirs, &frame(61, round)).unwrap();
            drop(theirs);
            // What it sent is still there.
            assert_eq!(receive(&mut ours), Some(frame(61, round)));
            assert!(send(&mut ours, &frame(60, 0)).is_err());
        }
        drop(ours);
        assert!(!a.exists());
    }
}
