//! What comes in by forwards.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::datagram::{self, Datagrams};
use super::env::{Env, Key};
use super::flows::Kind;
use super::forward::{Listener, Socket};
use super::tcp::Tcp;
use super::wire::{TCP, UDP};
use super::{FIRST_PORT, Nat};

impl Nat {
    /// Takes one connection or datagram from the forward with the token `token`, which has its turn again
    /// after the others.
    pub(super) fn incoming(&mut self, token: u64) {
        let Some(listener) = self.env.shared.listener(token) else { return };
        let came = match &listener.socket {
            Socket::Tcp(socket) => socket.accept().and_then(|(stream, peer)| {
                stream.set_nonblocking(true)?;
                self.connection(&listener, stream.into(), peer)
            }),
            Socket::Udp(socket) => {
                let mut room = std::mem::take(&mut self.env.scratch);
                let came = socket.recv_from(&mut room[datagram::HEADER..]);
                let came = came.and_then(|(len, peer)| {
                    self.forwarded(&listener, peer, &mut room[..datagram::HEADER + len])
                });
                self.env.scratch = room;
                came
            }
        };
        match came {
            Ok(()) => self.flows.ready.push_back(token),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                log::warn!("NAT: forward {}: {error}", listener.forward);
                if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) {
                    // Another may take the place; with none to be had, the next who comes is the next try.
                    if self.flows.len() > 0 {
                        self.evict();
                        self.flows.ready.push_back(token);
                    }
                } else {
                    // Of a connection that is gone again, or a datagram before.
                    self.flows.ready.push_back(token);
                }
            }
        }
    }

    /// A key for somebody who comes in, with a port of the gateway's that is free.
    fn key(&mut self, protocol: u8, listener: &Listener) -> Option<Key> {
        let guest: IpAddr = self.guest(listener.forward.bind.ip());
        let peer = self.env.config.gateway(guest);
        for _ in FIRST_PORT..=u16::MAX {
            let port = self.next_port;
            self.next_port = port.checked_add(1).unwrap_or(FIRST_PORT);
            let key = Key { protocol, guest: (guest, listener.forward.guest_port), peer: (peer, port) };
            if self.flows.find(&key).is_none() {
                return Some(key);
            }
        }
        None
    }

    fn connection(&mut self, listener: &Listener, socket: OwnedFd, peer: SocketAddr) -> io::Result<()> {
        let Some(key) = self.key(TCP, listener) else { return Ok(()) };
        log::debug!("NAT: {peer} comes in by {}", listener.forward);
        let mut socket = Some(socket);
        let make = |env: &mut Env, token| {
            let socket = socket.take().ok_or(io::ErrorKind::NotConnected)?;
            Tcp::accepted(env, socket, token).map(|tcp| Kind::Tcp(Box::new(tcp)))
        };
        if let Some(number) = self.open(key, make)? {
            self.touched(number);
        }
        Ok(())
    }

    fn forwarded(&mut self, listener: &Arc<Listener>, peer: SocketAddr, data: &mut [u8]) -> io::Result<()> {
        let key = match self.flows.find_forwarded(listener.forward.bind, peer) {
            Some(key) => key,
            None => {
                let Some(key) = self.key(UDP, listener) else { return Ok(()) };
                let make = |env: &mut Env, _| Ok(Kind::Datagrams(Datagrams::forwarded(env, listener, peer)));
                if let Some(number) = self.open(key, make)? {
                    self.touched(number);
                }
                key
            }
        };
        let now = self.env.now;
        if let Some(number) = self.flows.find(&key)
            && let Some(flow) = self.flows.get(number)
            && let Kind::Datagrams(datagrams) = &mut flow.kind
        {
            datagrams.touch(now);
        }
        datagram::give(&mut self.env, &key, data);
        Ok(())
    }
}
