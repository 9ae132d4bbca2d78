//! VHDX images (Hyper-V): dynamic and fixed ones, to be read.
//!
//! Two headers, two region tables, a metadata table, a block allocation table, blocks; all numbers are
//! little-endian. The layout and the names are those of MS-VHDX 1.0.

use std::fs::File;
use std::io;

use super::mapped::{Fields, Map, Place, damaged, read_up_to};
use super::{DiskError, Image, SECTOR};

pub(super) const MAGIC: &[u8] = b"vhdxfile";

const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
const HEADER_LEN: usize = 4 << 10;
const REGION_TABLES: [u64; 2] = [192 << 10, 256 << 10];
const REGION_TABLE_LEN: usize = 64 << 10;
const METADATA_TABLE_LEN: usize = 64 << 10;
const MOST_REGIONS: u32 = 2047;
const MOST_ITEMS: u16 = 2047;
const MIB: u64 = 1 << 20;

/// Most blocks of a disk: 64 TiB where they have 1 MiB, the least.
const MOST_BLOCKS: u64 = 64 << 20;

/// Identifiers, as their bytes are in a file.
mod guid {
    /// A GUID as it is printed, but for the dashes: the first three groups are little-endian.
    const fn guid(text: u128) -> [u8; 16] {
        let [a, b, c, d, e, f, g, h, rest @ ..] = text.to_be_bytes();
        let [i, j, k, l, m, n, o, p] = rest;
        [d, c, b, a, f, e, h, g, i, j, k, l, m, n, o, p]
    }

    pub(super) const BAT: [u8; 16] = guid(0x2DC2_7766_F623_4200_9D64_115E_9BFD_4A08);
    pub(super) const METADATA: [u8; 16] = guid(0x8B7C_A206_4790_4B9A_B8FE_575F_050F_886E);
    pub(super) const FILE_PARAMETERS: [u8; 16] = guid(0xCAA1_6737_FA36_4D43_B3B6_33F0_AA44_E76B);
    pub(super) const DISK_SIZE: [u8; 16] = guid(0x2FA5_4224_CD1B_4876_B211_5DBE_D83B_F4B8);
    pub(super) const SECTOR_SIZE: [u8; 16] = guid(0x8141_BF1D_A96F_4709_BA47_F233_A8FA_AB5F);
    pub(super) const PHYSICAL_SECTOR_SIZE: [u8; 16] = guid(0xCDA3_48C7_445D_4471_9CC9_E988_5251_C556);
    pub(super) const PAGE_83: [u8; 16] = guid(0xBECA_12AB_B2E6_4523_93EF_C309_E000_C746);
}

#[derive(Debug)]
pub(super) struct Vhdx {
    len: u64,
    block: u64,
    /// Payload blocks between two blocks of the sector bitmap.
    chunk: u64,
    /// Where the block allocation table is, in bytes, and how many entries it has.
    bat: (u64, u64),
}

/// CRC-32C (Castagnoli), bit by bit: it is for a few hundred kilobytes.
fn crc32c(parts: &[&[u8]]) -> u32 {
    let step = |crc: u32, &byte: &u8| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 })
    };
    !parts.iter().fold(u32::MAX, |crc, part| part.iter().fold(crc, step))
}

/// The structure of `len` bytes at `offset`, if it is what it should be: signature and checksum.
fn checked(file: &File, offset: u64, len: usize, signature: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let bytes = read_up_to(file, offset, len)?;
    if bytes.len() < len || !bytes.starts_with(signature) {
        return Ok(None);
    }
    let sum = crc32c(&[&bytes[..4], &[0; 4], &bytes[8..]]);
    Ok((sum == Fields(&bytes).word(4)).then_some(bytes))
}

impl Vhdx {
    pub(super) fn open(image: &Image, file: &File) -> Result<Self, DiskError> {
        Self::read(file).map_err(|error| image.is_not(error.to_string()))
    }

    fn read(file: &File) -> io::Result<Self> {
        if read_up_to(file, 0, MAGIC.len())? != MAGIC {
            return Err(io::Error::other("it does not begin with \"vhdxfile\""));
        }
        let headers = HEADERS.map(|at| checked(file, at, HEADER_LEN, b"head"));
        let [a, b] = headers;
        let newest = [a?, b?].into_iter().flatten().max_by_key(|header| Fields(header).long(8));
        let header = newest.ok_or_else(|| damaged("no header whose checksum is right"))?;
        if Fields(&header).half(66) != 1 {
            return Err(io::Error::other(format!("its version is {}; 1 is known", Fields(&header).half(66))));
        }
        if header[48..64] != [0; 16] {
            return Err(io::Error::other(
                "its log has changes that are not in place: open it where it was used, or with qemu-img check -r all",
            ));
        }
        let (bat, metadata) = regions(file)?;
        let bat_entries = u64::from(bat.1) / 8;
        let items = Items::read(file, metadata)?;
        let (block, flags) =
            (u64::from(items.word(guid::FILE_PARAMETERS, 0)?), items.word(guid::FILE_PARAMETERS, 4)?);
        if flags & 2 != 0 {
            return Err(io::Error::other("it is on top of another image, which is not supported"));
        }
        let len =
            u64::from(items.word(guid::DISK_SIZE, 4)?) << 32 | u64::from(items.word(guid::DISK_SIZE, 0)?);
        let sector = items.word(guid::SECTOR_SIZE, 0)?;
        if !block.is_power_of_two() || !(MIB..=256 * MIB).contains(&block) || ![512, 4096].contains(&sector) {
            return Err(damaged("blocks or sectors of no such size"));
        }
        let chunk = (u64::from(sector) << 23) / block;
        let blocks = len.div_ceil(block);
        // One more entry for the sector bitmap behind the blocks of each chunk but the last.
        if blocks == 0 || blocks > MOST_BLOCKS || blocks + (blocks - 1) / chunk > bat_entries {
            return Err(damaged("a disk of more blocks than are in its table, or of none"));
        }
        Ok(Self { len: len - len % SECTOR, block, chunk, bat: (bat.0, bat_entries) })
    }
}

type Region = (u64, u32);

/// The block allocation table and the metadata.
fn regions(file: &File) -> io::Result<(Region, Region)> {
    let [a, b] = REGION_TABLES.map(|at| checked(file, at, REGION_TABLE_LEN, b"regi"));
    let bytes = a?.or(b?).ok_or_else(|| damaged("no region table whose checksum is right"))?;
    let count = Fields(&bytes).word(8).min(MOST_REGIONS) as usize;
    let (mut bat, mut metadata) = (None, None);
    for entry in bytes[16..].chunks_exact(32).take(count) {
        let fields = Fields(entry);
        let region = Some((fields.long(16), fields.word(24)));
        if entry[..16] == guid::BAT {
            bat = region;
        } else if entry[..16] == guid::METADATA {
            metadata = region;
        } else if fields.word(28) & 1 == 1 {
            return Err(io::Error::other("it needs a region of a kind that is not known"));
        }
    }
    bat.zip(metadata).ok_or_else(|| damaged("no block allocation table, or no metadata"))
}

/// What is in the metadata region: identifiers and bytes.
struct Items(Vec<([u8; 16], Vec<u8>)>);

impl Items {
    fn read(file: &File, (start, len): Region) -> io::Result<Self> {
        const KNOWN: [[u8; 16]; 5] = [
            guid::FILE_PARAMETERS,
            guid::DISK_SIZE,
            guid::SECTOR_SIZE,
            guid::PHYSICAL_SECTOR_SIZE,
            guid::PAGE_83,
        ];
        let bytes = read_up_to(file, start, METADATA_TABLE_LEN)?;
        if !bytes.starts_with(b"metadata") {
            return Err(damaged("metadata that does not begin so"));
        }
        let count = Fields(&bytes).half(10).min(MOST_ITEMS).into();
        let mut items = Vec::new();
        for entry in bytes.get(32..).unwrap_or_default().chunks_exact(32).take(count) {
            let fields = Fields(entry);
            let (offset, size, flags) = (fields.word(16), fields.word(20), fields.word(24));
            let Some(&id) = KNOWN.iter().find(|id| entry[..16] == **id) else {
                if flags & 4 != 0 && flags & 1 == 0 {
                    return Err(io::Error::other("it needs metadata of a kind that is not known"));
                }
                continue;
            };
            if size > 16 || offset.checked_add(size).is_none_or(|end| end > len) {
                return Err(damaged("a metadata item that is too long"));
            }
            items.push((id, read_up_to(file, start.saturating_add(offset.into()), size as usize)?));
        }
        Ok(Self(items))
    }

    fn word(&self, id: [u8; 16], at: usize) -> io::Result<u32> {
        let item = self.0.iter().find(|(item, _)| *item == id);
        let bytes = item.map(|(_, bytes)| bytes).filter(|bytes| bytes.len() >= at + 4);
        bytes.map(|bytes| Fields(bytes).word(at)).ok_or_else(|| damaged("metadata without an item it needs"))
    }
}

impl Map for Vhdx {
    fn len(&self) -> u64 {
        self.len
    }

    fn find(&self, files: &[File], offset: u64) -> io::Result<(Place, u64)> {
        /// States of a payload block.
        const UNDEFINED: u64 = 1;
        const FULLY_PRESENT: u64 = 6;
        let (block, inside) = (offset / self.block, offset % self.block);
        let number = block + block / self.chunk;
        let file = files.first().filter(|_| number < self.bat.1).ok_or(io::ErrorKind::UnexpectedEof)?;
        let entry = read_up_to(file, self.bat.0.saturating_add(8 * number), 8)?;
        if entry.len() < 8 {
            return Err(damaged("a block allocation table that is not in the file"));
        }
        let entry = Fields(&entry).long(0);
        let place = match entry & 7 {
            // Not present, undefined, zero, unmapped: without a parent they may all read as zero.
            0 | UNDEFINED | 2 | 3 => Place::Zero,
            FULLY_PRESENT => {
                let start = (entry >> 20).checked_mul(MIB).and_then(|start| start.checked_add(inside));
                Place::File { file: 0, offset: start.ok_or_else(|| damaged("a block that is nowhere"))? }
            }
            state => return Err(damaged(&format!("a block in state {state}"))),
        };
        Ok((place, self.block - inside))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_and_identifiers_are_those_of_the_specifications() {
        // RFC 3720, appendix B.4.
        assert_eq!(crc32c(&[&[0; 32]]), 0x8a91_36aa);
        assert_eq!(crc32c(&[b"1234", b"56789"]), 0xe306_9283);
        assert_eq!(guid::BAT[..8], [0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6, 0x00, 0x42]);
        assert_eq!(guid::BAT[8..], [0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 0x08]);
    }
}
