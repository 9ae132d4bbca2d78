//! Port exits with a callback: Rust, C by libvmcore, and Python where its module can be imported, in turns.
//!
//! `cargo bench -p vmcore-benches --bench callbacks`, on the software CPU and on KVM. Python's figure is what
//! `python3 benches/callbacks.py` prints, a number of callbacks a second.

use std::process::Command;
use std::time::{Duration, Instant};

use vmcore::{Accel, GuestAddress, Io, MemoryRegion, VcpuExit, Vm};
// What callbacks.c calls is in there.
use vmcore_benches::side_by_side;
use vmcore_c as _;

/// again: out 0x10, al; jmp again
const PORT_LOOP: &[u8] = &[0xe6, 0x10, 0xeb, 0xfc];
const ACCESSES: u32 = 200_000;
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
    side_by_side(&format!("port exit with a callback, {backend}"), 41, ACCESSES, ("C", c), ("Rust", rust));
    callbacks_end();
    Ok(())
}

fn main() -> vmcore::Result<()> {
    compare("software CPU", Accel::Soft, VMCORE_ACCEL_SOFT)?;
    // A software KVM will do.
    if let Err(error) = compare("KVM", Accel::Kvm, VMCORE_ACCEL_KVM) {
        println!("KVM: skipped: {error}");
    }
    python();
    Ok(())
}
