//! Port and MMIO accesses, string I/O, HLT, in every mode.

use iced_x86::code_asm::*;
use vmcore::backend::{Backend, VcpuExit};

use crate::guest::{Access, Guest, Mode, NO_MEMORY, Recorder, assemble};

crate::contract!(
    code_runs_in_every_mode,
    ports_of_each_size,
    string_output_keeps_its_operand_size,
    string_input_keeps_its_operand_size,
    mmio_of_each_size,
    mmio_across_a_page_and_into_memory,
    a_triple_fault_ends_the_run,
    statistics_count_accesses,
);

/// Sums the numbers from 1 to 10 in a loop; leaves the sum in memory.
fn code_runs_in_every_mode(backend: &dyn Backend) {
    for mode in Mode::ALL {
        let code = assemble(mode, |a| {
            let mut again = a.create_label();
            a.xor(ax, ax).unwrap();
            a.mov(cx, 10).unwrap();
            a.set_label(&mut again).unwrap();
            a.add(ax, cx).unwrap();
            a.dec(cx).unwrap();
            a.jnz(again).unwrap();
            match mode {
                Mode::Real => a.mov(word_ptr(0x7000), ax).unwrap(),
                Mode::Protected => a.mov(ptr(edi + 0x7000), ax).unwrap(),
                Mode::Long => a.mov(ptr(rdi + 0x7000), ax).unwrap(),
            }
            a.hlt().unwrap();
        });
        let mut guest = Guest::new(backend, mode, &code);
        assert_eq!(guest.run_to_halt(), []);
        assert_eq!(guest.load(0x7000), [55, 0], "{mode:?}");
        assert_eq!(guest.vcpu.regs().unwrap().rax & 0xffff, 55);
        // HLT is behind the vCPU: run again and it goes on to what follows.
        let end = guest.vcpu.regs().unwrap().rip;
        let base = if mode == Mode::Real { 0 } else { crate::guest::CODE };
        assert_eq!(end, base + code.len() as u64);
    }
}

fn ports_of_each_size(backend: &dyn Backend) {
    for mode in Mode::ALL {
        let code = assemble(mode, |a| {
            a.mov(eax, 0x4433_2211).unwrap();
            a.out(0x80, al).unwrap();
            a.mov(dx, 0x1234).unwrap();
            a.out(dx, ax).unwrap();
            a.out(dx, eax).unwrap();
            a.in_(al, 0x42).unwrap();
            a.mov(bl, al).unwrap();
            a.in_(ax, dx).unwrap();
            a.mov(cx, ax).unwrap();
            a.in_(eax, dx).unwrap();
            a.hlt().unwrap();
        });
        let mut guest = Guest::new(backend, mode, &code);
        let log = guest.run_to_halt();
        let out = |port, data: &[u8]| Access::Out(port, data.to_vec());
        assert_eq!(
            log,
            [
                out(0x80, &[0x11]),
                out(0x1234, &[0x11, 0x22]),
                out(0x1234, &[0x11, 0x22, 0x33, 0x44]),
                Access::In(0x42, 1),
                Access::In(0x1234, 2),
                Access::In(0x1234, 4),
            ],
            "{mode:?}"
        );
        let regs = guest.vcpu.regs().unwrap();
        assert_eq!((regs.rbx & 0xff, regs.rcx & 0xffff, regs.rax & 0xffff_ffff), (0, 0x0201, 0x0605_0403));
    }
}

/// REP OUTSB, OUTSW, OUTSD of 5 elements: 5 calls, each of the operand's size.
fn string_output_keeps_its_operand_size(backend: &dyn Backend) {
    for mode in Mode::ALL {
        for size in [1usize, 2, 4] {
            let code = assemble(mode, |a| {
                a.cld().unwrap();
                a.mov(esi, 0x7000).unwrap();
                a.mov(ecx, 5).unwrap();
                a.mov(dx, 0x3f8).unwrap();
                match size {
                    1 => a.rep().outsb().unwrap(),
                    2 => a.rep().outsw().unwrap(),
                    _ => a.rep().outsd().unwrap(),
                }
                a.hlt().unwrap();
            });
            let mut guest = Guest::new(backend, mode, &code);
            let data: Vec<u8> = (1..=20).collect();
            guest.store(0x7000, &data);
            let expected: Vec<_> =
                data.chunks_exact(size).take(5).map(|c| Access::Out(0x3f8, c.to_vec())).collect();
            assert_eq!(guest.run_to_halt(), expected, "{mode:?}, {size} bytes");
            let regs = guest.vcpu.regs().unwrap();
            assert_eq!((regs.rcx & 0xffff, regs.rsi & 0xffff), (0, 0x7000 + 5 * size as u64));
        }
    }
}

fn string_input_keeps_its_operand_size(backend: &dyn Backend) {
    for mode in Mode::ALL {
        for size in [1usize, 2, 4] {
            let code = assemble(mode, |a| {
                a.cld().unwrap();
                a.mov(edi, 0x7000).unwrap();
                a.mov(ecx, 5).unwrap();
                a.mov(dx, 0x1f0).unwrap();
                match size {
                    1 => a.rep().insb().unwrap(),
                    2 => a.rep().insw().unwrap(),
                    _ => a.rep().insd().unwrap(),
                }
                a.hlt().unwrap();
            });
            let mut guest = Guest::new(backend, mode, &code);
            assert_eq!(guest.run_to_halt(), vec![Access::In(0x1f0, size); 5], "{mode:?}, {size} bytes");
            let mut expected = [0; 20];
            for (byte, value) in expected.iter_mut().zip(0..5 * size) {
                *byte = u8::try_from(value).unwrap();
            }
            assert_eq!(guest.load::<20>(0x7000), expected, "{mode:?}, {size} bytes");
        }
    }
}

fn mmio_of_each_size(backend: &dyn Backend) {
    for mode in [Mode::Protected, Mode::Long] {
        let at = NO_MEMORY + 0x10;
        let code = assemble(mode, |a| {
            a.mov(edi, u32::try_from(at).unwrap()).unwrap();
            a.mov(eax, 0x4433_2211).unwrap();
            if mode == Mode::Long {
                a.mov(ptr(rdi), al).unwrap();
                a.mov(ptr(rdi), ax).unwrap();
                a.mov(ptr(rdi), eax).unwrap();
                a.mov(rax, 0x8877_6655_4433_2211u64).unwrap();
                a.mov(ptr(rdi), rax).unwrap();
                a.mov(bl, ptr(rdi)).unwrap();
                a.mov(cx, ptr(rdi)).unwrap();
                a.mov(edx, ptr(rdi)).unwrap();
                a.mov(rax, ptr(rdi)).unwrap();
            } else {
                a.mov(ptr(edi), al).unwrap();
                a.mov(ptr(edi), ax).unwrap();
                a.mov(ptr(edi), eax).unwrap();
                a.mov(bl, ptr(edi)).unwrap();
                a.mov(cx, ptr(edi)).unwrap();
                a.mov(edx, ptr(edi)).unwrap();
            }
            a.hlt().unwrap();
        });
        let mut guest = Guest::new(backend, mode, &code);
        let data = [0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88];
        let sizes: &[usize] = if mode == Mode::Long { &[1, 2, 4, 8] } else { &[1, 2, 4] };
        let writes = sizes.iter().map(|&n| Access::Write(at, data[..n].to_vec()));
        let expected: Vec<_> = writes.chain(sizes.iter().map(|&n| Access::Read(at, n))).collect();
        assert_eq!(guest.run_to_halt(), expected, "{mode:?}");
        let regs = guest.vcpu.regs().unwrap();
        assert_eq!((regs.rbx & 0xff, regs.rcx & 0xffff, regs.rdx), (0, 0x0201, 0x0605_0403));
        if mode == Mode::Long {
            assert_eq!(regs.rax, 0x0e0d_0c0b_0a09_0807);
        }
    }
}

/// A word across the end of memory: the part in memory is memory's, the rest is I/O. No access is
/// wider than 8 bytes, and all are finished before the run returns.
fn mmio_across_a_page_and_into_memory(backend: &dyn Backend) {
    let end = crate::guest::MEMORY;
    let code = assemble(Mode::Long, |a| {
        a.mov(rdi, end - 2).unwrap();
        a.mov(eax, 0x4433_2211).unwrap();
        a.mov(ptr(rdi), eax).unwrap();
        a.mov(rdi, NO_MEMORY + 0xffe).unwrap();
        a.mov(ptr(rdi), eax).unwrap();
        a.hlt().unwrap();
    });
    let mut guest = Guest::new(backend, Mode::Long, &code);
    let log = guest.run_to_halt();
    assert_eq!(guest.load(end - 2), [0x11, 0x22]);
    let mut bytes = vec![];
    for access in &log {
        let Access::Write(at, data) = access else { panic!("{access:?}") };
        assert!(data.len() <= 8);
        bytes.extend(data.iter().zip(*at..).map(|(&byte, at)| (at, byte)));
    }
    let expected: Vec<_> = [0x33, 0x44]
        .into_iter()
        .zip(end..)
        .chain([0x11, 0x22, 0x33, 0x44].into_iter().zip(NO_MEMORY + 0xffe..))
        .map(|(byte, at)| (at, byte))
        .collect();
    assert_eq!(bytes, expected);
}

/// An exception without an IDT is a double fault, then a triple fault.
fn a_triple_fault_ends_the_run(backend: &dyn Backend) {
    let code = assemble(Mode::Protected, |a| a.ud2().unwrap());
    let mut guest = Guest::new(backend, Mode::Protected, &code);
    let mut sregs = guest.vcpu.sregs().unwrap();
    sregs.idt.limit = 0;
    guest.vcpu.set_sregs(&sregs).unwrap();
    assert_eq!(guest.run(&mut Recorder::default()), VcpuExit::TripleFault);
    assert_eq!(guest.vcpu.stats().shutdown, 1);
}

fn statistics_count_accesses(backend: &dyn Backend) {
    let code = assemble(Mode::Protected, |a| {
        a.mov(esi, 0x7000).unwrap();
        a.mov(ecx, 7).unwrap();
        a.mov(edx, 0x80).unwrap();
        a.rep().outsb().unwrap();
        a.mov(edi, u32::try_from(NO_MEMORY).unwrap()).unwrap();
        a.mov(ptr(edi), al).unwrap();
        a.hlt().unwrap();
    });
    let mut guest = Guest::new(backend, Mode::Protected, &code);
    guest.run_to_halt();
    let stats = guest.vcpu.stats();
    assert_eq!((stats.port, stats.mmio, stats.halt, stats.interrupted), (7, 1, 1, 0), "{stats:?}");
    assert!(stats.exits >= 3, "{stats:?}");
}
