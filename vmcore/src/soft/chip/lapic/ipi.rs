//! Interrupts that a local APIC sends (SDM vol. 3A, 11.6).

use super::Lapic;
use super::register::{esr, icr};
use crate::soft::chip::bus::{Destination, Message, delivery};
use crate::soft::chip::posted::Mode;
use crate::soft::link::attention;

/// Destination shorthands.
const NONE: u32 = 0;
const OWN: u32 = 1;
const ALL: u32 = 2;

impl Lapic {
    /// Sends what the interrupt command register says.
    pub(super) fn send(&mut self) {
        let command = self.icr_low();
        let [vector, ..] = command.to_le_bytes();
        let mode = command >> 8 & 7;
        // INIT level de-assert: it has only ever set arbitration ids, and those are gone (11.6.1).
        if mode == delivery::INIT && command & (icr::LEVEL | icr::ASSERT) == icr::LEVEL {
            return;
        }
        if matches!(mode, delivery::FIXED | delivery::LOWEST) && vector < 16 {
            self.error(esr::SEND_ILLEGAL_VECTOR);
            return;
        }
        let (to, except) = match command >> 18 & 3 {
            NONE => (self.icr_destination(), None),
            OWN => return self.send_to_self(mode, vector),
            ALL => (Destination::All, None),
            _ => (Destination::All, Some(self.link.id)),
        };
        // Trigger mode means something with INIT only (11.6.1): interrupts are edges.
        self.chipset.apics().deliver(Message { to, except, mode, vector, level: false });
    }

    pub(super) fn icr_low(&self) -> u32 {
        #[expect(clippy::cast_possible_truncation, reason = "the lower half is wanted")]
        let low = self.icr as u32;
        low
    }

    pub(super) fn icr_high(&self) -> u32 {
        (self.icr >> 32) as u32
    }

    fn icr_destination(&self) -> Destination {
        let logical = self.icr_low() & icr::LOGICAL != 0;
        let to = self.icr_high();
        if self.is_x2apic() {
            return Destination::wide(to, logical);
        }
        let [.., id] = to.to_le_bytes();
        Destination::narrow(id, logical)
    }

    /// The self shorthand.
    fn send_to_self(&mut self, mode: u32, vector: u8) {
        match mode {
            delivery::FIXED | delivery::LOWEST => self.raise_own(vector),
            // The manual allows fixed interrupts only, hardware and KVM take this one too.
            delivery::NMI => {
                self.link.posted.post(Mode::Nmi, 0, false);
                self.link.demand_own(attention::INTERRUPT);
            }
            _ => {}
        }
    }

    /// An interrupt that the APIC sends itself.
    pub(super) fn raise_own(&mut self, vector: u8) {
        if vector < 16 {
            self.error(esr::SEND_ILLEGAL_VECTOR);
        } else if self.is_software_enabled() {
            self.raise(vector);
        }
    }
}
