//! Alignment checks (SDM vol. 3A, 6.15, #AC). What is checked, and how, is what a processor of AMD's does.

use iced_x86::code_asm::*;
use vmcore::backend::Backend;

use crate::machine::*;

crate::system!(
    misaligned_accesses_fault_in_user_mode,
    alignment_is_checked_only_where_all_say_so,
    misalignment_comes_before_the_page,
    wide_and_special_accesses_have_their_own_alignment,
);

const AC: u64 = 1 << 18;

type Write = fn(&mut CodeAssembler);

/// The vector of the exception that `write` ends with at level `cpl`: #GP by HLT where it is none of its
/// own.
fn run(backend: &dyn Backend, cpl: u8, (mask, flag): (bool, bool), at: u64, write: Write) -> Frame {
    let mut machine = Machine::new(backend, Mode::Long, cpl, |a| {
        write(a);
        a.ud2().unwrap();
    });
    machine.edit_sregs(|s| s.cr0 |= if mask { 1 << 18 } else { 0 });
    machine.edit_regs(|r| {
        r.rflags |= if flag { AC } else { 0 };
        (r.rbx, r.rcx, r.rsi, r.rdi) = (at, 1, at, at + 64);
    });
    machine.run_to_fault()
}

fn misaligned_accesses_fault_in_user_mode(backend: &dyn Backend) {
    let cases: &[(&str, u64, Write)] = &[
        ("load", 4, |a| a.mov(eax, ptr(rbx)).unwrap()),
        ("store", 2, |a| a.mov(word_ptr(rbx), ax).unwrap()),
        ("change", 8, |a| a.add(qword_ptr(rbx), rax).unwrap()),
        ("locked", 4, |a| a.lock().add(dword_ptr(rbx), eax).unwrap()),
        ("string", 8, |a| a.rep().movsq().unwrap()),
        ("single", 4, |a| a.movss(xmm0, dword_ptr(rbx)).unwrap()),
        ("x87", 8, |a| a.fld(qword_ptr(rbx)).unwrap()),
        ("environment", 4, |a| a.fnstenv(ptr(rbx)).unwrap()),
    ];
    for (name, size, write) in cases {
        let machine = run(backend, 3, (true, true), DATA + size, *write);
        assert_eq!(machine.vector, 6, "{name}, aligned: {machine:x?}");
        for offset in [1, size / 2] {
            let frame = run(backend, 3, (true, true), DATA + offset, *write);
            assert_eq!((frame.vector, frame.code, frame.rip), (17, Some(0), CODE), "{name} at {offset}");
        }
    }
}

fn alignment_is_checked_only_where_all_say_so(backend: &dyn Backend) {
    let write: Write = |a| a.mov(eax, ptr(rbx)).unwrap();
    for (cpl, mask, flag, vector) in
        [(3, true, true, 17), (3, false, true, 6), (3, true, false, 6), (0, true, true, 6)]
    {
        assert_eq!(run(backend, cpl, (mask, flag), DATA + 1, write).vector, vector, "{cpl} {mask} {flag}");
    }
    // The flag that code sets itself counts from its next access on.
    let frame = run(backend, 3, (true, false), DATA + 1, |a| {
        a.mov(eax, ptr(rbx)).unwrap();
        a.pushfq().unwrap();
        a.or(dword_ptr(rsp), AC as i32).unwrap();
        a.popfq().unwrap();
        a.mov(eax, ptr(rbx)).unwrap();
    });
    assert_eq!(frame.vector, 17);
    assert!(frame.rip > CODE + 2);
}

fn misalignment_comes_before_the_page(backend: &dyn Backend) {
    let write: Write = |a| a.mov(eax, ptr(rbx)).unwrap();
    assert_eq!(run(backend, 3, (true, true), ABSENT_PAGE + 1, write).vector, 17);
    assert_eq!(run(backend, 3, (true, true), ABSENT_PAGE, write).vector, 14);
    assert_eq!(run(backend, 3, (true, true), ABSENT_PAGE - 2, write).vector, 17);
}

fn wide_and_special_accesses_have_their_own_alignment(backend: &dyn Backend) {
    let cases: &[(&str, u64, u64, Write)] = &[
        ("movups", 8, 17, |a| a.movups(xmm0, ptr(rbx)).unwrap()),
        ("movups store", 8, 17, |a| a.movups(ptr(rbx), xmm0).unwrap()),
        ("movaps", 8, 13, |a| a.movaps(xmm0, ptr(rbx)).unwrap()),
        ("movlps", 8, 6, |a| a.movlps(xmm0, ptr(rbx)).unwrap()),
        ("extended", 8, 6, |a| a.fld(tbyte_ptr(rbx)).unwrap()),
        ("extended", 4, 17, |a| a.fld(tbyte_ptr(rbx)).unwrap()),
        ("fnsave", 4, 6, |a| a.fnsave(ptr(rbx)).unwrap()),
        ("fnsave", 2, 17, |a| a.fnsave(ptr(rbx)).unwrap()),
        ("frstor", 4, 6, |a| a.frstor(ptr(rbx)).unwrap()),
        ("cmpxchg16b", 8, 13, |a| a.cmpxchg16b(xmmword_ptr(rbx)).unwrap()),
        ("clflush", 1, 6, |a| a.clflush(byte_ptr(rbx)).unwrap()),
        ("sidt", 1, 6, |a| a.sidt(tbyte_ptr(rbx)).unwrap()),
    ];
    for (name, offset, vector, write) in cases {
        let frame = run(backend, 3, (true, true), DATA + offset, *write);
        assert_eq!(frame.vector, *vector, "{name} at {offset}");
    }
}
