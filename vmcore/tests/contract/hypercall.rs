//! Those of KVM's hypercalls that a guest may make where CPUID offers them.

use iced_x86::code_asm::*;
use vmcore::backend::{Backend, Capability};
use vmcore::cpuid::{Cpuid, CpuidEntry};

use crate::guest::{CODE, Guest, Mode, OnOut, assemble, assemble_at, cpuid};

crate::contract!(
    a_kick_ends_the_next_halt,
    interrupts_are_sent_to_a_set_of_processors,
    unknown_hypercalls_are_told_so
);

const KICK_CPU: u64 = 5;
const SEND_IPI: u64 = 10;
/// The leaf of KVM's features, and two of them.
const FEATURES: u32 = 0x4000_0001;
const PV_UNHALT: u32 = 1 << 7;
const PV_SEND_IPI: u32 = 1 << 11;
const HANDLER: u64 = CODE + 0x1000;
const VECTOR: u8 = 0x51;

/// A software KVM keeps the instruction to itself.
fn without_hypercalls(backend: &dyn Backend) -> bool {
    let without = backend.name() == "kvm" && crate::small_guests_only(backend);
    if without {
        println!("skipped: this software KVM does not emulate hypercalls");
    }
    without
}

/// What a guest is shown that makes hypercalls. The software CPU shows it to none, but takes guests from KVM.
fn shown(backend: &dyn Backend) -> Cpuid {
    let mut shown = cpuid(backend);
    if backend.name() == "soft" {
        let leaf = *shown.get(FEATURES, 0).unwrap();
        assert_eq!(leaf.eax & (PV_UNHALT | PV_SEND_IPI), 0);
        shown.set(CpuidEntry { eax: leaf.eax | PV_UNHALT | PV_SEND_IPI, ..leaf });
    }
    shown
}

/// Whether the backend serves guests that were shown `feature`; says so where not.
fn offers(backend: &dyn Backend, feature: u32) -> bool {
    if without_hypercalls(backend) {
        return false;
    }
    let features = shown(backend).get(FEATURES, 0).map_or(0, |leaf| leaf.eax);
    let offered = backend.supports(Capability::Irqchip) && features & feature != 0;
    if !offered {
        println!("skipped: {} does not offer it", backend.name());
    }
    offered
}

/// The hypercall with `number`, by the instruction that the vendor of the guest's CPU has.
fn call(backend: &dyn Backend, a: &mut CodeAssembler, number: u64, arguments: [u64; 4]) {
    a.mov(rax, number).unwrap();
    for (register, value) in [rbx, rcx, rdx, rsi].into_iter().zip(arguments) {
        a.mov(register, value).unwrap();
    }
    // The last letters of AuthenticAMD.
    let amd = cpuid(backend).get(0, 0).unwrap().ecx == u32::from_le_bytes(*b"cAMD");
    if amd { a.vmmcall().unwrap() } else { a.vmcall().unwrap() }
}

fn enable_apic(a: &mut CodeAssembler) {
    a.mov(edi, 0xfee0_00f0u32).unwrap();
    a.mov(dword_ptr(rdi), 0x1ff).unwrap();
}

/// Runs until the guest writes to port 0x80, and gives the ports written to before.
fn ports(guest: &mut Guest) -> Vec<u16> {
    let handle = guest.vcpu.handle();
    let mut ports = vec![];
    guest.run(&mut OnOut(|port, _: &[u8]| if port == 0x80 { handle.kick() } else { ports.push(port) }));
    ports
}

/// With interrupts off, nothing but the kick ends the HLT.
fn a_kick_ends_the_next_halt(backend: &dyn Backend) {
    if !offers(backend, PV_UNHALT) {
        return;
    }
    let code = assemble(Mode::Long, |a| {
        enable_apic(a);
        for _ in 0..2 {
            call(backend, a, KICK_CPU, [0, 0, 0, 0]);
            a.hlt().unwrap();
            a.out(0x81, al).unwrap();
        }
        a.out(0x80, al).unwrap();
        a.hlt().unwrap();
    });
    let mut guest = Guest::with_irqchip(backend, Mode::Long, &code);
    guest.vcpu.set_cpuid(&shown(backend)).unwrap();
    assert_eq!(ports(&mut guest), [0x81, 0x81]);
}

fn interrupts_are_sent_to_a_set_of_processors(backend: &dyn Backend) {
    if !offers(backend, PV_SEND_IPI) {
        return;
    }
    let code = assemble(Mode::Long, |a| {
        enable_apic(a);
        // Bit 0 of both halves, the second time from a base that makes neither of them vCPU 0.
        for (slot, base) in [(0, 0), (8, 5)] {
            call(backend, a, SEND_IPI, [1, 1, base, VECTOR.into()]);
            a.mov(edi, 0x7000).unwrap();
            a.mov(ptr(rdi + slot), rax).unwrap();
        }
        a.sti().unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
        a.out(0x82, al).unwrap();
        a.out(0x80, al).unwrap();
        a.hlt().unwrap();
    });
    let handler = assemble_at(Mode::Long, HANDLER, |a| {
        a.out(0x81, al).unwrap();
        a.iretq().unwrap();
    });
    let mut guest = Guest::with_irqchip(backend, Mode::Long, &code);
    guest.vcpu.set_cpuid(&shown(backend)).unwrap();
    guest.set_handler(VECTOR, HANDLER, &handler);
    assert_eq!(ports(&mut guest), [0x81, 0x82]);
    // How many of the set there are.
    assert_eq!([0x7000, 0x7008].map(|at| i64::from_le_bytes(guest.load(at))), [1, 0]);
}

fn unknown_hypercalls_are_told_so(backend: &dyn Backend) {
    if without_hypercalls(backend) {
        return;
    }
    let code = assemble(Mode::Long, |a| {
        call(backend, a, 0xffff, [0; 4]);
        a.mov(edi, 0x7000).unwrap();
        a.mov(ptr(rdi), rax).unwrap();
        a.out(0x80, al).unwrap();
        a.hlt().unwrap();
    });
    let mut guest = Guest::new(backend, Mode::Long, &code);
    guest.vcpu.set_cpuid(&cpuid(backend)).unwrap();
    assert!(ports(&mut guest).is_empty());
    assert_eq!(i64::from_le_bytes(guest.load(0x7000)), -1000);
}
