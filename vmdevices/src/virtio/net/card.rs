//! What the parts of a card share: its driver's wishes, its link, its counters.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP,
};

use super::Mac;
use super::filter::Filter;
use super::header::{TO_GUEST, consistent};
use crate::virtio::device::Transport;

/// A network card in a running machine, for other threads: its link, its counters.
///
/// Clones are of the same card. It outlives the card and then does nothing.
#[derive(Clone, Debug)]
pub struct NetHandle(pub(super) Arc<Card>);

impl NetHandle {
    /// Plugs the cable in or pulls it out; the driver is told. Without link no packet goes in or out:
    /// those that come meanwhile are dropped.
    pub fn set_link(&self, up: bool) {
        if self.0.link.swap(up, Ordering::AcqRel) != up {
            self.0.config_changed();
        }
    }

    /// Whether the link is up.
    pub fn link(&self) -> bool {
        self.0.link.load(Ordering::Acquire)
    }

    /// Has the driver tell the network where its addresses are (gratuitous ARP), as it also does when
    /// the machine's state was restored: for a network that has changed behind the card. A driver
    /// that cannot (no VIRTIO_NET_F_GUEST_ANNOUNCE) does nothing.
    pub fn announce(&self) {
        self.0.announce();
    }

    /// The card's Ethernet address, which its driver may have changed.
    pub fn mac(&self) -> Mac {
        self.0.filter().mac
    }

    /// What has gone through the card until now.
    pub fn counters(&self) -> NetCounters {
        self.0.counters.get()
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Packets and bytes that went through a card since it was made, all its queues together. Bytes
        /// are those of Ethernet frames, without headers of virtio and checksums of Ethernet; a packet
        /// to be cut into segments counts once.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct NetCounters {
            $($(#[$doc])* pub $name: u64,)*
        }

        #[derive(Debug, Default)]
        pub(super) struct Counters {
            $(pub(super) $name: AtomicU64,)*
        }

        impl Counters {
            fn get(&self) -> NetCounters {
                NetCounters { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Packets that the guest received.
    received_packets,
    /// Bytes that the guest received.
    received_bytes,
    /// Packets for the guest that were lost: too long for its buffers, malformed, or without link.
    received_dropped,
    /// Packets that the driver did not ask for: other addresses, other VLANs.
    received_filtered,
    /// Packets that the guest sent.
    sent_packets,
    /// Bytes that the guest sent.
    sent_bytes,
    /// Packets from the guest that were lost: malformed, without link, or refused by the host.
    sent_dropped,
}

impl Counters {
    pub(super) fn count(&self, packets: &AtomicU64, bytes: &AtomicU64, len: usize) {
        packets.fetch_add(1, Ordering::Relaxed);
        bytes.fetch_add(len as u64, Ordering::Relaxed);
    }
}

/// Shared by the device, its workers and handles.
pub(super) struct Card {
    pub(super) link: AtomicBool,
    /// The driver is to announce itself.
    pub(super) announce: AtomicBool,
    /// Features agreed on; 0 while no driver is there.
    pub(super) features: AtomicU64,
    /// Queue pairs by which packets come.
    pub(super) pairs: AtomicU16,
    /// Offloads of received packets that the driver has not switched off.
    pub(super) chosen: AtomicU64,
    filter: RwLock<Filter>,
    transport: Mutex<Option<Arc<dyn Transport>>>,
    pub(super) counters: Counters,
}

impl Card {
    pub(super) fn new(mac: Mac) -> Self {
        Self {
            link: AtomicBool::new(true),
            announce: AtomicBool::new(false),
            features: AtomicU64::new(0),
            pairs: AtomicU16::new(1),
            chosen: AtomicU64::new(TO_GUEST),
            filter: RwLock::new(Filter::new(mac)),
            transport: Mutex::new(None),
            counters: Counters::default(),
        }
    }

    pub(super) fn filter(&self) -> RwLockReadGuard<'_, Filter> {
        self.filter.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn filter_mut(&self) -> RwLockWriteGuard<'_, Filter> {
        self.filter.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// A driver is there, with these features.
    pub(super) fn begin(&self, features: u64, transport: Arc<dyn Transport>) {
        self.features.store(features, Ordering::Release);
        *self.transport.lock().unwrap_or_else(PoisonError::into_inner) = Some(transport);
    }

    /// The driver is gone, and all that it asked for. What the embedder has set stays.
    fn end(&self, mac: Mac) {
        *self.filter_mut() = Filter::new(mac);
        self.features.store(0, Ordering::Release);
        self.announce.store(false, Ordering::Release);
        self.pairs.store(1, Ordering::Release);
        self.chosen.store(TO_GUEST, Ordering::Release);
    }

    /// The field `status` of the configuration (section 5.1.4).
    pub(super) fn status(&self) -> u16 {
        let set = |flag: &AtomicBool, bit: u32| if flag.load(Ordering::Acquire) { bit } else { 0 };
        let bits = set(&self.link, VIRTIO_NET_S_LINK_UP) | set(&self.announce, VIRTIO_NET_S_ANNOUNCE);
        u16::try_from(bits).unwrap_or(0)
    }

    pub(super) fn announce(&self) {
        if self.features.load(Ordering::Acquire) >> VIRTIO_NET_F_GUEST_ANNOUNCE & 1 == 1 {
            self.announce.store(true, Ordering::Release);
            self.config_changed();
        }
    }

    fn config_changed(&self) {
        let transport = self.transport.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(transport) = transport {
            transport.config_changed();
        }
    }

    /// The features in force: those agreed on without what the driver has switched off since.
    pub(super) fn in_force(&self, features: u64) -> u64 {
        consistent(features & (!TO_GUEST | self.chosen.load(Ordering::Acquire)))
    }
}

impl fmt::Debug for Card {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Card")
            .field("link", &self.link)
            .field("pairs", &self.pairs)
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}

/// The time of one driver, from activation to reset: what it asked for ends with it.
pub(super) struct Session {
    pub(super) card: Arc<Card>,
    /// The card's own address.
    pub(super) mac: Mac,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.card.end(self.mac);
    }
}
