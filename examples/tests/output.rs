//! The examples print what is in NAME.out: those in C and Python are compared with the same files by their tests.

use std::path::Path;
use std::process::Command;

#[track_caller]
fn prints(program: &str, name: &str) {
    let expected = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap();
    let ended = Command::new(program).output().unwrap();
    let said =
        (ended.status.code(), String::from_utf8_lossy(&ended.stdout), String::from_utf8_lossy(&ended.stderr));
    assert_eq!(said, (Some(0), String::from_utf8_lossy(&expected), "".into()));
}

#[test]
fn hello_vcpu_prints_its_text() {
    prints(env!("CARGO_BIN_EXE_hello_vcpu"), "hello_vcpu.out");
}

#[test]
fn custom_device_prints_its_sum() {
    prints(env!("CARGO_BIN_EXE_custom_device"), "custom_device.out");
}
