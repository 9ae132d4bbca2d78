//! A switch for the machines of one process.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use vmcore::{Error, Result};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{HEADER, NetBackend, deliver};
use crate::buffers::Buffers;

/// Frames that wait at a port for its machine; more are lost.
const MOST_WAITING: usize = 1024;

/// Addresses that a switch remembers. Those of others are looked for at every port.
const MOST_KNOWN: usize = 4096;

type Mac = [u8; 6];

/// A switch that connects network cards of one process: it learns which addresses are behind which
/// port, and sends what is for others, for groups and for addresses it has not seen to all.
///
/// Clones are of the same switch. It has no offloads, so that cards with and without can talk.
///
/// ```
/// # fn main() -> vmcore::Result<()> {
/// use vmdevices::{Net, net::Hub};
///
/// let hub = Hub::new();
/// let (first, second) = (Net::new(hub.port()?)?, Net::new(hub.port()?)?);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct Hub(Arc<Mutex<Switch>>);

#[derive(Debug, Default)]
struct Switch {
    ports: HashMap<u64, Weak<Waiting>>,
    next: u64,
    /// Behind which port an address was seen last.
    known: HashMap<Mac, u64>,
}

/// What is for one port.
#[derive(Debug)]
struct Waiting {
    frames: Mutex<VecDeque<Arc<[u8]>>>,
    /// Readable when there are some.
    event: EventFd,
}

impl Waiting {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Arc<[u8]>>> {
        self.frames.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, frame: Arc<[u8]>) {
        let mut frames = self.lock();
        if frames.len() < MOST_WAITING {
            frames.push_back(frame);
            // Who found nothing before waits for this.
            if frames.len() == 1
                && let Err(error) = self.event.write(1)
            {
                log::error!("network switch: a port is not told: {error}");
            }
        }
    }

    fn pop(&self) -> Option<Arc<[u8]>> {
        let mut frames = self.lock();
        let frame = frames.pop_front();
        if frame.is_none() {
            // Read with the frames locked: the next one makes it readable again.
            drop(self.event.read());
        }
        frame
    }
}

impl Hub {
    /// A switch without ports.
    pub fn new() -> Self {
        Self::default()
    }

    /// A new port. It is gone when it is dropped.
    ///
    /// # Errors
    /// [`Error::Os`] where the host is out of descriptors.
    pub fn port(&self) -> Result<Port> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
            .map_err(|error| Error::os("eventfd", "a port of a network switch", error))?;
        let waiting = Arc::new(Waiting { frames: Mutex::default(), event });
        let mut switch = self.lock();
        let number = switch.next;
        switch.next += 1;
        switch.ports.insert(number, Arc::downgrade(&waiting));
        Ok(Port { hub: self.clone(), number, waiting })
    }

    fn lock(&self) -> MutexGuard<'_, Switch> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes a frame from port `from` on.
    fn pass(&self, from: u64, frame: Arc<[u8]>) {
        let (Some(to), Some(sender)) = (mac(&frame, 0), mac(&frame, 6)) else { return };
        let mut switch = self.lock();
        let is_group = |mac: Mac| mac[0] & 1 == 1;
        if !is_group(sender) && (switch.known.len() < MOST_KNOWN || switch.known.contains_key(&sender)) {
            switch.known.insert(sender, from);
        }
        let known = if is_group(to) { None } else { switch.known.get(&to).copied() };
        let takes = |port: u64| port != from && known.is_none_or(|known| known == port);
        let ports = switch.ports.iter().filter(|&(&port, _)| takes(port));
        for waiting in ports.filter_map(|(_, waiting)| waiting.upgrade()) {
            waiting.push(frame.clone());
        }
    }
}

fn mac(frame: &[u8], at: usize) -> Option<Mac> {
    frame.get(at..)?.first_chunk().copied()
}

/// Two network cards connected to each other: the ends of one cable.
///
/// # Errors
/// As [`Hub::port`].
pub fn pair() -> Result<(Port, Port)> {
    let hub = Hub::new();
    Ok((hub.port()?, hub.port()?))
}

/// A port of a [`Hub`]: the network behind a card.
#[derive(Debug)]
pub struct Port {
    hub: Hub,
    number: u64,
    waiting: Arc<Waiting>,
}

/// The event of a port, for a card to wait for.
struct Source(Arc<Waiting>);

impl AsRawFd for Source {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.event.as_raw_fd()
    }
}

impl NetBackend for Port {
    fn source(&self) -> Option<Arc<dyn AsRawFd + Send + Sync>> {
        Some(Arc::new(Source(self.waiting.clone())))
    }

    fn send(&mut self, packet: &mut Buffers<'_>) -> io::Result<()> {
        packet.advance(HEADER);
        let mut frame = vec![0; packet.len()];
        packet.read(&mut frame);
        self.hub.pass(self.number, frame.into());
        Ok(())
    }

    fn receive(&mut self, into: &mut Buffers<'_>, spill: &mut [u8]) -> io::Result<usize> {
        let frame = self.waiting.pop().ok_or(io::ErrorKind::WouldBlock)?;
        Ok(deliver(&[&[0; HEADER], &frame], into, spill))
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        let mut switch = self.hub.lock();
        switch.ports.remove(&self.number);
        switch.known.retain(|_, port| *port != self.number);
    }
}

#[cfg(test)]
mod tests {
    use vmcore::EventSet;
    use vmm_sys_util::epoll::{ControlOperation, EpollEvent};

    use super::*;
    use crate::net::tests::{frame, receive, send};

    const A: Mac = [2, 0, 0, 0, 0, 0xa];
    const B: Mac = [2, 0, 0, 0, 0, 0xb];
    const ALL: Mac = [0xff; 6];

    fn between(from: Mac, to: Mac) -> Vec<u8> {
        let mut frame = frame(60, 7);
        frame[..6].copy_from_slice(&to);
        frame[6..12].copy_from_slice(&from);
        frame
    }

    #[test]
    fn addresses_are_learned() {
        let hub = Hub::new();
        let mut ports = [(); 3].map(|()| hub.port().unwrap());
        // Who gets a frame from port `from`.
        let mut pass = |from: usize, frame: &[u8]| {
            send(&mut ports[from], frame).unwrap();
            let got = ports.iter_mut().map(|port| std::iter::from_fn(|| receive(port)).count());
            got.collect::<Vec<_>>()
        };
        assert_eq!(pass(0, &between(A, B)), [0, 1, 1], "not known yet");
        assert_eq!(pass(1, &between(B, A)), [1, 0, 0]);
        assert_eq!(pass(0, &between(A, B)), [0, 1, 0]);
        assert_eq!(pass(0, &between(A, ALL)), [0, 1, 1]);
        assert_eq!(pass(1, &between(B, B)), [0, 0, 0], "to oneself");
        // It moves.
        assert_eq!(pass(2, &between(B, A)), [1, 0, 0]);
        assert_eq!(pass(0, &between(A, B)), [0, 0, 1]);
        // A group is nobody's address.
        assert_eq!(pass(1, &between(ALL, A)), [1, 0, 0]);
        assert_eq!(pass(0, &between(A, ALL)), [0, 1, 1]);
        assert_eq!(pass(0, &[1; 11]), [0, 0, 0]);
        drop(ports);
        assert!(hub.lock().ports.is_empty() && hub.lock().known.is_empty());
    }

    #[test]
    fn neither_frames_nor_addresses_fill_the_host() {
        let (mut a, mut b) = pair().unwrap();
        for n in 0..10_000_u32 {
            let [x, y, ..] = n.to_le_bytes();
            send(&mut a, &between([2, 1, 1, 1, x, y], ALL)).unwrap();
        }
        assert_eq!(a.hub.lock().known.len(), MOST_KNOWN);
        assert_eq!(std::iter::from_fn(|| receive(&mut b)).count(), MOST_WAITING);
    }

    #[test]
    fn a_port_is_readable_when_there_is_something() {
        let (mut a, mut b) = pair().unwrap();
        // Not by reading it, which would change it.
        let readable = |port: &Port| {
            let epoll = vmm_sys_util::epoll::Epoll::new().unwrap();
            let event = EpollEvent::new(EventSet::IN, 0);
            epoll.ctl(ControlOperation::Add, port.waiting.event.as_raw_fd(), event).unwrap();
            epoll.wait(0, &mut [EpollEvent::default()]).unwrap() == 1
        };
        assert!(!readable(&b));
        send(&mut a, &between(A, B)).unwrap();
        send(&mut a, &between(A, B)).unwrap();
        assert!(readable(&b));
        while receive(&mut b).is_some() {}
        assert!(!readable(&b));
        send(&mut a, &between(A, B)).unwrap();
        assert!(readable(&b));
    }
}
