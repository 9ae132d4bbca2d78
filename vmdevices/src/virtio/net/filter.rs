//! Which packets a card takes (virtio 1.2, sections 5.1.6.5.1 to 5.1.6.5.3).

use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_CTRL_RX_ALLMULTI, VIRTIO_NET_CTRL_RX_ALLUNI, VIRTIO_NET_CTRL_RX_NOBCAST,
    VIRTIO_NET_CTRL_RX_NOMULTI, VIRTIO_NET_CTRL_RX_NOUNI, VIRTIO_NET_CTRL_RX_PROMISC,
};

use super::Mac;

/// Addresses of each kind that are kept; with more the card takes all of that kind.
pub(super) const MOST_ADDRESSES: usize = 64;

/// Bytes of a frame that the filter looks at: addresses, type, and the VLAN's number.
pub(super) const LOOK: usize = 16;

/// EtherTypes of VLAN tags: IEEE 802.1Q and 802.1ad.
const TAGS: [[u8; 2]; 2] = [[0x81, 0x00], [0x88, 0xa8]];

const BROADCAST: Mac = [0xff; 6];

/// Addresses of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Addresses {
    list: Vec<Mac>,
    /// There were more than are kept.
    overflow: bool,
}

impl Addresses {
    /// As many of `addresses` as are kept.
    pub(super) fn new(mut addresses: impl Iterator<Item = Mac>) -> Self {
        let list = addresses.by_ref().take(MOST_ADDRESSES).collect();
        Self { list, overflow: addresses.next().is_some() }
    }

    fn take(&self, mac: &Mac) -> bool {
        self.overflow || self.list.contains(mac)
    }
}

/// What the driver asked for. Until it asks, every packet is taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Filter {
    pub(super) mac: Mac,
    promiscuous: bool,
    all_multicast: bool,
    all_unicast: bool,
    no_multicast: bool,
    no_unicast: bool,
    no_broadcast: bool,
    pub(super) unicast: Addresses,
    pub(super) multicast: Addresses,
    /// One bit for each VLAN; `None` where the driver does not care.
    vlans: Option<Vec<u64>>,
}

impl Filter {
    /// The filter of a card with address `mac` whose driver has not said anything.
    pub(super) fn new(mac: Mac) -> Self {
        Self {
            mac,
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            unicast: Addresses::default(),
            multicast: Addresses::default(),
            vlans: None,
        }
    }

    /// Whether the state makes sense: it may have been made by somebody else.
    pub(super) fn is_valid(&self) -> bool {
        let few = |addresses: &Addresses| addresses.list.len() <= MOST_ADDRESSES;
        few(&self.unicast) && few(&self.multicast) && self.vlans.as_ref().is_none_or(|bits| bits.len() == 64)
    }

    /// The driver is going to name its VLANs: none yet.
    pub(super) fn filter_vlans(&mut self) {
        self.vlans.get_or_insert_with(|| vec![0; 64]);
    }

    /// Packets of VLAN `id` are (not) to be taken. `false` where there is no such VLAN, or the
    /// driver is not to name any.
    pub(super) fn set_vlan(&mut self, id: u16, taken: bool) -> bool {
        let word = self.vlans.as_mut().and_then(|bits| bits.get_mut(usize::from(id / 64)));
        let Some(word) = word else { return false };
        let bit = 1 << (id % 64);
        *word = if taken { *word | bit } else { *word & !bit };
        true
    }

    /// Sets the mode that command `command` of class RX names. `false` where there is no such.
    pub(super) fn set_mode(&mut self, command: u8, on: bool) -> bool {
        let mode = match u32::from(command) {
            VIRTIO_NET_CTRL_RX_PROMISC => &mut self.promiscuous,
            VIRTIO_NET_CTRL_RX_ALLMULTI => &mut self.all_multicast,
            VIRTIO_NET_CTRL_RX_ALLUNI => &mut self.all_unicast,
            VIRTIO_NET_CTRL_RX_NOMULTI => &mut self.no_multicast,
            VIRTIO_NET_CTRL_RX_NOUNI => &mut self.no_unicast,
            VIRTIO_NET_CTRL_RX_NOBCAST => &mut self.no_broadcast,
            _ => return false,
        };
        *mode = on;
        true
    }

    /// Whether a frame that begins with `start` is to be taken.
    pub(super) fn takes(&self, start: &[u8; LOOK]) -> bool {
        if self.promiscuous {
            return true;
        }
        let [a, b, c, d, e, f, _, _, _, _, _, _, type0, type1, tag0, tag1] = *start;
        let to = [a, b, c, d, e, f];
        if let (Some(vlans), true) = (&self.vlans, TAGS.contains(&[type0, type1])) {
            let id = u16::from_be_bytes([tag0, tag1]) & 0xfff;
            // Number 0 is a priority, and of no VLAN (IEEE 802.1Q, 9.6).
            let bits = vlans.get(usize::from(id / 64)).copied().unwrap_or(0);
            if id != 0 && bits >> (id % 64) & 1 == 0 {
                return false;
            }
        }
        if to == BROADCAST {
            !self.no_broadcast
        } else if a & 1 == 1 {
            !self.no_multicast && (self.all_multicast || self.multicast.take(&to))
        } else {
            !self.no_unicast && (self.all_unicast || to == self.mac || self.unicast.take(&to))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Mac = [2, 0, 0, 0, 0, 1];
    const OTHER: Mac = [2, 0, 0, 0, 0, 2];
    const GROUP: Mac = [0x33, 0x33, 0, 0, 0, 1];

    fn frame(to: Mac, vlan: Option<u16>) -> [u8; LOOK] {
        let mut frame = [0; LOOK];
        frame[..6].copy_from_slice(&to);
        frame[12..14].copy_from_slice(&[8, 0]);
        if let Some(vlan) = vlan {
            frame[12..14].copy_from_slice(&[0x81, 0]);
            // With a priority.
            frame[14..].copy_from_slice(&(vlan | 0xa000).to_be_bytes());
        }
        frame
    }

    /// Which of own, other, group and broadcast packets are taken.
    fn taken(filter: &Filter) -> [bool; 4] {
        [OWN, OTHER, GROUP, BROADCAST].map(|to| filter.takes(&frame(to, None)))
    }

    #[test]
    fn modes_choose_packets_by_address() {
        let mut filter = Filter::new(OWN);
        assert_eq!(taken(&filter), [true; 4]);
        assert!(filter.set_mode(0, false));
        assert_eq!(taken(&filter), [true, false, false, true]);
        for (mode, expected) in [
            (1, [true, false, true, true]),
            (2, [true, true, false, true]),
            (3, [true, false, false, true]),
            (4, [false, false, false, true]),
            (5, [true, false, false, false]),
        ] {
            let mut filter = filter.clone();
            assert!(filter.set_mode(mode, true));
            assert_eq!(taken(&filter), expected, "{mode}");
        }
        filter.multicast = Addresses::new([GROUP].into_iter());
        filter.unicast = Addresses::new([OTHER].into_iter());
        assert_eq!(taken(&filter), [true; 4]);
        // Refusing goes before taking.
        filter.set_mode(3, true);
        filter.set_mode(1, true);
        assert_eq!(taken(&filter), [true, true, false, true]);
        assert!(!filter.set_mode(6, true));
    }

    #[test]
    fn more_addresses_than_are_kept_are_all() {
        let many = |count: u8| Addresses::new((0..count).map(|n| [2, 1, 0, 0, 0, n]));
        let mut filter = Filter::new(OWN);
        filter.set_mode(0, false);
        filter.unicast = many(64);
        assert_eq!(taken(&filter), [true, false, false, true]);
        assert!(filter.takes(&frame([2, 1, 0, 0, 0, 63], None)));
        filter.unicast = many(65);
        assert_eq!(taken(&filter), [true, true, false, true]);
        filter.multicast = many(65);
        assert_eq!(taken(&filter), [true; 4]);
        assert!(filter.is_valid());
    }

    #[test]
    fn vlans_are_taken_when_they_were_named() {
        let mut filter = Filter::new(OWN);
        filter.set_mode(0, false);
        assert!(filter.takes(&frame(OWN, Some(7))), "nobody filters");
        assert!(!filter.set_vlan(7, true), "and nobody may");
        filter.filter_vlans();
        assert!(!filter.takes(&frame(OWN, Some(7))) && filter.takes(&frame(OWN, Some(0))));
        assert!(filter.set_vlan(7, true) && filter.set_vlan(4095, true) && !filter.set_vlan(4096, true));
        assert!(filter.takes(&frame(OWN, Some(7))) && !filter.takes(&frame(OWN, Some(8))));
        assert!(!filter.takes(&frame(OTHER, Some(7))), "the address counts too");
        filter.set_vlan(7, false);
        assert!(!filter.takes(&frame(OWN, Some(7))) && filter.takes(&frame(OWN, Some(4095))));
        filter.set_mode(0, true);
        assert!(filter.takes(&frame(OWN, Some(7))));
    }
}
