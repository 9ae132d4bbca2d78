//! Boots a stock Linux kernel with a disk on this terminal: `boot_linux KERNEL INITRD DISK`.

use vmcore::Vm;
use vmcore::boot::Linux;
use vmdevices::console::Stdio;
use vmdevices::{Disk, Pc};

fn main() -> vmcore::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let mut next =
        |what| arguments.next().unwrap_or_else(|| panic!("usage: boot_linux KERNEL INITRD DISK: no {what}"));
    let (kernel, initrd, disk) = (next("KERNEL"), next("INITRD"), next("DISK"));

    let outcome = Vm::builder()
        .memory(512 << 20)
        .boot(Linux::new(kernel).initrd(initrd).cmdline("console=ttyS0 root=/dev/vda rw"))
        .attach(Pc::new().serial(Stdio::new()?))
        .attach(Disk::open(disk)?)
        .build()?
        .run()?;
    println!("the guest ended: {outcome:?}");
    Ok(())
}
