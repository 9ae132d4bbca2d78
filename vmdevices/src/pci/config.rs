//! The 256 bytes of configuration space of one function (PCI, chapter 6).

use std::ops::Range;

use vmcore::{Error, Result};

use super::device::{Bar, Capability, Description, MsixTable};
use super::msix;

/// Length in bytes.
pub(super) const LEN: usize = 256;

/// Offsets of registers (PCI, figure 6-1).
mod register {
    pub(super) const VENDOR: usize = 0x00;
    pub(super) const DEVICE: usize = 0x02;
    pub(super) const COMMAND: usize = 0x04;
    pub(super) const STATUS: usize = 0x06;
    pub(super) const REVISION: usize = 0x08;
    pub(super) const CLASS: usize = 0x09;
    pub(super) const CACHE_LINE: usize = 0x0c;
    pub(super) const LATENCY: usize = 0x0d;
    pub(super) const HEADER_TYPE: usize = 0x0e;
    pub(super) const BARS: usize = 0x10;
    pub(super) const SUBSYSTEM_VENDOR: usize = 0x2c;
    pub(super) const SUBSYSTEM: usize = 0x2e;
    pub(super) const CAPABILITIES: usize = 0x34;
    pub(super) const INTERRUPT_LINE: usize = 0x3c;
    pub(super) const INTERRUPT_PIN: usize = 0x3d;
    /// What the header leaves free.
    pub(super) const FREE: usize = 0x40;
}

/// Bits of the command register (PCI 6.2.2).
pub(super) mod command {
    pub(in super::super) const MEMORY: u16 = 1 << 1;
    pub(in super::super) const MASTER: u16 = 1 << 2;
    pub(super) const PARITY: u16 = 1 << 6;
    pub(super) const SERR: u16 = 1 << 8;
    pub(in super::super) const INTX_DISABLE: u16 = 1 << 10;
    /// Those that a function of memory only has. Errors of the bus, which the second and third are about, do
    /// not happen.
    pub(super) const WRITABLE: u16 = MEMORY | MASTER | PARITY | SERR | INTX_DISABLE;
}

/// Bits of the status register (PCI 6.2.3).
const INTERRUPT_STATUS: u8 = 1 << 3;
const CAPABILITIES_LIST: u16 = 1 << 4;

/// Header type: there are more functions in the slot.
const MULTI_FUNCTION: u8 = 1 << 7;

/// Low bits of a BAR: 64 bits wide, prefetchable.
const WIDE: u64 = 0b100;
const PREFETCHABLE: u64 = 0b1000;
/// All of them.
const BAR_FLAGS: u64 = 0b1111;

const MSIX_ID: u8 = 0x11;

/// Configuration space: what it contains, and which bits the guest may change.
#[derive(Clone, Debug)]
pub(super) struct Config {
    bytes: [u8; LEN],
    writable: [u8; LEN],
    /// Where the described capabilities are.
    capabilities: Vec<Range<usize>>,
    /// Where MSI-X' message control register is.
    msix: Option<usize>,
}

impl Config {
    /// That of a function that `description` describes, with interrupt pin `pin` (1 for INTA) wired to
    /// interrupt `line`.
    ///
    /// # Errors
    /// [`Error::Config`] for what no function can be.
    pub(super) fn new(description: &Description, pin: Option<(u8, u8)>) -> Result<Self> {
        let Description { identity, bars, capabilities, msix, .. } = description;
        check_bars(bars)?;
        let (bytes, writable) = ([0; LEN], [0; LEN]);
        let mut config = Self { bytes, writable, capabilities: Vec::new(), msix: None };
        if identity.vendor == u16::MAX || identity.class >> 24 != 0 {
            return Err(Error::Config {
                what: "identity of a PCI device",
                value: format!("{identity:x?}"),
                fix: "a vendor is not 0xFFFF, and a class has 24 bits".into(),
            });
        }
        config.set(register::VENDOR, &identity.vendor.to_le_bytes());
        config.set(register::DEVICE, &identity.device.to_le_bytes());
        config.set(register::REVISION, &[identity.revision]);
        config.set(register::CLASS, &identity.class.to_le_bytes()[..3]);
        config.set(register::SUBSYSTEM_VENDOR, &identity.subsystem_vendor.to_le_bytes());
        config.set(register::SUBSYSTEM, &identity.subsystem.to_le_bytes());
        config.allow(register::COMMAND, &command::WRITABLE.to_le_bytes());
        // Scratch registers here; guests write what a bus with clocks would need.
        config.allow(register::CACHE_LINE, &[0xff]);
        config.allow(register::LATENCY, &[0xff]);
        if let Some((pin, line)) = pin {
            config.set(register::INTERRUPT_PIN, &[pin]);
            config.set(register::INTERRUPT_LINE, &[line]);
            config.allow(register::INTERRUPT_LINE, &[0xff]);
        }
        for bar in bars {
            let flags = if bar.wide { WIDE } else { 0 } | if bar.prefetchable { PREFETCHABLE } else { 0 };
            let (at, width) = (bar_offset(bar), if bar.wide { 8 } else { 4 });
            config.set(at, &flags.to_le_bytes()[..width]);
            config.allow(at, &(!(bar.len - 1) & !BAR_FLAGS).to_le_bytes()[..width]);
        }
        let mut list = List { link: register::CAPABILITIES, next: register::FREE };
        for Capability { id, body } in capabilities {
            let at = config.add(&mut list, *id, body)?;
            config.capabilities.push(at);
        }
        if let Some(msix) = msix {
            check_msix(msix, bars)?;
            let place = |offset: u32| (offset | u32::from(msix.bar)).to_le_bytes();
            // The size is one less than it is (PCI 6.8.2.3).
            let size = (msix.vectors - 1).to_le_bytes();
            let body = [&size[..], &place(msix.table), &place(msix.pending)].concat();
            let at = config.add(&mut list, MSIX_ID, &body)?.start + 2;
            config.allow(at, &(msix::ENABLE | msix::FUNCTION_MASK).to_le_bytes());
            config.msix = Some(at);
        }
        Ok(config)
    }

    /// Puts a capability at the end of the list (PCI 6.7).
    fn add(&mut self, list: &mut List, id: u8, body: &[u8]) -> Result<Range<usize>> {
        let (at, end) = (list.next, list.next + 2 + body.len());
        let pointer = u8::try_from(at).ok().filter(|_| end <= LEN).ok_or_else(|| Error::Config {
            what: "capabilities of a PCI device",
            value: format!("{} bytes more at {at:#x}", 2 + body.len()),
            fix: format!("configuration space has {LEN:#x} bytes: describe fewer or shorter ones"),
        })?;
        self.set(list.link, &[pointer]);
        self.set(register::STATUS, &CAPABILITIES_LIST.to_le_bytes());
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        *list = List { link: at + 1, next: end.next_multiple_of(4) };
        Ok(at..end)
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, bits: &[u8]) {
        self.writable[at..at + bits.len()].copy_from_slice(bits);
    }

    fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    /// Reads at `offset`; what is beyond the end is 0.
    pub(super) fn read(&self, offset: usize, data: &mut [u8]) {
        data.fill(0);
        let there = self.bytes.get(offset..).unwrap_or_default();
        data.iter_mut().zip(there).for_each(|(to, from)| *to = *from);
    }

    /// Takes a write at `offset`, and says what of it concerns others.
    pub(super) fn write(&mut self, offset: usize, data: &[u8]) -> Changes {
        let bytes = self.bytes.iter_mut().zip(&self.writable).skip(offset);
        for ((byte, &writable), &new) in bytes.zip(data) {
            *byte = *byte & !writable | new & writable;
        }
        let touched = |at: Range<usize>| offset < at.end && offset.saturating_add(data.len()) > at.start;
        Changes {
            command: touched(register::COMMAND..register::STATUS),
            bars: touched(register::BARS..register::BARS + 24),
            msix: self.msix.is_some_and(|at| touched(at..at + 2)),
        }
    }

    /// The command register.
    pub(super) fn command(&self) -> u16 {
        self.word(register::COMMAND)
    }

    /// Sets bits of the command register, as firmware does.
    pub(super) fn set_command(&mut self, bits: u16) {
        let command = self.command() | bits & command::WRITABLE;
        self.set(register::COMMAND, &command.to_le_bytes());
    }

    /// MSI-X' message control register.
    pub(super) fn msix_control(&self) -> Option<u16> {
        self.msix.map(|at| self.word(at))
    }

    /// Where `bar` is programmed to be.
    pub(super) fn bar(&self, bar: &Bar) -> u64 {
        let at = bar_offset(bar);
        let mut bytes = [0; 8];
        let width = if bar.wide { 8 } else { 4 };
        bytes[..width].copy_from_slice(&self.bytes[at..at + width]);
        u64::from_le_bytes(bytes) & !BAR_FLAGS
    }

    /// Programs `bar`, as firmware does.
    pub(super) fn set_bar(&mut self, bar: &Bar, address: u64) {
        let width = if bar.wide { 8 } else { 4 };
        self.write(bar_offset(bar), &address.to_le_bytes()[..width]);
    }

    /// The described capabilities' places in configuration space.
    pub(super) fn capabilities(&self) -> &[Range<usize>] {
        &self.capabilities
    }

    /// All bytes, for a snapshot.
    pub(super) fn bytes(&self) -> &[u8; LEN] {
        &self.bytes
    }

    /// Takes over the bytes of an equal function's configuration space.
    ///
    /// # Errors
    /// [`Error::State`] where what the guest cannot change differs.
    pub(super) fn restore(&mut self, bytes: &[u8; LEN]) -> Result<()> {
        let each = || self.bytes.iter().zip(bytes).zip(&self.writable);
        if let Some(at) = each().position(|((ours, saved), writable)| (ours ^ saved) & !writable != 0) {
            return Err(Error::State {
                what: "a PCI function",
                expected: format!("{:#x} at {at:#x} of its configuration space", self.bytes[at]),
                found: format!("{:#x}", bytes[at]),
            });
        }
        self.bytes = *bytes;
        Ok(())
    }
}

/// Where the list of capabilities ends.
struct List {
    /// Where the pointer to the next capability goes.
    link: usize,
    /// Where it goes itself.
    next: usize,
}

/// What of a write concerns others than configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Changes {
    pub(super) command: bool,
    pub(super) bars: bool,
    pub(super) msix: bool,
}

/// Sets what the registers do not store: the interrupt status, and whether the slot has more functions, in what
/// was read at `offset`.
pub(super) fn overlay(offset: usize, data: &mut [u8], interrupt: bool, more: bool) {
    for (at, byte) in (offset..).zip(data) {
        match at {
            register::STATUS if interrupt => *byte |= INTERRUPT_STATUS,
            register::HEADER_TYPE if more => *byte |= MULTI_FUNCTION,
            _ => {}
        }
    }
}

fn bar_offset(bar: &Bar) -> usize {
    register::BARS + 4 * usize::from(bar.index)
}

fn check_bars(bars: &[Bar]) -> Result<()> {
    let mut taken = [false; 6];
    for bar in bars {
        let (registers, most) = if bar.wide { (2, 64 << 30) } else { (1, 2 << 30) };
        let place = usize::from(bar.index)..usize::from(bar.index) + registers;
        let free = taken.get_mut(place).filter(|place| !place.contains(&true));
        match free {
            Some(place) if bar.len.is_power_of_two() && (16..=most).contains(&bar.len) => place.fill(true),
            _ => {
                return Err(Error::Config {
                    what: "PCI BAR",
                    value: format!("{bar:?}"),
                    fix: "registers 0 to 5, each once, one of 64 bits takes two; a power of two from 16 bytes to \
                          2 GiB, with 64 bits to 64 GiB"
                        .into(),
                });
            }
        }
    }
    Ok(())
}

fn check_msix(msix: &MsixTable, bars: &[Bar]) -> Result<()> {
    let (table, pending) = (u64::from(msix.table), u64::from(msix.pending));
    let (table_end, pending_end) = (table + msix.table_len(), pending + msix.pending_len());
    let inside = bars
        .iter()
        .find(|bar| bar.index == msix.bar)
        .is_some_and(|bar| table_end <= bar.len && pending_end <= bar.len);
    let apart = table_end <= pending || pending_end <= table;
    let aligned = table.is_multiple_of(8) && pending.is_multiple_of(8);
    if (1..=2048).contains(&msix.vectors) && inside && apart && aligned {
        return Ok(());
    }
    Err(Error::Config {
        what: "MSI-X of a PCI device",
        value: format!("{msix:?}"),
        fix: "1 to 2048 vectors; table and pending bits apart, within the BAR, on multiples of 8".into(),
    })
}
