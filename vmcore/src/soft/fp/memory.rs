//! Memory operands of 10 and 16 bytes and their alignment.

use super::state::{vector, words};
use crate::soft::cpu::Cpu;
use crate::soft::cpu::op::{Flow, Op, Stop};
use crate::soft::cpu::word::Word;

impl Cpu {
    /// Address of a 16-byte operand, which must be aligned where `aligned`.
    ///
    /// # Errors
    /// By the segment, and #GP(0) by the alignment.
    #[inline(always)]
    pub(super) fn vector_address(&mut self, op: &Op, aligned: bool, write: bool) -> Result<u64, Stop> {
        let at = self.address(op, 16, write)?;
        if aligned && at & 15 != 0 {
            return Err(self.gp(0));
        }
        Ok(at)
    }

    /// Loads `size` bytes: 1, 2, 4, 8, 10 or 16.
    ///
    /// # Errors
    /// As [`Cpu::load`].
    #[inline(always)]
    pub(super) fn load_part(&mut self, at: u64, size: u64) -> Result<[u64; 2], Stop> {
        Ok(match size {
            1 => [self.load::<u8>(at)?.into(), 0],
            2 => [self.load::<u16>(at)?.into(), 0],
            4 => [self.load::<u32>(at)?.into(), 0],
            8 => [self.load(at)?, 0],
            10 => {
                let low = self.load(at)?;
                [low, self.load::<u16>(self.after(at, 8))?.into()]
            }
            _ => words(self.load_vector(at)?),
        })
    }

    /// Stores the low `size` bytes of `value`, all or none.
    ///
    /// # Errors
    /// As [`Cpu::store`].
    #[inline(always)]
    pub(super) fn store_part(&mut self, at: u64, size: u64, value: [u64; 2]) -> Flow {
        match size {
            1 => self.store(at, u8::cut(value[0])),
            2 => self.store(at, u16::cut(value[0])),
            4 => self.store(at, u32::cut(value[0])),
            8 => self.store(at, value[0]),
            10 => {
                self.check_write(at, 10)?;
                self.store(at, value[0])?;
                self.store(self.after(at, 8), u16::cut(value[1]))
            }
            _ => self.store_vector(at, vector(value)),
        }
    }
}
