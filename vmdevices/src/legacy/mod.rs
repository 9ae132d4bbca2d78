//! The devices that PCs had before PCI: what boot code and kernels take for granted.

mod acpi_pm;
mod calendar;
mod cmos;
mod exit_port;
mod i8042;
mod reset;
mod rtc;
mod serial;
mod uart;

pub use acpi_pm::{AcpiPower, PowerButton};
pub use cmos::Cmos;
pub use exit_port::ExitPort;
pub use i8042::I8042;
pub use reset::ResetControl;
pub use serial::Serial;

/// Splits an access to byte-wide registers into its bytes, as the ISA bus does: each byte goes to
/// the next register.
fn registers(offset: u64, len: usize) -> impl Iterator<Item = u64> {
    (0..len).map(move |at| offset.saturating_add(u64::try_from(at).unwrap_or(u64::MAX)))
}
