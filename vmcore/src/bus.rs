//! The port and MMIO buses: which device answers an access.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use arc_swap::{ArcSwap, Cache};

use crate::error::{Error, Result};

/// A device as a bus sees it. It knows offsets from its base, no address.
///
/// Accesses come on the threads of the vCPUs, one at a time, and the vCPU waits for the answer.
/// The bus locks the device for each access, so a device that has work to do off the vCPU thread
/// must not hold its own state locked while it waits for the host.
pub trait BusDevice: Send {
    /// Answers a read of `data.len()` bytes (1, 2, 4 or 8) at `offset` bytes from the device's base.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Takes a write of `data.len()` bytes (1, 2, 4 or 8) at `offset` bytes from the device's base.
    fn write(&mut self, offset: u64, data: &[u8]);

    /// Called before a run that follows [`Outcome::IoError`](crate::Outcome::IoError): a device that had the VM
    /// stopped tries again what the host failed to do.
    fn retry(&mut self) {}

    /// The device's state as bytes of its own format, to be given to [`BusDevice::restore`] of an equal device.
    ///
    /// # Errors
    /// Where the state cannot be had now.
    fn save(&self) -> Result<Vec<u8>> {
        Ok(Vec::new())
    }

    /// Takes over the bytes that an equal device saved.
    ///
    /// # Errors
    /// Where the state is not one of this kind of device.
    fn restore(&mut self, state: &[u8]) -> Result<()> {
        if state.is_empty() {
            return Ok(());
        }
        Err(Error::State {
            what: "a device without state",
            expected: "0 bytes".into(),
            found: format!("{} bytes", state.len()),
        })
    }
}

/// A device that can be put on a bus and still be reached by its owner.
pub type SharedDevice = Arc<Mutex<dyn BusDevice>>;

#[derive(Clone)]
struct Entry {
    base: u64,
    last: u64,
    device: SharedDevice,
}

/// The devices sorted by base, without overlaps.
type Entries = Vec<Entry>;

/// An address space of devices: I/O ports or MMIO.
///
/// Clones share the devices. Look-ups take no lock; devices can be added and removed while vCPUs
/// run. Accesses that no device claims are for the caller to answer (all ones for reads).
#[derive(Clone)]
pub struct Bus {
    kind: &'static str,
    entries: Arc<ArcSwap<Entries>>,
    change: Arc<Mutex<()>>,
}

impl Bus {
    /// An empty bus; `kind` ("port range", "MMIO window") is for messages.
    pub fn new(kind: &'static str) -> Self {
        Self { kind, entries: Arc::default(), change: Arc::default() }
    }

    /// Puts `device` at `len` addresses from `base`.
    ///
    /// # Errors
    /// [`Error::Conflict`] where a device is there already, [`Error::Config`] for an empty range or
    /// one that wraps.
    pub fn insert(&self, base: u64, len: u64, device: SharedDevice) -> Result<()> {
        let last =
            len.checked_sub(1).and_then(|last| base.checked_add(last)).ok_or_else(|| Error::Config {
                what: self.kind,
                value: format!("{len:#x} addresses at {base:#x}"),
                fix: "give at least one address, and end within 64 bits".into(),
            })?;
        let _guard = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let mut entries = Entries::clone(&self.entries.load());
        let at = entries.partition_point(|e| e.last < base);
        if let Some(existing) = entries.get(at).filter(|e| e.base <= last) {
            return Err(Error::Conflict {
                kind: self.kind,
                new: format!("[{base:#x}..={last:#x}]"),
                existing: format!("[{:#x}..={:#x}]", existing.base, existing.last),
            });
        }
        entries.insert(at, Entry { base, last, device });
        self.entries.store(Arc::new(entries));
        Ok(())
    }

    /// Takes the device that begins at address `base` off the bus and returns it, if there is one. An access
    /// that is under way on another thread still ends on it.
    pub fn remove(&self, base: u64) -> Option<SharedDevice> {
        let _guard = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let mut entries = Entries::clone(&self.entries.load());
        let at = entries.iter().position(|e| e.base == base)?;
        let removed = entries.remove(at);
        self.entries.store(Arc::new(entries));
        Some(removed.device)
    }

    /// The first and last address of a device that has some of the `len` addresses from `base`.
    pub(crate) fn overlapping(&self, base: u64, len: u64) -> Option<(u64, u64)> {
        let last = base.saturating_add(len.saturating_sub(1));
        let entries = self.entries.load();
        let at = entries.partition_point(|e| e.last < base);
        entries.get(at).filter(|e| e.base <= last).map(|e| (e.base, e.last))
    }

    /// Whether a device answers at `address`.
    pub fn claims(&self, address: u64) -> bool {
        self.entries.load().iter().any(|e| (e.base..=e.last).contains(&address))
    }

    /// The bus without a share in it, for devices that stand on it and move.
    pub(crate) fn downgrade(&self) -> WeakBus {
        let (entries, change) = (Arc::downgrade(&self.entries), Arc::downgrade(&self.change));
        WeakBus { kind: self.kind, entries, change }
    }

    /// A reader with its own cached copy of the device table, for one vCPU.
    pub fn reader(&self) -> BusReader {
        BusReader { cache: Cache::new(self.entries.clone()) }
    }

    /// Every device with its first address, in ascending order: what a snapshot walks.
    pub fn devices(&self) -> Vec<(u64, SharedDevice)> {
        self.entries.load().iter().map(|e| (e.base, e.device.clone())).collect()
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ranges = self.entries.load().iter().map(|e| (e.base, e.last)).collect::<Vec<_>>();
        f.debug_struct("Bus").field("kind", &self.kind).field("ranges", &ranges).finish()
    }
}

/// A [`Bus`] that may be gone.
#[derive(Clone)]
pub(crate) struct WeakBus {
    kind: &'static str,
    entries: Weak<ArcSwap<Entries>>,
    change: Weak<Mutex<()>>,
}

impl WeakBus {
    pub(crate) fn upgrade(&self) -> Option<Bus> {
        let (entries, change) = (self.entries.upgrade()?, self.change.upgrade()?);
        Some(Bus { kind: self.kind, entries, change })
    }
}

/// One thread's view of a [`Bus`]: looks devices up without locks or reference counting.
#[derive(Clone)]
pub struct BusReader {
    cache: Cache<Arc<ArcSwap<Entries>>, Arc<Entries>>,
}

impl BusReader {
    /// Reads from the device at `address`; `false` where none claims it.
    pub fn read(&mut self, address: u64, data: &mut [u8]) -> bool {
        self.access(address, |device, offset| device.read(offset, data))
    }

    /// Writes to the device at `address`; `false` where none claims it.
    pub fn write(&mut self, address: u64, data: &[u8]) -> bool {
        self.access(address, |device, offset| device.write(offset, data))
    }

    fn access(&mut self, address: u64, act: impl FnOnce(&mut dyn BusDevice, u64)) -> bool {
        let entries = self.cache.load();
        let at = entries.partition_point(|e| e.last < address);
        match entries.get(at).filter(|e| e.base <= address) {
            Some(entry) => {
                // A device that panicked (an embedder's own) is used on as it is.
                let mut device = entry.device.lock().unwrap_or_else(PoisonError::into_inner);
                act(&mut *device, address - entry.base);
                true
            }
            None => false,
        }
    }
}

impl fmt::Debug for BusReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BusReader").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(u8);

    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 + u8::try_from(offset).unwrap());
        }
        fn write(&mut self, _: u64, data: &[u8]) {
            self.0 = data[0];
        }
    }

    fn echo(value: u8) -> SharedDevice {
        Arc::new(Mutex::new(Echo(value)))
    }

    #[test]
    fn accesses_reach_the_device_at_its_offset() {
        let bus = Bus::new("port range");
        bus.insert(0x10, 4, echo(0x40)).unwrap();
        let mut reader = bus.reader();
        let mut data = [0];
        assert!(reader.read(0x13, &mut data));
        assert_eq!(data, [0x43]);
        assert!(!reader.read(0x14, &mut data) && !reader.read(0xf, &mut data));
        assert!(reader.write(0x10, &[7]) && reader.read(0x10, &mut data));
        assert_eq!(data, [7]);
    }

    #[test]
    fn readers_see_devices_come_and_go() {
        let bus = Bus::new("port range");
        let mut reader = bus.reader();
        assert!(!reader.write(0x3f8, &[0]));
        bus.insert(0x3f8, 8, echo(0)).unwrap();
        assert!(reader.write(0x3f8, &[0]));
        assert!(bus.remove(0x3f8).is_some() && bus.remove(0x3f8).is_none());
        assert!(!reader.write(0x3f8, &[0]));
    }

    #[test]
    fn overlaps_and_wraps_are_refused_and_name_both_sides() {
        let bus = Bus::new("MMIO window");
        bus.insert(0x1000, 0x1000, echo(0)).unwrap();
        bus.insert(0x3000, 0x1000, echo(0)).unwrap();
        for (base, len) in [(0x0, 0x1001), (0x1fff, 1), (0x1800, 0x1000), (0x2800, 0x10000)] {
            let text = bus.insert(base, len, echo(0)).unwrap_err().to_string();
            assert!(text.contains("overlaps"), "{text}");
        }
        bus.insert(0x2000, 0x1000, echo(0)).unwrap();
        assert!(bus.insert(0x9000, 0, echo(0)).is_err());
        assert!(bus.insert(u64::MAX, 2, echo(0)).is_err());
        bus.insert(u64::MAX, 1, echo(0)).unwrap();
    }
}
