//! Entropy and sockets: bytes per second as a program in the guest gets them.

use std::error::Error;
use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vmcore_benches::Archive;

use crate::session::{Host, Machine, Session, Side, Table, rounds};

/// Of entropy that are read. Linux asks for 64 bytes at a time.
const PAGES: u32 = 512;
/// That go through a socket one way.
const MIB: usize = 128;
const PORT: u32 = 5000;
const CID: u32 = 52;

pub fn rng(host: &Host, count: usize) -> Result<(), Box<dyn Error>> {
    // vmrun has one where there is a disk.
    let machine = Machine {
        root: true,
        qemu: ["-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng"]
            .map(OsString::from)
            .into(),
        ..Machine::default()
    };
    let mut table = Table::new();
    rounds(count, |side| {
        let mut guest = machine.boot(host, side)?;
        let before = guest.threads();
        // "6400 bytes (6.4 kB, 6.2 KiB) copied, 4.00025 s, 1.6 kB/s"
        let answer =
            guest.ask(&format!("dd if=/dev/hwrng of=/dev/null bs=4k count={PAGES} 2>&1 | grep copied"))?;
        let threads = before.until(&guest.threads());
        let answer = answer.lines().find(|line| line.contains("copied")).unwrap_or(&answer).to_owned();
        let words: Vec<&str> = answer.split_whitespace().collect();
        let bytes = words.first().and_then(|word| word.parse::<f64>().ok());
        let at = words.iter().position(|&word| word == "copied,");
        let seconds = at.and_then(|at| words.get(at + 1)?.parse::<f64>().ok());
        let (Some(bytes), Some(seconds)) = (bytes, seconds) else { return Err(answer.into()) };
        table.add("virtio-rng, /dev/hwrng", "KiB/s", side, bytes / seconds / 1024.0, threads);
        Ok(())
    });
    table.print(&format!("virtio-rng by dd, {PAGES} pages each, medians of {count}:"));
    Ok(())
}

pub fn vsock(host: &Host, count: usize) -> Result<(), Box<dyn Error>> {
    let initrd = host.scratch.join("stream.img");
    make_initrd(host, &initrd)?;
    let socket = host.scratch.join("vsock");
    let ours = format!("cid={CID},path={}", socket.display());
    let vhost = Path::new("/dev/vhost-vsock").exists();
    let serial = host.scratch.join("serial");
    let qemu = if vhost {
        vec!["-device".into(), format!("vhost-vsock-pci,guest-cid={CID}")]
    } else {
        let chardev = format!("socket,id=port,path={},server=on,wait=off", serial.display());
        let devices = ["virtio-serial-pci", "virtserialport,chardev=port,name=bench"];
        let device = |device: &str| ["-device".to_string(), device.into()];
        [vec!["-chardev".into(), chardev], devices.map(device).concat()].concat()
    };
    if !vhost {
        println!(
            "vsock: QEMU's is in the host's kernel, and there is no /dev/vhost-vsock (modprobe vhost_vsock): \
             beside it QEMU's virtio-serial port on a Unix socket"
        );
    }
    let machine = Machine {
        initrd: Some(initrd),
        vmrun: ["--vsock".into(), ours.into()].into(),
        qemu: qemu.into_iter().map(OsString::from).collect(),
        ..Machine::default()
    };
    let mut table = Table::new();
    rounds(count, |side| {
        drop((std::fs::remove_file(&socket), std::fs::remove_file(&serial)));
        let mut guest = machine.boot(host, side)?;
        for sends in [true, false] {
            let before = guest.threads();
            let rate = match side {
                Side::Vmcore => {
                    let path = PathBuf::from(format!("{}_{PORT}", socket.display()));
                    drop(std::fs::remove_file(&path));
                    let listener = UnixListener::bind(path)?;
                    transfer(&mut guest, &PORT.to_string(), sends, move || Ok(listener.accept()?.0.into()))?
                }
                Side::Qemu if vhost => {
                    let listener = listen()?;
                    transfer(&mut guest, &PORT.to_string(), sends, move || accept(&listener))?
                }
                Side::Qemu => {
                    let stream = UnixStream::connect(&serial)?;
                    transfer(&mut guest, "$(echo /dev/vport*p*)", sends, move || Ok(stream.into()))?
                }
            };
            let what = if sends { "vsock, guest to host" } else { "vsock, host to guest" };
            table.add(what, "MiB/s", side, rate / f64::from(1 << 20), before.until(&guest.threads()));
        }
        Ok(())
    });
    table.print(&format!("virtio-vsock, {MIB} MiB each way, medians of {count}:"));
    Ok(())
}

/// The usual initrd, and behind it one with the program: the kernel unpacks both.
fn make_initrd(host: &Host, to: &Path) -> Result<(), Box<dyn Error>> {
    let mut file = File::create(to)?;
    file.write_all(&std::fs::read(host.guests.join("cloud/initrd.img"))?)?;
    let mut archive = Archive::new(file);
    archive.add("stream", 0o100_755, include_bytes!(env!("STREAM")))?;
    archive.end()
}

/// Has the guest send or receive on `port` while the host does the opposite on what `open` gives; bytes per second.
fn transfer(
    guest: &mut Session,
    port: &str,
    sends: bool,
    open: impl FnOnce() -> std::io::Result<OwnedFd> + Send + 'static,
) -> Result<f64, Box<dyn Error>> {
    let other = std::thread::spawn(move || -> std::io::Result<()> {
        let mut stream = File::from(open()?);
        let mut part = vec![0; 1 << 16];
        let mut left = MIB << 20;
        while left > 0 {
            let most = left.min(part.len());
            let done = if sends { stream.read(&mut part[..most])? } else { stream.write(&part[..most])? };
            if done == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            left -= done;
        }
        if sends {
            stream.write_all(&[0])?;
        } else {
            // What is under way is lost with the stream.
            drop(stream.read(&mut part));
        }
        Ok(())
    });
    let word = if sends { "send" } else { "receive" };
    let answer = guest.ask(&format!("/stream {word} {port} {MIB}"))?;
    let rate = answer.split_once("rate ").and_then(|(_, rest)| rest.split_whitespace().next()?.parse().ok());
    let rate = rate.ok_or_else(|| format!("stream {word} {port}: {answer:?}"))?;
    let begin = Instant::now();
    // A port of QEMU's is not closed with the guest's end.
    while sends && !other.is_finished() && begin.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(1));
    }
    if other.is_finished() {
        other.join().map_err(|_| "the host's side panicked")??;
    }
    Ok(rate)
}

/// A socket of the host's own family, for vhost-vsock.
fn listen() -> std::io::Result<OwnedFd> {
    // SAFETY: socket(2) takes integers.
    let fd = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: sockaddr_vm is plain integers, for which zeros are valid.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as u16;
    (address.svm_cid, address.svm_port) = (libc::VMADDR_CID_ANY, PORT);
    let len = size_of_val(&address) as u32;
    // SAFETY: the address is of the type and length that the call is told.
    let bound = unsafe { libc::bind(fd, (&raw const address).cast(), len) };
    // SAFETY: listen(2) takes integers.
    if bound != 0 || unsafe { libc::listen(fd, 1) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(socket)
}

fn accept(listener: &OwnedFd) -> std::io::Result<OwnedFd> {
    use std::os::fd::AsRawFd;
    // SAFETY: without a place for the address the call takes none.
    let fd = unsafe { libc::accept(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut()) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
