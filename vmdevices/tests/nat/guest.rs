//! A guest without a machine: smoltcp's stack on a `NetBackend`.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::{dhcpv4, icmp, tcp, udp};
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr};
use vm_memory::Permissions;
use vmcore::memory::MemoryMap;
use vmcore::{GuestAddress, GuestMemory, MemoryRegion};
use vmdevices::buffers::Buffers;
use vmdevices::net::{HEADER, MOST_PACKET, Nat, NetBackend};

pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x17];
pub const GATEWAY_MAC: [u8; 6] = [2, b'v', b'm', b'n', b'a', b't'];
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
pub const ADDRESS6: Ipv6Addr = Ipv6Addr::new(0xfd76, 0x6d63, 0x6f72, 0, 0, 0, 0, 15);
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd76, 0x6d63, 0x6f72, 0, 0, 0, 0, 1);

/// Checksums and large packets, both ways: virtio-net features 0, 1, 7, 8, 11 and 12.
pub const OFFLOADS: u64 = 0x1983;

const LIMIT: Duration = Duration::from_secs(60);

/// Where packets for and from the guest lie in its memory: each in two pieces that do not touch.
const SENT: u64 = 0;
const RECEIVED: u64 = 0x2_0000;
const SPLIT: usize = 0x123;

/// What happens to frames on their way, for a guest whose link is not as good as a virtqueue.
#[derive(Clone, Copy, Debug, Default)]
pub struct Trouble {
    pub state: u64,
    /// Of 256 frames.
    pub lost: u8,
    pub doubled: u8,
    pub late: u8,
}

impl Trouble {
    fn strikes(&mut self, of_256: u8) -> bool {
        // xorshift64.
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        (self.state >> 32) as u8 <= of_256.wrapping_sub(1) && of_256 > 0
    }

    /// Puts `frame` into `queue`.
    fn pass(&mut self, queue: &mut VecDeque<Vec<u8>>, frame: Vec<u8>) {
        if self.strikes(self.lost) {
            return;
        }
        if self.strikes(self.doubled) {
            queue.push_back(frame.clone());
        }
        if self.strikes(self.late) && !queue.is_empty() {
            queue.insert(queue.len() - 1, frame);
        } else {
            queue.push_back(frame);
        }
    }
}

/// The NAT as smoltcp's device.
pub struct Wire {
    pub nat: Nat,
    memory: GuestMemory,
    offloads: bool,
    mtu: usize,
    pub trouble: Option<Trouble>,
    incoming: VecDeque<Vec<u8>>,
    outgoing: VecDeque<Vec<u8>>,
    /// Every frame that came, where that is wanted.
    pub seen: Option<Vec<Vec<u8>>>,
}

impl Wire {
    pub fn new(mut nat: Nat, features: u64) -> Self {
        nat.set_features(features).unwrap();
        let memory = GuestMemory::new();
        memory.insert(MemoryRegion::anonymous(GuestAddress(0), 0x4_0000).unwrap().into()).unwrap();
        let mtu = nat.mtu().unwrap().into();
        Self {
            nat,
            memory,
            offloads: features != 0,
            mtu,
            trouble: None,
            incoming: VecDeque::new(),
            outgoing: VecDeque::new(),
            seen: None,
        }
    }

    /// Sends `frame`; it has no header yet.
    pub fn send(&mut self, frame: &[u8]) {
        let split = SPLIT.min(frame.len() + HEADER);
        let packet = [&[0; HEADER][..], frame].concat();
        self.memory.write(GuestAddress(SENT + 0x1000), &packet[..split]).unwrap();
        self.memory.write(GuestAddress(SENT + 0x2000), &packet[split..]).unwrap();
        let map = self.memory.snapshot();
        self.nat.send(&mut pieces(&map, SENT, packet.len(), Permissions::Read)).unwrap();
    }

    /// Takes a frame, if there is one.
    pub fn receive(&mut self) -> Option<Vec<u8>> {
        let room = if self.offloads { MOST_PACKET } else { HEADER + 14 + self.mtu };
        let memory = self.memory.clone();
        let map = memory.snapshot();
        let mut buffers = pieces(&map, RECEIVED, room, Permissions::Write);
        let len = match self.nat.receive(&mut buffers, &mut vec![0; MOST_PACKET]) {
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
            Err(error) => panic!("{error}"),
        };
        assert!((HEADER + 14..=room).contains(&len), "a packet of {len} bytes");
        let mut packet = vec![0; len];
        let split = SPLIT.min(len);
        self.memory.read(GuestAddress(RECEIVED + 0x1000), &mut packet[..split]).unwrap();
        self.memory.read(GuestAddress(RECEIVED + 0x2000), &mut packet[split..]).unwrap();
        self.check_header(&packet);
        let frame = packet.split_off(HEADER);
        if let Some(seen) = &mut self.seen {
            seen.push(frame.clone());
        }
        Some(frame)
    }

    /// The header is what section 5.1.6.4 of virtio 1.2 asks for.
    fn check_header(&self, packet: &[u8]) {
        let field = |at: usize| usize::from(u16::from_le_bytes([packet[at], packet[at + 1]]));
        if !self.offloads {
            assert_eq!(packet[..10], [0; 10]);
        }
        if packet[0] != 0 {
            assert_eq!(packet[0], 1, "flags");
            assert_eq!(field(8), 16, "where TCP's checksum is");
            let headers = if packet[HEADER + 12..HEADER + 14] == [8, 0] { 34 } else { 54 };
            assert_eq!(field(6), headers);
            if packet[1] != 0 {
                assert_eq!(packet[1], if headers == 34 { 1 } else { 4 });
                assert_eq!(field(2), headers + 20);
                assert!((1..packet.len()).contains(&field(4)), "{:?} of {}", &packet[..12], packet.len());
            }
        }
        if packet[1] == 0 {
            assert!(packet.len() <= HEADER + 14 + self.mtu, "{} bytes are too long", packet.len());
        }
    }

    /// Moves frames with the trouble that there is.
    fn shuffle(&mut self) {
        let Some(mut trouble) = self.trouble else { return };
        while let Some(frame) = self.outgoing.pop_front() {
            self.send(&frame);
        }
        for _ in 0..16 {
            let Some(frame) = self.receive() else { break };
            trouble.state = self.trouble.map_or(1, |trouble| trouble.state);
            trouble.pass(&mut self.incoming, frame);
            self.trouble = Some(trouble);
        }
    }
}

/// `len` bytes of guest memory for a packet.
fn pieces(map: &MemoryMap, at: u64, len: usize, access: Permissions) -> Buffers<'_> {
    let mut buffers = Buffers::default();
    let split = SPLIT.min(len);
    for (at, len) in [(at + 0x1000, split), (at + 0x2000, len - split)] {
        let slices = vm_memory::GuestMemory::get_slices(map, GuestAddress(at), len, access);
        slices.unwrap().for_each(|slice| buffers.push(slice.unwrap()));
    }
    buffers
}

pub struct Received(Vec<u8>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, act: F) -> R {
        act(&self.0)
    }
}

pub struct Sending<'a>(&'a mut Wire);

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, act: F) -> R {
        let mut frame = vec![0; len];
        let result = act(&mut frame);
        match self.0.trouble {
            Some(mut trouble) => {
                trouble.pass(&mut self.0.outgoing, frame);
                self.0.trouble = Some(trouble);
            }
            None => self.0.send(&frame),
        }
        result
    }
}

impl Device for Wire {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Received, Sending<'_>)> {
        let frame = if self.trouble.is_some() {
            if self.incoming.is_empty() {
                self.shuffle();
            }
            self.incoming.pop_front()
        } else {
            Wire::receive(self)
        };
        frame.map(|frame| (Received(frame), Sending(self)))
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Sending<'_>> {
        Some(Sending(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = self.mtu + 14;
        if self.offloads {
            // What it gets is not complete; what it sends need not be.
            capabilities.checksum.tcp = Checksum::None;
        }
        capabilities
    }
}

/// A guest with its addresses.
pub struct Guest {
    pub wire: Wire,
    pub interface: Interface,
    pub sockets: SocketSet<'static>,
    start: Instant,
    port: u16,
}

impl Guest {
    pub fn new(nat: Nat) -> Self {
        Self::with(nat, OFFLOADS)
    }

    pub fn with(nat: Nat, features: u64) -> Self {
        let mut guest = Self::bare(nat, features);
        guest.configure();
        guest
    }

    /// A guest without addresses.
    pub fn bare(nat: Nat, features: u64) -> Self {
        let mut wire = Wire::new(nat, features);
        let mut config = Config::new(HardwareAddress::Ethernet(EthernetAddress(MAC)));
        config.random_seed = 7;
        let interface = Interface::new(config, &mut wire, smoltcp::time::Instant::ZERO);
        Self { wire, interface, sockets: SocketSet::new(Vec::new()), start: Instant::now(), port: 40_000 }
    }

    fn configure(&mut self) {
        self.interface.update_ip_addrs(|addresses| {
            addresses.push(IpCidr::new(ADDRESS.into(), 24)).unwrap();
            addresses.push(IpCidr::new(ADDRESS6.into(), 64)).unwrap();
        });
        self.interface.routes_mut().add_default_ipv4_route(GATEWAY).unwrap();
        self.interface.routes_mut().add_default_ipv6_route(GATEWAY6).unwrap();
    }

    /// The stack on another NAT.
    pub fn move_to(&mut self, mut nat: Nat) {
        nat.set_features(OFFLOADS).unwrap();
        self.wire.nat = nat;
    }

    /// Lets the stack work.
    pub fn poll(&mut self) {
        let now =
            smoltcp::time::Instant::from_micros(i64::try_from(self.start.elapsed().as_micros()).unwrap());
        if self.wire.trouble.is_some() {
            self.wire.shuffle();
        }
        self.interface.poll(now, &mut self.wire, &mut self.sockets);
        if self.wire.trouble.is_some() {
            self.wire.shuffle();
        }
    }

    /// Works until `done` gives something.
    #[track_caller]
    pub fn until<R>(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> Option<R>) -> R {
        let end = Instant::now() + LIMIT;
        loop {
            self.poll();
            if let Some(result) = done(self) {
                return result;
            }
            assert!(Instant::now() < end, "in vain: {what}; {:?}", self.wire.nat.handle().stats());
            self.wait(1);
        }
    }

    /// Works for this time.
    pub fn work(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.poll();
            self.wait(1);
        }
    }

    /// Waits for the NAT, as an I/O thread would.
    fn wait(&self, milliseconds: i64) {
        let source = self.wire.nat.source().unwrap();
        // SAFETY: the descriptor is open while `source` is there.
        let fd = unsafe { BorrowedFd::borrow_raw(source.as_raw_fd()) };
        let mut fds = [rustix::event::PollFd::from_borrowed_fd(fd, rustix::event::PollFlags::IN)];
        let time = rustix::time::Timespec { tv_sec: 0, tv_nsec: milliseconds * 1_000_000 };
        rustix::event::poll(&mut fds, Some(&time)).ok();
    }

    /// Begins to connect.
    pub fn connect(&mut self, to: SocketAddr) -> SocketHandle {
        self.connect_with(to, 256 << 10)
    }

    pub fn connect_with(&mut self, to: SocketAddr, buffer: usize) -> SocketHandle {
        self.port += 1;
        let room = || tcp::SocketBuffer::new(vec![0; buffer]);
        let mut socket = tcp::Socket::new(room(), room());
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        socket.connect(self.interface.context(), to, self.port).unwrap();
        self.sockets.add(socket)
    }

    /// Connects.
    #[track_caller]
    pub fn connected(&mut self, to: SocketAddr) -> SocketHandle {
        let handle = self.connect(to);
        self.until("connecting", |guest| {
            let state = guest.tcp(handle).state();
            assert_ne!(state, tcp::State::Closed, "refused");
            (state == tcp::State::Established).then_some(())
        });
        handle
    }

    /// Listens on `port`.
    pub fn listen(&mut self, port: u16) -> SocketHandle {
        let room = || tcp::SocketBuffer::new(vec![0; 64 << 10]);
        let mut socket = tcp::Socket::new(room(), room());
        socket.listen(port).unwrap();
        self.sockets.add(socket)
    }

    pub fn tcp(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    pub fn udp(&mut self, handle: SocketHandle) -> &mut udp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    pub fn icmp(&mut self, handle: SocketHandle) -> &mut icmp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    pub fn dhcp(&mut self) -> SocketHandle {
        self.sockets.add(dhcpv4::Socket::new())
    }

    /// A UDP socket on a port of its own.
    pub fn udp_socket(&mut self, port: u16) -> SocketHandle {
        let room = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 16], vec![0; 64 << 10]);
        let mut socket = udp::Socket::new(room(), room());
        socket.bind(port).unwrap();
        self.sockets.add(socket)
    }

    /// Sends `data` on the connection, and the end, and gives all that comes until the other end.
    #[track_caller]
    pub fn exchange(&mut self, handle: SocketHandle, data: &[u8]) -> Vec<u8> {
        let (mut sent, mut closed, mut received) = (0, false, Vec::new());
        self.until("an exchange", |guest| {
            let socket = guest.tcp(handle);
            while socket.can_send() && sent < data.len() {
                sent += socket.send_slice(&data[sent..]).unwrap();
            }
            if sent == data.len() && !closed {
                closed = true;
                socket.close();
            }
            while socket.can_recv() {
                let more = socket.recv(|bytes| (bytes.len(), bytes.to_vec())).unwrap();
                received.extend(more);
            }
            assert_ne!((socket.state(), closed), (tcp::State::Closed, false), "broken");
            (closed && !socket.may_recv()).then_some(())
        });
        received
    }

    /// Sends a datagram and gives the next that comes back.
    #[track_caller]
    pub fn ask(&mut self, handle: SocketHandle, to: SocketAddr, data: &[u8]) -> (Vec<u8>, SocketAddr) {
        self.udp(handle).send_slice(data, to).unwrap();
        self.answer(handle)
    }

    /// Gives the next datagram that comes.
    #[track_caller]
    pub fn answer(&mut self, handle: SocketHandle) -> (Vec<u8>, SocketAddr) {
        self.until("a datagram", |guest| {
            let (data, from) = guest.udp(handle).recv().ok()?;
            Some((data.to_vec(), SocketAddr::new(IpAddr::from(from.endpoint.addr), from.endpoint.port)))
        })
    }
}
