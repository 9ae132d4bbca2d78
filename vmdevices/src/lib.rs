//! What a guest of [`vmcore`] sees besides its CPU: a PC's own devices, virtio devices, and what
//! they are connected to on the host.
//!
//! A complete program that runs a guest on a PC board, sixteen-bit code that says "Hi" on the serial
//! port and ends the machine by its exit port:
//!
//! ```
//! use vmcore::boot::{Raw, RawMode};
//! use vmcore::{Outcome, Vm};
//! use vmdevices::{Pc, console};
//!
//! fn main() -> vmcore::Result<()> {
//! #   let report = vmcore::host::check();
//! #   if report.backends.iter().all(|b| b.status == vmcore::host::Status::NotUsable) {
//! #       println!("skipped: no backend can be used here\n{report}");
//! #       return Ok(());
//! #   }
//!     // mov dx, 0x3f8; mov al, 'H'; out dx, al; mov al, 'i'; out dx, al; mov al, 7; out 0xf4, al; hlt
//!     let code = b"\xba\xf8\x03\xb0H\xee\xb0i\xee\xb0\x07\xe6\xf4\xf4";
//!     let (serial, script) = console::memory()?;
//!     let outcome = Vm::builder()
//!         .memory(1 << 20)
//!         .boot(Raw::new(code, RawMode::Real16))
//!         .attach(Pc::new().serial(serial).exit_port(0xf4))
//!         .build()?
//!         .run()?;
//!     assert_eq!((outcome, script.transcript().as_str()), (Outcome::Exit(7), "Hi"));
//!     Ok(())
//! }
//! ```
//!
//! A stock Linux with its root on a disk, on this terminal, for hosts with a hardware KVM:
//!
//! ```no_run
//! use vmcore::{Vm, boot::Linux};
//! use vmdevices::{Disk, Pc, console::Stdio};
//!
//! fn main() -> vmcore::Result<()> {
//!     let outcome = Vm::builder()
//!         .memory(512 << 20)
//!         .boot(Linux::new("vmlinuz").initrd("initrd.img").cmdline("console=ttyS0 root=/dev/vda rw"))
//!         .attach(Pc::new().serial(Stdio::new()?))
//!         .attach(Disk::open("root.img")?)
//!         .build()?
//!         .run()?;
//!     println!("the guest ended: {outcome:?}");
//!     Ok(())
//! }
//! ```
//!
//! The same guest on a network: a NAT that needs no privilege, with a port of this host's leading to the
//! guest's web server and mail kept from going out.
//!
//! ```no_run
//! use vmcore::{Vm, boot::Linux};
//! use vmdevices::net::{Forward, Nat};
//! use vmdevices::{Disk, Net, Pc, console::Stdio};
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let nat = Nat::new()?.forward(Forward::tcp(8080, 80))?.deny("tcp:any:25".parse()?);
//!     let handle = nat.handle();
//!     let mut vm = Vm::builder()
//!         .memory(512 << 20)
//!         .boot(Linux::new("vmlinuz").initrd("initrd.img").cmdline("console=ttyS0 root=/dev/vda rw"))
//!         .attach(Pc::new().serial(Stdio::new()?))
//!         .attach(Disk::open("root.img")?)
//!         .attach(Net::nat(nat)?)
//!         .build()?;
//!     let outcome = vm.run()?;
//!     println!("the guest ended: {outcome:?} after {:?}", handle.stats());
//!     Ok(())
//! }
//! ```
//!
//! [`Pc`] is the board of everything that is not virtio; each of its devices can be attached alone
//! ([`legacy`]). [`Disk`], [`Net`], [`Rng`], [`VirtioConsole`], [`Vsock`] and [`Balloon`] are virtio devices behind
//! virtio-mmio; [`virtio::mmio`] puts any other [`virtio::VirtioDevice`] there, an embedder's own
//! too, and [`virtio::pci`] puts it on the PCI bus, where devices of other kinds can be as well ([`pci`]).
//! [`paravirtual`] has what hypervisors tell their guests otherwise. What disks, networks and consoles are
//! connected to on the host is in [`block`], [`net`] and
//! [`console`].
//!
//! # Conventions
//!
//! Units, errors and threads are as the page of [`vmcore`] says. Devices own no threads: register
//! accesses run on the thread of the vCPU that makes them, what waits for the host on the machine's
//! I/O threads ([`vmcore::IoThread`]). Only what waits for a disk's files runs elsewhere: in the kernel, or
//! on a few threads of the disk's. Section numbers of virtio are those of version 1.2.

// By this name tests of the crate and of its interface share code.
#[cfg(test)]
extern crate self as vmdevices;

pub mod block;
mod board;
pub mod buffers;
mod complaints;
pub mod console;
pub mod legacy;
pub mod net;
pub mod paravirtual;
pub mod pci;
pub mod rate;
mod saved;
mod timer;
mod unix_socket;
pub mod virtio;

pub use board::Pc;
pub use virtio::{Balloon, Disk, Net, Rng, VirtioConsole, Vsock};
