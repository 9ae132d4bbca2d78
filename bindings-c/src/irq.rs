//! Interrupt wires.

use vmcore::IrqLine;

use crate::error::{guard, need, vmcore_error};

/// A device's interrupt wire. Deleting it lowers it. It may outlive the machine, and then does nothing.
pub struct vmcore_irq {
    pub(crate) line: IrqLine,
}

/// Sets the wire's level, from any thread.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_irq_set(irq: Option<&vmcore_irq>, high: bool) -> Option<Box<vmcore_error>> {
    guard(|| {
        need(irq, "irq")?.line.set_level(high);
        Ok(())
    })
}

/// Raises and lowers the wire: one edge. From any thread.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_irq_pulse(irq: Option<&vmcore_irq>) -> Option<Box<vmcore_error>> {
    guard(|| {
        need(irq, "irq")?.line.pulse();
        Ok(())
    })
}

/// Whether the wire is high.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_irq_level(irq: Option<&vmcore_irq>) -> bool {
    irq.is_some_and(|irq| irq.line.level())
}

/// Lowers and frees it.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_irq_delete(irq: Option<Box<vmcore_irq>>) {
    drop(irq);
}
