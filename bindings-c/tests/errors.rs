//! Every kind of error has its number in C, and a test in C that provokes it.

#![expect(clippy::unwrap_used, reason = "these are tests")]

use std::collections::BTreeSet;
use std::path::Path;

/// What no test in C provokes, and why; src/error.rs has a test of each.
const UNREACHED: [(&str, &str); 2] = [
    ("entry_failed", "wants a hardware KVM, and registers that it did not refuse when they were set"),
    ("panic", "is a bug of the library"),
];

/// Errors with names of their own that no test in C provokes, and why.
const UNNAMED: [(&str, &str); 7] = [
    ("memory.no_slots", "takes 32764 regions, which is minutes"),
    ("boot.zero_byte", "a text of C has none"),
    ("boot.seed", "the host always has random numbers"),
    ("boot.table", "no device that a program can attach is one that no table can describe"),
    ("boot.memory", "what is loaded goes to memory that has just been found to be there"),
    ("disk.guess", "the format of an image that is written is never guessed here"),
    ("tap.host", "what a host refuses that has a tap"),
];

/// What the bindings have besides the engine's errors.
const OURS: [&str; 5] = ["argument", "timeout", "closed", "panic", "other"];

fn read(path: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// Where Rust has the errors that C can meet.
const ENUMS: [&str; 7] = [
    "../vmcore/src/error.rs",
    "../vmcore/src/memory/mod.rs",
    "../vmcore/src/boot/error.rs",
    "../vmdevices/src/block/error.rs",
    "../vmdevices/src/net/nat/error.rs",
    "../vmdevices/src/net/tap.rs",
    "../vmdevices/src/console/memory.rs",
];

/// The codes in the body of an error's `code`.
fn codes(path: &str) -> BTreeSet<String> {
    let source = read(path);
    let body = source.split_once("pub fn code(").unwrap().1.split_once("\n    }\n").unwrap().0.to_owned();
    let codes: BTreeSet<_> = body.split('"').skip(1).step_by(2).map(str::to_owned).collect();
    assert!(codes.len() >= 2, "{path}: {codes:?}");
    codes
}

/// All tests in C.
fn tests() -> String {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let sources = std::fs::read_dir(tests).unwrap().map(|entry| entry.unwrap().path());
    let sources = sources.filter(|path| path.extension().is_some_and(|extension| extension == "c"));
    sources.map(|path| std::fs::read_to_string(path).unwrap()).collect()
}

#[test]
fn each_error_of_rust_has_a_number_and_a_test_in_c() {
    let (numbers, tests) = (read("src/error.rs"), tests());
    // Those that have names of their own are of these kinds.
    let codes = &codes(ENUMS[0]) | &["memory", "boot", "device"].map(str::to_owned).into();
    for code in codes.iter().map(String::as_str).chain(OURS) {
        let name = format!("VMCORE_ERROR_{}", code.to_uppercase());
        assert!(numbers.contains(&format!("pub const {name}: ")), "{code} has no {name} in src/error.rs");
        let provoked = tests.contains(&format!("FAILS({name},"));
        match UNREACHED.iter().find(|(unreached, _)| *unreached == code) {
            None => assert!(provoked, "no test in C has FAILS({name}, ...)"),
            Some(_) => assert!(!provoked, "{code} is provoked: take it off the list"),
        }
    }
    for (code, _) in UNREACHED {
        assert!(codes.contains(code) || OURS.contains(&code), "{code} is no error any more");
    }
}

#[test]
fn each_error_of_memory_images_and_devices_has_a_test_in_c() {
    let tests = tests();
    let names: BTreeSet<String> = ENUMS[1..].iter().copied().flat_map(codes).collect();
    assert!(names.len() >= 50 && names.contains("disk.locked"), "{names:?}");
    let unreached: BTreeSet<String> =
        names.iter().filter(|name| !tests.contains(&format!("NAMED(\"{name}\","))).cloned().collect();
    assert_eq!(
        unreached,
        UNNAMED.map(|(name, _)| name.to_owned()).into(),
        "not provoked in C, and listed as such"
    );
}
