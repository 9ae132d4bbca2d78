//! Input and output.

use iced_x86::code_asm::*;
use vmcore::backend::Backend;

use crate::guest::Access;
use crate::machine::*;

crate::system!(the_bitmap_opens_ports, strings_go_as_far_as_they_can, strings_have_directions_and_sizes);

const IOPL: u64 = 3 << 12;

fn the_bitmap_opens_ports(backend: &dyn Backend) {
    // The map is at 0x68 of the TSS: bit 0 of byte 2 is port 16.
    let open = |machine: &Machine| {
        machine.write(TSS + 102, &0x68u16.to_le_bytes());
        machine.write(TSS + 0x68, &[0xff; 0x2000]);
        machine.write(TSS + 0x68 + 2, &[0xf0]);
    };
    for mode in [Mode::Protected, Mode::Long] {
        let mut machine = Machine::new(backend, mode, 3, |a| {
            a.out(0x10, eax).unwrap();
            a.out(0x13, al).unwrap();
            a.out(0x13, ax).unwrap();
        });
        open(&machine);
        let log = machine.run();
        assert_eq!(log, [Access::Out(0x10, vec![0; 4]), Access::Out(0x13, vec![0])]);
        let frame = machine.frame();
        assert_eq!((frame.vector, frame.code, frame.rip & 0xf), (13, Some(0), 4));
        // Behind the limit everything is closed.
        let mut machine = Machine::new(backend, mode, 3, |a| a.out(0x10, al).unwrap());
        open(&machine);
        machine.edit_sregs(|s| s.tr.limit = 0x6a);
        assert_eq!(machine.run_to_fault().vector, 13);
        // IOPL opens everything.
        let mut machine = Machine::new(backend, mode, 3, |a| {
            a.out(0x10, al).unwrap();
            a.int(0x80).unwrap();
        });
        machine.edit_regs(|r| r.rflags = 2 | IOPL);
        assert_eq!(machine.run().len(), 1);
    }
}

fn strings_go_as_far_as_they_can(backend: &dyn Backend) {
    // The third word would be in a page that is absent.
    let mut machine = Machine::new(backend, Mode::Long, 0, |a| {
        a.mov(edx, 0x10).unwrap();
        a.mov(ecx, 5).unwrap();
        a.mov(edi, (ABSENT_PAGE - 4) as u32).unwrap();
        a.rep().insw().unwrap();
    });
    // The page before is read-only: make room before that.
    machine.edit_sregs(|s| s.cr0 &= !(1 << 16));
    let log = machine.run();
    assert_eq!(log, [Access::In(0x10, 2), Access::In(0x10, 2)]);
    let (frame, r) = (machine.frame(), machine.regs());
    assert_eq!((frame.vector, frame.code, frame.rip), (14, Some(2), CODE + 15));
    assert_eq!((r.rcx, r.rdi), (3, ABSENT_PAGE));
    assert_eq!(machine.load32(ABSENT_PAGE - 4), 0x0302_0100);

    let mut machine = Machine::new(backend, Mode::Long, 0, |a| {
        a.mov(edx, 0x10).unwrap();
        a.mov(ecx, 3).unwrap();
        a.mov(esi, (ABSENT_PAGE - 4) as u32).unwrap();
        a.rep().outsd().unwrap();
    });
    machine.store(ABSENT_PAGE - 4, 0x0403_0201);
    let log = machine.run();
    assert_eq!(log, [Access::Out(0x10, vec![1, 2, 3, 4])]);
    assert_eq!((machine.regs().rcx, machine.regs().rsi, machine.frame().vector), (2, ABSENT_PAGE, 14));
}

fn strings_have_directions_and_sizes(backend: &dyn Backend) {
    let mut machine = Machine::new(backend, Mode::Real, 0, |a| {
        a.mov(dx, 0x10).unwrap();
        a.mov(cx, 3).unwrap();
        a.mov(si, 0x7004).unwrap();
        a.std().unwrap();
        a.rep().outsw().unwrap();
        a.cld().unwrap();
        a.mov(di, 0x7010).unwrap();
        a.insb().unwrap();
        a.insd().unwrap();
        a.xor(cx, cx).unwrap();
        a.rep().insb().unwrap();
        a.hlt().unwrap();
    });
    machine.write(0x7000, &[1, 2, 3, 4, 5, 6]);
    machine.edit_regs(|r| (r.rcx, r.rsi) = (0xabcd_0000, 0x1234_0000));
    let log = machine.run();
    let out = |bytes: &[u8]| Access::Out(0x10, bytes.to_vec());
    assert_eq!(log, [out(&[5, 6]), out(&[3, 4]), out(&[1, 2]), Access::In(0x10, 1), Access::In(0x10, 4)]);
    let r = machine.regs();
    assert_eq!((r.rsi, r.rdi, r.rcx), (0x1234_6ffe, 0x7015, 0xabcd_0000));
    assert_eq!(machine.load(0x7010) & 0xff_ffff_ffff, 0x04_0302_0100);
}
