//! What network cards are connected to: a [`Tap`] of the host, another process by [`Stream`] or
//! [`Datagram`], other machines of this process by a [`Hub`], the host's networks by a [`Nat`]; or whatever else is a [`NetBackend`].
//!
//! A [`Capture`] records, and a [`Limiter`] limits, what goes through any of them.

mod capture;
mod datagram;
mod hub;
mod limit;
mod nat;
mod stream;
mod tap;
mod wait;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::net::{AddressFamily, SocketType};
use vmcore::{Error, Result};

use crate::buffers::Buffers;

pub use capture::{Capture, Captured};
pub use datagram::Datagram;
pub use hub::{Hub, Port, pair};
pub use limit::{Limited, Limiter, Rates};
pub use nat::{Action, Cidr, Destination, Forward, Nat, NatError, NatHandle, NatStats, Protocol, RuleCount};
pub use stream::Stream;
pub use tap::{Tap, TapError};

/// Length of the header in front of each packet, in bytes: `struct virtio_net_hdr` with
/// `num_buffers` (virtio 1.2, section 5.1.6).
pub const HEADER: usize = 12;

/// The largest packet with offloads, in bytes: header, Ethernet header, 65,535 bytes of IP, and a
/// VLAN tag.
pub const MOST_PACKET: usize = HEADER + 14 + 4 + 65_535;

/// The network behind a card, or behind one queue pair of it. Each packet is an Ethernet frame
/// behind a [`HEADER`]; a back end without offloads ignores the header it is given and gives one of
/// zeroes.
///
/// Called by one thread at a time. No call may block.
pub trait NetBackend: Send {
    /// Which offloads it can do: virtio-net feature bits 0, 1, 7 to 14 and 54 to 56 (virtio 1.2,
    /// section 5.1.3).
    fn features(&self) -> u64 {
        0
    }

    /// The driver has agreed to the feature bits `features`: from now on no packet needs others.
    /// Called again when the driver changes its mind about those of received packets.
    ///
    /// # Errors
    /// Where the host refuses; the device then does not start.
    fn set_features(&mut self, features: u64) -> io::Result<()> {
        let _ = features;
        Ok(())
    }

    /// Whether packets are to come by this queue of several; the first is always in use. All are
    /// until this is called.
    ///
    /// # Errors
    /// Where the host refuses.
    fn set_enabled(&mut self, enabled: bool) -> io::Result<()> {
        let _ = enabled;
        Ok(())
    }

    /// The largest IP packet the network takes, where it is known, in bytes.
    fn mtu(&self) -> Option<u16> {
        None
    }

    /// What becomes readable when there are packets again after `WouldBlock`, and, of a back end
    /// that [holds back](NetBackend::holds_back), readable or writable when there is room again.
    fn source(&self) -> Option<Arc<dyn AsRawFd + Send + Sync>>;

    /// The [source](NetBackend::source) has told of an event: called before the calls for packets that may
    /// follow, for a back end that has something of its own to go on with.
    fn event(&mut self) {}

    /// Whether a packet that [`NetBackend::send`] refused with `WouldBlock` is to be sent again once
    /// the [source](NetBackend::source) tells of an event. Otherwise it is lost, as any other.
    fn holds_back(&self) -> bool {
        false
    }

    /// Sends the packet.
    ///
    /// # Errors
    /// Where it was not sent: then it is lost, as packets may be, unless the back end
    /// [holds back](NetBackend::holds_back).
    fn send(&mut self, packet: &mut Buffers<'_>) -> io::Result<()>;

    /// Takes a packet into `into`, and what does not fit (the packet is then dropped) into `spill`,
    /// without blocking. Returns the length of header and packet in bytes.
    ///
    /// # Errors
    /// `WouldBlock` where there is none.
    fn receive(&mut self, into: &mut Buffers<'_>, spill: &mut [u8]) -> io::Result<usize>;

    /// What of it belongs to the VM, for a snapshot: nothing, where the network is elsewhere.
    ///
    /// # Errors
    /// Where the state cannot be had.
    fn save_state(&self) -> io::Result<Vec<u8>> {
        Ok(Vec::new())
    }

    /// Takes over the bytes that an equal back end saved. Packets are asked for only afterwards.
    ///
    /// # Errors
    /// `InvalidData` where the state is not one of an equal back end.
    fn restore_state(&mut self, state: &[u8]) -> io::Result<()> {
        if state.is_empty() {
            return Ok(());
        }
        let what = format!("{} bytes of state for a network back end that has none", state.len());
        Err(io::Error::new(io::ErrorKind::InvalidData, what))
    }
}

/// The network behind a descriptor that somebody else opened: a tap ([`Tap::from_fd`]), or a connected
/// Unix socket ([`Stream::new`], [`Datagram::new`]).
///
/// # Errors
/// [`Error::Config`] where it is neither, and those of the functions above.
pub fn from_fd(fd: OwnedFd) -> Result<Box<dyn NetBackend>> {
    let neither = |what: String| Error::Config {
        what: "descriptor of a network",
        value: format!("{} ({what})", fd.as_raw_fd()),
        fix: "give one of a tap, or of a connected Unix stream or datagram socket".into(),
    };
    let status = rustix::fs::fstat(&fd).map_err(|error| neither(error.to_string()))?;
    if rustix::fs::FileType::from_raw_mode(status.st_mode) != rustix::fs::FileType::Socket {
        return Ok(Box::new(Tap::from_fd(fd)?));
    }
    let socket = |what: &str| neither(format!("{what} socket"));
    if rustix::net::sockopt::socket_domain(&fd) != Ok(AddressFamily::UNIX) {
        return Err(socket("not a Unix"));
    }
    match rustix::net::sockopt::socket_type(&fd) {
        Ok(SocketType::STREAM) => Ok(Box::new(Stream::new(fd.into())?)),
        Ok(SocketType::DGRAM) => Ok(Box::new(Datagram::new(fd.into())?)),
        _ => Err(socket("neither a stream nor a datagram")),
    }
}

/// The methods of a wrapper that has nothing to add to them.
macro_rules! forward {
    ($self:ident => $backend:expr) => {
        fn features(&$self) -> u64 {
            $backend.features()
        }
        fn set_features(&mut $self, features: u64) -> io::Result<()> {
            $backend.set_features(features)
        }
        fn set_enabled(&mut $self, enabled: bool) -> io::Result<()> {
            $backend.set_enabled(enabled)
        }
        fn mtu(&$self) -> Option<u16> {
            $backend.mtu()
        }
        fn event(&mut $self) {
            $backend.event();
        }
        fn save_state(&$self) -> io::Result<Vec<u8>> {
            $backend.save_state()
        }
        fn restore_state(&mut $self, state: &[u8]) -> io::Result<()> {
            $backend.restore_state(state)
        }
    };
}
use forward;

impl<B: NetBackend + ?Sized> NetBackend for Box<B> {
    forward!(self => (**self));

    fn source(&self) -> Option<Arc<dyn AsRawFd + Send + Sync>> {
        (**self).source()
    }
    fn holds_back(&self) -> bool {
        (**self).holds_back()
    }
    fn send(&mut self, packet: &mut Buffers<'_>) -> io::Result<()> {
        (**self).send(packet)
    }
    fn receive(&mut self, into: &mut Buffers<'_>, spill: &mut [u8]) -> io::Result<usize> {
        (**self).receive(into, spill)
    }
}

/// A back end that others have too: each call has it alone.
impl<B: NetBackend + ?Sized> NetBackend for Arc<Mutex<B>> {
    forward!(self => alone(self));

    fn source(&self) -> Option<Arc<dyn AsRawFd + Send + Sync>> {
        alone(self).source()
    }
    fn holds_back(&self) -> bool {
        alone(self).holds_back()
    }
    fn send(&mut self, packet: &mut Buffers<'_>) -> io::Result<()> {
        alone(self).send(packet)
    }
    fn receive(&mut self, into: &mut Buffers<'_>, spill: &mut [u8]) -> io::Result<usize> {
        alone(self).receive(into, spill)
    }
}

/// What `shared` has.
pub(crate) fn alone<B: NetBackend + ?Sized>(shared: &Mutex<B>) -> MutexGuard<'_, B> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes the pieces of a packet, header first, into `into`, and what has no room there into `spill`;
/// gives what [`NetBackend::receive`] is to give.
fn deliver(pieces: &[&[u8]], into: &mut Buffers<'_>, mut spill: &mut [u8]) -> usize {
    for piece in pieces {
        let rest = &piece[into.write(piece)..];
        let (here, beyond) = spill.split_at_mut(rest.len().min(spill.len()));
        here.copy_from_slice(&rest[..here.len()]);
        spill = beyond;
    }
    pieces.iter().map(|piece| piece.len()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffers::tests::buffers;
    use vmcore::{GuestAddress, GuestMemory, MemoryRegion};

    #[test]
    fn descriptors_are_what_they_are() {
        use std::os::unix::net::{UnixDatagram, UnixStream};
        let (a, b) = UnixStream::pair().unwrap();
        let (mut a, mut b) = (from_fd(a.into()).unwrap(), Stream::new(b).unwrap());
        send(&mut a, &frame(60, 1)).unwrap();
        assert_eq!(receive(&mut b), Some(frame(60, 1)));
        let (a, b) = UnixDatagram::pair().unwrap();
        let (mut a, mut b) = (from_fd(a.into()).unwrap(), Datagram::new(b).unwrap());
        send(&mut a, &frame(60, 2)).unwrap();
        assert_eq!(receive(&mut b), Some(frame(60, 2)));
        let error = |fd| from_fd(fd).err().unwrap().to_string();
        let text = error(std::net::UdpSocket::bind("127.0.0.1:0").unwrap().into());
        assert!(text.contains("Unix stream"), "{text}");
        let text = error(tempfile::tempfile().unwrap().into());
        assert!(text.contains("no tap"), "{text}");
    }

    #[test]
    fn what_has_no_room_is_in_the_spill() {
        use std::os::unix::net::{UnixDatagram, UnixStream};
        let (a, b) = pair().unwrap();
        short(a, b);
        let (a, b) = UnixStream::pair().unwrap();
        short(Stream::new(a).unwrap(), Stream::new(b).unwrap());
        let (a, b) = UnixDatagram::pair().unwrap();
        short(Datagram::new(a).unwrap(), Datagram::new(b).unwrap());
    }

    /// What `from` sends comes to `to` whole, wherever the guest's memory ends.
    pub(super) fn short(mut from: impl NetBackend, mut to: impl NetBackend) {
        for room in [0, HEADER - 2, HEADER + 20, HEADER + 80] {
            send(&mut from, &frame(60, 7)).unwrap();
            let (memory, _) = memory();
            let (map, places, mut spill) = (memory.snapshot(), [(0, room)], [0xee; HEADER + 70]);
            to.event();
            assert_eq!(to.receive(&mut buffers(&map, &places), &mut spill).unwrap(), HEADER + 60);
            let mut bytes = vec![0xee; room];
            buffers(&map, &places).read(&mut bytes);
            bytes.extend(spill);
            assert_eq!(bytes[..HEADER + 60], [&[0; HEADER][..], &frame(60, 7)].concat());
        }
    }

    /// A frame of `len` bytes for everybody.
    pub(super) fn frame(len: usize, byte: u8) -> Vec<u8> {
        let mut frame = vec![byte; len];
        frame[..6.min(len)].fill(0xff);
        frame
    }

    /// Guest memory for the longest packet, and where in it.
    fn memory() -> (GuestMemory, [(u64, usize); 3]) {
        let memory = GuestMemory::new();
        memory.insert(MemoryRegion::anonymous(GuestAddress(0), 0x4_0000).unwrap().into()).unwrap();
        (memory, [(0x100, 5), (0x200, 20), (0x1000, MOST_PACKET)])
    }

    /// Sends `frame` by `backend`, from several pieces of guest memory and behind a header of ones.
    pub(super) fn send(backend: &mut dyn NetBackend, frame: &[u8]) -> io::Result<()> {
        let (memory, places) = memory();
        let map = memory.snapshot();
        buffers(&map, &places).write(&[&[0xff; HEADER], frame].concat());
        backend.send(&mut buffers(&map, &places).take(HEADER + frame.len()))
    }

    /// The next frame, if there is one; its header must be zero.
    pub(super) fn receive(backend: &mut dyn NetBackend) -> Option<Vec<u8>> {
        let (memory, places) = memory();
        let map = memory.snapshot();
        buffers(&map, &places).write(&[0xee; HEADER]);
        // As if there had been one.
        backend.event();
        match backend.receive(&mut buffers(&map, &places), &mut [0; 100]) {
            Ok(len) => {
                let mut bytes = vec![0; len];
                assert_eq!(buffers(&map, &places).read(&mut bytes), len);
                assert_eq!(bytes[..HEADER], [0; HEADER]);
                Some(bytes.split_off(HEADER))
            }
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                None
            }
        }
    }
}
