//! What interrupts a vCPU, so that its thread can look for signals and at the clock.

use std::process;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use vmcore::VcpuHandle;

use crate::wait::LOOK;

/// One thread for all, which sleeps while no vCPU wants it. It never calls Python.
static TICKER: Ticker =
    Ticker { state: Mutex::new(State { process: 0, running: Vec::new(), next: 0 }), changed: Condvar::new() };

struct Ticker {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// Whose thread there is: a forked child has none.
    process: u32,
    running: Vec<Running>,
    next: u64,
}

struct Running {
    number: u64,
    handle: VcpuHandle,
    /// When its time is over.
    due: Option<Instant>,
}

/// Kicks a vCPU every now and then, while it lives.
pub struct Ticks(u64);

impl Ticks {
    /// Begins to kick `handle`, at `due` too.
    pub fn of(handle: VcpuHandle, due: Option<Instant>) -> vmcore::Result<Self> {
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
        state.running.push(Running { number, handle, due });
        drop(state);
        TICKER.changed.notify_one();
        Ok(Self(number))
    }
}

impl Drop for Ticks {
    fn drop(&mut self) {
        TICKER.state().running.retain(|running| running.number != self.0);
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
            let due = state.running.iter().filter_map(|running| running.due).min();
            // Where it is over the run may yet have to begin: a kick that comes before is lost on nobody.
            let slice = due.map_or(LOOK, |due| due.saturating_duration_since(Instant::now()));
            let slice = slice.clamp(Duration::from_millis(1), LOOK);
            let waited = self.changed.wait_timeout(state, slice).unwrap_or_else(PoisonError::into_inner);
            for running in &waited.0.running {
                running.handle.kick();
            }
        }
    }
}
