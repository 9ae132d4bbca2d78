//! The interrupt controllers and timers of a PC.
//!
//! Each chip has its own lock, and of two at most one is held at a time, except that the I/O APIC sends
//! its messages under its own: they arrive in the order in which it accounts for them.

mod bus;
mod counter;
mod ioapic;
mod lapic;
mod pic;
mod pit;
mod posted;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::ioapic::Ioapic;
use self::pic::Pics;
use self::pit::Pit;
use super::clock::Clock;
use super::link::{Link, attention};
use crate::error::{Error, Result};
use crate::irq::Msi;
use crate::state::IrqchipState;

use self::bus::ApicBus;
pub(in crate::soft) use self::bus::{Destination, Message};
pub(in crate::soft) use self::lapic::Lapic;
pub(in crate::soft) use self::posted::{Posted, Signals};

/// Inputs of each kind: the PICs' are the ISA interrupts.
const ISA_IRQS: u32 = 16;
/// The interrupt of the PIT.
const PIT_GSI: u32 = 0;
/// No deadline.
const NEVER: u64 = u64::MAX;

/// PICs, IOAPIC and PIT, shared by the vCPUs. Methods may be called from any thread.
#[derive(Debug)]
pub(in crate::soft) struct Chipset {
    apics: ApicBus,
    clock: Arc<Clock>,
    pics: Mutex<Pics>,
    /// The PICs' output, kept here so that looking at it needs no lock.
    pic_output: AtomicBool,
    ioapic: Mutex<Ioapic>,
    pit: Mutex<Pit>,
    /// When the PIT has something to do next, in ns; changed under its lock.
    pit_deadline: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Refuses what is not an interrupt input.
///
/// # Errors
/// Where there is no GSI of that number.
pub(in crate::soft) fn check_gsi(gsi: u32) -> Result<usize> {
    usize::try_from(gsi).ok().filter(|&pin| pin < ioapic::PINS).ok_or_else(|| Error::Config {
        what: "interrupt",
        value: format!("GSI {gsi}"),
        fix: format!("the machine has GSIs 0 to {}; messages have no GSI", ioapic::PINS - 1),
    })
}

impl Chipset {
    pub(in crate::soft) fn new(clock: Arc<Clock>) -> Self {
        Self {
            apics: ApicBus::default(),
            clock,
            pics: Mutex::new(Pics::new()),
            pic_output: AtomicBool::new(false),
            ioapic: Mutex::new(Ioapic::new()),
            pit: Mutex::new(Pit::new()),
            pit_deadline: AtomicU64::new(NEVER),
        }
    }

    /// Asks vCPU 0, to which the PICs and the PIT are wired, for attention.
    fn demand_first(&self, bits: u32) {
        if let Some(link) = self.apics.find(0) {
            link.demand(bits);
        }
    }

    /// Uses the PICs, and interrupts vCPU 0 where their output rises.
    fn with_pics<R>(&self, act: impl FnOnce(&mut Pics) -> R) -> R {
        let mut pics = lock(&self.pics);
        let result = act(&mut pics);
        let high = pics.output();
        let rises = !self.pic_output.swap(high, Ordering::SeqCst) && high;
        drop(pics);
        if rises {
            self.demand_first(attention::INTERRUPT);
        }
        result
    }

    /// Uses the PIT at the present time.
    fn with_pit<R>(&self, act: impl FnOnce(&mut Pit, u64) -> R) -> R {
        let mut pit = lock(&self.pit);
        let result = act(&mut pit, self.clock.now());
        self.pit_deadline.store(pit.deadline().unwrap_or(NEVER), Ordering::SeqCst);
        result
    }

    /// Makes a vCPU's local APIC known, so that interrupts find it. vCPU 0 gets the PIC's.
    pub(in crate::soft) fn add_vcpu(&self, link: Arc<Link>) {
        self.apics.add(&link);
    }

    /// The vCPU is gone.
    pub(in crate::soft) fn remove_vcpu(&self, id: u32) {
        self.apics.remove(id);
    }

    /// Sets the level of global system interrupt `gsi`: GSI n is IOAPIC pin n, and for n below 16 also
    /// input n of the PICs (2 being their cascade).
    ///
    /// # Errors
    /// Where there is no such input.
    pub(in crate::soft) fn set_irq(&self, gsi: u32, high: bool) -> Result<()> {
        let pin = check_gsi(gsi)?;
        if let Ok(irq) = u8::try_from(gsi)
            && gsi < ISA_IRQS
        {
            self.with_pics(|pics| pics.set_irq(irq, high));
        }
        lock(&self.ioapic).set_line(pin, high, |msi| self.send_msi(msi));
        Ok(())
    }

    /// Makes the ISA interrupts of the bits in `irqs` level-triggered at the PICs.
    pub(in crate::soft) fn set_level_triggered(&self, irqs: u16) {
        self.with_pics(|pics| {
            for (port, levels) in (0x4d0..).zip(irqs.to_le_bytes()) {
                let levels = pics.read(port) | levels;
                pics.write(port, levels);
            }
        });
    }

    /// Delivers a message (SDM vol. 3A, 11.11): from devices, the IOAPIC, and ICR writes.
    pub(in crate::soft) fn send_msi(&self, msi: Msi) {
        self.apics.send_msi(msi);
    }

    /// The local APICs.
    pub(in crate::soft) fn apics(&self) -> &ApicBus {
        &self.apics
    }

    /// Whether `port` is one of the PICs', ELCR's, PIT's, or 0x61.
    pub(in crate::soft) fn claims(port: u16) -> bool {
        Pics::claims(port) || Pit::claims(port)
    }

    /// Reads one byte from a port that [`Chipset::claims`].
    pub(in crate::soft) fn port_read(&self, port: u16) -> u8 {
        match port {
            _ if Pics::claims(port) => self.with_pics(|pics| pics.read(port)),
            _ if Pit::claims(port) => lock(&self.pit).read(self.clock.now(), port),
            _ => 0xff,
        }
    }

    /// Writes one byte to a port that [`Chipset::claims`].
    pub(in crate::soft) fn port_write(&self, port: u16, value: u8) {
        if Pics::claims(port) {
            self.with_pics(|pics| pics.write(port, value));
        } else if Pit::claims(port) {
            let before = self.deadline();
            self.with_pit(|pit, now| pit.write(now, port, value));
            if self.deadline() != before {
                // vCPU 0 may sleep for too long, or be another than the one that writes.
                self.demand_first(attention::TIMER);
            }
        }
    }

    /// Reads from the IOAPIC at `offset` from its base 0xFEC0_0000.
    pub(in crate::soft) fn ioapic_read(&self, offset: u64) -> u32 {
        lock(&self.ioapic).read(offset)
    }

    /// Writes to the IOAPIC.
    pub(in crate::soft) fn ioapic_write(&self, offset: u64, value: u32) {
        lock(&self.ioapic).write(offset, value, |msi| self.send_msi(msi));
    }

    /// A local APIC has ended the level-triggered interrupt `vector`.
    pub(in crate::soft) fn end_of_interrupt(&self, vector: u8) {
        lock(&self.ioapic).end_of_interrupt(vector, |msi| self.send_msi(msi));
    }

    /// vCPU 0 takes the PIC's interrupt (two INTA cycles); `None` where the PIC's output has gone low.
    pub(in crate::soft) fn acknowledge(&self) -> Option<u8> {
        self.with_pics(|pics| {
            // The output goes low in between: what is left rises anew.
            self.pic_output.store(false, Ordering::SeqCst);
            pics.acknowledge()
        })
    }

    /// Whether the PIC's output is high.
    pub(in crate::soft) fn pic_output(&self) -> bool {
        self.pic_output.load(Ordering::SeqCst)
    }

    /// Raises what the PIT owes by now; vCPU 0 calls this.
    pub(in crate::soft) fn poll(&self) {
        if self.clock.now() < self.pit_deadline.load(Ordering::SeqCst) {
            return;
        }
        if self.with_pit(Pit::take_interrupt) {
            for high in [true, false] {
                // There is such an input.
                let _ = self.set_irq(PIT_GSI, high);
            }
        }
    }

    /// The machine's time in ns at which [`Chipset::poll`] has something to do next.
    pub(in crate::soft) fn deadline(&self) -> Option<u64> {
        Some(self.pit_deadline.load(Ordering::SeqCst)).filter(|&at| at != NEVER)
    }

    pub(in crate::soft) fn save(&self) -> IrqchipState {
        IrqchipState {
            pics: lock(&self.pics).save(),
            ioapic: lock(&self.ioapic).save(),
            pit: lock(&self.pit).save(self.clock.now()),
        }
    }

    /// # Errors
    /// Where the state cannot be one of this chipset.
    pub(in crate::soft) fn restore(&self, state: &IrqchipState) -> Result<()> {
        lock(&self.ioapic).restore(&state.ioapic, |msi| self.send_msi(msi))?;
        self.with_pics(|pics| pics.restore(&state.pics));
        self.with_pit(|pit, now| pit.restore(now, &state.pit));
        self.demand_first(attention::TIMER);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
