//! iperf3 between the guest and a server on the host, in a network namespace of the bench's own: over a tap,
//! and over the built-in NAT beside QEMU's user network.

use std::error::Error;
use std::ffi::{OsString, c_int, c_ulong};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};

use crate::session::{Host, Machine, Side, Table, rounds};

const TAP: &str = "vmbench0";
/// Of each run.
const SECONDS: u32 = 4;

const RUNS: [(&str, &str); 4] = [
    ("1 stream, guest to host", ""),
    ("1 stream, host to guest", "-R"),
    ("4 streams, guest to host", "-P 4"),
    ("4 streams, host to guest", "-P 4 -R"),
];

pub fn run(host: &Host, count: usize) -> Result<(), Box<dyn Error>> {
    if let Err(error) = Command::new("iperf3").arg("--version").stdout(Stdio::null()).status() {
        println!("SKIPPED: networks: iperf3: {error} (apt-get install iperf3)");
        return Ok(());
    }
    // The namespace is the thread's, and of those that it starts.
    std::thread::scope(|scope| {
        let measured = scope.spawn(|| measure(host, count).map_err(|error| error.to_string()));
        Ok(measured.join().map_err(|_| "the thread in the namespace panicked")??)
    })
}

fn measure(host: &Host, count: usize) -> Result<(), Box<dyn Error>> {
    // SAFETY: the network namespace of a thread is no concern of Rust's.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        println!("SKIPPED: networks: no network namespace: {}", std::io::Error::last_os_error());
        return Ok(());
    }
    ip("link set lo up")?;
    let server = Command::new("iperf3").arg("-s").stdout(Stdio::null()).spawn()?;
    let _server = Server(server);
    let text = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>();

    let mut table = Table::new();
    match make_tap() {
        Ok(()) => {
            ip(&format!("addr add 192.0.2.1/24 dev {TAP}"))?;
            ip(&format!("link set {TAP} up"))?;
            let machine = Machine {
                root: true,
                words: "vmnet=192.0.2.2/24".into(),
                vmrun: text(&["--net", &format!("tap={TAP}")]),
                qemu: text(&[
                    "-netdev",
                    &format!("tap,id=net,ifname={TAP},script=no,downscript=no,vhost=off"),
                    "-device",
                    "virtio-net-pci,netdev=net,romfile=",
                ]),
                ..Machine::default()
            };
            rounds(count, |side| streams(host, side, &machine, "tap", "192.0.2.1", &mut table));
        }
        Err(error) => println!("SKIPPED: tap: {error}"),
    }
    let machine = Machine {
        root: true,
        words: "vmnet=10.0.2.15/24 vmgw=10.0.2.2".into(),
        // The host's loopback is behind the gateway, as it is with QEMU.
        vmrun: text(&["--net", "nat,host"]),
        qemu: text(&["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="]),
        ..Machine::default()
    };
    rounds(count, |side| streams(host, side, &machine, "NAT", "10.0.2.2", &mut table));
    table.print(&format!("virtio-net by iperf3, {SECONDS} s each, medians of {count}:"));
    Ok(())
}

/// Ends with the bench.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn streams(
    host: &Host,
    side: Side,
    machine: &Machine,
    network: &str,
    server: &str,
    table: &mut Table,
) -> Result<(), Box<dyn Error>> {
    let mut guest = machine.boot(host, side)?;
    guest.ask("mount -t tmpfs tmpfs /tmp; mount -t tmpfs tmpfs /run")?;
    for (what, words) in RUNS {
        // "[  5]   0.00-4.00   sec   150 MBytes   314 Mbits/sec   receiver"; of several the sum comes last.
        let run = format!("iperf3 -c {server} -t {SECONDS} -O 1 -f m {words}");
        let before = guest.threads();
        let answer = guest
            .ask(&format!("{run} > /tmp/out 2>&1; grep receiver /tmp/out | tail -n 1; tail -n 3 /tmp/out"))?;
        let threads = before.until(&guest.threads());
        let line = answer.lines().find(|line| line.contains("receiver")).unwrap_or("");
        let mut words = line.split_whitespace();
        let rate = words.by_ref().take_while(|&word| word != "Mbits/sec").last();
        let rate: f64 =
            rate.and_then(|word| word.parse().ok()).ok_or_else(|| format!("{run}: {answer:?}"))?;
        table.add(&format!("{network}, {what}"), "Mbit/s", side, rate, threads);
    }
    Ok(())
}

fn ip(arguments: &str) -> Result<(), Box<dyn Error>> {
    let status = Command::new("ip").args(arguments.split(' ')).status().map_err(|e| format!("ip: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("ip {arguments}: {status}").into()) }
}

/// Makes the tap stay while the guests take turns on it. It goes with the namespace.
fn make_tap() -> Result<(), Box<dyn Error>> {
    // linux/if_tun.h.
    const TUNSETIFF: c_ulong = 0x4004_54ca;
    const TUNSETPERSIST: c_ulong = 0x4004_54cb;
    let device = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: ifreq is plain bytes, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(TAP.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
    // SAFETY: TUNSETIFF reads and writes one ifreq.
    let made = unsafe { libc::ioctl(device.as_raw_fd(), TUNSETIFF, &raw mut request) };
    // SAFETY: TUNSETPERSIST takes an integer.
    if made != 0 || unsafe { libc::ioctl(device.as_raw_fd(), TUNSETPERSIST, 1 as c_int) } != 0 {
        return Err(format!("cannot make {TAP}: {}", std::io::Error::last_os_error()).into());
    }
    Ok(())
}
