//! Unpacking compressed images on the host, in every compression that Linux kernels come in.
//!
//! A [`Payload`] is read front to back, straight into guest memory, so that neither the packed nor
//! the unpacked image is ever whole in the host's. What a hostile image can cost: its output ends
//! at a limit (the guest's memory), and dictionaries at [`MAX_DICTIONARY`].

use std::io::{self, BufRead, BufReader, Read};

use super::BootError;
use super::lz4::Lz4Legacy;
use super::lzo::Lzop;
use super::source::{Bytes, Image, ImageReader};
use crate::memory::{GuestAddress, GuestMemory};

/// Most memory for a dictionary or window, in bytes. `xz --lzma2=dict=32MiB` and
/// `zstd -22 --ultra` (128 MiB), which the kernel's build uses, fit.
const MAX_DICTIONARY: u64 = 192 << 20;

/// Buffer between a file and its decompressor, and behind it, in bytes.
const BUFFER: usize = 64 << 10;

/// How much of the output is kept, so that headers can be read in any order. Bytes.
const HEAD: u64 = 4096;

/// A compression, known by the first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Gzip,
    Bzip2,
    Lzma,
    Xz,
    Lzo,
    Lz4,
    Zstd,
}

impl Format {
    const ALL: [(Self, &'static str, &'static [u8]); 7] = [
        (Self::Gzip, "gzip", b"\x1f\x8b"),
        (Self::Bzip2, "bzip2", b"BZh"),
        (Self::Lzma, "lzma", b"\x5d\x00\x00"),
        (Self::Xz, "xz", b"\xfd7zXZ\x00"),
        (Self::Lzo, "lzo", b"\x89LZO\x00"),
        (Self::Lz4, "lz4", b"\x02\x21\x4c\x18"),
        (Self::Zstd, "zstd", b"\x28\xb5\x2f\xfd"),
    ];

    /// The compression of data that begins with `head`.
    pub(super) fn detect(head: &[u8]) -> Option<Self> {
        Self::ALL.iter().find(|(_, _, magic)| head.starts_with(magic)).map(|(format, ..)| *format)
    }

    pub(super) fn name(self) -> &'static str {
        Self::ALL.iter().find(|(format, ..)| *format == self).map_or("unknown", |(_, name, _)| name)
    }
}

/// Compressed data being unpacked, as an image that can only be read forward.
pub(super) struct Payload {
    name: String,
    format: Format,
    reader: Box<dyn BufRead>,
    head: Vec<u8>,
    /// How much came out of the reader so far, in bytes.
    position: u64,
    limit: u64,
    /// The length of the output that the image states behind the data.
    stated: Option<u64>,
}

impl Payload {
    /// Begins to unpack the `len` bytes at `offset` of `image`, to `limit` bytes at most: `None`
    /// where the compression is not known. In a bzImage (`sized`) the length of the output follows
    /// the data in 4 bytes, which gzip has by itself.
    pub(super) fn open(
        image: &mut Image,
        offset: u64,
        len: u64,
        sized: bool,
        limit: u64,
    ) -> Result<Option<Self>, BootError> {
        const WHAT: &str = "compressed payload";
        let mut magic = [0; 6];
        if len < magic.len() as u64 + 4 {
            return Ok(None);
        }
        image.read_at(WHAT, offset, &mut magic)?;
        let Some(format) = Format::detect(&magic) else { return Ok(None) };
        let (data, stated) = if sized {
            let stated: u32 = image.load(WHAT, offset.saturating_add(len - 4))?;
            (if format == Format::Gzip { len } else { len - 4 }, Some(stated.into()))
        } else {
            (len, None)
        };
        let input = BufReader::with_capacity(BUFFER, image.reader(WHAT, offset, data)?);
        let name = format!("the payload of {}", image.name());
        let corrupt = |source| BootError::Decompress {
            image: name.clone(),
            format: format.name(),
            position: 0,
            source,
        };
        let reader = decompressor(format, input).map_err(corrupt)?;
        let mut payload =
            Self { name: name.clone(), format, reader, head: Vec::new(), position: 0, limit, stated };
        let mut head = Vec::new();
        payload.pump(HEAD.min(limit), |bytes| {
            head.extend_from_slice(bytes);
            Ok(())
        })?;
        payload.head = head;
        Ok(Some(payload))
    }

    pub(super) fn format(&self) -> Format {
        self.format
    }

    /// Hands the next `len` bytes, in pieces, to `sink`; fewer where the data ends. Returns how many.
    fn pump(
        &mut self,
        len: u64,
        mut sink: impl FnMut(&[u8]) -> Result<(), BootError>,
    ) -> Result<u64, BootError> {
        let mut done = 0;
        while done < len {
            let available = match self.reader.fill_buf() {
                Ok(available) => available,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => {
                    return Err(BootError::Decompress {
                        image: self.name.clone(),
                        format: self.format.name(),
                        position: self.position,
                        source,
                    });
                }
            };
            if available.is_empty() {
                break;
            }
            let part = usize::try_from(len - done).unwrap_or(usize::MAX).min(available.len());
            let end = self.position + part as u64;
            if end > self.limit {
                return Err(BootError::TooLarge {
                    image: self.name.clone(),
                    what: "the unpacked contents",
                    limit: self.limit,
                    limit_is: "the guest's memory",
                    fix: "give the VM more memory",
                });
            }
            sink(&available[..part])?;
            self.reader.consume(part);
            self.position = end;
            done += part as u64;
        }
        Ok(done)
    }

    /// Moves forward to `offset` and hands the `len` bytes there to `sink`.
    fn read_forward(
        &mut self,
        what: &'static str,
        offset: u64,
        len: u64,
        sink: impl FnMut(&[u8]) -> Result<(), BootError>,
    ) -> Result<(), BootError> {
        let Some(skip) = offset.checked_sub(self.position) else {
            return Err(BootError::Unsupported {
                image: self.name.clone(),
                what: format!("a {what} at offset {offset:#x}, before what was read already"),
                fix: "unpack the image to a file and boot that",
            });
        };
        let skipped = self.pump(skip, |_| Ok(()))?;
        let read = if skipped == skip { self.pump(len, sink)? } else { 0 };
        if read == len {
            return Ok(());
        }
        Err(BootError::Truncated { image: self.name.clone(), what, offset, needed: len, available: read })
    }

    /// Unpacks what is left, for the checksums at its end, and compares the length with the one
    /// that the image states.
    pub(super) fn finish(mut self) -> Result<(), BootError> {
        self.pump(u64::MAX, |_| Ok(()))?;
        match self.stated {
            // The field has 32 bits.
            Some(stated) if stated != self.position & 0xffff_ffff => Err(BootError::PayloadLength {
                image: self.name,
                format: self.format.name(),
                expected: stated,
                found: self.position,
            }),
            _ => Ok(()),
        }
    }

    /// All of the output, in memory.
    pub(super) fn into_image(mut self) -> Result<Image, BootError> {
        let mut bytes = std::mem::take(&mut self.head);
        self.pump(u64::MAX, |part| {
            bytes.extend_from_slice(part);
            Ok(())
        })?;
        Ok(Image::from_vec(self.name, bytes))
    }
}

impl Bytes for Payload {
    fn name(&self) -> &str {
        &self.name
    }

    fn read_at(&mut self, what: &'static str, offset: u64, buf: &mut [u8]) -> Result<(), BootError> {
        let kept = usize::try_from(offset).ok().and_then(|at| self.head.get(at..)).unwrap_or_default();
        let first = kept.len().min(buf.len());
        buf[..first].copy_from_slice(&kept[..first]);
        let (offset, mut rest) = (offset.saturating_add(first as u64), &mut buf[first..]);
        if rest.is_empty() {
            return Ok(());
        }
        self.read_forward(what, offset, rest.len() as u64, |part| {
            let (now, later) = std::mem::take(&mut rest).split_at_mut(part.len());
            now.copy_from_slice(part);
            rest = later;
            Ok(())
        })
    }

    fn copy_to(
        &mut self,
        what: &'static str,
        offset: u64,
        len: u64,
        memory: &GuestMemory,
        to: u64,
    ) -> Result<(), BootError> {
        let name = self.name.clone();
        let mut at = to;
        let mut write = |part: &[u8]| {
            memory
                .write(GuestAddress(at), part)
                .map_err(|source| BootError::Memory { what: format!("{what} of {name}"), source })?;
            at = at.saturating_add(part.len() as u64);
            Ok(())
        };
        let kept = usize::try_from(offset).ok().and_then(|at| self.head.get(at..)).unwrap_or_default();
        let first = kept.len().min(usize::try_from(len).unwrap_or(usize::MAX));
        write(&kept[..first])?;
        let first = first as u64;
        if first == len {
            return Ok(());
        }
        self.read_forward(what, offset.saturating_add(first), len - first, write)
    }
}

/// Unpacks `input`, which is in `format`.
fn decompressor(format: Format, input: BufReader<ImageReader>) -> io::Result<Box<dyn BufRead>> {
    let buffered = |reader: Box<dyn Read>| Box::new(BufReader::with_capacity(BUFFER, reader));
    let lzma = |stream: Result<liblzma::stream::Stream, _>, input| {
        let stream = stream.map_err(io::Error::from)?;
        Ok::<_, io::Error>(Box::new(liblzma::bufread::XzDecoder::new_stream(input, stream)))
    };
    Ok(match format {
        Format::Gzip => buffered(Box::new(flate2::bufread::GzDecoder::new(input))),
        Format::Bzip2 => buffered(Box::new(bzip2::bufread::BzDecoder::new(input))),
        Format::Lzma => buffered(lzma(liblzma::stream::Stream::new_lzma_decoder(MAX_DICTIONARY), input)?),
        Format::Xz => buffered(lzma(liblzma::stream::Stream::new_stream_decoder(MAX_DICTIONARY, 0), input)?),
        Format::Zstd => {
            // The decoder refuses windows above 2^27 bytes by itself.
            buffered(Box::new(zstd::stream::read::Decoder::with_buffer(input)?.single_frame()))
        }
        Format::Lzo => Box::new(Lzop::new(input)?),
        Format::Lz4 => Box::new(Lz4Legacy::new(input)),
    })
}
