//! Stopping a running vCPU from any thread without a signal handler.
//!
//! A kick sets the `immediate_exit` byte of the vCPU's `kvm_run` page, which makes the next KVM_RUN
//! return at once, and signals the thread that is inside [`run`](super::vcpu), if there is one, for
//! a KVM_RUN that has begun. The signal is blocked in that thread while it runs the vCPU, and only
//! KVM_RUN itself unblocks it (KVM_SET_SIGNAL_MASK): it ends KVM_RUN and stays pending, to be taken
//! off by `sigtimedwait`. So it is never delivered, needs no handler, and the signals and masks of
//! the host program stay what they are.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VcpuFd;

use super::sys::{self, ImmediateExit};
use crate::backend::Kick;
use crate::error::{Error, Result};

/// Which real-time signal kicks: `SIGRTMIN` plus this. A program that uses the signal itself must
/// not expect it on a thread that runs a vCPU.
pub const KICK_SIGNAL_OFFSET: i32 = 5;

fn kick_signal() -> i32 {
    libc::SIGRTMIN() + KICK_SIGNAL_OFFSET
}

#[derive(Debug)]
struct State {
    /// Gone with the vCPU: a mapping of kvm_run keeps the whole VM alive in the kernel.
    immediate_exit: Option<Arc<ImmediateExit>>,
    /// The thread inside run().
    runner: Option<libc::pid_t>,
    /// A signal has been sent to `runner`.
    signalled: bool,
}

/// What a vCPU and its handles share.
#[derive(Debug)]
pub(super) struct KvmKick {
    state: Mutex<State>,
}

impl KvmKick {
    pub(super) fn new(immediate_exit: Arc<ImmediateExit>) -> Arc<Self> {
        let state = State { immediate_exit: Some(immediate_exit), runner: None, signalled: false };
        Arc::new(Self { state: Mutex::new(state) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The vCPU is gone: from now on kicks do nothing.
    pub(super) fn disarm(&self) {
        self.lock().immediate_exit = None;
    }
}

impl Kick for KvmKick {
    fn kick(&self) {
        let mut state = self.lock();
        let Some(immediate_exit) = &state.immediate_exit else { return };
        immediate_exit.byte().store(1, Ordering::SeqCst);
        // While the lock is held the thread cannot leave run(), so the id cannot be another's.
        // One signal is enough: it stays pending until the thread has seen the byte.
        if let (Some(tid), false) = (state.runner, state.signalled) {
            sys::signal_thread(tid, kick_signal());
            state.signalled = true;
        }
    }
}

/// The calling thread runs the vCPU while this lives.
pub(super) struct Running<'a> {
    kick: &'a KvmKick,
    /// The thread's own signal mask.
    mask: u64,
}

impl<'a> Running<'a> {
    /// Blocks the kick signal and announces the thread. `cached` is the mask that KVM has.
    pub(super) fn enter(kick: &'a KvmKick, vcpu: &VcpuFd, cached: &mut Option<u64>) -> Result<Self> {
        let bit = sys::signal_bit(kick_signal());
        let mask = sys::block_signals(bit).map_err(|e| Error::os("rt_sigprocmask", "SIG_BLOCK", e))?;
        let running = Self { kick, mask };
        let inside = mask & !bit;
        if *cached != Some(inside) {
            sys::set_signal_mask(vcpu, inside).map_err(|e| Error::os("KVM_SET_SIGNAL_MASK", "", e))?;
            *cached = Some(inside);
        }
        kick.lock().runner = Some(sys::thread_id());
        Ok(running)
    }

    /// After KVM_RUN returned EINTR: takes the signal off, so that the next KVM_RUN can begin.
    ///
    /// A signal that is taken here without `immediate_exit` being seen was not sent by us.
    pub(super) fn interrupted(&self) {
        sys::drain_signals(sys::signal_bit(kick_signal()));
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let signalled = {
            let mut state = self.kick.lock();
            state.runner = None;
            std::mem::take(&mut state.signalled)
        };
        // A kick may have come after KVM_RUN had returned: unblocked, its signal would kill us.
        if signalled {
            sys::drain_signals(sys::signal_bit(kick_signal()));
        }
        if let Err(error) = sys::restore_signals(self.mask) {
            log::error!("the signal mask of a vCPU's thread could not be restored: {error}");
        }
    }
}
