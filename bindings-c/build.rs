//! Gives the shared library the name that programs are linked to. Which symbols it exports rustc sees to: a
//! version script of its own names those that are `no_mangle`, which are `vmcore_*`; tests/abi checks it.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let major = std::env::var("CARGO_PKG_VERSION_MAJOR").unwrap_or_default();
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libvmcore.so.{major}");
}
