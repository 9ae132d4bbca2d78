//! What can be wrong with a disk before a guest sees it.

use std::io;
use std::path::PathBuf;

use super::Format;

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
    /// Not an image of that format, or one that cannot be used.
    #[error("{path} cannot be used as a {format} image: {what}", path = .path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// What it was to be.
        format: Format,
        /// What is wrong, and what would do.
        what: String,
    },
    /// The image needs another file, which the caller did not name.
    #[error(
        "disk image {path} is backed by {named:?}, which is not opened on the image's word; name it \
         (Image::backing, or backing=FILE)",
        path = .path.display()
    )]
    Backing {
        /// The image.
        path: PathBuf,
        /// The name in it.
        named: String,
    },
    /// The image is made of several files, of which the caller did not name this one.
    #[error(
        "disk image {path} is partly in {named:?}, which is not opened on the image's word; name it \
         (Image::extent, or extent=FILE)",
        path = .path.display()
    )]
    Extent {
        /// The image.
        path: PathBuf,
        /// The name in it.
        named: String,
    },
    /// What may be a raw image, and is to be written.
    #[error(
        "disk image {path} is of no known format; if it is raw, say so (Image::raw, or format=raw): whoever \
         writes a raw image chooses what it looks like the next time",
        path = .path.display()
    )]
    Guess {
        /// The file.
        path: PathBuf,
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

impl DiskError {
    /// Its code, as [`vmcore::Error::code`] has it.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Open { .. } => "disk.open",
            Self::Locked { .. } => "disk.locked",
            Self::Kind { .. } => "disk.kind",
            Self::Empty { .. } => "disk.empty",
            Self::Image { .. } => "disk.image",
            Self::Backing { .. } => "disk.backing",
            Self::Extent { .. } => "disk.extent",
            Self::Guess { .. } => "disk.guess",
            Self::Direct { .. } => "disk.direct",
            Self::Resize { .. } => "disk.resize",
            Self::Id { .. } => "disk.id",
        }
    }

    /// What to do about it, where the text says so: the part that does.
    pub fn fix(&self) -> Option<&str> {
        match self {
            Self::Open { fix, .. } | Self::Locked { fix, .. } => Some(fix),
            Self::Image { what, .. } | Self::Resize { what, .. } => what.split_once("; ").map(|(_, fix)| fix),
            Self::Backing { .. } => Some("name it (Image::backing, or backing=FILE)"),
            Self::Extent { .. } => Some("name it (Image::extent, or extent=FILE)"),
            Self::Direct { .. } => Some("leave out \"direct\""),
            Self::Kind { .. } | Self::Empty { .. } | Self::Guess { .. } | Self::Id { .. } => None,
        }
    }
}

impl From<DiskError> for vmcore::Error {
    fn from(error: DiskError) -> Self {
        let code = error.code();
        let fix = error.fix().map(str::to_owned);
        vmcore::Error::device("disk", error).with_code(code).with_fix(fix)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_to_do_is_a_part_of_the_text_and_of_the_engines_error() {
        let path = PathBuf::from("/a/b");
        let named = String::from("c");
        let source = io::Error::from_raw_os_error(libc::ENOENT);
        for (error, known) in [
            (open_error(path.clone(), true, source), true),
            (DiskError::Locked { path: path.clone(), holder: "process 1".into(), fix: "end it" }, true),
            (DiskError::Kind { path: path.clone(), kind: "a directory" }, false),
            (DiskError::Empty { path: path.clone(), len: 0 }, false),
            (
                DiskError::Image {
                    path: path.clone(),
                    format: Format::Raw,
                    what: "it is not; say so".into(),
                },
                true,
            ),
            (DiskError::Image { path: path.clone(), format: Format::Raw, what: "it is not".into() }, false),
            (DiskError::Backing { path: path.clone(), named: named.clone() }, true),
            (DiskError::Extent { path: path.clone(), named }, true),
            (DiskError::Guess { path: path.clone() }, false),
            (DiskError::Direct { path, what: "no".into() }, true),
            (DiskError::Resize { len: 512, to: 0, what: "that is too short; give more".into() }, true),
            (DiskError::Id { id: "x".repeat(21) }, false),
        ] {
            let (text, fix) = (error.to_string(), error.fix().map(str::to_owned));
            assert_eq!(fix.is_some(), known, "{text}");
            assert!(fix.as_ref().is_none_or(|fix| text.ends_with(fix.as_str())), "{text}: {fix:?}");
            let code = error.code();
            let error = vmcore::Error::from(error);
            assert_eq!((error.fix(), error.code()), (fix.as_deref(), code));
        }
    }
}
