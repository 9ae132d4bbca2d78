//! The packets of one pair of queues.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{GuestMemory as _, Permissions};
use vmcore::memory::MemoryMap;
use vmcore::{EventSet, GuestAddress, GuestMemory, MemoryRegion, Result};

use super::card::{Card, Session};
use super::filter::{Filter, LOOK};
use super::header::{ETHERNET, Offloads, segmented};
use super::{Backend, lock};
use crate::buffers::{Buffers, GuestSlice};
use crate::net::{HEADER, MOST_PACKET};
use crate::virtio::device::{Progress, Source, Worker};
use crate::virtio::queue::{Chain, QueueError, VirtQueue};

/// Packets of one direction before others on the same thread have a turn.
const TURN: usize = 64;

/// Offset of `num_buffers` in the header (section 5.1.6).
const NUM_BUFFERS: usize = 10;

/// What a pair is made of.
pub(super) struct Parts {
    pub(super) number: u16,
    pub(super) memory: GuestMemory,
    pub(super) receive: VirtQueue,
    pub(super) transmit: VirtQueue,
    pub(super) backend: Backend,
    pub(super) card: Arc<Card>,
    pub(super) features: u64,
    /// A packet may take several buffers.
    pub(super) merge: bool,
    /// The largest IP packet that the driver was told of.
    pub(super) mtu: Option<u16>,
    pub(super) session: Option<Session>,
}

/// Serves one pair of queues.
pub(super) struct Pair {
    number: u16,
    memory: GuestMemory,
    /// Receive queue, transmit queue.
    queues: [VirtQueue; 2],
    backend: Backend,
    card: Arc<Card>,
    features: u64,
    merge: bool,
    mtu: Option<u16>,
    /// The backend may have more packets.
    readable: bool,
    /// The backend has no room for more packets.
    full: bool,
    /// A page that is not the guest's, for headers that it must not change after they were checked.
    page: GuestMemory,
    /// Takes what has no room in the guest's buffers.
    spill: Vec<u8>,
    /// The driver's time ends with the first pair.
    _session: Option<Session>,
}

impl Pair {
    pub(super) fn new(parts: Parts) -> Result<Self> {
        let page = GuestMemory::new();
        page.insert(MemoryRegion::anonymous(GuestAddress(0), 0x1000)?.into())?;
        Ok(Self {
            number: parts.number,
            memory: parts.memory,
            queues: [parts.receive, parts.transmit],
            backend: parts.backend,
            card: parts.card,
            features: parts.features,
            merge: parts.merge,
            mtu: parts.mtu,
            readable: true,
            full: false,
            page,
            spill: vec![0; MOST_PACKET],
            _session: parts.session,
        })
    }

    /// Whether packets come by this pair.
    fn connected(&self) -> bool {
        self.card.link.load(Ordering::Acquire) && self.number < self.card.pairs.load(Ordering::Acquire)
    }

    /// Moves packets to the guest while there are both packets and buffers.
    fn receive(&mut self) -> Result<Progress, QueueError> {
        if !self.readable {
            return Ok(Progress::Idle);
        }
        if !self.connected() {
            return Ok(self.discard());
        }
        let map = self.memory.snapshot();
        let [queue, _] = &mut self.queues;
        if !queue.ready() {
            return Ok(Progress::Idle);
        }
        let offloads = Offloads::to_guest(self.card.in_force(self.features));
        let gate = Gate { filter: &self.card.filter(), offloads, mtu: self.mtu };
        let counters = &self.card.counters;
        let mut backend = lock(&self.backend);
        let mut held = Held::default();
        let wanted = if self.merge { MOST_PACKET } else { 1 };
        queue.disable_notifications(&map)?;
        for _ in 0..TURN {
            held.gather(queue, &map, wanted)?;
            // With large packets to be expected the driver is given time to refill, as long as it
            // keeps less than half of the queue filled: a packet that does not fit is lost.
            let few =
                offloads.large() && held.room < wanted && held.chains.len() < usize::from(queue.size() / 2);
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
                Ok(len) => match gate.pass(&held, len, room) {
                    Verdict::Pass(header) => {
                        held.used(queue, &map, len, header)?;
                        counters.count(&counters.received_packets, &counters.received_bytes, len - HEADER);
                    }
                    Verdict::Filtered => drop(counters.received_filtered.fetch_add(1, Ordering::Relaxed)),
                    Verdict::Dropped(why) => {
                        log::debug!("virtio-net: dropped a packet of {len} bytes for {room}: {why}");
                        counters.received_dropped.fetch_add(1, Ordering::Relaxed);
                    }
                },
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

    /// Drops what comes while nobody is to get it: it would be stale later.
    fn discard(&mut self) -> Progress {
        let mut backend = lock(&self.backend);
        for _ in 0..TURN {
            if backend.receive(&mut Buffers::default(), &mut self.spill).is_err() {
                self.readable = false;
                return Progress::Idle;
            }
            self.card.counters.received_dropped.fetch_add(1, Ordering::Relaxed);
        }
        Progress::More
    }

    /// Sends what the guest has to send.
    fn transmit(&mut self) -> Result<Progress, QueueError> {
        if self.full {
            return Ok(Progress::Idle);
        }
        let (map, page) = (self.memory.snapshot(), self.page.snapshot());
        let [_, queue] = &mut self.queues;
        let lost = QueueError::Request { queue: queue.index(), what: "no page for headers" };
        let slices = page.get_slices(GuestAddress(0), HEADER, Permissions::Write);
        let Some(Ok(place)) = slices.map_err(|_| lost)?.next() else { return Ok(Progress::Idle) };
        let offloads = Offloads::from_guest(self.features);
        let link = self.card.link.load(Ordering::Acquire);
        let counters = &self.card.counters;
        let mut backend = lock(&self.backend);
        let mut served = 0;
        queue.disable_notifications(&map)?;
        loop {
            while let Some(chain) = queue.pop(&map)? {
                let (head, len) = (chain.head, chain.readable.len().saturating_sub(HEADER));
                let sent = match checked(chain, offloads, place) {
                    Some(mut packet) if link => backend.send(&mut packet),
                    _ => Err(io::ErrorKind::InvalidData.into()),
                };
                match sent {
                    Ok(()) => counters.count(&counters.sent_packets, &counters.sent_bytes, len),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock && backend.holds_back() => {
                        queue.unpop(1);
                        self.full = true;
                        queue.signal(&map)?;
                        return Ok(Progress::Idle);
                    }
                    Err(error) => {
                        log::debug!("virtio-net: a packet of {len} bytes is not sent: {error}");
                        counters.sent_dropped.fetch_add(1, Ordering::Relaxed);
                    }
                }
                queue.push(&map, head, 0)?;
                served += 1;
                if served >= TURN {
                    queue.signal(&map)?;
                    return Ok(Progress::More);
                }
            }
            queue.signal(&map)?;
            if !queue.enable_notifications(&map)? {
                return Ok(Progress::Idle);
            }
            queue.disable_notifications(&map)?;
            // Counts as one, or a driver that takes requests back could keep this going for ever.
            served += 1;
        }
    }
}

/// The packet in `chain` with its header, checked, at `place`; `None` where it is not to be sent.
fn checked<'m>(mut chain: Chain<'m>, offloads: Offloads, place: GuestSlice<'m>) -> Option<Buffers<'m>> {
    let len = chain.readable.len();
    if !(HEADER + ETHERNET..=MOST_PACKET).contains(&len) {
        return None;
    }
    let mut header = [0; HEADER];
    chain.readable.read(&mut header);
    place.copy_from(&offloads.check(header, len - HEADER)?);
    let mut packet = Buffers::default();
    packet.push(place);
    packet.append(chain.readable);
    Some(packet)
}

/// What a packet for the guest has to pass.
struct Gate<'a> {
    filter: &'a Filter,
    offloads: Offloads,
    mtu: Option<u16>,
}

enum Verdict {
    /// With this header.
    Pass([u8; HEADER]),
    Filtered,
    Dropped(&'static str),
}

impl Gate<'_> {
    /// Judges a packet of `len` bytes in the buffers of `held`, which had room for `room`.
    fn pass(&self, held: &Held<'_>, len: usize, room: usize) -> Verdict {
        if !(HEADER + ETHERNET..=room).contains(&len) {
            return Verdict::Dropped("too short, or too long for the driver's buffers");
        }
        let mut start = [0; HEADER + LOOK];
        // The last two bytes are stale in the shortest frames, which are of no VLAN.
        held.peek(&mut start);
        let (header, look) = start.split_first_chunk::<HEADER>().unwrap_or((&[0; HEADER], &[]));
        let look = look.first_chunk::<LOOK>().unwrap_or(&[0; LOOK]);
        if !self.filter.takes(look) {
            return Verdict::Filtered;
        }
        let Some(header) = self.offloads.check(*header, len - HEADER) else {
            return Verdict::Dropped("it needs offloads that were not agreed on");
        };
        // Section 5.1.6.4.1: with room for one VLAN tag.
        let most = self.mtu.map_or(usize::MAX, |mtu| HEADER + ETHERNET + 4 + usize::from(mtu));
        if len > most && !segmented(header) {
            return Verdict::Dropped("longer than the MTU");
        }
        Verdict::Pass(header)
    }
}

impl Worker for Pair {
    fn queues(&mut self) -> &mut [VirtQueue] {
        &mut self.queues
    }

    fn notify(&mut self, queue: u16) -> Result<Progress, QueueError> {
        if self.queues[0].index() == queue { self.receive() } else { self.transmit() }
    }

    fn sources(&self) -> Vec<Source> {
        let backend = lock(&self.backend);
        let events = if backend.holds_back() { EventSet::IN | EventSet::OUT } else { EventSet::IN };
        backend.source().map(|fd| Source { fd, events }).into_iter().collect()
    }

    fn ready(&mut self, _: usize) -> Result<Progress, QueueError> {
        lock(&self.backend).event();
        self.readable = true;
        let sent = if std::mem::take(&mut self.full) { self.transmit()? } else { Progress::Idle };
        let received = self.receive()?;
        Ok(if sent == Progress::Idle { received } else { Progress::More })
    }
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
                let what = "a receive buffer without room for a header";
                return Err(QueueError::Request { queue: queue.index(), what });
            }
            self.room += room;
            self.chains.push_back(chain);
        }
        Ok(())
    }

    fn slices(&self) -> impl Iterator<Item = &GuestSlice<'m>> {
        self.chains.iter().flat_map(|chain| chain.writable.slices())
    }

    /// The room of the first `count` chains.
    fn buffers(&self, count: usize) -> Buffers<'m> {
        let mut all = Buffers::default();
        for chain in self.chains.iter().take(count) {
            chain.writable.slices().iter().for_each(|slice| all.push(*slice));
        }
        all
    }

    /// Copies the start of what was received.
    fn peek(&self, into: &mut [u8]) {
        let mut done = 0;
        for slice in self.slices() {
            done += slice.copy_to(&mut into[done..]);
            if done == into.len() {
                break;
            }
        }
    }

    /// Gives the chains that a packet of `len` bytes takes to the driver, with its `header`.
    fn used(
        &mut self,
        queue: &mut VirtQueue,
        map: &MemoryMap,
        len: usize,
        mut header: [u8; HEADER],
    ) -> Result<(), QueueError> {
        let mut used = Vec::new();
        let mut rest = len;
        for chain in &self.chains {
            let here = rest.min(chain.writable.len());
            used.push((chain.head, u32::try_from(here).unwrap_or(u32::MAX)));
            rest -= here;
            if rest == 0 {
                break;
            }
        }
        let count = u16::try_from(used.len()).unwrap_or(u16::MAX);
        header[NUM_BUFFERS..].copy_from_slice(&count.to_le_bytes());
        let mut done = 0;
        for slice in self.slices() {
            let here = slice.len().min(HEADER - done);
            slice.copy_from(&header[done..done + here]);
            done += here;
            if done == HEADER {
                break;
            }
        }
        for chain in self.chains.drain(..used.len()) {
            self.room -= chain.writable.len();
        }
        queue.push_all(map, &used)
    }

    /// Puts the rest back into `queue`.
    fn release(self, queue: &mut VirtQueue) {
        queue.unpop(u16::try_from(self.chains.len()).unwrap_or(u16::MAX));
    }
}
