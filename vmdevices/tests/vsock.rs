//! The socket device under the `virtio-drivers` crate's driver: streams both ways, credit, half-closes
//! and resets.
#![cfg(test)]
#![expect(unsafe_code, reason = "the Hal trait is unsafe to implement")]

mod driver;

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use driver::{Machine, Registers};
use virtio_drivers::Error;
use virtio_drivers::device::socket::{
    SocketError, VirtIOSocket, VsockAddr, VsockConnectionManager, VsockEvent, VsockEventType,
};
use vmdevices::Vsock;

const CID: u32 = 42;
const LIMIT: Duration = Duration::from_secs(10);
const HOST: u64 = 2;

/// A guest whose streams have this room.
struct Guest {
    registers: Registers,
    sockets: VsockConnectionManager<driver::Memory, Registers, 4096>,
}

impl Guest {
    fn new(machine: &Machine, device: Vsock, room: u32) -> Self {
        let registers = machine.device(device);
        let driver = VirtIOSocket::new(registers.clone()).unwrap();
        assert_eq!(driver.guest_cid(), u64::from(CID));
        Self { registers, sockets: VsockConnectionManager::new_with_capacity(driver, room) }
    }

    fn poll(&mut self) -> Option<VsockEvent> {
        self.registers.poll();
        self.sockets.poll().unwrap()
    }

    /// The next event but of credit.
    fn event(&mut self) -> VsockEvent {
        let end = Instant::now() + LIMIT;
        loop {
            match self.poll() {
                Some(VsockEvent { event_type: VsockEventType::CreditUpdate, .. }) | None => {}
                Some(event) => return event,
            }
            assert!(Instant::now() < end, "no event came");
            std::thread::yield_now();
        }
    }

    /// Reads `count` bytes of a stream, telling the device of the room they leave.
    fn read(&mut self, host: u32, port: u32, count: usize) -> Vec<u8> {
        let peer = VsockAddr { cid: HOST, port: host };
        let mut all = Vec::new();
        let end = Instant::now() + LIMIT;
        while all.len() < count {
            self.poll();
            let mut piece = vec![0; count - all.len()];
            let got = self.sockets.recv(peer, port, &mut piece).unwrap();
            if got > 0 {
                self.sockets.update_credit(peer, port).unwrap();
            }
            all.extend(&piece[..got]);
            assert!(Instant::now() < end, "{} of {count} bytes came", all.len());
        }
        all
    }
}

fn pattern(count: usize) -> Vec<u8> {
    (0..count).map(|n| u8::try_from(n % 251).unwrap()).collect()
}

fn client(stream: UnixStream) -> UnixStream {
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.set_write_timeout(Some(LIMIT)).unwrap();
    stream
}

#[test]
fn the_socket_connects_clients_to_ports_of_the_guest() {
    // With room in the guest for one of its buffers at a time, and for more than it has buffers.
    for (machine, room) in
        [4096, 200_000].into_iter().flat_map(|room| Machine::both().map(move |m| (m, room)))
    {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm.sock");
        let mut guest = Guest::new(&machine, Vsock::new(CID).unwrap().socket(&path).unwrap(), room);
        guest.sockets.listen(1000);

        let mut host = client(UnixStream::connect(&path).unwrap());
        // The line may come in pieces, with data behind it.
        host.write_all(b"CONN").unwrap();
        guest.poll();
        host.write_all(b"ECT 1000\nearly").unwrap();
        let event = guest.event();
        assert_eq!(event.event_type, VsockEventType::ConnectionRequest);
        let port = event.source.port;
        let mut answers = BufReader::new(host.try_clone().unwrap());
        let mut line = String::new();
        guest.registers.poll();
        answers.read_line(&mut line).unwrap();
        assert_eq!(line, format!("OK {port}\n"));
        assert_eq!(guest.read(port, 1000, 5), b"early");

        // More than the guest has room for, and more than the device keeps.
        let text = pattern(300_000);
        let sender = {
            let (mut host, text) = (host.try_clone().unwrap(), text.clone());
            std::thread::spawn(move || host.write_all(&text).unwrap())
        };
        assert!(guest.read(port, 1000, text.len()) == text);
        sender.join().unwrap();

        // Half closed, the other direction goes on.
        host.shutdown(Shutdown::Write).unwrap();
        let peer = VsockAddr { cid: HOST, port };
        guest.registers.poll();
        guest.sockets.send(peer, 1000, b"last words").unwrap();
        guest.registers.poll();
        let mut last = [0; 10];
        answers.read_exact(&mut last).unwrap();
        assert_eq!(&last, b"last words");
        drop((host, answers));
        let event = guest.event();
        assert!(matches!(event.event_type, VsockEventType::Disconnected { .. }), "{event:?}");
    }
}

#[test]
fn clients_of_ports_where_nobody_listens_and_of_none_are_closed() {
    for machine in Machine::both() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm.sock");
        let device = Vsock::new(CID).unwrap().socket(&path).unwrap();
        assert!(Vsock::new(CID).unwrap().socket(&path).is_err(), "somebody listens");
        let mut guest = Guest::new(&machine, device, 4096);
        for line in ["CONNECT 9\n", "HELLO 9\n", "CONNECT 99999999999999999999999999999\n"] {
            let mut host = client(UnixStream::connect(&path).unwrap());
            host.write_all(line.as_bytes()).unwrap();
            let end = Instant::now() + LIMIT;
            host.set_nonblocking(true).unwrap();
            let closed = loop {
                guest.poll();
                match host.read(&mut [0; 1]) {
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => assert!(Instant::now() < end),
                    other => break other,
                }
            };
            // With its words unread the host's kernel says that it was reset.
            assert!(
                matches!(closed, Ok(0)) || closed.is_err_and(|e| e.kind() == io::ErrorKind::ConnectionReset)
            );
        }
        drop(guest);
        assert!(!path.exists(), "the file is left behind");
    }
}

#[test]
fn the_guest_reaches_servers_of_the_host() {
    for machine in Machine::both() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm.sock");
        let server = UnixListener::bind(directory.path().join("vm.sock_77")).unwrap();
        let mut guest = Guest::new(&machine, Vsock::new(CID).unwrap().socket(&path).unwrap(), 4096);
        let (peer, nobody) = (VsockAddr { cid: HOST, port: 77 }, VsockAddr { cid: HOST, port: 78 });

        guest.sockets.connect(nobody, 5).unwrap();
        assert!(matches!(guest.event().event_type, VsockEventType::Disconnected { .. }));
        // Of another machine than the host there is nothing either.
        guest.sockets.connect(VsockAddr { cid: 9, port: 77 }, 6).unwrap();
        assert!(matches!(guest.event().event_type, VsockEventType::Disconnected { .. }));

        guest.sockets.connect(peer, 5).unwrap();
        assert_eq!(guest.event().event_type, VsockEventType::Connected);
        let mut host = client(server.accept().unwrap().0);
        // The host does not read: the guest is stopped by its credit, and nothing is lost.
        let text = pattern(50_000);
        let mut sent = Vec::new();
        let mut refused = 0;
        while refused < 1000 {
            match guest.sockets.send(peer, 5, &text) {
                Ok(()) => (refused, sent) = (0, [sent, text.clone()].concat()),
                Err(error) => {
                    assert!(matches!(
                        error,
                        Error::SocketDeviceError(SocketError::InsufficientBufferSpaceInPeer)
                    ));
                    refused += 1;
                    guest.poll();
                }
            }
            assert!(sent.len() < 10_000_000, "credit without end");
        }
        assert!(sent.len() >= 128 << 10, "{}", sent.len());
        assert!(guest.registers.was_told());
        let mut got = vec![0; sent.len()];
        let reader = std::thread::spawn(move || {
            host.read_exact(&mut got).unwrap();
            (host, got)
        });
        let end = Instant::now() + LIMIT;
        while !reader.is_finished() {
            guest.poll();
            assert!(Instant::now() < end, "the host's side does not get it all");
        }
        let (mut host, got) = reader.join().unwrap();
        assert!(got == sent);
        // There is room again.
        let end = Instant::now() + LIMIT;
        while guest.sockets.send(peer, 5, b"more").is_err() {
            guest.poll();
            assert!(Instant::now() < end, "no credit comes back");
        }
        guest.sockets.shutdown(peer, 5).unwrap();
        let event = guest.event();
        assert!(matches!(event.event_type, VsockEventType::Disconnected { .. }), "{event:?}");
        let mut rest = String::new();
        host.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "more");
        // The ports can be used again; a reset of the guest is one on the host.
        guest.sockets.connect(peer, 5).unwrap();
        assert_eq!(guest.event().event_type, VsockEventType::Connected);
        let mut host = client(server.accept().unwrap().0);
        guest.sockets.force_close(peer, 5).unwrap();
        guest.poll();
        assert_eq!(host.read(&mut [0]).unwrap(), 0);
    }
}

#[test]
fn the_embedder_connects_and_listens_in_process() {
    for machine in Machine::both() {
        let device = Vsock::new(CID).unwrap();
        let handle = device.handle();
        let early = {
            let handle = handle.clone();
            std::thread::spawn(move || handle.connect(1000, LIMIT))
        };
        let mut guest = Guest::new(&machine, device, 4096);
        guest.sockets.listen(1000);
        let port = guest.event().source.port;
        guest.registers.poll();
        let mut host = client(early.join().unwrap().unwrap());
        host.write_all(b"to the guest").unwrap();
        assert_eq!(guest.read(port, 1000, 12), b"to the guest");

        let refused = {
            let handle = handle.clone();
            std::thread::spawn(move || handle.connect(1001, LIMIT))
        };
        while !refused.is_finished() {
            guest.poll();
        }
        let error = refused.join().unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{error}");
        assert!(error.to_string().contains("1001"), "{error}");

        let listener = handle.listen(50).unwrap();
        assert_eq!(handle.listen(50).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert_eq!(listener.accept(Duration::ZERO).unwrap_err().kind(), io::ErrorKind::TimedOut);
        let peer = VsockAddr { cid: HOST, port: 50 };
        guest.sockets.connect(peer, 7).unwrap();
        assert_eq!(guest.event().event_type, VsockEventType::Connected);
        let mut accepted = client(listener.accept(LIMIT).unwrap());
        guest.sockets.send(peer, 7, b"to the host").unwrap();
        guest.poll();
        let mut text = [0; 11];
        accepted.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"to the host");
        // A listener that is dropped listens no more, its streams go on.
        drop(listener);
        guest.sockets.connect(peer, 8).unwrap();
        assert!(matches!(guest.event().event_type, VsockEventType::Disconnected { .. }));
        guest.sockets.send(peer, 7, b"on and on...").unwrap();
        guest.poll();
        accepted.read_exact(&mut text).unwrap();

        let listener = handle.listen(50).unwrap();
        drop(guest);
        assert_eq!(listener.accept(LIMIT).unwrap_err().kind(), io::ErrorKind::NotConnected);
        assert_eq!(handle.connect(1000, LIMIT).unwrap_err().kind(), io::ErrorKind::NotConnected);
        assert_eq!(handle.listen(51).unwrap_err().kind(), io::ErrorKind::NotConnected);
        // Its driver was reset with it.
        assert!(matches!(host.read(&mut [0; 100]), Ok(0)));
    }
}

#[test]
fn cids_of_others_are_refused() {
    for cid in [0, 1, 2, u32::MAX] {
        let error = Vsock::new(cid).unwrap_err().to_string();
        assert!(error.contains(&cid.to_string()) && error.contains("choose 3 to"), "{error}");
    }
}
