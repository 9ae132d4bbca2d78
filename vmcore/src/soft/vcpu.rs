//! A software virtual CPU: the run loop, and what goes on between two blocks.
#![expect(unsafe_code, reason = "the callbacks of a run and the block under execution are pointers")]

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::block::Found;
use super::chip::{Lapic, Signals};
use super::cpu::flags::{IF, TF};
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

/// DR6.BS: a single step.
const DR6_BS: u64 = 1 << 14;

/// A vCPU of the software CPU.
pub(in crate::soft) struct SoftVcpu {
    pub(in crate::soft) cpu: Cpu,
    pub(in crate::soft) run_state: RunState,
    pub(in crate::soft) debug: DebugConfig,
    /// An NMI waits until it can be delivered.
    pub(in crate::soft) nmi_pending: bool,
    /// An interrupt that a restored state had accepted and not delivered.
    pub(in crate::soft) accepted: Option<u8>,
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
            stopped_at: None,
            blocks: BLOCKS_PER_LOOK,
        }
    }

    /// Runs until something ends the run.
    fn enter(&mut self) -> Result<VcpuExit> {
        self.cpu.link.set_in_guest(true);
        self.cpu.serve_memory();
        // Restoring another vCPU may have moved the TSC on.
        self.cpu.tell_tsc();
        let result = self.run_guest();
        self.cpu.link.set_in_guest(false);
        result
    }

    fn run_guest(&mut self) -> Result<VcpuExit> {
        loop {
            if let Some(exit) = self.between_blocks()? {
                return Ok(exit);
            }
            let stepping = self.debug.single_step || self.cpu.flag(TF) || self.debug.hardware.is_some();
            let stop = if stepping { self.step() } else { self.execute() };
            if let Some(exit) = self.after(stop)? {
                return Ok(exit);
            }
        }
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

    /// Runs one instruction, and raises the debug exception that the guest's TF asks for.
    fn step(&mut self) -> Stop {
        if let Some(dr6) = self.breakpoint() {
            self.cpu.leave = Leave::Debug { dr6, exception: vector::DB };
            return Stop::Leave;
        }
        let cpu = &mut self.cpu;
        let trap = cpu.flag(TF);
        let block = match cpu.single_block() {
            Ok(block) => block,
            Err(stop) => return stop,
        };
        let stop = cpu.run_block(Found::new(&block), 0);
        drop(block);
        if !matches!(stop, Stop::Next | Stop::Leave) {
            return stop;
        }
        cpu.end_shadow();
        if stop == Stop::Next && self.debug.single_step {
            cpu.leave = Leave::Debug { dr6: DR6_BS, exception: vector::DB };
            return Stop::Leave;
        }
        // A load of SS holds the trap off.
        if trap && !cpu.shadow.mov_ss {
            cpu.fault = Fault { vector: vector::DB, code: None, payload: DR6_BS };
            return Stop::Fault;
        }
        stop
    }

    /// Which of the embedder's breakpoints on execution are at the next instruction, as bits of DR6.
    fn breakpoint(&mut self) -> Option<u64> {
        let hardware = self.debug.hardware?;
        let at = self.cpu.linear_rip();
        if self.stopped_at.take() == Some(at) {
            return None;
        }
        let hits = |n: &usize| {
            let enabled = hardware.dr7 >> (2 * n) & 3 != 0;
            let on_execution = hardware.dr7 >> (16 + 4 * n) & 3 == 0;
            enabled && on_execution && hardware.addresses[*n] == at
        };
        let dr6 = (0..4).filter(hits).fold(0, |dr6, n| dr6 | 1 << n);
        if dr6 == 0 {
            return None;
        }
        self.stopped_at = Some(at);
        Some(dr6)
    }

    /// What the end of a block asks for.
    fn after(&mut self, stop: Stop) -> Result<Option<VcpuExit>> {
        let stop = match stop {
            Stop::Next | Stop::Again => return Ok(None),
            Stop::Fault => match self.cpu.deliver_fault() {
                Ok(()) => return Ok(None),
                Err(stop) => stop,
            },
            Stop::Leave => Stop::Leave,
        };
        debug_assert_eq!(stop, Stop::Leave);
        self.left()
    }

    /// The vCPU has left the guest for the reason in `Cpu::leave`.
    fn left(&mut self) -> Result<Option<VcpuExit>> {
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
            self.look_at_timers();
            self.take_signals();
            let stop = self.deliver_events();
            match stop {
                Ok(()) => {}
                Err(Stop::Leave) => {
                    if let Some(exit) = self.left()? {
                        return Ok(Some(exit));
                    }
                }
                Err(_) => {}
            }
            if self.run_state == RunState::Running {
                return Ok(None);
            }
            self.sleep();
        }
    }

    fn look_at_timers(&mut self) {
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
    fn take_signals(&mut self) {
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

    /// Delivers the event that comes first (SDM vol. 3A, 6.9).
    fn deliver_events(&mut self) -> std::result::Result<(), Stop> {
        // Taken in any case: with attention asked for, nobody would sleep.
        self.cpu.link.take(attention::EVENT);
        if matches!(self.run_state, RunState::WaitForInit | RunState::WaitForSipi) {
            return Ok(());
        }
        let cpu = &mut self.cpu;
        cpu.held = false;
        if let Some(vector) = self.accepted.take() {
            self.run_state = RunState::Running;
            return cpu.deliver_interrupt(vector);
        }
        let shadow = cpu.shadow;
        if self.nmi_pending && !cpu.nmi_masked && !shadow.mov_ss {
            self.nmi_pending = false;
            self.run_state = RunState::Running;
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
        cpu.deliver_interrupt(vector)
    }

    /// Waits for attention or the next timer.
    fn sleep(&mut self) {
        let cpu = &mut self.cpu;
        let pit = cpu.machine.chipset.as_ref().filter(|_| cpu.link.id == 0).and_then(|c| c.deadline());
        let timer = cpu.lapic.as_ref().and_then(|lapic| lapic.deadline());
        let deadline = [pit, timer].into_iter().flatten().min();
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
    /// After an instruction: the shadow of the one before it is over.
    #[inline(always)]
    fn end_shadow(&mut self) {
        if self.shadow_next | self.shadow.sti | self.shadow.mov_ss {
            self.end_shadow_slow();
        }
    }

    /// Whether interrupts are held off by the instruction just executed.
    #[inline(always)]
    fn in_shadow(&self) -> bool {
        self.shadow.sti | self.shadow.mov_ss
    }

    #[cold]
    fn end_shadow_slow(&mut self) {
        if !std::mem::take(&mut self.shadow_next) && self.shadow != Shadow::default() {
            self.shadow = Shadow::default();
            if self.held {
                self.link.demand_own(attention::EVENT);
            }
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

impl BackendVcpu for SoftVcpu {
    fn run(&mut self, io: &mut dyn VcpuIo) -> Result<VcpuExit> {
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
        end.0.enter()
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
        self.cpu.cpuid = cpuid.clone();
        Ok(())
    }

    fn tsc_khz(&self) -> Option<u32> {
        Some(self.cpu.msrs.tsc_khz)
    }

    fn set_debug(&mut self, config: &DebugConfig) -> Result<()> {
        let watches = |n: usize, dr7: u64| dr7 >> (2 * n) & 3 != 0 && dr7 >> (16 + 4 * n) & 3 != 0;
        if let Some(hardware) = config.hardware.filter(|h| (0..4).any(|n| watches(n, h.dr7))) {
            return Err(Error::Unsupported {
                what: format!("a watchpoint on data (DR7 {:#x})", hardware.dr7),
                backend: super::NAME,
                fix: "use breakpoints on execution, or single steps".into(),
            });
        }
        self.debug = *config;
        self.cpu.break_on_int3 = config.software_breakpoints;
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
