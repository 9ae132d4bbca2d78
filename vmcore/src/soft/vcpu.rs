//! A software virtual CPU: the run loop, and what goes on between two blocks.
#![expect(unsafe_code, reason = "the callbacks of a run and the block under execution are pointers")]

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::block::Found;
use super::breakpoint::{DR6_BS, EMBEDDER};
use super::chip::{Lapic, Signals};
use super::clock::TSC_KHZ_RANGE;
use super::cpu::flags::{IF, RF, TF};
use super::cpu::op::Stop;
use super::cpu::{Cpu, Fault, Leave, Shadow, vector};
use super::link::{Link, attention};
use super::vm::Machine;
use crate::backend::{BackendVcpu, DebugConfig, VcpuExit, VcpuHandle, VcpuIo, VcpuStats};
use crate::cpuid::Cpuid;
use crate::error::{Error, Result};
use crate::memory::GuestAddress;
use crate::state::{Regs, RunState, Sregs, VcpuState};

/// Blocks between two looks at the clock: some microseconds.
const BLOCKS_PER_LOOK: u32 = 512;

/// Blocks that follow a block without the run loop's doing: see [`Cpu::follow`]. In builds that are not
/// optimized their instructions are calls within one another, which must fit a thread's stack.
const MORE_BLOCKS: u32 = 7;

/// A vCPU of the software CPU.
pub(in crate::soft) struct SoftVcpu {
    pub(in crate::soft) cpu: Cpu,
    pub(in crate::soft) run_state: RunState,
    pub(in crate::soft) debug: DebugConfig,
    /// An NMI waits until it can be delivered.
    pub(in crate::soft) nmi_pending: bool,
    /// An interrupt that a restored state had accepted and not delivered.
    pub(in crate::soft) accepted: Option<u8>,
    /// Another vCPU has ended this one's next HLT.
    pub(in crate::soft) unhalted: bool,
    /// Where the last run stopped at one of the embedder's breakpoints, to go on past it.
    stopped_at: Option<u64>,
    /// Blocks until the clock is looked at.
    blocks: u32,
}

impl SoftVcpu {
    pub(in crate::soft) fn new(machine: Arc<Machine>, link: Arc<Link>) -> Self {
        let lapic = machine
            .chipset
            .as_ref()
            .map(|chipset| Box::new(Lapic::new(link.clone(), chipset.clone(), machine.clock.clone())));
        let waits = lapic.is_some() && link.id != 0;
        let run_state = if waits { RunState::WaitForInit } else { RunState::Running };
        Self {
            cpu: Cpu::new(machine, link, lapic),
            run_state,
            debug: DebugConfig::default(),
            nmi_pending: false,
            accepted: None,
            unhalted: false,
            stopped_at: None,
            blocks: BLOCKS_PER_LOOK,
        }
    }

    /// Runs until something ends the run.
    fn enter(&mut self) -> Result<VcpuExit> {
        self.begin();
        let result = self.run_guest();
        self.cpu.link.set_in_guest(false);
        result
    }

    /// Gets ready to use guest memory.
    pub(super) fn begin(&mut self) {
        let cpu = &mut self.cpu;
        cpu.link.set_in_guest(true);
        cpu.serve_memory();
        // Restoring another vCPU may have moved the TSC on.
        cpu.tell_tsc();
        if cpu.msrs.steal_time_is_new {
            cpu.write_steal_time();
        }
        self.stopped_at = self.stopped_at.filter(|&at| at == self.cpu.linear_rip());
    }

    fn run_guest(&mut self) -> Result<VcpuExit> {
        loop {
            if let Some(exit) = self.debug_traps()? {
                return Ok(exit);
            }
            if let Some(exit) = self.between_blocks()? {
                return Ok(exit);
            }
            let stop = self.advance();
            if let Some(exit) = self.after(stop)? {
                return Ok(exit);
            }
        }
    }

    /// Whether each instruction is looked at. Traps that a load of SS holds off come behind the next.
    pub(super) fn steps(&self) -> bool {
        self.debug.single_step || self.cpu.flag(TF) || self.cpu.breakpoints.hits != 0
    }

    /// Runs blocks, or an instruction where each is looked at.
    fn advance(&mut self) -> Stop {
        // What waits for the end of a shadow comes after one instruction, and not after a block.
        let shadowed = self.cpu.held && self.cpu.shadow != Shadow::default();
        if self.steps() || shadowed {
            self.step()
        } else if self.cpu.breakpoints.execution {
            self.execute_to_breakpoint()
        } else {
            self.execute()
        }
    }

    /// Runs `turns` blocks or steps at most, or until the guest stops or waits: for fuzzing.
    #[cfg(any(test, fuzzing))]
    pub(in crate::soft) fn run_turns(&mut self, io: &mut dyn VcpuIo, turns: u32) {
        // SAFETY: `io` is borrowed until `end_io`, and a panic ends the fuzzing.
        unsafe { self.cpu.begin_io(io) };
        self.cpu.link.set_in_guest(true);
        for _ in 0..turns {
            let exit = self.debug_traps().and_then(|exit| match exit {
                None if self.run_state == RunState::Running => self.between_blocks(),
                other => Ok(other),
            });
            if self.run_state != RunState::Running || !matches!(exit, Ok(None)) {
                break;
            }
            // One block is enough.
            self.cpu.link.demand_own(attention::EVENT);
            let stop = self.advance();
            if !matches!(self.after(stop), Ok(None)) {
                break;
            }
        }
        self.cpu.link.set_in_guest(false);
        self.cpu.end_io();
    }

    /// Tells of the debug conditions that the last instruction has met: before any interrupt (SDM vol. 3A,
    /// 6.9). The embedder hears of its own first.
    pub(super) fn debug_traps(&mut self) -> Result<Option<VcpuExit>> {
        let cpu = &mut self.cpu;
        let hits = cpu.breakpoints.hits;
        if hits == 0 || cpu.shadow.mov_ss {
            return Ok(None);
        }
        let embedders = hits >> EMBEDDER;
        if embedders != 0 {
            cpu.breakpoints.hits = hits & ((1 << EMBEDDER) - 1);
            cpu.leave = Leave::Debug { dr6: embedders, exception: vector::DB };
            return self.left();
        }
        cpu.breakpoints.hits = 0;
        cpu.repeating = false;
        cpu.fault = Fault { vector: vector::DB, code: None, payload: hits };
        self.run_state = RunState::Running;
        self.after(Stop::Fault)
    }

    /// Runs blocks until one ends otherwise than by going on to the next, or attention is asked for.
    fn execute(&mut self) -> Stop {
        let cpu = &mut self.cpu;
        loop {
            let block = match cpu.find_block() {
                Ok(block) => block,
                Err(stop) => return stop,
            };
            // An interrupt shadow is over with the next block.
            let more = if cpu.in_shadow() { 0 } else { MORE_BLOCKS };
            match cpu.run_block(block, more) {
                Stop::Next => {}
                stop => return stop,
            }
            cpu.end_shadow();
            let done = 1 + more - cpu.more;
            self.blocks = self.blocks.saturating_sub(done);
            if self.blocks == 0 {
                self.blocks = BLOCKS_PER_LOOK;
                cpu.link.demand_own(attention::TIMER);
            }
            if cpu.link.wanted() {
                return Stop::Next;
            }
        }
    }

    /// Runs a block, or one instruction where there is a breakpoint in the block.
    fn execute_to_breakpoint(&mut self) -> Stop {
        let cpu = &mut self.cpu;
        let at = cpu.linear_rip();
        // The one at RIP comes before the faults of fetching.
        if cpu.flag(RF) || cpu.breakpoints.in_code(at, 1) != 0 {
            return self.step();
        }
        let block = match cpu.find_block() {
            Ok(block) => block,
            Err(stop) => return stop,
        };
        if cpu.breakpoints.in_code(at, cpu.code_len(block)) != 0 {
            return self.step();
        }
        self.stopped_at = None;
        let stop = cpu.run_block(block, 0);
        if stop == Stop::Next {
            cpu.end_shadow();
        }
        self.tick();
        stop
    }

    /// Counts a block that was not run by [`SoftVcpu::execute`].
    fn tick(&mut self) {
        self.blocks -= 1;
        if self.blocks == 0 {
            self.blocks = BLOCKS_PER_LOOK;
            self.cpu.link.demand_own(attention::TIMER);
        }
    }

    /// Runs one instruction (of a repeated one, an iteration), unless there is a breakpoint at it. Notes
    /// the trap that the guest's TF asks for.
    pub(super) fn step(&mut self) -> Stop {
        self.tick();
        if let Some(stop) = self.breakpoint() {
            return stop;
        }
        let cpu = &mut self.cpu;
        let (trap, at) = (cpu.flag(TF), cpu.rip());
        // It lasts for one instruction, and a fault of that one sets it in the flags that are saved.
        cpu.system_flags &= !RF;
        cpu.no_step = false;
        let block = match cpu.single_block() {
            Ok(block) => block,
            Err(stop) => return stop,
        };
        let mut stop = cpu.run_block(Found::new(&block), 0);
        drop(block);
        if stop == Stop::Fault {
            return stop;
        }
        if stop == Stop::Again {
            // An iteration is done (nothing else has changed a block that nobody else knows), or all of
            // an instruction that is followed by a look at what it has caused.
            if cpu.rip() == at && cpu.breakpoints.execution {
                cpu.system_flags |= RF;
            }
            // With its trap, an iteration is a step of its own.
            cpu.instructions += u64::from(cpu.rip() == at && !cpu.repeating);
            stop = Stop::Next;
        }
        cpu.end_shadow();
        // A load of SS holds the trap off.
        if trap && !cpu.no_step && !cpu.shadow.mov_ss {
            cpu.breakpoints.hits |= DR6_BS;
            if (stop, cpu.leave) == (Stop::Leave, Leave::Halt) {
                // The trap wakes it at once.
                stop = Stop::Next;
            }
        }
        if stop == Stop::Next && self.debug.single_step {
            let others = cpu.breakpoints.hits >> EMBEDDER;
            cpu.breakpoints.hits &= (1 << EMBEDDER) - 1;
            cpu.leave = Leave::Debug { dr6: DR6_BS | others, exception: vector::DB };
            return Stop::Leave;
        }
        stop
    }

    /// The stop that breakpoints on the execution of the next instruction ask for.
    fn breakpoint(&mut self) -> Option<Stop> {
        let cpu = &mut self.cpu;
        let at = cpu.linear_rip();
        let passed = self.stopped_at.take() == Some(at);
        let hits = cpu.breakpoints.in_code(at, 1);
        if hits == 0 || cpu.shadow.mov_ss {
            return None;
        }
        let embedders = hits >> EMBEDDER;
        if embedders != 0 && !passed {
            self.stopped_at = Some(at);
            return Some(cpu.leave(Leave::Debug { dr6: embedders, exception: vector::DB }));
        }
        let guests = hits & ((1 << EMBEDDER) - 1);
        if guests == 0 || cpu.flag(RF) {
            return None;
        }
        cpu.fault = Fault { vector: vector::DB, code: None, payload: guests };
        Some(Stop::Fault)
    }

    /// What the end of a block asks for.
    pub(super) fn after(&mut self, stop: Stop) -> Result<Option<VcpuExit>> {
        let stop = match stop {
            Stop::Next | Stop::Again => return Ok(None),
            Stop::Fault => {
                // Time goes on also where no instruction comes to its end. A trap comes with one that has.
                self.cpu.instructions += u64::from(self.cpu.fault.vector != vector::DB);
                // An instruction that faults has met no condition.
                self.cpu.breakpoints.hits = 0;
                match self.cpu.deliver_fault() {
                    Ok(()) => return Ok(None),
                    Err(stop) => stop,
                }
            }
            Stop::Leave => Stop::Leave,
        };
        debug_assert_eq!(stop, Stop::Leave);
        self.left()
    }

    /// The vCPU has left the guest for the reason in `Cpu::leave`.
    pub(super) fn left(&mut self) -> Result<Option<VcpuExit>> {
        let stats = &mut self.cpu.stats;
        match self.cpu.leave {
            Leave::Halt if self.cpu.lapic.is_some() => {
                self.run_state = RunState::Halted;
                Ok(None)
            }
            Leave::Halt => {
                stats.halt += 1;
                stats.exits += 1;
                Ok(Some(VcpuExit::Halted))
            }
            Leave::TripleFault => {
                stats.shutdown += 1;
                stats.exits += 1;
                Ok(Some(VcpuExit::TripleFault))
            }
            Leave::Debug { dr6, exception } => {
                stats.debug += 1;
                stats.exits += 1;
                Ok(Some(VcpuExit::Debug { rip: self.cpu.linear_rip(), dr6, exception }))
            }
            Leave::Unknown => Err(self.emulation_failure()),
        }
    }

    fn emulation_failure(&mut self) -> Error {
        let rip = self.cpu.rip();
        Error::Emulation(Box::new(crate::error::EmulationFailure {
            backend: super::NAME,
            kind: "code is fetched from addresses without memory".into(),
            rip,
            bytes: Vec::new(),
            instruction: String::new(),
            hint: "the guest has jumped to where nothing is: look at where it came from".into(),
        }))
    }

    /// Serves what others ask for, waits where there is nothing to run, and delivers interrupts.
    fn between_blocks(&mut self) -> Result<Option<VcpuExit>> {
        loop {
            if self.cpu.link.take(attention::KICK) != 0 {
                self.cpu.stats.interrupted += 1;
                self.cpu.stats.exits += 1;
                return Ok(Some(VcpuExit::Kicked));
            }
            self.cpu.serve_memory();
            if let Some(exit) = self.serve_events()? {
                return Ok(Some(exit));
            }
            if self.run_state == RunState::Running {
                return Ok(None);
            }
            self.sleep();
        }
    }

    /// Takes what timers and others have raised, and delivers what may be.
    pub(super) fn serve_events(&mut self) -> Result<Option<VcpuExit>> {
        self.look_at_timers();
        self.take_signals();
        self.unhalted |= self.cpu.link.take(attention::UNHALT) != 0;
        if self.run_state == RunState::Halted && std::mem::take(&mut self.unhalted) {
            self.run_state = RunState::Running;
        }
        match self.deliver_events() {
            Err(Stop::Leave) => self.left(),
            Ok(()) | Err(_) => Ok(None),
        }
    }

    pub(super) fn look_at_timers(&mut self) {
        let cpu = &mut self.cpu;
        let halted = self.run_state != RunState::Running;
        if cpu.link.take(attention::TIMER) == 0 && !halted {
            return;
        }
        let Some(lapic) = &mut cpu.lapic else { return };
        lapic.poll();
        if cpu.link.id == 0
            && let Some(chipset) = &cpu.machine.chipset
        {
            chipset.poll();
        }
    }

    /// Takes over what other threads have sent to the local APIC.
    pub(super) fn take_signals(&mut self) {
        let cpu = &mut self.cpu;
        if cpu.link.take(attention::INTERRUPT) == 0 {
            return;
        }
        let Some(lapic) = &mut cpu.lapic else { return };
        let Signals { nmi, init, sipi } = lapic.take_posted();
        self.nmi_pending |= nmi;
        if init {
            lapic.init();
            cpu.reset();
            // The bootstrap processor starts over, the others wait for their address.
            self.run_state = if cpu.link.id == 0 { RunState::Running } else { RunState::WaitForSipi };
        }
        if let (Some(page), RunState::WaitForSipi) = (sipi, self.run_state) {
            cpu.start_at(page);
            self.run_state = RunState::Running;
        }
    }

    /// Delivers the event that comes first (SDM vol. 3A, 6.9), and asks to be called again after it: what
    /// else waits is delivered then, or held.
    pub(super) fn deliver_events(&mut self) -> std::result::Result<(), Stop> {
        // Taken in any case: with attention asked for, nobody would sleep.
        self.cpu.link.take(attention::EVENT);
        if matches!(self.run_state, RunState::WaitForInit | RunState::WaitForSipi) {
            return Ok(());
        }
        let cpu = &mut self.cpu;
        cpu.held = false;
        if let Some(vector) = self.accepted.take() {
            self.run_state = RunState::Running;
            cpu.link.demand_own(attention::EVENT);
            return cpu.deliver_interrupt(vector);
        }
        let shadow = cpu.shadow;
        if self.nmi_pending && !cpu.nmi_masked && !shadow.mov_ss {
            self.nmi_pending = false;
            self.run_state = RunState::Running;
            cpu.link.demand_own(attention::EVENT);
            return cpu.deliver_nmi();
        }
        cpu.held = self.nmi_pending;
        let Some(lapic) = &mut cpu.lapic else { return Ok(()) };
        if cpu.system_flags & IF == 0 || shadow.sti || shadow.mov_ss {
            cpu.held |= lapic.pending().is_some()
                || cpu.link.id == 0
                    && lapic.accepts_pic()
                    && cpu.machine.chipset.as_ref().is_some_and(|chipset| chipset.pic_output());
            return Ok(());
        }
        let found = match lapic.pending() {
            Some(vector) => {
                lapic.accept(vector);
                Some(vector)
            }
            None if cpu.link.id == 0 && lapic.accepts_pic() => cpu
                .machine
                .chipset
                .as_ref()
                .filter(|chipset| chipset.pic_output())
                .and_then(|c| c.acknowledge()),
            None => None,
        };
        let Some(vector) = found else { return Ok(()) };
        self.run_state = RunState::Running;
        cpu.link.demand_own(attention::EVENT);
        cpu.deliver_interrupt(vector)
    }

    /// Waits for attention or the next timer.
    fn sleep(&mut self) {
        let cpu = &mut self.cpu;
        let deadline = cpu.deadline();
        let now = cpu.machine.clock.now();
        let timeout = deadline.map(|at| Duration::from_nanos(at.saturating_sub(now)));
        if timeout != Some(Duration::ZERO) {
            cpu.link.set_in_guest(false);
            cpu.link.sleep(timeout);
            cpu.link.set_in_guest(true);
        }
    }
}

impl Cpu {
    /// When a timer that this vCPU serves is due next, in ns of the machine's time.
    pub(super) fn deadline(&self) -> Option<u64> {
        let pit = self.machine.chipset.as_ref().filter(|_| self.link.id == 0).and_then(|c| c.deadline());
        let timer = self.lapic.as_ref().and_then(|lapic| lapic.deadline());
        [pit, timer].into_iter().flatten().min()
    }

    /// After an instruction: the shadow of the one before it is over.
    #[inline(always)]
    pub(in crate::soft) fn end_shadow(&mut self) {
        if self.shadow_next | self.shadow.sti | self.shadow.mov_ss {
            self.end_shadow_slow();
        }
    }

    /// Whether interrupts are held off by the instruction just executed.
    #[inline(always)]
    pub(super) fn in_shadow(&self) -> bool {
        self.shadow.sti | self.shadow.mov_ss
    }

    #[cold]
    fn end_shadow_slow(&mut self) {
        if !std::mem::take(&mut self.shadow_next) {
            self.shadow = Shadow::default();
        }
        if self.held {
            self.link.demand_own(attention::EVENT);
        }
    }
}

impl Drop for SoftVcpu {
    fn drop(&mut self) {
        self.cpu.machine.remove_vcpu(self.cpu.link.id);
    }
}

impl fmt::Debug for SoftVcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SoftVcpu")
            .field("id", &self.cpu.link.id)
            .field("rip", &self.cpu.rip())
            .field("run_state", &self.run_state)
            .finish_non_exhaustive()
    }
}

impl SoftVcpu {
    /// Runs `act`, with `io` to answer the guest.
    fn with_io<R>(&mut self, io: &mut dyn VcpuIo, act: impl FnOnce(&mut Self) -> R) -> R {
        struct End<'a>(&'a mut SoftVcpu);
        impl Drop for End<'_> {
            fn drop(&mut self) {
                self.0.cpu.end_io();
            }
        }
        let end = End(self);
        // SAFETY: `io` is borrowed until this function returns, and `end` is dropped before that, also
        // when a callback panics.
        unsafe { end.0.cpu.begin_io(io) };
        act(end.0)
    }
}

impl BackendVcpu for SoftVcpu {
    fn run(&mut self, io: &mut dyn VcpuIo) -> Result<VcpuExit> {
        self.with_io(io, |vcpu| match vcpu.cpu.machine.clock.world().cloned() {
            Some(world) => vcpu.run_alone(&world),
            None => vcpu.enter(),
        })
    }

    fn run_instructions(&mut self, count: u64, io: &mut dyn VcpuIo) -> Result<VcpuExit> {
        let Some(world) = self.cpu.machine.clock.world().cloned() else {
            return Err(Error::Unsupported {
                what: "counting the instructions of a VM that goes with the host's time".into(),
                backend: super::NAME,
                fix: "make the VM with Backend::create_deterministic_vm".into(),
            });
        };
        self.with_io(io, |vcpu| vcpu.enter_counted(&world, count))
    }

    fn timer_deadline(&self) -> Option<u64> {
        self.cpu.deadline()
    }

    fn handle(&self) -> VcpuHandle {
        VcpuHandle::new(self.cpu.link.clone())
    }

    fn regs(&self) -> Result<Regs> {
        Ok(self.cpu.save_regs())
    }

    fn set_regs(&mut self, regs: &Regs) -> Result<()> {
        self.cpu.restore_regs(regs);
        Ok(())
    }

    fn sregs(&self) -> Result<Sregs> {
        Ok(self.cpu.save_sregs())
    }

    fn set_sregs(&mut self, sregs: &Sregs) -> Result<()> {
        self.cpu.restore_sregs(sregs)
    }

    fn set_cpuid(&mut self, cpuid: &Cpuid) -> Result<()> {
        self.cpu.set_cpuid(cpuid);
        Ok(())
    }

    fn tsc_khz(&self) -> Option<u32> {
        Some(self.cpu.msrs.tsc_khz)
    }

    fn set_tsc_khz(&mut self, khz: u32) -> Result<()> {
        if !TSC_KHZ_RANGE.contains(&khz) {
            return Err(Error::Unsupported {
                what: format!("a TSC of {khz} kHz"),
                backend: super::NAME,
                fix: format!("choose one of {TSC_KHZ_RANGE:?} kHz"),
            });
        }
        self.cpu.msrs.tsc_khz = khz;
        self.cpu.tell_tsc();
        Ok(())
    }

    fn set_debug(&mut self, config: &DebugConfig) -> Result<()> {
        self.debug = *config;
        self.cpu.break_on_int3 = config.software_breakpoints;
        self.cpu.set_breakpoints(config.hardware);
        Ok(())
    }

    fn translate(&self, gva: u64) -> Result<Option<GuestAddress>> {
        Ok(self.cpu.mmu.probe(gva).map(GuestAddress))
    }

    fn inject_nmi(&mut self) -> Result<()> {
        self.nmi_pending = true;
        self.cpu.link.demand(attention::TIMER);
        Ok(())
    }

    fn run_state(&self) -> Result<RunState> {
        Ok(self.run_state)
    }

    fn stats(&self) -> VcpuStats {
        self.cpu.stats
    }

    fn backend_stats(&self) -> Vec<(String, u64)> {
        vec![("instructions".into(), self.cpu.instructions)]
    }

    fn save(&self) -> Result<VcpuState> {
        Ok(self.save_state())
    }

    fn restore(&mut self, state: &VcpuState) -> Result<()> {
        self.restore_state(state)
    }
}
