//! Kinds of work (`rows.c`), timed inside: on the host as it is, in a guest of TCG's, and in one of the
//! software CPU's. The guest is a stock kernel with that program as its init, on one processor.

use std::collections::HashMap;
use std::error::Error;
use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use vmcore_benches::{Archive, build_vmrun};

use crate::guest::{Guest, guests, run_until};

const COMMAND_LINE: &str = "console=ttyS0 panic=-1 quiet";
/// What the program says last.
const DONE: &str = "rows: done";

/// The rows by the program's names for them, with what they are and how many times TCG's time the
/// interpreter may take, where that is said.
const ROWS: [(&str, &str, Option<f64>); 10] = [
    ("memory", "memory-bound loop, a turn", None),
    ("movs", "memcpy 4 KiB, REP MOVSB", Some(1.0)),
    ("memcpy", "memcpy 4 KiB, C library's", Some(1.0)),
    ("getpid", "getpid", None),
    ("pipe", "pipe round trip", Some(1.0)),
    ("exec", "fork + exec + exit", None),
    ("fault", "page fault", None),
    ("scalar", "SSE2 scalar, mul + add", Some(1.0)),
    ("packed", "SSE2 packed, per mul + add", Some(1.0)),
    ("disk", "virtio-blk 4k O_DIRECT, depth 1", Some(1.0)),
];

/// What a disk needs of a Debian kernel, on virtio-mmio or virtio-pci, in the order of loading.
const MODULES: [&str; 7] = [
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_mmio",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci",
    "drivers/block/virtio_blk",
];

const DISK_LEN: usize = 64 << 20;

/// The initrd: the program and the modules, which it loads in the order of their names.
fn make_initrd(to: &Path, kernel_modules: &Path) -> Result<(), Box<dyn Error>> {
    let mut archive = Archive::new(BufWriter::new(File::create(to)?));
    let (directory, program, file) = (0o40_755, 0o100_755, 0o100_644);
    archive.add("init", program, &std::fs::read(env!("ROWS"))?)?;
    for name in ["dev", "proc", "modules"] {
        archive.add(name, directory, &[])?;
    }
    for (n, module) in MODULES.into_iter().enumerate() {
        let path = kernel_modules.join(module).with_extension("ko");
        let content = std::fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        archive.add(&format!("modules/{n}.ko"), file, &content)?;
    }
    archive.end()
}

/// A disk of bytes that are there: holes would be read faster.
fn make_disk(to: &Path) -> Result<(), Box<dyn Error>> {
    let bytes: Vec<u8> = (0..DISK_LEN / 8).flat_map(|n| (n as u64).to_le_bytes()).collect();
    Ok(std::fs::write(to, bytes)?)
}

/// The rows that the program has printed, in ns.
fn rows(output: &str) -> HashMap<String, f64> {
    let row = |line: &str| {
        let (name, time) = line.strip_prefix("row ")?.split_once(' ')?;
        Some((name.to_owned(), time.trim().parse().ok()?))
    };
    output.lines().filter_map(row).collect()
}

fn median(mut times: Vec<f64>) -> Option<f64> {
    times.sort_unstable_by(f64::total_cmp);
    times.get(times.len() / 2).copied()
}

/// A time with three digits or so.
fn readable(ns: Option<f64>) -> String {
    match ns {
        None => "-".into(),
        Some(ns) if ns < 10.0 => format!("{ns:.2} ns"),
        Some(ns) if ns < 10e3 => format!("{ns:.0} ns"),
        Some(ns) => format!("{:.1} us", ns / 1e3),
    }
}

pub fn run(rounds: usize) -> Result<(), Box<dyn Error>> {
    let cloud = guests().join("cloud");
    let kernel = cloud.join("vmlinux");
    if !kernel.exists() {
        println!("SKIPPED: kinds of work: no {} (make guests)", kernel.display());
        return Ok(());
    }
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (initrd, disk) = (directory.join("rows.img"), directory.join("rows.disk"));
    make_initrd(&initrd, &cloud.join("modules/kernel"))?;
    make_disk(&disk)?;
    let guest = Guest { kernel: &kernel, initrd: &initrd, command_line: COMMAND_LINE, disk: Some(&disk) };
    let programs = [
        (PathBuf::from(env!("ROWS")), Vec::new()),
        ("qemu-system-x86_64".into(), guest.for_qemu()),
        (build_vmrun()?, guest.for_vmrun()),
    ];
    let mut results: [Vec<HashMap<String, f64>>; 3] = [const { Vec::new() }; 3];
    for round in 0..rounds {
        // None always goes first.
        for side in (0..3).map(|n| (n + round) % 3) {
            let (program, args) = &programs[side];
            match run_until(program, args, DONE, |_| Ok(())) {
                Ok(ran) => results[side].push(rows(&ran.output)),
                Err(error) if side == 1 => {
                    println!("SKIPPED: QEMU in round {round}: {error}");
                }
                Err(error) => return Err(error),
            }
        }
    }
    println!("kinds of work, one processor, medians of {rounds}:");
    println!("{:<34}{:>11}{:>11}{:>11}  vmcore / TCG", "", "native", "TCG", "vmcore");
    for (name, what, bound) in ROWS {
        let [native, tcg, vmcore] = [0, 1, 2]
            .map(|side| median(results[side].iter().filter_map(|rows| rows.get(name).copied()).collect()));
        print!("{what:<34}{:>11}{:>11}{:>11}", readable(native), readable(tcg), readable(vmcore));
        if let (Some(tcg), Some(vmcore)) = (tcg, vmcore) {
            let ratio = vmcore / tcg;
            print!("  {ratio:.2}");
            if let Some(bound) = bound {
                print!("; at most {bound}: {}", crate::held(ratio <= bound));
            }
        }
        println!();
    }
    Ok(())
}
