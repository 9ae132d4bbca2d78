//! Control registers, MSRs and CPUID.

use iced_x86::code_asm::*;
use vmcore::backend::Backend;

use crate::machine::*;

crate::system!(
    combinations_that_are_refused,
    smsw_and_lmsw,
    table_registers_come_back,
    cpuid_tells_the_state,
    the_time_stamp_goes_on,
    random_numbers_differ,
    translations_are_kept_until_flushed,
    process_contexts_keep_their_translations,
);

type Write = fn(&mut CodeAssembler);

fn combinations_that_are_refused(backend: &dyn Backend) {
    let cases: &[(&str, Write)] = &[
        ("PG without PE", |a| {
            a.mov(eax, 0x8000_0010u32).unwrap();
            a.mov(cr0, rax).unwrap();
        }),
        ("NW without CD", |a| {
            a.mov(rax, cr0).unwrap();
            a.bts(rax, 29).unwrap();
            a.mov(cr0, rax).unwrap();
        }),
        ("CR0's upper half", |a| {
            a.mov(rax, cr0).unwrap();
            a.bts(rax, 40).unwrap();
            a.mov(cr0, rax).unwrap();
        }),
        ("CR3's address", |a| {
            a.mov(rax, cr3).unwrap();
            a.bts(rax, 60).unwrap();
            a.mov(cr3, rax).unwrap();
        }),
        ("CR8 of 16", |a| {
            a.mov(eax, 16).unwrap();
            a.mov(cr8, rax).unwrap();
        }),
        ("EFER's reserved bits", |a| {
            a.mov(ecx, 0xc000_0080u32).unwrap();
            a.rdmsr().unwrap();
            a.bts(eax, 2).unwrap();
            a.wrmsr().unwrap();
        }),
        ("PAT of type 2", |a| {
            a.mov(ecx, 0x277).unwrap();
            a.mov(eax, 2).unwrap();
            a.wrmsr().unwrap();
        }),
        ("DR7's upper half", |a| {
            a.mov(rax, 0x1_0000_0400u64).unwrap();
            a.mov(dr7, rax).unwrap();
        }),
        ("LSTAR not canonical", |a| {
            a.mov(ecx, 0xc000_0082u32).unwrap();
            a.mov(edx, 0x8000_0000u32).unwrap();
            a.wrmsr().unwrap();
        }),
    ];
    for (name, write) in cases {
        let mut machine = Machine::new(backend, Mode::Long, 0, write);
        let before = machine.vcpu.sregs().unwrap();
        let frame = machine.run_to_fault();
        assert_eq!((frame.vector, frame.code), (13, Some(0)), "{name}");
        let after = machine.vcpu.sregs().unwrap();
        assert_eq!((after.cr0, after.cr3, after.cr4), (before.cr0, before.cr3, before.cr4), "{name}");
    }
}

fn smsw_and_lmsw(backend: &dyn Backend) {
    let mut machine = Machine::new(backend, Mode::Long, 0, |a| {
        a.smsw(ebx).unwrap();
        a.mov(eax, 0xe).unwrap();
        a.lmsw(eax).unwrap();
        a.smsw(ecx).unwrap();
        a.clts().unwrap();
        a.mov(rdx, cr0).unwrap();
        a.mov(word_ptr(DATA), 0).unwrap();
        a.lmsw(ptr(DATA)).unwrap();
        a.smsw(ptr(DATA)).unwrap();
        a.hlt().unwrap();
    });
    machine.run();
    let r = machine.regs();
    // LMSW cannot clear PE.
    assert_eq!((r.rbx & 0x3f, r.rcx & 0x3f, r.rdx & 0x3f), (0x31, 0x3f, 0x37));
    assert_eq!(machine.load(DATA) & 0xffff, 0x31);
}

fn table_registers_come_back(backend: &dyn Backend) {
    let mut machine = Machine::new(backend, Mode::Long, 0, |a| {
        a.sgdt(ptr(DATA)).unwrap();
        a.sidt(ptr(DATA + 16)).unwrap();
        a.mov(word_ptr(DATA + 32), 0x1234).unwrap();
        a.mov(rax, 0xffff_8000_1234_5678u64).unwrap();
        a.mov(ptr(DATA + 34), rax).unwrap();
        a.lidt(ptr(DATA + 32)).unwrap();
        a.sidt(ptr(DATA + 48)).unwrap();
        a.str(ecx).unwrap();
        a.sldt(edx).unwrap();
        a.hlt().unwrap();
    });
    machine.run();
    assert_eq!((machine.load(DATA) & 0xffff, machine.load(DATA + 2)), (GDT_LIMIT.into(), GDT));
    assert_eq!((machine.load(DATA + 16) & 0xffff, machine.load(DATA + 18)), (0xfff, IDT));
    assert_eq!((machine.load(DATA + 48) & 0xffff, machine.load(DATA + 50)), (0x1234, 0xffff_8000_1234_5678));
    assert_eq!((machine.regs().rcx, machine.regs().rdx), (TASK.into(), 0));
    // A local table, and a segment in it.
    let mut machine = Machine::new(backend, Mode::Protected, 0, |a| {
        a.mov(eax, u32::from(SPARE)).unwrap();
        a.lldt(eax).unwrap();
        a.mov(eax, 0xc).unwrap();
        a.mov(fs, eax).unwrap();
        a.mov(eax, dword_ptr(4).fs()).unwrap();
        a.sldt(ebx).unwrap();
        a.hlt().unwrap();
    });
    // At DATA, two descriptors; the second one's base is GOOD_PAGE.
    machine.set_descriptor(SPARE, 0x0000_8200_0000_000f | DATA << 16);
    machine.store(DATA + 8, 0x0040_9200_0000_0fff | (GOOD_PAGE & 0xff_ffff) << 16);
    machine.store(GOOD_PAGE + 4, 0x5566_7788);
    machine.run();
    assert_eq!((machine.regs().rax, machine.regs().rbx), (0x5566_7788, SPARE.into()));
    // The descriptor has been marked accessed.
    assert_eq!(machine.load(DATA + 8) >> 40 & 0xff, 0x93);
}

fn cpuid_tells_the_state(backend: &dyn Backend) {
    let mut machine = Machine::new(backend, Mode::Long, 0, |a| {
        a.mov(eax, 1).unwrap();
        a.cpuid().unwrap();
        a.mov(ptr(DATA), ecx).unwrap();
        a.mov(rax, cr4).unwrap();
        a.bts(rax, 18).unwrap();
        a.mov(cr4, rax).unwrap();
        a.mov(eax, 1).unwrap();
        a.cpuid().unwrap();
        a.mov(ptr(DATA + 4), ecx).unwrap();
        a.mov(eax, 0).unwrap();
        a.cpuid().unwrap();
        a.mov(ptr(DATA + 8), ebx).unwrap();
        a.mov(ptr(DATA + 12), eax).unwrap();
        a.hlt().unwrap();
    });
    let cpuid = machine.vcpu.save().unwrap().cpuid;
    if cpuid.get(1, 0).unwrap().ecx & 1 << 26 == 0 {
        println!("skipped: no XSAVE");
        return;
    }
    machine.run();
    assert_eq!(machine.load(DATA) >> 27 & 1, 0);
    assert_eq!(machine.load(DATA + 4) >> 27 & 1, 1);
    let leaf = cpuid.get(0, 0).unwrap();
    assert_eq!((machine.load32(DATA + 8), machine.load32(DATA + 12)), (leaf.ebx.into(), leaf.eax.into()));
}

fn the_time_stamp_goes_on(backend: &dyn Backend) {
    let mut machine = Machine::new(backend, Mode::Long, 0, |a| {
        a.mov(ecx, 0xc000_0103u32).unwrap();
        a.mov(eax, 77).unwrap();
        a.xor(edx, edx).unwrap();
        a.wrmsr().unwrap();
        a.rdtsc().unwrap();
        a.mov(ptr(DATA), eax).unwrap();
        a.mov(ptr(DATA + 4), edx).unwrap();
        a.rdtscp().unwrap();
        a.mov(ptr(DATA + 8), eax).unwrap();
        a.mov(ptr(DATA + 12), edx).unwrap();
        a.mov(ebx, ecx).unwrap();
        // Writing the TSC shows in TSC_ADJUST.
        a.mov(ecx, 0x10).unwrap();
        a.mov(edx, 0x100).unwrap();
        a.xor(eax, eax).unwrap();
        a.wrmsr().unwrap();
        a.rdmsr().unwrap();
        a.mov(esi, edx).unwrap();
        a.mov(ecx, 0x3b).unwrap();
        a.rdmsr().unwrap();
        a.hlt().unwrap();
    });
    machine.run();
    assert!(machine.load(DATA + 8) > machine.load(DATA));
    let r = machine.regs();
    assert_eq!((r.rbx, r.rsi), (77, 0x100));
    assert!(r.rdx == 0x100 || r.rdx == 0xff, "{:x}", r.rdx);
    // User code may not, with CR4.TSD.
    let mut machine = Machine::new(backend, Mode::Long, 3, |a| a.rdtsc().unwrap());
    machine.edit_sregs(|s| s.cr4 |= 4);
    assert_eq!(machine.run_to_fault().vector, 13);
}

fn random_numbers_differ(backend: &dyn Backend) {
    let mut machine = Machine::new(backend, Mode::Long, 0, |a| {
        a.rdrand(rbx).unwrap();
        a.setc(al).unwrap();
        a.rdseed(rcx).unwrap();
        a.hlt().unwrap();
    });
    let cpuid = machine.vcpu.save().unwrap().cpuid;
    if cpuid.get(1, 0).unwrap().ecx & 1 << 30 == 0 || cpuid.get(7, 0).unwrap().ebx & 1 << 18 == 0 {
        println!("skipped: no RDRAND");
        return;
    }
    machine.run();
    let r = machine.regs();
    assert_eq!(r.rax & 0xff, 1);
    assert_ne!(r.rbx, r.rcx);
}

fn translations_are_kept_until_flushed(backend: &dyn Backend) {
    // The entry of a page is changed, and the page read before and after INVLPG.
    let mut machine = Machine::new(backend, Mode::Long, 0, |a| {
        a.mov(eax, ptr(GOOD_PAGE)).unwrap();
        a.mov(ebx, DATA as u32 | 7).unwrap();
        a.mov(rdx, cr3).unwrap();
        // The fourth page of tables, entry 5.
        a.mov(ptr(rdx + (0x3000 + 5 * 8)), rbx).unwrap();
        a.invlpg(ptr(GOOD_PAGE)).unwrap();
        a.mov(ecx, ptr(GOOD_PAGE)).unwrap();
        a.mov(dword_ptr(GOOD_PAGE), 0x77).unwrap();
        a.mov(rbx, ptr(rdx + (0x3000 + 5 * 8))).unwrap();
        a.hlt().unwrap();
    });
    machine.store(GOOD_PAGE, 0x1111);
    machine.store(DATA, 0x2222);
    machine.run();
    let r = machine.regs();
    assert_eq!((r.rax, r.rcx, machine.load32(DATA)), (0x1111, 0x2222, 0x77));
    // Accessed and dirty.
    assert_eq!(r.rbx, DATA | 0x67);
}

fn process_contexts_keep_their_translations(backend: &dyn Backend) {
    let mut machine = Machine::new(backend, Mode::Long, 0, |a| {
        a.mov(rax, cr4).unwrap();
        a.bts(rax, 17).unwrap();
        a.mov(cr4, rax).unwrap();
        a.mov(rdx, cr3).unwrap();
        a.mov(rbx, rdx).unwrap();
        a.or(rbx, 5).unwrap();
        a.mov(cr3, rbx).unwrap();
        a.mov(rsi, cr3).unwrap();
        a.mov(rax, 1u64 << 63).unwrap();
        a.or(rdx, rax).unwrap();
        a.mov(cr3, rdx).unwrap();
        a.mov(rdi, cr3).unwrap();
        // PCIDE cannot be set with a context in CR3, but cleared.
        a.mov(rax, cr4).unwrap();
        a.btr(rax, 17).unwrap();
        a.mov(cr4, rax).unwrap();
        a.or(rdi, 3).unwrap();
        a.mov(cr3, rdi).unwrap();
        a.bts(rax, 17).unwrap();
        a.mov(cr4, rax).unwrap();
    });
    let cpuid = machine.vcpu.save().unwrap().cpuid;
    if cpuid.get(1, 0).unwrap().ecx & 1 << 17 == 0 {
        println!("skipped: no PCID");
        return;
    }
    let table = machine.vcpu.sregs().unwrap().cr3;
    let frame = machine.run_to_fault();
    assert_eq!(frame.vector, 13);
    let r = machine.regs();
    assert_eq!((r.rsi, r.rdi), (table | 5, table | 3));
}
