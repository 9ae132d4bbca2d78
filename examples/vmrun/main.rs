//! `vmrun`: vmcore's reference user. Runs a kernel in a virtual machine on this terminal.

mod args;
mod disk;
mod net;
mod stats;

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use vmcore::boot::{Boot, Linux, LinuxEntry, Multiboot, Pvh, Raw, RawMode};
use vmcore::host::{Report, Status};
use vmcore::{Accel, Deterministic, Outcome, Vm, VmBuilder};
use vmdevices::console::{self, Callback, Console, Socket, Stdio};
use vmdevices::virtio::{self, DiskHandle, VirtioDevice};
use vmdevices::{Balloon, Pc, Rng, Vsock};

use args::{AccelArg, Args, ConsoleArg, EntryArg, NetArg, TransportArg};
use stats::Times;

fn main() -> ExitCode {
    let begin = Instant::now();
    let args = Args::parse();
    if args.check {
        let report = vmcore::host::check();
        print!("{report}");
        return ExitCode::from(check_status(&report));
    }
    match run(&args, begin) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("vmrun: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args, begin: Instant) -> Result<u8, Box<dyn std::error::Error>> {
    if let NetArg::Card(card) = &args.net {
        net::check(card)?;
    }
    if log::set_logger(&StderrLog).is_err() {
        return Err("a logger is set already".into());
    }
    log::set_max_level(log::LevelFilter::Warn);
    let times = Times::new(begin);
    // Opened before the guest runs: a path that cannot be written is said while nothing is lost.
    let stats = match &args.stats {
        Some(path) => Some((path, File::create(path).map_err(|e| cannot_write(path, &e))?)),
        None => None,
    };
    let (mut vm, disks) = build(args, &times)?;
    times.created();
    // Standard error is not buffered: one text is one write.
    let using = format!("vmrun: using {}: {}\r\n", vm.backend(), vm.backend_reason());
    eprint!("{using}");
    let outcome = until_the_host_is_well(&disks, || match (args.timeout, args.checkpoint_every) {
        (Some(limit), _) => vm.run_for(limit.saturating_sub(begin.elapsed())),
        (None, Some(every)) => run_with_checkpoints(&mut vm, every.get()),
        (None, None) => vm.run(),
    });
    times.ended();
    // Whatever the outcome: the figures up to there are wanted most when something went wrong.
    if let Some((path, mut file)) = stats {
        let text = times.to_json(vm.backend(), &vm.stats()?, outcome.as_ref().ok());
        file.write_all(text.as_bytes()).map_err(|e| cannot_write(path, &e))?;
    }
    // The terminal gets its settings back before the last words.
    drop(vm);
    let outcome = outcome?;
    // A guest that resets may have meant to, or have crashed: the status is 0 either way.
    if outcome != Outcome::PowerOff {
        eprintln!("vmrun: the guest ended: {outcome:?}");
    }
    Ok(exit_status(outcome))
}

/// How long the guest waits before what a disk could not do is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Calls `run` again and again while disks stop the guest, and says why they do.
fn until_the_host_is_well(
    disks: &[(&Path, DiskHandle)],
    mut run: impl FnMut() -> vmcore::Result<Outcome>,
) -> vmcore::Result<Outcome> {
    let mut told = None;
    loop {
        let outcome = run()?;
        if outcome != Outcome::IoError {
            return Ok(outcome);
        }
        let stopped = disks.iter().find_map(|(path, disk)| Some((path, disk.stopped()?.message)));
        if let Some((path, message)) = stopped.filter(|stopped| told.as_ref() != Some(stopped)) {
            let text = format!("vmrun: the guest waits for {}: {message}\r\n", path.display());
            eprint!("{text}");
            told = Some((path, message));
        }
        std::thread::sleep(RETRY);
    }
}

/// Runs to the guest's end, and says every so many instructions and there what state it is in.
fn run_with_checkpoints(vm: &mut Vm, every: u64) -> vmcore::Result<Outcome> {
    loop {
        let outcome = vm.run_instructions(every)?;
        let line = format!("checkpoint {} {}\r\n", vm.instructions().unwrap_or(0), vm.state_hash()?);
        eprint!("{line}");
        if outcome != Outcome::InstructionLimit {
            return Ok(outcome);
        }
    }
}

fn cannot_write(path: &Path, error: &io::Error) -> String {
    format!("cannot write statistics to {}: {error}; check the path", path.display())
}

/// What a shell gets to see of `--check`.
fn check_status(report: &Report) -> u8 {
    let has = |status| report.backends.iter().any(|backend| backend.status == status);
    if has(Status::Usable) {
        0
    } else if has(Status::SmallGuestsOnly) {
        3
    } else {
        1
    }
}

/// What a shell gets to see of the guest's end.
fn exit_status(outcome: Outcome) -> u8 {
    match outcome {
        Outcome::PowerOff | Outcome::Reset(_) => 0,
        // As QEMU's isa-debug-exit: odd, so that it is not success by accident.
        Outcome::Exit(value) => (value << 1 | 1).to_le_bytes()[0],
        Outcome::TimeLimit => 124,
        Outcome::Stopped => 130,
        Outcome::Halted => 3,
        _ => 1,
    }
}

/// The VM, and its disks by their images.
type Built<'a> = (Vm, Vec<(&'a Path, DiskHandle)>);

fn build<'a>(args: &'a Args, times: &Times) -> Result<Built<'a>, Box<dyn std::error::Error>> {
    let kernel = args.kernel.as_deref().ok_or("no --kernel")?;
    let mut pc = Pc::new().serial(times.watch(console(args)?));
    if args.exit_port != 0 {
        pc = pc.exit_port(args.exit_port);
    }
    let mut builder: VmBuilder = Vm::builder()
        .accel(match args.accel {
            AccelArg::Auto => Accel::Auto,
            AccelArg::Kvm => Accel::Kvm,
            AccelArg::Soft => Accel::Soft,
        })
        .memory(args.memory)
        .cpus(args.cpus.get())
        .cpu_model(args.cpu)
        .acpi(!args.no_acpi)
        .boot(boot(args, kernel)?)
        .attach(pc);
    if let Some(khz) = args.tsc_khz {
        builder = builder.tsc_khz(khz);
    }
    if let Some(seed) = args.deterministic {
        builder = builder.deterministic(Deterministic::seeded(seed));
    }
    let mut disks = Vec::new();
    for disk in &args.disks {
        let device = disk::open(disk, args.cpus)?;
        disks.push((disk.path.as_path(), device.handle()));
        builder = attach(builder, device, args.transport);
    }
    if let NetArg::Card(card) = &args.net {
        builder = attach(builder, net::card(card)?, args.transport);
    }
    if let Some(bytes) = args.balloon {
        let balloon = Balloon::new()?;
        balloon.handle().set_target(bytes)?;
        builder = attach(builder, balloon, args.transport);
    }
    if let Some(vsock) = &args.vsock {
        builder = attach(builder, Vsock::new(vsock.cid)?.socket(&vsock.path)?, args.transport);
    }
    if !args.disks.is_empty() {
        builder = attach(builder, Rng::new(), args.transport);
    }
    Ok((builder.build()?, disks))
}

fn attach(builder: VmBuilder, device: impl VirtioDevice + 'static, transport: TransportArg) -> VmBuilder {
    match transport {
        TransportArg::Mmio => builder.attach(virtio::mmio(device)),
        TransportArg::Pci => builder.attach(virtio::pci(device)),
    }
}

fn console(args: &Args) -> vmcore::Result<Box<dyn Console>> {
    Ok(match &args.console {
        // No input is read, so that the terminal keeps its keys: Ctrl-C ends the program.
        ConsoleArg::Stdio if args.deterministic.is_some() => Box::new(Callback::new(|bytes: &[u8]| {
            let mut output = io::stdout();
            if let Err(error) = output.write_all(bytes).and_then(|()| output.flush()) {
                log::warn!("console output is lost: {error}");
            }
        })),
        ConsoleArg::Stdio => Box::new(Stdio::new()?),
        ConsoleArg::File(path) => Box::new(console::File::create(path)?),
        ConsoleArg::Unix(path) => Box::new(Socket::listen(path)?),
    })
}

fn boot(args: &Args, kernel: &Path) -> Result<Boot, Box<dyn std::error::Error>> {
    let kind = match args.entry {
        EntryArg::Auto => kind_of(kernel).map_err(|e| {
            format!("cannot open kernel {}: {e}; check the path and its permissions", kernel.display())
        })?,
        EntryArg::Bzimage | EntryArg::Realmode => Kind::Linux,
        EntryArg::Pvh => Kind::Pvh,
        EntryArg::Raw => Kind::Raw,
    };
    Ok(match kind {
        Kind::Linux => {
            let linux = Linux::new(kernel).cmdline(&args.cmdline).entry(match args.entry {
                EntryArg::Bzimage => LinuxEntry::BzImage,
                EntryArg::Realmode => LinuxEntry::RealMode,
                _ => LinuxEntry::Auto,
            });
            match &args.initrd {
                Some(initrd) => linux.initrd(initrd.as_path()),
                None => linux,
            }
            .into()
        }
        Kind::Pvh => {
            let pvh = Pvh::new(kernel).cmdline(&args.cmdline);
            match &args.initrd {
                Some(initrd) => pvh.initrd(initrd.as_path()),
                None => pvh,
            }
            .into()
        }
        Kind::Multiboot => {
            let multiboot = Multiboot::new(kernel).cmdline(&args.cmdline);
            match &args.initrd {
                Some(module) => multiboot.module(module.as_path(), ""),
                None => multiboot,
            }
            .into()
        }
        Kind::Raw => Raw::new(kernel, RawMode::Real16).into(),
    })
}

/// Which loader a kernel needs, where the user does not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Linux,
    Pvh,
    Multiboot,
    Raw,
}

fn kind_of(kernel: &Path) -> io::Result<Kind> {
    let mut head = Vec::with_capacity(8192);
    File::open(kernel)?.take(8192).read_to_end(&mut head)?;
    Ok(kind(&head))
}

fn kind(head: &[u8]) -> Kind {
    let multiboot = head.chunks_exact(4).any(|word| word == 0x1bad_b002_u32.to_le_bytes());
    match head {
        // An ELF file for 32-bit processors is entered by its PVH note, unless it asks for multiboot.
        [0x7f, b'E', b'L', b'F', 1, ..] if !multiboot => Kind::Pvh,
        [0x7f, b'E', b'L', b'F', 2, ..] => Kind::Linux,
        _ if multiboot => Kind::Multiboot,
        _ => Kind::Linux,
    }
}

/// Prints the library's warnings.
struct StderrLog;

impl log::Log for StderrLog {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Warn
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            // The terminal may be in raw mode, where a line feed does not return the carriage.
            let _ = write!(io::stderr(), "vmrun: {}\r\n", record.args());
        }
    }

    fn flush(&self) {}
}
