//! The built-in NAT, seen by an independent stack (smoltcp) through its packets alone.
#![cfg(test)]
#![expect(unsafe_code, reason = "descriptors of the backend, limits of the process")]
#![expect(clippy::cast_possible_truncation, clippy::unwrap_used, clippy::panic, reason = "these are tests")]

#[path = "nat/guest.rs"]
mod guest;

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use guest::{ADDRESS, ADDRESS6, GATEWAY, GATEWAY_MAC, GATEWAY6, Guest, MAC, OFFLOADS, Trouble, Wire};
use proptest::prelude::*;
use smoltcp::socket::{dhcpv4, icmp, tcp};
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr};
use vmdevices::net::{Action, Forward, Nat};

/// A NAT whose gateway stands for this host's loopback addresses.
fn nat() -> Nat {
    Nat::new().unwrap().gateway_is_host()
}

fn gateway(port: u16) -> SocketAddr {
    SocketAddr::from((GATEWAY, port))
}

/// Numbers that look random, the same for one seed.
fn noise(len: usize, mut seed: u64) -> Vec<u8> {
    let words = std::iter::repeat_with(|| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 32).to_le_bytes()
    });
    words.flatten().take(len).collect()
}

/// Serves every connection on a port of 127.0.0.1, or ::1, on a thread of its own.
fn serve(address: IpAddr, serve: impl Fn(TcpStream) + Send + Sync + 'static) -> u16 {
    let listener = TcpListener::bind((address, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let serve = std::sync::Arc::new(serve);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let serve = serve.clone();
            std::thread::spawn(move || serve(stream.unwrap()));
        }
    });
    port
}

const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Sends all back, and then the end.
fn echo(stream: TcpStream) {
    std::io::copy(&mut &stream, &mut &stream).ok();
    stream.shutdown(std::net::Shutdown::Write).ok();
}

#[test]
fn dhcp_gives_an_address_that_stays() {
    let mut guest = Guest::bare(nat().host_name("guest").unwrap(), 0);
    let handle = guest.dhcp();
    let (address, router, dns) =
        guest.until("a lease", |guest| match guest.sockets.get_mut::<dhcpv4::Socket<'_>>(handle).poll()? {
            dhcpv4::Event::Configured(config) => {
                Some((config.address, config.router, config.dns_servers.to_vec()))
            }
            dhcpv4::Event::Deconfigured => None,
        });
    assert_eq!((address.address(), address.prefix_len()), (ADDRESS, 24));
    assert_eq!((router, dns), (Some(GATEWAY), vec![GATEWAY]));
}

/// Sends echo requests and gives the answers' payloads.
fn ping(guest: &mut Guest, to: Ipv4Addr) -> Vec<u8> {
    let room = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 4], vec![0; 4096]);
    let mut socket = icmp::Socket::new(room(), room());
    socket.bind(icmp::Endpoint::Ident(0x1234)).unwrap();
    let handle = guest.sockets.add(socket);
    let request = Icmpv4Repr::EchoRequest { ident: 0x1234, seq_no: 3, data: b"are you there" };
    let mut bytes = vec![0; request.buffer_len()];
    request.emit(&mut Icmpv4Packet::new_unchecked(&mut bytes), &Default::default());
    guest.icmp(handle).send_slice(&bytes, to.into()).unwrap();
    guest.until("an echo reply", |guest| {
        let (bytes, from) = guest.icmp(handle).recv().ok()?;
        assert_eq!(from, to.into());
        let packet = Icmpv4Packet::new_checked(bytes).unwrap();
        match Icmpv4Repr::parse(&packet, &Default::default()).unwrap() {
            Icmpv4Repr::EchoReply { ident: 0x1234, seq_no: 3, data } => Some(data.to_vec()),
            other => panic!("{other:?}"),
        }
    })
}

#[test]
fn the_gateway_answers_echo_requests() {
    let mut guest = Guest::new(Nat::new().unwrap());
    assert_eq!(ping(&mut guest, GATEWAY), b"are you there");
}

#[test]
fn data_goes_both_ways_with_half_closes_over_both_versions() {
    let data = noise(3_000_000, 1);
    for (host, gateway) in [(LOCALHOST, IpAddr::from(GATEWAY)), (Ipv6Addr::LOCALHOST.into(), GATEWAY6.into())]
    {
        let port = serve(host, echo);
        for features in [OFFLOADS, 0] {
            let mut guest = Guest::with(nat(), features);
            let handle = guest.connected(SocketAddr::new(gateway, port));
            assert!(guest.exchange(handle, &data) == data, "{host} {features:#x}: the data is another");
            guest.until("the flow's end", |guest| {
                (guest.wire.nat.handle().stats().tcp_opened == 1).then_some(())
            });
        }
    }
}

#[test]
fn the_host_may_end_first() {
    let (sender, end) = std::sync::mpsc::channel();
    let port = serve(LOCALHOST, move |mut stream| {
        stream.write_all(b"hello").unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        sender.send(rest == b"and good bye").unwrap();
    });
    let mut guest = Guest::new(nat());
    let handle = guest.connected(gateway(port));
    let hello = guest.until("a word", |guest| {
        let socket = guest.tcp(handle);
        (socket.recv_queue() == 5).then(|| socket.recv(|bytes| (5, bytes.to_vec())).unwrap())
    });
    assert_eq!(hello, b"hello");
    guest.until("the host's end", |guest| (!guest.tcp(handle).may_recv()).then_some(()));
    assert!(guest.tcp(handle).may_send());
    assert_eq!(guest.exchange(handle, b"and good bye"), b"");
    assert!(guest.until("the host's verdict", |_| end.try_recv().ok()));
    // The guest's end may be sent again for a while, and is acknowledged then.
    guest.until("the flow's end", |guest| (guest.wire.nat.handle().stats().flows == 0).then_some(()));
}

#[test]
fn who_refuses_is_seen_to_refuse() {
    let free = TcpListener::bind((LOCALHOST, 0)).unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let mut guest = Guest::new(nat());
    let start = Instant::now();
    let handle = guest.connect(gateway(port));
    guest.until("a refusal", |guest| (guest.tcp(handle).state() == tcp::State::Closed).then_some(()));
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    guest.until("the flow's end", |guest| (guest.wire.nat.handle().stats().flows == 0).then_some(()));
}

#[test]
fn resets_pass_both_ways() {
    let (sender, ends) = std::sync::mpsc::channel();
    let port = serve(LOCALHOST, move |mut stream| {
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(1) if byte == *b"r" => {
                rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
            }
            Ok(1) => sender.send(stream.read(&mut byte).map_err(|error| error.kind())).unwrap(),
            other => panic!("{other:?}"),
        }
    });
    let mut guest = Guest::new(nat());
    let handle = guest.connected(gateway(port));
    guest.tcp(handle).send_slice(b"r").unwrap();
    guest.until("the host's reset", |guest| (guest.tcp(handle).state() == tcp::State::Closed).then_some(()));

    let handle = guest.connected(gateway(port));
    guest.tcp(handle).send_slice(b"w").unwrap();
    guest.work(Duration::from_millis(50));
    guest.tcp(handle).abort();
    guest.poll();
    let end = guest.until("the guest's reset", |_| ends.try_recv().ok());
    assert_eq!(end, Err(std::io::ErrorKind::ConnectionReset));
    guest.until("the flows' end", |guest| (guest.wire.nat.handle().stats().flows == 0).then_some(()));
}

/// As many descriptors as this process may have.
fn many_descriptors() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: it fills the structure that it is given.
    assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) }, 0);
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: it reads the structure that it is given.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }, 0);
    assert!(limit.rlim_cur >= 4096, "needs a limit of 4096 descriptors (ulimit -Hn)");
}

#[test]
fn a_thousand_connections_are_open_at_once() {
    const COUNT: usize = 1200;
    many_descriptors();
    let listener = TcpListener::bind((LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let host = std::thread::spawn(move || {
        let mut streams = (0..COUNT).map(|_| listener.accept().unwrap().0).collect::<Vec<_>>();
        for stream in &mut streams {
            let mut bytes = [0; 4];
            stream.read_exact(&mut bytes).unwrap();
            stream.write_all(&bytes.map(|byte| !byte)).unwrap();
        }
        streams
    });
    let mut guest = Guest::new(nat());
    let mut handles = Vec::new();
    // No more at a time than the host's queue takes.
    for _ in 0..COUNT / 100 {
        let some = (0..100).map(|_| guest.connect_with(gateway(port), 2048)).collect::<Vec<_>>();
        for &handle in &some {
            guest.until("connecting", |guest| {
                (guest.tcp(handle).state() == tcp::State::Established).then_some(())
            });
        }
        handles.extend(some);
    }
    for (number, &handle) in handles.iter().enumerate() {
        guest.tcp(handle).send_slice(&(number as u32).to_le_bytes()).unwrap();
    }
    for (number, &handle) in handles.iter().enumerate() {
        let answer = guest.until("an answer", |guest| {
            let socket = guest.tcp(handle);
            (socket.recv_queue() == 4).then(|| socket.recv(|bytes| (4, bytes.to_vec())).unwrap())
        });
        assert_eq!(answer, (!(number as u32)).to_le_bytes());
    }
    assert_eq!(guest.wire.nat.handle().stats().flows, COUNT as u64);
    assert_eq!(guest.wire.nat.handle().stats().evicted, 0);
    drop(host.join().unwrap());
}

/// Takes `len` bytes of noise from the host and gives them back, in one connection.
fn bulk(len: usize, features: u64) {
    let data = std::sync::Arc::new(noise(1 << 20, 2));
    let (source, times) = (data.clone(), len >> 20);
    let port = serve(LOCALHOST, move |mut stream| {
        for _ in 0..times {
            stream.write_all(&source).unwrap();
        }
        let mut part = vec![0; source.len()];
        for _ in 0..times {
            stream.read_exact(&mut part).unwrap();
            assert!(part == *source, "the data is another");
        }
        stream.write_all(b"right").unwrap();
    });
    let mut guest = Guest::with(nat(), features);
    let handle = guest.connected(gateway(port));
    let (mut received, mut sent) = (0, 0);
    let start = Instant::now();
    while received < len {
        guest.until("data", |guest| {
            let socket = guest.tcp(handle);
            let mut moved = false;
            while socket.can_recv() {
                let room = data.len() - received % data.len();
                let here = socket
                    .recv(|bytes| {
                        let here = bytes.len().min(room);
                        let at = received % data.len();
                        assert!(bytes[..here] == data[at..at + here], "the data is another");
                        (here, here)
                    })
                    .unwrap();
                received += here;
                moved = true;
            }
            moved.then_some(())
        });
    }
    let there = start.elapsed();
    while sent < len {
        guest.until("room", |guest| {
            let socket = guest.tcp(handle);
            let at = sent % data.len();
            let here = if socket.can_send() { socket.send_slice(&data[at..]).unwrap() } else { 0 };
            sent += here;
            (here > 0).then_some(())
        });
    }
    guest.until("the host's verdict", |guest| {
        let socket = guest.tcp(handle);
        (socket.recv_queue() == 5)
            .then(|| assert_eq!(socket.recv(|bytes| (5, bytes.to_vec())).unwrap(), b"right"))
    });
    let rate = |time: Duration| len as f64 / (1 << 20) as f64 / time.as_secs_f64();
    println!("{} MiB each way: {:.0} and {:.0} MiB/s", len >> 20, rate(there), rate(start.elapsed() - there));
    assert_eq!(guest.wire.nat.handle().stats().retransmitted, 0);
}

#[test]
fn much_data_arrives_as_it_was() {
    bulk(64 << 20, OFFLOADS);
    bulk(8 << 20, 0);
}

#[test]
#[ignore = "takes a minute"]
fn a_gibibyte_arrives_as_it_was() {
    bulk(1 << 30, OFFLOADS);
}

#[test]
fn a_side_that_does_not_read_makes_the_other_wait() {
    let (ready, go) = std::sync::mpsc::channel();
    let go = std::sync::Mutex::new(go);
    let port = serve(LOCALHOST, move |mut stream| {
        go.lock().unwrap().recv().unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        stream.write_all(&(rest.len() as u64).to_le_bytes()).unwrap();
    });
    let mut guest = Guest::new(nat().most_held(256 << 10));
    let handle = guest.connected(gateway(port));
    let part = noise(64 << 10, 3);
    let (mut sent, mut still) = (0_u64, Instant::now());
    while still.elapsed() < Duration::from_secs(1) {
        guest.poll();
        let socket = guest.tcp(handle);
        if socket.can_send() {
            sent += socket.send_slice(&part).unwrap() as u64;
            still = Instant::now();
        }
        // The host's socket buffers, a window, and the guest's own buffer.
        assert!(sent < 32 << 20, "{sent} bytes go nowhere");
    }
    assert!(sent > 256 << 10, "{sent}");
    ready.send(()).unwrap();
    let rest = guest.exchange(handle, b"");
    assert_eq!(rest, sent.to_le_bytes());

    // The other way: the host's writer waits for a guest that does not read.
    let written = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = written.clone();
    let port = serve(LOCALHOST, move |mut stream| {
        for part in noise(64 << 20, 4).chunks(1 << 16) {
            stream.write_all(part).unwrap();
            count.fetch_add(part.len(), std::sync::atomic::Ordering::Relaxed);
        }
    });
    let handle = guest.connected(gateway(port));
    guest.work(Duration::from_millis(1500));
    let before = written.load(std::sync::atomic::Ordering::Relaxed);
    assert!(before < 32 << 20, "{before} bytes wait somewhere");
    assert!(guest.exchange(handle, b"") == noise(64 << 20, 4), "the data is another");
}

#[test]
fn ports_are_forwarded_while_they_are() {
    let nat = Nat::new().unwrap().forward(Forward::tcp(0, 80)).unwrap();
    let handle = nat.handle();
    let tcp_port = handle.forwards()[0];
    let mut guest = Guest::new(nat);
    let listener = guest.listen(80);
    let client = std::thread::spawn(move || {
        let mut stream = TcpStream::connect(tcp_port.bind).unwrap();
        stream.write_all(b"question").unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    });
    guest.until("a client", |guest| guest.tcp(listener).is_active().then_some(()));
    assert_eq!(guest.tcp(listener).remote_endpoint().unwrap().addr, GATEWAY.into());
    assert_eq!(guest.exchange(listener, b"answer"), b"question");
    guest.until("the client's end", |_| client.is_finished().then_some(()));
    assert_eq!(client.join().unwrap(), "answer");

    // Nobody listens in the guest: the client is told.
    let client = std::thread::spawn(move || TcpStream::connect(tcp_port.bind).unwrap().read(&mut [0; 1]));
    guest.until("the client's end", |_| client.is_finished().then_some(()));
    assert_eq!(client.join().unwrap().unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);

    // UDP, added while it runs; over IPv6, once the guest has been heard with it.
    guest.ask_gateway6();
    let udp = handle.forward(Forward::udp(0, 53).bind(Ipv6Addr::LOCALHOST.into())).unwrap();
    let socket = guest.udp_socket(53);
    let client = UdpSocket::bind("[::1]:0").unwrap();
    client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    for round in 0..3_u8 {
        client.send_to(&[round; 100], udp.bind).unwrap();
        let (data, from) = guest.answer(socket);
        assert_eq!((data, from.ip()), (vec![round; 100], GATEWAY6.into()));
        guest.udp(socket).send_slice(&[!round; 50], from).unwrap();
        guest.poll();
        let mut answer = [0; 100];
        assert_eq!(client.recv_from(&mut answer).unwrap(), (50, udp.bind));
        assert_eq!(answer[..50], [!round; 50]);
    }
    assert_eq!(handle.stats().udp_opened, 1);

    assert!(handle.remove_forward(&tcp_port) && !handle.remove_forward(&tcp_port));
    assert_eq!(handle.forwards(), [udp]);
    assert!(TcpStream::connect(tcp_port.bind).is_err());
}

impl Guest {
    /// Has the NAT hear the guest's IPv6 address.
    fn ask_gateway6(&mut self) {
        let handle = self.connect(SocketAddr::from((GATEWAY6, 9)));
        self.until("a refusal", |guest| (guest.tcp(handle).state() == tcp::State::Closed).then_some(()));
    }
}

#[test]
fn udp_goes_out_and_comes_back_in_fragments_too() {
    let host = UdpSocket::bind((LOCALHOST, 0)).unwrap();
    let port = host.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let mut room = vec![0; 65_536];
        while let Ok((len, from)) = host.recv_from(&mut room) {
            host.send_to(&room[..len], from).unwrap();
        }
    });
    let mut guest = Guest::new(nat());
    let handle = guest.udp_socket(5000);
    for len in [0, 1, 1472, 1473, 9000] {
        let data = noise(len, len as u64);
        let (answer, from) = guest.ask(handle, gateway(port), &data);
        assert!(answer == data && from == gateway(port), "{len}");
    }
    assert_eq!(guest.wire.nat.handle().stats().udp_opened, 1);
    // Nobody there: the guest is told with every packet or soon after.
    guest.wire.seen = Some(Vec::new());
    let free = UdpSocket::bind((LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
    guest.udp(handle).send_slice(b"anybody?", gateway(free)).unwrap();
    guest.until("a port unreachable", |guest| guest.icmp_seen(3, 3).then_some(()));
}

impl Guest {
    /// Whether an ICMP message of this type and code was seen.
    fn icmp_seen(&self, kind: u8, code: u8) -> bool {
        let frames = self.wire.seen.as_ref().unwrap();
        frames.iter().any(|frame| {
            frame[12..14] == [8, 0] && frame[23] == 1 && frame[34..36] == [kind, code] && frame.len() >= 70
        })
    }
}

#[test]
fn the_policy_holds_for_all_protocols() {
    let port = serve(LOCALHOST, echo);
    let nat = Nat::new()
        .unwrap()
        .allow(format!("tcp:127.0.0.1:{port}").parse().unwrap())
        .deny("192.0.2.0/24".parse().unwrap());
    let handle = nat.handle();
    let mut guest = Guest::new(nat);
    guest.wire.seen = Some(Vec::new());
    let open = guest.connected(SocketAddr::new(LOCALHOST, port));
    assert_eq!(guest.exchange(open, b"x"), b"x");
    // Loopback by any other name or port, link-local, what the rule denies, and the gateway's own ports.
    let udp = guest.udp_socket(5000);
    for address in ["127.0.0.2", "127.0.0.1", "169.254.169.254", "192.0.2.1"] {
        guest.wire.seen = Some(Vec::new());
        let closed = guest.connect(SocketAddr::new(address.parse().unwrap(), 22));
        guest.until(address, |guest| guest.icmp_seen(3, 13).then_some(()));
        guest.tcp(closed).abort();
        guest.wire.seen = Some(Vec::new());
        guest.udp(udp).send_slice(b"x", SocketAddr::new(address.parse().unwrap(), 53)).unwrap();
        guest.until(address, |guest| guest.icmp_seen(3, 13).then_some(()));
    }
    let closed = guest.connect(gateway(port));
    guest.until("a refusal", |guest| (guest.tcp(closed).state() == tcp::State::Closed).then_some(()));
    let counts = handle.rules().into_iter().map(|count| count.flows).collect::<Vec<_>>();
    assert_eq!((handle.stats().denied, handle.stats().tcp_opened), (8, 1));
    assert_eq!(counts, [1, 2, 6, 0]);
}

#[test]
fn nothing_goes_out_where_the_default_denies() {
    let port = serve(LOCALHOST, echo);
    let nat = nat().otherwise(Action::Deny).allow(format!("tcp:10.0.2.2:{port}").parse().unwrap());
    let mut guest = Guest::new(nat);
    let open = guest.connected(gateway(port));
    assert_eq!(guest.exchange(open, b"x"), b"x");
    guest.wire.seen = Some(Vec::new());
    guest.connect(SocketAddr::from(([198, 51, 100, 1], 80)));
    guest.until("a refusal", |guest| guest.icmp_seen(3, 13).then_some(()));
}

/// A query for the IPv4 addresses of `name`.
fn query(name: &str) -> Vec<u8> {
    let mut message = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        message.push(label.len() as u8);
        message.extend(label.as_bytes());
    }
    message.extend([0, 0, 1, 0, 1]);
    message
}

#[test]
fn names_are_answered_here_or_by_resolvers() {
    // A resolver that says nothing, and one that answers with the query turned into a response.
    let silent = UdpSocket::bind((LOCALHOST, 0)).unwrap();
    let resolver = TcpListener::bind((LOCALHOST, 0)).unwrap();
    let address = resolver.local_addr().unwrap();
    let datagrams = UdpSocket::bind(address).unwrap();
    std::thread::spawn(move || {
        let mut room = [0; 512];
        while let Ok((len, from)) = datagrams.recv_from(&mut room) {
            room[2] |= 0x80;
            datagrams.send_to(&room[..len], from).unwrap();
        }
    });
    std::thread::spawn(move || resolver.incoming().for_each(|stream| echo(stream.unwrap())));
    let nat = Nat::new()
        .unwrap()
        .resolvers([silent.local_addr().unwrap(), address])
        .name("box.test", ["192.0.2.7".parse().unwrap()])
        .resolve(|name| name.strip_suffix(".made.up").map(|_| vec!["192.0.2.8".parse().unwrap()]));
    let mut guest = Guest::new(nat);
    let socket = guest.udp_socket(5000);
    for (name, last) in [("box.test", 7), ("any.made.up", 8)] {
        let (answer, from) = guest.ask(socket, gateway(53), &query(name));
        assert_eq!(from, gateway(53));
        assert!(answer.ends_with(&[0, 4, 192, 0, 2, last]), "{answer:?}");
    }
    // The first resolver does not answer; the client's second try is for the second.
    guest.udp(socket).send_slice(&query("far.test"), gateway(53)).unwrap();
    guest.work(Duration::from_millis(1100));
    let (answer, from) = guest.ask(socket, gateway(53), &query("far.test"));
    let mut expected = query("far.test");
    expected[2] |= 0x80;
    assert_eq!((answer, from), (expected, gateway(53)));
    // Long answers come over TCP, from the first resolver: here nobody listens for that.
    let handle = guest.connect(gateway(53));
    guest.until("a refusal", |guest| (guest.tcp(handle).state() == tcp::State::Closed).then_some(()));

    let mut guest = Guest::new(Nat::new().unwrap().resolvers([address]));
    let handle = guest.connected(gateway(53));
    assert_eq!(guest.exchange(handle, b"a query"), b"a query");
    let mut guest = Guest::new(Nat::new().unwrap().resolvers([]));
    let socket = guest.udp_socket(5000);
    assert_eq!(guest.ask(socket, gateway(53), &query("far.test")).0[3], 0x82);
}

#[test]
fn flows_have_a_limit_and_end_when_idle() {
    let port = serve(LOCALHOST, echo);
    let idle = Duration::from_millis(700);
    let mut guest = Guest::new(nat().most_flows(4).idle(idle, idle));
    let first = guest.connected(gateway(port));
    let rest = (0..4).map(|_| guest.connected(gateway(port))).collect::<Vec<_>>();
    guest.until("the eviction", |guest| (guest.tcp(first).state() == tcp::State::Closed).then_some(()));
    assert_eq!(guest.wire.nat.handle().stats().flows, 4);
    assert_eq!(guest.wire.nat.handle().stats().evicted, 1);
    guest
        .until("the end of what is idle", |guest| (guest.wire.nat.handle().stats().flows == 0).then_some(()));
    for handle in rest {
        guest.until("a reset", |guest| (guest.tcp(handle).state() == tcp::State::Closed).then_some(()));
    }
}

#[test]
fn after_a_restore_connections_are_reset_and_the_rest_is_there() {
    let port = serve(LOCALHOST, echo);
    let address = "192.168.9.15".parse().unwrap();
    let nat = nat().ipv4("192.168.9.1".parse().unwrap(), address, 24).unwrap();
    let nat = nat.forward(Forward::tcp(0, 80)).unwrap();
    let forwards = nat.handle().forwards();
    let mut guest = Guest::bare(nat, OFFLOADS);
    guest.interface.update_ip_addrs(|all| {
        all.push(smoltcp::wire::IpCidr::new(IpAddr::V4(address).into(), 24)).unwrap();
    });
    let to = SocketAddr::from(([192, 168, 9, 1], port));
    let handle = guest.connected(to);
    guest.tcp(handle).send_slice(b"ping").unwrap();
    guest.until("an answer", |guest| (guest.tcp(handle).recv_queue() == 4).then_some(()));
    let state = guest.wire.nat.save_state().unwrap();
    // The process ends, another begins.
    guest.move_to(Nat::new().unwrap());
    let mut nat = self::nat();
    nat.restore_state(&state).unwrap();
    assert_eq!(nat.handle().forwards(), forwards);
    guest.move_to(nat);
    let start = Instant::now();
    guest.until("a reset", |guest| (guest.tcp(handle).state() == tcp::State::Closed).then_some(()));
    assert!(start.elapsed() < Duration::from_millis(500), "{:?}", start.elapsed());
    let handle = guest.connected(to);
    assert_eq!(guest.exchange(handle, b"again"), b"again");

    for len in 0..state.len() {
        assert!(Nat::new().unwrap().restore_state(&state[..len]).is_err(), "{len}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 0, ..ProptestConfig::default() })]
    #[test]
    fn what_is_lost_late_or_doubled_comes_all_the_same(
        seed in 1_u64.., lost in 0_u8..12, doubled in 0_u8..40, late in 0_u8..40, offloads: bool
    ) {
        let port = serve(LOCALHOST, echo);
        let mut guest = Guest::with(nat(), if offloads { OFFLOADS } else { 0 });
        let handle = guest.connected(gateway(port));
        guest.wire.trouble = Some(Trouble { state: seed, lost, doubled, late });
        let data = noise(150_000, seed);
        prop_assert!(guest.exchange(handle, &data) == data, "the data is another");
    }
}

/// An IPv4 frame of the guest's.
fn frame(protocol: u8, to: Ipv4Addr, hops: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = [&GATEWAY_MAC[..], &MAC, &[8, 0]].concat();
    frame.extend([0x45, 0]);
    frame.extend(((20 + payload.len()) as u16).to_be_bytes());
    frame.extend([0, 0, 0, 0, hops, protocol, 0, 0]);
    frame.extend(ADDRESS.octets());
    frame.extend(to.octets());
    frame.extend(payload);
    frame
}

fn syn(port: u16, to: u16) -> Vec<u8> {
    let mut segment = [port.to_be_bytes(), to.to_be_bytes()].concat();
    segment.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x60, 2, 0xff, 0xff, 0, 0, 0, 0, 2, 4, 5, 0xb4]);
    segment
}

#[test]
fn the_gateway_counts_as_a_hop() {
    let mut wire = Wire::new(nat(), 0);
    for (protocol, payload) in
        [(6, syn(1000, 80)), (17, vec![0x12, 0x34, 0, 53, 0, 9, 0, 0, 7]), (1, vec![8; 16])]
    {
        wire.send(&frame(protocol, Ipv4Addr::new(198, 51, 100, 1), 1, &payload));
        let answer = wire.receive().unwrap();
        assert_eq!(answer[34..36], [11, 0], "{protocol}");
        assert_eq!(answer[26..30], GATEWAY.octets());
        // It quotes the packet.
        assert_eq!(answer[42 + 20..42 + 28], payload[..8]);
    }
    assert_eq!(wire.nat.handle().stats().flows, 0);
}

/// Frames of all kinds that the NAT knows.
fn valid_frames() -> Vec<Vec<u8>> {
    let arp = [
        &[0xff; 6][..],
        &MAC,
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
        &MAC,
        &[10, 0, 2, 15, 0, 0, 0, 0, 0, 0, 10, 0, 2, 2],
    ];
    let mut dhcp = vec![0; 240];
    dhcp[..3].copy_from_slice(&[1, 1, 6]);
    dhcp[236..].copy_from_slice(&[0x63, 0x82, 0x53, 0x63]);
    dhcp.extend([53, 1, 1, 255]);
    let udp = |from: u16, to: u16, data: &[u8]| {
        let len = (8 + data.len()) as u16;
        [&from.to_be_bytes()[..], &to.to_be_bytes(), &len.to_be_bytes(), &[0, 0], data].concat()
    };
    let six = |next: u8, to: Ipv6Addr, payload: &[u8]| {
        let mut frame = [&GATEWAY_MAC[..], &MAC, &[0x86, 0xdd, 0x60, 0, 0, 0]].concat();
        frame.extend((payload.len() as u16).to_be_bytes());
        frame.extend([next, 255]);
        frame.extend(ADDRESS6.octets());
        frame.extend(to.octets());
        frame.extend(payload);
        frame
    };
    let neighbor = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &GATEWAY6.octets(), &[1, 1], &MAC].concat();
    let mut fragment = frame(17, GATEWAY, 64, &udp(5, 6, &[7; 24]));
    fragment[20] = 0x20;
    let extension = [&[44, 0, 0, 0, 0, 0, 0, 0, 17, 0, 0, 1, 0, 0, 0, 9][..], &udp(5, 6, &[7; 24])].concat();
    vec![
        arp.concat(),
        frame(17, GATEWAY, 64, &udp(68, 67, &dhcp)),
        frame(17, GATEWAY, 64, &udp(1000, 53, &query("box.test"))),
        frame(17, GATEWAY, 64, &udp(1000, 9, b"data")),
        frame(1, GATEWAY, 64, &[8, 0, 0, 0, 0, 1, 0, 2, 3, 4]),
        frame(6, GATEWAY, 64, &syn(1000, 9)),
        fragment,
        six(58, GATEWAY6, &neighbor),
        six(58, Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2), &[133, 0, 0, 0, 0, 0, 0, 0]),
        six(58, GATEWAY6, &[128, 0, 0, 0, 0, 1, 0, 2, 3, 4]),
        six(6, GATEWAY6, &syn(1000, 9)),
        six(0, GATEWAY6, &extension),
    ]
}

#[test]
fn neighbours_and_routers_are_advertised() {
    let mut wire = Wire::new(nat(), 0);
    let frames = valid_frames();
    wire.send(&frames[0]);
    let arp = wire.receive().unwrap();
    assert_eq!(
        (&arp[..6], &arp[20..22], &arp[22..32]),
        (&MAC[..], &[0, 2][..], &[&GATEWAY_MAC[..], &GATEWAY.octets()].concat()[..])
    );
    wire.send(&frames[7]);
    let neighbor = wire.receive().unwrap();
    assert_eq!((neighbor[54], neighbor[58] & 0xe0, &neighbor[80..86]), (136, 0xe0, &GATEWAY_MAC[..]));
    wire.send(&frames[8]);
    let router = wire.receive().unwrap();
    assert_eq!((router[54], &router[..6]), (134, &[0x33, 0x33, 0, 0, 0, 1][..]));
    let options = &router[70..];
    // A network for autonomous addresses, the MTU, and the gateway as resolver.
    let prefix = [&[3, 4, 64, 0xc0][..], &[0xff; 8], &[0; 4], &GATEWAY6.octets()[..8], &[0; 8]].concat();
    for option in [
        prefix,
        vec![5, 1, 0, 0, 0, 0, 5, 220],
        [&[25, 3, 0, 0, 255, 255, 255, 255][..], &GATEWAY6.octets()].concat(),
    ] {
        assert!(options.windows(option.len()).any(|window| window == option), "{option:?}");
    }
    // The echo reply, whose checksum the guest's stack would look at.
    wire.send(&frames[9]);
    assert_eq!(wire.receive().unwrap()[54], 129);
}

#[test]
fn frames_that_lie_do_no_harm() {
    let mut wire = Wire::new(nat().resolvers([]), 0);
    for whole in valid_frames() {
        for len in 0..whole.len() {
            wire.send(&whole[..len]);
            while wire.receive().is_some() {}
        }
        // Each byte of the headers with other values.
        for at in 0..whole.len().min(80) {
            for value in [0, 1, 0x0f, 0x40, 0x7f, 0x80, 0xff] {
                let mut other = whole.clone();
                other[at] = value;
                // Not to real networks: addresses outside the guest's are left alone.
                if other[12..14] == [8, 0] && other[30..34] != GATEWAY.octets()
                    || other[12..14] == [0x86, 0xdd]
                {
                    other[6..12].copy_from_slice(&[0xff; 6]);
                }
                wire.send(&other);
                while wire.receive().is_some() {}
            }
        }
    }
    assert!(wire.nat.handle().stats().malformed > 500);
    assert!(wire.nat.handle().stats().foreign > 500);
    // It still works.
    wire.send(&valid_frames()[4]);
    assert_eq!(wire.receive().unwrap()[34], 0);
}

#[test]
fn a_flood_of_connections_is_bounded() {
    let listener = TcpListener::bind((LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut wire = Wire::new(nat().most_flows(64), 0);
    for number in 0..20_000_u32 {
        let mut segment = syn((number % 60_000) as u16 + 1, port);
        segment[4..8].copy_from_slice(&number.to_be_bytes());
        wire.send(&frame(6, GATEWAY, 64, &segment));
        if number % 1000 == 0 {
            while wire.receive().is_some() {}
        }
    }
    let stats = wire.nat.handle().stats();
    assert!(stats.flows <= 64 && stats.evicted > 10_000, "{stats:?}");
    // Packets for a guest that takes none are dropped, and not kept.
    let mut waiting = 0;
    while wire.receive().is_some() {
        waiting += 1;
    }
    assert!(waiting < 2000, "{waiting}");
}
