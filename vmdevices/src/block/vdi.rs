//! VDI images (VirtualBox): dynamic and fixed ones, to be read.
//!
//! A header of 512 bytes, a table with the number of each block's place in the file, the blocks. The
//! layout is that of VirtualBox' VDICore.h, version 1.1.

use std::fs::File;
use std::io;

use super::mapped::{Fields, Map, Place, read_up_to, table};
use super::{DiskError, Image, SECTOR};

const SIGNATURE: u32 = 0xbeda_107f;

/// Most blocks: 64 MiB of table, 16 TiB of disk where blocks have their usual 1 MiB.
const MOST_BLOCKS: u32 = 16 << 20;

/// A block that was never written.
const FREE: u32 = 0xffff_ffff;
/// A block that was discarded.
const ZERO: u32 = 0xffff_fffe;

#[derive(Debug)]
pub(super) struct Vdi {
    len: u64,
    block: u64,
    /// Where block number 0 of the file is, and how far apart they are.
    data: u64,
    stride: u64,
    places: Vec<u32>,
}

impl Vdi {
    pub(super) fn open(image: &Image, file: &File) -> Result<Self, DiskError> {
        let refused = |what: String| image.is_not(what);
        let header = read_up_to(file, 0, 512).map_err(|error| refused(error.to_string()))?;
        let header = Fields(&header);
        if header.word(0x40) != SIGNATURE {
            return Err(refused("its signature is another".into()));
        }
        if header.word(0x44) >> 16 != 1 {
            return Err(refused(format!("its version is {:#x}; 1.1 (0x10001) is known", header.word(0x44))));
        }
        match header.word(0x4c) {
            1 | 2 => {}
            kind => {
                return Err(refused(format!(
                    "its type is {kind}; 1 (dynamic) and 2 (fixed) are known, those that need others are not"
                )));
            }
        }
        let (map, data) = (u64::from(header.word(0x154)), u64::from(header.word(0x158)));
        let (len, block, extra) = (header.long(0x170), header.word(0x178), header.word(0x17c));
        let blocks = header.word(0x180);
        if !block.is_power_of_two() || u64::from(block) < SECTOR || extra > block {
            return Err(refused(format!("its blocks have {block} bytes and {extra} more")));
        }
        if blocks > MOST_BLOCKS || u64::from(blocks) * u64::from(block) < len {
            return Err(refused(format!("{blocks} blocks of {block} bytes for a disk of {len}")));
        }
        let places = table(file, map, blocks as usize).map_err(|error| refused(error.to_string()))?;
        let (block, stride) = (u64::from(block), u64::from(block) + u64::from(extra));
        Ok(Self { len: len - len % SECTOR, block, data: data + u64::from(extra), stride, places })
    }
}

impl Map for Vdi {
    fn len(&self) -> u64 {
        self.len
    }

    fn find(&self, _: &[File], offset: u64) -> io::Result<(Place, u64)> {
        let (number, inside) = (offset / self.block, offset % self.block);
        let place = usize::try_from(number).ok().and_then(|number| self.places.get(number));
        let place = match *place.unwrap_or(&FREE) {
            FREE | ZERO => Place::Zero,
            // Less than 2^32 blocks of less than 2^32 bytes.
            place => Place::File { file: 0, offset: self.data + u64::from(place) * self.stride + inside },
        };
        Ok((place, self.block - inside))
    }
}
