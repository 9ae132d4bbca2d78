//! Stock kernels with virtio devices on PCI, by every way to find functions and to be interrupted by them.

use vmcore::boot::Linux;
use vmcore::{Outcome, Vm};
use vmdevices::console::Script;
use vmdevices::net::Tap;
use vmdevices::virtio;
use vmdevices::{Disk, Net, Pc, Rng, VirtioConsole, console};

use super::{LIMIT, accel, ask, guests_with, network};

/// How functions interrupt, as `/proc/interrupts` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Interrupts {
    Messages,
    IoApic,
    Pic,
}

/// Boots `kernel` with `options` and has a disk, an entropy source, a console and a network card work.
fn works(kernel: &str, cpus: u32, options: &str, expected: Interrupts) {
    let Some(guests) = guests_with(&format!("{kernel}/initrd.img")) else { return };
    let net = network::namespace().then(|| {
        let tap = Tap::open("vmtap%d").unwrap();
        assert!(network::ip("addr add 192.0.2.1/24 dev vmtap0") && network::ip("link set vmtap0 up"));
        virtio::pci(Net::new(tap).unwrap().mac([2, 0, 0, 0, 0, 0x17]).unwrap()).slot(9)
    });
    let ((serial, script), (terminal, hvc)) = (console::memory().unwrap(), console::memory().unwrap());
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(16 << 20).unwrap();
    let linux = Linux::new(guests.join(format!("{kernel}/vmlinuz")))
        .initrd(guests.join(format!("{kernel}/initrd.img")))
        .cmdline(format!("console=ttyS0 panic=-1 vmtest=shell vmnet=192.0.2.2/24 {options}"));
    let mut builder = Vm::builder()
        .accel(accel())
        .cpus(cpus)
        .memory(256 << 20)
        .boot(linux)
        .attach(Pc::new().serial(serial))
        .attach(virtio::pci(Disk::open(image.path()).unwrap()))
        .attach(virtio::pci(VirtioConsole::new(terminal)))
        .attach(virtio::pci(Rng::new()));
    let card = net.is_some();
    if let Some(net) = net {
        builder = builder.attach(net);
    }
    let mut vm = builder.build().unwrap();
    let handle = vm.handle();
    script.send("stty -echo; echo re''ady\n").unwrap();
    let (outcome, user) = std::thread::scope(|scope| {
        let user = scope.spawn(|| {
            // Also where something fails, the guest comes to an end.
            let user = std::panic::catch_unwind(|| use_devices(&script, &hvc, card, options, expected));
            handle.stop();
            user
        });
        (vm.run_for(LIMIT), user.join().unwrap())
    });
    assert!(user.is_ok(), "{kernel} {options}: {outcome:?}\n{}", script.transcript());
    assert_eq!(outcome.unwrap(), Outcome::Stopped);
}

fn use_devices(script: &Script, hvc: &Script, card: bool, options: &str, expected: Interrupts) {
    script.expect("ready", LIMIT).unwrap();
    let ask = |command: &str| ask(script, command);

    // What `lspci -n` tells.
    let functions =
        ask("cd /sys/bus/pci/devices; for f in *; do echo $f $(cat $f/class $f/vendor $f/device \
                         $f/revision) $(basename $(readlink $f/driver) 2>&1); done");
    for line in [
        "0000:00:00.0 0x060000 0x1b36 0x0008 0x00",
        "0000:00:01.0 0x010000 0x1af4 0x1042 0x01 virtio-pci",
        "0000:00:02.0 0x078000 0x1af4 0x1043 0x01 virtio-pci",
        "0000:00:03.0 0xff0000 0x1af4 0x1044 0x01 virtio-pci",
    ] {
        assert!(functions.contains(line), "no {line:?} in {functions}");
    }
    assert_eq!(
        functions.contains("0000:00:09.0 0x020000 0x1af4 0x1041 0x01 virtio-pci"),
        card,
        "{functions}"
    );
    let resource = ask("cat 0000:00:01.0/resource");
    assert!(resource.contains("7fff 0x0000000000140204"), "{resource}");
    // Where the guest was told of the window, what was there at first stays.
    let as_found = resource.contains("0x00000000c0000000 0x00000000c0007fff");
    assert!(as_found || options.contains("noacpi"), "{resource}");

    disk(&ask);
    let random = ask("dd if=/dev/hwrng bs=64 count=1 2>/dev/null | wc -c");
    assert!(random.contains("64"), "{random}");
    ask("echo from the guest > /dev/hvc0");
    hvc.expect("from the guest", LIMIT).unwrap();
    if card {
        let ping = ask("ping -c 3 -W 10 192.0.2.1");
        assert!(ping.contains("3 packets transmitted, 3 packets received"), "{ping}");
    }

    let interrupts = ask("grep -E 'virtio|ACPI' /proc/interrupts");
    let of_virtio: Vec<_> = interrupts.lines().filter(|line| line.contains("virtio")).collect();
    let kind = match expected {
        Interrupts::Messages => "PCI-MSI",
        Interrupts::IoApic => "IO-APIC",
        Interrupts::Pic => "XT-PIC",
    };
    assert!(!of_virtio.is_empty() && of_virtio.iter().all(|line| line.contains(kind)), "{interrupts}");
    if expected == Interrupts::Messages {
        assert!(interrupts.contains("virtio0-req.0") && interrupts.contains("virtio2-input"), "{interrupts}");
    } else {
        assert!(expected == Interrupts::Pic || interrupts.contains("fasteoi"), "{interrupts}");
    }

    // The driver goes and comes: the device is reset and begins anew.
    ask("echo virtio0 > /sys/bus/virtio/drivers/virtio_blk/unbind");
    ask("echo virtio0 > /sys/bus/virtio/drivers/virtio_blk/bind");
    disk(&ask);
    // So does the function, to which the guest then gives addresses of its own choice. A 32-bit Linux chooses
    // some above 4 GiB, which its driver then cannot reach (under QEMU neither).
    if ask("uname -m").contains("x86_64") {
        ask("echo 1 > 0000:00:01.0/remove; echo 1 > ../rescan; sleep 1");
        disk(&ask);
    }

    // Nothing that a kernel warns of (levels 0 to 4).
    let informed = ask("dmesg -r | grep -c '^<6>.*PCI'");
    assert!(!informed.trim().starts_with('0'), "{informed}");
    let complaints =
        ask("dmesg -r | grep -E '^<[0-4]>' | grep -iE 'pci|acpi|bar |irq|virtio|mmconfig|firmware'");
    let harmless = |line: &str| {
        // That there is no ACPI, and what Linux says whenever MSI is switched off; what it says of any BIOS.
        ["END", "ACPI BIOS Error", "MSI/MSI-X support disabled"].iter().any(|known| line.contains(known))
            || !line.starts_with('<')
    };
    let left: Vec<_> = complaints.lines().filter(|line| !harmless(line)).collect();
    assert!(left.is_empty() || !options.is_empty(), "{left:#?}");
    println!("{options:?}: {left:#?}\n{interrupts}");
}

/// Writes the disk and reads it back.
fn disk(ask: &impl Fn(&str) -> String) {
    let compared = ask(
        "head -c 4000000 /dev/urandom > /tmp/a; dd if=/tmp/a of=/dev/vda bs=64k conv=fsync 2>/dev/null; \
                        echo 3 > /proc/sys/vm/drop_caches; cmp -n 4000000 /tmp/a /dev/vda && [ -b /dev/vda ] && echo the same",
    );
    assert!(compared.contains("the same"), "{compared}");
}

#[test]
fn linux_finds_virtio_on_pci_by_acpi() {
    works("cloud", 2, "", Interrupts::Messages);
}

#[test]
fn pins_interrupt_through_the_io_apic() {
    works("cloud", 2, "pci=nomsi", Interrupts::IoApic);
}

#[test]
fn the_mp_table_routes_pins_where_acpi_does_not() {
    works("generic", 2, "pci=noacpi", Interrupts::Messages);
    works("generic", 2, "pci=noacpi,nomsi", Interrupts::IoApic);
    works("generic", 2, "acpi=off pci=nomsi", Interrupts::IoApic);
}

/// Debian's cloud kernel reads no MP table: it is left with the 8259As.
#[test]
fn type_1_and_the_8259as_are_enough() {
    works("cloud", 1, "acpi=off", Interrupts::Pic);
    works("cloud", 1, "pci=noacpi", Interrupts::Pic);
}

#[test]
fn the_next_debians_and_a_32_bit_kernel_use_virtio_on_pci() {
    works("trixie", 2, "", Interrupts::Messages);
    works("i386", 1, "", Interrupts::Messages);
}
