//! virtio-vsock: streams between programs of the guest and of the host (virtio 1.2, section 5.10).

mod connection;
mod front;
mod handle;
mod mux;
mod packet;
mod worker;

use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmcore::{Error, Machine, Result};

use super::device::{Activation, DeviceType, VirtioDevice, Worker, read_config_bytes};
use crate::saved;
use front::Front;
use handle::Shared;
pub use handle::{VsockHandle, VsockListener};
use mux::Mux;
use worker::VsockWorker;

/// `VIRTIO_VSOCK_F_STREAM` (section 5.10.3).
const F_STREAM: u64 = 1 << 0;

/// The first CID that a guest may have: those below mean the hypervisor, the machine itself and the
/// host (section 5.10.4).
const FIRST_CID: u32 = 3;

const WHAT: &str = "a virtio socket device";
const STATE_VERSION: u8 = 1;

/// Sockets of the family AF_VSOCK in the guest, connected to Unix sockets of the host.
///
/// With [`Vsock::socket`] the host's side is that of Firecracker and Cloud Hypervisor:
///
/// - A program of the host connects to the socket at `PATH` and sends `CONNECT <port>` and a line feed.
///   Where a program in the guest accepts on that port it gets `OK <port of the host's side>` and a line
///   feed, and from there on the stream; otherwise the socket is closed.
/// - A program of the guest that connects to CID 2, port P, reaches the server that listens on the Unix
///   socket `PATH_P` of the host. Where there is none its connection is refused.
///
/// The embedder reaches the guest's ports without files by [`Vsock::handle`].
///
/// Data flows as fast as the reader takes it: the device keeps at most 128 KiB of a stream, and up to
/// 1024 streams at once. Half-closed streams go on in the other direction. A host that closes with data
/// unread resets the stream; a reset of the guest closes it on the host. Streams are of type `SOCK_STREAM`: `SOCK_SEQPACKET` is not offered, as a
/// Unix stream has no place for the ends of messages.
///
/// Streams end where a saved state is restored: the guest gets the transport reset event, and its
/// sockets an error. Its CID is then that of the device it goes on with. On a deterministic machine there
/// is none of this: what the host sends comes at no certain instruction.
#[derive(Debug)]
pub struct Vsock {
    cid: u32,
    front: Option<Arc<Front>>,
    shared: Arc<Shared>,
    /// A state was restored: the guest is to be told that its streams are gone.
    owes_reset: bool,
}

/// What is saved of it. The streams are not: their other ends are elsewhere.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    cid: u32,
}

impl Vsock {
    /// A device for a guest that others know as `cid`: 3 or more, and not 2^32 - 1.
    ///
    /// # Errors
    /// [`Error::Config`] for another CID, [`Error::Os`] where the host is out of descriptors.
    pub fn new(cid: u32) -> Result<Self> {
        if !(FIRST_CID..u32::MAX).contains(&cid) {
            return Err(Error::Config {
                what: "vsock CID",
                value: cid.to_string(),
                fix: format!("choose {FIRST_CID} to {}: the others are reserved", u32::MAX - 1),
            });
        }
        let shared = Shared::new().map_err(|error| Error::os("eventfd", "vsock", error))?;
        Ok(Self { cid, front: None, shared, owes_reset: false })
    }

    /// Listens on a Unix socket at `path` for programs of the host, and connects the guest to those that
    /// listen on `path_PORT`. A socket that nobody listens on is replaced; the file is removed with the
    /// device.
    ///
    /// Whoever may write to the files reaches the guest's ports: put them into a directory of the user's
    /// own.
    ///
    /// # Errors
    /// [`Error::Config`] where another program listens there or there is another kind of file,
    /// [`Error::Os`] where the host refuses.
    pub fn socket(mut self, path: impl AsRef<Path>) -> Result<Self> {
        self.front = Some(Arc::new(Front::bind(path.as_ref())?));
        Ok(self)
    }

    /// The guest's ports, for the program that embeds the VM.
    pub fn handle(&self) -> VsockHandle {
        self.shared.handle()
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> DeviceType {
        DeviceType::SOCKET
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![256, 256, 16]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&u64::from(self.cid).to_le_bytes(), offset, data);
    }

    fn attached(&mut self, machine: &mut Machine) -> Result<()> {
        if machine.is_deterministic() {
            return Err(Error::Config {
                what: "vsock device",
                value: "on a deterministic VM".into(),
                fix: "leave it out: data comes when the host's programs send it".into(),
            });
        }
        Ok(())
    }

    fn activate(&mut self, activation: Activation) -> Result<Vec<Box<dyn Worker>>> {
        let Activation { memory, queues, .. } = activation;
        let mux = Mux::new(self.cid.into(), self.front.clone(), self.shared.clone())
            .map_err(|error| Error::os("epoll", "vsock", error))?;
        let owes_reset = std::mem::take(&mut self.owes_reset);
        Ok(vec![Box::new(VsockWorker { memory, queues, mux, owes_reset })])
    }

    fn save(&self) -> Result<Vec<u8>> {
        saved::save(WHAT, STATE_VERSION, &State { cid: self.cid })
    }

    fn restore(&mut self, state: &[u8]) -> Result<()> {
        let State { cid } = saved::restore(WHAT, STATE_VERSION, state)?;
        if cid != self.cid {
            log::info!("vsock: the guest had CID {cid} and has {} now", self.cid);
        }
        self.owes_reset = true;
        Ok(())
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        self.shared.close();
    }
}
