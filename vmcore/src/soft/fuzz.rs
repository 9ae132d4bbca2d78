//! Any bytes as a guest: what the fuzz targets in `vmcore/fuzz` and, with random bytes, this module's test
//! feed to the decoder, the page walk and the whole CPU. Nothing may panic, hang or leave guest memory.
#![expect(clippy::cast_possible_truncation, reason = "input is cut to what is needed")]
#![expect(clippy::panic, reason = "it says what is wrong")]

use std::sync::{Arc, LazyLock};

use super::cpu::{Cpu, Mode, cr0, cr4, efer};
use super::fp::Thunks;
use super::isa::Isa;
use super::link::Link;
use super::vcpu::SoftVcpu;
use super::vm::SoftVm;
use super::{decode, features};
use crate::backend::{BackendConfig, BackendVcpu, BackendVm, HardwareBreakpoints, Slot, VcpuIo};
use crate::memory::{GuestAddress, GuestMemory, MemoryRegion};
use crate::state::{DescriptorTable, Regs, RunState, Segment, Sregs};

/// RAM in bytes.
const RAM: u64 = 1 << 18;
/// Where code begins.
const CODE: u64 = 0x1_0000;
/// Where descriptor tables and page tables are.
const GDT: u64 = 0x500;
const IDT: u64 = 0x1000;
const TSS: u64 = 0x2000;
const TABLES: u64 = 0x8000;
/// Blocks or steps of a run.
const TURNS: u32 = 150;

/// Input as numbers; zeros behind its end.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        self.0.split_off_first().copied().unwrap_or(0)
    }

    fn word(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    /// A number of few bytes of input: small, an address, an extreme, or any.
    fn value(&mut self) -> u64 {
        match self.byte() % 8 {
            0 => self.byte().into(),
            1 | 2 => CODE + u64::from(self.byte()) * 16,
            3 => RAM - u64::from(self.byte() % 32),
            4 => u64::MAX - u64::from(self.byte()),
            5 => 1 << (self.byte() % 64),
            6 => TABLES + u64::from(self.byte()) * 8,
            _ => self.word(),
        }
    }
}

/// Devices that answer with what they were last told.
struct Echo(u8);

impl VcpuIo for Echo {
    fn port_read(&mut self, _: u16, data: &mut [u8]) {
        data.fill(self.0);
    }
    fn port_write(&mut self, _: u16, data: &[u8]) {
        self.0 ^= data.first().copied().unwrap_or(0);
    }
    fn mmio_read(&mut self, _: GuestAddress, data: &mut [u8]) {
        data.fill(self.0);
    }
    fn mmio_write(&mut self, _: GuestAddress, data: &[u8]) {
        self.0 ^= data.first().copied().unwrap_or(0);
    }
}

fn mode(bits: u8) -> Mode {
    let bit = |n: u8| bits >> n & 1 != 0;
    let long = bit(0);
    let v86 = bit(4) && !long;
    Mode {
        long,
        code32: bit(1) && !long && !v86,
        stack32: bit(2) && !long && !v86,
        protected: (bit(3) || long) && !v86,
        v86,
        cpl: if v86 { 3 } else { bits >> 5 & 3 },
    }
}

/// Decodes any bytes for any mode and processor.
pub fn decoder(data: &[u8]) {
    static THUNKS: LazyLock<Option<Thunks>> = LazyLock::new(|| Thunks::new().ok());
    let Some(thunks) = &*THUNKS else { return };
    let mut input = Input(data);
    let mode = mode(input.byte());
    let isa = if input.byte() & 1 == 0 { Isa::ALL } else { Isa::of(&features::supported()) };
    let rip = input.value();
    let code = input.0;
    for start in 0..code.len().min(64) {
        let bytes = &code[start..code.len().min(start + 15)];
        let whole = decode::decode(bytes, rip, start as u64, mode, isa, thunks);
        let Ok(decoded) = whole else { continue };
        let len = usize::from(decoded.op.len);
        assert!((1..=15).contains(&len) && len <= bytes.len(), "{bytes:02x?}");
        // What is behind the instruction does not change it.
        let Ok(alone) = decode::decode(&bytes[..len], rip, start as u64, mode, isa, thunks) else {
            panic!("{bytes:02x?} is longer than it was");
        };
        assert_eq!((alone.op.len, alone.op.end), (decoded.op.len, decoded.op.end));
        // Handlers index registers, segments and shifts by these.
        let op = &decoded.op;
        assert!(op.base < 32 && op.index < 32 && op.seg < 8 && op.ashift < 64 && op.scale < 4, "{op:?}");
    }
}

fn vm(irqchip: bool, patches: &mut Input<'_>) -> Option<(SoftVm, GuestMemory, SoftVcpu)> {
    let vm = SoftVm::new(&BackendConfig { irqchip }).ok()?;
    let region = Arc::new(MemoryRegion::anonymous(GuestAddress(0), RAM).ok()?);
    vm.map(Slot(0), region.clone()).ok()?;
    let memory = GuestMemory::new();
    memory.insert(region).ok()?;
    let put = |at: u64, value: u64| memory.write(GuestAddress(at), &value.to_le_bytes()).ok();
    // Null; 64-bit, 32-bit, 16-bit code and data of level 0; 64-bit, 32-bit code and data of level 3; a TSS.
    let descriptors = [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9b00_0000_ffff,
        0x0000_9b01_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00af_fb00_0000_ffff,
        0x00cf_fb00_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x0000_8b00_0000_2067 | TSS << 16,
    ];
    for (n, descriptor) in (0..).zip(descriptors) {
        put(GDT + 8 * n, descriptor)?;
    }
    for vector in 0..64u64 {
        // To the code again, a little further.
        let at = CODE + 4 * vector;
        put(IDT + 16 * vector, at & 0xffff | 0x08 << 16 | 0xef00 << 32 | (at >> 16) << 48)?;
    }
    for n in 0..16 {
        put(TSS + 4 + 8 * n, 0x6000)?;
    }
    put(TABLES, TABLES + 0x1007)?;
    put(TABLES + 0x1000, TABLES + 0x2007)?;
    put(TABLES + 0x2000, TABLES + 0x3007)?;
    put(TABLES + 0x2008, 0x87)?;
    for page in 0..64 {
        put(TABLES + 0x3000 + 8 * page, page << 12 | 7)?;
    }
    for _ in 0..patches.byte() % 16 {
        let at = [GDT, IDT, TSS, TABLES][usize::from(patches.byte() & 3)] + u64::from(patches.byte()) * 8;
        let at = at + 0x1000 * u64::from(patches.byte() & 3);
        put(at, patches.value() ^ 7)?;
    }
    let vcpu = SoftVcpu::new(vm.machine(), Link::new(0));
    Some((vm, memory, vcpu))
}

fn segment(input: &mut Input<'_>, code: bool, bits: u8) -> Segment {
    let mut segment = Segment::flat(if code { 8 } else { 0x20 }, code);
    match bits {
        0 => segment = Segment::real_mode(0, code),
        2 if code => segment = Segment::long_code(8),
        _ => {}
    }
    let change = input.byte();
    if change & 1 != 0 {
        segment.base = input.value();
    }
    if change & 2 != 0 {
        segment.limit = input.value() as u32;
    }
    if change & 4 != 0 {
        let b = input.word();
        segment.selector = b as u16;
        (segment.kind, segment.dpl) = ((b >> 16) as u8 & 15, (b >> 24) as u8 & 3);
        (segment.present, segment.unusable) = (b >> 32 & 1 != 0, b >> 33 & 1 != 0);
        (segment.big, segment.long) = (b >> 34 & 1 != 0, b >> 35 & 1 != 0);
        segment.code_or_data = b >> 36 & 1 != 0;
    }
    segment
}

/// Special registers about one of the usual modes.
fn sregs(input: &mut Input<'_>, before: &Sregs) -> Sregs {
    let bits = input.byte() % 4;
    let mut s = *before;
    s.gdt = DescriptorTable { base: GDT, limit: 0x47 };
    s.idt = DescriptorTable { base: if bits == 0 { 0 } else { IDT }, limit: 0x3ff };
    s.cs = segment(input, true, bits);
    for data in [&mut s.ds, &mut s.es, &mut s.ss, &mut s.fs, &mut s.gs] {
        *data = segment(input, false, bits);
    }
    s.tr =
        Segment { base: TSS, limit: 0x2067, kind: 0xb, present: true, selector: 0x40, ..Segment::default() };
    s.cr0 = cr0::ET | cr0::NE;
    s.cr4 = cr4::OSFXSR | cr4::OSXMMEXCPT;
    s.cr3 = TABLES;
    if bits != 0 {
        s.cr0 |= cr0::PE;
    }
    if bits == 2 {
        s.cr0 |= cr0::PG;
        s.cr4 |= cr4::PAE;
        s.efer = efer::LME | efer::LMA | efer::SCE | efer::NXE;
    }
    if bits == 3 {
        s.cr0 |= cr0::PG;
    }
    let change = input.byte();
    if change & 1 != 0 {
        s.cr0 ^= input.word() & 0xe005_003f;
    }
    if change & 2 != 0 {
        s.cr4 ^= input.word() & 0x37_0fff;
    }
    if change & 4 != 0 {
        s.efer ^= input.word() & 0xd01;
    }
    if change & 8 != 0 {
        s.cr3 = input.value();
    }
    if change & 16 != 0 {
        (s.gdt.base, s.idt.base) = (input.value(), input.value());
    }
    if change & 32 != 0 {
        s.tr = segment(input, false, 1);
        s.ldt = segment(input, false, 1);
    }
    s
}

/// Accesses memory by any page tables, registers and addresses.
pub fn walk(data: &[u8]) {
    let mut input = Input(data);
    let Some((_vm, memory, mut vcpu)) = vm(false, &mut input) else { return };
    let before = vcpu.cpu.save_sregs();
    let s = sregs(&mut input, &before);
    if vcpu.cpu.restore_sregs(&s).is_err() {
        return;
    }
    let flags = input.word();
    vcpu.cpu.set_rflags(flags);
    let accesses = input.byte();
    let rest = input.0;
    // The rest is in the tables.
    let _ = memory.write(GuestAddress(TABLES), &rest[..rest.len().min(0x8000)]);
    for _ in 0..accesses {
        let at = input.value();
        let cpu: &mut Cpu = &mut vcpu.cpu;
        cpu.callbacks = None;
        let _ = match input.byte() % 9 {
            0 => cpu.load::<u8>(at).map(drop),
            1 => cpu.load::<u64>(at).map(drop),
            2 => cpu.store(at, 0x55u8),
            3 => cpu.store(at, at),
            4 => cpu.modify_atomic(at, |v: u32| v.wrapping_add(1)),
            5 => cpu.fetch_address(at).map(drop),
            6 => cpu.load_vector(at).map(drop),
            7 => cpu.load_system::<u64>(at).map(drop),
            _ => {
                cpu.mmu.flush_page(at);
                cpu.mmu.probe(at);
                Ok(())
            }
        };
    }
}

/// Runs any code from any state for some hundred blocks or instructions.
pub fn cpu(data: &[u8]) {
    let mut input = Input(data);
    let options = input.byte();
    let Some((_vm, memory, mut vcpu)) = vm(options & 1 != 0, &mut input) else { return };
    if options & 2 != 0 {
        let _ = vcpu.set_cpuid(&features::supported());
    }
    let before = vcpu.cpu.save_sregs();
    let s = sregs(&mut input, &before);
    if vcpu.cpu.restore_sregs(&s).is_err() {
        return;
    }
    let rflags = input.value() & 0x3f_7fd5 | 2;
    let mut r = [0; 16].map(|_| input.value());
    r[4] = if options & 4 != 0 { r[4] } else { 0x7000 };
    let regs = Regs {
        rax: r[0],
        rcx: r[1] & 0xfff,
        rdx: r[2],
        rbx: r[3],
        rsp: r[4],
        rbp: r[5],
        rsi: r[6],
        rdi: r[7],
        r8: r[8],
        r9: r[9],
        r10: r[10],
        r11: r[11],
        r12: r[12],
        r13: r[13],
        r14: r[14],
        r15: r[15],
        rip: if options & 8 != 0 { input.value() } else { CODE },
        rflags,
    };
    vcpu.cpu.restore_regs(&regs);
    if options & 16 != 0 {
        let mut area = [0; 512];
        area.iter_mut().for_each(|byte| *byte = input.byte());
        vcpu.cpu.fp.set_bytes(&area);
    }
    if options & 32 != 0 {
        vcpu.cpu.debug.addresses = std::array::from_fn(|_| input.value());
        vcpu.cpu.debug.dr7 = input.word() & 0xffff_2bff | 0x400;
        vcpu.cpu.arm_breakpoints();
    }
    if options & 64 != 0 {
        let addresses = std::array::from_fn(|_| input.value());
        vcpu.cpu.set_breakpoints(Some(HardwareBreakpoints { addresses, dr7: input.word() }));
    }
    let code = input.0;
    let at = if regs.rip < RAM { regs.rip } else { CODE };
    let room = usize::try_from(RAM - at).unwrap_or(0).min(code.len());
    let _ = memory.write(GuestAddress(at), &code[..room]);
    vcpu.run_state = RunState::Running;
    vcpu.run_turns(&mut Echo(options), TURNS);
    let state = vcpu.save_state();
    assert_eq!(state.regs.rflags & !0x3f_7fd7, 0, "{:x?}", state.regs);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Random input, `VMCORE_FUZZ_CASES` of each kind from seed `VMCORE_FUZZ_SEED`.
    fn cases(run: fn(&[u8])) {
        let number = |name, default| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default);
        let mut x: u64 = number("VMCORE_FUZZ_SEED", 1u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x.wrapping_mul(0x2545_f491_4f6c_dd1d)
        };
        for n in 0..number("VMCORE_FUZZ_CASES", 2_000) {
            let len = next() % 700;
            let sparse = next() % 3 == 0;
            let data: Vec<u8> = (0..len)
                .map(|_| {
                    let word = next() >> 24;
                    if sparse && word & 0x300 != 0 { 0 } else { word.to_le_bytes()[0] }
                })
                .collect();
            let result = std::panic::catch_unwind(|| run(&data));
            assert!(result.is_ok(), "case {n}: {data:02x?}");
        }
    }

    #[test]
    fn any_bytes_decode() {
        cases(decoder);
    }

    #[test]
    fn any_page_tables_are_walked() {
        cases(walk);
    }

    #[test]
    fn any_state_runs() {
        cases(cpu);
    }
}
