//! What other threads see of a software vCPU: how they get its attention, and know that it has
//! taken notice.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::chip::Posted;
use crate::backend::Kick;

/// Reasons to leave the guest's code for a moment. A block is the longest that a vCPU goes without
/// looking.
pub(in crate::soft) mod attention {
    /// `run` shall return.
    pub(in crate::soft) const KICK: u32 = 1;
    /// The local APIC has been sent something: interrupt, NMI, INIT, SIPI.
    pub(in crate::soft) const INTERRUPT: u32 = 1 << 1;
    /// Something that is due later may be due now: timers.
    pub(in crate::soft) const TIMER: u32 = 1 << 2;
    /// The map of guest memory has changed: drop translations and take the new map.
    pub(in crate::soft) const MEMORY: u32 = 1 << 3;
    /// Drop translations for writing: the dirty log has been read, or a page has become code.
    pub(in crate::soft) const WRITES: u32 = 1 << 4;
    /// Blocks have become stale: their pages are in [`super::Link::stale`].
    pub(in crate::soft) const CODE: u32 = 1 << 5;
    /// An event that was held off may be delivered now: IF, the task priority or an interrupt shadow
    /// has changed.
    pub(in crate::soft) const EVENT: u32 = 1 << 6;
    /// Another vCPU ends this one's HLT, or its next one (KVM_HC_KICK_CPU).
    pub(in crate::soft) const UNHALT: u32 = 1 << 7;
    /// What must be served before guest memory is used again.
    pub(in crate::soft) const BEFORE_MEMORY: u32 = MEMORY | WRITES | CODE;
}

/// One vCPU, as seen by others.
#[derive(Debug)]
pub(in crate::soft) struct Link {
    /// The vCPU's number, which is its APIC id.
    pub(in crate::soft) id: u32,
    /// Bits of [`attention`].
    attention: AtomicU32,
    /// The vCPU may use guest memory through translations it has cached.
    in_guest: AtomicBool,
    asleep: Mutex<bool>,
    wake: Condvar,
    /// Guest-physical page addresses whose blocks are stale.
    stale: Mutex<Vec<u64>>,
    /// What has been sent to the local APIC and not been taken over by it.
    pub(in crate::soft) posted: Posted,
}

impl Link {
    pub(in crate::soft) fn new(id: u32) -> Arc<Self> {
        Arc::new(Self {
            id,
            attention: AtomicU32::new(0),
            in_guest: AtomicBool::new(false),
            asleep: Mutex::new(false),
            wake: Condvar::new(),
            stale: Mutex::default(),
            posted: Posted::new(id),
        })
    }

    /// Asks for attention; wakes the vCPU where it sleeps.
    pub(in crate::soft) fn demand(&self, bits: u32) {
        self.attention.fetch_or(bits, Ordering::SeqCst);
        // The lock orders this with a vCPU that is about to sleep: it looks at the bits under it.
        let asleep = self.asleep.lock().unwrap_or_else(PoisonError::into_inner);
        if *asleep {
            self.wake.notify_all();
        }
    }

    /// Asks its own vCPU's thread, which is the caller, for attention.
    #[inline(always)]
    pub(in crate::soft) fn demand_own(&self, bits: u32) {
        self.attention.fetch_or(bits, Ordering::Relaxed);
    }

    /// Whether anything is asked for; what every block begins with.
    #[inline(always)]
    pub(in crate::soft) fn wanted(&self) -> bool {
        self.attention.load(Ordering::Relaxed) != 0
    }

    /// Which of `bits` are asked for.
    pub(in crate::soft) fn asked(&self, bits: u32) -> u32 {
        self.attention.load(Ordering::SeqCst) & bits
    }

    /// Takes those of `bits` that are asked for.
    pub(in crate::soft) fn take(&self, bits: u32) -> u32 {
        self.attention.fetch_and(!bits, Ordering::SeqCst) & bits
    }

    /// Sleeps until attention is asked for or `timeout` is over.
    pub(in crate::soft) fn sleep(&self, timeout: Option<Duration>) {
        let mut asleep = self.asleep.lock().unwrap_or_else(PoisonError::into_inner);
        if self.attention.load(Ordering::SeqCst) != 0 {
            return;
        }
        *asleep = true;
        let mut asleep = match timeout {
            Some(timeout) => {
                self.wake.wait_timeout(asleep, timeout).unwrap_or_else(PoisonError::into_inner).0
            }
            None => self.wake.wait(asleep).unwrap_or_else(PoisonError::into_inner),
        };
        *asleep = false;
    }

    /// The vCPU begins (or ceases) to use guest memory. After beginning it must serve what has been
    /// asked for of [`attention::BEFORE_MEMORY`].
    pub(in crate::soft) fn set_in_guest(&self, inside: bool) {
        self.in_guest.store(inside, Ordering::SeqCst);
    }

    /// Whether the vCPU has served `bits`, or is not in the guest and will before it is.
    pub(in crate::soft) fn has_served(&self, bits: u32) -> bool {
        self.asked(bits) == 0 || !self.in_guest.load(Ordering::SeqCst)
    }

    /// Waits until [`Link::has_served`] `bits`. Not to be called from the vCPU's own thread inside the
    /// guest.
    pub(in crate::soft) fn wait_served(&self, bits: u32) {
        let mut spins = 0u32;
        while !self.has_served(bits) {
            spins += 1;
            if spins < 1000 { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
    }

    /// Tells the vCPU that the blocks of the page at guest-physical `page` are stale.
    pub(in crate::soft) fn post_stale(&self, page: u64) {
        self.stale.lock().unwrap_or_else(PoisonError::into_inner).push(page);
        self.demand(attention::CODE);
    }

    /// The pages told by [`Link::post_stale`] since the last call.
    pub(in crate::soft) fn take_stale(&self) -> Vec<u64> {
        std::mem::take(&mut self.stale.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Kick for Link {
    fn kick(&self) {
        self.demand(attention::KICK);
    }
}
