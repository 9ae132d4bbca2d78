//! The deterministic mode on small guests: equal runs have equal hashes, wherever they are cut.
#![expect(clippy::unwrap_used, clippy::panic, reason = "these are tests")]

mod mmio;
mod program;
mod steps;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use program::Program;
use vmcore::boot::{Raw, RawMode};
use vmcore::cpuid::CpuModel;
use vmcore::{Accel, BusDevice, Deterministic, Error, Machine, Outcome, StateHash, Vm};

/// Guests that run on end before this, in instructions.
const LONGEST: u64 = 40_000_000;

/// Interrupts the guest after a while, and ends it: by the machine's own time.
struct Device {
    control: vmcore::Control,
    irq: vmcore::IrqLine,
    clock: vmcore::Clock,
    timer: Arc<Mutex<Option<vmcore::Timer>>>,
    writes: u64,
}

impl BusDevice for Device {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        let now = self.clock.now().as_nanos().to_le_bytes();
        data.copy_from_slice(&now[..data.len()]);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.writes += 1;
        match offset {
            0 => self.control.end(Outcome::Exit(data[0].into())),
            4 => self.irq.pulse(),
            _ => {
                let timer = self.timer.lock().unwrap();
                let after = Duration::from_nanos(u64::from(data[0]) * 100);
                timer.as_ref().unwrap().set(Some(self.clock.now() + after));
            }
        }
    }

    fn save(&self) -> vmcore::Result<Vec<u8>> {
        Ok(self.writes.to_le_bytes().to_vec())
    }
}

fn attach(machine: &mut Machine) -> vmcore::Result<()> {
    let irq = machine.irq_line(program::DEVICE_IRQ);
    let timer = Arc::new(Mutex::new(None));
    let device = Device {
        control: machine.control(),
        irq: machine.irq_line(program::DEVICE_IRQ),
        clock: machine.clock(),
        timer: timer.clone(),
        writes: 0,
    };
    *timer.lock().unwrap() = machine.timer(move || irq.pulse());
    machine.ports(program::PORT, 16, Arc::new(Mutex::new(device)))
}

fn vm(cpus: u32, settings: Deterministic) -> Vm {
    Vm::builder()
        .deterministic(settings)
        // It has RDRAND.
        .cpu_model(CpuModel::Host)
        .memory(2 << 20)
        .cpus(cpus)
        .acpi(false)
        .boot(Raw::new(Program::new(cpus).code(), RawMode::Real16).load_at(program::BASE))
        .attach(attach)
        .build()
        .unwrap()
}

/// The count and hash every `step` instructions, to the guest's end.
fn hashes(vm: &mut Vm, step: u64) -> Vec<(u64, StateHash)> {
    let mut all = Vec::new();
    loop {
        let begin = vm.instructions().unwrap();
        let outcome = vm.run_instructions(step).unwrap();
        let count = vm.instructions().unwrap();
        all.push((count, vm.state_hash().unwrap()));
        match outcome {
            Outcome::InstructionLimit => assert_eq!(count, begin + step),
            Outcome::Exit(7) => return all,
            other => panic!("{other:?} at {count}"),
        }
        assert!(count < LONGEST, "the guest does not end");
    }
}

#[test]
fn equal_runs_have_equal_hashes_at_every_checkpoint() {
    for cpus in [1, 2, 4] {
        let first = hashes(&mut vm(cpus, Deterministic::seeded(1)), 50_000);
        assert!(first.len() > 4, "{cpus}: {first:?}");
        let second = hashes(&mut vm(cpus, Deterministic::seeded(1)), 50_000);
        assert_eq!(first, second, "{cpus} vCPUs");
        let other = hashes(&mut vm(cpus, Deterministic::seeded(2)), 50_000);
        assert_ne!(first[0].1, other[0].1, "{cpus} vCPUs");
        let last = |all: &[(u64, StateHash)]| all.last().copied();
        assert_ne!(last(&first), last(&other));
    }
}

#[test]
fn the_guest_has_seen_timers_interrupts_and_every_vcpu() {
    for cpus in [1, 2, 4] {
        let mut vm = vm(cpus, Deterministic::default());
        assert_eq!(vm.run().unwrap(), Outcome::Exit(7));
        let word = |at| vm.memory().load::<u32>(vmcore::GuestAddress(at)).unwrap();
        assert!(word(program::TICKS) > 100, "{cpus}: {}", word(program::TICKS));
        assert!(word(program::DEVICE_TICKS) > 20, "{cpus}: {}", word(program::DEVICE_TICKS));
        assert_eq!(word(program::STARTED), cpus);
        assert_eq!(word(program::IPIS) > 10, cpus > 1, "{cpus}: {}", word(program::IPIS));
        for cpu in 0..u64::from(cpus) {
            assert!(word(program::ROUNDS + 4 * cpu) > 100, "vCPU {cpu} of {cpus} had no turn");
        }
    }
}

#[test]
fn where_a_run_is_cut_changes_nothing() {
    for cpus in [1, 2] {
        let coarse = hashes(&mut vm(cpus, Deterministic::seeded(3)), 120_000);
        let fine = hashes(&mut vm(cpus, Deterministic::seeded(3)), 1_200);
        let at = |count| fine.iter().find(|(n, _)| *n == count).map(|(_, hash)| *hash);
        assert!(coarse.len() > 2);
        for (count, hash) in coarse {
            assert_eq!(at(count), Some(hash), "{cpus} vCPUs at {count}");
        }
    }
}

#[test]
fn single_instructions_lead_to_the_same_state() {
    let mut whole = vm(2, Deterministic::seeded(4));
    let mut single = vm(2, Deterministic::seeded(4));
    for _ in 0..5 {
        assert_eq!(whole.run_instructions(7_001).unwrap(), Outcome::InstructionLimit);
        for _ in 0..7_001 {
            assert_eq!(single.run_instructions(1).unwrap(), Outcome::InstructionLimit);
        }
        let saved = |vm: &Vm| vm.handle().pause().unwrap().save().unwrap();
        let (a, b) = (saved(&whole), saved(&single));
        assert_eq!(a.machine, b.machine);
        for (a, b) in a.vcpus.iter().zip(&b.vcpus) {
            assert_eq!(
                (a.id, &a.regs, &a.sregs, &a.events, a.run_state),
                (b.id, &b.regs, &b.sregs, &b.events, b.run_state)
            );
            assert_eq!((&a.lapic, &a.msrs), (&b.lapic, &b.msrs));
            assert_eq!(a, b);
        }
        assert_eq!(whole.state_hash().unwrap(), single.state_hash().unwrap());
    }
}

#[test]
fn the_host_may_stop_and_pause_at_any_time() {
    for cpus in [1, 2] {
        let calm = hashes(&mut vm(cpus, Deterministic::seeded(5)), 400_000);
        let mut vm = vm(cpus, Deterministic::seeded(5));
        let done = AtomicBool::new(false);
        let handle = vm.handle();
        let harried = std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut wait = 1u64;
                while !done.load(Ordering::SeqCst) {
                    let paused = handle.pause().unwrap();
                    wait = wait * 1_103_515_245 % 65_537;
                    std::thread::sleep(Duration::from_micros(wait % 300));
                    drop(paused);
                    if wait.is_multiple_of(3) {
                        handle.stop();
                    }
                    std::thread::sleep(Duration::from_micros(wait % 700));
                }
            });
            let mut all = Vec::new();
            let mut next = 400_000;
            loop {
                let left = next - vm.instructions().unwrap();
                match vm.run_instructions(left).unwrap() {
                    Outcome::Stopped => continue,
                    Outcome::InstructionLimit => next += 400_000,
                    Outcome::Exit(7) => {
                        all.push((vm.instructions().unwrap(), vm.state_hash().unwrap()));
                        break;
                    }
                    other => panic!("{other:?}"),
                }
                all.push((vm.instructions().unwrap(), vm.state_hash().unwrap()));
            }
            done.store(true, Ordering::SeqCst);
            all
        });
        assert_eq!(calm, harried, "{cpus} vCPUs");
    }
}

#[test]
fn a_quantum_and_a_rate_are_settings_of_the_guests_world() {
    let of = |settings| hashes(&mut vm(2, settings), 100_000);
    let base = of(Deterministic::seeded(6));
    assert_ne!(base[0], of(Deterministic::seeded(6).quantum(999))[0]);
    assert_ne!(base[0], of(Deterministic::seeded(6).instructions_per_second(300_000_000))[0]);
    assert_eq!(base, of(Deterministic::default().seed(6)));
}

#[test]
fn a_guest_that_sleeps_for_good_has_halted() {
    // cli; hlt
    let boot = Raw::new(vec![0xfa, 0xf4], RawMode::Real16);
    let mut vm = Vm::builder().deterministic(Deterministic::default()).boot(boot).build().unwrap();
    assert_eq!(vm.run_instructions(100).unwrap(), Outcome::Halted);
    assert_eq!(vm.instructions(), Some(2));
}

#[test]
fn a_guest_that_waits_for_the_host_can_be_stopped() {
    // sti; hlt; jmp back to it
    let boot = Raw::new(vec![0xfb, 0xf4, 0xeb, 0xfd], RawMode::Real16);
    let mut vm = Vm::builder().deterministic(Deterministic::default()).boot(boot).build().unwrap();
    assert_eq!(vm.run_for(Duration::from_millis(30)).unwrap(), Outcome::TimeLimit);
    assert_eq!(vm.instructions(), Some(2));
}

#[test]
fn what_cannot_be_deterministic_says_so() {
    let boot = || Raw::new(vec![0xf4], RawMode::Real16);
    let settings = Deterministic::default();
    let threaded = |machine: &mut Machine| machine.io_thread("disk").map(drop);
    let build = |attach: fn(&mut Machine) -> vmcore::Result<()>| {
        Vm::builder().deterministic(settings).boot(boot()).attach(attach).build().map(drop)
    };
    let error = build(threaded).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    assert!(error.to_string().contains("I/O thread disk of a deterministic VM"), "{error}");
    let doorbell =
        vmcore::backend::DoorbellConfig { at: vmcore::backend::IoAddress::Port(0x80), width: 1, value: None };
    let vm = Vm::builder().deterministic(settings).boot(boot()).build().unwrap();
    assert!(matches!(vm.doorbell(doorbell), Err(Error::Unsupported { .. })));
    let event = vm.irq_event(vmcore::backend::IrqRoute::Gsi(5));
    assert!(matches!(event, Err(Error::Unsupported { .. })));
    if let Ok(kvm) = vmcore::kvm::Kvm::open() {
        let builder = Vm::builder().backend(Arc::new(kvm)).deterministic(settings);
        let error = builder.boot(boot()).build().unwrap_err();
        assert!(error.to_string().contains("use the software CPU"), "{error}");
    }
    let mut vm = Vm::builder().accel(Accel::Soft).boot(boot()).build().unwrap();
    assert!(matches!(vm.run_instructions(1), Err(Error::WrongState { .. })));
    assert_eq!(vm.instructions(), None);
}
