//! Linux' sockets of the family AF_VSOCK.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use vmdevices::{Disk, Vsock};

use super::super::guests_with;
use super::super::transport::virtio;
use super::{LIMIT, at_the_shell, machine, shell};

/// Streams of each direction, and how many bytes the longest of them sends.
const STREAMS: usize = 100;
const LONGEST: usize = 300_000;

/// The guest's side: `serve` on port 1000 answers each stream, once that is half closed, with what it
/// sent turned around; `call` does the opposite with the host's ports, and is reset by another.
const PROGRAM: &str = r"
import errno, socket, sys, threading
def all(s):
    parts = []
    while True:
        part = s.recv(65536)
        if not part: return b''.join(parts)
        parts.append(part)
def answer(s):
    text = all(s)
    s.sendall(text[::-1])
    s.shutdown(socket.SHUT_WR)
    s.close()
def vsock(): return socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
def serve():
    l = vsock(); l.bind((socket.VMADDR_CID_ANY, 1000)); l.listen(128)
    print('ser' + 'ving', flush=True)
    ends = []
    for n in range(100):
        s, peer = l.accept()
        assert peer[0] == 2, peer
        t = threading.Thread(target=answer, args=(s,)); t.start(); ends.append(t)
    for t in ends: t.join()
    print('ser' + 'ved', len(ends), flush=True)
good = []
def call(n):
    s = vsock(); s.connect((2, 5000 if n % 2 else 6000))
    text = bytes((n + i) % 251 for i in range(251)) * (1 + n * 12)
    s.sendall(text)
    s.shutdown(socket.SHUT_WR)
    if all(s) == text[::-1]: good.append(n)
    s.close()
def reset():
    s = vsock()
    try: s.connect((2, 4999)); return 'connected'
    except OSError as e: refused = errno.errorcode[e.errno]
    s = vsock(); s.connect((2, 7000)); s.sendall(b'x' * 100000)
    try:
        while s.recv(1000): pass
        refused += ' EOF'
        s.send(b'x')
        return refused
    except OSError as e: return refused + ' ' + errno.errorcode[e.errno]
if sys.argv[1] == 'serve': serve()
else:
    ends = [threading.Thread(target=call, args=(n,)) for n in range(100)]
    for t in ends: t.start()
    for t in ends: t.join()
    print('cal' + 'led', len(good), reset(), flush=True)
";

fn pattern(seed: usize) -> Vec<u8> {
    let len = LONGEST * seed / STREAMS;
    (0..len).map(|n| u8::try_from((seed + n) % 253).unwrap()).collect()
}

/// Sends, half closes, and gets it back turned around.
fn exchange(mut stream: UnixStream, seed: usize) {
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let text = pattern(seed);
    let sender = {
        let (mut stream, text) = (stream.try_clone().unwrap(), text.clone());
        std::thread::spawn(move || {
            stream.write_all(&text).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        })
    };
    let mut back = Vec::new();
    let end = stream.read_to_end(&mut back);
    assert!(end.is_ok(), "stream {seed}: {end:?} after {} of {} bytes", back.len(), text.len());
    sender.join().unwrap();
    back.reverse();
    assert!(back == text, "stream {seed}: {} of {} bytes", back.len(), text.len());
}

/// Answers a stream of the guest with what it sends, turned around.
fn answer(mut stream: UnixStream) {
    let mut text = Vec::new();
    stream.read_to_end(&mut text).unwrap();
    text.reverse();
    stream.write_all(&text).unwrap();
}

/// Connects as users of Firecracker do.
fn connect(path: &Path, port: u32) -> Option<UnixStream> {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
    // Byte by byte: what follows the line is the guest's.
    let mut line = String::new();
    BufReader::with_capacity(1, &stream).read_line(&mut line).ok()?;
    let port = line.strip_prefix("OK ")?.strip_suffix('\n')?;
    assert!(port.parse::<u32>().is_ok(), "{line:?}");
    Some(stream)
}

#[test]
fn a_hundred_streams_go_each_way_and_end_in_every_way() {
    let Some(guests) = guests_with("debian.ext4") else { return };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.sock");
    let vsock = Vsock::new(42).unwrap().socket(&path).unwrap();
    let handle = vsock.handle();
    let (builder, script) = machine(&guests, "cloud", "root=/dev/vda ro", 512);
    let vm = builder
        .cpus(2)
        .attach(virtio(Disk::open_read_only(guests.join("debian.ext4")).unwrap()))
        .attach(virtio(vsock))
        .build()
        .unwrap();
    at_the_shell(vm, &script, || {
        // A shell that edits no lines.
        script.send("exec env PS1= PS2= dash\n").unwrap();
        shell(&script, "mount -t tmpfs tmpfs /tmp; stty -echo");
        script.send(format!("cat >/tmp/vsock.py <<'END'\n{PROGRAM}END\n")).unwrap();
        script.send("python3 /tmp/vsock.py serve &\n").unwrap();
        script.expect("serving", LIMIT).unwrap();
        assert!(connect(&path, 1001).is_none(), "nobody listens there");
        let refused = handle.connect(1001, LIMIT).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        std::thread::scope(|scope| {
            for seed in 0..STREAMS {
                let (path, handle) = (&path, &handle);
                scope.spawn(move || {
                    exchange(
                        match seed % 2 {
                            0 => connect(path, 1000).unwrap(),
                            _ => handle.connect(1000, LIMIT).unwrap(),
                        },
                        seed,
                    );
                });
            }
        });
        script.expect("served 100", LIMIT).unwrap();

        let server = UnixListener::bind(directory.path().join("vm.sock_6000")).unwrap();
        let listener = handle.listen(5000).unwrap();
        let resetting = handle.listen(7000).unwrap();
        script.send("python3 /tmp/vsock.py call\n").unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..STREAMS / 2 {
                    let (stream, _) = server.accept().unwrap();
                    scope.spawn(|| answer(stream));
                }
            });
            for _ in 0..STREAMS / 2 {
                let stream = listener.accept(LIMIT).unwrap();
                scope.spawn(|| answer(stream));
            }
            // What it sends is never read: it is reset, which Linux takes for an end.
            let mut stream = resetting.accept(LIMIT).unwrap();
            stream.read_exact(&mut [0; 10]).unwrap();
            std::thread::sleep(Duration::from_millis(100));
        });
        let line = script.expect("called 100 ", LIMIT).unwrap() + &script.expect("\n", LIMIT).unwrap();
        assert!(line.ends_with("ECONNRESET EOF EPIPE\r\n"), "{line}");
    });
}
