//! A guest at its shell, under vmrun or under QEMU, on the same backend.

use std::collections::BTreeMap;
use std::error::Error;
use std::ffi::OsString;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use vmcore_benches::build_vmrun;

const MEMORY_MIB: u64 = 512;
/// A guest that takes longer to answer has failed.
const TIMEOUT: Duration = Duration::from_secs(180);

/// Who runs the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Vmcore,
    Qemu,
}

impl Side {
    pub const BOTH: [Self; 2] = [Self::Vmcore, Self::Qemu];

    pub fn name(self) -> &'static str {
        match self {
            Self::Vmcore => "vmcore",
            Self::Qemu => "QEMU",
        }
    }
}

/// What the host gives to all guests.
pub struct Host {
    /// Where the guests are that `make guests` has made.
    pub guests: PathBuf,
    /// For images and sockets: in memory, where the host has such a place.
    pub scratch: PathBuf,
    vmrun: PathBuf,
    /// KVM, instead of the software CPU and TCG.
    pub kvm: bool,
}

impl Host {
    /// Finds the guests and builds vmrun; `$VMCORE_VMRUN` is one that is there already, which the rig needs.
    ///
    /// # Errors
    /// Where something is missing.
    pub fn new() -> Result<Self, Box<dyn Error>> {
        let guests = std::env::var_os("VMCORE_GUESTS")
            .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guests"), PathBuf::from);
        for needed in ["cloud/vmlinux", "cloud/initrd.img", "disks.ext4"] {
            let path = guests.join(needed);
            if !path.exists() {
                return Err(format!("no {} (make guests)", path.display()).into());
            }
        }
        let accel = std::env::var("VMCORE_ACCEL").unwrap_or_else(|_| "soft".into());
        let kvm = match accel.as_str() {
            "soft" => false,
            "kvm" => true,
            other => return Err(format!("VMCORE_ACCEL={other}: give soft or kvm").into()),
        };
        let shm = Path::new("/dev/shm");
        let parent = if shm.is_dir() { shm.into() } else { std::env::temp_dir() };
        let scratch = parent.join(format!("vmcore-bench-{}", std::process::id()));
        std::fs::create_dir_all(&scratch)?;
        // A copy: others may have the image open, and locked.
        std::fs::copy(guests.join("disks.ext4"), scratch.join("root"))?;
        let vmrun = std::env::var_os("VMCORE_VMRUN").map_or_else(build_vmrun, |path| Ok(path.into()))?;
        Ok(Self { guests, scratch, vmrun, kvm })
    }

    pub fn backends(&self) -> &'static str {
        if self.kvm { "KVM, vmrun beside QEMU" } else { "vmrun's software CPU beside QEMU's TCG" }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.scratch));
    }
}

/// What a guest has besides a processor, memory and a serial port. All is on virtio-pci.
#[derive(Default)]
pub struct Machine {
    /// Of its kernel's command line.
    pub words: String,
    /// Boots from the root file system with fio and iperf3 instead of the initrd alone.
    pub root: bool,
    /// Instead of the usual one.
    pub initrd: Option<PathBuf>,
    /// vmrun's and QEMU's options for the devices to be measured.
    pub vmrun: Vec<OsString>,
    pub qemu: Vec<OsString>,
}

impl Machine {
    fn command(&self, host: &Host, side: Side) -> Command {
        let cloud = host.guests.join("cloud");
        let (kernel, root) = (cloud.join("vmlinux"), host.scratch.join("root"));
        let initrd = self.initrd.clone().unwrap_or_else(|| cloud.join("initrd.img"));
        let mut words = format!("console=ttyS0 panic=-1 quiet vmtest=shell {}", self.words);
        if self.root {
            words += " root=/dev/vda ro rootflags=noload";
        }
        match side {
            Side::Vmcore => {
                let mut command = Command::new(&host.vmrun);
                let accel = if host.kvm { "kvm" } else { "soft" };
                command.args(["--accel", accel, "--transport", "pci", "--memory"]);
                command.arg(format!("{MEMORY_MIB}M")).arg("--kernel").arg(kernel);
                command.arg("--initrd").arg(initrd).arg("--cmdline").arg(words);
                if self.root {
                    let mut disk = root.into_os_string();
                    disk.push(",format=raw,ro");
                    command.arg("--disk").arg(disk);
                }
                command.args(&self.vmrun);
                command
            }
            Side::Qemu => {
                let mut command = Command::new("qemu-system-x86_64");
                let processor = if host.kvm { "-accel kvm -cpu host" } else { "-accel tcg -cpu max" };
                command.args(processor.split(' ')).arg("-m").arg(format!("{MEMORY_MIB}M"));
                let fixed = "-M pc -nodefaults -no-user-config -display none -serial stdio -no-reboot \
                             -object iothread,id=io";
                command.args(fixed.split_whitespace()).arg("-kernel").arg(kernel);
                command.arg("-initrd").arg(initrd).arg("-append").arg(words);
                if self.root {
                    let mut drive = OsString::from("id=root,if=none,format=raw,readonly=on,file=");
                    drive.push(root);
                    command.arg("-drive").arg(drive).args(["-device", "virtio-blk-pci,drive=root"]);
                }
                command.args(&self.qemu);
                command
            }
        }
    }

    /// Boots it and waits for its shell.
    ///
    /// # Errors
    /// Where it does not come to that.
    pub fn boot(&self, host: &Host, side: Side) -> Result<Session, Box<dyn Error>> {
        let mut command = self.command(host, side);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(if std::env::var_os("VMCORE_BENCH_VERBOSE").is_some() {
                Stdio::inherit()
            } else {
                Stdio::null()
            })
            .spawn()
            .map_err(|e| format!("{}: {e}", command.get_program().display()))?;
        let mut console = child.stdout.take().ok_or("no pipe")?;
        let keys = child.stdin.take().ok_or("no pipe")?;
        let (sender, parts) = mpsc::channel();
        // It ends with the program.
        std::thread::spawn(move || {
            let mut part = [0; 4096];
            while let Ok(len @ 1..) = console.read(&mut part) {
                if sender.send(part[..len].to_vec()).is_err() {
                    break;
                }
            }
        });
        let mut session = Session { child, keys, parts, seen: Vec::new(), side };
        // What is typed before the shell's prompt may be lost.
        session.expect("# ")?;
        session
            .type_line("stty -echo; PS1=; bind 'set enable-bracketed-paste off' 2>/dev/null; echo re''ady")?;
        session.expect("ready")?;
        Ok(session)
    }
}

/// A running guest. Dropping it ends it.
pub struct Session {
    child: Child,
    keys: ChildStdin,
    parts: Receiver<Vec<u8>>,
    /// What it has written and nobody has asked for yet.
    seen: Vec<u8>,
    side: Side,
}

impl Session {
    fn type_line(&mut self, line: &str) -> Result<(), Box<dyn Error>> {
        Ok(self.keys.write_all(format!("{line}\n").as_bytes())?)
    }

    /// What was written up to `mark`, which is taken too.
    fn expect(&mut self, mark: &str) -> Result<String, Box<dyn Error>> {
        let begin = Instant::now();
        loop {
            let found = self.seen.windows(mark.len()).position(|window| window == mark.as_bytes());
            if let Some(at) = found {
                let text = String::from_utf8_lossy(&self.seen[..at]).into_owned();
                self.seen.drain(..at + mark.len());
                return Ok(text);
            }
            match self.parts.recv_timeout(TIMEOUT.saturating_sub(begin.elapsed())) {
                Ok(part) => self.seen.extend(part),
                Err(_) => {
                    let text = String::from_utf8_lossy(&self.seen);
                    let tail: Vec<&str> = text.lines().rev().take(8).collect();
                    let tail: Vec<&str> = tail.into_iter().rev().collect();
                    let who = self.side.name();
                    return Err(format!("{who}: no {mark:?} from the guest: ...{}", tail.join("\n")).into());
                }
            }
        }
    }

    /// Has the shell do `command`; gives what it wrote.
    ///
    /// # Errors
    /// Where no end comes.
    pub fn ask(&mut self, command: &str) -> Result<String, Box<dyn Error>> {
        self.type_line(&format!("{{ {command}; }} 2>&1; echo END''MARK"))?;
        self.expect("ENDMARK")
    }

    /// How long the threads of its program have used a processor, by their names.
    pub fn threads(&self) -> Threads {
        let mut seconds = BTreeMap::new();
        for task in
            std::fs::read_dir(format!("/proc/{}/task", self.child.id())).into_iter().flatten().flatten()
        {
            // proc_pid_stat(5): the name is in parentheses; utime and stime are the 12th and 13th fields behind it.
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            let Some((name, fields)) = stat.split_once('(').and_then(|(_, rest)| rest.rsplit_once(')'))
            else {
                continue;
            };
            let ticks: f64 = fields
                .split_whitespace()
                .skip(11)
                .take(2)
                .filter_map(|field| field.parse::<f64>().ok())
                .sum();
            *seconds.entry(name.to_owned()).or_default() += ticks / TICKS;
        }
        Threads { at: Instant::now(), seconds }
    }
}

/// `sysconf(_SC_CLK_TCK)`, on every Linux of x86.
const TICKS: f64 = 100.0;

/// What [`Session::threads`] saw.
pub struct Threads {
    at: Instant,
    seconds: BTreeMap<String, f64>,
}

impl Threads {
    /// How much of a processor each thread has used until `now`, those that used any.
    pub fn until(&self, now: &Self) -> String {
        let passed = now.at.duration_since(self.at).as_secs_f64();
        let share = |(name, seconds): (&String, &f64)| {
            let used = (seconds - self.seconds.get(name).unwrap_or(&0.0)) / passed;
            (used >= 0.05).then(|| format!("{name} {used:.2}"))
        };
        now.seconds.iter().filter_map(share).collect::<Vec<_>>().join(", ")
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// The figures of both sides, by row.
pub struct Table {
    rows: Vec<Row>,
}

struct Row {
    what: String,
    unit: &'static str,
    figures: [Vec<f64>; 2],
    /// What their threads did meanwhile, the last time.
    threads: [String; 2],
}

impl Table {
    pub fn new() -> Self {
        Self { rows: Vec::new() }
    }

    /// Adds a figure: more is better.
    pub fn add(&mut self, what: &str, unit: &'static str, side: Side, figure: f64, threads: String) {
        let known = self.rows.iter().position(|row| row.what == what);
        let at = known.unwrap_or_else(|| {
            self.rows.push(Row {
                what: what.into(),
                unit,
                figures: [Vec::new(), Vec::new()],
                threads: Default::default(),
            });
            self.rows.len() - 1
        });
        self.rows[at].figures[side as usize].push(figure);
        self.rows[at].threads[side as usize] = threads;
    }

    /// Prints the medians, how many times QEMU's figure ours is, and where that is less than once what share of a
    /// processor the threads of both had: one at 1 is what limits its side.
    pub fn print(&self, title: &str) {
        println!("{title}");
        println!("{:<44}{:>12}{:>12}{:>8}  vmcore / QEMU", "", "vmcore", "QEMU", "");
        for Row { what, unit, figures, threads: [ours_by, theirs_by] } in &self.rows {
            let [ours, theirs] = figures.each_ref().map(|figures| median(figures));
            let text = |figure: Option<f64>| figure.map_or("-".into(), readable);
            print!("{what:<44}{:>12}{:>12}{unit:>8}", text(ours), text(theirs));
            match (ours, theirs) {
                (Some(ours), Some(theirs)) if theirs > 0.0 => {
                    let ratio = ours / theirs;
                    println!("  {ratio:.2}{}", if ratio < 1.0 { ", behind" } else { "" });
                    if ratio < 1.0 {
                        println!("    vmcore: {ours_by}; QEMU: {theirs_by}");
                    }
                }
                _ => println!(),
            }
        }
    }
}

fn median(figures: &[f64]) -> Option<f64> {
    let mut sorted = figures.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied()
}

fn readable(figure: f64) -> String {
    if figure < 100.0 { format!("{figure:.2}") } else { format!("{figure:.0}") }
}

/// Has each side act once in each round; neither always goes first. A side that fails is told of and not
/// asked again.
pub fn rounds(count: usize, mut act: impl FnMut(Side) -> Result<(), Box<dyn Error>>) {
    let mut failed = [false; 2];
    for round in 0..count {
        for n in 0..2 {
            let side = Side::BOTH[(round + n) % 2];
            if failed[side as usize] {
                continue;
            }
            if let Err(error) = act(side) {
                println!("SKIPPED: {} from round {round} on: {error}", side.name());
                failed[side as usize] = true;
            }
        }
    }
}
