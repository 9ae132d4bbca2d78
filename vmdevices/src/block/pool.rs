//! A few threads that wait for the host's files, so that nobody else does.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

type Task = Box<dyn FnOnce() + Send>;

/// Threads that run tasks in the order given, several at a time. A thread begins when a task finds
/// none that is idle, so a disk that is never waited for has none. Dropping it waits for all tasks.
#[derive(Debug)]
pub(crate) struct Pool {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    most: usize,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    tasks: VecDeque<Task>,
    idle: usize,
    closed: bool,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.lock();
        f.debug_struct("Shared").field("tasks", &state.tasks.len()).field("idle", &state.idle).finish()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut state = self.lock();
        loop {
            if let Some(task) = state.tasks.pop_front() {
                drop(state);
                task();
                state = self.lock();
            } else if state.closed {
                return;
            } else {
                state.idle += 1;
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
            }
        }
    }
}

impl Pool {
    /// A pool of at most `most` threads.
    pub(crate) fn new(most: usize) -> Self {
        Self { shared: Arc::default(), threads: Mutex::default(), most: most.max(1) }
    }

    /// Has `task` run. It must not panic.
    pub(crate) fn run(&self, task: impl FnOnce() + Send + 'static) {
        let idle = {
            let mut state = self.shared.lock();
            state.tasks.push_back(Box::new(task));
            state.idle >= state.tasks.len()
        };
        if !idle {
            self.add_thread();
        }
        self.shared.changed.notify_one();
    }

    fn add_thread(&self) {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        if threads.len() >= self.most {
            return;
        }
        let shared = self.shared.clone();
        match std::thread::Builder::new().name("vmcore-disk".into()).spawn(move || shared.work()) {
            Ok(thread) => threads.push(thread),
            Err(error) => {
                log::warn!("cannot start a thread for a disk's requests: {error}");
                if threads.is_empty() {
                    // Slow is better than never.
                    while let Some(task) = { self.shared.lock().tasks.pop_front() } {
                        task();
                    }
                }
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
        let threads = self.threads.get_mut().unwrap_or_else(PoisonError::into_inner);
        for thread in threads.drain(..) {
            // Only tasks could panic, and they do not.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::channel;
    use std::time::Duration;

    #[test]
    fn tasks_run_side_by_side_and_all_of_them() {
        let pool = Pool::new(3);
        assert_eq!(pool.threads.lock().unwrap().len(), 0);
        let (count, (all, here)) = (Arc::new(AtomicUsize::new(0)), channel());
        let gate = Arc::new(std::sync::Barrier::new(4));
        for _ in 0..3 {
            let (gate, all) = (gate.clone(), all.clone());
            pool.run(move || {
                gate.wait();
                all.send(()).unwrap();
            });
        }
        // The three wait for each other and for this thread: they are all under way.
        gate.wait();
        (0..3).for_each(|_| here.recv_timeout(Duration::from_secs(10)).unwrap());
        for _ in 0..100 {
            let count = count.clone();
            pool.run(move || {
                count.fetch_add(1, Ordering::SeqCst);
            });
        }
        assert!(pool.threads.lock().unwrap().len() <= 3);
        drop(pool);
        assert_eq!(count.load(Ordering::SeqCst), 100);
    }
}
