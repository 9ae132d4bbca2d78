//! Any driver of a virtio entropy source.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    vmdevices_fuzz::rng(input);
});
