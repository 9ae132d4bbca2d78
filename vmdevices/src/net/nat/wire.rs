//! Ethernet, IP and checksums: what is common to all protocols. Bytes on the wire are big-endian.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::super::HEADER;
use crate::virtio::Mac;

/// Length of an Ethernet header (IEEE 802.3).
pub(super) const ETHERNET: usize = 14;

pub(super) const ETHERTYPE_IPV4: u16 = 0x0800;
pub(super) const ETHERTYPE_ARP: u16 = 0x0806;
pub(super) const ETHERTYPE_IPV6: u16 = 0x86dd;

/// IP protocol numbers (IANA).
pub(super) const ICMP: u8 = 1;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const ICMPV6: u8 = 58;

/// IPv6 extension headers (RFC 8200, section 4): they begin with the next header and, fragments
/// apart, their length.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;

/// The longest headers that are looked at: Ethernet, IP with its options or some extensions, TCP
/// with its options.
pub(super) const MOST_HEAD: usize = 256;

/// Hops that our packets may make; neighbour discovery wants 255 (RFC 4861, section 6.1).
const HOPS: u8 = 255;

/// The `N` bytes at `at`, where they are there.
pub(super) fn bytes<const N: usize>(from: &[u8], at: usize) -> Option<[u8; N]> {
    from.get(at..)?.first_chunk().copied()
}

/// The 16 bits at `at`, where they are there.
pub(super) fn be16(from: &[u8], at: usize) -> Option<u16> {
    bytes(from, at).map(u16::from_be_bytes)
}

/// The 32 bits at `at`, where they are there.
pub(super) fn be32(from: &[u8], at: usize) -> Option<u32> {
    bytes(from, at).map(u32::from_be_bytes)
}

/// An Ethernet header.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ethernet {
    pub(super) to: Mac,
    pub(super) from: Mac,
    pub(super) ethertype: u16,
}

impl Ethernet {
    pub(super) fn parse(frame: &[u8]) -> Option<Self> {
        Some(Self { to: bytes(frame, 0)?, from: bytes(frame, 6)?, ethertype: be16(frame, 12)? })
    }
}

/// Where a fragment belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fragment {
    pub(super) id: u32,
    /// Of its payload in that of the whole, in bytes.
    pub(super) offset: usize,
    pub(super) more: bool,
}

/// An IP header, of either version.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ip {
    pub(super) from: IpAddr,
    pub(super) to: IpAddr,
    /// Of what follows the headers.
    pub(super) protocol: u8,
    pub(super) hops: u8,
    /// Where the payload begins, counted from the IP header.
    pub(super) header: usize,
    /// Length of the payload.
    pub(super) payload: usize,
    pub(super) fragment: Option<Fragment>,
}

/// Why a packet is not understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Malformed {
    /// More bytes from the start of the packet are needed: as many in all.
    Short(usize),
    /// It contradicts itself.
    Wrong,
}

impl Ip {
    /// Parses the header of a packet of `len` bytes, of which the first are in `head`.
    pub(super) fn parse(head: &[u8], len: usize) -> Result<Self, Malformed> {
        match head.first().map(|first| first >> 4) {
            Some(4) => Self::parse_v4(head, len),
            Some(6) => Self::parse_v6(head, len),
            Some(_) => Err(Malformed::Wrong),
            None => Err(Malformed::Short(1)),
        }
    }

    /// RFC 791, section 3.1.
    fn parse_v4(head: &[u8], len: usize) -> Result<Self, Malformed> {
        let fixed = head.first_chunk::<20>().ok_or(Malformed::Short(20))?;
        let header = usize::from(fixed[0] & 15) * 4;
        let total = usize::from(u16::from_be_bytes([fixed[2], fixed[3]]));
        if header < fixed.len() || total < header || total > len {
            return Err(Malformed::Wrong);
        }
        if head.len() < header {
            return Err(Malformed::Short(header));
        }
        let flags = u16::from_be_bytes([fixed[6], fixed[7]]);
        let (offset, more) = (usize::from(flags & 0x1fff) * 8, flags & 0x2000 != 0);
        let id = u16::from_be_bytes([fixed[4], fixed[5]]).into();
        Ok(Self {
            from: Ipv4Addr::new(fixed[12], fixed[13], fixed[14], fixed[15]).into(),
            to: Ipv4Addr::new(fixed[16], fixed[17], fixed[18], fixed[19]).into(),
            protocol: fixed[9],
            hops: fixed[8],
            header,
            payload: total - header,
            fragment: (offset > 0 || more).then_some(Fragment { id, offset, more }),
        })
    }

    /// RFC 8200, section 3.
    fn parse_v6(head: &[u8], len: usize) -> Result<Self, Malformed> {
        const FIXED: usize = 40;
        if head.len() < FIXED {
            return Err(Malformed::Short(FIXED));
        }
        let field = |at| bytes::<16>(head, at).map(Ipv6Addr::from).ok_or(Malformed::Wrong);
        let total = FIXED + usize::from(be16(head, 4).ok_or(Malformed::Wrong)?);
        if total > len {
            return Err(Malformed::Wrong);
        }
        let (mut next, mut header, mut fragment) = (head[6], FIXED, None);
        while matches!(next, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION) {
            let extension = bytes::<8>(head, header).ok_or(Malformed::Short(header + 8))?;
            if next == FRAGMENT {
                let place = u16::from_be_bytes([extension[2], extension[3]]);
                let id = be32(&extension, 4).unwrap_or(0);
                fragment = Some(Fragment { id, offset: usize::from(place & 0xfff8), more: place & 1 == 1 });
            }
            next = extension[0];
            header += if fragment.is_some() { 8 } else { 8 + 8 * usize::from(extension[1]) };
            if header > total {
                return Err(Malformed::Wrong);
            }
            // What follows is a part of the whole, and no header of this packet.
            if fragment.is_some() {
                break;
            }
        }
        Ok(Self {
            from: field(8)?.into(),
            to: field(24)?.into(),
            protocol: next,
            hops: head[7],
            header,
            payload: total - header,
            // A fragment that is the whole (RFC 6946).
            fragment: fragment.filter(|part| part.more || part.offset > 0),
        })
    }
}

/// Sums up 16-bit words for an Internet checksum (RFC 1071). Parts but the last have even lengths.
pub(super) fn sum(start: u64, bytes: &[u8]) -> u64 {
    let mut chunks = bytes.chunks_exact(4);
    let words = chunks.by_ref().map(|word| u32::from_be_bytes([word[0], word[1], word[2], word[3]]));
    // 2^32 words of 32 bits fit.
    let mut total = words.fold(start, |total, word| total + u64::from(word));
    let mut last = [0; 4];
    for (to, from) in last.iter_mut().zip(chunks.remainder()) {
        *to = *from;
    }
    total += u64::from(u32::from_be_bytes(last));
    total
}

/// The sum of [`sum`] in 16 bits, not inverted.
pub(super) fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // Checked by the loop.
    (sum & 0xffff) as u16
}

/// The sum of the pseudo header (RFC 9293, section 3.1; RFC 8200, section 8.1).
pub(super) fn pseudo(from: IpAddr, to: IpAddr, protocol: u8, len: usize) -> u64 {
    let address = |start, address| match address {
        IpAddr::V4(v4) => sum(start, &v4.octets()),
        IpAddr::V6(v6) => sum(start, &v6.octets()),
    };
    address(address(0, from), to) + u64::from(protocol) + len as u64
}

/// Where in the header of `protocol` its checksum is.
pub(super) fn checksum_offset(protocol: u8) -> Option<usize> {
    match protocol {
        TCP => Some(16),
        UDP => Some(6),
        ICMP | ICMPV6 => Some(2),
        _ => None,
    }
}

/// Sets the checksum of a `protocol` payload.
pub(super) fn set_checksum(from: IpAddr, to: IpAddr, protocol: u8, payload: &mut [u8]) {
    let Some(field) = checksum_offset(protocol) else { return };
    let Some(place) = payload.get_mut(field..field + 2) else { return };
    place.fill(0);
    let start = if protocol == ICMP { 0 } else { pseudo(from, to, protocol, payload.len()) };
    let sum = !fold(sum(start, payload));
    // RFC 768: an UDP checksum that comes out as zero is sent as ones.
    let sum = if sum == 0 && protocol == UDP { 0xffff } else { sum };
    payload[field..field + 2].copy_from_slice(&sum.to_be_bytes());
}

/// Length of the IP header of our packets between these addresses.
pub(super) fn ip_header_len(address: IpAddr) -> usize {
    if address.is_ipv4() { 20 } else { 40 }
}

/// The two ends of the guest's Ethernet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Link {
    pub(super) gateway: Mac,
    pub(super) guest: Mac,
}

/// An empty [`HEADER`], Ethernet and IP header for a payload of `len` bytes of `protocol`.
pub(super) fn headers(link: Link, from: IpAddr, to: IpAddr, protocol: u8, len: usize) -> Vec<u8> {
    let mut packet = Vec::with_capacity(HEADER + ETHERNET + 40 + len);
    packet.resize(HEADER, 0);
    packet.extend(destination(link, to));
    packet.extend(link.gateway);
    // A length beyond 16 bits is never asked for; it would be a malformed packet.
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            packet.extend(ETHERTYPE_IPV4.to_be_bytes());
            let total = u16::try_from(len + 20).unwrap_or(u16::MAX).to_be_bytes();
            // Not to be fragmented, which this network never does to a whole packet.
            let mut header = [0x45, 0, total[0], total[1], 0, 0, 0x40, 0, HOPS, protocol, 0, 0]
                .into_iter()
                .chain(from.octets())
                .chain(to.octets())
                .collect::<Vec<u8>>();
            let sum = !fold(sum(0, &header));
            header[10..12].copy_from_slice(&sum.to_be_bytes());
            packet.extend(header);
        }
        (from, to) => {
            packet.extend(ETHERTYPE_IPV6.to_be_bytes());
            packet.extend([0x60, 0, 0, 0]);
            packet.extend(u16::try_from(len).unwrap_or(u16::MAX).to_be_bytes());
            packet.extend([protocol, HOPS]);
            for address in [from, to] {
                match address {
                    IpAddr::V6(v6) => packet.extend(v6.octets()),
                    IpAddr::V4(v4) => packet.extend(v4.to_ipv6_mapped().octets()),
                }
            }
        }
    }
    packet
}

/// The Ethernet address for packets to `to`.
fn destination(link: Link, to: IpAddr) -> Mac {
    match to {
        IpAddr::V4(Ipv4Addr::BROADCAST) => [0xff; 6],
        // RFC 2464, section 7.
        IpAddr::V6(v6) if v6.is_multicast() => {
            let [.., a, b, c, d] = v6.octets();
            [0x33, 0x33, a, b, c, d]
        }
        _ => link.guest,
    }
}

/// A whole packet with `payload`, whose checksum is set.
pub(super) fn packet(link: Link, from: IpAddr, to: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = headers(link, from, to, protocol, payload.len());
    let start = packet.len();
    packet.extend(payload);
    set_checksum(from, to, protocol, &mut packet[start..]);
    packet
}

/// A whole packet in pieces that fit `mtu` (RFC 791, section 3.2; RFC 8200, section 4.5).
pub(super) fn packets(
    link: Link,
    (from, to): (IpAddr, IpAddr),
    protocol: u8,
    payload: &[u8],
    mtu: u16,
    id: u32,
) -> Vec<Vec<u8>> {
    let mtu = usize::from(mtu);
    if ip_header_len(to) + payload.len() <= mtu {
        return vec![packet(link, from, to, protocol, payload)];
    }
    let mut whole = payload.to_vec();
    set_checksum(from, to, protocol, &mut whole);
    let extension = if to.is_ipv4() { 0 } else { 8 };
    let each = mtu.saturating_sub(ip_header_len(to) + extension).max(8) / 8 * 8;
    let count = whole.len().div_ceil(each);
    let parts = whole.chunks(each).enumerate().map(|(number, part)| {
        let more = number + 1 < count;
        // At most 65,535 bytes, in units of 8.
        let place = u16::try_from(number * each / 8).unwrap_or(u16::MAX);
        if to.is_ipv4() {
            let mut packet = headers(link, from, to, protocol, part.len());
            let ip = &mut packet[HEADER + ETHERNET..];
            // The identification has 16 bits here.
            ip[4..6].copy_from_slice(&id.to_be_bytes()[2..]);
            ip[6..8].copy_from_slice(&(place | u16::from(more) << 13).to_be_bytes());
            ip[10..12].fill(0);
            let sum = !fold(sum(0, ip));
            ip[10..12].copy_from_slice(&sum.to_be_bytes());
            packet.extend(part);
            packet
        } else {
            let mut packet = headers(link, from, to, FRAGMENT, part.len() + extension);
            packet.extend([protocol, 0]);
            packet.extend((place << 3 | u16::from(more)).to_be_bytes());
            packet.extend(id.to_be_bytes());
            packet.extend(part);
            packet
        }
    });
    parts.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINK: Link = Link { gateway: [2; 6], guest: [4; 6] };
    const V4: (IpAddr, IpAddr) =
        (IpAddr::V4(Ipv4Addr::new(10, 0, 2, 2)), IpAddr::V4(Ipv4Addr::new(10, 0, 2, 15)));
    const V6: (IpAddr, IpAddr) = (
        IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1)),
        IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2)),
    );

    /// The checksum of a `protocol` payload is right.
    fn checksum_holds(from: IpAddr, to: IpAddr, protocol: u8, payload: &[u8]) -> bool {
        let start = if protocol == ICMP { 0 } else { pseudo(from, to, protocol, payload.len()) };
        fold(sum(start, payload)) == 0xffff
    }

    #[test]
    fn the_checksum_is_that_of_the_rfc() {
        // RFC 1071, section 3.
        assert_eq!(fold(sum(0, &[0, 1, 0xf2, 3, 0xf4, 0xf5, 0xf6, 0xf7])), 0xddf2);
        assert_eq!(fold(sum(0, &[1])), 0x100);
        assert_eq!(fold(sum(0, &[1, 2, 3])), 0x402);
        for (from, to) in [V4, V6] {
            for protocol in [TCP, UDP, ICMPV6] {
                let mut payload = (0..41).collect::<Vec<u8>>();
                set_checksum(from, to, protocol, &mut payload);
                assert!(checksum_holds(from, to, protocol, &payload));
                payload[30] ^= 1;
                assert!(!checksum_holds(from, to, protocol, &payload));
            }
        }
    }

    #[test]
    fn what_is_built_is_parsed() {
        for (from, to) in [V4, V6] {
            let packet = packet(LINK, from, to, UDP, &[7; 33]);
            let ethernet = Ethernet::parse(&packet[HEADER..]).unwrap();
            assert_eq!((ethernet.to, ethernet.from), (LINK.guest, LINK.gateway));
            let ip = Ip::parse(&packet[HEADER + ETHERNET..], packet.len() - HEADER - ETHERNET).unwrap();
            assert_eq!((ip.from, ip.to, ip.protocol, ip.payload), (from, to, UDP, 33));
            assert_eq!((ip.header, ip.fragment), (ip_header_len(to), None));
        }
    }

    #[test]
    fn pieces_make_up_the_whole_and_fit() {
        let payload = (0..5000).map(|n| (n % 251) as u8).collect::<Vec<u8>>();
        for ends in [V4, V6] {
            let pieces = packets(LINK, ends, UDP, &payload, 1280, 7);
            assert!(pieces.len() > 3);
            let mut whole = Vec::new();
            for (number, piece) in pieces.iter().enumerate() {
                let ip = &piece[HEADER + ETHERNET..];
                assert!(ip.len() <= 1280);
                let parsed = Ip::parse(ip, ip.len()).unwrap();
                let more = number + 1 < pieces.len();
                assert_eq!(parsed.fragment, Some(Fragment { id: 7, offset: whole.len(), more }));
                whole.extend(&ip[parsed.header..]);
            }
            assert!(checksum_holds(ends.0, ends.1, UDP, &whole));
            assert_eq!(whole[8..], payload[8..]);
        }
    }

    #[test]
    fn lengths_that_lie_are_refused() {
        let packet = packet(LINK, V4.0, V4.1, UDP, &[7; 33]);
        let ip = &packet[HEADER + ETHERNET..];
        assert_eq!(Ip::parse(ip, ip.len() - 1).unwrap_err(), Malformed::Wrong);
        assert_eq!(Ip::parse(&ip[..19], ip.len()).unwrap_err(), Malformed::Short(20));
        let with = |at: usize, value: u8| {
            let mut changed = ip.to_vec();
            changed[at] = value;
            Ip::parse(&changed, changed.len()).map(|_| ())
        };
        assert_eq!(with(0, 0x44), Err(Malformed::Wrong));
        assert_eq!(with(0, 0x4f), Err(Malformed::Wrong));
        assert_eq!(with(0, 0x50), Err(Malformed::Wrong));
        assert_eq!(with(3, 19), Err(Malformed::Wrong));
        // Extension headers without end.
        let mut six = headers(LINK, V6.0, V6.1, HOP_BY_HOP, 64);
        six.extend([0; 64]);
        let six = &six[HEADER + ETHERNET..];
        assert_eq!(Ip::parse(&six[..80], six.len()).unwrap_err(), Malformed::Short(88));
        assert_eq!(Ip::parse(six, six.len()).unwrap_err(), Malformed::Short(112));
    }
}
