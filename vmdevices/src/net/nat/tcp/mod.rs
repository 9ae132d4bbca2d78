//! TCP connections of the guest's, each ended here and carried on by a socket of the host.
//!
//! Neither direction has a buffer of its own while things go well:
//!
//! - What the guest sends goes from its memory into the socket. What that does not take at once is held
//!   (it was acknowledged), and the window shrinks by it: no more than one window a connection, and
//!   [`Config::most_held`](super::config::Config::most_held) in all.
//! - What the host receives stays in the socket until the guest has acknowledged it: it is looked at with
//!   `MSG_PEEK` straight into the guest's memory, once more where it was lost, and thrown away after.
//!   So a guest that does not read makes the sender wait by the host's own TCP.
//!
//! Segments that come out of order are dropped; the guest sends them again. A virtqueue keeps the order.

mod segment;

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, Shutdown, SocketFlags, SocketType};
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6,
};

use super::env::{Env, Fate, Key, Payload, deliver};
use super::gateway::Refusal;
use super::handle::count;
use super::sys;
use super::wire::{self, ETHERNET, TCP};
use crate::buffers::Buffers;
use crate::net::HEADER;

pub(super) use segment::{ACK, RST, SYN, Segment, bare, distance, reset_for};
use segment::{FIN, PSH, header};

/// The largest window offered to the guest, in bytes: some hundred microseconds at 24 Gb/s.
const MOST_WINDOW: usize = 1 << 20;
/// And the smallest, with very many connections.
const LEAST_WINDOW: usize = 1 << 16;
/// What windows are counted in, as a shift (RFC 7323, section 2).
const SCALE: u8 = 5;

/// What may be in flight to the guest where the kernel cannot peek behind it, in bytes: it is read
/// again with each segment.
pub(super) const MOST_SKIP: usize = 3 << 16;

/// First timeout of what the guest does not acknowledge. It is next door.
const RETRY: Duration = Duration::from_millis(300);
/// And the longest.
const MOST_RETRY: Duration = Duration::from_secs(10);
/// Attempts that a guest that is awake leaves unanswered.
const MOST_TRIES: u32 = 10;
const MOST_SYNS: u32 = 6;
/// How long the host may try to connect: a little more than Linux does.
const CONNECTING: Duration = Duration::from_secs(150);
/// How long a connection that is over answers to a last segment that was lost.
const TIME_WAIT: Duration = Duration::from_secs(4);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The guest has asked, the host has not answered.
    Connecting,
    /// The host has answered; the guest is told.
    SynReceived,
    /// Somebody came in by a forward; the guest is asked.
    SynSent,
    Established,
    /// Over, and the guest's last segment may come again.
    TimeWait,
}

#[derive(Debug)]
pub(super) struct Tcp {
    /// `None` in [`State::TimeWait`].
    socket: Option<OwnedFd>,
    state: State,

    // Towards the guest, in sequence numbers: not acknowledged, next, and first never sent.
    unacknowledged: u32,
    next: u32,
    most: u32,
    /// What the guest takes, in bytes; its shift; the segment that said so.
    window: u32,
    scale: u8,
    window_from: (u32, u32),
    mss: usize,
    /// Where the host's data ends, once that is known.
    end: Option<u32>,
    duplicates: u8,
    tries: u32,
    backoff: u32,
    retry: Option<Instant>,

    // From the guest: next sequence number, and the end of the window that it was offered.
    expected: u32,
    offered: u32,
    own_scale: u8,
    /// What the socket has not taken.
    held: VecDeque<u8>,
    /// The guest has ended its data, and the host knows.
    guest_ended: bool,
    shut: bool,

    // What there is to do.
    readable: bool,
    /// The host's side has ended its data.
    host_ended: bool,
    acknowledge: bool,
    syn: bool,
    /// The kernel can peek behind what is in flight.
    peeks: bool,
    /// When something last moved.
    last: Instant,
}

/// `len` in sequence numbers; no window is as large as they are.
fn span(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

/// What is there to be given to the guest.
pub(super) enum Output {
    /// It got a packet of this length.
    Packet(usize),
    Nothing,
    /// The host's side broke off.
    Broken,
}

impl Tcp {
    fn new(env: &mut Env, socket: OwnedFd, state: State) -> Self {
        if let Err(error) = rustix::net::sockopt::set_tcp_nodelay(&socket, true) {
            log::debug!("NAT: TCP_NODELAY: {error}");
        }
        let peeks = sys::set_peek_offset(&socket, 0).is_ok();
        // Of 64 random bits.
        let start = (env.random() >> 32) as u32;
        Self {
            socket: Some(socket),
            state,
            unacknowledged: start,
            next: start,
            most: start,
            window: 0,
            scale: 0,
            window_from: (0, 0),
            mss: 536,
            end: None,
            duplicates: 0,
            tries: 0,
            backoff: 0,
            retry: None,
            expected: 0,
            offered: 0,
            own_scale: 0,
            held: VecDeque::new(),
            guest_ended: false,
            shut: false,
            readable: false,
            host_ended: false,
            acknowledge: false,
            syn: false,
            peeks,
            last: env.now,
        }
    }

    /// Begins to connect to `target` for the guest's SYN `segment`; its events come with `token`.
    pub(super) fn connect(
        env: &mut Env,
        segment: &Segment,
        target: SocketAddr,
        token: u64,
    ) -> io::Result<Self> {
        let family = if target.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
        match rustix::net::connect(&socket, &target) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(error) => return Err(error.into()),
        }
        // Not before: a socket that was never connected counts as hung up.
        env.watch(&socket, token)?;
        let mut tcp = Self::new(env, socket, State::Connecting);
        tcp.learn(env, segment);
        Ok(tcp)
    }

    /// Has the guest connected to by who is behind `socket`.
    pub(super) fn accepted(env: &mut Env, socket: OwnedFd, token: u64) -> io::Result<Self> {
        env.watch(&socket, token)?;
        let mut tcp = Self::new(env, socket, State::SynSent);
        tcp.own_scale = SCALE;
        tcp.syn = true;
        Ok(tcp)
    }

    /// Takes from a SYN what it says of the guest.
    fn learn(&mut self, env: &Env, segment: &Segment) {
        self.expected = segment.seq.wrapping_add(1);
        self.offered = self.expected;
        let most = usize::from(env.config.mtu) - 40;
        self.mss = usize::from(segment.mss.unwrap_or(536)).clamp(88, most);
        // Both scale, or none does (RFC 7323, section 2.2). A SYN's own window is not scaled.
        self.scale = segment.scale.unwrap_or(0);
        self.own_scale = if segment.scale.is_some() { SCALE } else { 0 };
        self.window = segment.window.into();
        self.window_from = (segment.seq, segment.ack);
    }

    /// Whether [`Tcp::output`] has something.
    pub(super) fn has_output(&self) -> bool {
        self.syn
            || self.acknowledge
            || self.state == State::Established && (self.at_end() || self.room() > 0 && self.has_data())
    }

    fn in_flight(&self) -> u32 {
        self.next.wrapping_sub(self.unacknowledged)
    }

    fn has_data(&self) -> bool {
        self.readable && self.end.is_none_or(|end| distance(self.next, end) < 0)
    }

    /// The end is what is to be said next.
    fn at_end(&self) -> bool {
        self.end == Some(self.next)
    }

    /// What the guest takes beyond what is in flight, in bytes.
    fn room(&self) -> usize {
        let window = if self.peeks { self.window as usize } else { (self.window as usize).min(MOST_SKIP) };
        window.saturating_sub(self.in_flight() as usize)
    }

    /// When it wants to be looked at.
    pub(super) fn deadline(&self, env: &Env) -> Instant {
        let idle = match self.state {
            State::TimeWait => TIME_WAIT,
            State::Connecting => CONNECTING,
            _ => env.config.tcp_idle,
        };
        let idle = self.last + idle;
        self.retry.map_or(idle, |retry| retry.min(idle))
    }

    /// When something last happened.
    pub(super) fn last(&self) -> Instant {
        self.last
    }

    /// Where the guest stands, for a reset after a restore: the next sequence number of either side.
    pub(super) fn position(&self) -> (u32, u32) {
        (self.most, self.expected)
    }

    /// Breaks off towards the host.
    pub(super) fn abort(&mut self, env: &mut Env) {
        self.forget(env);
        if let Some(socket) = &self.socket
            && let Err(error) = rustix::net::sockopt::set_socket_linger(socket, Some(Duration::ZERO))
        {
            log::debug!("NAT: SO_LINGER: {error}");
        }
    }

    /// Breaks off towards the guest.
    pub(super) fn reset(&mut self, env: &mut Env, key: &Key) {
        self.forget(env);
        let packet = if self.state == State::Connecting {
            bare(env, key, (0, self.expected), RST | ACK, 0, &[])
        } else {
            bare(env, key, (self.most, self.expected), RST | ACK, 0, &[])
        };
        env.push(packet);
    }

    /// What is held is held no more.
    fn forget(&mut self, env: &mut Env) {
        env.held -= self.held.len();
        self.held = VecDeque::new();
    }

    /// The socket has `events`.
    pub(super) fn event(&mut self, env: &mut Env, key: &Key, events: EventFlags) -> Fate {
        let Some(socket) = &self.socket else { return Fate::Keep };
        if events.intersects(EventFlags::ERR | EventFlags::HUP) || self.state == State::Connecting {
            match rustix::net::sockopt::socket_error(socket) {
                Ok(Ok(())) => {}
                Ok(Err(error)) | Err(error) => {
                    self.fail(env, key, error);
                    return Fate::Remove;
                }
            }
        }
        if self.state == State::Connecting {
            if events.contains(EventFlags::OUT) {
                self.state = State::SynReceived;
                self.syn = true;
                self.last = env.now;
            }
            return Fate::Keep;
        }
        self.readable |= events.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP);
        self.host_ended |= events.intersects(EventFlags::RDHUP | EventFlags::HUP);
        if events.contains(EventFlags::OUT) && self.flush(env).is_err() {
            self.reset(env, key);
            return Fate::Remove;
        }
        self.settled()
    }

    /// Tells the guest that the host's side failed.
    fn fail(&mut self, env: &mut Env, key: &Key, error: Errno) {
        match error {
            Errno::NETUNREACH | Errno::ADDRNOTAVAIL | Errno::AFNOSUPPORT
                if self.state == State::Connecting =>
            {
                env.refuse_flow(key, Refusal::NoRoute);
            }
            Errno::HOSTUNREACH | Errno::TIMEDOUT | Errno::ACCESS | Errno::PERM
                if self.state == State::Connecting =>
            {
                env.refuse_flow(key, Refusal::NoHost);
            }
            _ => self.reset(env, key),
        }
        self.forget(env);
    }

    /// Its time has come.
    pub(super) fn expired(&mut self, env: &mut Env, key: &Key) -> Fate {
        let idle = match self.state {
            State::TimeWait => return Fate::Remove,
            State::Connecting => CONNECTING,
            _ => env.config.tcp_idle,
        };
        if env.now.saturating_duration_since(self.last) >= idle {
            match self.state {
                State::Connecting => env.refuse_flow(key, Refusal::NoHost),
                _ => self.reset(env, key),
            }
            self.abort(env);
            return Fate::Remove;
        }
        let Some(retry) = self.retry.filter(|&retry| retry <= env.now) else { return Fate::Keep };
        let established = self.state == State::Established;
        // A guest that had the connection and says nothing at all is paused, and not gone.
        let silent = retry.checked_sub(self.timeout()).is_some_and(|tried| env.heard < tried);
        self.tries += u32::from(!(established && silent));
        let most = if established { MOST_TRIES } else { MOST_SYNS };
        if self.tries > most {
            self.reset(env, key);
            self.abort(env);
            return Fate::Remove;
        }
        self.backoff += 1;
        match self.state {
            State::SynReceived | State::SynSent => self.syn = true,
            _ if self.in_flight() > 0 => self.rewind(env),
            // A window that stays closed: what is in front of it is answered with where it is.
            _ if self.window == 0 => {
                let window = self.offer(env);
                let before = self.unacknowledged.wrapping_sub(1);
                env.push(bare(env, key, (before, self.expected), ACK, window, &[]));
            }
            _ => {
                self.retry = None;
                return Fate::Keep;
            }
        }
        self.retry = Some(env.now + self.timeout());
        Fate::Keep
    }

    fn timeout(&self) -> Duration {
        RETRY.saturating_mul(1 << self.backoff.min(8)).min(MOST_RETRY)
    }

    /// Sends all again that the guest has not acknowledged.
    fn rewind(&mut self, env: &Env) {
        let Some(socket) = &self.socket else { return };
        count(&env.counters().retransmitted);
        if self.peeks
            && let Err(error) = sys::set_peek_offset(socket, 0)
        {
            log::warn!("NAT: SO_PEEK_OFF: {error}");
            self.peeks = false;
        }
        self.next = self.unacknowledged;
        self.duplicates = 0;
        self.readable = true;
    }

    /// The guest sent `segment` with `payload` behind it.
    pub(super) fn segment(
        &mut self,
        env: &mut Env,
        key: &Key,
        segment: &Segment,
        payload: &mut Payload<'_, '_>,
    ) -> Fate {
        match self.state {
            State::Connecting | State::SynReceived if segment.flags & (SYN | ACK) == SYN => {
                if segment.seq.wrapping_add(1) != self.expected {
                    self.abort(env);
                    return Fate::Replace;
                }
                self.syn = self.state == State::SynReceived;
                return Fate::Keep;
            }
            State::TimeWait if segment.flags & (SYN | RST) == SYN => return Fate::Replace,
            State::Connecting | State::TimeWait if segment.has(RST) => {
                self.abort(env);
                return Fate::Remove;
            }
            State::Connecting => return Fate::Keep,
            State::TimeWait => {
                self.acknowledge = true;
                return Fate::Keep;
            }
            State::SynSent => return self.answered(env, key, segment),
            State::SynReceived | State::Established => {}
        }
        if segment.has(RST) {
            // RFC 5961, section 3.2: only what is exactly next counts.
            if segment.seq == self.expected {
                self.abort(env);
                return Fate::Remove;
            }
            self.acknowledge = distance(segment.seq, self.expected) > 0;
            return Fate::Keep;
        }
        if segment.has(SYN) {
            // RFC 5961, section 4.2: a guest that has forgotten the connection resets it.
            self.acknowledge = true;
            return Fate::Keep;
        }
        if !segment.has(ACK) {
            return Fate::Keep;
        }
        if distance(segment.ack, self.most) > 0 {
            if self.state == State::SynReceived {
                env.push(bare(env, key, (segment.ack, 0), RST, 0, &[]));
            } else {
                self.acknowledge = true;
            }
            return Fate::Keep;
        }
        if self.state == State::SynReceived {
            if segment.ack != self.next {
                return Fate::Keep;
            }
            self.establish(env);
        }
        self.last = env.now;
        if self.acknowledged(env, segment, payload.len()).is_err()
            || self.take(env, segment, payload).is_err()
        {
            self.reset(env, key);
            return Fate::Remove;
        }
        self.settled()
    }

    /// The guest's answer to our SYN.
    fn answered(&mut self, env: &mut Env, key: &Key, segment: &Segment) -> Fate {
        if segment.has(ACK) && segment.ack != self.most {
            if !segment.has(RST) {
                env.push(bare(env, key, (segment.ack, 0), RST, 0, &[]));
            }
            return Fate::Keep;
        }
        if segment.has(RST | ACK) {
            self.abort(env);
            return Fate::Remove;
        }
        if segment.has(SYN | ACK) {
            self.learn(env, segment);
            self.establish(env);
            self.acknowledge = true;
        }
        Fate::Keep
    }

    fn establish(&mut self, env: &Env) {
        self.state = State::Established;
        self.unacknowledged = self.most;
        self.next = self.most;
        (self.retry, self.tries, self.backoff) = (None, 0, 0);
        self.readable = true;
        self.syn = false;
        self.last = env.now;
    }

    /// Takes an acknowledgement and the window with it.
    fn acknowledged(&mut self, env: &Env, segment: &Segment, len: usize) -> io::Result<()> {
        let count = distance(segment.ack, self.unacknowledged);
        let window = u32::from(segment.window) << self.scale;
        if count > 0 {
            let ended = self.end.is_some_and(|end| distance(segment.ack, end) > 0);
            // Positive, and within what was sent.
            let data = count.unsigned_abs() - u32::from(ended);
            if data > 0
                && let Some(socket) = &self.socket
            {
                sys::discard(socket, data as usize)?;
            }
            self.unacknowledged = segment.ack;
            if distance(self.next, segment.ack) < 0 {
                self.next = segment.ack;
            }
            (self.duplicates, self.tries, self.backoff) = (0, 0, 0);
            self.retry = (self.in_flight() > 0).then(|| env.now + RETRY);
        } else if count == 0 && len == 0 && self.in_flight() > 0 && !segment.has(FIN) && window == self.window
        {
            self.duplicates = self.duplicates.saturating_add(1);
            if self.duplicates == 3 {
                self.rewind(env);
                self.retry = Some(env.now + self.timeout());
            }
        }
        // RFC 9293, section 3.10.7.4: not by what is older than what said so last.
        let (seq, ack) = self.window_from;
        let newer = distance(segment.seq, seq) > 0 || segment.seq == seq && distance(segment.ack, ack) >= 0;
        if count >= 0 && newer {
            if self.window == 0 && window > 0 {
                (self.retry, self.tries, self.backoff) =
                    ((self.in_flight() > 0).then(|| env.now + RETRY), 0, 0);
            }
            self.window = window;
            self.window_from = (segment.seq, segment.ack);
        }
        Ok(())
    }

    /// Takes the guest's data, as far as it is next.
    fn take(&mut self, env: &mut Env, segment: &Segment, payload: &mut Payload<'_, '_>) -> io::Result<()> {
        let old = distance(self.expected, segment.seq);
        let len = payload.len();
        if len == 0 && !segment.has(FIN) {
            // An old segment without data asks where we are (a keepalive, a probe).
            self.acknowledge |= old != 0;
            return Ok(());
        }
        self.acknowledge = true;
        let Some(old) = usize::try_from(old).ok().filter(|&old| old <= len && !self.guest_ended) else {
            return Ok(());
        };
        payload.advance(old);
        let open = usize::try_from(distance(self.offered, self.expected)).unwrap_or(0);
        let all = payload.len() <= open;
        payload.truncate(open);
        let mut taken = 0;
        if self.held.is_empty()
            && payload.len() > 0
            && let Some(socket) = &self.socket
        {
            taken = match payload.send(socket) {
                Ok(done) => done,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                Err(error) => return Err(error),
            };
        }
        // What has no room comes again.
        let rest = payload.len().min(env.config.most_held.saturating_sub(env.held));
        let complete = all && rest == payload.len();
        if rest > 0 {
            let start = self.held.len();
            self.held.resize(start + rest, 0);
            // Contiguous in one or two pieces.
            let (front, back) = self.held.as_mut_slices();
            let split = start.min(front.len());
            let done = payload.read(&mut front[split..]);
            payload.read(&mut back[start - split..][..rest - done]);
            env.held += rest;
        }
        self.expected = self.expected.wrapping_add(span(taken + rest));
        if complete && segment.has(FIN) {
            self.expected = self.expected.wrapping_add(1);
            self.guest_ended = true;
        }
        self.flush(env)
    }

    /// Gives the socket what is held for it, and then the end.
    fn flush(&mut self, env: &mut Env) -> io::Result<()> {
        let Some(socket) = &self.socket else { return Ok(()) };
        let held = !self.held.is_empty();
        while !self.held.is_empty() {
            match rustix::net::send(
                socket,
                self.held.as_slices().0,
                SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
            ) {
                Ok(done) => {
                    self.held.drain(..done);
                    env.held -= done;
                    self.last = env.now;
                }
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        if held {
            self.held = VecDeque::new();
            // The window opens again.
            self.acknowledge = true;
        }
        if self.guest_ended && !self.shut {
            self.shut = true;
            match rustix::net::shutdown(socket, Shutdown::Write) {
                // It has ended by itself already.
                Ok(()) | Err(Errno::NOTCONN) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Whether both sides have said all and know it of each other.
    fn settled(&mut self) -> Fate {
        let told = self.end.is_some_and(|end| distance(self.unacknowledged, end) > 0);
        if self.state != State::Established || !told || !self.shut {
            return Fate::Keep;
        }
        if !self.acknowledge {
            return Fate::Remove;
        }
        // The guest's end is to be acknowledged yet, and that may be lost.
        self.state = State::TimeWait;
        self.socket = None;
        self.retry = None;
        Fate::Keep
    }

    /// The window for the guest.
    fn offer(&mut self, env: &Env) -> u16 {
        let open = (env.config.most_held / env.flows.max(1)).clamp(LEAST_WINDOW, MOST_WINDOW);
        // What was offered stays so; while data is held no more is.
        let edge = self.expected.wrapping_add(span(open));
        if self.held.is_empty() && distance(edge, self.offered) > 0 {
            self.offered = edge;
        }
        let open = u32::try_from(distance(self.offered, self.expected)).unwrap_or(0);
        u16::try_from(open >> self.own_scale).unwrap_or(u16::MAX)
    }

    /// Gives the guest the next packet of this connection.
    pub(super) fn output(
        &mut self,
        env: &mut Env,
        key: &Key,
        into: &mut Buffers<'_>,
        spill: &mut [u8],
    ) -> Output {
        if self.syn {
            let packet = self.syn_packet(env, key);
            return Output::Packet(deliver(&packet, into, spill));
        }
        if self.state == State::Established {
            if self.has_data() && self.room() > 0 {
                match self.data(env, key, into, spill) {
                    Ok(0) => {}
                    Ok(len) => return Output::Packet(len),
                    Err(_) => return Output::Broken,
                }
            }
            if self.has_data() && self.window == 0 {
                self.retry.get_or_insert(env.now + RETRY);
            }
            if self.at_end() {
                let window = self.offer(env);
                let packet = bare(env, key, (self.next, self.expected), FIN | ACK, window, &[]);
                self.sent(env, 1);
                return Output::Packet(deliver(&packet, into, spill));
            }
        }
        if self.acknowledge {
            self.acknowledge = false;
            let window = self.offer(env);
            let packet = bare(env, key, (self.next, self.expected), ACK, window, &[]);
            return Output::Packet(deliver(&packet, into, spill));
        }
        Output::Nothing
    }

    /// Notes that the guest was sent `count` sequence numbers from the next, with an acknowledgement.
    fn sent(&mut self, env: &Env, count: u32) {
        self.next = self.next.wrapping_add(count);
        if distance(self.next, self.most) > 0 {
            self.most = self.next;
        }
        self.acknowledge = false;
        self.last = env.now;
        if self.retry.is_none() {
            self.retry = Some(env.now + self.timeout());
        }
    }

    fn syn_packet(&mut self, env: &mut Env, key: &Key) -> Vec<u8> {
        self.syn = false;
        let flags = if self.state == State::SynSent { SYN } else { SYN | ACK };
        let mss = usize::from(env.config.mtu) - wire::ip_header_len(key.guest.0) - segment::HEADER;
        let [high, low] = u16::try_from(mss).unwrap_or(536).to_be_bytes();
        let scale = if self.own_scale > 0 { [1, 3, 3, self.own_scale] } else { [1; 4] };
        let options = [&[2, 4, high, low][..], &scale].concat();
        // Not scaled yet.
        let shift = std::mem::take(&mut self.own_scale);
        let window = self.offer(env);
        self.own_scale = shift;
        let packet = bare(env, key, (self.unacknowledged, self.expected), flags, window, &options);
        self.most = self.unacknowledged.wrapping_add(1);
        self.next = self.most;
        self.retry = Some(env.now + self.timeout().max(Duration::from_secs(1)));
        packet
    }

    /// Gives the guest data; returns the packet's length, 0 where there is none.
    fn data(
        &mut self,
        env: &mut Env,
        key: &Key,
        into: &mut Buffers<'_>,
        spill: &mut [u8],
    ) -> io::Result<usize> {
        let Some(socket) = &self.socket else { return Ok(0) };
        let ip = wire::ip_header_len(key.guest.0);
        let headers = HEADER + ETHERNET + ip + segment::HEADER;
        let large = if key.guest.0.is_ipv4() { VIRTIO_NET_F_GUEST_TSO4 } else { VIRTIO_NET_F_GUEST_TSO6 };
        let segments = env.leaves_checksums() && env.has(large);
        let most = if segments { (65_535 - ip - segment::HEADER) / self.mss * self.mss } else { self.mss };
        let most = most.min(self.room()).min(into.len().saturating_sub(headers));
        let skip = if self.peeks { 0 } else { self.in_flight() as usize };
        let mut front = Buffers::default();
        let looked = if most == 0 {
            // Buffers without room for anything: the rule of section 5.1.6.3 is broken.
            Err(io::ErrorKind::WouldBlock.into())
        } else if env.leaves_checksums() {
            front = into.take(headers);
            into.take(most).peek_from(socket, &mut env.scratch[..skip])
        } else {
            let room = &mut env.scratch[..skip + most];
            let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
            rustix::net::recv(socket, room, flags).map(|(done, _)| done).map_err(io::Error::from)
        };
        let looked = match looked {
            Ok(looked) => looked,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                return Ok(0);
            }
            Err(error) => return Err(error),
        };
        let Some(len) = looked.checked_sub(skip).filter(|&len| len > 0) else {
            // The end, or (where what is in flight is looked at too) nothing new.
            self.readable = false;
            if looked == 0 || self.host_ended && looked == skip {
                self.end.get_or_insert(self.next);
            }
            return Ok(0);
        };
        let window = self.offer(env);
        let tcp = header(key, self.next, self.expected, ACK | PSH, window, &[]);
        let mut packet = wire::headers(env.link, key.peer.0, key.guest.0, TCP, segment::HEADER + len);
        let start = packet.len();
        packet.extend(tcp);
        if env.leaves_checksums() {
            self.offload(key, &mut packet, start, len);
            front.write(&packet);
        } else {
            packet.extend(&env.scratch[skip..skip + len]);
            wire::set_checksum(key.peer.0, key.guest.0, TCP, &mut packet[start..]);
            deliver(&packet, into, spill);
        }
        self.sent(env, span(len));
        Ok(headers + len)
    }

    /// Leaves checksum and segmentation to the guest (virtio 1.2, section 5.1.6.4).
    fn offload(&self, key: &Key, packet: &mut [u8], start: usize, len: usize) {
        let sum = wire::pseudo(key.peer.0, key.guest.0, TCP, segment::HEADER + len);
        packet[start + 16..start + 18].copy_from_slice(&wire::fold(sum).to_be_bytes());
        let short = |value: usize| u16::try_from(value).unwrap_or(0).to_le_bytes();
        let flag = |value: u32| u8::try_from(value).unwrap_or(0);
        packet[0] = flag(VIRTIO_NET_HDR_F_NEEDS_CSUM);
        if len > self.mss {
            let kind =
                if key.guest.0.is_ipv4() { VIRTIO_NET_HDR_GSO_TCPV4 } else { VIRTIO_NET_HDR_GSO_TCPV6 };
            packet[1] = flag(kind);
            packet[2..4].copy_from_slice(&short(start + segment::HEADER - HEADER));
            packet[4..6].copy_from_slice(&short(self.mss));
        }
        packet[6..8].copy_from_slice(&short(start - HEADER));
        packet[8..10].copy_from_slice(&short(16));
    }
}
