//! Code that changes, and translations that change: what a backend that keeps something made of
//! either must notice.

use std::thread;

use iced_x86::code_asm::*;
use vmcore::backend::{Backend, BackendConfig, VcpuExit};

use crate::guest::{CODE, Guest, Mode, OnOut, Recorder, STACK, assemble, assemble_at, sregs};

crate::contract!(
    a_store_into_the_next_instruction_counts_at_once,
    code_is_replaced_between_calls,
    code_that_the_host_replaces_is_new,
    code_that_another_vcpu_replaces_is_seen_in_the_end,
    an_instruction_may_lie_across_pages,
    a_page_moves_when_its_translation_is_invalidated,
    a_large_page_is_invalidated_whole,
    accessed_and_dirty_flags_are_set,
);

/// A page of code of its own.
const FUNCTION: u64 = 0x2_0000;
/// mov eax, imm32; ret
fn function(value: u32) -> Vec<u8> {
    [&[0xb8][..], &value.to_le_bytes(), &[0xc3]].concat()
}

fn a_store_into_the_next_instruction_counts_at_once(backend: &dyn Backend) {
    if std::env::var_os("VMCORE_RIG").is_some() {
        println!("skipped: the rig's emulated processors execute the old bytes once more");
        return;
    }
    for mode in [Mode::Protected, Mode::Long] {
        // The immediate of `mov al` is overwritten by the instruction before it.
        let mut code = assemble(mode, |a| {
            a.mov(ebx, 0u32).unwrap();
            if mode == Mode::Long {
                a.mov(byte_ptr(rbx), 0x77).unwrap();
            } else {
                a.mov(byte_ptr(ebx), 0x77).unwrap();
            }
            a.mov(al, 1).unwrap();
            a.out(0x80, al).unwrap();
            a.hlt().unwrap();
        });
        let at = code.windows(2).position(|w| w == [0xb0, 1]).unwrap() + 1;
        let target = u32::try_from(CODE + at as u64).unwrap();
        code[1..5].copy_from_slice(&target.to_le_bytes());
        let mut guest = Guest::new(backend, mode, &code);
        let mut seen = Vec::new();
        assert_eq!(guest.run(&mut OnOut(|_, data: &[u8]| seen.push(data[0]))), VcpuExit::Halted);
        assert_eq!(seen, [0x77], "{mode:?}");
    }
}

/// Calls [`FUNCTION`] `count` times, overwrites its immediate with the number of the call, and tells
/// what it returns.
fn code_is_replaced_between_calls(backend: &dyn Backend) {
    let code = assemble(Mode::Long, |a| {
        let mut again = a.create_label();
        a.xor(ebx, ebx).unwrap();
        a.set_label(&mut again).unwrap();
        a.call(FUNCTION).unwrap();
        a.out(0x80, eax).unwrap();
        a.inc(ebx).unwrap();
        a.mov(dword_ptr(FUNCTION + 1), ebx).unwrap();
        a.cmp(ebx, 200).unwrap();
        a.jb(again).unwrap();
        a.hlt().unwrap();
    });
    let mut guest = Guest::new(backend, Mode::Long, &code);
    guest.store(FUNCTION, &function(0));
    let mut seen = Vec::new();
    let mut record = OnOut(|_, data: &[u8]| seen.push(u32::from_le_bytes(data.try_into().unwrap())));
    assert_eq!(guest.run(&mut record), VcpuExit::Halted);
    assert_eq!(seen, (0..200).collect::<Vec<_>>());
}

fn code_that_the_host_replaces_is_new(backend: &dyn Backend) {
    let code = assemble(Mode::Long, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.call(FUNCTION).unwrap();
        a.out(0x80, eax).unwrap();
        a.jmp(again).unwrap();
    });
    let mut guest = Guest::new(backend, Mode::Long, &code);
    guest.store(FUNCTION, &function(0));
    let memory = guest.memory.clone();
    let kick = guest.vcpu.handle();
    let mut seen = Vec::new();
    let mut record = OnOut(|_, data: &[u8]| {
        seen.push(u32::from_le_bytes(data.try_into().unwrap()));
        let count = u32::try_from(seen.len()).unwrap();
        memory.write(vmcore::GuestAddress(FUNCTION + 1), &count.to_le_bytes()).unwrap();
        if count == 50 {
            kick.kick();
        }
    });
    assert_eq!(guest.run(&mut record), VcpuExit::Kicked);
    assert_eq!(seen, (0..50).collect::<Vec<_>>());
}

fn code_that_another_vcpu_replaces_is_seen_in_the_end(backend: &dyn Backend) {
    let code = assemble(Mode::Long, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.call(FUNCTION).unwrap();
        // A serializing instruction, as the manual asks of cross-modified code.
        a.mov(ecx, eax).unwrap();
        a.xor(eax, eax).unwrap();
        a.cpuid().unwrap();
        a.call(FUNCTION).unwrap();
        a.test(eax, eax).unwrap();
        a.je(again).unwrap();
        a.out(0x80, eax).unwrap();
        a.hlt().unwrap();
    });
    let mut guest = Guest::new(backend, Mode::Long, &code);
    guest.store(FUNCTION, &function(0));
    let writer = assemble_at(Mode::Long, 0x3_0000, |a| {
        a.mov(ecx, 20_000).unwrap();
        let mut wait = a.create_label();
        a.set_label(&mut wait).unwrap();
        a.dec(ecx).unwrap();
        a.jne(wait).unwrap();
        a.mov(dword_ptr(FUNCTION + 1), 77u32).unwrap();
        a.hlt().unwrap();
    });
    guest.store(0x3_0000, &writer);
    let mut second = guest.vm.create_vcpu(1).unwrap();
    second.set_cpuid(&crate::guest::cpuid(backend)).unwrap();
    second.set_sregs(&sregs(Mode::Long, &second.sregs().unwrap())).unwrap();
    let mut regs = second.regs().unwrap();
    (regs.rip, regs.rsp, regs.rflags) = (0x3_0000, STACK - 0x800, 2);
    second.set_regs(&regs).unwrap();
    thread::scope(|scope| {
        scope.spawn(move || assert_eq!(second.run(&mut Recorder::default()).unwrap(), VcpuExit::Halted));
        let mut seen = Vec::new();
        let mut record = OnOut(|_, data: &[u8]| seen.push(data.to_vec()));
        assert_eq!(guest.run(&mut record), VcpuExit::Halted);
        assert_eq!(seen, [77u32.to_le_bytes().to_vec()]);
    });
}

fn an_instruction_may_lie_across_pages(backend: &dyn Backend) {
    // Every split of `mov eax, 0x12345678; ret`.
    for before in 1..=5u64 {
        let at = FUNCTION + 0x1000 - before;
        let code = assemble(Mode::Long, |a| {
            for _ in 0..3 {
                a.call(at).unwrap();
                a.out(0x80, eax).unwrap();
                a.inc(byte_ptr(at + 4)).unwrap();
            }
            a.hlt().unwrap();
        });
        let mut guest = Guest::new(backend, Mode::Long, &code);
        guest.store(at, &function(0x1234_5678));
        let mut seen = Vec::new();
        let mut record = OnOut(|_, data: &[u8]| seen.push(u32::from_le_bytes(data.try_into().unwrap())));
        assert_eq!(guest.run(&mut record), VcpuExit::Halted);
        assert_eq!(seen, [0x1234_5678, 0x1334_5678, 0x1434_5678], "{before} bytes in the first page");
    }
}

/// Page tables of the guests' own: a table of 4 KiB pages for the 2 MiB at 4 MiB.
const TABLE: u64 = 0x28_0000;
const WINDOW: u64 = 0x40_0000;
/// The page-directory entry of [`WINDOW`], by what `guest::write_tables` writes.
const WINDOW_ENTRY: u64 = 0x30_2000 + 8 * (WINDOW >> 21);

fn a_page_moves_when_its_translation_is_invalidated(backend: &dyn Backend) {
    let code = assemble(Mode::Long, |a| {
        a.mov(eax, dword_ptr(WINDOW)).unwrap();
        a.out(0x80, eax).unwrap();
        a.call(WINDOW + 0x100).unwrap();
        a.out(0x80, eax).unwrap();
        a.mov(dword_ptr(TABLE), 0x5_1003u32).unwrap();
        a.invlpg(ptr(WINDOW)).unwrap();
        a.mov(eax, dword_ptr(WINDOW)).unwrap();
        a.out(0x80, eax).unwrap();
        a.call(WINDOW + 0x100).unwrap();
        a.out(0x80, eax).unwrap();
        // The same by loading CR3.
        a.mov(dword_ptr(TABLE), 0x5_0003u32).unwrap();
        a.mov(rax, cr3).unwrap();
        a.mov(cr3, rax).unwrap();
        a.call(WINDOW + 0x100).unwrap();
        a.out(0x80, eax).unwrap();
        a.hlt().unwrap();
    });
    let mut guest = Guest::new(backend, Mode::Long, &code);
    guest.store(TABLE, &0x5_0003u64.to_le_bytes());
    guest.store(WINDOW_ENTRY, &(TABLE | 3).to_le_bytes());
    for (page, value) in [(0x5_0000, 1u32), (0x5_1000, 2)] {
        guest.store(page, &value.to_le_bytes());
        guest.store(page + 0x100, &function(value + 10));
    }
    let mut seen = Vec::new();
    let mut record = OnOut(|_, data: &[u8]| seen.push(u32::from_le_bytes(data.try_into().unwrap())));
    assert_eq!(guest.run(&mut record), VcpuExit::Halted);
    assert_eq!(seen, [1, 11, 2, 12, 11]);
}

fn a_large_page_is_invalidated_whole(backend: &dyn Backend) {
    let offsets = [0u64, 0x1000, 0x12_3000, 0x1f_f000];
    let code = assemble(Mode::Long, |a| {
        for _ in 0..2 {
            for offset in offsets {
                a.mov(eax, dword_ptr(WINDOW + offset)).unwrap();
                a.out(0x80, eax).unwrap();
            }
            // The second large page of memory instead of the first.
            a.mov(dword_ptr(WINDOW_ENTRY), 0x20_0083u32).unwrap();
            // Any address in the page will do (SDM vol. 3A, 4.10.4.1).
            a.invlpg(ptr(WINDOW + 0x7000)).unwrap();
        }
        a.hlt().unwrap();
    });
    let mut guest = Guest::new(backend, Mode::Long, &code);
    guest.store(WINDOW_ENTRY, &0x83u64.to_le_bytes());
    let expected = |large: u64| offsets.map(|offset| guest.load::<4>(large + offset));
    guest.store(0x20_1000, b"abcd");
    guest.store(0x20_0000, b"efgh");
    let expected = [expected(0), expected(0x20_0000)].concat();
    let mut seen = Vec::new();
    let mut record = OnOut(|_, data: &[u8]| seen.push(<[u8; 4]>::try_from(data).unwrap()));
    assert_eq!(guest.run(&mut record), VcpuExit::Halted);
    assert_eq!(seen, expected);
}

fn accessed_and_dirty_flags_are_set(backend: &dyn Backend) {
    const ACCESSED: u8 = 1 << 5;
    const DIRTY: u8 = 1 << 6;
    let code = assemble(Mode::Long, |a| {
        a.mov(eax, dword_ptr(WINDOW)).unwrap();
        a.mov(dword_ptr(WINDOW + 0x1000), eax).unwrap();
        a.mov(eax, dword_ptr(WINDOW + 0x2000)).unwrap();
        a.mov(dword_ptr(WINDOW + 0x2000), eax).unwrap();
        a.hlt().unwrap();
    });
    let region = std::sync::Arc::new(
        vmcore::MemoryRegion::anonymous(vmcore::GuestAddress(0), crate::guest::MEMORY).unwrap(),
    );
    let config = BackendConfig::default();
    let mut guest = Guest::with_memory(backend, Mode::Long, &code, config, region);
    for page in 0..4u64 {
        guest.store(TABLE + 8 * page, &((0x5_0000 + 0x1000 * page) | 3).to_le_bytes());
    }
    guest.store(WINDOW_ENTRY, &(TABLE | 3).to_le_bytes());
    guest.run_to_halt();
    let flags = |page: u64| guest.load::<1>(TABLE + 8 * page)[0] & (ACCESSED | DIRTY);
    assert_eq!([0, 1, 2, 3].map(flags), [ACCESSED, ACCESSED | DIRTY, ACCESSED | DIRTY, 0]);
    assert_eq!(guest.load::<1>(WINDOW_ENTRY)[0] & ACCESSED, ACCESSED);
}
