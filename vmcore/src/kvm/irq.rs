//! GSI routes, interrupt events (irqfd) and doorbells (ioeventfd).

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, MutexGuard, PoisonError, Weak};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_IRQ_ROUTES, KvmIrqRouting, kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch,
    kvm_ioeventfd_flag_nr_deassign, kvm_ioeventfd_flag_nr_pio, kvm_irq_routing_entry,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::sys;
use super::vm::Shared;
use crate::backend::{DoorbellConfig, IoAddress, IrqRoute, Registration};
use crate::error::{Error, Result};
use crate::irq::Msi;

/// GSIs 0 to 23 are the IOAPIC's pins, the first 16 the PICs' inputs too.
const PINS: u32 = 24;

/// Entries of the routing table that the pins take.
const PIN_ENTRIES: usize = 40;

/// The low and high half of an address.
pub(super) fn halves(value: u64) -> [u32; 2] {
    #[expect(clippy::cast_possible_truncation, reason = "the halves are what is wanted")]
    [value as u32, (value >> 32) as u32]
}

/// Refuses what is not an interrupt input.
pub(super) fn check_gsi(gsi: u32) -> Result<()> {
    if gsi < PINS {
        return Ok(());
    }
    Err(Error::Config {
        what: "interrupt",
        value: format!("GSI {gsi}"),
        fix: format!("the machine has GSIs 0 to {}; messages have no GSI", PINS - 1),
    })
}

/// The messages that have a GSI: entry `n` is GSI `24 + n`.
///
/// The kernel's table is made of them and of the pins whenever they change. Until then it has the
/// one that KVM_CREATE_IRQCHIP sets up, which is the same for the pins.
#[derive(Debug, Default)]
pub(super) struct Routes {
    messages: Vec<Option<Msi>>,
}

impl Routes {
    /// Most messages there can be.
    const LIMIT: usize = KVM_MAX_IRQ_ROUTES - PIN_ENTRIES;

    fn table(&self) -> Vec<kvm_irq_routing_entry> {
        let mut table = Vec::with_capacity(PIN_ENTRIES + self.messages.len());
        for gsi in 0..PINS {
            let mut add = |irqchip, pin| {
                let mut entry =
                    kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
                entry.u.irqchip.irqchip = irqchip;
                entry.u.irqchip.pin = pin;
                table.push(entry);
            };
            match gsi {
                0..8 => add(KVM_IRQCHIP_PIC_MASTER, gsi),
                8..16 => add(KVM_IRQCHIP_PIC_SLAVE, gsi - 8),
                _ => {}
            }
            add(KVM_IRQCHIP_IOAPIC, gsi);
        }
        for (gsi, msi) in (PINS..).zip(&self.messages) {
            let Some(msi) = msi else { continue };
            let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
            let [low, high] = halves(msi.address);
            entry.u.msi.address_lo = low;
            entry.u.msi.address_hi = high;
            entry.u.msi.data = msi.data;
            table.push(entry);
        }
        table
    }

    /// Takes a free GSI for `msi`, or none where all are taken.
    fn add(&mut self, msi: Msi) -> Option<u32> {
        let at = match self.messages.iter().position(Option::is_none) {
            Some(free) => free,
            None if self.messages.len() < Self::LIMIT => {
                self.messages.push(None);
                self.messages.len() - 1
            }
            None => return None,
        };
        self.messages[at] = Some(msi);
        u32::try_from(at).ok().map(|at| PINS + at)
    }

    fn remove(&mut self, gsi: u32) {
        if let Some(entry) = self.messages.get_mut((gsi - PINS) as usize) {
            *entry = None;
        }
        while let Some(None) = self.messages.last() {
            self.messages.pop();
        }
    }
}

impl Shared {
    fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_routing(&self, routes: &Routes) -> Result<()> {
        let table = KvmIrqRouting::from_entries(&routes.table())
            .map_err(|e| Error::os("KVM_SET_GSI_ROUTING", "", io::Error::other(e.to_string())))?;
        self.fd.set_gsi_routing(&table).map_err(|e| {
            Error::os("KVM_SET_GSI_ROUTING", format_args!("{} messages", routes.messages.len()), e)
        })
    }

    fn add_message(&self, msi: Msi) -> Result<u32> {
        let mut routes = self.routes();
        let gsi = routes.add(msi).ok_or_else(|| Error::Unsupported {
            what: format!("an interrupt event for one more message than {}", Routes::LIMIT),
            backend: super::NAME,
            fix: "drop the registrations of messages that are no longer used".into(),
        })?;
        self.set_routing(&routes).inspect_err(|_| routes.remove(gsi))?;
        Ok(gsi)
    }

    fn remove_message(&self, gsi: u32) {
        let mut routes = self.routes();
        routes.remove(gsi);
        if let Err(error) = self.set_routing(&routes) {
            log::error!("a message's route could not be removed: {error}");
        }
    }
}

fn event() -> Result<Arc<EventFd>> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Arc::new).map_err(|e| Error::os("eventfd", "", e))
}

/// Makes writing an event raise an interrupt.
pub(super) fn irq_event(vm: &Arc<Shared>, route: IrqRoute) -> Result<Registration> {
    let event = event()?;
    let (gsi, message) = match route {
        IrqRoute::Gsi(gsi) => {
            check_gsi(gsi)?;
            (gsi, false)
        }
        IrqRoute::Msi(msi) => (vm.add_message(msi)?, true),
    };
    if let Err(e) = vm.fd.register_irqfd(&event, gsi) {
        if message {
            vm.remove_message(gsi);
        }
        return Err(Error::os("KVM_IRQFD", format_args!("GSI {gsi}"), e));
    }
    let (weak, fd) = (Arc::downgrade(vm), event.clone());
    Ok(Registration::new(event, move || {
        // With the VM its registrations are gone too.
        let Some(vm) = Weak::upgrade(&weak) else { return };
        if let Err(error) = vm.fd.unregister_irqfd(&fd, gsi) {
            log::error!("the interrupt event of GSI {gsi} could not be removed: {error}");
        }
        if message {
            vm.remove_message(gsi);
        }
    }))
}

/// Makes a guest's write signal an event.
pub(super) fn doorbell(
    vm: &Arc<Shared>,
    config: DoorbellConfig,
    event: Arc<EventFd>,
) -> Result<Registration> {
    let DoorbellConfig { at, width, value } = config;
    let any_width = width == 0 && matches!(at, IoAddress::Mmio(_)) && value.is_none();
    let widest = if matches!(at, IoAddress::Port(_)) { 4 } else { 8 };
    if !(any_width || matches!(width, 1 | 2 | 4 | 8) && width <= widest) {
        return Err(Error::Config {
            what: "doorbell width",
            value: format!("{width} bytes for {config:?}"),
            fix: "1, 2 or 4 bytes; on MMIO also 8, or 0 for any width where any value rings".into(),
        });
    }
    if let Some(value) = value.filter(|v| width < 8 && v >> (8 * width) != 0) {
        return Err(Error::Config {
            what: "doorbell value",
            value: format!("{value:#x}"),
            fix: format!("a value of {width} bytes"),
        });
    }
    let mut flags = 0;
    let addr = match at {
        IoAddress::Port(port) => {
            flags |= 1 << kvm_ioeventfd_flag_nr_pio;
            u64::from(port)
        }
        IoAddress::Mmio(address) => address.0,
    };
    if value.is_some() {
        flags |= 1 << kvm_ioeventfd_flag_nr_datamatch;
    }
    let argument = kvm_ioeventfd {
        datamatch: value.unwrap_or(0),
        addr,
        len: u32::from(width),
        fd: event.as_raw_fd(),
        flags,
        ..Default::default()
    };
    sys::ioeventfd(&vm.fd, &argument).map_err(|e| match e.raw_os_error() {
        Some(libc::EEXIST) => Error::Conflict {
            kind: "doorbell",
            new: format!("{config:?}"),
            existing: "another doorbell at that place".into(),
        },
        _ => Error::os("KVM_IOEVENTFD", format_args!("{config:?}"), e),
    })?;
    let (weak, fd) = (Arc::downgrade(vm), event.clone());
    Ok(Registration::new(event, move || {
        let Some(vm) = Weak::upgrade(&weak) else { return };
        let flags = argument.flags | 1 << kvm_ioeventfd_flag_nr_deassign;
        let undo = kvm_ioeventfd { flags, fd: fd.as_raw_fd(), ..argument };
        if let Err(error) = sys::ioeventfd(&vm.fd, &undo) {
            log::error!("the doorbell {config:?} could not be removed: {error}");
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freed_gsis_are_used_again_and_the_table_shrinks() {
        let mut routes = Routes::default();
        let msi = Msi { address: 0xfee0_0000, data: 0x31 };
        assert_eq!([routes.add(msi), routes.add(msi), routes.add(msi)], [Some(24), Some(25), Some(26)]);
        routes.remove(25);
        assert_eq!(routes.table().len(), PIN_ENTRIES + 2);
        assert_eq!(routes.add(msi), Some(25));
        routes.remove(26);
        routes.remove(25);
        assert_eq!(routes.messages.len(), 1);
    }

    #[test]
    fn messages_run_out_without_a_panic() {
        let mut routes = Routes::default();
        for _ in 0..Routes::LIMIT {
            assert!(routes.add(Msi::default()).is_some());
        }
        assert_eq!(routes.add(Msi::default()), None);
        assert_eq!(routes.table().len(), KVM_MAX_IRQ_ROUTES);
    }
}
