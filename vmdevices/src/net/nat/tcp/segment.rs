//! TCP headers (RFC 9293, section 3.1).

use super::super::env::{Env, Key};
use super::super::wire::{self, TCP, be16, be32};

pub(in super::super) const FIN: u8 = 1;
pub(in super::super) const SYN: u8 = 2;
pub(in super::super) const RST: u8 = 4;
pub(in super::super) const PSH: u8 = 8;
pub(in super::super) const ACK: u8 = 16;

/// Length of a header without options.
pub(in super::super) const HEADER: usize = 20;

/// How far sequence number `a` is behind `b`: negative where it is before it (RFC 9293, section 3.4).
pub(in super::super) fn distance(a: u32, b: u32) -> i32 {
    a.wrapping_sub(b).cast_signed()
}

/// A header of the guest's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in super::super) struct Segment {
    pub(in super::super) from: u16,
    pub(in super::super) to: u16,
    pub(in super::super) seq: u32,
    pub(in super::super) ack: u32,
    pub(in super::super) flags: u8,
    pub(in super::super) window: u16,
    /// Length of the header.
    pub(in super::super) header: usize,
    /// Options of a SYN.
    pub(in super::super) mss: Option<u16>,
    pub(in super::super) scale: Option<u8>,
}

impl Segment {
    /// Parses the header at the start of `bytes`.
    pub(in super::super) fn parse(bytes: &[u8]) -> Option<Self> {
        let fixed = bytes.first_chunk::<HEADER>()?;
        let header = usize::from(fixed[12] >> 4) * 4;
        if header < HEADER {
            return None;
        }
        let mut segment = Self {
            from: be16(fixed, 0)?,
            to: be16(fixed, 2)?,
            seq: be32(fixed, 4)?,
            ack: be32(fixed, 8)?,
            flags: fixed[13],
            window: be16(fixed, 14)?,
            header,
            mss: None,
            scale: None,
        };
        let mut options = bytes.get(HEADER..header)?;
        loop {
            match options {
                [1, rest @ ..] => options = rest,
                // No more, or cut short: what was understood counts.
                [] | [0, ..] | [_] => break,
                [kind, len, ..] => {
                    let Some((option, rest)) = options.split_at_checked(usize::from(*len).max(2)) else {
                        break;
                    };
                    match (kind, option) {
                        (2, [_, _, high, low]) => segment.mss = Some(u16::from_be_bytes([*high, *low])),
                        // RFC 7323, section 2.3: more than 14 is 14.
                        (3, [_, _, shift]) => segment.scale = Some((*shift).min(14)),
                        _ => {}
                    }
                    options = rest;
                }
            }
        }
        Some(segment)
    }

    pub(in super::super) fn has(&self, flags: u8) -> bool {
        self.flags & flags == flags
    }
}

/// A header for the guest; its checksum is to be set.
pub(in super::super) fn header(
    key: &Key,
    seq: u32,
    ack: u32,
    flags: u8,
    window: u16,
    options: &[u8],
) -> Vec<u8> {
    let mut header = Vec::with_capacity(HEADER + options.len());
    header.extend(key.peer.1.to_be_bytes());
    header.extend(key.guest.1.to_be_bytes());
    header.extend(seq.to_be_bytes());
    header.extend(if flags & ACK != 0 { ack } else { 0 }.to_be_bytes());
    // Options are whole words, and few.
    header.push(u8::try_from((HEADER + options.len()) / 4).unwrap_or(15) << 4);
    header.push(flags);
    header.extend(window.to_be_bytes());
    header.extend([0; 4]);
    header.extend(options);
    header
}

/// A whole packet for the guest without data.
pub(in super::super) fn bare(
    env: &Env,
    key: &Key,
    (seq, ack): (u32, u32),
    flags: u8,
    window: u16,
    options: &[u8],
) -> Vec<u8> {
    let header = header(key, seq, ack, flags, window, options);
    wire::packet(env.link, key.peer.0, key.guest.0, TCP, &header)
}

/// The answer to a segment that belongs to nothing (RFC 9293, section 3.5.2), which had `len` bytes.
pub(in super::super) fn reset_for(env: &Env, key: &Key, segment: &Segment, len: usize) -> Option<Vec<u8>> {
    if segment.has(RST) {
        return None;
    }
    if segment.has(ACK) {
        return Some(bare(env, key, (segment.ack, 0), RST, 0, &[]));
    }
    // At most 65,535.
    let len = u32::try_from(len).unwrap_or(0);
    let flags = u32::from(segment.has(SYN)) + u32::from(segment.has(FIN));
    let ack = segment.seq.wrapping_add(len).wrapping_add(flags);
    Some(bare(env, key, (0, ack), RST | ACK, 0, &[]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PORTS: [u8; 4] = [0x12, 0x34, 0, 80];

    fn segment(options: &[u8]) -> Vec<u8> {
        let mut bytes = [&PORTS[..], &[0, 0, 0, 7, 0, 0, 0, 9], &[0, SYN, 1, 0, 0, 0, 0, 0]].concat();
        bytes[12] = u8::try_from((HEADER + options.len()) / 4).unwrap() << 4;
        bytes.extend(options);
        bytes
    }

    #[test]
    fn options_of_a_syn_are_found() {
        let all = [1, 2, 4, 5, 0xb4, 4, 2, 1, 3, 3, 7, 0];
        let parsed = Segment::parse(&segment(&all)).unwrap();
        assert_eq!((parsed.from, parsed.to, parsed.seq, parsed.ack, parsed.window), (0x1234, 80, 7, 9, 256));
        assert_eq!((parsed.mss, parsed.scale, parsed.header), (Some(1460), Some(7), 32));
        assert_eq!(Segment::parse(&segment(&[3, 3, 200, 0])).unwrap().scale, Some(14));
        // Lengths that lie.
        for options in [[2, 0, 0, 0], [2, 40, 0, 0], [1, 1, 1, 2], [0, 2, 4, 5]] {
            let parsed = Segment::parse(&segment(&options)).unwrap();
            assert_eq!((parsed.mss, parsed.scale), (None, None));
        }
        assert_eq!(Segment::parse(&segment(&all)[..31]), None);
        assert_eq!(Segment::parse(&[0; 20]), None);
    }

    proptest! {
        #[test]
        fn any_bytes_do_no_harm(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            if let Some(segment) = Segment::parse(&bytes) {
                prop_assert!((HEADER..=bytes.len()).contains(&segment.header));
            }
        }
    }

    #[test]
    fn sequence_numbers_go_round() {
        assert_eq!(distance(3, u32::MAX), 4);
        assert_eq!(distance(u32::MAX, 3), -4);
    }
}
