//! System instructions: segments, far transfers, interrupts and exceptions, control registers, MSRs.
#![expect(
    clippy::cast_possible_truncation,
    reason = "selectors, levels and register halves are cut out of wider values"
)]

mod control;
mod cpuid;
mod debug;
mod descriptor;
mod far;
mod flags;
mod hypercall;
mod interrupt;
mod iret;
mod misc;
mod msr;
mod paravirt;
mod port;
mod segment;
mod syscall;
mod table;
mod task;
mod tsc;
mod verify;

use iced_x86::Instruction;

pub(in crate::soft) use self::msr::{MISC_ENABLE_RESET, PAT_RESET};

use crate::soft::cpu::Cpu;
use crate::soft::cpu::op::{Flow, Op, Selected, Stop};
use crate::soft::link::attention;

/// The handler of a system instruction.
pub(super) fn select(instruction: &Instruction) -> Option<Selected> {
    let groups = [
        segment::select,
        far::select,
        interrupt::select,
        iret::select,
        control::select,
        debug::select,
        table::select,
        verify::select,
        flags::select,
        syscall::select,
        msr::select,
        tsc::select,
        cpuid::select,
        port::select,
        misc::select,
        hypercall::select,
    ];
    groups.into_iter().find_map(|select| select(instruction))
}

/// The end of a handler that ends its block and goes on to the next instruction.
fn next(cpu: &mut Cpu, op: &Op) -> Flow {
    let rip = cpu.next_rip(op);
    cpu.set_rip(rip);
    Err(Stop::Next)
}

impl Cpu {
    /// #GP(0) where the privilege level is not 0.
    fn only_kernel(&mut self) -> Flow {
        if self.mode.cpl == 0 { Ok(()) } else { Err(self.gp(0)) }
    }

    /// #UD in real and virtual-8086 mode.
    fn only_protected(&mut self) -> Flow {
        if self.mode.protected { Ok(()) } else { Err(self.ud()) }
    }

    /// IA-32e mode: EFER.LMA.
    fn ia32e(&self) -> bool {
        self.efer & crate::soft::cpu::efer::LMA != 0
    }

    /// Interrupts may have become possible: those held off are looked at before the next block.
    fn events_may_come(&mut self) {
        if self.held {
            self.link.demand_own(attention::EVENT);
        }
    }
}
