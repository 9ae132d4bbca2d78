//! A stock Debian kernel in the deterministic mode: two boots are equal at every checkpoint, to power-off.
//!
//! Needs the guests of `examples/guest/build`; skipped aloud without, and failed where
//! `VMCORE_REQUIRE_BOOT` says that a skip is one.
#![expect(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "these are tests")]

use std::io::Write;
use std::path::{Path, PathBuf};

use vmcore::boot::Linux;
use vmcore::{Deterministic, Error, Outcome, StateHash, Vm};
use vmdevices::console::{self, Script};
use vmdevices::{Disk, Net, Pc, Rng, VirtioConsole};

/// Instructions between two checkpoints.
const STEP: u64 = 100_000_000;

/// More than any of these boots takes, in instructions.
const LONGEST: u64 = 20_000_000_000;

fn guests() -> Option<PathBuf> {
    let directory = std::env::var_os("VMCORE_GUESTS")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guests"), PathBuf::from);
    if directory.join("cloud/initrd.img").exists() {
        return Some(directory);
    }
    let reason = format!("no guests in {}: run examples/guest/build", directory.display());
    assert!(std::env::var_os("VMCORE_REQUIRE_BOOT").is_none(), "boot tests are required, but {reason}");
    println!("skipped: {reason}");
    None
}

/// A disk that is the same each time.
fn disk() -> tempfile::NamedTempFile {
    let mut image = tempfile::NamedTempFile::new().unwrap();
    let text: Vec<u8> = (0..4u32 << 20).map(|n| (n / 7).to_le_bytes()[0]).collect();
    image.write_all(&text).unwrap();
    image
}

fn vm(guests: &Path, image: &Path, cpus: u32, scenario: &str, settings: Deterministic) -> (Vm, Script) {
    let (serial, script) = console::memory().unwrap();
    let (virtio, _) = console::memory().unwrap();
    let linux = Linux::new(guests.join("cloud/vmlinuz"))
        .initrd(guests.join("cloud/initrd.img"))
        .cmdline(format!("console=ttyS0 panic=-1 vmtest={scenario}"));
    let vm = Vm::builder()
        .deterministic(settings)
        .cpus(cpus)
        .memory(128 << 20)
        .boot(linux)
        .attach(Pc::new().serial(serial).exit_port(0xf4))
        .attach(Disk::open(image).unwrap())
        .attach(Rng::new())
        .attach(VirtioConsole::new(virtio))
        .build()
        .unwrap();
    (vm, script)
}

/// The count and hash at every checkpoint and at the end, and what the guest said.
fn boot(
    guests: &Path,
    cpus: u32,
    scenario: &str,
    settings: Deterministic,
    step: u64,
) -> (Vec<(u64, StateHash)>, String) {
    let image = disk();
    let (mut vm, script) = vm(guests, image.path(), cpus, scenario, settings);
    let mut all = Vec::new();
    loop {
        let outcome = vm.run_instructions(step);
        let count = vm.instructions().unwrap();
        all.push((count, vm.state_hash().unwrap()));
        match outcome {
            Ok(Outcome::InstructionLimit) => assert!(count < LONGEST, "no end: {}", script.transcript()),
            Ok(Outcome::PowerOff) => return (all, script.transcript()),
            other => panic!("{other:?} at {count}: {}", script.transcript()),
        }
    }
}

fn equal_boots(cpus: u32, scenario: &str) {
    let Some(guests) = guests() else { return };
    let settings = Deterministic::seeded(42);
    let (first, said) = boot(&guests, cpus, scenario, settings, STEP);
    assert!(said.contains("vmcore-guest: done"), "{said}");
    assert!(said.contains(&format!("vmcore-guest: cpus={cpus} ")), "{said}");
    let (second, said_again) = boot(&guests, cpus, scenario, settings, STEP);
    let differ = first.iter().zip(&second).find(|(a, b)| a != b);
    assert!(differ.is_none() && first.len() == second.len(), "{cpus} vCPUs: {differ:?}");
    assert_eq!(said, said_again);
    println!("{cpus} vCPUs: {} checkpoints, {} instructions", first.len(), first.last().unwrap().0);
}

#[test]
fn two_boots_of_one_vcpu_are_equal() {
    equal_boots(1, "poweroff");
}

#[test]
fn two_boots_of_two_vcpus_are_equal() {
    equal_boots(2, "poweroff");
}

#[test]
fn two_boots_with_traffic_on_virtio_devices_are_equal() {
    equal_boots(1, "devices");
}

#[test]
fn checkpoints_change_nothing_and_the_seed_does() {
    let Some(guests) = guests() else { return };
    let (coarse, said) = boot(&guests, 1, "poweroff", Deterministic::seeded(42), 5 * STEP);
    let (fine, said_again) = boot(&guests, 1, "poweroff", Deterministic::seeded(42), STEP - 1);
    // The last checkpoint is where the guest ended, and says all of what came before.
    assert_eq!(coarse.last(), fine.last());
    assert_eq!(said, said_again);
    let image = disk();
    let (mut other, _) = vm(&guests, image.path(), 1, "poweroff", Deterministic::seeded(43));
    assert_eq!(other.run_instructions(5 * STEP).unwrap(), Outcome::InstructionLimit);
    assert_ne!(other.state_hash().unwrap(), coarse[0].1);
}

#[test]
fn devices_of_the_hosts_own_time_are_refused() {
    let Ok(net) = Net::tap("vmcore-none") else {
        println!("skipped: no tap interface here");
        return;
    };
    let boot = vmcore::boot::Raw::new(vec![0xf4], vmcore::boot::RawMode::Real16);
    let error =
        Vm::builder().deterministic(Deterministic::default()).boot(boot).attach(net).build().unwrap_err();
    assert!(matches!(error, Error::Config { .. }), "{error}");
}
