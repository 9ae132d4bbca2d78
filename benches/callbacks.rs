//! Port exits with a callback: Rust, C by libvmcore, and Python where its module can be imported, in turns.
//!
//! `cargo bench -p vmcore-benches --bench callbacks [-- PROCESSES]`, on the software CPU and on KVM. Where code and data
//! happen to lie makes a larger difference than the language: so each of several processes (15) compares both in turns,
//! and what is told is the median of their ratios. Python's figure is what `python3 benches/callbacks.py` prints, a
//! number of callbacks a second.

use std::process::Command;
use std::time::{Duration, Instant};

use vmcore::{Accel, GuestAddress, Io, MemoryRegion, VcpuExit, Vm};
// What callbacks.c calls is in there.
use vmcore_benches::side_by_side;
use vmcore_c as _;

/// again: out 0x10, al; jmp again
const PORT_LOOP: &[u8] = &[0xe6, 0x10, 0xeb, 0xfc];
const ACCESSES: u32 = 100_000;
const ROUNDS: usize = 21;
const PROCESSES: usize = 15;
const VMCORE_ACCEL_KVM: u32 = 1;
const VMCORE_ACCEL_SOFT: u32 = 2;

unsafe extern "C" {
    safe fn callbacks_run(count: u32) -> i32;
    safe fn callbacks_end();
    fn callbacks_begin(accel: u32, code: *const u8, len: u64) -> i32;
}

fn time(work: impl FnOnce()) -> Duration {
    let begin = Instant::now();
    work();
    begin.elapsed()
}

fn python() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/callbacks.py");
    // A directory of that name would be imported too.
    let importable = Command::new("python3").args(["-c", "import vmcore; vmcore.Vm"]).output();
    if !importable.is_ok_and(|output| output.status.success()) {
        println!("Python: skipped, there is no module vmcore");
        return;
    }
    match Command::new("python3").arg(script).output() {
        Ok(output) if output.status.success() => {
            println!("Python: {}", String::from_utf8_lossy(&output.stdout).trim());
        }
        other => println!("Python: failed: {other:?}"),
    }
}

/// C beside Rust on one backend.
fn compare(backend: &str, accel: Accel, in_c: u32) -> vmcore::Result<()> {
    let vm = Vm::bare(accel)?;
    vm.map(MemoryRegion::anonymous(GuestAddress(0), 64 << 10)?)?;
    vm.memory().write(GuestAddress(0), PORT_LOOP)?;
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.enter_real_mode(GuestAddress(0))?;
    let handle = vcpu.handle();
    // SAFETY: code of that length, which the call copies.
    let failed = unsafe { callbacks_begin(in_c, PORT_LOOP.as_ptr(), PORT_LOOP.len() as u64) };
    assert_eq!(failed, 0, "C makes a VM too");

    let rust = || {
        let (mut left, mut sum) = (ACCESSES, 0u64);
        time(|| {
            let exit = vcpu.run_with(|io| {
                if let Io::PortWrite { data, .. } = io {
                    sum += u64::from(data[0]);
                }
                left -= 1;
                if left == 0 {
                    handle.kick();
                }
            });
            assert_eq!(exit.unwrap(), VcpuExit::Kicked);
        })
    };
    let c = || time(|| assert_eq!(callbacks_run(ACCESSES), 0));
    let what = format!("port exit with a callback, {backend}");
    let ratio = side_by_side(&what, ROUNDS, ACCESSES, ("C", c), ("Rust", rust));
    println!("{RATIO}{ratio}");
    callbacks_end();
    Ok(())
}

const BACKENDS: [(&str, Accel, u32); 2] = [
    ("software CPU", Accel::Soft, VMCORE_ACCEL_SOFT),
    // A software KVM will do.
    ("KVM", Accel::Kvm, VMCORE_ACCEL_KVM),
];

/// What a process has to say to the one that started it.
const RATIO: &str = "ratio of this process: ";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // `cargo bench` adds --bench.
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    if let [only] = &args[..]
        && let Some(&(backend, accel, in_c)) = BACKENDS.iter().find(|backend| backend.0 == only)
    {
        return Ok(compare(backend, accel, in_c)?);
    }
    let processes = args.iter().find_map(|arg| arg.parse().ok()).unwrap_or(PROCESSES).max(1);
    for (backend, accel, _) in BACKENDS {
        if let Err(error) = Vm::bare(accel) {
            println!("{backend}: skipped: {error}");
            continue;
        }
        let mut ratios = Vec::new();
        for _ in 0..processes {
            let output = Command::new(std::env::current_exe()?).arg(backend).output()?;
            let text = String::from_utf8_lossy(&output.stdout);
            for line in text.lines() {
                match line.strip_prefix(RATIO) {
                    Some(ratio) => ratios.push(ratio.parse::<f64>()?),
                    None => println!("{line}"),
                }
            }
            if !output.status.success() {
                return Err(String::from_utf8_lossy(&output.stderr).into());
            }
        }
        ratios.sort_by(f64::total_cmp);
        let (least, most) = (ratios[0], ratios[ratios.len() - 1]);
        let middle = ratios[ratios.len() / 2];
        println!(
            "{backend}: C takes {middle:.3} times Rust's time, {least:.3} to {most:.3} in {processes} processes"
        );
    }
    python();
    Ok(())
}
