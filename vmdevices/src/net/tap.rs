//! Tap interfaces of the host (Linux, Documentation/networking/tuntap.rst), with one queue or several.
#![expect(unsafe_code, reason = "ioctls of the tun driver")]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_HOST_USO,
};
use vmcore::EventSet;

use super::wait::Wait;
use super::{HEADER, NetBackend};
use crate::buffers::Buffers;

const DEVICE: &str = "/dev/net/tun";

// linux/if_tun.h.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNSETVNETLE: libc::c_ulong = 0x4004_54dc;

// linux/if_tun.h too, since Linux 6.2.
const TUN_F_USO4: u32 = 0x20;
const TUN_F_USO6: u32 = 0x40;

/// Feature bit of virtio-net, and what it is to `TUNSETOFFLOAD`.
const OFFLOADS: [(u32, u32); 7] = [
    (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
    (VIRTIO_NET_F_GUEST_UFO, libc::TUN_F_UFO),
    (VIRTIO_NET_F_GUEST_USO4, TUN_F_USO4),
    (VIRTIO_NET_F_GUEST_USO6, TUN_F_USO6),
];

/// What the guest may leave to the host, which the tun driver always takes.
const FROM_GUEST: [u32; 5] = [
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_UFO,
];

/// Of a queue that is not attached, which `TUNGETIFF` tells too.
const IFF_DETACH_QUEUE: libc::c_int = libc::IFF_DETACH_QUEUE;

/// Most queues of one interface (`MAX_TAP_QUEUES` of the tun driver).
const MOST_QUEUES: u16 = 256;

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
        "no permission for tap {name}: run as root or with CAP_NET_ADMIN, or have it made for this user (ip tuntap add {name} mode tap {flags} user $USER)"
    )]
    Permission {
        /// Name of the interface.
        name: String,
        /// Flags it is to be made with.
        flags: &'static str,
    },
    /// Another process uses the tap.
    #[error("tap {name} is in use by another process; take another name")]
    Busy {
        /// Name of the interface.
        name: String,
    },
    /// A number of queues no interface can have.
    #[error("a tap cannot have {queues} queues: give 1 to {MOST_QUEUES}")]
    Queues {
        /// The number.
        queues: u16,
    },
    /// The name is taken by something else, or the tap was made with other flags.
    #[error(
        "{name} exists and is no tap that can be used here ({source}): it must be made with mode tap, with multi_queue for several queues and without for one"
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

impl TapError {
    /// Its code, as [`vmcore::Error::code`] has it.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Driver { .. } => "tap.driver",
            Self::Name { .. } => "tap.name",
            Self::Permission { .. } => "tap.permission",
            Self::Busy { .. } => "tap.busy",
            Self::Queues { .. } => "tap.queues",
            Self::Unsuitable { .. } => "tap.unsuitable",
            Self::Host { .. } => "tap.host",
        }
    }

    /// What to do about it, where the text says so and no name is in it: the part that does.
    pub fn fix(&self) -> Option<&str> {
        match self {
            Self::Driver { .. } => Some(
                "load the module (modprobe tun), and have the device node passed into the container or readable by this user",
            ),
            Self::Name { .. } => Some("give 1 to 15 bytes without '/', '%' and spaces"),
            Self::Busy { .. } => Some("take another name"),
            Self::Queues { .. } => Some("give 1 to 256"),
            Self::Permission { .. } | Self::Unsuitable { .. } | Self::Host { .. } => None,
        }
    }
}

impl From<TapError> for vmcore::Error {
    fn from(error: TapError) -> Self {
        let code = error.code();
        let fix = error.fix().map(str::to_owned);
        vmcore::Error::device("tap", error).with_code(code).with_fix(fix)
    }
}

/// One queue of a tap interface: what the guest sends arrives on it, and what the host sends out of it
/// goes to the guest. Connecting it (addresses, a bridge, routes) is the user's.
#[derive(Debug)]
pub struct Tap {
    fd: Arc<OwnedFd>,
    name: String,
    mtu: Option<u16>,
    /// Whether the driver below segments UDP for the guest, and takes segments of the guest's.
    uso: bool,
    /// Of several queues; `None` for the only one.
    queue: Option<Queue>,
}

/// One of several queues.
#[derive(Debug)]
struct Queue {
    /// Waits for the queue while it is attached: one that is not cannot be waited for, and what waited
    /// for it before is not told when it is again.
    wait: Wait,
    /// Whether the host sends by this queue.
    attached: bool,
}

impl Tap {
    /// The tap `name`; it is made where it does not exist, and then goes with the last user.
    /// A `%d` at the end of the name has the host choose a number.
    ///
    /// # Errors
    /// [`TapError`], which says what to do.
    pub fn open(name: &str) -> Result<Self, TapError> {
        Self::open_with(name, 0)
    }

    /// `queues` queues of the tap `name`, for [`Net::multiqueue`](crate::Net::multiqueue). One that
    /// exists must have been made with `multi_queue`.
    ///
    /// # Errors
    /// [`TapError`], which says what to do.
    pub fn open_queues(name: &str, queues: u16) -> Result<Vec<Self>, TapError> {
        if !(1..=MOST_QUEUES).contains(&queues) {
            return Err(TapError::Queues { queues });
        }
        if queues == 1 {
            return Self::open(name).map(|tap| vec![tap]);
        }
        let first = Self::open_with(name, libc::IFF_MULTI_QUEUE)?;
        // By the name that it has got.
        let name = first.name.clone();
        let more = (1..queues).map(|_| Self::open_with(&name, libc::IFF_MULTI_QUEUE));
        std::iter::once(Ok(first)).chain(more).collect()
    }

    fn open_with(name: &str, flags: libc::c_int) -> Result<Self, TapError> {
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
        let all = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | flags;
        request.ifr_ifru.ifru_flags = libc::c_short::try_from(all).unwrap_or_default();
        // SAFETY: TUNSETIFF reads and writes one ifreq.
        if let Err(source) = unsafe { ioctl(fd.as_fd(), TUNSETIFF, &mut request) } {
            let name = name.to_owned();
            let flags = if flags == 0 { "vnet_hdr" } else { "vnet_hdr multi_queue" };
            return Err(match source.raw_os_error() {
                Some(libc::EPERM | libc::EACCES) => TapError::Permission { name, flags },
                Some(libc::EBUSY | libc::E2BIG) => TapError::Busy { name },
                Some(libc::EINVAL) => TapError::Unsuitable { name, source },
                _ => TapError::Host { op: "TUNSETIFF", name, source },
            });
        }
        Self::prepare(fd, interface_name(&request), all)
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
        Self::prepare(fd, name, flags)
    }

    /// `flags` are those of the interface.
    fn prepare(fd: OwnedFd, name: String, flags: libc::c_int) -> Result<Self, TapError> {
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
        // Older hosts do not know it.
        let uso = set_offloads(fd.as_fd(), libc::TUN_F_CSUM | TUN_F_USO4 | TUN_F_USO6).is_ok();
        set_offloads(fd.as_fd(), 0).map_err(|source| TapError::Host {
            op: "TUNSETOFFLOAD",
            name: name.clone(),
            source,
        })?;
        let queue = match flags & (libc::IFF_MULTI_QUEUE | IFF_DETACH_QUEUE) {
            0 => None,
            flags => {
                let host = |source| TapError::Host { op: "epoll", name: name.clone(), source };
                let (wait, attached) = (Wait::new().map_err(host)?, flags & IFF_DETACH_QUEUE == 0);
                if attached {
                    wait.add(fd.as_raw_fd(), EventSet::IN).map_err(host)?;
                }
                Some(Queue { wait, attached })
            }
        };
        Ok(Self { fd: Arc::new(fd), name, mtu, uso, queue })
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl NetBackend for Tap {
    fn features(&self) -> u64 {
        const USO: [u32; 3] = [VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_USO];
        let to_guest = OFFLOADS.iter().map(|&(feature, _)| feature);
        let all = to_guest.chain(FROM_GUEST).chain(USO);
        all.filter(|bit| self.uso || !USO.contains(bit)).fold(0, |bits, bit| bits | 1 << bit)
    }

    fn set_features(&mut self, features: u64) -> io::Result<()> {
        let agreed = OFFLOADS.iter().filter(|(feature, _)| features >> feature & 1 == 1);
        let mut flags = agreed.fold(0, |flags, (_, flag)| flags | flag);
        // The tun driver has both or none.
        if flags & (TUN_F_USO4 | TUN_F_USO6) != TUN_F_USO4 | TUN_F_USO6 {
            flags &= !(TUN_F_USO4 | TUN_F_USO6);
        }
        set_offloads(self.fd.as_fd(), flags)
    }

    fn set_enabled(&mut self, enabled: bool) -> io::Result<()> {
        let Some(queue) = self.queue.as_mut().filter(|queue| queue.attached != enabled) else {
            return Ok(());
        };
        if !enabled {
            queue.wait.remove(self.fd.as_raw_fd())?;
        }
        let flag = if enabled { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        let mut request = interface_request("");
        request.ifr_ifru.ifru_flags = libc::c_short::try_from(flag).unwrap_or_default();
        // SAFETY: TUNSETQUEUE reads one ifreq.
        unsafe { ioctl(self.fd.as_fd(), TUNSETQUEUE, &mut request) }?;
        queue.attached = enabled;
        if enabled { queue.wait.add(self.fd.as_raw_fd(), EventSet::IN) } else { Ok(()) }
    }

    fn mtu(&self) -> Option<u16> {
        self.mtu
    }

    fn source(&self) -> Option<Arc<dyn AsRawFd + Send + Sync>> {
        Some(self.queue.as_ref().map_or_else(|| self.fd.clone() as Arc<_>, |queue| queue.wait.source()))
    }

    fn send(&mut self, packet: &mut Buffers<'_>) -> io::Result<()> {
        packet.drain_to(&self.fd).map(|_| ())
    }

    fn receive(&mut self, into: &mut Buffers<'_>, spill: &mut [u8]) -> io::Result<usize> {
        into.fill_from(&self.fd, spill)
    }
}

/// Has the host send packets that need the offloads `flags`.
fn set_offloads(fd: BorrowedFd<'_>, flags: u32) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its flags by value; the descriptor is open for the call.
    match unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(flags)) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
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
    fn what_to_do_is_the_end_of_the_text_and_a_part_of_the_engines_error() {
        let source = || io::Error::from_raw_os_error(libc::ENOENT);
        let name = || String::from("tap0");
        for (error, known) in [
            (TapError::Driver { source: source() }, true),
            (TapError::Name { name: name() }, true),
            (TapError::Permission { name: name(), flags: "" }, false),
            (TapError::Busy { name: name() }, true),
            (TapError::Queues { queues: 0 }, true),
            (TapError::Unsuitable { name: name(), source: source() }, false),
            (TapError::Host { op: "TUNSETOFFLOAD", name: name(), source: source() }, false),
        ] {
            let (text, fix) = (error.to_string(), error.fix().map(str::to_owned));
            assert_eq!(fix.is_some(), known, "{text}");
            assert!(fix.as_ref().is_none_or(|fix| text.ends_with(fix.as_str())), "{text}: {fix:?}");
            assert_eq!(vmcore::Error::from(error).fix(), fix.as_deref());
        }
    }

    #[test]
    fn a_descriptor_that_is_no_tap_is_refused() {
        let file = tempfile::tempfile().unwrap();
        assert!(matches!(Tap::from_fd(file.into()), Err(TapError::Unsuitable { .. })));
    }
}
