//! Debug registers and single steps: what the guest's own #DB handler finds.

use iced_x86::code_asm::*;
use vmcore::backend::{Backend, VcpuExit};

use crate::machine::*;

crate::system!(
    breakpoints_on_execution_come_before_the_instruction,
    the_resume_flag_passes_a_breakpoint_once,
    breakpoints_on_data_come_behind_the_instruction,
    watched_bytes_are_told_from_their_neighbours,
    repeated_instructions_stop_after_the_iteration,
    breakpoints_on_ports_need_debug_extensions,
    a_load_of_the_stack_segment_holds_off_watchpoints,
    a_software_interrupt_is_not_stepped_into,
    icebp_raises_without_status,
    breakpoints_in_loops_are_found_each_time,
    a_fault_meets_no_watchpoint,
    the_debug_status_gathers,
);

const RF: u64 = 1 << 16;
const TF: u64 = 1 << 8;

/// DR7 with breakpoint `n` enabled globally, of a kind (0: execution, 1: write, 2: port, 3: access) and a
/// length code (0: 1, 1: 2, 2: 8, 3: 4).
fn control(n: u32, kind: u64, length: u64) -> u64 {
    0x400 | 2 << (2 * n) | (length << 2 | kind) << (16 + 4 * n)
}

/// A 64-bit machine whose breakpoint `n` is at `address`.
fn machine(
    backend: &dyn Backend,
    n: usize,
    (address, enabled): (u64, u64),
    write: impl FnOnce(&mut CodeAssembler),
) -> Machine {
    let mut machine = Machine::new(backend, Mode::Long, 0, write);
    let mut state = machine.vcpu.save().unwrap();
    state.debug.addresses[n] = address;
    state.debug.dr7 = enabled;
    machine.vcpu.restore(&state).unwrap();
    machine
}

fn dr6(machine: &Machine) -> u64 {
    machine.vcpu.save().unwrap().debug.dr6 & 0xffff
}

/// Back from the handler, as IRET with these flags.
fn resume(machine: &mut Machine, frame: &Frame, flags: u64) {
    let sregs = machine.vcpu.sregs().unwrap();
    assert_eq!(sregs.cs.selector & !3, CODE64);
    // IRETQ behind the handler's HLT.
    machine.write(machine.regs().rip, &[0x48, 0xcf]);
    machine.store(machine.regs().rsp + 16, flags);
    assert_eq!(frame.vector, 1);
}

fn breakpoints_on_execution_come_before_the_instruction(backend: &dyn Backend) {
    let mut machine = machine(backend, 2, (CODE + 2, control(2, 0, 0)), |a| {
        a.nop().unwrap();
        a.nop().unwrap();
        a.inc(rax).unwrap();
        a.hlt().unwrap();
    });
    let frame = machine.run_to_fault();
    assert_eq!((frame.vector, frame.rip, frame.flags & RF), (1, CODE + 2, 0));
    assert_eq!((dr6(&machine), machine.regs().rax), (0xff4, 0));
}

fn the_resume_flag_passes_a_breakpoint_once(backend: &dyn Backend) {
    let mut machine = machine(backend, 0, (CODE, control(0, 0, 0)), |a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.inc(rax).unwrap();
        a.jmp(again).unwrap();
    });
    for n in 0..3 {
        let frame = machine.run_to_fault();
        assert_eq!((frame.rip, frame.flags & RF, machine.regs().rax), (CODE, 0, n));
        machine.edit_regs(|r| r.rip = HANDLERS + 17);
        resume(&mut machine, &frame, frame.flags | RF);
    }
}

fn breakpoints_on_data_come_behind_the_instruction(backend: &dyn Backend) {
    // Kind, and whether a read and a write meet it.
    for (kind, reads, writes) in [(1, false, true), (3, true, true)] {
        for (write, met) in [(false, reads), (true, writes)] {
            let mut machine = machine(backend, 1, (DATA, control(1, kind, 3)), |a| {
                if write {
                    a.mov(dword_ptr(DATA), ebx).unwrap();
                } else {
                    a.mov(ebx, dword_ptr(DATA)).unwrap();
                }
                a.nop().unwrap();
                a.ud2().unwrap();
            });
            let frame = machine.run_to_fault();
            let expected = if met { (1, CODE + 7) } else { (6, CODE + 8) };
            assert_eq!((frame.vector, frame.rip), expected, "kind {kind}, {write}");
            assert_eq!(dr6(&machine), if met { 0xff2 } else { 0xff0 });
        }
    }
}

fn watched_bytes_are_told_from_their_neighbours(backend: &dyn Backend) {
    // Two bytes at DATA + 2: where an access begins, its size, whether it touches them.
    for (at, size, met) in
        [(0, 2, false), (0, 4, true), (1, 2, true), (3, 1, true), (4, 4, false), (0, 8, true)]
    {
        let mut machine = machine(backend, 0, (DATA + 2, control(0, 1, 1)), |a| {
            match size {
                1 => a.mov(byte_ptr(DATA + at), al),
                2 => a.mov(word_ptr(DATA + at), ax),
                4 => a.mov(dword_ptr(DATA + at), eax),
                _ => a.mov(qword_ptr(DATA + at), rax),
            }
            .unwrap();
            a.ud2().unwrap();
        });
        assert_eq!(machine.run_to_fault().vector == 1, met, "{size} bytes at {at}");
    }
}

fn repeated_instructions_stop_after_the_iteration(backend: &dyn Backend) {
    let mut machine = machine(backend, 3, (DATA + 16, control(3, 1, 2)), |a| {
        a.mov(edi, DATA as u32).unwrap();
        a.mov(ecx, 100).unwrap();
        a.rep().stosq().unwrap();
        a.ud2().unwrap();
    });
    let frame = machine.run_to_fault();
    let r = machine.regs();
    assert_eq!((frame.vector, frame.rip, r.rcx, r.rdi), (1, CODE + 10, 97, DATA + 24));
    machine.edit_regs(|r| r.rip = HANDLERS + 17);
    resume(&mut machine, &frame, frame.flags);
    assert_eq!(machine.run_to_fault().vector, 6);
    assert_eq!(machine.regs().rcx, 0);
}

fn breakpoints_on_ports_need_debug_extensions(backend: &dyn Backend) {
    for extensions in [false, true] {
        for (port, met) in [(0x7f, false), (0x80, true), (0x81, true), (0x82, false)] {
            let mut machine = machine(backend, 0, (0x80, control(0, 2, 1)), |a| {
                a.out(port, al).unwrap();
                a.ud2().unwrap();
            });
            machine.edit_sregs(|s| s.cr4 |= if extensions { 8 } else { 0 });
            let frame = machine.run_to_fault();
            let expected = if met && extensions { 1 } else { 6 };
            assert_eq!((frame.vector, frame.rip), (expected, CODE + 2), "port {port:#x}, {extensions}");
        }
    }
}

fn a_load_of_the_stack_segment_holds_off_watchpoints(backend: &dyn Backend) {
    let mut machine = machine(backend, 0, (DATA, control(0, 3, 1)), |a| {
        a.mov(ss, word_ptr(DATA)).unwrap();
        a.nop().unwrap();
        a.ud2().unwrap();
    });
    machine.store(DATA, KERNEL_DATA.into());
    let frame = machine.run_to_fault();
    assert_eq!((frame.vector, frame.rip), (1, CODE + 8));
    assert_eq!(dr6(&machine), 0xff1);
}

/// INT n clears TF, and its handler's first instruction is not trapped (SDM vol. 3B, 18.3.1.4).
fn a_software_interrupt_is_not_stepped_into(backend: &dyn Backend) {
    let mut machine = Machine::new(backend, Mode::Long, 0, |a| {
        a.popfq().unwrap();
        a.int(0x40).unwrap();
    });
    machine.store(STACK, 2 | TF);
    let frame = machine.run_to_fault();
    assert_eq!((frame.vector, frame.rip, frame.flags & TF), (0x40, CODE + 3, TF));
    assert_eq!(dr6(&machine), 0xff0);
}

fn icebp_raises_without_status(backend: &dyn Backend) {
    let mut machine = Machine::new(backend, Mode::Long, 0, |a| {
        a.int1().unwrap();
        a.nop().unwrap();
    });
    let frame = machine.run_to_fault();
    assert_eq!((frame.vector, frame.rip, dr6(&machine)), (1, CODE + 1, 0xff0));
}

/// Also when the code around it is executed many times first.
fn breakpoints_in_loops_are_found_each_time(backend: &dyn Backend) {
    let mut machine = Machine::new(backend, Mode::Long, 0, |a| {
        let (mut again, mut on) = (a.create_label(), a.create_label());
        a.mov(ecx, 1000).unwrap();
        a.set_label(&mut again).unwrap();
        a.inc(rax).unwrap();
        a.jmp(on).unwrap();
        a.set_label(&mut on).unwrap();
        a.dec(ecx).unwrap();
        a.jne(again).unwrap();
        // Armed by the guest itself, when the loop's blocks are known.
        a.mov(ecx, 5).unwrap();
        a.lea(rbx, ptr(on)).unwrap();
        a.mov(dr0, rbx).unwrap();
        a.mov(ebx, 0x402).unwrap();
        a.mov(dr7, rbx).unwrap();
        a.jmp(again).unwrap();
    });
    let frame = machine.run_to_fault();
    assert_eq!((frame.vector, frame.rip, machine.regs().rax), (1, CODE + 10, 1001));
    machine.edit_regs(|r| r.rip = HANDLERS + 17);
    resume(&mut machine, &frame, frame.flags | RF);
    let frame = machine.run_to_fault();
    assert_eq!((frame.vector, frame.rip, machine.regs().rax), (1, CODE + 10, 1002));
}

fn a_fault_meets_no_watchpoint(backend: &dyn Backend) {
    // The read is done before the write faults.
    let mut machine = machine(backend, 0, (DATA, control(0, 3, 0)), |a| {
        a.mov(esi, DATA as u32).unwrap();
        a.mov(edi, ABSENT_PAGE as u32).unwrap();
        a.movsb().unwrap();
    });
    let frame = machine.run_to_fault();
    assert_eq!((frame.vector, frame.rip, dr6(&machine)), (14, CODE + 10, 0xff0));
}

/// BS beside B0.
fn the_debug_status_gathers(backend: &dyn Backend) {
    let mut machine = machine(backend, 0, (DATA, control(0, 1, 0)), |a| {
        a.popfq().unwrap();
        a.mov(byte_ptr(DATA), bl).unwrap();
        a.nop().unwrap();
    });
    machine.store(STACK, 2 | TF);
    let frame = machine.run_to_fault();
    assert_eq!((frame.vector, frame.rip, dr6(&machine)), (1, CODE + 8, 0x4ff1));
    // Nothing is left of it.
    machine.edit_regs(|r| r.rip = CODE + 8);
    machine.write(CODE + 8, &[0xf4]);
    assert_eq!(machine.run_to_exit(), VcpuExit::Halted);
    assert_eq!(machine.regs().rip, CODE + 9);
}
