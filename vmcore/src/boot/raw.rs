//! Images without a boot protocol: flat binaries in real, protected or long mode, and ELF files
//! entered where they say.

use super::elf::ElfFile;
use super::entry::{BELOW_4G, EntryState, place};
use super::linux::unpacked;
use super::place::Places;
use super::source::{Bytes, Image};
use super::{BootError, ImageSource, Loaded, MemoryLayout};
use crate::memory::{GpaRange, GuestMemory};

/// Stack given to images, in bytes.
const STACK: u64 = 16 << 10;
/// Where the stack of a real-mode image may be: behind the BIOS data area, within segment 0.
const REAL_STACKS: GpaRange = GpaRange { base: 0x500, len: 0xFB00 };
/// Stack of a real-mode image, in bytes.
const REAL_STACK: u64 = 0x400;
/// Where real mode's 64 KiB segments reach, without the A20 line's gift above.
const REAL_END: u64 = 0x10_0000;

/// The mode in which the vCPU enters a flat image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RawMode {
    /// 16-bit real mode. CS is a multiple of 0x1000, so that 0x7c00 is 0000:7c00 and 0xffff0 is
    /// f000:fff0; the other segments are 0.
    Real16,
    /// 32-bit protected mode, flat segments, no paging.
    Protected32,
    /// 64-bit mode, the first 4 GiB mapped to themselves in 2 MiB pages.
    Long64,
}

/// A flat binary. The vCPU enters it with a small stack, interrupts disabled and all general
/// registers but the stack pointer zero.
///
/// ```
/// # use vmcore::boot::{Boot, Raw, RawMode};
/// // mov al, '!'; out 0xe9, al; hlt
/// let boot: Boot = Raw::new(vec![0xb0, b'!', 0xe6, 0xe9, 0xf4], RawMode::Real16).into();
/// ```
#[derive(Clone, Debug)]
pub struct Raw {
    image: ImageSource,
    mode: RawMode,
    load_at: u64,
    entry: Option<u64>,
    stack: Option<u64>,
}

impl Raw {
    /// Runs `image` in `mode`, from 0x7c00 in real mode, else from 1 MiB.
    pub fn new(image: impl Into<ImageSource>, mode: RawMode) -> Self {
        let load_at = if mode == RawMode::Real16 { 0x7c00 } else { 0x10_0000 };
        Self { image: image.into(), mode, load_at, entry: None, stack: None }
    }

    /// Loads it at this guest-physical address.
    pub fn load_at(mut self, address: u64) -> Self {
        self.load_at = address;
        self
    }

    /// Enters it at this guest-physical address; its first byte unless said.
    pub fn entry(mut self, address: u64) -> Self {
        self.entry = Some(address);
        self
    }

    /// Sets the stack pointer; 16 KiB of free memory (1 KiB in real mode) unless said.
    pub fn stack(mut self, address: u64) -> Self {
        self.stack = Some(address);
        self
    }
}

/// A plain ELF executable, 32 or 64-bit, entered at its entry point in the mode of its class, with
/// a state as for [`Raw`]. It may be compressed as a whole.
///
/// ```
/// # use vmcore::boot::{Boot, Elf};
/// let boot: Boot = Elf::new("kernel.elf").into();
/// ```
#[derive(Clone, Debug)]
pub struct Elf {
    image: ImageSource,
}

impl Elf {
    /// Runs `image`.
    pub fn new(image: impl Into<ImageSource>) -> Self {
        Self { image: image.into() }
    }
}

pub(super) fn load(raw: &Raw, memory: &GuestMemory, layout: &MemoryLayout) -> Result<Loaded, BootError> {
    let mut image = Image::open(&raw.image, "image", layout.total_ram())?;
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
    // The image may be anywhere, also where a PC's firmware is: it is the firmware.
    let mut places = Places::new(&MemoryLayout::bare(layout.ram().to_vec()));
    let range = GpaRange { base: raw.load_at, len };
    places.claim(image.name(), range)?;
    let entry = raw.entry.unwrap_or(raw.load_at);
    image.copy_to("contents", 0, len, memory, raw.load_at)?;
    // Later claims stay out of the firmware areas.
    let mut places = beside(range, image.name(), layout);
    let state = match raw.mode {
        RawMode::Real16 => {
            if entry >= REAL_END {
                return Err(unreachable(&image, entry, "enter it below 1 MiB, or in another mode"));
            }
            let stack = match raw.stack {
                Some(stack) => stack,
                None => places.lowest("the stack", REAL_STACK, 16, REAL_STACKS)? + REAL_STACK,
            };
            let stack =
                u16::try_from(stack).map_err(|_| unreachable(&image, stack, "put the stack below 64 KiB"))?;
            EntryState::real(u32::try_from(entry).unwrap_or(0), stack)
        }
        RawMode::Protected32 => flat(&image, entry, false, raw.stack, memory, &mut places)?,
        RawMode::Long64 => flat(&image, entry, true, raw.stack, memory, &mut places)?,
    };
    let what = format!("{} at {range}, entered at {entry:#x} in {:?} mode", image.name(), raw.mode);
    Ok(Loaded { entry: state, what })
}

pub(super) fn load_elf(boot: &Elf, memory: &GuestMemory, layout: &MemoryLayout) -> Result<Loaded, BootError> {
    let limit = layout.total_ram();
    let mut image = unpacked(Image::open(&boot.image, "image", limit)?, limit)?;
    let Some(elf) = ElfFile::parse(&mut image)? else {
        return Err(BootError::Unrecognised {
            image: image.name().into(),
            expected: "an ELF executable for i386 or x86-64",
            found: image.magic(),
            fix: "boot it as what it is: Linux, Multiboot or Raw",
        });
    };
    let mut places = Places::new(layout);
    elf.load(&mut image, memory, &mut places)?;
    let entry = elf.physical_entry(&image)?;
    let state = flat(&image, entry, elf.is_64, None, memory, &mut places)?;
    let bits = if elf.is_64 { 64 } else { 32 };
    Ok(Loaded { entry: state, what: format!("{}, entered at {entry:#x} in {bits}-bit mode", image.name()) })
}

/// Entry in 32 or 64-bit mode, with a stack.
fn flat(
    image: &Image,
    entry: u64,
    long: bool,
    stack: Option<u64>,
    memory: &GuestMemory,
    places: &mut Places,
) -> Result<EntryState, BootError> {
    let mut state = if long {
        if entry >= BELOW_4G.len {
            return Err(unreachable(image, entry, "enter it below 4 GiB, where memory is mapped"));
        }
        EntryState::long(entry, memory, places)?
    } else {
        let entry = u32::try_from(entry)
            .map_err(|_| unreachable(image, entry, "enter it below 4 GiB, or in 64-bit mode"))?;
        EntryState::protected(entry, memory, places)?
    };
    state.regs.rsp = match stack {
        Some(stack) => stack,
        None => place(places, "the stack", STACK, 16)? + STACK,
    };
    Ok(state)
}

/// The layout's free memory without an image that may lie over what is reserved.
fn beside(image: GpaRange, name: &str, layout: &MemoryLayout) -> Places {
    let mut places = Places::new(layout);
    places.block(name, image);
    places
}

fn unreachable(image: &Image, address: u64, fix: &'static str) -> BootError {
    BootError::Unsupported {
        image: image.name().into(),
        what: format!("address {address:#x} in this mode"),
        fix,
    }
}
