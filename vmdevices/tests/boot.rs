//! Stock Debian kernels, booted to userland and ended in every way.
//!
//! Needs a backend that runs kernels and the guests of `examples/guest/build`; skipped aloud without,
//! and failed where `VMCORE_REQUIRE_BOOT` says that a skip is one.
#![expect(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "these are tests")]

mod cards;
mod devices;
#[path = "nat/booted.rs"]
mod nat;
mod network;
mod other;
mod pci;
mod recorded;
mod transport;

use std::io;
use std::net::{Shutdown, TcpListener};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vmcore::boot::{Linux, LinuxEntry};
use vmcore::cpuid::CpuModel;
use vmcore::host::{self, Status};
use vmcore::{Accel, GuestAddress, Outcome, ResetCause, Vm};
use vmdevices::console::Script;
use vmdevices::net::Tap;
use vmdevices::{Disk, Net, Pc, Rng, VirtioConsole, console};

/// Long enough for a guest on an emulated processor on a busy machine; a hang ends the test.
const LIMIT: Duration = Duration::from_secs(300);

/// The backend to boot on: `VMCORE_ACCEL`, or the best there is.
fn accel() -> Accel {
    std::env::var("VMCORE_ACCEL").map_or(Accel::Auto, |name| name.parse().unwrap())
}

/// Where the guests are, or `None` after saying why the test is skipped.
fn guests() -> Option<PathBuf> {
    guests_with("cloud/initrd.img")
}

/// [`guests`], where `needed` is among them.
fn guests_with(needed: &str) -> Option<PathBuf> {
    let directory = std::env::var_os("VMCORE_GUESTS")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guests"), PathBuf::from);
    let report = host::check();
    let usable = report.backends.iter().any(|backend| backend.status == Status::Usable);
    let reason = if !usable {
        format!("no backend here runs kernels: {}", report.backends[0].reason)
    } else if !directory.join(needed).exists() {
        format!("no {needed} in {}: run examples/guest/build", directory.display())
    } else {
        return Some(directory);
    };
    assert!(std::env::var_os("VMCORE_REQUIRE_BOOT").is_none(), "boot tests are required, but {reason}");
    println!("skipped: {reason}");
    None
}

/// The kernel `name` and its initial RAM disk, where they are there.
fn kernel(name: &str, scenario: &str) -> Option<(PathBuf, Case)> {
    let file = |file: &str| format!("{name}/{file}");
    let case = Case { kernel: file("vmlinuz"), initrd: file("initrd.img"), ..Case::new(scenario) };
    guests_with(&case.initrd).map(|guests| (guests, case))
}

/// One boot of an initial RAM disk.
#[derive(Clone, Debug)]
struct Case {
    kernel: String,
    initrd: String,
    entry: LinuxEntry,
    cpus: u32,
    memory_mib: u64,
    acpi: bool,
    cmdline: String,
    limit: Duration,
}

impl Case {
    fn new(scenario: &str) -> Self {
        Self {
            kernel: "cloud/vmlinuz".into(),
            initrd: "cloud/initrd.img".into(),
            entry: LinuxEntry::Auto,
            cpus: 1,
            memory_mib: 256,
            acpi: true,
            cmdline: format!("console=ttyS0 panic=-1 vmtest={scenario}"),
            limit: LIMIT,
        }
    }

    fn generic(self) -> Self {
        Self { kernel: "generic/vmlinuz".into(), initrd: "generic/initrd.img".into(), ..self }
    }

    /// Runs the guest to its end; gives the outcome and all it wrote.
    fn run(&self, guests: &Path) -> (Outcome, String) {
        let (serial, script) = console::memory().unwrap();
        let linux = Linux::new(guests.join(&self.kernel))
            .initrd(guests.join(&self.initrd))
            .cmdline(&self.cmdline)
            .entry(self.entry);
        let mut vm = Vm::builder()
            .accel(accel())
            .cpus(self.cpus)
            .memory(self.memory_mib << 20)
            .acpi(self.acpi)
            .boot(linux)
            .attach(Pc::new().serial(serial).exit_port(0xf4))
            .build()
            .unwrap();
        let outcome = vm.run_for(self.limit);
        let transcript = script.transcript();
        match outcome {
            Ok(outcome) => (outcome, transcript),
            Err(error) => panic!("{self:?}: {error}\n{transcript}"),
        }
    }

    /// Runs the guest and checks how it ended and that its userland saw the machine it was given.
    fn ends(&self, guests: &Path, expected: Outcome) {
        let (outcome, transcript) = self.run(guests);
        assert_eq!(outcome, expected, "{self:?}\n{transcript}");
        let line = transcript
            .lines()
            .find_map(|line| line.trim().strip_prefix("vmcore-guest: cpus="))
            .unwrap_or_else(|| panic!("{self:?}: userland was not reached\n{transcript}"));
        let (cpus, memory) = line.split_once(" mem_kib=").unwrap();
        assert_eq!(cpus, self.cpus.to_string(), "{self:?}");
        let seen_mib = memory.trim().parse::<u64>().unwrap() / 1024;
        // The kernel keeps some of it for itself, and does not count it.
        assert!(
            seen_mib <= self.memory_mib && seen_mib + 80 > self.memory_mib * 15 / 16,
            "{self:?}: {seen_mib}"
        );
        for line in ["vmcore-guest: done", "Hypervisor detected: KVM", "kvm-clock: Using msrs"] {
            assert!(transcript.contains(line), "no {line:?}: {self:?}\n{transcript}");
        }
    }
}

#[test]
fn cloud_kernel_powers_off() {
    let Some(guests) = guests() else { return };
    Case { memory_mib: 128, ..Case::new("poweroff") }.ends(&guests, Outcome::PowerOff);
}

#[test]
fn four_vcpus_and_six_gib_power_off() {
    let Some(guests) = guests() else { return };
    Case { cpus: 4, memory_mib: 6144, ..Case::new("poweroff") }.ends(&guests, Outcome::PowerOff);
}

#[test]
fn a_vmlinux_boots_as_its_bzimage_does() {
    let Some(guests) = guests() else { return };
    Case { kernel: "cloud/vmlinux".into(), ..Case::new("poweroff") }.ends(&guests, Outcome::PowerOff);
}

#[test]
fn a_bzimage_unpacks_itself() {
    let Some(guests) = guests() else { return };
    Case { entry: LinuxEntry::BzImage, ..Case::new("poweroff") }.ends(&guests, Outcome::PowerOff);
}

#[test]
fn generic_kernel_powers_off() {
    let Some(guests) = guests() else { return };
    Case { cpus: 4, ..Case::new("poweroff") }.generic().ends(&guests, Outcome::PowerOff);
}

#[test]
fn without_acpi_the_mp_table_names_the_processors() {
    let Some(guests) = guests() else { return };
    // Without ACPI there is no power-off; a reset by the keyboard controller ends the guest.
    let reboot = Case::new("reboot");
    let expected = Outcome::Reset(ResetCause::Keyboard);
    // Debian's cloud kernel is built without CONFIG_X86_MPPARSE: it has one processor then.
    let cmdline = format!("{} acpi=off reboot=k", reboot.cmdline);
    Case { cmdline: cmdline.clone(), ..reboot.clone() }.ends(&guests, expected);
    Case { cpus: 4, cmdline, ..reboot.clone() }.generic().ends(&guests, expected);
    // Tables that are not there are as good as tables that are not read.
    let cmdline = format!("{} reboot=k", reboot.cmdline);
    Case { cpus: 2, acpi: false, cmdline, ..reboot }.generic().ends(&guests, expected);
}

#[test]
fn reboots_are_resets() {
    let Some(guests) = guests() else { return };
    let (outcome, transcript) = Case::new("reboot").run(&guests);
    assert!(matches!(outcome, Outcome::Reset(_)), "{outcome:?}\n{transcript}");
    for (how, cause) in [("k", ResetCause::Keyboard), ("p", ResetCause::Port), ("t", ResetCause::TripleFault)]
    {
        let case = Case::new("reboot");
        let cmdline = format!("{} reboot={how}", case.cmdline);
        Case { cmdline, ..case }.ends(&guests, Outcome::Reset(cause));
    }
}

#[test]
fn a_panic_resets() {
    let Some(guests) = guests() else { return };
    let (outcome, transcript) = Case::new("panic").run(&guests);
    assert!(matches!(outcome, Outcome::Reset(_)), "{outcome:?}\n{transcript}");
    assert!(transcript.contains("Kernel panic - not syncing: sysrq triggered crash"), "{transcript}");
}

#[test]
fn a_hang_ends_at_the_time_limit_and_a_halt_is_seen() {
    let Some(guests) = guests() else { return };
    let (outcome, transcript) = Case { limit: Duration::from_secs(60), ..Case::new("hang") }.run(&guests);
    assert_eq!(outcome, Outcome::TimeLimit, "{transcript}");
    assert!(transcript.contains("vmcore-guest: hanging"), "{transcript}");
    Case { cpus: 2, ..Case::new("halt") }.ends(&guests, Outcome::Halted);
}

#[test]
fn files_on_a_disk_are_there_after_a_second_boot() {
    let Some(guests) = guests() else { return };
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("root.ext4");
    std::fs::copy(guests.join("root.ext4"), &image).unwrap();
    let run = |scenario: &str| {
        let (serial, script) = console::memory().unwrap();
        let cmdline = format!("console=ttyS0 panic=-1 root=/dev/vda rw vmtest={scenario}");
        let linux =
            Linux::new(guests.join("cloud/vmlinuz")).initrd(guests.join("cloud/initrd.img")).cmdline(cmdline);
        let mut vm = Vm::builder()
            .accel(accel())
            .cpus(2)
            .memory(256 << 20)
            .boot(linux)
            .attach(Pc::new().serial(serial))
            .attach(Disk::open(&image).unwrap())
            .attach(Rng::new())
            .build()
            .unwrap();
        let outcome = vm.run_for(LIMIT).unwrap();
        let transcript = script.transcript();
        assert_eq!(outcome, Outcome::PowerOff, "{scenario}\n{transcript}");
        transcript
    };
    let digest = |transcript: &str, mark: &str| {
        let found = transcript.lines().find_map(|line| line.trim().strip_prefix(mark).map(str::to_owned));
        found.unwrap_or_else(|| panic!("no {mark:?} in\n{transcript}"))
    };
    let wrote = digest(&run("write"), "vmcore-guest: wrote ");
    assert_eq!(digest(&run("verify"), "vmcore-guest: verified "), wrote);
    assert_eq!(wrote.len(), 64);
}

#[test]
fn linux_finds_the_virtio_devices() {
    let Some(guests) = guests() else { return };
    let (serial, script) = console::memory().unwrap();
    let linux = Linux::new(guests.join("cloud/vmlinuz"))
        .initrd(guests.join("cloud/initrd.img"))
        .cmdline("console=ttyS0 panic=-1 vmtest=devices");
    let (terminal, typed) = console::memory().unwrap();
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(64 << 20).unwrap();
    let mut vm = Vm::builder()
        .accel(accel())
        .memory(256 << 20)
        .boot(linux)
        .attach(Pc::new().serial(serial))
        .attach(Disk::open(image.path()).unwrap())
        .attach(Rng::new())
        .attach(VirtioConsole::new(terminal))
        .build()
        .unwrap();
    let outcome = vm.run_for(LIMIT).unwrap();
    let transcript = script.transcript();
    assert_eq!(outcome, Outcome::PowerOff, "{transcript}");
    for line in
        ["partition vda kib=65536", "driver=virtio_blk", "driver=virtio_rng", "bytes=32", "hvc0 present"]
    {
        assert!(transcript.contains(line), "no {line:?} in\n{transcript}");
    }
    assert_eq!(typed.transcript().trim_end(), "vmcore-guest: hello from hvc0");
}

#[test]
fn the_exit_port_ends_with_its_value() {
    let Some(guests) = guests() else { return };
    Case::new("exit:5").ends(&guests, Outcome::Exit(5));
}

/// Types `command` at a shell that does not echo, and gives what it puts out.
fn ask(script: &Script, command: &str) -> String {
    // A mark is split where it is typed, for shells that echo.
    script.send(format!("{command}; echo END''MARK\n")).unwrap();
    script.expect("ENDMARK", LIMIT).unwrap_or_else(|error| panic!("{command}: {error}"))
}

/// Has a shell read 40,000 bytes at once, more than the tty layer takes in one go: all come through.
fn paste(script: &Script) {
    let text: String = (0..4000).map(|line| format!("line {line:04}\n")).collect();
    script.send("stty raw; echo go''ing; head -c 40000 | md5sum; stty cooked; echo END''MARK\n").unwrap();
    script.expect("going", LIMIT).unwrap();
    script.send(&text).unwrap();
    let sum = script.expect("ENDMARK", LIMIT).unwrap();
    assert!(sum.contains("fda1353146f8d86992bf01e78a2d5f78"), "{sum}");
}

/// A shell on the serial port, and what the kernel makes of the board's own devices.
#[test]
fn a_shell_answers_and_finds_the_boards_devices() {
    let Some(guests) = guests() else { return };
    let (serial, script) = console::memory().unwrap();
    let linux = Linux::new(guests.join("cloud/vmlinuz"))
        .initrd(guests.join("cloud/initrd.img"))
        .cmdline("console=ttyS0 panic=-1 vmtest=shell");
    let mut vm = Vm::builder()
        .accel(accel())
        .memory(256 << 20)
        .boot(linux)
        .attach(Pc::new().serial(serial))
        .build()
        .unwrap();
    // Before there is a driver: it must not be lost.
    script.send("stty -echo; echo re''ady\n").unwrap();
    let typist = std::thread::spawn(move || {
        let ask = |command| ask(&script, command);
        script.expect("ready", LIMIT).unwrap();
        let uart = ask("cat /proc/tty/driver/serial");
        assert!(uart.contains("0: uart:16550A port:000003F8 irq:4"), "{uart}");
        let kernel = ask("dmesg | grep -E 'rtc|i8042|serio|input|SCI|reset'");
        assert!(kernel.contains("rtc_cmos") && kernel.contains("setting system clock to 20"), "{kernel}");
        assert!(kernel.contains("i8042: PNP: No PS/2") && !kernel.contains("Probing ports"), "{kernel}");

        // The clock is the host's, and its alarm rings.
        let host = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
        let seconds = ask("echo since=$(cat /sys/class/rtc/rtc0/since_epoch)=");
        let guest = seconds.split('=').nth(1).unwrap().parse::<u64>().unwrap();
        assert!(guest.abs_diff(host) <= 5, "{guest} {host}");
        ask("echo +2 > /sys/class/rtc/rtc0/wakealarm; sleep 4");
        let interrupts = ask("grep rtc /proc/interrupts");
        let count = interrupts.split(':').nth(1).and_then(|rest| rest.split_whitespace().next());
        assert!(count.unwrap().parse::<u64>().unwrap() >= 1, "{interrupts}");

        paste(&script);
        script.send("exit\n").unwrap();
        script
    });
    let outcome = vm.run_for(LIMIT);
    drop(vm);
    let script = typist.join().unwrap();
    assert_eq!(outcome.unwrap(), Outcome::PowerOff, "{}", script.transcript());
}

/// Works the network, a virtio console and the entropy source from a shell on the serial port.
#[test]
fn a_guest_talks_by_network_and_console_and_draws_random_numbers() {
    let Some(guests) = guests() else { return };
    if !network::namespace() {
        return;
    }
    let tap = Tap::open("vmtap%d").unwrap();
    assert!(network::ip("addr add 192.0.2.1/24 dev vmtap0") && network::ip("link set vmtap0 up"));
    let server = TcpListener::bind("192.0.2.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    // Sends back what it gets; ends with the test's process.
    std::thread::spawn(move || {
        for connection in server.incoming() {
            let connection = connection.unwrap();
            io::copy(&mut &connection, &mut &connection).unwrap();
            connection.shutdown(Shutdown::Write).unwrap();
        }
    });

    let ((serial, script), (terminal, hvc)) = (console::memory().unwrap(), console::memory().unwrap());
    let linux = Linux::new(guests.join("cloud/vmlinuz"))
        .initrd(guests.join("cloud/initrd.img"))
        .cmdline("console=ttyS0 panic=-1 vmtest=shell vmnet=192.0.2.2/24");
    let mut vm = Vm::builder()
        .accel(accel())
        .cpus(2)
        .memory(256 << 20)
        .boot(linux)
        .attach(Pc::new().serial(serial))
        .attach(Net::new(tap).unwrap().mac([2, 0, 0, 0, 0, 0x17]).unwrap())
        .attach(VirtioConsole::new(terminal))
        .attach(Rng::new())
        .build()
        .unwrap();
    script.send("stty -echo; echo re''ady\n").unwrap();
    let transcripts = [script.clone(), hvc.clone()];
    let typist = std::thread::spawn(move || {
        script.expect("ready", LIMIT).unwrap();
        let ask = |command: &str| ask(&script, command);

        let addresses = ask("cat /sys/class/net/eth0/address; ip addr show dev eth0");
        assert!(addresses.contains("02:00:00:00:00:17") && addresses.contains("192.0.2.2/24"), "{addresses}");
        let ping = ask("ping -c 3 -W 10 192.0.2.1");
        assert!(ping.contains("3 packets transmitted, 3 packets received"), "{ping}");
        let answer = ask(&format!("echo hello | nc 192.0.2.1 {port}"));
        assert!(answer.contains("hello"), "{answer}");
        // Enough for segmentation offload and several windows.
        ask("head -c 4000000 /dev/urandom > /tmp/sent");
        let compared = ask(&format!(
            "nc 192.0.2.1 {port} < /tmp/sent > /tmp/received; wc -c < /tmp/received; cmp /tmp/sent /tmp/received && echo the same"
        ));
        assert!(compared.contains("4000000") && compared.contains("the same"), "{compared}");

        // Not a child of this shell, which takes a child's end for its own.
        ask("(setsid sh < /dev/hvc0 > /dev/hvc0 2>&1 &)");
        hvc.send("stty -echo; PS1=; echo re''ady\n").unwrap();
        hvc.expect("ready", LIMIT).unwrap();
        let sum = self::ask(&hvc, "tty; echo sum=$((6 * 7))");
        assert!(sum.contains("/dev/hvc0") && sum.contains("sum=42"), "{sum}");
        // Sixteen bytes at a time, for each of which the guest spins until the host has them: slow where both
        // share one processor.
        let numbers = self::ask(&hvc, "seq 1 3000");
        let numbers = numbers.lines().filter_map(|line| line.trim().parse::<u32>().ok());
        assert!(numbers.eq(1..=3000));
        paste(&hvc);

        let source = ask("cat /sys/class/misc/hw_random/rng_current");
        assert!(source.contains("virtio_rng"), "{source}");
        let draw = || {
            let text = ask("dd if=/dev/hwrng bs=64 count=1 2>/dev/null | od -An -v -tx1");
            let bytes = text.split_whitespace().filter(|word| u8::from_str_radix(word, 16).is_ok());
            bytes.map(str::to_owned).collect::<Vec<_>>()
        };
        let (first, second) = (draw(), draw());
        assert_eq!((first.len(), second.len()), (64, 64));
        assert_ne!(first, second);
        script.send("exit\n").unwrap();
    });
    let outcome = vm.run_for(LIMIT);
    drop(vm);
    let typed = typist.join();
    assert!(
        typed.is_ok() && matches!(outcome, Ok(Outcome::PowerOff)),
        "{outcome:?}\n{}",
        transcripts.map(|script| script.transcript()).join("\non hvc0:\n")
    );
}

const MOVED_MIB: u64 = 192;

/// The kernel's log as it is in the memory of a guest without a console.
fn kernel_log(vm: &Vm) -> String {
    let mut memory = vec![0; usize::try_from(MOVED_MIB << 20).unwrap()];
    vm.memory().read(GuestAddress(0), &mut memory).unwrap();
    let second_line = b"Command line: panic=-1 vmtest";
    let Some(at) = memory.windows(second_line.len()).position(|window| window == second_line) else {
        return "no log in the guest's memory".into();
    };
    // The texts of the records, with their binary headers between them.
    let texts = &memory[at..memory.len().min(at + (128 << 10))];
    let printable = |text: &&[u8]| text.len() > 3 && text.iter().all(|byte| (b' '..=b'~').contains(byte));
    let texts = texts.split(|byte| !(b' '..=b'~').contains(byte)).filter(printable);
    texts.map(String::from_utf8_lossy).collect::<Vec<_>>().join("\n")
}

/// Boots a kernel that is taken `moves` times, after `slice` each, from one VM to another of the `kinds` in turn.
/// It has no console: devices' states are not part of a `VmState`. Gives how often it was moved.
fn boot_moving(guests: &Path, kinds: [Accel; 2], tsc_khz: u32, moves: usize, slice: Duration) -> usize {
    let make = |accel| {
        let linux = Linux::new(guests.join("cloud/vmlinuz"))
            .initrd(guests.join("cloud/initrd.img"))
            .cmdline("panic=-1 vmtest=poweroff");
        Vm::builder()
            .accel(accel)
            .cpus(2)
            // Of v2 the backends of this host may offer different parts.
            .cpu_model(CpuModel::V1)
            .tsc_khz(tsc_khz)
            .memory(MOVED_MIB << 20)
            .boot(linux)
            .attach(Pc::new())
            .build()
            .unwrap()
    };
    let mut vm = make(kinds[0]);
    let mut moved = 0;
    let outcome = loop {
        let outcome = vm.run_for(if moved < moves { slice } else { LIMIT }).unwrap();
        if outcome != Outcome::TimeLimit || moved == moves {
            break outcome;
        }
        moved += 1;
        let state = vm.handle().pause().unwrap().save().unwrap();
        let mut memory = vec![0; usize::try_from(MOVED_MIB << 20).unwrap()];
        vm.memory().read(GuestAddress(0), &mut memory).unwrap();
        vm = make(kinds[moved % 2]);
        vm.memory().write(GuestAddress(0), &memory).unwrap();
        vm.handle().pause().unwrap().restore(&state).unwrap();
    };
    assert_eq!(outcome, Outcome::PowerOff, "after {moved} moves from {kinds:?}\n{}", kernel_log(&vm));
    moved
}

/// A kernel is taken from one VM to the next while it boots, and ends as if nothing had been.
#[test]
fn a_booting_kernel_moves_within_the_software_cpu() {
    let Some(guests) = guests() else { return };
    let moves = boot_moving(&guests, [Accel::Soft; 2], 2_000_000, 8, Duration::from_millis(200));
    assert!(moves >= 2, "{moves} moves");
}

/// The same from one backend to the other and back.
#[test]
fn a_booting_kernel_moves_between_backends() {
    let Some(guests) = guests() else { return };
    let kvm = host::check().backends.iter().any(|b| b.name == "kvm" && b.status == Status::Usable);
    if !kvm {
        println!("skipped: this host's KVM runs no kernels");
        return;
    }
    // What this host's KVM has.
    let tsc_khz = Vm::bare(Accel::Kvm).unwrap().create_vcpu(0).unwrap().tsc_khz().unwrap();
    // Some moves on a slow machine as on a fast one.
    let start = Instant::now();
    boot_moving(&guests, [Accel::Kvm; 2], tsc_khz, 0, LIMIT);
    // To look for what happens seldom: more of them.
    let most = std::env::var("VMCORE_MOVES").ok().and_then(|moves| moves.parse().ok()).unwrap_or(8);
    let slice = start.elapsed() * 4 / (3 * u32::try_from(most).unwrap());
    for kinds in [[Accel::Soft, Accel::Kvm], [Accel::Kvm, Accel::Soft]] {
        let moves = boot_moving(&guests, kinds, tsc_khz, most, slice);
        assert!(moves >= 2, "{moves} moves of {slice:?}");
    }
}
