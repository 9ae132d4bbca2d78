//! Compiles the raw-ioctl C code that vmcore is measured against, a library and a program; and the
//! programs that time kinds of work, on the host and in guests.

use std::path::PathBuf;

/// Compiles `sources` into the program of that name, whose path the environment variable `variable` has.
fn program(build: &cc::Build, variable: &str, sources: &[&str], options: &[&str]) {
    let name = sources.last().and_then(|source| source.strip_suffix(".c")).expect("a C file");
    let path = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it")).join(name);
    let mut compile = build.get_compiler().to_command();
    compile.args(options).args(sources).arg("-o").arg(&path);
    let status = compile.status().expect("the C compiler runs");
    assert!(status.success(), "{compile:?}: {status}");
    println!("cargo:rustc-env={variable}={}", path.display());
}

fn main() {
    for source in [
        "callbacks.c",
        "../bindings-c/include/vmcore.h",
        "raw.c",
        "raw.h",
        "raw_start.c",
        "rows.c",
        "stream.c",
    ] {
        println!("cargo:rerun-if-changed={source}");
    }
    let mut build = cc::Build::new();
    build.opt_level(2).warnings(true).extra_warnings(true);
    build.clone().file("raw.c").compile("raw");
    build.clone().include("../bindings-c/include").file("callbacks.c").compile("callbacks");
    program(&build, "RAW_START", &["raw.c", "raw_start.c"], &[]);
    program(&build, "ROWS", &["rows.c"], &["-static"]);
    program(&build, "STREAM", &["stream.c"], &["-static"]);
}
