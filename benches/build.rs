//! Compiles the raw-ioctl C code that vmcore is measured against: a library, and a program.

use std::path::PathBuf;

fn main() {
    for source in ["raw.c", "raw.h", "raw_start.c"] {
        println!("cargo:rerun-if-changed={source}");
    }
    let mut build = cc::Build::new();
    build.opt_level(2).warnings(true).extra_warnings(true);
    build.clone().file("raw.c").compile("raw");

    let program = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it")).join("raw_start");
    let mut compile = build.get_compiler().to_command();
    compile.args(["raw.c", "raw_start.c", "-o"]).arg(&program);
    let status = compile.status().expect("the C compiler runs");
    assert!(status.success(), "{compile:?}: {status}");
    println!("cargo:rustc-env=RAW_START={}", program.display());
}
