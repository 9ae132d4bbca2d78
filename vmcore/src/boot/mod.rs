//! What the guest runs first, and the tables that tell it about its machine.
//!
//! A [`Boot`] names the images. [`load`] copies them to guest memory and returns the state in
//! which vCPU 0 must enter. [`acpi::build_tables`] and [`mptable::build_table`] describe the
//! machine; [`MemoryLayout`] says where RAM is and what in it is taken.
//!
//! Images are hostile: every length is checked against what there is, nothing is allocated for
//! what an image only announces, and unpacking ends at the size of the guest's memory. The file
//! of an image must not be written while it is loaded (the guest would see a mixture).

pub mod acpi;
mod bios;
mod bzimage;
mod elf;
mod entry;
mod error;
pub mod layout;
mod linux;
mod lz4;
mod lzo;
pub mod mptable;
mod multiboot;
mod payload;
mod place;
mod pvh;
mod raw;
mod seed;
mod setup;
mod source;
#[cfg(test)]
mod tests;

pub use entry::EntryState;
pub use error::BootError;
pub use layout::{E820Entry, E820Kind, MemoryLayout};
pub use linux::{Linux, LinuxEntry};
pub use multiboot::Multiboot;
pub use pvh::Pvh;
pub use raw::{Elf, Raw, RawMode};
pub use seed::RngSeed;
pub use source::ImageSource;

use crate::memory::{GuestAddress, GuestMemory};

/// What to run first.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Boot {
    /// A Linux kernel.
    Linux(Linux),
    /// An ELF kernel with a PVH entry.
    Pvh(Pvh),
    /// A multiboot 1 kernel with modules.
    Multiboot(Multiboot),
    /// A plain ELF executable.
    Elf(Elf),
    /// A flat binary.
    Raw(Raw),
}

macro_rules! boot_from {
    ($($kind:ident),+) => {$(
        impl From<$kind> for Boot {
            fn from(boot: $kind) -> Self {
                Boot::$kind(boot)
            }
        }
    )+};
}

boot_from!(Linux, Pvh, Multiboot, Elf, Raw);

impl Boot {
    /// Has a guest that would be given random numbers of the host be given `seed` instead.
    pub(crate) fn fix_seed(&mut self, seed: [u8; 32]) {
        if let Boot::Linux(linux) = self {
            linux.fix_seed(seed);
        }
    }
}

/// What [`load`] put into guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// The state in which vCPU 0 enters it.
    pub entry: EntryState,
    /// What was loaded and how it is entered, in words, for logs.
    pub what: String,
}

/// Loads `boot` into `memory`, beside what `layout` reserves. `rsdp` is where ACPI tables begin,
/// if there are any: boot protocols that can tell the guest do.
///
/// Memory need not be fresh: all that the images expect to be zero is cleared, so that a guest can
/// be booted again in place.
///
/// # Errors
/// [`BootError`]: the image cannot be read, is damaged, of another kind, or does not fit. Memory
/// may be partly written then.
pub fn load(
    boot: &Boot,
    memory: &GuestMemory,
    layout: &MemoryLayout,
    rsdp: Option<GuestAddress>,
) -> Result<Loaded, BootError> {
    // A flat binary may be the firmware that fills that area itself.
    if !matches!(boot, Boot::Raw(_)) {
        write_bios_data(memory, layout)?;
    }
    let loaded = match boot {
        Boot::Linux(linux) => linux::load(linux, memory, layout, rsdp),
        Boot::Pvh(pvh) => pvh::load(pvh, memory, layout, rsdp),
        Boot::Multiboot(multiboot) => multiboot::load(multiboot, memory, layout),
        Boot::Elf(elf) => raw::load_elf(elf, memory, layout),
        Boot::Raw(raw) => raw::load(raw, memory, layout),
    }?;
    log::debug!("loaded {}", loaded.what);
    Ok(loaded)
}

/// Tells guests that look at the BIOS data area how much base memory there is and where the
/// extended BIOS data area begins.
fn write_bios_data(memory: &GuestMemory, layout: &MemoryLayout) -> Result<(), BootError> {
    /// Segment of the extended BIOS data area, and KiB of base memory.
    const EBDA_SEGMENT: u64 = layout::BIOS_DATA.base + 0x0e;
    const BASE_MEMORY: u64 = layout::BIOS_DATA.base + 0x13;
    let reserved = |range| layout.reserved().iter().any(|(other, ..)| *other == range);
    if !reserved(layout::BIOS_DATA) || !reserved(layout::EBDA) || !memory.contains(GuestAddress(0), 0x500) {
        return Ok(());
    }
    let what = "the BIOS data area";
    let segment = (layout::EBDA.base >> 4).to_le_bytes();
    let kib = (layout::EBDA.base >> 10).to_le_bytes();
    entry::store(memory, what, EBDA_SEGMENT, &segment[..2])?;
    entry::store(memory, what, BASE_MEMORY, &kib[..2])
}
