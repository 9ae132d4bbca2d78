//! A guest in real mode that does what is hard to do twice alike: all vCPUs take a spin lock, mix the
//! time and random numbers into memory, and are interrupted by timers, devices and each other.

use iced_x86::code_asm::*;

/// Where it is, and where the other vCPUs start.
pub const BASE: u64 = 0x8000;
const TIMER: u64 = 0x8040;
const IPI: u64 = 0x8080;
const DEVICE: u64 = 0x80c0;
const MAIN: u64 = 0x8100;
/// Write a byte here to end the guest, 4 behind it to be interrupted now, and 8 behind it to be so
/// later. Reads give the time.
pub const PORT: u16 = 0x500;
pub const DEVICE_IRQ: u32 = 5;

const LOCK: u64 = 0x6000;
const COUNT: u64 = 0x6004;
const MIX: u64 = 0x6008;
pub const TICKS: u64 = 0x6010;
pub const IPIS: u64 = 0x6014;
pub const DEVICE_TICKS: u64 = 0x6018;
pub const STARTED: u64 = 0x601c;
/// A counter of 4 bytes for each vCPU.
pub const ROUNDS: u64 = 0x6040;
const TEXT: u64 = 0x6100;
const COPY: u64 = 0x6200;

/// Critical sections to the end, of all vCPUs.
const SECTIONS: u32 = 12_000;

const TIMER_VECTOR: u32 = 0x40;
const IPI_VECTOR: u32 = 0x41;
/// The PIC's vectors begin at 8 from a PC's power-on; here they are moved.
const PIC_VECTOR: u32 = 0x50;

mod msr {
    pub const APIC_BASE: u32 = 0x1b;
    pub const ID: u32 = 0x802;
    pub const EOI: u32 = 0x80b;
    pub const SVR: u32 = 0x80f;
    pub const ICR: u32 = 0x830;
    pub const LVT_TIMER: u32 = 0x832;
    pub const INITIAL_COUNT: u32 = 0x838;
    pub const DIVIDE: u32 = 0x83e;
}

pub struct Program {
    a: CodeAssembler,
    cpus: u32,
}

impl Program {
    pub fn new(cpus: u32) -> Self {
        Self { a: CodeAssembler::new(16).unwrap(), cpus }
    }

    fn write_msr(&mut self, index: u32, value: u32) {
        self.a.mov(ecx, index).unwrap();
        self.a.mov(eax, value).unwrap();
        self.a.xor(edx, edx).unwrap();
        self.a.wrmsr().unwrap();
    }

    fn out(&mut self, port: u32, value: u32) {
        self.a.mov(dx, port).unwrap();
        self.a.mov(al, value).unwrap();
        self.a.out(dx, al).unwrap();
    }

    /// An interrupt handler that counts at `counter`, and mixes the time in.
    fn handler(&mut self, counter: u64, end: impl FnOnce(&mut Self)) {
        for register in [eax, ecx, edx] {
            self.a.push(register).unwrap();
        }
        self.a.lock().inc(dword_ptr(counter)).unwrap();
        self.a.rdtsc().unwrap();
        self.a.lock().xor(dword_ptr(MIX), eax).unwrap();
        end(self);
        for register in [edx, ecx, eax] {
            self.a.pop(register).unwrap();
        }
        self.a.iret().unwrap();
    }

    /// What `write` assembles, for address `at`.
    fn part(&self, at: u64, write: impl FnOnce(&mut Self)) -> Vec<u8> {
        let mut part = Self::new(self.cpus);
        write(&mut part);
        part.a.assemble(at).unwrap()
    }

    /// The image, for [`BASE`].
    pub fn code(self) -> Vec<u8> {
        let parts = [
            (BASE, self.part(BASE, Self::start)),
            (TIMER, self.part(TIMER, |p| p.handler(TICKS, |p| p.write_msr(msr::EOI, 0)))),
            (IPI, self.part(IPI, |p| p.handler(IPIS, |p| p.write_msr(msr::EOI, 0)))),
            (DEVICE, self.part(DEVICE, |p| p.handler(DEVICE_TICKS, |p| p.out(0x20, 0x20)))),
            (MAIN, self.part(MAIN, Self::main)),
        ];
        let mut image = Vec::new();
        for (at, code) in parts {
            let offset = usize::try_from(at - BASE).unwrap();
            assert!(image.len() <= offset);
            image.resize(offset, 0x90);
            image.extend(code);
        }
        image
    }

    fn start(&mut self) {
        // CS is 0 for the first and 0x800 for the others: from here on it is 0.
        self.a.xor(ax, ax).unwrap();
        self.a.mov(ds, ax).unwrap();
        self.a.mov(es, ax).unwrap();
        self.a.mov(ss, ax).unwrap();
        self.a.mov(sp, 0x7f00).unwrap();
        self.a.push(ax).unwrap();
        self.a.mov(ax, u32::try_from(MAIN).unwrap()).unwrap();
        self.a.push(ax).unwrap();
        self.a.retf().unwrap();
    }

    fn main(&mut self) {
        let [mut again, mut got, mut end, mut wait] = [(); 4].map(|()| self.a.create_label());
        let [mut no_ipi, mut no_halt, mut no_device] = [(); 3].map(|()| self.a.create_label());
        let cpus = self.cpus;
        // x2APIC mode. The stacks are by the APIC id.
        self.a.mov(ecx, msr::APIC_BASE).unwrap();
        self.a.rdmsr().unwrap();
        self.a.or(eax, 0xc00).unwrap();
        self.a.wrmsr().unwrap();
        self.a.mov(ecx, msr::ID).unwrap();
        self.a.rdmsr().unwrap();
        self.a.mov(ebp, eax).unwrap();
        self.a.shl(eax, 8).unwrap();
        self.a.sub(sp, ax).unwrap();
        for (vector, handler) in [(TIMER_VECTOR, TIMER), (IPI_VECTOR, IPI), (PIC_VECTOR + 5, DEVICE)] {
            self.a.mov(word_ptr(4 * vector), u32::try_from(handler).unwrap()).unwrap();
            self.a.mov(word_ptr(4 * vector + 2), 0).unwrap();
        }
        self.a.lock().inc(dword_ptr(STARTED)).unwrap();
        self.write_msr(msr::SVR, 0x1ff);
        self.write_msr(msr::DIVIDE, 0xb);
        self.write_msr(msr::LVT_TIMER, 1 << 17 | TIMER_VECTOR);
        self.a.imul_3(eax, ebp, 17).unwrap();
        self.a.add(eax, 3001).unwrap();
        self.a.mov(ecx, msr::INITIAL_COUNT).unwrap();
        self.a.xor(edx, edx).unwrap();
        self.a.wrmsr().unwrap();
        self.a.test(ebp, ebp).unwrap();
        self.a.jne(wait).unwrap();
        // The first one sets up the PIC and starts the others.
        for (port, value) in [(0x20, 0x11), (0x21, PIC_VECTOR), (0x21, 4), (0x21, 1), (0x21, 0xdf)] {
            self.out(port, value);
        }
        self.write_msr(msr::ICR, 0xc_4500);
        self.write_msr(msr::ICR, 0xc_4608);
        self.a.set_label(&mut wait).unwrap();
        self.a.cmp(dword_ptr(STARTED), cpus).unwrap();
        self.a.jne(wait).unwrap();
        self.a.sti().unwrap();

        self.a.set_label(&mut again).unwrap();
        self.a.mov(al, 1).unwrap();
        self.a.xchg(byte_ptr(LOCK), al).unwrap();
        self.a.test(al, al).unwrap();
        self.a.je(got).unwrap();
        self.a.pause().unwrap();
        self.a.jmp(again).unwrap();
        self.a.set_label(&mut got).unwrap();
        self.a.rdtsc().unwrap();
        self.a.rol(dword_ptr(MIX), 5).unwrap();
        self.a.add(dword_ptr(MIX), eax).unwrap();
        self.a.rdrand(eax).unwrap();
        self.a.xor(dword_ptr(MIX + 4), eax).unwrap();
        // Long enough to be interrupted in.
        self.a.cld().unwrap();
        self.a.mov(si, u32::try_from(TEXT).unwrap()).unwrap();
        self.a.mov(di, u32::try_from(COPY).unwrap()).unwrap();
        self.a.mov(cx, 64).unwrap();
        self.a.rep().movsb().unwrap();
        self.a.inc(dword_ptr(COUNT)).unwrap();
        self.a.mov(ebx, dword_ptr(COUNT)).unwrap();
        self.a.mov(dword_ptr(TEXT), ebx).unwrap();
        self.a.mov(byte_ptr(LOCK), 0).unwrap();
        self.a.inc(dword_ptr(ROUNDS + ebp * 4)).unwrap();
        self.a.cmp(ebx, SECTIONS).unwrap();
        self.a.jae(end).unwrap();
        self.a.test(bl, 0x7f).unwrap();
        self.a.jne(no_ipi).unwrap();
        self.write_msr(msr::ICR, 0xc_4000 | IPI_VECTOR);
        self.a.set_label(&mut no_ipi).unwrap();
        self.a.test(bl, 0x3f).unwrap();
        self.a.jne(no_device).unwrap();
        self.a.mov(dx, u32::from(PORT)).unwrap();
        self.a.in_(eax, dx).unwrap();
        self.a.xor(dword_ptr(MIX), eax).unwrap();
        self.out(u32::from(PORT) + 4, 1);
        self.out(u32::from(PORT) + 8, 33);
        self.a.set_label(&mut no_device).unwrap();
        self.a.test(bl, 0xf).unwrap();
        self.a.jne(no_halt).unwrap();
        self.a.hlt().unwrap();
        self.a.set_label(&mut no_halt).unwrap();
        self.a.jmp(again).unwrap();

        self.a.set_label(&mut end).unwrap();
        self.out(PORT.into(), 7);
        self.a.jmp(again).unwrap();
    }
}
