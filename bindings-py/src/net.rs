//! Network cards, and what they are connected to.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use pyo3::prelude::*;
use vmdevices::net::{
    self, Action, Capture, Destination, Forward, Limiter, Nat, NatError, NatHandle, NetBackend, Rates,
    Stream, Tap,
};
use vmdevices::virtio::NetHandle;

use crate::error::{self, Raise};

/// A network card, with what it is connected to. It goes to the VM that is given it.
#[pyclass(frozen, module = "vmcore")]
pub struct Net {
    card: Mutex<Option<vmdevices::Net>>,
    handle: NetHandle,
    nat: Option<NatHandle>,
    kind: &'static str,
}

impl Net {
    pub fn take(&self) -> PyResult<vmdevices::Net> {
        let card = self.card.lock().unwrap_or_else(PoisonError::into_inner).take();
        card.ok_or_else(|| error::wrong_state("attach a network card", "using it already", "make another"))
    }

    fn new(
        kind: &'static str,
        queues: Vec<Box<dyn NetBackend>>,
        card: Card,
        nat: Option<NatHandle>,
    ) -> PyResult<Self> {
        let card = card.make(queues)?;
        Ok(Self { handle: card.handle(), card: Mutex::new(Some(card)), nat, kind })
    }

    fn nat_handle(&self) -> PyResult<&NatHandle> {
        let fix = "make the card with Net.nat";
        self.nat.as_ref().ok_or_else(|| error::config("network of NAT calls", self.kind, fix))
    }

    pub fn plain_nat() -> PyResult<Self> {
        let nat = Nat::new().raise()?;
        let handle = nat.handle();
        Self::new("nat", boxed([nat]), Card::default(), Some(handle))
    }
}

/// Settings of every card.
#[derive(Default)]
struct Card {
    mac: Option<String>,
    mtu: Option<u16>,
    pcap: Option<PathBuf>,
    bytes_per_second: Option<u64>,
}

impl Card {
    fn make(self, queues: Vec<Box<dyn NetBackend>>) -> PyResult<vmdevices::Net> {
        let mut card = vmdevices::Net::multiqueue(queues).raise()?;
        if let Some(per_second) = self.bytes_per_second {
            let rates = Rates::bytes(per_second);
            card = card.limit(&Limiter::new(rates, rates)).raise()?;
        }
        // Last: what the guest sent and got, and not what waits.
        if let Some(path) = &self.pcap {
            let capture =
                Capture::create(path, Capture::WHOLE).map_err(|e| error::io("create", path.display(), e))?;
            card = card.record(&capture);
        }
        if let Some(text) = &self.mac {
            card = card.mac(mac(text)?).raise()?;
        }
        if let Some(mtu) = self.mtu {
            card = card.mtu(mtu).raise()?;
        }
        Ok(card)
    }
}

fn boxed<B: NetBackend + 'static>(queues: impl IntoIterator<Item = B>) -> Vec<Box<dyn NetBackend>> {
    queues.into_iter().map(|queue| Box::new(queue) as Box<dyn NetBackend>).collect()
}

fn mac(text: &str) -> PyResult<[u8; 6]> {
    let bytes = text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok().filter(|_| byte.len() == 2));
    let bytes = bytes.collect::<Option<Vec<_>>>().and_then(|bytes| bytes.try_into().ok());
    bytes.ok_or_else(|| error::config("MAC address", text, "give six bytes: 02:00:00:00:00:01"))
}

fn action(text: &str) -> PyResult<Action> {
    match text {
        "allow" => Ok(Action::Allow),
        "deny" => Ok(Action::Deny),
        other => Err(error::config("action", other, "allow and deny are known")),
    }
}

#[pymethods]
impl Net {
    /// A card on a NAT in this process, which needs no privilege. `forwards` lead ports of this host to the
    /// guest ("tcp:8080:80"). `rules` say what the guest may reach, in their order: ("deny", "tcp:any:25"),
    /// ("allow", "10.0.0.0/8"); `otherwise`, "allow" unless said, is for the rest. `hosts` are names that
    /// the NAT answers itself.
    #[staticmethod]
    #[pyo3(signature = (*, forwards=Vec::new(), rules=Vec::new(), otherwise="allow", dns=Vec::new(), hosts=BTreeMap::new(), gateway_is_host=false, mtu=None, mac=None, pcap=None, bytes_per_second=None))]
    #[expect(clippy::too_many_arguments, reason = "keywords in Python")]
    fn nat(
        forwards: Vec<String>,
        rules: Vec<(String, String)>,
        otherwise: &str,
        dns: Vec<String>,
        hosts: BTreeMap<String, Vec<IpAddr>>,
        gateway_is_host: bool,
        mtu: Option<u16>,
        mac: Option<String>,
        pcap: Option<PathBuf>,
        bytes_per_second: Option<u64>,
    ) -> PyResult<Self> {
        let mut nat = Nat::new().raise()?;
        for (what, destination) in &rules {
            let destination = destination.parse::<Destination>().raise()?;
            nat = match action(what)? {
                Action::Allow => nat.allow(destination),
                Action::Deny => nat.deny(destination),
            };
        }
        nat = nat.otherwise(action(otherwise)?);
        if !dns.is_empty() {
            nat = nat
                .resolvers(dns.iter().map(|text| Nat::resolver(text).raise()).collect::<PyResult<Vec<_>>>()?);
        }
        for (name, addresses) in hosts {
            nat = nat.name(&name, addresses);
        }
        if let Some(mtu) = mtu {
            nat = nat.with_mtu(mtu).raise()?;
        }
        if gateway_is_host {
            nat = nat.gateway_is_host();
        }
        let forward = |nat: Nat, text: &String| -> Result<Nat, NatError> { nat.forward(text.parse()?) };
        nat = forwards.iter().try_fold(nat, forward).raise()?;
        let handle = nat.handle();
        // The NAT tells the card its MTU.
        Self::new("nat", boxed([nat]), Card { mac, mtu: None, pcap, bytes_per_second }, Some(handle))
    }

    /// A card on the tap interface `name`.
    #[staticmethod]
    #[pyo3(signature = (name, *, queues=1, mtu=None, mac=None, pcap=None, bytes_per_second=None))]
    fn tap(
        name: &str,
        queues: u16,
        mtu: Option<u16>,
        mac: Option<String>,
        pcap: Option<PathBuf>,
        bytes_per_second: Option<u64>,
    ) -> PyResult<Self> {
        let queues = boxed(Tap::open_queues(name, queues).raise()?);
        Self::new("tap", queues, Card { mac, mtu, pcap, bytes_per_second }, None)
    }

    /// A card on what listens at the Unix socket `path`: passt, QEMU.
    #[staticmethod]
    #[pyo3(signature = (path, *, mtu=None, mac=None, pcap=None, bytes_per_second=None))]
    fn unix(
        path: PathBuf,
        mtu: Option<u16>,
        mac: Option<String>,
        pcap: Option<PathBuf>,
        bytes_per_second: Option<u64>,
    ) -> PyResult<Self> {
        let queues = boxed([Stream::connect(path).raise()?]);
        Self::new("unix", queues, Card { mac, mtu, pcap, bytes_per_second }, None)
    }

    /// A card on an open descriptor of a tap or Unix socket, which is duplicated.
    #[staticmethod]
    #[pyo3(signature = (fd, *, mtu=None, mac=None, pcap=None, bytes_per_second=None))]
    fn fd(
        fd: &Bound<'_, PyAny>,
        mtu: Option<u16>,
        mac: Option<String>,
        pcap: Option<PathBuf>,
        bytes_per_second: Option<u64>,
    ) -> PyResult<Self> {
        let queues = vec![net::from_fd(duplicate(fd)?).raise()?];
        Self::new("fd", queues, Card { mac, mtu, pcap, bytes_per_second }, None)
    }

    /// Begins to forward while the guest runs; gives the forward with the port that the host chose, where it
    /// was 0.
    fn forward(&self, forward: &str) -> PyResult<String> {
        let forward: Forward = forward.parse().raise()?;
        Ok(self.nat_handle()?.forward(forward).raise()?.to_string())
    }

    /// Ends a forward; whether it was there. Its connections go on.
    fn remove_forward(&self, forward: &str) -> PyResult<bool> {
        Ok(self.nat_handle()?.remove_forward(&forward.parse().raise()?))
    }

    /// The forwards that there are, of a NAT.
    #[getter]
    fn forwards(&self) -> PyResult<Vec<String>> {
        Ok(self.nat_handle()?.forwards().iter().map(ToString::to_string).collect())
    }

    /// The rules of a NAT, with how many flows each has decided.
    #[getter]
    fn rules(&self) -> PyResult<Vec<(String, u64)>> {
        Ok(self.nat_handle()?.rules().into_iter().map(|rule| (rule.rule, rule.flows)).collect())
    }

    /// The packets and bytes that went through the card. Bytes are those of Ethernet frames; a packet to be cut
    /// into segments counts once.
    fn counters(&self) -> BTreeMap<&'static str, u64> {
        let c = self.handle.counters();
        BTreeMap::from([
            ("received_packets", c.received_packets),
            ("received_bytes", c.received_bytes),
            ("received_dropped", c.received_dropped),
            ("received_filtered", c.received_filtered),
            ("sent_packets", c.sent_packets),
            ("sent_bytes", c.sent_bytes),
            ("sent_dropped", c.sent_dropped),
        ])
    }

    /// Whether the cable is plugged in; may be set while the guest runs, which is told.
    #[getter]
    fn link(&self) -> bool {
        self.handle.link()
    }

    #[setter]
    fn set_link(&self, up: bool) {
        self.handle.set_link(up);
    }

    /// What a NAT has done.
    fn stats(&self) -> PyResult<BTreeMap<&'static str, u64>> {
        let s = self.nat_handle()?.stats();
        Ok(BTreeMap::from([
            ("frames_sent", s.frames_sent),
            ("bytes_sent", s.bytes_sent),
            ("frames_received", s.frames_received),
            ("bytes_received", s.bytes_received),
            ("tcp_opened", s.tcp_opened),
            ("udp_opened", s.udp_opened),
            ("icmp_opened", s.icmp_opened),
            ("flows", s.flows),
            ("evicted", s.evicted),
            ("denied", s.denied),
            ("malformed", s.malformed),
            ("foreign", s.foreign),
            ("unsupported", s.unsupported),
            ("retransmitted", s.retransmitted),
            ("dropped", s.dropped),
        ]))
    }

    fn __repr__(&self) -> String {
        format!("<Net {}>", self.kind)
    }
}

/// A descriptor of our own for the file that Python has.
pub fn duplicate(fd: &Bound<'_, PyAny>) -> PyResult<OwnedFd> {
    let number: RawFd = fd.py().import("os")?.call_method1("dup", (fileno(fd)?,))?.extract()?;
    #[expect(unsafe_code, reason = "a number is all that Python has of it")]
    // SAFETY: os.dup has just made it, and nothing else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// The descriptor of a file object, or a number.
fn fileno(fd: &Bound<'_, PyAny>) -> PyResult<RawFd> {
    if fd.hasattr("fileno")? { fd.call_method0("fileno")?.extract() } else { fd.extract() }
}

/// A switch between the machines of this process.
#[pyclass(frozen, module = "vmcore")]
pub struct Hub(net::Hub);

#[pymethods]
impl Hub {
    #[new]
    fn new() -> Self {
        Self(net::Hub::new())
    }

    /// A card on a new port of the switch.
    #[pyo3(signature = (*, mtu=None, mac=None, pcap=None, bytes_per_second=None))]
    fn card(
        &self,
        mtu: Option<u16>,
        mac: Option<String>,
        pcap: Option<PathBuf>,
        bytes_per_second: Option<u64>,
    ) -> PyResult<Net> {
        let queues = boxed([self.0.port().raise()?]);
        Net::new("hub", queues, Card { mac, mtu, pcap, bytes_per_second }, None)
    }
}
