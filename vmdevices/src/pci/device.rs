//! What a PCI device is to the bus.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmcore::{Error, GuestAddress, Result};

use super::interrupt::Interrupts;

/// One function of PCI, as the bus sees it.
///
/// It is called on vCPU threads, one call at a time. The bus answers for configuration space, the BARs'
/// addresses and MSI-X; the device for what its BARs contain.
pub trait PciDevice: Send {
    /// What it is and has. Asked once, when it is put on the bus; it must not change.
    fn describe(&self) -> Description;

    /// Its way to the interrupt controllers, given once, before anything else happens.
    fn connect(&mut self, interrupts: Interrupts) {
        let _ = interrupts;
    }

    /// Answers a read of `data.len()` bytes (1, 2, 4 or 8) at `offset` bytes into BAR number `bar`; `data` is
    /// zero before. The guest chooses offset and length: the last bytes may be beyond the BAR's end.
    fn read(&mut self, bar: u8, offset: u64, data: &mut [u8]);

    /// Takes a write, as [`PciDevice::read`].
    fn write(&mut self, bar: u8, offset: u64, data: &[u8]);

    /// Answers a read within capability number `index` of [`Description::capabilities`], `offset` bytes from
    /// its first; `data` has the bytes that were described. For capabilities with registers in them.
    fn read_capability(&mut self, index: usize, offset: usize, data: &mut [u8]) {
        let _ = (index, offset, data);
    }

    /// Takes a write within capability number `index`, as [`PciDevice::read_capability`].
    fn write_capability(&mut self, index: usize, offset: usize, data: &[u8]) {
        let _ = (index, offset, data);
    }

    /// The guest programmed something that the device may have to know; called with what is so from the
    /// beginning, too.
    fn programmed(&mut self, what: Programmed) {
        let _ = what;
    }

    /// As [`BusDevice::retry`](vmcore::BusDevice::retry).
    fn retry(&mut self) {}

    /// State besides configuration space and MSI-X, which the bus saves.
    ///
    /// # Errors
    /// Where the state cannot be had now.
    fn save(&self) -> Result<Vec<u8>> {
        Ok(Vec::new())
    }

    /// Takes over the bytes that an equal device saved. Configuration space, interrupts and addresses are
    /// those of the saved one already.
    ///
    /// # Errors
    /// [`Error::State`] where the state is not one of an equal device.
    fn restore(&mut self, state: &[u8]) -> Result<()> {
        if state.is_empty() {
            return Ok(());
        }
        Err(Error::State {
            what: "a PCI device without state of its own",
            expected: "0 bytes".into(),
            found: format!("{} bytes", state.len()),
        })
    }
}

/// A device that its owner still reaches, as [`SharedDevice`](vmcore::SharedDevice)s on other buses.
impl<D: PciDevice + ?Sized> PciDevice for Arc<Mutex<D>> {
    fn describe(&self) -> Description {
        reach(self).describe()
    }
    fn connect(&mut self, interrupts: Interrupts) {
        reach(self).connect(interrupts);
    }
    fn read(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        reach(self).read(bar, offset, data);
    }
    fn write(&mut self, bar: u8, offset: u64, data: &[u8]) {
        reach(self).write(bar, offset, data);
    }
    fn read_capability(&mut self, index: usize, offset: usize, data: &mut [u8]) {
        reach(self).read_capability(index, offset, data);
    }
    fn write_capability(&mut self, index: usize, offset: usize, data: &[u8]) {
        reach(self).write_capability(index, offset, data);
    }
    fn programmed(&mut self, what: Programmed) {
        reach(self).programmed(what);
    }
    fn retry(&mut self) {
        reach(self).retry();
    }
    fn save(&self) -> Result<Vec<u8>> {
        reach(self).save()
    }
    fn restore(&mut self, state: &[u8]) -> Result<()> {
        reach(self).restore(state)
    }
}

fn reach<D: ?Sized>(device: &Mutex<D>) -> MutexGuard<'_, D> {
    // A device that panicked (an embedder's own) is used on as it is.
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a guest programs in configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Programmed {
    /// A BAR answers at this address from now on, or nowhere: for devices with doorbells.
    Bar {
        /// Its number.
        index: u8,
        /// Where it is.
        at: Option<GuestAddress>,
    },
    /// Whether the function may read and write memory by itself (Bus Master of the command register). One that
    /// does so must not afterwards, when it is told that it may not; the bus sees to its messages.
    Master(bool),
}

/// What a function is and has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Description {
    /// What it says it is.
    pub identity: Identity,
    /// Its windows into guest-physical addresses.
    pub bars: Vec<Bar>,
    /// Its capabilities, in the order of the list, besides MSI-X.
    pub capabilities: Vec<Capability>,
    /// Its MSI-X vectors, if it has any.
    pub msix: Option<MsixTable>,
    /// Whether it has an interrupt pin: INTA for function 0, and so on in turn.
    pub pin: bool,
}

/// The registers that say what a function is (PCI 6.2.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID; 0xFFFF is none.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Base class, sub-class and programming interface, from bit 16, 8 and 0: 0x01_00_00 is a SCSI controller.
    pub class: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// A window of memory (PCI 6.2.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Number of its register, 0 to 5; one of 64 bits takes the next one too.
    pub index: u8,
    /// Length in bytes, a power of two from 16, up to 2 GiB with 32 bits and 64 GiB with 64.
    pub len: u64,
    /// Whether it may lie above 4 GiB.
    pub wide: bool,
    /// Whether reads have no side effects and writes may be merged.
    pub prefetchable: bool,
}

impl Bar {
    /// One with an address of 32 bits, not prefetchable.
    pub fn memory32(index: u8, len: u64) -> Self {
        Self { index, len, wide: false, prefetchable: false }
    }

    /// One with an address of 64 bits, not prefetchable.
    pub fn memory64(index: u8, len: u64) -> Self {
        Self { index, len, wide: true, prefetchable: false }
    }
}

/// A capability (PCI 6.7).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Capability ID: 9 is the vendor's own.
    pub id: u8,
    /// What follows the ID and the pointer to the next: up to 190 bytes.
    pub body: Vec<u8>,
}

/// MSI-X (PCI 6.8.2): the table and the pending bits take a part of a BAR of which the device then gets to see
/// nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixTable {
    /// Number of vectors, 1 to 2048.
    pub vectors: u16,
    /// Number of the BAR.
    pub bar: u8,
    /// Where in it the table begins, a multiple of 8: 16 bytes a vector.
    pub table: u32,
    /// Where in it the pending bits begin, a multiple of 8: 8 bytes for each 64 vectors.
    pub pending: u32,
}

impl MsixTable {
    /// Length of the table in bytes.
    pub(crate) fn table_len(&self) -> u64 {
        16 * u64::from(self.vectors)
    }

    /// Length of the pending bits in bytes.
    pub(crate) fn pending_len(&self) -> u64 {
        8 * u64::from(self.vectors).div_ceil(64)
    }
}
