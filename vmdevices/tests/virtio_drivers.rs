//! Our virtio devices under a driver we did not write: the `virtio-drivers` crate, in process, with
//! its `Transport` over our registers and its `Hal` over guest memory.
#![cfg(test)]
#![expect(unsafe_code, reason = "the Hal trait is unsafe to implement")]

mod driver;

use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use driver::Machine;
use virtio_drivers::device::blk::{SECTOR_SIZE, VirtIOBlk};
use virtio_drivers::device::console::{Size, VirtIOConsole};
use virtio_drivers::device::net::VirtIONet;
use virtio_drivers::device::rng::VirtIORng;
use vmdevices::buffers::Buffers;
use vmdevices::net::{self, HEADER, NetBackend};
use vmdevices::rate::Rate;
use vmdevices::virtio::{Disk, Net, Rng, VirtioConsole};
use vmdevices::{console, console::Console};

fn image(len: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(len).unwrap();
    file
}

#[test]
fn a_disk_is_read_written_and_flushed() {
    let image = image(1 << 20);
    let content = (0..1u32 << 18).flat_map(u32::to_le_bytes).collect::<Vec<u8>>();
    image.as_file().write_all_at(&content, 0).unwrap();
    for machine in Machine::both() {
        let disk = Disk::open(image.path()).unwrap().id("a serial number").unwrap();
        let transport = machine.device(disk);
        {
            let mut driver = VirtIOBlk::<driver::Memory, _>::new(transport.clone()).unwrap();
            assert_eq!((driver.capacity(), driver.readonly()), (2048, false));
            let mut id = [0; 20];
            let len = driver.device_id(&mut id).unwrap();
            assert_eq!(&id[..len], b"a serial number");

            let mut data = vec![0; 64 * SECTOR_SIZE];
            driver.read_blocks(100, &mut data).unwrap();
            assert_eq!(data, content[100 * SECTOR_SIZE..164 * SECTOR_SIZE]);
            for sector in [0, 7, 2047] {
                let data = vec![u8::try_from(sector % 256).unwrap() ^ 0xa5; SECTOR_SIZE];
                driver.write_blocks(sector, &data).unwrap();
                driver.flush().unwrap();
                let mut stored = vec![0; SECTOR_SIZE];
                image.as_file().read_exact_at(&mut stored, (sector * SECTOR_SIZE) as u64).unwrap();
                assert_eq!(stored, data);
            }
            // Beyond the end: an error inside the guest, and nothing else.
            assert!(driver.read_blocks(2048, &mut data[..SECTOR_SIZE]).is_err());
            assert!(driver.read_blocks(2047, &mut data[..2 * SECTOR_SIZE]).is_err());
            assert!(driver.write_blocks(usize::MAX / 4, &data).is_err());
            driver.read_blocks(2047, &mut data[..SECTOR_SIZE]).unwrap();
        }
        assert!(transport.was_told(), "no used buffer was signalled");
        // The driver stopped its queue when it went; another one begins anew.
        let mut again = VirtIOBlk::<driver::Memory, _>::new(transport).unwrap();
        let mut data = [0; SECTOR_SIZE];
        again.read_blocks(7, &mut data).unwrap();
        assert_eq!(data, [7 ^ 0xa5; SECTOR_SIZE]);
    }
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let image = image(4096);
    for machine in Machine::both() {
        let transport = machine.device(Disk::open_read_only(image.path()).unwrap());
        let mut driver = VirtIOBlk::<driver::Memory, _>::new(transport).unwrap();
        assert!(driver.readonly());
        assert!(driver.write_blocks(0, &[1; SECTOR_SIZE]).is_err());
        driver.read_blocks(0, &mut [0; SECTOR_SIZE]).unwrap();
    }
}

#[test]
fn many_requests_are_in_flight_at_once() {
    let image = image(1 << 20);
    for machine in Machine::both() {
        let transport = machine.device(Disk::open(image.path()).unwrap());
        let mut driver = VirtIOBlk::<driver::Memory, _>::new(transport).unwrap();
        for round in 0..200u8 {
            let data = [[round; SECTOR_SIZE]; 4];
            let mut requests: [_; 4] = Default::default();
            let mut answers: [_; 4] = Default::default();
            let mut tokens = Vec::new();
            for (n, ((request, answer), data)) in requests.iter_mut().zip(&mut answers).zip(&data).enumerate()
            {
                // SAFETY: request, data and answer live until the request is completed below.
                tokens.push(unsafe { driver.write_blocks_nb(n * 3, request, data, answer) }.unwrap());
            }
            for (n, token) in tokens.into_iter().enumerate() {
                while driver.peek_used() != Some(token) {
                    std::hint::spin_loop();
                }
                // SAFETY: these are the buffers the request was begun with.
                let ended =
                    unsafe { driver.complete_write_blocks(token, &requests[n], &data[n], &mut answers[n]) };
                ended.unwrap();
            }
        }
        let mut stored = [0; SECTOR_SIZE];
        image.as_file().read_exact_at(&mut stored, 9 * SECTOR_SIZE as u64).unwrap();
        assert_eq!(stored, [199; SECTOR_SIZE]);
    }
}

#[test]
fn random_bytes_are_random_and_bounded() {
    for machine in Machine::both() {
        let mut driver = VirtIORng::<driver::Memory, _>::new(machine.device(Rng::new())).unwrap();
        let (mut a, mut b) = ([0; 64], [0; 64]);
        assert_eq!(driver.request_entropy(&mut a).unwrap(), 64);
        assert_eq!(driver.request_entropy(&mut b).unwrap(), 64);
        assert_ne!(a, b);
        // One request cannot keep the device busy for long.
        assert_eq!(driver.request_entropy(&mut [0; 20000]).unwrap(), 4096);
    }
}

#[test]
fn random_bytes_come_no_faster_than_they_may() {
    for machine in Machine::both() {
        let begin = Instant::now();
        let transport = machine.device(Rng::new().limit(1000, Duration::from_millis(100)));
        let mut driver = VirtIORng::<driver::Memory, _>::new(transport.clone()).unwrap();
        // What there is at once, and less where less is left.
        assert_eq!(driver.request_entropy(&mut [0; 600]).unwrap(), 600);
        let less = driver.request_entropy(&mut [0; 4096]).unwrap();
        assert!((1..2000).contains(&less), "{less}");
        let mut given = 600 + less;
        // The driver waits for its answer, and somebody has to look at the timer meanwhile.
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    transport.poll();
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
            while given < 5000 {
                given += driver.request_entropy(&mut [0; 500]).unwrap();
            }
            done.store(true, Ordering::SeqCst);
        });
        // A thousand at once, and then a thousand each 100 ms.
        let allowed = 1000 + 10 * begin.elapsed().as_millis() + 1;
        assert!(given as u128 <= allowed, "{given} of {allowed}");
    }
}

/// What `act` gives, as soon as it does; it is tried for 10 s.
fn eventually<T>(mut act: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(value) = act() {
            return value;
        }
        assert!(Instant::now() < deadline, "nothing came");
        std::thread::yield_now();
    }
}

struct Terminal(console::Memory);

impl Console for Terminal {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<console::Input> {
        self.0.read(buffer)
    }
    fn input(&self) -> Option<console::Descriptor> {
        self.0.input()
    }
    fn size(&self) -> Option<(u16, u16)> {
        Some((132, 43))
    }
}

#[test]
fn a_console_takes_output_and_gives_input() {
    for machine in Machine::both() {
        let (memory, script) = console::memory().unwrap();
        script.send("typed early;").unwrap();
        let transport = machine.device(VirtioConsole::new(Terminal(memory)));
        let mut driver = VirtIOConsole::<driver::Memory, _>::new(transport.clone()).unwrap();
        assert_eq!(driver.size().unwrap(), Some(Size { columns: 132, rows: 43 }));
        driver.send_bytes(b"Debian GNU/Linux 12 hvc0\n").unwrap();
        driver.send(b'$').unwrap();
        script.expect("hvc0\n$", Duration::from_secs(10)).unwrap();

        let long = "0123456789".repeat(2000);
        script.send(&long).unwrap();
        let expected = format!("typed early;{long}");
        let mut text = String::new();
        while text.len() < expected.len() {
            transport.poll();
            text.push(char::from(eventually(|| driver.recv(true).unwrap())));
        }
        assert_eq!(text, expected);
        assert_eq!(driver.recv(true).unwrap(), None);

        driver.emergency_write(b'!').unwrap();
        script.expect("!", Duration::from_secs(10)).unwrap();
    }
}

/// A network whose other end is a socket.
struct Wire(Arc<UnixDatagram>);

impl NetBackend for Wire {
    fn mtu(&self) -> Option<u16> {
        Some(1400)
    }
    fn source(&self) -> Option<Arc<dyn AsRawFd + Send + Sync>> {
        Some(self.0.clone())
    }
    fn send(&mut self, packet: &mut Buffers<'_>) -> io::Result<()> {
        packet.advance(HEADER);
        packet.drain_to(&self.0).map(|_| ())
    }
    fn receive(&mut self, into: &mut Buffers<'_>, spill: &mut [u8]) -> io::Result<usize> {
        into.write(&[0; HEADER]);
        into.fill_from(&self.0, spill).map(|len| len + HEADER)
    }
}

#[test]
fn packets_go_both_ways_and_wait_for_buffers() {
    for machine in Machine::both() {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        theirs.set_nonblocking(false).unwrap();
        let card = Net::new(Wire(Arc::new(ours))).unwrap().mac([2, 0, 0, 1, 2, 3]).unwrap();
        let transport = machine.device(card);
        let mut driver = VirtIONet::<driver::Memory, _, 16>::new(transport.clone(), 2048).unwrap();
        assert_eq!(driver.mac_address(), [2, 0, 0, 1, 2, 3]);

        for len in [60, 1514] {
            let mut out = driver.new_tx_buffer(len);
            out.packet_mut().iter_mut().zip((0..251).cycle()).for_each(|(byte, n)| *byte = n);
            let sent = out.packet().to_vec();
            driver.send(out).unwrap();
            let mut back = vec![0; 2000];
            let count = theirs.recv(&mut back).unwrap();
            assert_eq!(back[..count], sent);
        }
        // More packets than buffers, a socket's worth at a time; one that fits no buffer is dropped.
        let mut received = 0u32;
        for number in 0..200u32 {
            if number % 50 == 0 {
                theirs.send(&[0xee; 5000]).unwrap();
            }
            let mut packet = vec![0x5a; 100 + number as usize];
            packet[..4].copy_from_slice(&number.to_le_bytes());
            theirs.set_nonblocking(true).unwrap();
            let mut drain = |received: &mut u32| {
                transport.poll();
                if !driver.can_recv() {
                    return None;
                }
                let buffer = driver.receive().unwrap();
                assert_eq!(buffer.packet()[..4], received.to_le_bytes());
                assert_eq!(buffer.packet_len(), 100 + *received as usize);
                assert_eq!(buffer.packet()[4..], vec![0x5a; 96 + *received as usize]);
                *received += 1;
                driver.recycle_rx_buffer(buffer).unwrap();
                Some(())
            };
            while theirs.send(&packet).is_err() {
                eventually(|| drain(&mut received));
            }
            if number == 199 {
                while received < 200 {
                    eventually(|| drain(&mut received));
                }
            }
        }
        assert!(transport.was_told());
    }
}

/// The peer reads slowly: packets wait in the guest's queue and go on when there is room.
#[test]
fn packets_wait_for_a_peer_that_reads_slowly() {
    const COUNT: u32 = 600;
    // A machine with an I/O thread: a driver waits for each packet.
    let machine = Machine::both().nth(1).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let stream = net::Stream::new(ours).unwrap();
    let (other, datagrams) = UnixDatagram::pair().unwrap();
    let datagram = net::Datagram::new(other).unwrap();
    // The next packet of each.
    let mut theirs = io::BufReader::new(theirs);
    let from_stream = move || {
        let (mut length, mut packet) = ([0; 4], Vec::new());
        theirs.read_exact(&mut length).unwrap();
        packet.resize(u32::from_be_bytes(length) as usize, 0);
        theirs.read_exact(&mut packet).unwrap();
        packet
    };
    let from_datagram = move || {
        let mut packet = vec![0; 2000];
        let len = datagrams.recv(&mut packet).unwrap();
        packet.truncate(len);
        packet
    };
    type Reader = Box<dyn FnMut() -> Vec<u8> + Send>;
    let cases: [(Net, Reader); 2] = [
        (Net::new(stream).unwrap(), Box::new(from_stream)),
        (Net::new(datagram).unwrap(), Box::new(from_datagram)),
    ];
    for (card, mut read) in cases {
        let handle = card.handle();
        let mut driver = VirtIONet::<driver::Memory, _, 16>::new(machine.device(card), 2048).unwrap();
        let reader = std::thread::spawn(move || {
            for number in 0..COUNT {
                if number % 200 == 0 {
                    std::thread::sleep(Duration::from_millis(100));
                }
                let packet = read();
                assert_eq!((&packet[..4], packet.len()), (&number.to_le_bytes()[..], 1514));
            }
        });
        for number in 0..COUNT {
            let mut out = driver.new_tx_buffer(1514);
            out.packet_mut()[..4].copy_from_slice(&number.to_le_bytes());
            driver.send(out).unwrap();
        }
        reader.join().unwrap();
        let counters = handle.counters();
        assert_eq!((counters.sent_packets, counters.sent_dropped), (COUNT.into(), 0));
    }
}

/// Two cards on one cable, each with a driver; one of them is recorded and limited.
#[test]
fn cards_of_one_process_talk_to_each_other() {
    for machine in Machine::both() {
        let (one, other) = net::pair().unwrap();
        let rates = net::Rates { packets: Some(Rate::new(1_000_000)), bytes: Some(Rate::new(1_000_000_000)) };
        let capture = net::Capture::to(io::sink(), 100).unwrap();
        let one = net::Limiter::new(rates, rates).limit(capture.record(one)).unwrap();
        let (one, other) = (Net::new(one).unwrap(), Net::new(other).unwrap());
        let handles = [one.handle(), other.handle()];
        let transports = [machine.device(one), machine.device(other)];
        let mut drivers = transports
            .clone()
            .map(|transport| VirtIONet::<driver::Memory, _, 16>::new(transport, 2048).unwrap());
        for round in 0..100_u8 {
            for from in [0, 1] {
                let mut out = drivers[from].new_tx_buffer(60 + usize::from(round) * 10);
                out.packet_mut().fill(round);
                out.packet_mut()[..12].copy_from_slice(&[[0xff; 6], drivers[from].mac_address()].concat());
                let sent = out.packet().to_vec();
                drivers[from].send(out).unwrap();
                let (driver, transport) = (&mut drivers[1 - from], &transports[1 - from]);
                let buffer = eventually(|| {
                    transport.poll();
                    driver.can_recv().then(|| driver.receive().unwrap())
                });
                assert_eq!(buffer.packet(), sent);
                driver.recycle_rx_buffer(buffer).unwrap();
            }
        }
        for handle in handles {
            let counters = handle.counters();
            assert_eq!((counters.sent_packets, counters.received_packets), (100, 100), "{counters:?}");
            assert_eq!(counters.sent_bytes, (0..100).map(|round| 60 + round * 10).sum::<u64>());
        }
    }
}
