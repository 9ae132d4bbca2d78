//! vmcore for C: the functions and types of `vmcore.h`, which cbindgen makes of this crate.
//!
//! A thin layer: everything it does is [`vmcore`]'s and [`vmdevices`]'. Handles are boxes. A reference in a
//! signature is a pointer that may be NULL, by `Option`; `out` parameters are `MaybeUninit`, since what they point
//! to has no value before.

#![expect(unsafe_code, reason = "the interface is C's: pointers, and symbols by their names")]
#![expect(non_camel_case_types, reason = "the types have the names that C sees")]

mod builder;
mod bytes;
mod callback;
mod console;
mod control;
mod cpuid;
mod device;
mod disk;
mod error;
mod host;
mod irq;
mod log;
mod machine;
mod memory;
mod net;
mod outcome;
mod pause;
mod region;
mod registers;
mod script;
mod state;
mod stats;
mod vcpu;
mod virtio;
mod vm;
mod vsock;

use std::ffi::c_char;

/// The version of the library, as VMCORE_VERSION is the header's: "0.1.0". Never freed.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}
