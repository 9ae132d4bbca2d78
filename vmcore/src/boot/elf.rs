//! ELF images, 32 and 64-bit: a strict parse and the loading of their segments (ELF specification
//! 1.2; System V ABI, AMD64 supplement 1.0).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::BootError;
use super::place::Places;
use super::source::Bytes;
use crate::memory::{GpaRange, GuestAddress, GuestMemory, MemoryError};

const MAGIC: [u8; 4] = *b"\x7fELF";
const CLASS_32: u8 = 1;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_386: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const TYPE_EXEC: u16 = 2;
const TYPE_DYN: u16 = 3;
const SEGMENT_LOAD: u32 = 1;
const SEGMENT_NOTE: u32 = 4;
/// More program headers than any kernel has; the format allows 65,534.
const MAX_SEGMENTS: u16 = 256;
/// More notes than any kernel has, in bytes.
const MAX_NOTES: u64 = 1 << 20;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Ident {
    magic: [u8; 4],
    class: u8,
    data: u8,
    version: u8,
    padding: [u8; 9],
    kind: u16,
    machine: u16,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header32 {
    version: u32,
    entry: u32,
    phoff: u32,
    shoff: u32,
    flags: u32,
    ehsize: u16,
    phentsize: u16,
    phnum: u16,
    shentsize: u16,
    shnum: u16,
    shstrndx: u16,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header64 {
    version: u32,
    // The fields from here on are 8-byte aligned only from the beginning of the file.
    entry: [u8; 8],
    phoff: [u8; 8],
    shoff: [u8; 8],
    flags: u32,
    ehsize: u16,
    phentsize: u16,
    phnum: u16,
    shentsize: u16,
    shnum: u16,
    shstrndx: u16,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Program32 {
    kind: u32,
    offset: u32,
    vaddr: u32,
    paddr: u32,
    filesz: u32,
    memsz: u32,
    flags: u32,
    align: u32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Program64 {
    kind: u32,
    flags: u32,
    offset: u64,
    vaddr: u64,
    paddr: u64,
    filesz: u64,
    memsz: u64,
    align: u64,
}

/// Offset of the headers' second part in the file.
const HEADER: u64 = size_of::<Ident>() as u64;

/// A part of the file and where it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    kind: u32,
    offset: u64,
    paddr: u64,
    filesz: u64,
    memsz: u64,
    align: u64,
    vaddr: u64,
}

/// The parsed headers of an ELF image.
#[derive(Debug)]
pub(super) struct ElfFile {
    /// 64-bit x86-64; else 32-bit i386.
    pub(super) is_64: bool,
    /// Address of the first instruction, as the file has it.
    pub(super) entry: u64,
    segments: Vec<Segment>,
}

impl ElfFile {
    /// Parses the headers of `image`: `None` where it is no ELF at all.
    pub(super) fn parse(image: &mut impl Bytes) -> Result<Option<Self>, BootError> {
        let mut magic = [0; 4];
        match image.read_at("ELF magic", 0, &mut magic) {
            Ok(()) if magic == MAGIC => {}
            Ok(()) | Err(BootError::Truncated { .. }) => return Ok(None),
            Err(error) => return Err(error),
        }
        let ident: Ident = image.load("ELF header", 0)?;
        let name = image.name().to_owned();
        let invalid = |field, offset, value, expected| BootError::Invalid {
            image: name.clone(),
            field,
            offset,
            value,
            expected,
        };
        let is_64 = match (ident.class, ident.machine) {
            (CLASS_64, MACHINE_X86_64) => true,
            (CLASS_32, MACHINE_386) => false,
            (CLASS_32 | CLASS_64, machine) => {
                return Err(invalid(
                    "e_machine",
                    18,
                    machine.into(),
                    "3 (i386) in 32-bit, 62 (x86-64) in 64-bit files",
                ));
            }
            (class, _) => return Err(invalid("EI_CLASS", 4, class.into(), "1 (32-bit) or 2 (64-bit)")),
        };
        if ident.data != LITTLE_ENDIAN {
            return Err(invalid("EI_DATA", 5, ident.data.into(), "1 (little-endian)"));
        }
        if !matches!(ident.kind, TYPE_EXEC | TYPE_DYN) {
            return Err(invalid("e_type", 16, ident.kind.into(), "2 (executable) or 3 (shared object)"));
        }
        let (entry, phoff, phentsize, phnum, expected, count_at) = if is_64 {
            let h: Header64 = image.load("ELF header", HEADER)?;
            (
                u64::from_le_bytes(h.entry),
                u64::from_le_bytes(h.phoff),
                h.phentsize,
                h.phnum,
                size_of::<Program64>(),
                56,
            )
        } else {
            let h: Header32 = image.load("ELF header", HEADER)?;
            (h.entry.into(), h.phoff.into(), h.phentsize, h.phnum, size_of::<Program32>(), 44)
        };
        if usize::from(phentsize) != expected {
            return Err(invalid(
                "e_phentsize",
                count_at - 2,
                phentsize.into(),
                "32 in 32-bit, 56 in 64-bit files",
            ));
        }
        if phnum == 0 || phnum > MAX_SEGMENTS {
            return Err(invalid("e_phnum", count_at, phnum.into(), "1 to 256"));
        }
        let mut segments = Vec::with_capacity(phnum.into());
        for index in 0..u64::from(phnum) {
            let at = phoff.checked_add(index * u64::from(phentsize)).ok_or_else(|| {
                invalid("e_phoff", if is_64 { 32 } else { 28 }, phoff, "an offset inside the file")
            })?;
            let segment = Segment::read(image, is_64, at)?;
            if segment.kind == SEGMENT_LOAD && segment.filesz > segment.memsz {
                return Err(invalid("p_filesz", at, segment.filesz, "at most p_memsz"));
            }
            segments.push(segment);
        }
        Ok(Some(Self { is_64, entry, segments }))
    }

    /// The segments to load, in the order of the file: a compressed image can only be read forward.
    fn loadable(&self) -> Vec<Segment> {
        let mut load: Vec<_> =
            self.segments.iter().filter(|s| s.kind == SEGMENT_LOAD && s.memsz > 0).copied().collect();
        load.sort_by_key(|segment| segment.offset);
        load
    }

    /// Copies the segments to their physical addresses and zeroes what has no bytes in the file.
    /// Returns the lowest and the highest address.
    pub(super) fn load(
        &self,
        image: &mut impl Bytes,
        memory: &GuestMemory,
        places: &mut Places,
    ) -> Result<GpaRange, BootError> {
        let segments = self.loadable();
        // All places first: nothing is copied of an image that does not fit.
        for segment in &segments {
            places.claim(
                format!("a segment of {}", image.name()),
                GpaRange { base: segment.paddr, len: segment.memsz },
            )?;
        }
        let first = segments.iter().map(|s| s.paddr).min();
        // Claimed ranges do not wrap.
        let end = segments.iter().map(|s| s.paddr + s.memsz).max();
        let (Some(first), Some(end)) = (first, end) else {
            return Err(BootError::Unsupported {
                image: image.name().into(),
                what: "an ELF file without a segment to load".into(),
                fix: "link it as an executable (an object file cannot be booted)",
            });
        };
        for segment in &segments {
            image.copy_to("ELF segment", segment.offset, segment.filesz, memory, segment.paddr)?;
            zero(memory, segment.paddr + segment.filesz, segment.memsz - segment.filesz).map_err(
                |source| BootError::Memory { what: format!("a segment of {}", image.name()), source },
            )?;
        }
        Ok(GpaRange { base: first, len: end - first })
    }

    /// The physical address to enter at. Where `e_entry` is a virtual address, it is translated by
    /// the segment that holds it.
    pub(super) fn physical_entry(&self, image: &impl Bytes) -> Result<u64, BootError> {
        let load = || self.segments.iter().filter(|s| s.kind == SEGMENT_LOAD);
        let inside = |base: u64, segment: &Segment| {
            self.entry.checked_sub(base).filter(|&offset| offset < segment.memsz)
        };
        if load().any(|segment| inside(segment.paddr, segment).is_some()) {
            return Ok(self.entry);
        }
        let translated =
            load().find_map(|segment| segment.paddr.checked_add(inside(segment.vaddr, segment)?));
        translated.ok_or_else(|| BootError::Invalid {
            image: image.name().into(),
            field: "e_entry",
            offset: 24,
            value: self.entry,
            expected: "an address inside a loaded segment",
        })
    }

    /// The description of the first note with this name and type, as far as `N` bytes.
    pub(super) fn note<const N: usize>(
        &self,
        image: &mut impl Bytes,
        name: &[u8],
        kind: u32,
    ) -> Result<Option<[u8; N]>, BootError> {
        for segment in self.segments.iter().filter(|s| s.kind == SEGMENT_NOTE) {
            if segment.filesz > MAX_NOTES {
                return Err(BootError::Invalid {
                    image: image.name().into(),
                    field: "p_filesz of a note segment",
                    offset: segment.offset,
                    value: segment.filesz,
                    expected: "at most 1 MiB",
                });
            }
            let mut notes = vec![0; usize::try_from(segment.filesz).unwrap_or(0)];
            image.read_at("ELF notes", segment.offset, &mut notes)?;
            // Notes are padded to 4 bytes, in segments aligned to 8 to 8.
            let pad = |len: u32| (len as usize).next_multiple_of(if segment.align == 8 { 8 } else { 4 });
            let mut rest = &notes[..];
            while let Ok(([namesz, descsz, found], body)) = <[u32; 3]>::read_from_prefix(rest) {
                let Some((found_name, body)) = body.split_at_checked(pad(namesz)) else { break };
                let Some(desc) = body.get(..descsz as usize) else { break };
                if found == kind && found_name.get(..namesz as usize) == Some(name) {
                    let mut value = [0; N];
                    let len = desc.len().min(N);
                    value[..len].copy_from_slice(&desc[..len]);
                    return Ok(Some(value));
                }
                let Some(next) = body.get(pad(descsz)..) else { break };
                rest = next;
            }
        }
        Ok(None)
    }
}

impl Segment {
    fn read(image: &mut impl Bytes, is_64: bool, at: u64) -> Result<Self, BootError> {
        const WHAT: &str = "ELF program header";
        Ok(if is_64 {
            let p: Program64 = image.load(WHAT, at)?;
            Self {
                kind: p.kind,
                offset: p.offset,
                paddr: p.paddr,
                filesz: p.filesz,
                memsz: p.memsz,
                align: p.align,
                vaddr: p.vaddr,
            }
        } else {
            let p: Program32 = image.load(WHAT, at)?;
            Self {
                kind: p.kind,
                offset: p.offset.into(),
                paddr: p.paddr.into(),
                filesz: p.filesz.into(),
                memsz: p.memsz.into(),
                align: p.align.into(),
                vaddr: p.vaddr.into(),
            }
        })
    }
}

/// Sets guest memory to zero without touching the pages that are zero already: fresh memory stays
/// unallocated, and memory of an earlier boot is cleared.
pub(super) fn zero(memory: &GuestMemory, at: u64, len: u64) -> Result<(), MemoryError> {
    let mut page = [0; 4096];
    let mut done = 0;
    while done < len {
        // Up to the end of the host page; the caller's range does not wrap.
        let base = at + done;
        let part = (len - done).min(4096 - base % 4096);
        let bytes = &mut page[..usize::try_from(part).unwrap_or(0)];
        memory.read(GuestAddress(base), bytes)?;
        if bytes.iter().any(|&byte| byte != 0) {
            memory.zero(GuestAddress(base), part)?;
        }
        done += part;
    }
    Ok(())
}
