//! Every 64-bit integer instruction against the host processor: random encodings on random registers
//! and memory, executed once by the handlers and once by the host.
#![cfg(target_arch = "x86_64")]
#![expect(unsafe_code, reason = "the host executes generated instructions")]
#![expect(
    clippy::cast_possible_truncation,
    reason = "addresses are below 4 GiB, and encodings are made of bytes"
)]

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, FlowControl, Formatter, Instruction, Mnemonic,
    NasmFormatter, OpKind, Register, RflagsBits,
};

use crate::backend::{BackendConfig, BackendVm, Slot};
use crate::memory::{GuestAddress, MemoryRegion};
use crate::soft::block::Found;
use crate::soft::cpu::flags::{ARITHMETIC, DF};
use crate::soft::cpu::op::Stop;
use crate::soft::cpu::{CS, Cpu, SS, cr0, efer, vector};
use crate::soft::decode::decode;
use crate::soft::link::Link;
use crate::soft::vm::SoftVm;
use crate::state::Segment;

/// Where the operands are, for the host and for the guest: low, so that every way to address works.
const DATA: u64 = 0x2000_0000;
const DATA_LEN: u64 = 0x8000;
const MIDDLE: u64 = DATA + DATA_LEN / 2;
/// The host's registers.
const STATE: u64 = DATA + 0x10_0000;
/// The host's code around the instruction.
const CODE: u64 = DATA + 0x20_0000;
const HERE: u64 = CODE + 0x800;
/// Where branches that are taken go.
const TAKEN: u64 = HERE + 0x40;

const RSP: usize = 4;

/// Registers and flags, as the host's code knows them.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
struct State {
    gpr: [u64; 16],
    flags: u64,
    taken: u64,
    host_rsp: u64,
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn byte(&mut self) -> u8 {
        self.next() as u8
    }

    /// A value of the kinds at which arithmetic has edges.
    fn value(&mut self) -> u64 {
        let value = match self.below(4) {
            0 => self.next(),
            1 => self.next() >> self.below(64),
            2 => !(self.next() >> self.below(64)),
            _ => 1 << self.below(64),
        };
        match self.below(4) {
            0 => value.wrapping_sub(1),
            1 => value.wrapping_neg(),
            _ => value,
        }
    }
}

/// The mappings of the one [`Host`] that there can be at a time.
const MAPPINGS: [(u64, u64); 3] = [(DATA, DATA_LEN), (STATE, 0x1000), (CODE, 0x1000)];

static ONE: Mutex<()> = Mutex::new(());

/// The host as a processor.
struct Host {
    _only: MutexGuard<'static, ()>,
}

impl Drop for Host {
    fn drop(&mut self) {
        for (at, len) in MAPPINGS {
            // SAFETY: `new` mapped them, and nobody else uses them.
            unsafe { libc::munmap(at as *mut libc::c_void, len as usize) };
        }
    }
}

impl Host {
    fn new() -> Self {
        let only = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        for (at, len) in MAPPINGS {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
            let rights = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
            let at = at as *mut libc::c_void;
            // SAFETY: nothing is mapped there, or the call fails.
            let mapped = unsafe { libc::mmap(at, len as usize, rights, flags, -1, 0) };
            assert_eq!(mapped, at, "{}", std::io::Error::last_os_error());
        }
        let mut host = Self { _only: only };
        host.write_frame();
        host
    }

    fn poke(&mut self, at: u64, bytes: &[u8]) {
        // SAFETY: callers write within the three mappings.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at as *mut u8, bytes.len()) };
    }

    fn data(&mut self) -> &mut [u8] {
        // SAFETY: the mapping, which this alone uses.
        unsafe { std::slice::from_raw_parts_mut(DATA as *mut u8, DATA_LEN as usize) }
    }

    /// The code before and after the instruction. It changes no flags after having loaded them.
    fn write_frame(&mut self) {
        let field = |n: usize| (STATE as u32 + 8 * n as u32).to_le_bytes();
        // `mov reg, [state]` and back.
        let moved = |opcode: u8, r: usize, n: usize| {
            let [a, b, c, d] = field(n);
            [0x48 | (r as u8 >> 3) << 2, opcode, 0x04 | (r as u8 & 7) << 3, 0x25, a, b, c, d]
        };
        let mut code = vec![0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57];
        code.extend(moved(0x89, RSP, 18));
        // push [flags]; popf
        code.extend([0xff, 0x34, 0x25]);
        code.extend(field(16));
        code.push(0x9d);
        (0..16).for_each(|r| code.extend(moved(0x8b, r, r)));
        code.push(0xe9);
        code.extend((HERE as u32).wrapping_sub(CODE as u32 + code.len() as u32 + 4).to_le_bytes());
        self.poke(CODE, &code);

        let exit = CODE + 0x400;
        let mut code = Vec::new();
        (0..16).for_each(|r| code.extend(moved(0x89, r, r)));
        code.extend(moved(0x8b, RSP, 18));
        // pushf; pop [flags]; cld
        code.extend([0x9c, 0x8f, 0x04, 0x25]);
        code.extend(field(16));
        code.extend([0xfc, 0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3]);
        self.poke(exit, &code);
        self.write_exit(TAKEN, 1);
    }

    /// Code at `at` that sets `taken` and leaves.
    fn write_exit(&mut self, at: u64, taken: u32) {
        let mut code = vec![0x48, 0xc7, 0x04, 0x25];
        code.extend((STATE as u32 + 8 * 17).to_le_bytes());
        code.extend(taken.to_le_bytes());
        code.push(0xe9);
        code.extend((CODE as u32 + 0x400).wrapping_sub(at as u32 + code.len() as u32 + 4).to_le_bytes());
        self.poke(at, &code);
    }

    fn run(&mut self, bytes: &[u8], state: &State) -> State {
        self.poke(HERE, bytes);
        self.write_exit(HERE + bytes.len() as u64, 0);
        let at = STATE as *mut State;
        // SAFETY: the mapping for it.
        unsafe { at.write(*state) };
        // SAFETY: the code that `write_frame` wrote, which saves what it must.
        let run = unsafe { std::mem::transmute::<*const (), extern "sysv64" fn()>(CODE as *const ()) };
        run();
        // SAFETY: as above.
        let mut state = unsafe { at.read() };
        state.host_rsp = 0;
        state
    }
}

/// The handlers as a processor.
struct Guest {
    cpu: Cpu,
    region: Arc<MemoryRegion>,
}

impl Guest {
    fn new() -> Self {
        let vm = SoftVm::new(&BackendConfig { irqchip: false }).unwrap();
        let region = Arc::new(MemoryRegion::anonymous(GuestAddress(DATA), DATA_LEN).unwrap());
        vm.map(Slot(0), region.clone()).unwrap();
        let mut cpu = Cpu::new(vm.machine(), Link::new(0), None);
        // 64-bit mode without paging exists here, and is all that handlers need.
        cpu.cr0 |= cr0::PE;
        cpu.efer = efer::LME | efer::LMA;
        let data = Segment { limit: u32::MAX, kind: 3, big: true, ..Segment::real_mode(0, false) };
        cpu.set_segment(SS, data);
        cpu.set_segment(CS, Segment { kind: 11, long: true, big: false, ..data });
        cpu.paging_changed();
        Self { cpu, region }
    }

    fn data(&mut self) -> &mut [u8] {
        // SAFETY: the region's memory, which this alone uses.
        unsafe { std::slice::from_raw_parts_mut(self.region.host_address(), DATA_LEN as usize) }
    }

    /// The state after the instruction, or the vector of its exception.
    fn run(&mut self, bytes: &[u8], state: &State) -> Result<State, u8> {
        let cpu = &mut self.cpu;
        for (n, value) in state.gpr.iter().enumerate() {
            cpu.set_r64(n, *value);
        }
        cpu.set_rflags(state.flags);
        cpu.set_rip(HERE);
        let block = Cpu::block_of(decode(bytes, HERE, 0, cpu.mode, cpu.isa, &cpu.machine.thunks).unwrap());
        let taken = match cpu.run_block(Found::new(&block), 0) {
            Stop::Next if cpu.rip() == TAKEN => 1,
            Stop::Next => {
                assert_eq!(cpu.rip(), HERE + bytes.len() as u64);
                0
            }
            Stop::Fault => {
                for (n, value) in state.gpr.iter().enumerate() {
                    assert_eq!(cpu.r64(n), *value, "register {n} changed though it faulted");
                }
                return Err(cpu.fault.vector);
            }
            stop => panic!("{stop:?}"),
        };
        let gpr = std::array::from_fn(|n| self.cpu.r64(n));
        Ok(State { gpr, flags: self.cpu.rflags(), taken, host_rsp: 0 })
    }
}

fn host_has(i: &Instruction) -> bool {
    i.cpuid_features().iter().all(|feature| match feature {
        CpuidFeature::BMI1 => is_x86_feature_detected!("bmi1"),
        CpuidFeature::BMI2 => is_x86_feature_detected!("bmi2"),
        CpuidFeature::ADX => is_x86_feature_detected!("adx"),
        CpuidFeature::LZCNT => is_x86_feature_detected!("lzcnt"),
        CpuidFeature::MOVBE => is_x86_feature_detected!("movbe"),
        CpuidFeature::POPCNT => is_x86_feature_detected!("popcnt"),
        CpuidFeature::SSE4_2 => is_x86_feature_detected!("sse4.2"),
        CpuidFeature::CMPXCHG16B => is_x86_feature_detected!("cmpxchg16b"),
        CpuidFeature::CLWB | CpuidFeature::CLFLUSHOPT | CpuidFeature::CLDEMOTE | CpuidFeature::CET_SS => {
            false
        }
        _ => true,
    })
}

/// Random bytes that may be an instruction.
fn encode(random: &mut Random) -> [u8; 15] {
    let mut bytes = Vec::new();
    if random.below(4) == 0 {
        bytes.push(0x66);
    }
    match random.below(10) {
        0 => bytes.push(0xf2),
        1 => bytes.push(0xf3),
        2 => bytes.push(0xf0),
        3 => bytes.push(0x67),
        _ => {}
    }
    if random.below(8) == 0 {
        // VEX, 128 bits, map 2 or 3.
        let map = 2 + random.below(2) as u8;
        bytes.extend([0xc4, random.byte() & 0xe0 | map, random.byte() & 0xfb, 0xf0 | random.byte() & 7]);
    } else {
        if random.below(2) == 0 {
            bytes.push(0x40 | random.byte() & 15);
        }
        match random.below(8) {
            0..4 => bytes.push(random.byte()),
            4..6 => bytes.extend([0x0f, random.byte()]),
            // CMPXCHG8B and 16B are rare, and MOVBE, CRC32, ADCX and ADOX.
            6 => bytes.extend([0x0f, if random.below(4) == 0 { 0xc7 } else { 0xa0 | random.byte() & 31 }]),
            _ => bytes.extend([0x0f, 0x38, 0xf0 | random.byte() & 7]),
        }
    }
    // ModRM: a register, or memory at RBX.
    bytes.push(match random.below(4) {
        0 => 0x03 | random.byte() & 0x38,
        1 => 0x43 | random.byte() & 0x38,
        _ => 0xc0 | random.byte(),
    });
    std::array::from_fn(|n| bytes.get(n).copied().unwrap_or_else(|| random.byte()))
}

/// Whether the operands are such that the instruction touches only `DATA`, given `State`s as `prepare`
/// makes them.
fn usable(i: &Instruction) -> bool {
    let rsp = |r: Register| r.full_register() == Register::RSP;
    let other_segment = !matches!(i.segment_prefix(), Register::None);
    if i.is_string_instruction() && other_segment {
        return false;
    }
    let bits = matches!(i.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc);
    if bits && i.op1_kind() == OpKind::Register && i.op1_register().full_register() == Register::RBX {
        // The pointer to the operand would be the bit's number too.
        return false;
    }
    let moffs = i.memory_base() == Register::None;
    for n in 0..i.op_count() {
        match i.op_kind(n) {
            OpKind::Register => {
                let register = i.op_register(n);
                if !register.is_gpr() || rsp(register) && i.mnemonic() != Mnemonic::Pop {
                    return false;
                }
            }
            OpKind::Memory => {
                let simple = i.memory_base() == Register::RBX
                    && i.memory_index() == Register::None
                    && i.memory_displacement64().wrapping_add(0x1000) < 0x2000
                    || i.mnemonic() == Mnemonic::Xlatb && i.memory_base() == Register::RBX
                    || matches!(i.mnemonic(), Mnemonic::Lea | Mnemonic::Nop);
                if !simple || moffs || other_segment {
                    return i.mnemonic() == Mnemonic::Lea;
                }
            }
            _ => {}
        }
    }
    true
}

/// Registers and operands for the instruction, and its bytes.
fn prepare(random: &mut Random, i: &Instruction, bytes: &mut [u8], host: &mut Host) -> State {
    let mut state = State { gpr: [0; 16], flags: 0x202, taken: 0, host_rsp: 0 };
    state.gpr.fill_with(|| random.value());
    state.flags |= random.next() & ARITHMETIC;
    state.gpr[RSP] = MIDDLE + 8 * random.below(64);
    let memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
    if memory {
        state.gpr[3] =
            MIDDLE + 16 * random.below(64) + if random.below(4) == 0 { random.below(16) } else { 0 };
    }
    let at = state.gpr[3].wrapping_add(i.memory_displacement64());
    if i.is_string_instruction() {
        state.flags |= random.next() & DF;
        for r in [6, 7] {
            state.gpr[r] = MIDDLE + random.below(0x800) - 0x400;
        }
        if random.below(4) == 0 {
            state.gpr[7] = state.gpr[6] + random.below(24);
        }
        state.gpr[1] = random.below(200);
        // Some runs that are alike.
        if random.below(2) == 0 {
            host.data()[0x3000..0x5000].fill(state.gpr[0] as u8);
        }
    }
    match i.mnemonic() {
        Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
            if memory && i.op1_kind() == OpKind::Register =>
        {
            let r = i.op1_register().full_register().number();
            state.gpr[r] = random.below(0x4000).wrapping_sub(0x2000);
        }
        Mnemonic::Div | Mnemonic::Idiv if random.below(4) != 0 => {
            state.gpr[2] =
                if random.below(2) == 0 { random.below(4) } else { random.below(4).wrapping_neg() };
            if random.below(2) == 0 {
                state.gpr[2] = (state.gpr[0].cast_signed() >> 63).cast_unsigned();
            }
        }
        Mnemonic::Cmpxchg | Mnemonic::Cmpxchg8b | Mnemonic::Cmpxchg16b if random.below(2) == 0 => {
            if memory {
                let offset = (at - DATA) as usize;
                let word = |n: usize| u64::from_le_bytes(host_bytes(offset + n));
                let (low, high) = match i.mnemonic() {
                    Mnemonic::Cmpxchg16b => (word(0), word(8)),
                    _ => (word(0), word(0) >> 32),
                };
                (state.gpr[0], state.gpr[2]) = (low, high);
            } else {
                state.gpr[0] = state.gpr[i.op0_register().full_register().number()];
            }
        }
        Mnemonic::Enter => {
            // Nesting levels read the frames below RBP.
            state.gpr[5] = MIDDLE + 8 * random.below(64);
            bytes[i.len() - 2] = random.byte() & 7;
            bytes[i.len() - 1] = if random.below(2) == 0 { 0 } else { random.byte() & 7 };
        }
        Mnemonic::Leave => state.gpr[5] = MIDDLE + 8 * random.below(64),
        Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne | Mnemonic::Jecxz | Mnemonic::Jrcxz => {
            state.gpr[1] = random.below(3);
        }
        _ => {}
    }
    if i.flow_control() != FlowControl::Next {
        let at_rsp = (state.gpr[RSP] - DATA) as usize;
        match i.op0_kind() {
            _ if i.mnemonic() == Mnemonic::Ret => {
                host.data()[at_rsp..][..8].copy_from_slice(&TAKEN.to_le_bytes());
            }
            OpKind::Register => state.gpr[i.op0_register().number()] = TAKEN,
            OpKind::Memory => host.data()[(at - DATA) as usize..][..8].copy_from_slice(&TAKEN.to_le_bytes()),
            _ => {
                let distance = TAKEN - HERE - i.len() as u64;
                if i.is_jcc_short() || i.is_jmp_short() || short(i) {
                    bytes[i.len() - 1] = distance as u8;
                } else {
                    bytes[i.len() - 4..i.len()].copy_from_slice(&(distance as u32).to_le_bytes());
                }
            }
        }
    }
    state
}

fn short(i: &Instruction) -> bool {
    i.is_loop() || i.is_loopcc() || i.is_jcx_short()
}

fn host_bytes(offset: usize) -> [u8; 8] {
    // SAFETY: within the mapping of the operands.
    unsafe { ((DATA + offset as u64) as *const [u8; 8]).read() }
}

/// Whether the division must raise #DE, reckoned another way.
fn division_faults(i: &Instruction, state: &State) -> bool {
    let size = match i.op0_kind() {
        OpKind::Register => i.op0_register().size(),
        _ => i.memory_size().size(),
    };
    let mut by = match i.op0_kind() {
        OpKind::Register => {
            let high = matches!(i.op0_register(), Register::AH | Register::BH | Register::CH | Register::DH);
            state.gpr[i.op0_register().full_register().number()] >> if high { 8 } else { 0 }
        }
        _ => u64::from_le_bytes(host_bytes(
            (state.gpr[3].wrapping_add(i.memory_displacement64()) - DATA) as usize,
        )),
    };
    let bits = 8 * size as u32;
    let cut = |value: u64| if bits == 64 { value } else { value & ((1 << bits) - 1) };
    by = cut(by);
    let (low, high) = match size {
        1 => (state.gpr[0] & 0xff, state.gpr[0] >> 8 & 0xff),
        _ => (cut(state.gpr[0]), cut(state.gpr[2])),
    };
    let all = u128::from(high) << bits | u128::from(low);
    if by == 0 {
        return true;
    }
    if i.mnemonic() == Mnemonic::Div {
        return (all / u128::from(by)) >> bits != 0;
    }
    let signed = (all << (128 - 2 * bits)).cast_signed() >> (128 - 2 * bits);
    let by = i128::from((by << (64 - bits)).cast_signed() >> (64 - bits));
    let Some(quotient) = signed.checked_div(by) else { return true };
    quotient != (quotient << (128 - bits)) >> (128 - bits)
}

/// The arithmetic flags that the instruction leaves undefined.
fn undefined_flags(i: &Instruction) -> u64 {
    let bits = i.rflags_undefined();
    let pairs = [
        (RflagsBits::OF, 1 << 11),
        (RflagsBits::SF, 1 << 7),
        (RflagsBits::ZF, 1 << 6),
        (RflagsBits::AF, 1 << 4),
        (RflagsBits::CF, 1),
        (RflagsBits::PF, 1 << 2),
    ];
    let mut undefined = pairs.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, flag)| flag).sum();
    // By more than one place the overflow of shifts and rotations is undefined, whatever the count.
    if matches!(
        i.mnemonic(),
        Mnemonic::Shl
            | Mnemonic::Sal
            | Mnemonic::Shr
            | Mnemonic::Sar
            | Mnemonic::Rol
            | Mnemonic::Ror
            | Mnemonic::Rcl
            | Mnemonic::Rcr
            | Mnemonic::Shld
            | Mnemonic::Shrd
    ) {
        undefined |= 1 << 11 | 1 << 4;
    }
    undefined
}

/// Counts beyond the operand, which leave everything undefined.
fn beyond(i: &Instruction, state: &State) -> bool {
    let double = matches!(i.mnemonic(), Mnemonic::Shld | Mnemonic::Shrd);
    let single = matches!(i.mnemonic(), Mnemonic::Shl | Mnemonic::Sal | Mnemonic::Shr | Mnemonic::Sar);
    let size = match i.op0_kind() {
        OpKind::Register => i.op0_register().size(),
        _ => i.memory_size().size(),
    };
    let Some(last) = i.op_count().checked_sub(1) else { return false };
    // The overflow of a count of 16 is nobody's.
    let count = match i.op_kind(last) {
        OpKind::Register => state.gpr[1] & 31,
        OpKind::Immediate8 => i.immediate(last) & 31,
        _ => 0,
    };
    (double && size == 2 && count >= 16) || (single && size < 4 && count >= 8 * size as u64)
}

/// Runs `cases` random instructions on both; `undefined` says whether what the manuals leave
/// undefined is compared too.
fn compare(seed: u64, cases: u32, undefined: bool) {
    let (mut host, mut guest) = (Host::new(), Guest::new());
    let mut random = Random(seed);
    let mut seen = std::collections::BTreeMap::<String, u32>::new();
    let mut wrong = std::collections::BTreeMap::<String, (u32, String)>::new();
    let mut done = 0;
    host.data().fill_with(|| random.byte());
    while done < cases {
        let mut bytes = encode(&mut random);
        let i = Decoder::with_ip(64, &bytes, HERE, DecoderOptions::NONE).decode();
        if i.is_invalid() || !usable(&i) || !host_has(&i) || super::select(&i).is_none() {
            continue;
        }
        let pops_rsp = i.mnemonic() == Mnemonic::Pop && i.op0_kind() == OpKind::Memory;
        if pops_rsp && i.memory_base() != Register::RBX || matches!(i.code(), Code::Std | Code::Cld) {
            continue;
        }
        // With REX.B it is XCHG there, with REPNE LOOPE is LOOPNE, and PREFETCHW of a register is #UD.
        let repeated = bytes[..8].iter().any(|byte| matches!(byte, 0xf2 | 0xf3));
        if i.mnemonic() == Mnemonic::Pause || i.is_loopcc() && repeated {
            continue;
        }
        if bytes.windows(2).take(8).any(|pair| pair == [0x0f, 0x0d]) {
            continue;
        }
        // AMD's processors heed this prefix of a near branch, Intel's and the decoder do not.
        if i.flow_control() != FlowControl::Next && bytes[..8].contains(&0x66) {
            continue;
        }
        let state = prepare(&mut random, &i, &mut bytes, &mut host);
        let i = Decoder::with_ip(64, &bytes, HERE, DecoderOptions::NONE).decode();
        let bytes = &bytes[..i.len()];
        guest.data().copy_from_slice(host.data());
        let mut text = String::new();
        NasmFormatter::new().format(&i, &mut text);
        let name = format!("{:?}", i.code());
        let mut fail = |what: String| {
            let entry = wrong.entry(name.clone()).or_insert((0, String::new()));
            entry.0 += 1;
            if entry.1.is_empty() {
                entry.1 = format!("{text} {bytes:02x?}: {what}\n  before {:x?}", state);
            }
        };
        if beyond(&i, &state) && (!undefined || i.mnemonic() == Mnemonic::Shld) {
            continue;
        }
        let faults = matches!(i.mnemonic(), Mnemonic::Div | Mnemonic::Idiv) && division_faults(&i, &state);
        let misaligned = i.mnemonic() == Mnemonic::Cmpxchg16b
            && state.gpr[3].wrapping_add(i.memory_displacement64()) & 15 != 0;
        let result = guest.run(bytes, &state);
        if faults || misaligned || result.is_err() {
            let expected = if faults { vector::DE } else { vector::GP };
            if !(faults || misaligned) || result != Err(expected) {
                fail(format!("{result:x?}, expected {faults} {misaligned}"));
            }
            continue;
        }
        done += 1;
        *seen.entry(format!("{:?}", i.mnemonic())).or_default() += 1;
        let mut soft = result.unwrap();
        let mut hard = host.run(bytes, &state);
        if !undefined {
            let mask = undefined_flags(&i);
            soft.flags &= !mask;
            hard.flags &= !mask;
        }
        if soft != hard {
            fail(format!(
                "flags {:x} for {:x}, differ {:x}\n  soft {soft:x?}\n  host {hard:x?}",
                soft.flags,
                hard.flags,
                soft.flags ^ hard.flags
            ));
        }
        if guest.data() != host.data() {
            let at = guest.data().iter().zip(host.data()).position(|(a, b)| a != b);
            fail(format!("memory at {at:x?}"));
        }
    }
    for (name, (count, example)) in &wrong {
        println!("{name}: {count} times; {example}");
    }
    println!("{} kinds: {seen:?}", seen.len());
    assert!(wrong.is_empty(), "{:?}", wrong.keys());
    assert!(seen.len() > 100, "{}", seen.len());
}

#[test]
fn instructions_do_what_the_host_does() {
    compare(1, 60_000, false);
}

#[test]
#[ignore = "what is undefined is as on one kind of processor"]
fn undefined_results_are_the_hosts() {
    compare(2, 400_000, true);
}
