//! Memory for generated code, never writable and executable at one address.
#![expect(unsafe_code, reason = "maps memory and writes code into it")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::error::{Error, Result};

/// One piece of memory, mapped twice: once to write, once to execute. Code is only added; it never
/// moves and lives as long as this.
#[derive(Debug)]
pub(super) struct ExecMemory {
    /// Address of the mapping that can be written.
    write: usize,
    /// Address of the mapping that can be executed.
    execute: usize,
    len: usize,
    used: usize,
}

impl ExecMemory {
    /// Maps `len` bytes (of whole pages), which take memory as they are used.
    ///
    /// # Errors
    /// [`Error::BackendUnusable`] where the host does not let this process execute memory that it has
    /// written.
    pub(super) fn new(len: usize) -> Result<Self> {
        let refused = |call: &str, error: io::Error| {
            Error::BackendUnusable {
            backend: crate::soft::NAME,
            reason: format!("the host refuses executable memory for generated code ({call}: {error})"),
            fix: "allow this process to execute memory of a memfd (vm.memfd_noexec, SELinux's execmem, seccomp)"
                .into(),
        }
        };
        let name = c"vmcore-code";
        // Older kernels know no MFD_EXEC and do without.
        let create = |flags| {
            // SAFETY: the name is a C string.
            let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | flags) };
            // SAFETY: the descriptor is new and nobody else's.
            (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) }).ok_or_else(io::Error::last_os_error)
        };
        let fd = create(libc::MFD_EXEC)
            .or_else(|_| create(0))
            .map_err(|error| Error::os("memfd_create", "generated code", error))?;
        let size = libc::off_t::try_from(len).unwrap_or(libc::off_t::MAX);
        // SAFETY: the descriptor is open.
        if unsafe { libc::ftruncate(fd.as_raw_fd(), size) } != 0 {
            return Err(Error::os("ftruncate", "memory for generated code", io::Error::last_os_error()));
        }
        let map = |prot| {
            // SAFETY: a new mapping at an address of the kernel's choice.
            let at =
                unsafe { libc::mmap(std::ptr::null_mut(), len, prot, libc::MAP_SHARED, fd.as_raw_fd(), 0) };
            if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(at.expose_provenance()) }
        };
        let write = map(libc::PROT_READ | libc::PROT_WRITE)
            .map_err(|error| Error::os("mmap", "memory for generated code", error))?;
        let mut memory = Self { write, execute: 0, len, used: 0 };
        memory.execute =
            map(libc::PROT_READ | libc::PROT_EXEC).map_err(|error| refused("mmap with PROT_EXEC", error))?;
        Ok(memory)
    }

    /// Adds `code` at the next multiple of 32 bytes, and returns the address to call. `None` where there
    /// is no room left.
    pub(super) fn add(&mut self, code: &[u8]) -> Option<usize> {
        let at = self.used.next_multiple_of(32);
        let end = at.checked_add(code.len()).filter(|&end| end <= self.len)?;
        let to = std::ptr::with_exposed_provenance_mut::<u8>(self.write + at);
        // SAFETY: `at..end` lies within the mapping for writing, and nothing there has been handed out
        // yet: nobody executes it.
        unsafe { to.copy_from_nonoverlapping(code.as_ptr(), code.len()) };
        self.used = end;
        Some(self.execute + at)
    }
}

impl Drop for ExecMemory {
    fn drop(&mut self) {
        for at in [self.write, self.execute] {
            if at != 0 {
                // SAFETY: the mapping is this one's own; what was handed out is no longer called, because
                // callers keep this alive.
                unsafe { libc::munmap(std::ptr::with_exposed_provenance_mut(at), self.len) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_added_can_be_called_and_the_room_is_limited() {
        let mut memory = ExecMemory::new(4096).unwrap();
        // mov eax, 42; ret
        let code = [0xb8, 42, 0, 0, 0, 0xc3];
        let mut added = 0;
        while let Some(at) = memory.add(&code) {
            assert_eq!(at % 32, 0);
            // SAFETY: the code is a function of this type.
            let call: extern "sysv64" fn() -> u32 = unsafe { std::mem::transmute(at) };
            assert_eq!(call(), 42);
            added += 1;
        }
        assert_eq!(added, 4096 / 32);
    }
}
