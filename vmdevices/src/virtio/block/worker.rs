//! Serves one queue of a disk: takes requests, has the host work on many of them at once, and gives
//! them back as they end.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmcore::memory::MemoryMap;
use vmcore::{Error, EventSet, GuestMemory, Result};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::coalesce::{Coalescing, Verdict};
use super::request::{Ended, Failure, Job, Op, Parsed, Part, Rules};
use super::{CacheMode, OnError, QUEUE_SIZE, Settings, Shared};
use crate::block::{Ring, Transfer, count};
use crate::timer::Timer;
use crate::virtio::device::{Progress, Source, Worker};
use crate::virtio::queue::{QueueError, VirtQueue};

/// Requests taken before others on the same thread have a turn.
const TURN: usize = 128;

/// Requests that are collected before the host gets them: it pays to have neighbours together.
const PLUG: usize = 32;

/// What the threads of the pool have done, and the way to tell of it.
#[derive(Debug)]
struct Results {
    ended: Mutex<Vec<Ended>>,
    arrived: Condvar,
    event: EventFd,
}

impl Results {
    fn lock(&self) -> MutexGuard<'_, Vec<Ended>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, ended: Vec<Ended>) {
        self.lock().extend(ended);
        self.arrived.notify_all();
        // Full means that it is signalled already.
        if let Err(e) = self.event.write(1)
            && e.kind() != io::ErrorKind::WouldBlock
        {
            log::error!("a disk's results are stuck: cannot write an event: {e}");
        }
    }
}

struct Fd(Arc<Results>);

impl AsRawFd for Fd {
    fn as_raw_fd(&self) -> i32 {
        self.0.event.as_raw_fd()
    }
}

/// Where requests are worked on.
enum Engine {
    /// In the call that takes them.
    Here,
    /// By the kernel where it can, by the disk's threads otherwise, while this one goes on.
    Aside(Aside),
}

struct Aside {
    ring: Kernel,
    results: Arc<Results>,
    /// Rings when the disk's limits let more be done.
    limits: Timer,
    coalescing: Coalescing,
    /// Rings when answers have waited long enough.
    answers: Timer,
}

/// The kernel's part. A ring is made when the first request comes: most queues of a disk with many never
/// see one.
enum Kernel {
    NotAsked,
    Ring(Box<Ring<Job>>),
    Unable,
}

pub(super) struct DiskWorker {
    memory: GuestMemory,
    /// One.
    queues: Vec<VirtQueue>,
    shared: Arc<Shared>,
    settings: Settings,
    engine: Engine,
    /// Requests that are taken and not given back.
    in_flight: usize,
    /// Jobs that ended and are not answered.
    ended: VecDeque<Ended>,
    plug: Vec<Job>,
}

impl DiskWorker {
    pub(super) fn new(
        memory: GuestMemory,
        queue: VirtQueue,
        shared: Arc<Shared>,
        settings: Settings,
        on_vcpu: bool,
    ) -> Result<Self> {
        let engine = if on_vcpu { Engine::Here } else { Engine::Aside(Aside::new()?) };
        Ok(Self {
            memory,
            queues: vec![queue],
            shared,
            settings,
            engine,
            in_flight: 0,
            ended: VecDeque::new(),
            plug: Vec::new(),
        })
    }

    /// Takes requests as far as there are any and it may, and tells the driver what has become of them.
    fn process(&mut self) -> Result<Progress, QueueError> {
        let map = self.memory.snapshot();
        let mut taken = 0;
        let progress = self.take(&map, &mut taken)?;
        self.tell(&map, progress, taken > 0)?;
        Ok(progress)
    }

    fn take(&mut self, map: &Arc<MemoryMap>, taken: &mut usize) -> Result<Progress, QueueError> {
        self.answer(map)?;
        let Some(queue) = self.queues.first_mut() else { return Ok(Progress::Idle) };
        queue.disable_notifications(map)?;
        // Where the VM is about to stop, the rest waits for its next run.
        while self.shared.stopped().is_none() {
            let more = self.fill_plug(map, taken)?;
            self.start();
            self.answer(map)?;
            let Some(queue) = self.queues.first_mut() else { return Ok(Progress::Idle) };
            match more {
                Take::Some if *taken >= TURN => return Ok(Progress::More),
                Take::Some => {}
                // Those that ended at once made room.
                Take::Full if self.in_flight < usize::from(queue.size()) => {}
                // Goes on with the next result, or when the timer rings.
                Take::Full | Take::Held => break,
                Take::None => {
                    if !queue.enable_notifications(map)? {
                        break;
                    }
                    queue.disable_notifications(map)?;
                    // Counts as one, or a driver that takes requests back could keep this going for
                    // ever.
                    *taken += 1;
                }
            }
        }
        let backed_up = self.ring().is_some_and(|ring| ring.is_backed_up());
        Ok(if backed_up { Progress::More } else { Progress::Idle })
    }

    fn ring(&mut self) -> Option<&mut Ring<Job>> {
        match &mut self.engine {
            Engine::Aside(Aside { ring: Kernel::Ring(ring), .. }) => Some(ring),
            _ => None,
        }
    }

    fn fill_plug(&mut self, map: &Arc<MemoryMap>, taken: &mut usize) -> Result<Take, QueueError> {
        let Some(queue) = self.queues.first_mut() else { return Ok(Take::None) };
        let (shared, settings) = (&self.shared, &self.settings);
        let durable = shared.durable(settings.cache);
        let rules = Rules {
            queue: queue.index(),
            len: shared.backend.len(),
            read_only: shared.backend.read_only(),
            id: &settings.id,
            flushes: settings.cache != CacheMode::Unsafe,
        };
        for _ in 0..PLUG {
            // A driver has no more requests than entries, unless it offers one twice.
            if self.in_flight >= usize::from(queue.size()) {
                return Ok(Take::Full);
            }
            let Some(chain) = queue.pop_ranges(map)? else { return Ok(Take::None) };
            let (head, bytes) = (chain.head, chain.readable.len().max(chain.writable.len()));
            if let Engine::Aside(aside) = &self.engine
                && let Err(wait) = shared.admit(bytes as u64)
            {
                queue.keep(head);
                aside.wake_in(wait);
                return Ok(Take::Held);
            }
            *taken += 1;
            match rules.parse(map, chain)? {
                Parsed::Work(op, part) => {
                    self.in_flight += 1;
                    plug(&mut self.plug, shared, map, durable, op, part);
                }
                Parsed::Done(written) => queue.push(map, head, written)?,
                Parsed::Failed(answer, failure) => {
                    queue.push(map, head, answer.give(map, failure.status(), 0))?;
                }
            }
        }
        Ok(Take::Some)
    }

    /// Hands over what is plugged.
    fn start(&mut self) {
        match &mut self.engine {
            Engine::Here => {
                let backend = &*self.shared.backend;
                self.ended.extend(self.plug.drain(..).flat_map(|job| job.perform(backend)));
            }
            Engine::Aside(aside) => self.plug.drain(..).for_each(|job| aside.start(job, &self.shared)),
        }
        if let Some(ring) = self.ring() {
            ring.submit();
        }
    }

    /// Gives back what has ended. The driver finds it if it looks; to be told it waits for [`DiskWorker::tell`].
    fn answer(&mut self, map: &MemoryMap) -> Result<(), QueueError> {
        if let Engine::Aside(aside) = &mut self.engine {
            aside.collect(&mut self.ended, &self.shared);
        }
        let Some(queue) = self.queues.first_mut() else { return Ok(()) };
        while let Some(Ended { job, mut result }) = self.ended.pop_front() {
            self.in_flight = self.in_flight.saturating_sub(job.parts.len());
            if let Err(Failure::Host(error)) = &result {
                match self.shared.judge(&job, error) {
                    OnError::Stop => {
                        job.parts.iter().for_each(|part| queue.keep(part.head));
                        continue;
                    }
                    OnError::Ignore => {
                        self.shared.account(&job, &result);
                        job.forget();
                        result = Ok(());
                    }
                    OnError::Report | OnError::StopIfFull => {}
                }
            }
            self.shared.account(&job, &result);
            for part in &job.parts {
                let written = part.answer.end(&job.map, &job.op, &result);
                queue.push(map, part.head, written)?;
            }
        }
        Ok(())
    }

    /// Tells the driver of what was given back, or leaves it for a later call.
    fn tell(&mut self, map: &MemoryMap, progress: Progress, added: bool) -> Result<(), QueueError> {
        let Some(queue) = self.queues.first_mut() else { return Ok(()) };
        if let Engine::Aside(aside) = &mut self.engine {
            let untold = queue.untold();
            // Where the VM is about to stop nobody may ask again.
            let at_once = || progress == Progress::More || self.shared.stopped().is_some();
            match aside.coalescing.judge(untold, added, Instant::now()) {
                Verdict::Waiting if !at_once() => return Ok(()),
                Verdict::Wait(wait) if !at_once() => match aside.answers.set(wait) {
                    Ok(()) => return Ok(()),
                    Err(error) => log::warn!("a disk tells of each answer: timerfd_settime: {error}"),
                },
                _ => {}
            }
            aside.coalescing.told();
        }
        queue.signal(map)
    }
}

/// Whether there was a request.
enum Take {
    Some,
    None,
    /// There may be, but as many are in flight as the queue has entries.
    Full,
    /// There is, but a limit says later.
    Held,
}

/// Puts a request to the others, together with the one before it if it follows that on the disk.
fn plug(jobs: &mut Vec<Job>, shared: &Shared, map: &Arc<MemoryMap>, durable: bool, op: Op, part: Part) {
    let unmerged = match jobs.last_mut() {
        Some(last) => last.merge(op, part),
        None => Err((op, part)),
    };
    match unmerged {
        Ok(()) => count(&shared.counters.merged, 1),
        Err((op, part)) => jobs.push(Job { op, parts: vec![part], map: map.clone(), durable }),
    }
}

impl Aside {
    fn new() -> Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
            .map_err(|error| Error::os("eventfd", "a disk's results", error))?;
        let timer = || Timer::new().map_err(|error| Error::os("timerfd_create", "a disk", error));
        let results = Arc::new(Results { ended: Mutex::default(), arrived: Condvar::new(), event });
        Ok(Self {
            ring: Kernel::NotAsked,
            results,
            limits: timer()?,
            coalescing: Coalescing::new(),
            answers: timer()?,
        })
    }

    /// Has `job` done by the kernel if it can, by the disk's threads otherwise.
    fn start(&mut self, job: Job, shared: &Arc<Shared>) {
        if let Kernel::NotAsked = self.ring {
            let ring = shared
                .backend
                .kernel_file()
                .and_then(|_| Ring::new(shared.backend.clone(), QUEUE_SIZE.into(), &self.results.event).ok());
            self.ring = ring.map_or(Kernel::Unable, |ring| Kernel::Ring(Box::new(ring)));
        }
        let Kernel::Ring(ring) = &mut self.ring else { return self.on_pool(job, shared) };
        let map = job.map.clone();
        let refused = match job.op {
            Op::Read(offset) => ring.transfer(Transfer::Read, &map, job.data(), offset, job),
            Op::Write(offset) => {
                let durable = job.durable;
                ring.transfer(Transfer::Write { durable }, &map, job.data(), offset, job)
            }
            Op::Flush => ring.flush(&map, job),
            Op::Discard(_) | Op::Zero(_) => Err(job),
        };
        if let Err(job) = refused {
            self.on_pool(job, shared);
        }
    }

    fn on_pool(&self, job: Job, shared: &Arc<Shared>) {
        let (results, backend) = (self.results.clone(), shared.backend.clone());
        shared.pool.run(move || results.add(job.perform(&*backend)));
    }

    /// Adds what has ended.
    fn collect(&mut self, ended: &mut VecDeque<Ended>, shared: &Arc<Shared>) {
        ended.extend(self.results.lock().drain(..));
        while let Kernel::Ring(ring) = &mut self.ring
            && let Some((job, result)) = ring.take()
        {
            match result {
                // The file is shorter than it should be, or full: found out, or gone on with, by calls
                // that may take their time. So is what is wrong with requests that were merged.
                Ok(done) if done < job.len() => self.on_pool(job, shared),
                Err(e) if job.parts.len() > 1 || e.kind() == io::ErrorKind::WouldBlock => {
                    self.on_pool(job, shared);
                }
                result => {
                    let result = result.map(|_| ()).map_err(Failure::from);
                    ended.push_back(Ended { job, result });
                }
            }
        }
    }

    /// Waits until something has ended. Something must be under way.
    fn wait(&mut self) {
        match &mut self.ring {
            Kernel::Ring(ring) if ring.len() > 0 => ring.wait(),
            _ => {
                let mut ended = self.results.lock();
                while ended.is_empty() {
                    ended = self.results.arrived.wait(ended).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// Has the worker called again after a while.
    fn wake_in(&self, wait: Duration) {
        if let Err(error) = self.limits.set(wait) {
            log::error!("a disk's requests wait for ever: timerfd_settime: {error}");
        }
    }
}

impl Worker for DiskWorker {
    fn queues(&mut self) -> &mut [VirtQueue] {
        &mut self.queues
    }

    fn notify(&mut self, _: u16) -> Result<Progress, QueueError> {
        self.process()
    }

    fn sources(&self) -> Vec<Source> {
        match &self.engine {
            Engine::Here => Vec::new(),
            Engine::Aside(Aside { results, limits, answers, .. }) => {
                let fds: [Arc<dyn AsRawFd + Send + Sync>; 3] =
                    [Arc::new(Fd(results.clone())), Arc::new(limits.clone()), Arc::new(answers.clone())];
                fds.map(|fd| Source { fd, events: EventSet::IN }).into()
            }
        }
    }

    fn ready(&mut self, _: usize) -> Result<Progress, QueueError> {
        self.process()
    }

    // An error says that the ring's memory is gone: there is nobody to answer to.
    fn drain(&mut self) {
        let map = self.memory.snapshot();
        self.start();
        while self.in_flight > 0 {
            if let Engine::Aside(aside) = &mut self.engine {
                aside.collect(&mut self.ended, &self.shared);
                if self.ended.is_empty() {
                    aside.wait();
                }
            } else if self.ended.is_empty() {
                return;
            }
            while !self.ended.is_empty() {
                let _ = self.answer(&map);
            }
        }
        // What waits for company is not part of the state.
        if let Some(queue) = self.queues.first_mut() {
            let _ = queue.signal(&map);
        }
        if let Engine::Aside(aside) = &mut self.engine {
            aside.coalescing.told();
        }
    }
}

impl Drop for DiskWorker {
    fn drop(&mut self) {
        // The driver has reset the device: a new one finds the cache mode as the first one did (section
        // 5.2.5).
        self.shared.write_back.store(self.settings.writes_back(), Ordering::Release);
    }
}
