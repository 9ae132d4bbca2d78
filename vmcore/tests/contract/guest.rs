//! Small guests: a VM with some memory, code assembled by iced-x86, and a record of its I/O.

use std::sync::Arc;

use iced_x86::code_asm::CodeAssembler;
use vmcore::backend::{Backend, BackendConfig, BackendVcpu, BackendVm, Slot, VcpuExit, VcpuIo};
use vmcore::state::{DescriptorTable, Segment, Sregs};
use vmcore::{GuestAddress, GuestMemory, MemoryRegion};

/// Where the guests' code is, in every mode.
pub const CODE: u64 = 0x1_0000;
/// Top of the stack.
pub const STACK: u64 = 0x9000;
/// Bytes of memory from 0 that a [`Guest`] has.
pub const MEMORY: u64 = 4 << 20;
/// An address without memory.
pub const NO_MEMORY: u64 = 0xd000_0000;

const GDT: u64 = 0x500;
pub const IDT: u64 = 0x1000;
const PAGE_TABLES: u64 = 0x30_0000;

/// Selectors of the flat segments in the guests' GDT.
pub const CODE_SELECTOR: u16 = 8;
pub const DATA_SELECTOR: u16 = 16;

/// A processor mode for a test guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Real,
    Protected,
    Long,
}

impl Mode {
    pub const ALL: [Mode; 3] = [Mode::Real, Mode::Protected, Mode::Long];

    pub fn bitness(self) -> u32 {
        match self {
            Mode::Real => 16,
            Mode::Protected => 32,
            Mode::Long => 64,
        }
    }
}

/// One access of a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    In(u16, usize),
    Out(u16, Vec<u8>),
    Read(u64, usize),
    Write(u64, Vec<u8>),
}

/// Records accesses and answers reads from `answer`, a counter that goes up with each byte.
#[derive(Debug, Default)]
pub struct Recorder {
    pub log: Vec<Access>,
    pub answer: u8,
}

impl Recorder {
    fn fill(&mut self, data: &mut [u8]) {
        for byte in data {
            *byte = self.answer;
            self.answer = self.answer.wrapping_add(1);
        }
    }
}

impl VcpuIo for Recorder {
    fn port_read(&mut self, port: u16, data: &mut [u8]) {
        self.log.push(Access::In(port, data.len()));
        self.fill(data);
    }
    fn port_write(&mut self, port: u16, data: &[u8]) {
        self.log.push(Access::Out(port, data.to_vec()));
    }
    fn mmio_read(&mut self, at: GuestAddress, data: &mut [u8]) {
        self.log.push(Access::Read(at.0, data.len()));
        self.fill(data);
    }
    fn mmio_write(&mut self, at: GuestAddress, data: &[u8]) {
        self.log.push(Access::Write(at.0, data.to_vec()));
    }
}

/// Calls a closure at each write to a port, and ignores everything else.
pub struct OnOut<F>(pub F);

impl<F: FnMut(u16, &[u8])> VcpuIo for OnOut<F> {
    fn port_read(&mut self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn port_write(&mut self, port: u16, data: &[u8]) {
        (self.0)(port, data);
    }
    fn mmio_read(&mut self, _: GuestAddress, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&mut self, _: GuestAddress, _: &[u8]) {}
}

/// Assembles `write`'s code for `mode` at [`CODE`].
pub fn assemble(mode: Mode, write: impl FnOnce(&mut CodeAssembler)) -> Vec<u8> {
    assemble_at(mode, CODE, write)
}

/// Assembles for another address. Real-mode code runs at offset 0 of the segment `CODE / 16`.
pub fn assemble_at(mode: Mode, at: u64, write: impl FnOnce(&mut CodeAssembler)) -> Vec<u8> {
    let mut code = CodeAssembler::new(mode.bitness()).unwrap();
    write(&mut code);
    code.assemble(if mode == Mode::Real { at - CODE } else { at }).unwrap()
}

/// Segments and control registers to run flat code in `mode`; [`Guest::new`] writes the tables.
pub fn sregs(mode: Mode, reset: &Sregs) -> Sregs {
    const PE: u64 = 1;
    const PG: u64 = 1 << 31;
    const PAE: u64 = 1 << 5;
    const OSFXSR: u64 = 1 << 9;
    const LME_LMA: u64 = 1 << 8 | 1 << 10;

    let mut s = *reset;
    s.gdt = DescriptorTable { base: GDT, limit: 23 };
    if mode == Mode::Real {
        let segment = u16::try_from(CODE >> 4).unwrap();
        s.cs = Segment::real_mode(segment, true);
        for data in [&mut s.ds, &mut s.es, &mut s.ss, &mut s.fs, &mut s.gs] {
            *data = Segment::real_mode(0, false);
        }
        return s;
    }
    s.cs = Segment::flat(CODE_SELECTOR, true);
    for data in [&mut s.ds, &mut s.es, &mut s.ss, &mut s.fs, &mut s.gs] {
        *data = Segment::flat(DATA_SELECTOR, false);
    }
    s.cr0 |= PE;
    s.cr4 |= OSFXSR;
    s.idt = DescriptorTable { base: IDT, limit: 0xfff };
    if mode == Mode::Long {
        s.cs = Segment::long_code(CODE_SELECTOR);
        s.cr3 = PAGE_TABLES;
        s.cr4 |= PAE;
        s.cr0 |= PG;
        s.efer |= LME_LMA;
    }
    s
}

/// A VM with [`MEMORY`] bytes from 0 and one vCPU, stopped before its first instruction.
pub struct Guest {
    pub vm: Arc<dyn BackendVm>,
    pub vcpu: Box<dyn BackendVcpu>,
    pub memory: GuestMemory,
    pub mode: Mode,
}

impl Guest {
    /// A guest without interrupt controllers.
    pub fn new(backend: &dyn Backend, mode: Mode, code: &[u8]) -> Self {
        Self::with(backend, mode, code, BackendConfig::default())
    }

    /// A guest with interrupt controllers.
    pub fn with_irqchip(backend: &dyn Backend, mode: Mode, code: &[u8]) -> Self {
        Self::with(backend, mode, code, BackendConfig { irqchip: true })
    }

    fn with(backend: &dyn Backend, mode: Mode, code: &[u8], config: BackendConfig) -> Self {
        let region = MemoryRegion::anonymous(GuestAddress(0), MEMORY).unwrap();
        Self::with_memory(backend, mode, code, config, Arc::new(region))
    }

    /// A guest whose memory from 0 is `region`.
    pub fn with_memory(
        backend: &dyn Backend,
        mode: Mode,
        code: &[u8],
        config: BackendConfig,
        region: Arc<MemoryRegion>,
    ) -> Self {
        let memory = GuestMemory::new();
        memory.insert(region.clone()).unwrap();
        memory.write(GuestAddress(CODE), code).unwrap();
        write_tables(&memory);
        let vm = backend.create_vm(&config).unwrap();
        vm.map(Slot(0), region).unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        vcpu.set_cpuid(&cpuid(backend)).unwrap();
        vcpu.set_sregs(&sregs(mode, &vcpu.sregs().unwrap())).unwrap();
        let mut regs = vcpu.regs().unwrap();
        (regs.rip, regs.rsp, regs.rflags) = (if mode == Mode::Real { 0 } else { CODE }, STACK, 2);
        vcpu.set_regs(&regs).unwrap();
        Self { vm, vcpu, memory, mode }
    }

    /// Runs until something ends the run, with a recorder; panics on an error.
    pub fn run(&mut self, io: &mut dyn VcpuIo) -> VcpuExit {
        self.vcpu.run(io).unwrap_or_else(|e| panic!("{:?} mode: {e}", self.mode))
    }

    /// Runs to a HLT and returns the accesses.
    pub fn run_to_halt(&mut self) -> Vec<Access> {
        let mut recorder = Recorder::default();
        assert_eq!(self.run(&mut recorder), VcpuExit::Halted, "{:?}", self.vcpu.regs());
        recorder.log
    }

    pub fn load<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.memory.read(GuestAddress(at), &mut bytes).unwrap();
        bytes
    }

    pub fn store(&self, at: u64, bytes: &[u8]) {
        self.memory.write(GuestAddress(at), bytes).unwrap();
    }

    /// Makes `vector` call `handler`, assembled by the caller for the guest's mode.
    pub fn set_handler(&self, vector: u8, handler: u64, code: &[u8]) {
        self.store(handler, code);
        let vector = u64::from(vector);
        let offset = handler.to_le_bytes();
        match self.mode {
            Mode::Real => {
                let segment = u16::try_from(CODE >> 4).unwrap().to_le_bytes();
                let offset = (handler - CODE).to_le_bytes();
                self.store(vector * 4, &[offset[0], offset[1], segment[0], segment[1]]);
            }
            // An interrupt gate (SDM vol. 3A, 6.11 and 6.14.1).
            Mode::Protected => {
                let gate = [offset[0], offset[1], 8, 0, 0, 0x8e, offset[2], offset[3]];
                self.store(IDT + vector * 8, &gate);
            }
            Mode::Long => {
                let mut gate = [0; 16];
                gate[..8].copy_from_slice(&[offset[0], offset[1], 8, 0, 0, 0x8e, offset[2], offset[3]]);
                gate[8..12].copy_from_slice(&offset[4..]);
                self.store(IDT + vector * 16, &gate);
            }
        }
    }
}

/// What test guests see: everything the backend has. A vCPU without CPUID lacks long-mode features
/// on some hosts.
pub fn cpuid(backend: &dyn Backend) -> vmcore::cpuid::Cpuid {
    backend.supported_cpuid().unwrap()
}

/// A GDT with flat segments, and page tables that map the first GiB and the GiB of [`NO_MEMORY`],
/// and the LAPIC's, by pages of 2 MiB.
pub fn write_tables(memory: &GuestMemory) {
    let store = |at: u64, value: u64| memory.write(GuestAddress(at), &value.to_le_bytes()).unwrap();
    store(GDT + 8, 0x00af_9b00_0000_ffff);
    store(GDT + 16, 0x00cf_9300_0000_ffff);
    let (pdpt, directories) = (PAGE_TABLES + 0x1000, PAGE_TABLES + 0x2000);
    store(PAGE_TABLES, pdpt | 3);
    for gib in 0..4 {
        let directory = directories + gib * 0x1000;
        store(pdpt + gib * 8, directory | 3);
        for entry in 0..512 {
            store(directory + entry * 8, (gib << 30 | entry << 21) | 0x83);
        }
    }
}
