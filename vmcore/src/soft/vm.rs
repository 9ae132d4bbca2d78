//! A virtual machine of the software CPU: memory slots, doorbells, interrupts.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use vmm_sys_util::eventfd::EventFd;

use super::chip::Chipset;
use super::clock::Clock;
use super::fp::Thunks;
use super::irq_event::IrqEvents;
use super::link::{Link, attention};
use super::memory::{Memory, SlotMemory};
use super::vcpu::SoftVcpu;
use super::{MAX_VCPUS, NAME};
use crate::backend::{
    BackendConfig, BackendVcpu, BackendVm, DoorbellConfig, IoAddress, IrqRoute, Registration, Slot,
};
use crate::deterministic::{Deterministic, World};
use crate::error::{Error, Result};
use crate::irq::{IrqSink, Msi};
use crate::memory::{DirtyBitmap, MemoryError, MemoryRegion};
use crate::state::MachineState;

/// Slots are only numbers here; this many are plenty.
const MAX_SLOTS: u32 = 32_764;

/// A registered doorbell.
#[derive(Clone)]
struct Doorbell {
    config: DoorbellConfig,
    event: Arc<EventFd>,
}

/// What a VM and its vCPUs share.
pub(in crate::soft) struct Machine {
    pub(in crate::soft) memory: Memory,
    slots: Mutex<BTreeMap<u32, Arc<SlotMemory>>>,
    pub(in crate::soft) clock: Arc<Clock>,
    /// Where the VM has interrupt controllers.
    pub(in crate::soft) chipset: Option<Arc<Chipset>>,
    irq_events: Option<Arc<IrqEvents>>,
    links: Arc<ArcSwap<Vec<Arc<Link>>>>,
    change: Mutex<()>,
    doorbells: ArcSwap<Vec<Doorbell>>,
    split_lock: Mutex<()>,
    /// Generated code for x87, MMX and SSE instructions.
    pub(in crate::soft) thunks: Thunks,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Machine {
    fn slots(&self) -> MutexGuard<'_, BTreeMap<u32, Arc<SlotMemory>>> {
        lock(&self.slots)
    }

    /// The vCPUs there are.
    pub(in crate::soft) fn links(&self) -> Arc<Vec<Arc<Link>>> {
        self.links.load_full()
    }

    /// Held for an atomic access that is not aligned.
    pub(in crate::soft) fn split_lock(&self) -> MutexGuard<'_, ()> {
        lock(&self.split_lock)
    }

    /// Makes every vCPU serve `bits`, and waits until each has, or is not using guest memory.
    fn shoot_down(&self, bits: u32) {
        let links = self.links();
        links.iter().for_each(|link| link.demand(bits));
        links.iter().for_each(|link| link.wait_served(bits));
    }

    /// The vCPU is gone.
    pub(in crate::soft) fn remove_vcpu(&self, id: u32) {
        let _guard = lock(&self.change);
        let left = self.links.load().iter().filter(|link| link.id != id).cloned().collect();
        self.links.store(Arc::new(left));
        if let Some(chipset) = &self.chipset {
            chipset.remove_vcpu(id);
        }
    }

    /// Rings the doorbell at `port` where the write is one's.
    pub(in crate::soft) fn ring_port(&self, port: u16, value: u32, size: usize) -> bool {
        self.ring(IoAddress::Port(port), value.into(), size)
    }

    /// Rings the doorbell at guest-physical `gpa` where the write is one's.
    pub(in crate::soft) fn ring_mmio(&self, gpa: u64, value: u64, size: usize) -> bool {
        self.ring(IoAddress::Mmio(crate::memory::GuestAddress(gpa)), value, size)
    }

    fn ring(&self, at: IoAddress, value: u64, size: usize) -> bool {
        let doorbells = self.doorbells.load();
        let hit = doorbells.iter().find(|bell| {
            let config = &bell.config;
            let mask = if size == 8 { u64::MAX } else { (1 << (8 * size)) - 1 };
            config.at == at
                && (config.width == 0 || usize::from(config.width) == size)
                && config.value.is_none_or(|wanted| wanted == value & mask)
        });
        let Some(bell) = hit else { return false };
        // EAGAIN says that the counter is full: the event is signalled already.
        let _ = bell.event.write(1);
        true
    }
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine")
            .field("memory", &self.memory)
            .field("links", &self.links())
            .finish_non_exhaustive()
    }
}

/// A VM of the software CPU.
#[derive(Debug)]
pub(super) struct SoftVm {
    machine: Arc<Machine>,
}

impl SoftVm {
    /// # Errors
    /// [`Error::BackendUnusable`] where the host refuses memory for generated code.
    pub(super) fn new(config: &BackendConfig) -> Result<Self> {
        Self::with_clock(config, Clock::new())
    }

    /// A VM that does the same in every run.
    ///
    /// # Errors
    /// As [`SoftVm::new`].
    pub(super) fn deterministic(config: &BackendConfig, deterministic: Deterministic) -> Result<Self> {
        Self::with_clock(config, Clock::counting(Arc::new(World::new(deterministic))))
    }

    fn with_clock(config: &BackendConfig, clock: Clock) -> Result<Self> {
        let clock = Arc::new(clock);
        let chipset = config.irqchip.then(|| Arc::new(Chipset::new(clock.clone())));
        let irq_events = chipset.clone().map(IrqEvents::new);
        let machine = Machine {
            memory: Memory::default(),
            slots: Mutex::default(),
            clock,
            chipset,
            irq_events,
            links: Arc::default(),
            change: Mutex::default(),
            doorbells: ArcSwap::default(),
            split_lock: Mutex::default(),
            thunks: Thunks::new()?,
        };
        Ok(Self { machine: Arc::new(machine) })
    }

    /// What its vCPUs share, for tests of their parts.
    #[cfg(any(test, fuzzing))]
    pub(in crate::soft) fn machine(&self) -> Arc<Machine> {
        self.machine.clone()
    }

    fn chipset(&self, what: &str) -> Result<&Arc<Chipset>> {
        self.controllers(&self.machine.chipset, what)
    }

    /// What only a VM with interrupt controllers has.
    fn controllers<'a, T>(&self, part: &'a Option<T>, what: &str) -> Result<&'a T> {
        part.as_ref().ok_or_else(|| Error::Unsupported {
            what: format!("{what} of a VM without interrupt controllers"),
            backend: NAME,
            fix: "make the VM with BackendConfig::irqchip".into(),
        })
    }

    /// Refuses what another thread would serve, at its own time.
    fn refuse_threads(&self, what: &str, fix: &str) -> Result<()> {
        if self.machine.clock.world().is_none() {
            return Ok(());
        }
        Err(Error::Unsupported {
            what: format!("{what} of a deterministic VM"),
            backend: NAME,
            fix: fix.into(),
        })
    }

    fn no_slot(slot: Slot, slots: &BTreeMap<u32, Arc<SlotMemory>>) -> Error {
        Error::Config {
            what: "memory slot",
            value: format!("{} has no memory", slot.0),
            fix: format!("slots with memory: {:?}", slots.keys().collect::<Vec<_>>()),
        }
    }
}

impl IrqSink for SoftVm {
    fn set_irq(&self, gsi: u32, high: bool) -> Result<()> {
        self.chipset("the interrupt lines")?.set_irq(gsi, high)
    }

    fn send_msi(&self, msi: Msi) -> Result<()> {
        self.chipset("message-signalled interrupts")?.send_msi(msi);
        Ok(())
    }
}

impl BackendVm for SoftVm {
    fn name(&self) -> &'static str {
        NAME
    }

    fn max_slots(&self) -> u32 {
        MAX_SLOTS
    }

    fn map(&self, slot: Slot, region: Arc<MemoryRegion>) -> Result<()> {
        let new = region.range();
        if slot.0 >= MAX_SLOTS {
            return Err(MemoryError::NoSlots { new, limit: MAX_SLOTS, backend: NAME }.into());
        }
        let mut slots = self.machine.slots();
        if let Some(existing) = slots.get(&slot.0) {
            return Err(Error::Conflict {
                kind: "memory slot",
                new: format!("{} for {new}", slot.0),
                existing: format!("the same slot for {}", existing.region.range()),
            });
        }
        if let Some(existing) = slots.values().map(|s| s.region.range()).find(|r| r.overlaps(&new)) {
            return Err(MemoryError::Overlap { new, existing }.into());
        }
        slots.insert(slot.0, SlotMemory::new(region, self.machine.links.clone()));
        self.machine.memory.replace(&slots);
        self.machine.shoot_down(attention::MEMORY);
        Ok(())
    }

    fn unmap(&self, slot: Slot) -> Result<()> {
        let mut slots = self.machine.slots();
        if slots.remove(&slot.0).is_none() {
            return Err(Self::no_slot(slot, &slots));
        }
        self.machine.memory.replace(&slots);
        self.machine.shoot_down(attention::MEMORY);
        Ok(())
    }

    fn take_dirty(&self, slot: Slot) -> Result<DirtyBitmap> {
        let slots = self.machine.slots();
        let memory = slots.get(&slot.0).ok_or_else(|| Self::no_slot(slot, &slots))?;
        if !memory.region.tracks_dirty() {
            return Err(Error::Config {
                what: "dirty log",
                value: format!("of slot {}, {}, which does not record writes", slot.0, memory.region.range()),
                fix: "make the region with RegionBuilder::track_dirty".into(),
            });
        }
        // A vCPU that writes through a translation it had before is stopped from doing so before this
        // returns: what it writes until then is in pages that this log names.
        let dirty = memory.take_dirty();
        self.machine.shoot_down(attention::WRITES);
        Ok(dirty)
    }

    fn doorbell_on(&self, config: DoorbellConfig, event: Arc<EventFd>) -> Result<Registration> {
        self.refuse_threads("a doorbell", "serve the write itself, on the thread of the vCPU")?;
        let valid: &[u8] =
            if matches!(config.at, IoAddress::Port(_)) { &[1, 2, 4] } else { &[0, 1, 2, 4, 8] };
        if !valid.contains(&config.width) {
            return Err(Error::Config {
                what: "width of a doorbell",
                value: format!("{} bytes at {:?}", config.width, config.at),
                fix: format!("one of {valid:?}"),
            });
        }
        let too_large = |value| config.width < 8 && value >= 1u64 << (8 * config.width);
        if config.width != 0 && config.value.is_some_and(too_large) {
            return Err(Error::Config {
                what: "value of a doorbell",
                value: format!(
                    "{:#x} in {} bytes at {:?}",
                    config.value.unwrap_or(0),
                    config.width,
                    config.at
                ),
                fix: "give a value that fits the width".into(),
            });
        }
        if config.width == 0 && config.value.is_some() {
            return Err(Error::Config {
                what: "doorbell",
                value: format!("a value but no width at {:?}", config.at),
                fix: "say how wide the value is, or let any value ring".into(),
            });
        }
        let _guard = lock(&self.machine.change);
        let mut doorbells = Vec::clone(&self.machine.doorbells.load());
        let taken = |bell: &&Doorbell| {
            let (a, b) = (&bell.config, &config);
            let same_width = a.width == b.width || a.width == 0 || b.width == 0;
            a.at == b.at && same_width && (a.value == b.value || a.value.is_none() || b.value.is_none())
        };
        if let Some(existing) = doorbells.iter().find(taken) {
            return Err(Error::Conflict {
                kind: "doorbell",
                new: format!("{config:?}"),
                existing: format!("another doorbell there, {:?}", existing.config),
            });
        }
        doorbells.push(Doorbell { config, event: event.clone() });
        self.machine.doorbells.store(Arc::new(doorbells));
        let machine = Arc::downgrade(&self.machine);
        Ok(Registration::new(event, move || {
            let Some(machine) = machine.upgrade() else { return };
            let _guard = lock(&machine.change);
            // No two have the same place.
            let left = machine.doorbells.load().iter().filter(|b| b.config != config).cloned().collect();
            machine.doorbells.store(Arc::new(left));
        }))
    }

    fn set_level_triggered(&self, irqs: u16) -> Result<()> {
        self.controllers(&self.machine.chipset, "level-triggered interrupts")?.set_level_triggered(irqs);
        Ok(())
    }

    fn irq_events_pay(&self) -> bool {
        false
    }

    fn irq_event(&self, route: IrqRoute) -> Result<Registration> {
        let events = self.controllers(&self.machine.irq_events, "interrupt events")?;
        self.refuse_threads("an interrupt event", "use IrqSink, on the thread of the vCPU")?;
        events.register(route)
    }

    fn create_vcpu(&self, id: u32) -> Result<Box<dyn BackendVcpu>> {
        if id >= MAX_VCPUS {
            return Err(Error::Config {
                what: "vCPU id",
                value: id.to_string(),
                fix: format!("the {NAME} backend has ids from 0 to {}", MAX_VCPUS - 1),
            });
        }
        let link = Link::new(id);
        {
            let _guard = lock(&self.machine.change);
            let mut links = Vec::clone(&self.machine.links.load());
            if links.iter().any(|link| link.id == id) {
                return Err(Error::Conflict {
                    kind: "vCPU",
                    new: id.to_string(),
                    existing: "a vCPU with the same id".into(),
                });
            }
            links.push(link.clone());
            self.machine.links.store(Arc::new(links));
            if let Some(chipset) = &self.machine.chipset {
                chipset.add_vcpu(link.clone());
            }
        }
        Ok(Box::new(SoftVcpu::new(self.machine.clone(), link)))
    }

    fn world(&self) -> Option<&Arc<World>> {
        self.machine.clock.world()
    }

    fn save(&self) -> Result<MachineState> {
        if let Some(events) = &self.machine.irq_events {
            events.settle();
        }
        let irqchip = self.machine.chipset.as_ref().map(|chipset| chipset.save());
        Ok(MachineState { irqchip, clock_ns: self.machine.clock.now() })
    }

    fn restore(&self, state: &MachineState) -> Result<()> {
        self.machine.clock.set(state.clock_ns);
        match (&state.irqchip, &self.machine.chipset) {
            (Some(irqchip), Some(chipset)) => chipset.restore(irqchip),
            (None, None) => Ok(()),
            (saved, _) => {
                let name = |has| if has { "a VM with interrupt controllers" } else { "a VM without" };
                Err(Error::State {
                    what: "the machine",
                    expected: name(self.machine.chipset.is_some()).into(),
                    found: name(saved.is_some()).into(),
                })
            }
        }
    }
}
