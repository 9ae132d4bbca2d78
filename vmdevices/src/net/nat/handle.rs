//! What other threads may do with a NAT at work.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use rustix::event::epoll;

use super::error::NatError;
use super::forward::{Forward, Listener};
use super::policy::{Policy, RuleCount};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// What a NAT has done since it was made.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct NatStats {
            $($(#[$doc])* pub $name: u64,)*
        }

        /// [`NatStats`] as they are counted.
        #[derive(Debug, Default)]
        pub(super) struct Counters {
            $(pub(super) $name: AtomicU64,)*
        }

        impl Counters {
            fn load(&self) -> NatStats {
                NatStats { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Frames that the guest sent.
    frames_sent,
    /// Their bytes.
    bytes_sent,
    /// Frames that the guest got.
    frames_received,
    /// Their bytes.
    bytes_received,
    /// TCP connections begun, from either side.
    tcp_opened,
    /// UDP flows begun.
    udp_opened,
    /// Flows of echo requests begun.
    icmp_opened,
    /// Flows that there are now.
    flows,
    /// Flows that were given up for new ones: the limit was reached.
    evicted,
    /// Flows that the policy refused.
    denied,
    /// Frames that make no sense.
    malformed,
    /// Frames with a source that is not the guest's, or for other stations.
    foreign,
    /// Frames of protocols that do not pass: neither TCP, UDP nor echo requests.
    unsupported,
    /// Segments sent to the guest once more.
    retransmitted,
    /// Packets for the guest that were dropped because it takes none.
    dropped,
}

/// Counts one.
pub(super) fn count(counter: &AtomicU64) {
    add(counter, 1);
}

pub(super) fn add(counter: &AtomicU64, by: usize) {
    counter.fetch_add(by as u64, Ordering::Relaxed);
}

/// Set in the tokens of forwards; see [`Shared`].
pub(super) const FORWARD: u64 = 1 << 63;

/// What the NAT and its handles share. In the epoll each descriptor has a token that says what it is.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) epoll: Arc<OwnedFd>,
    forwards: Mutex<Forwards>,
    pub(super) policy: RwLock<Policy>,
    pub(super) counters: Counters,
}

#[derive(Debug, Default)]
struct Forwards {
    next: u64,
    open: BTreeMap<u64, Arc<Listener>>,
}

impl Shared {
    pub(super) fn new(epoll: OwnedFd) -> Self {
        Self {
            epoll: Arc::new(epoll),
            forwards: Mutex::default(),
            policy: RwLock::default(),
            counters: Counters::default(),
        }
    }

    fn forwards(&self) -> MutexGuard<'_, Forwards> {
        self.forwards.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The forward with the token `token`, if it is still there.
    pub(super) fn listener(&self, token: u64) -> Option<Arc<Listener>> {
        self.forwards().open.get(&token).cloned()
    }
}

/// A NAT from outside: its forwards and statistics. Cheap to clone; works from any thread, and while
/// the guest runs.
#[derive(Clone, Debug)]
pub struct NatHandle {
    pub(super) shared: Arc<Shared>,
}

impl NatHandle {
    /// Begins to forward; gives the forward with the port that the host chose, where it is 0.
    ///
    /// # Errors
    /// [`NatError::Bind`] where the port cannot be had.
    pub fn forward(&self, forward: Forward) -> Result<Forward, NatError> {
        let listener = Arc::new(Listener::open(&forward)?);
        let forward = listener.forward;
        let mut forwards = self.shared.forwards();
        let token = FORWARD | forwards.next;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&*self.shared.epoll, &listener, epoll::EventData::new_u64(token), flags)
            .map_err(|error| NatError::Host { op: "epoll_ctl", source: error.into() })?;
        forwards.next += 1;
        forwards.open.insert(token, listener);
        Ok(forward)
    }

    /// Ends a forward, as [`NatHandle::forward`] gave it. Its TCP connections go on. Returns whether
    /// it was there.
    pub fn remove_forward(&self, forward: &Forward) -> bool {
        let mut forwards = self.shared.forwards();
        let before = forwards.open.len();
        forwards.open.retain(|_, listener| {
            let gone = listener.forward == *forward;
            if gone && let Err(error) = epoll::delete(&*self.shared.epoll, listener) {
                log::warn!("NAT: forward {forward}: epoll_ctl: {error}");
            }
            !gone
        });
        forwards.open.len() < before
    }

    /// The forwards that there are.
    pub fn forwards(&self) -> Vec<Forward> {
        self.shared.forwards().open.values().map(|listener| listener.forward).collect()
    }

    /// What the NAT has done.
    pub fn stats(&self) -> NatStats {
        self.shared.counters.load()
    }

    /// The rules of the egress policy, in the order in which they are asked, with what they decided.
    pub fn rules(&self) -> Vec<RuleCount> {
        self.shared.policy.read().unwrap_or_else(PoisonError::into_inner).counts()
    }
}
