//! A stock Debian kernel in the deterministic mode: two boots are equal at every checkpoint, to power-off.
//!
//! Needs the guests of `examples/guest/build`; skipped aloud without, and failed where
//! `VMCORE_REQUIRE_BOOT` says that a skip is one.
#![expect(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "these are tests")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use vmcore::boot::{Linux, Raw, RawMode};
use vmcore::{Deterministic, Error, Outcome, StateHash, Vm};
use vmdevices::console::{self, Script};
use vmdevices::{Disk, Net, Pc, Rng, VirtioConsole, virtio};

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
        .attach(virtio::pci(Disk::open(image).unwrap()))
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

/// 16-bit code that counts 64 periodic interrupts of the real-time clock, then writes to the exit port.
fn clock_guest() -> Vec<u8> {
    let pic = |port: u8, words: [u8; 4], mask: u8| {
        let set = |port, value| [0xb0, value, 0xe6, port];
        let [first, rest @ ..] = words;
        [set(port, first)].into_iter().chain(rest.map(|w| set(port + 1, w))).chain([set(port + 1, mask)])
    };
    let mut code = vec![
        0xfa, //             cli
        0x31, 0xc0, //       xor ax, ax
        0x8e, 0xd8, //       mov ds, ax
        0xc7, 0x06, 0xc0, 0x01, 0, 0, // mov word [0x70 * 4], handler
        0xc7, 0x06, 0xc2, 0x01, 0, 0, // mov word [0x70 * 4 + 2], 0
        0x31, 0xdb, //       xor bx, bx
    ];
    code.extend(pic(0x20, [0x11, 0x08, 0x04, 0x01], 0xfb).flatten());
    code.extend(pic(0xa0, [0x11, 0x70, 0x02, 0x01], 0xfe).flatten());
    code.extend([
        0xb0, 0x0b, 0xe6, 0x70, // register B: 24 hours, periodic interrupts, of 1024 Hz
        0xb0, 0x42, 0xe6, 0x71, //
        0xfb, //             sti
        0xf4, //       wait: hlt
        0xeb, 0xfd, //       jmp wait
    ]);
    let handler = u16::try_from(0x7c00 + code.len()).unwrap().to_le_bytes();
    code[9..11].copy_from_slice(&handler);
    code.extend([
        0x43, //             inc bx
        0xb0, 0x0c, 0xe6, 0x70, // register C acknowledges
        0xe4, 0x71, //
        0xb0, 0x20, 0xe6, 0xa0, 0xe6, 0x20, // both PICs
        0x83, 0xfb, 0x40, // cmp bx, 64
        0x7c, 0x04, //       jl out
        0xb0, 0x05, 0xe6, 0xf4, // exit port
        0xcf, //        out: iret
    ]);
    code
}

#[test]
fn the_real_time_clock_interrupts_by_the_machines_time() {
    let run = |start: Duration| {
        let (serial, _script) = console::memory().unwrap();
        let boot = Raw::new(clock_guest(), RawMode::Real16);
        let mut vm = Vm::builder()
            .deterministic(Deterministic::default().start_time(start))
            .memory(1 << 20)
            .boot(boot)
            .attach(Pc::new().serial(serial).exit_port(0xf4))
            .build()
            .unwrap();
        assert_eq!(vm.run().unwrap(), Outcome::Exit(5));
        let state = vm.handle().pause().unwrap().save().unwrap();
        // Nothing is executed while the guest sleeps.
        assert!(vm.instructions().unwrap() < 2_000);
        (vm.state_hash().unwrap(), state.machine.clock_ns)
    };
    let (hash, end) = run(Duration::from_secs(1_000_000_000));
    assert!((62_000_000..63_500_000).contains(&end), "64 periods of 1/1024 s are not {end} ns");
    assert_eq!(run(Duration::from_secs(1_000_000_000)).0, hash);
    assert_ne!(run(Duration::from_secs(1_000_000_001)).0, hash);
}

#[test]
fn input_is_what_was_typed_before_the_vm_is_built() {
    let code = vec![
        0xb9, 0x00, 0x40, //       mov cx, 0x4000
        0xba, 0xfd, 0x03, // poll: mov dx, 0x3fd
        0xec, //                   in al, dx
        0xa8, 0x01, //             test al, 1
        0x74, 0x06, //             jz none
        0xb2, 0xf8, //             mov dl, 0xf8
        0xec, 0xee, //             in al, dx; out dx, al
        0xeb, 0xf2, //             jmp poll
        0x49, //             none: dec cx
        0x75, 0xef, //             jnz poll
        0xb0, 0x05, 0xe6, 0xf4, // exit port
        0xf4, //
    ];
    let (serial, script) = console::memory().unwrap();
    let said: String = (0..900).map(|n| format!("line {n}\n")).collect();
    script.send(said.as_str()).unwrap();
    let mut vm = Vm::builder()
        .deterministic(Deterministic::default())
        .memory(1 << 20)
        .boot(Raw::new(code, RawMode::Real16))
        .attach(Pc::new().serial(serial).exit_port(0xf4))
        .build()
        .unwrap();
    script.send("too late").unwrap();
    assert_eq!(vm.run().unwrap(), Outcome::Exit(5));
    assert_eq!(script.transcript(), said);
}

#[test]
fn devices_of_the_hosts_own_time_are_refused() {
    let Ok(net) = Net::tap("vmcore-none") else {
        println!("skipped: no tap interface here");
        return;
    };
    let boot = Raw::new(vec![0xf4], RawMode::Real16);
    let error =
        Vm::builder().deterministic(Deterministic::default()).boot(boot).attach(net).build().unwrap_err();
    assert!(matches!(error, Error::Config { .. }), "{error}");
}
