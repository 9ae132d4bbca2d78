//! Any bytes as a multiboot kernel with a module; the header's checksum is made right.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmcore::boot::Multiboot;
use vmcore_fuzz::try_load;

fuzz_target!(|data: &[u8]| {
    let Some((flags, rest)) = data.split_first_chunk() else { return };
    let flags = u32::from_le_bytes(*flags);
    let checksum = 0u32.wrapping_sub(0x1BAD_B002).wrapping_sub(flags);
    let header: Vec<u8> = [0x1BAD_B002, flags, checksum].iter().flat_map(|word| word.to_le_bytes()).collect();
    try_load(Multiboot::new([&header, rest].concat()).module(b"module", "one"));
    try_load(Multiboot::new(data.to_vec()));
});
