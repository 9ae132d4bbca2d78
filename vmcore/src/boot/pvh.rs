//! PVH: an ELF kernel with a Xen note, entered in 32-bit mode (Xen
//! `docs/misc/pvh.pandoc` and `xen/include/public/arch-x86/hvm/start_info.h`).

use zerocopy::{Immutable, IntoBytes};

use super::elf::ElfFile;
use super::entry::{EntryState, place, store};
use super::linux::{Linux, load_initrd, store_text, unpacked};
use super::place::Places;
use super::source::{Bytes, Image};
use super::{BootError, ImageSource, Loaded, MemoryLayout};
use crate::memory::{GuestAddress, GuestMemory};

/// `XEN_ELFNOTE_PHYS32_ENTRY`: the note that holds the 32-bit entry point.
const NOTE_PHYS32_ENTRY: u32 = 18;
const NOTE_NAME: &[u8] = b"Xen\0";
/// `XEN_HVM_START_MAGIC_VALUE`.
const START_MAGIC: u32 = 0x336e_c578;
/// Modules may be anywhere below 4 GiB.
const MODULE_MAX: u64 = 0xffff_ffff;
/// Longest command line; Linux' own limit is shorter.
const CMDLINE_MAX: u64 = 0xffff;

/// An ELF kernel with a PVH entry: Linux' vmlinux, Xen, FreeBSD, unikernels (Xen
/// `docs/misc/pvh.pandoc`).
///
/// ```
/// # use vmcore::boot::{Boot, Pvh};
/// let boot: Boot = Pvh::new("vmlinux").initrd("initrd.img").cmdline("console=ttyS0").into();
/// ```
#[derive(Clone, Debug)]
pub struct Pvh(pub(super) Linux);

impl Pvh {
    /// Boots `kernel`, an ELF file with the note `XEN_ELFNOTE_PHYS32_ENTRY`; it may be compressed.
    pub fn new(kernel: impl Into<ImageSource>) -> Self {
        Self(Linux::new(kernel))
    }

    /// The first module, which Linux takes for its initrd.
    pub fn initrd(self, initrd: impl Into<ImageSource>) -> Self {
        Self(self.0.initrd(initrd))
    }

    /// The kernel's command line.
    pub fn cmdline(self, cmdline: impl Into<String>) -> Self {
        Self(self.0.cmdline(cmdline))
    }
}

/// `struct hvm_start_info`, version 1.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    module_count: u32,
    modules: u64,
    cmdline: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

/// `struct hvm_modlist_entry`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Module {
    address: u64,
    len: u64,
    cmdline: u64,
    reserved: u64,
}

/// `struct hvm_memmap_table_entry`; types are those of E820.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct MapEntry {
    address: u64,
    len: u64,
    kind: u32,
    reserved: u32,
}

pub(super) fn load(
    pvh: &Pvh,
    memory: &GuestMemory,
    layout: &MemoryLayout,
    rsdp: Option<GuestAddress>,
) -> Result<Loaded, BootError> {
    let limit = layout.total_ram();
    let mut image = unpacked(Image::open(&pvh.0.kernel, "kernel", limit)?, limit)?;
    load_image(&pvh.0, &mut image, memory, layout, rsdp)
}

pub(super) fn load_image(
    kernel: &Linux,
    image: &mut Image,
    memory: &GuestMemory,
    layout: &MemoryLayout,
    rsdp: Option<GuestAddress>,
) -> Result<Loaded, BootError> {
    let unrecognised = |image: &mut Image, fix| BootError::Unrecognised {
        image: image.name().into(),
        expected: "an ELF file with a PVH entry (note XEN_ELFNOTE_PHYS32_ENTRY)",
        found: image.magic(),
        fix,
    };
    let Some(elf) = ElfFile::parse(image)? else {
        return Err(unrecognised(image, "give the vmlinux, not the bzImage"));
    };
    let Some(entry) = elf.note::<4>(image, NOTE_NAME, NOTE_PHYS32_ENTRY)? else {
        return Err(unrecognised(image, "build it with CONFIG_PVH, or boot it with Linux or Elf"));
    };
    let entry = u32::from_le_bytes(entry);
    let mut places = Places::new(layout);
    elf.load(image, memory, &mut places)?;

    let mut modules = Vec::new();
    if let Some(initrd) = load_initrd(kernel, memory, &mut places, MODULE_MAX, layout.total_ram())? {
        modules.push(Module { address: initrd.base, len: initrd.len, cmdline: 0, reserved: 0 });
    }
    let map: Vec<MapEntry> = layout
        .e820()
        .iter()
        .map(|e| MapEntry { address: e.range.base, len: e.range.len, kind: e.kind as u32, reserved: 0 })
        .collect();
    let info = StartInfo {
        magic: START_MAGIC,
        version: 1,
        flags: 0,
        module_count: u32::try_from(modules.len()).unwrap_or(0),
        modules: store_table(memory, &mut places, "the PVH module list", modules.as_bytes())?,
        cmdline: store_text(memory, &mut places, "the command line", &kernel.cmdline, CMDLINE_MAX)?,
        rsdp: rsdp.map_or(0, |rsdp| rsdp.0),
        memory_map: store_table(memory, &mut places, "the PVH memory map", map.as_bytes())?,
        memory_map_entries: u32::try_from(map.len()).unwrap_or(0),
        reserved: 0,
    };
    let info = store_table(memory, &mut places, "the PVH start info", info.as_bytes())?;

    let mut state = EntryState::protected(entry, memory, &mut places)?;
    state.regs.rbx = info;
    Ok(Loaded { entry: state, what: format!("{}, entered at {entry:#x} by PVH", image.name()) })
}

/// Writes a table to low memory; an empty one has no address.
fn store_table(
    memory: &GuestMemory,
    places: &mut Places,
    what: &'static str,
    bytes: &[u8],
) -> Result<u64, BootError> {
    if bytes.is_empty() {
        return Ok(0);
    }
    let at = place(places, what, bytes.len() as u64, 16)?;
    store(memory, what, at, bytes)?;
    Ok(at)
}
