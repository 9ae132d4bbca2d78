//! Where images come from, and bounded reading of them.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use zerocopy::{FromBytes, IntoBytes};

use super::BootError;
use crate::memory::{GuestAddress, GuestMemory};

/// An image to boot or to hand to the guest: a path, an open file, or bytes in memory.
///
/// Made with `From`: `"vmlinuz".into()` is a path, `include_bytes!("kernel").into()` and
/// `vec![0xf4].into()` are bytes. Clones share the bytes. A file is read when the VM boots, by
/// position: its cursor stays where it was.
#[derive(Clone)]
pub struct ImageSource(Source);

#[derive(Clone)]
enum Source {
    Path(PathBuf),
    File(Arc<File>),
    Bytes(Arc<dyn AsRef<[u8]> + Send + Sync>),
}

impl fmt::Debug for ImageSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ImageSource({})", self.describe())
    }
}

impl ImageSource {
    fn describe(&self) -> String {
        match &self.0 {
            Source::Path(path) => path.display().to_string(),
            Source::File(_) => "(an open file)".into(),
            Source::Bytes(bytes) => format!("({} bytes in memory)", (**bytes).as_ref().len()),
        }
    }
}

macro_rules! image_source_from {
    ($($from:ty => |$value:ident| $source:expr),+ $(,)?) => {$(
        impl From<$from> for ImageSource {
            fn from($value: $from) -> Self {
                Self($source)
            }
        }
    )+};
}

image_source_from! {
    &str => |path| Source::Path(path.into()),
    String => |path| Source::Path(path.into()),
    &Path => |path| Source::Path(path.into()),
    PathBuf => |path| Source::Path(path),
    &PathBuf => |path| Source::Path(path.clone()),
    File => |file| Source::File(Arc::new(file)),
    Arc<File> => |file| Source::File(file),
    Vec<u8> => |bytes| Source::Bytes(Arc::new(bytes)),
    &'static [u8] => |bytes| Source::Bytes(Arc::new(bytes)),
    Arc<[u8]> => |bytes| Source::Bytes(Arc::new(bytes)),
}

impl<const N: usize> From<&'static [u8; N]> for ImageSource {
    fn from(bytes: &'static [u8; N]) -> Self {
        Self(Source::Bytes(Arc::new(bytes)))
    }
}

/// Chunk of copies from a file to guest memory, in bytes: stays in the CPU's caches.
const CHUNK: usize = 64 << 10;

/// Bytes that can be read by position, and copied to guest memory.
pub(super) trait Bytes {
    /// What to call the image in errors.
    fn name(&self) -> &str;

    /// Fills `buf` from `offset`; `what` is named where the image is too short.
    fn read_at(&mut self, what: &'static str, offset: u64, buf: &mut [u8]) -> Result<(), BootError>;

    /// One value of plain data in the image's (little-endian) layout.
    fn load<T: FromBytes + IntoBytes>(&mut self, what: &'static str, offset: u64) -> Result<T, BootError>
    where
        Self: Sized,
    {
        let mut value = T::new_zeroed();
        self.read_at(what, offset, value.as_mut_bytes())?;
        Ok(value)
    }

    /// Copies `len` bytes from `offset` to guest memory at `to`.
    fn copy_to(
        &mut self,
        what: &'static str,
        offset: u64,
        len: u64,
        memory: &GuestMemory,
        to: u64,
    ) -> Result<(), BootError> {
        let mut buf = vec![0; usize::try_from(len).unwrap_or(CHUNK).min(CHUNK)];
        let mut done = 0;
        while done < len {
            let part = usize::try_from(len - done).unwrap_or(CHUNK).min(CHUNK);
            let overflow = || truncated(self.name(), what, offset, len, 0);
            let from = offset.checked_add(done).ok_or_else(overflow)?;
            let at = to.checked_add(done).ok_or_else(overflow)?;
            let buf = &mut buf[..part];
            self.read_at(what, from, buf)?;
            memory
                .write(GuestAddress(at), buf)
                .map_err(|source| BootError::Memory { what: format!("{what} of {}", self.name()), source })?;
            done += part as u64;
        }
        Ok(())
    }
}

fn truncated(image: &str, what: &'static str, offset: u64, needed: u64, available: u64) -> BootError {
    BootError::Truncated { image: image.into(), what, offset, needed, available }
}

/// An opened image of known length.
#[derive(Clone)]
pub(super) struct Image {
    name: String,
    source: Source,
    len: u64,
}

impl Image {
    /// Opens `source`; `role` ("kernel", "initrd") goes into its name. What is not a regular file
    /// (a pipe) is read into memory, `limit` bytes at most.
    pub(super) fn open(source: &ImageSource, role: &str, limit: u64) -> Result<Self, BootError> {
        let name = format!("{role} {}", source.describe());
        let open = |e| BootError::Open { image: name.clone(), source: e };
        let file = match &source.0 {
            Source::Bytes(bytes) => {
                let len = (**bytes).as_ref().len() as u64;
                return Ok(Self { name, source: source.0.clone(), len });
            }
            Source::Path(path) => Arc::new(File::open(path).map_err(open)?),
            Source::File(file) => file.clone(),
        };
        let metadata = file.metadata().map_err(open)?;
        if metadata.is_file() {
            return Ok(Self { name, source: Source::File(file), len: metadata.len() });
        }
        let mut bytes = Vec::new();
        (&*file).take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(open)?;
        if bytes.len() as u64 > limit {
            return Err(BootError::TooLarge {
                image: name,
                what: "the contents",
                limit,
                limit_is: "the guest's memory",
                fix: "give the VM more memory",
            });
        }
        Ok(Self::from_vec(name, bytes))
    }

    /// An image of `bytes`, under a name of its own.
    pub(super) fn from_vec(name: String, bytes: Vec<u8>) -> Self {
        Self { name, len: bytes.len() as u64, source: Source::Bytes(Arc::new(bytes)) }
    }

    /// Length in bytes.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// At most `max` bytes from the beginning.
    pub(super) fn head(&mut self, max: usize) -> Result<Vec<u8>, BootError> {
        let mut head = vec![0; usize::try_from(self.len).unwrap_or(max).min(max)];
        self.read_at("beginning", 0, &mut head)?;
        Ok(head)
    }

    /// Its first bytes in hexadecimal, for errors.
    pub(super) fn magic(&mut self) -> String {
        match self.head(8) {
            Ok(head) if head.is_empty() => "nothing (it is empty)".into(),
            Ok(head) => head.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" "),
            Err(e) => e.to_string(),
        }
    }

    /// A reader of the `len` bytes from `offset`, which must be inside.
    pub(super) fn reader(&self, what: &'static str, offset: u64, len: u64) -> Result<ImageReader, BootError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(ImageReader { source: self.source.clone(), at: offset, end }),
            _ => Err(truncated(&self.name, what, offset, len, self.len.saturating_sub(offset))),
        }
    }
}

impl Bytes for Image {
    fn name(&self) -> &str {
        &self.name
    }

    fn read_at(&mut self, what: &'static str, offset: u64, buf: &mut [u8]) -> Result<(), BootError> {
        let len = buf.len() as u64;
        let mut reader = self.reader(what, offset, len)?;
        reader.read_exact(buf).map_err(|source| BootError::Read {
            image: self.name.clone(),
            offset,
            len,
            source,
        })
    }
}

/// Reads a part of an image from front to back.
pub(super) struct ImageReader {
    source: Source,
    at: u64,
    end: u64,
}

impl Read for ImageReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let part = usize::try_from(self.end - self.at).unwrap_or(usize::MAX).min(buf.len());
        let buf = &mut buf[..part];
        let count = match &self.source {
            Source::File(file) => file.read_at(buf, self.at)?,
            Source::Bytes(bytes) => {
                let start = usize::try_from(self.at).map_err(io::Error::other)?;
                (**bytes).as_ref().get(start..).unwrap_or_default().read(buf)?
            }
            // `Image::open` turns paths into files.
            Source::Path(_) => 0,
        };
        self.at += count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn reads_beyond_the_end_say_what_and_where() {
        let mut image = Image::open(&ImageSource::from(vec![1, 2, 3]), "kernel", 0).unwrap();
        assert_eq!(image.load::<u16>("field", 1).unwrap(), 0x302);
        let error = image.load::<u32>("field", 1).unwrap_err();
        assert!(matches!(error, BootError::Truncated { offset: 1, needed: 4, available: 2, .. }), "{error}");
        assert!(image.load::<u32>("field", u64::MAX).is_err());
    }

    #[test]
    fn files_and_bytes_read_alike_and_pipes_are_bounded() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[7; 100]).unwrap();
        let mut image = Image::open(&ImageSource::from(file.path()), "initrd", 0).unwrap();
        assert_eq!((image.len(), image.load::<u8>("byte", 99).unwrap()), (100, 7));

        let error = Image::open(&"/dev/zero".into(), "initrd", 1000).err().unwrap();
        assert!(matches!(error, BootError::TooLarge { limit: 1000, .. }), "{error}");
        let error = Image::open(&"/no/such/kernel".into(), "kernel", 0).err().unwrap();
        assert!(error.to_string().contains("/no/such/kernel"), "{error}");
    }
}
