//! VMDK images (VMware), to be read: sparse ones, compressed ones (as in OVA files), and those of several
//! flat or sparse extents, which the caller names.
//!
//! A sparse extent is a header, a directory of tables, tables of grains, grains; all numbers are little-endian
//! and count sectors. A descriptor is text: what the disk is made of. The layout is that of VMware's
//! "Virtual Disk Format 5.0".

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use super::mapped::{Fields, Map, Place, damaged, read_up_to, table};
use super::raw::open_image;
use super::{DiskError, Image, SECTOR};

/// "KDMV".
pub(super) const SPARSE_MAGIC: &[u8] = b"KDMV";
/// What a descriptor in a file of its own begins with.
pub(super) const DESCRIPTOR_MAGIC: &[u8] = b"# Disk DescriptorFile";

/// Most bytes of a descriptor.
const MOST_TEXT: usize = 64 << 10;
const MOST_EXTENTS: usize = 256;
/// Most tables of one extent: with the usual 32 MiB each, 64 TiB.
const MOST_TABLES: u64 = 2 << 20;
/// Most sectors of a grain: 2 MiB.
const MOST_GRAIN: u64 = 4096;
/// Most grains of a table.
const MOST_ENTRIES: u32 = 4096;

/// Flags of a sparse extent.
const ZEROED_GRAINS: u32 = 1 << 2;
const COMPRESSED: u32 = 1 << 16;

/// The directory is told of by a footer, at the end of the file.
const AT_END: u64 = u64::MAX;

/// A disk in sectors, made of extents one after the other.
#[derive(Debug)]
pub(super) struct Vmdk {
    extents: Vec<(u64, Extent)>,
    len: u64,
}

#[derive(Debug)]
enum Extent {
    Zero,
    /// From this sector of the file on.
    Flat {
        file: usize,
        start: u64,
    },
    Sparse {
        file: usize,
        sparse: Sparse,
    },
}

#[derive(Debug)]
struct Sparse {
    /// Sectors of a grain.
    grain: u64,
    /// Grains of a table.
    entries: u64,
    zeroed: bool,
    compressed: bool,
    /// Sectors where the tables begin; 0 where there is none.
    directory: Vec<u32>,
}

/// An extent as a descriptor lists it.
#[derive(Debug, PartialEq, Eq)]
struct Listed {
    sectors: u64,
    kind: Kind,
    name: String,
    start: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Flat,
    Sparse,
    Zero,
}

impl Vmdk {
    /// Gives the disk, and the files that its extents count.
    pub(super) fn open(image: &Image, file: File) -> Result<(Self, Vec<File>), DiskError> {
        let refused = |what: String| image.is_not(what);
        let wrong = |error: io::Error| image.is_not(error.to_string());
        let head = read_up_to(&file, 0, 512).map_err(wrong)?;
        if head.starts_with(SPARSE_MAGIC) {
            let header = Fields(&head);
            let (at, len) = (header.long(28), header.long(36));
            let len = usize::try_from(len.saturating_mul(SECTOR)).unwrap_or(usize::MAX).min(MOST_TEXT);
            let text = read_up_to(&file, at.saturating_mul(SECTOR), len).map_err(wrong)?;
            stands_alone(&String::from_utf8_lossy(&text)).map_err(refused)?;
            if !image.extents.is_empty() {
                return Err(refused("it is one file, but extents were given".into()));
            }
            let (sectors, sparse) = Sparse::open(&file).map_err(wrong)?;
            let extents = vec![(sectors, Extent::Sparse { file: 0, sparse })];
            return Ok((Self { len: sectors * SECTOR, extents }, vec![file]));
        }
        if !head.starts_with(DESCRIPTOR_MAGIC) {
            return Err(refused("it begins neither with \"KDMV\" nor as a descriptor".into()));
        }
        let text = read_up_to(&file, 0, MOST_TEXT).map_err(wrong)?;
        Self::of_descriptor(image, file, &String::from_utf8_lossy(&text))
    }

    fn of_descriptor(image: &Image, file: File, text: &str) -> Result<(Self, Vec<File>), DiskError> {
        let refused = |what: String| image.is_not(what);
        stands_alone(text).map_err(refused)?;
        let listed = parse(text).map_err(refused)?;
        let (mut files, mut extents, mut sectors) = (vec![file], Vec::new(), 0_u64);
        for Listed { sectors: count, kind, name, start } in listed {
            sectors = sectors
                .checked_add(count)
                .filter(|sectors| sectors.checked_mul(SECTOR).is_some())
                .ok_or_else(|| refused("it is longer than a disk can be".into()))?;
            if kind == Kind::Zero {
                extents.push((count, Extent::Zero));
                continue;
            }
            let path = named(&image.extents, &name)
                .ok_or_else(|| DiskError::Extent { path: image.path.clone(), named: name.clone() })?;
            let extent = open_image(path, image.options)?;
            let number = files.len();
            extents.push((
                count,
                match kind {
                    Kind::Sparse => {
                        let sparse = Sparse::open(&extent);
                        let (has, sparse) =
                            sparse.map_err(|error| refused(format!("extent {name:?}: {error}")))?;
                        if has < count {
                            return Err(refused(format!("extent {name:?} has {has} of {count} sectors")));
                        }
                        Extent::Sparse { file: number, sparse }
                    }
                    _ => Extent::Flat { file: number, start },
                },
            ));
            files.push(extent);
        }
        Ok((Self { extents, len: sectors * SECTOR }, files))
    }
}

/// The path among `given` whose file has the name that a descriptor gives.
fn named<'a>(given: &'a [PathBuf], name: &str) -> Option<&'a PathBuf> {
    let name = Path::new(name).file_name()?;
    given.iter().find(|path| path.file_name() == Some(name))
}

/// Whether a descriptor says that there is no disk below this one.
fn stands_alone(text: &str) -> Result<(), String> {
    let parent = text
        .lines()
        .filter_map(|line| line.trim().split_once('='))
        .find(|(key, _)| key.trim().eq_ignore_ascii_case("parentCID"));
    match parent {
        Some((_, id)) if !id.trim().eq_ignore_ascii_case("ffffffff") => {
            Err(format!("it is on top of another image (parentCID {}), which is not supported", id.trim()))
        }
        _ => Ok(()),
    }
}

/// The extents that a descriptor lists: `RW 4192256 SPARSE "disk-s001.vmdk"`.
fn parse(text: &str) -> Result<Vec<Listed>, String> {
    let mut all = Vec::new();
    for line in text.lines().map(str::trim) {
        let Some((access, rest)) = line.split_once(' ') else { continue };
        if !["RW", "RDONLY", "NOACCESS"].contains(&access) {
            continue;
        }
        let odd = || format!("its extent {line:?} makes no sense");
        let (before, quoted) = rest.split_once('"').unwrap_or((rest, ""));
        let (name, behind) = quoted.split_once('"').unwrap_or_default();
        let mut words = before.split_whitespace();
        let sectors = words.next().and_then(|word| word.parse().ok()).ok_or_else(odd)?;
        let kind = match words.next() {
            Some("FLAT" | "VMFS") => Kind::Flat,
            Some("SPARSE") => Kind::Sparse,
            Some("ZERO") => Kind::Zero,
            Some(other) => return Err(format!("its extents are {other}; FLAT, SPARSE and ZERO are known")),
            None => return Err(odd()),
        };
        if kind != Kind::Zero && name.is_empty() {
            return Err(odd());
        }
        let start = match behind.trim() {
            "" => 0,
            number => number.parse().map_err(|_| odd())?,
        };
        all.push(Listed { sectors, kind, name: name.into(), start });
        if all.len() > MOST_EXTENTS {
            return Err(format!("it has more than {MOST_EXTENTS} extents"));
        }
    }
    if all.is_empty() { Err("it lists no extents".into()) } else { Ok(all) }
}

impl Sparse {
    /// The extent in `file`, and its sectors.
    fn open(file: &File) -> io::Result<(u64, Self)> {
        let mut head = read_up_to(file, 0, 512)?;
        if Fields(&head).long(56) == AT_END {
            // Of the last three sectors (a marker, the footer, the end) the footer is the second.
            let len = file.metadata()?.len();
            head = read_up_to(file, len.saturating_sub(2 * SECTOR), 512)?;
        }
        if !head.starts_with(SPARSE_MAGIC) {
            return Err(damaged("an extent or footer that does not begin with \"KDMV\""));
        }
        let header = Fields(&head);
        let (version, flags) = (header.word(4), header.word(8));
        let (sectors, grain, entries) = (header.long(12), header.long(20), header.word(44));
        if !(1..=3).contains(&version) {
            return Err(io::Error::other(format!("its version is {version}; 1 to 3 are known")));
        }
        if !grain.is_power_of_two() || grain > MOST_GRAIN || entries == 0 || entries > MOST_ENTRIES {
            return Err(damaged("grains or tables of no such size"));
        }
        let compressed = flags & COMPRESSED != 0;
        if compressed && header.half(77) != 1 {
            return Err(io::Error::other("it is compressed by no method known; 1 (deflate) is"));
        }
        let tables = sectors.div_ceil(grain).div_ceil(entries.into());
        if sectors == 0 || tables > MOST_TABLES {
            return Err(damaged("more tables than there can be, or none"));
        }
        // At most MOST_TABLES.
        let count = usize::try_from(tables).unwrap_or(0);
        let directory = table(file, header.long(56).saturating_mul(SECTOR), count)?;
        let zeroed = flags & ZEROED_GRAINS != 0;
        Ok((sectors, Self { grain, entries: entries.into(), zeroed, compressed, directory }))
    }

    /// Where the sector is, and how many follow.
    fn find(&self, file: &File, number: usize, sector: u64) -> io::Result<(Place, u64)> {
        let (grain, inside) = (sector / self.grain, sector % self.grain);
        let left = self.grain - inside;
        let table = usize::try_from(grain / self.entries).ok().and_then(|at| self.directory.get(at));
        let at = match table {
            None | Some(0) => return Ok((Place::Zero, left)),
            Some(&table) => u64::from(table) * SECTOR + 4 * (grain % self.entries),
        };
        let entry = self::table(file, at, 1)?;
        let place = match entry.first().copied().map(u64::from).unwrap_or(0) {
            0 => Place::Zero,
            1 if self.zeroed => Place::Zero,
            start if self.compressed => {
                // The sector that the grain is, the length of the bytes that follow.
                let marker = read_up_to(file, start * SECTOR, 12)?;
                let whole = usize::try_from(self.grain * SECTOR).unwrap_or(0);
                let stored = Fields(&marker).word(8) as usize;
                // Deflate makes nothing larger than that.
                if stored == 0 || stored > 2 * whole + 64 || Fields(&marker).long(0) != grain * self.grain {
                    return Err(damaged("a compressed grain whose marker is another's"));
                }
                let skip = usize::try_from(inside * SECTOR).unwrap_or(0);
                Place::Deflated { file: number, offset: start * SECTOR + 12, stored, whole, skip }
            }
            start => Place::File { file: number, offset: (start + inside) * SECTOR },
        };
        Ok((place, left))
    }
}

impl Map for Vmdk {
    fn len(&self) -> u64 {
        self.len
    }

    fn find(&self, files: &[File], offset: u64) -> io::Result<(Place, u64)> {
        // Requests are whole sectors.
        let mut sector = offset / SECTOR;
        for (count, extent) in &self.extents {
            if sector >= *count {
                sector -= count;
                continue;
            }
            let (place, len) = match extent {
                Extent::Zero => (Place::Zero, count - sector),
                Extent::Flat { file, start } => {
                    let offset = start.checked_add(sector).and_then(|sector| sector.checked_mul(SECTOR));
                    let offset = offset.ok_or_else(|| damaged("an extent that begins nowhere"))?;
                    (Place::File { file: *file, offset }, count - sector)
                }
                Extent::Sparse { file, sparse } => {
                    let opened = files.get(*file).ok_or_else(|| damaged("an extent that is no file"))?;
                    sparse.find(opened, *file, sector)?
                }
            };
            return Ok((place, len.min(count - sector) * SECTOR));
        }
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn descriptors_are_read() {
        let text = "# Disk DescriptorFile\nversion=1\nparentCID = ffffffff\n# Extent description\n\
                    RW 63 FLAT \"a b.vmdk\" 7\nRDONLY 2 ZERO\r\nRW 4192256 SPARSE \"s1.vmdk\"\n";
        let all = parse(text).unwrap();
        let short = |n: usize| (all[n].sectors, all[n].kind, all[n].name.as_str(), all[n].start);
        assert_eq!(short(0), (63, Kind::Flat, "a b.vmdk", 7));
        assert_eq!(short(1), (2, Kind::Zero, "", 0));
        assert_eq!(short(2), (4_192_256, Kind::Sparse, "s1.vmdk", 0));
        assert_eq!(stands_alone(text), Ok(()));
        assert!(stands_alone("parentCID=1234abcd").unwrap_err().contains("1234abcd"));
        for bad in ["", "RW x FLAT \"a\"", "RW 1 FLAT", "RW 1", "RW 1 VMFSRDM \"a\"", "RW 1 FLAT \"a\" b"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert!(parse(&"RW 1 ZERO\n".repeat(257)).unwrap_err().contains("256"));
        let given = [PathBuf::from("/x/y.vmdk")];
        assert!(named(&given, "/etc/y.vmdk").is_some() && named(&given, "z").is_none());
        assert!(named(&given, "..").is_none());
    }

    proptest! {
        #[test]
        fn any_descriptor_is_read_or_refused(text in "(RW|RDONLY|NOACCESS| |\"|FLAT|SPARSE|ZERO|[0-9a-z\n])*") {
            let _ = (parse(&text), stands_alone(&text));
        }
    }
}
