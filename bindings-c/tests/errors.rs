//! Every kind of error has its number in C, and a test in C that provokes it.

#![expect(clippy::unwrap_used, reason = "these are tests")]

use std::collections::BTreeSet;
use std::path::Path;

/// What no test in C provokes, and why; src/error.rs has a test of each.
const UNREACHED: [(&str, &str); 2] = [
    ("entry_failed", "wants a hardware KVM, and registers that it did not refuse when they were set"),
    ("panic", "is a bug of the library"),
];

/// What the bindings have besides the engine's errors.
const OURS: [&str; 5] = ["argument", "timeout", "closed", "panic", "other"];

fn read(path: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// The codes in the body of `Error::code`.
fn codes() -> BTreeSet<String> {
    let source = read("../vmcore/src/error.rs");
    let body = source.split_once("pub fn code(").unwrap().1.split_once("\n    }\n").unwrap().0.to_owned();
    let codes: BTreeSet<_> = body.split('"').skip(1).step_by(2).map(str::to_owned).collect();
    assert!(codes.len() >= 12 && codes.contains("wrong_state"), "{codes:?}");
    codes
}

#[test]
fn each_error_of_rust_has_a_number_and_a_test_in_c() {
    let numbers = read("src/error.rs");
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let sources = std::fs::read_dir(tests).unwrap().map(|entry| entry.unwrap().path());
    let tests: String = sources
        .filter(|path| path.extension().is_some_and(|extension| extension == "c"))
        .map(|path| std::fs::read_to_string(path).unwrap())
        .collect();
    let codes = codes();
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
