//! PCI: a host bridge with one bus, and what a function on it is.
//!
//! The bus has 32 slots of 8 functions, reached by type-1 configuration accesses (ports 0xCF8 and 0xCFC) and
//! by ECAM. Functions have memory BARs, capabilities, a pin and MSI-X; BARs have addresses from the start, as
//! after firmware, and follow where the guest programs them. There are no I/O ports in BARs, no bridges to
//! further buses and no extended capabilities.
//!
//! A machine gets a bus with its first PCI device; no word is needed for it. A device of one's own is attached
//! as ours are:
//!
//! ```
//! use vmcore::{GuestAddress, Vm};
//! use vmdevices::pci::{self, Bar, Description, Identity, PciDevice};
//!
//! /// Four bytes that count how often they were read.
//! struct Counter(u32);
//!
//! impl PciDevice for Counter {
//!     fn describe(&self) -> Description {
//!         let identity = Identity { vendor: 0x1234, device: 0x5678, class: 0xff_0000, ..Identity::default() };
//!         Description { identity, bars: vec![Bar::memory32(0, 0x1000)], ..Description::default() }
//!     }
//!     fn read(&mut self, _bar: u8, _offset: u64, data: &mut [u8]) {
//!         self.0 += 1;
//!         let bytes = self.0.to_le_bytes();
//!         data.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
//!     }
//!     fn write(&mut self, _bar: u8, _offset: u64, _data: &[u8]) {}
//! }
//!
//! let builder = Vm::builder().attach(pci::device(Counter(0)).slot(5));
//! ```
//!
//! What a guest writes ends at its own function: a BAR answers only where no memory, no interrupt controller and
//! no other device is; elsewhere it is silent until the guest moves it.
//!
//! Sources: PCI Local Bus Specification 3.0 ("PCI"), PCI Express Base Specification 5.0 for ECAM.

mod attach;
mod bus;
mod config;
mod device;
mod function;
mod interrupt;
mod msix;
#[cfg(test)]
mod tests;
mod windows;

pub use attach::{PciAttach, device};
pub use bus::{PciAddress, PciBus};
pub use device::{Bar, Capability, Description, Identity, MsixTable, PciDevice};
pub use interrupt::Interrupts;
