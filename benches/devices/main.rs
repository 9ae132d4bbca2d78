//! Our devices beside QEMU's under the same guest, on the same backend, in the same run: disks by fio, networks by
//! iperf3, entropy, sockets; and what a request costs in the bare device model.
//!
//! `cargo bench -p vmcore-benches --bench devices [-- [blk] [net] [rng] [vsock] [instructions] [ROUNDS]]`
//!
//! vmrun and QEMU boot the same kernel and root, with the same devices on virtio-pci and as many processors and
//! queues (one), and take turns. `VMCORE_ACCEL=kvm` compares on KVM instead of on the software CPU and TCG. Guests
//! are those of `make guests`; what the host lacks is skipped and says so. In the rig (`examples/guest/rig --qemu`)
//! `VMCORE_VMRUN` says where vmrun is.

mod blk;
#[allow(dead_code, missing_docs, reason = "the tests of vmdevices have more use for it")]
#[path = "../../vmdevices/tests/driver/mod.rs"]
mod driver;
mod instructions;
mod net;
mod session;
mod streams;

use std::error::Error;

use session::Host;

const ROUNDS: usize = 3;
const PARTS: [&str; 5] = ["blk", "net", "rng", "vsock", "instructions"];

fn main() -> Result<(), Box<dyn Error>> {
    // `cargo bench` adds --bench.
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    if let [first, name, requests] = &args[..]
        && first == instructions::DRIVE
    {
        return instructions::drive(name, requests.parse()?);
    }
    let rounds = args.iter().find_map(|arg| arg.parse().ok()).unwrap_or(ROUNDS).max(1);
    let parts: Vec<&str> =
        args.iter().map(String::as_str).filter(|arg| arg.parse::<usize>().is_err()).collect();
    if let Some(unknown) = parts.iter().find(|part| !PARTS.contains(part)) {
        return Err(format!("{unknown}: the parts of this bench are {}", PARTS.join(", ")).into());
    }
    let wanted = |part| parts.is_empty() || parts.contains(&part);
    if wanted("instructions") {
        instructions::run()?;
    }
    if !PARTS.iter().any(|&part| part != "instructions" && wanted(part)) {
        return Ok(());
    }
    let host = match Host::new() {
        Ok(host) => host,
        Err(error) => {
            println!("SKIPPED: guests: {error}");
            return Ok(());
        }
    };
    println!("{}:", host.backends());
    type Part = fn(&Host, usize) -> Result<(), Box<dyn Error>>;
    let guests: [(&str, Part); 4] =
        [("blk", blk::run), ("net", net::run), ("rng", streams::rng), ("vsock", streams::vsock)];
    for (part, run) in guests {
        if wanted(part) {
            run(&host, rounds)?;
        }
    }
    Ok(())
}
