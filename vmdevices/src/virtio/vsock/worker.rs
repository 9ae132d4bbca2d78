//! The queues of the device (virtio 1.2, section 5.10.2).

use vmcore::{EventSet, GuestMemory};

use super::mux::Mux;
use super::packet::{HEADER, Header};
use crate::virtio::device::{Progress, Source, Worker};
use crate::virtio::queue::{QueueError, VirtQueue};

pub(super) const RECEIVE: u16 = 0;
pub(super) const TRANSMIT: u16 = 1;
pub(super) const EVENT: u16 = 2;

/// Packets of one direction before others have a turn.
const TURN: usize = 64;

/// Buffers of the guest that one read of a stream fills: those of Linux have 4 KiB, and a read would
/// otherwise be a system call for each.
const MOST_CHAINS: usize = 16;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`: all streams are gone (section 5.10.6.7).
const TRANSPORT_RESET: u32 = 0;

pub(super) struct VsockWorker {
    pub(super) memory: GuestMemory,
    pub(super) queues: Vec<VirtQueue>,
    pub(super) mux: Mux,
    /// The guest is to be told that its streams are gone.
    pub(super) owes_reset: bool,
}

impl VsockWorker {
    /// Goes on with everything that may have something to do.
    fn turn(&mut self) -> Result<Progress, QueueError> {
        let mut more = self.mux.poll_host();
        more |= self.tell_reset()?;
        more |= self.take()? == Progress::More;
        more |= self.give()? == Progress::More;
        Ok(if more { Progress::More } else { Progress::Idle })
    }

    /// Takes the guest's packets, as long as there is room for the answers.
    fn take(&mut self) -> Result<Progress, QueueError> {
        let map = self.memory.snapshot();
        let Some(queue) = self.queues.get_mut(usize::from(TRANSMIT)) else { return Ok(Progress::Idle) };
        queue.disable_notifications(&map)?;
        for _ in 0..TURN {
            if self.mux.is_full() {
                // It goes on when the guest has made room in the other queue.
                queue.signal(&map)?;
                return Ok(Progress::Idle);
            }
            let Some(mut chain) = queue.pop(&map)? else {
                queue.signal(&map)?;
                if !queue.enable_notifications(&map)? {
                    return Ok(Progress::Idle);
                }
                queue.disable_notifications(&map)?;
                continue;
            };
            let short =
                QueueError::Request { queue: TRANSMIT, what: "a packet shorter than its header says" };
            let Some(header) = Header::read(&mut chain.readable) else { return Err(short) };
            if !self.mux.receive(&header, &mut chain.readable) {
                return Err(short);
            }
            queue.push(&map, chain.head, 0)?;
        }
        queue.signal(&map)?;
        Ok(Progress::More)
    }

    /// Gives the guest what there is for it, as long as it has buffers.
    fn give(&mut self) -> Result<Progress, QueueError> {
        let map = self.memory.snapshot();
        let held = self.mux.is_full();
        let Some(queue) = self.queues.get_mut(usize::from(RECEIVE)) else { return Ok(Progress::Idle) };
        queue.disable_notifications(&map)?;
        let (mut given, mut batch) = (0, 1);
        let (mut chains, mut used) = (Vec::new(), Vec::new());
        while given < TURN {
            if !self.mux.has_packets() {
                queue.signal(&map)?;
                return Ok(if held { Progress::More } else { Progress::Idle });
            }
            while chains.len() < batch
                && let Some(chain) = queue.pop(&map)?
            {
                if chain.writable.len() < HEADER {
                    let what = "a buffer without room for a header";
                    return Err(QueueError::Request { queue: RECEIVE, what });
                }
                chains.push(chain);
            }
            if chains.is_empty() {
                queue.signal(&map)?;
                if !queue.enable_notifications(&map)? {
                    return Ok(if held && !self.mux.is_full() { Progress::More } else { Progress::Idle });
                }
                queue.disable_notifications(&map)?;
                // Counts as one, or a driver that takes buffers back could keep this going for ever.
                given += 1;
                continue;
            }
            self.mux.next(&mut chains, &mut used);
            queue.push_all(&map, &used)?;
            let left = chains.len() - used.len();
            queue.unpop(u16::try_from(left).unwrap_or(0));
            // Few buffers are looked at in vain: more at a time only as long as all are filled.
            batch = if left == 0 { (2 * batch).min(MOST_CHAINS) } else { 1 };
            given += used.len().max(1);
            chains.clear();
            used.clear();
        }
        queue.signal(&map)?;
        Ok(Progress::More)
    }

    /// Tells the guest that its streams are gone, where they are and it has a buffer for that; `true`
    /// where one came just now.
    fn tell_reset(&mut self) -> Result<bool, QueueError> {
        let map = self.memory.snapshot();
        let Some(queue) = self.queues.get_mut(usize::from(EVENT)) else { return Ok(false) };
        if !self.owes_reset {
            return Ok(false);
        }
        let Some(mut chain) = queue.pop(&map)? else {
            // The guest gives a buffer in its own time.
            return queue.enable_notifications(&map);
        };
        let event = TRANSPORT_RESET.to_le_bytes();
        if chain.writable.write(&event) < event.len() {
            return Err(QueueError::Request { queue: EVENT, what: "a buffer without room for an event" });
        }
        queue.push(&map, chain.head, 4)?;
        self.owes_reset = false;
        queue.signal(&map)?;
        Ok(false)
    }
}

impl Worker for VsockWorker {
    fn queues(&mut self) -> &mut [VirtQueue] {
        &mut self.queues
    }

    fn notify(&mut self, _: u16) -> Result<Progress, QueueError> {
        self.turn()
    }

    fn sources(&self) -> Vec<Source> {
        vec![Source { fd: self.mux.descriptor(), events: EventSet::IN }]
    }

    fn ready(&mut self, _: usize) -> Result<Progress, QueueError> {
        self.turn()
    }
}
