//! A Unix socket for a user or a program to connect to.

use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::event::epoll;
use vmcore::{Error, Result};

use super::stream::Stream;
use super::{Console, Descriptor, Input};
use crate::unix_socket::Listener;

/// A console that listens on a Unix socket: connect with `socat -,raw,echo=0 UNIX-CONNECT:PATH`,
/// `nc -U PATH`, or a program.
///
/// One client is served at a time; the next waits until it leaves. The guest runs whether or not
/// there is one: the newest 64 KiB of its output are kept by the device's [`Link`](super::Link) for
/// the next client. A client that closes its sending half has left.
///
/// Whoever may write to the socket's file can type at the guest's console: put it into a directory of
/// the user's own. The file is removed when the console is dropped.
#[derive(Debug)]
pub struct Socket {
    listener: Listener,
    client: Option<Stream>,
    /// Waits for listener and client, so that one descriptor stands for every client there will be.
    /// It is readable too when the client takes more output.
    wait: Descriptor,
}

impl Socket {
    /// Listens on a new socket at `path`, or in place of one that nobody listens on any more.
    ///
    /// # Errors
    /// [`Error::Config`] where another program listens there or there is another kind of file,
    /// [`Error::Os`] where the host refuses.
    pub fn listen(path: impl AsRef<Path>) -> Result<Self> {
        let listener = Listener::bind(path.as_ref(), "console socket")?;
        let wait = epoll::create(epoll::CreateFlags::CLOEXEC)
            .and_then(|wait| {
                let data = epoll::EventData::new_u64(0);
                epoll::add(&wait, &listener.socket, data, epoll::EventFlags::IN).map(|()| wait)
            })
            .map_err(|e| {
                Error::os(
                    "epoll",
                    format_args!("the console socket {}", listener.path.display()),
                    io::Error::from(e),
                )
            })?;
        Ok(Self { listener, client: None, wait: Arc::new(wait) })
    }

    /// Where the socket is.
    pub fn path(&self) -> &Path {
        &self.listener.path
    }

    /// Takes the next client; `false` where there is none.
    fn accept(&mut self) -> io::Result<bool> {
        let client = match self.listener.socket.accept() {
            Ok((client, _)) => OwnedFd::from(client),
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(e) => return Err(e),
        };
        let events = epoll::EventFlags::IN | epoll::EventFlags::OUT;
        epoll::add(&self.wait, &client, epoll::EventData::new_u64(1), events)?;
        self.client = Some(Stream::socket(Arc::new(client)));
        Ok(true)
    }
}

impl Console for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(client) = &self.client else { return Err(ErrorKind::WouldBlock.into()) };
        client.write(bytes).map_err(|e| match e.kind() {
            // It is gone, which its input tells too; the next client takes these bytes.
            ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => ErrorKind::WouldBlock.into(),
            _ => e,
        })
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<Input> {
        loop {
            if let Some(client) = &self.client {
                match client.read(buffer) {
                    Ok(Input::End) => self.client = None,
                    Err(e) if e.kind() == ErrorKind::ConnectionReset => self.client = None,
                    other => return other,
                }
            }
            match self.accept() {
                Ok(true) => {}
                Ok(false) => return Ok(Input::Nothing),
                // Clients to come are not to blame.
                Err(e) => {
                    log::warn!("console socket {}: a client is lost: {e}", self.path().display());
                    return Ok(Input::Nothing);
                }
            }
        }
    }

    fn input(&self) -> Option<Descriptor> {
        Some(self.wait.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console::Link;
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::sync::Mutex;
    use std::time::{Duration, Instant};
    use vmcore::{IoThread, Watch};

    /// A link on a socket, served by an I/O thread as devices do it.
    struct Served {
        link: Arc<Mutex<Link>>,
        _watches: Vec<Watch>,
        _thread: IoThread,
    }

    fn serve(path: &Path) -> Served {
        let link = Arc::new(Mutex::new(Link::new(Socket::listen(path).unwrap())));
        let thread = IoThread::new("console").unwrap();
        let ready = {
            let link = link.clone();
            move || link.lock().unwrap().ready()
        };
        let watches = link.lock().unwrap().watch(&thread, ready).unwrap();
        Served { link, _watches: watches, _thread: thread }
    }

    fn connect(path: &Path) -> UnixStream {
        let client = UnixStream::connect(path).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        client
    }

    fn hears(client: &mut UnixStream, text: &[u8]) {
        let mut got = vec![0; text.len()];
        client.read_exact(&mut got).unwrap();
        assert!(got == text);
    }

    /// What the guest reads, once there is as much as `len` bytes.
    fn typed(served: &Served, len: usize) -> Vec<u8> {
        let begin = Instant::now();
        let (mut got, mut buffer) = (vec![], [0; 64]);
        while got.len() < len && begin.elapsed() < Duration::from_secs(20) {
            match served.link.lock().unwrap().read(&mut buffer) {
                Input::Bytes(count) => got.extend(&buffer[..count]),
                Input::Nothing => std::thread::yield_now(),
                other => panic!("{other:?}"),
            }
        }
        got
    }

    #[test]
    fn clients_come_and_go_and_get_what_was_said_meanwhile() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        let served = serve(&path);
        served.link.lock().unwrap().write(b"login: ");
        let mut first = connect(&path);
        hears(&mut first, b"login: ");
        first.write_all(b"root\n").unwrap();
        assert_eq!(typed(&served, 5), b"root\n");
        // The second waits for the first to leave.
        let mut second = connect(&path);
        second.write_all(b"second").unwrap();
        served.link.lock().unwrap().write(b"# ");
        hears(&mut first, b"# ");
        drop(first);
        assert_eq!(typed(&served, 6), b"second");
        served.link.lock().unwrap().write(b"hello");
        hears(&mut second, b"hello");
        drop(second);
        // All leave; the guest goes on talking.
        let text: Vec<u8> = (0..60_000u32).map(|n| n.wrapping_mul(0x9e37_79b9).to_be_bytes()[0]).collect();
        served.link.lock().unwrap().ready();
        text.chunks(100).for_each(|piece| served.link.lock().unwrap().write(piece));
        hears(&mut connect(&path), &text);
        assert_eq!(served.link.lock().unwrap().lost(), 0);
    }

    #[test]
    fn a_slow_client_gets_all_of_it_in_its_own_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        let served = serve(&path);
        let mut client = connect(&path);
        client.write_all(b"!").unwrap();
        typed(&served, 1);
        // Until the socket is full, and then what the link keeps.
        let mut said = vec![];
        let mut say = |count: usize| {
            let piece: Vec<u8> = (0..count).map(|n| (said.len() + n).to_le_bytes()[0]).collect();
            said.extend(&piece);
            served.link.lock().unwrap().write(&piece);
        };
        while format!("{:?}", served.link.lock().unwrap()).contains("kept: 0,") {
            say(999);
        }
        say(50_000);
        assert_eq!(served.link.lock().unwrap().lost(), 0);
        hears(&mut client, &said);
    }

    #[test]
    fn a_socket_left_behind_is_replaced_and_one_in_use_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let socket = Socket::listen(&path).unwrap();
        assert_eq!(socket.path(), path);
        let error = Socket::listen(&path).unwrap_err().to_string();
        assert!(error.contains("another program listens") && error.contains("console"), "{error}");
        drop(socket);
        assert!(!path.exists());
        std::fs::write(&path, "a file").unwrap();
        let error = Socket::listen(&path).unwrap_err().to_string();
        assert!(error.contains("another kind of file"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"a file");
        let error = Socket::listen(dir.path().join("no/such")).unwrap_err().to_string();
        assert!(error.contains("bind") && error.contains("no/such"), "{error}");
    }
}
