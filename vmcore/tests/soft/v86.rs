//! Virtual-8086 mode.

use iced_x86::code_asm::*;
use vmcore::backend::Backend;

use crate::guest::Access;
use crate::machine::*;

crate::system!(
    iretd_enters_and_interrupts_leave,
    sensitive_instructions_follow_iopl,
    the_bitmap_counts_whatever_the_level,
    extensions_redirect_and_virtualize,
);

const VM: u64 = 1 << 17;
const VIF: u64 = 1 << 19;
const VIP: u64 = 1 << 20;
const IF: u64 = 1 << 9;
const IOPL: u64 = 3 << 12;

/// A machine that goes to virtual-8086 code at 0x500:0 with `flags`.
fn machine(backend: &dyn Backend, flags: u64, write: impl FnOnce(&mut CodeAssembler)) -> Machine {
    let machine = Machine::new(backend, Mode::Protected, 0, |a| {
        for value in [4, 3, 2, 1, 0x800, 0x7f0, (flags | VM | 2) as i32, 0x500, 0] {
            a.push(value).unwrap();
        }
        a.iretd().unwrap();
    });
    machine.write(0x5000, &code(16, 0, write));
    machine
}

fn iretd_enters_and_interrupts_leave(backend: &dyn Backend) {
    let mut machine = machine(backend, IOPL | IF, |a| {
        a.mov(ax, ds).unwrap();
        a.mov(bx, gs).unwrap();
        a.push(bx).unwrap();
        a.mov(ptr(0x10), ax).unwrap();
        a.int(0x80).unwrap();
    });
    let frame = machine.run_to_fault();
    assert_eq!((frame.vector, frame.cs), (0x80, 0x500));
    assert_eq!(frame.flags, VM | IOPL | IF | 2);
    let r = machine.regs();
    let word = |n: u64| machine.load32(r.rsp + 4 * n);
    assert_eq!((word(3), word(4)), (0x7f0 - 2, 0x800));
    // ES, DS, FS, GS.
    assert_eq!([word(5), word(6), word(7), word(8)], [1, 2, 3, 4]);
    assert_eq!((r.rsp, r.rax & 0xffff, r.rbx & 0xffff), (INNER_STACK - 36, 2, 4));
    assert_eq!(machine.load(0x20 + 0x10) & 0xffff, 2);
    let s = machine.vcpu.sregs().unwrap();
    assert_eq!((s.ds.selector, s.gs.selector, s.ss.selector, r.rflags), (0, 0, KERNEL_DATA, 2 | IOPL));
    assert_eq!(machine.load(0x8000 + 0x7f0 - 2) & 0xffff, 4);
}

fn sensitive_instructions_follow_iopl(backend: &dyn Backend) {
    let cases: [fn(&mut CodeAssembler); 6] = [
        |a| a.cli().unwrap(),
        |a| a.sti().unwrap(),
        |a| a.pushf().unwrap(),
        |a| a.popf().unwrap(),
        |a| a.int(0x80).unwrap(),
        |a| a.iret().unwrap(),
    ];
    for write in cases {
        let mut machine = machine(backend, 0, write);
        let frame = machine.run_to_fault();
        assert_eq!((frame.vector, frame.code, frame.rip, frame.cs), (13, Some(0), 0, 0x500));
        assert_eq!(frame.flags, VM | 2 | 1 << 16);
    }
    // Protected mode's own instructions do not exist.
    let mut machine = machine(backend, IOPL, |a| a.db(&[0x0f, 0x00, 0xc8]).unwrap());
    assert_eq!(machine.run_to_fault().vector, 6);
}

fn the_bitmap_counts_whatever_the_level(backend: &dyn Backend) {
    let mut machine = machine(backend, IOPL, |a| {
        a.out(0x10, al).unwrap();
        a.out(0x18, al).unwrap();
    });
    machine.write(TSS + 102, &0x68u16.to_le_bytes());
    machine.write(TSS + 0x68, &[0xff; 0x2000]);
    machine.write(TSS + 0x68 + 2, &[0]);
    let log = machine.run();
    assert_eq!(log, [Access::Out(0x10, vec![0])]);
    assert_eq!((machine.frame().vector, machine.frame().rip), (13, 2));
}

fn extensions_redirect_and_virtualize(backend: &dyn Backend) {
    let mut machine = machine(backend, VIF, |a| {
        a.cli().unwrap();
        a.pushf().unwrap();
        a.sti().unwrap();
        a.pushf().unwrap();
        a.int(0x21).unwrap();
        a.int(0x22).unwrap();
    });
    machine.edit_sregs(|s| s.cr4 |= 1);
    // INT 0x21 is redirected to the program's own handler at 0x500:0x80, INT 0x22 is not.
    machine.write(TSS + 102, &0x88u16.to_le_bytes());
    machine.write(TSS + 0x68, &[0xff; 32]);
    machine.write(TSS + 0x68 + 4, &[0xfd]);
    machine.write(0x21 * 4, &[0x80, 0, 0, 5]);
    machine.write(
        0x5080,
        &code(16, 0x80, |a| {
            a.pushf().unwrap();
            a.pop(dx).unwrap();
            a.iret().unwrap();
        }),
    );
    let frame = machine.run_to_fault();
    assert_eq!((frame.vector, frame.rip), (13, 6));
    assert_eq!(frame.flags & (VIF | VIP | IF | IOPL), VIF);
    let word = |at: u64| machine.load(0x8000 + at) & 0xffff;
    // IF in the image stands for VIF, and IOPL is told as 3.
    assert_eq!((word(0x7ee), word(0x7ec)), (IOPL | 2, IOPL | IF | 2));
    assert_eq!(machine.regs().rdx & 0xffff, IOPL | 2);
    // With an interrupt pending, STI is for the kernel.
    let mut machine = crate::v86::machine(backend, VIP, |a| a.sti().unwrap());
    machine.edit_sregs(|s| s.cr4 |= 1);
    assert_eq!(machine.run_to_fault().vector, 13);
}
