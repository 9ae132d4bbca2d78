//! Multiboot 1 (Multiboot Specification 0.6.96): ELF kernels, and flat ones that carry their
//! addresses in the header.

use zerocopy::{Immutable, IntoBytes};

use super::elf::{ElfFile, zero};
use super::entry::{BELOW_4G, EntryState, place, store};
use super::layout::EBDA;
use super::linux::{store_text, unpacked};
use super::place::Places;
use super::source::{Bytes, Image};
use super::{BootError, E820Kind, ImageSource, Loaded, MemoryLayout};
use crate::memory::{GpaRange, GuestMemory, PAGE_SIZE};

/// Header magic, and what the kernel finds in EAX (3.1.1, 3.2).
const HEADER_MAGIC: u32 = 0x1BAD_B002;
const LOADER_MAGIC: u64 = 0x2BAD_B002;
/// The header is in the first 8192 bytes of the image, on a multiple of 4.
const SEARCH: usize = 8192;
/// Header flags (3.1.2): modules on page boundaries, memory information, addresses in the header.
/// Bits 0 to 15 are requirements; the memory information and page boundaries are always given.
const WANTS_PAGES: u32 = 1 << 0;
const WANTS_MEMORY: u32 = 1 << 1;
const HAS_ADDRESSES: u32 = 1 << 16;
const REQUIREMENTS: u32 = 0xffff;
/// Longest command line that we pass on: the specification has no limit.
const CMDLINE_MAX: u64 = 0xffff;
/// What the kernel gets as the name of its boot loader.
const LOADER_NAME: &str = "vmcore";

/// A multiboot kernel with its modules (Multiboot Specification 0.6.96).
///
/// ```
/// # use vmcore::boot::{Boot, Multiboot};
/// let boot: Boot =
///     Multiboot::new("kernel.elf").cmdline("verbose").module("init.bin", "init --first").into();
/// ```
#[derive(Clone, Debug)]
pub struct Multiboot {
    kernel: ImageSource,
    cmdline: String,
    modules: Vec<(ImageSource, String)>,
}

impl Multiboot {
    /// Boots `kernel`, which has a multiboot 1 header; it may be compressed as a whole.
    pub fn new(kernel: impl Into<ImageSource>) -> Self {
        Self { kernel: kernel.into(), cmdline: String::new(), modules: Vec::new() }
    }

    /// The kernel's command line.
    pub fn cmdline(mut self, cmdline: impl Into<String>) -> Self {
        self.cmdline = cmdline.into();
        self
    }

    /// Adds a module with its own command line; modules are loaded in this order.
    pub fn module(mut self, image: impl Into<ImageSource>, cmdline: impl Into<String>) -> Self {
        self.modules.push((image.into(), cmdline.into()));
        self
    }
}

/// Information flags (3.3): which fields of [`Info`] are valid.
const INFO_MEMORY: u32 = 1 << 0;
const INFO_CMDLINE: u32 = 1 << 2;
const INFO_MODULES: u32 = 1 << 3;
const INFO_MAP: u32 = 1 << 6;
const INFO_LOADER_NAME: u32 = 1 << 9;

/// The information structure (3.3).
#[derive(Default, IntoBytes, Immutable)]
#[repr(C)]
struct Info {
    flags: u32,
    /// KiB of base memory from 0.
    mem_lower: u32,
    /// KiB of memory from 1 MiB to its first hole.
    mem_upper: u32,
    boot_device: u32,
    cmdline: u32,
    mods_count: u32,
    mods_addr: u32,
    syms: [u32; 4],
    mmap_length: u32,
    mmap_addr: u32,
    drives: [u32; 2],
    config_table: u32,
    boot_loader_name: u32,
    apm_table: u32,
    vbe: [u32; 4],
    framebuffer: [u32; 7],
}

/// One module (3.3, "mods_addr").
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Module {
    start: u32,
    end: u32,
    cmdline: u32,
    reserved: u32,
}

/// One range of the memory map (3.3, "mmap_addr"). `size` does not count itself.
#[derive(IntoBytes, Immutable)]
#[repr(C, packed)]
struct MapEntry {
    size: u32,
    base: u64,
    len: u64,
    kind: u32,
}

/// The header in the image.
struct Header {
    /// Where in the image, in bytes.
    offset: u64,
    flags: u32,
    /// header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr.
    addresses: Option<[u32; 5]>,
}

impl Header {
    fn find(image: &mut Image) -> Result<Option<Self>, BootError> {
        let head = image.head(SEARCH)?;
        let word = |at: usize| {
            head.get(at..).and_then(|rest| rest.first_chunk()).map(|bytes| u32::from_le_bytes(*bytes))
        };
        for at in (0..head.len()).step_by(4) {
            let (Some(magic), Some(flags), Some(checksum)) = (word(at), word(at + 4), word(at + 8)) else {
                break;
            };
            if magic != HEADER_MAGIC || magic.wrapping_add(flags).wrapping_add(checksum) != 0 {
                continue;
            }
            let offset = at as u64;
            let addresses = if flags & HAS_ADDRESSES != 0 {
                let fields: [[u8; 4]; 5] = image.load("multiboot header", offset + 12)?;
                Some(fields.map(u32::from_le_bytes))
            } else {
                None
            };
            return Ok(Some(Self { offset, flags, addresses }));
        }
        Ok(None)
    }
}

pub(super) fn load(
    boot: &Multiboot,
    memory: &GuestMemory,
    layout: &MemoryLayout,
) -> Result<Loaded, BootError> {
    let limit = layout.total_ram();
    let mut image = unpacked(Image::open(&boot.kernel, "kernel", limit)?, limit)?;
    let Some(header) = Header::find(&mut image)? else {
        return Err(BootError::Unrecognised {
            image: image.name().into(),
            expected: "a multiboot 1 kernel (no valid header in its first 8192 bytes)",
            found: image.magic(),
            fix: "boot it as what it is: Linux, Pvh, Elf or Raw",
        });
    };
    let unmet = header.flags & REQUIREMENTS & !(WANTS_PAGES | WANTS_MEMORY);
    if unmet != 0 {
        return Err(BootError::Unsupported {
            image: image.name().into(),
            what: format!("multiboot requirement {unmet:#x} (bit 2 is a video mode)"),
            fix: "build the kernel without it; there is no display at boot",
        });
    }
    let mut places = Places::new(layout);
    let (entry, kind) = match header.addresses {
        Some(addresses) => (load_flat(&mut image, header.offset, addresses, memory, &mut places)?, "flat"),
        None => {
            let Some(elf) = ElfFile::parse(&mut image)? else {
                return Err(BootError::Unsupported {
                    image: image.name().into(),
                    what: "a multiboot header without addresses in a file that is not ELF".into(),
                    fix: "set bit 16 of its flags and the address fields, or link it as ELF",
                });
            };
            elf.load(&mut image, memory, &mut places)?;
            (elf.physical_entry(&image)?, if elf.is_64 { "ELF64" } else { "ELF32" })
        }
    };
    let entry = low(&image, "entry", entry)?;
    let info = Info {
        flags: INFO_MEMORY | INFO_CMDLINE | INFO_MAP | INFO_LOADER_NAME,
        mem_lower: u32::try_from(EBDA.base >> 10).unwrap_or(0),
        mem_upper: upper_memory(layout),
        cmdline: text(&image, "the command line", &boot.cmdline, memory, &mut places)?,
        boot_loader_name: text(&image, "the boot loader's name", LOADER_NAME, memory, &mut places)?,
        ..Info::default()
    };
    let info = with_modules(info, boot, &image, memory, &mut places, limit)?;
    let info = with_map(info, &image, memory, layout, &mut places)?;
    let at = table(&image, "the multiboot information", info.as_bytes(), memory, &mut places)?;

    let mut state = EntryState::protected(entry, memory, &mut places)?;
    state.regs.rax = LOADER_MAGIC;
    state.regs.rbx = at.into();
    let what = format!("{} ({kind}), entered at {entry:#x} by multiboot", image.name());
    Ok(Loaded { entry: state, what })
}

/// Loads a flat kernel to the addresses in its header (3.1.3) and returns its entry.
fn load_flat(
    image: &mut Image,
    header_offset: u64,
    addresses: [u32; 5],
    memory: &GuestMemory,
    places: &mut Places,
) -> Result<u64, BootError> {
    let [header, load, load_end, bss_end, entry] = addresses.map(u64::from);
    let name = image.name().to_owned();
    let invalid = |field, index: u64, value, expected| BootError::Invalid {
        image: name.clone(),
        field,
        offset: header_offset + 12 + index * 4,
        value,
        expected,
    };
    let skipped = header.checked_sub(load).and_then(|before| header_offset.checked_sub(before));
    let offset = skipped.ok_or_else(|| {
        invalid("load_addr", 1, load, "at most header_addr, and not before the image's first byte")
    })?;
    let len = match load_end {
        0 => image.len().saturating_sub(offset),
        end => end
            .checked_sub(load)
            .ok_or_else(|| invalid("load_end_addr", 2, end, "0 or at least load_addr"))?,
    };
    let total = match bss_end {
        0 => len,
        end => end
            .checked_sub(load)
            .filter(|total| *total >= len)
            .ok_or_else(|| invalid("bss_end_addr", 3, end, "0 or at least load_end_addr"))?,
    };
    if !(load..load + total).contains(&entry) {
        return Err(invalid("entry_addr", 4, entry, "an address inside what is loaded"));
    }
    places.claim(image.name(), GpaRange { base: load, len: total })?;
    image.copy_to("flat kernel", offset, len, memory, load)?;
    zero(memory, load + len, total - len)
        .map_err(|source| BootError::Memory { what: image.name().into(), source })?;
    Ok(entry)
}

/// Loads the modules, page-aligned, from the lowest free address above 1 MiB.
fn with_modules(
    mut info: Info,
    boot: &Multiboot,
    kernel: &Image,
    memory: &GuestMemory,
    places: &mut Places,
    limit: u64,
) -> Result<Info, BootError> {
    let mut modules = Vec::new();
    let window = GpaRange { base: 1 << 20, len: BELOW_4G.len - (1 << 20) };
    for (source, cmdline) in &boot.modules {
        let mut image = Image::open(source, "module", limit)?;
        let len = image.len();
        let base = places.lowest(image.name(), len.max(1), PAGE_SIZE, window)?;
        image.copy_to("contents", 0, len, memory, base)?;
        modules.push(Module {
            start: low(&image, "start", base)?,
            end: low(&image, "end", base + len)?,
            cmdline: text(&image, "a module's command line", cmdline, memory, places)?,
            reserved: 0,
        });
    }
    if modules.is_empty() {
        return Ok(info);
    }
    info.flags |= INFO_MODULES;
    info.mods_count = u32::try_from(modules.len()).unwrap_or(u32::MAX);
    info.mods_addr = table(kernel, "the module list", modules.as_bytes(), memory, places)?;
    Ok(info)
}

fn with_map(
    mut info: Info,
    kernel: &Image,
    memory: &GuestMemory,
    layout: &MemoryLayout,
    places: &mut Places,
) -> Result<Info, BootError> {
    let map: Vec<MapEntry> = layout
        .e820()
        .iter()
        .map(|e| MapEntry { size: 20, base: e.range.base, len: e.range.len, kind: e.kind as u32 })
        .collect();
    let bytes = map.as_bytes();
    info.mmap_addr = table(kernel, "the memory map", bytes, memory, places)?;
    info.mmap_length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    Ok(info)
}

/// KiB of RAM from 1 MiB to the first hole.
fn upper_memory(layout: &MemoryLayout) -> u32 {
    let map = layout.e820();
    let upper = map.iter().find(|e| e.kind == E820Kind::Ram && e.range.base == 1 << 20);
    u32::try_from(upper.map_or(0, |e| e.range.len >> 10)).unwrap_or(u32::MAX)
}

fn text(
    image: &Image,
    what: &'static str,
    text: &str,
    memory: &GuestMemory,
    places: &mut Places,
) -> Result<u32, BootError> {
    low(image, what, store_text(memory, places, what, text, CMDLINE_MAX)?)
}

fn table(
    image: &Image,
    what: &'static str,
    bytes: &[u8],
    memory: &GuestMemory,
    places: &mut Places,
) -> Result<u32, BootError> {
    let at = place(places, what, bytes.len() as u64, 16)?;
    store(memory, what, at, bytes)?;
    low(image, what, at)
}

/// `address` as the 32 bits that multiboot has for it.
fn low(image: &Image, what: &str, address: u64) -> Result<u32, BootError> {
    u32::try_from(address).map_err(|_| BootError::Unsupported {
        image: image.name().into(),
        what: format!("{what} at {address:#x}, above 4 GiB,"),
        fix: "link the kernel below 4 GiB",
    })
}
