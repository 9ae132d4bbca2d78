//! Events that an instruction in the midst of a block causes: they come right after it.

use std::sync::{Arc, Mutex};

use iced_x86::code_asm::*;
use vmcore::boot::{Raw, RawMode};
use vmcore::{
    Accel, BusDevice, Clock, Control, Deterministic, GuestAddress, IrqLine, Machine, Outcome, Vm, VmBuilder,
};

const CODE: u64 = 0x10_0000;
const TIMER: u64 = CODE + 0x400;
const DEVICE: u64 = CODE + 0x440;
const WINDOW: u64 = 0xd000_0000;
const APIC: u64 = 0xfee0_0000;
const IDT: u32 = 0x5000;
const TICKS: u64 = 0x6000;
const DEVICE_TICKS: u64 = 0x6004;
const MIX: u64 = 0x6008;

/// Written at 0 it interrupts, at 8 it ends the guest; it reads as the time.
struct Device {
    irq: IrqLine,
    clock: Clock,
    control: Control,
}

impl BusDevice for Device {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        let now = self.clock.now().as_nanos().to_le_bytes();
        data.copy_from_slice(&now[..data.len()]);
    }
    fn write(&mut self, offset: u64, _: &[u8]) {
        match offset {
            0 => self.irq.pulse(),
            _ => self.control.end(Outcome::Exit(1)),
        }
    }
}

fn attach(machine: &mut Machine) -> vmcore::Result<()> {
    let device = Device { irq: machine.irq_line(5), clock: machine.clock(), control: machine.control() };
    machine.mmio(GuestAddress(WINDOW), 0x1000, Arc::new(Mutex::new(device)))
}

fn builder(code: Vec<u8>) -> VmBuilder {
    let boot = Raw::new(code, RawMode::Protected32).load_at(CODE);
    Vm::builder().memory(2 << 20).acpi(false).boot(boot).attach(attach)
}

fn part(image: &mut Vec<u8>, at: u64, write: impl FnOnce(&mut CodeAssembler)) {
    let mut a = CodeAssembler::new(32).unwrap();
    write(&mut a);
    let offset = usize::try_from(at - CODE).unwrap();
    assert!(image.len() <= offset);
    image.resize(offset, 0x90);
    image.extend(a.assemble(at).unwrap());
}

/// The PIC's input 5 at vector 0x55 and the APIC's timer at 0x40, with an IDT.
fn set_up(a: &mut CodeAssembler) {
    a.mov(ebx, esp).unwrap();
    for (vector, handler) in [(0x40, TIMER), (0x55, DEVICE)] {
        a.mov(eax, u32::try_from(handler).unwrap()).unwrap();
        a.mov(word_ptr(IDT + 8 * vector), ax).unwrap();
        a.mov(word_ptr(IDT + 8 * vector + 2), cs).unwrap();
        a.mov(word_ptr(IDT + 8 * vector + 4), 0x8e00).unwrap();
        a.shr(eax, 16).unwrap();
        a.mov(word_ptr(IDT + 8 * vector + 6), ax).unwrap();
    }
    a.mov(word_ptr(0x5ff0), 0x7ff).unwrap();
    a.mov(dword_ptr(0x5ff2), IDT).unwrap();
    a.lidt(ptr(0x5ff0)).unwrap();
    for (port, value) in [(0x20, 0x11), (0x21, 0x50), (0x21, 4), (0x21, 1), (0x21, 0xdf)] {
        a.mov(al, value).unwrap();
        a.out(port, al).unwrap();
    }
    a.mov(dword_ptr(APIC + 0xf0), 0x1ff).unwrap();
}

/// Counts at `counter`, and mixes in which instructions have been executed.
fn handler(a: &mut CodeAssembler, counter: u64, end: impl FnOnce(&mut CodeAssembler)) {
    a.inc(dword_ptr(counter)).unwrap();
    a.rol(dword_ptr(MIX), 3).unwrap();
    a.add(dword_ptr(MIX), esi).unwrap();
    a.push(eax).unwrap();
    end(a);
    a.pop(eax).unwrap();
    a.iretd().unwrap();
}

fn handlers(image: &mut Vec<u8>) {
    part(image, TIMER, |a| {
        handler(a, TICKS, |a| a.mov(dword_ptr(APIC + 0xb0), 0).unwrap());
    });
    part(image, DEVICE, |a| {
        handler(a, DEVICE_TICKS, |a| {
            a.mov(al, 0x20).unwrap();
            a.out(0x20, al).unwrap();
        });
    });
}

/// Long blocks in which devices interrupt and timers are set.
fn busy() -> Vec<u8> {
    let mut image = Vec::new();
    part(&mut image, CODE, |a| {
        let mut again = a.create_label();
        set_up(a);
        a.mov(dword_ptr(APIC + 0x3e0), 0xb).unwrap();
        a.mov(dword_ptr(APIC + 0x320), 0x40).unwrap();
        a.mov(ecx, 3000).unwrap();
        a.sti().unwrap();
        a.set_label(&mut again).unwrap();
        for (n, wait) in [3u32, 11, 200].into_iter().enumerate() {
            // One shot, before the block's end or after.
            a.mov(dword_ptr(APIC + 0x380), wait).unwrap();
            (0..5).for_each(|_| a.inc(esi).unwrap());
            if n == 1 {
                a.mov(dword_ptr(WINDOW), eax).unwrap();
            }
            (0..4).for_each(|_| a.inc(esi).unwrap());
            a.mov(eax, dword_ptr(WINDOW)).unwrap();
            a.add(dword_ptr(MIX), eax).unwrap();
            a.mov(eax, dword_ptr(APIC + 0x390)).unwrap();
            a.add(dword_ptr(MIX), eax).unwrap();
        }
        a.dec(ecx).unwrap();
        a.jne(again).unwrap();
        a.mov(dword_ptr(WINDOW + 8), eax).unwrap();
        a.hlt().unwrap();
    });
    handlers(&mut image);
    image
}

#[test]
fn events_come_between_the_same_instructions_wherever_the_run_is_cut() {
    let vm = || builder(busy()).deterministic(Deterministic::default()).build().unwrap();
    let (mut whole, mut single) = (vm(), vm());
    for _ in 0..12 {
        assert_eq!(whole.run_instructions(1_013).unwrap(), Outcome::InstructionLimit);
        for _ in 0..1_013 {
            assert_eq!(single.run_instructions(1).unwrap(), Outcome::InstructionLimit);
        }
        assert_eq!(whole.state_hash().unwrap(), single.state_hash().unwrap());
    }
    assert_eq!(whole.run().unwrap(), Outcome::Exit(1));
    while single.run_instructions(3).unwrap() == Outcome::InstructionLimit {}
    assert_eq!(whole.state_hash().unwrap(), single.state_hash().unwrap());
    let word = |at| whole.memory().load::<u32>(GuestAddress(at)).unwrap();
    assert!(word(TICKS) > 3_000, "{}", word(TICKS));
    assert!(word(DEVICE_TICKS) > 2_000, "{}", word(DEVICE_TICKS));
}

/// An interrupt of the APIC and one of the PIC wait for STI; ESI counts what is executed after.
fn two_at_once() -> Vec<u8> {
    let mut image = Vec::new();
    part(&mut image, CODE, |a| {
        let mut again = a.create_label();
        set_up(a);
        a.mov(dword_ptr(WINDOW), eax).unwrap();
        // To itself.
        a.mov(dword_ptr(APIC + 0x300), 0x4_0040).unwrap();
        a.mov(ecx, 100_000).unwrap();
        a.sti().unwrap();
        a.nop().unwrap();
        a.set_label(&mut again).unwrap();
        a.inc(esi).unwrap();
        a.dec(ecx).unwrap();
        a.jne(again).unwrap();
        a.mov(dword_ptr(WINDOW + 8), eax).unwrap();
        a.hlt().unwrap();
    });
    handlers(&mut image);
    image
}

#[test]
fn an_interrupt_that_waited_for_another_comes_right_after_it() {
    for deterministic in [false, true] {
        let mut builder = builder(two_at_once()).accel(Accel::Soft);
        if deterministic {
            builder = builder.deterministic(Deterministic::default());
        }
        let mut vm = builder.build().unwrap();
        assert_eq!(vm.run().unwrap(), Outcome::Exit(1));
        let word = |at| vm.memory().load::<u32>(GuestAddress(at)).unwrap();
        // ESI was next to 0 both times; without the second one's turn it would be hundreds.
        assert_eq!((word(TICKS), word(DEVICE_TICKS)), (1, 1));
        assert!(word(MIX) < 20, "{}", word(MIX));
    }
}
