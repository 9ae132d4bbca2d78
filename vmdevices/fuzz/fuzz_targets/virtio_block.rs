//! Any driver of a virtio disk.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    vmdevices_fuzz::block(input);
});
