//! VMs made, run, held and dropped, many times and at any moment.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "these are tests")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use vmcore::backend::Backend;
use vmcore::boot::{Raw, RawMode};
use vmcore::{Error, GuestAddress, MemoryRegion, Outcome, VcpuExit, Vm};

/// hlt
const HALT: &[u8] = &[0xf4];
/// again: jmp again
const SPIN: &[u8] = &[0xeb, 0xfe];

fn backend() -> Option<Arc<dyn Backend>> {
    match vmcore::kvm::Kvm::open() {
        Ok(kvm) => Some(Arc::new(kvm)),
        Err(reason) => {
            println!("skipped: {reason}");
            None
        }
    }
}

fn spinning(backend: &Arc<dyn Backend>, cpus: u32) -> Vm {
    Vm::builder()
        .backend(backend.clone())
        .memory(64 << 10)
        .irqchip(cpus > 1)
        .cpus(cpus)
        .boot(Raw::new(SPIN, RawMode::Real16))
        .build()
        .unwrap()
}

fn halting(backend: &Arc<dyn Backend>) -> Vm {
    Vm::builder()
        .backend(backend.clone())
        .memory(64 << 10)
        .irqchip(false)
        .boot(Raw::new(HALT, RawMode::Real16))
        .build()
        .unwrap()
}

/// Descriptors, threads and resident KiB of this process.
fn usage() -> (usize, u64, u64) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
    };
    (std::fs::read_dir("/proc/self/fd").unwrap().count(), field("Threads:"), field("VmRSS:"))
}

/// One test, so that nothing else in this process changes what it counts.
#[test]
fn ten_thousand_vms_leave_nothing_behind() {
    let Some(backend) = backend() else { return };
    let bare = || {
        let vm = Vm::bare_on(backend.clone(), &Default::default()).unwrap();
        vm.map(MemoryRegion::anonymous(GuestAddress(0), 64 << 10).unwrap()).unwrap();
        vm.memory().write(GuestAddress(0x1000), HALT).unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        vcpu.enter_real_mode(GuestAddress(0x1000)).unwrap();
        assert_eq!(vcpu.run_with(|_| ()).unwrap(), VcpuExit::Halted);
    };
    let built = || assert_eq!(halting(&backend).run().unwrap(), Outcome::Halted);
    // What allocators and the kernel keep for later is there after the first ones.
    for _ in 0..200 {
        bare();
        built();
    }
    let before = usage();
    for _ in 0..5_000 {
        bare();
        built();
    }
    let after = usage();
    assert_eq!((after.0, after.1), (before.0, before.1), "descriptors, threads");
    assert!(after.2 < before.2 + 1024, "memory grew from {} to {} KiB", before.2, after.2);

    let mut vms: Vec<Vm> = (0..100).map(|_| spinning(&backend, 1)).collect();
    for vm in &mut vms {
        assert_eq!(vm.run_for(Duration::from_millis(2)).unwrap(), Outcome::TimeLimit);
    }
    // Two of them at the same time as the others wait, each on a thread of its own.
    std::thread::scope(|scope| {
        for vm in vms.iter_mut().take(2) {
            scope.spawn(move || vm.run_for(Duration::from_millis(50)).unwrap());
        }
    });
    drop(vms);
    let end = usage();
    assert_eq!((end.0, end.1), (before.0, before.1), "descriptors, threads after 100 at once");

    // Dropped by another thread's panic, a handle left over, while paused.
    let mut vm = spinning(&backend, 1);
    let handle = vm.handle();
    let runner = std::thread::spawn(move || vm.run_for(Duration::from_millis(300)).map(|_| drop(vm)));
    let paused = handle.pause().unwrap();
    runner.join().unwrap().unwrap();
    drop(paused);
    assert!(matches!(handle.pause(), Err(Error::WrongState { state: "dropped", .. })));
    handle.stop();
    drop(handle);
    assert_eq!(usage().0, before.0);

    a_thousand_pauses_stops_and_resumes(&backend);
    assert_eq!((usage().0, usage().1), (before.0, before.1), "descriptors, threads at the end");
}

fn a_thousand_pauses_stops_and_resumes(backend: &Arc<dyn Backend>) {
    let mut vm = spinning(backend, 2);
    let handle = vm.handle();
    let begin = Instant::now();
    std::thread::scope(|scope| {
        let controllers: Vec<_> = (0..4u64)
            .map(|seed| {
                let handle = handle.clone();
                scope.spawn(move || {
                    let mut random = seed * 2 + 1;
                    for _ in 0..250 {
                        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        match random >> 62 {
                            0 => handle.stop(),
                            1 => handle.pause().unwrap().resume(),
                            _ => {
                                let first = handle.pause().unwrap();
                                let second = handle.pause().unwrap();
                                assert_eq!(first.save().unwrap().vcpus.len(), 2);
                                drop((first, second));
                            }
                        }
                    }
                })
            })
            .collect();
        while !controllers.iter().all(|controller| controller.is_finished()) {
            let outcome = vm.run_for(Duration::from_millis(20)).unwrap();
            assert!(matches!(outcome, Outcome::Stopped | Outcome::TimeLimit), "{outcome:?}");
        }
    });
    println!("1000 pauses and stops in {:?}", begin.elapsed());
}

#[test]
fn a_vm_is_dropped_while_its_guest_spins_and_bad_settings_are_named() {
    let Some(backend) = backend() else { return };
    let mut vm = spinning(&backend, 1);
    assert_eq!(vm.run_for(Duration::from_millis(10)).unwrap(), Outcome::TimeLimit);
    drop(vm);

    let error = Vm::bare_on(backend.clone(), &Default::default()).unwrap().run().unwrap_err();
    assert!(matches!(error, Error::WrongState { state: "bare", .. }), "{error}");
    let mut vm = halting(&backend);
    assert_eq!(vm.run().unwrap(), Outcome::Halted);
    let error = vm.run().unwrap_err();
    assert!(matches!(error, Error::WrongState { state: "halted for good", .. }), "{error}");
    let builder = || Vm::builder().backend(backend.clone()).boot(Raw::new(HALT, RawMode::Real16));
    for (built, words) in [
        (builder().cpus(0).build(), ["number of vCPUs", "0"]),
        (builder().cpus(2).irqchip(false).build(), ["number of vCPUs", "without interrupt controllers"]),
        (builder().memory(0).build(), ["0 bytes", "4096"]),
        (builder().memory(4097).build(), ["length", "0x1001"]),
        (Vm::builder().backend(backend.clone()).build(), ["boot image", "VmBuilder::boot"]),
    ] {
        let text = built.unwrap_err().to_string();
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    }
}
