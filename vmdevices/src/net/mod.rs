//! What network cards are connected to.

mod nat;
mod tap;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use crate::buffers::Buffers;

pub use nat::{Action, Cidr, Destination, Forward, Nat, NatError, NatHandle, NatStats, Protocol, RuleCount};
pub use tap::{Tap, TapError};

/// Length of the header in front of each packet, in bytes: `struct virtio_net_hdr` with
/// `num_buffers` (virtio 1.2, section 5.1.6).
pub const HEADER: usize = 12;

/// The largest packet with offloads, in bytes: header, Ethernet header, 65,535 bytes of IP, and a
/// VLAN tag.
pub const MOST_PACKET: usize = HEADER + 14 + 4 + 65_535;

/// The network behind a card. Each packet is an Ethernet frame behind a [`HEADER`]; a back end
/// without offloads ignores the header it is given and gives one of zeroes.
pub trait NetBackend: Send {
    /// Which offloads it can do: virtio-net feature bits 0, 1, 7 to 14 and 54 to 56 (virtio 1.2,
    /// section 5.1.3).
    fn features(&self) -> u64 {
        0
    }

    /// The driver has agreed to the feature bits `features`: from now on no packet needs others.
    ///
    /// # Errors
    /// Where the host refuses; the device then does not start.
    fn set_features(&mut self, features: u64) -> io::Result<()> {
        let _ = features;
        Ok(())
    }

    /// The largest IP packet the network takes, where it is known, in bytes.
    fn mtu(&self) -> Option<u16> {
        None
    }

    /// What becomes readable when there are packets again after `WouldBlock`.
    fn source(&self) -> Option<Arc<dyn AsRawFd + Send + Sync>>;

    /// Sends the packet.
    ///
    /// # Errors
    /// Where it was not sent: then it is lost, as packets may be.
    fn send(&mut self, packet: &mut Buffers<'_>) -> io::Result<()>;

    /// Takes a packet into `into`, and what does not fit (the packet is then dropped) into `spill`,
    /// without blocking. Returns the length of header and packet in bytes.
    ///
    /// # Errors
    /// `WouldBlock` where there is none.
    fn receive(&mut self, into: &mut Buffers<'_>, spill: &mut [u8]) -> io::Result<usize>;
}
