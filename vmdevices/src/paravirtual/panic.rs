//! pvpanic: a guest's kernel tells that it is at its end (QEMU's docs/specs/pvpanic).

use std::fmt;
use std::sync::{Arc, Mutex};

use vmcore::boot::acpi::{AcpiDevice, AcpiHid, AcpiResource};
use vmcore::{Attach, BusDevice, Control, Machine, Outcome, Result};

/// The port, and its name in ACPI: QEMU's.
const PORT: u16 = 0x505;
const HID: &str = "QEMU0001";

/// What a guest's kernel tells of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum GuestEvent {
    /// It panicked, and nothing in the guest will handle that.
    Panicked,
    /// It panicked, and a crash kernel in the guest takes over.
    CrashLoaded,
    /// It shuts down on purpose (newer drivers only).
    Shutdown,
}

impl GuestEvent {
    /// Bit of the event in the register.
    const ALL: [(u8, Self); 3] =
        [(1 << 0, GuestEvent::Panicked), (1 << 1, GuestEvent::CrashLoaded), (1 << 2, GuestEvent::Shutdown)];
}

type Callback = Box<dyn FnMut(GuestEvent) + Send>;

/// A port by which a guest's kernel tells of its panic; Linux' driver is `pvpanic-mmio`, Windows has one
/// built in.
///
/// ```
/// use vmdevices::paravirtual::{GuestEvent, Pvpanic};
///
/// // Ends the VM with `Outcome::Panicked`.
/// let device = Pvpanic::new().end_on_panic();
/// // Leaves it to the guest what comes then.
/// let device = Pvpanic::new().on_event(|event: GuestEvent| log::warn!("the guest: {event:?}"));
/// ```
#[derive(Default)]
#[must_use = "attach it to a VmBuilder"]
pub struct Pvpanic {
    callback: Option<Callback>,
    ends: bool,
}

impl Pvpanic {
    /// A device that tells nobody.
    pub fn new() -> Self {
        Self::default()
    }

    /// Calls `callback` with each event, on the thread of the vCPU that tells of it: it must not wait for
    /// the VM.
    pub fn on_event(mut self, callback: impl FnMut(GuestEvent) + Send + 'static) -> Self {
        self.callback = Some(Box::new(callback));
        self
    }

    /// Ends the VM with [`Outcome::Panicked`] at [`GuestEvent::Panicked`]. Where the guest has a crash
    /// kernel that has its turn.
    pub fn end_on_panic(mut self) -> Self {
        self.ends = true;
        self
    }
}

impl fmt::Debug for Pvpanic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pvpanic").field("ends", &self.ends).finish_non_exhaustive()
    }
}

impl Attach for Pvpanic {
    fn attach(self: Box<Self>, machine: &mut Machine) -> Result<()> {
        let device = Device { callback: self.callback, control: self.ends.then(|| machine.control()) };
        machine.ports(PORT, 1, Arc::new(Mutex::new(device)))?;
        machine.describe(AcpiDevice {
            name: "PEVT".into(),
            hid: AcpiHid::Text(HID.into()),
            uid: 0,
            resources: vec![AcpiResource::Ports { base: PORT, len: 1 }],
        });
        Ok(())
    }
}

struct Device {
    callback: Option<Callback>,
    /// What ends the VM, if it is to be ended.
    control: Option<Control>,
}

impl BusDevice for Device {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        // The events that there are. Of a wider read the other ports are nobody's.
        data.fill(0xff);
        if let Some(first) = data.first_mut() {
            *first = GuestEvent::ALL.iter().fold(0, |all, (bit, _)| all | bit);
        }
    }

    fn write(&mut self, _: u64, data: &[u8]) {
        let bits = data.first().copied().unwrap_or(0);
        for (bit, event) in GuestEvent::ALL {
            if bits & bit == 0 {
                continue;
            }
            if let Some(callback) = &mut self.callback {
                callback(event);
            }
            if let (GuestEvent::Panicked, Some(control)) = (event, &self.control) {
                control.end(Outcome::Panicked);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_told_and_a_panic_ends_the_vm() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let callback: Callback = {
            let told = told.clone();
            Box::new(move |event| told.lock().unwrap().push(event))
        };
        let control = Control::detached();
        let mut device = Device { callback: Some(callback), control: Some(control.clone()) };
        let mut byte = [0; 1];
        device.read(0, &mut byte);
        assert_eq!(byte, [7]);
        device.write(0, &[]);
        for (value, asked) in [(0, None), (2, None), (4, None), (0xf8, None), (1, Some(Outcome::Panicked))] {
            device.write(0, &[value]);
            assert_eq!(control.asked(), asked, "{value}");
        }
        assert_eq!(
            *told.lock().unwrap(),
            [GuestEvent::CrashLoaded, GuestEvent::Shutdown, GuestEvent::Panicked]
        );
    }
}
