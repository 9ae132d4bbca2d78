//! vmgenid: a number that changes when a guest is set back or copied (Microsoft's "Virtual Machine
//! Generation ID").

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use acpi_tables::Aml;
use acpi_tables::aml::{Device, Interrupt, Method, Name, Notify, Package, Path, ResourceTemplate};
use serde::{Deserialize, Serialize};
use vmcore::{Attach, BusDevice, Entropy, Error, IrqLine, Machine, Result};

use crate::saved;

/// Bytes of the window, and of the number at its beginning.
const WINDOW: u64 = 0x1000;
const ID: usize = 16;

const WHAT: &str = "a generation id";
const STATE_VERSION: u8 = 1;

/// A random number of 128 bits that the guest can read, and that is another one after a saved state was
/// restored: two guests of one state must not have the same random numbers, identifiers and keys. Linux
/// (since 5.18, as far as its driver is built in) seeds its random numbers anew; databases and Windows
/// take notice too.
///
/// The number is in device memory, which is never part of the guest's own; the guest is told of a new one
/// by an interrupt (an ACPI generic event device).
#[derive(Debug)]
pub struct Generation(Arc<Mutex<State>>);

/// Gives a guest a new generation. Clones are of the same guest; may be used from any thread, and does
/// not keep the VM alive.
#[derive(Clone)]
pub struct GenerationHandle(Weak<Mutex<State>>);

struct State {
    id: [u8; ID],
    entropy: Entropy,
    irq: IrqLine,
}

#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    id: [u8; ID],
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    fn renew(&mut self) -> Result<()> {
        let old = self.id;
        while self.id == old {
            self.entropy.fill(&mut self.id)?;
        }
        Ok(())
    }
}

impl Generation {
    /// The number of one guest.
    pub fn new() -> Self {
        let (entropy, irq) = (Entropy::default(), IrqLine::detached());
        Self(Arc::new(Mutex::new(State { id: [0; ID], entropy, irq })))
    }

    /// What gives the guest a new generation.
    pub fn handle(&self) -> GenerationHandle {
        GenerationHandle(Arc::downgrade(&self.0))
    }
}

impl Default for Generation {
    fn default() -> Self {
        Self::new()
    }
}

impl GenerationHandle {
    /// Gives the guest a new number and tells it so. Restoring a state does this by itself; this is for
    /// guests that are copied in another way.
    ///
    /// # Errors
    /// Where the host has no random numbers, or the VM is gone.
    pub fn renew(&self) -> Result<()> {
        let Some(state) = self.0.upgrade() else {
            return Err(Error::Config {
                what: "generation id",
                value: "a new one for a VM that is gone".into(),
                fix: "use the handle while the VM is there".into(),
            });
        };
        let mut state = lock(&state);
        state.renew()?;
        state.irq.pulse();
        Ok(())
    }

    /// The number, while the VM is there.
    pub fn id(&self) -> Option<u128> {
        self.0.upgrade().map(|state| u128::from_le_bytes(lock(&state).id))
    }
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State").field("irq", &self.irq).finish_non_exhaustive()
    }
}

impl fmt::Debug for GenerationHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GenerationHandle")
    }
}

impl Attach for Generation {
    fn attach(self: Box<Self>, machine: &mut Machine) -> Result<()> {
        let base = machine.mmio_window(WINDOW)?;
        let gsi = machine.allocate_gsi();
        {
            let mut state = lock(&self.0);
            state.entropy = machine.entropy();
            state.irq = machine.irq_line(gsi);
            state.renew()?;
        }
        machine.mmio(base, WINDOW, Arc::new(Mutex::new(Register(self.0))))?;
        machine.describe_aml(&aml(base.0, gsi));
        Ok(())
    }
}

/// The device, and the event device that notifies it (ACPI 6.5, 5.6.9).
fn aml(base: u64, gsi: u32) -> Vec<u8> {
    let (low, high) = (base & u64::from(u32::MAX), base >> 32);
    let mut bytes = Vec::new();
    Device::new(
        Path::new("VGEN"),
        vec![
            &Name::new("_HID".into(), &"VMGENCTR"),
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("ADDR".into(), &Package::new(vec![&low, &high])),
        ],
    )
    .to_aml_bytes(&mut bytes);
    Device::new(
        Path::new("VGED"),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &0_u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Interrupt::new(true, true, false, false, gsi)]),
            ),
            // 0x80: the number has changed.
            &Method::new("_EVT".into(), 1, true, vec![&Notify::new(&Path::new("VGEN"), &0x80_u8)]),
        ],
    )
    .to_aml_bytes(&mut bytes);
    bytes
}

/// What the guest reads.
struct Register(Arc<Mutex<State>>);

impl BusDevice for Register {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let id = lock(&self.0).id;
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = id.get(at.saturating_add(index)).copied().unwrap_or(0);
        }
    }

    fn write(&mut self, _: u64, _: &[u8]) {}

    fn save(&self) -> Result<Vec<u8>> {
        saved::save(WHAT, STATE_VERSION, &Saved { id: lock(&self.0).id })
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<()> {
        let Saved { id } = saved::restore(WHAT, STATE_VERSION, bytes)?;
        let mut state = lock(&self.0);
        state.id = id;
        state.renew()?;
        state.irq.pulse();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use vmcore::{IrqSink, Msi};

    #[derive(Default)]
    struct Edges(AtomicUsize);

    impl IrqSink for Edges {
        fn set_irq(&self, _: u32, high: bool) -> Result<()> {
            self.0.fetch_add(high.into(), Ordering::SeqCst);
            Ok(())
        }
        fn send_msi(&self, _: Msi) -> Result<()> {
            Ok(())
        }
    }

    fn read(register: &mut Register) -> u128 {
        let mut halves = [[0; 8]; 2];
        register.read(0, &mut halves[0]);
        register.read(8, &mut halves[1]);
        u128::from_le_bytes(halves.concat().try_into().unwrap())
    }

    #[test]
    fn a_new_generation_has_another_number_and_is_told() {
        let device = Generation::new();
        let (handle, edges) = (device.handle(), Arc::new(Edges::default()));
        lock(&device.0).irq = IrqLine::new(edges.clone(), 9);
        let mut register = Register(device.0);
        handle.renew().unwrap();
        let first = read(&mut register);
        assert_eq!(handle.id(), Some(first));
        let state = register.save().unwrap();
        register.restore(&state).unwrap();
        let second = read(&mut register);
        assert!(first != 0 && second != first);
        assert_eq!(edges.0.load(Ordering::SeqCst), 2);
        // The guest changes nothing, and there is nothing behind the number.
        register.write(0, &[1; 16]);
        assert_eq!(read(&mut register), second);
        let mut behind = [9; 8];
        register.read(12, &mut behind);
        assert_eq!(behind[4..], [0; 4]);
        register.read(u64::MAX, &mut behind[..1]);
        for cut in 0..state.len() {
            assert!(register.restore(&state[..cut]).is_err());
        }
        drop(register);
        assert!(handle.renew().is_err() && handle.id().is_none());
    }
}
