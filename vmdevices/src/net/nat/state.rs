//! What is saved with the machine.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::env::Key;
use super::flows::Kind;
use super::tcp::{ACK, RST, bare};
use super::wire::TCP;
use super::{Forward, Nat, Protocol};
use crate::saved;
use crate::virtio::Mac;

const WHAT: &str = "a NAT";
const VERSION: u8 = 1;

/// What a guest knows of its network, and what must not surprise it.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    gateway4: Ipv4Addr,
    guest4: Ipv4Addr,
    prefix4: u8,
    prefix6: Option<Ipv6Addr>,
    mtu: u16,
    mac: Mac,
    guest6: Option<Ipv6Addr>,
    leased: bool,
    advertising: bool,
    /// Protocol number, address of the host, port of the guest.
    forwards: Vec<(u8, SocketAddr, u16)>,
    /// TCP connections, with the next sequence numbers towards the guest and from it.
    connections: Vec<(Key, u32, u32)>,
}

impl Nat {
    /// The state to be saved with the machine: addresses and lease, forwards, and which connections
    /// there are.
    ///
    /// # Errors
    /// Where it cannot be encoded.
    pub fn save_state(&self) -> io::Result<Vec<u8>> {
        let config = &self.env.config;
        let forwards = self.handle().forwards().into_iter().map(|forward| {
            let number = if forward.protocol == Protocol::Tcp { TCP } else { super::wire::UDP };
            (number, forward.bind, forward.guest_port)
        });
        let connections = self.flows.iter().filter_map(|flow| match &flow.kind {
            Kind::Tcp(tcp) => {
                let (next, expected) = tcp.position();
                Some((flow.key, next, expected))
            }
            Kind::Datagrams(_) => None,
        });
        let state = State {
            gateway4: config.gateway4,
            guest4: config.guest4,
            prefix4: config.prefix4,
            prefix6: config.prefix6,
            mtu: config.mtu,
            mac: self.env.link.guest,
            guest6: self.guest6,
            leased: self.leased,
            advertising: self.advertising,
            forwards: forwards.collect(),
            connections: connections.collect(),
        };
        saved::save(WHAT, VERSION, &state).map_err(io::Error::other)
    }

    /// Takes over what [`Nat::save_state`] saved: the guest keeps its addresses, whatever this NAT was told
    /// before, and forwards that are not there begin. Connections went with the process that had them:
    /// the guest is told at once that they are reset. Rules, names and limits are this NAT's own.
    ///
    /// # Errors
    /// `InvalidData` where the bytes are no such state; as [`Nat::forward`] where a port cannot be had.
    pub fn restore_state(&mut self, state: &[u8]) -> io::Result<()> {
        let invalid =
            |error: &dyn std::error::Error| io::Error::new(io::ErrorKind::InvalidData, error.to_string());
        let state: State = saved::restore(WHAT, VERSION, state).map_err(|error| invalid(&error))?;
        // The bounds of the settings apply.
        let checked = Nat::new()
            .and_then(|nat| nat.ipv4(state.gateway4, state.guest4, state.prefix4))
            .and_then(|nat| nat.ipv6(state.prefix6))
            .and_then(|nat| nat.with_mtu(state.mtu))
            .map_err(|error| invalid(&error))?;
        let handle = self.handle();
        for (number, bind, guest_port) in state.forwards {
            let protocol = if number == TCP { Protocol::Tcp } else { Protocol::Udp };
            let forward = Forward { protocol, bind, guest_port };
            if !handle.forwards().contains(&forward) {
                handle.forward(forward).map_err(io::Error::other)?;
            }
        }
        let config = &mut self.env.config;
        (config.gateway4, config.guest4, config.prefix4) = (state.gateway4, state.guest4, state.prefix4);
        (config.prefix6, config.mtu) = (state.prefix6, checked.env.config.mtu);
        self.env.link.guest = state.mac;
        (self.guest6, self.leased) = (state.guest6, state.leased);
        if state.advertising && !self.advertising {
            self.advertising = true;
            self.advertise();
        }
        for (key, next, expected) in state.connections {
            let sane = key.protocol == TCP && key.guest.0.is_ipv4() == key.peer.0.is_ipv4();
            if sane {
                let packet = bare(&self.env, &key, (next, expected), RST | ACK, 0, &[]);
                // All of them, whatever waits: there are as many as there were flows.
                self.env.out.push_back(packet);
            }
        }
        Ok(())
    }
}
