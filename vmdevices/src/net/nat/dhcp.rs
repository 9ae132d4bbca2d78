//! A DHCP server for one guest (RFC 2131, options of RFC 2132).

use std::net::Ipv4Addr;

use super::config::Config;
use super::wire::{be32, bytes};
use crate::virtio::Mac;

pub(super) const SERVER_PORT: u16 = 67;
pub(super) const CLIENT_PORT: u16 = 68;

const MAGIC: u32 = 0x6382_5363;
/// Where the options begin, behind the magic number.
const OPTIONS: usize = 240;
/// Many clients take no shorter message (BOOTP, RFC 951).
const SHORTEST: usize = 300;

// Message types (option 53).
const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const ACK: u8 = 5;
const NAK: u8 = 6;
const INFORM: u8 = 8;

/// What a message of the client's is answered with.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Answer {
    /// The message, for [`CLIENT_PORT`].
    pub(super) message: Vec<u8>,
    pub(super) to: Ipv4Addr,
    /// The client has its address now.
    pub(super) leased: bool,
}

/// The value of option `wanted`.
fn option(message: &[u8], wanted: u8) -> Option<&[u8]> {
    let mut rest = message.get(OPTIONS..)?;
    loop {
        match rest {
            [0, tail @ ..] => rest = tail,
            [255, ..] | [_] | [] => return None,
            [code, len, tail @ ..] => {
                let (value, tail) = tail.split_at_checked(usize::from(*len))?;
                if *code == wanted {
                    return Some(value);
                }
                rest = tail;
            }
        }
    }
}

fn address(message: &[u8], at: usize) -> Option<Ipv4Addr> {
    bytes::<4>(message, at).map(Ipv4Addr::from)
}

/// Answers a message to [`SERVER_PORT`].
pub(super) fn answer(config: &Config, request: &[u8]) -> Option<Answer> {
    // A request of a station with an Ethernet address.
    if bytes(request, 0)? != [1_u8, 1, 6] || be32(request, 236)? != MAGIC {
        return None;
    }
    let mac: Mac = bytes(request, 28)?;
    let client = address(request, 12)?;
    let server = option(request, 54);
    if server.is_some_and(|server| server != config.gateway4.octets()) {
        return None;
    }
    let kind = match *option(request, 53)?.first()? {
        DISCOVER => OFFER,
        REQUEST => {
            let wanted = option(request, 50).and_then(|value| address(value, 0)).unwrap_or(client);
            if wanted == config.guest4 { ACK } else { NAK }
        }
        INFORM => ACK,
        // RELEASE and DECLINE: the address stays this guest's.
        _ => return None,
    };
    let inform = option(request, 53) == Some(&[INFORM]);
    let mut message = vec![0; OPTIONS];
    message[..4].copy_from_slice(&[2, 1, 6, 0]);
    // Transaction, and flags with the wish for a broadcast.
    message[4..8].copy_from_slice(&request[4..8]);
    message[10..12].copy_from_slice(&request[10..12]);
    if kind != NAK {
        message[12..16].copy_from_slice(&client.octets());
        if !inform {
            message[16..20].copy_from_slice(&config.guest4.octets());
        }
        message[20..24].copy_from_slice(&config.gateway4.octets());
    }
    message[28..34].copy_from_slice(&mac);
    message[236..240].copy_from_slice(&MAGIC.to_be_bytes());
    let mut add = |code: u8, value: &[u8]| {
        if let Ok(len) = u8::try_from(value.len()) {
            message.extend([code, len]);
            message.extend(value);
        }
    };
    let gateway = config.gateway4.octets();
    add(53, &[kind]);
    add(54, &gateway);
    if kind != NAK {
        if !inform {
            // For ever: a guest that was paused or saved for long still has its address.
            add(51, &u32::MAX.to_be_bytes());
        }
        add(1, &config.mask4().octets());
        add(3, &gateway);
        add(6, &gateway);
        add(26, &config.mtu.to_be_bytes());
        if let Some(name) = &config.host_name {
            add(12, name.as_bytes());
        }
        let broadcast = config.gateway4.to_bits() | !config.mask4().to_bits();
        add(28, &broadcast.to_be_bytes());
    }
    message.push(255);
    message.resize(message.len().max(SHORTEST), 0);
    // RFC 2131, section 4.1: a client without an address can hear a broadcast, whatever it can do.
    let to = if kind != NAK && !client.is_unspecified() { client } else { Ipv4Addr::BROADCAST };
    Some(Answer { message, to, leased: kind == ACK && !inform })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(kind: u8, options: &[u8]) -> Vec<u8> {
        let mut request = vec![0; OPTIONS];
        request[..3].copy_from_slice(&[1, 1, 6]);
        request[4..8].copy_from_slice(&[1, 2, 3, 4]);
        request[28..34].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
        request[236..240].copy_from_slice(&MAGIC.to_be_bytes());
        request.extend([0, 53, 1, kind]);
        request.extend(options);
        request.push(255);
        request
    }

    #[test]
    fn a_client_gets_its_address_and_the_rest() {
        let config = Config { host_name: Some("guest".into()), mtu: 9000, ..Config::default() };
        let offer = answer(&config, &request(DISCOVER, &[])).unwrap();
        assert_eq!((offer.to, offer.leased), (Ipv4Addr::BROADCAST, false));
        assert_eq!(offer.message[4..8], [1, 2, 3, 4]);
        let ack = answer(&config, &request(REQUEST, &[50, 4, 10, 0, 2, 15, 54, 4, 10, 0, 2, 2])).unwrap();
        assert!(ack.leased);
        for (message, kind) in [(&offer.message, OFFER), (&ack.message, ACK)] {
            assert_eq!(message[16..20], [10, 0, 2, 15]);
            for (code, value) in [
                (53, &[kind][..]),
                (1, &[255, 255, 255, 0]),
                (3, &[10, 0, 2, 2]),
                (6, &[10, 0, 2, 2]),
                (12, b"guest"),
                (26, &[0x23, 0x28]),
                (28, &[10, 0, 2, 255]),
                (51, &[255; 4]),
            ] {
                assert_eq!(option(message, code), Some(value), "option {code}");
            }
        }
    }

    #[test]
    fn other_addresses_and_other_servers() {
        let config = Config::default();
        let nak = answer(&config, &request(REQUEST, &[50, 4, 192, 168, 0, 1])).unwrap();
        assert_eq!((option(&nak.message, 53), nak.leased), (Some(&[NAK][..]), false));
        assert_eq!(option(&nak.message, 3), None);
        assert_eq!(answer(&config, &request(REQUEST, &[54, 4, 10, 0, 2, 3])), None);
        assert_eq!(answer(&config, &request(7, &[])), None);
        // A renewal and a question of those who have an address go to that.
        for kind in [REQUEST, INFORM] {
            let mut renewal = request(kind, &[]);
            renewal[12..16].copy_from_slice(&[10, 0, 2, 15]);
            let ack = answer(&config, &renewal).unwrap();
            assert_eq!((ack.to, ack.leased), (Ipv4Addr::new(10, 0, 2, 15), kind == REQUEST));
            assert_eq!(option(&ack.message, 51).is_some(), kind == REQUEST);
        }
    }

    #[test]
    fn messages_cut_short_are_ignored() {
        let config = Config::default();
        let whole = request(REQUEST, &[50, 4, 10, 0, 2, 15]);
        for len in 0..OPTIONS + 4 {
            assert_eq!(answer(&config, &whole[..len]), None, "{len}");
        }
        assert_eq!(answer(&config, &request(DISCOVER, &[61, 200])).map(|a| a.leased), Some(false));
    }
}
