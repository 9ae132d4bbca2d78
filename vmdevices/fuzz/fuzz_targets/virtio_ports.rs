//! Any driver of a virtio console with several ports.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    vmdevices_fuzz::ports(input);
});
