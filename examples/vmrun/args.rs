//! The command line.

use std::net::{IpAddr, SocketAddr};
use std::num::{NonZeroU32, NonZeroU64};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use vmcore::cpuid::CpuModel;
use vmdevices::net::{Action, Destination, Forward, NatError};

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

    /// Network card: none, a tap interface, or a NAT in this process, which needs no privilege. Options
    /// of nat, each any number of times: forward=tcp:8080:80, allow=DEST and deny=DEST (in their order),
    /// otherwise=deny, dns=ADDRESS, mtu=BYTES, host (the gateway stands for this host's loopback address),
    /// where DEST is any, 10.0.0.0/8 or tcp:10.0.0.0/8:80-90
    #[arg(long, value_name = "none|tap=NAME|nat[,OPTION..]", default_value = "none", value_parser = net)]
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
    /// A card on this tap interface.
    Tap(String),
    /// A card on the built-in NAT.
    Nat(NatArgs),
}

/// Options of `--net nat`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NatArgs {
    /// Ports that lead to the guest.
    pub forwards: Vec<Forward>,
    /// What the guest may reach, in order.
    pub rules: Vec<(Action, Destination)>,
    /// What becomes of the rest.
    pub otherwise: Option<Action>,
    /// Resolvers; those of this host where there are none.
    pub dns: Vec<SocketAddr>,
    /// Largest IP packet.
    pub mtu: Option<u16>,
    /// The gateway's address stands for this host's loopback address.
    pub host: bool,
}

fn disk(text: &str) -> Result<DiskArg, String> {
    /// Stands for a doubled comma while the text is split at the others: no path contains it.
    const COMMA: &str = "\0";
    let text = text.replace(",,", COMMA);
    let mut parts = text.split(',');
    let path = parts.next().unwrap_or_default().replace(COMMA, ",");
    if path.is_empty() {
        return Err("give the path of an image".into());
    }
    let mut read_only = false;
    for option in parts {
        match option {
            "ro" => read_only = true,
            other => {
                let other = other.replace(COMMA, ",");
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
    match text.split_once('=') {
        None if text == "none" => Ok(NetArg::None),
        Some(("tap", name)) if !name.is_empty() => Ok(NetArg::Tap(name.into())),
        _ if text == "nat" || text.starts_with("nat,") => nat(text).map(NetArg::Nat),
        _ => Err("valid are: none, tap=NAME, nat[,OPTION..]".into()),
    }
}

fn nat(text: &str) -> Result<NatArgs, String> {
    let mut args = NatArgs::default();
    let action = |text: &str| match text {
        "allow" => Ok(Action::Allow),
        "deny" => Ok(Action::Deny),
        other => Err(format!("{other:?} is no action: give allow or deny")),
    };
    let said = |error: NatError| error.to_string();
    for option in text.split(',').skip(1) {
        match option.split_once('=') {
            Some(("forward", forward)) => args.forwards.push(forward.parse().map_err(said)?),
            Some((rule @ ("allow" | "deny"), destination)) => {
                args.rules.push((action(rule)?, destination.parse().map_err(said)?));
            }
            Some(("otherwise", text)) => args.otherwise = Some(action(text)?),
            Some(("dns", server)) => {
                let address = server.parse().map(|address: IpAddr| SocketAddr::new(address, 53));
                let address = address.or_else(|_| server.parse());
                args.dns.push(
                    address
                        .map_err(|_| format!("{server:?} is no resolver: give 192.0.2.53 or [::1]:5353"))?,
                );
            }
            Some(("mtu", bytes)) => {
                let bytes = bytes.parse().map_err(|_| format!("{bytes:?} is no MTU: give bytes: 1500"))?;
                args.mtu = Some(bytes);
            }
            None if option == "host" => args.host = true,
            _ => {
                return Err(format!(
                    "no option {option:?}; known are: forward=, allow=, deny=, otherwise=, dns=, mtu=, host"
                ));
            }
        }
    }
    Ok(args)
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
    fn consoles_are_terminals_files_and_sockets() {
        let console = |text| parse(&["--console", text]).unwrap().console;
        assert_eq!(console("stdio"), ConsoleArg::Stdio);
        assert_eq!(console("out.log"), ConsoleArg::File("out.log".into()));
        assert_eq!(console("./a=b"), ConsoleArg::File("./a=b".into()));
        assert_eq!(console("unix=/run/vm.sock"), ConsoleArg::Unix("/run/vm.sock".into()));
        refused(&["--console", "unix="], &["unix=PATH"]);
    }

    #[test]
    fn a_nat_has_forwards_rules_and_resolvers() {
        assert_eq!(parse(&["--net", "nat"]).unwrap().net, NetArg::Nat(NatArgs::default()));
        let text = "nat,forward=tcp:8080:80,forward=udp:[::1]:53:53,deny=tcp:any:25,allow=10.0.0.0/8,otherwise=deny,dns=192.0.2.53,dns=[::1]:5353,mtu=9000,host";
        let NetArg::Nat(nat) = parse(&["--net", text]).unwrap().net else { panic!("no NAT") };
        let forwards: Vec<_> = nat.forwards.iter().map(ToString::to_string).collect();
        assert_eq!(forwards, ["tcp:127.0.0.1:8080:80", "udp:[::1]:53:53"]);
        let rules: Vec<_> = nat.rules.iter().map(|(action, to)| (*action, to.to_string())).collect();
        assert_eq!(rules, [(Action::Deny, "tcp:any:25".into()), (Action::Allow, "10.0.0.0/8".into())]);
        assert_eq!(nat.dns, ["192.0.2.53:53", "[::1]:5353"].map(|text| text.parse().unwrap()));
        assert_eq!((nat.otherwise, nat.mtu, nat.host), (Some(Action::Deny), Some(9000), true));
        refused(&["--net", "nat,forward=80"], &["tcp:8080:80"]);
        refused(&["--net", "nat,deny=10.0.0.1/8"], &["10.0.0.0/8"]);
        refused(&["--net", "nat,otherwise=maybe"], &["allow or deny"]);
        refused(&["--net", "nat,dns=one"], &["192.0.2.53"]);
        refused(&["--net", "nat,speed=1"], &["forward=", "otherwise="]);
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
