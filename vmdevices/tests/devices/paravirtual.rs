//! Linux' vmgenid and pvpanic.

use std::sync::{Arc, Mutex};

use vmcore::Outcome;
use vmdevices::paravirtual::{Generation, GuestEvent, Pvpanic};

use super::super::guests_with;
use super::{LIMIT, at_the_shell, machine, shell};

#[test]
fn a_new_generation_seeds_random_numbers_anew() {
    let Some(guests) = guests_with("generic/initrd.img") else { return };
    let generation = Generation::new();
    let handle = generation.handle();
    let (builder, script) = machine(&guests, "generic", "", 256);
    let vm = builder.attach(generation).build().unwrap();
    at_the_shell(vm, &script, || {
        let count = || {
            let text =
                shell(&script, "echo count=$(dmesg | grep -c 'crng reseeded due to virtual machine fork')=");
            text.split('=').nth(1).unwrap().parse::<u32>().unwrap()
        };
        assert_eq!(count(), 0);
        for round in 1..4 {
            handle.renew().unwrap();
            shell(&script, "sleep 1");
            assert_eq!(count(), round);
        }
    });
}

#[test]
fn a_panic_is_told_and_ends_the_vm() {
    let Some(guests) = guests_with("cloud/initrd.img") else { return };
    let events = Arc::new(Mutex::new(Vec::new()));
    let told = events.clone();
    let device = Pvpanic::new().end_on_panic().on_event(move |event| told.lock().unwrap().push(event));
    let (builder, script) = machine(&guests, "cloud", "", 256);
    let mut vm = builder.attach(device).build().unwrap();
    script.send("modprobe pvpanic-mmio; echo ev''ents $(cat /sys/bus/*/devices/QEMU0001:00/events); echo c >/proc/sysrq-trigger\n").unwrap();
    let outcome = vm.run_for(LIMIT);
    let transcript = script.transcript();
    assert!(matches!(outcome, Ok(Outcome::Panicked)), "{outcome:?}\n{transcript}");
    assert_eq!(*events.lock().unwrap(), [GuestEvent::Panicked], "{transcript}");
}
