//! Any driver of a virtio socket device.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    vmdevices_fuzz::vsock(input);
});
