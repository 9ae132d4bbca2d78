//! What can be wrong with a disk before a guest sees it.

use std::io;
use std::path::PathBuf;

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
    /// The image and O_DIRECT do not go together.
    #[error("disk image {path} cannot be opened with O_DIRECT: {what}; leave out \"direct\"", path = .path.display())]
    Direct {
        /// The file.
        path: PathBuf,
        /// Why not.
        what: String,
    },
    /// A disk cannot have another size.
    #[error("cannot resize a disk of {len} bytes to {to}: {what}")]
    Resize {
        /// Its length in bytes.
        len: u64,
        /// The length asked for.
        to: u64,
        /// Why not, and what would do.
        what: String,
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

/// Why the operating system did not open `path`, and what to do.
pub(super) fn open_error(path: PathBuf, read_only: bool, source: io::Error) -> DiskError {
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
