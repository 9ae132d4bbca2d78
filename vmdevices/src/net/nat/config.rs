//! How a NAT is set up.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use crate::virtio::Mac;

/// The gateway's Ethernet address: locally administered (IEEE 802, 8.2).
pub(super) const GATEWAY_MAC: Mac = [0x02, b'v', b'm', b'n', b'a', b't'];

/// The gateway's link-local address, from which routers advertise (RFC 4861, section 4.2).
pub(super) const LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// Settings that stay as they are while the NAT works.
#[derive(Clone, Debug)]
pub(super) struct Config {
    pub(super) gateway4: Ipv4Addr,
    /// What DHCP gives the guest.
    pub(super) guest4: Ipv4Addr,
    /// Bits of the IPv4 network.
    pub(super) prefix4: u8,
    /// Network of 64 bits.
    pub(super) prefix6: Option<Ipv6Addr>,
    pub(super) mtu: u16,
    pub(super) host_name: Option<String>,
    /// The gateway's address stands for the host's loopback address.
    pub(super) gateway_is_host: bool,
    pub(super) most_flows: usize,
    pub(super) tcp_idle: Duration,
    pub(super) udp_idle: Duration,
    /// Bytes that all TCP flows together hold for slow receivers on the host's side.
    pub(super) most_held: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            gateway4: Ipv4Addr::new(10, 0, 2, 2),
            guest4: Ipv4Addr::new(10, 0, 2, 15),
            prefix4: 24,
            // A unique local network (RFC 4193).
            prefix6: Some(Ipv6Addr::new(0xfd76, 0x6d63, 0x6f72, 0, 0, 0, 0, 0)),
            mtu: 1500,
            host_name: None,
            gateway_is_host: false,
            most_flows: 8192,
            // RFC 5382, REQ-5.
            tcp_idle: Duration::from_secs(2 * 3600 + 4 * 60),
            // RFC 4787, REQ-5.
            udp_idle: Duration::from_secs(2 * 60),
            most_held: 64 << 20,
        }
    }
}

impl Config {
    pub(super) fn mask4(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(u32::MAX.checked_shl(32 - u32::from(self.prefix4)).unwrap_or(0))
    }

    /// The gateway's address of 64 bits network, 64 bits 1.
    pub(super) fn gateway6(&self) -> Option<Ipv6Addr> {
        self.prefix6.map(|prefix| Ipv6Addr::from_bits(prefix.to_bits() | 1))
    }

    /// The gateway's address of the version of `other`.
    pub(super) fn gateway(&self, other: IpAddr) -> IpAddr {
        match other {
            IpAddr::V4(_) => self.gateway4.into(),
            IpAddr::V6(v6) if v6.is_unicast_link_local() => LINK_LOCAL.into(),
            IpAddr::V6(_) => self.gateway6().unwrap_or(LINK_LOCAL).into(),
        }
    }

    pub(super) fn is_gateway(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(v4) => v4 == self.gateway4,
            IpAddr::V6(v6) => self.prefix6.is_some() && (v6 == LINK_LOCAL || Some(v6) == self.gateway6()),
        }
    }

    /// Whether `address` is of the network between guest and gateway.
    pub(super) fn is_inside(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(v4) => (v4.to_bits() ^ self.gateway4.to_bits()) & self.mask4().to_bits() == 0,
            IpAddr::V6(v6) => self.prefix6.is_some_and(|prefix| (v6.to_bits() ^ prefix.to_bits()) >> 64 == 0),
        }
    }

    /// Whether the guest may send from `address`.
    pub(super) fn may_send(&self, address: IpAddr) -> bool {
        if self.is_gateway(address) {
            return false;
        }
        match address {
            IpAddr::V4(v4) => {
                let station = v4.to_bits() & !self.mask4().to_bits();
                self.is_inside(address) && station != 0 && station != !self.mask4().to_bits()
            }
            IpAddr::V6(v6) => self.is_inside(address) || self.prefix6.is_some() && v6.is_unicast_link_local(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_sends_from_its_own_network_alone() {
        let config = Config::default();
        for (address, may) in [
            ("10.0.2.15", true),
            ("10.0.2.200", true),
            ("10.0.2.2", false),
            ("10.0.2.0", false),
            ("10.0.2.255", false),
            ("10.0.3.15", false),
            ("127.0.0.1", false),
            ("fd76:6d63:6f72::5", true),
            ("fd76:6d63:6f72::1", false),
            ("fd76:6d63:6f72:1::5", false),
            ("fe80::5", true),
            ("fe80::1", false),
            ("::", false),
        ] {
            assert_eq!(config.may_send(address.parse().unwrap()), may, "{address}");
        }
        let config = Config { prefix6: None, ..config };
        assert!(!config.may_send("fe80::5".parse().unwrap()));
    }
}
