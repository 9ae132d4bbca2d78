//! Instructions are there where CPUID shows them. (A KVM cannot take them away: these tests are of the
//! software CPU alone.)

use iced_x86::code_asm::*;
use vmcore::GuestAddress;
use vmcore::backend::{Backend, VcpuExit, VcpuIo};
use vmcore::cpuid::{CpuConfig, CpuModel, Topology};
use vmcore::soft::Soft;

use crate::machine::*;

type Write = fn(&mut CodeAssembler);

/// A machine that runs `write` and halts, on a processor of `model`.
fn machine(model: CpuModel, mode: Mode, write: impl FnOnce(&mut CodeAssembler)) -> Machine {
    let backend = Soft::new();
    let mut machine = Machine::new(&backend, mode, 0, |a| {
        write(a);
        a.hlt().unwrap();
    });
    let topology = Topology { sockets: 1, cores: 1, threads: 1 };
    let config = CpuConfig { model, topology, lapic: false, tsc_khz: None };
    machine.vcpu.set_cpuid(&config.cpuid(&backend.supported_cpuid().unwrap(), 0).unwrap()).unwrap();
    machine
}

#[test]
fn what_cpuid_does_not_show_is_undefined() {
    let cases: &[(&str, Write)] = &[
        ("popcnt", |a| a.popcnt(eax, ebx).unwrap()),
        ("movbe", |a| a.movbe(eax, dword_ptr(rsp - 8)).unwrap()),
        ("crc32", |a| a.crc32(eax, ebx).unwrap()),
        ("sse3", |a| a.haddps(xmm1, xmm2).unwrap()),
        ("ssse3", |a| a.pshufb(xmm1, xmm2).unwrap()),
        ("ssse3 of mmx", |a| a.pshufb(mm1, mm2).unwrap()),
        ("sse4.1", |a| a.pmulld(xmm1, xmm2).unwrap()),
        ("sse4.2", |a| a.pcmpgtq(xmm1, xmm2).unwrap()),
        ("aes", |a| a.aesenc(xmm1, xmm2).unwrap()),
        ("pclmulqdq", |a| a.pclmulqdq(xmm1, xmm2, 0).unwrap()),
        ("sha", |a| a.sha256msg1(xmm1, xmm2).unwrap()),
        ("cmpxchg16b", |a| a.cmpxchg16b(xmmword_ptr(rsp - 32)).unwrap()),
        ("rdrand", |a| a.rdrand(eax).unwrap()),
        ("rdseed", |a| a.rdseed(eax).unwrap()),
        ("rdpid", |a| a.rdpid(rax).unwrap()),
        ("andn", |a| a.andn(eax, ebx, ecx).unwrap()),
        ("pdep", |a| a.pdep(eax, ebx, ecx).unwrap()),
        ("adcx", |a| a.adcx(eax, ebx).unwrap()),
        ("clflushopt", |a| a.clflushopt(byte_ptr(rsp)).unwrap()),
        ("clwb", |a| a.clwb(byte_ptr(rsp)).unwrap()),
        ("invpcid", |a| a.invpcid(rax, xmmword_ptr(rsp - 32)).unwrap()),
        ("stac", |a| a.stac().unwrap()),
        ("xgetbv", |a| a.xgetbv().unwrap()),
        ("rdfsbase", |a| a.rdfsbase(rax).unwrap()),
        ("lahf", |a| a.lahf().unwrap()),
    ];
    for (name, write) in cases {
        assert_eq!(machine(CpuModel::V1, Mode::Long, write).run_to_fault().vector, 6, "{name}");
    }
}

#[test]
fn what_cpuid_shows_is_there() {
    // All that the model has whatever the host.
    let mut machine = machine(CpuModel::V2, Mode::Long, |a| {
        a.mov(ebx, 0x11).unwrap();
        a.cmpxchg16b(xmmword_ptr(rsp - 32)).unwrap();
        a.lahf().unwrap();
        a.popcnt(eax, ebx).unwrap();
    });
    machine.run();
    assert!((CODE..CODE + 64).contains(&machine.regs().rip), "{:x?}", machine.regs());
    assert_eq!(machine.regs().rax & 0xff, 2);
}

/// Older processors ignore the prefix.
#[test]
fn counts_of_zeros_are_bit_scans_where_they_are_not_shown() {
    let mut machine = machine(CpuModel::V2, Mode::Long, |a| {
        a.mov(ebx, 0x80).unwrap();
        a.mov(ecx, 77).unwrap();
        a.mov(edx, 78).unwrap();
        a.xor(esi, esi).unwrap();
        a.lzcnt(eax, ebx).unwrap();
        // The destination of a bit scan of zero stays.
        a.lzcnt(ecx, esi).unwrap();
        a.tzcnt(edx, esi).unwrap();
    });
    machine.run();
    let r = machine.regs();
    assert_eq!((r.rax, r.rcx, r.rdx), (7, 77, 78));
}

/// C4 is LDS there, and with a register operand nothing at all.
#[test]
fn there_is_no_vex_in_real_mode() {
    let mut machine = Machine::with_code(&Soft::new(), Mode::Real, 0, &[0xc4, 0xe2, 0x60, 0xf2, 0xc1, 0xf4]);
    machine.vcpu.set_cpuid(&vmcore::cpuid::Cpuid::default()).unwrap();
    assert_eq!(machine.run_to_fault().vector, 6);
}

/// An embedder that computes with a rounding mode of its own, and changes it at each access.
struct Rounds {
    seen: Vec<u32>,
}

fn mxcsr() -> u32 {
    let mut value = 0u32;
    // SAFETY: writes four bytes to a local variable.
    #[expect(unsafe_code, reason = "reads a control register")]
    unsafe {
        std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut value, options(nostack));
    }
    value
}

fn set_mxcsr(value: u32) {
    // SAFETY: the tests set bits that exist.
    #[expect(unsafe_code, reason = "writes a control register")]
    unsafe {
        std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const value, options(nostack));
    }
}

impl VcpuIo for Rounds {
    fn port_read(&mut self, _: u16, _: &mut [u8]) {}
    fn port_write(&mut self, _: u16, _: &[u8]) {
        self.seen.push(mxcsr());
        // Round down, flush to zero: it is the next access's, and the embedder's after the run.
        set_mxcsr(0x1f80 | 1 << 13 | 1 << 15);
    }
    fn mmio_read(&mut self, _: GuestAddress, _: &mut [u8]) {}
    fn mmio_write(&mut self, _: GuestAddress, _: &[u8]) {}
}

#[test]
fn the_embedders_floating_point_control_is_its_own() {
    const THIRD: f64 = 1.0 / 3.0;
    let mut machine = machine(CpuModel::V2, Mode::Long, |a| {
        a.mov(eax, 1).unwrap();
        a.mov(ebx, 3).unwrap();
        for n in 0..3 {
            // Twice: the first result makes MXCSR tell of inexact ones, which the quick way waits for.
            for _ in 0..2 {
                a.cvtsi2sd(xmm0, eax).unwrap();
                a.cvtsi2sd(xmm1, ebx).unwrap();
                a.divsd(xmm0, xmm1).unwrap();
            }
            a.movsd_2(qword_ptr(DATA + 8 * n), xmm0).unwrap();
            a.out(0x80, al).unwrap();
        }
    });
    // Round up; division by zero is not masked.
    let mine = 0x1f80 & !(1 << 9) | 2 << 13;
    set_mxcsr(mine);
    let mut io = Rounds { seen: Vec::new() };
    let exit = machine.vcpu.run(&mut io);
    let after = mxcsr();
    set_mxcsr(0x1f80);
    assert_eq!(exit.unwrap(), VcpuExit::Halted);
    let changed = 0x1f80 | 1 << 13 | 1 << 15;
    assert_eq!((io.seen, after), (vec![mine, changed, changed], changed));
    for n in 0..3 {
        assert_eq!(f64::from_bits(machine.load(DATA + 8 * n)), THIRD, "{n}");
    }
}
