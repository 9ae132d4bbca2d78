//! Frames over a Unix stream socket, as passt and QEMU's `-netdev stream` speak it: each behind its
//! length, 32 bits in network byte order.

use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::SendFlags;
use vmcore::{Error, EventSet, Result};

use super::wait::Wait;
use super::{HEADER, MOST_PACKET, NetBackend, deliver};
use crate::buffers::Buffers;
use crate::timer::Timer;
use crate::unix_socket::Listener;

/// Bytes in front of each frame.
const LENGTH: usize = 4;

/// The longest frame.
const MOST_FRAME: usize = MOST_PACKET - HEADER;

/// Bytes that are read at once: several of the usual frames, and at least one of any.
const INPUT: usize = 2 * (LENGTH + MOST_FRAME);

/// Between two attempts to reach the peer again.
const PATIENCE: Duration = Duration::from_secs(1);

/// The other end of a Unix stream socket: passt, or a QEMU with `-netdev stream`.
///
/// When the peer goes, what it had not taken is lost, and, unless the socket was given, the next one
/// is waited for: the guest's packets are lost until then, as if a cable were out somewhere behind the
/// card. There are no offloads: that protocol has no place for them.
///
/// ```no_run
/// # fn main() -> vmcore::Result<()> {
/// use vmdevices::{Net, net::Stream};
///
/// // passt --socket /run/user/1000/passt.sock
/// let card = Net::new(Stream::connect("/run/user/1000/passt.sock")?)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Stream {
    peers: Peers,
    socket: Option<UnixStream>,
    wait: Wait,
    /// Rings when it is time to try again.
    timer: Timer,
    again: Instant,
    input: Box<[u8]>,
    /// What of it was read and not looked at.
    filled: std::ops::Range<usize>,
    /// What of one frame the socket has not taken yet.
    output: Vec<u8>,
}

/// Where peers come from.
#[derive(Debug)]
enum Peers {
    /// There is one, and no other.
    Given,
    Connect(PathBuf),
    Listen(Listener),
}

impl Stream {
    /// Connects to the socket at `path`, again too when the peer has gone.
    ///
    /// # Errors
    /// [`Error::Config`] where nobody listens there, [`Error::Os`] where the host refuses.
    pub fn connect(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let socket = UnixStream::connect(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Error::Config {
                what: "network socket",
                value: path.display().to_string(),
                fix: format!(
                    "start what listens there first, for example: passt --socket {}",
                    path.display()
                ),
            },
            _ => Error::os("connect", path.display(), error),
        })?;
        Self::with(Peers::Connect(path), Some(socket))
    }

    /// Listens on a new socket at `path`, or in place of one that nobody listens on any more. One peer
    /// is served at a time; the next waits until it leaves. Whoever may write to the file is on the
    /// guest's network.
    ///
    /// # Errors
    /// [`Error::Config`] where another program listens there or there is another kind of file,
    /// [`Error::Os`] where the host refuses.
    pub fn listen(path: impl AsRef<Path>) -> Result<Self> {
        let listener = Listener::bind(path.as_ref(), "network socket")?;
        Self::with(Peers::Listen(listener), None)
    }

    /// One end of a pair, or a connection that somebody else made. When the peer goes the network is
    /// gone for good.
    ///
    /// # Errors
    /// [`Error::Os`] where the host refuses.
    pub fn new(socket: UnixStream) -> Result<Self> {
        Self::with(Peers::Given, Some(socket))
    }

    fn with(peers: Peers, socket: Option<UnixStream>) -> Result<Self> {
        let os = |error| Error::os("epoll or timerfd", "a network socket", error);
        let wait = Wait::new().map_err(os)?;
        if let Peers::Listen(listener) = &peers {
            wait.add(listener.socket.as_raw_fd(), EventSet::IN).map_err(os)?;
        }
        let timer = wait.timer().map_err(os)?;
        let mut this = Self {
            peers,
            socket: None,
            wait,
            timer,
            again: Instant::now(),
            input: vec![0; INPUT].into(),
            filled: 0..0,
            output: Vec::new(),
        };
        socket.map_or(Ok(()), |socket| this.begin(socket)).map_err(os)?;
        Ok(this)
    }

    /// Whether a peer is there, as far as is known.
    pub fn is_connected(&self) -> bool {
        self.socket.is_some()
    }

    fn begin(&mut self, socket: UnixStream) -> io::Result<()> {
        socket.set_nonblocking(true)?;
        self.wait.add(socket.as_raw_fd(), EventSet::IN | EventSet::OUT)?;
        self.socket = Some(socket);
        Ok(())
    }

    /// The peer is gone, or speaks something else.
    fn end(&mut self, why: impl std::fmt::Display) {
        if let Some(socket) = self.socket.take() {
            log::info!("network socket: the peer is gone: {why}");
            // Closing would do, if nobody else had the connection.
            drop(self.wait.remove(socket.as_raw_fd()));
        }
        self.filled = 0..0;
        self.output.clear();
    }

    /// Looks for a peer, if there is none.
    ///
    /// # Errors
    /// `WouldBlock` where there is none yet.
    fn find(&mut self) -> io::Result<()> {
        let none = || io::Error::from(io::ErrorKind::WouldBlock);
        if self.socket.is_some() {
            return Ok(());
        }
        let socket = match &self.peers {
            Peers::Given => Err(none()),
            Peers::Listen(listener) => listener.socket.accept().map(|(socket, _)| socket),
            Peers::Connect(_) if Instant::now() < self.again => Err(none()),
            Peers::Connect(path) => UnixStream::connect(path),
        };
        let begun = socket.and_then(|socket| self.begin(socket));
        if begun.is_err() && matches!(self.peers, Peers::Connect(_)) && Instant::now() >= self.again {
            self.again = Instant::now() + PATIENCE;
            self.timer.set(PATIENCE)?;
        }
        begun.map_err(|_| none())
    }

    /// Writes what is left of a frame.
    ///
    /// # Errors
    /// `WouldBlock` where the peer does not take all of it.
    fn flush(&mut self) -> io::Result<()> {
        while let (false, Some(socket)) = (self.output.is_empty(), &self.socket) {
            match rustix::net::send(socket, &self.output, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(count) => drop(self.output.drain(..count)),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return Err(io::ErrorKind::WouldBlock.into()),
                Err(error) => self.end(error),
            }
        }
        Ok(())
    }

    /// Where in the input the next frame lies, if all of it is there.
    fn frame(&mut self) -> Option<std::ops::Range<usize>> {
        let start = self.filled.start;
        let length = self.input.get(self.filled.clone())?.first_chunk::<LENGTH>()?;
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        if length > MOST_FRAME {
            self.end(format_args!("a frame of {length} bytes is none; the most are {MOST_FRAME}"));
            return None;
        }
        let frame = start + LENGTH..start + LENGTH + length;
        (frame.end <= self.filled.end).then(|| {
            self.filled.start = frame.end;
            frame
        })
    }

    /// Reads more.
    ///
    /// # Errors
    /// `WouldBlock` where there is no more.
    fn fill(&mut self) -> io::Result<()> {
        self.find()?;
        let Some(socket) = &mut self.socket else { return Err(io::ErrorKind::WouldBlock.into()) };
        self.input.copy_within(self.filled.clone(), 0);
        self.filled = 0..self.filled.len();
        match socket.read(&mut self.input[self.filled.end..]) {
            Ok(0) => self.end("it closed the connection"),
            Ok(count) => self.filled.end += count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(error),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => self.end(error),
        }
        Ok(())
    }
}

impl NetBackend for Stream {
    fn source(&self) -> Option<Arc<dyn AsRawFd + Send + Sync>> {
        Some(self.wait.source())
    }

    fn holds_back(&self) -> bool {
        true
    }

    fn event(&mut self) {
        // Whether or not the guest has more to send; where it is not all, there will be another event.
        drop(self.flush());
    }

    fn send(&mut self, packet: &mut Buffers<'_>) -> io::Result<()> {
        self.flush()?;
        packet.advance(HEADER);
        let length = u32::try_from(packet.len()).unwrap_or(u32::MAX);
        if self.socket.is_none() || packet.len() > MOST_FRAME {
            return Err(io::ErrorKind::NotConnected.into());
        }
        self.output.extend(length.to_be_bytes());
        self.output.resize(LENGTH + packet.len(), 0);
        packet.read(&mut self.output[LENGTH..]);
        // The rest goes with the next event.
        match self.flush() {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(()),
        }
    }

    fn receive(&mut self, into: &mut Buffers<'_>, spill: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(frame) = self.frame() {
                return Ok(deliver(&[&[0; HEADER], &self.input[frame]], into, spill));
            }
            self.fill()?;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::net::tests::{frame, receive, send};

    fn framed(frame: &[u8]) -> Vec<u8> {
        [&u32::try_from(frame.len()).unwrap().to_be_bytes(), frame].concat()
    }

    #[test]
    fn frames_come_in_pieces_and_several_at_once() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut stream = Stream::new(ours).unwrap();
        let frames = [frame(60, 1), frame(14, 2), frame(MOST_FRAME, 3), Vec::new(), frame(1514, 4)];
        let bytes = frames.iter().flat_map(|frame| framed(frame)).collect::<Vec<_>>();
        let mut got = Vec::new();
        for (n, piece) in bytes.chunks(4099).enumerate() {
            let (a, b) = piece.split_at(n % 7);
            for piece in [a, b] {
                theirs.write_all(piece).unwrap();
                got.extend(std::iter::from_fn(|| receive(&mut stream)));
            }
        }
        assert_eq!(got, frames);
        assert!(receive(&mut stream).is_none());
    }

    #[test]
    fn a_peer_that_does_not_read_holds_back_and_loses_nothing() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut stream = Stream::new(ours).unwrap();
        let mut sent = Vec::new();
        let mut number = 0_u32;
        while sent.len() < 3_000_000 {
            let packet =
                frame(60 + usize::try_from(number % 5000).unwrap(), (number % 251).try_into().unwrap());
            match send(&mut stream, &packet) {
                Ok(()) => {
                    sent.extend(framed(&packet));
                    number += 1;
                }
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    // The event that there is room has what is left of a frame written.
                    let mut back = vec![0; 100_000.min(sent.len())];
                    let count = theirs.read(&mut back).unwrap();
                    assert_eq!(back[..count], sent[..count]);
                    sent.drain(..count);
                    assert!(receive(&mut stream).is_none());
                    if number > 2000 {
                        break;
                    }
                }
            }
        }
        theirs.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut back = vec![0; 1000];
        while !sent.is_empty() {
            let count = theirs.read(&mut back).unwrap();
            assert_eq!(back[..count], sent[..count]);
            sent.drain(..count);
            assert!(receive(&mut stream).is_none());
        }
    }

    #[test]
    fn a_frame_that_is_none_ends_the_connection() {
        for length in [MOST_FRAME + 1, 0x8000_0000, 0xffff_ffff] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let mut stream = Stream::new(ours).unwrap();
            theirs.write_all(&u32::try_from(length).unwrap().to_be_bytes()).unwrap();
            theirs.write_all(&[0; 100]).unwrap();
            assert!(receive(&mut stream).is_none() && !stream.is_connected());
            assert_eq!(send(&mut stream, &frame(60, 0)).unwrap_err().kind(), io::ErrorKind::NotConnected);
            assert!(matches!(theirs.read(&mut [0; 1]), Ok(0) | Err(_)));
        }
    }

    #[test]
    fn the_next_peer_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("net.sock");
        let text = Stream::connect(&path).unwrap_err().to_string();
        assert!(text.contains("passt --socket"), "{text}");

        let mut server = Stream::listen(&path).unwrap();
        assert!(receive(&mut server).is_none() && !server.is_connected());
        for round in 1..4 {
            let mut client = Stream::connect(&path).unwrap();
            send(&mut client, &frame(60, round)).unwrap();
            assert_eq!(receive(&mut server), Some(frame(60, round)));
            send(&mut server, &frame(61, round)).unwrap();
            assert_eq!(receive(&mut client), Some(frame(61, round)));
            // Half a frame of this one does not become half a frame of the next.
            client.socket.as_ref().unwrap().write_all(&[0, 0, 0, 60, 1]).unwrap();
            assert!(receive(&mut server).is_none() && server.is_connected());
            drop(client);
            assert!(receive(&mut server).is_none() && !server.is_connected());
        }

        // And one that comes back is found, without being asked all the time.
        let mut client = Stream::connect(&path).unwrap();
        assert!(receive(&mut server).is_none() && server.is_connected());
        drop(server);
        assert!(receive(&mut client).is_none() && !client.is_connected());
        let mut server = Stream::listen(&path).unwrap();
        let again = client.again;
        assert!(again > Instant::now(), "it tries all the time");
        assert!(receive(&mut client).is_none() && !client.is_connected() && client.again == again);
        client.again = Instant::now();
        assert!(receive(&mut client).is_none() && client.is_connected());
        send(&mut client, &frame(60, 9)).unwrap();
        assert_eq!(receive(&mut server), Some(frame(60, 9)));
    }
}
