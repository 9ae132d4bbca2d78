//! MSI-X: the table of messages, masks and pending bits (PCI 6.8.2).

use serde::{Deserialize, Serialize};
use vmcore::Msi;

/// Bits of the message control register.
pub(super) const ENABLE: u16 = 1 << 15;
pub(super) const FUNCTION_MASK: u16 = 1 << 14;
/// Vector control: the vector is masked.
const MASKED: u32 = 1;
/// Bytes of a table entry.
const ENTRY: usize = 16;

/// The vectors of one function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Msix {
    enabled: bool,
    function_masked: bool,
    table: Vec<Entry>,
    /// A bit for each vector.
    pending: Vec<u64>,
}

/// Address, data, vector control.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    address: u64,
    data: u32,
    control: u32,
}

impl Msix {
    pub(super) fn new(vectors: u16) -> Self {
        let entry = Entry { address: 0, data: 0, control: MASKED };
        let (vectors, words) = (usize::from(vectors), usize::from(vectors).div_ceil(64));
        Self { enabled: false, function_masked: false, table: vec![entry; vectors], pending: vec![0; words] }
    }

    pub(super) fn enabled(&self) -> bool {
        self.enabled
    }

    /// Number of vectors.
    pub(super) fn vectors(&self) -> usize {
        self.table.len()
    }

    /// Whether the state, from a snapshot, has the parts that it must have.
    pub(super) fn is_of(&self, vectors: usize) -> bool {
        self.table.len() == vectors && self.pending.len() == vectors.div_ceil(64)
    }

    /// The guest wrote the message control register.
    pub(super) fn control(&mut self, value: u16) {
        self.enabled = value & ENABLE != 0;
        self.function_masked = value & FUNCTION_MASK != 0;
    }

    /// The message of `vector` that is to be sent now; it is pending where it may not be.
    pub(super) fn signal(&mut self, vector: u16, master: bool) -> Option<Msi> {
        let at = usize::from(vector);
        let entry = *self.table.get(at).filter(|_| self.enabled)?;
        if self.function_masked || !master || entry.control & MASKED != 0 {
            self.pending[at / 64] |= 1 << (at % 64);
            return None;
        }
        Some(Msi { address: entry.address, data: entry.data })
    }

    /// Sends every pending message that nothing holds back any more.
    pub(super) fn take_deliverable(&mut self, master: bool, mut send: impl FnMut(Msi)) {
        if !self.enabled || self.function_masked || !master {
            return;
        }
        for (word, entries) in self.pending.iter_mut().zip(self.table.chunks(64)) {
            let mut left = *word;
            while left != 0 {
                let bit = left.trailing_zeros();
                left &= left - 1;
                let Some(entry) = entries.get(bit as usize) else { break };
                if entry.control & MASKED == 0 {
                    *word &= !(1 << bit);
                    send(Msi { address: entry.address, data: entry.data });
                }
            }
        }
    }

    /// Reads from the table. Bytes beyond its end stay as they are.
    pub(super) fn read_table(&self, offset: u64, data: &mut [u8]) {
        let Ok(offset) = usize::try_from(offset) else { return };
        for (byte, at) in data.iter_mut().zip(offset..) {
            let Some(Entry { address, data, control }) = self.table.get(at / ENTRY) else { return };
            let entry = u128::from(*address) | u128::from(*data) << 64 | u128::from(*control) << 96;
            *byte = entry.to_le_bytes()[at % ENTRY];
        }
    }

    /// Writes aligned double or quad words to the table; nothing else is allowed (PCI 6.8.2).
    pub(super) fn write_table(&mut self, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        let Ok(offset) = usize::try_from(offset) else { return };
        for (word, at) in data.chunks_exact(4).zip((offset..).step_by(4)) {
            let (Some(entry), &[a, b, c, d]) = (self.table.get_mut(at / ENTRY), word) else { return };
            let value = u32::from_le_bytes([a, b, c, d]);
            match at % ENTRY {
                // The two lowest bits are zero: messages are double words.
                0 => entry.address = entry.address & !0xffff_ffff | u64::from(value & !3),
                4 => entry.address = entry.address & 0xffff_ffff | u64::from(value) << 32,
                8 => entry.data = value,
                // All but the mask are reserved.
                _ => entry.control = value & MASKED,
            }
        }
    }

    /// Reads the pending bits. Bytes beyond their end stay as they are.
    pub(super) fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let Ok(offset) = usize::try_from(offset) else { return };
        for (byte, at) in data.iter_mut().zip(offset..) {
            let Some(word) = self.pending.get(at / 8) else { return };
            *byte = word.to_le_bytes()[at % 8];
        }
    }
}
