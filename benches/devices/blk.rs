//! fio in the guest on a raw image: the same jobs, file and cache mode on both sides, one queue.

use std::error::Error;
use std::ffi::OsString;

use crate::session::{Host, Machine, Side, Table, rounds};

const IMAGE_LEN: usize = 256 << 20;
/// Of each job.
const SECONDS: u32 = 4;

/// What is measured, with fio's words for it, and whether by bandwidth.
const JOBS: [(&str, &str, bool); 6] = [
    ("4k random read, depth 1", "--rw=randread --bs=4k --iodepth=1", false),
    ("4k random read, depth 32", "--rw=randread --bs=4k --iodepth=32", false),
    ("4k random write, depth 1", "--rw=randwrite --bs=4k --iodepth=1", false),
    ("4k random write, depth 32", "--rw=randwrite --bs=4k --iodepth=32", false),
    ("1 MiB sequential read, depth 4", "--rw=read --bs=1m --iodepth=4", true),
    ("1 MiB sequential write, depth 4", "--rw=write --bs=1m --iodepth=4", true),
];

pub fn run(host: &Host, count: usize) -> Result<(), Box<dyn Error>> {
    let image = host.scratch.join("image");
    // Bytes that are there: holes would be read faster.
    let bytes: Vec<u8> = (0..IMAGE_LEN / 8).flat_map(|n| (n as u64).to_le_bytes()).collect();
    std::fs::write(&image, bytes)?;
    let name = image.to_str().ok_or("a directory whose name is no text")?;
    let mut machine = Machine { root: true, ..Machine::default() };
    machine.vmrun = ["--disk".into(), OsString::from(format!("{name},format=raw"))].into();
    // As fast as QEMU's manual has it: an I/O thread, and io_uring.
    let drive = format!("id=disk,if=none,format=raw,cache=writeback,aio=io_uring,file={name}");
    let device = "virtio-blk-pci,drive=disk,iothread=io,num-queues=1";
    machine.qemu = ["-drive", &drive, "-device", device].map(OsString::from).into();

    let mut table = Table::new();
    rounds(count, |side| jobs(host, side, &machine, &mut table));
    table.print(&format!(
        "virtio-blk by fio, raw image in the page cache, {SECONDS} s each, medians of {count}:"
    ));
    Ok(())
}

fn jobs(host: &Host, side: Side, machine: &Machine, table: &mut Table) -> Result<(), Box<dyn Error>> {
    let mut guest = machine.boot(host, side)?;
    guest.ask("mount -t tmpfs tmpfs /tmp; mount -t tmpfs tmpfs /run; cd /tmp")?;
    for (what, words, bandwidth) in JOBS {
        let before = guest.threads();
        // Terse format, version 3: bandwidth in KiB/s and operations per second of reads, then of writes.
        let answer = guest.ask(&format!(
            "fio --minimal --name=j --filename=/dev/vdb --direct=1 --ioengine=libaio {words} --time_based \
             --runtime={SECONDS} --ramp_time=1 --gtod_reduce=1 --norandommap --thread | grep '^3;' | cut -d';' -f7,8,48,49"
        ))?;
        let threads = before.until(&guest.threads());
        let line = answer.lines().find(|line| line.contains(';')).unwrap_or("");
        let figures: Vec<f64> = line.trim().split(';').filter_map(|figure| figure.parse().ok()).collect();
        let &[read, reads, write, writes] = &figures[..] else {
            return Err(format!("fio {words}: {answer:?}").into());
        };
        let (figure, unit) =
            if bandwidth { ((read + write) / 1024.0, "MiB/s") } else { (reads + writes, "IOPS") };
        if figure <= 0.0 {
            return Err(format!("fio {words}: {answer:?}").into());
        }
        table.add(what, unit, side, figure, threads);
    }
    Ok(())
}
