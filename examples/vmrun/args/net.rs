//! `--net`.

use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::path::PathBuf;

use vmdevices::net::{Action, Destination, Forward, Nat, NatError};

use super::parts;

/// What networks there are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetArg {
    /// No network card.
    None,
    /// A card.
    Card(CardArg),
}

/// A network card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CardArg {
    /// What it is connected to.
    pub network: Network,
    /// Its address, if not a random one.
    pub mac: Option<[u8; 6]>,
    /// Pairs of queues.
    pub queues: u16,
    /// The largest IP packet.
    pub mtu: Option<u16>,
    /// Where packets are recorded.
    pub pcap: Option<PathBuf>,
    /// Most bits per second of each direction.
    pub bps: Option<NonZeroU64>,
}

/// What a network card is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Network {
    /// A tap interface of this name.
    Tap(String),
    /// The built-in NAT.
    Nat(NatArgs),
    /// A tap or Unix socket that is open already.
    Fd(i32),
    /// A Unix stream socket that somebody listens on.
    Unix(PathBuf),
}

/// Options of a card on the built-in NAT.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NatArgs {
    /// Ports that lead to the guest.
    pub forwards: Vec<Forward>,
    /// What the guest may reach, in order.
    pub rules: Vec<(Action, Destination)>,
    /// What becomes of the rest.
    pub otherwise: Option<Action>,
    /// Resolvers; those of this host where there are none.
    pub dns: Vec<SocketAddr>,
    /// The gateway's address stands for this host's loopback address.
    pub host: bool,
}

impl NatArgs {
    /// Takes `option`; `false` where it is none of these.
    fn take(&mut self, option: &str) -> Result<bool, String> {
        let said = |error: NatError| error.to_string();
        match option.split_once('=') {
            Some(("forward", forward)) => self.forwards.push(forward.parse().map_err(said)?),
            Some((rule @ ("allow" | "deny"), destination)) => {
                self.rules.push((action(rule)?, destination.parse().map_err(said)?));
            }
            Some(("otherwise", text)) => self.otherwise = Some(action(text)?),
            Some(("dns", server)) => self.dns.push(Nat::resolver(server).map_err(said)?),
            None if option == "host" => self.host = true,
            _ => return Ok(false),
        }
        Ok(true)
    }
}

fn action(text: &str) -> Result<Action, String> {
    match text {
        "allow" => Ok(Action::Allow),
        "deny" => Ok(Action::Deny),
        other => Err(format!("{other:?} is no action: give allow or deny")),
    }
}

pub fn parse(text: &str) -> Result<NetArg, String> {
    const KINDS: &str = "valid are: none, nat, tap=NAME, fd=N, unix=PATH";
    let mut parts = parts(text);
    let kind = parts.next().unwrap_or_default();
    let network = match kind.split_once('=') {
        None if kind == "none" && parts.len() == 0 => return Ok(NetArg::None),
        None if kind == "nat" => Network::Nat(NatArgs::default()),
        Some((_, "")) | None => return Err(KINDS.into()),
        Some(("tap", name)) => Network::Tap(name.into()),
        Some(("unix", path)) => Network::Unix(path.into()),
        Some(("fd", number)) => {
            let number = number.parse().ok().filter(|&fd| fd > 2);
            Network::Fd(number.ok_or("give the number of an open descriptor, 3 or more: fd=3")?)
        }
        _ => return Err(KINDS.into()),
    };
    let mut card = CardArg { network, mac: None, queues: 1, mtu: None, pcap: None, bps: None };
    for option in parts {
        if let Network::Nat(nat) = &mut card.network
            && nat.take(&option)?
        {
            continue;
        }
        let invalid = |fix: &str| format!("{option:?}: {fix}");
        match option.split_once('=').unwrap_or_default() {
            ("mac", text) => card.mac = Some(mac(text).ok_or(invalid("give six bytes: 02:00:00:00:00:01"))?),
            ("queues", text) => {
                let queues = text.parse().ok().filter(|queues| (1..=256).contains(queues));
                card.queues = queues.ok_or(invalid("give 1 to 256 queues"))?;
            }
            ("mtu", text) => card.mtu = Some(text.parse().map_err(|_| invalid("give 68 to 65535 bytes"))?),
            ("pcap", path) if !path.is_empty() => card.pcap = Some(path.into()),
            ("bps", text) => card.bps = Some(bits(text).ok_or(invalid("give bits per second: 100M"))?),
            _ => {
                let more = match card.network {
                    Network::Nat(_) => ", forward=, allow=, deny=, otherwise=, dns=, host",
                    _ => "",
                };
                return Err(format!(
                    "no option {option:?}; known are: mac=, queues=, mtu=, pcap=, bps={more}. A comma of a name is doubled"
                ));
            }
        }
    }
    if card.queues > 1 && !matches!(card.network, Network::Tap(_)) {
        return Err("several queues are a tap's: tap=NAME,queues=N".into());
    }
    Ok(NetArg::Card(card))
}

fn mac(text: &str) -> Option<[u8; 6]> {
    let bytes = text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok().filter(|_| byte.len() == 2));
    bytes.collect::<Option<Vec<_>>>()?.try_into().ok()
}

/// Bits per second, with a decimal unit: as speeds of networks are given.
fn bits(text: &str) -> Option<NonZeroU64> {
    let (digits, unit) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 1_000),
        b'M' | b'm' => (&text[..text.len() - 1], 1_000_000),
        b'G' | b'g' => (&text[..text.len() - 1], 1_000_000_000),
        _ => (text, 1),
    };
    NonZeroU64::new(digits.parse::<u64>().ok()?.checked_mul(unit)?)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{parse, refused};
    use super::*;

    fn card(text: &str) -> CardArg {
        match parse(&["--net", text]).unwrap().net {
            NetArg::Card(card) => card,
            NetArg::None => panic!("{text}"),
        }
    }

    #[test]
    fn cards_are_on_taps_descriptors_and_sockets() {
        let plain = |network| CardArg { network, mac: None, queues: 1, mtu: None, pcap: None, bps: None };
        assert_eq!(card("tap=vm0"), plain(Network::Tap("vm0".into())));
        assert_eq!(card("fd=3"), plain(Network::Fd(3)));
        assert_eq!(card("unix=/run/a,,b"), plain(Network::Unix("/run/a,b".into())));
        let all = card("tap=vm0,mac=02:00:00:00:0a:ff,queues=4,mtu=9000,pcap=a,,b=c.pcap,bps=100M");
        assert_eq!((all.mac, all.queues, all.mtu), (Some([2, 0, 0, 0, 10, 255]), 4, Some(9000)));
        assert_eq!((all.pcap, all.bps), (Some("a,b=c.pcap".into()), NonZeroU64::new(100_000_000)));
        for (bad, words) in [
            ("none,mtu=1500", "tap=NAME"),
            ("fd=2", "3 or more"),
            ("fd=x", "3 or more"),
            ("tap=a,mac=02:00:00:00:00", "six bytes"),
            ("tap=a,mac=2:0:0:0:0:1", "six bytes"),
            ("tap=a,queues=0", "1 to 256"),
            ("tap=a,mtu=70000", "68 to 65535"),
            ("tap=a,pcap=", "known are"),
            ("tap=a,bps=0", "100M"),
            ("tap=a,bps=99999999999G", "100M"),
            ("tap=a,speed=1", "known are"),
            ("tap=a,mac", "known are"),
            ("unix=a,queues=2", "a tap's"),
        ] {
            refused(&["--net", bad], &[words]);
        }
    }

    #[test]
    fn a_nat_has_forwards_rules_and_resolvers() {
        let nat = |text| match card(text) {
            CardArg { network: Network::Nat(nat), mtu, .. } => (nat, mtu),
            other => panic!("{other:?}"),
        };
        assert_eq!(nat("nat"), (NatArgs::default(), None));
        let text = "nat,forward=tcp:8080:80,forward=udp:[::1]:53:53,deny=tcp:any:25,allow=10.0.0.0/8,otherwise=deny,dns=192.0.2.53,dns=[::1]:5353,mtu=9000,host";
        let (nat, mtu) = nat(text);
        let forwards: Vec<_> = nat.forwards.iter().map(ToString::to_string).collect();
        assert_eq!(forwards, ["tcp:127.0.0.1:8080:80", "udp:[::1]:53:53"]);
        let rules: Vec<_> = nat.rules.iter().map(|(action, to)| (*action, to.to_string())).collect();
        assert_eq!(rules, [(Action::Deny, "tcp:any:25".into()), (Action::Allow, "10.0.0.0/8".into())]);
        assert_eq!(nat.dns, ["192.0.2.53:53", "[::1]:5353"].map(|text| text.parse().unwrap()));
        assert_eq!((nat.otherwise, mtu, nat.host), (Some(Action::Deny), Some(9000), true));
        refused(&["--net", "nat,forward=80"], &["tcp:8080:80"]);
        refused(&["--net", "nat,deny=10.0.0.1/8"], &["10.0.0.0/8"]);
        refused(&["--net", "nat,otherwise=maybe"], &["allow or deny"]);
        refused(&["--net", "nat,dns=one"], &["192.0.2.53"]);
        refused(&["--net", "nat,speed=1"], &["forward=", "otherwise="]);
        refused(&["--net", "tap=a,host"], &["known are"]);
    }
}
