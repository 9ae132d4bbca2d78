//! Putting a PCI device on a machine.

use vmcore::{Attach, Machine, Result};

use super::bus::{PciAddress, PciBus};
use super::device::PciDevice;

/// `device` as a function of the machine's PCI bus, to be attached to a machine.
pub fn device(device: impl PciDevice + 'static) -> PciAttach {
    PciAttach { device: Box::new(device), address: None }
}

/// A PCI device about to be attached; see [`device`]. It gets the first free slot unless told otherwise.
#[must_use = "attach it to a VmBuilder"]
pub struct PciAttach {
    device: Box<dyn PciDevice>,
    address: Option<PciAddress>,
}

impl PciAttach {
    /// Puts the device into `slot`, 1 to 31, as its function 0.
    pub fn slot(self, slot: u8) -> Self {
        self.at(PciAddress::slot(slot))
    }

    /// Puts the device at `address`. Function 0 of a slot is to be attached before the others.
    pub fn at(mut self, address: PciAddress) -> Self {
        self.address = Some(address);
        self
    }
}

impl std::fmt::Debug for PciAttach {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PciAttach").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Attach for PciAttach {
    fn attach(self: Box<Self>, machine: &mut Machine) -> Result<()> {
        PciBus::of(machine)?.add(self.address, self.device).map(drop)
    }
}
