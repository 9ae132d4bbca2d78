//! A PC's BIOS, as far as programs that begin in real mode need one: console and keyboard on the first
//! serial port, the timer's tick, the sizes of memory. It has no disks and no PCI functions, and ends the
//! machine with a reset where it is asked to boot something else.
//!
//! The services and their registers are those of the IBM PS/2 and PC BIOS Interface Technical Reference,
//! the memory map's of ACPI 6.5, 15.1.
#![expect(unsafe_code, reason = "takes the assembled code from where the linker has put it")]

use zerocopy::IntoBytes;

use super::entry::{EntryState, store};
use super::layout::{BIOS_SERVICES, E820Kind};
use super::{BootError, MemoryLayout};
use crate::memory::GuestMemory;

std::arch::global_asm!(include_str!("bios.s"), options(att_syntax));

/// Where in the services the processor begins after a reset: their last 16 bytes are the mebibyte's.
const RESET_VECTOR: usize = 0xff0;

unsafe extern "C" {
    static vmcore_bios_start: u8;
    static vmcore_bios_table: u8;
    static vmcore_bios_end: u8;
}

/// The code, and where in it the table begins: two sizes, the handler of vectors without a service, then
/// vectors and handlers.
fn code() -> (&'static [u8], usize) {
    let (start, table, end) =
        (&raw const vmcore_bios_start, &raw const vmcore_bios_table, &raw const vmcore_bios_end);
    let len = end.addr() - start.addr();
    // SAFETY: `bios.s` puts the three labels into one section that nobody writes, in this order.
    let code = unsafe { std::slice::from_raw_parts(start, len) };
    (code, table.addr() - start.addr())
}

/// Writes interrupt vectors and services. vCPU 0 is to begin in the state returned: the interrupt
/// controllers and the timer are set up then, and the setup code in the segment `setup` entered at
/// offset 0x200 with the stack pointer `stack`.
pub(super) fn install(
    memory: &GuestMemory,
    layout: &MemoryLayout,
    setup: u16,
    stack: u16,
) -> Result<EntryState, BootError> {
    const WHAT: &str = "the BIOS services";
    let segment = u16::try_from(BIOS_SERVICES.base >> 4).unwrap_or(0);
    let (code, table) = code();
    let (mut image, numbers) = (code.to_vec(), code[table..].as_chunks::<2>().0);
    let mut numbers = numbers.iter().skip(2).map(|bytes| u16::from_le_bytes(*bytes));

    let mut vectors = [[numbers.next().unwrap_or(0), segment]; 256];
    while let (Some(vector), Some(handler)) = (numbers.next(), numbers.next()) {
        if let Some(entry) = vectors.get_mut(usize::from(vector)) {
            entry[0] = handler;
        }
    }

    let map = layout.e820();
    let (below_16m, above_16m) = extended(&map);
    image[table..table + 2].copy_from_slice(&below_16m.to_le_bytes());
    image[table + 2..table + 4].copy_from_slice(&above_16m.to_le_bytes());
    let count = u16::try_from(map.len()).unwrap_or(u16::MAX);
    image.extend(count.to_le_bytes());
    for entry in &map {
        image.extend(entry.range.base.to_le_bytes());
        image.extend(entry.range.len.to_le_bytes());
        image.extend((entry.kind as u32).to_le_bytes());
    }
    if image.len() > RESET_VECTOR {
        return Err(BootError::Table {
            what: "the memory map".into(),
            table: WHAT,
            value: format!("{count} ranges"),
            fix: "join memory regions, or enter the image in another mode",
        });
    }
    // Programs jump to f000:fff0 for a reset: far, to where INT 19h leads.
    image.resize(RESET_VECTOR, 0);
    let [[low, high], [segment_low, segment_high]] = vectors[0x19].map(u16::to_le_bytes);
    image.extend([0xea, low, high, segment_low, segment_high]);
    store(memory, WHAT, BIOS_SERVICES.base, &image)?;
    store(memory, WHAT, 0, vectors.as_bytes())?;

    let mut state = EntryState::real(0, stack);
    state.sregs.cs = crate::state::Segment::real_mode(segment, true);
    state.sregs.ss = crate::state::Segment::real_mode(setup, false);
    Ok(state)
}

/// RAM from 1 MiB to 16 MiB in KiB, and from 16 MiB in blocks of 64 KiB, up to the first hole.
fn extended(map: &[super::E820Entry]) -> (u16, u16) {
    const MIB: u64 = 1 << 20;
    let ram = map.iter().find(|entry| entry.kind == E820Kind::Ram && entry.range.base == MIB);
    let end = ram.and_then(|entry| entry.range.end()).unwrap_or(MIB);
    let clamp = |value: u64| u16::try_from(value).unwrap_or(u16::MAX);
    (clamp((end.min(16 * MIB) - MIB) >> 10), clamp(end.saturating_sub(16 * MIB) >> 16))
}
