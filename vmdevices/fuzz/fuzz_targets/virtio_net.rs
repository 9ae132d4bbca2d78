//! Any driver of a virtio network card.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    vmdevices_fuzz::net(input);
});
