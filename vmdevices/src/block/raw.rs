//! Raw images: the disk's bytes are the file's bytes.
#![expect(unsafe_code, reason = "fallocate and the block device ioctls")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

use super::direct::{Alignment, Bounce, Window};
use super::error::open_error;
use super::{BlockBackend, DiskError, KernelFile, SECTOR, Topology, lock};
use crate::buffers::Buffers;

/// How a raw image is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RawOptions {
    /// The guest cannot write, and others may read too.
    pub read_only: bool,
    /// Past the host's page cache (O_DIRECT). Requests that are not aligned as the file system wants
    /// it are copied.
    pub direct: bool,
}

/// A raw image in a file or on a block device, locked against other writers.
#[derive(Debug)]
pub struct RawFile {
    file: File,
    path: PathBuf,
    len: AtomicU64,
    device: bool,
    read_only: bool,
    topology: Topology,
    /// Of O_DIRECT.
    alignment: Alignment,
    /// Held for writing by who reads a block, changes part of it and writes it back.
    parts: RwLock<()>,
}

impl RawFile {
    /// Opens `path` for reading and, unless `read_only`, writing. Where its length is not a multiple
    /// of 512 bytes the last, partial sector is left out, with a warning in the log.
    ///
    /// # Errors
    /// [`DiskError`]: the file cannot be opened, is in use, or is no disk image.
    pub fn open(path: impl AsRef<Path>, read_only: bool) -> Result<Self, DiskError> {
        Self::open_with(path, RawOptions { read_only, ..RawOptions::default() })
    }

    /// As [`RawFile::open`], with `options`.
    ///
    /// # Errors
    /// As [`RawFile::open`], and [`DiskError::Direct`].
    pub fn open_with(path: impl AsRef<Path>, options: RawOptions) -> Result<Self, DiskError> {
        let (path, read_only) = (path.as_ref().to_path_buf(), options.read_only);
        let file = open_image(&path, options)?;
        let refused = |source| open_error(path.clone(), read_only, source);
        let metadata = file.metadata().map_err(refused)?;
        let device = metadata.file_type().is_block_device();
        let (len, block) = if device {
            (device_len(&file).map_err(refused)?, device_block_size(&file))
        } else {
            (metadata.len(), u32::try_from(metadata.blksize()).unwrap_or(512))
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
        let alignment = if options.direct { Alignment::of(&file) } else { Alignment::NONE };
        if !len.is_multiple_of(alignment.offset) {
            let what = format!("its length of {len} bytes is no multiple of {}", alignment.offset);
            return Err(DiskError::Direct { path, what });
        }
        let block = if block.is_power_of_two() { block.clamp(512, 4096) } else { 512 };
        let topology = Topology { physical: block, discard: block, optimal: 0 };
        let len = AtomicU64::new(len - len % SECTOR);
        Ok(Self { file, path, len, device, read_only, topology, alignment, parts: RwLock::new(()) })
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

    /// Whether the kernel takes this as it is.
    fn is_aligned(&self, buffers: &Buffers<'_>, offset: u64) -> bool {
        buffers.aligned(self.alignment.memory)
            && (offset | buffers.len() as u64).is_multiple_of(self.alignment.offset)
    }

    fn read_bounced(&self, into: &mut Buffers<'_>, mut offset: u64) -> io::Result<()> {
        let mut bounce = Bounce::new(self.alignment, into.len());
        while !into.is_empty() {
            let window = bounce.window(offset, into.len());
            self.file.read_exact_at(bounce.bytes(window.outer), window.start)?;
            offset += into.write(&bounce.bytes(window.outer)[window.inner]) as u64;
        }
        Ok(())
    }

    /// Writes `len` bytes at `offset` through a buffer of our own, which `fill` fills in turn.
    fn write_bounced(
        &self,
        mut offset: u64,
        mut len: usize,
        mut fill: impl FnMut(&mut [u8]),
    ) -> io::Result<()> {
        let mut bounce = Bounce::new(self.alignment, len);
        while len > 0 {
            let Window { start, outer, inner } = bounce.window(offset, len);
            let whole = inner == (0..outer);
            let guard = (!whole).then(|| self.parts.write().unwrap_or_else(PoisonError::into_inner));
            if guard.is_some() {
                self.file.read_exact_at(bounce.bytes(outer), start)?;
            }
            offset += inner.len() as u64;
            len -= inner.len();
            fill(&mut bounce.bytes(outer)[inner]);
            self.file.write_all_at(bounce.bytes(outer), start)?;
        }
        Ok(())
    }
}

/// Opens a file or block device and locks it.
pub(super) fn open_image(path: &Path, options: RawOptions) -> Result<File, DiskError> {
    let RawOptions { read_only, direct } = options;
    let refused = |source| open_error(path.to_path_buf(), read_only, source);
    let flags = if direct { libc::O_DIRECT } else { 0 };
    let file = match OpenOptions::new().read(true).write(!read_only).custom_flags(flags).open(path) {
        Err(e) if direct && e.raw_os_error() == Some(libc::EINVAL) => {
            let what = "its file system does not have that".into();
            return Err(DiskError::Direct { path: path.to_path_buf(), what });
        }
        opened => opened.map_err(refused)?,
    };
    let kind = file.metadata().map_err(refused)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        let kind = if kind.is_dir() { "a directory" } else { "a character device, pipe or socket" };
        return Err(DiskError::Kind { path: path.to_path_buf(), kind });
    }
    match lock::lock(&file, !read_only) {
        Ok(()) => {}
        Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            let fix = if read_only {
                "stop whoever writes it, or use a copy"
            } else {
                "stop whoever uses it, use a copy, or open it read-only if all others do"
            };
            return Err(DiskError::Locked { holder: lock::users(&file), path: path.to_path_buf(), fix });
        }
        // Some network file systems have no locks.
        Err(e) => log::warn!("disk image {} cannot be locked: {e}", path.display()),
    }
    Ok(file)
}

const PUNCH: libc::c_int = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: libc::c_int = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

impl BlockBackend for RawFile {
    fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn topology(&self) -> Topology {
        self.topology
    }

    fn kernel_file(&self) -> Option<KernelFile<'_>> {
        // Where blocks are larger than sectors, parts of them are for `write_bounced` and its lock.
        (self.alignment.offset <= SECTOR).then(|| KernelFile {
            fd: self.file.as_fd(),
            memory_align: self.alignment.memory,
            offset_align: self.alignment.offset,
        })
    }

    fn read_at(&self, into: &mut Buffers<'_>, mut offset: u64) -> io::Result<()> {
        while !into.is_empty() {
            if !self.is_aligned(into, offset) {
                return self.read_bounced(into, offset);
            }
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
            if !self.is_aligned(from, offset) {
                return self.write_bounced(offset, from.len(), |bytes| {
                    from.read(bytes);
                });
            }
            let _guard = self.parts.read().unwrap_or_else(PoisonError::into_inner);
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
        self.write_bounced(offset, usize::try_from(len).map_err(io::Error::other)?, |bytes| bytes.fill(0))
    }

    fn resize(&self, len: u64) -> io::Result<()> {
        if self.device {
            let there = device_len(&self.file)?;
            if len > there {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!("the block device has {there} bytes"),
                ));
            }
        } else if !len.is_multiple_of(self.alignment.offset) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("with O_DIRECT it must be a multiple of {} bytes", self.alignment.offset),
            ));
        } else if len < self.len() {
            // Requests that are checked from here on stay within what is left.
            self.len.store(len, Ordering::Release);
            self.file.set_len(len)?;
        } else {
            self.file.set_len(len)?;
        }
        self.len.store(len, Ordering::Release);
        Ok(())
    }
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
