//! Any page tables and control registers, and accesses through them.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| vmcore::soft::fuzz::walk(data));
