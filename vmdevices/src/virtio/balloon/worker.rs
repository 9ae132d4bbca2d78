//! The queues of the balloon (virtio 1.2, section 5.5.2).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmcore::memory::MemoryMap;
use vmcore::{EventSet, GuestAddress, GuestMemory, MemoryRegion};

use super::handle::{BalloonStatistics, Shared};
use super::{F_PAGE_POISON, F_STATS_VQ, PAGE};
use crate::buffers::Buffers;
use crate::complaints::Complaints;
use crate::virtio::device::{Activation, Progress, Source, Worker};
use crate::virtio::queue::{QueueError, VirtQueue};

const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const STATISTICS: u16 = 2;

/// Requests before others on the same thread have a turn: each may have the host give up a lot.
const TURN: usize = 8;

/// Most bytes of one list of pages (1 GiB of them), or of statistics. Linux sends 1 KiB.
const MOST_LIST: usize = 1 << 20;

/// Most bytes of one report: Linux' are 32 blocks of up to 4 MiB.
const MOST_REPORT: usize = 1 << 30;

/// Bytes of a statistic: tag and value, packed (section 5.5.6.4).
const STATISTIC: usize = 10;

pub(super) struct BalloonWorker {
    memory: GuestMemory,
    queues: Vec<VirtQueue>,
    shared: Arc<Shared>,
    has_statistics: bool,
    has_poison: bool,
    /// The guest's buffer for statistics, which it gets back when new ones are wanted.
    held: Option<u16>,
    /// New ones are wanted, and the guest's buffer is not there yet.
    wanted: bool,
    complaints: Complaints,
}

impl BalloonWorker {
    pub(super) fn new(activation: Activation, shared: Arc<Shared>) -> Self {
        let (has_statistics, has_poison) = (activation.has(F_STATS_VQ), activation.has(F_PAGE_POISON));
        let Activation { memory, queues, transport, .. } = activation;
        shared.set_transport(Some(transport));
        let complaints = Complaints::default();
        Self { memory, queues, shared, has_statistics, has_poison, held: None, wanted: false, complaints }
    }

    /// Takes lists of pages that are in the balloon now.
    fn inflate(&mut self) -> Result<Progress, QueueError> {
        let map = self.memory.snapshot();
        let Some(queue) = self.queues.get_mut(usize::from(INFLATE)) else { return Ok(Progress::Idle) };
        let complaints = &self.complaints;
        queue.serve(&map, TURN, 1, |chain| {
            if chain.readable.len() > MOST_LIST {
                return Err(QueueError::Request { queue: INFLATE, what: "more than 1 GiB of pages at once" });
            }
            discard_pages(&map, &mut chain.readable, complaints);
            Ok(0)
        })
    }

    /// Pages that the guest takes out of the balloon need nothing: the host gives them when they are
    /// touched.
    fn deflate(&mut self) -> Result<Progress, QueueError> {
        let map = self.memory.snapshot();
        let Some(queue) = self.queues.get_mut(usize::from(DEFLATE)) else { return Ok(Progress::Idle) };
        queue.serve(&map, TURN, TURN, |_| Ok(0))
    }

    /// Takes reports of free pages: the buffers are the pages (section 5.5.6.6).
    fn report(&mut self, queue: u16) -> Result<Progress, QueueError> {
        let map = self.memory.snapshot();
        let poison = if self.has_poison { self.shared.poison.load(Ordering::Acquire) } else { 0 };
        let complaints = &self.complaints;
        let Some(virt_queue) = self.queues.get_mut(usize::from(queue)) else { return Ok(Progress::Idle) };
        virt_queue.serve(&map, TURN, 1, |chain| {
            if chain.writable.len() > MOST_REPORT {
                return Err(QueueError::Request { queue, what: "more than 1 GiB of free pages at once" });
            }
            for slice in chain.writable.slices() {
                let at = slice.ptr_guard().as_ptr().addr();
                let inside = |region: &&Arc<MemoryRegion>| {
                    let offset = at.checked_sub(region.host_address().addr());
                    offset.is_some_and(|offset| (offset as u64) < region.len())
                };
                let Some(region) = map.regions().iter().find(inside) else { continue };
                // Pages must stay as they are, or be filled with what the guest checks for (5.5.6.6.2).
                if poison == 0 && region.discards_to_zero() {
                    let offset = at - region.host_address().addr();
                    discard(region, offset as u64, slice.len() as u64, complaints);
                }
            }
            Ok(0)
        })
    }

    /// Takes the guest's statistics, and keeps the buffer until new ones are wanted (section 5.5.6.4).
    fn statistics(&mut self) -> Result<Progress, QueueError> {
        let map = self.memory.snapshot();
        let Some(queue) = self.queues.get_mut(usize::from(STATISTICS)) else { return Ok(Progress::Idle) };
        // One buffer goes back and forth. A driver that gives more has the older ones back.
        for _ in 0..TURN {
            let Some(mut chain) = queue.pop(&map)? else {
                queue.signal(&map)?;
                if !queue.enable_notifications(&map)? {
                    return Ok(Progress::Idle);
                }
                continue;
            };
            if chain.readable.len() > MOST_LIST {
                return Err(QueueError::Request { queue: STATISTICS, what: "more than 1 MiB of statistics" });
            }
            if let Some(head) = self.held.replace(chain.head) {
                queue.push(&map, head, 0)?;
            }
            let mut statistics = BalloonStatistics::default();
            let mut entry = [0; STATISTIC];
            while chain.readable.read(&mut entry) == STATISTIC {
                let [a, b, value @ ..] = entry;
                statistics.set(u16::from_le_bytes([a, b]), u64::from_le_bytes(value));
            }
            if std::mem::take(&mut self.wanted) {
                // What it had filled before anybody asked is not what was asked for.
                self.give_back(&map)?;
                return Ok(Progress::More);
            }
            self.shared.publish(statistics);
        }
        Ok(Progress::More)
    }

    /// Gives the guest its buffer back, for new statistics.
    fn give_back(&mut self, map: &MemoryMap) -> Result<(), QueueError> {
        let Some(queue) = self.queues.get_mut(usize::from(STATISTICS)) else { return Ok(()) };
        match self.held.take() {
            Some(head) => {
                queue.push(map, head, 0)?;
                queue.signal(map)
            }
            None => {
                self.wanted = true;
                Ok(())
            }
        }
    }
}

/// Returns the pages that `list` names to the host: in runs, as neighbours come one after the other,
/// upwards or downwards.
fn discard_pages(map: &MemoryMap, list: &mut Buffers<'_>, complaints: &Complaints) {
    let mut run: Option<(u64, u64)> = None;
    let mut bytes = [0; 1024];
    while let count @ 4.. = list.read(&mut bytes) {
        for page in bytes[..count].chunks_exact(4) {
            let page = page.try_into().map_or(0, u32::from_le_bytes).into();
            run = Some(match run {
                Some((first, end)) if page == end => (first, page + 1),
                Some((first, end)) if page + 1 == first => (page, end),
                other => {
                    discard_run(map, other, complaints);
                    (page, page + 1)
                }
            });
        }
    }
    discard_run(map, run, complaints);
}

/// Returns the pages from the first number to before the second.
fn discard_run(map: &MemoryMap, run: Option<(u64, u64)>, complaints: &Complaints) {
    let Some((first, end)) = run else { return };
    let (mut at, end) = (first * PAGE, end * PAGE);
    while at < end {
        let Some(region) = map.find(GuestAddress(at)) else {
            complaints.warn("balloon", format_args!("the guest gives page {at:#x}, where it has no memory"));
            // The rest of a run begins at the next page that is memory, if any is.
            let next = map.regions().iter().map(|region| region.base().0).find(|&base| base > at);
            at = next.unwrap_or(end);
            continue;
        };
        let offset = at - region.base().0;
        let len = (region.len() - offset).min(end - at);
        discard(region, offset, len, complaints);
        at += len;
    }
}

fn discard(region: &MemoryRegion, offset: u64, len: u64, complaints: &Complaints) {
    if let Err(error) = region.discard(offset, len) {
        complaints.warn("balloon", format_args!("{error}"));
    }
}

impl Worker for BalloonWorker {
    fn queues(&mut self) -> &mut [VirtQueue] {
        &mut self.queues
    }

    fn notify(&mut self, queue: u16) -> Result<Progress, QueueError> {
        match queue {
            INFLATE => self.inflate(),
            DEFLATE => self.deflate(),
            STATISTICS if self.has_statistics => self.statistics(),
            // Free page reporting is number 4 in the specification. Linux counts only the queues that
            // were agreed on.
            _ => self.report(queue),
        }
    }

    fn sources(&self) -> Vec<Source> {
        vec![Source { fd: self.shared.wanted.clone(), events: EventSet::IN }]
    }

    fn ready(&mut self, _: usize) -> Result<Progress, QueueError> {
        if self.shared.wanted.read().is_ok() && self.has_statistics {
            let map = self.memory.snapshot();
            self.give_back(&map)?;
            if self.wanted {
                // After a snapshot it is in the ring again.
                return self.statistics();
            }
        }
        Ok(Progress::Idle)
    }

    /// The buffer for statistics is in flight; it is taken again afterwards.
    fn drain(&mut self) {
        if self.held.take().is_some()
            && let Some(queue) = self.queues.get_mut(usize::from(STATISTICS))
        {
            queue.unpop(1);
        }
    }
}

impl Drop for BalloonWorker {
    fn drop(&mut self) {
        self.shared.set_transport(None);
    }
}
