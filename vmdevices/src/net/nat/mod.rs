//! A network for a guest without privileges: the NAT is the guest's gateway, and carries on what the
//! guest sends with ordinary sockets of the host.
//!
//! The guest gets its address by DHCP (10.0.2.15 in 10.0.2.0/24) or IPv6 router advertisement
//! (fd76:6d63:6f72::/64); the gateway, 10.0.2.2, answers echo requests and forwards names. TCP, UDP and
//! echo requests (those by sockets that need no privilege, icmp(7)) go out; nothing comes in but by
//! [forwards](Nat::forward). To the rest of the world it all comes from this process.

mod config;
mod datagram;
mod dhcp;
mod dns;
mod env;
mod error;
mod flows;
mod forward;
mod gateway;
mod handle;
mod inbound;
mod outbound;
mod policy;
mod reassembly;
mod settings;
mod state;
mod sys;
mod tcp;
mod timers;
mod wire;

use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, epoll, eventfd};
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
};

use super::{NetBackend, deliver};
use crate::buffers::Buffers;
use config::Config;
use dns::Names;
use env::{Env, Fate};
use flows::{Flows, Kind};
use handle::{FORWARD, Shared, add, count};
use reassembly::Reassembly;
use tcp::Output;
use timers::Timers;

pub use error::NatError;
pub use forward::Forward;
pub use handle::{NatHandle, NatStats};
pub use policy::{Action, Cidr, Destination, Protocol, RuleCount};

/// Tokens of what is no flow and no forward.
const KICK: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;
/// The timer for the next router advertisement.
const ADVERTISE: u64 = u64::MAX - 2;

/// How often routers advertise unasked (RFC 4861, section 6.2.1).
const ADVERTISED: Duration = Duration::from_secs(600);

/// Packets for the guest between two looks at the host's sockets.
const LOOK: u32 = 16;

/// Events taken at once.
const EVENTS: usize = 64;

/// A network for a guest without privileges, interfaces or other programs: IPv4 and IPv6 with DHCP, router
/// advertisement and names, TCP, UDP and echo requests out, forwards in, and rules for what may go out.
///
/// It is the backend of one card ([`Net::nat`](crate::Net::nat)), and can be tried without a host network:
///
/// ```
/// use vmdevices::Net;
/// use vmdevices::net::{Forward, Nat};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let nat = Nat::new()?
///     .host_name("guest")?
///     .name("files.test", ["192.0.2.80".parse()?])
///     .deny("tcp:any:25".parse()?)
///     .forward(Forward::tcp(0, 80))?;
/// let handle = nat.handle();
/// let card = Net::nat(nat)?; // goes to VmBuilder::attach
///
/// // While the guest runs: which port of 127.0.0.1 leads to the guest's port 80, and one more.
/// println!("http://{}/", handle.forwards()[0].bind);
/// let ssh = handle.forward("tcp:0:22".parse()?)?;
/// assert_eq!(handle.forwards().len(), 2);
/// assert!(handle.remove_forward(&ssh));
/// assert_eq!(handle.stats().tcp_opened, 0);
/// assert_eq!(handle.rules()[0].rule, "deny tcp:any:25");
/// # Ok(())
/// # }
/// ```
///
/// # What the guest may reach
///
/// All but the host itself and what only the host sees, unless told otherwise:
///
/// 1. [Rules](Nat::allow), in the order in which they were given; the first that matches decides.
/// 2. Closed: unspecified, loopback, link-local (169.254.169.254 is the metadata service of clouds),
///    multicast, broadcast and reserved addresses, and IPv6 addresses that stand for IPv4 ones
///    (IPv4-mapped, 6to4, NAT64). Only a rule for a block within one of these opens a part of it:
///    `allow any` does not.
/// 3. [The default](Nat::otherwise): allow.
///
/// Addresses of the host's other interfaces are like those of any other machine: services that listen
/// on all addresses are reached unless a rule denies them. Rules look at the address that a flow goes to,
/// whatever name it was found by, and never at an answer of the DNS. What is refused is told by ICMP
/// ("administratively prohibited"). The resolvers that the gateway asks are not subject to rules, as it
/// is not the guest that reaches them.
///
/// # Limits
///
/// A TCP flow holds at most a window of data ([bounded](Nat::most_held) for all together), a datagram is
/// given to the guest at once or dropped, fragments wait five seconds, and beyond
/// [a number of flows](Nat::most_flows), or of descriptors of this process, the flow that was idle longest
/// makes room. IP options, IPv6 routing headers, multicast and protocols besides TCP, UDP and echo are not
/// carried. Urgent data is in line.
///
/// # Threads
///
/// Works on the thread that calls it as a [`NetBackend`], never waits, and has no thread of its own;
/// a [`NatHandle`] works from any thread.
pub struct Nat {
    env: Env,
    flows: Flows,
    timers: Timers<u64>,
    names: Names,
    reassembly: Reassembly,
    /// Wakes who waits for the epoll: there is something that came from the guest's own sending.
    kick: OwnedFd,
    /// The last look found nothing: whoever has something now has to wake.
    asleep: bool,
    /// The guest's address for what comes in over IPv6.
    guest6: Option<Ipv6Addr>,
    /// The guest has asked for its address.
    leased: bool,
    /// Routers are advertised from time to time: the guest has asked for one.
    advertising: bool,
    /// For ports of the gateway's that stand for somebody who came in.
    next_port: u16,
    looked: u32,
}

impl std::fmt::Debug for Nat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nat")
            .field("config", &self.env.config)
            .field("shared", &self.env.shared)
            .field("names", &self.names)
            .field("flows", &self.flows)
            .finish_non_exhaustive()
    }
}

impl Nat {
    /// A NAT with everything as it is unless told otherwise: resolvers of /etc/resolv.conf, no forwards,
    /// no rules.
    ///
    /// # Errors
    /// [`NatError::Host`] where the process can have no more descriptors.
    pub fn new() -> Result<Self, NatError> {
        let host = |op| move |error: rustix::io::Errno| NatError::Host { op, source: error.into() };
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(host("epoll_create"))?;
        let kick = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(host("eventfd"))?;
        let timers = Timers::new().map_err(|source| NatError::Host { op: "timerfd_create", source })?;
        // Edge-triggered: neither is ever read.
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&epoll, &kick, epoll::EventData::new_u64(KICK), flags).map_err(host("epoll_ctl"))?;
        epoll::add(&epoll, timers.fd(), epoll::EventData::new_u64(TIMER), flags)
            .map_err(host("epoll_ctl"))?;
        let mut names = Names::default();
        names.use_file("/etc/resolv.conf".into());
        Ok(Self {
            env: Env::new(Config::default(), Arc::new(Shared::new(epoll))),
            flows: Flows::default(),
            timers,
            names,
            reassembly: Reassembly::default(),
            kick,
            asleep: false,
            guest6: None,
            leased: false,
            advertising: false,
            next_port: FIRST_PORT,
            looked: 0,
        })
    }

    /// A handle for other threads, and for while the guest runs.
    pub fn handle(&self) -> NatHandle {
        NatHandle { shared: self.env.shared.clone() }
    }

    /// The guest's address of the version of `other`, for what comes in.
    fn guest(&self, other: IpAddr) -> IpAddr {
        match (other, self.guest6) {
            (IpAddr::V6(_), Some(v6)) => v6.into(),
            _ => self.env.config.guest4.into(),
        }
    }

    /// Ends a flow.
    fn remove(&mut self, number: usize) {
        drop(self.flows.remove(&mut self.env, &mut self.timers, number));
    }

    fn touched(&mut self, number: usize) {
        self.flows.touched(&self.env, &mut self.timers, number);
    }

    /// Ends the flow that was idle longest, in both directions.
    fn evict(&mut self) {
        let Some(number) = self.flows.oldest() else { return };
        if let Some(mut flow) = self.flows.remove(&mut self.env, &mut self.timers, number) {
            count(&self.env.counters().evicted);
            if let Kind::Tcp(tcp) = &mut flow.kind {
                tcp.reset(&mut self.env, &flow.key);
                tcp.abort(&mut self.env);
            }
        }
    }

    /// Puts in the flow that `make` makes for a token. Where there are too many flows or descriptors, one
    /// makes room.
    fn open(
        &mut self,
        key: env::Key,
        mut make: impl FnMut(&mut Env, u64) -> io::Result<Kind>,
    ) -> io::Result<Option<usize>> {
        if self.flows.len() >= self.env.config.most_flows {
            self.evict();
        }
        let mut token = self.flows.reserve();
        let mut made = make(&mut self.env, token);
        let full = |error: &io::Error| matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE));
        if made.as_ref().is_err_and(full) && self.flows.len() > 0 {
            log::warn!(
                "NAT: no more descriptors for {} flows: raise the limit (ulimit -n)",
                self.flows.len()
            );
            self.evict();
            token = self.flows.reserve();
            made = make(&mut self.env, token);
        }
        let made = made?;
        let counters = self.env.counters();
        count(match key.kind() {
            Protocol::Tcp => &counters.tcp_opened,
            Protocol::Udp => &counters.udp_opened,
            Protocol::Icmp => &counters.icmp_opened,
        });
        Ok(self.flows.insert(&mut self.env, key, made))
    }

    /// Looks at the host's sockets and the clock. Returns whether there was anything.
    fn look(&mut self) -> bool {
        self.env.now = Instant::now();
        let mut events = Vec::with_capacity(EVENTS);
        let zero = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        let room = rustix::buffer::spare_capacity(&mut events);
        match epoll::wait(&*self.env.shared.epoll, room, Some(&zero)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => log::error!("NAT: epoll_wait: {error}"),
        }
        for event in &events {
            // Copied: the event is packed.
            let (data, flags) = (event.data, event.flags);
            let token = data.u64();
            match token {
                KICK => {}
                TIMER => self.timers_rang(),
                token if token & FORWARD != 0 => {
                    if !self.flows.ready.contains(&token) {
                        self.flows.ready.push_back(token);
                    }
                }
                token => {
                    if let Some(number) = self.flows.resolve(token) {
                        self.event(number, flags);
                    }
                }
            }
        }
        !events.is_empty()
    }

    fn event(&mut self, number: usize, flags: epoll::EventFlags) {
        let Some(flow) = self.flows.get(number) else { return };
        let fate = match &mut flow.kind {
            Kind::Tcp(tcp) => tcp.event(&mut self.env, &flow.key, flags),
            Kind::Datagrams(datagrams) => {
                datagrams.readable |= flags.intersects(epoll::EventFlags::IN | epoll::EventFlags::ERR);
                Fate::Keep
            }
        };
        self.settle(number, fate);
    }

    fn settle(&mut self, number: usize, fate: Fate) {
        match fate {
            Fate::Keep => self.touched(number),
            Fate::Remove | Fate::Replace => self.remove(number),
        }
    }

    fn timers_rang(&mut self) {
        while let Some(token) = self.timers.due(self.env.now) {
            if token == ADVERTISE {
                self.advertise();
                continue;
            }
            let Some(number) = self.flows.resolve(token) else { continue };
            let due = self.flows.is_due(&self.env, number);
            let Some(flow) = self.flows.get(number) else { continue };
            let fate = match &mut flow.kind {
                _ if !due => Fate::Keep,
                Kind::Tcp(tcp) => tcp.expired(&mut self.env, &flow.key),
                Kind::Datagrams(_) => Fate::Remove,
            };
            self.settle(number, fate);
        }
    }

    /// Advertises the router, and once more after a while.
    fn advertise(&mut self) {
        if let Some(packet) = gateway::router_advertisement(&self.env.config, self.env.link) {
            self.env.push(packet);
            let next = self.env.now + ADVERTISED;
            self.timers.set(None, next, ADVERTISE);
        }
    }

    /// Gives the guest the next packet.
    fn next(&mut self, into: &mut Buffers<'_>, spill: &mut [u8]) -> Option<usize> {
        self.looked += 1;
        if self.looked >= LOOK {
            self.looked = 0;
            self.look();
        }
        loop {
            if let Some(packet) = self.env.out.pop_front() {
                return Some(deliver(&[&packet], into, spill));
            }
            match self.flows.next_ready() {
                Some(Ok(number)) => {
                    if let Some(len) = self.turn(number, into, spill) {
                        return Some(len);
                    }
                }
                Some(Err(token)) => self.incoming(token),
                None if self.look() => {}
                None => return None,
            }
        }
    }

    /// One flow's turn.
    fn turn(&mut self, number: usize, into: &mut Buffers<'_>, spill: &mut [u8]) -> Option<usize> {
        let flow = self.flows.get(number)?;
        let output = match &mut flow.kind {
            Kind::Tcp(tcp) => tcp.output(&mut self.env, &flow.key, into, spill),
            Kind::Datagrams(datagrams) => {
                datagrams.output(&mut self.env, &flow.key);
                Output::Nothing
            }
        };
        match output {
            Output::Packet(len) => {
                self.touched(number);
                Some(len)
            }
            Output::Nothing => {
                self.touched(number);
                None
            }
            Output::Broken => {
                if let Kind::Tcp(tcp) = &mut flow.kind {
                    tcp.reset(&mut self.env, &flow.key);
                }
                self.remove(number);
                None
            }
        }
    }
}

/// The first port of the gateway's for those who come in (RFC 6335, section 6).
const FIRST_PORT: u16 = 49_152;

impl NetBackend for Nat {
    fn save_state(&self) -> io::Result<Vec<u8>> {
        Self::save_state(self)
    }

    fn restore_state(&mut self, state: &[u8]) -> io::Result<()> {
        Self::restore_state(self, state)
    }

    fn features(&self) -> u64 {
        let bits = [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
        ];
        bits.into_iter().fold(0, |all, bit| all | 1 << bit)
    }

    fn set_features(&mut self, features: u64) -> io::Result<()> {
        self.env.features = features;
        Ok(())
    }

    fn mtu(&self) -> Option<u16> {
        Some(self.env.config.mtu)
    }

    fn source(&self) -> Option<Arc<dyn AsRawFd + Send + Sync>> {
        Some(self.env.shared.epoll.clone())
    }

    fn send(&mut self, packet: &mut Buffers<'_>) -> io::Result<()> {
        self.env.now = Instant::now();
        self.env.heard = self.env.now;
        count(&self.env.counters().frames_sent);
        add(&self.env.counters().bytes_sent, packet.len().saturating_sub(super::HEADER));
        self.frame(packet);
        if self.asleep && !(self.env.out.is_empty() && self.flows.ready.is_empty()) {
            self.asleep = false;
            // Full means that it rings already.
            match rustix::io::write(&self.kick, &1_u64.to_ne_bytes()) {
                Ok(_) | Err(rustix::io::Errno::AGAIN) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn receive(&mut self, into: &mut Buffers<'_>, spill: &mut [u8]) -> io::Result<usize> {
        self.asleep = false;
        match self.next(into, spill) {
            Some(len) => {
                count(&self.env.counters().frames_received);
                add(&self.env.counters().bytes_received, len.saturating_sub(super::HEADER));
                Ok(len)
            }
            None => {
                self.asleep = true;
                Err(io::ErrorKind::WouldBlock.into())
            }
        }
    }
}
