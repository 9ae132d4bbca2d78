//! The legacy LZ4 frame, which `lz4 -l` writes and Linux kernels are packed in (LZ4 frame format
//! 1.6.4, "Legacy frame").
//!
//! lz4_flex reads this frame too, but with a whole frame around every block size that it accepts;
//! here blocks are handed out where they were unpacked, without a copy.

use std::io::{self, BufRead, Read};

const MAGIC: u32 = 0x184C_2102;
/// Every block but the last unpacks to this length, in bytes.
const BLOCK: usize = 8 << 20;
/// A block that cannot be packed grows by 1/255 and 16 bytes at most.
const MAX_PACKED: usize = BLOCK + BLOCK / 255 + 16;

/// Unpacks a legacy frame.
pub(super) struct Lz4Legacy<R> {
    input: R,
    packed: Vec<u8>,
    block: Vec<u8>,
    /// What of `block` is still to be handed out.
    ready: std::ops::Range<usize>,
}

impl<R: BufRead> Lz4Legacy<R> {
    pub(super) fn new(input: R) -> Self {
        Self { input, packed: Vec::new(), block: Vec::new(), ready: 0..0 }
    }

    /// Unpacks the next block. At the end there is none.
    fn next_block(&mut self) -> io::Result<()> {
        let mut word = [0; 4];
        loop {
            if self.input.fill_buf()?.is_empty() {
                return Ok(());
            }
            self.input.read_exact(&mut word)?;
            // The frame's own magic, or that of a frame appended.
            if u32::from_le_bytes(word) != MAGIC {
                break;
            }
        }
        let len = usize::try_from(u32::from_le_bytes(word)).unwrap_or(usize::MAX);
        if len == 0 || len > MAX_PACKED {
            return Err(corrupt(format!("a block of {len} packed bytes, expected 1 to {MAX_PACKED}")));
        }
        // Grows as data arrives: a length alone costs nothing.
        self.packed.clear();
        let read = (&mut self.input).take(len as u64).read_to_end(&mut self.packed)?;
        if read < len {
            return Err(corrupt(format!("a block of {len} packed bytes ends after {read}")));
        }
        self.block.resize(BLOCK, 0);
        let unpacked = lz4_flex::block::decompress_into(&self.packed, &mut self.block)
            .map_err(|e| corrupt(e.to_string()))?;
        self.ready = 0..unpacked;
        Ok(())
    }
}

impl<R: BufRead> BufRead for Lz4Legacy<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.ready.is_empty() {
            self.next_block()?;
        }
        Ok(self.block.get(self.ready.clone()).unwrap_or_default())
    }

    fn consume(&mut self, amount: usize) {
        self.ready.start = self.ready.end.min(self.ready.start.saturating_add(amount));
    }
}

impl<R: BufRead> Read for Lz4Legacy<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.fill_buf()?.read(buf)?;
        self.consume(count);
        Ok(count)
    }
}

fn corrupt(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
