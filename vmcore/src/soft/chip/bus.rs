//! What connects the local APICs with each other, the IOAPIC and devices (SDM vol. 3A, 11.6, 11.11).

use std::sync::Arc;

use arc_swap::ArcSwap;

use super::posted::Mode;
use crate::irq::Msi;
use crate::soft::link::{Link, attention};

/// For whom a message is (SDM vol. 3A, 11.6.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::soft) enum Destination {
    /// The APIC with this id.
    Physical(u32),
    /// The APICs whose logical ids this selects, in the format of the receiver's mode.
    Logical(u32),
    All,
}

impl Destination {
    /// The 8-bit destination of an xAPIC, the IOAPIC or a message; 0xFF is everyone.
    pub(in crate::soft) fn narrow(to: u8, logical: bool) -> Self {
        match (to, logical) {
            (0xff, _) => Self::All,
            (to, true) => Self::Logical(to.into()),
            (to, false) => Self::Physical(to.into()),
        }
    }

    /// The 32-bit destination of an x2APIC (11.12.9).
    pub(in crate::soft) fn wide(to: u32, logical: bool) -> Self {
        match (to, logical) {
            (u32::MAX, _) => Self::All,
            (to, true) => Self::Logical(to),
            (to, false) => Self::Physical(to),
        }
    }
}

/// Delivery modes of messages, as encoded (SDM vol. 3A, 11.6.1).
pub(super) mod delivery {
    pub(in crate::soft::chip) const FIXED: u32 = 0;
    pub(in crate::soft::chip) const LOWEST: u32 = 1;
    pub(in crate::soft::chip) const NMI: u32 = 4;
    pub(in crate::soft::chip) const INIT: u32 = 5;
    pub(in crate::soft::chip) const SIPI: u32 = 6;
    pub(in crate::soft::chip) const EXTINT: u32 = 7;
}

/// A message to local APICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::soft) struct Message {
    pub(in crate::soft) to: Destination,
    /// Not for the APIC of this vCPU, who sends it.
    pub(in crate::soft) except: Option<u32>,
    /// One of [`delivery`].
    pub(in crate::soft) mode: u32,
    pub(in crate::soft) vector: u8,
    pub(in crate::soft) level: bool,
}

/// The local APICs of a machine. Methods may be called from any thread.
#[derive(Debug, Default)]
pub(in crate::soft) struct ApicBus {
    links: ArcSwap<Vec<Arc<Link>>>,
}

impl ApicBus {
    /// The vCPU with number `id`.
    pub(in crate::soft) fn find(&self, id: u32) -> Option<Arc<Link>> {
        self.links.load().iter().find(|link| link.id == id).cloned()
    }

    pub(in crate::soft) fn add(&self, link: &Arc<Link>) {
        self.links.rcu(|links| links.iter().chain([link]).cloned().collect::<Vec<_>>());
    }

    pub(in crate::soft) fn remove(&self, id: u32) {
        self.links.rcu(|links| links.iter().filter(|link| link.id != id).cloned().collect::<Vec<_>>());
    }

    /// Delivers a message-signalled interrupt. Writes to other addresses are no interrupts.
    pub(in crate::soft) fn send_msi(&self, msi: Msi) {
        const AREA: u64 = 0xfee;
        const LOGICAL: u64 = 1 << 2;
        const REDIRECTION_HINT: u64 = 1 << 3;
        const LEVEL: u32 = 1 << 15;
        if msi.address >> 20 != AREA {
            log::debug!("soft: a message to {:#x} reaches no local APIC", msi.address);
            return;
        }
        // Bits 12 to 19.
        let [_, _, id, ..] = (msi.address << 4).to_le_bytes();
        let [vector, ..] = msi.data.to_le_bytes();
        let mode = match msi.data >> 8 & 7 {
            delivery::FIXED if msi.address & REDIRECTION_HINT != 0 => delivery::LOWEST,
            mode => mode,
        };
        let to = Destination::narrow(id, msi.address & LOGICAL != 0);
        self.deliver(Message { to, except: None, mode, vector, level: msi.data & LEVEL != 0 });
    }

    /// Delivers `message` to whom it is for, and gets their attention.
    pub(in crate::soft) fn deliver(&self, message: Message) {
        let mode = match message.mode {
            delivery::FIXED => Mode::Fixed,
            delivery::LOWEST => return self.deliver_lowest(message),
            delivery::NMI => Mode::Nmi,
            delivery::INIT => Mode::Init,
            delivery::SIPI => Mode::Sipi,
            // ExtINT: the PIC's output reaches the CPU by its LINT0, and not as a message. SMI: there is
            // no system management mode. 3 is reserved.
            mode => {
                log::debug!("soft: an interrupt message of mode {mode} is dropped");
                return;
            }
        };
        let links = self.links.load();
        for link in links.iter().filter(|link| Some(link.id) != message.except) {
            let address = link.posted.address();
            // Disabled by software, an APIC only takes NMI, INIT and SIPI (11.4.7.2).
            if address.matches(message.to) && (mode != Mode::Fixed || address.software_enabled) {
                link.posted.post(mode, message.vector, message.level);
                link.demand(attention::INTERRUPT);
            }
        }
    }

    /// Delivers to the one of the receivers with the lowest task priority; where several have it, the
    /// vector decides, so that one vector stays on one CPU.
    fn deliver_lowest(&self, message: Message) {
        let links = self.links.load();
        let willing = |link: &&Arc<Link>| {
            let address = link.posted.address();
            Some(link.id) != message.except && address.software_enabled && address.matches(message.to)
        };
        let candidates = || links.iter().filter(willing);
        let Some(lowest) = candidates().map(|link| link.posted.priority()).min() else { return };
        // Priorities may change meanwhile: then any receiver is as good.
        let equals = candidates().filter(|link| link.posted.priority() == lowest).count();
        let nth = usize::from(message.vector) % equals.max(1);
        let chosen = candidates().filter(|link| link.posted.priority() == lowest).nth(nth);
        let Some(link) = chosen.or_else(|| candidates().next()) else { return };
        link.posted.post(Mode::Fixed, message.vector, message.level);
        link.demand(attention::INTERRUPT);
    }
}
