//! Privilege levels: gates, returns, SYSCALL and SYSENTER, what user code may not do.

use iced_x86::code_asm::*;
use vmcore::backend::Backend;

use crate::machine::*;

crate::system!(
    iretq_goes_to_user_code_and_interrupts_come_back,
    syscall_and_sysret,
    sysenter_and_sysexit,
    user_code_may_not,
    flags_belong_to_their_levels,
    a_call_gate_copies_parameters,
    long_call_gates_switch_stacks,
    conforming_code_keeps_the_level,
    far_returns_drop_what_the_outer_level_may_not_have,
    descriptors_can_be_looked_at,
    returns_check_their_selectors,
    bases_are_swapped,
);

const IF: u64 = 1 << 9;
const IOPL: u64 = 3 << 12;

fn iretq_goes_to_user_code_and_interrupts_come_back(backend: &dyn Backend) {
    // To 64-bit code, and to compatibility mode.
    for (selector, bitness) in [(USER_CODE64 | 3, 64), (USER_CODE32 | 3, 32)] {
        let mut machine = Machine::new(backend, Mode::Long, 0, |a| {
            a.push(i32::from(USER_DATA) + 3).unwrap();
            a.push(USER_STACK as i32).unwrap();
            a.push(0x3202).unwrap();
            a.push(i32::from(selector)).unwrap();
            a.push(0x5000).unwrap();
            a.iretq().unwrap();
        });
        let user = code(bitness, 0x5000, |a| {
            a.push(0x1234).unwrap();
            a.mov(ax, cs).unwrap();
            a.int(0x80).unwrap();
        });
        machine.write(0x5000, &user);
        let frame = machine.run_to_fault();
        let pushed = u64::from(bitness) / 8;
        assert_eq!(frame.vector, 0x80);
        assert_eq!((frame.rip, frame.cs), (0x5000 + user.len() as u64, u64::from(selector)));
        assert_eq!(
            (frame.flags, frame.stack),
            (0x3202, Some((USER_STACK - pushed, u64::from(USER_DATA) + 3)))
        );
        assert_eq!(machine.regs().rax & 0xffff, u64::from(selector));
        assert_eq!(machine.vcpu.sregs().unwrap().cs.selector, CODE64);
        // Data segments of the kernel have not gone to the user.
        assert_eq!(machine.vcpu.sregs().unwrap().ds.selector, 0);
    }
}

fn syscall_and_sysret(backend: &dyn Backend) {
    let mut machine = Machine::new(backend, Mode::Long, 0, |a| {
        for (msr, low, high) in [
            (0xc000_0081u32, 0, u32::from(USER_CODE32 | 3) << 16 | u32::from(CODE64)),
            (0xc000_0082, 0x5000, 0),
            (0xc000_0084, 0x200, 0),
        ] {
            a.mov(ecx, msr).unwrap();
            a.mov(eax, low).unwrap();
            a.mov(edx, high).unwrap();
            a.wrmsr().unwrap();
        }
        a.mov(ecx, 0x6000).unwrap();
        a.mov(r11d, 0x3a02).unwrap();
        a.sysretq().unwrap();
    });
    machine.write(
        0x5000,
        &code(64, 0x5000, |a| {
            a.mov(ptr(DATA), rcx).unwrap();
            a.mov(ptr(DATA + 8), r11).unwrap();
            a.mov(bx, cs).unwrap();
            a.mov(ptr(DATA + 16), bx).unwrap();
            a.mov(bx, ss).unwrap();
            a.mov(ptr(DATA + 24), bx).unwrap();
            a.pushfq().unwrap();
            a.pop(rbx).unwrap();
            a.mov(ptr(DATA + 32), rbx).unwrap();
            a.mov(ecx, 0x7000).unwrap();
            a.sysret().unwrap();
        }),
    );
    machine.write(
        0x6000,
        &code(64, 0x6000, |a| {
            a.mov(ptr(DATA + 40), cs).unwrap();
            a.mov(ptr(DATA + 48), ss).unwrap();
            a.syscall().unwrap();
        }),
    );
    // In compatibility mode the processor of Intel has no SYSCALL.
    machine.write(0x7000, &[0x0f, 0x05]);
    machine.set_gate(6, HANDLERS + 96, 0x8e, 0);
    let intel = is_intel(&machine);
    if intel {
        let frame = machine.run_to_fault();
        assert_eq!((frame.vector, frame.rip, frame.cs), (6, 0x7000, u64::from(USER_CODE32) + 3));
        assert_eq!(frame.flags, 0x1_3a02);
        assert_eq!(frame.stack.map(|s| s.1), Some(u64::from(USER_DATA) + 3));
    } else {
        machine.write(0x7000, &[0xcd, 0x80]);
        machine.run_to_fault();
    }
    let selector = |at| machine.load(at) & 0xffff;
    assert_eq!(machine.load(DATA + 8), 0x3a02);
    assert_eq!((selector(DATA + 16), selector(DATA + 24)), (CODE64.into(), u64::from(CODE64) + 8));
    assert_eq!(machine.load(DATA + 32), 0x3802);
    assert_eq!(
        (selector(DATA + 40), selector(DATA + 48)),
        (u64::from(USER_CODE64) + 3, u64::from(USER_DATA) + 3)
    );
    assert_eq!(machine.load(DATA) & 0xf000, 0x6000);
}

fn is_intel(machine: &Machine) -> bool {
    let cpuid = machine.vcpu.save().unwrap().cpuid;
    cpuid.get(0, 0).unwrap().ebx.to_le_bytes() == *b"Genu"
}

fn sysenter_and_sysexit(backend: &dyn Backend) {
    let mut machine = Machine::new(backend, Mode::Protected, 0, |a| {
        // SYSENTER wants code, stack, user code, user stack in a row: CODE32's neighbours are not.
        for (msr, value) in [(0x174, u32::from(SPARE)), (0x175, INNER_STACK as u32), (0x176, 0x5000)] {
            a.mov(ecx, msr).unwrap();
            a.mov(eax, value).unwrap();
            a.xor(edx, edx).unwrap();
            a.wrmsr().unwrap();
        }
        a.mov(edx, 0x6000).unwrap();
        a.mov(ecx, USER_STACK as u32).unwrap();
        a.sysexit().unwrap();
    });
    machine.write(
        0x6000,
        &code(32, 0x6000, |a| {
            a.mov(ptr(DATA), cs).unwrap();
            a.mov(ptr(DATA + 8), ss).unwrap();
            a.push(eax).unwrap();
            a.sysenter().unwrap();
        }),
    );
    machine.write(
        0x5000,
        &code(32, 0x5000, |a| {
            a.mov(ptr(DATA + 16), cs).unwrap();
            a.mov(ptr(DATA + 24), ss).unwrap();
            a.hlt().unwrap();
        }),
    );
    machine.edit_regs(|r| r.rflags = IF | 2);
    machine.run();
    let selector = |at| machine.load(at) & 0xffff;
    let base = u64::from(SPARE);
    assert_eq!((selector(DATA), selector(DATA + 8)), (base + 16 + 3, base + 24 + 3));
    assert_eq!((selector(DATA + 16), selector(DATA + 24)), (base, base + 8));
    assert_eq!((machine.regs().rsp, machine.regs().rflags & !0xcd5), (INNER_STACK, 2));
    assert_eq!(machine.load32(USER_STACK - 4), 0x5000);
    // Without a selector there is none.
    let mut machine = Machine::new(backend, Mode::Protected, 3, |a| a.sysenter().unwrap());
    assert_eq!(machine.run_to_fault().code, Some(0));
}

fn user_code_may_not(backend: &dyn Backend) {
    type Write = fn(&mut CodeAssembler);
    let cases: &[(&str, Write)] = &[
        ("hlt", |a| a.hlt().unwrap()),
        ("cli", |a| a.cli().unwrap()),
        ("sti", |a| a.sti().unwrap()),
        ("in", |a| a.in_(al, 0x10).unwrap()),
        ("out", |a| a.out(0x10, al).unwrap()),
        ("clts", |a| a.clts().unwrap()),
        ("invlpg", |a| a.invlpg(ptr(rax)).unwrap()),
        ("wbinvd", |a| a.wbinvd().unwrap()),
        ("rdmsr", |a| a.rdmsr().unwrap()),
        ("wrmsr", |a| a.wrmsr().unwrap()),
        ("mov to cr", |a| a.mov(cr3, rax).unwrap()),
        ("mov from cr", |a| a.mov(rax, cr0).unwrap()),
        ("mov to dr", |a| a.mov(dr0, rax).unwrap()),
        ("lgdt", |a| a.lgdt(ptr(rsp)).unwrap()),
        ("lidt", |a| a.lidt(ptr(rsp)).unwrap()),
        ("lldt", |a| a.lldt(eax).unwrap()),
        ("ltr", |a| a.ltr(eax).unwrap()),
        ("lmsw", |a| a.lmsw(eax).unwrap()),
        ("swapgs", |a| a.swapgs().unwrap()),
        ("sysretq", |a| a.sysretq().unwrap()),
        ("sysexitq", |a| a.sysexitq().unwrap()),
    ];
    for (name, write) in cases {
        let mut machine = Machine::new(backend, Mode::Long, 3, write);
        let frame = machine.run_to_fault();
        assert_eq!((frame.vector, frame.code, frame.rip), (13, Some(0), CODE), "{name}");
    }
    // What only looks is forbidden by UMIP alone.
    let cases: &[(&str, Write)] = &[
        ("sgdt", |a| a.sgdt(ptr(rsp)).unwrap()),
        ("sidt", |a| a.sidt(ptr(rsp)).unwrap()),
        ("sldt", |a| a.sldt(eax).unwrap()),
        ("str", |a| a.str(eax).unwrap()),
        ("smsw", |a| a.smsw(eax).unwrap()),
    ];
    for (name, write) in cases {
        let with_end = |a: &mut CodeAssembler| {
            write(a);
            a.int(0x80).unwrap();
        };
        let mut machine = Machine::new(backend, Mode::Long, 3, with_end);
        assert_eq!(machine.run_to_fault().vector, 0x80, "{name}");
        let cpuid = machine.vcpu.save().unwrap().cpuid;
        if cpuid.get(7, 0).is_some_and(|leaf| leaf.ecx & 4 != 0) {
            let mut machine = Machine::new(backend, Mode::Long, 3, with_end);
            machine.edit_sregs(|s| s.cr4 |= 1 << 11);
            assert_eq!(machine.run_to_fault().vector, 13, "{name}");
        }
    }
}

fn flags_belong_to_their_levels(backend: &dyn Backend) {
    // POPF at level 3: neither IOPL nor, below it, IF.
    for (iopl, expected) in [(0, 2 | 0x4cd5), (IOPL, 2 | 0x4ed5 | IOPL)] {
        let mut machine = Machine::new(backend, Mode::Long, 3, |a| {
            a.popfq().unwrap();
            a.int(0x80).unwrap();
        });
        machine.edit_regs(|r| r.rflags = 2 | iopl);
        machine.store(USER_STACK, 0x4ed5 | 0x1_0000 | (IOPL & !iopl));
        let frame = machine.run_to_fault();
        assert_eq!(frame.flags, expected, "{:x}", frame.flags);
    }
    // At level 0 everything but VM, RF, VIF and VIP.
    let mut machine = Machine::new(backend, Mode::Long, 0, |a| {
        a.popfq().unwrap();
        a.pushfq().unwrap();
        a.hlt().unwrap();
    });
    machine.store(STACK, 0x003f_7ed5);
    machine.run();
    assert_eq!(machine.load(STACK), 0x0024_7ed7);
    // CLI and STI follow IOPL.
    let mut machine = Machine::new(backend, Mode::Long, 3, |a| {
        a.sti().unwrap();
        a.pushfq().unwrap();
        a.cli().unwrap();
        a.pushfq().unwrap();
        a.int(0x80).unwrap();
    });
    machine.edit_regs(|r| r.rflags = 2 | IOPL);
    machine.run();
    assert_eq!((machine.load(USER_STACK - 8), machine.load(USER_STACK - 16)), (2 | IOPL | IF, 2 | IOPL));
}

fn a_call_gate_copies_parameters(backend: &dyn Backend) {
    let mut machine = Machine::new(backend, Mode::Protected, 3, |a| {
        a.push(0x1111).unwrap();
        a.push(0x2222).unwrap();
        a.db(&[0x9a, 0, 0, 0, 0]).unwrap();
        a.dw(&[SPARE | 3]).unwrap();
        a.int(0x80).unwrap();
    });
    // Two parameters, level 3, to CODE32:0x5000.
    machine.set_descriptor(SPARE, 0x5000 | u64::from(CODE32) << 16 | 2 << 32 | 0xec << 40);
    machine.write(
        0x5000,
        &code(32, 0x5000, |a| {
            a.mov(ptr(DATA), esp).unwrap();
            a.mov(eax, ptr(esp + 8)).unwrap();
            a.mov(ebx, ptr(esp + 12)).unwrap();
            a.mov(ecx, ptr(esp + 16)).unwrap();
            a.mov(edx, ptr(esp + 20)).unwrap();
            a.mov(esi, ptr(esp + 4)).unwrap();
            a.retf_1(8).unwrap();
        }),
    );
    let frame = machine.run_to_fault();
    assert_eq!((frame.vector, frame.stack), (0x80, Some((USER_STACK, u64::from(USER_DATA) + 3))));
    let regs = machine.regs();
    assert_eq!(machine.load32(DATA), INNER_STACK - 24);
    assert_eq!((regs.rax, regs.rbx, regs.rcx), (0x2222, 0x1111, USER_STACK - 8));
    assert_eq!((regs.rdx, regs.rsi), (u64::from(USER_DATA) + 3, u64::from(USER_CODE32) + 3));
}

fn long_call_gates_switch_stacks(backend: &dyn Backend) {
    let mut machine = Machine::new(backend, Mode::Long, 3, |a| {
        a.db(&[0xff, 0x1c, 0x25, 0, 0, 3, 0]).unwrap();
        a.int(0x80).unwrap();
    });
    machine.store(DATA, u64::from(SPARE) << 32);
    machine.store(GDT + u64::from(SPARE), 0x5000 | u64::from(CODE64) << 16 | 0xec << 40);
    machine.store(GDT + u64::from(SPARE) + 8, 0);
    machine.write(
        0x5000,
        &code(64, 0x5000, |a| {
            a.mov(rbx, rsp).unwrap();
            a.mov(ax, ss).unwrap();
            a.retf().unwrap();
        }),
    );
    let frame = machine.run_to_fault();
    assert_eq!((frame.vector, frame.stack), (0x80, Some((USER_STACK, u64::from(USER_DATA) + 3))));
    assert_eq!((machine.regs().rbx, machine.regs().rax & 0xffff), (INNER_STACK - 32, 0));
    let words: Vec<u64> = (1..=4).map(|n| machine.load(INNER_STACK - 8 * n)).collect();
    // The handler's frame has overwritten this with the same stack, and its own return address.
    assert_eq!(words[0], u64::from(USER_DATA) + 3);
    assert_eq!(words[1], USER_STACK);
}

fn conforming_code_keeps_the_level(backend: &dyn Backend) {
    let mut machine = Machine::new(backend, Mode::Protected, 3, |a| {
        a.db(&[0x9a, 0, 0x50, 0, 0]).unwrap();
        a.dw(&[CONFORMING]).unwrap();
        a.int(0x80).unwrap();
    });
    machine.write(
        0x5000,
        &code(32, 0x5000, |a| {
            a.mov(ax, cs).unwrap();
            a.retf().unwrap();
        }),
    );
    let frame = machine.run_to_fault();
    assert_eq!((frame.vector, frame.cs), (0x80, u64::from(USER_CODE32) + 3));
    assert_eq!(machine.regs().rax & 0xffff, u64::from(CONFORMING) + 3);
}

fn far_returns_drop_what_the_outer_level_may_not_have(backend: &dyn Backend) {
    let mut machine = Machine::new(backend, Mode::Protected, 0, |a| {
        a.mov(eax, u32::from(USER_DATA)).unwrap();
        a.mov(es, eax).unwrap();
        a.mov(eax, u32::from(CONFORMING)).unwrap();
        a.mov(fs, eax).unwrap();
        a.push(i32::from(USER_DATA) + 3).unwrap();
        a.push(USER_STACK as i32).unwrap();
        a.push(i32::from(USER_CODE32) + 3).unwrap();
        a.push(0x5000).unwrap();
        a.retf().unwrap();
    });
    machine.write(0x5000, &[0xcd, 0x80]);
    let frame = machine.run_to_fault();
    assert_eq!((frame.vector, frame.rip), (0x80, 0x5002));
    let s = machine.vcpu.sregs().unwrap();
    assert_eq!((s.ds.selector, s.es.selector, s.fs.selector, s.gs.selector), (0, USER_DATA, CONFORMING, 0));
}

fn descriptors_can_be_looked_at(backend: &dyn Backend) {
    let mut machine = Machine::new(backend, Mode::Long, 3, |a| {
        let look = |a: &mut CodeAssembler, n: u64| {
            a.pushfq().unwrap();
            a.pop(rsi).unwrap();
            a.mov(ptr(DATA + n * 16), rsi).unwrap();
            a.mov(ptr(DATA + n * 16 + 8), rbx).unwrap();
        };
        for (n, selector) in [USER_DATA, KERNEL_DATA, CONFORMING, TASK, 0].into_iter().enumerate() {
            a.mov(eax, u32::from(selector)).unwrap();
            a.mov(ebx, 7).unwrap();
            a.lar(ebx, eax).unwrap();
            look(a, n as u64 * 4);
            a.mov(ebx, 7).unwrap();
            a.lsl(ebx, eax).unwrap();
            look(a, n as u64 * 4 + 1);
            a.verr(eax).unwrap();
            look(a, n as u64 * 4 + 2);
            a.verw(eax).unwrap();
            look(a, n as u64 * 4 + 3);
        }
        a.int(0x80).unwrap();
    });
    assert_eq!(machine.run_to_fault().vector, 0x80);
    let zf = |n: u64| machine.load(DATA + n * 16) >> 6 & 1;
    let value = |n: u64| machine.load(DATA + n * 16 + 8);
    let zfs = |n: u64| [zf(4 * n), zf(4 * n + 1), zf(4 * n + 2), zf(4 * n + 3)];
    assert_eq!((zfs(0), value(0), value(1)), ([1, 1, 1, 1], 0x00cf_f300, 0xffff_ffff));
    assert_eq!((zfs(1), value(4), value(5)), ([0; 4], 7, 7));
    assert_eq!((zfs(2), value(8)), ([1, 1, 1, 0], 0x00af_9f00));
    assert_eq!(zfs(3), [0; 4]);
    assert_eq!(zfs(4), [0; 4]);
}

fn returns_check_their_selectors(backend: &dyn Backend) {
    // CS, SS, RIP, vector, error code.
    let user = u64::from(USER_CODE64) + 3;
    let stack = u64::from(USER_DATA) + 3;
    let cases = [
        (0, stack, 0x5000, 13, 0),
        (u64::from(KERNEL_DATA), stack, 0x5000, 13, u64::from(KERNEL_DATA)),
        (u64::from(USER_CODE64), stack, 0x5000, 13, u64::from(USER_CODE64)),
        (user, 0, 0x5000, 13, 0),
        (user, u64::from(KERNEL_DATA), 0x5000, 13, u64::from(KERNEL_DATA)),
        (user, u64::from(USER_CODE64) + 3, 0x5000, 13, u64::from(USER_CODE64)),
        (u64::from(ABSENT), stack, 0x5000, 11, u64::from(ABSENT)),
        (user, stack, 1 << 60, 13, 0),
        (user, 0x1003, 0x5000, 13, 0x1000),
    ];
    for (code, stack, rip, vector, error) in cases {
        let mut machine = Machine::new(backend, Mode::Long, 0, |a| a.iretq().unwrap());
        for (n, value) in (0..).zip([rip, code, 2, USER_STACK, stack]) {
            machine.store(STACK + 8 * n, value);
        }
        machine.set_gate(13, HANDLERS + 13 * 16, 0x8e, 1);
        machine.set_gate(11, HANDLERS + 11 * 16, 0x8e, 1);
        let frame = machine.run_to_fault();
        assert_eq!(
            (frame.vector, frame.code, frame.rip),
            (vector, Some(error), CODE),
            "{code:x} {stack:x} {rip:x}"
        );
        assert_eq!(frame.stack, Some((STACK, KERNEL_DATA.into())));
    }
    // NT has no meaning in long mode but a fault.
    let mut machine = Machine::new(backend, Mode::Long, 0, |a| a.iretq().unwrap());
    machine.edit_regs(|r| r.rflags = 0x4002);
    let frame = machine.run_to_fault();
    assert_eq!((frame.vector, frame.flags), (13, 0x1_4002));
}

fn bases_are_swapped(backend: &dyn Backend) {
    const FS_BASE: u32 = 0xc000_0100;
    let mut machine = Machine::new(backend, Mode::Long, 0, |a| {
        for (msr, value) in [(FS_BASE, 0x3_0000u32), (FS_BASE + 1, 0x3_1000), (FS_BASE + 2, 0x3_2000)] {
            a.mov(ecx, msr).unwrap();
            a.mov(eax, value).unwrap();
            a.xor(edx, edx).unwrap();
            a.wrmsr().unwrap();
        }
        a.mov(rax, qword_ptr(8).fs()).unwrap();
        a.mov(rbx, qword_ptr(8).gs()).unwrap();
        a.swapgs().unwrap();
        a.mov(rsi, qword_ptr(8).gs()).unwrap();
        a.rdmsr().unwrap();
        a.mov(rdi, rax).unwrap();
        a.mov(rax, qword_ptr(8).fs()).unwrap();
        // A null selector clears FS's base, on Intel's.
        a.hlt().unwrap();
    });
    for at in [0x3_0000u64, 0x3_1000, 0x3_2000] {
        machine.store(at + 8, at);
    }
    machine.run();
    let r = machine.regs();
    assert_eq!((r.rax, r.rbx, r.rsi, r.rdi), (0x3_0000, 0x3_1000, 0x3_2000, 0x3_1000));
    assert_eq!(machine.vcpu.sregs().unwrap().gs.base, 0x3_2000);
    // Only canonical ones.
    let mut machine = Machine::new(backend, Mode::Long, 0, |a| {
        a.mov(ecx, FS_BASE).unwrap();
        a.mov(edx, 0x1000_0000).unwrap();
        a.wrmsr().unwrap();
    });
    assert_eq!(machine.run_to_fault().vector, 13);
}
