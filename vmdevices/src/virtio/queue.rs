//! A virtqueue as a device uses it: requests out, answers in, nothing lost and nothing trusted.
//!
//! Ring layout and indices are virtio-queue's. On top of it a [`VirtQueue`] refuses chains that
//! virtio-queue would silently cut short (loops, bad indices, bad addresses), publishes several used
//! buffers at once, and honours the driver's wish for no interrupts without EVENT_IDX.

use std::collections::VecDeque;
use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestMemory as _, Permissions};
use vmcore::GuestAddress;
use vmcore::memory::MemoryMap;

use super::device::{Progress, Transport};
use crate::buffers::{Buffers, GuestRanges};

/// How a driver broke the rules (virtio 1.2, section 2.7). The device needs a reset.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QueueError {
    /// A ring lies where there is no memory, or read-only memory.
    #[error("queue {queue}: its {part} at {at:#x} is not in (writable) memory")]
    Ring {
        /// Number of the queue.
        queue: u16,
        /// Which ring.
        part: &'static str,
        /// Its guest-physical address.
        at: u64,
    },
    /// A size or an alignment that no queue can have.
    #[error("queue {queue}: {what} {value:#x} is not valid")]
    Setup {
        /// Number of the queue.
        queue: u16,
        /// Which setting.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// The available index is further ahead than the queue has entries.
    #[error("queue {queue}: the available index jumped ({source})")]
    Index {
        /// Number of the queue.
        queue: u16,
        /// What virtio-queue says.
        source: virtio_queue::Error,
    },
    /// A chain that never ends, or leads out of its table.
    #[error("queue {queue}: the chain at descriptor {head} loops or leads nowhere")]
    Chain {
        /// Number of the queue.
        queue: u16,
        /// Index of its first descriptor.
        head: u16,
    },
    /// A chain of more descriptors than the device's queue has.
    #[error("queue {queue}: the chain at descriptor {head} is longer than {limit} descriptors")]
    Long {
        /// Number of the queue.
        queue: u16,
        /// Index of its first descriptor.
        head: u16,
        /// Most descriptors a chain may have.
        limit: u16,
    },
    /// A buffer for the device to read behind one for it to write.
    #[error("queue {queue}: the chain at descriptor {head} has a readable buffer behind a writable one")]
    Order {
        /// Number of the queue.
        queue: u16,
        /// Index of its first descriptor.
        head: u16,
    },
    /// A buffer where there is no memory, or that the device cannot write.
    #[error(
        "queue {queue}: a buffer of {len:#x} bytes at {at:#x}, chain {head}, is not in (writable) memory"
    )]
    Buffer {
        /// Number of the queue.
        queue: u16,
        /// Index of the chain's first descriptor.
        head: u16,
        /// Guest-physical address of the buffer.
        at: u64,
        /// Its length in bytes.
        len: u32,
    },
    /// A request that the device's own rules do not allow.
    #[error("queue {queue}: {what}")]
    Request {
        /// Number of the queue.
        queue: u16,
        /// What is wrong with it.
        what: &'static str,
    },
}

/// A request: the buffers of one descriptor chain (virtio 1.2, section 2.7.5).
#[derive(Debug)]
pub struct Chain<'m> {
    /// Index of the first descriptor: names the chain when it is given back.
    pub head: u16,
    /// What the driver says.
    pub readable: Buffers<'m>,
    /// Where the answer goes.
    pub writable: Buffers<'m>,
}

/// A request that stays in flight: as [`Chain`], by address.
#[derive(Debug, Default)]
pub struct RangeChain {
    /// Index of the first descriptor: names the chain when it is given back.
    pub head: u16,
    /// What the driver says.
    pub readable: GuestRanges,
    /// Where the answer goes.
    pub writable: GuestRanges,
}

/// One virtqueue of an active device (virtio 1.2, section 2.7), used by one worker at a time.
#[derive(Debug)]
pub struct VirtQueue {
    index: u16,
    queue: Queue,
    /// The used index when the driver was last told, or might have been.
    signalled: Wrapping<u16>,
    /// Heads of chains that were taken, and are to be taken again before others.
    kept: VecDeque<u16>,
    transport: Arc<dyn Transport>,
}

/// Where a queue stands, for snapshots.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Position {
    next_avail: u16,
    next_used: u16,
    kept: Vec<u16>,
}

/// How a driver set a queue up, as it wrote it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct QueueSetup {
    pub(super) size: u16,
    pub(super) ready: bool,
    pub(super) descriptors: u64,
    pub(super) driver: u64,
    pub(super) device: u64,
}

impl VirtQueue {
    /// The queue number `index` that `setup` describes, of at most `most` entries.
    pub(super) fn new(
        index: u16,
        most: u16,
        setup: &QueueSetup,
        position: Position,
        event_idx: bool,
        memory: &MemoryMap,
        transport: Arc<dyn Transport>,
    ) -> Result<Self, QueueError> {
        let invalid = |what, value| QueueError::Setup { queue: index, what, value };
        let mut queue = Queue::new(most).map_err(|_| invalid("the largest size", most.into()))?;
        if setup.ready {
            let state = QueueState {
                max_size: most,
                next_avail: position.next_avail,
                next_used: position.next_used,
                event_idx_enabled: event_idx,
                size: setup.size,
                ready: true,
                desc_table: setup.descriptors,
                avail_ring: setup.driver,
                used_ring: setup.device,
            };
            queue = Queue::try_from(state).map_err(|error| match error {
                virtio_queue::Error::InvalidSize => invalid("size", setup.size.into()),
                virtio_queue::Error::InvalidDescTableAlign => invalid("descriptor table", setup.descriptors),
                virtio_queue::Error::InvalidAvailRingAlign => invalid("driver area", setup.driver),
                _ => invalid("device area", setup.device),
            })?;
            let size = usize::from(setup.size);
            // Virtio 1.2, section 2.7: table of 16-byte descriptors, rings of 2- and 8-byte elements
            // with flags, index and event index.
            for (part, at, len, access) in [
                ("descriptor table", setup.descriptors, 16 * size, Permissions::Read),
                ("available ring", setup.driver, 6 + 2 * size, Permissions::Read),
                ("used ring", setup.device, 6 + 8 * size, Permissions::Write),
            ] {
                // 0 is what virtio-queue takes for "not set up", and nobody puts a ring there.
                if at == 0 || !memory.check_range(GuestAddress(at), len, access) {
                    return Err(QueueError::Ring { queue: index, part, at });
                }
            }
        }
        let (signalled, mut kept) = (Wrapping(position.next_used), VecDeque::from(position.kept));
        kept.truncate(usize::from(setup.size));
        Ok(Self { index, queue, signalled, kept, transport })
    }

    /// The device's number of this queue.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Whether the driver uses it.
    pub fn ready(&self) -> bool {
        self.queue.ready()
    }

    /// How many entries it has.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Stops it: it is empty from now on.
    pub(super) fn stop(&mut self) {
        self.queue.reset();
        self.kept.clear();
    }

    pub(super) fn position(&self) -> Position {
        Position {
            next_avail: self.queue.next_avail(),
            next_used: self.queue.next_used(),
            kept: self.kept.iter().copied().collect(),
        }
    }

    /// Takes the next request, if there is one. `map` is the memory its buffers lie in.
    ///
    /// # Errors
    /// Where ring or chain break the rules; what was taken before is to be given back no more.
    pub fn pop<'m>(&mut self, map: &'m MemoryMap) -> Result<Option<Chain<'m>>, QueueError> {
        let (queue, limit) = (self.index, self.queue.max_size());
        let Some(descriptors) = self.next(map)? else { return Ok(None) };
        let head = descriptors.head_index();
        let mut chain = Chain { head, readable: Buffers::default(), writable: Buffers::default() };
        walk(queue, head, descriptors, limit, |at, len, access| {
            let outside = |_| QueueError::Buffer { queue, head, at: at.0, len };
            let buffers = match access {
                Permissions::Write => &mut chain.writable,
                _ => &mut chain.readable,
            };
            for slice in map.get_slices(at, len as usize, access).map_err(outside)? {
                buffers.push(slice.map_err(outside)?);
            }
            Ok(())
        })?;
        Ok(Some(chain))
    }

    /// As [`VirtQueue::pop`], for a request that outlives the call: its buffers are within `map`. Those that
    /// were [kept](VirtQueue::keep) come first.
    ///
    /// # Errors
    /// As [`VirtQueue::pop`].
    pub fn pop_ranges(&mut self, map: &MemoryMap) -> Result<Option<RangeChain>, QueueError> {
        let limit = self.queue.max_size();
        if let Some(head) = self.kept.pop_front() {
            let descriptors = self.chain(map, head, limit)?;
            return self.ranges(map, head, descriptors.into_iter()).map(Some);
        }
        let Some(descriptors) = self.next(map)? else { return Ok(None) };
        let head = descriptors.head_index();
        self.ranges(map, head, descriptors).map(Some)
    }

    /// Has [`VirtQueue::pop_ranges`] give a request again, after others that are kept. Its descriptors are
    /// then read anew.
    pub fn keep(&mut self, head: u16) {
        self.kept.push_back(head);
    }

    fn ranges(
        &self,
        map: &MemoryMap,
        head: u16,
        descriptors: impl Iterator<Item = Descriptor>,
    ) -> Result<RangeChain, QueueError> {
        let (queue, limit) = (self.index, self.queue.max_size());
        let mut chain = RangeChain { head, ..RangeChain::default() };
        walk(queue, head, descriptors, limit, |at, len, access| {
            if len > 0 && !map.check_range(at, len as usize, access) {
                return Err(QueueError::Buffer { queue, head, at: at.0, len });
            }
            match access {
                Permissions::Write => chain.writable.push(at, len as usize),
                _ => chain.readable.push(at, len as usize),
            }
            Ok(())
        })?;
        Ok(chain)
    }

    /// The descriptors of the chain at `head`, as far as it can be followed and is not longer than `limit`:
    /// virtio-queue has only those of the available ring.
    fn chain(&self, map: &MemoryMap, head: u16, limit: u16) -> Result<Vec<Descriptor>, QueueError> {
        let broken = || QueueError::Chain { queue: self.index, head };
        let (mut table, mut size) = (GuestAddress(self.queue.desc_table()), self.queue.size());
        let (mut index, mut indirect, mut chain) = (head, false, Vec::new());
        while chain.len() <= usize::from(limit) {
            let at =
                table.0.checked_add(16 * u64::from(index)).filter(|_| index < size).ok_or_else(broken)?;
            let descriptor: Descriptor = map.read_obj(GuestAddress(at)).map_err(|_| broken())?;
            if descriptor.refers_to_indirect_table() {
                // Virtio 1.2, section 2.7.5.3.1: no table within a table.
                let entries = u16::try_from(descriptor.len() / 16).map_err(|_| broken())?;
                if std::mem::replace(&mut indirect, true) || !descriptor.len().is_multiple_of(16) {
                    return Err(broken());
                }
                (table, size, index) = (descriptor.addr(), entries, 0);
                continue;
            }
            chain.push(descriptor);
            if !descriptor.has_next() {
                break;
            }
            index = descriptor.next();
        }
        Ok(chain)
    }

    /// The next chain, not looked at yet.
    fn next<'m>(&mut self, map: &'m MemoryMap) -> Result<Option<DescriptorChain<&'m MemoryMap>>, QueueError> {
        if !self.queue.ready() {
            return Ok(None);
        }
        let available = self.queue.avail_idx(map, Ordering::Acquire).map_err(|_| self.lost())?;
        if available.0 == self.queue.next_avail() {
            return Ok(None);
        }
        let queue = self.index;
        let mut heads = self.queue.iter(map).map_err(|source| QueueError::Index { queue, source })?;
        let next = heads.next();
        next.map(Some).ok_or_else(|| self.lost())
    }

    /// Puts the last `count` requests that [`VirtQueue::pop`] gave back to where they were.
    pub fn unpop(&mut self, count: u16) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(count));
    }

    /// Gives a request back to the driver with `written` bytes of answer.
    ///
    /// # Errors
    /// Where the ring is not in memory any more.
    pub fn push(&mut self, map: &MemoryMap, head: u16, written: u32) -> Result<(), QueueError> {
        self.queue.add_used(map, head, written).map_err(|_| self.lost())
    }

    /// Gives several requests back at once: the driver sees all of them or none (virtio 1.2, section
    /// 5.1.6.4 asks for it of merged receive buffers).
    ///
    /// # Errors
    /// Where the ring is not in memory any more.
    pub fn push_all(&mut self, map: &MemoryMap, used: &[(u16, u32)]) -> Result<(), QueueError> {
        let Some((last, first)) = used.split_last() else { return Ok(()) };
        let mut next = Wrapping(self.queue.next_used());
        for &(head, written) in first {
            let slot = u64::from(next.0 % self.queue.size().max(1));
            let at = GuestAddress(self.queue.used_ring().saturating_add(4 + 8 * slot));
            let element = u64::from(head) | u64::from(written) << 32;
            map.write_obj(element.to_le(), at).map_err(|_| self.lost())?;
            next += 1;
        }
        // The index, which publishes all of them, is written with the last one.
        self.queue.set_next_used(next.0);
        self.push(map, last.0, last.1)
    }

    /// How many requests were given back that the driver has not been told of.
    pub fn untold(&self) -> u16 {
        self.queue.next_used().wrapping_sub(self.signalled.0)
    }

    /// Tells the driver about what was given back since the last time, if it wants to know.
    ///
    /// # Errors
    /// Where the ring is not in memory any more.
    pub fn signal(&mut self, map: &MemoryMap) -> Result<(), QueueError> {
        let new = Wrapping(self.queue.next_used());
        let old = std::mem::replace(&mut self.signalled, new);
        if new == old {
            return Ok(());
        }
        // The used index must be visible before the driver's wish is looked at (virtio 1.2, 2.7.7).
        fence(Ordering::SeqCst);
        let ring = self.queue.avail_ring();
        let load = |offset: u64| -> Result<u16, QueueError> {
            let at = GuestAddress(ring.saturating_add(offset));
            map.load::<u16>(at, Ordering::Relaxed).map(u16::from_le).map_err(|_| self.lost())
        };
        let wanted = if self.queue.event_idx_enabled() {
            let event = Wrapping(load(4 + 2 * u64::from(self.queue.size()))?);
            new - event - Wrapping(1) < new - old
        } else {
            u32::from(load(0)?) & VRING_AVAIL_F_NO_INTERRUPT == 0
        };
        if wanted {
            self.transport.used(self.index);
        }
        Ok(())
    }

    /// Asks the driver not to notify while its requests are being served.
    ///
    /// # Errors
    /// Where the ring is not in memory any more.
    pub fn disable_notifications(&mut self, map: &MemoryMap) -> Result<(), QueueError> {
        if !self.queue.ready() {
            return Ok(());
        }
        self.queue.disable_notification(map).map_err(|_| self.lost())
    }

    /// Asks the driver to notify about the next request. `true` means that there is one already,
    /// for which no notification will come.
    ///
    /// # Errors
    /// Where the ring is not in memory any more.
    pub fn enable_notifications(&mut self, map: &MemoryMap) -> Result<bool, QueueError> {
        if !self.queue.ready() {
            return Ok(false);
        }
        self.queue.enable_notification(map).map_err(|_| self.lost())
    }

    /// Serves requests: calls `serve` with each, which returns how many bytes it wrote, gives it back
    /// and tells the driver after every `batch`. Ends when none are left, or after `most`.
    ///
    /// # Errors
    /// Where the driver breaks the rules, or as `serve` says.
    pub fn serve(
        &mut self,
        map: &MemoryMap,
        most: usize,
        batch: usize,
        mut serve: impl FnMut(&mut Chain<'_>) -> Result<u32, QueueError>,
    ) -> Result<Progress, QueueError> {
        let mut served = 0;
        self.disable_notifications(map)?;
        loop {
            while let Some(mut chain) = self.pop(map)? {
                let written = serve(&mut chain)?;
                self.push(map, chain.head, written)?;
                served += 1;
                if served >= most {
                    self.signal(map)?;
                    return Ok(Progress::More);
                }
                if served % batch.max(1) == 0 {
                    self.signal(map)?;
                }
            }
            self.signal(map)?;
            if !self.enable_notifications(map)? {
                return Ok(Progress::Idle);
            }
            self.disable_notifications(map)?;
            // Counts as one, or a driver that takes requests back could keep this going for ever.
            served += 1;
        }
    }

    /// The memory of a ring has been taken away.
    fn lost(&self) -> QueueError {
        QueueError::Ring { queue: self.index, part: "available or used ring", at: self.queue.avail_ring() }
    }
}

/// Gives `take` the buffers of a chain, in order: address, length, and whether they are read or written.
/// virtio-queue's iterator bounds the walk by the table's size; it ends early where a chain is bad, which
/// this tells from its end. A limit by the device's size: drivers may use fewer entries and put longer
/// chains into indirect tables.
fn walk(
    queue: u16,
    head: u16,
    descriptors: impl Iterator<Item = Descriptor>,
    limit: u16,
    mut take: impl FnMut(GuestAddress, u32, Permissions) -> Result<(), QueueError>,
) -> Result<(), QueueError> {
    let (mut ended, mut answers, mut count) = (false, false, 0);
    for descriptor in descriptors {
        count += 1;
        if count > limit {
            return Err(QueueError::Long { queue, head, limit });
        }
        ended = !descriptor.has_next();
        let access = if descriptor.is_write_only() {
            answers = true;
            Permissions::Write
        } else if answers {
            // Virtio 1.2, section 2.7.4.2.
            return Err(QueueError::Order { queue, head });
        } else {
            Permissions::Read
        };
        take(descriptor.addr(), descriptor.len(), access)?;
    }
    if ended { Ok(()) } else { Err(QueueError::Chain { queue, head }) }
}
