//! Devices that stop the VM because the host fails them, and try again when it runs again.
#![cfg(feature = "soft")]
#![expect(clippy::unwrap_used, reason = "these are tests")]

use std::sync::{Arc, Mutex};

use vmcore::boot::{Raw, RawMode};
use vmcore::{Accel, BusDevice, Control, Deterministic, Machine, Outcome, Vm, VmHandle};

const PORT: u16 = 0x600;

/// mov dx, 0x600; out dx, al; inc dx; out dx, al; again: jmp again
const CODE: &[u8] = &[0xba, 0x00, 0x06, 0xee, 0x42, 0xee, 0xeb, 0xfe];

/// At its first port the host fails; the second ends the guest.
struct Device {
    control: Control,
    /// How often it fails again.
    failures: usize,
    retries: usize,
}

impl BusDevice for Device {
    fn read(&mut self, _: u64, _: &mut [u8]) {}
    fn write(&mut self, offset: u64, _: &[u8]) {
        self.control.end(if offset == 0 { Outcome::IoError } else { Outcome::Exit(7) });
    }
    fn retry(&mut self) {
        self.retries += 1;
        if self.failures > 0 {
            self.failures -= 1;
            self.control.end(Outcome::IoError);
        }
    }
}

/// A VM with a device that fails again `failures` times; how often it tried.
fn vm(deterministic: bool, failures: usize) -> (Vm, impl Fn() -> usize, VmHandle) {
    let place: Arc<Mutex<Option<Arc<Mutex<Device>>>>> = Arc::default();
    let kept = place.clone();
    let attach = move |machine: &mut Machine| {
        let device = Arc::new(Mutex::new(Device { control: machine.control(), failures, retries: 0 }));
        *kept.lock().unwrap() = Some(device.clone());
        machine.ports(PORT, 2, device)
    };
    let mut builder = Vm::builder()
        .accel(Accel::Soft)
        .memory(64 << 10)
        .boot(Raw::new(CODE, RawMode::Real16))
        .attach(attach);
    if deterministic {
        builder = builder.deterministic(Deterministic::seeded(1));
    }
    let vm = builder.build().unwrap();
    let device = place.lock().unwrap().take().unwrap();
    let handle = vm.handle();
    (vm, move || device.lock().unwrap().retries, handle)
}

#[test]
fn a_vm_that_a_device_stopped_goes_on_and_the_device_tries_again() {
    for deterministic in [false, true] {
        let (mut vm, retries, _) = vm(deterministic, 2);
        assert_eq!((vm.run().unwrap(), retries()), (Outcome::IoError, 0));
        assert_eq!((vm.run().unwrap(), retries()), (Outcome::IoError, 1));
        assert_eq!((vm.run().unwrap(), retries()), (Outcome::IoError, 2));
        assert_eq!((vm.run().unwrap(), retries()), (Outcome::Exit(7), 3));
    }
}

#[test]
fn an_error_is_not_forgotten_when_something_else_ends_the_run() {
    let (mut vm, retries, handle) = vm(false, 0);
    handle.stop();
    vm.control().end(Outcome::IoError);
    // The first counts, and the device did not try yet.
    assert_eq!((vm.run().unwrap(), retries()), (Outcome::Stopped, 0));
    assert_eq!((vm.run().unwrap(), retries()), (Outcome::IoError, 1));
    assert_eq!((vm.run().unwrap(), retries()), (Outcome::Exit(7), 2));
}

#[test]
fn an_error_between_two_runs_ends_the_second_at_its_begin() {
    let (mut vm, retries, _) = vm(false, 0);
    vm.control().end(Outcome::IoError);
    assert_eq!((vm.run().unwrap(), retries()), (Outcome::IoError, 0));
    assert_eq!((vm.run().unwrap(), retries()), (Outcome::IoError, 1));
    // Others need no second try.
    vm.handle().stop();
    assert_eq!((vm.run().unwrap(), retries()), (Outcome::Stopped, 1));
    assert_eq!((vm.run().unwrap(), retries()), (Outcome::Exit(7), 2));
}
