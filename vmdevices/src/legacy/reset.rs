//! The reset control register at port 0xCF9 (Intel PIIX4 data sheet, 4.1.5; ICH and later alike).

use std::sync::{Arc, Mutex};

use vmcore::{Attach, BusDevice, Control, Machine, Outcome, ResetCause, Result};

/// A rising edge resets the processor; which bits are set besides says how hard.
const RESET_CPU: u8 = 1 << 2;
/// System reset, reset CPU, full reset.
const WRITABLE: u8 = 0x0e;

/// The reset control register: a write of 6 to port 0xCF9 ends the VM with [`ResetCause::Port`].
///
/// It has this one port, between those of PCI configuration at 0xCF8 and 0xCFC, which are only
/// accessed as whole double words.
#[derive(Clone, Copy, Debug, Default)]
pub struct ResetControl;

impl ResetControl {
    /// Where the register is.
    pub const PORT: u16 = 0xcf9;
    /// What resets the machine when it is written there.
    pub const VALUE: u8 = 0x06;
}

impl Attach for ResetControl {
    fn attach(self: Box<Self>, machine: &mut Machine) -> Result<()> {
        let device = Device { value: 0, control: machine.control() };
        machine.ports(Self::PORT, 1, Arc::new(Mutex::new(device)))
    }
}

struct Device {
    value: u8,
    control: Control,
}

impl BusDevice for Device {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(byte) = data.first_mut() {
            *byte = self.value;
        }
    }

    fn write(&mut self, _: u64, data: &[u8]) {
        let Some(value) = data.first() else { return };
        let before = self.value;
        self.value = value & WRITABLE;
        if !before & self.value & RESET_CPU != 0 {
            self.control.end(Outcome::Reset(ResetCause::Port));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rising_edge_resets() {
        let control = Control::detached();
        let mut device = Device { value: 0, control: control.clone() };
        let mut data = [0; 2];
        // As Linux does it: first which reset, then the edge.
        device.write(0, &[0x02]);
        device.read(0, &mut data);
        assert_eq!((data, control.asked()), ([0x02, 0xff], None));
        device.write(0, &[0xf1]);
        assert_eq!(control.asked(), None);
        device.write(0, &[ResetControl::VALUE]);
        assert_eq!(control.asked(), Some(Outcome::Reset(ResetCause::Port)));
    }

    #[test]
    fn a_level_does_not() {
        let control = Control::detached();
        let mut device = Device { value: RESET_CPU, control: control.clone() };
        device.write(0, &[0x0e]);
        assert_eq!(control.asked(), None);
    }
}
