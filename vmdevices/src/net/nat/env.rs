//! What all flows need: settings, the way to the guest, memory of the NAT as a whole.

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Instant;

use rustix::event::epoll;
use virtio_bindings::bindings::virtio_net::VIRTIO_NET_F_GUEST_CSUM;

use super::config::{Config, GATEWAY_MAC};
use super::gateway::{self, Refusal};
use super::handle::{Counters, Shared, count};
use super::policy::Protocol;
use super::wire::{self, Link};
use crate::buffers::Buffers;

/// Packets of the NAT's own (not TCP's) that wait for the guest.
const MOST_OUT: usize = 512;

/// What a flow is between. For echo requests, the guest's port is their identifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub(super) struct Key {
    /// IP protocol number.
    pub(super) protocol: u8,
    pub(super) guest: (IpAddr, u16),
    pub(super) peer: (IpAddr, u16),
}

impl Key {
    /// What rules call it.
    pub(super) fn kind(&self) -> Protocol {
        match self.protocol {
            wire::TCP => Protocol::Tcp,
            wire::UDP => Protocol::Udp,
            _ => Protocol::Icmp,
        }
    }
}

/// Whether a flow goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum Fate {
    Keep,
    /// It is over.
    Remove,
    /// It is over, and the segment at hand begins another.
    Replace,
}

pub(super) struct Env {
    pub(super) config: Config,
    pub(super) shared: Arc<Shared>,
    pub(super) link: Link,
    /// What the driver has agreed to.
    pub(super) features: u64,
    /// Whole packets for the guest.
    pub(super) out: VecDeque<Vec<u8>>,
    /// As of this call.
    pub(super) now: Instant,
    /// When the guest last sent something.
    pub(super) heard: Instant,
    /// Bytes that TCP flows hold for the host's side.
    pub(super) held: usize,
    /// For packets in the making, and data to be skipped.
    pub(super) scratch: Vec<u8>,
    /// How many flows there are.
    pub(super) flows: usize,
    secret: RandomState,
    counter: u64,
    fragments: u32,
}

impl Env {
    pub(super) fn new(config: Config, shared: Arc<Shared>) -> Self {
        let now = Instant::now();
        Self {
            config,
            shared,
            // Heard by all until the guest's own is known.
            link: Link { gateway: GATEWAY_MAC, guest: [0xff; 6] },
            features: 0,
            out: VecDeque::new(),
            now,
            heard: now,
            held: 0,
            scratch: vec![0; super::tcp::MOST_SKIP + (1 << 16)],
            flows: 0,
            secret: RandomState::new(),
            counter: 0,
            fragments: 0,
        }
    }

    pub(super) fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    pub(super) fn has(&self, feature: u32) -> bool {
        self.features >> feature & 1 == 1
    }

    /// The guest takes packets whose checksums are not complete.
    pub(super) fn leaves_checksums(&self) -> bool {
        self.has(VIRTIO_NET_F_GUEST_CSUM)
    }

    /// Has the guest get `packet`, unless it takes none for long.
    pub(super) fn push(&mut self, packet: Vec<u8>) {
        if self.out.len() < MOST_OUT {
            self.out.push_back(packet);
        } else {
            count(&self.counters().dropped);
        }
    }

    /// Has the guest get a `protocol` packet with `payload`, in fragments where it is too long.
    pub(super) fn push_payload(&mut self, ends: (IpAddr, IpAddr), protocol: u8, payload: &[u8]) {
        self.fragments = self.fragments.wrapping_add(1);
        let mtu = self.config.mtu;
        for packet in wire::packets(self.link, ends, protocol, payload, mtu, self.fragments) {
            self.push(packet);
        }
    }

    /// Tells the guest that its packet `original` (an IP packet, or its first bytes) does not go on.
    pub(super) fn refuse(&mut self, ends: (IpAddr, IpAddr), refusal: Refusal, original: &[u8]) {
        let packet = gateway::refuse(&self.config, self.link, ends, refusal, original);
        self.push(packet);
    }

    /// [`Env::refuse`] for a packet of a flow that is not at hand any more.
    /// A station looks whether the sequence number `seq` is one that it has sent (RFC 5927, section 4.1).
    pub(super) fn refuse_flow(&mut self, key: &Key, refusal: Refusal, seq: u32) {
        let ends = (key.guest.0, key.peer.0);
        let mut first = [0; 8];
        match key.protocol {
            wire::TCP | wire::UDP => {
                first[..2].copy_from_slice(&key.guest.1.to_be_bytes());
                first[2..4].copy_from_slice(&key.peer.1.to_be_bytes());
                let rest = if key.protocol == wire::UDP { 8 << 16 } else { seq };
                first[4..].copy_from_slice(&rest.to_be_bytes());
            }
            protocol => {
                first[0] =
                    if protocol == wire::ICMP { gateway::ECHO_REQUEST } else { gateway::ECHO_REQUEST_V6 };
                first[4..6].copy_from_slice(&key.guest.1.to_be_bytes());
            }
        }
        self.refuse(ends, refusal, &gateway::original(ends, key.protocol, first));
    }

    /// Numbers that the guest cannot foresee.
    pub(super) fn random(&mut self) -> u64 {
        self.counter = self.counter.wrapping_add(1);
        self.secret.hash_one(self.counter)
    }

    /// Has the events of `fd` come up with `token`.
    pub(super) fn watch(&self, fd: impl std::os::fd::AsFd, token: u64) -> std::io::Result<()> {
        let flags =
            epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
        Ok(epoll::add(&*self.shared.epoll, fd, epoll::EventData::new_u64(token), flags)?)
    }
}

/// Adds to a counter of what there is at the moment.
pub(super) fn gauge(counter: &AtomicU64, value: usize) {
    counter.store(value as u64, std::sync::atomic::Ordering::Relaxed);
}

/// What follows the headers of a packet of the guest's: in its memory, or put together here.
pub(super) enum Payload<'a, 'm> {
    Guest(Buffers<'m>),
    Bytes(&'a [u8]),
}

impl Payload<'_, '_> {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Guest(buffers) => buffers.len(),
            Self::Bytes(bytes) => bytes.len(),
        }
    }

    pub(super) fn advance(&mut self, count: usize) {
        match self {
            Self::Guest(buffers) => buffers.advance(count),
            Self::Bytes(bytes) => *bytes = bytes.get(count..).unwrap_or_default(),
        }
    }

    /// Keeps the first `len` bytes.
    pub(super) fn truncate(&mut self, len: usize) {
        match self {
            Self::Guest(buffers) => *buffers = buffers.take(len),
            Self::Bytes(bytes) => *bytes = &bytes[..len.min(bytes.len())],
        }
    }

    /// Sends to `socket` what it takes at once and consumes that.
    pub(super) fn send(&mut self, socket: impl std::os::fd::AsFd) -> std::io::Result<usize> {
        match self {
            Self::Guest(buffers) => buffers.send_to(socket),
            Self::Bytes(bytes) => {
                let flags = rustix::net::SendFlags::NOSIGNAL | rustix::net::SendFlags::DONTWAIT;
                let done = rustix::net::send(socket, bytes, flags)?;
                *bytes = &bytes[done..];
                Ok(done)
            }
        }
    }

    /// Takes the next bytes out.
    pub(super) fn read(&mut self, into: &mut [u8]) -> usize {
        match self {
            Self::Guest(buffers) => buffers.read(into),
            Self::Bytes(bytes) => {
                let (front, rest) = bytes.split_at(into.len().min(bytes.len()));
                into[..front.len()].copy_from_slice(front);
                *bytes = rest;
                front.len()
            }
        }
    }
}
