//! The Unix socket in front of a guest's ports, with the protocol of Firecracker and Cloud Hypervisor.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, recv, socket_with};
use vmcore::Result;

use crate::unix_socket::Listener;

/// Most clients that have not said yet where they want to go; beyond, the oldest is dropped.
const MOST_HANDSHAKES: usize = 64;

/// Longest line of a client: `CONNECT 4294967295` with room to spare.
const MOST_LINE: usize = 32;

/// A listening socket, and where those of the host's own servers are.
#[derive(Debug)]
pub(super) struct Front(Listener);

impl Front {
    pub(super) fn bind(path: &Path) -> Result<Self> {
        Listener::bind(path, "vsock socket").map(Self)
    }

    pub(super) fn listener(&self) -> &Listener {
        &self.0
    }

    /// Connects to the host's server for `port`, at once or not at all.
    pub(super) fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.0.path.clone().into_os_string();
        path.push(format!("_{port}"));
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(socket.into())
    }
}

/// What a client of the socket has come to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// It wants this port.
    Connect(u32),
    /// Its line has not come in full.
    Incomplete,
    /// It says something else, or nothing any more.
    Wrong,
}

/// Reads the line of a client, and not a byte behind it.
pub(super) fn read_line(client: &UnixStream) -> Line {
    let mut line = [0; MOST_LINE];
    let seen = match recv(client, &mut line[..], RecvFlags::PEEK) {
        Ok((seen, _)) => &line[..seen],
        Err(e) if e.kind() == ErrorKind::WouldBlock => return Line::Incomplete,
        Err(_) => return Line::Wrong,
    };
    let Some(end) = seen.iter().position(|&byte| byte == b'\n') else {
        return if seen.is_empty() || seen.len() == MOST_LINE { Line::Wrong } else { Line::Incomplete };
    };
    let Some(port) = parse(&seen[..end]) else { return Line::Wrong };
    let mut taken = [0; MOST_LINE];
    match recv(client, &mut taken[..=end], RecvFlags::empty()) {
        Ok((taken, _)) if taken == end + 1 => Line::Connect(port),
        _ => Line::Wrong,
    }
}

/// The port of `CONNECT <port>`.
fn parse(line: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(line).ok()?;
    let mut words = line.split_ascii_whitespace();
    let (verb, port, end) = (words.next()?, words.next()?, words.next());
    (verb.eq_ignore_ascii_case("connect") && end.is_none()).then(|| port.parse().ok()).flatten()
}

/// Clients that have not said yet where they want to go.
#[derive(Debug, Default)]
pub(super) struct Handshakes {
    waiting: VecDeque<(u32, UnixStream)>,
    next: u32,
}

impl Handshakes {
    /// Adds a client, and gives its number.
    pub(super) fn insert(&mut self, client: UnixStream) -> u32 {
        if self.waiting.len() >= MOST_HANDSHAKES {
            self.waiting.pop_front();
        }
        let number = self.next;
        // Below the numbers that stand for other things.
        self.next = (self.next + 1) % (1 << 31);
        self.waiting.push_back((number, client));
        number
    }

    pub(super) fn get(&self, number: u32) -> Option<&UnixStream> {
        self.waiting.iter().find(|(n, _)| *n == number).map(|(_, client)| client)
    }

    pub(super) fn remove(&mut self, number: u32) -> Option<UnixStream> {
        let at = self.waiting.iter().position(|(n, _)| *n == number)?;
        self.waiting.remove(at).map(|(_, client)| client)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn lines_name_a_port_or_are_wrong() {
        for (text, expected) in [
            ("CONNECT 1234\n", Line::Connect(1234)),
            ("connect 4294967295\r\n", Line::Connect(u32::MAX)),
            ("CONNECT 12", Line::Incomplete),
            ("CONNECT\n", Line::Wrong),
            ("CONNECT 4294967296\n", Line::Wrong),
            ("CONNECT -1\n", Line::Wrong),
            ("CONNECT 1 2\n", Line::Wrong),
            ("GET / HTTP/1.1\r\n", Line::Wrong),
            ("\n", Line::Wrong),
            ("CONNECT 1                              \n", Line::Wrong),
        ] {
            let (mut client, ours) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            assert_eq!(read_line(&ours), Line::Incomplete);
            client.write_all(text.as_bytes()).unwrap();
            assert_eq!(read_line(&ours), expected, "{text:?}");
        }
        let (client, ours) = UnixStream::pair().unwrap();
        drop(client);
        assert_eq!(read_line(&ours), Line::Wrong);
    }

    #[test]
    fn what_follows_the_line_stays_for_the_guest() {
        let (mut client, mut ours) = UnixStream::pair().unwrap();
        client.write_all(b"CONNECT 7\nearly words").unwrap();
        drop(client);
        assert_eq!(read_line(&ours), Line::Connect(7));
        let mut rest = String::new();
        ours.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "early words");
    }

    #[test]
    fn clients_that_say_nothing_make_room_for_others() {
        let mut handshakes = Handshakes::default();
        let (mut first, ours) = UnixStream::pair().unwrap();
        let number = handshakes.insert(ours);
        for _ in 0..MOST_HANDSHAKES {
            handshakes.insert(UnixStream::pair().unwrap().0);
        }
        assert!(handshakes.get(number).is_none() && handshakes.waiting.len() == MOST_HANDSHAKES);
        assert_eq!(first.read(&mut [0]).unwrap(), 0, "it is closed");
    }
}
