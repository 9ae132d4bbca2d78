//! What the guest sends.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::PoisonError;
use std::time::Instant;

use super::datagram::{self, Datagrams};
use super::dns::Verdict;
use super::env::{Env, Fate, Key, Payload};
use super::flows::Kind;
use super::gateway::{self, Refusal};
use super::handle::count;
use super::policy::{Action, Protocol};
use super::tcp::{self, ACK, RST, SYN, Segment, Tcp};
use super::wire::{
    self, ETHERNET, ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet, ICMP, ICMPV6, Ip, MOST_HEAD,
    Malformed, TCP, UDP,
};
use super::{Nat, config, dhcp, dns};
use crate::buffers::Buffers;
use crate::net::HEADER;

/// The start of a frame: as much of it as was asked for, and the rest still in the guest's memory.
struct Head<'a, 'm> {
    bytes: [u8; MOST_HEAD],
    len: usize,
    rest: &'a mut Buffers<'m>,
}

impl Head<'_, '_> {
    /// Has the first `len` bytes there.
    fn need(&mut self, len: usize) -> Option<&[u8]> {
        if len > self.len {
            let room = self.bytes.get_mut(self.len..len)?;
            self.len += self.rest.read(room);
        }
        self.bytes.get(..len).filter(|_| self.len >= len)
    }
}

impl Nat {
    /// Takes a frame behind a [`HEADER`].
    pub(super) fn frame(&mut self, packet: &mut Buffers<'_>) {
        packet.advance(HEADER);
        if self.ethernet(packet).is_none() {
            count(&self.env.counters().malformed);
        }
    }

    /// Takes a frame; `None` where it makes no sense.
    fn ethernet(&mut self, frame: &mut Buffers<'_>) -> Option<()> {
        let whole = frame.len();
        let mut head = Head { bytes: [0; MOST_HEAD], len: 0, rest: frame };
        let ethernet = Ethernet::parse(head.need(ETHERNET)?)?;
        // To the gateway or to a group, from a station.
        if ethernet.to != config::GATEWAY_MAC && ethernet.to[0] & 1 == 0 || ethernet.from[0] & 1 == 1 {
            count(&self.env.counters().foreign);
            return Some(());
        }
        self.env.link.guest = ethernet.from;
        match ethernet.ethertype {
            ETHERTYPE_ARP => {
                let arp = head.need(ETHERNET + 28)?;
                if let Some(answer) = gateway::arp(&self.env.config, arp) {
                    self.env.push(answer);
                }
            }
            ETHERTYPE_IPV4 | ETHERTYPE_IPV6 => return self.ip(head, whole - ETHERNET),
            _ => count(&self.env.counters().unsupported),
        }
        Some(())
    }

    /// Takes an IP packet of `len` bytes, padding included.
    fn ip(&mut self, mut head: Head<'_, '_>, len: usize) -> Option<()> {
        let mut looked = 20.min(len);
        let ip = loop {
            match Ip::parse(&head.need(ETHERNET + looked)?[ETHERNET..], len) {
                Ok(ip) => break ip,
                Err(Malformed::Short(needed)) if needed > looked => looked = needed,
                Err(_) => return None,
            }
        };
        let start = ETHERNET + ip.header;
        if !self.accepts(&ip) {
            count(&self.env.counters().foreign);
            return Some(());
        }
        if ip.protocol == TCP && ip.fragment.is_none() {
            let fixed = head.need(start + 20)?;
            let header = usize::from(fixed[start + 12] >> 4) * 4;
            if header > ip.payload {
                return None;
            }
            let segment = Segment::parse(&head.need(start + header)?[start..])?;
            let refused = ip.hops <= 1;
            let first = head.bytes;
            let rest = Payload::Guest(head.rest.take(ip.payload - header));
            if refused {
                self.expire(&ip, &first[ETHERNET..start + header.min(8)]);
            } else {
                self.tcp(&ip, &segment, rest);
            }
            return Some(());
        }
        // The rest is small, or rare: it is copied.
        let read = head.len;
        let mut packet = Vec::with_capacity(ETHERNET + ip.header + ip.payload);
        packet.extend(&head.bytes[..read.min(ETHERNET + ip.header + ip.payload)]);
        let there = packet.len();
        packet.resize(ETHERNET + ip.header + ip.payload, 0);
        if head.rest.read(&mut packet[there..]) < packet.len() - there {
            return None;
        }
        let headers = packet[ETHERNET..start].to_vec();
        let payload = &packet[start..];
        match ip.fragment {
            None => self.payload(&ip, &headers, payload),
            Some(part) => match self.reassembly.add(&ip, part, payload, self.env.now) {
                Some(whole) => {
                    let ip = Ip { payload: whole.len(), fragment: None, ..ip };
                    self.payload(&ip, &headers, &whole)
                }
                None => Some(()),
            },
        }
    }

    /// Whether the packet's source is the guest's; learns from it.
    fn accepts(&mut self, ip: &Ip) -> bool {
        match (ip.from, ip.to) {
            // Of those who have no address yet: DHCP, and whether an address is taken.
            (IpAddr::V4(from), IpAddr::V4(to)) if from.is_unspecified() => {
                to.is_broadcast() && ip.protocol == UDP
            }
            (IpAddr::V6(from), IpAddr::V6(to)) if from.is_unspecified() => {
                to.is_multicast() && ip.protocol == ICMPV6
            }
            (IpAddr::V6(from), IpAddr::V6(_)) if self.env.config.may_send(ip.from) => {
                if !from.is_unicast_link_local() {
                    self.guest6 = Some(from);
                }
                true
            }
            _ => self.env.config.may_send(ip.from),
        }
    }

    /// Tells the guest that its packet has made all its hops.
    fn expire(&mut self, ip: &Ip, original: &[u8]) {
        self.env.refuse((ip.from, ip.to), Refusal::TimeExceeded, original);
    }

    /// Takes a whole payload; `None` where it makes no sense.
    fn payload(&mut self, ip: &Ip, headers: &[u8], payload: &[u8]) -> Option<()> {
        let inside = self.env.config.is_gateway(ip.to);
        let group = match ip.to {
            IpAddr::V4(v4) => v4.is_broadcast() || v4.is_multicast(),
            IpAddr::V6(v6) => v6.is_multicast(),
        };
        if ip.hops <= 1 && !inside && !group {
            let first = &payload[..payload.len().min(8)];
            self.expire(ip, &[headers, first].concat());
            return Some(());
        }
        match ip.protocol {
            TCP => {
                let segment = Segment::parse(payload)?;
                self.tcp(ip, &segment, Payload::Bytes(&payload[segment.header..]));
            }
            UDP => return self.udp(ip, payload),
            ICMP if ip.from.is_ipv4() => return self.icmp(ip, payload),
            ICMPV6 if ip.from.is_ipv6() => return self.icmp(ip, payload),
            _ => count(&self.env.counters().unsupported),
        }
        Some(())
    }

    /// Where a flow really goes.
    fn target(&mut self, key: &Key, resolver: usize) -> Result<SocketAddr, Refusal> {
        let (peer, port) = key.peer;
        let decide = |env: &Env| {
            let policy = env.shared.policy.read().unwrap_or_else(PoisonError::into_inner);
            match policy.decide(key.kind(), peer, port) {
                Action::Allow => Ok(()),
                Action::Deny => {
                    count(&env.counters().denied);
                    Err(Refusal::Prohibited)
                }
            }
        };
        if self.env.config.is_gateway(peer) {
            if port == dns::PORT && key.kind() != Protocol::Icmp {
                let servers = self.names.servers(self.env.now);
                return servers.get(resolver % servers.len().max(1)).copied().ok_or(Refusal::NoPort);
            }
            if !self.env.config.gateway_is_host {
                return Err(Refusal::NoPort);
            }
            decide(&self.env)?;
            let host = match peer {
                IpAddr::V4(_) => IpAddr::from(Ipv4Addr::LOCALHOST),
                IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
            };
            return Ok(SocketAddr::new(host, port));
        }
        if self.env.config.is_inside(peer) {
            return Err(Refusal::NoHost);
        }
        decide(&self.env)?;
        Ok(SocketAddr::new(peer, port))
    }

    fn tcp(&mut self, ip: &Ip, segment: &Segment, mut payload: Payload<'_, '_>) {
        let key = Key { protocol: TCP, guest: (ip.from, segment.from), peer: (ip.to, segment.to) };
        if let Some(number) = self.flows.find(&key) {
            let Some(flow) = self.flows.get(number) else { return };
            let Kind::Tcp(tcp) = &mut flow.kind else { return };
            let fate = tcp.segment(&mut self.env, &key, segment, &mut payload);
            self.settle(number, fate);
            if fate != Fate::Replace {
                return;
            }
        }
        if segment.flags & (SYN | ACK | RST) != SYN {
            if let Some(packet) = tcp::reset_for(&self.env, &key, segment, payload.len()) {
                self.env.push(packet);
            }
            return;
        }
        let opened = match self.target(&key, 0) {
            Ok(target) => {
                let connect = |env: &mut Env, token| {
                    Tcp::connect(env, segment, target, token).map(|tcp| Kind::Tcp(Box::new(tcp)))
                };
                self.open(key, connect).map_err(|error| refusal(&error))
            }
            Err(refusal) => Err(refusal),
        };
        match opened {
            Ok(Some(number)) => self.touched(number),
            Ok(None) => {}
            Err(Refusal::NoPort) => {
                if let Some(packet) = tcp::reset_for(&self.env, &key, segment, 0) {
                    self.env.push(packet);
                }
            }
            Err(refusal) => self.env.refuse_flow(&key, refusal),
        }
    }

    fn udp(&mut self, ip: &Ip, payload: &[u8]) -> Option<()> {
        let (from, to, data) = datagram::parse(payload)?;
        if let (IpAddr::V4(_), dhcp::SERVER_PORT) = (ip.to, to)
            && (self.env.config.is_gateway(ip.to) || ip.to == IpAddr::V4(Ipv4Addr::BROADCAST))
        {
            self.dhcp(data);
            return Some(());
        }
        if !self.env.config.may_send(ip.from) {
            return Some(());
        }
        let key = Key { protocol: UDP, guest: (ip.from, from), peer: (ip.to, to) };
        let names = to == dns::PORT && self.env.config.is_gateway(ip.to);
        if names {
            match self.names.question(data, self.env.now) {
                Verdict::Answer(answer) => {
                    datagram::answer(&mut self.env, &key, &answer);
                    return Some(());
                }
                Verdict::Ignore => return None,
                Verdict::Ask => {}
            }
        }
        self.datagram(key, data, names);
        Some(())
    }

    fn dhcp(&mut self, message: &[u8]) {
        let Some(answer) = dhcp::answer(&self.env.config, message) else { return };
        if answer.leased && !self.leased {
            self.leased = true;
            log::info!("NAT: the guest has its address, {}", self.env.config.guest4);
        }
        let gateway = self.env.config.gateway4.into();
        let mut data = vec![0; datagram::HEADER];
        data.extend(answer.message);
        let key = Key {
            protocol: UDP,
            guest: (answer.to.into(), dhcp::CLIENT_PORT),
            peer: (gateway, dhcp::SERVER_PORT),
        };
        datagram::give(&mut self.env, &key, &mut data);
    }

    fn icmp(&mut self, ip: &Ip, message: &[u8]) -> Option<()> {
        let v4 = ip.protocol == ICMP;
        let (&kind, ident) = (message.first()?, wire::be16(message, 4)?);
        let (request, reply) = if v4 {
            (gateway::ECHO_REQUEST, gateway::ECHO_REPLY)
        } else {
            (gateway::ECHO_REQUEST_V6, gateway::ECHO_REPLY_V6)
        };
        if kind != request {
            if !v4 && self.env.config.prefix6.is_some() {
                if let Some(answer) = gateway::neighbor(&self.env.config, self.env.link, ip, message) {
                    self.env.push(answer);
                }
                if kind == gateway::ROUTER_SOLICITATION && !self.advertising {
                    self.advertising = true;
                    let next: Instant = self.env.now + super::ADVERTISED;
                    self.timers.set(None, next, super::ADVERTISE);
                }
            }
            return Some(());
        }
        if message.len() < 8 || !self.env.config.may_send(ip.from) {
            return None;
        }
        if self.env.config.is_gateway(ip.to) {
            let mut answer = message.to_vec();
            answer[0] = reply;
            self.env.push_payload((ip.to, ip.from), ip.protocol, &answer);
            return Some(());
        }
        let key = Key { protocol: ip.protocol, guest: (ip.from, ident), peer: (ip.to, 0) };
        self.datagram(key, message, false);
        Some(())
    }

    /// Sends a datagram by its flow, which is made where there is none.
    fn datagram(&mut self, key: Key, data: &[u8], names: bool) {
        let mut resolver = 0;
        let mut number = self.flows.find(&key);
        if let Some(found) = number
            && let Some(flow) = self.flows.get(found)
            && let Kind::Datagrams(datagrams) = &flow.kind
            && let Some(asked) = datagrams.resolver
            && datagrams.unanswered(self.env.now)
        {
            // The next one may be more talkative.
            resolver = asked + 1;
            self.remove(found);
            number = None;
        }
        if number.is_none() {
            let made = self.target(&key, resolver).and_then(|target| {
                let connect = |env: &mut Env, token| {
                    let mut flow = Datagrams::connect(env, &key, target, token)?;
                    flow.resolver = names.then_some(resolver);
                    Ok(Kind::Datagrams(flow))
                };
                self.open(key, connect).map_err(|error| {
                    if key.kind() == Protocol::Icmp {
                        log::warn!(
                            "NAT: no echo request to {}: {error}; let this user's group have them (sysctl net.ipv4.ping_group_range)",
                            key.peer.0
                        );
                    }
                    refusal(&error)
                })
            });
            number = match made {
                Ok(number) => number,
                Err(refusal) => {
                    self.env.refuse_flow(&key, refusal);
                    return;
                }
            };
        }
        let Some(number) = number else { return };
        let Some(flow) = self.flows.get(number) else { return };
        let Kind::Datagrams(datagrams) = &mut flow.kind else { return };
        let fate = datagrams.send(&mut self.env, &key, data);
        self.settle(number, fate);
    }
}

/// What a guest is told when the host refuses it a socket.
fn refusal(error: &io::Error) -> Refusal {
    match error.raw_os_error() {
        Some(libc::ENETUNREACH | libc::EADDRNOTAVAIL | libc::EAFNOSUPPORT) => Refusal::NoRoute,
        Some(libc::ECONNREFUSED) => Refusal::NoPort,
        Some(libc::EACCES | libc::EPERM) => Refusal::Prohibited,
        _ => Refusal::NoHost,
    }
}
