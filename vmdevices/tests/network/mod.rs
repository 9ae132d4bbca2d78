//! A network of the host's own for a test: nothing of it is seen outside.
#![expect(unsafe_code, reason = "unshare")]

use std::process::Command;

use vmdevices::net::{Tap, TapError};

/// Runs `ip` with `arguments`.
pub fn ip(arguments: &str) -> bool {
    Command::new("ip").args(arguments.split(' ')).status().is_ok_and(|status| status.success())
}

/// Moves the calling thread, and those that it starts from now on, to an empty network namespace, or
/// says why the test is skipped.
pub fn namespace() -> bool {
    // SAFETY: the network namespace of a thread is no concern of Rust's.
    let moved = unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0;
    let reason = if !moved {
        format!("no network namespace: {}", std::io::Error::last_os_error())
    } else if let Err(error @ TapError::Driver { .. }) = Tap::open("probe0") {
        error.to_string()
    } else if !ip("link set lo up") {
        "no ip command (package iproute2)".into()
    } else {
        return true;
    };
    // The rig has all of it.
    assert!(std::env::var_os("VMCORE_RIG").is_none(), "{reason}");
    println!("skipped: {reason}");
    false
}
