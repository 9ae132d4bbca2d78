//! What interrupts a vCPU on the thread of Python's signal handlers, so that it can look for signals.

use std::process;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use vmcore::VcpuHandle;

use crate::wait::LOOK;

/// One thread for all, which sleeps while no vCPU runs there. It never calls Python.
static TICKER: Ticker =
    Ticker { state: Mutex::new(State { process: 0, running: Vec::new(), next: 0 }), changed: Condvar::new() };

struct Ticker {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// Whose thread there is: a forked child has none.
    process: u32,
    running: Vec<(u64, VcpuHandle)>,
    next: u64,
}

/// Kicks a vCPU every now and then, while it lives.
pub struct Ticks(u64);

impl Ticks {
    /// Begins to kick `handle`.
    pub fn of(handle: VcpuHandle) -> vmcore::Result<Self> {
        let mut state = TICKER.state();
        if state.process != process::id() {
            state.running.clear();
            thread::Builder::new()
                .name("vmcore ticks".into())
                .spawn(|| TICKER.run())
                .map_err(|e| vmcore::Error::os("pthread_create", "the thread that looks for signals", e))?;
            state.process = process::id();
        }
        let number = state.next;
        state.next += 1;
        state.running.push((number, handle));
        drop(state);
        TICKER.changed.notify_one();
        Ok(Self(number))
    }
}

impl Drop for Ticks {
    fn drop(&mut self) {
        TICKER.state().running.retain(|(number, _)| *number != self.0);
    }
}

impl Ticker {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        loop {
            let mut state = self.state();
            while state.running.is_empty() {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            drop(state);
            thread::sleep(LOOK);
            for (_, handle) in &self.state().running {
                handle.kick();
            }
        }
    }
}
