//! UDP and echo requests: each flow has a socket of its own, or is one of a forward's.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, ipproto};

use super::env::{Env, Fate, Key};
use super::forward::{Listener, Socket};
use super::gateway::{self, Refusal};
use super::wire::{self, UDP, be16};

/// Length of a UDP header (RFC 768).
pub(super) const HEADER: usize = 8;

/// How long a resolver may take before the next is asked.
const ANSWER: Duration = Duration::from_secs(1);
/// How long flows of names and echo requests are kept.
const SHORT: Duration = Duration::from_secs(30);

#[derive(Debug)]
enum Way {
    /// A socket that is connected to the peer.
    Own(OwnedFd),
    /// To the last address, by the forward with the first, where that is still there.
    Forward(Weak<Listener>, SocketAddr, SocketAddr),
}

#[derive(Debug)]
pub(super) struct Datagrams {
    way: Way,
    /// It asks names: the number of the resolver.
    pub(super) resolver: Option<usize>,
    /// Since when there is no answer.
    asked: Option<Instant>,
    pub(super) readable: bool,
    last: Instant,
}

impl Datagrams {
    /// A flow to `target`, whose events come with `token`.
    pub(super) fn connect(env: &Env, key: &Key, target: SocketAddr, token: u64) -> io::Result<Self> {
        let (family, icmp) = match target {
            SocketAddr::V4(_) => (AddressFamily::INET, ipproto::ICMP),
            SocketAddr::V6(_) => (AddressFamily::INET6, ipproto::ICMPV6),
        };
        // An echo socket that needs no privilege (icmp(7)), where the host's
        // net.ipv4.ping_group_range allows it.
        let protocol = if key.protocol == UDP { None } else { Some(icmp) };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(family, SocketType::DGRAM, flags, protocol)?;
        rustix::net::connect(&socket, &target)?;
        env.watch(&socket, token)?;
        Ok(Self { way: Way::Own(socket), resolver: None, asked: None, readable: false, last: env.now })
    }

    /// A flow of somebody at `peer` who came in by a forward.
    pub(super) fn forwarded(env: &Env, listener: &Arc<Listener>, peer: SocketAddr) -> Self {
        let way = Way::Forward(Arc::downgrade(listener), listener.forward.bind, peer);
        Self { way, resolver: None, asked: None, readable: false, last: env.now }
    }

    /// By which forward to whom it leads.
    pub(super) fn forward(&self) -> Option<(SocketAddr, SocketAddr)> {
        match &self.way {
            Way::Own(_) => None,
            Way::Forward(_, bind, peer) => Some((*bind, *peer)),
        }
    }

    pub(super) fn last(&self) -> Instant {
        self.last
    }

    pub(super) fn deadline(&self, env: &Env, key: &Key) -> Instant {
        let short = key.protocol != UDP || self.resolver.is_some();
        self.last + if short { SHORT.min(env.config.udp_idle) } else { env.config.udp_idle }
    }

    pub(super) fn touch(&mut self, now: Instant) {
        self.last = now;
    }

    /// Whether the resolver asked does not answer.
    pub(super) fn unanswered(&self, now: Instant) -> bool {
        self.asked.is_some_and(|asked| now.saturating_duration_since(asked) >= ANSWER)
    }

    /// Sends `payload`: of UDP what is behind the header, an echo request with its header.
    pub(super) fn send(&mut self, env: &mut Env, key: &Key, payload: &[u8]) -> Fate {
        self.last = env.now;
        if self.resolver.is_some() {
            self.asked.get_or_insert(env.now);
        }
        let flags = rustix::net::SendFlags::NOSIGNAL | rustix::net::SendFlags::DONTWAIT;
        let result = match &self.way {
            Way::Own(socket) => {
                // The first answer may be the error of the packet before: ask again.
                let send = || rustix::net::send(socket, payload, flags);
                send().or_else(|error| if error == Errno::CONNREFUSED { send() } else { Err(error) })
            }
            Way::Forward(listener, _, peer) => match listener.upgrade().as_deref() {
                Some(Listener { socket: Socket::Udp(socket), .. }) => {
                    rustix::net::sendto(socket, payload, flags, peer)
                }
                _ => {
                    env.refuse_flow(key, Refusal::NoPort);
                    return Fate::Remove;
                }
            },
        };
        match result {
            // What the host has no room for is lost, as datagrams may be.
            Ok(_) | Err(Errno::AGAIN | Errno::NOBUFS) => Fate::Keep,
            Err(error) => {
                log::debug!("NAT: a datagram of {} bytes to {:?}: {error}", payload.len(), key.peer);
                self.report(env, key, error);
                Fate::Keep
            }
        }
    }

    fn report(&self, env: &mut Env, key: &Key, error: Errno) {
        match error {
            Errno::CONNREFUSED => env.refuse_flow(key, Refusal::NoPort),
            Errno::HOSTUNREACH => env.refuse_flow(key, Refusal::NoHost),
            Errno::NETUNREACH => env.refuse_flow(key, Refusal::NoRoute),
            _ => {}
        }
    }

    /// Has the guest get the next datagram that came.
    pub(super) fn output(&mut self, env: &mut Env, key: &Key) {
        let Way::Own(socket) = &self.way else {
            self.readable = false;
            return;
        };
        let mut room = std::mem::take(&mut env.scratch);
        // Room for a UDP header in front.
        match rustix::net::recv(socket, &mut room[HEADER..], RecvFlags::DONTWAIT) {
            Ok((len, _)) => {
                self.last = env.now;
                self.asked = None;
                if key.protocol == UDP {
                    give(env, key, &mut room[..HEADER + len]);
                } else {
                    echo_reply(env, key, &mut room[HEADER..HEADER + len]);
                }
            }
            Err(Errno::AGAIN) => self.readable = false,
            // Asked once more after an error: it is told once.
            Err(error) => self.report(env, key, error),
        }
        env.scratch = room;
    }
}

/// Has the guest get the datagram `data`, which has room for a header in front.
pub(super) fn give(env: &mut Env, key: &Key, data: &mut [u8]) {
    let Ok(len) = u16::try_from(data.len()) else { return };
    data[..2].copy_from_slice(&key.peer.1.to_be_bytes());
    data[2..4].copy_from_slice(&key.guest.1.to_be_bytes());
    data[4..6].copy_from_slice(&len.to_be_bytes());
    data[6..8].fill(0);
    env.push_payload((key.peer.0, key.guest.0), UDP, data);
}

/// Has the guest get an echo reply; the kernel has put an identifier of its own in.
fn echo_reply(env: &mut Env, key: &Key, message: &mut [u8]) {
    let expected = if key.protocol == wire::ICMP { gateway::ECHO_REPLY } else { gateway::ECHO_REPLY_V6 };
    if message.len() >= 8 && message[0] == expected {
        message[4..6].copy_from_slice(&key.guest.1.to_be_bytes());
        env.push_payload((key.peer.0, key.guest.0), key.protocol, message);
    }
}

/// The ports of a UDP payload and what is behind its header, cut to the length that it says.
pub(super) fn parse(payload: &[u8]) -> Option<(u16, u16, &[u8])> {
    let len = usize::from(be16(payload, 4)?);
    Some((be16(payload, 0)?, be16(payload, 2)?, payload.get(HEADER..len)?))
}

/// Has the guest get `answer` on the flow `key`.
pub(super) fn answer(env: &mut Env, key: &Key, answer: &[u8]) {
    let mut data = vec![0; HEADER];
    data.extend(answer);
    give(env, key, &mut data);
}
