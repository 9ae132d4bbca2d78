//! A stock Debian guest on the built-in NAT.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Barrier, LazyLock};
use std::time::{Duration, Instant};

use vmcore::boot::Linux;
use vmcore::{Outcome, Vm};
use vmdevices::console::Script;
use vmdevices::net::{Forward, Nat};
use vmdevices::{Disk, Net, Pc, console};

use super::transport::virtio;
use super::{LIMIT, accel, ask, guests, guests_with};

/// What udhcpc runs: sets what it got.
const LEASE: &str = r#"#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add "$ip/$mask" dev "$interface"
ip link set "$interface" mtu "${mtu:-1500}"
ip route add default via "$router"
echo "nameserver $dns" > /etc/resolv.conf
echo "leased $ip/$mask via $router dns $dns mtu $mtu name $hostname for $lease"
"#;

/// Answers every request with `mib` MiB; returns its port.
fn serve(mib: u32) -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut request = [0; 1024];
            let len = stream.read(&mut request).unwrap();
            assert!(request[..len].starts_with(b"GET /file"));
            let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", u64::from(mib) << 20);
            stream.write_all(head.as_bytes()).unwrap();
            for number in 0..mib {
                // The guest may have gone.
                if stream.write_all(&part(number)).is_err() {
                    break;
                }
            }
        }
    });
    port
}

/// One MiB of the file, another for each number.
fn part(number: u32) -> Vec<u8> {
    static NOISE: LazyLock<Vec<u8>> = LazyLock::new(|| {
        (0..1 << 18).flat_map(|word: u32| word.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect()
    });
    let mut part = NOISE.clone();
    part[..4].copy_from_slice(&number.to_le_bytes());
    part
}

/// Has the guest end, when the test fails too.
struct End<'a>(&'a Script);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.send("exit\n").ok();
    }
}

/// Boots a guest with a card on `nat`, has it ask for an address, and has `act` talk to its shell.
fn with_guest(nat: Nat, act: impl FnOnce(&Script) + Send + 'static) {
    let Some(guests) = guests() else { return };
    boot(&guests, "", None, nat, move |script| {
        script.send(format!("cat > /tmp/lease <<'EOF'\n{LEASE}EOF\nchmod 755 /tmp/lease\n")).unwrap();
        ask(script, "ip link set lo up; ip link set eth0 up");
        let lease = ask(script, "udhcpc -i eth0 -s /tmp/lease -n -q -T 1 -t 20");
        let expected = "leased 10.0.2.15/24 via 10.0.2.2 dns 10.0.2.2 mtu 1500 name guest for ";
        assert!(lease.contains(expected), "{lease}");
        act(script);
    });
}

/// Boots a guest with a card on `nat`, and a disk, if there is one, that the guest does not write; has `act`
/// talk to its shell.
fn boot(guests: &Path, more: &str, disk: Option<Disk>, nat: Nat, act: impl FnOnce(&Script) + Send + 'static) {
    let (serial, script) = console::memory().unwrap();
    let linux = Linux::new(guests.join("cloud/vmlinuz"))
        .initrd(guests.join("cloud/initrd.img"))
        .cmdline(format!("console=ttyS0 panic=-1 vmtest=shell {more}"));
    let mut builder = Vm::builder()
        .accel(accel())
        .cpus(2)
        .memory(256 << 20)
        .boot(linux)
        .attach(Pc::new().serial(serial))
        .attach(virtio(Net::nat(nat).unwrap()));
    if let Some(disk) = disk {
        builder = builder.attach(virtio(disk));
    }
    let mut vm = builder.build().unwrap();
    let transcript = script.clone();
    script.send("stty -echo; PS1=; echo re''ady\n").unwrap();
    let typist = std::thread::spawn(move || {
        let end = End(&script);
        script.expect("ready", LIMIT).unwrap();
        act(&script);
        drop(end);
    });
    // Each question has the limit to itself.
    let outcome = vm.run_for(3 * LIMIT);
    drop(vm);
    let typed = typist.join();
    let transcript = transcript.transcript();
    assert!(typed.is_ok() && matches!(outcome, Ok(Outcome::PowerOff)), "{outcome:?}\n{transcript}");
}

fn nat() -> Nat {
    Nat::new().unwrap().gateway_is_host().host_name("guest").unwrap().resolvers([])
}

/// Has the guest download `mib` MiB by name and compare its checksum.
fn download(script: &Script, port: u16, mib: u32) {
    let mut md5sum = Command::new("md5sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut input = md5sum.stdin.take().unwrap();
    (0..mib).for_each(|number| input.write_all(&part(number)).unwrap());
    drop(input);
    let expected = String::from_utf8(md5sum.wait_with_output().unwrap().stdout).unwrap();
    let start = Instant::now();
    let sum = ask(script, &format!("wget -q -O - http://files.test:{port}/file | md5sum"));
    let rate = f64::from(mib) / start.elapsed().as_secs_f64();
    println!("the guest downloaded {mib} MiB with {rate:.0} MiB/s, md5sum included");
    assert!(sum.contains(expected.trim()), "{sum}, not {expected}");
}

#[test]
fn a_guest_is_on_the_network_without_privileges() {
    let port = serve(128);
    let closed = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let closed_port = closed.local_addr().unwrap().port();
    let nat = nat()
        .name("files.test", [Ipv4Addr::new(10, 0, 2, 2).into()])
        .deny(format!("tcp:10.0.2.2:{closed_port}").parse().unwrap())
        .forward(Forward::tcp(0, 8080))
        .unwrap();
    let handle = nat.handle();
    with_guest(nat, move |script| {
        let ask = |command: &str| ask(script, command);
        let ping = ask("ping -c 2 -W 10 10.0.2.2");
        assert!(ping.contains("2 packets received"), "{ping}");
        // An address by router advertisement, and the gateway's own.
        let six = ask(
            "for i in $(seq 50); do ip -6 addr show dev eth0 scope global | grep -v tentative | grep fd76:6d63:6f72 && break; usleep 200000; done; ping6 -c 1 -W 10 fd76:6d63:6f72::1",
        );
        assert!(six.contains("inet6 fd76:6d63:6f72:") && six.contains("1 packets received"), "{six}");
        let name = ask("nslookup files.test");
        assert!(name.contains("10.0.2.2") && !name.contains("NXDOMAIN"), "{name}");
        let name = ask("nslookup nobody.test");
        assert!(name.contains("SERVFAIL") || name.contains("can't resolve"), "{name}");

        download(script, port, 128);
        // It serves a file to the host.
        ask("mkdir /tmp/www; seq 1 500000 > /tmp/www/numbers; httpd -p 8080 -h /tmp/www");
        let forward = handle.forwards()[0].bind;
        let mut stream = TcpStream::connect(forward).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.write_all(b"GET /numbers HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let text = String::from_utf8(answer).unwrap();
        let body = text.split_once("\r\n\r\n").unwrap().1;
        assert!(body.lines().map(|line| line.parse::<u32>().unwrap()).eq(1..=500_000));

        // What the policy denies is told at once.
        let start = Instant::now();
        for target in [format!("10.0.2.2:{closed_port}"), "169.254.169.254".into(), "224.0.0.1".into()] {
            let refused = ask(&format!("wget -q -O - http://{target}/ 2>&1"));
            assert!(
                refused.contains("No route to host") || refused.contains("unreachable"),
                "{target}: {refused}"
            );
        }
        assert!(start.elapsed() < Duration::from_secs(20));
        let refused = ask("wget -q -O - http://10.0.2.2:1/ 2>&1");
        assert!(refused.contains("Connection refused"), "{refused}");
        assert!(handle.rules()[0].flows >= 1);
        println!("{:?}", handle.stats());
        assert_eq!(handle.stats().malformed, 0);
    });
    drop(closed);
}

#[test]
#[ignore = "takes minutes on the software CPU"]
fn a_guest_downloads_a_gibibyte() {
    let port = serve(1024);
    let nat = nat().name("files.test", [Ipv4Addr::new(10, 0, 2, 2).into()]);
    with_guest(nat, move |script| download(script, port, 1024));
}

/// Connections are descriptors here twice: the NAT's and the server's.
fn many_descriptors() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).unwrap();
}

#[test]
fn a_guest_keeps_a_thousand_connections_and_uploads_beside_them() {
    const COUNT: usize = 1000;
    many_descriptors();
    let Some(guests) = guests_with("root.ext4") else { return };
    let listen = || {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        (listener, port)
    };
    let (crowd, crowd_port) = listen();
    let (upload, upload_port) = listen();
    // Answers nobody before all are there, and the file too.
    let all_there = Arc::new(Barrier::new(2));
    let server = std::thread::spawn({
        let all_there = all_there.clone();
        move || {
            let streams = (0..COUNT).map(|_| crowd.accept().unwrap().0).collect::<Vec<_>>();
            all_there.wait();
            all_there.wait();
            for stream in &streams {
                let mut line = String::new();
                BufReader::new(stream).read_line(&mut line).unwrap();
                let number: usize = line.trim().parse().unwrap();
                writeln!(&*stream, "{}", 7 * number + 1).unwrap();
            }
        }
    });
    let receiver = std::thread::spawn(move || {
        let (stream, _) = upload.accept().unwrap();
        let sum = Command::new("md5sum").stdin(std::os::fd::OwnedFd::from(stream)).output().unwrap();
        String::from_utf8(sum.stdout).unwrap()
    });
    let nat = nat();
    let handle = nat.handle();
    let root = Disk::open_read_only(guests.join("root.ext4")).unwrap();
    let more = "root=/dev/vda ro vmnet=10.0.2.15/24 vmgw=10.0.2.2";
    boot(&guests, more, Some(root), nat, move |script| {
        let ask = |command: &str| ask(script, command);
        let opened = ask(&format!(
            "ulimit -n 4096; fds=(); for i in $(seq {COUNT}); do exec {{fd}}<>/dev/tcp/10.0.2.2/{crowd_port} || break; \
             fds+=($fd); done; echo opened ${{#fds[@]}}"
        ));
        assert!(opened.contains(&format!("opened {COUNT}")), "{opened}");
        all_there.wait();
        let stats = handle.stats();
        assert!(stats.flows >= COUNT as u64 && stats.evicted == 0, "{stats:?}");

        let sum = ask(&format!(
            "mount -t tmpfs tmpfs /tmp; seq 1000000 >/tmp/up; cat /tmp/up >/dev/tcp/10.0.2.2/{upload_port}; md5sum </tmp/up"
        ));
        let received = receiver.join().unwrap();
        assert!(sum.contains(received.trim()), "{sum}, not {received}");

        all_there.wait();
        let begin = Instant::now();
        let good = ask("for i in ${!fds[@]}; do echo $i >&${fds[i]}; done; good=0; for i in ${!fds[@]}; do \
             read -r -u ${fds[i]} answer; [ \"$answer\" = $((7 * i + 1)) ] && good=$((good + 1)); done; echo good $good");
        assert!(good.contains(&format!("good {COUNT}")), "{good}");
        println!("answers on all of them took {:?}: {:?}", begin.elapsed(), handle.stats());
        assert_eq!((handle.stats().malformed, handle.stats().evicted), (0, 0));
    });
    server.join().unwrap();
}
