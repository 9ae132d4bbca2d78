//! Disk images by format: what the caller says they are, and what they may refer to.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use super::error::open_error;
use super::mapped::MappedDisk;
use super::raw::open_image;
use super::vdi::Vdi;
use super::vhdx::Vhdx;
use super::vmdk::Vmdk;
use super::{BlockBackend, DiskError, RawFile, RawOptions, SECTOR, qcow2, vhdx, vmdk};

/// How an image keeps a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Format {
    /// The disk's bytes as they are.
    Raw,
    /// QEMU's, with backing files and compressed clusters; read and written.
    Qcow2,
    /// VMware's, sparse, compressed or of several extents; read.
    Vmdk,
    /// Hyper-V's; read.
    Vhdx,
    /// VirtualBox'; read.
    Vdi,
}

impl Format {
    const ALL: [Self; 5] = [Self::Raw, Self::Qcow2, Self::Vmdk, Self::Vhdx, Self::Vdi];

    /// Its usual name, as `qemu-img` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
            Format::Vmdk => "vmdk",
            Format::Vhdx => "vhdx",
            Format::Vdi => "vdi",
        }
    }

    /// What an image of it has at this offset.
    fn magic(self) -> &'static [(usize, &'static [u8])] {
        match self {
            Format::Raw => &[],
            Format::Qcow2 => &[(0, b"QFI\xfb")],
            Format::Vmdk => &[(0, vmdk::SPARSE_MAGIC), (0, vmdk::DESCRIPTOR_MAGIC)],
            Format::Vhdx => &[(0, vhdx::MAGIC)],
            Format::Vdi => &[(0x40, b"\x7f\x10\xda\xbe")],
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|format| format.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            format!("no image format {name:?}; known are: {names}")
        })
    }
}

/// An image to be opened. Nothing but the files that the caller names is ever opened, whatever the image
/// says: an image that needs another file is refused until it is named here.
///
/// ```no_run
/// use vmdevices::{Disk, block::Image};
///
/// # fn main() -> Result<(), vmdevices::block::DiskError> {
/// let base = Image::qcow2("base.qcow2").backing(Image::raw("golden.img"));
/// let disk = Disk::image(Image::qcow2("vm7.qcow2").backing(base))?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use = "it is opened by Disk::image, or by open()"]
pub struct Image {
    pub(super) path: PathBuf,
    pub(super) format: Format,
    pub(super) options: RawOptions,
    pub(super) backing: Option<Box<Image>>,
    pub(super) extents: Vec<PathBuf>,
}

impl Image {
    /// The image at `path`, which is of `format`.
    pub fn new(path: impl Into<PathBuf>, format: Format) -> Self {
        Self { path: path.into(), format, options: RawOptions::default(), backing: None, extents: Vec::new() }
    }

    /// A raw image.
    pub fn raw(path: impl Into<PathBuf>) -> Self {
        Self::new(path, Format::Raw)
    }

    /// A qcow2 image.
    pub fn qcow2(path: impl Into<PathBuf>) -> Self {
        Self::new(path, Format::Qcow2)
    }

    /// A VMDK image.
    pub fn vmdk(path: impl Into<PathBuf>) -> Self {
        Self::new(path, Format::Vmdk)
    }

    /// A VHDX image.
    pub fn vhdx(path: impl Into<PathBuf>) -> Self {
        Self::new(path, Format::Vhdx)
    }

    /// A VDI image.
    pub fn vdi(path: impl Into<PathBuf>) -> Self {
        Self::new(path, Format::Vdi)
    }

    /// The image at `path`, whose format is found out by what it begins with. An image that begins with
    /// none of them is raw, but only where it is not to be written: a guest that writes a raw image can
    /// make it look like anything, and so choose what it is taken for the next time.
    ///
    /// # Errors
    /// [`DiskError::Open`], and [`DiskError::Guess`] for what would be a writable raw image.
    pub fn probe(path: impl Into<PathBuf>, read_only: bool) -> Result<Self, DiskError> {
        let path = path.into();
        let mut head = Vec::new();
        let read = File::open(&path).and_then(|file| file.take(512).read_to_end(&mut head));
        if let Err(source) = read {
            return Err(open_error(path, true, source));
        }
        let format = match of_magic(&head) {
            Some(format) => format,
            None if read_only => Format::Raw,
            None => return Err(DiskError::Guess { path }),
        };
        let image = Self::new(path, format);
        Ok(if read_only { image.read_only() } else { image })
    }

    /// The guest cannot write, and others may read too.
    pub fn read_only(mut self) -> Self {
        self.options.read_only = true;
        self
    }

    /// Past the host's page cache (O_DIRECT).
    pub fn direct(mut self) -> Self {
        self.options.direct = true;
        self
    }

    /// What the image does not have itself is read from `backing`, whatever file it names. `backing` is
    /// never written.
    pub fn backing(mut self, backing: Image) -> Self {
        self.backing = Some(Box::new(backing.read_only()));
        self
    }

    /// A file that a VMDK descriptor may name as one of its extents: by its name, whatever directory the
    /// descriptor says.
    pub fn extent(mut self, path: impl Into<PathBuf>) -> Self {
        self.extents.push(path.into());
        self
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Opens and locks it, and all it is backed by.
    ///
    /// # Errors
    /// [`DiskError`]: a file cannot be opened, is in use, is no such image, is one of a kind that is not
    /// supported, or needs a file that is not named.
    pub fn open(self) -> Result<Arc<dyn BlockBackend>, DiskError> {
        match self.format {
            Format::Raw => {
                self.refuse_backing()?;
                Ok(Arc::new(RawFile::open_with(self.path, self.options)?))
            }
            Format::Qcow2 => Ok(Arc::new(qcow2::Qcow2Disk::open(self)?)),
            Format::Vmdk | Format::Vhdx | Format::Vdi => self.open_mapped(),
        }
    }

    /// Of a format that is read only.
    fn open_mapped(self) -> Result<Arc<dyn BlockBackend>, DiskError> {
        self.refuse_backing()?;
        if !self.options.read_only {
            return Err(self.is_not("it can only be read: open it read-only, or convert it with qemu-img"));
        }
        if self.options.direct {
            return Err(DiskError::Direct { path: self.path, what: "its format has that not".into() });
        }
        let file = open_image(&self.path, self.options)?;
        let disk: Arc<dyn BlockBackend> = match self.format {
            Format::Vdi => Arc::new(MappedDisk::new(Vdi::open(&self, &file)?, vec![file])),
            Format::Vhdx => Arc::new(MappedDisk::new(Vhdx::open(&self, &file)?, vec![file])),
            _ => {
                let (map, files) = Vmdk::open(&self, file)?;
                Arc::new(MappedDisk::new(map, files))
            }
        };
        let len = disk.len();
        if len < SECTOR { Err(DiskError::Empty { path: self.path, len }) } else { Ok(disk) }
    }

    /// Images of this format stand alone.
    pub(super) fn refuse_backing(&self) -> Result<(), DiskError> {
        match &self.backing {
            Some(_) => Err(self.is_not(format!("{} images have no backing file", self.format))),
            None => Ok(()),
        }
    }

    /// The error that says `what` is wrong with this image.
    pub(super) fn is_not(&self, what: impl Into<String>) -> DiskError {
        DiskError::Image { path: self.path.clone(), format: self.format, what: what.into() }
    }
}

fn of_magic(head: &[u8]) -> Option<Format> {
    let has = |&(at, magic): &(usize, &[u8])| head.get(at..).is_some_and(|head| head.starts_with(magic));
    Format::ALL.into_iter().find(|format| format.magic().iter().any(has))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_told_by_their_beginnings_and_raw_is_no_guess() {
        let directory = tempfile::tempdir().unwrap();
        let file = |bytes: &[u8]| {
            let path = directory.path().join("image");
            std::fs::write(&path, bytes).unwrap();
            path
        };
        for read_only in [false, true] {
            let image = Image::probe(file(b"QFI\xfb and so on"), read_only).unwrap();
            assert_eq!((image.format(), image.options.read_only), (Format::Qcow2, read_only));
        }
        let vdi = [&[0; 0x40][..], &0xbeda_107f_u32.to_le_bytes()].concat();
        for (bytes, format) in [
            (&b"KDMV"[..], Format::Vmdk),
            (b"# Disk DescriptorFile\nversion=1", Format::Vmdk),
            (b"vhdxfile", Format::Vhdx),
            (&vdi, Format::Vdi),
        ] {
            assert_eq!(Image::probe(file(bytes), false).unwrap().format(), format);
        }
        let raw = file(&[0; 1024]);
        assert_eq!(Image::probe(&raw, true).unwrap().format(), Format::Raw);
        let text = Image::probe(&raw, false).unwrap_err().to_string();
        assert!(text.contains("format=raw") && text.contains("image"), "{text}");
        assert!(matches!(Image::probe(directory.path().join("none"), true), Err(DiskError::Open { .. })));
        for format in Format::ALL {
            assert_eq!(format.to_string().parse(), Ok(format));
        }
        assert!("qcow".parse::<Format>().unwrap_err().contains("raw, qcow2"));
    }
}
