//! Any code from any state, on a small memory.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| vmcore::soft::fuzz::cpu(data));
