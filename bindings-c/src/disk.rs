//! Disks.

use std::ffi::c_char;
use std::mem::MaybeUninit;

use vmdevices::Disk;
use vmdevices::block::{DiskError, Format, Image, Limits};
use vmdevices::rate::Rate;
use vmdevices::virtio::{CacheMode, DiskHandle, OnError};

use crate::bytes::{text, vmcore_bytes};
use crate::error::{Result, give, guard, need, put, vmcore_error};

/// A disk image to be opened: nothing but the files that are named here is ever opened.
pub struct vmcore_image {
    image: Image,
}

/// A disk: to be set up and attached to a machine, and a handle on it from then on.
pub struct vmcore_disk {
    disk: Option<Disk>,
    handle: DiskHandle,
}

/// What is said of a device that a machine has.
pub(crate) fn attached(what: &'static str) -> Box<vmcore_error> {
    let fix = "set it up before, and make one for each machine";
    vmcore_error::argument(what, "attached already", fix)
}

impl vmcore_disk {
    fn new(disk: Disk) -> Self {
        Self { handle: disk.handle(), disk: Some(disk) }
    }

    pub(crate) fn take(&mut self) -> Result<Disk> {
        self.disk.take().ok_or_else(|| attached("disk"))
    }
}

/// When what a guest writes is on stable storage.
pub type vmcore_cache = u32;
/// When the guest flushes.
pub const VMCORE_CACHE_WRITEBACK: vmcore_cache = 0;
/// When the write ends.
pub const VMCORE_CACHE_WRITETHROUGH: vmcore_cache = 1;
/// When the host likes.
pub const VMCORE_CACHE_UNSAFE: vmcore_cache = 2;

/// What becomes of a request that the host fails.
pub type vmcore_on_error = u32;
/// The guest gets an I/O error.
pub const VMCORE_ON_ERROR_REPORT: vmcore_on_error = 0;
/// The VM stops with VMCORE_OUTCOME_IO_ERROR, and the request is kept. The next run tries it again.
pub const VMCORE_ON_ERROR_STOP: vmcore_on_error = 1;
/// As VMCORE_ON_ERROR_STOP where the host has no room left, as VMCORE_ON_ERROR_REPORT otherwise.
pub const VMCORE_ON_ERROR_STOP_IF_FULL: vmcore_on_error = 2;
/// The guest is told that all went well; what it reads is zero. What it wrote is lost.
pub const VMCORE_ON_ERROR_IGNORE: vmcore_on_error = 3;

fn on_error(what: &str, policy: vmcore_on_error) -> Result<OnError> {
    Ok(match policy {
        VMCORE_ON_ERROR_REPORT => OnError::Report,
        VMCORE_ON_ERROR_STOP => OnError::Stop,
        VMCORE_ON_ERROR_STOP_IF_FULL => OnError::StopIfFull,
        VMCORE_ON_ERROR_IGNORE => OnError::Ignore,
        other => return Err(vmcore_error::argument(what, other, "give a VMCORE_ON_ERROR_*")),
    })
}

/// What a disk did so far.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct vmcore_disk_stats {
    /// Reads that ended well.
    pub reads: u64,
    /// Bytes of them.
    pub bytes_read: u64,
    /// Writes that ended well.
    pub writes: u64,
    /// Bytes of them.
    pub bytes_written: u64,
    /// Flushes that ended well.
    pub flushes: u64,
    /// Discards and writes of zeroes that ended well.
    pub cleared: u64,
    /// Requests that the host failed.
    pub errors: u64,
}

/// The image at `path` of `format`: "raw", "qcow2", "vmdk", "vhdx", "vdi".
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_image_new(
    path: *const c_char,
    format: *const c_char,
    out: Option<&mut MaybeUninit<*mut vmcore_image>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let name = text!(format);
        let fix = "give raw, qcow2, vmdk, vhdx or vdi";
        let format: Format = name.parse().map_err(|_| vmcore_error::argument("format", name, fix))?;
        give(out, vmcore_image { image: Image::new(text!(path), format) })
    })
}

fn change(image: Option<&mut vmcore_image>, change: impl FnOnce(Image) -> Image) {
    if let Some(image) = image {
        image.image = change(image.image.clone());
    }
}

/// The guest cannot write it, and others may read it too.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_image_set_read_only(image: Option<&mut vmcore_image>) {
    change(image, Image::read_only);
}

/// Past the host's page cache (O_DIRECT).
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_image_set_direct(image: Option<&mut vmcore_image>) {
    change(image, Image::direct);
}

/// What the image does not have itself is read from `backing`, which is taken.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_image_set_backing(
    image: Option<&mut vmcore_image>,
    backing: Option<Box<vmcore_image>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let backing = need(backing, "backing")?.image;
        change(Some(need(image, "image")?), |image| image.backing(backing));
        Ok(())
    })
}

/// A file that a VMDK descriptor may name as one of its extents.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_image_add_extent(
    image: Option<&mut vmcore_image>,
    path: *const c_char,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let path = text!(path);
        change(Some(need(image, "image")?), |image| image.extent(path));
        Ok(())
    })
}

/// Frees it.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_image_delete(image: Option<Box<vmcore_image>>) {
    drop(image);
}

/// The raw image at `path`, for reading and writing. It is locked.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_disk_open(
    path: *const c_char,
    out: Option<&mut MaybeUninit<*mut vmcore_disk>>,
) -> Option<Box<vmcore_error>> {
    guard(|| give(out, vmcore_disk::new(Disk::open(text!(path))?)))
}

/// The disk in an image, which is taken.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_disk_open_image(
    image: Option<Box<vmcore_image>>,
    out: Option<&mut MaybeUninit<*mut vmcore_disk>>,
) -> Option<Box<vmcore_error>> {
    guard(|| give(out, vmcore_disk::new(Disk::image(need(image, "image")?.image)?)))
}

/// What the guest reads as the disk's serial number: at most 20 bytes.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_disk_set_serial(
    disk: Option<&mut vmcore_disk>,
    serial: *const c_char,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let (disk, serial) = (need(disk, "disk")?, text!(serial));
        if serial.len() > 20 {
            return Err(DiskError::Id { id: serial.into() }.into());
        }
        let set = disk.take()?.id(serial)?;
        disk.disk = Some(set);
        Ok(())
    })
}

/// How many queues it has, 1 to 256.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_disk_set_queues(
    disk: Option<&mut vmcore_disk>,
    count: u16,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let disk = need(disk, "disk")?;
        disk.disk = Some(disk.take()?.queues(count));
        Ok(())
    })
}

/// When writes are stable.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_disk_set_cache(
    disk: Option<&mut vmcore_disk>,
    mode: vmcore_cache,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let mode = match mode {
            VMCORE_CACHE_WRITEBACK => CacheMode::WriteBack,
            VMCORE_CACHE_WRITETHROUGH => CacheMode::WriteThrough,
            VMCORE_CACHE_UNSAFE => CacheMode::Unsafe,
            other => return Err(vmcore_error::argument("mode", other, "give a VMCORE_CACHE_*")),
        };
        let disk = need(disk, "disk")?;
        disk.disk = Some(disk.take()?.cache(mode));
        Ok(())
    })
}

/// What becomes of reads that the host fails, and of its other requests; VMCORE_ON_ERROR_REPORT unless said.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_disk_set_on_error(
    disk: Option<&mut vmcore_disk>,
    reads: vmcore_on_error,
    others: vmcore_on_error,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let (reads, others) = (on_error("reads", reads)?, on_error("others", others)?);
        let disk = need(disk, "disk")?;
        disk.disk = Some(disk.take()?.on_error(reads, others));
        Ok(())
    })
}

/// Why the disk stopped its VM, in words, until the VM runs again; a NULL where it did not.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_disk_stopped(
    disk: Option<&vmcore_disk>,
    out: Option<&mut MaybeUninit<*mut vmcore_bytes>>,
) -> Option<Box<vmcore_error>> {
    guard(|| match need(disk, "disk")?.handle.stopped() {
        Some(stop) => give(out, vmcore_bytes::new(stop.message)),
        None => put(out, std::ptr::null_mut()),
    })
}

/// How many requests and bytes a second the guest may have of it; 0 is no limit. At any time.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_disk_set_limits(disk: Option<&vmcore_disk>, operations: u64, bytes: u64) {
    if let Some(disk) = disk {
        let rate = |limit: u64| (limit > 0).then(|| Rate::new(limit));
        disk.handle.set_limits(Limits { operations: rate(operations), bytes: rate(bytes) });
    }
}

/// Its length.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_disk_len(disk: Option<&vmcore_disk>) -> u64 {
    disk.map_or(0, |disk| disk.handle.len())
}

/// Makes it `len` bytes long, while the guest runs too; it cannot shrink.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_disk_resize(disk: Option<&vmcore_disk>, len: u64) -> Option<Box<vmcore_error>> {
    guard(|| Ok(need(disk, "disk")?.handle.resize(len)?))
}

/// What it did so far.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_disk_get_stats(
    disk: Option<&vmcore_disk>,
    out: Option<&mut MaybeUninit<vmcore_disk_stats>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let stats = need(disk, "disk")?.handle.stats();
        put(
            out,
            vmcore_disk_stats {
                reads: stats.reads,
                bytes_read: stats.bytes_read,
                writes: stats.writes,
                bytes_written: stats.bytes_written,
                flushes: stats.flushes,
                cleared: stats.cleared,
                errors: stats.errors,
            },
        )
    })
}

/// Frees the handle, and the disk where no machine has it.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_disk_delete(disk: Option<Box<vmcore_disk>>) {
    drop(disk);
}
