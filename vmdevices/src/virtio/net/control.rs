//! The control queue (virtio 1.2, section 5.1.6.5).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET,
    VIRTIO_NET_CTRL_MAC_TABLE_SET, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_CTRL_RX,
    VIRTIO_NET_CTRL_RX_ALLMULTI, VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD, VIRTIO_NET_CTRL_VLAN_DEL,
    VIRTIO_NET_ERR, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MQ,
    VIRTIO_NET_OK,
};
use vmcore::GuestMemory;

use super::card::Card;
use super::filter::{Addresses, MOST_ADDRESSES};
use super::header::TO_GUEST;
use super::{Backend, Mac, is_station, lock};
use crate::buffers::Buffers;
use crate::virtio::device::{Progress, Worker};
use crate::virtio::queue::{Chain, QueueError, VirtQueue};

/// Commands before others on the same thread have a turn.
const TURN: usize = 16;

/// Serves the control queue.
pub(super) struct Control {
    pub(super) memory: GuestMemory,
    pub(super) queues: [VirtQueue; 1],
    pub(super) card: Arc<Card>,
    /// Of all pairs.
    pub(super) backends: Vec<Backend>,
    pub(super) features: u64,
}

impl Worker for Control {
    fn queues(&mut self) -> &mut [VirtQueue] {
        &mut self.queues
    }

    fn notify(&mut self, number: u16) -> Result<Progress, QueueError> {
        let map = self.memory.snapshot();
        let Self { queues: [queue], card, backends, features, .. } = self;
        let commands = Commands { card, backends, features: *features };
        queue.serve(&map, TURN, 1, |chain| commands.serve(number, chain))
    }
}

struct Commands<'a> {
    card: &'a Card,
    backends: &'a [Backend],
    features: u64,
}

impl Commands<'_> {
    /// Does what the command in `chain` says: class, command and data, and a byte to answer.
    fn serve(&self, queue: u16, chain: &mut Chain<'_>) -> Result<u32, QueueError> {
        if chain.writable.is_empty() {
            return Err(QueueError::Request { queue, what: "a control command without room for its answer" });
        }
        let mut command = [0; 2];
        let whole = chain.readable.read(&mut command) == command.len();
        let done = whole && self.act(command, &mut chain.readable).is_some();
        if !done {
            log::debug!("virtio-net: control command {command:?} refused");
        }
        let answer = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
        chain.writable.write(&[u8::try_from(answer).unwrap_or(u8::MAX)]);
        Ok(1)
    }

    fn has(&self, bit: u32) -> Option<()> {
        (self.features >> bit & 1 == 1).then_some(())
    }

    /// `None` where the command is not known, not agreed on, or its data is not right.
    fn act(&self, [class, command]: [u8; 2], data: &mut Buffers<'_>) -> Option<()> {
        match (u32::from(class), u32::from(command)) {
            (VIRTIO_NET_CTRL_RX, mode) => {
                let basic = mode <= VIRTIO_NET_CTRL_RX_ALLMULTI;
                self.has(if basic { VIRTIO_NET_F_CTRL_RX } else { VIRTIO_NET_F_CTRL_RX_EXTRA })?;
                let [on] = exactly(data)?;
                (on <= 1 && self.card.filter_mut().set_mode(command, on == 1)).then_some(())
            }
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET) => {
                self.has(VIRTIO_NET_F_CTRL_RX)?;
                let (unicast, multicast) = (addresses(data)?, addresses(data)?);
                if !data.is_empty() {
                    return None;
                }
                let mut filter = self.card.filter_mut();
                (filter.unicast, filter.multicast) = (unicast, multicast);
                Some(())
            }
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET) => {
                self.has(VIRTIO_NET_F_CTRL_MAC_ADDR)?;
                let mac = exactly(data).filter(is_station)?;
                self.card.filter_mut().mac = mac;
                Some(())
            }
            (VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD | VIRTIO_NET_CTRL_VLAN_DEL) => {
                self.has(VIRTIO_NET_F_CTRL_VLAN)?;
                let id = u16::from_le_bytes(exactly(data)?);
                let add = u32::from(command) == VIRTIO_NET_CTRL_VLAN_ADD;
                self.card.filter_mut().set_vlan(id, add).then_some(())
            }
            (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK) => {
                self.has(VIRTIO_NET_F_GUEST_ANNOUNCE)?;
                let [] = exactly(data)?;
                self.card.announce.store(false, Ordering::Release);
                Some(())
            }
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
                self.has(VIRTIO_NET_F_MQ)?;
                self.set_pairs(u16::from_le_bytes(exactly(data)?))
            }
            (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET) => {
                self.has(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)?;
                self.set_offloads(u64::from_le_bytes(exactly(data)?))
            }
            _ => None,
        }
    }

    fn set_pairs(&self, count: u16) -> Option<()> {
        if count == 0 || usize::from(count) > self.backends.len() {
            return None;
        }
        let old = self.card.pairs.load(Ordering::Acquire);
        // Once the command is done nothing comes by the others (section 5.1.6.5.5): their workers
        // look at this with their backends locked.
        self.card.pairs.store(count.min(old), Ordering::Release);
        if let Err(error) = enable(self.backends, count) {
            log::warn!("virtio-net: {count} queue pairs: {error}");
            return None;
        }
        self.card.pairs.store(count, Ordering::Release);
        Some(())
    }

    fn set_offloads(&self, wanted: u64) -> Option<()> {
        if wanted & !(self.features & TO_GUEST) != 0 {
            return None;
        }
        let old = self.card.chosen.swap(wanted, Ordering::AcqRel);
        let in_force = self.card.in_force(self.features);
        let result = self.backends.iter().try_for_each(|backend| lock(backend).set_features(in_force));
        if let Err(error) = result {
            log::warn!("virtio-net: offloads {in_force:#x}: {error}");
            self.card.chosen.store(old, Ordering::Release);
            return None;
        }
        Some(())
    }
}

/// Has packets come by the first `count` of `backends`.
pub(super) fn enable(backends: &[Backend], count: u16) -> std::io::Result<()> {
    let mut number = 0..;
    backends.iter().try_for_each(|backend| lock(backend).set_enabled(number.next() < Some(count)))
}

/// The data of a command that has `N` bytes.
fn exactly<const N: usize>(data: &mut Buffers<'_>) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    (data.len() == N).then(|| data.read(&mut bytes))?;
    Some(bytes)
}

/// A table of addresses (section 5.1.6.5.2), of which no more are looked at than are kept.
fn addresses(data: &mut Buffers<'_>) -> Option<Addresses> {
    let mut count = [0; 4];
    (data.read(&mut count) == count.len()).then_some(())?;
    let count = usize::try_from(u32::from_le_bytes(count)).ok()?;
    let len = count.checked_mul(size_of::<Mac>()).filter(|&len| len <= data.len())?;
    let mut table = data.take(len);
    let mut next = || {
        let mut mac = Mac::default();
        (table.read(&mut mac) == mac.len()).then_some(mac)
    };
    Some(Addresses::new(std::iter::from_fn(&mut next).take(MOST_ADDRESSES + 1)))
}
