//! Any bytes as a bzImage, entered both ways; the setup header's magic is given.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmcore::boot::{Linux, LinuxEntry};
use vmcore_fuzz::try_load;

fuzz_target!(|data: &[u8]| {
    let mut image = data.to_vec();
    if let Some(magic) = image.get_mut(0x1fe..0x206) {
        magic[..2].copy_from_slice(b"\x55\xaa");
        magic[4..].copy_from_slice(b"HdrS");
    }
    let linux = Linux::new(image).initrd(b"initrd").cmdline("console=ttyS0");
    try_load(linux.clone());
    try_load(linux.entry(LinuxEntry::BzImage));
});
