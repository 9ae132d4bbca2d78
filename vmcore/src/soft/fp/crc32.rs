//! CRC32 of SSE4.2: the checksum of iSCSI, polynomial 0x11EDC6F41, bits reflected.

use iced_x86::{Code, Instruction, OpKind};

use crate::soft::cpu::Cpu;
use crate::soft::cpu::op::{Flow, Handler, Op, Selected};
use crate::soft::cpu::word::Word;

/// What each byte adds.
static TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut n = 0u32;
    while n < 256 {
        let mut crc = n;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 != 0 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        table[n as usize] = crc;
        n += 1;
    }
    table
};

fn crc<W: Word>(mut crc: u32, value: W) -> u32 {
    let bytes = value.zext().to_le_bytes();
    for byte in &bytes[..(W::BITS / 8) as usize] {
        crc = TABLE[usize::from(crc.to_le_bytes()[0] ^ byte)] ^ crc >> 8;
    }
    crc
}

fn register<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = cpu.reg::<W>(op.src);
    let result = crc(cpu.reg(op.dst), value);
    cpu.set_reg(op.dst, result);
    Ok(())
}

fn memory<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = cpu.load_operand::<W>(op)?;
    let result = crc(cpu.reg(op.dst), value);
    cpu.set_reg(op.dst, result);
    Ok(())
}

/// The handler of CRC32.
pub(super) fn select(i: &Instruction) -> Option<Selected> {
    let [in_register, in_memory]: [Handler; 2] = match i.code() {
        Code::Crc32_r32_rm8 | Code::Crc32_r64_rm8 => [register::<u8>, memory::<u8>],
        Code::Crc32_r32_rm16 => [register::<u16>, memory::<u16>],
        Code::Crc32_r32_rm32 => [register::<u32>, memory::<u32>],
        Code::Crc32_r64_rm64 => [register::<u64>, memory::<u64>],
        _ => return None,
    };
    Some(Selected::plain(if i.op1_kind() == OpKind::Memory { in_memory } else { in_register }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_check_value_is_the_standards() {
        // RFC 3720, B.4: 32 bytes of zeros.
        let crc = (0..4).fold(u32::MAX, |sum, _| crc(sum, 0u64));
        assert_eq!(!crc, 0x8a91_36aa);
    }
}
