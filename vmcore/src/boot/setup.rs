//! The bzImage's 16-bit setup code, entered as a boot loader in a BIOS does (Linux
//! `Documentation/arch/x86/boot.rst`, "The Real-Mode Kernel Header").

use super::bzimage::BzImage;
use super::entry::store;
use super::linux::{Linux, load_initrd, terminated};
use super::place::Places;
use super::source::{Bytes, Image};
use super::{BootError, Loaded, MemoryLayout, bios};
use crate::memory::{GpaRange, GuestMemory};

/// The setup code's segment of 64 KiB.
const SETUP: GpaRange = GpaRange { base: 0x1_0000, len: 0x1_0000 };
/// Where in it heap and stack end and the command line begins.
const HEAP_END: u16 = 0xE000;
/// Longest setup code that leaves room for its heap and stack.
const SETUP_MAX: u64 = 0xD000;
/// Longest command line that fits behind them.
const CMDLINE_MAX: u64 = 0x1FFF;

/// Fields of the setup header, as offsets in the setup code.
mod header {
    pub const TYPE_OF_LOADER: u64 = 0x210;
    pub const LOADFLAGS: u64 = 0x211;
    pub const CODE32_START: u64 = 0x214;
    pub const RAMDISK_IMAGE: u64 = 0x218;
    pub const RAMDISK_SIZE: u64 = 0x21c;
    pub const HEAP_END_PTR: u64 = 0x224;
    pub const CMD_LINE_PTR: u64 = 0x228;
}
/// loadflags: the heap may be used; the code is at 1 MiB.
const CAN_USE_HEAP_LOADED_HIGH: u8 = 0x81;
/// type_of_loader of loaders without a number of their own.
const LOADER_UNDEFINED: u8 = 0xff;

/// Loads `image` with the services of a [`bios`] and returns the state that enters its setup code.
pub(super) fn load(
    linux: &Linux,
    image: &mut Image,
    bzimage: &BzImage,
    memory: &GuestMemory,
    layout: &MemoryLayout,
) -> Result<Loaded, BootError> {
    const WHAT: &str = "the setup code";
    let mut places = Places::new(layout);
    places.claim(WHAT, SETUP)?;
    if bzimage.code_offset > SETUP_MAX {
        return Err(BootError::TooLarge {
            image: image.name().into(),
            what: WHAT,
            limit: SETUP_MAX,
            limit_is: "what leaves room for its stack",
            fix: "enter the image in 32-bit mode",
        });
    }
    image.copy_to(WHAT, 0, bzimage.code_offset, memory, SETUP.base)?;
    let code = GpaRange { base: bzimage.load_address, len: bzimage.init_size };
    places.claim(image.name(), code)?;
    image.copy_to("protected-mode code", bzimage.code_offset, bzimage.code_len, memory, code.base)?;
    let initrd = load_initrd(linux, memory, &mut places, bzimage.initrd_max, layout.total_ram())?;

    let put = |at: u64, bytes: &[u8]| store(memory, WHAT, SETUP.base + at, bytes);
    let put32 = |at: u64, value: u64| put(at, &value.to_le_bytes()[..4]);
    let cmdline = terminated("the command line", &linux.cmdline, bzimage.cmdline_max.min(CMDLINE_MAX))?;
    put(u64::from(HEAP_END), &cmdline)?;
    put(header::TYPE_OF_LOADER, &[LOADER_UNDEFINED])?;
    put(header::LOADFLAGS, &[CAN_USE_HEAP_LOADED_HIGH])?;
    put(header::HEAP_END_PTR, &(HEAP_END - 0x200).to_le_bytes())?;
    put32(header::CODE32_START, code.base)?;
    put32(header::CMD_LINE_PTR, SETUP.base + u64::from(HEAP_END))?;
    if let Some(initrd) = initrd {
        put32(header::RAMDISK_IMAGE, initrd.base)?;
        put32(header::RAMDISK_SIZE, initrd.len)?;
    }
    let segment = u16::try_from(SETUP.base >> 4).unwrap_or(0);
    let entry = bios::install(memory, layout, segment, HEAP_END)?;
    let version = bzimage.version.as_deref().unwrap_or("of unknown version");
    let what = format!("Linux {version} ({}), entered by its setup code in real mode", image.name());
    Ok(Loaded { entry, what })
}
