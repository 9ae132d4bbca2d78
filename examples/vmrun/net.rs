//! The network card that the command line asks for.

use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;

use vmcore::{Error, Result};
use vmdevices::Net;
use vmdevices::net::{self, Action, Capture, Limiter, Nat, NatError, NetBackend, Rates, Stream, Tap};

use crate::args::{CardArg, NatArgs, Network};

/// Says whether the descriptor that `arg` names is there. To be called before anything is opened, which
/// might get its number.
pub fn check(arg: &CardArg) -> Result<()> {
    match arg.network {
        Network::Fd(number) if Path::new(&format!("/proc/self/fd/{number}")).symlink_metadata().is_err() => {
            Err(Error::Config {
                what: "descriptor of a network",
                value: number.to_string(),
                fix: "start vmrun with it open".into(),
            })
        }
        _ => Ok(()),
    }
}

/// The card that `arg` describes, once; it was [checked](check).
pub fn card(arg: &CardArg) -> Result<Net> {
    let queues = match &arg.network {
        Network::Tap(name) => boxed(Tap::open_queues(name, arg.queues)?),
        Network::Unix(path) => boxed([Stream::connect(path)?]),
        Network::Nat(options) => boxed([nat(options, arg.mtu)?]),
        Network::Fd(number) => vec![net::from_fd(descriptor(*number))?],
    };
    let mut card = Net::multiqueue(queues)?;
    if let Some(bps) = arg.bps {
        let rates = Rates::bytes(bps.get().div_ceil(8));
        card = card.limit(&Limiter::new(rates, rates))?;
    }
    // Last: what the guest sent and got, and not what waits.
    if let Some(path) = &arg.pcap {
        card = card.record(&capture(path)?);
    }
    if let Some(mac) = arg.mac {
        card = card.mac(mac)?;
    }
    // The NAT has told the card what it takes.
    if let Some(mtu) = arg.mtu.filter(|_| !matches!(arg.network, Network::Nat(_))) {
        card = card.mtu(mtu)?;
    }
    Ok(card)
}

fn nat(options: &NatArgs, mtu: Option<u16>) -> std::result::Result<Nat, NatError> {
    let mut nat = Nat::new()?;
    for (action, destination) in options.rules.iter().cloned() {
        nat = match action {
            Action::Allow => nat.allow(destination),
            Action::Deny => nat.deny(destination),
        };
    }
    if let Some(action) = options.otherwise {
        nat = nat.otherwise(action);
    }
    if !options.dns.is_empty() {
        nat = nat.resolvers(options.dns.iter().copied());
    }
    if let Some(mtu) = mtu {
        nat = nat.with_mtu(mtu)?;
    }
    if options.host {
        nat = nat.gateway_is_host();
    }
    options.forwards.iter().try_fold(nat, |nat, forward| nat.forward(*forward))
}

fn boxed<B: NetBackend + 'static>(queues: impl IntoIterator<Item = B>) -> Vec<Box<dyn NetBackend>> {
    queues.into_iter().map(|queue| Box::new(queue) as Box<dyn NetBackend>).collect()
}

fn capture(path: &Path) -> Result<Capture> {
    Capture::create(path, Capture::WHOLE).map_err(|error| Error::os("create", path.display(), error))
}

/// A descriptor that this program was started with.
fn descriptor(number: i32) -> OwnedFd {
    #[expect(unsafe_code, reason = "a number on the command line is all there is of it")]
    // SAFETY: it was open before this program opened anything (see `check`) and is above standard
    // input, output and errors, so that nothing else here owns it; the card is made once.
    unsafe {
        OwnedFd::from_raw_fd(number)
    }
}
