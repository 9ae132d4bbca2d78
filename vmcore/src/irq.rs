//! Interrupts: wires (GSIs) and messages (MSI), and the sink that a backend gives for them.
//!
//! GSI `n` is pin `n` of the one I/O APIC, and below 16 also input `n` of the 8259As; ISA IRQ 0, the
//! PIT's, is pin 0, with no override.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::Result;

/// A message-signalled interrupt: a write of `data` to `address` (SDM vol. 3A, 11.11).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Msi {
    /// Address of the write; 0xFEE0_0000 to 0xFEEF_FFFF on x86, with destination and mode in it.
    pub address: u64,
    /// Data of the write: vector, delivery mode, trigger mode.
    pub data: u32,
}

/// Where interrupts go: the machine's interrupt controllers. May be called from any thread.
///
/// Global system interrupt (GSI) `n` is pin `n` of the one I/O APIC, which has 24. GSIs 0 to 15 are
/// the ISA IRQs of the same numbers too, the inputs of the two 8259As, of which 2 is their cascade.
/// There is no override: ISA IRQ 0, the PIT's, is GSI 0 and pin 0, and not pin 2 as on many PCs. The
/// tables for the guest ([`boot::acpi`](crate::boot::acpi), [`boot::mptable`](crate::boot::mptable))
/// say so, hence every backend wires it so.
pub trait IrqSink: Send + Sync {
    /// Sets the level of global system interrupt `gsi`, 0 to 23.
    ///
    /// # Errors
    /// Where the machine has no interrupt controllers or no such input.
    fn set_irq(&self, gsi: u32, high: bool) -> Result<()>;

    /// Delivers one message.
    ///
    /// # Errors
    /// Where the machine has no LAPICs.
    fn send_msi(&self, msi: Msi) -> Result<()>;
}

/// A device's interrupt wire. It knows its sink, the device does not: a device never sees a GSI.
///
/// Dropping the wire lowers it. Methods take `&self` and may be called from any thread.
pub struct IrqLine {
    sink: Option<Arc<dyn IrqSink>>,
    gsi: u32,
    high: AtomicBool,
}

impl IrqLine {
    /// The wire into input `gsi` of `sink`, low.
    pub fn new(sink: Arc<dyn IrqSink>, gsi: u32) -> Self {
        Self { sink: Some(sink), gsi, high: AtomicBool::new(false) }
    }

    /// A wire that leads nowhere, for devices without interrupt and for tests, which can look at
    /// [`IrqLine::level`].
    pub fn detached() -> Self {
        Self { sink: None, gsi: 0, high: AtomicBool::new(false) }
    }

    /// Sets the level. Setting the level it has costs no system call.
    pub fn set_level(&self, high: bool) {
        if self.high.swap(high, Ordering::SeqCst) != high {
            self.deliver(high);
        }
    }

    /// Raises and lowers the wire: one edge, for edge-triggered inputs.
    pub fn pulse(&self) {
        self.deliver(true);
        self.deliver(false);
        self.high.store(false, Ordering::SeqCst);
    }

    /// The level the wire has.
    pub fn level(&self) -> bool {
        self.high.load(Ordering::SeqCst)
    }

    fn deliver(&self, high: bool) {
        if let Some(Err(error)) = self.sink.as_ref().map(|sink| sink.set_irq(self.gsi, high)) {
            log::error!("interrupt {} lost: {error}", self.gsi);
        }
    }
}

impl Drop for IrqLine {
    fn drop(&mut self) {
        self.set_level(false);
    }
}

impl fmt::Debug for IrqLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IrqLine")
            .field("gsi", &self.gsi)
            .field("attached", &self.sink.is_some())
            .field("high", &self.level())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u32, bool)>>);

    impl IrqSink for Recorder {
        fn set_irq(&self, gsi: u32, high: bool) -> Result<()> {
            self.0.lock().unwrap().push((gsi, high));
            Ok(())
        }
        fn send_msi(&self, _: Msi) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn levels_are_deduplicated_and_drop_lowers() {
        let sink = Arc::new(Recorder::default());
        let line = IrqLine::new(sink.clone(), 5);
        line.set_level(true);
        line.set_level(true);
        drop(line);
        assert_eq!(*sink.0.lock().unwrap(), [(5, true), (5, false)]);
    }

    #[test]
    fn a_pulse_is_an_edge_and_ends_low() {
        let sink = Arc::new(Recorder::default());
        let line = IrqLine::new(sink.clone(), 7);
        line.pulse();
        assert!(!line.level());
        assert_eq!(*sink.0.lock().unwrap(), [(7, true), (7, false)]);
    }
}
