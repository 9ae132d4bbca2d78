//! Any frames for the built-in NAT.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    vmdevices_fuzz::nat::nat(input);
});
