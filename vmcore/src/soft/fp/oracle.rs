//! Every x87, MMX and SSE instruction against the host processor: every opcode on random registers,
//! states and memory, executed once by the handlers and once by the host.
#![cfg(target_arch = "x86_64")]
#![expect(unsafe_code, reason = "the host executes generated instructions")]
#![expect(clippy::cast_possible_truncation, reason = "random values are cut to what is needed")]

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, Formatter, Instruction, Mnemonic, NasmFormatter, OpKind,
    Register, RflagsBits,
};

use super::offered;
use crate::backend::{BackendConfig, BackendVm, Slot};
use crate::memory::{GuestAddress, MemoryRegion};
use crate::soft::block::Found;
use crate::soft::cpu::flags::ARITHMETIC;
use crate::soft::cpu::op::Stop;
use crate::soft::cpu::{CS, Cpu, DS, SS, cr0, cr4, efer};
use crate::soft::decode::decode;
use crate::soft::link::Link;
use crate::soft::vm::SoftVm;
use crate::state::Segment;

/// Where the memory operands are, for the host and for the guest: two pages.
pub(super) const DATA: u64 = 0x3000_0000;
/// Where [`Guest::with_one_page`] has its page.
pub(super) const PAGE: u64 = 0x7000_1000;
const DATA_LEN: u64 = 0x2000;
/// The host's registers, and the code around the instruction.
const FRAME: u64 = 0x3010_0000;
const FRAME_LEN: u64 = 0x3000;
pub(super) const HERE: u64 = FRAME + 0x2000;
const FX_IN: u64 = FRAME + 0x400;
const FX_OUT: u64 = FRAME + 0x800;
const FX_HOST: u64 = FRAME + 0xc00;
const CODE: u64 = FRAME + 0x1000;
const EXIT: u64 = FRAME + 0x1800;

/// What an instruction works on.
#[derive(Clone, PartialEq)]
pub(super) struct State {
    pub(super) gpr: [u64; 16],
    pub(super) flags: u64,
    pub(super) fx: [u8; 512],
    pub(super) memory: Vec<u8>,
    pub(super) fault: Option<u8>,
}

impl State {
    pub(super) fn put(&mut self, at: usize, bytes: &[u8]) {
        self.fx[at..at + bytes.len()].copy_from_slice(bytes);
    }
}

/// xorshift64*.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(super) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub(super) fn byte(&mut self) -> u8 {
        self.next() as u8
    }

    fn single(&mut self) -> u32 {
        let sign = (self.below(2) as u32) << 31;
        sign | match self.below(8) {
            0 => [0, 0x3f80_0000, 0x7f80_0000, 0x7fc0_0000, 0x7fa0_0001, 1, 0x7f7f_ffff, 0x80_0000]
                [self.below(8) as usize],
            1 => self.next() as u32 & 0x7f_ffff,
            2 => self.next() as u32 & 0x81ff_ffff,
            3 => (self.below(4096) as f32 / 16.0).to_bits(),
            4 => 0x4f00_0000 | self.next() as u32 & 0xff_ffff,
            // Products of two of these are about the smallest normal number.
            5 => 0x1f80_0000 + ((self.below(4) as u32) << 23) + (self.next() as u32 & 0x7f_0000),
            _ => self.next() as u32 & 0x7fff_ffff,
        }
    }

    fn double(&mut self) -> u64 {
        let sign = self.below(2) << 63;
        sign | match self.below(8) {
            0 => [
                0,
                0x3ff0_0000_0000_0000,
                0x7ff0_0000_0000_0000,
                0x7ff8_0000_0000_0000,
                0x7ff4_0000_0000_0001,
                1,
                0x7fef_ffff_ffff_ffff,
                0x10_0000_0000_0000,
            ][self.below(8) as usize],
            1 => self.next() & 0xf_ffff_ffff_ffff,
            2 => 0x3800_0000_0000_0000 | self.next() & 0xff_ffff_ffff_ffff,
            3 => (self.below(1 << 20) as f64 / 64.0).to_bits(),
            4 => 0x41d0_0000_0000_0000 | self.next() & 0x2f_ffff_ffff_ffff,
            5 => 0x1fe0_0000_0000_0000 + (self.below(4) << 52) + (self.next() & 0xf_f000_0000_0000),
            _ => self.next() >> 1,
        }
    }

    fn vector(&mut self) -> [u8; 16] {
        let mut bytes = [0; 16];
        match self.below(4) {
            0 => bytes
                .chunks_exact_mut(4)
                .for_each(|chunk| chunk.copy_from_slice(&self.single().to_le_bytes())),
            1 => bytes
                .chunks_exact_mut(8)
                .for_each(|chunk| chunk.copy_from_slice(&self.double().to_le_bytes())),
            2 => {
                bytes.chunks_exact_mut(8).for_each(|chunk| chunk.copy_from_slice(&self.next().to_le_bytes()))
            }
            _ => bytes.iter_mut().for_each(|byte| *byte = [0, 0xff, 0x80, b'a'][self.below(4) as usize]),
        }
        bytes
    }

    /// An 80-bit value.
    fn extended(&mut self) -> [u8; 10] {
        let mut exponent = match self.below(8) {
            0 => 0,
            1 => 0x7fff,
            2 => self.below(0x8000),
            3 => 0x3c00 + self.below(8),
            4 => self.below(3),
            _ => 0x3fff - 40 + self.below(110),
        };
        let significand = match self.below(8) {
            0 => 0,
            1 => 1 << 63,
            2 => self.next() >> 1,
            3 => 3 << 62,
            4 => self.next() | 1 << 63,
            5 => (self.next() & !0x7ff) | 1 << 63,
            _ => self.next() << 40 | 1 << 63,
        };
        exponent |= self.below(2) << 15;
        let mut bytes = [0; 10];
        bytes[..8].copy_from_slice(&significand.to_le_bytes());
        bytes[8..].copy_from_slice(&(exponent as u16).to_le_bytes());
        bytes
    }
}

/// Vector plus 1 of what the host raised.
static RAISED: AtomicU64 = AtomicU64::new(0);
/// Where the host goes on.
static RESUME: AtomicU64 = AtomicU64::new(0);
static ONE: Mutex<()> = Mutex::new(());

extern "C" fn on_signal(signal: i32, _: *mut libc::siginfo_t, context: *mut c_void) {
    let context = context.cast::<libc::ucontext_t>();
    // SAFETY: the kernel passes a context to SA_SIGINFO handlers.
    let registers = unsafe { &mut (*context).uc_mcontext.gregs };
    let rip = registers[libc::REG_RIP as usize].cast_unsigned();
    if !(FRAME..FRAME + FRAME_LEN).contains(&rip) {
        // Somebody else's: it happens again, and is not handled.
        // SAFETY: resets a signal's disposition.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
        return;
    }
    RAISED.store(registers[libc::REG_TRAPNO as usize].cast_unsigned() + 1, Ordering::SeqCst);
    registers[libc::REG_RIP as usize] = RESUME.load(Ordering::SeqCst).cast_signed();
}

/// The host as a processor. There is one at a time.
pub(super) struct Host {
    _only: MutexGuard<'static, ()>,
}

impl Drop for Host {
    fn drop(&mut self) {
        for (at, len) in [(DATA, DATA_LEN), (FRAME, FRAME_LEN)] {
            // SAFETY: `new` mapped them, and nobody else uses them.
            unsafe { libc::munmap(at as *mut c_void, len as usize) };
        }
    }
}

impl Host {
    pub(super) fn new() -> Self {
        let only = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        for (at, len) in [(DATA, DATA_LEN), (FRAME, FRAME_LEN)] {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
            let rights = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
            // SAFETY: nothing is mapped there, or the call fails.
            let mapped = unsafe { libc::mmap(at as *mut c_void, len as usize, rights, flags, -1, 0) };
            assert_eq!(mapped, at as *mut c_void, "{}", std::io::Error::last_os_error());
        }
        // SAFETY: it is plain data, for which zeros are valid.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_signal as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        for signal in [libc::SIGFPE, libc::SIGILL, libc::SIGSEGV, libc::SIGBUS] {
            // SAFETY: the handler touches its context and atomics only.
            assert_eq!(unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) }, 0);
        }
        let host = Self { _only: only };
        host.write_frame();
        host
    }

    fn poke(&self, at: u64, bytes: &[u8]) {
        // SAFETY: callers write within the two mappings.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at as *mut u8, bytes.len()) };
    }

    fn peek(&self, at: u64, len: usize) -> Vec<u8> {
        // SAFETY: callers read within the two mappings.
        unsafe { std::slice::from_raw_parts(at as *const u8, len) }.to_vec()
    }

    fn write_frame(&self) {
        let address = |at: u64| (at as u32).to_le_bytes();
        let moved = |opcode: u8, r: u8, n: u64| {
            let [a, b, c, d] = address(FRAME + 8 * n);
            [0x48 | (r >> 3) << 2, opcode, 0x04 | (r & 7) << 3, 0x25, a, b, c, d]
        };
        let fx = |reg: u8, at: u64| {
            let [a, b, c, d] = address(at);
            [0x48, 0x0f, 0xae, reg << 3 | 4, 0x25, a, b, c, d]
        };
        let jump = |from: u64, to: u64| {
            let [a, b, c, d] = (to as u32).wrapping_sub(from as u32 + 5).to_le_bytes();
            [0xe9, a, b, c, d]
        };
        let mut code = vec![0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57];
        code.extend(moved(0x89, 4, 18));
        code.extend(fx(0, FX_HOST));
        code.extend(fx(1, FX_IN));
        code.extend([0xff, 0x34, 0x25]);
        code.extend(address(FRAME + 8 * 16));
        code.push(0x9d);
        (0..16).for_each(|r| code.extend(moved(0x8b, r, r.into())));
        code.extend(jump(CODE + code.len() as u64, HERE));
        self.poke(CODE, &code);
        let mut code = Vec::new();
        (0..16).for_each(|r| code.extend(moved(0x89, r, r.into())));
        code.extend(moved(0x8b, 4, 18));
        code.extend([0x9c, 0x8f, 0x04, 0x25]);
        code.extend(address(FRAME + 8 * 16));
        code.extend(fx(0, FX_OUT));
        code.extend(fx(1, FX_HOST));
        code.extend([0xfc, 0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3]);
        self.poke(EXIT, &code);
    }

    pub(super) fn run(&self, bytes: &[u8], before: &State) -> State {
        let mut code = bytes.to_vec();
        code.push(0xe9);
        code.extend((EXIT as u32).wrapping_sub(HERE as u32 + code.len() as u32 + 4).to_le_bytes());
        self.poke(HERE, &code);
        RESUME.store(HERE + bytes.len() as u64, Ordering::SeqCst);
        RAISED.store(0, Ordering::SeqCst);
        before
            .gpr
            .iter()
            .enumerate()
            .for_each(|(n, value)| self.poke(FRAME + 8 * n as u64, &value.to_le_bytes()));
        self.poke(FRAME + 128, &before.flags.to_le_bytes());
        self.poke(FX_IN, &before.fx);
        self.poke(DATA, &before.memory);
        // SAFETY: the code that `write_frame` wrote, which saves what it must.
        let run = unsafe { std::mem::transmute::<*const (), extern "sysv64" fn()>(CODE as *const ()) };
        run();
        let word = |n: u64| u64::from_le_bytes(self.peek(FRAME + 8 * n, 8).try_into().unwrap());
        let raised = RAISED.load(Ordering::SeqCst);
        State {
            gpr: std::array::from_fn(|n| word(n as u64)),
            flags: word(16),
            fx: self.peek(FX_OUT, 512).try_into().unwrap(),
            memory: self.peek(DATA, DATA_LEN as usize),
            fault: raised.checked_sub(1).map(|vector| vector as u8),
        }
    }
}

/// The handlers as a processor, in 64-bit code at the host's privilege.
pub(super) struct Guest {
    pub(super) cpu: Cpu,
    region: Arc<MemoryRegion>,
    vm: SoftVm,
}

impl Guest {
    pub(super) fn new() -> Self {
        let vm = SoftVm::new(&BackendConfig { irqchip: false }).unwrap();
        let region = Arc::new(MemoryRegion::anonymous(GuestAddress(DATA), DATA_LEN).unwrap());
        vm.map(Slot(0), region.clone()).unwrap();
        let mut cpu = Cpu::new(vm.machine(), Link::new(0), None);
        // 64-bit mode without paging exists here, and is all that handlers need.
        cpu.cr0 = cr0::PE | cr0::NE;
        cpu.cr4 = cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
        cpu.xcr0 = 3;
        cpu.efer = efer::LME | efer::LMA;
        let data = Segment { limit: u32::MAX, kind: 3, big: true, ..Segment::real_mode(0, false) };
        cpu.set_segment(SS, data);
        cpu.set_segment(DS, data);
        cpu.set_segment(CS, Segment { kind: 11, long: true, big: false, ..data });
        cpu.paging_changed();
        Self { cpu, region, vm }
    }

    /// With paging on, and the first half of the memory at `PAGE` with nothing after it.
    pub(super) fn with_one_page() -> Self {
        let mut guest = Self::new();
        let tables = Arc::new(MemoryRegion::anonymous(GuestAddress(0), 0x4000).unwrap());
        guest.vm.map(Slot(1), tables.clone()).unwrap();
        let index = |level: u64| 8 * (PAGE >> (12 + 9 * level) & 0x1ff) as usize;
        for (at, entry) in [
            (index(3), 0x1003),
            (0x1000 + index(2), 0x2003),
            (0x2000 + index(1), 0x3003),
            (0x3000 + index(0), DATA | 3),
        ] {
            let at = tables.host_address().wrapping_add(at).cast::<u64>();
            // SAFETY: within the tables' region.
            unsafe { at.write(entry) };
        }
        let cpu = &mut guest.cpu;
        let memory = cpu.machine.memory.snapshot();
        cpu.mmu.set_phys(memory);
        cpu.cr0 |= cr0::PG;
        cpu.cr3 = 0;
        cpu.cr4 |= cr4::PAE;
        cpu.paging_changed();
        guest
    }

    pub(super) fn memory(&mut self) -> &mut [u8] {
        // SAFETY: the region's memory, which this alone uses.
        unsafe { std::slice::from_raw_parts_mut(self.region.host_address(), DATA_LEN as usize) }
    }

    pub(super) fn load(&mut self, before: &State) {
        before.gpr.iter().enumerate().for_each(|(n, value)| self.cpu.set_r64(n, *value));
        self.cpu.set_rflags(before.flags);
        self.cpu.fp.set_bytes(&before.fx);
        self.memory().copy_from_slice(&before.memory);
    }

    /// Executes one instruction; the fault it raises.
    pub(super) fn execute(&mut self, bytes: &[u8]) -> Option<u8> {
        let cpu = &mut self.cpu;
        match execute_at(cpu, HERE, bytes) {
            Stop::Next => {
                assert_eq!(cpu.rip(), HERE + bytes.len() as u64);
                None
            }
            Stop::Fault => Some(cpu.fault.vector),
            stop => panic!("{stop:?}"),
        }
    }

    pub(super) fn run(&mut self, bytes: &[u8], before: &State) -> State {
        self.load(before);
        let fault = self.execute(bytes);
        State {
            gpr: std::array::from_fn(|n| self.cpu.r64(n)),
            flags: self.cpu.rflags(),
            fx: self.cpu.fp.bytes(),
            memory: self.memory().to_vec(),
            fault,
        }
    }
}

/// Executes one instruction that is at `rip`, in a block of its own: handlers go on to what is behind them.
pub(super) fn execute_at(cpu: &mut Cpu, rip: u64, bytes: &[u8]) -> Stop {
    cpu.set_rip(rip);
    let block = Cpu::block_of(decode(bytes, rip, 0, cpu.mode, cpu.isa, &cpu.machine.thunks).unwrap());
    cpu.run_block(Found::new(&block), 0)
}

/// A random state; `strict` also with exceptions that are not masked, and pending ones.
pub(super) fn state(random: &mut Random, strict: bool) -> State {
    let mut state = State {
        gpr: [0; 16],
        flags: 0x202 | random.next() & ARITHMETIC,
        fx: [0; 512],
        memory: vec![0; DATA_LEN as usize],
        fault: None,
    };
    state.gpr.fill_with(|| match random.below(4) {
        0 => random.below(20),
        1 => random.below(40).wrapping_sub(20),
        _ => random.next(),
    });
    state.gpr[4] = FRAME + 0xf80;
    state.memory.as_chunks_mut::<16>().0.iter_mut().for_each(|chunk| {
        *chunk = random.vector();
        if random.below(4) == 0 {
            chunk[..10].copy_from_slice(&random.extended());
        }
    });
    let mut mxcsr = 0x1f80 | (random.below(4) << 13) as u32;
    if random.below(3) == 0 {
        mxcsr |= random.next() as u32 & 0x807f;
    }
    if random.below(3) == 0 {
        // What most programs run with after a while.
        mxcsr = 0x1fa0 | random.next() as u32 & 0x1f;
    }
    if strict {
        mxcsr &= !(random.next() as u32 & 0x1f80);
    }
    state.put(24, &mxcsr.to_le_bytes());
    for n in 0..16 {
        let vector = random.vector();
        state.put(160 + 16 * n, &vector);
    }
    let mut control =
        0x7f | [0, 0x200, 0x300, 0x300][random.below(4) as usize] | (random.below(4) as u16) << 10;
    let mut status = (random.below(8) as u16) << 11 | random.next() as u16 & 0x4700;
    if random.below(3) == 0 {
        status |= random.next() as u16 & 0x7f;
    }
    if strict {
        control &= !(random.next() as u16 & 0x3f);
        if random.below(4) != 0 {
            status &= !0x3f;
        }
    }
    if status & !control & 0x3f != 0 {
        status |= 0x8080;
    }
    state.put(0, &control.to_le_bytes());
    state.put(2, &status.to_le_bytes());
    state.fx[4] = if random.below(3) == 0 { random.next() as u8 } else { 0xff };
    for n in 0..8 {
        let value = random.extended();
        state.put(32 + 16 * n, &value);
    }
    state
}

fn is_x87(i: &Instruction) -> bool {
    let fpu = |f: &CpuidFeature| matches!(f, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387);
    i.cpuid_features().iter().any(fpu)
}

/// Whether `i` is one of ours, and can be compared.
fn comparable(i: &Instruction) -> bool {
    let ours = is_x87(i)
        || (0..i.op_count()).any(|n| {
            i.op_kind(n) == OpKind::Register && (i.op_register(n).is_xmm() || i.op_register(n).is_mm())
        })
        || matches!(i.mnemonic(), Mnemonic::Emms | Mnemonic::Crc32 | Mnemonic::Stmxcsr | Mnemonic::Movnti);
    ours && !i.is_invalid()
        && i.cpuid_features().iter().all(|feature| offered(*feature))
        && !matches!(
            i.code(),
            // What they store depends on the host's pointers; `Fnsetpm` and its kin mean nothing.
            Code::Fnstenv_m14byte | Code::Fnstenv_m28byte | Code::Fnsave_m94byte | Code::Fnsave_m108byte
        )
}

/// RFLAGS bits that `i` leaves undefined.
fn undefined(i: &Instruction) -> u64 {
    let bits = i.rflags_undefined();
    let known = [
        (RflagsBits::CF, 1),
        (RflagsBits::PF, 4),
        (RflagsBits::AF, 0x10),
        (RflagsBits::ZF, 0x40),
        (RflagsBits::SF, 0x80),
        (RflagsBits::OF, 0x800),
    ];
    known.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, flag)| flag).sum()
}

/// MXCSR's flags that may differ beside an exception that is raised; see `mxcsr`.
fn unknown_flags(i: &Instruction, host: &State) -> u8 {
    let raised = |flag: u8, mask: u8| host.fx[24] & flag != 0 && host.fx[25] & mask == 0;
    if matches!(i.mnemonic(), Mnemonic::Dpps | Mnemonic::Dppd) {
        return 0x3f;
    }
    u8::from(raised(8, 4) || raised(16, 8)) << 5
}

/// What is different, in words.
pub(super) fn difference(before: &State, host: &State, guest: &State, undefined: u64) -> String {
    let mut text = String::new();
    let mut note = |what: &str, before: String, host: String, guest: String| {
        if host != guest {
            text.push_str(&format!("    {what}: before {before}, host {host}, guest {guest}\n"));
        }
    };
    let fault = |state: &State| format!("{:?}", state.fault);
    note("fault", String::new(), fault(host), fault(guest));
    let flags = |state: &State| format!("{:#x}", state.flags & ARITHMETIC & !undefined);
    note("flags", flags(before), flags(host), flags(guest));
    for n in 0..16 {
        let register = |state: &State| format!("{:#x}", state.gpr[n]);
        note(&format!("r{n}"), register(before), register(host), register(guest));
        let at = 160 + 16 * n;
        let register = |state: &State| {
            format!("{:032x}", u128::from_le_bytes(state.fx[at..at + 16].try_into().unwrap()))
        };
        note(&format!("xmm{n}"), register(before), register(host), register(guest));
    }
    for (what, at, len) in [("fcw", 0, 2), ("fsw", 2, 2), ("ftw", 4, 1), ("mxcsr", 24, 4)] {
        let field = |state: &State| format!("{:02x?}", &state.fx[at..at + len]);
        note(what, field(before), field(host), field(guest));
    }
    for n in 0..8 {
        let register = |state: &State| format!("{:02x?}", &state.fx[32 + 16 * n..42 + 16 * n]);
        note(&format!("st{n}"), register(before), register(host), register(guest));
    }
    if host.memory != guest.memory {
        let at = host.memory.iter().zip(&guest.memory).position(|(a, b)| a != b).unwrap();
        let memory = |state: &State| format!("{:02x?}", &state.memory[at..(at + 16).min(DATA_LEN as usize)]);
        note(&format!("memory {at:#x}"), memory(before), memory(host), memory(guest));
    }
    text
}

/// An encoding with `opcode` in `map`, registers or memory at RBX.
fn encode(random: &mut Random, map: usize, prefix: usize, opcode: u8) -> [u8; 15] {
    let mut bytes = Vec::new();
    bytes.extend([&[][..], &[0x66], &[0xf2], &[0xf3], &[0x66, 0xf2]][prefix]);
    if random.below(2) == 0 {
        bytes.push(0x40 | random.next() as u8 & 15);
    }
    match map {
        0 => bytes.push(0x0f),
        1 => bytes.extend([0x0f, 0x38]),
        2 => bytes.extend([0x0f, 0x3a]),
        _ => {}
    }
    bytes.push(opcode);
    let mut modrm = random.next() as u8;
    if modrm < 0xc0 {
        // [rbx + disp8]
        modrm = modrm & 0x38 | 0x43;
    }
    bytes.push(modrm);
    std::array::from_fn(|n| bytes.get(n).copied().unwrap_or_else(|| random.next() as u8))
}

/// Runs `each` cases of every opcode.
fn compare_all(seed: u64, each: u64, strict: bool) {
    let host = Host::new();
    let mut guest = Guest::new();
    let mut random = Random(seed);
    let only = std::env::var("VMCORE_FP_ONLY").ok();
    let (mut cases, mut codes) = (0u64, std::collections::BTreeSet::new());
    let mut wrong: BTreeMap<String, (u64, String)> = BTreeMap::new();
    for n in 0..(3 * 5 * 256 + 8) {
        let (map, prefix, opcode) = if n < 8 {
            (3, 0, 0xd8 + n as u8)
        } else {
            ((n - 8) / 1280, (n - 8) / 256 % 5, ((n - 8) % 256) as u8)
        };
        // Each x87 opcode byte has 8 instructions in memory and up to 64 on registers.
        for _ in 0..if map == 3 { 72 * each } else { each } {
            let mut bytes = encode(&mut random, map, prefix, opcode);
            let decoded = Decoder::with_ip(64, &bytes, HERE, DecoderOptions::NONE).decode();
            if !comparable(&decoded) {
                continue;
            }
            let rsp = |n| {
                decoded.op_kind(n) == OpKind::Register
                    && decoded.op_register(n).full_register() == Register::RSP
            };
            let memory = (0..decoded.op_count()).any(|n| decoded.op_kind(n) == OpKind::Memory);
            if (0..decoded.op_count()).any(rsp)
                || memory && decoded.memory_base().full_register() != Register::RBX
            {
                continue;
            }
            let mut before = state(&mut random, strict);
            let place = match random.below(4) {
                0 => 4096 - 16 + random.below(32),
                1 => 256 + random.below(1000),
                _ => 256 + 16 * random.below(300),
            };
            before.gpr[3] = if memory {
                (DATA + place).wrapping_sub(decoded.memory_displacement64())
            } else {
                before.gpr[3]
            };
            if matches!(decoded.mnemonic(), Mnemonic::Maskmovdqu | Mnemonic::Maskmovq) {
                before.gpr[7] = DATA + place;
            }
            if decoded.mnemonic() == Mnemonic::Fldcw {
                // A control word that unmasks what the state has pending is for another test.
                before.memory[place as usize] |= 0x3f;
            }
            let bytes = &mut bytes[..decoded.len()];
            if matches!(decoded.mnemonic(), Mnemonic::Maskmovdqu | Mnemonic::Maskmovq) && bytes[0] == 0x67 {
                continue;
            }
            let mut text = String::new();
            NasmFormatter::new().format(&decoded, &mut text);
            if only.as_ref().is_some_and(|only| !text.starts_with(only)) {
                continue;
            }
            cases += 1;
            codes.insert(decoded.code());
            let (by_host, mut by_guest) = (host.run(bytes, &before), guest.run(bytes, &before));
            if by_guest.fault == Some(19) {
                by_guest.fx[24] ^= (by_guest.fx[24] ^ by_host.fx[24]) & unknown_flags(&decoded, &by_host);
            }
            let found = difference(&before, &by_host, &by_guest, undefined(&decoded));
            if !found.is_empty() {
                let entry = wrong.entry(format!("{:?}", decoded.code())).or_insert((0, String::new()));
                entry.0 += 1;
                if entry.1.is_empty() {
                    let control = format!(
                        "fcw {:02x?} fsw {:02x?} ftw {:#x} mxcsr {:02x?}",
                        &before.fx[0..2],
                        &before.fx[2..4],
                        before.fx[4],
                        &before.fx[24..28]
                    );
                    entry.1 = format!("  {text} ({bytes:02x?}) with {control}\n{found}");
                }
            }
        }
    }
    println!("{cases} cases of {} instructions", codes.len());
    let report: String =
        wrong.iter().map(|(code, (count, first))| format!("{code} x {count}\n{first}")).collect();
    assert!(wrong.is_empty(), "{} instructions differ\n{report}", wrong.len());
}

fn cases(default: u64) -> u64 {
    std::env::var("VMCORE_FP_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[test]
fn every_instruction_does_what_it_does_on_the_host() {
    compare_all(0x1234_5678_9abc_def1, cases(30), false);
}

#[test]
fn exceptions_that_are_not_masked_are_the_hosts() {
    compare_all(0x8bad_f00d_dead_beef, cases(30), true);
}
