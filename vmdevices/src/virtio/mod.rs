//! Virtio 1.2: devices, queues and transports.
//!
//! A [`VirtioDevice`] says what the driver sees and answers at once; the [`Worker`]s it makes serve
//! its [`VirtQueue`]s on whatever thread the board gives them ([`Threading`]). A device is attached as it
//! is, behind virtio-mmio with an I/O thread of its own, or by [`mmio`] or [`pci`], with a choice:
//!
//! ```no_run
//! use vmcore::{Vm, boot::Linux};
//! use vmdevices::virtio::{self, Disk, Net, Rng, Threading};
//!
//! # fn main() -> vmcore::Result<()> {
//! let vm = Vm::builder()
//!     .boot(Linux::new("vmlinuz").initrd("initrd.img").cmdline("root=/dev/vda"))
//!     .attach(Disk::open("root.img")?)
//!     .attach(Net::tap("tap0")?)
//!     .attach(virtio::pci(Disk::open("data.img")?).slot(5))
//!     .attach(virtio::mmio(Rng::new()).threading(Threading::Vcpu))
//!     .build()?;
//! # Ok(())
//! # }
//! ```
//!
//! Both transports have the same features: VERSION_1, INDIRECT_DESC, EVENT_IDX and RING_RESET, and where they are
//! asked for ACCESS_PLATFORM and ORDER_PLATFORM ([`PciAttach::access_platform`]). Rings are split ones: virtio-queue
//! has no packed rings, so RING_PACKED is not offered.
//!
//! Whatever a driver does ends at its own device: a broken ring stops the device until it is reset
//! (DEVICE_NEEDS_RESET), a failed request is an I/O error inside the guest.

mod attach;
mod balloon;
mod block;
mod console;
mod device;
#[cfg(test)]
mod hostile;
mod lifecycle;
mod mmio;
mod net;
mod pci;
mod queue;
mod rng;
mod runner;
mod vsock;

pub use attach::{MmioAttach, PciAttach, mmio, pci};
pub use balloon::{Balloon, BalloonHandle, BalloonStatistics};
pub use block::{CacheMode, Disk, DiskHandle, DiskStop, OnError};
pub use console::{ConsoleHandle, VirtioConsole};
pub use device::{
    Activation, DeviceType, Progress, Source, Transport, VirtioDevice, Worker, read_config_bytes,
};
pub use mmio::{Interrupt, VirtioMmio};
pub use net::{Mac, Net, NetCounters, NetHandle};
pub use pci::VirtioPci;
pub use queue::{Chain, QueueError, RangeChain, VirtQueue};
pub use rng::Rng;
pub use runner::Threading;
pub use vsock::{Vsock, VsockHandle, VsockListener};

use std::sync::Arc;

use vmcore::{Error, Result};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Feature bits that are the transport's (virtio 1.2, section 6).
mod features {
    pub(super) const INDIRECT_DESC: u64 = 1 << 28;
    pub(super) const EVENT_IDX: u64 = 1 << 29;
    pub(super) const VERSION_1: u64 = 1 << 32;
    pub(super) const RING_RESET: u64 = 1 << 40;
    pub(super) const ACCESS_PLATFORM: u64 = 1 << 33;
    pub(super) const ORDER_PLATFORM: u64 = 1 << 36;
    /// Those of a device that is reached as if it were hardware.
    pub(super) const OF_PLATFORM: u64 = ACCESS_PLATFORM | ORDER_PLATFORM;
    pub(super) const OF_TRANSPORT: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1 | RING_RESET;
}

/// Device status bits (virtio 1.2, section 2.1).
mod status {
    pub(super) const ACKNOWLEDGE: u32 = 1;
    pub(super) const DRIVER: u32 = 2;
    pub(super) const DRIVER_OK: u32 = 4;
    pub(super) const FEATURES_OK: u32 = 8;
    pub(super) const NEEDS_RESET: u32 = 64;
    pub(super) const FAILED: u32 = 128;
    /// Those a driver may write.
    pub(super) const OF_DRIVER: u32 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;
}

/// An event for each of `queues`, by which its driver's notifications reach the device.
fn events(queues: usize) -> Result<Vec<Arc<EventFd>>> {
    (0..queues)
        .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Arc::new))
        .collect::<std::io::Result<_>>()
        .map_err(|error| Error::os("eventfd", "virtio notifications", error))
}

/// Sets the low half of an address.
fn set_low(address: &mut u64, value: u32) {
    *address = *address & !0xffff_ffff | u64::from(value);
}

/// Sets the high half of an address.
fn set_high(address: &mut u64, value: u32) {
    *address = *address & 0xffff_ffff | u64::from(value) << 32;
}
