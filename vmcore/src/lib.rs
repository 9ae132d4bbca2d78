//! vmcore: virtual machines as a library.
//!
//! A complete program that runs a guest, sixteen-bit code that prints and halts:
//!
//! ```
//! use vmcore::{Accel, GuestAddress, Io, MemoryRegion, VcpuExit, Vm};
//!
//! fn main() -> vmcore::Result<()> {
//! #   let report = vmcore::host::check();
//! #   if report.backends.iter().all(|b| b.status == vmcore::host::Status::NotUsable) {
//! #       println!("skipped: no backend can be used here\n{report}");
//! #       return Ok(());
//! #   }
//!     let vm = Vm::bare(Accel::Auto)?;
//!     vm.map(MemoryRegion::anonymous(GuestAddress(0), 0x10000)?)?;
//!     // mov al, '!'; out 0xe9, al; hlt
//!     vm.memory().write(GuestAddress(0x1000), &[0xb0, b'!', 0xe6, 0xe9, 0xf4])?;
//!
//!     let mut vcpu = vm.create_vcpu(0)?;
//!     vcpu.enter_real_mode(GuestAddress(0x1000))?;
//!     let mut text = String::new();
//!     let exit = vcpu.run_with(|io| {
//!         if let Io::PortWrite { port: 0xe9, data } = io {
//!             text.push(char::from(data[0]));
//!         }
//!     })?;
//!     assert_eq!((exit, text.as_str()), (VcpuExit::Halted, "!"));
//!     Ok(())
//! }
//! ```
//!
//! A machine with devices, that boots a kernel, is as short: the page of the `vmdevices` crate has it.
//!
//! # Core concepts
//!
//! - [`Vm`]: a virtual machine, bare ([`Vm::bare`]) or built with devices and something to boot
//!   ([`Vm::builder`], [`VmBuilder`]). [`Vm::run`] returns when the guest ends, with an [`Outcome`].
//! - [`Vcpu`]: a virtual CPU in the embedder's own hands. [`VcpuHandle`] stops it from any thread.
//! - [`VmHandle`] pauses ([`Paused`]), resumes and stops a VM from any thread.
//! - [`GuestMemory`] and [`MemoryRegion`]: what backs guest-physical addresses ([`memory`]).
//! - [`boot`]: kernels and images, and the tables that tell a guest about its machine.
//! - [`cpuid`]: CPU models, topology, and what CPUID tells.
//! - [`Attach`] and [`Machine`]: how devices, ours (the `vmdevices` crate) and the embedder's, get
//!   ports, MMIO windows, interrupts ([`IrqLine`]) and threads ([`IoThread`]). [`BusDevice`] is a device
//!   as a bus sees it; [`Control`] is the machine's off switch.
//! - [`host`]: what this host can run, and why not. [`Accel`] chooses.
//! - [`backend`]: the contract behind which KVM ([`kvm`]) and the software CPU (`soft`) stand; [`state`]
//!   is what crosses it.
//!
//! # Conventions
//!
//! What an item does not say otherwise:
//!
//! - **Units.** Sizes, lengths and offsets are bytes; a page is 4096 of them
//!   ([`memory::PAGE_SIZE`]). Addresses are guest-physical ([`GuestAddress`], or a number called
//!   `base`, `at` or `address`); guest-virtual ones are called `gva`, the host's "host address". Times
//!   are [`Duration`](std::time::Duration)s, or nanoseconds in a name that ends in `_ns`. Interrupts are
//!   global system interrupts, numbered as [`IrqSink`] says; vCPUs are numbered by their APIC ids.
//! - **Errors.** Each names the operation, the value it failed with and, where it is known, what to
//!   do. A call that fails has changed nothing, unless its `# Errors` says what. Nothing panics on
//!   what a guest does or an image contains.
//! - **Threads.** Types that are `Sync` may be used from any thread, while the guest runs too: [`Vm`] and
//!   its handles, [`GuestMemory`], [`Bus`], [`IrqLine`], [`Control`]. Clones of them mean the same thing.
//!   Devices and I/O closures are called on the thread of the vCPU that makes the access, which waits
//!   for them; watches ([`IoThread`]) on the I/O thread.
//! - **Sources.** SDM is the Intel 64 and IA-32 Architectures Software Developer's Manual, with the
//!   chapters of the editions since March 2023; APM the AMD64 Architecture Programmer's Manual; ACPI 6.5
//!   and virtio 1.2 are the specifications of these versions; names like `KVM_RUN` are in the kernel's
//!   `Documentation/virt/kvm/api.rst`.
//!
//! Many VMs live in one process; nothing is shared between them. The library never exits, prints, or
//! installs a signal handler; it logs through the `log` crate. While a thread runs a vCPU, one
//! real-time signal is blocked in that thread ([`kvm`] says which), with which other threads interrupt
//! it.

pub mod backend;
pub mod boot;
mod bus;
pub mod cpuid;
pub mod deterministic;
mod error;
pub mod host;
mod irq;
pub mod kvm;
pub mod memory;
#[cfg(feature = "soft")]
pub mod soft;
pub mod state;
mod vcpu;
mod vm;

pub use backend::{VcpuExit, VcpuHandle};
pub use bus::{Bus, BusDevice, BusReader, SharedDevice};
pub use deterministic::{Deterministic, StateHash};
pub use error::{EmulationFailure, Error, Result};
pub use host::Accel;
pub use irq::{IrqLine, IrqSink, Msi};
pub use memory::{GuestAddress, GuestMemory, MemoryRegion};
pub use vcpu::{Io, Vcpu};
pub use vm::{
    Attach, Clock, Control, Entropy, EventSet, IoThread, Machine, Outcome, Paused, Platform, ResetCause,
    Timer, Vm, VmBuilder, VmHandle, VmState, VmStats, Watch,
};

const _: () = {
    const fn sendable<T: Send>() {}
    const fn shared<T: Send + Sync>() {}
    sendable::<Vcpu>();
    shared::<Vm>();
    shared::<VmHandle>();
    shared::<VcpuHandle>();
    shared::<GuestMemory>();
    shared::<Bus>();
    shared::<IrqLine>();
    shared::<IoThread>();
    shared::<Control>();
    shared::<Platform>();
    shared::<Error>();
};
