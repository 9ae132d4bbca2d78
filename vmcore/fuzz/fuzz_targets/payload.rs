//! Any bytes as compressed data: the first byte chooses the format, whose magic is given.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmcore::boot::Linux;
use vmcore_fuzz::{bzimage, try_load};

const MAGICS: [&[u8]; 7] = [
    b"\x1f\x8b\x08\0",
    b"BZh9",
    b"\x5d\0\0",
    b"\xfd7zXZ\0",
    b"\x89LZO\0\r\n\x1a\n",
    b"\x02\x21\x4c\x18",
    b"\x28\xb5\x2f\xfd",
];

fuzz_target!(|data: &[u8]| {
    let Some((&choice, rest)) = data.split_first() else { return };
    let payload = [MAGICS[usize::from(choice) % MAGICS.len()], rest].concat();
    try_load(Linux::new(bzimage(&payload)));
    try_load(Linux::new(payload));
});
