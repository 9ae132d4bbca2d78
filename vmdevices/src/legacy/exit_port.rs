//! A port that ends the VM.

use std::sync::{Arc, Mutex};

use vmcore::{Attach, BusDevice, Control, Machine, Outcome, Result};

/// A port whose write ends the VM with [`Outcome::Exit`] and the value written, as QEMU's
/// `isa-debug-exit` does: test payloads for it run unchanged.
///
/// It has 4 ports, the first at 0xF4 unless said, which read as ones. A test runner turns the value
/// into its process status by [`ExitPort::status`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitPort {
    base: u16,
}

impl ExitPort {
    /// The first port where nobody says otherwise.
    pub const DEFAULT: u16 = 0xf4;

    /// An exit port at `base` and the three ports behind it.
    pub fn new(base: u16) -> Self {
        Self { base }
    }

    /// The status of a process that passes the guest's `value` on as QEMU does:
    /// `(value << 1) | 1`, of which an operating system keeps 8 bits. It is odd, so that a guest
    /// cannot claim the 0 of a clean power-off.
    pub fn status(value: u32) -> u8 {
        let [low, ..] = ((value << 1) | 1).to_le_bytes();
        low
    }
}

impl Default for ExitPort {
    fn default() -> Self {
        Self::new(Self::DEFAULT)
    }
}

impl Attach for ExitPort {
    fn attach(self: Box<Self>, machine: &mut Machine) -> Result<()> {
        let device = Device { control: machine.control() };
        machine.ports(self.base, 4, Arc::new(Mutex::new(device)))
    }
}

struct Device {
    control: Control,
}

impl BusDevice for Device {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&mut self, _: u64, data: &[u8]) {
        let mut value = [0; 4];
        value.iter_mut().zip(data).for_each(|(to, byte)| *to = *byte);
        self.control.end(Outcome::Exit(u32::from_le_bytes(value)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_of_any_width_ends_the_vm_with_its_value() {
        for (data, value) in [
            (&[0x10][..], 0x10),
            (&[0x34, 0x12], 0x1234),
            (&[1, 2, 3, 0x84], 0x8403_0201),
            (&[9; 8], 0x0909_0909),
        ] {
            let control = Control::detached();
            let mut port = Device { control: control.clone() };
            let mut ones = [0; 4];
            port.read(0, &mut ones);
            assert_eq!((ones, control.asked()), ([0xff; 4], None));
            port.write(0, data);
            assert_eq!(control.asked(), Some(Outcome::Exit(value)));
        }
    }

    #[test]
    fn the_status_is_qemus() {
        assert_eq!([0, 1, 0x10, 0x7f, 0x80, u32::MAX].map(ExitPort::status), [1, 3, 33, 255, 1, 255]);
    }
}
