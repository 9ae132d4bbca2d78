//! What the loaders' fuzz targets share: a small guest to load into.
//!
//! Run one from `vmcore/` with `cargo +nightly fuzz run TARGET -- -max_total_time=60`. (Those of the software
//! CPU, `decoder`, `walk` and `cpu`, are `vmcore::soft::fuzz`, which is there for `--cfg fuzzing` alone; its
//! unit tests run them on random input without cargo-fuzz.)

use std::sync::LazyLock;

use vmcore::boot::{Boot, MemoryLayout, load};
use vmcore::{GuestAddress, GuestMemory, MemoryRegion};

/// RAM of the guest, in bytes.
const RAM: u64 = 4 << 20;

static MACHINE: LazyLock<(GuestMemory, MemoryLayout)> = LazyLock::new(|| {
    let memory = GuestMemory::new();
    let region = MemoryRegion::anonymous(GuestAddress(0), RAM).expect("4 MiB of memory");
    memory.insert(region.into()).expect("an empty address space");
    (memory, MemoryLayout::pc(RAM))
});

/// Loads `boot`; whether it succeeds is not the question. What was loaded must be in memory.
pub fn try_load(boot: impl Into<Boot>) {
    let (memory, layout) = &*MACHINE;
    if let Ok(loaded) = load(&boot.into(), memory, layout, Some(GuestAddress(0xe_0000))) {
        assert!(loaded.entry.sregs.cr3 < RAM && loaded.entry.sregs.gdt.base < RAM);
    }
}

/// A bzImage around `payload`, which is loaded at 1 MiB where it unpacks itself.
pub fn bzimage(payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).expect("a short input");
    let mut image = vec![0; 1024];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS\x0f\x02");
    put(0x211, &[1]);
    put(0x24c, &len.to_le_bytes());
    image.extend_from_slice(payload);
    image
}
