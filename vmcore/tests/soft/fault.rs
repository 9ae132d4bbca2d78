//! Exceptions: what their handlers find.

use iced_x86::code_asm::*;
use vmcore::backend::{Backend, DebugConfig, VcpuExit};
use vmcore::state::DescriptorTable;

use crate::machine::*;

crate::system!(
    every_exception_has_its_frame,
    page_faults_tell_what_was_tried,
    traps_return_behind_the_instruction,
    real_mode_has_its_table,
    protected_mode_has_its_frames,
    faults_of_faults_double_and_triple,
    faulting_instructions_leave_everything,
    interrupt_stacks_are_switched_to,
    interrupt_gates_clear_and_trap_gates_keep,
    single_steps_are_trapped,
    loading_the_stack_holds_off_the_trap,
    general_detect_guards_the_debug_registers,
);

const RF: u64 = 1 << 16;
const TF: u64 = 1 << 8;
const IF: u64 = 1 << 9;

type Write = fn(&mut CodeAssembler);

fn every_exception_has_its_frame(backend: &dyn Backend) {
    // What is done, where the faulting instruction begins, vector, error code.
    let cases: &[(&str, u64, u64, Option<u64>, Write)] = &[
        ("div", 0, 0, None, |a| a.div(cl).unwrap()),
        ("ud2", 0, 6, None, |a| a.ud2().unwrap()),
        ("not canonical", 10, 13, Some(0), |a| {
            a.mov(rbx, 1u64 << 60).unwrap();
            a.mov(al, ptr(rbx)).unwrap();
        }),
        ("stack not canonical", 10, 12, Some(0), |a| {
            a.mov(rbp, 1u64 << 60).unwrap();
            a.mov(al, ptr(rbp)).unwrap();
        }),
        ("mov to cs", 0, 6, None, |a| a.db(&[0x8e, 0xc8]).unwrap()),
        ("absent segment", 5, 11, Some(ABSENT.into()), |a| {
            a.mov(eax, u32::from(ABSENT)).unwrap();
            a.mov(ds, ax).unwrap();
        }),
        ("read-only stack", 5, 13, Some(READ_ONLY.into()), |a| {
            a.mov(eax, u32::from(READ_ONLY)).unwrap();
            a.mov(ss, ax).unwrap();
        }),
        ("beyond the table", 5, 13, Some(0x1000), |a| {
            a.mov(eax, 0x1003).unwrap();
            a.mov(es, ax).unwrap();
        }),
        ("local table that is not there", 5, 13, Some(0xc), |a| {
            a.mov(eax, 0xc).unwrap();
            a.mov(es, ax).unwrap();
        }),
        ("wrong level of the stack", 5, 13, Some(USER_DATA.into()), |a| {
            a.mov(eax, u32::from(USER_DATA) + 3).unwrap();
            a.mov(ss, ax).unwrap();
        }),
        ("ltr of no task", 5, 13, Some(CODE64.into()), |a| {
            a.mov(eax, u32::from(CODE64)).unwrap();
            a.ltr(ax).unwrap();
        }),
        ("unknown msr", 5, 13, Some(0), |a| {
            a.mov(ecx, 0x1234_5678).unwrap();
            a.rdmsr().unwrap();
        }),
        ("reserved bit of cr4", 5, 13, Some(0), |a| {
            a.mov(eax, 0x8000_0020u32).unwrap();
            a.mov(cr4, rax).unwrap();
        }),
        ("cr1", 0, 6, None, |a| a.db(&[0x0f, 0x20, 0xc8]).unwrap()),
        ("absent call gate", 0, 11, Some(SPARE.into()), |a| a.db(&[0xff, 0x1c, 0x25, 0, 0, 3, 0]).unwrap()),
        ("int of an absent gate", 0, 11, Some(0x71 << 3 | 2), |a| a.int(0x71).unwrap()),
        ("int behind the table", 0, 13, Some(0xf0 << 3 | 2), |a| a.int(0xf0).unwrap()),
    ];
    for &(name, offset, vector, error, write) in cases {
        let mut machine = Machine::new(backend, Mode::Long, 0, write);
        machine.set_descriptor(SPARE, 0x0000_0c00_0008_0000);
        machine.store(DATA, u64::from(SPARE) << 32);
        machine.set_gate(0x71, HANDLERS, 0x0e, 0);
        machine.edit_sregs(|s| s.idt.limit = 0xeff);
        machine.edit_regs(|r| {
            r.rflags = 0xed7;
            r.rsp = STACK - 24;
        });
        let frame = machine.run_to_fault();
        assert_eq!((frame.vector, frame.code, frame.rip), (vector, error, CODE + offset), "{name}");
        // INT n is no fault itself, but what comes of it is.
        assert_eq!(frame.flags, 0xed7 | RF, "{name}: {:x}", frame.flags);
        assert_eq!(
            (frame.cs, frame.stack),
            (CODE64.into(), Some((STACK - 24, KERNEL_DATA.into()))),
            "{name}"
        );
        assert_eq!(machine.regs().rflags, 0xcd7, "{name}");
        // The frame is at a multiple of 16 bytes.
        let pushed = if error.is_some() { 48 } else { 40 };
        assert_eq!(machine.regs().rsp, ((STACK - 24) & !15) - pushed, "{name}");
    }
}

fn page_faults_tell_what_was_tried(backend: &dyn Backend) {
    // Address, privilege, what is done (0 read, 1 write, 2 execute), error code.
    let cases = [
        (ABSENT_PAGE, 0, 0, 0),
        (ABSENT_PAGE, 0, 1, 2),
        (ABSENT_PAGE, 3, 0, 4),
        (ABSENT_PAGE, 3, 1, 6),
        (ABSENT_PAGE, 3, 2, 0x14),
        (READ_ONLY_PAGE, 0, 1, 3),
        (READ_ONLY_PAGE, 3, 1, 7),
        (SUPERVISOR_PAGE, 3, 0, 5),
        (SUPERVISOR_PAGE, 3, 1, 7),
        (SUPERVISOR_PAGE, 3, 2, 0x15),
        (NO_EXECUTE_PAGE, 0, 2, 0x11),
        (NO_EXECUTE_PAGE, 3, 2, 0x15),
        (RESERVED_PAGE, 0, 0, 9),
        (RESERVED_PAGE, 3, 1, 0xf),
    ];
    for (at, cpl, how, error) in cases {
        let at = at + 0x123;
        let mut machine = Machine::new(backend, Mode::Long, cpl, |a| {
            a.mov(rbx, at).unwrap();
            match how {
                0 => a.mov(eax, ptr(rbx)).unwrap(),
                1 => a.mov(ptr(rbx), eax).unwrap(),
                _ => a.jmp(rbx).unwrap(),
            }
        });
        let frame = machine.run_to_fault();
        assert_eq!((frame.vector, frame.code), (14, Some(error)), "{at:x} {cpl} {how}");
        assert_eq!(machine.vcpu.sregs().unwrap().cr2, at);
        let rip = if how == 2 { at } else { frame.rip };
        assert_eq!(frame.rip, rip);
        if cpl == 3 {
            assert_eq!(machine.regs().rsp, INNER_STACK - 48);
            assert_eq!(frame.stack, Some((USER_STACK, u64::from(USER_DATA) + 3)));
            assert_eq!(frame.cs, u64::from(USER_CODE64) + 3);
            assert_eq!(machine.vcpu.sregs().unwrap().ss.selector, 0);
        }
    }
}

fn traps_return_behind_the_instruction(backend: &dyn Backend) {
    let cases: [(u64, u64, Write); 3] = [
        (0x80, 2, |a| a.int(0x80).unwrap()),
        (3, 1, |a| a.int3().unwrap()),
        (3, 2, |a| a.db(&[0xcd, 3]).unwrap()),
    ];
    for cpl in [0, 3] {
        for (vector, length, write) in cases {
            let mut machine = Machine::new(backend, Mode::Long, cpl, write);
            let frame = machine.run_to_fault();
            assert_eq!((frame.vector, frame.rip, frame.flags), (vector, CODE + length, 2));
        }
    }
    // INTO is a trap where OF is set, and nothing where it is not; it is not in 64-bit code.
    let mut machine = Machine::new(backend, Mode::Protected, 3, |a| {
        a.into().unwrap();
        a.mov(al, 0x7f).unwrap();
        a.inc(al).unwrap();
        a.into().unwrap();
    });
    let frame = machine.run_to_fault();
    assert_eq!((frame.vector, frame.rip), (4, CODE + 6));
    let mut machine = Machine::new(backend, Mode::Long, 3, |a| a.db(&[0xce]).unwrap());
    assert_eq!(machine.run_to_fault().vector, 6);
    // User code may not use gates of the kernel: the code names the gate.
    let mut machine = Machine::new(backend, Mode::Long, 3, |a| a.int(0x81).unwrap());
    let frame = machine.run_to_fault();
    assert_eq!((frame.vector, frame.code, frame.rip), (13, Some(0x81 << 3 | 2), CODE));
}

fn real_mode_has_its_table(backend: &dyn Backend) {
    let mut machine = Machine::new(backend, Mode::Real, 0, |a| {
        a.sti().unwrap();
        a.int(0x21).unwrap();
    });
    machine.edit_regs(|r| r.rsp = 0x8000);
    let frame = machine.run_to_fault();
    assert_eq!((frame.vector, frame.rip, frame.cs, frame.flags), (0x21, 3, 0x1000, 2 | IF));
    assert_eq!((machine.regs().rsp, machine.regs().rflags), (0x8000 - 6, 2));
    let mut machine = Machine::new(backend, Mode::Real, 0, |a| {
        a.push(ax).unwrap();
        a.div(cx).unwrap();
    });
    let frame = machine.run_to_fault();
    assert_eq!((frame.vector, frame.rip), (0, 1));
    // Beyond the segment's limit.
    let mut machine = Machine::new(backend, Mode::Real, 0, |a| a.mov(ax, ptr(0xffff)).unwrap());
    let frame = machine.run_to_fault();
    assert_eq!((frame.vector, frame.rip), (13, 0));
    // IRET goes back.
    let mut machine = Machine::new(backend, Mode::Real, 0, |a| {
        a.int(0x22).unwrap();
        a.mov(bx, 0x1234).unwrap();
        a.hlt().unwrap();
    });
    machine.write(HANDLERS + 0x220, &[0x40, 0xcf]);
    machine.run();
    assert_eq!((machine.regs().rax, machine.regs().rbx, machine.regs().rip), (1, 0x1234, 6));
    assert_eq!(machine.regs().rsp, STACK);
}

fn protected_mode_has_its_frames(backend: &dyn Backend) {
    // From level 0, and from level 3 with a change of stack; by 32-bit and by 16-bit gates.
    for cpl in [0, 3] {
        let mut machine = Machine::new(backend, Mode::Protected, cpl, |a| {
            a.mov(eax, u32::from(ABSENT) + 3).unwrap();
            a.mov(gs, eax).unwrap();
        });
        machine.set_descriptor(ABSENT, 0x00cf_7300_0000_ffff);
        let frame = machine.run_to_fault();
        assert_eq!((frame.vector, frame.code, frame.rip), (11, Some(ABSENT.into()), CODE + 5));
        let stack = (cpl == 3).then_some((USER_STACK, u64::from(USER_DATA) + 3));
        assert_eq!((frame.stack, frame.flags), (stack, RF | 2));
        assert_eq!(machine.regs().rsp, if cpl == 3 { INNER_STACK - 24 } else { STACK - 16 });
        assert_eq!(machine.vcpu.sregs().unwrap().cs.selector, CODE32);
    }
    let mut machine = Machine::new(backend, Mode::Protected, 3, |a| a.int(0x80).unwrap());
    machine.set_gate(0x80, 0x5000, 0xe6, 0);
    machine.write(0x5000, &[0xf4]);
    machine.run();
    let regs = machine.regs();
    assert_eq!((regs.rip, regs.rsp), (0x5001, INNER_STACK - 10));
    assert_eq!(
        machine.load(INNER_STACK - 10),
        2 << 32 | (u64::from(USER_CODE32) + 3) << 16 | ((CODE + 2) & 0xffff) | (USER_STACK << 48)
    );
}

fn faults_of_faults_double_and_triple(backend: &dyn Backend) {
    for mode in [Mode::Protected, Mode::Long] {
        // #NP of the gate of #GP: a double fault.
        let mut machine = Machine::new(backend, mode, 0, |a| {
            a.mov(eax, 0x1000).unwrap();
            a.mov(ds, eax).unwrap();
        });
        machine.set_gate(13, HANDLERS, 0x0e, 0);
        let frame = machine.run_to_fault();
        assert_eq!((frame.vector, frame.code, frame.rip), (8, Some(0), CODE + 5), "{mode:?}");
        // #NP of the gate of #UD comes by itself, with EXT.
        let mut machine = Machine::new(backend, mode, 0, |a| a.ud2().unwrap());
        machine.set_gate(6, HANDLERS, 0x0e, 0);
        let frame = machine.run_to_fault();
        assert_eq!((frame.vector, frame.code, frame.rip), (11, Some(6 << 3 | 2 | 1), CODE), "{mode:?}");
        // No table at all.
        let mut machine = Machine::new(backend, mode, 0, |a| a.ud2().unwrap());
        machine.edit_sregs(|s| s.idt = DescriptorTable::default());
        assert_eq!(machine.run_to_exit(), VcpuExit::TripleFault, "{mode:?}");
    }
    // A page fault on the stack of a page fault's handler.
    let mut machine = Machine::new(backend, Mode::Long, 0, |a| a.mov(eax, ptr(ABSENT_PAGE + 8)).unwrap());
    machine.edit_regs(|r| r.rsp = ABSENT_PAGE + 0x1000);
    machine.set_gate(8, HANDLERS + 0x80, 0x8e, 1);
    let frame = machine.run_to_fault();
    assert_eq!((frame.vector, frame.code, frame.rip), (8, Some(0), CODE));
    assert_eq!(machine.vcpu.sregs().unwrap().cr2, ABSENT_PAGE + 0x1000 - 48);
    assert_eq!(machine.regs().rsp, IST1 - 48);
}

/// A fault in the middle of instructions with many effects.
fn faulting_instructions_leave_everything(backend: &dyn Backend) {
    let cases: [(Write, u64); 4] = [
        (|a| a.iretq().unwrap(), 14),
        (|a| a.retf().unwrap(), 14),
        (|a| a.call(qword_ptr(ABSENT_PAGE)).unwrap(), 14),
        (|a| a.push(qword_ptr(ABSENT_PAGE)).unwrap(), 14),
    ];
    for (write, vector) in cases {
        let mut machine = Machine::new(backend, Mode::Long, 0, write);
        machine.set_gate(14, HANDLERS + 14 * 16, 0x8e, 1);
        let top = ABSENT_PAGE - 8;
        machine.edit_regs(|r| (r.rsp, r.rax, r.rflags) = (top, 7, 0x46));
        let frame = machine.run_to_fault();
        assert_eq!((frame.vector, frame.rip), (vector, CODE));
        assert_eq!(frame.stack, Some((top, KERNEL_DATA.into())));
        assert_eq!((machine.regs().rax, frame.flags & !RF), (7, 0x46));
    }
}

fn interrupt_stacks_are_switched_to(backend: &dyn Backend) {
    for cpl in [0, 3] {
        let mut machine = Machine::new(backend, Mode::Long, cpl, |a| a.ud2().unwrap());
        machine.set_gate(6, HANDLERS + 6 * 16, 0x8e, 1);
        let frame = machine.run_to_fault();
        assert_eq!(machine.regs().rsp, IST1 - 40);
        let sregs = machine.vcpu.sregs().unwrap();
        assert_eq!(sregs.ss.selector, if cpl == 3 { 0 } else { KERNEL_DATA });
        assert_eq!(frame.stack.map(|s| s.0), Some(if cpl == 3 { USER_STACK } else { STACK }));
    }
    // A TSS that is too short.
    let mut machine = Machine::new(backend, Mode::Long, 3, |a| a.ud2().unwrap());
    machine.edit_sregs(|s| s.tr.limit = 8);
    machine.set_gate(10, HANDLERS + 160, 0x8e, 0);
    assert_eq!(machine.run_to_exit(), VcpuExit::TripleFault);
}

fn interrupt_gates_clear_and_trap_gates_keep(backend: &dyn Backend) {
    for (access, expected) in [(0x8e, 0), (0x8f, IF)] {
        for mode in [Mode::Protected, Mode::Long] {
            let mut machine = Machine::new(backend, mode, 0, |a| a.int(0x40).unwrap());
            machine.set_gate(0x40, HANDLERS + 0x400, access, 0);
            machine.edit_regs(|r| r.rflags |= IF);
            let frame = machine.run_to_fault();
            assert_eq!((frame.flags & IF, machine.regs().rflags & IF), (IF, expected));
        }
    }
}

fn single_steps_are_trapped(backend: &dyn Backend) {
    let mut machine = Machine::new(backend, Mode::Long, 0, |a| {
        a.popfq().unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
    });
    machine.store(STACK, 2 | TF);
    let frame = machine.run_to_fault();
    // The trap comes after the instruction behind the one that sets TF.
    assert_eq!((frame.vector, frame.rip, frame.flags), (1, CODE + 2, 2 | TF));
    assert_eq!(machine.regs().rflags & TF, 0);
    assert_eq!(machine.vcpu.save().unwrap().debug.dr6 & 0xffff, 0x4ff0);
}

fn loading_the_stack_holds_off_the_trap(backend: &dyn Backend) {
    let mut machine = Machine::new(backend, Mode::Long, 0, |a| {
        a.popfq().unwrap();
        a.mov(ss, eax).unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
    });
    machine.store(STACK, 2 | TF);
    machine.edit_regs(|r| r.rax = KERNEL_DATA.into());
    let frame = machine.run_to_fault();
    assert_eq!((frame.vector, frame.rip), (1, CODE + 4));
}

fn general_detect_guards_the_debug_registers(backend: &dyn Backend) {
    let mut machine = Machine::new(backend, Mode::Long, 0, |a| {
        a.mov(eax, 0x2400).unwrap();
        a.mov(dr7, rax).unwrap();
        a.mov(rbx, dr0).unwrap();
    });
    machine.vcpu.set_debug(&DebugConfig::default()).unwrap();
    let frame = machine.run_to_fault();
    assert_eq!((frame.vector, frame.rip), (1, CODE + 8));
    let debug = machine.vcpu.save().unwrap().debug;
    assert_eq!((debug.dr6 & 0xf000, debug.dr7), (0x2000, 0x400));
}
