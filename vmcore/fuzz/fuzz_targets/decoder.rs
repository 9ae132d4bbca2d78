//! Any bytes as code of any mode and processor.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| vmcore::soft::fuzz::decoder(data));
