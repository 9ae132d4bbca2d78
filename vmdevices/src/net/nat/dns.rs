//! Names: those that the caller answers himself, and the host's resolvers for all others (RFC 1035).

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use super::wire::be16;

pub(super) const PORT: u16 = 53;

/// How old what is known of resolv.conf may be.
const FRESH: Duration = Duration::from_secs(1);

/// Resolvers that are asked, as of the C library.
const MOST_SERVERS: usize = 3;

const HEADER: usize = 12;
const A: u16 = 1;
const AAAA: u16 = 28;
const ANY: u16 = 255;
const INTERNET: u16 = 1;
/// Response codes (RFC 1035, section 4.1.1).
const SERVER_FAILURE: u8 = 2;
/// How long the guest may remember an answer, in seconds.
const LIFETIME: u32 = 30;
/// What fits into an answer that every client takes (RFC 1035, section 4.2.1).
const MOST_ANSWER: usize = 512;

/// Answers for names; see [`Nat::resolve`](super::Nat::resolve).
pub(super) type Resolve = Box<dyn FnMut(&str) -> Option<Vec<IpAddr>> + Send>;

/// Who knows names.
#[derive(Default)]
pub(super) struct Names {
    table: HashMap<String, Vec<IpAddr>>,
    resolve: Option<Resolve>,
    servers: Vec<SocketAddr>,
    file: Option<File>,
}

impl fmt::Debug for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Names");
        out.field("table", &self.table).field("servers", &self.servers).finish_non_exhaustive()
    }
}

/// A resolv.conf(5).
struct File {
    path: PathBuf,
    looked: Option<Instant>,
    changed: Option<SystemTime>,
}

/// What to do with a question.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is answered.
    Answer(Vec<u8>),
    /// A resolver is to be asked.
    Ask,
    /// It is no question.
    Ignore,
}

impl Names {
    /// Has the resolvers of the file `path` asked.
    pub(super) fn use_file(&mut self, path: PathBuf) {
        self.servers.clear();
        self.file = Some(File { path, looked: None, changed: None });
    }

    /// Has `servers` asked and no others.
    pub(super) fn use_servers(&mut self, servers: Vec<SocketAddr>) {
        self.servers = servers;
        self.file = None;
    }

    pub(super) fn insert(&mut self, name: &str, addresses: Vec<IpAddr>) {
        self.table.insert(name.trim_end_matches('.').to_ascii_lowercase(), addresses);
    }

    pub(super) fn set_resolve(&mut self, resolve: Resolve) {
        self.resolve = Some(resolve);
    }

    /// The resolvers, in the order of preference.
    pub(super) fn servers(&mut self, now: Instant) -> &[SocketAddr] {
        if let Some(file) = &mut self.file
            && file.looked.is_none_or(|looked| now.saturating_duration_since(looked) >= FRESH)
        {
            file.looked = Some(now);
            let changed = std::fs::metadata(&file.path).and_then(|data| data.modified()).ok();
            if changed.is_none() || changed != file.changed {
                file.changed = changed;
                match std::fs::read_to_string(&file.path) {
                    Ok(text) => self.servers = parse(&text),
                    Err(error) => log::warn!("NAT: no resolvers: {}: {error}", file.path.display()),
                }
            }
        }
        &self.servers
    }

    /// What becomes of a message to port 53.
    pub(super) fn question(&mut self, message: &[u8], now: Instant) -> Verdict {
        let Some(question) = Question::parse(message) else { return Verdict::Ignore };
        let known = match self.table.get(&question.name) {
            Some(addresses) => Some(addresses.clone()),
            None => self.resolve.as_mut().and_then(|resolve| resolve(&question.name)),
        };
        match known {
            Some(addresses) => Verdict::Answer(question.answer(message, &addresses)),
            None if self.servers(now).is_empty() => Verdict::Answer(question.failure(message)),
            None => Verdict::Ask,
        }
    }
}

/// The `nameserver` lines of a resolv.conf(5).
fn parse(text: &str) -> Vec<SocketAddr> {
    let servers = text.lines().filter_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let address = words.next().filter(|&word| word == "nameserver").and_then(|_| words.next())?;
        // A scope (fe80::1%eth0) cannot be told to the socket without asking the host's names.
        address.parse::<IpAddr>().ok().map(|address| SocketAddr::new(address, PORT))
    });
    servers.take(MOST_SERVERS).collect()
}

/// The question of a query (RFC 1035, section 4.1).
struct Question {
    /// In lower case, without the last dot.
    name: String,
    kind: u16,
    class: u16,
    /// Where it ends in the message.
    end: usize,
}

impl Question {
    /// A plain query with one question.
    fn parse(message: &[u8]) -> Option<Self> {
        let flags = be16(message, 2)?;
        // A response, another operation, more questions.
        if flags & 0xf800 != 0 || be16(message, 4)? != 1 {
            return None;
        }
        let (mut at, mut name) = (HEADER, String::new());
        loop {
            let len = usize::from(*message.get(at)?);
            at += 1;
            if len == 0 {
                break;
            }
            // Questions have nothing before them that they could point to; names end at 255 bytes.
            let label = message.get(at..at + len).filter(|_| len < 64 && at + len <= HEADER + 255)?;
            if !name.is_empty() {
                name.push('.');
            }
            name.extend(label.iter().map(|&byte| char::from(byte.to_ascii_lowercase())));
            at += len;
        }
        Some(Self { name, kind: be16(message, at)?, class: be16(message, at + 2)?, end: at + 4 })
    }

    /// The header and question of a response.
    fn response(&self, message: &[u8], code: u8, answers: u16) -> Vec<u8> {
        let mut response = message[..self.end].to_vec();
        // A response with recursion available; the recursion desired as it was.
        response[2] = 0x80 | message[2] & 1;
        response[3] = 0x80 | code;
        response[6..12].fill(0);
        response[6..8].copy_from_slice(&answers.to_be_bytes());
        response
    }

    fn failure(&self, message: &[u8]) -> Vec<u8> {
        self.response(message, SERVER_FAILURE, 0)
    }

    fn answer(&self, message: &[u8], addresses: &[IpAddr]) -> Vec<u8> {
        let mut records = Vec::new();
        let mut count = 0;
        for address in addresses {
            let (kind, octets) = match address {
                IpAddr::V4(v4) => (A, v4.octets().to_vec()),
                IpAddr::V6(v6) => (AAAA, v6.octets().to_vec()),
            };
            let len = 12 + octets.len();
            let fits = self.end + records.len() + len <= MOST_ANSWER;
            if self.class != INTERNET || self.kind != kind && self.kind != ANY || !fits {
                continue;
            }
            // The name is that at the end of the header.
            records.extend([0xc0, 12]);
            records.extend(kind.to_be_bytes());
            records.extend(INTERNET.to_be_bytes());
            records.extend(LIFETIME.to_be_bytes());
            records.extend([0, if kind == A { 4 } else { 16 }]);
            records.extend(octets);
            count += 1;
        }
        let mut response = self.response(message, 0, count);
        response.extend(records);
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A query for the addresses of `name`.
    fn query(name: &str, kind: u16) -> Vec<u8> {
        let mut message = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name.split('.') {
            message.push(u8::try_from(label.len()).unwrap());
            message.extend(label.as_bytes());
        }
        message.push(0);
        message.extend(kind.to_be_bytes());
        message.extend([0, 1]);
        message
    }

    #[test]
    fn names_of_the_table_and_the_closure_are_answered() {
        let mut names = Names::default();
        names.insert("Box.Test.", vec!["192.0.2.7".parse().unwrap(), "2001:db8::7".parse().unwrap()]);
        names.set_resolve(Box::new(|name| (name == "none.test").then(Vec::new)));
        let now = Instant::now();
        let mut ask = |name, kind| match names.question(&query(name, kind), now) {
            Verdict::Answer(answer) => answer,
            other => panic!("{name}: {other:?}"),
        };
        let answer = ask("bOx.test", A);
        assert_eq!(answer[..8], [0x12, 0x34, 0x81, 0x80, 0, 1, 0, 1]);
        assert!(answer.ends_with(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 30, 0, 4, 192, 0, 2, 7]));
        let answer = ask("box.test", AAAA);
        assert!(answer.ends_with(&[0, 16, 0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7]));
        // A mail exchanger it has not: no error, and no answer.
        assert_eq!(ask("box.test", 15)[2..8], [0x81, 0x80, 0, 1, 0, 0]);
        assert_eq!(ask("none.test", A)[2..8], [0x81, 0x80, 0, 1, 0, 0]);
        // Nobody to ask.
        assert_eq!(ask("other.test", A)[3], 0x82);
    }

    #[test]
    fn resolvers_are_those_of_the_file_as_it_is() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = "# nameserver 1.1.1.1\nsearch x\nnameserver 192.0.2.53\nnameserver ::1\nnameserver x\n";
        std::fs::write(file.path(), text).unwrap();
        let mut names = Names::default();
        names.use_file(file.path().into());
        let start = Instant::now();
        let expected = ["192.0.2.53:53", "[::1]:53"].map(|text| text.parse::<SocketAddr>().unwrap());
        assert_eq!(names.servers(start), expected);
        assert_eq!(names.question(&query("a.b", A), start), Verdict::Ask);
        std::fs::write(file.path(), "nameserver 192.0.2.54\n").unwrap();
        let later = SystemTime::now() + Duration::from_secs(10);
        std::fs::File::options().write(true).open(file.path()).unwrap().set_modified(later).unwrap();
        assert_eq!(names.servers(start).len(), 2, "not with every query");
        assert_eq!(names.servers(start + FRESH)[0].to_string(), "192.0.2.54:53");
        names.use_servers(vec!["192.0.2.55:5353".parse().unwrap()]);
        assert_eq!(names.servers(start + 2 * FRESH)[0].to_string(), "192.0.2.55:5353");
    }

    #[test]
    fn messages_that_are_no_question_are_ignored() {
        let whole = query("box.test", A);
        let mut names = Names::default();
        let now = Instant::now();
        for len in 0..whole.len() {
            assert_eq!(names.question(&whole[..len], now), Verdict::Ignore, "{len}");
        }
        for (at, value) in [(2, 0x81), (2, 0x29), (5, 2), (12, 0xc0), (12, 64)] {
            let mut other = whole.clone();
            other[at] = value;
            assert_eq!(names.question(&other, now), Verdict::Ignore, "{at} {value}");
        }
        let long = query(&["a"; 200].join("."), A);
        assert_eq!(names.question(&long, now), Verdict::Ignore);
    }
}
