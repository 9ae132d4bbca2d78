//! What the guest may reach.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};

use super::error::NatError;

/// A block of addresses: `10.0.0.0/8`, `fd00::/8`, or one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cidr {
    address: IpAddr,
    prefix: u8,
}

impl Cidr {
    /// The addresses whose first `prefix` bits are those of `address`.
    ///
    /// # Errors
    /// [`NatError::Text`] where the prefix is longer than the address, or bits behind it are set.
    pub fn new(address: IpAddr, prefix: u8) -> Result<Self, NatError> {
        let block = Self { address, prefix };
        let bits = if address.is_ipv4() { 32 } else { 128 };
        if prefix > bits || block.masked(address) != Some(value(address)) {
            return Err(NatError::text(
                "a block of addresses",
                format!("{address}/{prefix}"),
                "give the first address of the block and how many bits are common: 10.0.0.0/8",
            ));
        }
        Ok(block)
    }

    const fn v4(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> Self {
        Self { address: IpAddr::V4(Ipv4Addr::new(a, b, c, d)), prefix }
    }

    const fn v6(first: u16, last: u16, prefix: u8) -> Self {
        Self { address: IpAddr::V6(Ipv6Addr::new(first, 0, 0, 0, 0, 0, 0, last)), prefix }
    }

    /// The bits of `address` that count, where it is of the same version.
    fn masked(self, address: IpAddr) -> Option<u128> {
        let bits = match (self.address, address) {
            (IpAddr::V4(_), IpAddr::V4(_)) => 32,
            (IpAddr::V6(_), IpAddr::V6(_)) => 128,
            _ => return None,
        };
        let shift = u32::from(u8::checked_sub(bits, self.prefix)?);
        Some(value(address).checked_shr(shift).map_or(0, |high| high << shift))
    }

    /// Whether `address` is in it.
    pub fn contains(self, address: IpAddr) -> bool {
        self.masked(address) == Some(value(self.address))
    }

    /// Whether all of `other` is in it.
    fn covers(self, other: Self) -> bool {
        other.prefix >= self.prefix && self.contains(other.address)
    }
}

fn value(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => v4.to_bits().into(),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl FromStr for Cidr {
    type Err = NatError;

    fn from_str(text: &str) -> Result<Self, NatError> {
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, prefix.parse().ok()),
            None => (text, Some(if text.contains(':') { 128 } else { 32 })),
        };
        match (address.parse(), prefix) {
            (Ok(address), Some(prefix)) => Self::new(address, prefix),
            _ => Err(NatError::text("a block of addresses", text.into(), "write 10.0.0.0/8 or fd00::/8")),
        }
    }
}

/// What a rule or a forward is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// Echo requests of ICMP and ICMPv6.
    Icmp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Icmp => "icmp",
        })
    }
}

impl FromStr for Protocol {
    type Err = NatError;

    fn from_str(text: &str) -> Result<Self, NatError> {
        match text {
            "tcp" => Ok(Self::Tcp),
            "udp" => Ok(Self::Udp),
            "icmp" => Ok(Self::Icmp),
            _ => Err(NatError::text("a protocol", text.into(), "valid are: tcp, udp, icmp")),
        }
    }
}

/// What happens to what a rule is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// It goes out.
    Allow,
    /// It is refused: the guest gets an ICMP message that says so.
    Deny,
}

/// Which destinations a rule is about: `tcp:10.0.0.0/8:80-90`, where protocol and ports may be left
/// out, and `any` stands for all addresses. IPv6 with ports is written `[fd00::/8]:443`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    /// The protocol; all where it is `None`.
    pub protocol: Option<Protocol>,
    /// The addresses; all where it is `None`.
    pub addresses: Option<Cidr>,
    /// The ports of TCP and UDP; echo requests have none, and match only rules for all ports.
    pub ports: RangeInclusive<u16>,
}

impl Destination {
    fn matches(&self, protocol: Protocol, address: IpAddr, port: u16) -> bool {
        let ports = self.ports == (0..=u16::MAX) || protocol != Protocol::Icmp && self.ports.contains(&port);
        self.protocol.is_none_or(|own| own == protocol)
            && self.addresses.is_none_or(|block| block.contains(address))
            && ports
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(protocol) = self.protocol {
            write!(f, "{protocol}:")?;
        }
        let all = self.ports == (0..=u16::MAX);
        match self.addresses {
            None => f.write_str("any")?,
            Some(block) if block.address.is_ipv6() && !all => write!(f, "[{block}]")?,
            Some(block) => write!(f, "{block}")?,
        }
        match (self.ports.start(), self.ports.end()) {
            _ if all => Ok(()),
            (first, last) if first == last => write!(f, ":{first}"),
            (first, last) => write!(f, ":{first}-{last}"),
        }
    }
}

impl FromStr for Destination {
    type Err = NatError;

    fn from_str(text: &str) -> Result<Self, NatError> {
        let wrong = || {
            NatError::text(
                "a destination",
                text.into(),
                "write any, 10.0.0.0/8, tcp:10.0.0.0/8:80-90 or udp:[fd00::/8]:53",
            )
        };
        let (protocol, rest) = match text.split_once(':') {
            Some((name @ ("tcp" | "udp" | "icmp"), rest)) => (Some(name.parse()?), rest),
            _ => (None, text),
        };
        let (block, ports) = match rest.strip_prefix('[') {
            Some(inner) => {
                let (block, tail) = inner.split_once(']').ok_or_else(wrong)?;
                (block, if tail.is_empty() { None } else { Some(tail.strip_prefix(':').ok_or_else(wrong)?) })
            }
            // An IPv6 block without brackets has no ports.
            None if rest.matches(':').count() > 1 => (rest, None),
            None => rest.split_once(':').map_or((rest, None), |(block, ports)| (block, Some(ports))),
        };
        let addresses = if block == "any" { None } else { Some(block.parse()?) };
        let port = |text: &str| text.parse::<u16>().map_err(|_| wrong());
        let ports = match ports.map(|ports| ports.split_once('-').unwrap_or((ports, ports))) {
            None => 0..=u16::MAX,
            Some((first, last)) => port(first)?..=port(last)?,
        };
        if ports.is_empty() || protocol == Some(Protocol::Icmp) && ports != (0..=u16::MAX) {
            return Err(wrong());
        }
        Ok(Self { protocol, addresses, ports })
    }
}

/// Destinations that are closed unless a rule opens them: they are the host itself, its immediate
/// neighbours (on clouds: the metadata service, 169.254.169.254), or no single station. IPv6 blocks
/// that carry IPv4 addresses would be a way around rules for those.
const CLOSED: [Cidr; 12] = [
    Cidr::v4(0, 0, 0, 0, 8),
    Cidr::v4(127, 0, 0, 0, 8),
    Cidr::v4(169, 254, 0, 0, 16),
    Cidr::v4(224, 0, 0, 0, 4),
    Cidr::v4(240, 0, 0, 0, 4),
    Cidr::v6(0, 0, 128),
    Cidr::v6(0, 1, 128),
    Cidr::v6(0xfe80, 0, 10),
    Cidr::v6(0xff00, 0, 8),
    // IPv4-mapped (RFC 4291, section 2.5.5.2).
    Cidr { address: IpAddr::V6(Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0)), prefix: 96 },
    // 6to4 (RFC 3056) and NAT64 (RFC 6052).
    Cidr::v6(0x2002, 0, 16),
    Cidr { address: IpAddr::V6(Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0, 0)), prefix: 96 },
];

/// A rule and how often it decided.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RuleCount {
    /// What it says, as `allow tcp:10.0.0.0/8:80`; the last two are `closed` and `default`.
    pub rule: String,
    /// Flows that it decided about.
    pub flows: u64,
}

#[derive(Debug)]
struct Rule {
    action: Action,
    destination: Destination,
    flows: AtomicU64,
}

/// The rules in their order, then the closed destinations, then the default.
#[derive(Debug)]
pub(super) struct Policy {
    rules: Vec<Rule>,
    default: Action,
    closed: AtomicU64,
    defaulted: AtomicU64,
}

impl Default for Policy {
    fn default() -> Self {
        let zero = AtomicU64::default;
        Self { rules: Vec::new(), default: Action::Allow, closed: zero(), defaulted: zero() }
    }
}

impl Policy {
    pub(super) fn push(&mut self, action: Action, destination: Destination) {
        self.rules.push(Rule { action, destination, flows: AtomicU64::new(0) });
    }

    pub(super) fn set_default(&mut self, action: Action) {
        self.default = action;
    }

    /// What is to happen to a flow, which is counted.
    pub(super) fn decide(&self, protocol: Protocol, address: IpAddr, port: u16) -> Action {
        let closed = CLOSED.into_iter().find(|block| block.contains(address));
        let (action, count) = self
            .rules
            .iter()
            .filter(|rule| rule.destination.matches(protocol, address, port))
            // What is closed is opened by a rule for it, not by one for half of the Internet.
            .find(|rule| {
                let wide =
                    |closed: Cidr| !rule.destination.addresses.is_some_and(|block| closed.covers(block));
                rule.action == Action::Deny || !closed.is_some_and(wide)
            })
            .map_or_else(
                || match closed {
                    Some(_) => (Action::Deny, &self.closed),
                    None => (self.default, &self.defaulted),
                },
                |rule| (rule.action, &rule.flows),
            );
        count.fetch_add(1, Ordering::Relaxed);
        action
    }

    pub(super) fn counts(&self) -> Vec<RuleCount> {
        let name = |action| if action == Action::Allow { "allow" } else { "deny" };
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let rules = self.rules.iter().map(|rule| RuleCount {
            rule: format!("{} {}", name(rule.action), rule.destination),
            flows: load(&rule.flows),
        });
        let closed = RuleCount { rule: "closed".into(), flows: load(&self.closed) };
        let default =
            RuleCount { rule: format!("default {}", name(self.default)), flows: load(&self.defaulted) };
        rules.chain([closed, default]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Protocol::{Icmp, Tcp, Udp};

    fn policy(rules: &[(Action, &str)]) -> Policy {
        let mut policy = Policy::default();
        for (action, text) in rules {
            policy.push(*action, text.parse().unwrap());
        }
        policy
    }

    fn decide(policy: &Policy, protocol: Protocol, address: &str, port: u16) -> Action {
        policy.decide(protocol, address.parse().unwrap(), port)
    }

    #[test]
    fn blocks_are_parsed_and_contain() {
        let block: Cidr = "10.32.0.0/11".parse().unwrap();
        assert!(block.contains("10.63.255.255".parse().unwrap()));
        for outside in ["10.64.0.0", "10.31.255.255", "::", "::ffff:10.32.0.1"] {
            assert!(!block.contains(outside.parse().unwrap()), "{outside}");
        }
        let all: Cidr = "0.0.0.0/0".parse().unwrap();
        assert!(all.contains("255.255.255.255".parse().unwrap()) && !all.contains("::1".parse().unwrap()));
        assert!("::/0".parse::<Cidr>().unwrap().contains("::1".parse().unwrap()));
        assert_eq!("fd00::1".parse::<Cidr>().unwrap().to_string(), "fd00::1/128");
        for bad in ["10.0.0.1/8", "10.0.0.0/33", "10.0.0/8", "fd00::/129", "", "/8", "10.0.0.0/", "x"] {
            let text = bad.parse::<Cidr>().unwrap_err().to_string();
            assert!(text.contains(bad) && text.contains("10.0.0.0/8"), "{text}");
        }
    }

    #[test]
    fn destinations_are_written_as_they_are_parsed() {
        for text in [
            "any",
            "tcp:any:80",
            "10.0.0.0/8",
            "udp:10.0.0.0/8:53-60",
            "10.0.0.0/8:80",
            "tcp:[fd00::/8]:443",
            "fd00::/8",
            "icmp:any",
        ] {
            assert_eq!(text.parse::<Destination>().unwrap().to_string(), text);
        }
        for bad in [
            "",
            "tcp:",
            "any:x",
            "any:9-8",
            "[fd00::/8",
            "[fd00::/8]80",
            "icmp:any:7",
            "sctp:any",
            "any:65536",
        ] {
            assert!(bad.parse::<Destination>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_first_rule_that_matches_decides() {
        use Action::{Allow, Deny};
        let policy = policy(&[
            (Allow, "tcp:10.0.0.0/8:80"),
            (Deny, "10.0.0.0/8"),
            (Allow, "udp:any:53"),
            (Deny, "any:1-1023"),
        ]);
        assert_eq!(decide(&policy, Tcp, "10.1.1.1", 80), Allow);
        assert_eq!(decide(&policy, Tcp, "10.1.1.1", 81), Deny);
        assert_eq!(decide(&policy, Udp, "192.0.2.1", 53), Allow);
        assert_eq!(decide(&policy, Tcp, "192.0.2.1", 53), Deny);
        assert_eq!(decide(&policy, Tcp, "192.0.2.1", 8080), Allow);
        assert_eq!(decide(&policy, Icmp, "10.1.1.1", 0), Deny);
        // Echo requests have no port, so that a rule about some ports is not about them.
        assert_eq!(decide(&policy, Icmp, "192.0.2.1", 7), Allow);
        let counts = policy.counts().into_iter().map(|count| (count.rule, count.flows)).collect::<Vec<_>>();
        let expected = [
            ("allow tcp:10.0.0.0/8:80", 1),
            ("deny 10.0.0.0/8", 2),
            ("allow udp:any:53", 1),
            ("deny any:1-1023", 1),
            ("closed", 0),
            ("default allow", 2),
        ];
        assert_eq!(counts, expected.map(|(rule, flows)| (rule.to_owned(), flows)));
    }

    #[test]
    fn the_host_and_its_neighbours_are_closed_unless_opened() {
        use Action::{Allow, Deny};
        let closed = [
            "127.0.0.1",
            "127.255.255.254",
            "0.0.0.0",
            "0.1.2.3",
            "169.254.169.254",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "fe80::1",
            "ff02::1",
            "::ffff:127.0.0.1",
            "2002:7f00:1::",
            "64:ff9b::7f00:1",
        ];
        let wide =
            policy(&[(Allow, "any"), (Allow, "0.0.0.0/0"), (Allow, "::/0"), (Allow, "tcp:126.0.0.0/7")]);
        for address in closed {
            assert_eq!(decide(&Policy::default(), Tcp, address, 80), Deny, "{address}");
            assert_eq!(decide(&wide, Tcp, address, 80), Deny, "{address}");
        }
        let open = policy(&[
            (Deny, "127.0.0.2"),
            (Allow, "tcp:127.0.0.0/8:80"),
            (Allow, "169.254.169.254"),
            (Allow, "::1"),
        ]);
        for (address, port, action) in [
            ("127.0.0.1", 80, Allow),
            ("127.0.0.1", 81, Deny),
            ("127.0.0.2", 80, Deny),
            ("169.254.169.254", 80, Allow),
            ("169.254.169.253", 80, Deny),
            ("::1", 1, Allow),
        ] {
            assert_eq!(decide(&open, Tcp, address, port), action, "{address}:{port}");
        }
    }

    #[test]
    fn a_default_of_deny_leaves_what_is_allowed() {
        let mut policy = policy(&[(Action::Allow, "192.0.2.0/24")]);
        policy.set_default(Action::Deny);
        assert_eq!(decide(&policy, Udp, "192.0.2.9", 1), Action::Allow);
        assert_eq!(decide(&policy, Udp, "198.51.100.1", 1), Action::Deny);
        assert_eq!(policy.counts().last().unwrap().rule, "default deny");
    }
}
