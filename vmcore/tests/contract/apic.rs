//! The local APIC's timer and commands, in both of its modes, and its state from one backend to
//! another.

use iced_x86::code_asm::*;
use vmcore::backend::{Backend, Capability, VcpuExit};

use crate::guest::{CODE, Guest, Mode, OnOut, assemble, assemble_at, cpuid};
use crate::irq::{INTERRUPTED, run_interrupts, wait_for_interrupts};
use crate::state::{copied, resumed};

crate::contract!(
    a_one_shot_timer_is_armed_again_by_its_handler,
    a_periodic_timer_goes_on,
    a_deadline_of_the_tsc_interrupts,
    a_processor_interrupts_itself,
    a_level_is_raised_again_until_it_falls,
    a_timer_goes_on_in_every_other_backend,
    two_processors_interrupt_each_other,
);

const HANDLER: u64 = CODE + 0x1000;
const VECTOR: u32 = 0x51;

const APIC_BASE: u32 = 0x1b;
const TSC_DEADLINE_MSR: u32 = 0x6e0;

// Offsets in the page of registers.
const EOI: u32 = 0xb0;
const SPURIOUS: u32 = 0xf0;
const ICR: u32 = 0x300;
const LVT_TIMER: u32 = 0x320;
const INITIAL_COUNT: u32 = 0x380;
const DIVIDE: u32 = 0x3e0;

/// 1 ms of a 1 GHz timer, where the backend's is.
const COUNT: u32 = 1_000_000;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Apic {
    Page,
    Msrs,
}

const BOTH: [Apic; 2] = [Apic::Page, Apic::Msrs];

impl Apic {
    /// Writes `value` to the register at `offset`; clobbers RAX, RCX, RDX, RDI.
    fn write(self, a: &mut CodeAssembler, offset: u32, value: u32) {
        match self {
            Self::Page => {
                a.mov(edi, 0xfee0_0000 + offset).unwrap();
                a.mov(dword_ptr(rdi), value).unwrap();
            }
            Self::Msrs => wrmsr(a, 0x800 + offset / 16, value),
        }
    }

    /// Masks the PICs and enables the APIC in this mode.
    fn enable(self, a: &mut CodeAssembler) {
        a.mov(al, 0xff).unwrap();
        a.out(0x21, al).unwrap();
        a.out(0xa1, al).unwrap();
        if self == Self::Msrs {
            wrmsr(a, APIC_BASE, 0xfee0_0d00);
        }
        self.write(a, SPURIOUS, 0x1ff);
    }
}

fn wrmsr(a: &mut CodeAssembler, msr: u32, low: u32) {
    a.mov(ecx, msr).unwrap();
    a.mov(eax, low).unwrap();
    a.xor(edx, edx).unwrap();
    a.wrmsr().unwrap();
}

/// A guest that does `prepare` and waits; its handler does `again` after the end of interrupt.
fn guest(
    backend: &dyn Backend,
    apic: Apic,
    prepare: impl Fn(&mut CodeAssembler),
    again: impl Fn(&mut CodeAssembler),
) -> Option<Guest> {
    if !backend.supports(Capability::Irqchip) {
        println!("skipped: {} has no interrupt controllers", backend.name());
        return None;
    }
    let code = assemble(Mode::Long, |a| {
        apic.enable(a);
        prepare(a);
        wait_for_interrupts(a);
    });
    let handler = assemble_at(Mode::Long, HANDLER, |a| {
        a.out(u32::from(INTERRUPTED), al).unwrap();
        apic.write(a, EOI, 0);
        again(a);
        a.iretq().unwrap();
    });
    let guest = Guest::with_irqchip(backend, Mode::Long, &code);
    guest.set_handler(VECTOR.try_into().unwrap(), HANDLER, &handler);
    Some(guest)
}

fn a_one_shot_timer_is_armed_again_by_its_handler(backend: &dyn Backend) {
    for apic in BOTH {
        let prepare = |a: &mut CodeAssembler| {
            apic.write(a, DIVIDE, 0xb);
            apic.write(a, LVT_TIMER, VECTOR);
            apic.write(a, INITIAL_COUNT, COUNT);
        };
        let again = |a: &mut CodeAssembler| apic.write(a, INITIAL_COUNT, COUNT);
        let Some(mut guest) = guest(backend, apic, prepare, again) else { return };
        run_interrupts(&mut *guest.vcpu, 4, |_| {});
    }
}

/// A guest with a periodic timer.
fn periodic(backend: &dyn Backend, apic: Apic) -> Option<Guest> {
    let prepare = |a: &mut CodeAssembler| {
        apic.write(a, DIVIDE, 0xb);
        apic.write(a, LVT_TIMER, VECTOR | 1 << 17);
        apic.write(a, INITIAL_COUNT, COUNT);
    };
    guest(backend, apic, prepare, |_| {})
}

fn a_periodic_timer_goes_on(backend: &dyn Backend) {
    for apic in BOTH {
        let Some(mut guest) = periodic(backend, apic) else { return };
        run_interrupts(&mut *guest.vcpu, 4, |_| {});
    }
}

/// Arms the timer for 1,000,000 ticks of the TSC from now.
fn arm_deadline(a: &mut CodeAssembler) {
    a.rdtsc().unwrap();
    a.add(eax, 1_000_000).unwrap();
    a.adc(edx, 0).unwrap();
    a.mov(ecx, TSC_DEADLINE_MSR).unwrap();
    a.wrmsr().unwrap();
}

fn with_deadline(backend: &dyn Backend, apic: Apic) -> Option<Guest> {
    let prepare = |a: &mut CodeAssembler| {
        apic.write(a, LVT_TIMER, VECTOR | 2 << 17);
        a.mfence().unwrap();
        arm_deadline(a);
    };
    guest(backend, apic, prepare, arm_deadline)
}

fn a_deadline_of_the_tsc_interrupts(backend: &dyn Backend) {
    for apic in BOTH {
        let Some(mut guest) = with_deadline(backend, apic) else { return };
        run_interrupts(&mut *guest.vcpu, 4, |_| {});
    }
}

fn a_processor_interrupts_itself(backend: &dyn Backend) {
    for apic in BOTH {
        // By shorthand, by id, and everyone.
        for command in [1 << 18 | VECTOR, VECTOR, 2 << 18 | VECTOR] {
            let prepare = |a: &mut CodeAssembler| apic.write(a, ICR, command);
            let again = |a: &mut CodeAssembler| apic.write(a, ICR, command);
            let Some(mut guest) = guest(backend, apic, prepare, again) else { return };
            run_interrupts(&mut *guest.vcpu, 3, |_| {});
        }
    }
    let prepare = |a: &mut CodeAssembler| wrmsr(a, 0x83f, VECTOR);
    let Some(mut guest) = guest(backend, Apic::Msrs, prepare, |_| {}) else { return };
    run_interrupts(&mut *guest.vcpu, 1, |_| {});
}

/// Pin 10 as a level: it comes again after each end of interrupt, until the line falls.
fn a_level_is_raised_again_until_it_falls(backend: &dyn Backend) {
    for apic in BOTH {
        let prepare = |a: &mut CodeAssembler| {
            a.mov(edi, 0xfec0_0000u32).unwrap();
            for (register, value) in [(0x10 + 10 * 2 + 1, 0), (0x10 + 10 * 2, 1 << 15 | VECTOR)] {
                a.mov(dword_ptr(rdi), register).unwrap();
                a.mov(dword_ptr(rdi + 0x10), value).unwrap();
            }
        };
        let Some(mut guest) = guest(backend, apic, prepare, |_| {}) else { return };
        let vm = guest.vm.clone();
        // Low and high again before the third, so that a line that fell is still served.
        run_interrupts(&mut *guest.vcpu, 5, |seen| match seen {
            0 => vm.set_irq(10, true).unwrap(),
            2 => {
                vm.set_irq(10, false).unwrap();
                vm.set_irq(10, true).unwrap();
            }
            _ => {}
        });
        vm.set_irq(10, false).unwrap();
    }
}

fn a_timer_goes_on_in_every_other_backend(backend: &dyn Backend) {
    for apic in BOTH {
        for make in [periodic, with_deadline] {
            for other in crate::others(backend) {
                let Some(mut guest) = make(backend, apic) else { return };
                run_interrupts(&mut *guest.vcpu, 2, |_| {});
                let (machine, mut state) = (guest.vm.save().unwrap(), guest.vcpu.save().unwrap());
                // Not every host can give a TSC another frequency.
                state.tsc_khz = None;
                // Nor has it every feature that this guest could have seen.
                state.cpuid = cpuid(&*other);
                let mut new = resumed(&*other, copied(&guest), &machine, &state);
                let restored = new.vcpu.save().unwrap();
                assert_eq!(restored.sregs.apic_base, state.sregs.apic_base);
                // Apart from the current count, and IRR.
                let fixed = |state: &vmcore::state::VcpuState| {
                    let registers = &state.lapic.as_ref().unwrap().registers;
                    [0x2, 0x3, 0x8, 0xd, 0xe, 0xf, 0x30, 0x31, 0x32, 0x35, 0x36, 0x37, 0x38, 0x3e]
                        .map(|n| registers[n])
                };
                assert_eq!(fixed(&restored), fixed(&state), "{apic:?} from {backend:?} to {other:?}");
                run_interrupts(&mut *new.vcpu, 3, |_| {});
            }
        }
    }
}

/// Two processors in real mode and x2APIC mode, each of which waits for the other's interrupt to send
/// its own. Where one is lost, nothing goes on.
fn two_processors_interrupt_each_other(backend: &dyn Backend) {
    const TRAMPOLINE: u64 = 0x8000;
    const ROUNDS: u32 = 2_000;
    const COUNTER: u32 = 0x7000;
    const VECTOR: u8 = 0x51;
    if !backend.supports(Capability::Irqchip) {
        println!("skipped: {} has no interrupt controllers", backend.name());
        return;
    }
    let send = |a: &mut CodeAssembler, to: u32, command: u32| {
        a.mov(ecx, 0x830).unwrap();
        a.mov(edx, to).unwrap();
        a.mov(eax, command).unwrap();
        a.wrmsr().unwrap();
    };
    let code = assemble(Mode::Real, |a| {
        Apic::Msrs.enable(a);
        send(a, 1, 0x4500);
        send(a, 1, 0x4600 | u32::try_from(TRAMPOLINE >> 12).unwrap());
        wait_for_interrupts(a);
    });
    let handler = assemble_at(Mode::Real, HANDLER, |a| {
        let (mut other, mut end) = (a.create_label(), a.create_label());
        Apic::Msrs.write(a, EOI, 0);
        a.mov(ecx, 0x802).unwrap();
        a.rdmsr().unwrap();
        a.test(eax, eax).unwrap();
        a.jnz(other).unwrap();
        a.xor(ax, ax).unwrap();
        a.mov(ds, ax).unwrap();
        a.inc(dword_ptr(COUNTER)).unwrap();
        a.cmp(dword_ptr(COUNTER), ROUNDS).unwrap();
        send_if_less(a, &mut end, u32::from(VECTOR));
        a.out(u32::from(INTERRUPTED), al).unwrap();
        a.set_label(&mut end).unwrap();
        a.iret().unwrap();
        a.set_label(&mut other).unwrap();
        send(a, 0, VECTOR.into());
        a.iret().unwrap();
    });
    let mut guest = Guest::with_irqchip(backend, Mode::Real, &code);
    guest.set_handler(VECTOR, HANDLER, &handler);
    guest.store(COUNTER.into(), &[0; 4]);
    let mut trampoline = CodeAssembler::new(16).unwrap();
    trampoline.mov(sp, 0x6000).unwrap();
    Apic::Msrs.enable(&mut trampoline);
    send(&mut trampoline, 0, VECTOR.into());
    let mut again = trampoline.create_label();
    trampoline.sti().unwrap();
    trampoline.set_label(&mut again).unwrap();
    trampoline.hlt().unwrap();
    trampoline.jmp(again).unwrap();
    guest.store(TRAMPOLINE, &trampoline.assemble(0).unwrap());
    let mut second = guest.vm.create_vcpu(1).unwrap();
    second.set_cpuid(&cpuid(backend)).unwrap();
    let handle = second.handle();
    let thread = std::thread::spawn(move || second.run(&mut OnOut(|_, _: &[u8]| {})).unwrap());
    run_interrupts(&mut *guest.vcpu, 1, |_| {});
    handle.kick();
    assert_eq!(thread.join().unwrap(), VcpuExit::Kicked);
    assert_eq!(guest.load(COUNTER.into()), ROUNDS.to_le_bytes());
}

/// Below: sends the other processor interrupt `command`, and goes to `end`.
fn send_if_less(a: &mut CodeAssembler, end: &mut CodeLabel, command: u32) {
    let mut enough = a.create_label();
    a.jae(enough).unwrap();
    a.mov(ecx, 0x830).unwrap();
    a.mov(edx, 1).unwrap();
    a.mov(eax, command).unwrap();
    a.wrmsr().unwrap();
    a.jmp(*end).unwrap();
    a.set_label(&mut enough).unwrap();
}
