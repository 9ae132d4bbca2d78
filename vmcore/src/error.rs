//! What can go wrong, in one type that says what was tried, with which value, and what to do.

use std::fmt;
use std::io;

use crate::boot::BootError;
use crate::memory::MemoryError;

/// Result of vmcore's calls.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of the engine, its backends or its devices. Each says the operation, the value it was
/// tried with, and where it is known what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Guest memory: layout, mapping, access.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel or image to boot.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A system call or KVM ioctl failed.
    #[error("{op} failed{}{detail}: {source}{}", if .detail.is_empty() { "" } else { " for " }, advice(.source))]
    Os {
        /// The call, by its name in the manual: "KVM_CREATE_VM", "epoll_wait".
        op: &'static str,
        /// The value it was tried with, or empty.
        detail: String,
        /// What the operating system said.
        source: io::Error,
    },
    /// The backend asked for cannot be used on this host.
    #[error("the {backend} backend cannot be used: {reason}; {fix}")]
    BackendUnusable {
        /// Name of the backend.
        backend: &'static str,
        /// Why not.
        reason: String,
        /// What the user should do.
        fix: String,
    },
    /// The backend does not offer something.
    #[error("{what} is not available on the {backend} backend; {fix}")]
    Unsupported {
        /// What was asked for.
        what: String,
        /// Name of the backend.
        backend: &'static str,
        /// What to do instead.
        fix: String,
    },
    /// A setting that makes no sense, alone or with others.
    #[error("invalid {what}: {value}; {fix}")]
    Config {
        /// Which setting.
        what: &'static str,
        /// Its value.
        value: String,
        /// Which values are valid.
        fix: String,
    },
    /// Two devices want the same addresses, ports or interrupt.
    #[error("{kind} {new} overlaps {existing}; choose another place")]
    Conflict {
        /// "port range", "MMIO window", ...
        kind: &'static str,
        /// What was to be claimed.
        new: String,
        /// What is there.
        existing: String,
    },
    /// The backend could not execute an instruction of the guest.
    #[error(transparent)]
    Emulation(Box<EmulationFailure>),
    /// The processor refused to enter the guest.
    #[error(
        "the CPU refused to enter the guest (hardware reason {reason:#x}); the register state is invalid: check segments, CR0, CR4 and EFER"
    )]
    EntryFailed {
        /// The hardware's code: VMX' exit reason (SDM vol. 3D, appendix C) or SVM's exit code (APM vol. 2,
        /// appendix C).
        reason: u64,
    },
    /// A saved state does not fit what it is restored into.
    #[error("cannot restore {what}: expected {expected}, the saved state has {found}")]
    State {
        /// Which part of the state.
        what: &'static str,
        /// What the target has.
        expected: String,
        /// What the saved state has.
        found: String,
    },
    /// The call does not fit what the VM is doing.
    #[error("cannot {op} while the VM is {state}; {fix}")]
    WrongState {
        /// The call.
        op: &'static str,
        /// What the VM is doing.
        state: &'static str,
        /// What to do first.
        fix: &'static str,
    },
    /// A device failed to attach, activate, save or restore.
    #[error("device {id}: {source}")]
    Device {
        /// The device's name.
        id: String,
        /// What it said.
        source: Box<dyn std::error::Error + Send + Sync>,
        /// The part of that which says what to do, where the device knows.
        fix: Option<String>,
        /// Which error of which device it is ("disk.locked"), or "device".
        code: &'static str,
    },
}

/// What to do about an error of the operating system, where that is the same for every call.
fn advice(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => "; check the path",
        Some(libc::EACCES | libc::EPERM) => "; check that this user may do it",
        Some(libc::EMFILE) => "; raise this process's limit of open files (ulimit -n)",
        Some(libc::ENFILE) => "; the host has no descriptors left: close some",
        Some(libc::ENOMEM) => "; free some memory, or raise the limit (ulimit -v, cgroup)",
        Some(libc::ENOSPC | libc::EDQUOT) => "; free some space",
        Some(libc::EROFS) => "; choose a place that can be written",
        _ => "",
    }
}

impl Error {
    /// The error of system call or ioctl `op`, tried with `detail` (may be empty).
    pub fn os(op: &'static str, detail: impl fmt::Display, source: impl Into<io::Error>) -> Self {
        Error::Os { op, detail: detail.to_string(), source: source.into() }
    }

    /// The error `source` of the device named `id`.
    pub fn device(
        id: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Error::Device { id: id.into(), source: source.into(), fix: None, code: "device" }
    }

    /// What to do about an error of a device; nothing changes for others. `fix` is a part of the device's text.
    #[must_use]
    pub fn with_fix(mut self, what: Option<impl Into<String>>) -> Self {
        if let Error::Device { fix, .. } = &mut self {
            *fix = what.map(Into::into);
        }
        self
    }

    /// Which error of a device it is, as [`code`](Self::code) tells it; nothing changes for others.
    #[must_use]
    pub fn with_code(mut self, which: &'static str) -> Self {
        if let Error::Device { code, .. } = &mut self {
            *code = which;
        }
        self
    }

    /// Which error it is, in words that stay the same: the variant's name in lower case ("wrong_state"), and of memory,
    /// images and devices that know their errors also which of theirs ("memory.overlap", "disk.locked"). For programs in
    /// other languages and for logs.
    pub fn code(&self) -> &'static str {
        match self {
            Error::Memory(error) => error.code(),
            Error::Boot(error) => error.code(),
            Error::Os { .. } => "os",
            Error::BackendUnusable { .. } => "backend_unusable",
            Error::Unsupported { .. } => "unsupported",
            Error::Config { .. } => "config",
            Error::Conflict { .. } => "conflict",
            Error::Emulation(_) => "emulation",
            Error::EntryFailed { .. } => "entry_failed",
            Error::State { .. } => "state",
            Error::WrongState { .. } => "wrong_state",
            Error::Device { code, .. } => code,
        }
    }

    /// What to do about it, where that is known: the part of the text that says so, for programs that show
    /// it apart.
    pub fn fix(&self) -> Option<&str> {
        let fix: &str = match self {
            Error::BackendUnusable { fix, .. }
            | Error::Unsupported { fix, .. }
            | Error::Config { fix, .. } => fix,
            Error::WrongState { fix, .. } => fix,
            Error::Os { source, .. } => advice(source).trim_start_matches("; "),
            Error::Conflict { .. } => "choose another place",
            Error::EntryFailed { .. } => "check segments, CR0, CR4 and EFER",
            Error::Emulation(failure) => &failure.hint,
            Error::Memory(error) => return error.fix(),
            Error::Boot(error) => return error.fix(),
            Error::State { .. } => return None,
            Error::Device { fix: Some(fix), .. } => fix,
            Error::Device { source, fix: None, .. } => return source.downcast_ref::<Error>()?.fix(),
        };
        Some(fix).filter(|fix| !fix.is_empty())
    }

    /// The number of the operating system's error that is behind it (errno), where one is.
    pub fn errno(&self) -> Option<i32> {
        let mut next: Option<&(dyn std::error::Error + 'static)> = Some(self);
        while let Some(error) = next {
            if let Some(number) = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
                return Some(number);
            }
            next = error.source();
        }
        None
    }
}

/// Where and on what the backend gave up executing the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EmulationFailure {
    /// Name of the backend.
    pub backend: &'static str,
    /// What the backend calls the failure: "emulation failure", "delivery of an exception failed".
    pub kind: String,
    /// Guest virtual address of the instruction.
    pub rip: u64,
    /// The bytes there, as far as they could be had (at most 15).
    pub bytes: Vec<u8>,
    /// The first instruction of these bytes, decoded for the vCPU's mode (Intel syntax).
    pub instruction: String,
    /// What it means on this host and what to do.
    pub hint: String,
}

impl fmt::Display for EmulationFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at rip {:#x}", self.kind, self.rip)?;
        if self.bytes.is_empty() {
            f.write_str(" (its bytes cannot be read)")?;
        } else {
            f.write_str(", bytes")?;
            for byte in &self.bytes {
                write!(f, " {byte:02x}")?;
            }
            write!(f, " (`{}`)", self.instruction)?;
        }
        write!(f, " on the {} backend: {}", self.backend, self.hint)
    }
}

impl std::error::Error for EmulationFailure {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_the_operating_system_say_what_to_do() {
        let text = |errno| Error::os("open", "/a/b", io::Error::from_raw_os_error(errno)).to_string();
        let missing = text(libc::ENOENT);
        assert!(missing.starts_with("open failed for /a/b: ") && missing.ends_with("; check the path"));
        assert!(text(libc::EMFILE).contains("ulimit -n"));
        assert!(text(libc::EINVAL).ends_with("(os error 22)"));
        assert_eq!(
            Error::os("open", "/a/b", io::Error::from_raw_os_error(libc::ENOENT)).fix(),
            Some("check the path")
        );
        let plain = Error::os("KVM_CREATE_VM", "", io::Error::from_raw_os_error(libc::ENOMEM)).to_string();
        assert!(plain.starts_with("KVM_CREATE_VM failed: "), "{plain}");
    }

    #[test]
    fn errno_and_fix_are_found_below_a_device_and_an_image() {
        let os = |errno| io::Error::from_raw_os_error(errno);
        let inner = Error::os("open", "/a/b", os(libc::EMFILE));
        let outer = Error::device("disk", inner);
        assert_eq!((outer.code(), outer.errno()), ("device", Some(libc::EMFILE)));
        assert!(outer.fix().is_some_and(|fix| fix.contains("ulimit -n")));
        let boot = Error::from(BootError::Open { image: "kernel x".into(), source: os(libc::ENOENT) });
        assert_eq!((boot.code(), boot.errno()), ("boot.open", Some(libc::ENOENT)));
        assert_eq!(boot.fix(), Some("check the path and its permissions"));
        let text = Error::device("disk", "is gone");
        assert_eq!((text.errno(), text.fix()), (None, None));
        assert_eq!(text.with_fix(Some("plug it in")).fix(), Some("plug it in"));
        let known = Error::device("disk", "is in use").with_code("disk.locked");
        assert_eq!(known.code(), "disk.locked");
        assert_eq!(boot.with_fix(Some("plug it in")).fix(), Some("check the path and its permissions"));
    }
}
