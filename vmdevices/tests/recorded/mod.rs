//! What a stock Debian kernel does with each device, as seeds for the fuzz targets.
#![expect(
    clippy::cast_possible_truncation,
    clippy::expect_used,
    reason = "a fuzz crate of its own workspace"
)]

#[path = "../../fuzz/src/lib.rs"]
mod fuzz;
mod pci;
#[path = "../reach/mod.rs"]
mod reach;
mod recorder;
mod seeds;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmdevices::console::{self, Script};
use vmdevices::net::{Capture, Forward, Nat, NatHandle};
use vmdevices::virtio::{BalloonHandle, VsockHandle};
use vmdevices::{Balloon, Disk, Net, Rng, VirtioConsole, Vsock};

use super::devices::{at_the_shell, machine, shell};
use super::{LIMIT, guests_with};
use recorder::{Log, attach};
use seeds::Fit;

/// The address of the card on the NAT.
const STATION: [u8; 6] = [2, 0, 0, 0, 0, 0x11];

/// Stations of sockets: as those of the fuzz target.
const CID: u32 = 3;
const HOST_PORT: u32 = 1;
const GUEST_PORT: u32 = 2;

/// Connects to the host, and answers a connection of the host's.
const SOCKETS: &str = r"
import socket, sys
def vsock(): return socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
if sys.argv[1] == 'connect':
    s = vsock(); s.connect((2, 1)); s.sendall(b'from the guest'); print(s.recv(100))
    s.shutdown(socket.SHUT_WR); print(s.recv(100)); s.close()
    s = vsock()
    try: s.connect((2, 9))
    except OSError as e: print(e)
else:
    l = vsock(); l.bind((socket.VMADDR_CID_ANY, 2)); l.listen(1); print('list' + 'ening', flush=True)
    s, _ = l.accept(); s.sendall(s.recv(100)); s.sendall(b'more'); s.close(); print('clo' + 'sed', flush=True)
";

/// What the guest does, one recording for each device.
#[derive(Default)]
struct Logs {
    disk: Log,
    rng: Log,
    console: Log,
    ports: Log,
    sockets: Log,
    balloon: Log,
    /// One queue pair on the NAT, and several that lead back.
    card: Log,
    cards: Log,
    pci: pci::Log,
}

impl Logs {
    /// Begins a part of all of them.
    fn part(&self, name: &'static str) {
        let logs =
            [&self.disk, &self.rng, &self.console, &self.ports, &self.sockets, &self.balloon, &self.card];
        logs.into_iter().chain([&self.cards]).for_each(|log| log.part(name));
    }
}

/// A capture in memory.
#[derive(Clone, Default)]
struct Frames(Arc<Mutex<Vec<u8>>>);

impl Write for Frames {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Frames {
    /// What the guest has sent since this was asked the last time.
    fn sent(&self) -> Vec<Vec<u8>> {
        // Before each frame are 16 bytes, of which the third word is its length.
        let bytes = std::mem::take(&mut *self.0.lock().unwrap());
        let (mut rest, mut frames) = (&bytes[..], Vec::new());
        while let Some((head, tail)) = rest.split_at_checked(16) {
            let len = u32::from_le_bytes(head[8..12].try_into().unwrap()) as usize;
            let (frame, tail) = tail.split_at(len);
            rest = tail;
            if frame[6..12] == STATION {
                frames.push(frame.to_vec());
            }
        }
        frames
    }
}

/// The host's ends of all devices.
struct Host {
    logs: Logs,
    terminal: Script,
    port: Script,
    sockets: VsockHandle,
    balloon: BalloonHandle,
    nat: NatHandle,
    frames: Frames,
}

/// Seeds to make of a device's recording: their names, and the parts that each consists of.
type Plan = &'static [(&'static str, &'static [&'static str])];

/// Seeds that this made: target, name, input.
type Seeds = Vec<(&'static str, &'static str, Vec<u8>)>;

/// With `VMCORE_FUZZ_CORPUS` they are put there. They are tried here in any case.
#[test]
#[ignore = "records the fuzz targets' seeds"]
fn a_stock_kernels_traffic_makes_fuzz_seeds() {
    let Some(guests) = guests_with("debian.ext4") else { return };
    let logs = Logs::default();
    let frames = Frames::default();
    let capture = Capture::to(frames.clone(), Capture::WHOLE).unwrap();
    // The head of the file is no frame.
    frames.0.lock().unwrap().clear();
    let nat = Nat::new().unwrap().gateway_is_host().resolvers([]);
    let nat = nat.name("box", [Ipv4Addr::LOCALHOST.into()]).forward(Forward::tcp(0, fuzz::nat::FORWARDED));
    let nat = nat.unwrap();
    let nat_handle = nat.handle();
    let card = Net::new(capture.record(nat)).unwrap().mac(STATION).unwrap();
    let (terminal, hvc) = console::memory().unwrap();
    let (agent, port) = console::memory().unwrap();
    let ports = VirtioConsole::new(console::Null).port("agent", agent).unwrap();
    let resize = ports.handle().unwrap();
    let sockets = Vsock::new(CID).unwrap();
    let balloon = Balloon::new().unwrap();
    let host = Host {
        logs,
        terminal: hvc,
        port,
        sockets: sockets.handle(),
        balloon: balloon.handle(),
        nat: nat_handle,
        frames,
    };
    let logs = &host.logs;
    let (builder, script) = machine(&guests, "cloud", "root=/dev/vda ro vmmod=8021q", 512);
    let vm = builder
        .attach(Disk::open_read_only(guests.join("debian.ext4")).unwrap())
        .attach(Disk::open_read_only(guests.join("root.ext4")).unwrap())
        .attach(attach(fuzz::disk(), &logs.disk))
        .attach(attach(Rng::new(), &logs.rng))
        .attach(attach(VirtioConsole::new(terminal), &logs.console))
        .attach(attach(ports, &logs.ports))
        .attach(attach(sockets, &logs.sockets))
        .attach(attach(balloon, &logs.balloon))
        .attach(attach(card, &logs.card))
        .attach(attach(fuzz::card(), &logs.cards))
        .attach(pci::attach(&logs.pci))
        .build()
        .unwrap();
    resize.set_size(0, 80, 25).unwrap();
    host.port.send("typed before\n").unwrap();
    let mut seeds = Seeds::new();
    at_the_shell(vm, &script, || {
        // A shell that edits no lines.
        script.send("exec env PS1= PS2= dash\n").unwrap();
        shell(&script, "mount -t tmpfs tmpfs /tmp; mount -t tmpfs tmpfs /run; stty -echo");
        host.everything(&script, &mut seeds);
    });
    host.devices(&mut seeds);
    keep(&seeds);
}

impl Host {
    /// Has the guest use every device, in parts that become seeds.
    fn everything(&self, script: &Script, seeds: &mut Seeds) {
        let ask = |command: &str| shell(script, command);
        seeds.push(("pci", "linux-boot", self.logs.pci.input(true)));
        self.disk(&ask);
        self.logs.part("random");
        ask("for rng in $(cat /sys/class/misc/hw_random/rng_available); do \
             echo $rng >/sys/class/misc/hw_random/rng_current; dd if=/dev/hwrng bs=48 count=3 of=/dev/null; done");
        seeds.push(("pci", "linux-random", self.logs.pci.input(false)));
        self.terminals(&ask);
        self.sockets(script);
        self.balloon(&ask);
        self.card(script, seeds);
        self.cards(&ask);
        self.logs.part("end");
    }

    fn disk(&self, ask: &impl Fn(&str) -> String) {
        const DISK: &str = "/dev/vdc";
        self.logs.part("read");
        let read =
            ask(&format!("dd if={DISK} bs=4k iflag=direct | md5sum; dd if={DISK} bs=16k count=1 | md5sum"));
        assert_eq!(read.matches('-').count(), 2, "{read}");
        self.logs.part("write");
        ask(&format!("echo some words | dd of={DISK} bs=512 seek=3 conv=sync oflag=direct"));
        ask(&format!("dd if=/dev/zero of={DISK} bs=1k seek=8 count=6 conv=fsync"));
        self.logs.part("discard");
        let discarded = ask(&format!("blkdiscard -o 4096 -l 8192 {DISK} && echo good"));
        assert!(discarded.contains("good"), "{discarded}");
        self.logs.part("zeroes");
        let zeroed =
            ask(&format!("blkdiscard -z -o 512 -l 1024 {DISK} && blkdiscard -z {DISK} && echo good"));
        assert!(zeroed.contains("good"), "{zeroed}");
        self.logs.part("serial");
        ask(
            "cat /sys/block/vdc/serial; cat /sys/block/vdc/cache_type; echo write through >/sys/block/vdc/cache_type",
        );
    }

    fn terminals(&self, ask: &impl Fn(&str) -> String) {
        self.logs.part("terminal");
        ask("exec 3<>/dev/hvc0; stty raw -echo <&3");
        self.terminal.send("from the host\n").unwrap();
        let said = ask("head -n 1 <&3; echo to the host >&3; seq 100 >&3; exec 3>&-");
        assert!(said.contains("from the host"), "{said}");
        self.terminal.expect("to the host", LIMIT).unwrap();
        self.logs.part("port");
        let said = ask("exec 3<>$(echo /dev/vport*p1); head -n 1 <&3; echo to the host >&3; exec 3>&-");
        assert!(said.contains("typed before"), "{said}");
        self.port.expect("to the host", LIMIT).unwrap();
        ask("echo to nobody >/dev/hvc1");
    }

    fn sockets(&self, script: &Script) {
        script.send(format!("cat >/tmp/sockets.py <<'END'\n{SOCKETS}END\n")).unwrap();
        // The first connection of the host's has the number that it has in the fuzz target.
        self.logs.part("listen");
        script.send("python3 /tmp/sockets.py listen &\n").unwrap();
        script.expect("listening", LIMIT).unwrap();
        let mut stream = self.sockets.connect(GUEST_PORT, LIMIT).unwrap();
        stream.write_all(b"from the host").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "from the hostmore");
        script.expect("closed", LIMIT).unwrap();
        drop(stream);
        self.logs.part("connect");
        let listener = self.sockets.listen(HOST_PORT).unwrap();
        script.send("python3 /tmp/sockets.py connect; echo do''ne\n").unwrap();
        let mut stream: UnixStream = listener.accept(LIMIT).unwrap();
        let mut bytes = [0; 14];
        stream.read_exact(&mut bytes).unwrap();
        stream.write_all(b"from the host").unwrap();
        assert_eq!(stream.read(&mut bytes).unwrap(), 0);
        drop(stream);
        script.expect("done", LIMIT).unwrap();
    }

    fn balloon(&self, ask: &impl Fn(&str) -> String) {
        let reaches = |bytes| {
            self.balloon.set_target(bytes).unwrap();
            let end = Instant::now() + LIMIT;
            while self.balloon.actual() != bytes {
                assert!(Instant::now() < end, "{} bytes are in it", self.balloon.actual());
                std::thread::sleep(Duration::from_millis(20));
            }
        };
        self.logs.part("inflate");
        reaches(4 * fuzz::PAGE);
        reaches(40 * fuzz::PAGE);
        self.logs.part("deflate");
        reaches(4 * fuzz::PAGE);
        reaches(0);
        self.logs.part("statistics");
        for _ in 0..2 {
            assert!(self.balloon.statistics(LIMIT).unwrap().total.is_some());
        }
        self.logs.part("report");
        // Linux reports two seconds after memory got free.
        ask("dd if=/dev/zero of=/tmp/file bs=1M count=100; rm /tmp/file; sleep 5");
    }

    fn card(&self, script: &Script, seeds: &mut Seeds) {
        let ask = |command: &str| shell(script, command);
        let mut part = |name, port, connected| {
            seeds.push(("nat", name, seeds::nat(&self.frames.sent(), port, connected)));
        };
        self.frames.sent();
        self.logs.part("lease");
        script
            .send("cat >/tmp/lease <<'END'\n#!/bin/sh\n[ $1 = bound ] && ip addr add $ip/$mask dev $interface && ip route add default via $router\nEND\n")
            .unwrap();
        let lease = ask(
            "card=$(grep -l 02:00:00:00:00:11 /sys/class/net/e*/address); card=${card%/*}; card=${card##*/}; \
             chmod 755 /tmp/lease; ip link set lo up; ip link set $card up; \
             busybox udhcpc -i $card -s /tmp/lease -n -q -T 1 -t 20; ip addr show dev $card",
        );
        assert!(lease.contains("10.0.2.15"), "{lease}");
        part("linux-lease", 0, false);
        self.logs.part("ping");
        let ping =
            ask("busybox ping -c 2 -W 10 10.0.2.2; sleep 2; busybox ping6 -c 1 -W 10 fd76:6d63:6f72::1");
        assert!(ping.contains("2 packets received") && ping.contains("1 packets received"), "{ping}");
        part("linux-ping", 0, false);
        self.logs.part("names");
        let name = ask("busybox nslookup box 10.0.2.2; busybox nslookup nobody.test 10.0.2.2");
        assert!(name.contains("Address"), "{name}");
        part("linux-names", 0, false);

        self.logs.part("client");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = std::thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            let mut request = [0; 1000];
            assert!(stream.read(&mut request).unwrap() > 0);
            stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nthe host's words").unwrap();
        });
        let got = ask(&format!("busybox wget -q -O - http://10.0.2.2:{port}/"));
        assert!(got.contains("the host's words"), "{got}");
        server.join().unwrap();
        ask("sleep 1");
        part("linux-client", port, false);

        self.logs.part("server");
        let forwarded = fuzz::nat::FORWARDED;
        ask(&format!("seq 300 >/tmp/numbers; busybox httpd -p {forwarded} -h /tmp"));
        let mut stream = TcpStream::connect(self.nat.forwards()[0].bind).unwrap();
        stream.write_all(b"GET /numbers HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.ends_with("300\n"), "{answer}");
        drop(stream);
        ask("sleep 1");
        part("linux-server", 0, true);
    }

    fn cards(&self, ask: &impl Fn(&str) -> String) {
        self.logs.part("filter");
        ask("mkdir /tmp/root; mount -t ext4 -o ro,noload /dev/vdb /tmp/root; \
             cards=$(grep -L 02:00:00:00:00:11 /sys/class/net/e*/address); cards=${cards%/*}; cards=${cards##*/}");
        ask(
            "ip link set $cards up; ip maddr add 01:00:5e:00:00:63 dev $cards; ip link set $cards promisc on; \
             ip link set $cards promisc off; ip link set $cards allmulticast on; ip link set $cards allmulticast off; \
             ip link set $cards down; ip link set $cards address 02:00:00:00:07:07; ip link set $cards up",
        );
        self.logs.part("vlan");
        ask("ip link add link $cards name vlan5 type vlan id 5; ip link set vlan5 up; ip link del vlan5");
        self.logs.part("queues");
        let queues = ask(
            "chroot /tmp/root ethtool -L $cards combined 2; chroot /tmp/root ethtool -l $cards | tail -n 2; \
             chroot /tmp/root ethtool -K $cards rx-gro-hw off; chroot /tmp/root ethtool -K $cards rx-gro-hw on",
        );
        assert!(queues.contains("Combined:\t2"), "{queues}");
        self.logs.part("packets");
        ask(
            "ip addr add 198.51.100.2/24 dev $cards; ip neigh add 198.51.100.1 lladdr 02:00:00:00:00:99 dev $cards; \
             busybox ping -c 1 -W 1 198.51.100.1; \
             echo 0 >/sys/class/net/$cards/queues/tx-0/xps_cpus; echo 1 >/sys/class/net/$cards/queues/tx-1/xps_cpus; \
             busybox ping -c 1 -s 3000 -W 1 198.51.100.1; busybox ping -c 1 -W 1 198.51.100.1",
        );
    }

    /// The seeds of virtio-mmio devices.
    fn devices(&self, seeds: &mut Seeds) {
        let Logs { disk, rng, console, ports, sockets, balloon, card, cards, .. } = &self.logs;
        // Pages of the little memory, behind the queues.
        let pages = Fit {
            piece: 0x2000,
            content: |queue, content| {
                for number in content.chunks_exact_mut(4).filter(|_| queue < 2) {
                    number.copy_from_slice(&[8 + number[0] % 8, 0, 0, 0]);
                }
            },
        };
        let whole = Fit::pieces(0x4000);
        let plans: [(_, &Log, Fit, Plan); 8] = [
            (
                "virtio_block",
                disk,
                whole,
                &[
                    ("linux-probe", &["probe"]),
                    ("linux-read", &["read"]),
                    ("linux-write", &["write"]),
                    ("linux-discard", &["discard"]),
                    ("linux-zeroes", &["zeroes"]),
                    ("linux-serial", &["serial"]),
                ],
            ),
            ("virtio_rng", rng, whole, &[("linux-probe", &["probe"]), ("linux-random", &["random"])]),
            ("virtio_console", console, Fit::pieces(0x200), &[("linux-terminal", &["probe", "terminal"])]),
            (
                "virtio_ports",
                ports,
                Fit::pieces(0x200),
                &[("linux-probe", &["probe"]), ("linux-port", &["probe", "port"])],
            ),
            (
                "virtio_vsock",
                sockets,
                Fit::pieces(0x400),
                &[("linux-listen", &["listen"]), ("linux-connect", &["connect"])],
            ),
            (
                "virtio_balloon",
                balloon,
                pages,
                &[
                    ("linux-balloon", &["inflate", "deflate"]),
                    ("linux-statistics", &["statistics"]),
                    ("linux-report", &["report"]),
                ],
            ),
            (
                "virtio_net",
                card,
                Fit::pieces(0x600),
                &[("linux-lease", &["lease"]), ("linux-client", &["client"]), ("linux-server", &["server"])],
            ),
            (
                "virtio_net",
                cards,
                Fit::pieces(0x600),
                &[
                    ("linux-filter", &["filter"]),
                    ("linux-queues", &["vlan", "queues"]),
                    ("linux-packets", &["queues", "packets"]),
                ],
            ),
        ];
        for (target, log, fit, parts) in plans {
            let events = log.events();
            for &(name, parts) in parts {
                seeds.push((target, name, seeds::device(&events, parts, fit)));
            }
        }
        let events = cards.events();
        for (name, parts) in [
            ("linux-filter", &["probe", "filter"][..]),
            ("linux-queues", &["vlan", "queues"]),
            ("linux-packets", &["queues", "packets"]),
        ] {
            seeds.push(("virtio_net_commands", name, seeds::commands(&events, parts)));
        }
    }
}

/// Has each seed reach something, and all of a target together what they are to; then they are written, where
/// that is asked for, over those of before.
fn keep(seeds: &Seeds) {
    let mut reached = BTreeMap::<_, BTreeSet<_>>::new();
    for (target, name, input) in seeds {
        let of_seed = reach::reached(target, input);
        println!("{target}/{name}: {} bytes reach {of_seed:?}", input.len());
        assert!(!of_seed.is_empty(), "{target}/{name} reaches nothing");
        reached.entry(*target).or_default().extend(of_seed);
    }
    for (target, wanted) in reach::targets() {
        let reached = reached.get(target).unwrap_or_else(|| panic!("no seed of {target}"));
        assert!(reached.is_superset(&wanted), "{target}: {reached:?}, not all of {wanted:?}");
    }
    let Some(corpus) = std::env::var_os("VMCORE_FUZZ_CORPUS").map(PathBuf::from) else { return };
    // Tests run in the directory of their package, and who gives a path in the one of the workspace.
    let corpus = if corpus.is_dir() { corpus } else { PathBuf::from("..").join(corpus) };
    for (target, name, input) in seeds {
        std::fs::write(corpus.join(target).join(name), input).unwrap();
    }
}
