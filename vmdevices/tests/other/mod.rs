//! Other kernels than the standard ones, programs that boot without one, and work in a Debian system.

use std::time::Duration;

use vmcore::boot::{Linux, LinuxEntry};
use vmcore::{Outcome, ResetCause, Vm, VmHandle};
use vmdevices::console::{self, Script};
use vmdevices::{Disk, Pc, Rng};

use super::{Case, LIMIT, accel, guests_with, kernel};

#[test]
fn a_real_time_kernel_powers_off() {
    let Some((guests, case)) = kernel("rt", "poweroff") else { return };
    Case { cpus: 2, ..case }.ends(&guests, Outcome::PowerOff);
}

#[test]
fn the_next_debians_kernel_powers_off() {
    let Some((guests, case)) = kernel("trixie", "poweroff") else { return };
    Case { cpus: 4, memory_mib: 6144, ..case }.ends(&guests, Outcome::PowerOff);
}

/// The only one of Debian's kernels with room for itself in 64 MiB.
#[test]
fn a_32_bit_kernel_powers_off_in_64_mib() {
    let Some((guests, case)) = kernel("i386", "poweroff") else { return };
    Case { cpus: 2, memory_mib: 64, ..case }.ends(&guests, Outcome::PowerOff);
}

#[test]
fn other_kernels_do_without_acpi() {
    for name in ["i386", "rt", "trixie"] {
        let Some((guests, case)) = kernel(name, "reboot") else { return };
        let cmdline = format!("{} acpi=off reboot=k", case.cmdline);
        // As the standard one, Debian's cloud kernel reads no MP table.
        let cpus = if name == "trixie" { 1 } else { 2 };
        Case { cpus, cmdline, ..case }.ends(&guests, Outcome::Reset(ResetCause::Keyboard));
    }
}

/// All kernels with one, two and four processors, with ACPI and without.
#[test]
#[ignore = "takes some minutes: make soak"]
fn every_kernel_powers_off_or_resets() {
    for name in ["cloud", "generic", "rt", "i386", "trixie"] {
        for cpus in [1, 2, 4] {
            let Some((guests, case)) = kernel(name, "poweroff") else { return };
            Case { cpus, ..case }.ends(&guests, Outcome::PowerOff);
            let Some((_, case)) = kernel(name, "reboot") else { return };
            let cmdline = format!("{} acpi=off reboot=k", case.cmdline);
            // The cloud kernels read no MP table.
            let cpus = if matches!(name, "cloud" | "trixie") { 1 } else { cpus };
            Case { cpus, cmdline, ..case }.ends(&guests, Outcome::Reset(ResetCause::Keyboard));
        }
    }
}

#[test]
fn a_kernel_is_entered_by_its_setup_code() {
    let Some((guests, case)) = kernel("cloud", "poweroff") else { return };
    Case { entry: LinuxEntry::RealMode, ..case }.ends(&guests, Outcome::PowerOff);
}

/// Boots a bzImage that is no Linux, has `user` at its serial port, and gives how it ended.
fn run(
    file: &str,
    cmdline: &str,
    cpus: u32,
    memory: u64,
    user: impl FnOnce(&Script, &VmHandle) + Send,
) -> Option<(Outcome, String)> {
    let guests = guests_with(file)?;
    let (serial, script) = console::memory().unwrap();
    let mut vm = Vm::builder()
        .accel(accel())
        .cpus(cpus)
        .memory(memory)
        .boot(Linux::new(guests.join(file)).cmdline(cmdline))
        .attach(Pc::new().serial(serial))
        .build()
        .unwrap();
    let handle = vm.handle();
    let (outcome, typed) = std::thread::scope(|scope| {
        let typist = scope.spawn(|| user(&script, &handle));
        (vm.run_for(LIMIT), typist.join())
    });
    let transcript = script.transcript();
    assert!(typed.is_ok(), "{outcome:?}\n{transcript}");
    Some((outcome.unwrap(), transcript))
}

/// Tests of both widths, alone and with a second processor, to the last one, which only waits. (Of the
/// others the screen, which is put out now and then, need not tell.)
#[test]
fn memtest_finds_no_error() {
    for (file, cpus) in [("memtest/x64.bin", 1), ("memtest/x64.bin", 2), ("memtest/ia32.bin", 2)] {
        let ended = run(file, "console=ttyS0,115200", cpus, 8 << 20, |script, vm| {
            let last = script.expect("[Bit fade test", LIMIT);
            vm.stop();
            last.unwrap();
        });
        let Some((outcome, transcript)) = ended else { return };
        assert_eq!(outcome, Outcome::Stopped, "{file}\n{transcript}");
        let counts: Vec<_> = transcript.split("Errors: ").skip(1).collect();
        assert!(
            !counts.is_empty() && counts.iter().all(|count| count.starts_with("0 ")),
            "{file}\n{transcript}"
        );
    }
}

/// Goes between real and protected mode for every character, and waits by halting.
#[test]
fn ipxe_answers_at_its_command_line() {
    // What is on its command line it takes for a script.
    let ended = run("ipxe/ipxe.lkrn", "", 1, 64 << 20, |script, vm| {
        let talk = || {
            script.expect("Press Ctrl-B", LIMIT)?;
            script.send("\x02")?;
            script.expect("iPXE> ", LIMIT)?;
            script.send("set answer 42\recho answer=${answer}\r")?;
            script.expect("answer=42", LIMIT)?;
            script.expect("iPXE> ", LIMIT)?;
            script.send("exit\r")
        };
        let talked = talk();
        if talked.is_err() {
            vm.stop();
        }
        talked.unwrap();
    });
    let Some((outcome, transcript)) = ended else { return };
    assert!(matches!(outcome, Outcome::Reset(_)), "{outcome:?}\n{transcript}");
}

/// Does `steps` of `examples/guest/soak` in a copy of the Debian system.
fn soak(steps: &str, limit: Duration) {
    let Some(guests) = guests_with("debian.ext4") else { return };
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("debian.ext4");
    std::fs::copy(guests.join("debian.ext4"), &image).unwrap();
    let (serial, script) = console::memory().unwrap();
    let linux = Linux::new(guests.join("cloud/vmlinuz"))
        .initrd(guests.join("cloud/initrd.img"))
        .cmdline(format!("console=ttyS0 panic=-1 quiet root=/dev/vda rw vmtest=soak:{steps}"));
    let mut vm = Vm::builder()
        .accel(accel())
        .cpus(2)
        .memory(1 << 30)
        .boot(linux)
        .attach(Pc::new().serial(serial))
        .attach(Disk::open(&image).unwrap())
        .attach(Rng::new())
        .build()
        .unwrap();
    let outcome = vm.run_for(limit).unwrap();
    let transcript = script.transcript();
    assert_eq!(outcome, Outcome::PowerOff, "{transcript}");
    assert!(transcript.contains("vmcore-guest: done soak") && !transcript.contains("FAILED"), "{transcript}");
}

#[test]
fn a_debian_system_computes_what_the_host_does() {
    soak("digests,gcc,python=test_struct", LIMIT * 2);
}

#[test]
#[ignore = "takes half an hour: make soak"]
fn a_debian_system_works() {
    soak("debootstrap,apt,digests,gcc,sqlite,openssl,python,stress=120", Duration::from_secs(3600));
}

#[test]
#[ignore = "takes an hour: make soak"]
fn a_debian_system_bears_stress() {
    soak("debootstrap,apt,stress=1800", Duration::from_secs(7200));
}
