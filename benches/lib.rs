//! What the benchmarks share: the C program, medians, and a way to print both sides of a comparison.

use std::ffi::c_int;
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
    let (us, them) = (median(our_times) / per, median(their_times) / per);
    let ratio = us.as_secs_f64() / them.as_secs_f64();
    println!("{what:<44} {our_name} {us:>10.2?}   {their_name} {them:>10.2?}   ratio {ratio:.3}");
    ratio
}
