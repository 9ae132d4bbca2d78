//! What the comparison with the host's instructions leaves out: areas and environments in memory,
//! faults half-way, and who may use the registers.

use iced_x86::code_asm::*;

use super::oracle::{Guest, Host, Random, State, difference, execute_at, state};
use crate::soft::cpu::op::Stop;
use crate::soft::cpu::{CS, Cpu, RAX, RBX, RCX, RDX, cr0, cr4, vector};
use crate::state::Segment;

const DATA: u64 = super::oracle::DATA;

fn assemble(bits: u32, write: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) -> Vec<u8> {
    let mut code = CodeAssembler::new(bits).unwrap();
    write(&mut code).unwrap();
    code.assemble(0).unwrap()
}

/// Random state with RBX at the middle of the memory, aligned for areas.
fn area_state(random: &mut Random, strict: bool) -> State {
    let mut before = state(random, strict);
    before.gpr[RBX] = DATA + 0x800;
    before
}

const AREA: usize = 0x800;

#[test]
fn fxsave_writes_what_the_host_writes() {
    let host = Host::new();
    let mut guest = Guest::new();
    let mut random = Random(11);
    for code in [assemble(64, |a| a.fxsave64(ptr(rbx))), assemble(64, |a| a.fxsave(ptr(rbx)))] {
        for _ in 0..50 {
            let before = area_state(&mut random, true);
            let (mut by_host, by_guest) = (host.run(&code, &before), guest.run(&code, &before));
            // Opcode and pointers, MXCSR_MASK (the host may have more bits), the reserved end.
            for part in [6..24, 28..32, 416..512] {
                let part = AREA + part.start..AREA + part.end;
                by_host.memory[part.clone()].copy_from_slice(&by_guest.memory[part]);
            }
            assert_eq!(difference(&before, &by_host, &by_guest, 0), "");
            assert_eq!(by_guest.memory[AREA + 416..AREA + 512], before.memory[AREA + 416..AREA + 512]);
            assert_eq!(by_guest.memory[AREA + 28..AREA + 32], [0xff, 0xff, 0, 0]);
        }
    }
}

#[test]
fn fxrstor_reads_what_the_host_reads() {
    let host = Host::new();
    let mut guest = Guest::new();
    let mut random = Random(12);
    let code = assemble(64, |a| a.fxrstor64(ptr(rbx)));
    for n in 0..200 {
        let mut before = area_state(&mut random, false);
        for byte in &mut before.memory[AREA..AREA + 512] {
            *byte = random.byte();
        }
        if n % 4 != 0 {
            before.memory[AREA + 26..AREA + 28].fill(0);
        } else {
            // A bit that no MXCSR has.
            before.memory[AREA + 27] |= 0x80;
        }
        let (by_host, by_guest) = (host.run(&code, &before), guest.run(&code, &before));
        assert_eq!(by_guest.fault.is_some(), n % 4 == 0);
        assert_eq!(difference(&before, &by_host, &by_guest, 0), "");
    }
}

#[test]
fn xsave_and_xrstor_are_the_hosts() {
    if !is_x86_feature_detected!("xsave") {
        return;
    }
    let host = Host::new();
    let mut guest = Guest::new();
    let mut random = Random(13);
    let save = [assemble(64, |a| a.xsave64(ptr(rbx))), assemble(64, |a| a.xsave(ptr(rbx)))];
    let restore = [assemble(64, |a| a.xrstor64(ptr(rbx))), assemble(64, |a| a.xrstor(ptr(rbx)))];
    for n in 0..400 {
        let mut before = area_state(&mut random, false);
        before.gpr[RAX] = random.next() & 0xffff_ffff_0000_0003;
        before.gpr[RDX] = 0;
        let code = if n % 2 == 0 {
            &save[n / 2 % 2]
        } else {
            for byte in &mut before.memory[AREA..AREA + 512] {
                *byte = random.byte();
            }
            before.memory[AREA + 26..AREA + 28].fill(0);
            before.memory[AREA + 512..AREA + 576].fill(0);
            before.memory[AREA + 512] = random.byte() & 3;
            match n % 20 {
                1 => before.memory[AREA + 512 + 8 + (random.next() % 16) as usize] = 1,
                3 => before.memory[AREA + 512 + 7] = 0x10,
                5 => before.memory[AREA + 27] = 0x80,
                7 => before.gpr[RBX] += 16,
                _ => {}
            }
            &restore[n / 2 % 2]
        };
        let (mut by_host, by_guest) = (host.run(code, &before), guest.run(code, &before));
        if n % 2 == 0 {
            for part in [6..24, 28..32] {
                let part = AREA + part.start..AREA + part.end;
                by_host.memory[part.clone()].copy_from_slice(&by_guest.memory[part]);
            }
        }
        assert_eq!(difference(&before, &by_host, &by_guest, 0), "", "case {n}");
    }
}

#[test]
fn environments_are_the_hosts() {
    let host = Host::new();
    let mut guest = Guest::new();
    let mut random = Random(14);
    let all: [(Vec<u8>, usize); 8] = [
        (assemble(64, |a| a.fnstenv(ptr(rbx))), 4),
        (assemble(64, |a| a.fnsave(ptr(rbx))), 4),
        (vec![0x66, 0xd9, 0x33], 2),
        (vec![0x66, 0xdd, 0x33], 2),
        (assemble(64, |a| a.fldenv(ptr(rbx))), 0),
        (assemble(64, |a| a.frstor(ptr(rbx))), 0),
        (vec![0x66, 0xd9, 0x23], 0),
        (vec![0x66, 0xdd, 0x23], 0),
    ];
    for (code, width) in all {
        for _ in 0..100 {
            let before = area_state(&mut random, true);
            let (mut by_host, by_guest) = (host.run(&code, &before), guest.run(&code, &before));
            if width != 0 {
                // The pointers are those of the host's last instruction.
                let part = AREA + 3 * width..AREA + 7 * width;
                by_host.memory[part.clone()].copy_from_slice(&by_guest.memory[part]);
            }
            assert_eq!(difference(&before, &by_host, &by_guest, 0), "", "{code:02x?}");
        }
    }
}

#[test]
fn the_environment_tells_of_the_last_instruction() {
    let mut guest = Guest::new();
    let mut before = state(&mut Random(15), false);
    before.put(2, &[0, 0]);
    before.gpr[RBX] = DATA + 0x100;
    guest.load(&before);
    // fld qword [rbx + 8], twice over with registers after it
    let code = assemble(64, |a| a.fld(qword_ptr(rbx + 8)));
    assert_eq!(guest.execute(&code), None);
    let here = super::oracle::HERE;
    assert_eq!((guest.cpu.fp.fip, guest.cpu.fp.fdp, guest.cpu.fp.fop), (here, DATA + 0x108, 0x543));
    assert_eq!(guest.execute(&assemble(64, |a| a.fxch(st0, st3))), None);
    assert_eq!((guest.cpu.fp.fdp, guest.cpu.fp.fop), (DATA + 0x108, 0x1cb));
    assert_eq!(guest.execute(&assemble(64, |a| a.fnstenv(ptr(rbx)))), None);
    let mut word = |at: usize| u32::from_le_bytes(guest.memory()[at..at + 4].try_into().unwrap());
    let (fip, fdp) = (word(0x100 + 12), word(0x100 + 20));
    assert_eq!((u64::from(fip), u64::from(fdp)), (here, DATA + 0x108));
}

#[test]
fn real_mode_environments_have_linear_addresses() {
    let mut guest = Guest::new();
    let cpu = &mut guest.cpu;
    (cpu.cr0, cpu.efer) = (cr0::NE, 0);
    // The memory begins at DATA: real mode reaches it by a segment base that a mode switch has left.
    for n in 0..6 {
        let base = if n == CS { 0x1_2340 } else { DATA };
        cpu.set_segment(n, Segment { base, selector: 0x1234, ..Segment::real_mode(0, n == CS) });
    }
    cpu.paging_changed();
    cpu.fp.init_x87();
    let run = |cpu: &mut Cpu, bytes: &[u8]| {
        assert_eq!(execute_at(cpu, 0x100, bytes), Stop::Next, "{bytes:02x?}");
    };
    cpu.set_r64(RBX, 0x200);
    run(cpu, &[0xdd, 0x07]); // fld qword [bx]
    run(cpu, &[0xd9, 0x37]); // fnstenv [bx], 14 bytes
    let word =
        |guest: &mut Guest, at: usize| u16::from_le_bytes(guest.memory()[at..at + 2].try_into().unwrap());
    let words: Vec<u16> = (0..7).map(|n| word(&mut guest, 0x200 + 2 * n)).collect();
    assert_eq!(
        words[0..3],
        [0x37f, 7 << 11, 0x3fff | if words[2] >> 14 == 1 { 1 << 14 } else { words[2] & 0xc000 }]
    );
    // 0x1234:0x100 is 0x12440; 0x1234:0x200 is 0x12540.
    assert_eq!(words[3..7], [0x2440, 1 << 12 | 0x507, 0x2540, 1 << 12]);
    run(&mut guest.cpu, &[0xd9, 0x27]); // fldenv [bx]
    assert_eq!((guest.cpu.fp.fip, guest.cpu.fp.fdp, guest.cpu.fp.fop), (0x1_2440, 0x1_2540, 0x507));
}

#[test]
fn thirty_two_bit_code_has_eight_registers() {
    let mut guest = Guest::new();
    let mut random = Random(16);
    let before = area_state(&mut random, false);
    guest.load(&before);
    let code = Segment { kind: 11, long: false, big: true, ..*guest.cpu.segment(CS) };
    guest.cpu.efer = 0;
    guest.cpu.set_segment(CS, code);
    guest.cpu.paging_changed();
    let run = |cpu: &mut Cpu, bytes: &[u8]| {
        assert_eq!(execute_at(cpu, 0x100, bytes), Stop::Next, "{bytes:02x?}");
    };
    run(&mut guest.cpu, &assemble(32, |a| a.fxsave(ptr(ebx))));
    assert_eq!(guest.memory()[AREA + 160..AREA + 288], before.fx[160..288]);
    assert_eq!(guest.memory()[AREA + 288..AREA + 512], before.memory[AREA + 288..AREA + 512]);
    guest.memory()[AREA + 160..AREA + 416].fill(0x55);
    run(&mut guest.cpu, &assemble(32, |a| a.fxrstor(ptr(ebx))));
    assert_eq!(guest.cpu.fp.bytes()[160..288], [0x55; 128]);
    assert_eq!(guest.cpu.fp.bytes()[288..416], before.fx[288..416]);
}

#[test]
fn what_faults_half_way_has_done_nothing() {
    let page_end = super::oracle::PAGE + 0x1000;
    let cases: Vec<(&str, Vec<u8>, u64)> = vec![
        ("movups store", assemble(64, |a| a.movups(ptr(rbx), xmm1)), 8),
        ("movups load", assemble(64, |a| a.movups(xmm1, ptr(rbx))), 8),
        ("movdqu load", assemble(64, |a| a.movdqu(xmm1, ptr(rbx))), 1),
        ("movhps store", assemble(64, |a| a.movhps(ptr(rbx), xmm1)), 4),
        ("movq mm store", assemble(64, |a| a.movq(ptr(rbx), mm1)), 4),
        ("movq mm load", assemble(64, |a| a.movq(mm1, ptr(rbx))), 4),
        ("paddb mm", assemble(64, |a| a.paddb(mm1, ptr(rbx))), 4),
        ("pcmpistri", assemble(64, |a| a.pcmpistri(xmm1, ptr(rbx), 12)), 8),
        ("cvtsi2sd", assemble(64, |a| a.cvtsi2sd(xmm1, qword_ptr(rbx))), 4),
        ("addsd", assemble(64, |a| a.addsd(xmm1, ptr(rbx))), 4),
        ("stmxcsr", assemble(64, |a| a.stmxcsr(ptr(rbx))), 2),
        ("fstp m80", assemble(64, |a| a.fstp(tbyte_ptr(rbx))), 8),
        ("fstp m64", assemble(64, |a| a.fstp(qword_ptr(rbx))), 4),
        ("fistp m64", assemble(64, |a| a.fistp(qword_ptr(rbx))), 4),
        ("fbstp", assemble(64, |a| a.fbstp(ptr(rbx))), 4),
        ("fld m80", assemble(64, |a| a.fld(tbyte_ptr(rbx))), 8),
        ("fadd m64", assemble(64, |a| a.fadd(qword_ptr(rbx))), 4),
        ("fnstenv", assemble(64, |a| a.fnstenv(ptr(rbx))), 16),
        ("fldenv", assemble(64, |a| a.fldenv(ptr(rbx))), 16),
        ("fnsave", assemble(64, |a| a.fnsave(ptr(rbx))), 100),
        ("frstor", assemble(64, |a| a.frstor(ptr(rbx))), 100),
        ("fxsave", assemble(64, |a| a.fxsave64(ptr(rbx))), 16),
        ("fxrstor", assemble(64, |a| a.fxrstor64(ptr(rbx))), 16),
        ("xsave", assemble(64, |a| a.xsave64(ptr(rbx))), 64),
        ("xrstor", assemble(64, |a| a.xrstor64(ptr(rbx))), 64),
        ("maskmovdqu", assemble(64, |a| a.maskmovdqu(xmm1, xmm2)), 8),
    ];
    let mut guest = Guest::with_one_page();
    for (name, code, before_end) in cases {
        let mut before = state(&mut Random(17), false);
        before.put(2, &[0, 0x10]);
        before.put(160 + 32, &[0xff; 16]);
        before.gpr[RBX] = page_end - before_end;
        before.gpr[7] = page_end - before_end;
        before.gpr[RAX] = 3;
        before.gpr[RDX] = 0;
        let after = guest.run(&code, &before);
        assert_eq!(after.fault, Some(vector::PF), "{name}");
        assert_eq!(guest.cpu.fault.payload, page_end, "{name}");
        let mut expected = before.clone();
        expected.fault = after.fault;
        assert_eq!(difference(&before, &expected, &after, 0), "", "{name}");
    }
}

#[test]
fn who_may_use_the_registers() {
    let sse = assemble(64, |a| a.addps(xmm0, xmm1));
    let moved = assemble(64, |a| a.movaps(xmm0, xmm1));
    let logic = assemble(64, |a| a.pxor(xmm0, xmm1));
    let control = assemble(64, |a| a.ldmxcsr(ptr(rbx)));
    let mmx = assemble(64, |a| a.paddb(mm0, mm1));
    let emms = assemble(64, |a| a.emms());
    let x87 = assemble(64, |a| a.fadd_2(st0, st1));
    let quiet = assemble(64, |a| a.fnstsw(ax));
    let fxsave = assemble(64, |a| a.fxsave64(ptr(rbx)));
    let xsave = assemble(64, |a| a.xsave64(ptr(rbx)));
    let wait = assemble(64, |a| a.wait());
    let crc = assemble(64, |a| a.crc32(eax, ecx));
    let base = cr0::PE | cr0::NE;
    let on = cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
    let (ud, nm) = (Some(vector::UD), Some(vector::NM));
    let table = [
        (&sse, [None, nm, ud, None, ud, None]),
        (&moved, [None, nm, ud, None, ud, None]),
        (&logic, [None, nm, ud, None, ud, None]),
        (&control, [None, nm, ud, None, ud, None]),
        (&mmx, [None, nm, ud, None, None, None]),
        (&emms, [None, nm, ud, None, None, None]),
        (&x87, [None, nm, nm, None, None, None]),
        (&quiet, [None, nm, nm, None, None, None]),
        (&fxsave, [None, nm, nm, None, None, None]),
        (&xsave, [None, nm, None, None, None, ud]),
        (&wait, [None, None, None, nm, None, None]),
        (&crc, [None, None, None, None, None, None]),
    ];
    let states = [
        (base, on),
        (base | cr0::TS, on),
        (base | cr0::EM, on),
        (base | cr0::TS | cr0::MP, on),
        (base, on & !cr4::OSFXSR),
        (base, on & !cr4::OSXSAVE),
    ];
    let mut guest = Guest::new();
    let mut before = state(&mut Random(18), false);
    before.gpr[RBX] = DATA + 0x800;
    before.memory[0x800..0x804].copy_from_slice(&[0x80, 0x1f, 0, 0]);
    for (code, expected) in table {
        for ((c0, c4), expected) in states.into_iter().zip(expected) {
            // With TS and MP everything that is refused with TS is, too.
            let expected =
                if c0 & cr0::MP != 0 && expected.is_none() && *code != crc { nm } else { expected };
            guest.load(&before);
            (guest.cpu.cr0, guest.cpu.cr4) = (c0, c4);
            assert_eq!(guest.execute(code), expected, "{code:02x?} cr0 {c0:#x} cr4 {c4:#x}");
        }
    }
}

#[test]
fn unmasked_sse_exceptions_without_the_operating_systems_consent_are_undefined() {
    let mut guest = Guest::new();
    let mut before = state(&mut Random(19), false);
    before.put(24, &0x1d80u32.to_le_bytes());
    before.put(160, &1f64.to_le_bytes());
    before.put(176, &0f64.to_le_bytes());
    let code = assemble(64, |a| a.divsd(xmm0, xmm1));
    let after = guest.run(&code, &before);
    assert_eq!(after.fault, Some(vector::XM));
    assert_eq!(after.fx[160..176], before.fx[160..176]);
    // Division by zero.
    assert_eq!(after.fx[24..28], 0x1d84u32.to_le_bytes());
    guest.load(&before);
    guest.cpu.cr4 &= !cr4::OSXMMEXCPT;
    assert_eq!(guest.execute(&code), Some(vector::UD));
}

#[test]
fn xcr0_takes_only_what_there_is() {
    let mut guest = Guest::new();
    guest.load(&state(&mut Random(20), false));
    let (get, set) = (assemble(64, |a| a.xgetbv()), assemble(64, |a| a.xsetbv()));
    let write = |guest: &mut Guest, register: u64, value: u64| {
        guest.cpu.set_r64(RCX, register);
        guest.cpu.set_r64(RAX, value & 0xffff_ffff);
        guest.cpu.set_r64(RDX, value >> 32);
        guest.execute(&set)
    };
    let gp = Some(vector::GP);
    assert_eq!(write(&mut guest, 0, 1), None);
    assert_eq!(guest.cpu.xcr0, 1);
    for (register, value) in [(0, 0), (0, 2), (0, 7), (0, 1 << 63 | 1), (1, 3)] {
        assert_eq!(write(&mut guest, register, value), gp, "{register} {value:#x}");
    }
    assert_eq!(write(&mut guest, 0, 3), None);
    guest.cpu.set_r64(RCX, 0);
    assert_eq!(guest.execute(&get), None);
    assert_eq!((guest.cpu.r64(RAX), guest.cpu.r64(RDX)), (3, 0));
    guest.cpu.set_r64(RCX, 1);
    assert_eq!(guest.execute(&get), gp);
    guest.cpu.cr4 &= !cr4::OSXSAVE;
    guest.cpu.set_r64(RCX, 0);
    assert_eq!(guest.execute(&get), Some(vector::UD));
}
