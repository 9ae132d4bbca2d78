//! Runs of exactly so many instructions, of a vCPU of a deterministic VM ([`crate::deterministic`]).
//!
//! Blocks run as a whole as long as they cannot exceed the count; the rest of the way goes instruction by
//! instruction. What is served between two instructions is served where it became due: accesses that leave
//! memory end their block where they ask for something ([`Cpu::end_access`](super::io)), timers end the
//! run at their count, and an interrupt shadow ends with its one instruction. So nothing that the guest
//! can see depends on where blocks begin and end, and a run may be cut anywhere.

use super::block::Found;
use super::cpu::op::Stop;
use super::link::attention;
use super::vcpu::SoftVcpu;
use crate::backend::VcpuExit;
use crate::deterministic::World;
use crate::error::Result;
use crate::state::RunState;

impl SoftVcpu {
    /// Runs for at most `count` instructions.
    pub(super) fn enter_counted(&mut self, world: &World, count: u64) -> Result<VcpuExit> {
        self.cpu.others = world.instructions().wrapping_sub(self.cpu.instructions);
        self.begin();
        let end = self.cpu.instructions.saturating_add(count);
        let result = self.run_counted(world, end);
        self.cpu.link.set_in_guest(false);
        result
    }

    fn run_counted(&mut self, world: &World, end: u64) -> Result<VcpuExit> {
        loop {
            if let Some(exit) = self.debug_traps()? {
                return Ok(exit);
            }
            let cpu = &mut self.cpu;
            if cpu.link.take(attention::KICK) != 0 {
                cpu.stats.interrupted += 1;
                cpu.stats.exits += 1;
                return Ok(VcpuExit::Kicked);
            }
            cpu.serve_memory();
            // A repeated string instruction that has paused is not over: no event comes inside of it.
            if !cpu.repeating
                && let Some(exit) = self.serve_events()?
            {
                return Ok(exit);
            }
            if self.run_state != RunState::Running {
                return Ok(VcpuExit::Waiting);
            }
            if !self.cpu.repeating && self.cpu.link.wanted() {
                // After an event others may be due before the next instruction.
                continue;
            }
            if self.cpu.instructions >= end {
                return Ok(VcpuExit::InstructionLimit);
            }
            let until = end.min(self.next_timer(world));
            self.cpu.repeating = false;
            let looks = self.steps() || self.cpu.breakpoints.execution;
            let stop = if looks { self.step() } else { self.execute_until(until) };
            let exit = self.after(stop);
            world.set_instructions(self.cpu.others.wrapping_add(self.cpu.instructions));
            if self.cpu.instructions >= until {
                self.cpu.link.demand_own(attention::TIMER);
            }
            if let Some(exit) = exit? {
                return Ok(exit);
            }
        }
    }

    /// The vCPU's count at which a timer is to be looked at, at least one instruction from here.
    fn next_timer(&self, world: &World) -> u64 {
        let cpu = &self.cpu;
        let due = cpu.deadline().map(|at| world.instructions_at(at).saturating_sub(world.instructions()));
        due.map_or(u64::MAX, |left| cpu.instructions.saturating_add(left.max(1)))
    }

    /// Runs blocks until one ends otherwise than by going on to the next, attention is asked for, or the
    /// vCPU's count is `until`.
    fn execute_until(&mut self, until: u64) -> Stop {
        let cpu = &mut self.cpu;
        loop {
            let left = until.saturating_sub(cpu.instructions);
            let in_shadow = cpu.in_shadow();
            let found = match cpu.find_block() {
                Ok(found) => found,
                Err(stop) => return stop,
            };
            let stop = if !in_shadow && found.longest() <= left {
                cpu.run_block(found, 0)
            } else {
                match cpu.single_block() {
                    Ok(block) => cpu.run_block(Found::new(&block), 0),
                    Err(stop) => return stop,
                }
            };
            if stop != Stop::Next {
                return stop;
            }
            cpu.end_shadow();
            if cpu.instructions >= until || cpu.link.wanted() {
                return Stop::Next;
            }
        }
    }

    /// A run without an end, of a vCPU that is alone: time goes on to what wakes it.
    pub(super) fn run_alone(&mut self, world: &World) -> Result<VcpuExit> {
        loop {
            match self.enter_counted(world, u64::MAX)? {
                VcpuExit::InstructionLimit => {}
                VcpuExit::Waiting => match self.cpu.deadline() {
                    Some(at) if at > world.now() => world.set_now(at),
                    Some(_) => {}
                    None => self.cpu.link.sleep(None),
                },
                exit => return Ok(exit),
            }
        }
    }
}
