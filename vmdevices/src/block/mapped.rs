//! Images that are read only: a map from the disk to pieces of files.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};

use flate2::read::ZlibDecoder;

use super::BlockBackend;
use crate::buffers::Buffers;

/// Where a stretch of the disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Nowhere: it reads as zero.
    Zero,
    /// In a file, at an offset in bytes.
    File {
        /// Which.
        file: usize,
        /// Where.
        offset: u64,
    },
    /// In a piece that is compressed (RFC 1950).
    Deflated {
        /// In which file.
        file: usize,
        /// Where the compressed bytes begin.
        offset: u64,
        /// How many there are.
        stored: usize,
        /// How many bytes they become, at most.
        whole: usize,
        /// How many of those come before the stretch.
        skip: usize,
    },
}

/// Finds the disk's bytes.
pub(super) trait Map: Send + Sync {
    /// The disk's length in bytes: a multiple of 512.
    fn len(&self) -> u64;

    /// Where the bytes from `offset` (less than the length) are, and how many lie there in a row: at
    /// least one.
    ///
    /// # Errors
    /// Where the image contradicts itself.
    fn find(&self, files: &[File], offset: u64) -> io::Result<(Place, u64)>;
}

/// File and offset of a piece, and what it unpacks to.
type Unpacked = ((usize, u64), Vec<u8>);

/// A disk to be read, of any format.
pub(super) struct MappedDisk<M> {
    map: M,
    /// Locked against writers.
    files: Vec<File>,
    /// The last piece that was unpacked: a guest reads it in parts.
    unpacked: Mutex<Option<Unpacked>>,
}

impl<M: Map> MappedDisk<M> {
    pub(super) fn new(map: M, files: Vec<File>) -> Self {
        Self { map, files, unpacked: Mutex::default() }
    }

    fn file(&self, number: usize) -> io::Result<&File> {
        self.files.get(number).ok_or_else(|| damaged("a file that there is not"))
    }

    /// Copies the beginning of a stretch.
    fn copy(&self, place: Place, part: &mut Buffers<'_>) -> io::Result<()> {
        match place {
            Place::Zero => part.write_zeroes(part.len()),
            Place::File { file, mut offset } => {
                while !part.is_empty() {
                    match part.fill_from_at(self.file(file)?, offset)? {
                        0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                        count => offset += count as u64,
                    }
                }
            }
            Place::Deflated { file, offset, stored, whole, skip } => {
                let mut unpacked = self.unpacked.lock().unwrap_or_else(PoisonError::into_inner);
                let bytes = match &mut *unpacked {
                    Some((place, bytes)) if *place == (file, offset) => bytes,
                    other => {
                        let bytes = unpack(self.file(file)?, offset, stored, whole)?;
                        &mut other.insert(((file, offset), bytes)).1
                    }
                };
                part.write(bytes.get(skip..).unwrap_or_default());
                if !part.is_empty() {
                    return Err(damaged("a piece that is shorter than it should be"));
                }
            }
        }
        Ok(())
    }
}

/// The image contradicts itself.
pub(super) fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the image is damaged: {what}"))
}

fn unpack(file: &File, offset: u64, stored: usize, whole: usize) -> io::Result<Vec<u8>> {
    let mut packed = vec![0; stored];
    file.read_exact_at(&mut packed, offset)?;
    let mut bytes = Vec::with_capacity(whole);
    // The last one of a disk may be shorter.
    ZlibDecoder::new(&packed[..]).take(whole as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

impl<M: Map> BlockBackend for MappedDisk<M> {
    fn len(&self) -> u64 {
        self.map.len()
    }

    fn read_only(&self) -> bool {
        true
    }

    fn read_at(&self, into: &mut Buffers<'_>, mut offset: u64) -> io::Result<()> {
        while !into.is_empty() {
            let (place, len) = self.map.find(&self.files, offset)?;
            let mut part = into.take(usize::try_from(len).unwrap_or(usize::MAX));
            let taken = part.len() as u64;
            if taken == 0 {
                return Err(damaged("a stretch of no bytes"));
            }
            self.copy(place, &mut part)?;
            offset += taken;
        }
        Ok(())
    }

    fn write_at(&self, _: &mut Buffers<'_>, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }
}

/// Fields of a header, little-endian, as most formats have them. What is behind the end is 0: images are
/// told from others by their magic, and headers are checked for sense.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl Fields<'_> {
    fn get<const N: usize>(&self, at: usize) -> [u8; N] {
        let bytes = at.checked_add(N).and_then(|end| self.0.get(at..end));
        bytes.and_then(|bytes| bytes.try_into().ok()).unwrap_or([0; N])
    }

    pub(super) fn half(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.get(at))
    }

    pub(super) fn word(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.get(at))
    }

    pub(super) fn long(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.get(at))
    }
}

/// `len` bytes of `file` at `offset`, or what there is of them; the caller has a limit for `len`.
pub(super) fn read_up_to(file: &File, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    let mut done = 0;
    while done < len {
        match file.read_at(&mut bytes[done..], offset.saturating_add(done as u64))? {
            0 => break,
            count => done += count,
        }
    }
    bytes.truncate(done);
    Ok(bytes)
}

/// A table of `count` entries of four bytes, which must be in the file. The caller has a limit for `count`.
pub(super) fn table(file: &File, offset: u64, count: usize) -> io::Result<Vec<u32>> {
    let bytes = read_up_to(file, offset, 4 * count)?;
    if bytes.len() < 4 * count {
        return Err(damaged("a table that is not in the file"));
    }
    Ok(bytes.chunks_exact(4).map(|entry| Fields(entry).word(0)).collect())
}
