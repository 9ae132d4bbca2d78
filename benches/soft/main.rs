//! The software CPU beside QEMU's TCG and the host's processor: the time that a stock kernel takes from
//! process start to its init, with the memory that vmrun takes besides the guest's; a table of kinds of
//! work, timed inside the guest; and millions of instructions a second of branchy integer code.
//!
//! `cargo bench -p vmcore-benches --bench soft [-- [mix] [boot] [work] [ROUNDS]]`
//!
//! vmrun and QEMU get the same kernel, initrd, command line, memory and disk, take turns, and are killed
//! when the guest has said what it had to. Guests are those of `make guests`, in `$VMCORE_GUESTS` or
//! target/guests; without them, or without QEMU, what wants them is skipped and says so.

mod boot;
mod guest;
#[cfg(target_arch = "x86_64")]
mod mix;
mod work;

use std::error::Error;

const ROUNDS: usize = 5;

/// How a bound is reported.
fn held(holds: bool) -> &'static str {
    if holds { "holds" } else { "DOES NOT HOLD" }
}

fn main() -> Result<(), Box<dyn Error>> {
    // `cargo bench` adds --bench.
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let rounds = args.iter().find_map(|arg| arg.parse().ok()).unwrap_or(ROUNDS).max(1);
    let parts: Vec<&str> =
        args.iter().map(String::as_str).filter(|arg| arg.parse::<usize>().is_err()).collect();
    if let Some(unknown) = parts.iter().find(|part| !["mix", "boot", "work"].contains(part)) {
        return Err(format!("{unknown}: the parts of this bench are mix, boot and work").into());
    }
    let wanted = |part| parts.is_empty() || parts.contains(&part);
    #[cfg(target_arch = "x86_64")]
    if wanted("mix") {
        mix::run(rounds)?;
    }
    if wanted("boot") {
        boot::run(rounds)?;
    }
    if wanted("work") {
        work::run(rounds)?;
    }
    Ok(())
}
