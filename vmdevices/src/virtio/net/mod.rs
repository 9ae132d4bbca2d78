//! virtio-net: network cards (virtio 1.2, section 5.1).
//!
//! A card has one or several pairs of queues, each with a back end of its own, and a control queue.
//! Each pair is a worker ([`pair`]), so that pairs run on different I/O threads; the control queue is
//! one more ([`control`]). What they share is the [`card`]: the driver's filter, the link, counters.
//! Headers are checked in both directions ([`header`]) and packets for the guest filtered
//! ([`filter`]) here, whatever the back end is.

mod card;
mod control;
mod filter;
mod header;
mod pair;
#[cfg(test)]
mod tests;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_SPEED_DUPLEX,
    VIRTIO_NET_F_STATUS,
};
use vmcore::{Error, Machine, Result};

use self::card::{Card, Session};
use self::control::Control;
use self::filter::Filter;
use self::header::{OFFLOADS, TO_GUEST};
use self::pair::{Pair, Parts};
use super::device::{Activation, DeviceType, VirtioDevice, Worker, read_config_bytes};
use crate::net::{Capture, Limiter, Nat, NetBackend, Tap, TapError, alone as lock};
use crate::saved;

pub use self::card::{NetCounters, NetHandle};

const QUEUE_SIZE: u16 = 256;

/// The control queue's size: commands go one by one, of a few descriptors each.
const CONTROL_SIZE: u16 = 64;

/// Most pairs of queues: what a tap interface of Linux has.
const MOST_PAIRS: usize = 256;

/// The smallest MTU of IPv4 (RFC 791).
const LEAST_MTU: u16 = 68;

/// Speed and duplex where they are not known (section 5.1.4).
const UNKNOWN: (u32, u8) = (u32::MAX, u8::MAX);

/// Full duplex (section 5.1.4).
const FULL: u8 = 1;

const WHAT: &str = "a network card";
const STATE_VERSION: u8 = 1;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// The network behind one pair of queues: its worker's while the device is active, kept here over
/// resets.
type Backend = Arc<Mutex<dyn NetBackend>>;

/// A network card (virtio 1.2, section 5.1).
///
/// It has as many pairs of queues as back ends. On I/O threads pairs are served at the same time.
/// Offloads are those that all its back ends have; with others it offers none of them to the guest,
/// which then makes whole packets with checksums.
///
/// ```no_run
/// # fn main() -> vmcore::Result<()> {
/// use vmdevices::{Net, net::Tap};
///
/// // One queue for each of four vCPUs.
/// let card = Net::multiqueue(Tap::open_queues("tap0", 4)?)?.mac([2, 0, 0, 0, 0, 1])?;
/// let handle = card.handle();
/// // In a thread of the embedder, once the machine runs:
/// handle.set_link(false);
/// println!("{} packets", handle.counters().received_packets);
/// # Ok(())
/// # }
/// ```
pub struct Net {
    backends: Vec<Backend>,
    features: u64,
    mac: Mac,
    mtu: Option<u16>,
    speed: Option<u32>,
    card: Arc<Card>,
    /// The state was restored and no driver has begun since: it is to announce itself.
    moved: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct State {
    filter: Filter,
    link: bool,
    announce: bool,
    pairs: u16,
    offloads: u64,
    backends: Vec<Vec<u8>>,
}

impl std::fmt::Debug for Net {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Net")
            .field("mac", &self.mac)
            .field("mtu", &self.mtu)
            .field("pairs", &self.backends.len())
            .finish_non_exhaustive()
    }
}

impl Net {
    /// A card on `backend`, with a random address of its own.
    ///
    /// # Errors
    /// Where the host has no random numbers.
    pub fn new(backend: impl NetBackend + 'static) -> Result<Self> {
        Self::multiqueue([backend])
    }

    /// A card with a pair of queues for each of `backends`, which lead to the same network: the driver
    /// sends by any, and packets may come by any that it [uses](NetBackend::set_enabled).
    ///
    /// # Errors
    /// [`Error::Config`] where there are none, or more than 256; where the host has no random
    /// numbers.
    pub fn multiqueue<B: NetBackend + 'static>(backends: impl IntoIterator<Item = B>) -> Result<Self> {
        let backends: Vec<_> = backends.into_iter().collect();
        if backends.is_empty() || backends.len() > MOST_PAIRS {
            return Err(Error::Config {
                what: "queue pairs of a network card",
                value: backends.len().to_string(),
                fix: format!("give 1 to {MOST_PAIRS} back ends"),
            });
        }
        let mut mac = [0; 6];
        rustix::rand::getrandom(&mut mac, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| Error::os("getrandom", "an Ethernet address", error))?;
        // Locally administered, and of one station (IEEE 802, 8.2).
        mac[0] = mac[0] & 0xfc | 2;
        let features = backends.iter().fold(OFFLOADS, |common, backend| common & backend.features());
        let mtu = backends.iter().filter_map(NetBackend::mtu).min();
        let backends = backends.into_iter().map(|backend| Arc::new(Mutex::new(backend)) as Backend).collect();
        let card = Arc::new(Card::new(mac));
        Ok(Self { backends, features, mac, mtu, speed: None, card, moved: false })
    }

    /// A card on the tap interface `name` of the host.
    ///
    /// # Errors
    /// As [`Tap::open`].
    pub fn tap(name: &str) -> Result<Self> {
        Self::new(Tap::open(name).map_err(|error: TapError| Error::from(error))?)
    }

    /// A card on a network of the guest's own behind this process, which needs no privilege.
    ///
    /// # Errors
    /// As [`Net::new`].
    pub fn nat(nat: Nat) -> Result<Self> {
        Self::new(nat)
    }

    /// Gives the card the address `mac`.
    ///
    /// # Errors
    /// [`Error::Config`] where it is a group's address, or zero.
    pub fn mac(mut self, mac: Mac) -> Result<Self> {
        if !is_station(&mac) {
            return Err(Error::Config {
                what: "Ethernet address",
                value: format!("{mac:02x?}"),
                fix: "give one of a single station: the first byte is even, and not all are 0".into(),
            });
        }
        self.mac = mac;
        *self.card.filter_mut() = Filter::new(mac);
        Ok(self)
    }

    /// Tells the guest that the largest IP packet has `mtu` bytes, instead of what the back end says.
    /// Longer ones do not get to it.
    ///
    /// # Errors
    /// [`Error::Config`] below 68.
    pub fn mtu(mut self, mtu: u16) -> Result<Self> {
        self.set_mtu(mtu)?;
        Ok(self)
    }

    /// As [`Net::mtu`], in place.
    ///
    /// # Errors
    /// As there; nothing is changed then.
    pub fn set_mtu(&mut self, mtu: u16) -> Result<()> {
        if mtu < LEAST_MTU {
            return Err(Error::Config {
                what: "MTU of a network card",
                value: mtu.to_string(),
                fix: format!("give {LEAST_MTU} to 65535 bytes"),
            });
        }
        self.mtu = Some(mtu);
        Ok(())
    }

    /// Tells the guest that the link has `megabits` per second, in both directions at once. It is told
    /// no speed otherwise. This limits nothing; see [`Net::limit`].
    pub fn speed(mut self, megabits: u32) -> Self {
        // Section 5.1.4: 0 to 0x7fffffff.
        self.speed = Some(megabits.min(u32::MAX >> 1));
        self
    }

    /// Records what goes through all queues of the card with `capture`, as [`Capture::record`] does with a back
    /// end.
    pub fn record(mut self, capture: &Capture) -> Self {
        let recorded = |backend| Arc::new(Mutex::new(capture.record(backend))) as Backend;
        self.backends = self.backends.into_iter().map(recorded).collect();
        self
    }

    /// Limits what goes through all queues of the card with `limiter`, as [`Limiter::limit`] does with a back end. What
    /// is [recorded](Net::record) after that is what has got through.
    ///
    /// # Errors
    /// As [`Limiter::limit`].
    pub fn limit(mut self, limiter: &Limiter) -> Result<Self> {
        self.set_limit(limiter)?;
        Ok(self)
    }

    /// As [`Net::limit`], in place.
    ///
    /// # Errors
    /// As there; nothing is changed then.
    pub fn set_limit(&mut self, limiter: &Limiter) -> Result<()> {
        let limited =
            |backend: &Backend| Ok(Arc::new(Mutex::new(limiter.limit(backend.clone())?)) as Backend);
        self.backends = self.backends.iter().map(limited).collect::<Result<_>>()?;
        Ok(())
    }

    /// The card in the running machine, for other threads.
    pub fn handle(&self) -> NetHandle {
        NetHandle(self.card.clone())
    }
}

/// Whether `mac` is the address of one station.
fn is_station(mac: &Mac) -> bool {
    mac[0] & 1 == 0 && *mac != Mac::default()
}

impl VirtioDevice for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType::NET
    }

    fn features(&self) -> u64 {
        let always = [
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_STATUS,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_CTRL_VQ,
            VIRTIO_NET_F_CTRL_RX,
            VIRTIO_NET_F_CTRL_RX_EXTRA,
            VIRTIO_NET_F_CTRL_VLAN,
            VIRTIO_NET_F_CTRL_MAC_ADDR,
            VIRTIO_NET_F_GUEST_ANNOUNCE,
        ];
        let here = [
            (self.backends.len() > 1, VIRTIO_NET_F_MQ),
            (self.mtu.is_some(), VIRTIO_NET_F_MTU),
            (self.speed.is_some(), VIRTIO_NET_F_SPEED_DUPLEX),
            (self.features & TO_GUEST != 0, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS),
        ];
        let here = here.into_iter().filter_map(|(is, bit)| is.then_some(bit));
        always.into_iter().chain(here).fold(self.features, |bits, bit| bits | 1 << bit)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![QUEUE_SIZE; 2 * self.backends.len()];
        sizes.push(CONTROL_SIZE);
        sizes
    }

    fn threads(&self) -> usize {
        self.backends.len()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // Section 5.1.4: address, status, number of queue pairs, MTU, speed, duplex.
        let mut config = [0; 17];
        let (speed, duplex) = self.speed.map_or(UNKNOWN, |speed| (speed, FULL));
        config[..6].copy_from_slice(&self.card.filter().mac);
        config[6..8].copy_from_slice(&self.card.status().to_le_bytes());
        config[8..10].copy_from_slice(&u16::try_from(self.backends.len()).unwrap_or(1).to_le_bytes());
        config[10..12].copy_from_slice(&self.mtu.unwrap_or(0).to_le_bytes());
        config[12..16].copy_from_slice(&speed.to_le_bytes());
        config[16] = duplex;
        read_config_bytes(&config, offset, data);
    }

    fn attached(&mut self, machine: &mut Machine) -> Result<()> {
        if machine.is_deterministic() {
            return Err(Error::Config {
                what: "network card",
                value: "on a deterministic VM".into(),
                fix: "leave it out: packets come when the host's network has them".into(),
            });
        }
        Ok(())
    }

    fn activate(&mut self, activation: Activation) -> Result<Vec<Box<dyn Worker>>> {
        let multiqueue = activation.has(VIRTIO_NET_F_MQ);
        let (merge, mtu) = (activation.has(VIRTIO_NET_F_MRG_RXBUF), activation.has(VIRTIO_NET_F_MTU));
        let has_control = activation.has(VIRTIO_NET_F_CTRL_VQ);
        let has_announce = activation.has(VIRTIO_NET_F_GUEST_ANNOUNCE);
        let Activation { memory, features, queues, transport, .. } = activation;
        let card = &self.card;
        let session = Session { card: card.clone(), mac: self.mac };
        card.begin(features, transport);
        if features >> VIRTIO_NET_F_CTRL_VLAN & 1 == 1 {
            card.filter_mut().filter_vlans();
        }
        let in_force = card.in_force(features);
        for backend in &self.backends {
            lock(backend)
                .set_features(in_force)
                .map_err(|error| Error::os("setting network offloads", "", error))?;
        }
        control::enable(&self.backends, card.pairs.load(Ordering::Acquire))
            .map_err(|error| Error::os("enabling network queues", "", error))?;
        if std::mem::take(&mut self.moved) && has_announce {
            card.announce();
        }

        // Section 5.1.2: without multiqueue there is one pair, and the control queue behind it.
        let pairs = if multiqueue { self.backends.len() } else { 1 };
        let mut queues = queues.into_iter();
        let mut session = Some(session);
        let mut workers: Vec<Box<dyn Worker>> = Vec::new();
        for (number, backend) in (0..).zip(self.backends.iter().take(pairs)) {
            let (Some(receive), Some(transmit)) = (queues.next(), queues.next()) else { break };
            workers.push(Box::new(Pair::new(Parts {
                number,
                memory: memory.clone(),
                receive,
                transmit,
                backend: backend.clone(),
                card: card.clone(),
                features,
                merge,
                mtu: self.mtu.filter(|_| mtu),
                session: session.take(),
            })?));
        }
        if let (Some(queue), true) = (queues.next(), has_control) {
            workers.push(Box::new(Control {
                memory,
                queues: [queue],
                card: card.clone(),
                backends: self.backends.iter().take(pairs).cloned().collect(),
                features,
            }));
        }
        Ok(workers)
    }

    fn save(&self) -> Result<Vec<u8>> {
        let card = &self.card;
        let backends = self.backends.iter().map(|backend| lock(backend).save_state());
        let state = State {
            filter: card.filter().clone(),
            link: card.link.load(Ordering::Acquire),
            announce: card.announce.load(Ordering::Acquire),
            pairs: card.pairs.load(Ordering::Acquire),
            offloads: card.chosen.load(Ordering::Acquire),
            backends: backends.collect::<std::io::Result<_>>().map_err(|e| Error::device(WHAT, e))?,
        };
        saved::save(WHAT, STATE_VERSION, &state)
    }

    fn restore(&mut self, state: &[u8]) -> Result<()> {
        let state: State = saved::restore(WHAT, STATE_VERSION, state)?;
        let pairs = self.backends.len();
        let valid = (1..=pairs).contains(&state.pairs.into()) && state.backends.len() == pairs;
        if !valid || !state.filter.is_valid() || state.offloads & !TO_GUEST != 0 {
            return Err(Error::State {
                what: WHAT,
                expected: format!("{pairs} queue pairs, and a filter"),
                found: format!("{} in use of {}", state.pairs, state.backends.len()),
            });
        }
        for (backend, state) in self.backends.iter().zip(&state.backends) {
            lock(backend).restore_state(state).map_err(|error| Error::State {
                what: "the network behind a card",
                expected: "the state of an equal back end".into(),
                found: error.to_string(),
            })?;
        }
        *self.card.filter_mut() = state.filter;
        self.card.link.store(state.link, Ordering::Release);
        self.card.announce.store(state.announce, Ordering::Release);
        self.card.pairs.store(state.pairs, Ordering::Release);
        self.card.chosen.store(state.offloads, Ordering::Release);
        self.moved = true;
        Ok(())
    }
}
