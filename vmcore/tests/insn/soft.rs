//! An instruction on the software CPU, in a small 64-bit guest that has the memory at the host's
//! address.

use std::sync::Arc;

use vmcore::backend::{Backend, BackendConfig, BackendVcpu, BackendVm, Slot, VcpuExit, VcpuIo};
use vmcore::state::{DescriptorTable, Segment};
use vmcore::{GuestAddress, GuestMemory, MemoryRegion};

use crate::generate::Case;
use crate::{MEMORY, State};

const TABLES: u64 = 0x1000;
const GDT: u64 = 0x8000;
const IDT: u64 = 0x9000;
const HANDLERS: u64 = 0xa000;
const HANDLER_STACK: u64 = 0xc000;
const TSS: u64 = 0xd000;
const CODE: u64 = 0x1_0000;
const DATA: u64 = 0x2_0000;

pub struct Soft {
    memory: GuestMemory,
    vcpu: Box<dyn BackendVcpu>,
    _vm: Arc<dyn BackendVm>,
    sregs: vmcore::state::Sregs,
}

/// The handlers write their vector to the port of the same number.
struct Faults(Option<u8>);

impl VcpuIo for Faults {
    fn port_read(&mut self, _: u16, _: &mut [u8]) {}
    fn port_write(&mut self, port: u16, _: &[u8]) {
        self.0 = Some(u8::try_from(port).unwrap());
    }
    fn mmio_read(&mut self, _: GuestAddress, _: &mut [u8]) {}
    fn mmio_write(&mut self, _: GuestAddress, _: &[u8]) {}
}

impl Soft {
    /// `address` is where the memory shall be.
    pub fn new(address: u64) -> Self {
        let vm = vmcore::soft::Soft::new().create_vm(&BackendConfig { irqchip: false }).unwrap();
        let region = Arc::new(MemoryRegion::anonymous(GuestAddress(0), 1 << 20).unwrap());
        let memory = GuestMemory::new();
        memory.insert(region.clone()).unwrap();
        vm.map(Slot(0), region).unwrap();
        let put = |at: u64, value: u64| memory.store(GuestAddress(at), &value).unwrap();
        assert_ne!(address >> 30, 0, "the first GiB is the guest's own");
        // The first 2 MiB one to one, and two pages at `address`.
        let index = |level: u32| 8 * (address >> (12 + 9 * level) & 0x1ff);
        put(TABLES, TABLES + 0x1003);
        put(TABLES + 0x1000, TABLES + 0x2003);
        put(TABLES + 0x2000, 0x83);
        put(TABLES + index(3), TABLES + if index(3) == 0 { 0x1003 } else { 0x3003 });
        let directory = TABLES + if index(3) == 0 { 0x1000 } else { 0x3000 };
        put(directory + index(2), TABLES + 0x4003);
        put(TABLES + 0x4000 + index(1), TABLES + 0x5003);
        // The tables that hold `address`'s two pages, which may be in two tables.
        for page in 0..2u64 {
            let at = address + 4096 * page;
            assert_eq!(at >> 21, address >> 21, "the memory lies across a table's end");
            put(TABLES + 0x5000 + 8 * (at >> 12 & 0x1ff), (DATA + 4096 * page) | 3);
        }
        put(GDT + 8, 0x00af_9b00_0000_ffff);
        put(GDT + 16, 0x00cf_9300_0000_ffff);
        put(TSS + 0x24, HANDLER_STACK);
        for vector in 0..32u64 {
            let handler = HANDLERS + 8 * vector;
            // Interrupt gate with IST 1.
            put(IDT + 16 * vector, handler & 0xffff | 8 << 16 | 1 << 32 | 0x8e << 40 | (handler >> 16) << 48);
            put(IDT + 16 * vector + 8, 0);
            // out vector, al; hlt
            put(handler, 0xf4 << 16 | vector << 8 | 0xe6);
        }
        let mut vcpu = vm.create_vcpu(0).unwrap();
        let mut sregs = vcpu.sregs().unwrap();
        sregs.cs = Segment::long_code(8);
        for data in [&mut sregs.ds, &mut sregs.es, &mut sregs.ss, &mut sregs.fs, &mut sregs.gs] {
            *data = Segment::flat(16, false);
        }
        sregs.tr = Segment { base: TSS, limit: 0x67, kind: 0xb, present: true, ..Segment::default() };
        sregs.gdt = DescriptorTable { base: GDT, limit: 23 };
        sregs.idt = DescriptorTable { base: IDT, limit: 0x1ff };
        // PE, MP, NE, WP, PG; PAE, OSFXSR, OSXMMEXCPT; LME, LMA.
        sregs.cr0 = 0x8001_0033;
        sregs.cr3 = TABLES;
        sregs.cr4 = 0x620;
        sregs.efer = 0x500;
        vcpu.set_sregs(&sregs).unwrap();
        Self { memory, vcpu, _vm: vm, sregs }
    }

    pub fn run(&mut self, case: &Case) -> State {
        let mut code = case.bytes.clone();
        code.push(0xf4);
        self.memory.write(GuestAddress(CODE), &code).unwrap();
        self.memory.write(GuestAddress(DATA), &case.state.memory).unwrap();
        let mut full = self.vcpu.save().unwrap();
        full.sregs = self.sregs;
        let g = &case.state.gpr;
        let r = &mut full.regs;
        [r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi] =
            [g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7]];
        [r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15] =
            [g[8], g[9], g[10], g[11], g[12], g[13], g[14], g[15]];
        r.rip = CODE;
        r.rflags = case.state.flags;
        full.xsave[..512].copy_from_slice(&case.state.fx);
        self.vcpu.restore(&full).unwrap();
        let mut faults = Faults(None);
        let exit = self.vcpu.run(&mut faults).unwrap();
        assert_eq!(exit, VcpuExit::Halted, "{} ({:02x?})", case.text, case.bytes);
        let after = self.vcpu.save().unwrap();
        let r = &after.regs;
        let gpr = [
            r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13,
            r.r14, r.r15,
        ];
        let mut memory = vec![0; MEMORY];
        self.memory.read(GuestAddress(DATA), &mut memory).unwrap();
        State { gpr, flags: r.rflags, fx: after.xsave[..512].to_vec(), memory, fault: faults.0 }
    }
}
