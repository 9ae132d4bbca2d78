//! Any driver of a virtio console.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    vmdevices_fuzz::console(input);
});
