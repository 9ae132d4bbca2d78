//! Network cards, and the NAT.

use std::ffi::c_char;
use std::mem::MaybeUninit;

use vmcore::Error;
use vmdevices::Net;
use vmdevices::net::{Action, Capture, Destination, Forward, Nat, NatHandle, Stream};
use vmdevices::virtio::NetHandle;

use crate::bytes::text;
use crate::disk::attached;
use crate::error::{Result, give, guard, need, put, vmcore_error};

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

fn rule(
    nat: Option<&mut vmcore_nat>,
    destination: &str,
    add: impl FnOnce(Nat, Destination) -> Nat,
) -> Result<()> {
    let (nat, destination) = (need(nat, "nat")?, destination.parse()?);
    let before = nat.nat.take().ok_or_else(|| attached("nat"))?;
    nat.nat = Some(add(before, destination));
    Ok(())
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

/// Frees the handle, and the NAT where no card has it.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_nat_delete(nat: Option<Box<vmcore_nat>>) {
    drop(nat);
}
