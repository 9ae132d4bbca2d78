//! Network cards, and the NAT.

use std::ffi::c_char;
use std::mem::MaybeUninit;
use std::net::IpAddr;

use vmcore::Error;
use vmdevices::Net;
use vmdevices::net::{
    Action, Capture, Destination, Forward, Limiter, Nat, NatHandle, NatStats, Rates, Stream, Tap, from_fd,
};
use vmdevices::virtio::NetHandle;

use crate::bytes::{text, vmcore_bytes};
use crate::disk::attached;
use crate::error::{Result, give, guard, need, put, vmcore_error};
use crate::region::duplicate;

/// A network card: to be set up and attached to a machine, and a handle on it from then on.
pub struct vmcore_net {
    net: Option<Net>,
    handle: NetHandle,
}

/// Packets and bytes that went through a card since it was made. Bytes are those of Ethernet frames; a packet to be
/// cut into segments counts once.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct vmcore_net_stats {
    /// Packets that the guest received.
    pub received_packets: u64,
    /// Bytes of them.
    pub received_bytes: u64,
    /// Packets for the guest that were lost.
    pub received_dropped: u64,
    /// Packets that the guest did not ask for.
    pub received_filtered: u64,
    /// Packets that the guest sent.
    pub sent_packets: u64,
    /// Bytes of them.
    pub sent_bytes: u64,
    /// Packets from the guest that were lost.
    pub sent_dropped: u64,
}

/// What a NAT has done since it was made.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct vmcore_nat_stats {
    /// Frames that the guest sent.
    pub frames_sent: u64,
    /// Their bytes.
    pub bytes_sent: u64,
    /// Frames that the guest got.
    pub frames_received: u64,
    /// Their bytes.
    pub bytes_received: u64,
    /// TCP connections begun, from either side.
    pub tcp_opened: u64,
    /// UDP flows begun.
    pub udp_opened: u64,
    /// Flows of echo requests begun.
    pub icmp_opened: u64,
    /// Flows that there are now.
    pub flows: u64,
    /// Flows that were given up for new ones.
    pub evicted: u64,
    /// Flows that the rules refused.
    pub denied: u64,
    /// Frames that make no sense.
    pub malformed: u64,
    /// Frames with a source that is not the guest's, or for other stations.
    pub foreign: u64,
    /// Frames of protocols that do not pass.
    pub unsupported: u64,
    /// Segments sent to the guest once more.
    pub retransmitted: u64,
    /// Packets for the guest that were dropped because it takes none.
    pub dropped: u64,
}

impl From<NatStats> for vmcore_nat_stats {
    #[rustfmt::skip]
    fn from(stats: NatStats) -> Self {
        let NatStats {
            frames_sent, bytes_sent, frames_received, bytes_received, tcp_opened, udp_opened, icmp_opened, flows,
            evicted, denied, malformed, foreign, unsupported, retransmitted, dropped, ..
        } = stats;
        Self {
            frames_sent, bytes_sent, frames_received, bytes_received, tcp_opened, udp_opened, icmp_opened, flows,
            evicted, denied, malformed, foreign, unsupported, retransmitted, dropped,
        }
    }
}

/// A NAT that needs no privilege, to be put behind a card, and a handle on it from then on.
pub struct vmcore_nat {
    nat: Option<Nat>,
    handle: NatHandle,
}

impl vmcore_net {
    fn new(net: Net) -> Self {
        Self { handle: net.handle(), net: Some(net) }
    }

    pub(crate) fn take(&mut self) -> Result<Net> {
        self.net.take().ok_or_else(|| attached("net"))
    }
}

/// A card on a tap of this name.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_net_tap(
    name: *const c_char,
    out: Option<&mut MaybeUninit<*mut vmcore_net>>,
) -> Option<Box<vmcore_error>> {
    guard(|| give(out, vmcore_net::new(Net::tap(text!(name))?)))
}

/// A card with a pair of queues for each of `queues` of a tap.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_net_tap_queues(
    name: *const c_char,
    queues: u16,
    out: Option<&mut MaybeUninit<*mut vmcore_net>>,
) -> Option<Box<vmcore_error>> {
    guard(|| give(out, vmcore_net::new(Net::multiqueue(Tap::open_queues(text!(name), queues)?)?)))
}

/// A card on an open descriptor of a tap or Unix socket, which is duplicated.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_net_fd(
    fd: i32,
    out: Option<&mut MaybeUninit<*mut vmcore_net>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let (out, fd) = (need(out, "out")?, duplicate(fd)?);
        give(Some(out), vmcore_net::new(Net::multiqueue([from_fd(fd)?])?))
    })
}

/// A card on what listens at a Unix socket: passt, QEMU.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_net_unix(
    path: *const c_char,
    out: Option<&mut MaybeUninit<*mut vmcore_net>>,
) -> Option<Box<vmcore_error>> {
    guard(|| give(out, vmcore_net::new(Net::new(Stream::connect(text!(path))?)?)))
}

/// A card on a NAT. The handle stays the caller's; a NAT is behind one card.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_net_nat(
    nat: Option<&mut vmcore_nat>,
    out: Option<&mut MaybeUninit<*mut vmcore_net>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let out = need(out, "out")?;
        let nat = need(nat, "nat")?.nat.take().ok_or_else(|| attached("nat"))?;
        give(Some(out), vmcore_net::new(Net::nat(nat)?))
    })
}

/// The card's address, six bytes.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_net_set_mac(
    net: Option<&mut vmcore_net>,
    mac: Option<&[u8; 6]>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let (net, mac) = (need(net, "net")?, *need(mac, "mac")?);
        if mac[0] & 1 == 1 || mac == [0; 6] {
            let fix = "give the address of one card: 02:00:00:00:00:01";
            return Err(vmcore_error::argument("mac", format!("{mac:02x?}"), fix));
        }
        net.net = Some(net.take()?.mac(mac)?);
        Ok(())
    })
}

/// Tells the guest that the largest IP packet has `mtu` bytes, at least 68; a tap and a NAT know theirs.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_net_set_mtu(net: Option<&mut vmcore_net>, mtu: u16) -> Option<Box<vmcore_error>> {
    guard(|| Ok(need(net, "net")?.net.as_mut().ok_or_else(|| attached("net"))?.set_mtu(mtu)?))
}

/// Limits what goes through the card to so many bytes each second, in each direction.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_net_set_limit(
    net: Option<&mut vmcore_net>,
    bytes_per_second: u64,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let rates = Rates::bytes(bytes_per_second);
        let net = need(net, "net")?.net.as_mut().ok_or_else(|| attached("net"))?;
        Ok(net.set_limit(&Limiter::new(rates, rates))?)
    })
}

/// Records all packets of the card in a new file at `path`, or in place of what it has, for tcpdump and Wireshark.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_net_record(
    net: Option<&mut vmcore_net>,
    path: *const c_char,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let (net, path) = (need(net, "net")?, text!(path));
        let capture =
            Capture::create(path, Capture::WHOLE).map_err(|error| Error::os("create", path, error))?;
        net.net = Some(net.take()?.record(&capture));
        Ok(())
    })
}

/// What went through it so far.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_net_get_stats(
    net: Option<&vmcore_net>,
    out: Option<&mut MaybeUninit<vmcore_net_stats>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let counters = need(net, "net")?.handle.counters();
        put(
            out,
            vmcore_net_stats {
                received_packets: counters.received_packets,
                received_bytes: counters.received_bytes,
                received_dropped: counters.received_dropped,
                received_filtered: counters.received_filtered,
                sent_packets: counters.sent_packets,
                sent_bytes: counters.sent_bytes,
                sent_dropped: counters.sent_dropped,
            },
        )
    })
}

/// Connects or disconnects the cable, while the guest runs too.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_net_set_link(net: Option<&vmcore_net>, up: bool) {
    if let Some(net) = net {
        net.handle.set_link(up);
    }
}

/// Frees the handle, and the card where no machine has it.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_net_delete(net: Option<Box<vmcore_net>>) {
    drop(net);
}

/// A NAT with DHCP, names and no forwards, by which the guest reaches everything.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_nat_new(
    out: Option<&mut MaybeUninit<*mut vmcore_nat>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let nat = Nat::new()?;
        give(out, vmcore_nat { handle: nat.handle(), nat: Some(nat) })
    })
}

/// Leads a port of the host to one of the guest: "tcp:8080:80", "udp:192.0.2.1:5353:53". At any time.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_nat_forward(
    nat: Option<&vmcore_nat>,
    forward: *const c_char,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let forward: Forward = text!(forward).parse()?;
        need(nat, "nat")?.handle.forward(forward)?;
        Ok(())
    })
}

/// Ends a forward, which the same text began; `was_there` tells whether it did. Its connections go on.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_nat_remove_forward(
    nat: Option<&vmcore_nat>,
    forward: *const c_char,
    was_there: Option<&mut MaybeUninit<bool>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let forward: Forward = text!(forward).parse()?;
        put(was_there, need(nat, "nat")?.handle.remove_forward(&forward))
    })
}

/// The forwards that there are, one in a line, with the ports that the host chose where 0 was asked for.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_nat_forwards(
    nat: Option<&vmcore_nat>,
    out: Option<&mut MaybeUninit<*mut vmcore_bytes>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let forwards = need(nat, "nat")?.handle.forwards();
        let lines: String = forwards.iter().map(|forward| format!("{forward}\n")).collect();
        give(out, vmcore_bytes::new(lines))
    })
}

/// Changes a NAT that no card has.
fn change(nat: Option<&mut vmcore_nat>, change: impl FnOnce(Nat) -> Nat) -> Result<()> {
    let nat = need(nat, "nat")?;
    let before = nat.nat.take().ok_or_else(|| attached("nat"))?;
    nat.nat = Some(change(before));
    Ok(())
}

fn rule(
    nat: Option<&mut vmcore_nat>,
    destination: &str,
    add: impl FnOnce(Nat, Destination) -> Nat,
) -> Result<()> {
    let destination = destination.parse()?;
    change(nat, |nat| add(nat, destination))
}

/// The guest may reach a destination: "any", "10.0.0.0/8", "tcp:10.0.0.0/8:80-90". The first rule that fits counts.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_nat_allow(
    nat: Option<&mut vmcore_nat>,
    destination: *const c_char,
) -> Option<Box<vmcore_error>> {
    guard(|| rule(nat, text!(destination), Nat::allow))
}

/// The guest may not reach a destination.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_nat_deny(
    nat: Option<&mut vmcore_nat>,
    destination: *const c_char,
) -> Option<Box<vmcore_error>> {
    guard(|| rule(nat, text!(destination), Nat::deny))
}

/// Whether the guest may reach what no rule is about, as it may unless said.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_nat_otherwise(
    nat: Option<&mut vmcore_nat>,
    allow: bool,
) -> Option<Box<vmcore_error>> {
    let action = if allow { Action::Allow } else { Action::Deny };
    guard(|| rule(nat, "any", |nat, _| nat.otherwise(action)))
}

/// The largest IP packet that the guest is told of, in bytes.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_nat_set_mtu(nat: Option<&mut vmcore_nat>, mtu: u16) -> Option<Box<vmcore_error>> {
    guard(|| Ok(need(nat, "nat")?.nat.as_mut().ok_or_else(|| attached("nat"))?.set_mtu(mtu)?))
}

/// Has the gateway's address stand for this host's loopback address.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_nat_gateway_is_host(nat: Option<&mut vmcore_nat>) -> Option<Box<vmcore_error>> {
    guard(|| change(nat, Nat::gateway_is_host))
}

/// Asks these resolvers for names, separated by commas ("192.0.2.53,[::1]:5353"), in place of those of
/// /etc/resolv.conf. "" means none.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_nat_set_resolvers(
    nat: Option<&mut vmcore_nat>,
    resolvers: *const c_char,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let text = text!(resolvers);
        let parts = text.split(',').filter(|part| !part.is_empty());
        let resolvers = parts.map(|part| Ok(Nat::resolver(part)?)).collect::<Result<Vec<_>>>()?;
        change(nat, |nat| nat.resolvers(resolvers))
    })
}

/// Answers for `name` with these addresses, separated by commas.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_nat_add_name(
    nat: Option<&mut vmcore_nat>,
    name: *const c_char,
    addresses: *const c_char,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let (name, text) = (text!(name), text!(addresses));
        let address = |part: &str| {
            let fix = "write them as 192.0.2.1,2001:db8::1";
            part.parse::<IpAddr>().map_err(|_| vmcore_error::argument("addresses", format!("{text:?}"), fix))
        };
        let addresses = text.split(',').map(address).collect::<Result<Vec<_>>>()?;
        change(nat, |nat| nat.name(name, addresses))
    })
}

/// What it has done so far.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_nat_get_stats(
    nat: Option<&vmcore_nat>,
    out: Option<&mut MaybeUninit<vmcore_nat_stats>>,
) -> Option<Box<vmcore_error>> {
    guard(|| put(out, need(nat, "nat")?.handle.stats().into()))
}

/// Frees the handle, and the NAT where no card has it.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_nat_delete(nat: Option<Box<vmcore_nat>>) {
    drop(nat);
}
