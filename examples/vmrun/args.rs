//! The command line.

mod disk;
mod net;

use std::num::{NonZeroU32, NonZeroU64};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use vmcore::cpuid::CpuModel;

pub use disk::DiskArg;
pub use net::{CardArg, NatArgs, NetArg, Network};

/// Runs a kernel or image in a virtual machine on this terminal.
///
/// Exit status: 0 when the guest switches off or resets, (value << 1 | 1) when it writes a value to
/// the exit port, 124 when the time is over, 3 when it halts for good, 130 when the user stops it,
/// 1 for errors, 2 for a wrong command line. With --check: 0 when a backend runs every guest, 3 when
/// small guests only, 1 when there is none.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
pub struct Args {
    /// What runs the guest
    #[arg(long, value_enum, default_value_t = AccelArg::Auto)]
    pub accel: AccelArg,

    /// bzImage, vmlinux, PVH or multiboot kernel, or (with --raw) 16-bit code
    #[arg(long, value_name = "FILE", required_unless_present = "check")]
    pub kernel: Option<PathBuf>,

    /// Initial RAM disk; a module for multiboot kernels
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,

    /// Kernel command line
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub cmdline: String,

    /// How the kernel is entered
    #[arg(long, value_enum, default_value_t = EntryArg::Auto)]
    pub entry: EntryArg,

    /// A disk image, and how it is used; ",," is a comma of a name. May be given several times.
    /// Options: format=raw|qcow2|vmdk|vhdx|vdi (raw unless said), ro (the guest cannot write; vmdk, vhdx and
    /// vdi want it), backing=FILE (what a qcow2 image is on top of; again for what is below that), extent=FILE
    /// (a part of a vmdk image), cache=writeback|writethrough|unsafe, direct (past the page cache),
    /// rerror= and werror=report|stop|enospc|ignore (what becomes of reads and writes that the host fails; report
    /// unless said; after stop, or enospc for want of room, the guest waits and they are tried again),
    /// iops=N[/BURST] and bps=SIZE[/BURST] (limits per second), queues=N (one per CPU unless said),
    /// serial=TEXT
    #[arg(long = "disk", value_name = "FILE[,OPTION...]", value_parser = disk::parse)]
    pub disks: Vec<DiskArg>,

    /// Network card: on a NAT in this process, which needs no privilege; on a tap; on an open descriptor of a
    /// tap or Unix socket; or on what listens at a Unix socket (passt, QEMU). A comma of a name is doubled.
    /// Options: mac=02:00:00:00:00:01, queues=N (of a tap), mtu=BYTES, pcap=FILE (packets recorded), bps=RATE (bits
    /// per second in each direction: 100M). Of nat besides, any number of times: forward=tcp:8080:80, allow=DEST
    /// and deny=DEST (in their order), otherwise=deny, dns=ADDRESS, host (the gateway stands for this host's
    /// loopback address), where DEST is any, 10.0.0.0/8 or tcp:10.0.0.0/8:80-90
    #[arg(long, value_name = "none|nat|tap=NAME|fd=N|unix=PATH[,OPTION...]", default_value = "none", value_parser = net::parse)]
    pub net: NetArg,

    /// What disks and network card are behind: virtio-mmio, or virtio-pci
    #[arg(long, value_enum, default_value_t = TransportArg::Mmio)]
    pub transport: TransportArg,

    /// Sockets to the guest: programs connect to PATH and send "CONNECT PORT", the guest reaches those
    /// that listen on PATH_PORT
    #[arg(long, value_name = "cid=N,path=PATH", value_parser = vsock)]
    pub vsock: Option<VsockArg>,

    /// A balloon: memory that the guest does not use goes back to the host, and SIZE of it at once
    #[arg(long, value_name = "SIZE", num_args = 0..=1, default_missing_value = "0", value_parser = balloon)]
    pub balloon: Option<u64>,

    /// Size of the guest's memory: 64M, 2G, ...
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = size)]
    pub memory: u64,

    /// Number of virtual CPUs
    #[arg(long, value_name = "N", default_value = "1")]
    pub cpus: NonZeroU32,

    /// CPU features: a level of the x86-64 psABI, the best of v1 to v3 that the host has, or all it has
    #[arg(long, value_name = "best|v1|v2|v3|v4|host", default_value_t = CpuModel::Best, value_parser = cpu)]
    pub cpu: CpuModel,

    /// Frequency of the guest's TSC in kHz; the host's with KVM and 1000000 on the software CPU, unless said
    #[arg(long, value_name = "KHZ")]
    pub tsc_khz: Option<u32>,

    /// End the guest after this time, with status 124
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub timeout: Option<Duration>,

    /// Where the guest's serial port goes: on stdio, Ctrl-A x stops the guest; a socket is listened on
    #[arg(long, value_name = "stdio|FILE|unix=PATH", default_value = "stdio", value_parser = console)]
    pub console: ConsoleArg,

    /// Port that ends the guest when it is written; 0 for none
    #[arg(long, value_name = "PORT", default_value = "0xf4", value_parser = port)]
    pub exit_port: u16,

    /// No ACPI tables: the guest finds its processors in an MP table
    #[arg(long)]
    pub no_acpi: bool,

    /// Write times, exits by reason and peak memory to FILE as JSON
    #[arg(long, value_name = "FILE")]
    pub stats: Option<PathBuf>,

    /// Do the same in every run, on the software CPU: time follows from the instructions executed,
    /// random numbers from SEED, and the guest gets no input
    #[arg(long, value_name = "SEED", num_args = 0..=1, default_missing_value = "0")]
    pub deterministic: Option<u64>,

    /// Write a line "checkpoint COUNT HASH" to standard error every N instructions and at the end
    #[arg(long, value_name = "N", requires = "deterministic", conflicts_with = "timeout")]
    pub checkpoint_every: Option<NonZeroU64>,

    /// Say which backends this host has, and end
    #[arg(long)]
    pub check: bool,
}

/// `--accel`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum AccelArg {
    /// The best that this host has.
    Auto,
    /// KVM.
    Kvm,
    /// The software CPU.
    Soft,
}

/// `--transport`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TransportArg {
    /// virtio-mmio, which guests find by ACPI only.
    Mmio,
    /// virtio-pci, which every guest with PCI finds.
    Pci,
}

/// `--entry`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EntryArg {
    /// By the kernel's format; a bzImage's payload is unpacked on the host.
    Auto,
    /// A bzImage unpacks itself.
    Bzimage,
    /// A bzImage's 16-bit setup code, with the services of a small BIOS.
    Realmode,
    /// The PVH entry of an ELF kernel.
    Pvh,
    /// 16-bit code at 0x7c00.
    Raw,
}

/// `--console`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConsoleArg {
    /// This terminal, or what standard input and output are.
    Stdio,
    /// Output to a file, no input.
    File(PathBuf),
    /// Whoever connects to a Unix socket at this path.
    Unix(PathBuf),
}

/// The parts of `text` between single commas. A doubled one is one of the part's own.
fn parts(text: &str) -> std::vec::IntoIter<String> {
    /// Stands for a doubled comma while the text is split at the others: no path contains it.
    const COMMA: &str = "\0";
    let parts = text.replace(",,", COMMA).split(',').map(|part| part.replace(COMMA, ",")).collect::<Vec<_>>();
    parts.into_iter()
}

/// `--vsock`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockArg {
    /// The guest's number among others.
    pub cid: u32,
    /// The socket to listen on.
    pub path: PathBuf,
}

fn cpu(text: &str) -> Result<CpuModel, vmcore::Error> {
    text.parse()
}

fn console(text: &str) -> Result<ConsoleArg, String> {
    match text.split_once('=') {
        None if text == "stdio" => Ok(ConsoleArg::Stdio),
        Some(("unix", "")) => Err("give the path of a socket: unix=PATH".into()),
        Some(("unix", path)) => Ok(ConsoleArg::Unix(path.into())),
        _ if text.is_empty() => Err("give stdio, a file, or unix=PATH".into()),
        _ => Ok(ConsoleArg::File(text.into())),
    }
}

fn vsock(text: &str) -> Result<VsockArg, String> {
    let (mut cid, mut path) = (None, None);
    for option in parts(text) {
        match option.split_once('=') {
            Some(("cid", number)) => {
                let parsed = number.parse().ok().filter(|cid| (3..u32::MAX).contains(cid));
                cid = Some(parsed.ok_or_else(|| format!("{number:?} is no CID: give 3 to 4294967294"))?);
            }
            Some(("path", name)) if !name.is_empty() => path = Some(name.into()),
            _ => return Err(format!("no option {option:?}; known are: cid, path")),
        }
    }
    match (cid, path) {
        (Some(cid), Some(path)) => Ok(VsockArg { cid, path }),
        _ => Err("give both: cid=3,path=vm.vsock".into()),
    }
}

fn balloon(text: &str) -> Result<u64, String> {
    if text == "0" { Ok(0) } else { size(text) }
}

fn size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        Some(b'T' | b't') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let number: u64 =
        digits.parse().map_err(|_| "give a number with K, M, G or T behind it: 512M".to_string())?;
    number.checked_mul(1 << shift).filter(|&bytes| bytes > 0).ok_or_else(|| "too large, or zero".into())
}

fn seconds(text: &str) -> Result<Duration, String> {
    let number: f64 = text.parse().map_err(|_| "give a number of seconds: 30, 0.5")?;
    Duration::try_from_secs_f64(number).map_err(|error| error.to_string())
}

fn port(text: &str) -> Result<u16, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u16::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map_err(|error| format!("{error}; give a port from 0 to 65535 or 0xffff"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_and_limits() {
        assert_eq!(size("64M"), Ok(64 << 20));
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("1T"), Ok(1 << 40));
        for bad in ["", "M", "-1M", "0", "99999999T", "1.5G"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    pub(super) fn parse(arguments: &[&str]) -> Result<Args, String> {
        let line = ["vmrun", "--kernel", "k"].iter().chain(arguments);
        Args::try_parse_from(line).map_err(|e| e.to_string())
    }

    /// An error names the option, the value and what would do.
    #[track_caller]
    pub(super) fn refused(arguments: &[&str], words: &[&str]) {
        let text = parse(arguments).unwrap_err();
        for word in arguments.iter().chain(words) {
            assert!(text.contains(word), "{word:?} is not in {text}");
        }
    }

    #[test]
    fn the_parser_is_consistent() {
        use clap::CommandFactory;
        Args::command().debug_assert();
        assert!(Args::try_parse_from(["vmrun", "--check"]).is_ok());
        assert!(Args::try_parse_from(["vmrun", "--memory", "64M"]).is_err());
    }

    #[test]
    fn the_defaults_are_a_small_machine_on_this_terminal() {
        let args = parse(&[]).unwrap();
        assert_eq!((args.memory, args.cpus.get(), args.exit_port), (512 << 20, 1, 0xf4));
        assert_eq!((args.cpu, args.net, args.console), (CpuModel::Best, NetArg::None, ConsoleArg::Stdio));
        assert!(args.disks.is_empty() && args.timeout.is_none() && args.stats.is_none() && !args.check);
    }

    #[test]
    fn consoles_are_terminals_files_and_sockets() {
        let console = |text| parse(&["--console", text]).unwrap().console;
        assert_eq!(console("stdio"), ConsoleArg::Stdio);
        assert_eq!(console("out.log"), ConsoleArg::File("out.log".into()));
        assert_eq!(console("./a=b"), ConsoleArg::File("./a=b".into()));
        assert_eq!(console("unix=/run/vm.sock"), ConsoleArg::Unix("/run/vm.sock".into()));
        refused(&["--console", "unix="], &["unix=PATH"]);
    }

    #[test]
    fn a_balloon_has_a_size_or_none_yet() {
        assert_eq!(parse(&["--balloon", "--check"]).unwrap().balloon, Some(0));
        assert_eq!(parse(&["--balloon", "64M"]).unwrap().balloon, Some(64 << 20));
        assert_eq!(parse(&[]).unwrap().balloon, None);
        refused(&["--balloon", "many"], &["512M"]);
    }

    #[test]
    fn sockets_have_a_cid_and_a_path() {
        let vsock = |text| parse(&["--vsock", text]).unwrap().vsock;
        assert_eq!(vsock("cid=3,path=a,,b"), Some(VsockArg { cid: 3, path: "a,b".into() }));
        assert_eq!(vsock("path=v,cid=9").map(|vsock| vsock.cid), Some(9));
        refused(&["--vsock", "cid=2,path=v"], &["3 to 4294967294"]);
        refused(&["--vsock", "cid=3"], &["both"]);
        refused(&["--vsock", "cid=3,path="], &["known are: cid, path"]);
    }

    #[test]
    fn the_deterministic_mode_has_a_seed_and_checkpoints() {
        assert_eq!(parse(&[]).unwrap().deterministic, None);
        assert_eq!(parse(&["--deterministic", "--memory", "64M"]).unwrap().deterministic, Some(0));
        let args = parse(&["--deterministic", "7", "--checkpoint-every", "1000"]).unwrap();
        assert_eq!((args.deterministic, args.checkpoint_every), (Some(7), NonZeroU64::new(1000)));
        assert!(parse(&["--checkpoint-every", "1000"]).is_err());
        assert!(parse(&["--deterministic", "--checkpoint-every", "0"]).is_err());
    }

    #[test]
    fn other_values_are_refused_with_what_would_do() {
        assert_eq!(parse(&["--cpu", "v3"]).unwrap().cpu, CpuModel::V3);
        refused(&["--cpu", "v9"], &["best, v1, v2, v3, v4 and host"]);
        refused(&["--net", "tap="], &["none, nat, tap=NAME"]);
        refused(&["--net", "bridge"], &["none, nat, tap=NAME"]);
        assert_eq!(parse(&["--timeout", "0.5"]).unwrap().timeout, Some(Duration::from_millis(500)));
        refused(&["--timeout", "soon"], &["number of seconds"]);
        assert_eq!(parse(&["--exit-port", "0"]).unwrap().exit_port, 0);
        refused(&["--exit-port", "0x10000"], &["0 to 65535"]);
        refused(&["--memory", "1.5G"], &["512M"]);
        refused(&["--cpus", "0"], &["zero"]);
        refused(&["--accel", "hvf"], &["auto, kvm"]);
        assert_eq!(parse(&["--transport", "pci"]).unwrap().transport, TransportArg::Pci);
        refused(&["--transport", "ccw"], &["mmio, pci"]);
    }
}
