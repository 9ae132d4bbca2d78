//! Any driver of a virtio balloon.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    vmdevices_fuzz::balloon(input);
});
