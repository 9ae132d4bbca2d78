//! Changes of mode.

use iced_x86::code_asm::*;
use vmcore::backend::Backend;

use crate::guest::Access;
use crate::machine::*;

crate::system!(from_real_mode_to_long_mode_and_back, long_mode_needs_its_conditions);

const EFER: u32 = 0xc000_0080;

/// Each stage tells itself at a port.
fn from_real_mode_to_long_mode_and_back(backend: &dyn Backend) {
    let (protected, long, compatible, sixteen, real) =
        (0x4000u64, 0x4200u64, 0x4400u64, 0x4600u64, 0x4800u64);
    let mut machine = Machine::new(backend, Mode::Real, 0, |a| {
        a.out(0x10, al).unwrap();
        // 66: all 32 bits of the base.
        a.db(&[0x66, 0x0f, 0x01, 0x16, 0x00, 0x60]).unwrap();
        a.mov(eax, cr0).unwrap();
        a.or(eax, 1).unwrap();
        a.mov(cr0, eax).unwrap();
        // JMP CODE32:protected, with a 32-bit offset.
        a.db(&[0x66, 0xea]).unwrap();
        a.dd(&[protected as u32]).unwrap();
        a.dw(&[CODE32]).unwrap();
    });
    machine.write(0x6000, &[&GDT_LIMIT.to_le_bytes()[..], &(GDT as u32).to_le_bytes()].concat());
    // The same page tables, which a machine made for long mode has.
    let tables = Machine::new(backend, Mode::Long, 0, |a| a.nop().unwrap());
    let table = tables.vcpu.sregs().unwrap().cr3;
    let mut page = vec![0; 0x4000];
    tables.memory.read(vmcore::GuestAddress(table), &mut page).unwrap();
    machine.write(table, &page);

    let far = |a: &mut CodeAssembler, selector: u16, to: u64| {
        a.db(&[0xea]).unwrap();
        a.dd(&[to as u32]).unwrap();
        a.dw(&[selector]).unwrap();
    };
    machine.write(
        protected,
        &code(32, protected, |a| {
            a.mov(eax, u32::from(KERNEL_DATA)).unwrap();
            a.mov(ds, eax).unwrap();
            a.mov(ss, eax).unwrap();
            a.mov(es, eax).unwrap();
            a.mov(esp, STACK as u32).unwrap();
            a.out(0x11, al).unwrap();
            a.mov(eax, 1 << 5).unwrap();
            a.mov(cr4, eax).unwrap();
            a.mov(eax, cr3_value(table)).unwrap();
            a.mov(cr3, eax).unwrap();
            a.mov(ecx, EFER).unwrap();
            a.rdmsr().unwrap();
            a.or(eax, 1 << 8 | 1 << 11).unwrap();
            a.wrmsr().unwrap();
            a.mov(eax, cr0).unwrap();
            a.or(eax, 0x8000_0000u32 as i32).unwrap();
            a.mov(cr0, eax).unwrap();
            // Compatibility mode: IA-32e with a 32-bit segment.
            a.rdmsr().unwrap();
            a.out(0x12, eax).unwrap();
            far(a, CODE64, long);
        }),
    );
    machine.write(
        long,
        &code(64, long, |a| {
            a.mov(rax, 0x1_0000_0000_0000u64 | 0x1234).unwrap();
            a.shr(rax, 48).unwrap();
            a.out(0x13, eax).unwrap();
            a.push(u32::from(CODE32) as i32).unwrap();
            a.push(compatible as i32).unwrap();
            a.retf().unwrap();
        }),
    );
    machine.write(
        compatible,
        &code(32, compatible, |a| {
            a.out(0x14, al).unwrap();
            a.mov(eax, cr0).unwrap();
            a.and(eax, 0x7fff_ffff).unwrap();
            a.mov(cr0, eax).unwrap();
            a.mov(ecx, EFER).unwrap();
            a.rdmsr().unwrap();
            a.out(0x15, eax).unwrap();
            a.and(eax, !(1 << 8 | 1 << 11)).unwrap();
            a.wrmsr().unwrap();
            a.mov(eax, u32::from(DATA16)).unwrap();
            a.mov(ds, eax).unwrap();
            a.mov(es, eax).unwrap();
            a.mov(ss, eax).unwrap();
            a.mov(fs, eax).unwrap();
            a.mov(gs, eax).unwrap();
            far(a, SPARE, sixteen);
        }),
    );
    // 16-bit code from 0.
    machine.set_descriptor(SPARE, 0x0000_9b00_0000_ffff);
    machine.write(
        sixteen,
        &code(16, sixteen, |a| {
            a.out(0x16, al).unwrap();
            a.mov(eax, cr0).unwrap();
            a.and(eax, 0xfffe).unwrap();
            a.mov(cr0, eax).unwrap();
            a.db(&[0xea]).unwrap();
            a.dw(&[0, (real >> 4) as u16]).unwrap();
        }),
    );
    machine.write(
        real,
        &code(16, 0, |a| {
            a.xor(ax, ax).unwrap();
            a.mov(ds, ax).unwrap();
            a.out(0x17, al).unwrap();
            a.int(0x33).unwrap();
        }),
    );
    let log = machine.run();
    let out = |port, value: &[u8]| Access::Out(port, value.to_vec());
    assert_eq!(
        log,
        [
            out(0x10, &[0]),
            out(0x11, &[KERNEL_DATA as u8]),
            out(0x12, &[0, 0xd, 0, 0]),
            out(0x13, &[1, 0, 0, 0]),
            out(0x14, &[1]),
            out(0x15, &[0, 0x9, 0, 0]),
            out(0x16, &[DATA16 as u8]),
            out(0x17, &[0]),
        ]
    );
    assert_eq!((machine.frame().vector, machine.frame().cs), (0x33, real >> 4));
    assert_eq!(machine.vcpu.sregs().unwrap().cr0 & 0x8000_0001, 0);
}

fn cr3_value(at: u64) -> u32 {
    u32::try_from(at).unwrap()
}

fn long_mode_needs_its_conditions(backend: &dyn Backend) {
    // Without PAE paging cannot be switched on; EFER.LME cannot change while it is.
    let mut machine = Machine::new(backend, Mode::Protected, 0, |a| {
        a.mov(ecx, EFER).unwrap();
        a.rdmsr().unwrap();
        a.or(eax, 1 << 8).unwrap();
        a.wrmsr().unwrap();
        a.mov(eax, cr0).unwrap();
        a.or(eax, 0x8000_0000u32 as i32).unwrap();
        a.mov(cr0, eax).unwrap();
    });
    let frame = machine.run_to_fault();
    assert_eq!((frame.vector, frame.code), (13, Some(0)));
    let mut machine = Machine::new(backend, Mode::Long, 0, |a| {
        a.mov(ecx, EFER).unwrap();
        a.rdmsr().unwrap();
        a.btr(eax, 8).unwrap();
        a.wrmsr().unwrap();
    });
    let frame = machine.run_to_fault();
    assert_eq!((frame.vector, frame.code), (13, Some(0)));
    // Paging cannot be switched off in 64-bit code, nor PAE.
    let mut machine = Machine::new(backend, Mode::Long, 0, |a| {
        a.mov(rax, cr0).unwrap();
        a.btr(rax, 31).unwrap();
        a.mov(cr0, rax).unwrap();
    });
    assert_eq!(machine.run_to_fault().vector, 13);
    let mut machine = Machine::new(backend, Mode::Long, 0, |a| {
        a.mov(rax, cr4).unwrap();
        a.btr(rax, 5).unwrap();
        a.mov(cr4, rax).unwrap();
    });
    assert_eq!(machine.run_to_fault().vector, 13);
}
