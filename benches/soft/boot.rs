//! A stock kernel from process start to the first line of its init. Processor time is that of the whole
//! process (wait4(2)).

use std::error::Error;
use std::path::Path;
use std::time::Duration;

use vmcore_benches::{build_vmrun, median};

use crate::guest::{Guest, MEMORY_MIB, guests, run_until};
use crate::held;

/// The software CPU's processor time may be so many times TCG's.
const RATIO_BOUND: f64 = 2.0;
/// What vmrun may have resident besides the guest's memory: the program's own, and the decoded blocks.
const OWN_BOUND_KIB: u64 = (32 + 16) << 10;

const COMMAND_LINE: &str = "console=ttyS0 panic=-1 vmtest=poweroff";
const INIT: &str = "vmcore-guest: init";

/// One boot of a guest.
struct Boot {
    cpu: Duration,
    wall: Duration,
    /// KiB resident besides the guest's memory, and in it, when init began.
    own_kib: u64,
    guest_kib: u64,
}

/// What is resident of process `pid`: besides the guest's memory, and in that, in KiB (proc(5), smaps).
/// The guest's memory is the smallest mapping that it fits in.
fn resident(pid: u32) -> Result<(u64, u64), Box<dyn Error>> {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let values = |key: &str| -> Vec<u64> {
        let lines = smaps.lines().filter_map(|line| line.strip_prefix(key));
        lines.filter_map(|rest| rest.split_whitespace().next()?.parse().ok()).collect()
    };
    let (sizes, resident) = (values("Size:"), values("Rss:"));
    let total: u64 = resident.iter().sum();
    let fits = |&(size, _): &(u64, u64)| size >= MEMORY_MIB << 10;
    let (_, guest) = sizes.into_iter().zip(resident).filter(fits).min().ok_or("no guest memory")?;
    Ok((total - guest, guest))
}

pub fn run(rounds: usize) -> Result<(), Box<dyn Error>> {
    let [kernel, initrd] = ["vmlinux", "initrd.img"].map(|name| guests().join("cloud").join(name));
    if let Some(missing) = [&kernel, &initrd].into_iter().find(|path| !path.exists()) {
        println!("SKIPPED: boots: no {} (make guests)", missing.display());
        return Ok(());
    }
    let guest = Guest { kernel: &kernel, initrd: &initrd, command_line: COMMAND_LINE, disk: None };
    let (ours, theirs) = (guest.for_vmrun(), guest.for_qemu());
    let vmrun = build_vmrun()?;
    let qemu = Path::new("qemu-system-x86_64");
    let mut results: [Vec<Boot>; 2] = [Vec::new(), Vec::new()];
    for round in 0..rounds {
        // Neither side always goes first.
        for side in [round % 2, 1 - round % 2] {
            let (program, args) = [(&*vmrun, &ours), (qemu, &theirs)][side];
            match run_until(program, args, INIT, resident) {
                Ok(ran) => {
                    let (own_kib, guest_kib) = ran.seen;
                    results[side].push(Boot { cpu: ran.ended.cpu, wall: ran.wall, own_kib, guest_kib });
                }
                Err(error) if side == 1 && results[1].is_empty() => {
                    if round == 0 {
                        println!("SKIPPED: the comparison with QEMU: {error}");
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }
    println!("process start to init, {MEMORY_MIB} MiB, medians of {rounds}:");
    let mut times = Vec::new();
    for (name, boots) in ["vmrun --accel soft", "QEMU microvm, TCG"].into_iter().zip(&results) {
        if boots.is_empty() {
            continue;
        }
        let cpu = median(boots.iter().map(|boot| boot.cpu).collect());
        let wall = median(boots.iter().map(|boot| boot.wall).collect());
        let most = |of: fn(&Boot) -> u64| boots.iter().map(of).max().unwrap_or(0);
        println!(
            "{name:<20} CPU {cpu:>8.2?}   wall {wall:>8.2?}   resident at init: guest memory {} KiB, \
             all else {} KiB",
            most(|boot| boot.guest_kib),
            most(|boot| boot.own_kib),
        );
        times.push(cpu.as_secs_f64());
    }
    if let [ours, theirs] = times[..] {
        let ratio = ours / theirs;
        println!("CPU time, vmrun / QEMU: {ratio:.3}; at most {RATIO_BOUND}: {}", held(ratio <= RATIO_BOUND));
    }
    let own = results[0].iter().map(|boot| boot.own_kib).max().unwrap_or(0);
    println!("besides the guest's memory at most {OWN_BOUND_KIB} KiB: {}", held(own <= OWN_BOUND_KIB));
    Ok(())
}
