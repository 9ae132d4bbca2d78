//! What a request costs in the bare device model, in host instructions: a driver in this process (the
//! `virtio-drivers` crate) rings the doorbell, the device serves the request before the write returns, and
//! valgrind counts what runs inside that write, in user space. The driver is not counted, nor is the kernel.

use std::error::Error;
use std::io;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::Arc;

use virtio_drivers::device::blk::VirtIOBlk;
use virtio_drivers::device::net::VirtIONet;
use virtio_drivers::device::rng::VirtIORng;
use vmdevices::buffers::Buffers;
use vmdevices::net::{HEADER, NetBackend};
use vmdevices::{Disk, Net, Rng};

use crate::driver::{Machine, Memory, Registers};

/// What the counting process is asked to do, by [`drive`].
pub const DRIVE: &str = "drive";

/// Where a device is entered: by a register write, and to be told of what came from the host.
const ENTRIES: [&str; 2] = [
    "<vmdevices::virtio::mmio::VirtioMmio as vmcore::bus::BusDevice>::write*",
    "<vmdevices::virtio::mmio::VirtioMmio as devices::driver::Polled>::poll*",
];

const FEW: u32 = 200;
const MANY: u32 = 600;

const ROWS: [(&str, &str); 7] = [
    ("read", "virtio-blk, read 4 KiB"),
    ("write", "virtio-blk, write 4 KiB"),
    ("send60", "virtio-net, send 60 bytes"),
    ("send1514", "virtio-net, send 1,514 bytes"),
    ("receive60", "virtio-net, receive 60 bytes"),
    ("receive1514", "virtio-net, receive 1,514 bytes"),
    ("rng", "virtio-rng, 64 bytes"),
];

pub fn run() -> Result<(), Box<dyn Error>> {
    if let Err(error) = Command::new("valgrind").arg("--version").output() {
        println!("SKIPPED: instructions: valgrind: {error} (apt-get install valgrind)");
        return Ok(());
    }
    println!("host instructions a request, bare device model on virtio-mmio:");
    for (name, what) in ROWS {
        let (few, many) = (count(name, FEW)?, count(name, MANY)?);
        if many <= few {
            return Err(format!("{name}: {few} instructions of {FEW} requests, {many} of {MANY}").into());
        }
        println!("{what:<44}{:>12}", (many - few) / u64::from(MANY - FEW));
    }
    Ok(())
}

/// The instructions that `requests` of them take.
fn count(name: &str, requests: u32) -> Result<u64, Box<dyn Error>> {
    let mut command = Command::new("valgrind");
    command.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]);
    command.args(ENTRIES.map(|entry| format!("--toggle-collect={entry}")));
    command.arg(std::env::current_exe()?).args([DRIVE, name, &requests.to_string()]);
    let output = command.output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    let collected = text.lines().find_map(|line| line.split_once("Collected :")?.1.trim().parse().ok());
    match collected {
        Some(instructions) if output.status.success() => Ok(instructions),
        _ => Err(format!("valgrind: {}: {text}", output.status).into()),
    }
}

/// In the counting process: makes the device and has it serve that many requests.
pub fn drive(name: &str, requests: u32) -> Result<(), Box<dyn Error>> {
    let machine = Machine::both().next().ok_or("no machine")?;
    match name {
        "read" | "write" => {
            const LEN: usize = 4096;
            let image = tempfile::NamedTempFile::new()?;
            image.as_file().set_len(1 << 20)?;
            let mut driver =
                VirtIOBlk::<Memory, _>::new(machine.device(Disk::open(image.path())?)).map_err(said)?;
            let mut data = [1; LEN];
            for n in 0..requests as usize {
                let sector = n % 256 * 8;
                let done = if name == "read" {
                    driver.read_blocks(sector, &mut data)
                } else {
                    driver.write_blocks(sector, &data)
                };
                done.map_err(said)?;
            }
        }
        "rng" => {
            let mut driver = VirtIORng::<Memory, _>::new(machine.device(Rng::new())).map_err(said)?;
            for _ in 0..requests {
                driver.request_entropy(&mut [0; 64]).map_err(said)?;
            }
        }
        _ => {
            let (sends, len) = match name.split_at(name.find(|c: char| c.is_ascii_digit()).unwrap_or(0)) {
                ("send", len) => (true, len.parse()?),
                ("receive", len) => (false, len.parse()?),
                _ => return Err(format!("{name}: no such request").into()),
            };
            network(&machine, sends, len, requests)?;
        }
    }
    Ok(())
}

fn said(error: virtio_drivers::Error) -> String {
    format!("the driver: {error}")
}

fn network(machine: &Machine, sends: bool, len: usize, requests: u32) -> Result<(), Box<dyn Error>> {
    let frames = Frames { len, left: if sends { 0 } else { requests }, event: Arc::new(io::stdin()) };
    let transport: Registers = machine.device(Net::new(frames)?.mac([2, 0, 0, 0, 0, 1])?);
    let mut driver = VirtIONet::<Memory, _, 16>::new(transport.clone(), 2048).map_err(said)?;
    if sends {
        for _ in 0..requests {
            let mut packet = driver.new_tx_buffer(len);
            packet.packet_mut().fill(1);
            driver.send(packet).map_err(said)?;
        }
        return Ok(());
    }
    let mut received = 0;
    while received < requests {
        transport.poll();
        while driver.can_recv() {
            let packet = driver.receive().map_err(said)?;
            assert_eq!(packet.packet_len(), len);
            received += 1;
            driver.recycle_rx_buffer(packet).map_err(said)?;
        }
    }
    Ok(())
}

/// A network that swallows what it is sent, and has some frames for the guest.
struct Frames {
    len: usize,
    left: u32,
    /// Never asked: nothing waits for it.
    event: Arc<io::Stdin>,
}

impl NetBackend for Frames {
    fn source(&self) -> Option<Arc<dyn AsRawFd + Send + Sync>> {
        Some(self.event.clone())
    }

    fn send(&mut self, packet: &mut Buffers<'_>) -> io::Result<()> {
        packet.advance(HEADER);
        let mut frame = [0; 1514];
        packet.read(&mut frame);
        Ok(())
    }

    fn receive(&mut self, into: &mut Buffers<'_>, _: &mut [u8]) -> io::Result<usize> {
        self.left = self.left.checked_sub(1).ok_or(io::ErrorKind::WouldBlock)?;
        into.write(&[0; HEADER]);
        into.write(&[0xff; 1514][..self.len]);
        Ok(HEADER + self.len)
    }
}
