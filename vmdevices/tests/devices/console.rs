//! Linux' virtio_console with several ports.

use std::time::{Duration, Instant};

use vmdevices::VirtioConsole;
use vmdevices::console::{self, Script};

use super::super::guests;
use super::super::transport::virtio;
use super::{LIMIT, at_the_shell, machine, shell};

/// Waits until the guest says `wanted` when it is asked for it.
fn becomes(script: &Script, command: &str, wanted: &str) {
    let end = Instant::now() + LIMIT;
    loop {
        let said = shell(script, command);
        if said.contains(wanted) {
            return;
        }
        assert!(Instant::now() < end, "{command}: {said}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn ports_have_names_and_terminals_change_their_size() {
    let Some(guests) = guests() else { return };
    let ((first, hvc0), (second, hvc1)) = (console::memory().unwrap(), console::memory().unwrap());
    let (agent, port) = console::memory().unwrap();
    let device = VirtioConsole::new(first).port("org.example.agent", agent).unwrap().console(second).unwrap();
    let handle = device.handle().unwrap();
    handle.set_size(0, 100, 30).unwrap();
    let (builder, script) = machine(&guests, "cloud", "", 256);
    let vm = builder.attach(virtio(device)).build().unwrap();
    port.send("early words\n").unwrap();
    at_the_shell(vm, &script, || {
        let names = shell(&script, "cat /sys/class/virtio-ports/vport0p1/name");
        assert!(names.contains("org.example.agent"), "{names}");
        assert!(!handle.is_open(1));

        // Both ways, with what was there before anybody listened.
        let text = shell(&script, "exec 3<>/dev/vport0p1; head -n 1 <&3; echo to the host >&3");
        assert!(text.contains("early words"), "{text}");
        port.expect("to the host", LIMIT).unwrap();
        assert!(handle.is_open(1));
        shell(&script, "exec 3>&-");
        let end = Instant::now() + LIMIT;
        while handle.is_open(1) {
            assert!(Instant::now() < end, "it stays open");
        }
        // Where the host's side is closed there is an end, and open again there is not.
        handle.set_open(1, false).unwrap();
        let ended = shell(&script, "sleep 1; cat </dev/vport0p1; echo cat=$?");
        assert!(ended.contains("cat=0"), "{ended}");
        handle.set_open(1, true).unwrap();
        port.send("again\n").unwrap();
        let again = shell(&script, "sleep 1; head -n 1 </dev/vport0p1");
        assert!(again.contains("again"), "{again}");

        // The sizes of two terminals, each its own.
        becomes(&script, "stty size </dev/hvc0", "30 100");
        handle.set_size(0, 132, 43).unwrap();
        becomes(&script, "stty size </dev/hvc0", "43 132");
        handle.set_size(2, 81, 26).unwrap();
        becomes(&script, "stty size </dev/hvc1", "26 81");
        assert!(shell(&script, "stty size </dev/hvc0").contains("43 132"));
        shell(&script, "echo to hvc0 >/dev/hvc0; echo to hvc1 >/dev/hvc1");
        hvc0.expect("to hvc0", LIMIT).unwrap();
        hvc1.expect("to hvc1", LIMIT).unwrap();
        // A shell on the second.
        shell(&script, "(setsid sh </dev/hvc1 >/dev/hvc1 2>&1 &)");
        hvc1.send("stty -echo; echo sum=$((6 * 7))\n").unwrap();
        hvc1.expect("sum=42", LIMIT).unwrap();
        assert!(hvc0.transcript().find("sum=42").is_none());
    });
}

/// A single port is told its size by the configuration.
#[test]
fn a_single_terminal_changes_its_size_too() {
    let Some(guests) = guests() else { return };
    let device = VirtioConsole::new(console::Null);
    let handle = device.handle().unwrap();
    let (builder, script) = machine(&guests, "cloud", "", 256);
    let vm = builder.attach(virtio(device)).build().unwrap();
    at_the_shell(vm, &script, || {
        handle.set_size(0, 120, 33).unwrap();
        becomes(&script, "stty size </dev/hvc0", "33 120");
    });
}
