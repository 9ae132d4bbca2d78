//! The PICs and the PIT, and what wakes a processor that halts.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use iced_x86::code_asm::*;
use vmcore::backend::{Backend, IrqRoute, VcpuExit};

use crate::guest::{CODE, Guest, Mode, OnOut, assemble, assemble_at};
use crate::irq::{Alarm, INTERRUPTED, run_interrupts, wait_for_interrupts, without_irqchip};

crate::contract!(
    a_level_interrupts_through_the_pic_until_it_falls,
    a_level_may_be_made_one_before_the_guest_runs,
    the_pit_interrupts_through_the_pic_at_its_rate,
    a_processor_that_halts_learns_of_a_timer_set_by_another,
    an_event_wakes_a_processor_that_halts,
    counter_2_is_seen_at_port_61,
);

const HANDLER: u64 = CODE + 0x1000;

/// ICW1 to ICW4 of both, vectors from 0x20 and 0x28; input 2 and that of `irq` are not masked.
fn program_pics(a: &mut CodeAssembler, irq: u32) {
    let mask = !(1u32 << irq | 4);
    let writes = [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, mask & 0xff)];
    let slave = [(0xa0, 0x11), (0xa1, 0x28), (0xa1, 2), (0xa1, 1), (0xa1, mask >> 8 & 0xff)];
    write_ports(a, &[writes, slave].concat());
}

fn write_ports(a: &mut CodeAssembler, writes: &[(u32, u32)]) {
    for &(port, value) in writes {
        a.mov(al, value).unwrap();
        a.mov(dx, port).unwrap();
        a.out(dx, al).unwrap();
    }
}

/// A real-mode guest that waits for `irq`, and ends it at both PICs.
fn pic_guest(backend: &dyn Backend, irq: u32, prepare: impl FnOnce(&mut CodeAssembler)) -> Guest {
    let code = assemble(Mode::Real, |a| {
        program_pics(a, irq);
        prepare(a);
        wait_for_interrupts(a);
    });
    let handler = assemble_at(Mode::Real, HANDLER, |a| {
        a.out(u32::from(INTERRUPTED), al).unwrap();
        write_ports(a, &[(0xa0, 0x20), (0x20, 0x20)]);
        a.iret().unwrap();
    });
    let guest = Guest::with_irqchip(backend, Mode::Real, &code);
    guest.set_handler(u8::try_from(0x20 + irq).unwrap(), HANDLER, &handler);
    guest
}

fn a_level_interrupts_through_the_pic_until_it_falls(backend: &dyn Backend) {
    if !without_irqchip(backend) {
        level_interrupts(pic_guest(backend, 11, |a| write_ports(a, &[(0x4d1, 8)])));
    }
}

fn a_level_may_be_made_one_before_the_guest_runs(backend: &dyn Backend) {
    if without_irqchip(backend) {
        return;
    }
    let guest = pic_guest(backend, 11, |_| {});
    // The timer's, keyboard's and clock's cannot.
    guest.vm.set_level_triggered(1 << 11 | 1 << 5 | 1 | 1 << 1 | 1 << 8).unwrap();
    let irqchip = guest.vm.save().unwrap().irqchip.unwrap();
    assert_eq!(irqchip.pics.map(|pic| pic.elcr), [1 << 5, 1 << 3]);
    level_interrupts(guest);
}

/// A level on interrupt 11 comes again until it falls.
fn level_interrupts(mut guest: Guest) {
    let (vm, handle) = (guest.vm.clone(), guest.vcpu.handle());
    let mut seen = 0;
    let mut kicker = None;
    let _alarm = Alarm::new(guest.vcpu.handle());
    let exit = guest.run(&mut OnOut(|port, _: &[u8]| {
        seen += u32::from(port == u16::from(INTERRUPTED));
        vm.set_irq(11, seen < 4).unwrap();
        if seen == 4 {
            // Time for interrupts that should not come.
            let handle = handle.clone();
            kicker = Some(thread::spawn(move || {
                thread::sleep(Duration::from_millis(50));
                handle.kick();
            }));
        }
    }));
    assert_eq!((exit, seen), (VcpuExit::Kicked, 4));
    kicker.unwrap().join().unwrap();
}

fn the_pit_interrupts_through_the_pic_at_its_rate(backend: &dyn Backend) {
    if without_irqchip(backend) {
        return;
    }
    for mode in [2, 3] {
        // 2 kHz.
        let mut guest =
            pic_guest(backend, 0, |a| write_ports(a, &[(0x43, 0x30 | mode << 1), (0x40, 0x55), (0x40, 2)]));
        let start = Instant::now();
        run_interrupts(&mut *guest.vcpu, 100, |_| {});
        assert!(start.elapsed() >= Duration::from_millis(48), "{:?}", start.elapsed());
    }
}

/// The bootstrap processor halts without any timer; the other programs the PIT.
fn a_processor_that_halts_learns_of_a_timer_set_by_another(backend: &dyn Backend) {
    if without_irqchip(backend) {
        return;
    }
    let mut guest = pic_guest(backend, 0, |_| {});
    let mut other = CodeAssembler::new(16).unwrap();
    write_ports(&mut other, &[(0x43, 0x30), (0x40, 0), (0x40, 0x10)]);
    other.hlt().unwrap();
    guest.store(0x8000, &other.assemble(0).unwrap());
    let mut vcpu = guest.vm.create_vcpu(1).unwrap();
    vcpu.set_cpuid(&crate::guest::cpuid(backend)).unwrap();
    let mut state = vcpu.save().unwrap();
    state.run_state = vmcore::state::RunState::Running;
    state.sregs = crate::guest::sregs(Mode::Real, &state.sregs);
    state.sregs.cs = vmcore::state::Segment::real_mode(0, true);
    (state.regs.rip, state.regs.rflags) = (0x8000, 2);
    vcpu.restore(&state).unwrap();
    let handle = vcpu.handle();
    let (ready, is_ready) = mpsc::channel();
    let thread = thread::spawn(move || {
        is_ready.recv().unwrap();
        // The first is asleep by then, as a rule.
        thread::sleep(Duration::from_millis(20));
        vcpu.run(&mut OnOut(|_, _: &[u8]| {})).unwrap()
    });
    run_interrupts(&mut *guest.vcpu, 1, |_| ready.send(()).unwrap());
    handle.kick();
    thread.join().unwrap();
}

fn an_event_wakes_a_processor_that_halts(backend: &dyn Backend) {
    if without_irqchip(backend) {
        return;
    }
    let mut guest = pic_guest(backend, 5, |_| {});
    let registration = guest.vm.irq_event(IrqRoute::Gsi(5)).unwrap();
    let event = registration.event().clone();
    let (ready, is_ready) = mpsc::channel();
    let thread = thread::spawn(move || {
        for () in is_ready {
            thread::sleep(Duration::from_millis(5));
            event.write(1).unwrap();
        }
    });
    run_interrupts(&mut *guest.vcpu, 10, |_| ready.send(()).unwrap());
    drop(ready);
    thread.join().unwrap();
}

/// What kernels calibrate by: counter 2 in mode 0 for 10 ms, without interrupts.
fn counter_2_is_seen_at_port_61(backend: &dyn Backend) {
    if without_irqchip(backend) {
        return;
    }
    let code = assemble(Mode::Real, |a| {
        let mut again = a.create_label();
        write_ports(a, &[(0x61, 1), (0x43, 0xb0), (0x42, 0x9c), (0x42, 0x2e)]);
        a.out(0x80, al).unwrap();
        a.set_label(&mut again).unwrap();
        a.in_(al, 0x61).unwrap();
        a.test(al, 0x20).unwrap();
        a.jz(again).unwrap();
        a.out(0x81, al).unwrap();
        a.hlt().unwrap();
    });
    let mut guest = Guest::with_irqchip(backend, Mode::Real, &code);
    let handle = guest.vcpu.handle();
    let mut times = vec![];
    let _alarm = Alarm::new(guest.vcpu.handle());
    // The exit of port 0x80 may take long, and the counter has begun by then.
    let begin = Instant::now();
    guest.run(&mut OnOut(|port, _: &[u8]| {
        times.push(Instant::now());
        if port == 0x81 {
            handle.kick();
        }
    }));
    assert_eq!(times.len(), 2, "counter 2 has not ended");
    let passed = times[1] - begin;
    assert!(passed > Duration::from_millis(9) && passed < Duration::from_secs(1), "{passed:?}");
}
