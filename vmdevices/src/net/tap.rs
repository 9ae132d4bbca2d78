//! Tap interfaces of the host (Linux, Documentation/networking/tuntap.rst).
#![expect(unsafe_code, reason = "ioctls of the tun driver")]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
};

use super::{HEADER, NetBackend};
use crate::buffers::Buffers;

const DEVICE: &str = "/dev/net/tun";

// linux/if_tun.h.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNSETVNETLE: libc::c_ulong = 0x4004_54dc;

/// Feature bit of virtio-net, and what it is to `TUNSETOFFLOAD`.
const OFFLOADS: [(u32, u32); 4] = [
    (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
];

/// What the guest may leave to the host, which the tun driver always takes.
const FROM_GUEST: [u32; 4] =
    [VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_ECN];

/// Why there is no tap.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TapError {
    /// The tun driver is not there or not ours to use.
    #[error(
        "cannot open {DEVICE}: {source}; load the module (modprobe tun), and have the device node passed into the container or readable by this user"
    )]
    Driver {
        /// What the operating system said.
        source: io::Error,
    },
    /// A name no interface can have.
    #[error("{name:?} cannot name a tap: give 1 to 15 bytes without '/', '%' and spaces")]
    Name {
        /// The name.
        name: String,
    },
    /// Making or taking the interface needs a privilege.
    #[error(
        "no permission for tap {name}: run as root or with CAP_NET_ADMIN, or have it made for this user (ip tuntap add {name} mode tap vnet_hdr user $USER)"
    )]
    Permission {
        /// Name of the interface.
        name: String,
    },
    /// Another process uses the tap.
    #[error("tap {name} is in use by another process; take another name")]
    Busy {
        /// Name of the interface.
        name: String,
    },
    /// The name is taken by something else, or the tap was made with other flags.
    #[error(
        "{name} exists and is no tap that can be used here ({source}): it must be made with mode tap, and without multi_queue"
    )]
    Unsuitable {
        /// Name of the interface.
        name: String,
        /// What the operating system said.
        source: io::Error,
    },
    /// The host refused something else.
    #[error("{op} failed for tap {name}: {source}")]
    Host {
        /// The call.
        op: &'static str,
        /// Name of the interface.
        name: String,
        /// What the operating system said.
        source: io::Error,
    },
}

impl From<TapError> for vmcore::Error {
    fn from(error: TapError) -> Self {
        vmcore::Error::device("tap", error)
    }
}

/// A tap interface: what the guest sends arrives on it, and what the host sends out of it goes to the
/// guest. Connecting it (addresses, a bridge, routes) is the user's.
#[derive(Debug)]
pub struct Tap {
    fd: Arc<OwnedFd>,
    name: String,
    mtu: Option<u16>,
}

impl Tap {
    /// The tap `name`; it is made where it does not exist, and then goes with the last user.
    /// A `%d` at the end of the name has the host choose a number.
    ///
    /// # Errors
    /// [`TapError`], which says what to do.
    pub fn open(name: &str) -> Result<Self, TapError> {
        let stem = name.strip_suffix("%d").unwrap_or(name);
        let bad = |byte: u8| byte == b'/' || byte == b'%' || byte == b':' || !byte.is_ascii_graphic();
        if name.is_empty() || name.len() >= libc::IFNAMSIZ || stem.bytes().any(bad) || name.starts_with('.') {
            return Err(TapError::Name { name: name.into() });
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(DEVICE)
            .map_err(|source| TapError::Driver { source })?;
        let fd = OwnedFd::from(file);
        let mut request = interface_request(name);
        request.ifr_ifru.ifru_flags =
            libc::c_short::try_from(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR).unwrap_or_default();
        // SAFETY: TUNSETIFF reads and writes one ifreq.
        if let Err(source) = unsafe { ioctl(fd.as_fd(), TUNSETIFF, &mut request) } {
            let name = name.to_owned();
            return Err(match source.raw_os_error() {
                Some(libc::EPERM | libc::EACCES) => TapError::Permission { name },
                Some(libc::EBUSY) => TapError::Busy { name },
                Some(libc::EINVAL) => TapError::Unsuitable { name, source },
                _ => TapError::Host { op: "TUNSETIFF", name, source },
            });
        }
        Self::prepare(fd, interface_name(&request))
    }

    /// A tap that somebody else opened, with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR.
    ///
    /// # Errors
    /// [`TapError::Unsuitable`] where it was opened otherwise.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, TapError> {
        let unnamed = || format!("descriptor {}", fd.as_raw_fd());
        let mut request = interface_request("");
        // SAFETY: TUNGETIFF writes one ifreq.
        unsafe { ioctl(fd.as_fd(), TUNGETIFF, &mut request) }
            .map_err(|source| TapError::Unsuitable { name: unnamed(), source })?;
        let name = interface_name(&request);
        // SAFETY: TUNGETIFF has set this member.
        let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        let needed = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if flags & needed != needed {
            let source = io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("flags {flags:#x} lack some of {needed:#x}: tap, no packet information, vnet header"),
            );
            return Err(TapError::Unsuitable { name, source });
        }
        rustix::io::ioctl_fionbio(&fd, true).map_err(|e| TapError::Host {
            op: "FIONBIO",
            name: name.clone(),
            source: e.into(),
        })?;
        Self::prepare(fd, name)
    }

    fn prepare(fd: OwnedFd, name: String) -> Result<Self, TapError> {
        let settings = [
            ("TUNSETVNETHDRSZ", TUNSETVNETHDRSZ, libc::c_int::try_from(HEADER).unwrap_or(0)),
            ("TUNSETVNETLE", TUNSETVNETLE, 1),
        ];
        for (op, code, mut value) in settings {
            // SAFETY: both read one int.
            unsafe { ioctl(fd.as_fd(), code, &mut value) }.map_err(|source| TapError::Host {
                op,
                name: name.clone(),
                source,
            })?;
        }
        let mtu = mtu(&name);
        Ok(Self { fd: Arc::new(fd), name, mtu })
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl NetBackend for Tap {
    fn features(&self) -> u64 {
        let to_guest = OFFLOADS.iter().map(|&(feature, _)| feature);
        to_guest.chain(FROM_GUEST).fold(0, |bits, bit| bits | 1 << bit)
    }

    fn set_features(&mut self, features: u64) -> io::Result<()> {
        let agreed = OFFLOADS.iter().filter(|(feature, _)| features >> feature & 1 == 1);
        let flags = agreed.fold(0, |flags, (_, flag)| flags | flag);
        // SAFETY: TUNSETOFFLOAD takes its flags by value; the descriptor is open for the call.
        match unsafe { libc::ioctl(self.fd.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(flags)) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn mtu(&self) -> Option<u16> {
        self.mtu
    }

    fn source(&self) -> Option<Arc<dyn AsRawFd + Send + Sync>> {
        Some(self.fd.clone())
    }

    fn send(&mut self, packet: &mut Buffers<'_>) -> io::Result<()> {
        packet.drain_to(&self.fd).map(|_| ())
    }

    fn receive(&mut self, into: &mut Buffers<'_>, spill: &mut [u8]) -> io::Result<usize> {
        into.fill_from(&self.fd, spill)
    }
}

/// The largest IP packet of interface `name`, where it is one of this network namespace.
fn mtu(name: &str) -> Option<u16> {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None);
    let mut request = interface_request(name);
    // SAFETY: SIOCGIFMTU reads and writes one ifreq.
    unsafe { ioctl(socket.ok()?.as_fd(), libc::SIOCGIFMTU, &mut request) }.ok()?;
    // SAFETY: SIOCGIFMTU has set this member.
    u16::try_from(unsafe { request.ifr_ifru.ifru_mtu }).ok()
}

fn interface_request(name: &str) -> libc::ifreq {
    // SAFETY: an ifreq is plain data, for which zeroes are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // One byte less than there is room for: the name ends with 0.
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from.cast_signed();
    }
    request
}

fn interface_name(request: &libc::ifreq) -> String {
    let bytes = request.ifr_name.iter().map(|byte| byte.cast_unsigned());
    String::from_utf8_lossy(&bytes.take_while(|&byte| byte != 0).collect::<Vec<_>>()).into_owned()
}

/// # Safety
/// `code` must read and write no more than a `T`.
unsafe fn ioctl<T>(fd: BorrowedFd<'_>, code: libc::c_ulong, argument: &mut T) -> io::Result<()> {
    // SAFETY: the descriptor is open and the argument lives for the call; the rest is the caller's.
    match unsafe { libc::ioctl(fd.as_raw_fd(), code, std::ptr::from_mut(argument)) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_no_interface_can_have_are_refused() {
        for name in ["", "0123456789abcdef", "a/b", "a b", "%dx", ".", "a:1", "ä"] {
            assert!(matches!(Tap::open(name), Err(TapError::Name { .. })), "{name}");
        }
    }

    #[test]
    fn a_descriptor_that_is_no_tap_is_refused() {
        let file = tempfile::tempfile().unwrap();
        assert!(matches!(Tap::from_fd(file.into()), Err(TapError::Unsuitable { .. })));
    }
}
