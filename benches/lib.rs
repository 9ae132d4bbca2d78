//! What the benchmarks share: the C program, medians, and a way to print both sides of a comparison.

use std::error::Error;
use std::ffi::c_int;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

/// The C program's VM; its layout is `struct raw_vm` in `raw.h`.
#[repr(C)]
#[derive(Debug)]
struct RawVmFields {
    fds: [c_int; 4],
    memory_size: u64,
    memory: *mut u8,
    run: *mut u8,
}

unsafe extern "C" {
    fn raw_open(vm: *mut RawVmFields, memory_size: u64, code: *const u8, code_size: u64, pc: c_int) -> c_int;
    fn raw_run(vm: *mut RawVmFields, accesses: u64) -> c_int;
    fn raw_close(vm: *mut RawVmFields);
}

/// A VM of the raw-ioctl C program.
#[derive(Debug)]
pub struct RawVm(RawVmFields);

impl RawVm {
    /// One vCPU in real mode at address 0 of `memory_size` bytes that begin with `code`; with `pc` also
    /// interrupt controllers, a timer and CPUID.
    ///
    /// # Panics
    /// Where KVM refuses.
    pub fn new(memory_size: u64, code: &[u8], pc: bool) -> Self {
        let mut fields = RawVmFields {
            fds: [0; 4],
            memory_size: 0,
            memory: std::ptr::null_mut(),
            run: std::ptr::null_mut(),
        };
        // SAFETY: `fields` has the layout that raw.h declares, and `code` is as long as said.
        let result =
            unsafe { raw_open(&raw mut fields, memory_size, code.as_ptr(), code.len() as u64, pc.into()) };
        assert_eq!(result, 0, "raw_open failed at step {result}");
        Self(fields)
    }

    /// Runs until HLT, or for this many port and MMIO accesses where it is not 0.
    ///
    /// # Panics
    /// Where the guest does anything else.
    pub fn run(&mut self, accesses: u64) {
        // SAFETY: the VM was opened by raw_open and not yet closed.
        let result = unsafe { raw_run(&raw mut self.0, accesses) };
        assert_eq!(result, 0, "raw_run: {result}");
    }
}

impl Drop for RawVm {
    fn drop(&mut self) {
        // SAFETY: the VM was opened by raw_open and is closed once.
        unsafe { raw_close(&raw mut self.0) }
    }
}

/// How a process ended, and what it took.
#[derive(Clone, Copy, Debug)]
pub struct Ended {
    /// Its status, where it exited.
    pub status: Option<i32>,
    /// Processor time of all its threads, in the kernel too.
    pub cpu: Duration,
    /// Its largest resident set in KiB.
    pub peak_rss_kib: u64,
}

/// Waits for process `pid` to end.
///
/// # Errors
/// Where it is no child of this process.
pub fn wait(pid: u32) -> Result<Ended, Box<dyn Error>> {
    let (mut status, pid) = (0, libc::pid_t::try_from(pid)?);
    // SAFETY: rusage is plain integers, for which zeros are valid.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to locals of the types that the call fills.
    while unsafe { libc::wait4(pid, &raw mut status, 0, &raw mut usage) } < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error.into());
        }
    }
    let status = libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status));
    let time = |t: libc::timeval| Duration::new(t.tv_sec.cast_unsigned(), t.tv_usec as u32 * 1000);
    let cpu = time(usage.ru_utime) + time(usage.ru_stime);
    Ok(Ended { status, cpu, peak_rss_kib: u64::try_from(usage.ru_maxrss)? })
}

/// Builds vmrun as `make vmrun` does and returns where it is: beside this program.
///
/// # Errors
/// Where it cannot be built.
pub fn build_vmrun() -> Result<PathBuf, Box<dyn Error>> {
    let build = "rustc --release --quiet -p vmcore-examples --bin vmrun -- -C target-feature=+crt-static";
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo).args(build.split_whitespace()).status()?;
    if !status.success() {
        return Err(format!("vmrun cannot be built (cargo {build}): {status}").into());
    }
    // target/release/deps/startup-1234 is this, target/release/vmrun the other.
    let own = std::env::current_exe()?;
    let vmrun = own.ancestors().nth(2).ok_or("no target directory")?.join("vmrun");
    if vmrun.exists() { Ok(vmrun) } else { Err(format!("no {}", vmrun.display()).into()) }
}

/// An archive for the kernel to unpack: cpio's "newc" format (Linux,
/// Documentation/driver-api/early-userspace/buffer-format.rst).
#[derive(Debug)]
pub struct Archive<W: Write> {
    to: W,
    files: u32,
}

impl<W: Write> Archive<W> {
    /// An empty one.
    pub fn new(to: W) -> Self {
        Self { to, files: 0 }
    }

    /// Adds the file or directory `name` with its mode, as stat(2) has it.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn add(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<(), Box<dyn Error>> {
        self.files += 1;
        let (size, name_size) = (u32::try_from(content.len())?, u32::try_from(name.len() + 1)?);
        // Magic; inode, mode, user, group, links, time, size, device (2), special device (2), name, checksum.
        write!(self.to, "070701")?;
        for field in [self.files, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0] {
            write!(self.to, "{field:08x}")?;
        }
        self.padded(&[name.as_bytes(), &[0]].concat(), 110)?;
        self.padded(content, 0)
    }

    /// Writes `bytes`, with zeros to the next multiple of four of their number and `before`.
    fn padded(&mut self, bytes: &[u8], before: usize) -> Result<(), Box<dyn Error>> {
        self.to.write_all(bytes)?;
        let len = before + bytes.len();
        Ok(self.to.write_all(&[0; 3][..len.next_multiple_of(4) - len])?)
    }

    /// Ends it.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn end(mut self) -> Result<(), Box<dyn Error>> {
        self.add("TRAILER!!!", 0, &[])?;
        Ok(self.to.flush()?)
    }
}

/// The middle one.
///
/// # Panics
/// Where there is none.
pub fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// Runs `ours` and `theirs` in turn `rounds` times, after one round to warm up, and prints the medians
/// and their ratio. Returns the ratio, ours over theirs.
pub fn side_by_side(
    what: &str,
    rounds: usize,
    per: u32,
    (our_name, mut ours): (&str, impl FnMut() -> Duration),
    (their_name, mut theirs): (&str, impl FnMut() -> Duration),
) -> f64 {
    ours();
    theirs();
    let (mut our_times, mut their_times) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        // Neither side always goes first: what one leaves behind must not favour the other.
        if round % 2 == 0 {
            our_times.push(ours());
            their_times.push(theirs());
        } else {
            their_times.push(theirs());
            our_times.push(ours());
        }
    }
    let (us, them) = (median(our_times), median(their_times));
    let ratio = us.as_secs_f64() / them.as_secs_f64();
    let (us, them) = (us / per, them / per);
    println!("{what:<44} {our_name} {us:>10.2?}   {their_name} {them:>10.2?}   ratio {ratio:.3}");
    ratio
}
