//! A network card on a tap interface, in a network namespace of its own.
#![cfg(test)]
#![expect(unsafe_code, reason = "the Hal trait is unsafe to implement, and setresuid to call")]

mod driver;
mod network;

use std::time::{Duration, Instant};

use driver::Machine;
use network::{ip, namespace};
use virtio_drivers::device::net::VirtIONet;
use vmdevices::net::{Tap, TapError};
use vmdevices::virtio::Net;

const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 2];

#[test]
fn the_host_answers_the_guest() {
    if !namespace() {
        return;
    }
    for machine in Machine::both() {
        let tap = Tap::open("vmtap%d").unwrap();
        assert_eq!(tap.name(), "vmtap0");
        assert!(ip("addr add 192.0.2.1/24 dev vmtap0") && ip("link set vmtap0 up"));
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
            assert!(transport.interrupts() > 0);
            // The host also talks about IPv6 of its own accord.
            if packet[12..22] == [8, 6, 0, 1, 8, 0, 6, 4, 0, 2] {
                assert_eq!((&packet[..6], &packet[28..32]), (&GUEST[..], &[192, 0, 2, 1][..]));
                break;
            }
        }
    }
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
            }
            // The node of the driver itself is closed to others.
            TapError::Driver { .. } => {}
            error => panic!("{error}"),
        }
    }
}
