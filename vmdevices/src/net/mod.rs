//! What network cards are connected to.

mod tap;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use crate::buffers::Buffers;

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

impl<B: NetBackend + ?Sized> NetBackend for Box<B> {
    fn features(&self) -> u64 {
        (**self).features()
    }
    fn set_features(&mut self, features: u64) -> io::Result<()> {
        (**self).set_features(features)
    }
    fn set_enabled(&mut self, enabled: bool) -> io::Result<()> {
        (**self).set_enabled(enabled)
    }
    fn mtu(&self) -> Option<u16> {
        (**self).mtu()
    }
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
    fn save_state(&self) -> io::Result<Vec<u8>> {
        (**self).save_state()
    }
    fn restore_state(&mut self, state: &[u8]) -> io::Result<()> {
        (**self).restore_state(state)
    }
}
