//! `vmrun` as a user has it: nothing that the guest said is missing, however the guest ended and
//! however slow the reader is.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// Bytes that the guest writes: more than a pipe holds, and less than a pipe and the console do.
const LENGTH: usize = 2 * 60_000;

/// 16-bit code that writes [`LENGTH`] bytes to COM1, then runs `end`.
fn guest(end: &[u8]) -> Vec<u8> {
    let write = [
        0xbb, 0x02, 0x00, //       mov bx, 2
        0xba, 0xf8, 0x03, //       mov dx, 0x3f8
        0xb9, 0x60, 0xea, // turn: mov cx, 60000
        0x88, 0xc8, //       next: mov al, cl
        0xee, //                   out dx, al
        0xe2, 0xfb, //             loop next
        0x4b, //                   dec bx
        0x75, 0xf5, //             jnz turn
    ];
    [&write, end].concat()
}

fn expected() -> Vec<u8> {
    (1..=60_000_u16).rev().map(|count| count.to_le_bytes()[0]).collect::<Vec<_>>().repeat(2)
}

/// mov dx, 0xcf9; mov al, 6; out dx, al; hlt: a reset.
const RESET: &[u8] = &[0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee, 0xf4];
/// mov al, 5; out 0xf4, al; hlt: the exit port.
const EXIT: &[u8] = &[0xb0, 0x05, 0xe6, 0xf4, 0xf4];
/// Runs a guest that ends by `end` with standard output in a pipe that is read from only `delay`
/// after its end; status, output and messages.
fn run(end: &[u8], console: &str, delay: Duration) -> (Option<i32>, Vec<u8>, String) {
    let directory = tempfile::tempdir().unwrap();
    let (kernel, stats) = (directory.path().join("kernel"), directory.path().join("stats"));
    std::fs::write(&kernel, guest(end)).unwrap();
    let mut vmrun = Command::new(env!("CARGO_BIN_EXE_vmrun"))
        .args(["--entry", "raw", "--memory", "1M", "--timeout", "60", "--console", console, "--kernel"])
        .arg(&kernel)
        .arg("--stats")
        .arg(&stats)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The statistics are written between the guest's end and the console's.
    while !stats.exists() && vmrun.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::sleep(delay);
    let mut output = Vec::new();
    vmrun.stdout.take().unwrap().read_to_end(&mut output).unwrap();
    let ended = vmrun.wait_with_output().unwrap();
    let messages = String::from_utf8_lossy(&ended.stderr).into_owned();
    (ended.status.code(), output, messages)
}

fn can_run() -> bool {
    let usable = Path::new("/dev/kvm").exists();
    if !usable {
        println!("skipped: no /dev/kvm");
    }
    usable
}

#[test]
fn a_slow_reader_gets_everything() {
    if !can_run() {
        return;
    }
    for (end, status) in [(RESET, 0), (EXIT, 11)] {
        let (code, output, messages) = run(end, "stdio", Duration::from_secs(1));
        assert_eq!((code, output.len()), (Some(status), LENGTH), "{messages}");
        assert!(output == expected());
        assert!(!messages.contains("lost"), "{messages}");
    }
}

#[test]
fn a_file_has_everything() {
    if !can_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let console = directory.path().join("console");
    for (end, status) in [(RESET, 0), (EXIT, 11)] {
        let (code, output, messages) = run(end, console.to_str().unwrap(), Duration::ZERO);
        assert_eq!((code, output.len()), (Some(status), 0), "{messages}");
        assert!(std::fs::read(&console).unwrap() == expected());
    }
}

#[test]
fn a_reset_is_told_from_a_power_off() {
    if !can_run() {
        return;
    }
    let (code, _, messages) = run(RESET, "stdio", Duration::ZERO);
    assert_eq!(code, Some(0));
    assert!(messages.contains("the guest ended: Reset(Port)"), "{messages}");
}

/// Status, output and checkpoints of a deterministic run of its own process.
fn deterministic(seed: &str) -> (Option<i32>, Vec<u8>, Vec<String>) {
    let directory = tempfile::tempdir().unwrap();
    let kernel = directory.path().join("kernel");
    std::fs::write(&kernel, guest(EXIT)).unwrap();
    let ended = Command::new(env!("CARGO_BIN_EXE_vmrun"))
        .args(["--entry", "raw", "--memory", "1M", "--deterministic", seed, "--checkpoint-every", "100000"])
        .arg("--kernel")
        .arg(&kernel)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let messages = String::from_utf8_lossy(&ended.stderr).into_owned();
    let checkpoints = messages.lines().filter_map(|line| line.strip_prefix("checkpoint "));
    (ended.status.code(), ended.stdout, checkpoints.map(str::to_owned).collect())
}

#[test]
fn deterministic_runs_of_two_processes_have_the_same_checkpoints() {
    let first = deterministic("7");
    assert_eq!((first.0, first.1.as_slice()), (Some(11), expected().as_slice()));
    // Three instructions a byte, and some.
    assert_eq!(first.2.len(), 4, "{:?}", first.2);
    assert!(first.2[0].starts_with("100000 ") && first.2[0].len() == 7 + 64, "{:?}", first.2);
    assert_eq!(first, deterministic("7"));
    assert_ne!(first.2, deterministic("8").2);
}
