//! Any bytes as an ELF file, by each protocol that takes one; the magic is given.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmcore::boot::{Elf, Linux, Pvh};
use vmcore_fuzz::try_load;

fuzz_target!(|data: &[u8]| {
    let image = [b"\x7fELF", data].concat();
    try_load(Linux::new(image.clone()));
    try_load(Pvh::new(image.clone()).initrd(b"initrd").cmdline("pvh"));
    try_load(Elf::new(image));
});
