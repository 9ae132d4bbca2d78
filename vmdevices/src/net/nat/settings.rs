//! What a [`Nat`] can be told before it works.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::PoisonError;
use std::time::Duration;

use super::{Action, Destination, Forward, Nat, NatError};

/// The smallest MTU of IPv6 (RFC 8200, section 5).
const LEAST_MTU: u16 = 1280;
/// The largest, with which a packet of 65,535 bytes has its Ethernet header.
const MOST_MTU: u16 = 65_520;

impl Nat {
    /// Uses `gateway` and `guest` for the two ends of an IPv4 network of `prefix` bits (8 to 30), in place
    /// of 10.0.2.2 and 10.0.2.15 of 24.
    ///
    /// # Errors
    /// [`NatError::Setting`] where the two are no stations of one such network.
    pub fn ipv4(mut self, gateway: Ipv4Addr, guest: Ipv4Addr, prefix: u8) -> Result<Self, NatError> {
        let mut config = self.env.config.clone();
        (config.gateway4, config.guest4, config.prefix4) = (gateway, guest, prefix);
        let hosts = !config.mask4().to_bits();
        let station = gateway.to_bits() & hosts;
        let special = gateway.is_loopback() || gateway.is_multicast() || gateway.is_unspecified();
        let fits = (8..=30).contains(&prefix) && station != 0 && station != hosts && !special;
        if !fits || !config.may_send(guest.into()) {
            return Err(NatError::Setting {
                what: "the IPv4 network of a NAT",
                value: format!("gateway {gateway} and guest {guest} of {prefix} bits"),
                fix: "give two addresses of one network of 8 to 30 bits: 10.0.2.2, 10.0.2.15, 24",
            });
        }
        self.env.config = config;
        Ok(self)
    }

    /// Uses the IPv6 network of 64 bits that `prefix` begins, in place of fd76:6d63:6f72::; the gateway is
    /// 1 in it. `None` means no IPv6.
    ///
    /// # Errors
    /// [`NatError::Setting`] where bits behind the first 64 are set.
    pub fn ipv6(mut self, prefix: impl Into<Option<Ipv6Addr>>) -> Result<Self, NatError> {
        let prefix = prefix.into();
        if let Some(prefix) = prefix
            && (prefix.to_bits() & u128::from(u64::MAX) != 0
                || prefix.is_unspecified()
                || prefix.is_multicast())
        {
            return Err(NatError::Setting {
                what: "the IPv6 network of a NAT",
                value: prefix.to_string(),
                fix: "give the first 64 bits of addresses: fd00:1:2:3::",
            });
        }
        self.env.config.prefix6 = prefix;
        Ok(self)
    }

    /// The largest IP packet between guest and gateway, in bytes: 1,280 to 65,520, and 1,500 unless said.
    ///
    /// # Errors
    /// [`NatError::Setting`] for others.
    pub fn with_mtu(mut self, mtu: u16) -> Result<Self, NatError> {
        self.set_mtu(mtu)?;
        Ok(self)
    }

    /// As [`Nat::with_mtu`], in place.
    ///
    /// # Errors
    /// As there; nothing is changed then.
    pub fn set_mtu(&mut self, mtu: u16) -> Result<(), NatError> {
        if !(LEAST_MTU..=MOST_MTU).contains(&mtu) {
            let fix = "give 1280 to 65520 bytes";
            return Err(NatError::Setting { what: "the MTU of a NAT", value: mtu.to_string(), fix });
        }
        self.env.config.mtu = mtu;
        Ok(())
    }

    /// The host name that DHCP gives the guest.
    ///
    /// # Errors
    /// [`NatError::Setting`] where it is no host name (RFC 1123, section 2.1).
    pub fn host_name(mut self, name: impl Into<String>) -> Result<Self, NatError> {
        let name = name.into();
        let label = |label: &str| {
            (1..64).contains(&label.len())
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        if name.len() > 253 || !name.split('.').all(label) {
            let fix = "give letters, digits and hyphens between dots";
            return Err(NatError::Setting { what: "a host name", value: format!("{name:?}"), fix });
        }
        self.env.config.host_name = Some(name);
        Ok(self)
    }

    /// Lets the guest reach `destination`, where no rule before says otherwise. Rules are asked in the order
    /// in which they were given. A rule opens what is closed (the host's loopback, link-local and other
    /// special addresses, see [`Nat`]) only where its block lies within that: `127.0.0.1`, and not
    /// `any`.
    pub fn allow(self, destination: Destination) -> Self {
        self.rule(Action::Allow, destination)
    }

    /// Keeps the guest from `destination`, where no rule before says otherwise.
    pub fn deny(self, destination: Destination) -> Self {
        self.rule(Action::Deny, destination)
    }

    fn rule(self, action: Action, destination: Destination) -> Self {
        self.env.shared.policy.write().unwrap_or_else(PoisonError::into_inner).push(action, destination);
        self
    }

    /// What happens to destinations of no rule that are not closed: [`Action::Allow`] unless said.
    pub fn otherwise(self, action: Action) -> Self {
        self.env.shared.policy.write().unwrap_or_else(PoisonError::into_inner).set_default(action);
        self
    }

    /// Forwards from a port of the host to one of the guest's, from now on. [`NatHandle::forward`] does so
    /// while the guest runs.
    ///
    /// # Errors
    /// [`NatError::Bind`] where the port cannot be had.
    ///
    /// [`NatHandle::forward`]: super::NatHandle::forward
    pub fn forward(self, forward: Forward) -> Result<Self, NatError> {
        self.handle().forward(forward)?;
        Ok(self)
    }

    /// Has the gateway's address stand for the host's loopback address: the guest reaches what listens on
    /// 127.0.0.1 (or `::1`) by it, but for port 53. Rules for the gateway's address apply.
    pub fn gateway_is_host(mut self) -> Self {
        self.env.config.gateway_is_host = true;
        self
    }

    /// Asks these resolvers, in place of those of /etc/resolv.conf. None means no names but [`Nat::name`]'s
    /// and [`Nat::resolve`]'s.
    pub fn resolvers(mut self, servers: impl IntoIterator<Item = SocketAddr>) -> Self {
        self.names.use_servers(servers.into_iter().collect());
        self
    }

    /// The resolver that `text` names: an address, or an address and a port (`192.0.2.53`, `[::1]:5353`).
    ///
    /// # Errors
    /// [`NatError::Text`] for something else.
    pub fn resolver(text: &str) -> Result<SocketAddr, NatError> {
        let alone = text.parse().map(|address: IpAddr| SocketAddr::new(address, 53));
        alone.or_else(|_| text.parse()).map_err(|_| {
            NatError::text("a resolver", text.into(), "write it as 192.0.2.53 or [2001:db8::53]:5353")
        })
    }

    /// Asks the resolvers of this resolv.conf(5), which is read again when it changes.
    pub fn resolv_conf(mut self, path: impl Into<PathBuf>) -> Self {
        self.names.use_file(path.into());
        self
    }

    /// Answers for `name` with these addresses, to questions over UDP.
    pub fn name(mut self, name: &str, addresses: impl IntoIterator<Item = IpAddr>) -> Self {
        self.names.insert(name, addresses.into_iter().collect());
        self
    }

    /// Answers for names as `resolve` says: with addresses, with none, or (`None`) as a resolver does. It is
    /// called on the thread of the network card, with names in lower case, and must not wait.
    pub fn resolve(mut self, resolve: impl FnMut(&str) -> Option<Vec<IpAddr>> + Send + 'static) -> Self {
        self.names.set_resolve(Box::new(resolve));
        self
    }

    /// The most flows at once, of all protocols; 8,192 unless said, and at least 1. Each has a descriptor of
    /// this process, whose limit (ulimit -n) is often 1,024.
    pub fn most_flows(mut self, flows: usize) -> Self {
        self.env.config.most_flows = flows.max(1);
        self
    }

    /// The most bytes that all TCP flows together hold for receivers that are slow; 64 MiB unless said.
    pub fn most_held(mut self, bytes: usize) -> Self {
        self.env.config.most_held = bytes;
        self
    }

    /// Does without `SO_PEEK_OFF` on TCP, as hosts before Linux 6.9 do: for tests.
    #[doc(hidden)]
    pub fn without_peek_offset(mut self) -> Self {
        self.env.config.peek_offset = false;
        self
    }

    /// After how long a flow ends in which nothing happens: TCP and UDP. 2 hours 4 minutes and 2 minutes
    /// unless said (RFC 5382, RFC 4787).
    pub fn idle(mut self, tcp: Duration, udp: Duration) -> Self {
        (self.env.config.tcp_idle, self.env.config.udp_idle) = (tcp, udp);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_cannot_be_are_refused() {
        let nat = || Nat::new().unwrap();
        let ip = |text: &str| text.parse::<Ipv4Addr>().unwrap();
        for (gateway, guest, prefix) in [
            ("10.0.2.2", "10.0.3.15", 24),
            ("10.0.2.2", "10.0.2.2", 24),
            ("10.0.2.0", "10.0.2.15", 24),
            ("10.0.2.255", "10.0.2.15", 24),
            ("10.0.2.2", "10.0.2.15", 31),
            ("10.0.2.2", "10.0.2.15", 0),
            ("127.0.0.1", "127.0.0.2", 8),
        ] {
            assert!(nat().ipv4(ip(gateway), ip(guest), prefix).is_err(), "{gateway} {guest} {prefix}");
        }
        assert!(nat().ipv4(ip("192.168.7.1"), ip("192.168.7.2"), 30).is_ok());
        assert!(nat().ipv6("fd00::1".parse::<Ipv6Addr>().unwrap()).is_err());
        assert!(nat().ipv6(None).is_ok());
        assert!(
            nat().with_mtu(1279).is_err() && nat().with_mtu(65_521).is_err() && nat().with_mtu(9000).is_ok()
        );
        for bad in ["", "a b", "-a", "a..b", "a_b"] {
            assert!(nat().host_name(bad).is_err(), "{bad}");
        }
    }
}
