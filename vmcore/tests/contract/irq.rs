//! Interrupts by line, message and event; NMI; application processors.

use std::thread;
use std::time::Duration;

use iced_x86::code_asm::*;
use vmcore::Msi;
use vmcore::backend::{Backend, BackendConfig, BackendVcpu, Capability, IrqRoute, VcpuExit};

use crate::guest::{CODE, Guest, Mode, OnOut, assemble, assemble_at, cpuid};

crate::contract!(
    a_line_interrupts_through_the_pic,
    a_line_interrupts_through_the_ioapic,
    every_gsi_is_the_pin_of_its_number_and_the_pit_is_on_0,
    a_message_interrupts,
    an_interrupt_comes_one_instruction_after_sti,
    events_interrupt_until_dropped,
    interrupts_need_controllers,
    an_nmi_is_delivered,
    application_processors_start_by_init_and_sipi,
    ids_of_vcpus_are_checked,
);

/// Ports by which the guests talk to the tests.
const READY: u8 = 0x81;
pub const INTERRUPTED: u8 = 0x82;

const HANDLER: u64 = CODE + 0x1000;
const VECTOR: u8 = 0x31;

/// What the guest does after READY: waits for interrupts for ever.
pub fn wait_for_interrupts(a: &mut CodeAssembler) {
    let mut again = a.create_label();
    a.sti().unwrap();
    a.out(u32::from(READY), al).unwrap();
    a.set_label(&mut again).unwrap();
    a.hlt().unwrap();
    a.jmp(again).unwrap();
}

/// Runs; at READY and after each interrupt calls `next` with how many there were, until `count`.
pub fn run_interrupts(vcpu: &mut dyn BackendVcpu, count: usize, mut next: impl FnMut(usize)) {
    let handle = vcpu.handle();
    let mut seen = 0;
    let mut ports = vec![];
    // A guest that gets no interrupt would wait for ever.
    let alarm = Alarm::new(handle.clone());
    let exit = vcpu.run(&mut OnOut(|port, _: &[u8]| {
        ports.push(port);
        if port == u16::from(INTERRUPTED) {
            seen += 1;
        }
        if seen == count {
            handle.kick();
        } else {
            next(seen);
        }
    }));
    drop(alarm);
    assert_eq!(exit.unwrap(), VcpuExit::Kicked);
    assert_eq!(seen, count, "accesses: {ports:x?}, {:x?}", vcpu.regs());
}

/// Kicks after five seconds, unless dropped before.
pub struct Alarm(Option<(std::sync::mpsc::Sender<()>, thread::JoinHandle<()>)>);

impl Alarm {
    pub fn new(handle: vmcore::backend::VcpuHandle) -> Self {
        let (stop, stopped) = std::sync::mpsc::channel();
        let thread = thread::spawn(move || {
            if stopped
                .recv_timeout(Duration::from_secs(5))
                .is_err_and(|e| e == std::sync::mpsc::RecvTimeoutError::Timeout)
            {
                handle.kick();
            }
        });
        Self(Some((stop, thread)))
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.0.take() {
            drop(stop);
            thread.join().unwrap();
        }
    }
}

pub fn without_irqchip(backend: &dyn Backend) -> bool {
    let without = !backend.supports(Capability::Irqchip);
    if without {
        println!("skipped: {} has no interrupt controllers", backend.name());
    }
    without
}

/// Real mode, 8259A with its inputs at 0x20: an edge on IRQ 5, three times.
fn a_line_interrupts_through_the_pic(backend: &dyn Backend) {
    if without_irqchip(backend) {
        return;
    }
    let code = assemble(Mode::Real, |a| {
        // ICW1 to ICW4, then a mask that leaves IRQ 5.
        for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xdf)] {
            a.mov(al, value).unwrap();
            a.out(port, al).unwrap();
        }
        wait_for_interrupts(a);
    });
    let handler = assemble_at(Mode::Real, HANDLER, |a| {
        a.mov(al, 0x20).unwrap();
        a.out(0x20, al).unwrap();
        a.out(u32::from(INTERRUPTED), al).unwrap();
        a.iret().unwrap();
    });
    let mut guest = Guest::with_irqchip(backend, Mode::Real, &code);
    guest.set_handler(0x25, HANDLER, &handler);
    let vm = guest.vm.clone();
    run_interrupts(&mut *guest.vcpu, 3, |_| {
        vm.set_irq(5, true).unwrap();
        vm.set_irq(5, false).unwrap();
    });
}

/// Long-mode code that enables the LAPIC and sends IOAPIC pin 9 as [`VECTOR`], and its handler.
fn apic_guest(backend: &dyn Backend) -> Guest {
    apic_guest_on(backend, 9, |_| {})
}

/// The same for any pin; `prepare` is more for the guest to do before it waits.
fn apic_guest_on(backend: &dyn Backend, pin: u32, prepare: fn(&mut CodeAssembler)) -> Guest {
    let code = assemble(Mode::Long, |a| {
        // The pin leads to the PICs too: mask them.
        a.mov(al, 0xff).unwrap();
        a.out(0x21, al).unwrap();
        a.out(0xa1, al).unwrap();
        // Spurious-interrupt vector register: enable.
        a.mov(edi, 0xfee0_00f0u32).unwrap();
        a.mov(dword_ptr(rdi), 0x1ff).unwrap();
        // The pin's redirection entry: fixed, physical destination 0, edge.
        a.mov(edi, 0xfec0_0000u32).unwrap();
        for (register, value) in [(0x10 + pin * 2 + 1, 0), (0x10 + pin * 2, u32::from(VECTOR))] {
            a.mov(dword_ptr(rdi), register).unwrap();
            a.mov(dword_ptr(rdi + 0x10), value).unwrap();
        }
        prepare(a);
        wait_for_interrupts(a);
    });
    let handler = assemble_at(Mode::Long, HANDLER, |a| {
        a.mov(edi, 0xfee0_00b0u32).unwrap();
        a.mov(dword_ptr(rdi), 0).unwrap();
        a.out(u32::from(INTERRUPTED), al).unwrap();
        a.iretq().unwrap();
    });
    let guest = Guest::with_irqchip(backend, Mode::Long, &code);
    guest.set_handler(VECTOR, HANDLER, &handler);
    guest
}

fn message() -> Msi {
    Msi { address: 0xfee0_0000, data: VECTOR.into() }
}

fn a_line_interrupts_through_the_ioapic(backend: &dyn Backend) {
    if without_irqchip(backend) {
        return;
    }
    let mut guest = apic_guest(backend);
    let vm = guest.vm.clone();
    run_interrupts(&mut *guest.vcpu, 3, |_| {
        vm.set_irq(9, true).unwrap();
        vm.set_irq(9, false).unwrap();
    });
}

/// What MADT and MP table say of the wiring: no interrupt source override, the PIT's neither.
fn every_gsi_is_the_pin_of_its_number_and_the_pit_is_on_0(backend: &dyn Backend) {
    if without_irqchip(backend) {
        return;
    }
    for pin in 0..24 {
        let mut guest = apic_guest_on(backend, pin, |_| {});
        let vm = guest.vm.clone();
        run_interrupts(&mut *guest.vcpu, 1, |_| {
            vm.set_irq(pin, true).unwrap();
            vm.set_irq(pin, false).unwrap();
        });
    }
    // Counter 0 in mode 2, 1 kHz.
    let mut guest = apic_guest_on(backend, 0, |a| {
        for (port, value) in [(0x43, 0x34), (0x40, 0xa9), (0x40, 4)] {
            a.mov(al, value).unwrap();
            a.out(port, al).unwrap();
        }
    });
    run_interrupts(&mut *guest.vcpu, 3, |_| {});
}

fn a_message_interrupts(backend: &dyn Backend) {
    if without_irqchip(backend) {
        return;
    }
    let mut guest = apic_guest(backend);
    let vm = guest.vm.clone();
    run_interrupts(&mut *guest.vcpu, 3, |_| vm.send_msi(message()).unwrap());
}

/// SDM vol. 2B, "STI": the instruction after it comes first, and CLI there keeps the interrupt away.
fn an_interrupt_comes_one_instruction_after_sti(backend: &dyn Backend) {
    if without_irqchip(backend) {
        return;
    }
    if backend.name() == "kvm" && crate::small_guests_only(backend) {
        println!("skipped: this software KVM does not look for interrupts before each instruction");
        return;
    }
    let code = assemble(Mode::Long, |a| {
        a.mov(edi, 0xfee0_00f0u32).unwrap();
        a.mov(dword_ptr(rdi), 0x1ff).unwrap();
        a.out(u32::from(READY), al).unwrap();
        a.sti().unwrap();
        a.cli().unwrap();
        a.nop().unwrap();
        a.out(0x83, al).unwrap();
        a.sti().unwrap();
        a.nop().unwrap();
        a.cli().unwrap();
        a.nop().unwrap();
        a.out(0x84, al).unwrap();
        a.hlt().unwrap();
    });
    let handler = assemble_at(Mode::Long, HANDLER, |a| {
        a.out(u32::from(INTERRUPTED), al).unwrap();
        a.iretq().unwrap();
    });
    let mut guest = Guest::with_irqchip(backend, Mode::Long, &code);
    guest.set_handler(VECTOR, HANDLER, &handler);
    let (vm, handle) = (guest.vm.clone(), guest.vcpu.handle());
    let _alarm = Alarm::new(handle.clone());
    let mut ports = vec![];
    guest.run(&mut OnOut(|port, _: &[u8]| {
        ports.push(port);
        match port {
            0x81 => vm.send_msi(message()).unwrap(),
            0x84 => handle.kick(),
            _ => {}
        }
    }));
    assert_eq!(ports, [0x81, 0x83, 0x82, 0x84]);
}

fn events_interrupt_until_dropped(backend: &dyn Backend) {
    if without_irqchip(backend) {
        return;
    }
    let mut guest = apic_guest(backend);
    let line = guest.vm.irq_event(IrqRoute::Gsi(9)).unwrap();
    let msi = guest.vm.irq_event(IrqRoute::Msi(message())).unwrap();
    run_interrupts(&mut *guest.vcpu, 4, |seen| {
        let event = if seen % 2 == 0 { &line } else { &msi };
        event.event().write(1).unwrap();
    });
    // Many messages at once, and the ends of some of them leave the others alone.
    let mut events: Vec<_> =
        (0..100).map(|_| guest.vm.irq_event(IrqRoute::Msi(message())).unwrap()).collect();
    events.truncate(60);
    drop(msi);
    let mut writes = 0;
    let handle = guest.vcpu.handle();
    events[59].event().write(1).unwrap();
    let alarm = Alarm::new(handle.clone());
    let exit = guest.run(&mut OnOut(|port, _: &[u8]| {
        assert_eq!(port, u16::from(INTERRUPTED));
        writes += 1;
        match writes {
            1 => events[0].event().write(1).unwrap(),
            2 => line.event().write(1).unwrap(),
            _ => handle.kick(),
        }
    }));
    drop(alarm);
    assert_eq!((exit, writes), (VcpuExit::Kicked, 3));
    let text = guest.vm.irq_event(IrqRoute::Gsi(24)).unwrap_err().to_string();
    assert!(text.contains("GSI 24") && text.contains("0 to 23"), "{text}");
    assert!(guest.vm.set_irq(1000, true).unwrap_err().to_string().contains("GSI 1000"));
}

fn interrupts_need_controllers(backend: &dyn Backend) {
    let vm = backend.create_vm(&BackendConfig::default()).unwrap();
    let errors = [
        vm.set_irq(5, true).unwrap_err(),
        vm.send_msi(message()).unwrap_err(),
        vm.irq_event(IrqRoute::Gsi(5)).unwrap_err(),
    ];
    for error in errors {
        assert!(error.to_string().contains("BackendConfig::irqchip"), "{error}");
    }
}

fn an_nmi_is_delivered(backend: &dyn Backend) {
    let code = assemble(Mode::Protected, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.out(u32::from(READY), al).unwrap();
        a.jmp(again).unwrap();
    });
    let handler = assemble_at(Mode::Protected, HANDLER, |a| {
        a.out(u32::from(INTERRUPTED), al).unwrap();
        a.iretd().unwrap();
    });
    let mut guest = Guest::new(backend, Mode::Protected, &code);
    guest.set_handler(2, HANDLER, &handler);
    guest.vcpu.inject_nmi().unwrap();
    run_interrupts(&mut *guest.vcpu, 1, |_| {});
}

/// The bootstrap processor starts two others by INIT and SIPI; each adds its APIC id plus one to a
/// counter and halts; the first waits until all have come.
fn application_processors_start_by_init_and_sipi(backend: &dyn Backend) {
    if without_irqchip(backend) {
        return;
    }
    const TRAMPOLINE: u64 = 0x8000;
    const COUNTER: u32 = 0x7000;
    let code = assemble(Mode::Protected, |a| {
        let mut wait = a.create_label();
        a.mov(edi, 0xfee0_0000u32).unwrap();
        a.mov(dword_ptr(edi + 0xf0), 0x1ff).unwrap();
        // Interrupt command register: to all but self, INIT, then SIPI (SDM vol. 3A, 11.6.1).
        a.mov(dword_ptr(edi + 0x300), 0x000c_4500).unwrap();
        let sipi = 0x000c_4600 | u32::try_from(TRAMPOLINE >> 12).unwrap();
        a.mov(dword_ptr(edi + 0x300), sipi).unwrap();
        a.set_label(&mut wait).unwrap();
        a.cmp(dword_ptr(COUNTER), 5).unwrap();
        a.jne(wait).unwrap();
        a.out(u32::from(INTERRUPTED), al).unwrap();
        a.hlt().unwrap();
    });
    let mut guest = Guest::with_irqchip(backend, Mode::Protected, &code);
    // CPUID leaf 1 tells the APIC id in EBX 31:24.
    let mut trampoline = CodeAssembler::new(16).unwrap();
    trampoline.mov(eax, 1).unwrap();
    trampoline.cpuid().unwrap();
    trampoline.shr(ebx, 24).unwrap();
    trampoline.inc(ebx).unwrap();
    trampoline.xor(ax, ax).unwrap();
    trampoline.mov(ds, ax).unwrap();
    trampoline.lock().add(dword_ptr(COUNTER), ebx).unwrap();
    trampoline.hlt().unwrap();
    guest.store(TRAMPOLINE, &trampoline.assemble(0).unwrap());
    let processors: Vec<_> = [1u32, 2]
        .map(|id| {
            let mut vcpu = guest.vm.create_vcpu(id).unwrap();
            let mut cpuid = cpuid(backend);
            let leaf = cpuid.get_mut(1, 0).unwrap();
            leaf.ebx = leaf.ebx & 0x00ff_ffff | id << 24;
            vcpu.set_cpuid(&cpuid).unwrap();
            assert_eq!(vcpu.run_state().unwrap(), vmcore::state::RunState::WaitForInit);
            vcpu
        })
        .into_iter()
        .map(|mut vcpu| {
            let handle = vcpu.handle();
            let thread = thread::spawn(move || (vcpu.run(&mut OnOut(|_, _: &[u8]| {})).unwrap(), vcpu));
            (handle, thread)
        })
        .collect();
    run_interrupts(&mut *guest.vcpu, 1, |_| {});
    for (handle, thread) in processors {
        handle.kick();
        let (exit, vcpu) = thread.join().unwrap();
        assert_eq!(exit, VcpuExit::Kicked);
        assert_eq!(vcpu.run_state().unwrap(), vmcore::state::RunState::Halted);
        assert_eq!(vcpu.sregs().unwrap().cs.base, TRAMPOLINE);
    }
    assert_eq!(guest.load(COUNTER.into()), [5, 0, 0, 0]);
}

fn ids_of_vcpus_are_checked(backend: &dyn Backend) {
    let vm = backend.create_vm(&BackendConfig::default()).unwrap();
    let _first = vm.create_vcpu(0).unwrap();
    let text = vm.create_vcpu(0).err().map(|e| e.to_string()).unwrap();
    assert!(text.contains("vCPU 0"), "{text}");
    assert!(vm.create_vcpu(u32::MAX).is_err());
}
