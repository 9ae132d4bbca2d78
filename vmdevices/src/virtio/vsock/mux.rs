//! All streams of a guest: who they belong to, and whose turn it is.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};

use super::connection::{After, Connection, Next, Opener, Packet};
use super::front::{Front, Handshakes, Line, read_line};
use super::handle::Shared;
use super::packet::{HEADER, HOST, Header, STREAM, op};
use crate::buffers::Buffers;
use crate::virtio::queue::Chain;

/// Most streams at once. Each keeps up to 128 KiB that the host's side does not take.
pub(super) const MOST_STREAMS: usize = 1024;

/// With so many answers to packets of no stream the guest's packets wait.
const MOST_REPLIES: usize = 256;

/// Ports of the host's side of streams that the host opens: the same as Firecracker's.
const FIRST_PORT: u32 = 1 << 30;
const LAST_PORT: u32 = (1 << 31) - 1;

/// `VMADDR_PORT_ANY`: no port of a stream.
const ANY_PORT: u32 = u32::MAX;

/// How many events of host descriptors are looked at in one go.
const MOST_EVENTS: usize = 64;

/// The two ports of a stream: the CIDs are always the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    host: u32,
    guest: u32,
}

impl Key {
    /// What epoll knows the stream as: `host` is never [`ANY_PORT`].
    fn token(self) -> EventData {
        EventData::new_u64(u64::from(self.host) << 32 | u64::from(self.guest))
    }
}

/// Who an event of epoll is for.
enum Token {
    Stream(Key),
    Handshake(u32),
    Listener,
    Wake,
}

const LISTENER: u32 = u32::MAX;
const WAKE: u32 = u32::MAX - 1;

impl Token {
    fn handshake(number: u32) -> EventData {
        EventData::new_u64(u64::from(ANY_PORT) << 32 | u64::from(number))
    }

    fn of(data: u64) -> Self {
        let half = |bits: u64| u32::try_from(bits & u64::from(u32::MAX)).unwrap_or(ANY_PORT);
        match (half(data >> 32), half(data)) {
            (ANY_PORT, LISTENER) => Token::Listener,
            (ANY_PORT, WAKE) => Token::Wake,
            (ANY_PORT, number) => Token::Handshake(number),
            (host, guest) => Token::Stream(Key { host, guest }),
        }
    }
}

/// The streams of an active device. Dropping it closes them.
#[derive(Debug)]
pub(super) struct Mux {
    cid: u64,
    /// Waits for all of them by edges.
    epoll: Arc<OwnedFd>,
    front: Option<Arc<Front>>,
    shared: Arc<Shared>,
    streams: HashMap<Key, Connection>,
    handshakes: Handshakes,
    /// Resets that the guest is to be told.
    replies: VecDeque<Header>,
    /// Streams that may have something to tell the guest, each once.
    line: VecDeque<Key>,
    next_port: u32,
}

impl Mux {
    pub(super) fn new(cid: u64, front: Option<Arc<Front>>, shared: Arc<Shared>) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let events = EventFlags::IN | EventFlags::ET;
        let token = |low: u32| Token::handshake(low);
        epoll::add(&epoll, &shared.wake, token(WAKE), events)?;
        if let Some(front) = &front {
            epoll::add(&epoll, &front.listener().socket, token(LISTENER), events)?;
        }
        Ok(Self {
            cid,
            epoll: Arc::new(epoll),
            front,
            shared,
            streams: HashMap::new(),
            handshakes: Handshakes::default(),
            replies: VecDeque::new(),
            line: VecDeque::new(),
            next_port: FIRST_PORT,
        })
    }

    /// Becomes readable when the host's side has something.
    pub(super) fn descriptor(&self) -> Arc<OwnedFd> {
        self.epoll.clone()
    }

    /// Whether the guest's packets are to wait until it has taken some of ours.
    pub(super) fn is_full(&self) -> bool {
        self.replies.len() >= MOST_REPLIES
    }

    /// Whether there may be a packet for the guest.
    pub(super) fn has_packets(&self) -> bool {
        !self.replies.is_empty() || !self.line.is_empty()
    }

    /// Looks at what the host's side has; `true` where there may be more.
    pub(super) fn poll_host(&mut self) -> bool {
        let mut events: Vec<(u64, EventFlags)> = Vec::with_capacity(MOST_EVENTS);
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut found = Vec::with_capacity(MOST_EVENTS);
        match epoll::wait(&*self.epoll, rustix::buffer::spare_capacity(&mut found), Some(&now)) {
            Ok(_) => events.extend(found.iter().map(|event: &epoll::Event| (event.data.u64(), event.flags))),
            Err(rustix::io::Errno::INTR) => return true,
            Err(error) => log::error!("vsock: epoll_wait: {error}"),
        }
        let full = events.len() == MOST_EVENTS;
        for (data, flags) in events {
            match Token::of(data) {
                Token::Stream(key) => self.with(key, |stream| stream.ready(flags)),
                Token::Handshake(number) => self.handshake(number),
                Token::Listener => self.accept(),
                Token::Wake => {
                    self.shared.wake.take();
                    while let Some(request) = self.shared.request() {
                        self.connect(request.port, request.stream, |_| Opener::Handle(request.answer));
                    }
                }
            }
        }
        full
    }

    /// Has `act` work on a stream, and does with it what that says.
    fn with(&mut self, key: Key, act: impl FnOnce(&mut Connection) -> After) {
        let Entry::Occupied(mut entry) = self.streams.entry(key) else { return };
        match act(entry.get_mut()) {
            After::Keep => {
                let stream = entry.get_mut();
                if stream.wants() && !std::mem::replace(&mut stream.queued, true) {
                    self.line.push_back(key);
                }
            }
            After::Gone => drop(entry.remove()),
            After::Reset => {
                let known = !entry.remove().is_leaving();
                if known {
                    self.reset(key);
                }
            }
        }
    }

    /// Tells the guest that there is no such stream.
    fn reset(&mut self, key: Key) {
        self.replies.push_back(self.header(key, Packet { op: op::RST, ..Packet::default() }));
    }

    fn header(&self, key: Key, packet: Packet) -> Header {
        let Packet { op, flags, len } = packet;
        Header {
            src_cid: HOST,
            dst_cid: self.cid,
            src_port: key.host,
            dst_port: key.guest,
            len,
            kind: STREAM,
            op,
            flags,
            ..Header::default()
        }
    }

    /// Takes the clients that there are.
    fn accept(&mut self) {
        let Some(front) = self.front.clone() else { return };
        loop {
            match front.listener().socket.accept() {
                Ok((client, _)) => self.greet(client),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == ErrorKind::ConnectionAborted => {}
                Err(e) => {
                    log::warn!("vsock socket {}: clients wait: {e}", front.listener().path.display());
                    return;
                }
            }
        }
    }

    fn greet(&mut self, client: UnixStream) {
        if let Err(e) = client.set_nonblocking(true) {
            log::warn!("vsock: a client is lost: {e}");
            return;
        }
        let number = self.handshakes.insert(client);
        let events = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
        let Some(client) = self.handshakes.get(number) else { return };
        if let Err(e) = epoll::add(&*self.epoll, client, Token::handshake(number), events) {
            log::warn!("vsock: a client is lost: {e}");
            self.handshakes.remove(number);
        }
    }

    fn handshake(&mut self, number: u32) {
        let Some(client) = self.handshakes.get(number) else { return };
        let port = match read_line(client) {
            Line::Incomplete => return,
            Line::Connect(port) => Some(port),
            Line::Wrong => None,
        };
        let client = self.handshakes.remove(number);
        if let (Some(port), Some(client)) = (port, client) {
            if let Err(e) = epoll::delete(&*self.epoll, &client) {
                log::warn!("vsock: a client is lost: {e}");
                return;
            }
            self.connect(port, client, Opener::Front);
        }
    }

    /// Asks the guest for a stream to its `port`. Where there can be none `stream` is closed.
    fn connect(&mut self, port: u32, stream: UnixStream, opener: impl FnOnce(u32) -> Opener) {
        let tries = u32::try_from(MOST_STREAMS).unwrap_or(u32::MAX);
        for _ in 0..=tries {
            let key = Key { host: self.next_port, guest: port };
            self.next_port = if self.next_port == LAST_PORT { FIRST_PORT } else { self.next_port + 1 };
            if !self.streams.contains_key(&key) {
                self.insert(key, Connection::new(stream, opener(key.host)));
                return;
            }
        }
    }

    /// Adds a stream, or drops it where there are enough; whether it was added.
    fn insert(&mut self, key: Key, stream: Connection) -> bool {
        if self.streams.len() >= MOST_STREAMS {
            log::warn!("vsock: {MOST_STREAMS} streams are open, one more is refused");
            return false;
        }
        let events = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        if let Err(e) = epoll::add(&*self.epoll, stream.stream(), key.token(), events) {
            log::warn!("vsock: a stream is lost: {e}");
            return false;
        }
        self.streams.insert(key, stream);
        self.with(key, |_| After::Keep);
        true
    }

    /// Takes a packet of the guest; `body` is what follows the header. `false` where its length is
    /// not true.
    pub(super) fn receive(&mut self, header: &Header, body: &mut Buffers<'_>) -> bool {
        let length = usize::try_from(header.len).unwrap_or(usize::MAX);
        if header.op == op::RW && length > body.len() {
            return false;
        }
        let mut body = body.take(if header.op == op::RW { length } else { 0 });
        // Packets of others than the guest itself are discarded (section 5.10.6.4.2).
        if header.src_cid != self.cid {
            return true;
        }
        let key = Key { host: header.dst_port, guest: header.src_port };
        let ours = header.dst_cid == HOST && header.kind == STREAM && key.host != ANY_PORT;
        let known = ours && self.streams.get(&key).is_some_and(|stream| !stream.is_leaving());
        match header.op {
            _ if known => self.with(key, |stream| stream.receive(header, &mut body)),
            op::RST => {}
            op::REQUEST if ours => {
                if !self.open(key, header) {
                    self.replies.push_back(header.reset());
                }
            }
            _ => self.replies.push_back(header.reset()),
        }
        true
    }

    /// Connects the guest to the host's server for a port; `false` where there is none.
    fn open(&mut self, key: Key, header: &Header) -> bool {
        let stream = match (self.shared.open(key.host), &self.front) {
            (Some(stream), _) => stream,
            (None, Some(front)) => front.connect(key.host),
            (None, None) => return false,
        };
        // A stream that the guest has left may still have words for the host: these are lost, the guest
        // uses the ports anew.
        self.streams.remove(&key);
        let Ok(stream) = stream else { return false };
        let mut stream = Connection::new(stream, Opener::Guest);
        stream.learn_credit(header);
        self.insert(key, stream)
    }

    /// Puts the next packets for the guest into the first of `chains`, each of which has room for a header:
    /// one, or as many as are filled by one read of a stream. Adds them to `used`, with their lengths.
    pub(super) fn next(&mut self, chains: &mut [Chain<'_>], used: &mut Vec<(u16, u32)>) {
        if let Some(reply) = self.replies.pop_front() {
            return write(chains, &reply, used);
        }
        let room = payload(chains);
        while let Some(key) = self.line.pop_front() {
            let Some(stream) = self.streams.get_mut(&key) else { continue };
            stream.queued = false;
            match stream.next(&room) {
                Next::Packet(packet) => {
                    let (buf_alloc, fwd_cnt) = stream.tell_credit();
                    let header = Header { buf_alloc, fwd_cnt, ..self.header(key, packet) };
                    write(chains, &header, used);
                    // Behind all others, if it has more.
                    return self.with(key, |_| After::Keep);
                }
                Next::Nothing => {}
                Next::Reset => {
                    self.streams.remove(&key);
                    let packet = Packet { op: op::RST, ..Packet::default() };
                    return write(chains, &self.header(key, packet), used);
                }
            }
        }
    }
}

/// Where the payloads of packets in `chains` go, up to the first that has room for a header only.
fn payload<'m>(chains: &[Chain<'m>]) -> Buffers<'m> {
    let mut room = Buffers::default();
    for chain in chains {
        let mut buffer = chain.writable.view();
        buffer.advance(HEADER);
        if buffer.is_empty() {
            break;
        }
        room.append(buffer);
    }
    room
}

/// Writes `header`, whose payload is in the [`payload`] of `chains`, to the first of them, and to as many as
/// it reaches into, each with the length of what is there.
fn write(chains: &mut [Chain<'_>], header: &Header, used: &mut Vec<(u16, u32)>) {
    let bytes = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    let mut left = usize::try_from(header.len).unwrap_or(usize::MAX);
    for chain in chains {
        let here = left.min(chain.writable.len().saturating_sub(HEADER));
        chain.writable.write(&Header { len: bytes(here), ..*header }.bytes());
        used.push((chain.head, bytes(HEADER + here)));
        left -= here;
        if left == 0 {
            break;
        }
    }
}
