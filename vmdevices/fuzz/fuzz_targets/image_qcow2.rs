//! Any qcow2 image.
#![no_main]

#[path = "../src/images.rs"]
mod images;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    images::image(vmdevices::block::Format::Qcow2, input);
});
