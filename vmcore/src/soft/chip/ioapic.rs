//! The I/O APIC (Intel 82093AA data sheet): 24 pins, each with a redirection entry that says which
//! message its interrupt becomes.
//!
//! What is on the wire is whether a device asks: the polarity of an entry says only how a board would
//! have coded that, and changes nothing here. ExtINT is not delivered from here: the PICs have their
//! own way to the processor, LINT0.

use crate::error::{Error, Result};
use crate::irq::Msi;
use crate::state::IoapicState;

/// Where the registers are, guest-physical.
const BASE: u64 = 0xfec0_0000;

/// The number of the last pin.
const LAST: u32 = 23;
/// Number of pins.
pub(super) const PINS: usize = LAST as usize + 1;

/// Of the register of the same name.
const VERSION: u32 = 0x11 | LAST << 16;

/// Fields of a redirection entry (data sheet, 3.2.4).
mod entry {
    pub(super) const VECTOR: u64 = 0xff;
    pub(super) const DELIVERY_MODE: u64 = 7 << 8;
    pub(super) const LOGICAL: u64 = 1 << 11;
    pub(super) const DELIVERY_STATUS: u64 = 1 << 12;
    pub(super) const REMOTE_IRR: u64 = 1 << 14;
    pub(super) const LEVEL: u64 = 1 << 15;
    pub(super) const MASKED: u64 = 1 << 16;
    /// What the guest cannot write.
    pub(super) const READ_ONLY: u64 = DELIVERY_STATUS | REMOTE_IRR;

    pub(super) const EXT_INT: u64 = 7 << 8;
}

/// The I/O APIC. What it sends is given to the `send` of each call.
#[derive(Clone, Debug)]
pub(super) struct Ioapic {
    select: u32,
    id: u32,
    /// Levels of the pins, one bit each.
    lines: u32,
    /// Edges that have been sent while their line is still high.
    sent: u32,
    entries: [u64; PINS],
}

fn bit(pin: usize) -> u32 {
    1 << pin
}

impl Ioapic {
    pub(super) fn new() -> Self {
        Self { select: 0, id: 0, lines: 0, sent: 0, entries: [entry::MASKED; PINS] }
    }

    /// Sets the level of `pin`, which is below [`PINS`].
    pub(super) fn set_line(&mut self, pin: usize, high: bool, send: impl FnMut(Msi)) {
        let before = self.lines;
        if !high {
            self.lines &= !bit(pin);
            self.sent &= !bit(pin);
            return;
        }
        self.lines |= bit(pin);
        // An edge is one only on the way up; a masked edge is neither delivered nor kept (3.2.4).
        if self.entries[pin] & entry::LEVEL != 0 || before != self.lines {
            self.service(pin, send);
        }
    }

    /// Sends the interrupt of `pin`, whose line is high, unless it is held back.
    fn service(&mut self, pin: usize, mut send: impl FnMut(Msi)) {
        let value = self.entries[pin];
        let level = value & entry::LEVEL != 0;
        let external = value & entry::DELIVERY_MODE == entry::EXT_INT;
        if value & entry::MASKED != 0 || external || level && value & entry::REMOTE_IRR != 0 {
            return;
        }
        if level {
            self.entries[pin] |= entry::REMOTE_IRR;
        } else {
            self.sent |= bit(pin);
        }
        send(message(value));
    }

    /// A local APIC has ended the level-triggered interrupt `vector`: lines that are still high
    /// interrupt again.
    pub(super) fn end_of_interrupt(&mut self, vector: u8, mut send: impl FnMut(Msi)) {
        for pin in 0..PINS {
            let value = self.entries[pin];
            if value & entry::VECTOR != u64::from(vector) || value & entry::LEVEL == 0 {
                continue;
            }
            self.entries[pin] &= !entry::REMOTE_IRR;
            if self.lines & bit(pin) != 0 {
                self.service(pin, &mut send);
            }
        }
    }

    /// Reads the register at `offset` of the window.
    pub(super) fn read(&self, offset: u64) -> u32 {
        match offset & !3 {
            0 => self.select,
            0x10 => match self.select {
                // The arbitration id is the id, there being nothing to arbitrate.
                0 | 2 => self.id << 24,
                1 => VERSION,
                select => self.half(select),
            },
            _ => 0,
        }
    }

    /// Half of a redirection entry; all ones where there is none.
    fn half(&self, select: u32) -> u32 {
        let Some((pin, high)) = pin_of(select) else { return u32::MAX };
        #[expect(clippy::cast_possible_truncation, reason = "one half is what is asked for")]
        let half = (self.entries[pin] >> if high { 32 } else { 0 }) as u32;
        half
    }

    /// Writes the register at `offset` of the window.
    pub(super) fn write(&mut self, offset: u64, value: u32, send: impl FnMut(Msi)) {
        match (offset & !3, self.select) {
            (0, _) => self.select = value & 0xff,
            (0x10, 0) => self.id = value >> 24 & 0xf,
            (0x10, select) => {
                if let Some((pin, high)) = pin_of(select) {
                    self.write_entry(pin, high, value, send);
                }
            }
            _ => {}
        }
    }

    fn write_entry(&mut self, pin: usize, high: bool, value: u32, send: impl FnMut(Msi)) {
        let old = self.entries[pin];
        let (value, keep) = if high {
            (u64::from(value) << 32, 0xffff_ffff)
        } else {
            // Bits 17 to 55 are reserved.
            (u64::from(value) & 0x1_ffff & !entry::READ_ONLY, 0xffff_ffff << 32 | entry::READ_ONLY)
        };
        let mut new = (old & keep | value) & !(0x00ff_ffff << 32);
        if new & entry::LEVEL == 0 {
            // So is remote IRR cleared by hand (Linux does where there is no EOI register).
            new &= !entry::REMOTE_IRR;
        }
        self.entries[pin] = new;
        if new & entry::LEVEL != 0 && self.lines & bit(pin) != 0 {
            self.service(pin, send);
        }
    }

    pub(super) fn save(&self) -> IoapicState {
        IoapicState {
            base: BASE,
            ioregsel: self.select,
            id: self.id,
            irr: self.lines & !self.sent,
            redirection: self.entries.to_vec(),
        }
    }

    /// Takes over a state, and sends what it has not yet sent.
    pub(super) fn restore(&mut self, state: &IoapicState, send: impl FnMut(Msi)) -> Result<()> {
        let mut new = Self::from_state(state)?;
        new.resend(send);
        *self = new;
        Ok(())
    }

    fn from_state(state: &IoapicState) -> Result<Self> {
        let mismatch = |expected, found| Err(Error::State { what: "the I/O APIC", expected, found });
        let Ok(entries) = <[u64; PINS]>::try_from(state.redirection.as_slice()) else {
            return mismatch(
                format!("{PINS} redirection entries"),
                format!("{} redirection entries", state.redirection.len()),
            );
        };
        if state.base != BASE {
            return mismatch(format!("registers at {BASE:#x}"), format!("registers at {:#x}", state.base));
        }
        let lines = state.irr & (bit(PINS) - 1);
        Ok(Self { select: state.ioregsel & 0xff, id: state.id & 0xf, lines, sent: 0, entries })
    }

    fn resend(&mut self, mut send: impl FnMut(Msi)) {
        for pin in 0..PINS {
            if self.lines & bit(pin) != 0 {
                self.service(pin, &mut send);
            }
        }
    }
}

/// The pin whose entry register `select` is in, and whether it is the entry's high half.
fn pin_of(select: u32) -> Option<(usize, bool)> {
    let at = usize::try_from(select.checked_sub(0x10)?).ok()?;
    (at / 2 < PINS).then_some((at / 2, at % 2 != 0))
}

/// The message that an entry asks for (SDM vol. 3A, 11.11).
fn message(value: u64) -> Msi {
    const ASSERT: u64 = 1 << 14;
    let destination = value >> 56;
    let logical = if value & entry::LOGICAL != 0 { 1 << 2 } else { 0 };
    let level = if value & entry::LEVEL != 0 { entry::LEVEL | ASSERT } else { 0 };
    #[expect(clippy::cast_possible_truncation, reason = "the fields are in the low 16 bits")]
    let data = (value & (entry::VECTOR | entry::DELIVERY_MODE) | level) as u32;
    Msi { address: 0xfee0_0000 | destination << 12 | logical, data }
}
