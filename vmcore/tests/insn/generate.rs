//! Random instructions and states.
#![expect(clippy::cast_possible_truncation, reason = "random bits are cut to size")]

use std::collections::HashMap;
use std::ops::Range;

use iced_x86::{
    Code, CodeSize, CpuidFeature, Decoder, DecoderOptions, FlowControl, Formatter, Instruction,
    InstructionInfoFactory, Mnemonic, NasmFormatter, OpKind, Register,
};

use crate::{MEMORY, State};

/// One instruction with the state before it.
pub struct Case {
    pub bytes: Vec<u8>,
    pub text: String,
    pub instruction: Instruction,
    pub state: State,
    /// RFLAGS bits that the instruction leaves undefined.
    pub undefined_flags: u64,
    /// Bytes of the memory that depend on where the code is: x87's pointers in an environment.
    pub elsewhere: Range<usize>,
}

impl Case {
    pub fn code_name(&self) -> String {
        format!("{:?}", self.instruction.code())
    }

    fn is_x87(&self) -> bool {
        self.instruction.cpuid_features().iter().any(|f| {
            matches!(f, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387 | CpuidFeature::MMX)
        })
    }

    /// The parts of the FXSAVE area to compare, with names.
    pub fn fx_ranges(&self) -> Vec<(String, Range<usize>)> {
        let mut ranges = vec![("mxcsr".to_owned(), 24..28)];
        ranges.extend((0..16).map(|n| (format!("xmm{n}"), 160 + 16 * n..176 + 16 * n)));
        if self.is_x87() {
            ranges.extend([("fcw".to_owned(), 0..2), ("fsw".to_owned(), 2..4), ("ftw".to_owned(), 4..5)]);
            ranges.extend((0..8).map(|n| (format!("st{n}"), 32 + 16 * n..42 + 16 * n)));
        }
        ranges
    }
}

/// xorshift64*: repeatable everywhere.
pub struct Random(u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// Numbers that find bugs: small, extreme, and any.
    fn interesting(&mut self) -> u64 {
        let value = match self.below(8) {
            0 => self.below(4),
            1 => u64::MAX - self.below(4),
            2 => 1 << self.below(64),
            3 => (1 << self.below(64)) - 1,
            4 => [0x7f, 0x80, 0x7fff, 0x8000, 0x7fff_ffff, 0x8000_0000, i64::MAX as u64, 1 << 63]
                [self.below(8) as usize],
            _ => self.next(),
        };
        if self.below(4) == 0 { value & 0xffff_ffff } else { value }
    }

    fn float(&mut self) -> [u8; 16] {
        let mut bytes = [0; 16];
        let specials32 =
            [0u32, 0x8000_0000, 0x3f80_0000, 0x7f80_0000, 0xff80_0000, 0x7fc0_0000, 0x7fa0_0000, 1];
        let specials64 = [
            0u64,
            1 << 63,
            0x3ff0_0000_0000_0000,
            0x7ff0_0000_0000_0000,
            0x7ff8_0000_0000_0000,
            0x7ff4_0000_0000_0000,
            1,
        ];
        match self.below(4) {
            0 => {
                for chunk in bytes.chunks_exact_mut(4) {
                    let value = if self.below(2) == 0 {
                        specials32[self.below(8) as usize]
                    } else {
                        (self.below(4096) as f32 / 16.0 - 100.0).to_bits()
                    };
                    chunk.copy_from_slice(&value.to_le_bytes());
                }
            }
            1 => {
                for chunk in bytes.chunks_exact_mut(8) {
                    let value = if self.below(2) == 0 {
                        specials64[self.below(7) as usize]
                    } else {
                        (self.below(1 << 20) as f64 / 64.0 - 4000.0).to_bits()
                    };
                    chunk.copy_from_slice(&value.to_le_bytes());
                }
            }
            _ => {
                bytes[..8].copy_from_slice(&self.interesting().to_le_bytes());
                bytes[8..].copy_from_slice(&self.interesting().to_le_bytes());
            }
        }
        bytes
    }
}

pub struct Generator {
    random: Random,
    only: Option<String>,
    seen: HashMap<Code, u32>,
    info: InstructionInfoFactory,
}

/// What the software CPU has, and every host that runs these tests.
fn supported(features: &[CpuidFeature]) -> bool {
    use CpuidFeature as F;
    features.iter().all(|feature| {
        matches!(
            feature,
            F::INTEL8086
                | F::INTEL186
                | F::INTEL286
                | F::INTEL386
                | F::INTEL486
                | F::X64
                | F::CMOV
                | F::CX8
                | F::CMPXCHG16B
                | F::MULTIBYTENOP
                | F::POPCNT
                | F::MOVBE
                | F::FPU
                | F::FPU287
                | F::FPU387
                | F::MMX
                | F::SSE
                | F::SSE2
                | F::SSE3
                | F::SSSE3
                | F::SSE4_1
                | F::SSE4_2
                | F::AES
                | F::PCLMULQDQ
                | F::SHA
                | F::CLFSH
                | F::PAUSE
        )
    })
}

/// What cannot be compared: it looks at the machine, stops it, or leaves the user's world.
fn excluded(i: &Instruction) -> bool {
    use Mnemonic as M;
    let through = |segment| i.op_count() > 0 && i.memory_segment() == segment;
    i.flow_control() != FlowControl::Next
        // The code is elsewhere in the guest.
        || i.is_ip_rel_memory_operand()
        // Intel's are no operations, AMD's undefined.
        || matches!(i.code(), Code::Reservednop_rm16_r16_0F0D | Code::Reservednop_rm32_r32_0F0D | Code::Reservednop_rm64_r64_0F0D)
        || i.is_string_instruction() && (through(Register::FS) || through(Register::GS))
        || i.is_privileged()
        || i.memory_segment() == Register::FS && i.op_kinds().any(|k| k == OpKind::Memory)
        || i.memory_segment() == Register::GS && i.op_kinds().any(|k| k == OpKind::Memory)
        || i.op_kinds().any(|kind| kind == OpKind::Register)
            && (0..i.op_count())
                .any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_segment_register())
        || matches!(
            i.mnemonic(),
            M::Cpuid
                | M::Rdtsc
                | M::Rdtscp
                | M::Pushfq
                | M::Popfq
                | M::Pushf
                | M::Popf
                | M::In
                | M::Out
                | M::Insb
                | M::Insw
                | M::Insd
                | M::Outsb
                | M::Outsw
                | M::Outsd
                | M::Cli
                | M::Sti
                | M::Sldt
                | M::Str
                | M::Smsw
                | M::Sgdt
                | M::Sidt
                | M::Lar
                | M::Lsl
                | M::Verr
                | M::Verw
                | M::Lss
                | M::Lfs
                | M::Lgs
                | M::Fxrstor
                | M::Fxrstor64
                | M::Fxsave
                | M::Fxsave64
                | M::Ldmxcsr
                | M::Fsave
                | M::Fstenv
                | M::Arpl
        )
}

impl Generator {
    pub fn new(seed: u64, only: Option<String>) -> Self {
        let random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        Self { random, only, seen: HashMap::new(), info: InstructionInfoFactory::new() }
    }

    /// How many different instructions there were.
    pub fn codes(&self) -> usize {
        self.seen.len()
    }

    pub fn next(&mut self, memory: u64) -> Case {
        loop {
            if let Some(case) = self.try_next(memory) {
                return case;
            }
        }
    }

    fn bytes(&mut self) -> [u8; 15] {
        let r = &mut self.random;
        let mut bytes = [0; 15];
        bytes[..8].copy_from_slice(&r.next().to_le_bytes());
        bytes[7..].copy_from_slice(&r.next().to_le_bytes());
        let mut at = 0;
        if r.below(3) == 0 {
            bytes[at] = [0x66, 0xf2, 0xf3, 0xf0, 0x67, 0x2e, 0x36, 0x26, 0x3e][r.below(9) as usize];
            at += 1;
        }
        if r.below(2) == 0 {
            bytes[at] = 0x40 | r.below(16) as u8;
            at += 1;
        }
        match r.below(5) {
            0 | 1 => {
                bytes[at] = 0x0f;
                if r.below(3) == 0 {
                    bytes[at + 1] = [0x38, 0x3a][r.below(2) as usize];
                }
            }
            2 => bytes[at] = 0xd8 | r.below(8) as u8,
            _ => {}
        }
        bytes
    }

    fn try_next(&mut self, memory: u64) -> Option<Case> {
        let bytes = self.bytes();
        let instruction = Decoder::with_ip(64, &bytes, 0, DecoderOptions::NONE).decode();
        if instruction.is_invalid()
            || instruction.code_size() != CodeSize::Code64
            || excluded(&instruction)
            || !supported(instruction.cpuid_features())
        {
            return None;
        }
        let mut text = String::new();
        NasmFormatter::new().format(&instruction, &mut text);
        if self.only.as_ref().is_some_and(|only| !text.split(' ').any(|word| word == only)) {
            return None;
        }
        // Every instruction its share: the common ones are thinned out.
        let seen = self.seen.entry(instruction.code()).or_default();
        if *seen > 8 && self.only.is_none() && self.random.below(u64::from(*seen / 4)) != 0 {
            return None;
        }
        *seen += 1;
        let (state, at) = self.state(&instruction, memory)?;
        let undefined_flags = undefined(&instruction);
        // The environment's fourth to seventh word.
        let elsewhere = match instruction.code() {
            Code::Fnstenv_m14byte | Code::Fnsave_m94byte => at + 6..at + 14,
            Code::Fnstenv_m28byte | Code::Fnsave_m108byte => at + 12..at + 28,
            _ => 0..0,
        };
        let bytes = bytes[..instruction.len()].to_vec();
        Some(Case { bytes, text, instruction, state, undefined_flags, elsewhere })
    }

    /// A state in which every address of the instruction is in the memory, and where its operand is there.
    fn state(&mut self, i: &Instruction, memory: u64) -> Option<(State, usize)> {
        let r = &mut self.random;
        let mut gpr: [u64; 16] = std::array::from_fn(|_| r.interesting());
        gpr[4] = memory + 2048 + 8 * r.below(256);
        let mut fx = vec![0; 512];
        fx[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
        let rounding = r.below(4) as u32;
        let modes = [0, 0, 0, 0x8040, 0x8000, 0x40][r.below(6) as usize];
        // Sometimes with exceptions that are not masked, and with flags of earlier ones.
        let masks = if r.below(4) == 0 { r.next() as u32 & 0x1f80 } else { 0x1f80 };
        let raised = if r.below(2) == 0 { r.next() as u32 & 0x3f } else { 0 };
        let mxcsr = masks | rounding << 13 | modes | raised;
        fx[24..28].copy_from_slice(&mxcsr.to_le_bytes());
        fx[28..32].copy_from_slice(&0xffffu32.to_le_bytes());
        for n in 0..16 {
            fx[160 + 16 * n..][..16].copy_from_slice(&r.float());
        }
        let x87 = i
            .cpuid_features()
            .iter()
            .any(|f| matches!(f, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387));
        if x87 || i.cpuid_features().contains(&CpuidFeature::MMX) {
            let masks = if r.below(4) == 0 { r.next() as u16 & 0x3f } else { 0x3f };
            let control =
                0x40u16 | masks | [0, 0x200, 0x300][r.below(3) as usize] | (r.below(4) as u16) << 10;
            fx[0..2].copy_from_slice(&control.to_le_bytes());
            // Condition codes, and flags of earlier exceptions; now and then one that is pending.
            let earlier = r.next() as u16 & 0x477f;
            let earlier = if r.below(8) == 0 { earlier } else { earlier & !(0x3f & !masks) };
            let pending = if earlier & 0x3f & !masks != 0 { 0x8080 } else { 0 };
            let top = r.below(8) as u16;
            fx[2..4].copy_from_slice(&(top << 11 | earlier | pending).to_le_bytes());
            fx[4] = r.next() as u8 | r.next() as u8;
            for n in 0..8 {
                let value = match r.below(8) {
                    // Denormals, pseudo-denormals, unnormals, NaNs, extremes.
                    4 => vec![r.next() >> r.below(64), r.below(2) << 15],
                    5 => vec![r.next() >> 1, r.next() & 0xffff],
                    6 => vec![r.next(), 0x7fff | r.below(2) << 15],
                    7 => vec![r.next() | 1 << 63, r.next() & 0xffff],
                    0 => [0x8000_0000_0000_0000, 0x7fff, 0][..2].to_vec(),
                    1 => vec![0, 0],
                    2 => vec![r.next() | 1 << 63, (0x3fff + r.below(64) - 32) | (r.below(2) << 15)],
                    _ => vec![0xc000_0000_0000_0000, 0x3ffe + r.below(8)],
                };
                fx[32 + 16 * n..][..8].copy_from_slice(&value[0].to_le_bytes());
                fx[40 + 16 * n..][..2].copy_from_slice(&(value[1] as u16).to_le_bytes());
            }
        }
        // Repetitions stay within the memory.
        let repeats = i.has_rep_prefix() || i.has_repe_prefix() || i.has_repne_prefix();
        let string = i.is_string_instruction();
        if string {
            if repeats {
                gpr[1] = r.below(40);
            }
            gpr[6] = memory + 3000 + r.below(2000);
            gpr[7] = memory + 3000 + r.below(2000);
        }
        let mut at = 0;
        match i.mnemonic() {
            Mnemonic::Maskmovq | Mnemonic::Maskmovdqu => gpr[7] = memory + 2000 + r.below(4096),
            Mnemonic::Xlatb => gpr[3] = memory + 2000 + r.below(4096),
            Mnemonic::Leave => gpr[5] = memory + 2000 + 8 * r.below(256),
            Mnemonic::Enter => {
                if i.immediate16() > 1024 {
                    return None;
                }
                gpr[5] = memory + 2000 + 8 * r.below(256);
            }
            _ => {}
        }
        if !string && i.op_kinds().any(|kind| kind == OpKind::Memory) && i.mnemonic() != Mnemonic::Lea {
            let address =
                |register: Register| register == Register::None || register.is_gpr64() || register.is_gpr32();
            if !address(i.memory_base()) || !address(i.memory_index()) || i.memory_base() == Register::None {
                return None;
            }
            // With 32-bit registers the upper halves do not count.
            let narrow = i.memory_base().is_gpr32();
            let above = if narrow { r.next() << 32 } else { 0 };
            let base = i.memory_base().number();
            let size = i.memory_size().size() as u64;
            let mut offset = 2000 + r.below(4096);
            if r.below(4) != 0 && size >= 16 {
                offset &= !15;
            }
            let bit_string =
                matches!(i.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc);
            if bit_string && i.op1_kind() == OpKind::Register {
                let register = i.op1_register().full_register().number();
                if register == base || register == 4 {
                    return None;
                }
                gpr[register] = r.below(8000).wrapping_sub(4000);
            }
            if i.memory_index() != Register::None {
                let index = i.memory_index().number();
                if index == base || index == 4 {
                    return None;
                }
                gpr[index] = r.below(16);
                if bit_string
                    && i.op1_kind() == OpKind::Register
                    && i.op1_register().full_register().number() == index
                {
                    return None;
                }
            }
            let index = match i.memory_index() {
                Register::None => 0,
                register => gpr[register.number()].wrapping_mul(i.memory_index_scale().into()),
            };
            let wanted = (memory + offset).wrapping_sub(index).wrapping_sub(i.memory_displacement64());
            let implicit_stack =
                self.info.info(i).used_registers().iter().any(|u| u.register() == Register::RSP);
            if base == 4 && implicit_stack {
                return None;
            }
            let wanted = if narrow { wanted & 0xffff_ffff | above } else { wanted };
            gpr[base] = wanted;
            at = offset as usize;
            // The address must not depend on anything that must stay what it is.
            if base == 4 && !(memory..memory + MEMORY as u64).contains(&wanted) {
                return None;
            }
        }
        let mut bytes = vec![0; MEMORY];
        for chunk in bytes.chunks_exact_mut(16) {
            chunk.copy_from_slice(&r.float());
        }
        let flags = 2 | r.next() & 0x8d5 | if string && r.below(3) == 0 { 1 << 10 } else { 0 };
        Some((State { gpr, flags, fx, memory: bytes, fault: None }, at))
    }
}

/// RFLAGS bits that `i` leaves undefined.
fn undefined(i: &Instruction) -> u64 {
    use iced_x86::RflagsBits as B;
    let bits = i.rflags_undefined();
    let map = [(B::CF, 1), (B::PF, 4), (B::AF, 0x10), (B::ZF, 0x40), (B::SF, 0x80), (B::OF, 0x800)];
    map.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, flag)| flag).sum()
}
