//! What the guest gets on a connection.

use std::io;
use std::time::Duration;

use rustix::net::RecvFlags;
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6,
};

use super::super::env::{Env, Key};
use super::super::wire::{self, ETHERNET, TCP};
use super::segment::{self, ACK, FIN, PSH, SYN, bare, distance, header};
use super::{LEAST_WINDOW, MOST_WINDOW, Output, State, Tcp, span};
use crate::buffers::Buffers;
use crate::net::{HEADER, deliver};

impl Tcp {
    /// The window for the guest.
    pub(super) fn offer(&mut self, env: &Env) -> u16 {
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
    pub(in super::super) fn output(
        &mut self,
        env: &mut Env,
        key: &Key,
        into: &mut Buffers<'_>,
        spill: &mut [u8],
    ) -> Output {
        if self.syn {
            let packet = self.syn_packet(env, key);
            return Output::Packet(deliver(&[&packet], into, spill));
        }
        if self.state == State::Established {
            if self.has_data() && self.room() > 0 {
                match self.data(env, key, into, spill) {
                    Ok(0) => {}
                    Ok(len) => return Output::Packet(len),
                    Err(_) => return Output::Broken,
                }
            }
            if self.at_end() {
                let window = self.offer(env);
                let packet = bare(env, key, (self.next, self.expected), FIN | ACK, window, &[]);
                self.sent(env, 1);
                return Output::Packet(deliver(&[&packet], into, spill));
            }
        }
        if self.acknowledge {
            self.repeats = self.repeats.saturating_sub(1);
            self.acknowledge = self.repeats > 0;
            let window = self.offer(env);
            let packet = bare(env, key, (self.next, self.expected), ACK, window, &[]);
            return Output::Packet(deliver(&[&packet], into, spill));
        }
        Output::Nothing
    }

    /// Notes that the guest was sent `count` sequence numbers from the next, with an acknowledgement.
    fn sent(&mut self, env: &Env, count: u32) {
        self.next = self.next.wrapping_add(count);
        if distance(self.next, self.most) > 0 {
            self.most = self.next;
        }
        // What carries data repeats nothing.
        self.acknowledge = self.repeats > 0;
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
        let (mut front, mut body) = (into.take(headers), into.take(most));
        let looked = if most == 0 {
            // Buffers without room for anything: the rule of section 5.1.6.3 is broken.
            Err(io::ErrorKind::WouldBlock.into())
        } else if env.leaves_checksums() {
            body.peek_from(socket, &mut env.scratch[..skip])
        } else {
            let room = &mut env.scratch[..skip + most];
            let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
            rustix::net::recv(socket, room, flags).map(|(done, _)| done).map_err(io::Error::from)
        };
        let len = looked.as_ref().map_or(0, |looked| looked.saturating_sub(skip));
        if len == 0 || !env.leaves_checksums() {
            // Nothing was written: it is there for the next packet.
            front.append(body);
            front.append(std::mem::take(into));
            *into = std::mem::take(&mut front);
        }
        if len == 0 {
            self.readable = false;
            return match looked {
                // The end, or (where what is in flight is looked at too) nothing new.
                Ok(looked) => {
                    if looked == 0 || self.host_ended && looked == skip {
                        self.end.get_or_insert(self.next);
                    }
                    Ok(0)
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
                Err(error) => Err(error),
            };
        }
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
            deliver(&[&packet], into, spill);
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
