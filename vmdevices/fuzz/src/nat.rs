//! Any frames for the built-in NAT, from the guest and from a connection of the host's.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};

use vm_memory::Permissions;
use vmcore::{GuestAddress, GuestMemory, MemoryRegion};
use vmdevices::buffers::Buffers;
use vmdevices::net::{Action, Forward, HEADER, MOST_PACKET, Nat, NatStats, NetBackend};

/// Bytes of each change to a frame: where, and to what.
const CHANGE: usize = 2;

/// A step that is a frame as it is, of so many bytes (16 bits) behind another byte: real traffic.
pub const RAW: u8 = 253;
/// In the last byte of a step's head: a segment of TCP goes on where the NAT's last one leads.
pub const FOLLOW: u8 = 2;
/// A step by which the host connects to what the NAT forwards, besides that it is a frame.
pub const CONNECT: u8 = 254;

/// What frames have in place of the port that somebody listens on.
pub const PORT: [u8; 2] = [0, 80];
/// The port of the guest that is forwarded to.
pub const FORWARDED: u16 = 1024;

const TO_GATEWAY: [u8; 12] = [2, b'v', b'm', b'n', b'a', b't', 2, 0, 0, 0, 0, 9];

/// Starts of packets that the NAT knows: the payload of an IP packet to the gateway, with its protocol.
const PAYLOADS: [(u8, &[u8]); 8] = [
    // A SYN, data and the end, a reset: the sequence numbers are the input's to get right.
    (6, &[4, 0, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x60, 2, 255, 255, 0, 0, 0, 0, 2, 4, 5, 180]),
    (6, &[4, 0, 0, 80, 0, 0, 0, 2, 0, 0, 0, 0, 0x50, 0x11, 255, 255, 0, 0, 0, 0, b'd', b'a', b't', b'a']),
    (6, &[4, 0, 0, 80, 0, 0, 0, 2, 0, 0, 0, 0, 0x50, 4, 0, 0, 0, 0, 0, 0]),
    // A question for an address, and for nothing.
    (17, &[4, 0, 0, 53, 0, 29, 0, 0, 1, 2, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 3, b'b', b'o', b'x', 0, 0, 1, 0, 1]),
    (17, &[4, 0, 0, 9, 0, 12, 0, 0, 1, 2, 3, 4]),
    (1, &[8, 0, 0, 0, 0, 1, 0, 2, 3, 4]),
    (58, &[135, 0, 0, 0, 0, 0, 0, 0, 0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]),
    (58, &[133, 0, 0, 0, 0, 0, 0, 0]),
];

/// What the NAT has come to.
#[derive(Clone, Copy, Debug)]
pub struct End {
    pub stats: NatStats,
    /// How many bytes the host got from the guest by TCP.
    pub read: u64,
}

/// Sends the frames that `input` describes (a template, how long it is to be, and changes), answers what
/// asks for an acknowledgement now and then, and takes all that comes.
pub fn nat(input: &[u8]) -> End {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    listener.set_nonblocking(true).expect("a descriptor");
    let port = listener.local_addr().expect("an address").port();
    let nat = Nat::new().expect("descriptors").gateway_is_host().resolvers([]).most_flows(8);
    let nat = nat.name("box", [Ipv4Addr::LOCALHOST.into()]).otherwise(Action::Deny);
    let open = format!("tcp:10.0.2.2:{port}").parse().expect("a destination");
    let nat = nat.allow(open).forward(Forward::tcp(0, FORWARDED)).expect("a port");
    let forward = nat.handle().forwards()[0].bind;
    let mut guest = Guest { nat, memory: GuestMemory::new(), ack: [0; 8], peer: [0; 2], sockets: Vec::new() };
    let region = MemoryRegion::anonymous(GuestAddress(0), 0x2_0000).expect("memory");
    guest.memory.insert(region.into()).expect("no overlap");

    let (mut rest, mut read) = (input, 0);
    while let Some((&[what, len, changes, bits], tail)) = rest.split_first_chunk::<4>() {
        rest = tail;
        guest.nat.set_features(if bits & 1 == 1 { 0x1983 } else { 0 }).expect("features");
        if what == 255 {
            let state = guest.nat.save_state().expect("a state");
            guest.nat.restore_state(&state).expect("its own state");
        }
        if what == CONNECT && guest.sockets.len() < 4 {
            guest.sockets.push(TcpStream::connect(forward).expect("the forward listens"));
        }
        let frame = if what == RAW {
            let (frame, tail) =
                rest.split_at(usize::from(u16::from_le_bytes([len, changes])).min(rest.len()));
            rest = tail;
            let mut frame = frame.to_vec();
            if bits & FOLLOW != 0 {
                guest.follow(&mut frame, port);
            }
            frame
        } else {
            let (edits, tail) = rest.split_at((usize::from(changes % 8) * CHANGE).min(rest.len()));
            rest = tail;
            let (protocol, payload) = PAYLOADS[usize::from(what) % PAYLOADS.len()];
            let mut payload = payload.to_vec();
            if protocol == 6 && payload[2..4] == PORT {
                payload[2..4].copy_from_slice(&port.to_be_bytes());
                if bits & FOLLOW != 0 {
                    payload[4..12].copy_from_slice(&guest.ack);
                }
            }
            let mut frame = frame(protocol, &payload, bits & 4 == 4);
            for edit in edits.chunks_exact(CHANGE) {
                let at = usize::from(edit[0]) % frame.len();
                frame[at] = edit[1];
            }
            if len > 0 {
                frame.resize(usize::from(len) * 8, 0x5a);
            }
            frame
        };
        guest.send(&frame);
        if bits & 8 == 0 {
            guest.receive();
        }
        while let Ok((stream, _)) = listener.accept() {
            guest.sockets.push(stream);
            guest.sockets.truncate(8);
        }
        for socket in &mut guest.sockets {
            socket.set_nonblocking(true).expect("a descriptor");
            drop(socket.write(b"from the host"));
            read += socket.read(&mut [0; 4096]).unwrap_or(0) as u64;
        }
    }
    guest.receive();
    let stats = guest.nat.handle().stats();
    assert!(stats.flows <= 8);
    End { stats, read }
}

/// A frame with `payload` to the gateway, by IPv4 or IPv6.
fn frame(protocol: u8, payload: &[u8], six: bool) -> Vec<u8> {
    let mut frame = TO_GATEWAY.to_vec();
    let len = payload.len() as u16;
    if six || protocol == 58 {
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend(len.to_be_bytes());
        frame.extend([protocol, 255]);
        for station in [9, 1] {
            frame.extend([0xfd, 0x76, 0x6d, 0x63, 0x6f, 0x72, 0, 0, 0, 0, 0, 0, 0, 0, 0, station]);
        }
    } else {
        frame.extend([8, 0, 0x45, 0]);
        frame.extend((len + 20).to_be_bytes());
        frame.extend([0, 7, 0, 0, 64, protocol, 0, 0, 10, 0, 2, 15, 10, 0, 2, 2]);
    }
    frame.extend(payload);
    frame
}

struct Guest {
    nat: Nat,
    memory: GuestMemory,
    /// Sequence number and acknowledgement with which the guest goes on after the last segment that it got.
    ack: [u8; 8],
    /// The port which that segment came from.
    peer: [u8; 2],
    sockets: Vec<TcpStream>,
}

impl Guest {
    /// Has a segment that was recorded go on with the connections of this run: ports of the host's and first
    /// sequence numbers of the NAT's are other ones each time. (The NAT does not look at its checksum.)
    fn follow(&self, frame: &mut [u8], port: u16) {
        if frame.len() < 54 || frame[12..15] != [8, 0, 0x45] || frame[23] != 6 {
            return;
        }
        let (syn, ack) = (frame[47] & 2 != 0, frame[47] & 16 != 0);
        if syn && !ack {
            if frame[36..38] == PORT {
                frame[36..38].copy_from_slice(&port.to_be_bytes());
            }
            return;
        }
        frame[36..38].copy_from_slice(&self.peer);
        if ack {
            frame[42..46].copy_from_slice(&self.ack[4..]);
        }
    }

    fn send(&mut self, frame: &[u8]) {
        self.memory.write(GuestAddress(HEADER as u64), frame).expect("memory");
        let map = self.memory.snapshot();
        let mut packet = Buffers::default();
        let len = HEADER + frame.len();
        let slices = vm_memory::GuestMemory::get_slices(&*map, GuestAddress(0), len, Permissions::Read);
        slices.expect("memory").for_each(|slice| packet.push(slice.expect("memory")));
        self.nat.send(&mut packet).expect("an event");
    }

    fn receive(&mut self) {
        let mut spill = vec![0; MOST_PACKET];
        for _ in 0..1000 {
            let map = self.memory.snapshot();
            let mut room = Buffers::default();
            let slices = vm_memory::GuestMemory::get_slices(&*map, GuestAddress(0), 2048, Permissions::Write);
            slices.expect("memory").for_each(|slice| room.push(slice.expect("memory")));
            let Ok(len) = self.nat.receive(&mut room, &mut spill) else { return };
            assert!((HEADER + 14..=MOST_PACKET).contains(&len));
            let mut head = [0; HEADER + 54];
            self.memory.read(GuestAddress(0), &mut head).expect("memory");
            let frame = &head[HEADER..];
            if frame[12..14] == [8, 0] && frame[23] == 6 {
                let seq = u32::from_be_bytes([frame[38], frame[39], frame[40], frame[41]]);
                let control = u32::from(frame[47] & 2 != 0) + u32::from(frame[47] & 1);
                let data = len - HEADER - 34 - 4 * usize::from(frame[46] >> 4);
                let next = seq.wrapping_add(data as u32).wrapping_add(control);
                self.peer.copy_from_slice(&frame[34..36]);
                self.ack[..4].copy_from_slice(&frame[42..46]);
                self.ack[4..].copy_from_slice(&next.to_be_bytes());
            }
        }
    }
}
