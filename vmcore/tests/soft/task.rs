//! Hardware tasks.

use iced_x86::code_asm::*;
use vmcore::backend::Backend;

use crate::machine::*;

crate::system!(
    a_jump_switches_tasks,
    a_call_nests_and_iret_returns,
    a_task_gate_takes_a_double_fault,
    a_bad_task_is_refused,
    a_fault_of_the_new_task_is_its_own,
);

const OTHER_TSS: u64 = 0x6000;
const GATE: u16 = SPARE + 8;

/// A 32-bit TSS at [`OTHER_TSS`], named by [`SPARE`], that begins at `rip`.
fn other_task(machine: &Machine, rip: u64) {
    machine.set_descriptor(SPARE, 0x0000_8900_0000_0067 | OTHER_TSS << 16);
    machine.set_descriptor(GATE, u64::from(SPARE) << 16 | 0xe5 << 40);
    let mut words = [0u32; 26];
    words[8] = rip as u32;
    words[9] = 2 | 0x40;
    for n in 0..8 {
        words[10 + n] = 0x100 * (n as u32 + 1);
    }
    words[14] = 0xe000;
    for (n, selector) in [KERNEL_DATA, CODE32, KERNEL_DATA, USER_DATA, 0, 0].into_iter().enumerate() {
        words[18 + n] = selector.into();
    }
    words[25] = 0x68 << 16;
    for (n, word) in words.into_iter().enumerate() {
        machine.write(OTHER_TSS + 4 * n as u64, &word.to_le_bytes());
    }
}

fn busy(machine: &Machine, selector: u16) -> bool {
    machine.load(GDT + u64::from(selector)) >> 41 & 1 != 0
}

fn a_jump_switches_tasks(backend: &dyn Backend) {
    for to in [SPARE, GATE] {
        let mut machine = Machine::new(backend, Mode::Protected, 0, |a| {
            a.mov(ebx, 0x1234_5678).unwrap();
            a.stc().unwrap();
            a.db(&[0xea, 0, 0, 0, 0]).unwrap();
            a.dw(&[to]).unwrap();
        });
        other_task(&machine, 0x5000);
        machine.write(0x5000, &[0xf4]);
        machine.run();
        let (r, s) = (machine.regs(), machine.vcpu.sregs().unwrap());
        assert_eq!((r.rip, r.rax, r.rcx, r.rdi, r.rsp), (0x5001, 0x100, 0x200, 0x800, 0xe000));
        assert_eq!((r.rflags, s.tr.selector, s.ds.selector, s.fs.selector), (0x42, SPARE, USER_DATA, 0));
        assert_eq!(s.cr0 >> 3 & 1, 1, "CR0.TS");
        assert_eq!((busy(&machine, TASK), busy(&machine, SPARE)), (false, true));
        // The old task is in its TSS.
        assert_eq!((machine.load32(TSS + 0x20), machine.load32(TSS + 0x24)), (CODE + 13, 3));
        assert_eq!((machine.load32(TSS + 0x34), machine.load32(TSS + 0x38)), (0x1234_5678, STACK));
        assert_eq!(machine.load32(TSS + 0x4c), u64::from(CODE32));
    }
}

fn a_call_nests_and_iret_returns(backend: &dyn Backend) {
    let mut machine = Machine::new(backend, Mode::Protected, 0, |a| {
        a.mov(ebx, 0x1234_5678).unwrap();
        a.db(&[0x9a, 0, 0, 0, 0]).unwrap();
        a.dw(&[SPARE]).unwrap();
        a.hlt().unwrap();
    });
    other_task(&machine, 0x5000);
    machine.write(
        0x5000,
        &code(32, 0x5000, |a| {
            a.pushfd().unwrap();
            a.pop(ebx).unwrap();
            a.mov(ptr(DATA), ebx).unwrap();
            a.iretd().unwrap();
        }),
    );
    machine.run();
    let (r, s) = (machine.regs(), machine.vcpu.sregs().unwrap());
    assert_eq!((r.rip, r.rbx, r.rsp, s.tr.selector), (CODE + 13, 0x1234_5678, STACK, TASK));
    assert_eq!((busy(&machine, TASK), busy(&machine, SPARE)), (true, false));
    // NT in the nested task, and the link to the old one; NT is gone from what IRET saved.
    assert_eq!(machine.load32(DATA), 0x4042);
    assert_eq!(machine.load(OTHER_TSS) & 0xffff, u64::from(TASK));
    assert_eq!(machine.load32(OTHER_TSS + 0x24), 0x42);
    assert_eq!(machine.load32(OTHER_TSS + 0x20), 0x5000 + 9);
}

fn a_task_gate_takes_a_double_fault(backend: &dyn Backend) {
    let mut machine = Machine::new(backend, Mode::Protected, 0, |a| {
        a.mov(esp, ptr(0x10)).unwrap();
        a.mov(eax, 0x1000).unwrap();
        a.mov(ds, eax).unwrap();
    });
    machine.set_gate(13, HANDLERS, 0x0e, 0);
    machine.store(IDT + 64, u64::from(SPARE) << 16 | 0x85 << 40);
    other_task(&machine, 0x5000);
    machine.write(0x5000, &[0xf4]);
    machine.run();
    let r = machine.regs();
    // The error code is on the new task's stack.
    assert_eq!((r.rip, r.rsp, machine.load32(0xe000 - 4)), (0x5001, 0xe000 - 4, 0));
    assert_eq!(machine.vcpu.sregs().unwrap().tr.selector, SPARE);
    let fault = machine.load32(TSS + 0x20);
    assert_eq!(fault, CODE + 11);
}

fn a_bad_task_is_refused(backend: &dyn Backend) {
    let jump = |to: u16| {
        move |a: &mut iced_x86::code_asm::CodeAssembler| {
            a.db(&[0xea, 0, 0, 0, 0]).unwrap();
            a.dw(&[to]).unwrap();
        }
    };
    // Busy.
    let mut machine = Machine::new(backend, Mode::Protected, 0, jump(TASK));
    let frame = machine.run_to_fault();
    assert_eq!((frame.vector, frame.code, frame.rip), (13, Some(TASK.into()), CODE));
    // Too short.
    let mut machine = Machine::new(backend, Mode::Protected, 0, jump(SPARE));
    other_task(&machine, 0x5000);
    machine.set_descriptor(SPARE, 0x0000_8900_0000_0066 | OTHER_TSS << 16);
    let frame = machine.run_to_fault();
    assert_eq!((frame.vector, frame.code, frame.rip), (10, Some(SPARE.into()), CODE));
    // Absent.
    let mut machine = Machine::new(backend, Mode::Protected, 0, jump(SPARE));
    other_task(&machine, 0x5000);
    machine.set_descriptor(SPARE, 0x0000_0900_0000_0067 | OTHER_TSS << 16);
    let frame = machine.run_to_fault();
    assert_eq!((frame.vector, frame.code, frame.rip), (11, Some(SPARE.into()), CODE));
    // Of the kernel.
    let mut machine = Machine::new(backend, Mode::Protected, 3, jump(SPARE));
    other_task(&machine, 0x5000);
    let frame = machine.run_to_fault();
    assert_eq!((frame.vector, frame.code, frame.rip), (13, Some(SPARE.into()), CODE));
    assert!(!busy(&machine, SPARE) && busy(&machine, TASK));
}

fn a_fault_of_the_new_task_is_its_own(backend: &dyn Backend) {
    let mut machine = Machine::new(backend, Mode::Protected, 0, |a| {
        a.db(&[0xea, 0, 0, 0, 0]).unwrap();
        a.dw(&[SPARE]).unwrap();
    });
    other_task(&machine, 0x5000);
    // DS names a segment that is not there.
    machine.write(OTHER_TSS + 0x54, &0x1000u32.to_le_bytes());
    let frame = machine.run_to_fault();
    assert_eq!((frame.vector, frame.code, frame.rip), (10, Some(0x1000), 0x5000));
    assert_eq!((machine.vcpu.sregs().unwrap().tr.selector, machine.regs().rsp), (SPARE, 0xe000 - 16));
}
