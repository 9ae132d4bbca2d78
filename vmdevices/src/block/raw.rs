//! Raw images: the disk's bytes are the file's bytes.
#![expect(unsafe_code, reason = "fallocate and the block device ioctls")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::{BlockBackend, lock};
use crate::buffers::Buffers;

/// Size of a sector in bytes: the unit of disks (virtio 1.2, section 5.2).
const SECTOR: u64 = 512;

/// Why a disk cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// The operating system does not open the file.
    #[error("cannot open disk image {path} {mode}: {source}; {fix}", path = .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// "for reading" or "for reading and writing".
        mode: &'static str,
        /// What the operating system said.
        source: io::Error,
        /// What to do.
        fix: &'static str,
    },
    /// Somebody else uses the file in a way that excludes this one.
    #[error("disk image {path} is in use by {holder}; {fix}", path = .path.display())]
    Locked {
        /// The file.
        path: PathBuf,
        /// Who has it open, as far as it can be found out.
        holder: String,
        /// What to do.
        fix: &'static str,
    },
    /// Neither a file nor a block device.
    #[error("{path} is {kind}: a disk image is a regular file or a block device", path = .path.display())]
    Kind {
        /// The path.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// Too short for a single sector.
    #[error("disk image {path} has {len} bytes: less than one sector of 512", path = .path.display())]
    Empty {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
    },
    /// A disk id that does not fit.
    #[error("disk id {id:?} has {} bytes; the guest sees at most 20", .id.len())]
    Id {
        /// The id given.
        id: String,
    },
}

impl From<DiskError> for vmcore::Error {
    fn from(error: DiskError) -> Self {
        vmcore::Error::device("disk", error)
    }
}

/// A raw image in a file or on a block device, locked against other writers.
#[derive(Debug)]
pub struct RawFile {
    file: File,
    path: PathBuf,
    len: u64,
    read_only: bool,
    block_size: u32,
}

impl RawFile {
    /// Opens `path` for reading and, unless `read_only`, writing. Where its length is not a multiple
    /// of 512 bytes the last, partial sector is left out, with a warning in the log.
    ///
    /// # Errors
    /// [`DiskError`]: the file cannot be opened, is in use, or is no disk image.
    pub fn open(path: impl AsRef<Path>, read_only: bool) -> Result<Self, DiskError> {
        let path = path.as_ref().to_path_buf();
        let opened = OpenOptions::new().read(true).write(!read_only).open(&path);
        let file = match opened {
            Ok(file) => file,
            Err(source) => return Err(open_error(path, read_only, source)),
        };
        let metadata = match file.metadata() {
            Ok(metadata) => metadata,
            Err(source) => return Err(open_error(path, read_only, source)),
        };
        let kind = metadata.file_type();
        let (len, block_size) = if kind.is_block_device() {
            let len = match device_len(&file) {
                Ok(len) => len,
                Err(source) => return Err(open_error(path, read_only, source)),
            };
            (len, device_block_size(&file))
        } else if kind.is_file() {
            (metadata.len(), u32::try_from(metadata.blksize()).unwrap_or(512))
        } else {
            let kind = if kind.is_dir() { "a directory" } else { "a character device, pipe or socket" };
            return Err(DiskError::Kind { path, kind });
        };
        if len < SECTOR {
            return Err(DiskError::Empty { path, len });
        }
        if !len.is_multiple_of(SECTOR) {
            log::warn!(
                "disk image {}: the last {} of {len} bytes are no whole sector and not part of the disk",
                path.display(),
                len % SECTOR
            );
        }
        match lock::lock(&file, !read_only) {
            Ok(()) => {}
            Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                let fix = if read_only {
                    "stop whoever writes it, or use a copy"
                } else {
                    "stop whoever uses it, use a copy, or open it read-only if all others do"
                };
                return Err(DiskError::Locked { holder: lock::users(&file), path, fix });
            }
            // Some network file systems have no locks.
            Err(e) => log::warn!("disk image {} cannot be locked: {e}", path.display()),
        }
        let len = len - len % SECTOR;
        let block_size = if block_size.is_power_of_two() { block_size.clamp(512, 4096) } else { 512 };
        Ok(Self { file, path, len, read_only, block_size })
    }

    /// Where the image is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `fallocate(2)`; `false` where the file system or device cannot.
    fn fallocate(&self, mode: libc::c_int, offset: u64, len: u64) -> io::Result<bool> {
        let convert =
            |value| libc::off_t::try_from(value).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL));
        let (offset, len) = (convert(offset)?, convert(len)?);
        // SAFETY: the descriptor is open for the call, which takes no pointers.
        if unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset, len) } == 0 {
            return Ok(true);
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            // EINVAL: a block device with blocks of more than 512 bytes, and a range of parts of them.
            Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::EINVAL) => Ok(false),
            _ => Err(error),
        }
    }
}

const PUNCH: libc::c_int = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: libc::c_int = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

impl BlockBackend for RawFile {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn block_size(&self) -> u32 {
        self.block_size
    }

    fn read_at(&self, into: &mut Buffers<'_>, mut offset: u64) -> io::Result<()> {
        while !into.is_empty() {
            match into.fill_from_at(&self.file, offset)? {
                // Somebody cut the file short.
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => offset += count as u64,
            }
        }
        Ok(())
    }

    fn write_at(&self, from: &mut Buffers<'_>, mut offset: u64) -> io::Result<()> {
        while !from.is_empty() {
            match from.drain_to_at(&self.file, offset)? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                count => offset += count as u64,
            }
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.fallocate(PUNCH, offset, len).map(|_| ())
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        // A hole reads as zero too, so the one may stand in for the other.
        let (first, second) = if unmap { (PUNCH, ZERO) } else { (ZERO, PUNCH) };
        if self.fallocate(first, offset, len)? || unmap && self.fallocate(second, offset, len)? {
            return Ok(());
        }
        let zeroes = vec![0; 64 << 10];
        let (mut at, end) = (offset, offset.saturating_add(len));
        while at < end {
            let part = usize::try_from(end - at).unwrap_or(usize::MAX).min(zeroes.len());
            self.file.write_all_at(&zeroes[..part], at)?;
            at += part as u64;
        }
        Ok(())
    }
}

fn open_error(path: PathBuf, read_only: bool, source: io::Error) -> DiskError {
    let mode = if read_only { "for reading" } else { "for reading and writing" };
    let fix = match (source.kind(), read_only) {
        (io::ErrorKind::NotFound, _) => "check the path, or make the image first (truncate -s SIZE FILE)",
        (io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem, false) => {
            "give yourself write permission, or open it read-only"
        }
        (io::ErrorKind::PermissionDenied, true) => "give yourself permission to read it",
        (io::ErrorKind::IsADirectory, _) => "name a file in the directory",
        _ => "check the file",
    };
    DiskError::Open { path, mode, source, fix }
}

/// Size of a block device in bytes.
fn device_len(device: &File) -> io::Result<u64> {
    /// `BLKGETSIZE64` of linux/fs.h, `_IOR(0x12, 114, size_t)`.
    const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
    let mut len = 0u64;
    // SAFETY: the descriptor is open for the call, which writes 8 bytes to `len`.
    match unsafe { libc::ioctl(device.as_raw_fd(), BLKGETSIZE64, &raw mut len) } {
        0 => Ok(len),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Physical block size of a block device in bytes, or 512.
fn device_block_size(device: &File) -> u32 {
    /// `BLKPBSZGET` of linux/fs.h, `_IO(0x12, 123)`.
    const BLKPBSZGET: libc::c_ulong = 0x127b;
    let mut size = 0u32;
    // SAFETY: the descriptor is open for the call, which writes 4 bytes to `size`.
    match unsafe { libc::ioctl(device.as_raw_fd(), BLKPBSZGET, &raw mut size) } {
        0 => size,
        _ => 512,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffers::tests::{buffers, memory};
    use std::os::unix::fs::MetadataExt;
    use vmcore::GuestAddress;

    fn image(len: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(len).unwrap();
        file
    }

    #[test]
    fn a_writer_keeps_all_others_out_and_readers_share() {
        let image = image(4096);
        let locked = |result: Result<RawFile, DiskError>| match result {
            Err(error @ DiskError::Locked { .. }) => error.to_string(),
            other => panic!("{other:?}"),
        };
        let writer = RawFile::open(image.path(), false).unwrap();
        for read_only in [false, true] {
            let text = locked(RawFile::open(image.path(), read_only));
            assert!(text.contains("this process") && text.contains("use a copy"), "{text}");
        }
        drop(writer);
        let readers = [(); 2].map(|()| RawFile::open(image.path(), true).unwrap());
        locked(RawFile::open(image.path(), false));
        drop(readers);
        RawFile::open(image.path(), false).unwrap();
    }

    #[test]
    fn what_is_no_image_is_refused_and_the_error_says_what_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let open = |path: &Path, read_only| RawFile::open(path, read_only).unwrap_err();
        assert!(matches!(open(directory.path(), true), DiskError::Kind { kind: "a directory", .. }));
        assert!(matches!(open(Path::new("/dev/null"), false), DiskError::Kind { .. }));
        assert!(matches!(open(image(511).path(), false), DiskError::Empty { len: 511, .. }));
        let text = open(&directory.path().join("none"), false).to_string();
        assert!(text.contains("truncate") && text.contains("none"), "{text}");
    }

    #[test]
    fn a_partial_sector_is_left_out() {
        let image = image(1500);
        assert_eq!(RawFile::open(image.path(), false).unwrap().len(), 1024);
    }

    #[test]
    fn ranges_read_as_zero_and_holes_give_space_back() {
        let image = image(1 << 20);
        let disk = RawFile::open(image.path(), false).unwrap();
        let memory = memory();
        let map = memory.snapshot();
        memory.write(GuestAddress(0), &[0x77; 0x8000]).unwrap();
        for offset in (0..1 << 20).step_by(0x8000) {
            disk.write_at(&mut buffers(&map, &[(0, 0x8000)]), offset).unwrap();
        }
        disk.flush().unwrap();
        let full = image.as_file().metadata().unwrap().blocks();
        disk.write_zeroes(0x1_0000, 0x2_0000, true).unwrap();
        disk.write_zeroes(0x8_0200, 0x400, false).unwrap();
        disk.discard(0xc_0000, 0x1_0000).unwrap();
        assert_eq!(image.as_file().metadata().unwrap().len(), 1 << 20);
        let mut bytes = vec![0; 1 << 20];
        image.as_file().read_exact_at(&mut bytes, 0).unwrap();
        let zero = |range: std::ops::Range<usize>| bytes[range].iter().all(|&byte| byte == 0);
        assert!(zero(0x1_0000..0x3_0000) && zero(0x8_0200..0x8_0600));
        assert_eq!(
            (bytes[0xffff], bytes[0x3_0000], bytes[0x8_01ff], bytes[0x8_0600]),
            (0x77, 0x77, 0x77, 0x77)
        );
        let left = image.as_file().metadata().unwrap().blocks();
        assert!(left < full, "{left} of {full} blocks");
    }

    #[test]
    fn a_file_that_was_cut_short_is_an_error_and_not_zeroes() {
        let image = image(8192);
        let disk = RawFile::open(image.path(), true).unwrap();
        image.as_file().set_len(4096).unwrap();
        let memory = memory();
        let map = memory.snapshot();
        let error = disk.read_at(&mut buffers(&map, &[(0, 1024)]), 4096 - 512).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
