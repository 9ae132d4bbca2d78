//! The balloon from outside.

use std::io::{self, ErrorKind};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::PAGE;
use crate::virtio::device::Transport;

/// Most statistics that are kept which have no field of their own.
const MOST_OTHERS: usize = 64;

/// Changes and watches a balloon while the guest runs. Clones are the same balloon; any thread but
/// those of the VM.
#[derive(Clone, Debug)]
pub struct BalloonHandle(Arc<Shared>);

/// What device, worker and handles share.
#[derive(Debug)]
pub(super) struct Shared {
    /// Pages that the host wishes in the balloon, and that the guest says are in it.
    pub(super) target: AtomicU32,
    pub(super) actual: AtomicU32,
    /// What free pages are filled with, where the guest checks that.
    pub(super) poison: AtomicU32,
    /// Rings when statistics are wanted.
    pub(super) wanted: Arc<EventFd>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The way to an active driver, and whether that gives statistics.
    transport: Option<Arc<dyn Transport>>,
    /// Times that statistics came, and the last ones.
    round: u64,
    statistics: BalloonStatistics,
    /// The device is gone.
    closed: bool,
}

/// What the guest's driver says about its memory (virtio 1.2, section 5.5.6.4), as far as it does.
/// Sizes are bytes; counts are since the guest began.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BalloonStatistics {
    /// Bytes swapped in.
    pub swap_in: Option<u64>,
    /// Bytes swapped out.
    pub swap_out: Option<u64>,
    /// Page faults that needed the disk.
    pub major_faults: Option<u64>,
    /// Page faults that did not.
    pub minor_faults: Option<u64>,
    /// Memory used for nothing.
    pub free: Option<u64>,
    /// Memory that the guest has, with the balloon's taken off.
    pub total: Option<u64>,
    /// Memory that programs could have without swapping.
    pub available: Option<u64>,
    /// Memory that holds parts of files and could be given up.
    pub disk_caches: Option<u64>,
    /// Huge pages that were allocated.
    pub hugetlb_allocations: Option<u64>,
    /// Huge pages that could not be allocated.
    pub hugetlb_failures: Option<u64>,
    /// Values with other tags, up to 64 of them.
    pub others: Vec<(u16, u64)>,
}

impl BalloonStatistics {
    /// Takes one value.
    pub(super) fn set(&mut self, tag: u16, value: u64) {
        let field = match tag {
            0 => &mut self.swap_in,
            1 => &mut self.swap_out,
            2 => &mut self.major_faults,
            3 => &mut self.minor_faults,
            4 => &mut self.free,
            5 => &mut self.total,
            6 => &mut self.available,
            7 => &mut self.disk_caches,
            8 => &mut self.hugetlb_allocations,
            9 => &mut self.hugetlb_failures,
            _ => {
                if self.others.len() < MOST_OTHERS {
                    self.others.push((tag, value));
                }
                return;
            }
        };
        *field = Some(value);
    }
}

impl Shared {
    pub(super) fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            target: AtomicU32::new(0),
            actual: AtomicU32::new(0),
            poison: AtomicU32::new(0),
            wanted: Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?),
            state: Mutex::default(),
            changed: Condvar::new(),
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn handle(self: &Arc<Self>) -> BalloonHandle {
        BalloonHandle(self.clone())
    }

    /// There is a driver now, or none any more.
    pub(super) fn set_transport(&self, transport: Option<Arc<dyn Transport>>) {
        self.state().transport = transport;
    }

    /// Statistics have come.
    pub(super) fn publish(&self, statistics: BalloonStatistics) {
        let mut state = self.state();
        state.round += 1;
        state.statistics = statistics;
        self.changed.notify_all();
    }

    pub(super) fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        state.transport = None;
        self.changed.notify_all();
    }
}

impl BalloonHandle {
    /// Wishes `bytes` in the balloon, rounded down to pages of 4 KiB. The guest follows as fast and as
    /// far as it can, [`BalloonHandle::actual`] says how far it is.
    ///
    /// # Errors
    /// `InvalidInput` for 16 TiB and more: the device counts pages in 32 bits.
    pub fn set_target(&self, bytes: u64) -> io::Result<()> {
        let pages = u32::try_from(bytes / PAGE).map_err(|_| {
            let what = format!("balloon of {bytes} bytes: the most is {}", u64::from(u32::MAX) * PAGE);
            io::Error::new(ErrorKind::InvalidInput, what)
        })?;
        self.0.target.store(pages, Ordering::Release);
        let transport = self.0.state().transport.clone();
        if let Some(transport) = transport {
            transport.config_changed();
        }
        Ok(())
    }

    /// Bytes that are wished in the balloon.
    pub fn target(&self) -> u64 {
        u64::from(self.0.target.load(Ordering::Acquire)) * PAGE
    }

    /// Bytes that the guest says are in the balloon.
    pub fn actual(&self) -> u64 {
        u64::from(self.0.actual.load(Ordering::Acquire)) * PAGE
    }

    /// Asks the guest for its statistics, and waits for them at most for `limit`. Call it as often as
    /// they are wanted.
    ///
    /// # Errors
    /// `TimedOut` where the guest has no driver or does not answer, `NotConnected` where the VM is gone.
    pub fn statistics(&self, limit: Duration) -> io::Result<BalloonStatistics> {
        let state = self.0.state();
        let round = state.round;
        // Full means that it rings already.
        self.0.wanted.write(1).ok();
        let waits = |state: &mut State| state.round == round && !state.closed;
        let (state, _) =
            self.0.changed.wait_timeout_while(state, limit, waits).unwrap_or_else(PoisonError::into_inner);
        if state.round != round {
            return Ok(state.statistics.clone());
        }
        let (kind, what) = if state.closed {
            (ErrorKind::NotConnected, "the device is gone; ask while the VM is there".into())
        } else {
            (ErrorKind::TimedOut, format!("none within {limit:?}; see whether the guest has a driver"))
        };
        Err(io::Error::new(kind, format!("balloon statistics: {what}")))
    }
}
