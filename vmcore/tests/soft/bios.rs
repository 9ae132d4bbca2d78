//! A bzImage's setup code, entered in real mode: the services that it is given.

use std::sync::{Arc, Mutex};

use iced_x86::code_asm::*;
use vmcore::boot::{Linux, LinuxEntry, MemoryLayout};
use vmcore::{Accel, BusDevice, Control, Machine, Outcome, Vm};

/// Where the setup code reports, a word at a time.
const REPORT: u32 = 0x510;
/// Memory of the machine, in bytes.
const MEMORY: u64 = 64 << 20;
/// Where setup code begins.
const SETUP_CODE: u64 = 0x268;

/// What was reported; "port 0x64" ends the VM as the keyboard controller would.
#[derive(Clone, Default)]
struct Report(Arc<Mutex<Vec<u16>>>);

impl BusDevice for Report {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _: u64, data: &[u8]) {
        self.0.lock().unwrap().push(u16::from_le_bytes([data[0], data.get(1).copied().unwrap_or(0)]));
    }
}

struct Keyboard(Control);

impl BusDevice for Keyboard {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _: u64, data: &[u8]) {
        self.0.end(Outcome::Exit(data[0].into()));
    }
}

/// COM1 with a character to read, an empty transmitter, and what was sent.
#[derive(Clone, Default)]
struct Serial(Arc<Mutex<Vec<u8>>>, bool);

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data[0] = match offset {
            0 => {
                self.1 = true;
                b'k'
            }
            5 => 0x20 | u8::from(!self.1),
            _ => 0,
        };
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == 0 {
            self.0.lock().unwrap().push(data[0]);
        }
    }
}

fn report(a: &mut CodeAssembler, register: AsmRegister16) {
    a.push(ax).unwrap();
    a.mov(ax, register).unwrap();
    a.mov(dx, REPORT).unwrap();
    a.out(dx, ax).unwrap();
    a.pop(ax).unwrap();
}

/// Calls every service and reports what it answers.
fn setup_code() -> Vec<u8> {
    let mut a = CodeAssembler::new(16).unwrap();
    // Where it is: CS, SS, SP, and the command line's address.
    for segment in [cs, ss, ds] {
        a.mov(ax, segment).unwrap();
        report(&mut a, ax);
    }
    a.mov(cx, sp).unwrap();
    report(&mut a, cx);
    a.mov(si, word_ptr(0x228)).unwrap();
    a.mov(al, byte_ptr(si)).unwrap();
    a.mov(ah, 0).unwrap();
    report(&mut a, ax);
    a.int(0x12).unwrap();
    report(&mut a, ax);
    for function in [0x8800, 0xe801] {
        a.mov(ax, function).unwrap();
        a.int(0x15).unwrap();
        report(&mut a, ax);
    }
    report(&mut a, bx);
    // The memory map: kind and low half of the base in 64 KiB of each entry; its end is 0xffff.
    let (mut next, mut done) = (a.create_label(), a.create_label());
    a.xor(ebx, ebx).unwrap();
    a.set_label(&mut next).unwrap();
    a.mov(eax, 0xe820).unwrap();
    a.mov(edx, 0x534d_4150).unwrap();
    a.mov(ecx, 20).unwrap();
    a.mov(di, 0x8000).unwrap();
    a.int(0x15).unwrap();
    a.jc(done).unwrap();
    a.mov(ax, word_ptr(0x8010)).unwrap();
    report(&mut a, ax);
    a.mov(ax, word_ptr(0x8002)).unwrap();
    report(&mut a, ax);
    a.test(ebx, ebx).unwrap();
    a.jne(next).unwrap();
    a.mov(ax, 0xffff).unwrap();
    report(&mut a, ax);
    a.set_label(&mut done).unwrap();
    // Unknown: carry and 0x86.
    a.mov(ax, 0xc000).unwrap();
    a.int(0x15).unwrap();
    a.sbb(cx, cx).unwrap();
    report(&mut a, ax);
    report(&mut a, cx);
    // A key: seen, read, and no more there.
    for function in [0x0100, 0x0000, 0x1100] {
        a.mov(ax, function).unwrap();
        a.int(0x16).unwrap();
        a.mov(cx, 0).unwrap();
        let mut none = a.create_label();
        a.je(none).unwrap();
        a.mov(cx, ax).unwrap();
        a.set_label(&mut none).unwrap();
        if function != 0 {
            report(&mut a, cx);
        } else {
            report(&mut a, ax);
        }
    }
    a.mov(ax, 0x0e00 | i32::from(b'!')).unwrap();
    a.int(0x10).unwrap();
    // Two ticks of the timer, waited for as programs do.
    let mut tick = a.create_label();
    a.set_label(&mut tick).unwrap();
    a.sti().unwrap();
    a.hlt().unwrap();
    a.mov(ah, 0).unwrap();
    a.int(0x1a).unwrap();
    a.cmp(dx, 2).unwrap();
    a.jb(tick).unwrap();
    report(&mut a, cx);
    // The reset vector leads where INT 19h does.
    a.push(0xf000u32 as i32).unwrap();
    a.push(0xfff0u32 as i32).unwrap();
    a.retf().unwrap();
    a.assemble(SETUP_CODE).unwrap()
}

fn image() -> Vec<u8> {
    let mut image = vec![0; 0x600];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[2]);
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x66]);
    put(0x202, b"HdrS\x07\x02");
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x238, &100u32.to_le_bytes());
    put(0x268, &setup_code());
    image.extend(b"protected-mode code");
    image
}

#[test]
fn setup_code_gets_the_services_of_a_bios() {
    let (report, serial) = (Report::default(), Serial::default());
    let (reports, sent) = (report.0.clone(), serial.0.clone());
    // Without a 32-bit entry in the header this is what `Auto` takes.
    let mut vm = Vm::builder()
        .accel(Accel::Soft)
        .memory(MEMORY)
        .boot(Linux::new(image()).cmdline("quiet").entry(LinuxEntry::Auto))
        .attach(move |machine: &mut Machine| {
            let control = machine.control();
            machine.ports(REPORT as u16, 2, Arc::new(Mutex::new(report)))?;
            machine.ports(0x3f8, 8, Arc::new(Mutex::new(serial)))?;
            machine.ports(0x64, 1, Arc::new(Mutex::new(Keyboard(control))))
        })
        .build()
        .unwrap();
    let outcome = vm.run_for(std::time::Duration::from_secs(60)).unwrap();
    let reports = reports.lock().unwrap();
    assert_eq!(outcome, Outcome::Exit(0xfe), "{reports:#x?}");
    let mut expected =
        vec![0x1020, 0x1000, 0x1000, 0xe000, u16::from(b'q'), 639, 15 << 10, 15 << 10, 48 << 4];
    for entry in MemoryLayout::pc(MEMORY).e820() {
        expected.extend([entry.kind as u16, (entry.range.base >> 16) as u16]);
    }
    let key = 0x100 | u16::from(b'k');
    expected.extend([0xffff, 0x8600, 0xffff, key, key, 0, 0]);
    assert_eq!(*reports, expected, "{reports:#x?}");
    assert_eq!(*sent.lock().unwrap(), b"!");
}
