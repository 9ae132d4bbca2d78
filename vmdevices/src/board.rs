//! The PC board: the devices that every stock kernel expects to find.

use vmcore::{Attach, Machine, Result};

use crate::console::Console;
use crate::legacy::{AcpiPower, Cmos, ExitPort, I8042, PowerButton, Serial};

/// A PC's own devices in one piece: keyboard controller, reset control, ACPI power block, clock, and
/// as many serial ports and the exit port as are asked for.
///
/// ```no_run
/// # fn main() -> vmcore::Result<()> {
/// use vmcore::{Vm, boot::Linux};
/// use vmdevices::{Pc, console::Stdio};
///
/// let outcome = Vm::builder()
///     .boot(Linux::new("vmlinuz").initrd("initrd.img").cmdline("console=ttyS0"))
///     .attach(Pc::new().serial(Stdio::new()?))
///     .build()?
///     .run()?;
/// println!("{outcome:?}");
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "attach it to a VmBuilder"]
pub struct Pc {
    power: AcpiPower,
    serial: Vec<Serial>,
    exit_port: Option<ExitPort>,
}

impl Default for Pc {
    fn default() -> Self {
        Self::new()
    }
}

impl Pc {
    /// A board without serial ports and exit port.
    pub fn new() -> Self {
        Self { power: AcpiPower::new(), serial: Vec::new(), exit_port: None }
    }

    /// Connects COM1 (ttyS0) to `console`.
    pub fn serial(mut self, console: impl Console + 'static) -> Self {
        self.serial.push(Serial::com1(console));
        self
    }

    /// Connects COM2 (ttyS1) to `console`.
    pub fn serial2(mut self, console: impl Console + 'static) -> Self {
        self.serial.push(Serial::com2(console));
        self
    }

    /// Ends the VM with [`Outcome::Exit`](vmcore::Outcome::Exit) when the guest writes to port `base`
    /// or the three behind it; QEMU's isa-debug-exit is usually at 0xf4.
    pub fn exit_port(mut self, base: u16) -> Self {
        self.exit_port = Some(ExitPort::new(base));
        self
    }

    /// The machine's power button, for other threads to press.
    pub fn power_button(&self) -> PowerButton {
        self.power.button()
    }
}

impl Attach for Pc {
    fn attach(mut self: Box<Self>, machine: &mut Machine) -> Result<()> {
        // One thread for all that never blocks: the clock's timer, consoles with input.
        let needed = machine.has_irqchip() || self.serial.iter_mut().any(Serial::needs_thread);
        let thread =
            if needed && !machine.is_deterministic() { Some(machine.io_thread("pc")?) } else { None };
        Box::new(I8042).attach(machine)?;
        Box::new(self.power).attach(machine)?;
        Cmos::new().attach_with(machine, thread.as_ref())?;
        for serial in self.serial {
            serial.attach_with(machine, thread.as_ref())?;
        }
        self.exit_port.map_or(Ok(()), |port| Box::new(port).attach(machine))
    }
}
