//! The command line.

use std::num::{NonZeroU32, NonZeroU64};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use vmcore::cpuid::CpuModel;

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

    /// A disk image, raw; ",ro" keeps the guest from writing it, ",," is a comma of the name. May be
    /// given several times
    #[arg(long = "disk", value_name = "FILE[,ro]", value_parser = disk)]
    pub disks: Vec<DiskArg>,

    /// Network card: on a tap, on an open descriptor of a tap or Unix socket, or on what listens at a Unix
    /// socket (passt, QEMU). Options: mac=02:00:00:00:00:01, queues=N (of a tap), mtu=BYTES, pcap=FILE
    /// (packets recorded), bps=RATE (bits per second in each direction: 100M). A comma of a name is doubled
    #[arg(long, value_name = "none|tap=NAME|fd=N|unix=PATH[,OPTION...]", default_value = "none", value_parser = net)]
    pub net: NetArg,

    /// What disks and network card are behind: virtio-mmio, or virtio-pci
    #[arg(long, value_enum, default_value_t = TransportArg::Mmio)]
    pub transport: TransportArg,

    /// Sockets to the guest: programs connect to PATH and send "CONNECT PORT", the guest reaches those
    /// that listen on PATH_PORT
    #[arg(long, value_name = "cid=N,path=PATH", value_parser = vsock)]
    pub vsock: Option<VsockArg>,

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

/// `--disk`.
#[derive(Clone, Debug)]
pub struct DiskArg {
    /// The image.
    pub path: PathBuf,
    /// The guest cannot write it.
    pub read_only: bool,
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
    /// A card.
    Card(CardArg),
}

/// A network card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CardArg {
    /// What it is connected to.
    pub network: Network,
    /// Its address, if not a random one.
    pub mac: Option<[u8; 6]>,
    /// Pairs of queues.
    pub queues: u16,
    /// The largest IP packet.
    pub mtu: Option<u16>,
    /// Where packets are recorded.
    pub pcap: Option<PathBuf>,
    /// Most bits per second of each direction.
    pub bps: Option<NonZeroU64>,
}

/// What a network card is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Network {
    /// A tap interface of this name.
    Tap(String),
    /// A tap or Unix socket that is open already.
    Fd(i32),
    /// A Unix stream socket that somebody listens on.
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

fn disk(text: &str) -> Result<DiskArg, String> {
    let mut parts = parts(text);
    let path = parts.next().unwrap_or_default();
    if path.is_empty() {
        return Err("give the path of an image".into());
    }
    let mut read_only = false;
    for option in parts {
        match option.as_str() {
            "ro" => read_only = true,
            other => {
                return Err(format!("no option {other:?}; known is: ro. A comma of the name is doubled"));
            }
        }
    }
    Ok(DiskArg { path: path.into(), read_only })
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
    const KINDS: &str = "valid are: none, tap=NAME, fd=N, unix=PATH";
    let mut parts = parts(text);
    let kind = parts.next().unwrap_or_default();
    let network = match kind.split_once('=') {
        None if kind == "none" && parts.len() == 0 => return Ok(NetArg::None),
        Some((_, "")) | None => return Err(KINDS.into()),
        Some(("tap", name)) => Network::Tap(name.into()),
        Some(("unix", path)) => Network::Unix(path.into()),
        Some(("fd", number)) => {
            let number = number.parse().ok().filter(|&fd| fd > 2);
            Network::Fd(number.ok_or("give the number of an open descriptor, 3 or more: fd=3")?)
        }
        _ => return Err(KINDS.into()),
    };
    let mut card = CardArg { network, mac: None, queues: 1, mtu: None, pcap: None, bps: None };
    for option in parts {
        let invalid = |fix: &str| format!("{option:?}: {fix}");
        match option.split_once('=').unwrap_or_default() {
            ("mac", text) => card.mac = Some(mac(text).ok_or(invalid("give six bytes: 02:00:00:00:00:01"))?),
            ("queues", text) => {
                let queues = text.parse().ok().filter(|queues| (1..=256).contains(queues));
                card.queues = queues.ok_or(invalid("give 1 to 256 queues"))?;
            }
            ("mtu", text) => card.mtu = Some(text.parse().map_err(|_| invalid("give 68 to 65535 bytes"))?),
            ("pcap", path) if !path.is_empty() => card.pcap = Some(path.into()),
            ("bps", text) => card.bps = Some(bits(text).ok_or(invalid("give bits per second: 100M"))?),
            _ => {
                return Err(format!(
                    "no option {option:?}; known are: mac=, queues=, mtu=, pcap=, bps=. A comma of a name is doubled"
                ));
            }
        }
    }
    if card.queues > 1 && !matches!(card.network, Network::Tap(_)) {
        return Err("several queues are a tap's: tap=NAME,queues=N".into());
    }
    Ok(NetArg::Card(card))
}

fn mac(text: &str) -> Option<[u8; 6]> {
    let bytes = text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok().filter(|_| byte.len() == 2));
    bytes.collect::<Option<Vec<_>>>()?.try_into().ok()
}

/// Bits per second, with a decimal unit: as speeds of networks are given.
fn bits(text: &str) -> Option<NonZeroU64> {
    let (digits, unit) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 1_000),
        b'M' | b'm' => (&text[..text.len() - 1], 1_000_000),
        b'G' | b'g' => (&text[..text.len() - 1], 1_000_000_000),
        _ => (text, 1),
    };
    NonZeroU64::new(digits.parse::<u64>().ok()?.checked_mul(unit)?)
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
        refused(&["--disk", "a.img,rw"], &["\"rw\"", "known is: ro"]);
        refused(&["--disk", "a.img,ro,cache=none"], &["\"cache=none\""]);
        refused(&["--disk", ",ro"], &["path of an image"]);
    }

    #[test]
    fn cards_are_on_taps_descriptors_and_sockets() {
        let card = |text| match parse(&["--net", text]).unwrap().net {
            NetArg::Card(card) => card,
            NetArg::None => panic!("{text}"),
        };
        let plain = |network| CardArg { network, mac: None, queues: 1, mtu: None, pcap: None, bps: None };
        assert_eq!(card("tap=vm0"), plain(Network::Tap("vm0".into())));
        assert_eq!(card("fd=3"), plain(Network::Fd(3)));
        assert_eq!(card("unix=/run/a,,b"), plain(Network::Unix("/run/a,b".into())));
        let all = card("tap=vm0,mac=02:00:00:00:0a:ff,queues=4,mtu=9000,pcap=a,,b=c.pcap,bps=100M");
        assert_eq!((all.mac, all.queues, all.mtu), (Some([2, 0, 0, 0, 10, 255]), 4, Some(9000)));
        assert_eq!((all.pcap, all.bps), (Some("a,b=c.pcap".into()), NonZeroU64::new(100_000_000)));
        for (bad, words) in [
            ("none,mtu=1500", "tap=NAME"),
            ("fd=2", "3 or more"),
            ("fd=x", "3 or more"),
            ("tap=a,mac=02:00:00:00:00", "six bytes"),
            ("tap=a,mac=2:0:0:0:0:1", "six bytes"),
            ("tap=a,queues=0", "1 to 256"),
            ("tap=a,mtu=70000", "68 to 65535"),
            ("tap=a,pcap=", "known are"),
            ("tap=a,bps=0", "100M"),
            ("tap=a,bps=99999999999G", "100M"),
            ("tap=a,speed=1", "known are"),
            ("tap=a,mac", "known are"),
            ("unix=a,queues=2", "a tap's"),
        ] {
            refused(&["--net", bad], &[words]);
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
        refused(&["--net", "tap="], &["none, tap=NAME"]);
        refused(&["--net", "bridge"], &["none, tap=NAME"]);
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
