//! Linux: a bzImage or vmlinux, an initrd, a command line and the zero page (Linux
//! `Documentation/arch/x86/boot.rst` and `zero-page.rst`).

use super::bzimage::{BzImage, HEADER_START};
use super::elf::ElfFile;
use super::entry::{BELOW_4G, EntryState, place, store};
use super::payload::{Format, Payload};
use super::place::Places;
use super::source::{Bytes, Image};
use super::{BootError, E820Entry, ImageSource, Loaded, MemoryLayout, RngSeed, pvh, setup};
use crate::memory::{GpaRange, GuestAddress, GuestMemory, PAGE_SIZE};

/// How to enter a Linux kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LinuxEntry {
    /// The kernel proper: unpacked here on the host and entered directly, which saves the guest
    /// from running the decompressor. Where the payload's compression or contents are not known,
    /// the bzImage's own entry.
    #[default]
    Auto,
    /// The kernel proper, or an error.
    Payload,
    /// The bzImage's own entry: 64-bit where it has one, else 32-bit. The guest decompresses.
    BzImage,
    /// The bzImage's 16-bit setup code, as boot loaders enter it in a BIOS, with the services of a small
    /// BIOS: memory map, timer, and the first serial port for console and keyboard. The guest is told of
    /// no ACPI tables (it may find them) and gets no [`RngSeed`]. [`LinuxEntry::Auto`] takes it where the
    /// header has no 32-bit entry, as iPXE's.
    RealMode,
    /// The PVH entry of a vmlinux; see [`Pvh`](super::Pvh).
    Pvh,
}

/// A Linux kernel to boot: a bzImage or a vmlinux (ELF, 32 or 64-bit), known by its contents.
///
/// ```
/// # use vmcore::boot::{Boot, Linux};
/// let boot: Boot = Linux::new("vmlinuz").initrd("initrd.img").cmdline("console=ttyS0").into();
/// ```
#[derive(Clone, Debug)]
pub struct Linux {
    pub(super) kernel: ImageSource,
    pub(super) initrd: Option<ImageSource>,
    pub(super) cmdline: String,
    entry: LinuxEntry,
    rng_seed: RngSeed,
}

impl Linux {
    /// Boots `kernel`.
    pub fn new(kernel: impl Into<ImageSource>) -> Self {
        Self {
            kernel: kernel.into(),
            initrd: None,
            cmdline: String::new(),
            entry: LinuxEntry::default(),
            rng_seed: RngSeed::default(),
        }
    }

    /// The initial RAM disk, given to the kernel as it is.
    pub fn initrd(mut self, initrd: impl Into<ImageSource>) -> Self {
        self.initrd = Some(initrd.into());
        self
    }

    /// The kernel's command line.
    pub fn cmdline(mut self, cmdline: impl Into<String>) -> Self {
        self.cmdline = cmdline.into();
        self
    }

    /// How to enter the kernel; [`LinuxEntry::Auto`] unless said.
    pub fn entry(mut self, entry: LinuxEntry) -> Self {
        self.entry = entry;
        self
    }

    /// Replaces the host's random numbers by `seed`; what else was asked for stays.
    pub(super) fn fix_seed(&mut self, seed: [u8; 32]) {
        if self.rng_seed == RngSeed::Random {
            self.rng_seed = RngSeed::Fixed(seed);
        }
    }

    /// What the kernel seeds its random numbers with; [`RngSeed::Random`] unless said. The PVH entry
    /// has no place for it.
    pub fn rng_seed(mut self, seed: RngSeed) -> Self {
        self.rng_seed = seed;
        self
    }
}

/// Offsets in the zero page.
mod zero_page {
    pub const ACPI_RSDP_ADDR: usize = 0x070;
    pub const EXT_RAMDISK_IMAGE: usize = 0x0c0;
    pub const EXT_RAMDISK_SIZE: usize = 0x0c4;
    pub const E820_ENTRIES: usize = 0x1e8;
    pub const BOOT_FLAG: usize = 0x1fe;
    pub const HEADER: usize = 0x202;
    pub const VERSION: usize = 0x206;
    pub const TYPE_OF_LOADER: usize = 0x210;
    pub const LOADFLAGS: usize = 0x211;
    pub const CODE32_START: usize = 0x214;
    pub const RAMDISK_IMAGE: usize = 0x218;
    pub const RAMDISK_SIZE: usize = 0x21c;
    pub const CMD_LINE_PTR: usize = 0x228;
    pub const SETUP_DATA: usize = 0x250;
    pub const E820_TABLE: usize = 0x2d0;
}

/// Most entries of the memory map in the zero page.
const MAX_E820: usize = 128;
/// type_of_loader of loaders without a number of their own.
const LOADER_UNDEFINED: u8 = 0xff;
/// The version of the boot protocol that brought `setup_data`.
const SETUP_DATA_SINCE: u16 = 0x0209;
/// Longest command line of a vmlinux, which has no header to tell (`COMMAND_LINE_SIZE` of x86).
const VMLINUX_CMDLINE_MAX: u64 = 2047;
/// Highest initrd address for a vmlinux: what bzImages of the last decades say.
const VMLINUX_INITRD_MAX: u64 = 0x7fff_ffff;

/// The kernel as it was loaded, before the zero page is there.
struct Kernel {
    entry: u64,
    long_mode: bool,
    bzimage: Option<BzImage>,
    what: String,
}

pub(super) fn load(
    linux: &Linux,
    memory: &GuestMemory,
    layout: &MemoryLayout,
    rsdp: Option<GuestAddress>,
) -> Result<Loaded, BootError> {
    let limit = layout.total_ram();
    let mut image = Image::open(&linux.kernel, "kernel", limit)?;
    let mut places = Places::new(layout);
    if let Some(bzimage) = BzImage::parse(&mut image)? {
        let only_setup = bzimage.code32_start == 0 && bzimage.payload.is_none();
        if linux.entry == LinuxEntry::RealMode || linux.entry == LinuxEntry::Auto && only_setup {
            return setup::load(linux, &mut image, &bzimage, memory, layout);
        }
        let kernel = load_bzimage(linux, &mut image, bzimage, memory, &mut places, limit)?;
        return finish(linux, kernel, memory, layout, rsdp, places);
    }
    let mut image = unpacked(image, limit)?;
    if linux.entry == LinuxEntry::Pvh {
        return pvh::load_image(linux, &mut image, memory, layout, rsdp);
    }
    let Some(elf) = ElfFile::parse(&mut image)? else {
        return Err(BootError::Unrecognised {
            image: image.name().into(),
            expected: "a Linux kernel (bzImage or ELF vmlinux for x86)",
            found: image.magic(),
            fix: "boot it as what it is: Pvh, Multiboot, Elf or Raw",
        });
    };
    if matches!(linux.entry, LinuxEntry::BzImage | LinuxEntry::RealMode) {
        return Err(BootError::Unrecognised {
            image: image.name().into(),
            expected: "a bzImage",
            found: image.magic(),
            fix: "use LinuxEntry::Auto for a vmlinux",
        });
    }
    elf.load(&mut image, memory, &mut places)?;
    let entry = elf.physical_entry(&image)?;
    let what = format!("Linux ({})", image.name());
    let kernel = Kernel { entry, long_mode: elf.is_64, bzimage: None, what };
    finish(linux, kernel, memory, layout, rsdp, places)
}

/// `image`, unpacked where it is compressed as a whole ("vmlinux.gz").
pub(super) fn unpacked(mut image: Image, limit: u64) -> Result<Image, BootError> {
    if Format::detect(&image.head(8)?).is_none() {
        return Ok(image);
    }
    let len = image.len();
    match Payload::open(&mut image, 0, len, false, limit)? {
        Some(payload) => payload.into_image(),
        None => Ok(image),
    }
}

fn load_bzimage(
    linux: &Linux,
    image: &mut Image,
    bzimage: BzImage,
    memory: &GuestMemory,
    places: &mut Places,
    limit: u64,
) -> Result<Kernel, BootError> {
    let version = bzimage.version.as_deref().unwrap_or("of unknown version").to_owned();
    match linux.entry {
        LinuxEntry::Auto | LinuxEntry::Payload => {
            let payload = match bzimage.payload {
                Some((offset, len)) => Payload::open(image, offset, len, true, limit)?,
                None => None,
            };
            let kernel = match payload {
                Some(mut payload) => ElfFile::parse(&mut payload)?.map(|elf| (payload, elf)),
                None => None,
            };
            if let Some((mut payload, elf)) = kernel {
                elf.load(&mut payload, memory, places)?;
                let entry = elf.physical_entry(&payload)?;
                let what = format!("Linux {version} ({}, {})", image.name(), payload.format().name());
                payload.finish()?;
                return Ok(Kernel { entry, long_mode: elf.is_64, bzimage: Some(bzimage), what });
            }
            if linux.entry == LinuxEntry::Payload {
                return Err(BootError::Unsupported {
                    image: image.name().into(),
                    what: "a payload of unknown compression or that is no ELF file".into(),
                    fix: "use LinuxEntry::Auto, and the kernel unpacks itself",
                });
            }
        }
        LinuxEntry::BzImage | LinuxEntry::RealMode => {}
        LinuxEntry::Pvh => {
            return Err(BootError::Unsupported {
                image: image.name().into(),
                what: "the PVH entry of a bzImage".into(),
                fix: "give the vmlinux, or use LinuxEntry::Auto",
            });
        }
    }
    // The kernel moves and unpacks itself inside this range.
    let range = GpaRange { base: bzimage.load_address, len: bzimage.init_size };
    places.claim(image.name(), range)?;
    image.copy_to("protected-mode code", bzimage.code_offset, bzimage.code_len, memory, range.base)?;
    let long_mode = bzimage.has_64bit_entry;
    let entry = bzimage.load_address + if long_mode { 0x200 } else { 0 };
    let what = format!("Linux {version} ({}, unpacks itself)", image.name());
    Ok(Kernel { entry, long_mode, bzimage: Some(bzimage), what })
}

/// Places initrd, command line and zero page, and makes the entry state.
fn finish(
    linux: &Linux,
    kernel: Kernel,
    memory: &GuestMemory,
    layout: &MemoryLayout,
    rsdp: Option<GuestAddress>,
    mut places: Places,
) -> Result<Loaded, BootError> {
    let mut page = Page::new(kernel.bzimage.as_ref(), kernel.entry);
    let initrd_max = kernel.bzimage.as_ref().map_or(VMLINUX_INITRD_MAX, |b| b.initrd_max);
    if let Some(initrd) = load_initrd(linux, memory, &mut places, initrd_max, layout.total_ram())? {
        page.put32(zero_page::RAMDISK_IMAGE, initrd.base);
        page.put32(zero_page::EXT_RAMDISK_IMAGE, initrd.base >> 32);
        page.put32(zero_page::RAMDISK_SIZE, initrd.len);
        page.put32(zero_page::EXT_RAMDISK_SIZE, initrd.len >> 32);
    }
    let cmdline_max = kernel.bzimage.as_ref().map_or(VMLINUX_CMDLINE_MAX, |b| b.cmdline_max);
    let cmdline = store_text(memory, &mut places, "the command line", &linux.cmdline, cmdline_max)?;
    page.put32(zero_page::CMD_LINE_PTR, cmdline);
    if let Some(rsdp) = rsdp {
        page.put(zero_page::ACPI_RSDP_ADDR, &rsdp.0.to_le_bytes());
    }
    if page.protocol() >= SETUP_DATA_SINCE {
        let seed = linux.rng_seed.write(memory, &mut places)?;
        page.put(zero_page::SETUP_DATA, &seed.to_le_bytes());
    }
    page.put_e820(&layout.e820())?;
    let at = place(&mut places, "the zero page", PAGE_SIZE, PAGE_SIZE)?;
    store(memory, "the zero page", at, &page.0)?;

    let mut entry = if kernel.long_mode {
        EntryState::long(kernel.entry, memory, &mut places)?
    } else {
        let entry = u32::try_from(kernel.entry).map_err(|_| BootError::Unsupported {
            image: kernel.what.clone(),
            what: format!("a 32-bit entry at {:#x}", kernel.entry),
            fix: "link the kernel below 4 GiB",
        })?;
        EntryState::protected(entry, memory, &mut places)?
    };
    entry.regs.rsi = at;
    let mode = if kernel.long_mode { "64-bit" } else { "32-bit" };
    let what = format!("{}, entered at {:#x} in {mode} mode", kernel.what, kernel.entry);
    Ok(Loaded { entry, what })
}

/// Loads the initrd as high as it may be, page-aligned.
pub(super) fn load_initrd(
    linux: &Linux,
    memory: &GuestMemory,
    places: &mut Places,
    max_address: u64,
    limit: u64,
) -> Result<Option<GpaRange>, BootError> {
    let Some(source) = &linux.initrd else { return Ok(None) };
    let mut image = Image::open(source, "initrd", limit)?;
    let len = image.len();
    if len == 0 {
        return Err(BootError::Truncated {
            image: image.name().into(),
            what: "contents",
            offset: 0,
            needed: 1,
            available: 0,
        });
    }
    let window = GpaRange { base: 0, len: max_address.saturating_add(1).min(BELOW_4G.len) };
    let base = places.highest(image.name(), len, PAGE_SIZE, window)?;
    image.copy_to("contents", 0, len, memory, base)?;
    Ok(Some(GpaRange { base, len }))
}

/// Writes a zero-terminated text to low memory and returns its address.
pub(super) fn store_text(
    memory: &GuestMemory,
    places: &mut Places,
    what: &'static str,
    text: &str,
    max: u64,
) -> Result<u64, BootError> {
    let text = terminated(what, text, max)?;
    let at = place(places, what, text.len() as u64, 16)?;
    store(memory, what, at, &text)?;
    Ok(at)
}

/// `text` of at most `max` bytes, and a zero.
pub(super) fn terminated(what: &'static str, text: &str, max: u64) -> Result<Vec<u8>, BootError> {
    if let Some(position) = text.bytes().position(|byte| byte == 0) {
        return Err(BootError::ZeroByte { what, position });
    }
    if text.len() as u64 > max {
        return Err(BootError::TooLarge {
            image: format!("the image (it has {} bytes)", text.len()),
            what,
            limit: max,
            limit_is: "what the image accepts",
            fix: "shorten it",
        });
    }
    Ok([text.as_bytes(), &[0]].concat())
}

/// The zero page being filled.
struct Page([u8; 4096]);

impl Page {
    /// With the bzImage's setup header, or one that says what a vmlinux needs.
    fn new(bzimage: Option<&BzImage>, entry: u64) -> Self {
        let mut page = Self([0; 4096]);
        match bzimage {
            Some(bzimage) => page.put(HEADER_START, &bzimage.header),
            None => {
                page.put(zero_page::BOOT_FLAG, &0xAA55u16.to_le_bytes());
                page.put(zero_page::HEADER, b"HdrS");
                page.put(zero_page::VERSION, &0x020fu16.to_le_bytes());
                page.put(zero_page::LOADFLAGS, &[1]);
            }
        }
        page.put(zero_page::TYPE_OF_LOADER, &[LOADER_UNDEFINED]);
        page.put32(zero_page::CODE32_START, entry);
        page
    }

    /// The version of the boot protocol.
    fn protocol(&self) -> u16 {
        u16::from_le_bytes([self.0[zero_page::VERSION], self.0[zero_page::VERSION + 1]])
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// The low 32 bits of `value`.
    fn put32(&mut self, at: usize, value: u64) {
        self.put(at, &value.to_le_bytes()[..4]);
    }

    fn put_e820(&mut self, entries: &[E820Entry]) -> Result<(), BootError> {
        let count = u8::try_from(entries.len()).ok().filter(|&n| usize::from(n) <= MAX_E820);
        let count = count.ok_or_else(|| BootError::Table {
            what: "the memory map".into(),
            table: "zero page",
            value: format!("{} ranges", entries.len()),
            fix: "it has room for 128: join memory regions",
        })?;
        self.put(zero_page::E820_ENTRIES, &[count]);
        for (index, entry) in entries.iter().enumerate() {
            let at = zero_page::E820_TABLE + index * 20;
            self.put(at, &entry.range.base.to_le_bytes());
            self.put(at + 8, &entry.range.len.to_le_bytes());
            self.put(at + 16, &(entry.kind as u32).to_le_bytes());
        }
        Ok(())
    }
}
