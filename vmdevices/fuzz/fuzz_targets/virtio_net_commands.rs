//! Commands, and packets with any headers, of a virtio network card's driver.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    vmdevices_fuzz::net_commands(input);
});
