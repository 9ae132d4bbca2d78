//! Starting a virtual machine monitor: from just before exec to the first byte of a tiny guest on its
//! standard output, and the largest resident set, beside QEMU's microvm and a C program of raw ioctls
//! in the same run.
//!
//! `cargo bench -p vmcore-benches --bench startup [-- TURNS]`
//!
//! All boot the same machine size, 64 MiB and one vCPU, and the guest is the same few instructions;
//! vmrun and QEMU get it as one ELF file with a PVH entry. They take turns, so that what else the
//! host does meets all of them. In its turn each is started a few times in a row. The first start finds
//! the processor's caches full of another program and is shown apart, as "cold". Of the others minimum
//! and median are shown: on a busy host the minimum says what the program takes, the median what the
//! user waits.

use std::error::Error;
use std::ffi::OsString;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use vmcore_benches::{build_vmrun, wait};

/// What vmrun must stay below.
const TIME_BOUND: Duration = Duration::from_micros(2500);
const RSS_BOUND_KIB: u64 = 4096;

const TURNS: usize = 12;
/// How often a program is started in its turn, besides the cold start.
const WARM_STARTS: usize = 4;
/// What the guest writes to COM1.
const BYTE: u8 = b'!';
/// What it writes to the exit port is 0, and the status (0 << 1 | 1).
const STATUS: i32 = 1;
/// The least that a program can do.
const RAW: &str = "raw C";
const QEMU: &str = "qemu-system-x86_64";

/// One program to start.
struct Subject {
    name: &'static str,
    program: OsString,
    args: Vec<OsString>,
    cold: Vec<Start>,
    warm: Vec<Start>,
}

/// One start of it.
#[derive(Clone, Copy)]
struct Start {
    first_byte: Duration,
    end: Duration,
    peak_rss_kib: u64,
}

impl Subject {
    fn new<'a>(
        name: &'static str,
        program: impl Into<OsString>,
        args: impl IntoIterator<Item = &'a str>,
    ) -> Self {
        let args = args.into_iter().map(OsString::from).collect();
        Self { name, program: program.into(), args, cold: Vec::new(), warm: Vec::new() }
    }

    fn with_kernel(mut self, option: &str, kernel: &Path) -> Self {
        self.args.extend([option.into(), kernel.into()]);
        self
    }

    fn start(&self) -> Result<Start, Box<dyn Error>> {
        let mut command = Command::new(&self.program);
        command.args(&self.args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let begin = Instant::now();
        let mut child = command.spawn().map_err(|e| format!("{}: {e}", self.program.display()))?;
        let mut byte = [0];
        let read = child.stdout.take().ok_or("no pipe")?.read_exact(&mut byte);
        let first_byte = begin.elapsed();
        let ended = wait(child.id())?;
        let end = begin.elapsed();
        if read.is_err() || byte[0] != BYTE || ended.status != Some(STATUS) {
            let command = format!("{command:?}");
            return Err(format!("{command} wrote {byte:?} and ended with status {:?}", ended.status).into());
        }
        Ok(Start { first_byte, end, peak_rss_kib: ended.peak_rss_kib })
    }

    fn take_turn(&mut self) -> Result<(), Box<dyn Error>> {
        self.cold.push(self.start()?);
        for _ in 0..WARM_STARTS {
            self.warm.push(self.start()?);
        }
        Ok(())
    }

    fn peak_rss_kib(&self) -> u64 {
        self.cold.iter().chain(&self.warm).map(|start| start.peak_rss_kib).max().unwrap_or(0)
    }
}

/// The shortest and the middle one.
fn minimum_and_median(starts: &[Start], of: fn(&Start) -> Duration) -> (Duration, Duration) {
    let mut times: Vec<_> = starts.iter().map(of).collect();
    times.sort_unstable();
    (times[0], times[times.len() / 2])
}

/// An ELF file for 32-bit processors with a PVH entry (Xen's note XEN_ELFNOTE_PHYS32_ENTRY): writes
/// [`BYTE`] to COM1, 0 to port 0xf4, and halts.
fn tiny_elf() -> Vec<u8> {
    const BASE: u32 = 1 << 20;
    const CODE_AT: u32 = 4096;
    const HEADER: u16 = 52;
    const SEGMENT: u16 = 32;
    const NOTE_AT: u32 = HEADER as u32 + 2 * SEGMENT as u32;
    // mov dx, 0x3f8; mov al, BYTE; out dx, al; mov dx, 0xf4; mov al, 0; out dx, al; again: hlt; jmp again
    let code = [
        0x66, 0xba, 0xf8, 0x03, 0xb0, BYTE, 0xee, 0x66, 0xba, 0xf4, 0x00, 0xb0, 0x00, 0xee, 0xf4, 0xeb, 0xfd,
    ];
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
    let halves = |halves: &[u16]| halves.iter().flat_map(|half| half.to_le_bytes()).collect::<Vec<_>>();
    let note = [words(&[4, 4, 18]), b"Xen\0".to_vec(), words(&[BASE])].concat();
    let (code_len, note_len) = (code.len() as u32, note.len() as u32);
    let mut elf = [
        // 32-bit, little-endian, version 1; an executable for the i386.
        b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec(),
        halves(&[2, 3]),
        words(&[1, BASE, HEADER.into(), 0, 0]),
        halves(&[HEADER, SEGMENT, 2, 0, 0, 0]),
        // To be loaded, readable and executable; a note.
        words(&[1, CODE_AT, BASE, BASE, code_len, code_len, 5, 4096]),
        words(&[4, NOTE_AT, 0, 0, note_len, note_len, 4, 4]),
        note,
    ]
    .concat();
    elf.resize(CODE_AT as usize, 0);
    elf.extend(code);
    elf
}

fn subjects(kernel: &Path) -> Result<Vec<Subject>, Box<dyn Error>> {
    let vmrun = build_vmrun()?;
    let mut subjects = vec![
        Subject::new("vmrun --accel kvm", &vmrun, ["--accel", "kvm", "--memory", "64M"])
            .with_kernel("--kernel", kernel),
        Subject::new("vmrun", &vmrun, ["--memory", "64M"]).with_kernel("--kernel", kernel),
        Subject::new(RAW, env!("RAW_START"), []),
        Subject::new("raw C, a PC", env!("RAW_START"), ["pc"]),
    ];
    // With nothing that microvm can do without.
    let qemu = "-M microvm -accel kvm -m 64 -nodefaults -no-user-config -display none -serial stdio \
                -device isa-debug-exit,iobase=0xf4,iosize=4";
    let qemu = Subject::new("QEMU microvm", QEMU, qemu.split_whitespace()).with_kernel("-kernel", kernel);
    match qemu.start() {
        Ok(_) => subjects.push(qemu),
        Err(error) => println!("no comparison with QEMU: {error}"),
    }
    Ok(subjects)
}

fn main() -> Result<(), Box<dyn Error>> {
    if let Err(error) = vmcore::Vm::bare(vmcore::Accel::Kvm) {
        println!("skipped: {error}");
        return Ok(());
    }
    // `cargo bench` adds --bench.
    let turns = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(TURNS).max(1);
    let kernel = std::env::temp_dir().join(format!("vmcore-startup-{}.elf", std::process::id()));
    std::fs::write(&kernel, tiny_elf())?;
    let measured = measure(&kernel, turns);
    std::fs::remove_file(&kernel)?;
    report(&measured?);
    Ok(())
}

fn measure(kernel: &Path, turns: usize) -> Result<Vec<Subject>, Box<dyn Error>> {
    let mut subjects = subjects(kernel)?;
    for turn in 0..turns {
        // Nobody always comes behind the same one: what that leaves behind must not count.
        let first = turn % subjects.len();
        let (later, sooner) = subjects.split_at_mut(first);
        sooner.iter_mut().chain(later).try_for_each(Subject::take_turn)?;
    }
    Ok(subjects)
}

fn report(subjects: &[Subject]) {
    let (cold, warm) = (subjects[0].cold.len(), subjects[0].warm.len());
    println!("process start to first console byte, 64 MiB; {warm} warm starts and {cold} cold ones of each:");
    println!(
        "{:<18} {:>10} {:>10} {:>11} {:>13} {:>12} {:>14}",
        "", "minimum", "median", "vmrun / it", "cold, median", "end, median", "peak RSS, KiB"
    );
    let first_byte = |start: &Start| start.first_byte;
    let (_, ours) = minimum_and_median(&subjects[0].warm, first_byte);
    for subject in subjects {
        let (minimum, median) = minimum_and_median(&subject.warm, first_byte);
        let (_, cold) = minimum_and_median(&subject.cold, first_byte);
        let (_, end) = minimum_and_median(&subject.warm, |start| start.end);
        let ratio = ours.as_secs_f64() / median.as_secs_f64();
        println!(
            "{:<18} {minimum:>10.2?} {median:>10.2?} {ratio:>11.3} {cold:>13.2?} {end:>12.2?} {:>14}",
            subject.name,
            subject.peak_rss_kib()
        );
    }
    // A child begins with its parent's memory, and that counts as its own.
    println!("less peak RSS than this program's own cannot be seen");
    if let Some(raw) = subjects.iter().find(|subject| subject.name == RAW) {
        let (minimum, median) = minimum_and_median(&raw.warm, first_byte);
        let busy = median.as_secs_f64() / minimum.as_secs_f64();
        if busy > 1.3 {
            println!(
                "the host is busy: {RAW} has a median of {busy:.1} times its minimum; believe the minima"
            );
        }
    }
    for subject in &subjects[..2] {
        let (minimum, median) = minimum_and_median(&subject.warm, first_byte);
        let held = |holds| if holds { "holds" } else { "DOES NOT HOLD" };
        println!(
            "{}: at most {TIME_BOUND:.1?}: {} for the median, {} for the minimum; at most {RSS_BOUND_KIB} KiB: {}",
            subject.name,
            held(median <= TIME_BOUND),
            held(minimum <= TIME_BOUND),
            held(subject.peak_rss_kib() <= RSS_BOUND_KIB),
        );
    }
}
