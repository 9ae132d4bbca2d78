//! What the host cannot be asked about: other modes, segments, faults in the middle, several vCPUs.
#![expect(clippy::cast_possible_truncation, reason = "test data is cut to its size")]

use std::sync::Arc;

use iced_x86::code_asm::CodeAssembler;

use crate::backend::{BackendConfig, BackendVcpu, BackendVm, Slot, VcpuExit, VcpuIo};
use crate::memory::{GuestAddress, GuestMemory, MemoryRegion};
use crate::soft::cpu::{CS, Cpu, DS, ES, SS, cr0, efer, flags};
use crate::soft::link::Link;
use crate::soft::vcpu::SoftVcpu;
use crate::soft::vm::SoftVm;
use crate::state::Segment;

const CODE: u64 = 0x1000;
const STACK: u64 = 0x8000;
const MEMORY: u64 = 8 << 20;
pub(super) const DATA: u64 = 0x10_0000;

const RAX: usize = 0;
pub(super) const RCX: usize = 1;
const RDX: usize = 2;
pub(super) const RBX: usize = 3;
const RSP: usize = 4;
const RBP: usize = 5;
pub(super) const RSI: usize = 6;
pub(super) const RDI: usize = 7;

/// There are no devices.
struct NoIo;
impl VcpuIo for NoIo {
    fn port_read(&mut self, _: u16, _: &mut [u8]) {
        panic!("no devices");
    }
    fn port_write(&mut self, _: u16, _: &[u8]) {
        panic!("no devices");
    }
    fn mmio_read(&mut self, at: GuestAddress, _: &mut [u8]) {
        panic!("read at {:#x}", at.0);
    }
    fn mmio_write(&mut self, at: GuestAddress, _: &[u8]) {
        panic!("write at {:#x}", at.0);
    }
}

pub(super) struct Program {
    vm: SoftVm,
    memory: GuestMemory,
    vcpu: SoftVcpu,
}

impl Program {
    pub(super) fn new(bits: u32, write: impl FnOnce(&mut CodeAssembler)) -> Self {
        let vm = SoftVm::new(&BackendConfig { irqchip: false }).unwrap();
        let region = Arc::new(MemoryRegion::anonymous(GuestAddress(0), MEMORY).unwrap());
        vm.map(Slot(0), region.clone()).unwrap();
        let memory = GuestMemory::new();
        memory.insert(region).unwrap();
        let vcpu = SoftVcpu::new(vm.machine(), Link::new(0));
        let mut program = Self { vm, memory, vcpu };
        program.write(bits, CODE, write);
        Self::enter(&mut program.vcpu.cpu, bits);
        program
    }

    fn write(&self, bits: u32, at: u64, write: impl FnOnce(&mut CodeAssembler)) {
        let mut code = CodeAssembler::new(bits).unwrap();
        write(&mut code);
        self.put(at, &code.assemble(at).unwrap());
    }

    fn enter(cpu: &mut Cpu, bits: u32) {
        if bits == 16 {
            for n in [ES, SS, DS] {
                cpu.set_segment(n, Segment::real_mode(0, false));
            }
            cpu.set_segment(CS, Segment::real_mode(0, true));
        } else {
            cpu.cr0 |= cr0::PE;
            let data = Segment { limit: u32::MAX, kind: 3, big: true, ..Segment::real_mode(0, false) };
            for n in [ES, SS, DS] {
                cpu.set_segment(n, data);
            }
            let long = bits == 64;
            if long {
                cpu.efer = efer::LME | efer::LMA;
            }
            cpu.set_segment(CS, Segment { kind: 11, long, big: !long, ..data });
        }
        // No exception can be delivered.
        cpu.idt.limit = 0;
        cpu.paging_changed();
        cpu.set_rip(CODE);
        cpu.set_r64(RSP, STACK);
    }

    pub(super) fn set(&mut self, r: usize, value: u64) -> &mut Self {
        self.vcpu.cpu.set_r64(r, value);
        self
    }

    fn r(&self, r: usize) -> u64 {
        self.vcpu.cpu.r64(r)
    }

    /// Runs to a HLT.
    pub(super) fn run(&mut self) -> &mut Self {
        let exit = self.vcpu.run(&mut NoIo).unwrap();
        assert!(matches!(exit, VcpuExit::Halted), "{exit:?} at {:#x}", self.vcpu.cpu.rip());
        self
    }

    /// Runs into an exception, which no handler is there for.
    fn fault(&mut self) -> u64 {
        let exit = self.vcpu.run(&mut NoIo).unwrap();
        assert!(matches!(exit, VcpuExit::TripleFault), "{exit:?}");
        self.vcpu.cpu.rip()
    }

    /// Runs 64-bit code at `rip` with `registers` (but RSP) to a HLT or a fault, in single steps if
    /// `single`. Returns the registers with RIP and RFLAGS, and whether it was a fault.
    pub(super) fn run_from(&mut self, rip: u64, registers: &[u64; 16], single: bool) -> (Vec<u64>, bool) {
        Self::enter(&mut self.vcpu.cpu, 64);
        (0..16).filter(|&r| r != RSP).for_each(|r| self.vcpu.cpu.set_r64(r, registers[r]));
        self.vcpu.cpu.set_rflags(2);
        self.vcpu.cpu.set_rip(rip);
        self.vcpu.debug.single_step = single;
        let fault = loop {
            match self.vcpu.run(&mut NoIo).unwrap() {
                VcpuExit::Debug { .. } if single => {}
                VcpuExit::Halted => break false,
                VcpuExit::TripleFault => break true,
                other => panic!("{other:?} at {:#x}", self.vcpu.cpu.rip()),
            }
        };
        let cpu = &self.vcpu.cpu;
        ((0..16).map(|r| cpu.r64(r)).chain([cpu.rip(), cpu.rflags()]).collect(), fault)
    }

    /// What the decoded blocks take, and may take, in bytes.
    pub(super) fn size_of_blocks(&self) -> (usize, usize) {
        self.vcpu.cpu.blocks.size()
    }

    pub(super) fn instructions(&self) -> u64 {
        self.vcpu.cpu.instructions
    }

    pub(super) fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read(GuestAddress(at), &mut bytes).unwrap();
        bytes
    }

    pub(super) fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.write(GuestAddress(at), bytes).unwrap();
    }

    fn fill(&self, at: u64, len: usize) -> Vec<u8> {
        let bytes: Vec<u8> = (0..len).map(|n| (n * 7 + n / 251) as u8).collect();
        self.put(at, &bytes);
        bytes
    }
}

/// Runs straight code in 16-bit mode with AX as given; AX and the flags afterwards.
fn adjust(ax: u16, write: impl FnOnce(&mut CodeAssembler)) -> (u16, u64) {
    let mut program = Program::new(16, |a| {
        write(a);
        a.hlt().unwrap();
    });
    program.set(RAX, ax.into()).run();
    (program.r(RAX) as u16, program.vcpu.cpu.rflags())
}

#[test]
fn decimal_adjustments_reckon_in_decimal() {
    use iced_x86::code_asm::*;
    let bcd = |n: u16| ((n / 10) << 4) | (n % 10);
    for (a, b) in [(0, 0), (9, 1), (15, 27), (50, 50), (99, 1), (99, 99), (38, 45), (88, 44), (90, 9)] {
        let (result, flags) = adjust(bcd(a), |c| {
            c.add(al, bcd(b) as i32).unwrap();
            c.daa().unwrap();
        });
        assert_eq!((result & 0xff, flags & flags::CF != 0), (bcd((a + b) % 100), a + b > 99), "{a} + {b}");
        let (result, flags) = adjust(bcd(a), |c| {
            c.sub(al, bcd(b) as i32).unwrap();
            c.das().unwrap();
        });
        assert_eq!((result & 0xff, flags & flags::CF != 0), (bcd((100 + a - b) % 100), a < b), "{a} - {b}");
    }
    for a in 0..10u16 {
        for b in 0..10u16 {
            let (result, flags) = adjust(a, |c| {
                c.add(al, i32::from(b)).unwrap();
                c.aaa().unwrap();
            });
            assert_eq!(result, (((a + b) / 10) << 8) | ((a + b) % 10));
            assert_eq!(flags & flags::CF != 0, a + b > 9);
            let (result, flags) = adjust(0x500 | a, |c| {
                c.sub(al, i32::from(b)).unwrap();
                c.aas().unwrap();
            });
            let expected = if a < b { 0x400 | (10 + a - b) } else { 0x500 | (a - b) };
            assert_eq!((result, flags & flags::CF != 0), (expected, a < b));
            let (result, _) = adjust(a * b, |c| c.aam(10).unwrap());
            assert_eq!(result, (((a * b) / 10) << 8) | ((a * b) % 10));
            let (result, _) = adjust((a << 8) | b, |c| c.aad(10).unwrap());
            assert_eq!(result, 10 * a + b);
        }
    }
    let mut program = Program::new(16, |c| c.aam(0).unwrap());
    assert_eq!(program.fault(), CODE);
    assert_eq!(program.r(RSP), STACK);
}

#[test]
fn sixteen_bit_pointers_wrap() {
    use iced_x86::code_asm::*;
    let mut program = Program::new(16, |a| {
        a.rep().stosb().unwrap();
        a.hlt().unwrap();
    });
    program.set(RAX, 0xaa).set(RCX, 0x1_0050).set(RDI, 0x7777_ffe0).run();
    assert_eq!((program.r(RCX), program.r(RDI)), (0x1_0000, 0x7777_0030));
    assert_eq!(program.bytes(0xffe0, 32), [0xaa; 32]);
    assert_eq!(program.bytes(0x10000, 4), [0; 4]);
    assert_eq!(program.bytes(0, 0x31), [vec![0xaa; 0x30], vec![0]].concat());

    // An element that does not fit the segment faults, after those that do.
    let mut program = Program::new(16, |a| {
        a.rep().stosd().unwrap();
        a.hlt().unwrap();
    });
    program.set(RAX, u64::MAX).set(RCX, 0x20).set(RDI, 0xffc2);
    assert_eq!(program.fault(), CODE);
    assert_eq!((program.r(RCX), program.r(RDI)), (0x11, 0xfffe));
    assert_eq!(program.bytes(0xffc2, 0x3e), [vec![0xff; 0x3c], vec![0; 2]].concat());

    // The pointers of 32 bits reach beyond the limit.
    let mut program = Program::new(16, |a| {
        a.mov(ax, word_ptr(ebx)).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(program.set(RBX, 0x10000).fault(), CODE);
}

#[test]
fn frames_and_calls_of_sixteen_bits() {
    use iced_x86::code_asm::*;
    let mut program = Program::new(16, |a| {
        let mut function = a.create_label();
        let mut over = a.create_label();
        a.push(0x1234).unwrap();
        a.pusha().unwrap();
        a.mov(ax, 5).unwrap();
        a.popa().unwrap();
        a.call(function).unwrap();
        a.pop(cx).unwrap();
        a.jmp(over).unwrap();
        a.nop().unwrap();
        a.set_label(&mut function).unwrap();
        a.enter(0x20, 2).unwrap();
        a.mov(dx, sp).unwrap();
        a.leave().unwrap();
        a.ret_1(0).unwrap();
        a.set_label(&mut over).unwrap();
        a.hlt().unwrap();
    });
    program.set(RAX, 0xaaaa_1111).set(RBP, 0x5555_0100).set(RSP, 0xffff_8000).run();
    assert_eq!(program.r(RAX), 0xaaaa_1111);
    assert_eq!(program.r(RCX), 0x1234);
    // The return address, BP, the outer frame's pointer, this frame's, and the locals.
    assert_eq!(program.r(RDX) & 0xffff, 0x8000 - 2 - 2 - 2 - 2 - 2 - 0x20);
    assert_eq!((program.r(RSP), program.r(RBP)), (0xffff_8000, 0x5555_0100));
    assert_eq!(program.bytes(0x7ffe, 2), [0x34, 0x12]);
}

#[test]
fn branches_stay_in_the_segment() {
    use iced_x86::code_asm::*;
    let mut program = Program::new(16, |a| {
        a.mov(eax, 0x12345).unwrap();
        a.jmp(eax).unwrap();
    });
    assert_eq!(program.fault(), CODE + 6);
    // Of a 16-bit operand size the target is cut.
    let mut program = Program::new(32, |a| {
        a.mov(eax, 0x12_2000).unwrap();
        a.jmp(ax).unwrap();
    });
    program.write(32, 0x2000, |a| a.hlt().unwrap());
    program.run();
    // What may not be entered has not been called.
    let mut program = Program::new(64, |a| {
        a.mov(rax, 0x8000_0000_0000_0000u64).unwrap();
        a.call(rax).unwrap();
    });
    assert_eq!((program.fault(), program.r(RSP)), (CODE + 10, STACK));
    let mut program = Program::new(64, |a| {
        a.push(rbx).unwrap();
        a.ret().unwrap();
    });
    assert_eq!(program.set(RBX, 1 << 63).fault(), CODE + 1);
    assert_eq!(program.r(RSP), STACK - 8);
}

#[test]
fn counters_have_the_address_size() {
    use iced_x86::code_asm::*;
    let mut program = Program::new(32, |a| {
        let mut again = a.create_label();
        let mut done = a.create_label();
        a.set_label(&mut again).unwrap();
        a.inc(eax).unwrap();
        a.loop_(again).unwrap();
        a.mov(ecx, 0x10000).unwrap();
        a.jcxz(done).unwrap();
        a.mov(eax, 0).unwrap();
        a.set_label(&mut done).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(program.set(RAX, 0).set(RCX, 0x1_0003).run().r(RAX), 0x1_0003);
}

#[test]
fn bit_offsets_reach_backwards() {
    use iced_x86::code_asm::*;
    let mut program = Program::new(16, |a| {
        a.bts(word_ptr(bx), ax).unwrap();
        a.hlt().unwrap();
    });
    program.set(RAX, 0xffff).set(RBX, 0x4000).run();
    assert_eq!(program.bytes(0x3ffc, 6), [0, 0, 0, 0x80, 0, 0]);
}

#[test]
fn bound_checks_signed_limits() {
    use iced_x86::code_asm::*;
    let mut program = Program::new(32, |a| {
        a.bound(eax, dword_ptr(ebx)).unwrap();
        a.mov(eax, 6).unwrap();
        a.bound(eax, dword_ptr(ebx)).unwrap();
    });
    program.put(0x4000, &(-3i32).to_le_bytes());
    program.put(0x4004, &5i32.to_le_bytes());
    program.set(RAX, (-3i32).cast_unsigned().into()).set(RBX, 0x4000);
    assert_eq!(program.fault(), CODE + 7);
}

#[test]
fn copies_are_as_if_byte_by_byte() {
    let program = || {
        Program::new(64, |a| {
            a.rep().movsb().unwrap();
            a.hlt().unwrap();
        })
    };
    // Longer than what is done at one go, and not aligned.
    let mut long = program();
    let source = long.fill(DATA + 3, 300_001);
    long.set(RCX, 300_001).set(RSI, DATA + 3).set(RDI, 0x20_0001).run();
    assert_eq!((long.r(RCX), long.r(RSI), long.r(RDI)), (0, DATA + 3 + 300_001, 0x20_0001 + 300_001));
    assert!(long.bytes(0x20_0001, 300_001) == source);
    assert_eq!(long.bytes(0x20_0000, 1), [0]);
    for distance in [1, 2, 7, 8, 63, 4096, 5000] {
        let mut over = program();
        let mut expected = over.fill(DATA, 40_000);
        for n in 0..20_000 {
            expected[n + distance] = expected[n];
        }
        over.set(RCX, 20_000).set(RSI, DATA).set(RDI, DATA + distance as u64).run();
        assert!(over.bytes(DATA, 40_000) == expected, "{distance}");
        let mut under = program();
        let mut expected = under.fill(DATA, 40_000);
        for n in 0..20_000 {
            expected[n] = expected[n + distance];
        }
        under.set(RCX, 20_000).set(RSI, DATA + distance as u64).set(RDI, DATA).run();
        assert!(under.bytes(DATA, 40_000) == expected, "{distance}");
    }
    // Words that overlap by less than one.
    let mut words = Program::new(64, |a| {
        a.rep().movsq().unwrap();
        a.hlt().unwrap();
    });
    let mut expected = words.fill(DATA, 9000);
    for n in (0..8000).step_by(8) {
        expected.copy_within(n..n + 8, n + 3);
    }
    words.set(RCX, 1000).set(RSI, DATA).set(RDI, DATA + 3).run();
    assert!(words.bytes(DATA, 9000) == expected);
}

#[test]
fn strings_go_backwards() {
    let mut program = Program::new(64, |a| {
        a.std().unwrap();
        a.rep().movsd().unwrap();
        a.hlt().unwrap();
    });
    let source = program.fill(DATA, 40_000);
    program.set(RCX, 10_000).set(RSI, DATA + 39_996).set(RDI, DATA + 40_996).run();
    assert_eq!((program.r(RCX), program.r(RSI), program.r(RDI)), (0, DATA - 4, DATA + 996));
    assert!(program.bytes(DATA + 1000, 40_000) == source);
}

#[test]
fn fills_have_any_pattern() {
    use iced_x86::code_asm::*;
    for value in [0u64, 0x0101_0101_0101_0101, 0x1234_5678_9abc_def0] {
        let mut program = Program::new(64, |a| {
            a.rep().stosq().unwrap();
            a.rep().stosb().unwrap();
            a.mov(ecx, 3).unwrap();
            a.rep().stosw().unwrap();
            a.hlt().unwrap();
        });
        program.set(RAX, value).set(RCX, 20_000).set(RDI, DATA + 5).run();
        let mut expected = value.to_le_bytes().repeat(20_000);
        expected.extend(value.to_le_bytes()[..2].repeat(3));
        assert!(program.bytes(DATA + 5, expected.len()) == expected);
        assert_eq!(program.bytes(DATA + 5 + 160_006, 1), [0]);
    }
}

#[test]
fn scans_end_where_they_find() {
    use iced_x86::code_asm::*;
    let mut program = Program::new(64, |a| {
        a.repne().scasb().unwrap();
        a.mov(r8, rcx).unwrap();
        a.mov(rdi, rbx).unwrap();
        a.mov(ecx, 30_000).unwrap();
        a.repe().cmpsb().unwrap();
        a.hlt().unwrap();
    });
    program.put(DATA, &[7; 30_000]);
    program.put(DATA + 20_000, &[8]);
    program.put(0x20_0000, &[7; 30_000]);
    program.set(RAX, 8).set(RCX, 30_000).set(RDI, DATA).set(RBX, DATA).set(RSI, 0x20_0000).run();
    assert_eq!(program.r(8), 30_000 - 20_001);
    assert_eq!((program.r(RCX), program.r(RDI)), (30_000 - 20_001, DATA + 20_001));
    assert_eq!(program.vcpu.cpu.rflags() & flags::CF, flags::CF);
}

/// Turns on 32-bit paging, all pages at their own addresses, with `missing` not present.
fn page(program: &mut Program, missing: u64) {
    const DIRECTORY: u64 = 0x3f_0000;
    const TABLE: u64 = 0x3f_1000;
    for page in 0..1024u64 {
        let entry = (page << 12 | u64::from(page << 12 != missing) | 2) as u32;
        program.put(TABLE + 4 * page, &entry.to_le_bytes());
    }
    program.put(DIRECTORY, &(TABLE as u32 | 3).to_le_bytes());
    let cpu = &mut program.vcpu.cpu;
    cpu.cr3 = DIRECTORY;
    cpu.cr0 |= cr0::PG;
    cpu.paging_changed();
}

#[test]
fn a_fault_leaves_what_is_done() {
    use iced_x86::code_asm::*;
    let mut program = Program::new(32, |a| {
        a.rep().movsd().unwrap();
        a.hlt().unwrap();
    });
    page(&mut program, DATA + 0x2000);
    let source = program.fill(0x20_0000, 0x4000);
    // The last element before the missing page reaches into it.
    program.set(RCX, 0x1000).set(RSI, 0x20_0000).set(RDI, DATA + 2);
    assert_eq!(program.fault(), CODE);
    let done = (0x2000 - 2) / 4;
    assert_eq!(program.r(RCX), 0x1000 - done);
    assert_eq!(program.r(RSI), 0x20_0000 + 4 * done);
    assert_eq!(program.r(RDI), DATA + 2 + 4 * done);
    assert_eq!(program.vcpu.cpu.cr2, DATA + 0x2000);
    assert!(program.bytes(DATA + 2, 0x1ffc) == source[..0x1ffc]);
    assert_eq!(program.bytes(DATA + 0x1ffe, 2), [0, 0]);

    // A comparison has not changed the flags.
    let mut program = Program::new(32, |a| {
        a.cmp(eax, eax).unwrap();
        a.repne().scasb().unwrap();
        a.hlt().unwrap();
    });
    page(&mut program, DATA + 0x2000);
    program.set(RAX, 1).set(RCX, 0x1000).set(RDI, DATA + 0x1ff0);
    assert_eq!(program.fault(), CODE + 2);
    assert_eq!((program.r(RCX), program.r(RDI)), (0xff0, DATA + 0x2000));
    assert_ne!(program.vcpu.cpu.rflags() & flags::ZF, 0);
}

#[test]
fn a_fault_changes_nothing() {
    use iced_x86::code_asm::*;
    // POP to memory that is not there, and a push of many.
    let mut program = Program::new(32, |a| a.pop(dword_ptr(ebx)).unwrap());
    page(&mut program, DATA);
    program.set(RBX, DATA);
    assert_eq!((program.fault(), program.r(RSP)), (CODE, STACK));
    let mut program = Program::new(32, |a| a.pushad().unwrap());
    page(&mut program, DATA);
    program.set(RSP, DATA + 0x1010).put(DATA + 0x1000, &[9; 16]);
    assert_eq!((program.fault(), program.r(RSP)), (CODE, DATA + 0x1010));
    assert_eq!(program.bytes(DATA + 0x1000, 16), [9; 16]);
    let mut program = Program::new(32, |a| a.xadd(dword_ptr(ebx), ecx).unwrap());
    page(&mut program, DATA);
    program.set(RBX, DATA + 0xfff).set(RCX, 5);
    assert_eq!((program.fault(), program.r(RCX)), (CODE, 5));
    assert_eq!(program.vcpu.cpu.cr2, DATA + 0xfff);
}

#[test]
fn locked_operations_of_two_vcpus_all_count() {
    use iced_x86::code_asm::*;
    const TIMES: u32 = 200_000;
    let mut first = Program::new(64, |a| {
        let mut again = a.create_label();
        a.mov(ecx, TIMES).unwrap();
        a.mov(ebx, DATA as u32).unwrap();
        a.set_label(&mut again).unwrap();
        a.lock().inc(dword_ptr(rbx)).unwrap();
        a.mov(eax, 1).unwrap();
        a.lock().xadd(qword_ptr(rbx + 8), rax).unwrap();
        a.lock().bts(dword_ptr(rbx + 20), 3).unwrap();
        a.lock().add(word_ptr(rbx + 16), 3).unwrap();
        a.loop_(again).unwrap();
        // CMPXCHG16B as a counter.
        a.mov(edi, TIMES).unwrap();
        a.mov(esi, ebx).unwrap();
        let mut next = a.create_label();
        let mut retry = a.create_label();
        a.set_label(&mut next).unwrap();
        a.mov(rax, qword_ptr(rsi + 32)).unwrap();
        a.mov(rdx, qword_ptr(rsi + 40)).unwrap();
        a.set_label(&mut retry).unwrap();
        a.lea(rbx, ptr(rax + 1)).unwrap();
        a.lea(rcx, ptr(rdx + 2)).unwrap();
        a.lock().cmpxchg16b(xmmword_ptr(rsi + 32)).unwrap();
        a.jne(retry).unwrap();
        a.dec(edi).unwrap();
        a.jne(next).unwrap();
        a.hlt().unwrap();
    });
    let mut second = SoftVcpu::new(first.vm.machine(), Link::new(1));
    Program::enter(&mut second.cpu, 64);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let exit = second.run(&mut NoIo).unwrap();
            assert!(matches!(exit, VcpuExit::Halted), "{exit:?}");
        });
        first.run();
    });
    let word = |at: u64| u64::from_le_bytes(first.bytes(at, 8).try_into().unwrap());
    assert_eq!(word(DATA) as u32, 2 * TIMES);
    assert_eq!(word(DATA + 8), u64::from(2 * TIMES));
    assert_eq!(word(DATA + 16) as u16, (6 * TIMES) as u16);
    assert_eq!(word(DATA + 20) as u32, 8);
    assert_eq!((word(DATA + 32), word(DATA + 40)), (u64::from(2 * TIMES), u64::from(4 * TIMES)));
}
