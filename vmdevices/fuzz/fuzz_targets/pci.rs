//! Any driver of a PCI bus.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    vmdevices_fuzz::pci(input);
});
