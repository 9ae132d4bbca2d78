//! A network card on a tap interface, in a network namespace of its own.
#![cfg(test)]
#![expect(unsafe_code, reason = "the Hal trait is unsafe to implement, and setresuid to call")]

mod driver;
mod network;

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use driver::Machine;
use network::{ip, namespace};
use virtio_drivers::device::net::VirtIONet;
use vmcore::EventSet;
use vmdevices::buffers::Buffers;
use vmdevices::net::{MOST_PACKET, NetBackend, Tap, TapError};
use vmdevices::virtio::Net;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};

const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 2];

#[test]
fn the_host_answers_the_guest() {
    if !namespace() {
        return;
    }
    for machine in Machine::both() {
        let tap = Tap::open("vmtap%d").unwrap();
        let name = tap.name().to_owned();
        assert!(name.starts_with("vmtap") && name != "vmtap%d", "{name}");
        assert!(ip(&format!("addr add 192.0.2.1/24 dev {name}")) && ip(&format!("link set {name} up")));
        let transport = machine.device(Net::new(tap).unwrap().mac(GUEST).unwrap());
        let mut driver = VirtIONet::<driver::Memory, _, 16>::new(transport.clone(), 2048).unwrap();

        // ARP: who has 192.0.2.1? Tell 192.0.2.2.
        let request = [
            &[0xff; 6][..],
            &GUEST,
            &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
            &GUEST,
            &[192, 0, 2, 2, 0, 0, 0, 0, 0, 0, 192, 0, 2, 1],
        ]
        .concat();
        let mut out = driver.new_tx_buffer(request.len());
        out.packet_mut().copy_from_slice(&request);
        driver.send(out).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            assert!(Instant::now() < deadline, "the host does not answer");
            transport.poll();
            if !driver.can_recv() {
                std::thread::yield_now();
                continue;
            }
            let buffer = driver.receive().unwrap();
            let packet = buffer.packet().to_vec();
            driver.recycle_rx_buffer(buffer).unwrap();
            assert!(transport.was_told());
            // The host also talks about IPv6 of its own accord.
            if packet[12..22] == [8, 6, 0, 1, 8, 0, 6, 4, 0, 2] {
                assert_eq!((&packet[..6], &packet[28..32]), (&GUEST[..], &[192, 0, 2, 1][..]));
                break;
            }
        }
    }
}

/// Packets come by the queues that are in use, and those that were not tell when they are again.
#[test]
fn queues_are_used_as_the_driver_says() {
    if !namespace() {
        return;
    }
    let mut taps = Tap::open_queues("vmtapq%d", 3).unwrap();
    let name = taps[0].name().to_owned();
    assert!(taps.iter().all(|tap| tap.name() == name));
    assert!(ip(&format!("addr add 192.0.2.1/24 dev {name}")) && ip(&format!("link set {name} up")));
    assert!(ip(&format!("neigh add 192.0.2.2 lladdr 02:00:00:00:00:02 dev {name}")));
    let socket = UdpSocket::bind("192.0.2.1:0").unwrap();
    let epolls: Vec<_> = taps
        .iter()
        .map(|tap| {
            let (epoll, source) = (Epoll::new().unwrap(), tap.source().unwrap());
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
            epoll.ctl(ControlOperation::Add, source.as_raw_fd(), event).unwrap();
            epoll
        })
        .collect();
    // Which queues a hundred flows came by, and that each told.
    let flows = |taps: &mut [Tap]| {
        let drain = |tap: &mut Tap| {
            let mut packet = vec![0; MOST_PACKET];
            std::iter::from_fn(|| tap.receive(&mut Buffers::default(), &mut packet).ok()).count()
        };
        taps.iter_mut().for_each(|tap| assert!(drain(tap) < 1000));
        epolls.iter().for_each(|epoll| drop(epoll.wait(0, &mut [EpollEvent::default()])));
        for port in 1000..1100 {
            socket.send_to(b"to the guest", ("192.0.2.2", port)).unwrap();
        }
        let told = |epoll: &Epoll| epoll.wait(0, &mut [EpollEvent::default()]).unwrap() > 0;
        let counts = taps.iter_mut().zip(&epolls).map(|(tap, epoll)| (told(epoll), drain(tap) > 0));
        counts.collect::<Vec<_>>()
    };
    let (yes, no) = ((true, true), (false, false));
    assert_eq!(flows(&mut taps), [yes, yes, yes]);
    for (enabled, expected) in [([false, false], [yes, no, no]), ([true, false], [yes, yes, no])] {
        for (tap, enabled) in taps[1..].iter_mut().zip(enabled) {
            tap.set_enabled(enabled).unwrap();
            tap.set_enabled(enabled).unwrap();
        }
        assert_eq!(flows(&mut taps)[..2], expected[..2]);
        assert!(!flows(&mut taps)[2].1);
    }
    // Who begins to wait for a queue while it is not in use is told too.
    let (epoll, source) = (Epoll::new().unwrap(), taps[2].source().unwrap());
    let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
    epoll.ctl(ControlOperation::Add, source.as_raw_fd(), event).unwrap();
    taps[2].set_enabled(true).unwrap();
    assert_eq!(flows(&mut taps)[2], yes);
    assert_eq!(epoll.wait(0, &mut [EpollEvent::default()]).unwrap(), 0, "all was taken");
    for port in 1000..1100 {
        socket.send_to(b"to the guest", ("192.0.2.2", port)).unwrap();
    }
    assert_eq!(epoll.wait(0, &mut [EpollEvent::default()]).unwrap(), 1);

    let text = Tap::open(&name).unwrap_err().to_string();
    assert!(text.contains("multi_queue"), "{text}");
    let text = Tap::open_queues("vmtapn", 0).unwrap_err().to_string();
    assert!(text.contains("1 to 256"), "{text}");
}

#[test]
fn errors_say_what_to_do() {
    if !namespace() {
        return;
    }
    let first = Tap::open("vmtap7").unwrap();
    let text = Tap::open("vmtap7").unwrap_err().to_string();
    assert!(text.contains("in use") && text.contains("vmtap7"), "{text}");
    drop(first);
    drop(Tap::open("vmtap7").unwrap());
    let text = Tap::open("lo").unwrap_err().to_string();
    assert!(text.contains("no tap"), "{text}");
    // SAFETY: no effect on memory; the thread of this test ends with it.
    if unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) } == 0 {
        match Tap::open("vmtap8").unwrap_err() {
            error @ TapError::Permission { .. } => {
                assert!(error.to_string().contains("CAP_NET_ADMIN"), "{error}");
                let text = Tap::open_queues("vmtap8", 2).unwrap_err().to_string();
                assert!(text.contains("mode tap vnet_hdr multi_queue"), "{text}");
            }
            // The node of the driver itself is closed to others.
            TapError::Driver { .. } => {}
            error => panic!("{error}"),
        }
    }
}
