//! The lzop container and LZO1X inside it (Linux `Documentation/staging/lzo.rst`; lzop 1.04
//! manual, "file format").
//!
//! Our own because the crates at hand take neither a limit on their output nor hostile input.

use std::io::{self, BufRead, Read};

const MAGIC: [u8; 9] = *b"\x89LZO\0\r\n\x1a\n";
/// Version from which headers have a "version needed", a level and a second time word.
const VERSION_EXTENDED: u16 = 0x0940;
/// Most bytes of a block, unpacked: what lzop writes and the kernel accepts.
const MAX_BLOCK: u32 = 256 << 10;

/// Header flags.
const ADLER32_UNPACKED: u32 = 0x1;
const ADLER32_PACKED: u32 = 0x2;
const EXTRA_FIELD: u32 = 0x40;
const CRC32_UNPACKED: u32 = 0x100;
const CRC32_PACKED: u32 = 0x200;
const FILTER: u32 = 0x800;

/// Unpacks an lzop file.
pub(super) struct Lzop<R> {
    input: R,
    flags: u32,
    packed: Vec<u8>,
    block: Vec<u8>,
    taken: usize,
    ended: bool,
}

impl<R: BufRead> Lzop<R> {
    /// Reads the header.
    pub(super) fn new(mut input: R) -> io::Result<Self> {
        let mut magic = [0; MAGIC.len()];
        input.read_exact(&mut magic)?;
        if magic != MAGIC {
            return Err(corrupt("no lzop magic"));
        }
        let version = be16(&mut input)?;
        let _library = be16(&mut input)?;
        let extended = version >= VERSION_EXTENDED;
        if extended {
            let _needed = be16(&mut input)?;
        }
        let _method = byte(&mut input)?;
        if extended {
            let _level = byte(&mut input)?;
        }
        let flags = be32(&mut input)?;
        if flags & FILTER != 0 {
            let _filter = be32(&mut input)?;
        }
        let (_mode, _time) = (be32(&mut input)?, be32(&mut input)?);
        if extended {
            let _time_high = be32(&mut input)?;
        }
        let name = byte(&mut input)?;
        skip(&mut input, name.into())?;
        let _checksum = be32(&mut input)?;
        if flags & EXTRA_FIELD != 0 {
            let extra = be32(&mut input)?;
            skip(&mut input, u64::from(extra) + 4)?;
        }
        Ok(Self { input, flags, packed: Vec::new(), block: Vec::new(), taken: 0, ended: false })
    }

    fn next_block(&mut self) -> io::Result<()> {
        self.block.clear();
        self.taken = 0;
        let len = be32(&mut self.input)?;
        if len == 0 {
            self.ended = true;
            return Ok(());
        }
        let packed = be32(&mut self.input)?;
        if len > MAX_BLOCK || packed > len {
            return Err(corrupt("a block larger than 256 KiB, or larger packed than unpacked"));
        }
        let adler = if self.flags & ADLER32_UNPACKED != 0 { Some(be32(&mut self.input)?) } else { None };
        let others = [
            self.flags & CRC32_UNPACKED != 0,
            packed < len && self.flags & ADLER32_PACKED != 0,
            packed < len && self.flags & CRC32_PACKED != 0,
        ];
        for _ in others.into_iter().filter(|&present| present) {
            let _checksum = be32(&mut self.input)?;
        }
        let into = if packed < len { &mut self.packed } else { &mut self.block };
        into.clear();
        if (&mut self.input).take(packed.into()).read_to_end(into)? < packed as usize {
            return Err(corrupt("a block is cut off"));
        }
        if packed < len {
            lzo1x(&self.packed, &mut self.block, len as usize)?;
        }
        if self.block.len() != len as usize {
            return Err(corrupt("a block has another length than its header says"));
        }
        if adler.is_some_and(|adler| adler != adler32(&self.block)) {
            return Err(corrupt("the checksum of a block does not match"));
        }
        Ok(())
    }
}

impl<R: BufRead> BufRead for Lzop<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.taken >= self.block.len() && !self.ended {
            self.next_block()?;
        }
        Ok(self.block.get(self.taken..).unwrap_or_default())
    }

    fn consume(&mut self, amount: usize) {
        self.taken = self.taken.saturating_add(amount).min(self.block.len());
    }
}

impl<R: BufRead> Read for Lzop<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.fill_buf()?.read(buf)?;
        self.consume(count);
        Ok(count)
    }
}

/// Unpacks one LZO1X stream to `out`, `max` bytes at most.
///
/// Each instruction copies a match and then up to three literals; how many is the state, which
/// gives the instructions below 16 their meaning.
fn lzo1x(packed: &[u8], out: &mut Vec<u8>, max: usize) -> io::Result<()> {
    let mut input = packed;
    let mut state = 0;
    if let Some(&first) = packed.first()
        && first >= 18
    {
        let count = usize::from(first) - 17;
        input = &packed[1..];
        literals(&mut input, out, count, max)?;
        state = if count < 4 { count } else { 4 };
    }
    loop {
        let op = usize::from(byte(&mut input)?);
        let (distance, len, next) = match op {
            0..16 if state == 0 => {
                let count = extended(&mut input, op, 15)? + 3;
                literals(&mut input, out, count, max)?;
                state = 4;
                continue;
            }
            0..16 => {
                let high = usize::from(byte(&mut input)?) << 2;
                let (base, len) = if state == 4 { (2049, 3) } else { (1, 2) };
                (base + high + (op >> 2), len, op & 3)
            }
            16..32 => {
                let len = extended(&mut input, op & 7, 7)? + 2;
                let tail = usize::from(le16(&mut input)?);
                let distance = 16384 + ((op & 8) << 11) + (tail >> 2);
                if distance == 16384 {
                    return Ok(());
                }
                (distance, len, tail & 3)
            }
            32..64 => {
                let len = extended(&mut input, op & 31, 31)? + 2;
                let tail = usize::from(le16(&mut input)?);
                (1 + (tail >> 2), len, tail & 3)
            }
            _ => {
                let len = if op < 128 { 3 + (op >> 5 & 1) } else { 5 + (op >> 5 & 3) };
                let high = usize::from(byte(&mut input)?) << 3;
                (1 + high + (op >> 2 & 7), len, op & 3)
            }
        };
        let Some(from) = out.len().checked_sub(distance) else {
            return Err(corrupt("a match reaches before the beginning"));
        };
        if len > max - out.len() {
            return Err(corrupt("a block unpacks to more than its header says"));
        }
        // A match may reach into what it writes: it repeats then.
        for at in from..from + len {
            out.push(out[at]);
        }
        literals(&mut input, out, next, max)?;
        state = next;
    }
}

/// A length: `value`, or where that is 0 `base` plus 255 for every zero byte plus the next byte.
fn extended(input: &mut &[u8], value: usize, base: usize) -> io::Result<usize> {
    if value != 0 {
        return Ok(value);
    }
    let mut len = base;
    loop {
        match byte(input)? {
            // At most as often as there are bytes in a block.
            0 => len += 255,
            last => return Ok(len + usize::from(last)),
        }
    }
}

fn literals(input: &mut &[u8], out: &mut Vec<u8>, count: usize, max: usize) -> io::Result<()> {
    let Some((bytes, rest)) = input.split_at_checked(count) else {
        return Err(corrupt("a literal run is cut off"));
    };
    if count > max - out.len() {
        return Err(corrupt("a block unpacks to more than its header says"));
    }
    out.extend_from_slice(bytes);
    *input = rest;
    Ok(())
}

/// RFC 1950, 9.
fn adler32(bytes: &[u8]) -> u32 {
    let (mut a, mut b) = (1u32, 0u32);
    // The sums of so many bytes fit 32 bits.
    for chunk in bytes.chunks(5552) {
        for &byte in chunk {
            a += u32::from(byte);
            b += a;
        }
        a %= 65521;
        b %= 65521;
    }
    b << 16 | a
}

fn byte(input: &mut impl Read) -> io::Result<u8> {
    let mut bytes = [0];
    input.read_exact(&mut bytes)?;
    Ok(bytes[0])
}

fn le16(input: &mut impl Read) -> io::Result<u16> {
    let mut bytes = [0; 2];
    input.read_exact(&mut bytes)?;
    Ok(u16::from_le_bytes(bytes))
}

fn be16(input: &mut impl Read) -> io::Result<u16> {
    Ok(le16(input)?.swap_bytes())
}

fn be32(input: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    input.read_exact(&mut bytes)?;
    Ok(u32::from_be_bytes(bytes))
}

fn skip(input: &mut impl Read, count: u64) -> io::Result<()> {
    let skipped = io::copy(&mut input.take(count), &mut io::sink())?;
    if skipped == count { Ok(()) } else { Err(corrupt("the header is cut off")) }
}

fn corrupt(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
