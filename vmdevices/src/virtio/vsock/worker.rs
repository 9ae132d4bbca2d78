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
        self.tell_reset()?;
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
        for _ in 0..TURN {
            if !self.mux.has_packets() {
                queue.signal(&map)?;
                return Ok(if held { Progress::More } else { Progress::Idle });
            }
            let Some(mut chain) = queue.pop(&map)? else {
                queue.signal(&map)?;
                if !queue.enable_notifications(&map)? {
                    return Ok(if held && !self.mux.is_full() { Progress::More } else { Progress::Idle });
                }
                queue.disable_notifications(&map)?;
                continue;
            };
            if chain.writable.len() < HEADER {
                return Err(QueueError::Request {
                    queue: RECEIVE,
                    what: "a buffer without room for a header",
                });
            }
            match self.mux.next(&mut chain.writable) {
                Some(length) => queue.push(&map, chain.head, u32::try_from(length).unwrap_or(0))?,
                None => queue.unpop(1),
            }
        }
        queue.signal(&map)?;
        Ok(Progress::More)
    }

    /// Tells the guest that its streams are gone, where they are and it has a buffer for that.
    fn tell_reset(&mut self) -> Result<(), QueueError> {
        let map = self.memory.snapshot();
        let Some(queue) = self.queues.get_mut(usize::from(EVENT)) else { return Ok(()) };
        if !self.owes_reset {
            return Ok(());
        }
        let Some(mut chain) = queue.pop(&map)? else { return Ok(()) };
        let event = TRANSPORT_RESET.to_le_bytes();
        if chain.writable.write(&event) < event.len() {
            return Err(QueueError::Request { queue: EVENT, what: "a buffer without room for an event" });
        }
        queue.push(&map, chain.head, 4)?;
        self.owes_reset = false;
        queue.signal(&map)
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
