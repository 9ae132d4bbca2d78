//! Image locks: one writer, or any number of readers.
#![expect(unsafe_code, reason = "open file description locks have no safe interface")]

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

/// Locks all of `file` (fcntl(2), "Open file description locks"), for writing or shared with other
/// readers. It is released when the last descriptor of this opening is closed.
///
/// The lock is advisory: it keeps out who asks, which QEMU and other users of this library do.
pub(super) fn lock(file: &File, exclusive: bool) -> io::Result<()> {
    let kind = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
    // Whence, start and length 0: the whole file, whatever its size becomes.
    let request = libc::flock {
        l_type: kind.try_into().unwrap_or_default(),
        l_whence: libc::SEEK_SET.try_into().unwrap_or_default(),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open for the call, and `request` is the argument this command takes.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const request) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The processes that have `file` open, for a message: locks of this kind do not tell their owner.
pub(super) fn users(file: &File) -> String {
    let Ok(this) = file.metadata() else { return String::new() };
    let own = std::process::id();
    let opened = |process: &fs::DirEntry| {
        let descriptors = fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten();
        // This process has it open in any case: here.
        let needed = if process.file_name().to_str() == Some(&own.to_string()) { 2 } else { 1 };
        descriptors
            .filter_map(|descriptor| fs::metadata(descriptor.path()).ok())
            .filter(|other| (other.dev(), other.ino()) == (this.dev(), this.ino()))
            .nth(needed - 1)
            .is_some()
    };
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let names = processes
        .filter(|process| process.file_name().to_str().is_some_and(|name| name.parse::<u32>().is_ok()))
        .filter(opened)
        .map(|process| {
            let id = process.file_name().to_string_lossy().into_owned();
            if id == own.to_string() {
                return "this process".into();
            }
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            format!("process {id} ({})", name.trim())
        })
        .collect::<Vec<String>>();
    if names.is_empty() { "a process that cannot be looked at".into() } else { names.join(", ") }
}
