//! Network cards under Linux, with everything that a driver can ask of them.

use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmcore::boot::Linux;
use vmcore::boot::acpi::{AcpiDevice, AcpiHid, AcpiResource};
use vmcore::{BusDevice, GuestAddress, Machine, Outcome, Vm, VmHandle};
use vmdevices::console::{self, Script};
use vmdevices::net::{Capture, Datagram, Limiter, Rates, Tap};
use vmdevices::rate::Rate;
use vmdevices::virtio::{Interrupt, NetHandle, Threading, VirtioMmio};
use vmdevices::{Disk, Net, Pc};

use super::network::{ip, namespace};
use super::transport::virtio;
use super::{LIMIT, accel, ask, guests_with};

/// The cards' addresses, but for the last byte.
const STATION: [u8; 5] = [2, 0, 0, 0, 0];

/// Frames that the limited card may send.
const BURST: u64 = 20;

/// A guest with three cards: eth0 has two queues of a tap and is recorded, eth1 and eth2 end at sockets of
/// the test's, and eth2 is limited.
#[test]
fn network_cards_do_what_linux_asks_of_them() {
    let Some(guests) = guests_with("root.ext4") else { return };
    if !namespace() {
        return;
    }
    if Command::new("iperf3").arg("--version").stdout(Stdio::null()).status().is_err() {
        assert!(std::env::var_os("VMCORE_REQUIRE_BOOT").is_none(), "boot tests are required, but no iperf3");
        println!("skipped: no iperf3 (apt-get install iperf3)");
        return;
    }
    let taps = Tap::open_queues("vmtap%d", 2).unwrap();
    let tap = taps[0].name().to_owned();
    for command in ["link set {} mtu 9000 up", "addr add 192.0.2.1/24 dev {}"] {
        assert!(ip(&command.replace("{}", &tap)), "{command}");
    }
    let mut server =
        Server(Command::new("iperf3").args(["-s", "-B", "192.0.2.1"]).stdout(Stdio::null()).spawn().unwrap());

    let directory = tempfile::tempdir().unwrap();
    let pcap = directory.path().join("eth0.pcap");
    let capture = Capture::create(&pcap, 128).unwrap();
    let station = |n| [&STATION[..], &[n]].concat().try_into().unwrap();
    let queues = taps.into_iter().map(|tap| capture.record(tap));
    let first = Net::multiqueue(queues).unwrap().mac(station(0)).unwrap().mtu(9000).unwrap().speed(25_000);
    let (ours, raw) = UnixDatagram::pair().unwrap();
    let second = Net::new(Datagram::new(ours).unwrap()).unwrap().mac(station(1)).unwrap();
    let (ours, limited) = UnixDatagram::pair().unwrap();
    let rates = Rates { packets: Some(Rate { per_second: 1, burst: BURST }), bytes: None };
    let limiter = Limiter::new(rates, Rates::default());
    let third = limiter.limit(Datagram::new(ours).unwrap()).unwrap();
    let third = Net::new(third).unwrap().mac(station(2)).unwrap();
    let handles = [first.handle(), second.handle(), third.handle()];

    let (serial, script) = console::memory().unwrap();
    let linux = Linux::new(guests.join("cloud/vmlinuz"))
        .initrd(guests.join("cloud/initrd.img"))
        .cmdline("console=ttyS0 panic=-1 root=/dev/vda ro vmmod=8021q vmtest=shell vmnet=192.0.2.2/24");
    let mut vm = Vm::builder()
        .accel(accel())
        .cpus(2)
        .memory(256 << 20)
        .boot(linux)
        .attach(Pc::new().serial(serial))
        .attach(virtio(Disk::open_read_only(guests.join("root.ext4")).unwrap()))
        .attach(virtio(first))
        .attach(virtio(second))
        .attach(virtio(third))
        .build()
        .unwrap();
    script.send("stty -echo; echo re''ady\n").unwrap();
    let (transcript, vm_handle) = (script.clone(), vm.handle());
    let typist = std::thread::spawn(move || {
        let _stop = StopWhenPanicking(vm_handle);
        script.expect("ready", LIMIT).unwrap();
        let guest = Guest { script: &script };
        guest.ask("mount -t tmpfs tmpfs /tmp; mount -t tmpfs tmpfs /run");
        let [first, second, third] = &handles;
        queues_and_throughput(&guest, first);
        large_frames(&guest);
        link(&guest, first);
        addresses_and_vlans(&guest, second, &raw);
        limits(&guest, third, &limited);
        script.send("exit\n").unwrap();
    });
    let outcome = vm.run_for(LIMIT);
    drop(vm);
    let typed = typist.join();
    server.0.kill().unwrap();
    assert!(typed.is_ok(), "{}", transcript.transcript());
    assert_eq!(outcome.unwrap(), Outcome::PowerOff, "{}", transcript.transcript());
    assert!(capture.error().is_none());
    recorded(&pcap);
}

/// Does not have a failed test wait for the guest.
struct StopWhenPanicking(VmHandle);

impl Drop for StopWhenPanicking {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.stop();
        }
    }
}

/// Ends with the test.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

struct Guest<'a> {
    script: &'a Script,
}

impl Guest<'_> {
    fn ask(&self, command: &str) -> String {
        ask(self.script, command)
    }

    /// Asks until `expected` is in the answer.
    #[track_caller]
    fn eventually(&self, command: &str, expected: &str) {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let answer = self.ask(command);
            if answer.contains(expected) {
                return;
            }
            assert!(Instant::now() < end, "{command}: {answer}");
        }
    }
}

fn queues_and_throughput(guest: &Guest<'_>, card: &NetHandle) {
    let queues = guest
        .ask("ls /sys/class/net/eth0/queues | tr '\\n' ' '; ethtool -l eth0 | grep Combined | tr -d '\\n'");
    assert!(queues.contains("rx-0 rx-1 tx-0 tx-1"), "{queues}");
    assert!(queues.contains("Combined:\t2Combined:\t2"), "{queues}");
    let speed = guest.ask("ethtool eth0 | grep -E 'Speed|Duplex'; cat /sys/class/net/eth0/mtu");
    assert!(speed.contains("25000Mb/s") && speed.contains("Full") && speed.contains("9000"), "{speed}");
    // Both ways, with one stream and several, which the host spreads over the queues.
    for options in ["", "-R", "-P 4", "-P 4 -R"] {
        let before = card.counters();
        let report = guest.ask(&format!("iperf3 -c 192.0.2.1 -n 16M {options} | tail -n 4"));
        assert!(report.contains("receiver") && report.contains("iperf Done"), "{options}: {report}");
        let after = card.counters();
        let sent = after.sent_bytes - before.sent_bytes;
        let received = after.received_bytes - before.received_bytes;
        let moved = if options.contains("-R") { received } else { sent };
        // The rest of the last window may be lost with the connections.
        assert!(moved > 8 << 20, "{options}: {sent} sent, {received} received");
        println!("iperf3 {options}: {}", report.lines().find(|line| line.contains("receiver")).unwrap_or(""));
    }
    let packets = |queue| {
        let line = guest.ask(&format!("ethtool -S eth0 | grep rx_queue_{queue}_packets | tr : ="));
        line.split('=').nth(1).and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap()
    };
    assert!(packets(0) > 10 && packets(1) > 10, "{} and {} packets", packets(0), packets(1));
    // One queue alone carries everything, and two again.
    let before = packets(1);
    for count in [1, 2] {
        let now = guest.ask(&format!("ethtool -L eth0 combined {count}; ethtool -l eth0 | tail -n 2"));
        assert!(now.contains(&format!("Combined:\t{count}")), "{now}");
        for direction in ["", "-R"] {
            let report = guest.ask(&format!("iperf3 -c 192.0.2.1 -n 2M -P 4 {direction} | tail -n 1"));
            assert!(report.contains("iperf Done"), "{count} queues {direction}: {report}");
        }
    }
    assert!(packets(1) > before, "nothing came by the second queue");
}

fn large_frames(guest: &Guest<'_>) {
    let ping = guest.ask("ping -M do -s 8972 -c 3 -W 10 192.0.2.1");
    assert!(ping.contains("3 packets transmitted, 3 received"), "{ping}");
    let ping = guest.ask("ping -M do -s 8973 -c 1 -W 1 192.0.2.1 2>&1");
    assert!(ping.contains("mtu=9000") || ping.contains("100% packet loss"), "{ping}");
}

fn link(guest: &Guest<'_>, card: &NetHandle) {
    const CARRIER: &str = "echo carrier=$(cat /sys/class/net/eth0/carrier)";
    guest.eventually(CARRIER, "carrier=1");
    card.set_link(false);
    guest.eventually(CARRIER, "carrier=0");
    let ping = guest.ask("ping -c 1 -W 1 192.0.2.1 2>&1");
    assert!(!ping.contains("1 received"), "{ping}");
    card.set_link(true);
    guest.eventually(CARRIER, "carrier=1");
    guest.eventually("ping -c 1 -W 5 192.0.2.1", "1 received");
}

/// A frame for `to` in `vlan`, that nobody will answer.
fn frame(to: [u8; 6], vlan: Option<u16>) -> Vec<u8> {
    let from = [2, 0, 0, 0, 9, 9];
    let tag = vlan.map_or(Vec::new(), |id| [&[0x81, 0][..], &id.to_be_bytes()].concat());
    // EtherType 0x88b5 is for experiments (IEEE 802).
    [&to[..], &from, &tag, &[0x88, 0xb5], &[0; 60]].concat()
}

fn addresses_and_vlans(guest: &Guest<'_>, card: &NetHandle, wire: &UnixDatagram) {
    guest.ask("echo 1 > /proc/sys/net/ipv6/conf/eth1/disable_ipv6; ip link set eth1 up");
    guest.eventually("ip link show dev eth1", "state UP");
    // How many of ten packets are taken, and filtered.
    let count = |to, vlan| {
        let before = card.counters();
        for _ in 0..10 {
            wire.send(&frame(to, vlan)).unwrap();
        }
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let now = card.counters();
            let (taken, filtered) = (
                now.received_packets - before.received_packets,
                now.received_filtered - before.received_filtered,
            );
            if taken + filtered >= 10 || Instant::now() > end {
                return (taken, filtered);
            }
            std::thread::yield_now();
        }
    };
    let (own, other) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 7, 7]);
    let group = [1, 0, 0x5e, 0, 0, 99];
    assert_eq!((count(own, None), count(other, None), count(group, None)), ((10, 0), (0, 10), (0, 10)));
    assert_eq!((count([0xff; 6], None), count(own, Some(5))), ((10, 0), (0, 10)));
    guest.ask("ip maddr add 01:00:5e:00:00:63 dev eth1; ip link set eth1 promisc on");
    assert_eq!((count(other, None), count(group, None)), ((10, 0), (10, 0)));
    guest.ask("ip link set eth1 promisc off");
    assert_eq!((count(other, None), count(group, None)), ((0, 10), (10, 0)));
    guest.ask("ip link set eth1 allmulticast on; ip link set eth1 down; ip link set eth1 address 02:00:00:00:07:07; ip link set eth1 up");
    assert_eq!((card.mac(), count(other, None), count(own, None)), (other, (10, 0), (0, 10)));
    assert_eq!(count([1, 0, 0x5e, 0, 0, 98], None), (10, 0));

    // VLAN 5, and what Linux sends on it.
    guest.ask("ip link add link eth1 name eth1.5 type vlan id 5; ip link set eth1.5 up; ip addr add 198.51.100.2/24 dev eth1.5");
    assert_eq!(
        (count(other, Some(5)), count(other, Some(6)), count(other, Some(0))),
        ((10, 0), (0, 10), (10, 0))
    );
    guest.eventually("ip -s link show dev eth1.5 | tail -n 4 | tr '\\n' ' '", " 10 ");
    wire.set_nonblocking(true).unwrap();
    while wire.recv(&mut [0; 2000]).is_ok() {}
    wire.set_nonblocking(false).unwrap();
    wire.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    guest.ask("ping -c 1 -W 1 198.51.100.1");
    // A question for an address, between what IPv6 has to say of itself.
    let mut bytes = [0; 2000];
    while !bytes[12..].starts_with(&[0x81, 0, 0, 5, 8, 6]) {
        assert!(wire.recv(&mut bytes).unwrap() >= 46, "{:x?}", &bytes[..46]);
    }
    guest.ask("ip link del eth1.5");
    assert_eq!(count(other, Some(5)), (0, 10));
}

/// What goes out is counted here and waits there.
fn limits(guest: &Guest<'_>, card: &NetHandle, wire: &UnixDatagram) {
    guest.ask("echo 1 > /proc/sys/net/ipv6/conf/eth2/disable_ipv6; ip link set eth2 up; ip addr add 203.0.113.2/24 dev eth2");
    guest.ask("ip neigh add 203.0.113.1 lladdr 02:00:00:00:00:99 dev eth2");
    let start = Instant::now();
    guest.ask("ping -q -f -c 100 -W 1 203.0.113.1; true");
    wire.set_nonblocking(true).unwrap();
    let count = std::iter::from_fn(|| wire.recv(&mut [0; 2000]).ok()).count() as u64;
    let passed = start.elapsed().as_secs() + 1;
    assert!((BURST..=BURST + passed).contains(&count), "{count} in {passed} s");
    let counters = card.counters();
    assert_eq!((counters.sent_dropped, counters.sent_packets >= count), (0, true), "{counters:?}");
    // Nothing is lost, only late: the rest goes on, and a guest with packets that wait can be used.
    assert!(guest.ask("echo still here").contains("still here"));
}

/// The file has a head and whole records, with ARP and IP among them.
fn recorded(path: &Path) {
    let bytes = std::fs::read(path).unwrap();
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    assert_eq!([word(0), word(4), word(16), word(20)], [0xa1b2_3c4d, 0x0004_0002, 128, 1]);
    let (mut at, mut types, mut longest) = (24, std::collections::BTreeMap::<_, u32>::new(), 0);
    while at < bytes.len() {
        let (kept, whole) = (word(at + 8), word(at + 12));
        assert!(kept == whole.min(128) && word(at + 4) < 1_000_000_000, "at {at:#x}");
        *types.entry([bytes[at + 28], bytes[at + 29]]).or_default() += 1;
        longest = longest.max(whole);
        at += 16 + kept as usize;
    }
    assert_eq!(at, bytes.len());
    assert!(types[&[8, 0]] > 1000 && types[&[8, 6]] > 1 && longest > 9000, "{types:x?} {longest}");
}

/// A machine with one card that goes on elsewhere, with its card on another network, tells that network
/// where it is. Of the other devices nothing is moved: the guest is not asked for anything there.
#[test]
fn a_moved_guest_announces_its_address() {
    const MEMORY: u64 = 256 << 20;
    let Some(guests) = guests_with("cloud/initrd.img") else { return };
    let make = || {
        let (serial, script) = console::memory().unwrap();
        let (ours, wire) = UnixDatagram::pair().unwrap();
        let linux = Linux::new(guests.join("cloud/vmlinuz"))
            .initrd(guests.join("cloud/initrd.img"))
            .cmdline("console=ttyS0 panic=-1 vmtest=shell vmnet=192.0.2.2/24");
        let card = Net::new(Datagram::new(ours).unwrap()).unwrap().mac([2, 0, 0, 0, 0, 3]).unwrap();
        let device = Arc::new(Mutex::new(None));
        let attached = device.clone();
        let vm = Vm::builder()
            .accel(accel())
            .memory(MEMORY)
            .boot(linux)
            .attach(Pc::new().serial(serial))
            .attach(move |machine: &mut Machine| {
                let (base, gsi) = (machine.mmio_window(0x1000)?, machine.allocate_gsi());
                let threading = Threading::IoThreads(vec![machine.io_thread("net")?]);
                let interrupt = Interrupt::Line(machine.irq_line(gsi));
                let device = VirtioMmio::new("net", card, machine.memory().clone(), interrupt, threading)?;
                let device = Arc::new(Mutex::new(device));
                *attached.lock().unwrap() = Some(device.clone());
                machine.mmio(base, 0x1000, device)?;
                machine.describe(AcpiDevice {
                    name: "VR00".into(),
                    hid: AcpiHid::Text("LNRO0005".into()),
                    uid: 0,
                    resources: vec![
                        AcpiResource::Memory { base: base.0, len: 0x1000 },
                        AcpiResource::Irq { gsi, level: false, shared: true },
                    ],
                });
                Ok(())
            })
            .build()
            .unwrap();
        let device = device.lock().unwrap().take().unwrap();
        (vm, script, wire, device)
    };
    let (mut vm, script, wire, device) = make();
    let handle = vm.handle();
    script.send("stty -echo; echo re''ady\n").unwrap();
    let typist = std::thread::spawn(move || {
        let _stop = StopWhenPanicking(handle.clone());
        script.expect("ready", LIMIT).unwrap();
        let address =
            "ip link set eth0 down; ip link set eth0 address 02:00:00:00:07:07; ip link set eth0 up";
        ask(&script, &format!("{address}; ip addr add 192.0.2.2/24 dev eth0; ip link show eth0"));
        handle.stop();
    });
    let outcome = vm.run_for(LIMIT).unwrap();
    typist.join().unwrap();
    assert_eq!(outcome, Outcome::Stopped);
    let state = vm.handle().pause().unwrap().save().unwrap();
    let card = device.lock().unwrap().save().unwrap();
    let mut memory = vec![0; usize::try_from(MEMORY).unwrap()];
    vm.memory().read(GuestAddress(0), &mut memory).unwrap();
    drop((vm, device, wire));

    let (mut vm, _script, wire, device) = make();
    vm.memory().write(GuestAddress(0), &memory).unwrap();
    vm.handle().pause().unwrap().restore(&state).unwrap();
    device.lock().unwrap().restore(&card).unwrap();
    let handle = vm.handle();
    let watcher = std::thread::spawn(move || {
        let _stop = StopWhenPanicking(handle.clone());
        wire.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let (mut bytes, own) = ([0; 2000], [2, 0, 0, 0, 7, 7]);
        // A gratuitous ARP: from its own address, about its own address.
        loop {
            let len = wire.recv(&mut bytes).unwrap();
            let arp = len >= 42 && bytes[6..14] == [&own[..], &[8, 6]].concat();
            if arp && bytes[28..32] == [192, 0, 2, 2] && bytes[38..42] == [192, 0, 2, 2] {
                break;
            }
        }
        handle.stop();
    });
    let outcome = vm.run_for(LIMIT).unwrap();
    watcher.join().unwrap();
    assert_eq!(outcome, Outcome::Stopped);
}
