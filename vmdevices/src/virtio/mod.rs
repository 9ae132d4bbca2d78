//! Virtio 1.2: devices, queues and transports.
//!
//! A [`VirtioDevice`] says what the driver sees and answers at once; the [`Worker`]s it makes serve
//! its [`VirtQueue`]s on whatever thread the board gives them ([`Threading`]). A device is attached as it
//! is, with an I/O thread of its own, or by [`mmio`], with a choice:
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
//!     .attach(virtio::mmio(Rng::new()).threading(Threading::Vcpu))
//!     .build()?;
//! # Ok(())
//! # }
//! ```
//!
//! Whatever a driver does ends at its own device: a broken ring stops the device until it is reset
//! (DEVICE_NEEDS_RESET), a failed request is an I/O error inside the guest.

mod attach;
mod balloon;
mod block;
mod complaints;
mod console;
mod device;
#[cfg(test)]
mod hostile;
mod lifecycle;
mod mmio;
mod net;
mod queue;
mod rng;
mod runner;
mod vsock;

pub use attach::{MmioAttach, mmio};
pub use balloon::{Balloon, BalloonHandle, BalloonStatistics};
pub use block::Disk;
pub use console::{ConsoleHandle, VirtioConsole};
pub use device::{
    Activation, DeviceType, Progress, Source, Transport, VirtioDevice, Worker, read_config_bytes,
};
pub use mmio::{Interrupt, VirtioMmio};
pub use net::{Mac, Net};
pub use queue::{Chain, QueueError, VirtQueue};
pub use rng::Rng;
pub use runner::Threading;
pub use vsock::{Vsock, VsockHandle, VsockListener};

/// Feature bits that are the transport's (virtio 1.2, section 6).
mod features {
    pub(super) const INDIRECT_DESC: u64 = 1 << 28;
    pub(super) const EVENT_IDX: u64 = 1 << 29;
    pub(super) const VERSION_1: u64 = 1 << 32;
    pub(super) const RING_RESET: u64 = 1 << 40;
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
