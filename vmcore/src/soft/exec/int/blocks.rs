//! Instructions in blocks against the same ones in single steps: whatever a block makes of its
//! instructions together (`peephole`, blocks that follow one another), nobody may see.
#![expect(clippy::cast_possible_truncation, reason = "encodings are made of bytes")]

use super::programs::{DATA, Program, RBX};

/// Programs tried.
const PROGRAMS: usize = 4000;
/// Instructions of a program.
const LENGTH: u64 = 24;
/// Where the first one is, and how far apart they are.
const CODE: u64 = 0x20_0000;
const APART: u64 = 0x200;
/// An address that is not canonical, so that using it faults.
const NOWHERE: u64 = 1 << 63;
/// The register that has it.
const R15: usize = 15;

struct Random(u64);

impl Random {
    /// A number below `end`.
    fn below(&mut self, end: u64) -> u64 {
        self.bits() % end
    }

    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// A register that programs change: not RBX and R15, which are addresses, nor RSP.
    fn register(&mut self) -> u8 {
        const REGISTERS: [u8; 8] = [0, 1, 2, 5, 6, 7, 9, 12];
        REGISTERS[self.below(8) as usize]
    }
}

/// REX for two registers, of which the second is the one in ModRM's low bits.
fn rex(wide: bool, reg: u8, rm: u8) -> u8 {
    0x40 | u8::from(wide) << 3 | (reg >> 3) << 2 | rm >> 3
}

/// ModRM with two registers.
fn registers(reg: u8, rm: u8) -> u8 {
    0xc0 | (reg & 7) << 3 | rm & 7
}

/// One instruction that does not branch.
fn instruction(random: &mut Random) -> Vec<u8> {
    let (a, b) = (random.register(), random.register());
    let wide = random.below(2) == 0;
    let byte = random.below(4) == 0;
    let full = u8::from(!byte);
    let small = [0, 1, 2, 7, 0x7f, 0x80, 0xff][random.below(7) as usize];
    let near = random.below(32) as u8;
    let rex_ab = rex(wide, a, b);
    let group = random.below(8) as u8;
    let condition = random.below(16) as u8;
    match random.below(21) {
        // The eight operations of two operands: registers, immediate.
        0..=2 => vec![rex_ab, group << 3 | full, registers(a, b)],
        3 | 4 => vec![rex(wide, 0, b), if byte { 0x80 } else { 0x83 }, registers(group, b), small],
        // CMP and TEST of registers, with an immediate, with memory at RBX.
        5 => vec![rex_ab, 0x38 | full, registers(a, b)],
        6 => vec![rex_ab, 0x84 | full, registers(a, b)],
        7 => vec![rex(wide, 0, b), 0xf6, registers(0, b), small],
        8 => vec![rex(wide, 0, 3), if byte { 0x80 } else { 0x83 }, 0x7b, near, small],
        9 => vec![rex(wide, 0, 3), 0xf6, 0x43, near, small],
        // Shifts and rotations by an immediate, by CL.
        10 | 11 => vec![rex(wide, 0, b), 0xc0 | full, registers(group, b), small],
        12 => vec![rex(wide, 0, b), 0xd2 | full, registers(group, b)],
        // INC, DEC, NOT, NEG.
        13 => vec![rex(wide, 0, b), 0xfe | full, registers(group & 1, b)],
        14 => vec![rex(wide, 0, b), 0xf6 | full, registers(2 | group & 1, b)],
        // IMUL of two and three operands.
        15 => vec![rex_ab, 0x0f, 0xaf, registers(a, b)],
        16 => vec![rex_ab, 0x6b, registers(a, b), small],
        // What reads flags: SETcc, CMOVcc.
        17 => vec![rex(false, 0, b), 0x0f, 0x90 | condition, registers(0, b)],
        18 => vec![rex_ab, 0x0f, 0x40 | condition, registers(a, b)],
        // What leaves them: MOV, MOVZX, LEA; and a load and a store.
        19 => match group {
            0..=2 => vec![rex_ab, 0x89, registers(a, b)],
            3..=5 => vec![rex_ab, 0x0f, 0xb6 | full, registers(a, b)],
            _ => vec![rex(true, a, 3), 0x8d, 0x43 | (a & 7) << 3, near],
        },
        _ => vec![rex(wide, a, 3), if byte { 0x89 } else { 0x8b }, 0x43 | (a & 7) << 3, near],
    }
}

/// A program with forward branches, which ends in a HLT or in a fault.
fn program(random: &mut Random) -> Vec<u8> {
    let mut instructions: Vec<Vec<u8>> = (0..LENGTH).map(|_| instruction(random)).collect();
    if random.below(2) == 0 {
        // MOV RDX, [R15]
        instructions.insert(random.below(LENGTH) as usize, vec![0x49, 0x8b, 0x17]);
    }
    // From the end, so that what is branched over has its final length.
    for n in (0..instructions.len()).rev() {
        let over = random.below(4) as usize;
        let distance: usize = instructions[n..].iter().take(over).map(Vec::len).sum();
        match random.below(12) {
            0..=3 => instructions.insert(n, vec![0x70 | random.below(16) as u8, distance as u8]),
            4 => instructions.insert(n, vec![0xeb, distance as u8]),
            _ => {}
        }
    }
    instructions.push(vec![0xf4]);
    instructions.concat()
}

#[test]
fn blocks_do_what_single_steps_do() {
    let mut random = Random(1);
    let (mut blocks, mut steps) = (Program::new(64, |_| {}), Program::new(64, |_| {}));
    for n in 0..PROGRAMS {
        let code = program(&mut random);
        let at = CODE + APART * n as u64;
        // Again with other values: the blocks are known then, and follow one another.
        for turn in 0..3 {
            let mut values: [u64; 16] = std::array::from_fn(|_| random.bits() >> (random.bits() & 56));
            (values[RBX], values[R15]) = (DATA, NOWHERE);
            let data = random.bits();
            let [a, b] = [(&mut blocks, false), (&mut steps, true)].map(|(program, single)| {
                if turn == 0 {
                    program.put(at, &code);
                }
                (0..8).for_each(|word| program.put(DATA + 8 * word, &data.to_le_bytes()));
                let before = program.instructions();
                let end = program.run_from(at, &values, single);
                (end, program.instructions() - before, program.bytes(DATA, 64))
            });
            assert_eq!(a, b, "program {n}, turn {turn}: {code:02x?} with {values:x?}");
        }
    }
}

#[test]
fn the_blocks_of_endless_code_take_bounded_memory() {
    const JUMPS: usize = 200_000;
    let mut program = Program::new(64, |_| {});
    // Each jump to the next instruction is a block.
    let code = [[0xeb, 0x00].repeat(JUMPS), vec![0xf4]].concat();
    program.put(CODE, &code);
    let (_, fault) = program.run_from(CODE, &[0; 16], false);
    assert!(!fault);
    assert_eq!(program.instructions(), JUMPS as u64 + 1);
    let (bytes, most) = program.size_of_blocks();
    assert!(bytes <= most && most < JUMPS * 100, "{bytes} of {most}");
}
