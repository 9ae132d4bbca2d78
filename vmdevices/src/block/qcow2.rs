//! qcow2 images, by imago: with backing images and compressed clusters.
//!
//! imago opens nothing here: files are opened and locked by us, and its gate denies the rest. It copies
//! from and to memory of the host's, since guest memory is nothing to make Rust slices of.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use imago::file::File as Storage;
use imago::format::PreallocateMode;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, StorageOpenOptions};

use super::image::{Format, Image};
use super::raw::open_image;
use super::{BlockBackend, DiskError, SECTOR, Topology};
use crate::buffers::Buffers;

/// Most bytes copied at once.
const MOST_COPIED: usize = 1 << 20;

/// A qcow2 image and what it is backed by.
#[derive(Debug)]
pub(super) struct Qcow2Disk {
    /// Written (locked) by what takes clusters away, which must not happen while others use them.
    image: RwLock<FormatAccess<Storage>>,
    len: AtomicU64,
    cluster: u64,
    read_only: bool,
}

/// What is looked at of a header before imago gets it (QEMU's docs/interop/qcow2.txt).
#[derive(Debug, PartialEq, Eq)]
struct Header {
    cluster_bits: u32,
    backing: Option<String>,
    /// log2 of the bits of a reference count.
    refcount_order: u32,
    /// Where the table of the blocks of reference counts is, in bytes, and its length in clusters.
    refcounts: (u64, u32),
}

impl Header {
    /// Looks at the first bytes of a file, and says what is wrong with them.
    fn parse(head: &[u8]) -> Result<Self, String> {
        let word = |at: usize| head.get(at..at + 4)?.try_into().ok().map(u32::from_be_bytes);
        let long = |at: usize| head.get(at..at + 8)?.try_into().ok().map(u64::from_be_bytes);
        let fields = || Some((word(0)?, word(4)?, long(8)?, word(16)?, word(20)?, word(32)?, long(64)?));
        let (magic, version, backing_at, backing_len, cluster_bits, crypt, _) =
            fields().ok_or("it is shorter than a header")?;
        if magic != 0x5146_49fb {
            return Err("it does not begin with \"QFI\\xfb\"".into());
        }
        if !(2..=3).contains(&version) {
            return Err(format!("its version is {version}; 2 and 3 are known"));
        }
        if crypt != 0 {
            return Err("it is encrypted, which is not supported".into());
        }
        if !(9..=21).contains(&cluster_bits) {
            return Err(format!("its clusters are of 2^{cluster_bits} bytes; 2^9 to 2^21 are known"));
        }
        let incompatible = if version == 3 { long(72).ok_or("it is shorter than a header")? } else { 0 };
        for (bit, what) in [
            (0, "was not closed properly: qemu-img check -r all repairs it"),
            (1, "is marked as corrupt: qemu-img check -r all may repair it"),
            (2, "keeps its data in another file, which is not supported"),
            (3, "is compressed by zstd, which is not supported: convert it with qemu-img"),
            (4, "has subclusters, which are not supported: convert it with qemu-img"),
        ] {
            if incompatible >> bit & 1 == 1 {
                return Err(format!("it {what}"));
            }
        }
        let refcount_order = if version == 3 { word(96).ok_or("it is shorter than a header")? } else { 4 };
        if refcount_order > 6 {
            return Err(format!("its reference counts have 2^{refcount_order} bits; 2^0 to 2^6 are known"));
        }
        let refcounts = long(48).zip(word(56)).ok_or("it is shorter than a header")?;
        let backing = if backing_at == 0 {
            None
        } else {
            let name = usize::try_from(backing_at).ok().and_then(|at| {
                let len = usize::try_from(backing_len).ok().filter(|&len| len <= 1023)?;
                head.get(at..at.checked_add(len)?)
            });
            let name = name.ok_or("its backing file's name is not in its header")?;
            Some(String::from_utf8_lossy(name).into_owned())
        };
        Ok(Self { cluster_bits, backing, refcount_order, refcounts })
    }

    /// Whether every cluster of the file has its reference count, which writing relies on. Without it,
    /// imago looks for a place for the count, whose own count is missing too, for ever.
    fn counts_all(&self, file: &File) -> Result<(), String> {
        /// Of the table, in clusters' worth of counts: imago takes no larger ones.
        const MOST: u64 = 4 << 20;
        let wrong =
            |what: &str| Err(format!("its reference counts are {what}: qemu-img check -r all repairs it"));
        let cluster = 1_u64 << self.cluster_bits;
        let len = file.metadata().map_err(|error| error.to_string())?.len();
        let counts = (cluster * 8) >> self.refcount_order;
        let blocks = len.div_ceil(cluster).div_ceil(counts);
        let (at, clusters) = self.refcounts;
        if blocks > MOST.min(u64::from(clusters).saturating_mul(cluster / 8)) {
            return wrong("fewer than its clusters");
        }
        // At most 32 MiB.
        let mut table = vec![0; usize::try_from(8 * blocks).unwrap_or(0)];
        if file.read_exact_at(&mut table, at).is_err() {
            return wrong("not in the file");
        }
        let place = |entry: &[u8]| entry.try_into().map_or(0, u64::from_be_bytes);
        let mut places = table.chunks_exact(8).map(place);
        match places.all(|place| place != 0 && place.is_multiple_of(cluster) && place < len) {
            true => Ok(()),
            false => wrong("incomplete"),
        }
    }

    fn read(image: &Image, file: &File) -> Result<Self, DiskError> {
        // A cluster, which header and names are in, is at most 2 MiB; names are near its beginning.
        let mut head = vec![0; 64 << 10];
        let mut len = 0;
        while len < head.len() {
            match file.read_at(&mut head[len..], len as u64) {
                Ok(0) => break,
                Ok(count) => len += count,
                Err(error) => return Err(image.is_not(format!("it cannot be read: {error}"))),
            }
        }
        Self::parse(&head[..len]).map_err(|what| image.is_not(what))
    }
}

/// Opens `image` and all below it.
fn open_layer(image: &Image) -> Result<(FormatAccess<Storage>, Option<Header>), DiskError> {
    let wrong = |error: io::Error| image.is_not(error.to_string());
    let options = StorageOpenOptions::new().write(!image.options.read_only).direct(image.options.direct);
    let storage = |file| {
        // Headers may be unaligned for O_DIRECT, which they are not read with.
        Storage::from_open_file(file, options).map_err(wrong)
    };
    match image.format {
        Format::Raw => {
            image.refuse_backing()?;
            let file = storage(open_image(&image.path, image.options)?)?;
            let raw = Raw::builder(file).open(DenyImplicitOpenGate::default()).map_err(wrong)?;
            Ok((FormatAccess::new(raw), None))
        }
        Format::Qcow2 => {
            let file = open_image(&image.path, image.options)?;
            // O_DIRECT has its own ideas about the buffers that a header is read to.
            let plain =
                if image.options.direct { Some(File::open(&image.path).map_err(wrong)?) } else { None };
            let plain = plain.as_ref().unwrap_or(&file);
            let header = Header::read(image, plain)?;
            if !image.options.read_only {
                header.counts_all(plain).map_err(|what| image.is_not(what))?;
            }
            let backing = match (&header.backing, &image.backing) {
                (Some(_), Some(backing)) => Some(open_layer(backing)?.0),
                (None, None) => None,
                (Some(named), None) => {
                    return Err(DiskError::Backing { path: image.path.clone(), named: named.clone() });
                }
                (None, Some(_)) => return Err(image.is_not("it has no backing file, but one was given")),
            };
            let builder = Qcow2::<Storage>::builder(storage(file)?)
                .write(!image.options.read_only)
                .backing(backing)
                .data_file(None);
            let opened = catch_unwind(AssertUnwindSafe(|| builder.open(DenyImplicitOpenGate::default())))
                .unwrap_or_else(|_| Err(io::Error::other("it makes no sense")));
            Ok((FormatAccess::new(opened.map_err(wrong)?), Some(header)))
        }
        format => Err(image.is_not(format!("a {format} image below a qcow2 image is not supported"))),
    }
}

impl Qcow2Disk {
    pub(super) fn open(image: Image) -> Result<Self, DiskError> {
        let (access, header) = open_layer(&image)?;
        let size = access.size();
        if size < SECTOR {
            return Err(DiskError::Empty { path: image.path, len: size });
        }
        Ok(Self {
            image: RwLock::new(access),
            len: AtomicU64::new(size - size % SECTOR),
            cluster: header.map_or(SECTOR, |header| 1 << header.cluster_bits),
            read_only: image.options.read_only,
        })
    }

    fn shared(&self) -> RwLockReadGuard<'_, FormatAccess<Storage>> {
        self.image.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Zeroes, as any other data.
    fn write_in_full(&self, offset: u64, len: u64) -> io::Result<()> {
        let zeroes = vec![0; usize::try_from(len).unwrap_or(MOST_COPIED).min(MOST_COPIED)];
        let (mut at, end) = (offset, offset.saturating_add(len));
        while at < end {
            let part = usize::try_from(end - at).unwrap_or(MOST_COPIED).min(zeroes.len());
            self.shared().write(&zeroes[..part], at)?;
            at += part as u64;
        }
        Ok(())
    }

    /// Whether all of it is in one cluster, and does not fill that. imago 0.2.6 must not be asked to zero a part
    /// of such an image: where the last cluster ends behind the image it computes below zero, and where
    /// that is not noticed it zeroes what it was not to touch.
    fn is_tiny(&self) -> bool {
        self.len() < self.cluster
    }

    fn alone(&self) -> RwLockWriteGuard<'_, FormatAccess<Storage>> {
        self.image.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BlockBackend for Qcow2Disk {
    fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn topology(&self) -> Topology {
        let cluster = u32::try_from(self.cluster).unwrap_or(512);
        Topology { physical: cluster.min(4096), discard: cluster, optimal: cluster }
    }

    fn read_at(&self, into: &mut Buffers<'_>, mut offset: u64) -> io::Result<()> {
        let mut copy = vec![0; into.len().min(MOST_COPIED)];
        while !into.is_empty() {
            let part = &mut copy[..into.len().min(MOST_COPIED)];
            self.shared().read(&mut *part, offset)?;
            offset += into.write(part) as u64;
        }
        Ok(())
    }

    fn write_at(&self, from: &mut Buffers<'_>, mut offset: u64) -> io::Result<()> {
        let mut copy = vec![0; from.len().min(MOST_COPIED)];
        while !from.is_empty() {
            let len = from.read(&mut copy);
            self.shared().write(&copy[..len], offset)?;
            offset += len as u64;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        let image = self.shared();
        image.flush()?;
        image.sync()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        // Whole clusters: parts of them would have to be written.
        let begin = offset.next_multiple_of(self.cluster);
        let end = offset.saturating_add(len);
        let end = if end == self.len() { end } else { end - end % self.cluster };
        if begin >= end || self.is_tiny() {
            return Ok(());
        }
        // Not what the backing image has there: it may be what the guest wanted to be rid of.
        match self.alone().discard_to_zero(begin, end - begin) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            result => result,
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if self.is_tiny() {
            return self.write_in_full(offset, len);
        }
        if unmap {
            match self.alone().discard_to_zero(offset, len) {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
                result => return result,
            }
        }
        match self.shared().write_zeroes(offset, len) {
            // Version 2 has no clusters of zeroes.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => self.write_in_full(offset, len),
            result => result,
        }
    }

    fn resize(&self, len: u64) -> io::Result<()> {
        let mut image = self.alone();
        if len < self.len() {
            // Requests that are checked from here on stay within what is left.
            self.len.store(len, Ordering::Release);
        }
        image.resize(len, PreallocateMode::None)?;
        self.len.store(len, Ordering::Release);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> Vec<u8> {
        let mut head = vec![0; 200];
        head[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        head[23] = 16;
        head[99] = 4;
        head
    }

    #[test]
    fn headers_that_need_what_is_not_there_are_refused_by_name() {
        let mut head = header();
        let parsed = Header::parse(&head).unwrap();
        assert_eq!((parsed.cluster_bits, parsed.backing, parsed.refcount_order), (16, None, 4));
        head[8..20].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 150, 0, 0, 0, 11]);
        head[150..161].copy_from_slice(b"/etc/shadow");
        assert_eq!(Header::parse(&head).unwrap().backing.as_deref(), Some("/etc/shadow"));
        for (at, value, word) in [
            (0, 0, "begin with"),
            (7, 4, "version is 4"),
            (35, 1, "encrypted"),
            (23, 22, "2^22"),
            (23, 8, "2^8"),
            (79, 1, "closed properly"),
            (79, 2, "corrupt"),
            (79, 4, "another file"),
            (79, 8, "zstd"),
            (79, 16, "subclusters"),
            (15, 190, "name"),
            (18, 255, "name"),
            (99, 7, "2^7"),
        ] {
            let mut head = head.clone();
            head[at] = value;
            let text = Header::parse(&head).unwrap_err();
            assert!(text.contains(word), "{at} {value}: {text}");
        }
        assert!((0..80).all(|len| Header::parse(&header()[..len]).is_err()));
    }

    proptest! {
        #[test]
        fn any_header_is_taken_or_refused(mut head in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Header::parse(&head);
            let len = head.len().min(8);
            head[..len].copy_from_slice(&header()[..len]);
            let _ = Header::parse(&head);
        }
    }
}
