//! Putting fragments together (RFC 791, section 3.2; RFC 8200, section 4.5), within bounds.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::wire::{Fragment, Ip};

/// Packets under way at once.
const MOST_PACKETS: usize = 16;

/// Fragments of one packet: 65,535 bytes in pieces of what IPv6 carries everywhere, and some more.
const MOST_FRAGMENTS: usize = 64;

/// The largest payload of IP.
const MOST_BYTES: usize = 65_535;

/// How long all fragments of a packet may take. The guest sends them back to back.
const PATIENCE: Duration = Duration::from_secs(5);

/// To what packet a fragment belongs.
type Key = (IpAddr, IpAddr, u8, u32);

#[derive(Debug)]
struct Packet {
    since: Instant,
    bytes: Vec<u8>,
    /// What is there, as (offset, end).
    parts: Vec<(usize, usize)>,
    /// Length of the whole, known from the last fragment.
    len: Option<usize>,
}

/// Packets whose fragments have not all come.
#[derive(Debug, Default)]
pub(super) struct Reassembly {
    packets: HashMap<Key, Packet>,
}

impl Reassembly {
    /// Takes a fragment with its payload; gives the payload of the whole packet when that is there.
    pub(super) fn add(&mut self, ip: &Ip, part: Fragment, payload: &[u8], now: Instant) -> Option<Vec<u8>> {
        self.packets.retain(|_, packet| now.saturating_duration_since(packet.since) < PATIENCE);
        let key = (ip.from, ip.to, ip.protocol, part.id);
        let end = part.offset + payload.len();
        // Only the last may have a length that is no multiple of 8, and none is empty.
        if end > MOST_BYTES || payload.is_empty() || part.more && !payload.len().is_multiple_of(8) {
            self.packets.remove(&key);
            return None;
        }
        if !self.packets.contains_key(&key) && self.packets.len() >= MOST_PACKETS {
            let oldest = self.packets.iter().min_by_key(|(_, packet)| packet.since).map(|(key, _)| *key);
            oldest.map(|key| self.packets.remove(&key));
        }
        let packet = self.packets.entry(key).or_insert_with(|| Packet {
            since: now,
            bytes: Vec::new(),
            parts: Vec::new(),
            len: None,
        });
        let same = packet.parts.contains(&(part.offset, end));
        let overlaps = packet.parts.iter().any(|&(from, to)| part.offset < to && from < end);
        let beyond = packet.len.is_some_and(|len| end > len || !part.more && end != len);
        let early = !part.more && packet.parts.iter().any(|&(_, to)| to > end);
        // Overlaps are an attack (RFC 5722): the whole packet goes. Fragments may come twice.
        if !same && (overlaps || beyond || early) || packet.parts.len() >= MOST_FRAGMENTS {
            self.packets.remove(&key);
            return None;
        }
        if !same {
            packet.parts.push((part.offset, end));
            if packet.bytes.len() < end {
                packet.bytes.resize(end, 0);
            }
            packet.bytes[part.offset..end].copy_from_slice(payload);
        }
        if !part.more {
            packet.len = Some(end);
        }
        // Without overlaps, as many bytes as there are in all are all of them.
        let there = packet.parts.iter().map(|(from, to)| to - from).sum::<usize>();
        if packet.len != Some(there) {
            return None;
        }
        self.packets.remove(&key).map(|packet| packet.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::Ipv4Addr;

    fn ip(id: u32) -> (Ip, u32) {
        let from = Ipv4Addr::new(10, 0, 2, 15).into();
        let to = Ipv4Addr::new(192, 0, 2, 1).into();
        (Ip { from, to, protocol: 17, hops: 64, header: 20, payload: 0, fragment: None }, id)
    }

    fn add(all: &mut Reassembly, id: u32, offset: usize, more: bool, payload: &[u8]) -> Option<Vec<u8>> {
        let (ip, id) = ip(id);
        all.add(&ip, Fragment { id, offset, more }, payload, Instant::now())
    }

    proptest! {
        #[test]
        fn any_order_and_repetition_gives_the_whole(
            len in 1_usize..4000, order in proptest::collection::vec(0_usize..64, 200)
        ) {
            let whole = (0..len).map(|n| (n % 253) as u8).collect::<Vec<_>>();
            let parts = whole.chunks(104).collect::<Vec<_>>();
            let mut all = Reassembly::default();
            let mut seen = vec![false; parts.len()];
            for number in order.into_iter().map(|n| n % parts.len()).chain(0..parts.len()) {
                seen[number] = true;
                let more = number + 1 < parts.len();
                let done = add(&mut all, 1, number * 104, more, parts[number]);
                if seen.iter().all(|&seen| seen) {
                    prop_assert_eq!(done, Some(whole));
                    break;
                }
                prop_assert_eq!(done, None);
            }
            prop_assert!(all.packets.is_empty());
        }

        #[test]
        fn nothing_does_harm(
            parts in proptest::collection::vec((0_u32..40, 0_usize..9000, any::<bool>(), 0_usize..600), 300)
        ) {
            let mut all = Reassembly::default();
            for (id, offset, more, len) in parts {
                let done = add(&mut all, id, offset * 8, more, &vec![1; len]);
                // What was never sent is in no packet.
                prop_assert!(done.is_none_or(|bytes| bytes.iter().all(|&byte| byte == 1)));
                prop_assert!(all.packets.len() <= MOST_PACKETS);
                prop_assert!(all.packets.values().all(|p| p.bytes.len() <= MOST_BYTES && p.parts.len() <= MOST_FRAGMENTS));
            }
        }
    }

    #[test]
    fn overlaps_and_contradictions_discard_the_packet() {
        let mut all = Reassembly::default();
        for (second, more, len) in [(8, false, 16), (0, true, 24), (16, true, 7)] {
            add(&mut all, 1, 0, true, &[1; 16]);
            add(&mut all, 1, second, more, &vec![2; len]);
            assert!(all.packets.is_empty(), "{second}");
        }
        add(&mut all, 1, 16, false, &[1; 8]);
        add(&mut all, 1, 24, true, &[1; 8]);
        assert!(all.packets.is_empty(), "behind the last");
        add(&mut all, 1, 65_528, true, &[1; 16]);
        assert!(all.packets.is_empty(), "beyond what IP carries");
    }

    #[test]
    fn what_never_ends_makes_room() {
        let mut all = Reassembly::default();
        for id in 0..100 {
            add(&mut all, id, 0, true, &[1; 8]);
        }
        assert_eq!(all.packets.len(), MOST_PACKETS);
        let later = Instant::now() + 2 * PATIENCE;
        let (ip, id) = ip(1000);
        all.add(&ip, Fragment { id, offset: 0, more: true }, &[1; 8], later);
        assert_eq!(all.packets.len(), 1);
    }
}
