//! The engine beside a raw-ioctl C program, in one process: making a VM, and the cost of an exit.
//!
//! `cargo bench -p vmcore-benches --bench engine`

use std::time::{Duration, Instant};

use vmcore::{Accel, GuestAddress, Io, MemoryRegion, Vcpu, VcpuExit, Vm};
use vmcore_benches::{RawVm, side_by_side};

const MEMORY: u64 = 128 << 20;
/// hlt
const HALT: &[u8] = &[0xf4];
/// again: out 0x10, al; jmp again
const PORT_LOOP: &[u8] = &[0xe6, 0x10, 0xeb, 0xfc];
/// mov ax, 0x2000; mov ds, ax; again: mov [0], al; jmp again (with 64 KiB of memory: MMIO)
const MMIO_LOOP: &[u8] = &[0xb8, 0x00, 0x20, 0x8e, 0xd8, 0xa2, 0x00, 0x00, 0xeb, 0xfb];
const ACCESSES: u32 = 20_000;

fn vm(memory: u64, code: &[u8]) -> vmcore::Result<(Vm, Vcpu)> {
    let vm = Vm::bare(Accel::Kvm)?;
    vm.map(MemoryRegion::anonymous(GuestAddress(0), memory)?)?;
    vm.memory().write(GuestAddress(0), code)?;
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.enter_real_mode(GuestAddress(0))?;
    Ok((vm, vcpu))
}

fn time<T>(work: impl FnOnce() -> T) -> (Duration, T) {
    let begin = Instant::now();
    let result = work();
    (begin.elapsed(), result)
}

fn create() -> vmcore::Result<f64> {
    let ours = || {
        let (elapsed, kept) = time(|| {
            let (vm, mut vcpu) = vm(MEMORY, HALT).unwrap();
            assert_eq!(vcpu.run_with(|_| ()).unwrap(), VcpuExit::Halted);
            (vm, vcpu)
        });
        drop(kept);
        elapsed
    };
    let theirs = || {
        let (elapsed, kept) = time(|| {
            let mut vm = RawVm::new(MEMORY, HALT, false);
            vm.run(0);
            vm
        });
        drop(kept);
        elapsed
    };
    Ok(side_by_side("create 128 MiB, 1 vCPU, first instruction", 101, 1, ("vmcore", ours), ("raw C", theirs)))
}

fn exits(what: &str, code: &[u8]) -> vmcore::Result<f64> {
    let (_vm, mut vcpu) = vm(64 << 10, code)?;
    let mut raw = RawVm::new(64 << 10, code, false);
    let handle = vcpu.handle();
    let ours = || {
        let (mut left, mut sum) = (ACCESSES, 0u64);
        time(|| {
            let exit = vcpu.run_with(|io| {
                if let Io::PortWrite { data, .. } | Io::MmioWrite { data, .. } = io {
                    sum += u64::from(data[0]);
                }
                left -= 1;
                if left == 0 {
                    handle.kick();
                }
            });
            assert_eq!(exit.unwrap(), VcpuExit::Kicked);
        })
        .0
    };
    let theirs = || time(|| raw.run(ACCESSES.into())).0;
    Ok(side_by_side(what, 41, ACCESSES, ("vmcore", ours), ("raw C", theirs)))
}

fn main() -> vmcore::Result<()> {
    if let Err(error) = Vm::bare(Accel::Kvm) {
        println!("skipped: {error}");
        return Ok(());
    }
    create()?;
    exits("port exit", PORT_LOOP)?;
    exits("MMIO exit", MMIO_LOOP)?;
    Ok(())
}
