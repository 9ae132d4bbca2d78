//! A small machine with everything that privileges need: descriptors of every kind, a TSS, an IDT
//! whose every handler is a HLT, page tables with pages of every right.

use std::sync::Arc;

use iced_x86::code_asm::CodeAssembler;
use vmcore::backend::{Backend, BackendConfig, BackendVcpu, BackendVm, Slot, VcpuExit};
use vmcore::state::{DescriptorTable, Regs, Segment, Sregs};
use vmcore::{GuestAddress, GuestMemory, MemoryRegion};

use crate::guest::{Access, Recorder};

pub const CODE: u64 = 0x1_0000;
/// Handler `n` is a HLT at this plus 16 `n`.
pub const HANDLERS: u64 = 0x2_0000;
pub const GDT: u64 = 0x500;
pub const IDT: u64 = 0x1000;
pub const TSS: u64 = 0x2000;
pub const STACK: u64 = 0x9000;
pub const USER_STACK: u64 = 0xa000;
/// The stack of level 0 in the TSS.
pub const INNER_STACK: u64 = 0xb000;
/// Interrupt stack 1 in the TSS.
pub const IST1: u64 = 0xc000;
/// For the tests' own use.
pub const DATA: u64 = 0x3_0000;
/// Pages with a right missing (from here on by pages of 4 KiB).
pub const SUPERVISOR_PAGE: u64 = 0x20_0000;
pub const READ_ONLY_PAGE: u64 = 0x20_1000;
pub const ABSENT_PAGE: u64 = 0x20_2000;
pub const NO_EXECUTE_PAGE: u64 = 0x20_3000;
pub const RESERVED_PAGE: u64 = 0x20_4000;
pub const GOOD_PAGE: u64 = 0x20_5000;
const PAGE_TABLES: u64 = 0x30_0000;

pub const CODE64: u16 = 0x08;
pub const KERNEL_DATA: u16 = 0x10;
pub const CODE32: u16 = 0x18;
pub const CODE16: u16 = 0x20;
pub const DATA16: u16 = 0x28;
pub const USER_CODE32: u16 = 0x30;
pub const USER_DATA: u16 = 0x38;
pub const USER_CODE64: u16 = 0x40;
pub const TASK: u16 = 0x48;
/// A code segment that is not present.
pub const ABSENT: u16 = 0x58;
/// A data segment of level 0 that cannot be written.
pub const READ_ONLY: u16 = 0x60;
/// A conforming code segment of level 0.
pub const CONFORMING: u16 = 0x68;
/// For the tests' own use: 16 bytes, and up to the table's end.
pub const SPARE: u16 = 0x70;
pub const GDT_LIMIT: u16 = 0xff;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Real,
    Protected,
    Long,
}

/// What an exception's handler found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub vector: u64,
    pub code: Option<u64>,
    pub rip: u64,
    pub cs: u64,
    pub flags: u64,
    /// RSP and SS, where they were pushed.
    pub stack: Option<(u64, u64)>,
}

pub struct Machine {
    pub _vm: Arc<dyn BackendVm>,
    pub vcpu: Box<dyn BackendVcpu>,
    pub memory: GuestMemory,
    pub mode: Mode,
}

/// Whether exception `vector` has an error code.
fn has_code(vector: u64) -> bool {
    matches!(vector, 8 | 10..=14 | 17)
}

impl Machine {
    /// A machine at [`CODE`] with privilege `cpl`, without interrupts.
    pub fn new(backend: &dyn Backend, mode: Mode, cpl: u8, write: impl FnOnce(&mut CodeAssembler)) -> Self {
        let bitness = match mode {
            Mode::Real => 16,
            Mode::Protected => 32,
            Mode::Long => 64,
        };
        let mut code = CodeAssembler::new(bitness).unwrap();
        write(&mut code);
        let bytes = code.assemble(if mode == Mode::Real { 0 } else { CODE }).unwrap();
        Self::with_code(backend, mode, cpl, &bytes)
    }

    pub fn with_code(backend: &dyn Backend, mode: Mode, cpl: u8, code: &[u8]) -> Self {
        let region = Arc::new(MemoryRegion::anonymous(GuestAddress(0), 4 << 20).unwrap());
        let memory = GuestMemory::new();
        memory.insert(region.clone()).unwrap();
        let vm = backend.create_vm(&BackendConfig::default()).unwrap();
        vm.map(Slot(0), region).unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        vcpu.set_cpuid(&backend.supported_cpuid().unwrap()).unwrap();
        let mut machine = Self { _vm: vm, vcpu, memory, mode };
        machine.write(CODE, code);
        machine.write_tables();
        let sregs = machine.sregs(cpl);
        machine.vcpu.set_sregs(&sregs).unwrap();
        let rip = if mode == Mode::Real { 0 } else { CODE };
        let rsp = if cpl == 3 { USER_STACK } else { STACK };
        machine.vcpu.set_regs(&Regs { rip, rsp, rflags: 2, ..Regs::default() }).unwrap();
        machine
    }

    fn sregs(&self, cpl: u8) -> Sregs {
        let mut s = self.vcpu.sregs().unwrap();
        s.gdt = DescriptorTable { base: GDT, limit: GDT_LIMIT };
        if self.mode == Mode::Real {
            s.cs = Segment::real_mode(0x1000, true);
            for data in [&mut s.ds, &mut s.es, &mut s.ss, &mut s.fs, &mut s.gs] {
                *data = Segment::real_mode(0, false);
            }
            s.idt = DescriptorTable { base: 0, limit: 0x3ff };
            return s;
        }
        let long = self.mode == Mode::Long;
        let (code, data) = match (cpl, long) {
            (3, true) => (USER_CODE64 | 3, USER_DATA | 3),
            (3, false) => (USER_CODE32 | 3, USER_DATA | 3),
            (_, true) => (CODE64, KERNEL_DATA),
            (_, false) => (CODE32, KERNEL_DATA),
        };
        s.cs = if long { Segment::long_code(code) } else { Segment::flat(code, true) };
        s.cs.dpl = cpl;
        for segment in [&mut s.ds, &mut s.es, &mut s.ss, &mut s.fs, &mut s.gs] {
            *segment = Segment { dpl: cpl, ..Segment::flat(data, false) };
        }
        s.tr = Segment {
            selector: TASK,
            base: TSS,
            limit: 0x2067,
            kind: 0xb,
            present: true,
            ..Segment::default()
        };
        s.idt = DescriptorTable { base: IDT, limit: 0xfff };
        s.cr0 = 1 | 1 << 4 | 1 << 5 | 1 << 16;
        s.cr4 = 1 << 9;
        if long {
            s.cr0 |= 1 << 31;
            s.cr3 = PAGE_TABLES;
            s.cr4 |= 1 << 5;
            // SCE, LME, LMA, NXE.
            s.efer = 1 | 1 << 8 | 1 << 10 | 1 << 11;
        }
        s
    }

    fn write_tables(&self) {
        let long = self.mode == Mode::Long;
        for (selector, descriptor) in [
            (CODE64, 0x00af_9b00_0000_ffff),
            (KERNEL_DATA, 0x00cf_9300_0000_ffff),
            (CODE32, 0x00cf_9b00_0000_ffff),
            (CODE16, 0x0000_9b01_0000_ffff),
            (DATA16, 0x0000_9300_0000_ffff),
            (USER_CODE32, 0x00cf_fb00_0000_ffff),
            (USER_DATA, 0x00cf_f300_0000_ffff),
            (USER_CODE64, 0x00af_fb00_0000_ffff),
            (TASK, 0x0000_8b00_0000_2067 | TSS << 16),
            (ABSENT, 0x00cf_1b00_0000_ffff),
            (READ_ONLY, 0x00cf_9100_0000_ffff),
            (CONFORMING, if long { 0x00af_9f00_0000_ffff } else { 0x00cf_9f00_0000_ffff }),
        ] {
            self.set_descriptor(selector, descriptor);
        }
        for vector in 0..=255 {
            let handler = HANDLERS + 16 * vector;
            self.write(handler, &[0xf4]);
            // INT 0x80 and INT3 are for everybody.
            let dpl = if matches!(vector, 3 | 4 | 0x80) { 3 } else { 0 };
            self.set_gate(vector, handler, 0x8e | dpl << 5, 0);
        }
        if long {
            self.store(TSS + 4, INNER_STACK);
            self.store(TSS + 36, IST1);
        } else {
            self.write(TSS + 4, &(INNER_STACK as u32).to_le_bytes());
            self.write(TSS + 8, &KERNEL_DATA.to_le_bytes());
        }
        // No bitmap: it begins behind the limit.
        self.write(TSS + 102, &0x2068u16.to_le_bytes());
        let (pdpt, directory, table) = (PAGE_TABLES + 0x1000, PAGE_TABLES + 0x2000, PAGE_TABLES + 0x3000);
        self.store(PAGE_TABLES, pdpt | 7);
        self.store(pdpt, directory | 7);
        self.store(directory, 0x87);
        self.store(directory + 8, table | 7);
        for n in 0..512 {
            let at = 0x20_0000 + n * 0x1000;
            let rights = match at {
                SUPERVISOR_PAGE => 3,
                READ_ONLY_PAGE => 5,
                ABSENT_PAGE => 6,
                NO_EXECUTE_PAGE => 7 | 1 << 63,
                RESERVED_PAGE => 7 | 1 << 51,
                _ => 7,
            };
            self.store(table + n * 8, at | rights);
        }
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write(GuestAddress(at), bytes).unwrap();
    }

    pub fn store(&self, at: u64, value: u64) {
        self.write(at, &value.to_le_bytes());
    }

    pub fn load(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.memory.read(GuestAddress(at), &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    pub fn load32(&self, at: u64) -> u64 {
        self.load(at) & 0xffff_ffff
    }

    pub fn set_descriptor(&self, selector: u16, descriptor: u64) {
        self.store(GDT + u64::from(selector & !7), descriptor);
    }

    /// Makes `vector` lead to `handler` by a gate with the access byte `access` (and, in long mode,
    /// interrupt stack `ist`).
    pub fn set_gate(&self, vector: u64, handler: u64, access: u64, ist: u64) {
        let gate = |selector: u16| {
            handler & 0xffff
                | u64::from(selector) << 16
                | access << 40
                | ist << 32
                | (handler >> 16 & 0xffff) << 48
        };
        match self.mode {
            Mode::Real => {
                // Segment 0x2000 holds the handlers.
                let offset = handler - HANDLERS;
                self.write(vector * 4, &(offset as u32 | 0x2000 << 16).to_le_bytes());
            }
            Mode::Protected => self.store(IDT + vector * 8, gate(CODE32)),
            Mode::Long => {
                self.store(IDT + vector * 16, gate(CODE64));
                self.store(IDT + vector * 16 + 8, handler >> 32);
            }
        }
    }

    pub fn regs(&self) -> Regs {
        self.vcpu.regs().unwrap()
    }

    pub fn edit_regs(&mut self, edit: impl FnOnce(&mut Regs)) {
        let mut regs = self.regs();
        edit(&mut regs);
        self.vcpu.set_regs(&regs).unwrap();
    }

    pub fn edit_sregs(&mut self, edit: impl FnOnce(&mut Sregs)) {
        let mut sregs = self.vcpu.sregs().unwrap();
        edit(&mut sregs);
        self.vcpu.set_sregs(&sregs).unwrap();
    }

    /// Runs to a HLT; the accesses meanwhile.
    pub fn run(&mut self) -> Vec<Access> {
        let mut recorder = Recorder::default();
        let exit = self.vcpu.run(&mut recorder).unwrap();
        assert_eq!(exit, VcpuExit::Halted, "{:x?}", self.regs());
        recorder.log
    }

    /// Runs to the end that is not a HLT.
    pub fn run_to_exit(&mut self) -> VcpuExit {
        self.vcpu.run(&mut Recorder::default()).unwrap()
    }

    /// Runs until a handler is reached, and reads what is on its stack.
    pub fn run_to_fault(&mut self) -> Frame {
        self.run();
        self.frame()
    }

    /// The frame of the handler that the machine has halted in.
    pub fn frame(&self) -> Frame {
        let regs = self.regs();
        let sregs = self.vcpu.sregs().unwrap();
        let rip = if self.mode == Mode::Real { regs.rip + sregs.cs.base } else { regs.rip };
        assert!((HANDLERS..HANDLERS + 0x1000).contains(&rip), "no handler: {regs:x?}");
        let vector = (rip - HANDLERS) / 16;
        let size = match self.mode {
            Mode::Real => 2,
            Mode::Protected => 4,
            Mode::Long => 8,
        };
        let word = |n: u64| self.load(sregs.ss.base + regs.rsp + n * size) & u64::MAX >> (64 - 8 * size);
        let coded = self.mode != Mode::Real && has_code(vector);
        let first = u64::from(coded);
        let cs = word(first + 1);
        let pushed =
            self.mode == Mode::Long || self.mode == Mode::Protected && cs & 3 != u64::from(sregs.ss.dpl);
        Frame {
            vector,
            code: coded.then(|| word(0)),
            rip: word(first),
            cs,
            flags: word(first + 2),
            stack: pushed.then(|| (word(first + 3), word(first + 4))),
        }
    }
}

/// Bytes of code for `bitness`, to be placed at `at`.
pub fn code(bitness: u32, at: u64, write: impl FnOnce(&mut CodeAssembler)) -> Vec<u8> {
    let mut code = CodeAssembler::new(bitness).unwrap();
    write(&mut code);
    code.assemble(at).unwrap()
}
