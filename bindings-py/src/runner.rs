//! A run of a built VM on a thread of its own, so that the thread that waits for it can look for signals.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use pyo3::prelude::*;
use vmcore::{Error, Outcome};

use crate::callback::Sink;
use crate::console::Bell;
use crate::error;
use crate::wait;

/// A VM that may be gone.
pub type Slot = Arc<Mutex<Option<vmcore::Vm>>>;

/// How long a run may take.
#[derive(Clone, Copy)]
pub enum Limit {
    None,
    Time(Duration),
    Instructions(u64),
}

/// How a run ended.
enum End {
    Outcome(Outcome),
    Failed(Arc<Error>),
    Raised(PyErr),
}

#[derive(Default)]
struct State {
    running: bool,
    end: Option<End>,
    /// What is told of the next end.
    waiting: Vec<Py<PyAny>>,
}

/// The runs of one VM.
#[derive(Default)]
pub struct Runner {
    state: Mutex<State>,
    changed: Condvar,
}

impl Runner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn is_running(&self) -> bool {
        self.state().running
    }

    /// How the last run ended, where none is under way.
    pub fn ended(&self) -> Option<String> {
        self.state().end.as_ref().map(|end| match end {
            End::Outcome(outcome) => format!("{outcome:?}"),
            End::Failed(error) => error.to_string(),
            End::Raised(_) => "by an exception".into(),
        })
    }

    /// Begins a run. `bell` rings when it ends.
    pub fn start(
        self: &Arc<Self>,
        slot: &Slot,
        limit: Limit,
        sink: &Arc<Sink>,
        bell: Option<Arc<Bell>>,
    ) -> PyResult<()> {
        {
            let mut state = self.state();
            if state.running {
                return Err(error::wrong_state("run", "running", "wait for that run to end"));
            }
            state.running = true;
            state.end = None;
        }
        let (runner, slot, sink) = (self.clone(), slot.clone(), sink.clone());
        let body = move || {
            let end = run(&slot, limit);
            // Not longer than the run itself: who waits may close the VM at once.
            drop(slot);
            let end = sink.take().map_or(end, End::Raised);
            let waiting = {
                let mut state = runner.state();
                state.running = false;
                state.end = Some(end);
                std::mem::take(&mut state.waiting)
            };
            runner.changed.notify_all();
            bell.inspect(|bell| bell.ring());
            if !waiting.is_empty() {
                Python::try_attach(|py| {
                    for function in waiting {
                        if let Err(error) = function.call0(py) {
                            error.write_unraisable(py, Some(function.bind(py)));
                        }
                    }
                });
            }
        };
        thread::Builder::new().name("vmcore run".into()).spawn(body).map(drop).map_err(|e| {
            self.state().running = false;
            error::exception(&Error::os("pthread_create", "the thread that runs the VM", e))
        })
    }

    /// Calls `function` when the run that is under way ends; at once where there is none.
    pub fn when_ended(&self, function: Py<PyAny>) -> Option<Py<PyAny>> {
        let mut state = self.state();
        if state.running {
            state.waiting.push(function);
            return None;
        }
        Some(function)
    }

    /// Waits until no run is under way; `None` where the time is over.
    pub fn wait(&self, py: Python<'_>, deadline: Option<Instant>) -> PyResult<Option<Outcome>> {
        let done = wait::until(py, deadline, Duration::from_secs(3600), |slice| self.idle_within(slice))?;
        if done.is_none() {
            return Ok(None);
        }
        // Python is not called with the lock held: it may let other threads go on, and those want it.
        let end = self.state().end.as_ref().map(|end| match end {
            End::Outcome(outcome) => Ok(*outcome),
            End::Failed(error) => Err(Ok(error.clone())),
            End::Raised(error) => Err(Err(error.clone_ref(py))),
        });
        match end {
            Some(Ok(outcome)) => Ok(Some(outcome)),
            Some(Err(Ok(error))) => Err(error::exception(&error)),
            Some(Err(Err(error))) => Err(error),
            None => Err(error::wrong_state("wait", "not started", "start it first")),
        }
    }

    fn idle_within(&self, limit: Duration) -> Option<()> {
        let state = self.state();
        let (state, _) = self
            .changed
            .wait_timeout_while(state, limit, |state| state.running)
            .unwrap_or_else(PoisonError::into_inner);
        (!state.running).then_some(())
    }

    /// Waits until no run is under way, whatever signals come. Without the GIL.
    pub fn settle(&self) {
        let state = self.state();
        drop(self.changed.wait_while(state, |state| state.running).unwrap_or_else(PoisonError::into_inner));
    }
}

fn run(slot: &Slot, limit: Limit) -> End {
    let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
    let gone = || Error::WrongState { op: "run", state: "closed", fix: "make another" };
    let result = slot.as_mut().ok_or_else(gone).and_then(|vm| match limit {
        Limit::None => vm.run(),
        Limit::Time(limit) => vm.run_for(limit),
        Limit::Instructions(count) => vm.run_instructions(count),
    });
    result.map_or_else(|error| End::Failed(Arc::new(error)), End::Outcome)
}
