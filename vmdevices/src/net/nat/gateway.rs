//! What the gateway itself says: ARP, neighbour discovery, router advertisements, ICMP.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::config::{Config, GATEWAY_MAC, LINK_LOCAL};
use super::wire::{self, ETHERTYPE_ARP, ICMP, ICMPV6, Ip, Link, bytes};
use crate::net::HEADER;
use crate::virtio::Mac;

/// All stations on the link (RFC 4291, section 2.7.1).
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// How long the gateway stays one without a new advertisement, in seconds: the most there is.
const ROUTER_LIFETIME: u16 = u16::MAX;

// ICMPv6 (RFC 4443, RFC 4861).
pub(super) const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOR_SOLICITATION: u8 = 135;
const NEIGHBOR_ADVERTISEMENT: u8 = 136;
pub(super) const ECHO_REQUEST_V6: u8 = 128;
pub(super) const ECHO_REPLY_V6: u8 = 129;
// ICMP (RFC 792).
pub(super) const ECHO_REQUEST: u8 = 8;
pub(super) const ECHO_REPLY: u8 = 0;

/// The answer to an ARP request for the gateway (RFC 826); the frame is given without [`HEADER`].
pub(super) fn arp(config: &Config, frame: &[u8]) -> Option<Vec<u8>> {
    let arp = frame.get(wire::ETHERNET..)?;
    // Ethernet, IPv4, their lengths, a request.
    if bytes(arp, 0)? != [0_u8, 1, 8, 0, 6, 4, 0, 1] {
        return None;
    }
    let (mac, from, to): (Mac, [u8; 4], [u8; 4]) = (bytes(arp, 8)?, bytes(arp, 14)?, bytes(arp, 24)?);
    if Ipv4Addr::from(to) != config.gateway4 {
        return None;
    }
    let mut answer = vec![0; HEADER];
    answer.extend(mac);
    answer.extend(GATEWAY_MAC);
    answer.extend(ETHERTYPE_ARP.to_be_bytes());
    answer.extend([0, 1, 8, 0, 6, 4, 0, 2]);
    answer.extend(GATEWAY_MAC);
    answer.extend(to);
    answer.extend(mac);
    answer.extend(from);
    Some(answer)
}

/// The answer to an ICMPv6 message about this link.
pub(super) fn neighbor(config: &Config, link: Link, ip: &Ip, message: &[u8]) -> Option<Vec<u8>> {
    // Anything with fewer hops came from elsewhere (RFC 4861, section 6.1.1).
    if ip.hops != 255 {
        return None;
    }
    match *message.first()? {
        ROUTER_SOLICITATION => router_advertisement(config, link),
        NEIGHBOR_SOLICITATION => {
            let target = Ipv6Addr::from(bytes::<16>(message, 8)?);
            // The guest looks whether its own new address is taken, which it is not.
            if !config.is_gateway(target.into()) {
                return None;
            }
            let unspecified = ip.from == IpAddr::V6(Ipv6Addr::UNSPECIFIED);
            let to = if unspecified { ALL_NODES.into() } else { ip.from };
            // From a router; solicited, where there is somebody to say it to; overriding.
            let flags = if unspecified { 0xa0 } else { 0xe0 };
            let mut answer = vec![NEIGHBOR_ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0];
            answer.extend(target.octets());
            answer.extend([2, 1]);
            answer.extend(GATEWAY_MAC);
            Some(wire::packet(link, target.into(), to, ICMPV6, &answer))
        }
        _ => None,
    }
}

/// Tells all stations of the router, the network and the resolver (RFC 4861, section 4.2; RFC 8106).
pub(super) fn router_advertisement(config: &Config, link: Link) -> Option<Vec<u8>> {
    let (prefix, gateway) = (config.prefix6?, config.gateway6()?);
    let mut message = vec![ROUTER_ADVERTISEMENT, 0, 0, 0, 64, 0];
    message.extend(ROUTER_LIFETIME.to_be_bytes());
    // Reachability and retransmission are as the guest likes.
    message.extend([0; 8]);
    // Source address.
    message.extend([1, 1]);
    message.extend(GATEWAY_MAC);
    // MTU.
    message.extend([5, 1, 0, 0]);
    message.extend(u32::from(config.mtu).to_be_bytes());
    // A network of 64 bits, on this link, to make addresses in, for ever.
    message.extend([3, 4, 64, 0xc0]);
    message.extend([0xff; 8]);
    message.extend([0; 4]);
    message.extend(prefix.octets());
    // A resolver, for ever.
    message.extend([25, 3, 0, 0]);
    message.extend([0xff; 4]);
    message.extend(gateway.octets());
    Some(wire::packet(link, LINK_LOCAL.into(), ALL_NODES.into(), ICMPV6, &message))
}

/// Why a packet of the guest's does not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It has made all its hops.
    TimeExceeded,
    /// The policy says so.
    Prohibited,
    /// There is no way there.
    NoRoute,
    /// Nobody answers there.
    NoHost,
    /// Nobody listens there.
    NoPort,
}

impl Refusal {
    /// Type and code for ICMP (RFC 792, RFC 1812 section 5.2.7.1).
    fn v4(self) -> [u8; 2] {
        match self {
            Self::TimeExceeded => [11, 0],
            Self::Prohibited => [3, 13],
            Self::NoRoute => [3, 0],
            Self::NoHost => [3, 1],
            Self::NoPort => [3, 3],
        }
    }

    /// Type and code for ICMPv6 (RFC 4443, section 3).
    fn v6(self) -> [u8; 2] {
        match self {
            Self::TimeExceeded => [3, 0],
            Self::Prohibited => [1, 1],
            Self::NoRoute => [1, 0],
            Self::NoHost => [1, 3],
            Self::NoPort => [1, 4],
        }
    }
}

/// The message that tells the sender of the IP packet `original` (its headers at least) so. It comes
/// from the gateway, and a missing port from who has none.
pub(super) fn refuse(
    config: &Config,
    link: Link,
    (from, to): (IpAddr, IpAddr),
    refusal: Refusal,
    original: &[u8],
) -> Vec<u8> {
    let speaker = if refusal == Refusal::NoPort { to } else { config.gateway(from) };
    let (protocol, kind, most) = match from {
        // A header and 8 bytes are all that every station understands; more is better.
        IpAddr::V4(_) => (ICMP, refusal.v4(), 576 - 28),
        IpAddr::V6(_) => (ICMPV6, refusal.v6(), 1280 - 48),
    };
    let mut message = vec![kind[0], kind[1], 0, 0, 0, 0, 0, 0];
    message.extend(&original[..original.len().min(most)]);
    wire::packet(link, speaker, from, protocol, &message)
}

/// The headers of a packet as the guest sent it, for [`refuse`] when the packet itself is gone.
pub(super) fn original((from, to): (IpAddr, IpAddr), protocol: u8, first_bytes: [u8; 8]) -> Vec<u8> {
    let link = Link { gateway: GATEWAY_MAC, guest: GATEWAY_MAC };
    let mut packet = wire::headers(link, from, to, protocol, first_bytes.len());
    packet.drain(..HEADER + wire::ETHERNET);
    packet.extend(first_bytes);
    packet
}
