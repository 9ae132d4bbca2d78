//! Ports of the host that lead to the guest.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::str::FromStr;

use super::Protocol;
use super::error::NatError;

/// A port of the host that leads to one of the guest: `tcp:8080:80`, `udp:192.0.2.1:53:53`,
/// `tcp:[::1]:8080:80`. Without an address of the host it is 127.0.0.1, which other machines do not
/// reach.
///
/// The guest sees connections that come from the gateway. They go over the IP version of the host's
/// address, or over IPv4 where the guest has not used IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Forward {
    /// [`Protocol::Tcp`] or [`Protocol::Udp`].
    pub protocol: Protocol,
    /// The host's address and port; port 0 has the host choose one.
    pub bind: SocketAddr,
    /// The guest's port.
    pub guest_port: u16,
}

impl Forward {
    /// TCP from `host_port` of the host's loopback address to the guest's `guest_port`.
    pub fn tcp(host_port: u16, guest_port: u16) -> Self {
        Self { protocol: Protocol::Tcp, bind: SocketAddr::from((Ipv4Addr::LOCALHOST, host_port)), guest_port }
    }

    /// UDP from `host_port` of the host's loopback address to the guest's `guest_port`.
    pub fn udp(host_port: u16, guest_port: u16) -> Self {
        Self { protocol: Protocol::Udp, ..Self::tcp(host_port, guest_port) }
    }

    /// From this address of the host instead of 127.0.0.1; unspecified means all.
    pub fn bind(self, address: IpAddr) -> Self {
        Self { bind: SocketAddr::new(address, self.bind.port()), ..self }
    }
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.protocol, self.bind, self.guest_port)
    }
}

impl FromStr for Forward {
    type Err = NatError;

    fn from_str(text: &str) -> Result<Self, NatError> {
        let wrong = || {
            NatError::text(
                "a forward",
                text.into(),
                "write tcp:8080:80, udp:192.0.2.1:5353:53 or tcp:[::1]:8080:80: protocol, address and port of the host, port of the guest",
            )
        };
        let (protocol, rest) = text.split_once(':').ok_or_else(wrong)?;
        let (host, guest_port) = rest.rsplit_once(':').ok_or_else(wrong)?;
        let protocol = match protocol {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            _ => return Err(wrong()),
        };
        let guest_port = guest_port.parse().ok().filter(|&port| port != 0).ok_or_else(wrong)?;
        let bind = match host.parse::<u16>() {
            Ok(port) => SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
            Err(_) => host.parse().map_err(|_| wrong())?,
        };
        Ok(Self { protocol, bind, guest_port })
    }
}

/// A forward at work.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) forward: Forward,
    pub(super) socket: Socket,
}

#[derive(Debug)]
pub(super) enum Socket {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

impl Listener {
    pub(super) fn open(forward: &Forward) -> Result<Self, NatError> {
        let (protocol, bind) = (forward.protocol, forward.bind);
        if forward.guest_port == 0 {
            return Err(NatError::Setting {
                what: "the guest's port of a forward",
                value: "0".into(),
                fix: "give one from 1 to 65535",
            });
        }
        let open = || match protocol {
            Protocol::Tcp => {
                let listener = TcpListener::bind(bind)?;
                listener.set_nonblocking(true)?;
                Ok((listener.local_addr()?, Socket::Tcp(listener)))
            }
            Protocol::Udp => {
                let socket = UdpSocket::bind(bind)?;
                socket.set_nonblocking(true)?;
                Ok((socket.local_addr()?, Socket::Udp(socket)))
            }
            Protocol::Icmp => Err(std::io::ErrorKind::Unsupported.into()),
        };
        let (bind, socket) = open().map_err(|source| NatError::Bind { protocol, bind, source })?;
        Ok(Self { forward: Forward { bind, ..*forward }, socket })
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Socket::Tcp(listener) => listener.as_fd(),
            Socket::Udp(socket) => socket.as_fd(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwards_are_written_as_they_are_parsed() {
        for (text, full) in [
            ("tcp:8080:80", "tcp:127.0.0.1:8080:80"),
            ("udp:0.0.0.0:53:5353", "udp:0.0.0.0:53:5353"),
            ("tcp:[::1]:0:22", "tcp:[::1]:0:22"),
        ] {
            let forward: Forward = text.parse().unwrap();
            assert_eq!(forward.to_string(), full);
            assert_eq!(full.parse::<Forward>().unwrap(), forward);
        }
        for bad in ["", "tcp", "tcp:80", "icmp:1:2", "tcp:8080:0", "tcp:x:80", "tcp:::1:80:80", "tcp:65536:1"]
        {
            let text = bad.parse::<Forward>().unwrap_err().to_string();
            assert!(text.contains("tcp:8080:80"), "{text}");
        }
    }

    #[test]
    fn a_port_that_is_taken_says_so() {
        let first = Listener::open(&Forward::tcp(0, 80)).unwrap();
        assert_ne!(first.forward.bind.port(), 0);
        let text = Listener::open(&first.forward).unwrap_err().to_string();
        assert!(text.contains(&first.forward.bind.to_string()) && text.contains("in use"), "{text}");
        assert!(Listener::open(&Forward::udp(0, 0)).is_err());
    }
}
