//! Running a VM: one thread per vCPU, and the state they and their controllers share.
//!
//! A vCPU's thread owns its [`Vcpu`] while it runs and parks between runs. All decisions are made
//! under one lock, [`Shared::state`]; whoever changes it kicks the vCPUs, and kicks are never lost,
//! so a thread always comes back to look. No other lock is taken while that one is held.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::io_thread::{Hold, IoThread, mark_vm_thread, on_vm_thread};
use super::turns::{Turn, Turns};
use super::{Inside, VmStats, hash};
use crate::backend::{VcpuExit, VcpuHandle};
use crate::deterministic::StateHash;
use crate::error::{Error, Result};
use crate::state::{MachineState, VcpuState};
use crate::vcpu::Vcpu;

use serde::{Deserialize, Serialize};

/// What made the guest's machine reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ResetCause {
    /// The keyboard controller's reset line (i8042, command 0xFE).
    Keyboard,
    /// The reset control register at port 0xCF9.
    Port,
    /// The ACPI reset register, where it is not port 0xCF9.
    Acpi,
    /// A triple fault.
    TripleFault,
}

/// How a run of the guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Outcome {
    /// The guest switched itself off (ACPI S5).
    PowerOff,
    /// The guest reset itself. To boot again, build the VM again.
    Reset(ResetCause),
    /// The guest wrote this value to the exit port.
    Exit(u32),
    /// The guest's kernel panicked, and told so.
    Panicked,
    /// Every vCPU is halted with interrupts off or was never started: nothing can wake the guest.
    Halted,
    /// The host failed a device (a disk whose file system is full, say) that was told to stop the VM then. The
    /// device knows more. The VM can go on: the next run has the device try again.
    IoError,
    /// The host stopped the run; it can go on.
    Stopped,
    /// The time given to the run is over; it can go on.
    TimeLimit,
    /// The instructions given to the run are executed; it can go on.
    InstructionLimit,
}

impl Outcome {
    /// Whether another run can go on from here.
    fn resumable(self) -> bool {
        matches!(self, Outcome::IoError | Outcome::Stopped | Outcome::TimeLimit | Outcome::InstructionLimit)
    }

    fn as_state(self) -> &'static str {
        match self {
            Outcome::PowerOff => "switched off",
            Outcome::Reset(_) => "reset",
            Outcome::Exit(_) => "ended by its exit port",
            Outcome::Panicked => "panicked",
            Outcome::Halted => "halted for good",
            Outcome::IoError | Outcome::Stopped | Outcome::TimeLimit | Outcome::InstructionLimit => "stopped",
        }
    }
}

/// How long a guest may look idle before it is looked at. A look costs an idle guest one exit.
const IDLE_LOOK: Duration = Duration::from_millis(100);
const IDLE_LOOK_MAX: Duration = Duration::from_secs(2);

/// How long turns of vCPUs that wait for the host are apart.
const TURNS_LOOK: Duration = Duration::from_millis(5);

#[derive(Debug, Default)]
struct State {
    /// [`Vm::run`](super::Vm::run) is under way.
    running: bool,
    /// How many [`Paused`] guards there are.
    pauses: usize,
    /// Threads are to end.
    quit: bool,
    /// How many vCPU threads there are, and how many wait for permission to run.
    threads: usize,
    parked: usize,
    /// How the run ended, until the run takes it.
    ended: Option<Result<Outcome>>,
    /// A device waits for the next run to try again, even where another reason ended the run.
    retry: bool,
    /// The guest is gone for good: how.
    over: Option<&'static str>,
    /// The count of instructions at which the run of a deterministic VM ends.
    limit: u64,
    /// How many vCPUs sleep for good, as counted since look number `look`.
    look: u64,
    asleep: usize,
    /// When the first vCPU first entered the guest.
    first_entry: Option<Instant>,
}

impl State {
    fn may_run(&self) -> bool {
        self.running && self.pauses == 0 && self.ended.is_none()
    }
}

#[derive(Default)]
pub(super) struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    handles: Mutex<Vec<VcpuHandle>>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add_handle(&self, handle: VcpuHandle) {
        self.handles.lock().unwrap_or_else(PoisonError::into_inner).push(handle);
    }

    pub(super) fn kick_all(&self) {
        for handle in self.handles.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            handle.kick();
        }
    }

    /// Ends the run; the first to say so counts.
    fn end(&self, how: Result<Outcome>) {
        {
            let mut state = self.state();
            state.retry |= matches!(how, Ok(Outcome::IoError));
            // What the guest did must not be lost to a stop or time limit that came just before.
            let final_one = how.as_ref().map_or(true, |outcome| !outcome.resumable());
            match &state.ended {
                Some(Ok(before)) if before.resumable() && final_one => {}
                Some(_) => return,
                None => {}
            }
            state.ended = Some(how);
        }
        self.changed.notify_all();
        self.kick_all();
    }

    /// Waits until no vCPU thread is in the guest.
    fn wait_for_parked(&self) -> MutexGuard<'_, State> {
        let mut state = self.state();
        while state.parked < state.threads {
            state = self.wait(state);
        }
        state
    }

    pub(super) fn first_entry(&self) -> Option<Instant> {
        self.state().first_entry
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.state().fmt(f)
    }
}

/// A machine's off and reset switch: what devices hold, to end the guest.
///
/// Clones act on the same VM. May be called from any thread, device callbacks included.
#[derive(Clone, Debug)]
pub struct Control(pub(super) Arc<Shared>);

impl Control {
    /// A switch of no machine, for tests of devices, which can look at [`Control::asked`].
    pub fn detached() -> Self {
        Self(Arc::default())
    }

    /// What the run is to end with, where it has not ended yet. `None` also for an error.
    pub fn asked(&self) -> Option<Outcome> {
        self.0.state().ended.as_ref().and_then(|ended| ended.as_ref().ok().copied())
    }

    /// Ends the run that is under way, or the next one at its begin, with `outcome`. Where several
    /// say so the first counts. The vCPU that calls this from an I/O callback runs no further
    /// instruction.
    pub fn end(&self, outcome: Outcome) {
        self.0.end(Ok(outcome));
    }

    /// Ends the run with an error, for a device that cannot go on.
    pub fn fail(&self, error: Error) {
        self.0.end(Err(error));
    }
}

/// The vCPU threads of a VM.
pub(super) struct Threads {
    pub(super) shared: Arc<Shared>,
    vcpus: Vec<Arc<Mutex<Vcpu>>>,
    /// Of a deterministic VM, all of whose vCPUs have one thread.
    turns: Option<Arc<Mutex<Turns>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Threads {
    pub(super) fn new(
        shared: Arc<Shared>,
        vcpus: &[Arc<Mutex<Vcpu>>],
        turns: Option<Arc<Mutex<Turns>>>,
    ) -> Self {
        for vcpu in vcpus {
            shared.add_handle(lock(vcpu).handle());
        }
        Self { shared, vcpus: vcpus.to_vec(), turns, threads: Vec::new() }
    }

    fn start(&mut self) -> Result<()> {
        let threads = if self.turns.is_some() { 1 } else { self.vcpus.len() };
        for id in self.threads.len()..threads {
            let (shared, vcpus, turns) = (self.shared.clone(), self.vcpus.clone(), self.turns.clone());
            self.shared.state().threads += 1;
            let body = move || {
                mark_vm_thread();
                let work = || match &turns {
                    Some(turns) => turns_thread(&shared, &vcpus, turns),
                    None => vcpu_thread(&shared, &vcpus[id]),
                };
                if catch_unwind(AssertUnwindSafe(work)).is_err() {
                    shared.end(Err(Error::device(format!("vcpu{id}"), "a device callback panicked")));
                    let mut state = shared.state();
                    state.threads -= 1;
                    drop(state);
                    shared.changed.notify_all();
                }
            };
            let thread = std::thread::Builder::new().name(format!("vcpu{id}")).spawn(body).map_err(|e| {
                self.shared.state().threads -= 1;
                Error::os("pthread_create", format_args!("vCPU {id}"), e)
            })?;
            self.threads.push(thread);
        }
        Ok(())
    }

    /// Lets the vCPUs run, and `io_threads` serve them, until the guest ends, `deadline` passes, the
    /// count of instructions is `limit`, or somebody stops it. Before, `retry` is called where a device asked
    /// for it by [`Outcome::IoError`].
    pub(super) fn run(
        &mut self,
        deadline: Option<Instant>,
        limit: u64,
        io_threads: &[IoThread],
        retry: impl FnOnce(),
    ) -> Result<Outcome> {
        if on_vm_thread() {
            return Err(Error::WrongState {
                op: "run",
                state: "calling a device",
                fix: "call it from a thread that is not the VM's own",
            });
        }
        if let Some(over) = self.shared.state().over {
            return Err(Error::WrongState { op: "run", state: over, fix: "build the VM again" });
        }
        self.start()?;
        let asked = {
            let mut state = self.shared.state();
            // One that was told of in between ends this run, and is tried again by the next.
            state.ended.is_none() && std::mem::take(&mut state.retry)
        };
        if asked {
            retry();
        }
        {
            let mut state = self.shared.state();
            state.running = true;
            state.limit = limit;
        }
        self.shared.changed.notify_all();
        // After the vCPUs, whose first instructions need none of them.
        if let Err(error) = io_threads.iter().try_for_each(IoThread::start) {
            self.shared.end(Err(error));
        }
        let mut state = self.shared.state();
        let mut patience = IDLE_LOOK;
        let mut idle_since = None;
        while state.ended.is_none() {
            let now = Instant::now();
            let left = deadline.map(|deadline| deadline.saturating_duration_since(now));
            if left == Some(Duration::ZERO) {
                state.ended = Some(Ok(Outcome::TimeLimit));
                break;
            }
            let wait = patience.min(left.unwrap_or(patience));
            let waited = self.shared.changed.wait_timeout(state, wait);
            let timeout;
            (state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            let early = !timeout.timed_out() || now.elapsed() < patience;
            // Vcpus that take turns see for themselves that all of them sleep.
            if state.ended.is_some() || early || self.turns.is_some() {
                continue;
            }
            drop(state);
            let spent = self.cpu_time();
            idle_since = match idle_since {
                // The look itself costs CPU time, so the next period begins afresh.
                Some(before) if before == spent => {
                    patience = (patience * 2).min(IDLE_LOOK_MAX);
                    self.look();
                    None
                }
                Some(_) => {
                    patience = IDLE_LOOK;
                    Some(spent)
                }
                None => Some(spent),
            };
            state = self.shared.state();
        }
        // Bring the threads home before the caller gets the VM back.
        state.running = false;
        drop(state);
        self.shared.kick_all();
        let mut state = self.shared.wait_for_parked();
        let ended = state.ended.take().unwrap_or(Ok(Outcome::Stopped));
        state.over = match &ended {
            Ok(outcome) if outcome.resumable() => None,
            Ok(outcome) => Some(outcome.as_state()),
            Err(_) => Some("ended by an error"),
        };
        ended
    }

    /// CPU time that the vCPU threads have used, in clock readings that only change when one ran.
    fn cpu_time(&self) -> Vec<Option<Duration>> {
        self.threads.iter().map(super::thread_clock::cpu_time).collect()
    }

    /// Has every vCPU that runs come out and say whether it sleeps for good.
    fn look(&self) {
        {
            let mut state = self.shared.state();
            state.look += 1;
            state.asleep = 0;
        }
        self.shared.kick_all();
    }
}

impl Threads {
    /// Ends the vCPU threads, wherever they are.
    pub(super) fn end(&mut self) {
        self.shared.state().quit = true;
        self.shared.changed.notify_all();
        self.shared.kick_all();
        for thread in self.threads.drain(..) {
            // A VM dropped by one of its own threads cannot wait for that one.
            if thread.thread().id() != std::thread::current().id() {
                // The thread has caught and told its panics.
                drop(thread.join());
            }
        }
    }
}

/// Waits until vCPUs may run; `false`: never more.
fn park(shared: &Shared) -> bool {
    let mut state = shared.state();
    state.parked += 1;
    shared.changed.notify_all();
    while !state.quit && !state.may_run() {
        state = shared.wait(state);
    }
    if state.quit {
        return false;
    }
    state.parked -= 1;
    state.first_entry.get_or_insert_with(Instant::now);
    true
}

/// Runs the vCPUs of a deterministic VM in turn.
fn turns_thread(shared: &Shared, vcpus: &[Arc<Mutex<Vcpu>>], turns: &Mutex<Turns>) {
    while park(shared) {
        let mut vcpus: Vec<_> = vcpus.iter().map(|vcpu| lock(vcpu)).collect();
        let mut turns = turns.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let state = shared.state();
            if state.quit || !state.may_run() {
                break;
            }
            let limit = state.limit;
            drop(state);
            match turns.take(&mut vcpus, limit) {
                Ok(Turn::Over) => {}
                Ok(Turn::Idle) => {
                    let state = shared.state();
                    if !state.quit && state.may_run() {
                        drop(shared.changed.wait_timeout(state, TURNS_LOOK));
                    }
                }
                Ok(Turn::Ended(outcome)) => shared.end(Ok(outcome)),
                Err(error) => shared.end(Err(error)),
            }
        }
    }
}

fn vcpu_thread(shared: &Shared, vcpu: &Mutex<Vcpu>) {
    let mut looked = 0;
    while park(shared) {
        let mut vcpu = lock(vcpu);
        loop {
            let exit = vcpu.run();
            match exit {
                Ok(VcpuExit::Kicked | VcpuExit::InstructionLimit) => {}
                Ok(VcpuExit::TripleFault) => shared.end(Ok(Outcome::Reset(ResetCause::TripleFault))),
                // Without interrupt controllers nothing wakes a halted vCPU.
                Ok(VcpuExit::Halted | VcpuExit::Waiting) => shared.end(Ok(Outcome::Halted)),
                Ok(VcpuExit::Debug { .. }) => shared.end(Ok(Outcome::Stopped)),
                Err(error) => shared.end(Err(error)),
            }
            let state = shared.state();
            if state.quit || !state.may_run() {
                break;
            }
            let look = state.look;
            drop(state);
            if look != looked {
                looked = look;
                answer_look(shared, &vcpu, look);
            }
        }
    }
}

/// Counts a vCPU that sleeps for good; where all do, the guest has halted.
fn answer_look(shared: &Shared, vcpu: &Vcpu, look: u64) {
    if !vcpu.sleeps_for_good().unwrap_or(false) {
        return;
    }
    let mut state = shared.state();
    if state.look == look {
        state.asleep += 1;
        if state.asleep == state.threads {
            drop(state);
            shared.end(Ok(Outcome::Halted));
        }
    }
}

/// A handle on a VM for other threads: pause, resume, stop. Clones mean the same VM.
///
/// It does not keep the VM alive.
#[derive(Clone)]
pub struct VmHandle {
    pub(super) shared: Arc<Shared>,
    pub(super) inside: Weak<Inside>,
}

impl VmHandle {
    /// Ends the run that is under way, or the next one at its begin, with [`Outcome::Stopped`].
    pub fn stop(&self) {
        self.shared.end(Ok(Outcome::Stopped));
    }

    /// Holds all vCPUs and device threads until the guard is dropped. Returns once they stand still;
    /// several guards may live at once. A VM that does not run can be paused too: its next run
    /// then begins when the last guard goes.
    ///
    /// # Errors
    /// [`Error::WrongState`] where a device's callback asks for it, which would wait for itself, and
    /// where the VM is gone.
    pub fn pause(&self) -> Result<Paused> {
        let wrong = |state, fix| Error::WrongState { op: "pause", state, fix };
        if on_vm_thread() {
            return Err(wrong("calling a device", "pause from a thread that is not the VM's own"));
        }
        let inside =
            self.inside.upgrade().ok_or_else(|| wrong("dropped", "keep the Vm while you use its handles"))?;
        self.shared.state().pauses += 1;
        // From here on the guard undoes what was done.
        let mut paused = Paused { shared: self.shared.clone(), inside, holds: Vec::new() };
        self.shared.kick_all();
        drop(self.shared.wait_for_parked());
        paused.holds = paused.inside.io_threads.iter().map(IoThread::hold).collect();
        Ok(paused)
    }

    /// What the VM did so far, also while it runs: it stands still for the answer.
    ///
    /// # Errors
    /// As [`VmHandle::pause`].
    pub fn stats(&self) -> Result<VmStats> {
        let paused = self.pause()?;
        let mut stats = VmStats {
            first_entry: self.shared.first_entry(),
            backend_vm: paused.inside.vm.backend_stats(),
            ..VmStats::default()
        };
        for vcpu in &paused.inside.vcpus {
            let vcpu = lock(vcpu);
            stats.vcpus.push(vcpu.stats());
            stats.backend_vcpus.push(vcpu.backend_stats());
        }
        Ok(stats)
    }
}

impl fmt::Debug for VmHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VmHandle").field("shared", &self.shared).finish_non_exhaustive()
    }
}

/// The vCPUs and machine of a VM, without its memory and devices.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmState {
    /// One state a vCPU, in the order of their numbers.
    pub vcpus: Vec<VcpuState>,
    /// Interrupt controllers and clock.
    pub machine: MachineState,
}

/// A VM that stands still. It goes on when this is dropped, or by [`Paused::resume`], on any thread.
pub struct Paused {
    shared: Arc<Shared>,
    inside: Arc<Inside>,
    holds: Vec<Hold>,
}

impl Paused {
    /// Lets the VM go on, where no other guard holds it.
    pub fn resume(self) {}

    /// The state of vCPUs and machine. Memory can be read through [`Vm::memory`](super::Vm::memory);
    /// devices are not part of it.
    ///
    /// # Errors
    /// Where the host refuses.
    pub fn save(&self) -> Result<VmState> {
        let vcpus = self.inside.vcpus.iter().map(|vcpu| lock(vcpu).save()).collect::<Result<_>>()?;
        Ok(VmState { vcpus, machine: self.inside.vm.save()? })
    }

    /// A fingerprint of the state of vCPUs, machine, memory and devices.
    ///
    /// # Errors
    /// Where the host or a device refuses to give its state.
    pub fn state_hash(&self) -> Result<StateHash> {
        hash::of(&self.inside, &self.save()?)
    }

    /// Takes over a state that [`Paused::save`] gave, of this VM or of one built alike.
    ///
    /// # Errors
    /// [`Error::State`] where the VM was built differently. vCPUs before the one that failed are
    /// changed by then.
    pub fn restore(&self, state: &VmState) -> Result<()> {
        if state.vcpus.len() != self.inside.vcpus.len() {
            return Err(Error::State {
                what: "a VM",
                expected: format!("{} vCPUs", self.inside.vcpus.len()),
                found: format!("{} vCPUs", state.vcpus.len()),
            });
        }
        self.inside.vm.restore(&state.machine)?;
        for (vcpu, state) in self.inside.vcpus.iter().zip(&state.vcpus) {
            lock(vcpu).restore(state)?;
        }
        Ok(())
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        self.holds.clear();
        self.shared.state().pauses -= 1;
        self.shared.changed.notify_all();
    }
}

impl fmt::Debug for Paused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Paused").finish_non_exhaustive()
    }
}

fn lock(vcpu: &Mutex<Vcpu>) -> MutexGuard<'_, Vcpu> {
    vcpu.lock().unwrap_or_else(PoisonError::into_inner)
}
