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

mod input;
mod output;
mod segment;

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::env::{Env, Fate, Key};
use super::gateway::Refusal;
use super::handle::count;
use super::sys;

pub(super) use segment::{ACK, RST, SYN, Segment, bare, distance, reset_for};

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
}
