//! The command line.

use std::num::{NonZeroU16, NonZeroU32, NonZeroU64};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use vmcore::cpuid::CpuModel;
use vmdevices::block::{Format, Limits, Rate};
use vmdevices::virtio::CacheMode;

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
    /// iops=N[/BURST] and bps=SIZE[/BURST] (limits per second), queues=N (one per CPU unless said),
    /// serial=TEXT
    #[arg(long = "disk", value_name = "FILE[,OPTION...]", value_parser = disk)]
    pub disks: Vec<DiskArg>,

    /// Network card: none, or tap=NAME
    #[arg(long, value_name = "none|tap=NAME", default_value = "none", value_parser = net)]
    pub net: NetArg,

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

/// `--disk`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskArg {
    /// The image.
    pub path: PathBuf,
    /// What it is, if that was said.
    pub format: Option<Format>,
    /// The guest cannot write it.
    pub read_only: bool,
    /// Past the page cache.
    pub direct: bool,
    /// What it is on top of, from the top.
    pub backing: Vec<PathBuf>,
    /// Files that it is made of besides.
    pub extents: Vec<PathBuf>,
    /// When writes are stable.
    pub cache: CacheMode,
    /// Operations and bytes a second.
    pub limits: Limits,
    /// How many queues, if that was said.
    pub queues: Option<NonZeroU16>,
    /// What the guest sees as its serial number.
    pub serial: String,
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

/// `--net`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetArg {
    /// No network card.
    None,
    /// A card on this tap interface.
    Tap(String),
}

fn disk(text: &str) -> Result<DiskArg, String> {
    /// Stands for a doubled comma while the text is split at the others: no path contains it.
    const COMMA: &str = "\0";
    let text = text.replace(",,", COMMA);
    let mut parts = text.split(',').map(|part| part.replace(COMMA, ","));
    let path = parts.next().unwrap_or_default();
    if path.is_empty() {
        return Err("give the path of an image".into());
    }
    let mut disk = DiskArg { path: path.into(), ..DiskArg::default() };
    for option in parts {
        let (key, value) =
            option.split_once('=').map_or((option.as_str(), None), |(key, value)| (key, Some(value)));
        let wrong = |what: &str| format!("option {option:?}: {what}");
        let path = || value.filter(|value| !value.is_empty()).map(PathBuf::from).ok_or(wrong("give a path"));
        let text = || value.ok_or(wrong("give a value"));
        match key {
            "ro" if value.is_none() => disk.read_only = true,
            "direct" if value.is_none() => disk.direct = true,
            "format" => disk.format = Some(text()?.parse().map_err(|e: String| wrong(&e))?),
            "backing" => disk.backing.push(path()?),
            "extent" => disk.extents.push(path()?),
            "cache" => {
                disk.cache = match text()? {
                    "writeback" => CacheMode::WriteBack,
                    "writethrough" => CacheMode::WriteThrough,
                    "unsafe" => CacheMode::Unsafe,
                    _ => return Err(wrong("valid are: writeback, writethrough, unsafe")),
                }
            }
            "iops" => disk.limits.operations = Some(rate(text()?).map_err(|e| wrong(&e))?),
            "bps" => disk.limits.bytes = Some(rate(text()?).map_err(|e| wrong(&e))?),
            "queues" => {
                let count = text()?.parse().map_err(|_| wrong("give a number from 1 to 256"))?;
                disk.queues = Some(count);
            }
            "serial" => disk.serial = text()?.into(),
            _ => {
                return Err(format!(
                    "no option {option:?}; known are: format= ro backing= extent= cache= direct iops= bps= queues= \
                     serial=. A comma of the name is doubled"
                ));
            }
        }
    }
    Ok(disk)
}

/// So many a second, and at once after a pause: RATE or RATE/BURST.
fn rate(text: &str) -> Result<Rate, String> {
    match text.split_once('/') {
        None => size(text).map(Rate::new),
        Some((rate, burst)) => Ok(Rate { per_second: size(rate)?, burst: size(burst)? }),
    }
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

fn net(text: &str) -> Result<NetArg, String> {
    match text.split_once('=') {
        None if text == "none" => Ok(NetArg::None),
        Some(("tap", name)) if !name.is_empty() => Ok(NetArg::Tap(name.into())),
        _ => Err("valid are: none, tap=NAME".into()),
    }
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

    fn parse(arguments: &[&str]) -> Result<Args, String> {
        let line = ["vmrun", "--kernel", "k"].iter().chain(arguments);
        Args::try_parse_from(line).map_err(|e| e.to_string())
    }

    /// An error names the option, the value and what would do.
    #[track_caller]
    fn refused(arguments: &[&str], words: &[&str]) {
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
    fn disks_have_options_and_names_with_commas() {
        let args = parse(&["--disk", "a.img,ro", "--disk", "b", "--disk", "x,,y,,,ro"]).unwrap();
        let disks: Vec<_> = args.disks.iter().map(|d| (d.path.to_str().unwrap(), d.read_only)).collect();
        assert_eq!(disks, [("a.img", true), ("b", false), ("x,y,", true)]);
        refused(&["--disk", "a.img,rw"], &["\"rw\"", "known are: format= ro"]);
        refused(&["--disk", "a.img,ro,cache=none"], &["\"cache=none\"", "writeback"]);
        refused(&["--disk", ",ro"], &["path of an image"]);
        let line = "top,format=qcow2,backing=mid,backing=a,,b,cache=unsafe,direct,iops=500/1K,bps=10M,queues=4,serial=x";
        let disk = &parse(&["--disk", line]).unwrap().disks[0];
        assert_eq!(disk.backing, ["mid", "a,b"].map(PathBuf::from));
        assert_eq!((disk.format, disk.cache, disk.direct), (Some(Format::Qcow2), CacheMode::Unsafe, true));
        assert_eq!(disk.limits.operations, Some(Rate { per_second: 500, burst: 1024 }));
        assert_eq!(disk.limits.bytes, Some(Rate::new(10 << 20)));
        assert_eq!((disk.queues, disk.serial.as_str()), (NonZeroU16::new(4), "x"));
        for (bad, word) in [
            ("format=qcow", "raw, qcow2"),
            ("format", "value"),
            ("backing=", "path"),
            ("iops=many", "number"),
            ("queues=0", "1 to 256"),
            ("ro=1", "known are"),
        ] {
            refused(&["--disk", &format!("a,{bad}")], &[word]);
        }
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
        assert_eq!(parse(&["--net", "tap=vm0"]).unwrap().net, NetArg::Tap("vm0".into()));
        refused(&["--net", "tap="], &["none, tap=NAME"]);
        refused(&["--net", "bridge"], &["none, tap=NAME"]);
        assert_eq!(parse(&["--timeout", "0.5"]).unwrap().timeout, Some(Duration::from_millis(500)));
        refused(&["--timeout", "soon"], &["number of seconds"]);
        assert_eq!(parse(&["--exit-port", "0"]).unwrap().exit_port, 0);
        refused(&["--exit-port", "0x10000"], &["0 to 65535"]);
        refused(&["--memory", "1.5G"], &["512M"]);
        refused(&["--cpus", "0"], &["zero"]);
        refused(&["--accel", "hvf"], &["auto, kvm"]);
    }
}
