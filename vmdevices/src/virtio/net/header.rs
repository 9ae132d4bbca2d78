//! The header in front of each packet (virtio 1.2, section 5.1.6), checked before anybody acts on it.

use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_HOST_USO, VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN,
    VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP,
    VIRTIO_NET_HDR_GSO_UDP_L4,
};

use crate::net::HEADER;

/// Length of an Ethernet header in bytes, without VLAN tag.
pub(super) const ETHERNET: usize = 14;

const fn bits<const N: usize>(numbers: [u32; N]) -> u64 {
    let (mut bits, mut n) = (0, 0);
    while n < N {
        bits |= 1 << numbers[n];
        n += 1;
    }
    bits
}

/// Feature bits of packets to the guest that a driver can switch while it runs (section 5.1.6.5.6.1).
pub(super) const TO_GUEST: u64 = bits([
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
]);

/// Feature bits of packets from the guest.
const FROM_GUEST: u64 = bits([
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_HOST_USO,
]);

/// All offloads.
pub(super) const OFFLOADS: u64 = TO_GUEST | FROM_GUEST;

/// `features` without the offloads that need another one which is not there (section 5.1.3.1): a
/// driver that accepts such has to do without.
pub(super) fn consistent(features: u64) -> u64 {
    let requirements = [
        // What is left over, and which of these (one is enough) it needs.
        (bits([VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6]), bits([VIRTIO_NET_F_GUEST_CSUM])),
        (bits([VIRTIO_NET_F_GUEST_UFO]), bits([VIRTIO_NET_F_GUEST_CSUM])),
        (bits([VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6]), bits([VIRTIO_NET_F_GUEST_CSUM])),
        (bits([VIRTIO_NET_F_GUEST_ECN]), bits([VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6])),
        (bits([VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6]), bits([VIRTIO_NET_F_CSUM])),
        (bits([VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_HOST_USO]), bits([VIRTIO_NET_F_CSUM])),
        (bits([VIRTIO_NET_F_HOST_ECN]), bits([VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6])),
    ];
    let drop = |features: u64, (what, needs): (u64, u64)| {
        if features & needs == 0 { features & !what } else { features }
    };
    requirements.into_iter().fold(features, drop)
}

/// What packets of one direction may ask of the receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Offloads {
    checksum: bool,
    tcp4: bool,
    tcp6: bool,
    ecn: bool,
    /// Fragments of UDP datagrams.
    ufo: bool,
    /// Segments of UDP datagrams, of IPv4 or IPv6.
    uso: bool,
}

impl Offloads {
    /// Those of packets from the guest.
    pub(super) fn from_guest(features: u64) -> Self {
        let has = |bit: u32| features >> bit & 1 == 1;
        Self {
            checksum: has(VIRTIO_NET_F_CSUM),
            tcp4: has(VIRTIO_NET_F_HOST_TSO4),
            tcp6: has(VIRTIO_NET_F_HOST_TSO6),
            ecn: has(VIRTIO_NET_F_HOST_ECN),
            ufo: has(VIRTIO_NET_F_HOST_UFO),
            uso: has(VIRTIO_NET_F_HOST_USO),
        }
    }

    /// Those of packets to the guest.
    pub(super) fn to_guest(features: u64) -> Self {
        let has = |bit: u32| features >> bit & 1 == 1;
        Self {
            checksum: has(VIRTIO_NET_F_GUEST_CSUM),
            tcp4: has(VIRTIO_NET_F_GUEST_TSO4),
            tcp6: has(VIRTIO_NET_F_GUEST_TSO6),
            ecn: has(VIRTIO_NET_F_GUEST_ECN),
            ufo: has(VIRTIO_NET_F_GUEST_UFO),
            uso: has(VIRTIO_NET_F_GUEST_USO4) || has(VIRTIO_NET_F_GUEST_USO6),
        }
    }

    /// Whether packets may be as long as IP allows.
    pub(super) fn large(self) -> bool {
        self.tcp4 || self.tcp6 || self.ufo || self.uso
    }

    /// The header of a packet of `frame` bytes behind it, without what does not concern the
    /// receiver; `None` where it asks for what was not agreed on or makes no sense, so that the
    /// packet is to be dropped.
    pub(super) fn check(self, header: [u8; HEADER], frame: usize) -> Option<[u8; HEADER]> {
        let [flags, gso_type, h0, h1, s0, s1, b0, b1, o0, o1, _, _] = header;
        let (flags, kind) = (u32::from(flags), u32::from(gso_type));
        let mut checked = [0; HEADER];
        if flags & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0 {
            let (start, offset) = (u16::from_le_bytes([b0, b1]), u16::from_le_bytes([o0, o1]));
            let end = usize::from(start) + usize::from(offset) + 2;
            if !self.checksum || usize::from(start) < ETHERNET || end > frame {
                return None;
            }
            checked[0] = 1;
            checked[6..10].copy_from_slice(&[b0, b1, o0, o1]);
        } else if flags & VIRTIO_NET_HDR_F_DATA_VALID != 0 && self.checksum {
            checked[0] = 2;
        }
        if kind == VIRTIO_NET_HDR_GSO_NONE {
            return Some(checked);
        }
        let ecn = kind & VIRTIO_NET_HDR_GSO_ECN != 0;
        let (agreed, tcp) = match kind & !VIRTIO_NET_HDR_GSO_ECN {
            VIRTIO_NET_HDR_GSO_TCPV4 => (self.tcp4, true),
            VIRTIO_NET_HDR_GSO_TCPV6 => (self.tcp6, true),
            VIRTIO_NET_HDR_GSO_UDP => (self.ufo, false),
            VIRTIO_NET_HDR_GSO_UDP_L4 => (self.uso, false),
            _ => (false, false),
        };
        let (headers, segment) = (u16::from_le_bytes([h0, h1]), u16::from_le_bytes([s0, s1]));
        // Section 5.1.6.2: segments need a checksum each, some bytes, and header lengths that are
        // within the packet; those are a hint.
        let sound = checked[0] == 1 && segment > 0 && usize::from(headers) <= frame;
        if !agreed || !sound || ecn && !(tcp && self.ecn) {
            return None;
        }
        checked[1..6].copy_from_slice(&[gso_type, h0, h1, s0, s1]);
        Some(checked)
    }
}

/// Whether the packet is to be cut into segments.
pub(super) fn segmented(header: [u8; HEADER]) -> bool {
    header[1] != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: Offloads =
        Offloads { checksum: true, tcp4: true, tcp6: true, ecn: true, ufo: true, uso: true };
    const NONE: Offloads =
        Offloads { checksum: false, tcp4: false, tcp6: false, ecn: false, ufo: false, uso: false };

    /// flags, type, header length, segment size, checksum's start and offset.
    fn header(flags: u8, kind: u8, fields: [u16; 4]) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        header[..2].copy_from_slice(&[flags, kind]);
        for (place, field) in header[2..10].chunks_exact_mut(2).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        header
    }

    #[test]
    fn what_was_agreed_on_goes_through_and_nothing_else() {
        let segments = header(1, 1, [54, 1448, 34, 16]);
        assert_eq!(ALL.check(segments, 3000), Some(segments));
        assert_eq!(Offloads { tcp4: false, ..ALL }.check(segments, 3000), None);
        assert_eq!(Offloads { checksum: false, ..ALL }.check(segments, 3000), None);
        for (kind, lacking) in [
            (4, Offloads { tcp6: false, ..ALL }),
            (3, Offloads { ufo: false, ..ALL }),
            (5, Offloads { uso: false, ..ALL }),
            (0x81, Offloads { ecn: false, ..ALL }),
        ] {
            let header = header(1, kind, [54, 1448, 34, 16]);
            assert_eq!(
                (ALL.check(header, 3000), lacking.check(header, 3000)),
                (Some(header), None),
                "{kind}"
            );
        }
        assert_eq!(NONE.check(header(0, 0, [0; 4]), 60), Some([0; HEADER]));
        assert_eq!(NONE.check(header(1, 0, [0, 0, 34, 16]), 60), None);
        // What one side says of a checksum it has looked at concerns only those who listen.
        assert_eq!(ALL.check(header(2, 0, [0; 4]), 60), Some(header(2, 0, [0; 4])));
        assert_eq!(NONE.check(header(2, 0, [0; 4]), 60), Some([0; HEADER]));
    }

    #[test]
    fn absurd_headers_are_refused() {
        for (header, why) in [
            (header(1, 0, [0, 0, 34, 25]), "the checksum behind the end"),
            (header(1, 0, [0, 0, 0xffff, 0xffff]), "the checksum far behind"),
            (header(1, 0, [0, 0, 13, 16]), "the checksum of addresses"),
            (header(1, 1, [54, 0, 34, 16]), "segments of no bytes"),
            (header(0, 1, [54, 1448, 34, 16]), "segments without checksum"),
            (header(1, 1, [61, 1448, 34, 16]), "headers longer than the packet"),
            (header(1, 2, [54, 1448, 34, 16]), "no such type"),
            (header(1, 6, [54, 1448, 34, 16]), "no such type"),
            (header(1, 0x80, [54, 1448, 34, 16]), "congestion of nothing"),
            (header(1, 0x83, [54, 1448, 34, 16]), "congestion of UDP"),
            (header(1, 0xff, [54, 1448, 34, 16]), "everything"),
        ] {
            assert_eq!(ALL.check(header, 60), None, "{why}");
        }
    }

    #[test]
    fn offloads_without_what_they_need_are_not_there() {
        assert_eq!(consistent(OFFLOADS), OFFLOADS);
        assert_eq!(consistent(OFFLOADS & !(1 << VIRTIO_NET_F_GUEST_CSUM)), FROM_GUEST);
        assert_eq!(consistent(OFFLOADS & !(1 << VIRTIO_NET_F_CSUM)), TO_GUEST);
        assert_eq!(consistent(1 << 13 | 1 << 9 | 1 << 15 | 1 | 2), 1 << 15 | 1 | 2);
        assert_eq!(consistent(1 << 13 | 1 << 12 | 1), 1 << 13 | 1 << 12 | 1);
    }

    proptest! {
        /// Whatever goes through, the receiver can do, and it is within the packet.
        #[test]
        fn checked_headers_are_sound(bytes in any::<[u8; HEADER]>(), frame in ETHERNET..70_000, features in any::<u64>()) {
            let offloads = Offloads::from_guest(consistent(features));
            let Some(checked) = offloads.check(bytes, frame) else { return Ok(()) };
            prop_assert_eq!(offloads.check(checked, frame), Some(checked));
            let field = |at: usize| usize::from(u16::from_le_bytes([checked[at], checked[at + 1]]));
            if checked[0] & 1 == 1 {
                prop_assert!(offloads.checksum && field(6) + field(8) + 2 <= frame);
            }
            prop_assert!(!segmented(checked) || checked[0] == 1 && field(4) > 0 && offloads.large());
            prop_assert_eq!(&checked[10..], &[0, 0]);
        }
    }
}
