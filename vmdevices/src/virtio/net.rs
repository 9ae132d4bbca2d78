//! virtio-net: network cards (virtio 1.2, section 5.1).

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use vmcore::memory::MemoryMap;
use vmcore::{Error, EventSet, GuestMemory, Machine, Result};

use super::device::{Activation, DeviceType, Progress, Source, VirtioDevice, Worker, read_config_bytes};
use super::queue::{Chain, QueueError, VirtQueue};
use crate::buffers::Buffers;
use crate::net::{HEADER, MOST_PACKET, Nat, NetBackend, Tap, TapError};

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

const QUEUE_SIZE: u16 = 256;

/// Packets of one direction before others on the same thread have a turn.
const TURN: usize = 64;

/// Offset of `num_buffers` in the header (section 5.1.6).
const NUM_BUFFERS: usize = 10;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// A network card (virtio 1.2, section 5.1).
pub struct Net {
    /// The worker's while the device is active; kept here over resets.
    backend: Arc<Mutex<dyn NetBackend>>,
    features: u64,
    mac: Mac,
    mtu: u16,
}

impl std::fmt::Debug for Net {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Net").field("mac", &self.mac).field("mtu", &self.mtu).finish_non_exhaustive()
    }
}

impl Net {
    /// A card on `backend`, with a random address of its own.
    ///
    /// # Errors
    /// Where the host has no random numbers.
    pub fn new(backend: impl NetBackend + 'static) -> Result<Self> {
        let mut mac = [0; 6];
        rustix::rand::getrandom(&mut mac, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| Error::os("getrandom", "an Ethernet address", error))?;
        // Locally administered, and of one station (IEEE 802, 8.2).
        mac[0] = mac[0] & 0xfc | 2;
        let own = [VIRTIO_NET_F_MAC, VIRTIO_NET_F_STATUS, VIRTIO_NET_F_MRG_RXBUF];
        let mtu = backend.mtu();
        let offered = own.into_iter().chain(mtu.map(|_| VIRTIO_NET_F_MTU));
        let features = offered.fold(backend.features(), |bits, bit| bits | 1 << bit);
        Ok(Self { backend: Arc::new(Mutex::new(backend)), features, mac, mtu: mtu.unwrap_or(0) })
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
        if mac[0] & 1 == 1 || mac == [0; 6] {
            return Err(Error::Config {
                what: "Ethernet address",
                value: format!("{mac:02x?}"),
                fix: "give one of a single station: the first byte is even, and not all are 0".into(),
            });
        }
        self.mac = mac;
        Ok(self)
    }
}

fn lock(backend: &Mutex<dyn NetBackend>) -> MutexGuard<'_, dyn NetBackend + 'static> {
    backend.lock().unwrap_or_else(PoisonError::into_inner)
}

impl VirtioDevice for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType::NET
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE, QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // Section 5.1.4: address, link status, number of queue pairs, MTU.
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.mac);
        config[6] = u8::try_from(VIRTIO_NET_S_LINK_UP).unwrap_or(0);
        config[8] = 1;
        config[10..].copy_from_slice(&self.mtu.to_le_bytes());
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
        lock(&self.backend)
            .set_features(activation.features)
            .map_err(|error| Error::os("setting network offloads", "", error))?;
        let large = [VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO];
        Ok(vec![Box::new(NetWorker {
            merge: activation.has(VIRTIO_NET_F_MRG_RXBUF),
            large: large.into_iter().any(|bit| activation.has(bit)),
            memory: activation.memory,
            queues: activation.queues,
            backend: self.backend.clone(),
            readable: true,
            spill: vec![0; MOST_PACKET],
        })])
    }
}

struct NetWorker {
    memory: GuestMemory,
    queues: Vec<VirtQueue>,
    backend: Arc<Mutex<dyn NetBackend>>,
    /// A packet may take several buffers.
    merge: bool,
    /// Packets may be as long as IP allows.
    large: bool,
    /// The backend may have more packets.
    readable: bool,
    /// Takes what has no room in the guest's buffers.
    spill: Vec<u8>,
}

/// Receive buffers that were taken and not used yet.
#[derive(Default)]
struct Held<'m> {
    chains: VecDeque<Chain<'m>>,
    room: usize,
}

impl<'m> Held<'m> {
    /// Takes buffers from `queue` until there is room for `wanted` bytes, or until it is empty.
    fn gather(&mut self, queue: &mut VirtQueue, map: &'m MemoryMap, wanted: usize) -> Result<(), QueueError> {
        while self.room < wanted {
            let Some(chain) = queue.pop(map)? else { break };
            let room = chain.writable.len();
            if room < HEADER {
                return Err(QueueError::Request {
                    queue: RECEIVE,
                    what: "a receive buffer without room for a header",
                });
            }
            self.room += room;
            self.chains.push_back(chain);
        }
        Ok(())
    }

    /// The room of the first `count` chains.
    fn buffers(&self, count: usize) -> Buffers<'m> {
        let mut all = Buffers::default();
        for chain in self.chains.iter().take(count) {
            chain.writable.slices().iter().for_each(|slice| all.push(*slice));
        }
        all
    }

    /// Gives the chains that a packet of `len` bytes takes to the driver.
    fn used(&mut self, queue: &mut VirtQueue, map: &MemoryMap, len: usize) -> Result<(), QueueError> {
        let mut used = Vec::new();
        let mut rest = len;
        let mut header = self.buffers(1);
        while let Some(chain) = self.chains.front().filter(|_| rest > 0) {
            let here = rest.min(chain.writable.len());
            used.push((chain.head, u32::try_from(here).unwrap_or(u32::MAX)));
            self.room -= chain.writable.len();
            rest -= here;
            self.chains.pop_front();
        }
        header.advance(NUM_BUFFERS);
        header.write(&u16::try_from(used.len()).unwrap_or(u16::MAX).to_le_bytes());
        queue.push_all(map, &used)
    }

    /// Puts the rest back into `queue`.
    fn release(self, queue: &mut VirtQueue) {
        queue.unpop(u16::try_from(self.chains.len()).unwrap_or(u16::MAX));
    }
}

impl NetWorker {
    /// Moves packets to the guest while there are both packets and buffers.
    fn receive(&mut self) -> Result<Progress, QueueError> {
        if !self.readable {
            return Ok(Progress::Idle);
        }
        let map = self.memory.snapshot();
        let Some(queue) = self.queues.get_mut(usize::from(RECEIVE)).filter(|queue| queue.ready()) else {
            return Ok(Progress::Idle);
        };
        let mut backend = lock(&self.backend);
        let mut held = Held::default();
        let wanted = if self.merge { MOST_PACKET } else { 1 };
        queue.disable_notifications(&map)?;
        for _ in 0..TURN {
            held.gather(queue, &map, wanted)?;
            // With large packets to be expected the driver is given time to refill, as long as it
            // keeps less than half of the queue filled: a packet that does not fit is lost.
            let few = self.large && held.room < wanted && held.chains.len() < usize::from(queue.size() / 2);
            if held.chains.is_empty() || few {
                queue.signal(&map)?;
                // Asked before the buffers go back, so that the driver notifies about the next one.
                if queue.enable_notifications(&map)? {
                    queue.disable_notifications(&map)?;
                    continue;
                }
                held.release(queue);
                return Ok(Progress::Idle);
            }
            let mut into = held.buffers(if self.merge { held.chains.len() } else { 1 });
            let room = into.len();
            match backend.receive(&mut into, &mut self.spill) {
                Ok(len) if (HEADER..=room).contains(&len) => held.used(queue, &map, len)?,
                Ok(len) => {
                    log::debug!("virtio-net: dropped a packet of {len} bytes; the guest has room for {room}")
                }
                Err(error) => {
                    // Until the backend says that it is readable again.
                    self.readable = false;
                    if error.kind() != io::ErrorKind::WouldBlock {
                        log::warn!("virtio-net: receiving: {error}");
                    }
                    held.release(queue);
                    queue.signal(&map)?;
                    return Ok(Progress::Idle);
                }
            }
        }
        held.release(queue);
        queue.signal(&map)?;
        Ok(Progress::More)
    }

    /// Sends what the guest has to send.
    fn transmit(&mut self) -> Result<Progress, QueueError> {
        let map = self.memory.snapshot();
        let Some(queue) = self.queues.get_mut(usize::from(TRANSMIT)) else { return Ok(Progress::Idle) };
        let mut backend = lock(&self.backend);
        queue.serve(&map, TURN, TURN, |chain| {
            let len = chain.readable.len();
            if !(HEADER..=MOST_PACKET).contains(&len) {
                log::debug!("virtio-net: a packet of {len} bytes is not sent");
            } else if let Err(error) = backend.send(&mut chain.readable) {
                log::debug!("virtio-net: a packet of {len} bytes is lost: {error}");
            }
            Ok(0)
        })
    }
}

impl Worker for NetWorker {
    fn queues(&mut self) -> &mut [VirtQueue] {
        &mut self.queues
    }

    fn notify(&mut self, queue: u16) -> Result<Progress, QueueError> {
        match queue {
            RECEIVE => self.receive(),
            _ => self.transmit(),
        }
    }

    fn sources(&self) -> Vec<Source> {
        lock(&self.backend).source().map(|fd| Source { fd, events: EventSet::IN }).into_iter().collect()
    }

    fn ready(&mut self, _: usize) -> Result<Progress, QueueError> {
        self.readable = true;
        self.receive()
    }
}
