//! A KVM virtual machine: memory slots, vCPUs, and the state of the machine.
#![expect(unsafe_code, reason = "memory slots hand host memory to the guest")]

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use kvm_bindings::{
    KVM_CAP_EXCEPTION_PAYLOAD, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, KVM_PIT_SPEAKER_DUMMY, kvm_clock_data, kvm_enable_cap,
    kvm_irqchip, kvm_msi, kvm_pit_config, kvm_pit_state2, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::irq::Routes;
use super::sys::{self, XsaveSize};
use super::vcpu::KvmVcpu;
use super::{Kvm, NAME, System};
use crate::backend::{BackendConfig, BackendVcpu, BackendVm, DoorbellConfig, IrqRoute, Registration, Slot};
use crate::error::{Error, Result};
use crate::irq::{IrqSink, Msi};
use crate::memory::{DirtyBitmap, MemoryError, MemoryRegion, PAGE_SIZE};
use crate::state::{IoapicState, IrqchipState, MachineState};

/// Three pages that KVM on Intel needs for real mode, in the hole under 4 GiB (KVM_SET_TSS_ADDR).
const TSS_ADDRESS: usize = 0xfffb_d000;
/// One page below them, for the identity page table (KVM_SET_IDENTITY_MAP_ADDR).
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// What a VM, its vCPUs and its registrations share.
///
/// The order of the fields is the order in which they go: the VM first, then the memory it maps.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) fd: VmFd,
    slots: Mutex<BTreeMap<u32, Arc<MemoryRegion>>>,
    pub(super) routes: Mutex<Routes>,
    /// The machine has interrupt controllers and a PIT, once it needs them.
    pub(super) irqchip: bool,
    irqchip_made: OnceLock<()>,
    /// Taken while they are made.
    irqchip_making: Mutex<()>,
    pub(super) xsave_size: XsaveSize,
    pub(super) system: Arc<System>,
    pub(super) tsc_control: bool,
    /// A vCPU's TSC has been restored since the machine was.
    pub(super) tsc_restored: AtomicBool,
    /// KVM_CAP_EXCEPTION_PAYLOAD is enabled.
    pub(super) exception_payload: bool,
    /// KVM has system management mode.
    pub(super) smm: bool,
    read_only_memory: bool,
    max_slots: u32,
}

impl Shared {
    fn slots(&self) -> MutexGuard<'_, BTreeMap<u32, Arc<MemoryRegion>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Copies guest memory at `at` to `buf`, as far as there is memory; returns how much.
    pub(super) fn peek(&self, at: u64, buf: &mut [u8]) -> usize {
        let slots = self.slots();
        let mut done = 0;
        while let Some(next) = at.checked_add(done as u64).filter(|_| done < buf.len()) {
            let covers = |r: &&Arc<MemoryRegion>| next.checked_sub(r.base().0).is_some_and(|o| o < r.len());
            let Some(region) = slots.values().find(covers) else { break };
            let offset = next - region.base().0;
            let here = usize::try_from(region.len() - offset).unwrap_or(usize::MAX).min(buf.len() - done);
            if region.read(offset, &mut buf[done..done + here]).is_err() {
                break;
            }
            done += here;
        }
        done
    }
}

/// A VM of the KVM backend.
#[derive(Debug)]
pub(super) struct KvmVm {
    shared: Arc<Shared>,
}

impl KvmVm {
    pub(super) fn new(kvm: &Kvm, config: &BackendConfig) -> Result<Self> {
        let fd = loop {
            match kvm.system.fd.create_vm() {
                // A signal can interrupt the allocation; the call has then done nothing.
                Err(e) if e.errno() == libc::EINTR => {}
                other => break other.map_err(|e| Error::os("KVM_CREATE_VM", "", e))?,
            }
        };
        let has = |cap| fd.check_extension(cap);
        let exception_payload = fd.check_extension_raw(KVM_CAP_EXCEPTION_PAYLOAD.into()) > 0;
        if exception_payload {
            // Keeps CR2 and DR6 of an exception that is pending apart from the registers.
            let cap =
                kvm_enable_cap { cap: KVM_CAP_EXCEPTION_PAYLOAD, args: [1, 0, 0, 0], ..Default::default() };
            fd.enable_cap(&cap).map_err(|e| Error::os("KVM_ENABLE_CAP", "KVM_CAP_EXCEPTION_PAYLOAD", e))?;
        }
        let max_slots = u32::try_from(fd.check_extension_int(Cap::NrMemslots)).unwrap_or(0);
        let shared = Shared {
            slots: Mutex::default(),
            routes: Mutex::new(Routes::default()),
            irqchip: config.irqchip,
            irqchip_made: OnceLock::new(),
            irqchip_making: Mutex::default(),
            xsave_size: XsaveSize::from_capability(fd.check_extension_int(Cap::Xsave2)),
            system: kvm.system.clone(),
            tsc_control: has(Cap::TscControl),
            tsc_restored: AtomicBool::new(false),
            exception_payload,
            smm: has(Cap::X86Smm),
            read_only_memory: has(Cap::ReadonlyMem),
            // What the kernel answers where it does not know is 32.
            max_slots: if max_slots == 0 { 32 } else { max_slots },
            fd,
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Makes interrupt controllers and PIT, where the machine has them and this was not done yet.
    ///
    /// Not with the VM, but when they are needed, which the first vCPU does. Each of these devices on
    /// KVM's buses begins an SRCU grace period, and the next memory slot waits for its end: several
    /// milliseconds for memory that is mapped after them, nothing for memory mapped before.
    fn make_irqchip(&self) -> Result<()> {
        if !self.shared.irqchip || self.shared.irqchip_made.get().is_some() {
            return Ok(());
        }
        let _making = self.shared.irqchip_making.lock().unwrap_or_else(PoisonError::into_inner);
        if self.shared.irqchip_made.get().is_none() {
            self.create_irqchip()?;
        }
        self.shared.irqchip_made.get_or_init(|| ());
        Ok(())
    }

    fn create_irqchip(&self) -> Result<()> {
        let fd = &self.shared.fd;
        if fd.check_extension(Cap::SetTssAddr) {
            fd.set_tss_address(TSS_ADDRESS)
                .map_err(|e| Error::os("KVM_SET_TSS_ADDR", format_args!("{TSS_ADDRESS:#x}"), e))?;
        }
        if fd.check_extension(Cap::SetIdentityMapAddr) {
            fd.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(|e| {
                Error::os("KVM_SET_IDENTITY_MAP_ADDR", format_args!("{IDENTITY_MAP_ADDRESS:#x}"), e)
            })?;
        }
        fd.create_irq_chip().map_err(|e| Error::os("KVM_CREATE_IRQCHIP", "", e))?;
        // The dummy speaker answers port 0x61, which guests read to calibrate with counter 2.
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        fd.create_pit2(pit).map_err(|e| Error::os("KVM_CREATE_PIT2", "KVM_PIT_SPEAKER_DUMMY", e))
    }

    fn need_irqchip(&self, what: &str) -> Result<()> {
        if self.shared.irqchip {
            return self.make_irqchip();
        }
        Err(Error::Unsupported {
            what: format!("{what} of a VM without interrupt controllers"),
            backend: NAME,
            fix: "make the VM with BackendConfig::irqchip".into(),
        })
    }

    fn set_slot(&self, slot: u32, flags: u32, region: &MemoryRegion, len: u64) -> Result<()> {
        let argument = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: region.base().0,
            memory_size: len,
            userspace_addr: region.host_address() as u64,
        };
        // SAFETY: `Shared::slots` keeps the region, and so its mapping, until the slot is removed or
        // the VM is closed, and every vCPU keeps `Shared`.
        unsafe { sys::set_user_memory_region(&self.shared.fd, argument) }.map_err(|e| {
            Error::os("KVM_SET_USER_MEMORY_REGION", format_args!("slot {slot}, {}", region.range()), e)
        })
    }

    fn no_slot(slot: Slot, slots: &BTreeMap<u32, Arc<MemoryRegion>>) -> Error {
        Error::Config {
            what: "memory slot",
            value: format!("{} has no memory", slot.0),
            fix: format!("slots with memory: {:?}", slots.keys().collect::<Vec<_>>()),
        }
    }

    fn irqchip_state(&self) -> Result<IrqchipState> {
        let fd = &self.shared.fd;
        let chip = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            fd.get_irqchip(&mut chip)
                .map_err(|e| Error::os("KVM_GET_IRQCHIP", format_args!("chip {chip_id}"), e))?;
            Ok::<_, Error>(chip)
        };
        let pic = |chip_id| {
            // SAFETY: the kernel fills the member of the union that the chip's id names.
            chip(chip_id).map(|chip| unsafe { chip.chip.pic }.into())
        };
        // SAFETY: as above.
        let ioapic = unsafe { chip(KVM_IRQCHIP_IOAPIC)?.chip.ioapic };
        // SAFETY: both members of the entry's union are its 64 bits.
        let redirection = ioapic.redirtbl.iter().map(|entry| unsafe { entry.bits }).collect();
        Ok(IrqchipState {
            pics: [pic(KVM_IRQCHIP_PIC_MASTER)?, pic(KVM_IRQCHIP_PIC_SLAVE)?],
            ioapic: IoapicState::from_kvm(&ioapic, redirection),
            pit: fd.get_pit2().map_err(|e| Error::os("KVM_GET_PIT2", "", e))?.into(),
        })
    }

    fn set_irqchip_state(&self, state: &IrqchipState) -> Result<()> {
        let fd = &self.shared.fd;
        let set = |chip: kvm_irqchip| {
            fd.set_irqchip(&chip)
                .map_err(|e| Error::os("KVM_SET_IRQCHIP", format_args!("chip {}", chip.chip_id), e))
        };
        for (chip_id, pic) in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE].into_iter().zip(&state.pics) {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            chip.chip.pic = pic.into();
            set(chip)?;
        }
        let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
        chip.chip.ioapic = (&state.ioapic).try_into()?;
        set(chip)?;
        fd.set_pit2(&kvm_pit_state2::from(&state.pit)).map_err(|e| Error::os("KVM_SET_PIT2", "", e))
    }
}

impl IrqSink for KvmVm {
    fn set_irq(&self, gsi: u32, high: bool) -> Result<()> {
        self.need_irqchip("the interrupt lines")?;
        super::irq::check_gsi(gsi)?;
        self.shared
            .fd
            .set_irq_line(gsi, high)
            .map_err(|e| Error::os("KVM_IRQ_LINE", format_args!("GSI {gsi}"), e))
    }

    fn send_msi(&self, msi: Msi) -> Result<()> {
        self.need_irqchip("message-signalled interrupts")?;
        let [low, high] = super::irq::halves(msi.address);
        let argument = kvm_msi { address_lo: low, address_hi: high, data: msi.data, ..Default::default() };
        // The result tells whether the guest takes it or blocks it, which is the guest's affair.
        self.shared.fd.signal_msi(argument).map(drop).map_err(|e| {
            Error::os("KVM_SIGNAL_MSI", format_args!("{:#x} to {:#x}", msi.data, msi.address), e)
        })
    }
}

impl BackendVm for KvmVm {
    fn name(&self) -> &'static str {
        NAME
    }

    fn max_slots(&self) -> u32 {
        self.shared.max_slots
    }

    fn map(&self, slot: Slot, region: Arc<MemoryRegion>) -> Result<()> {
        let new = region.range();
        if slot.0 >= self.shared.max_slots {
            return Err(MemoryError::NoSlots { new, limit: self.shared.max_slots, backend: NAME }.into());
        }
        if region.is_read_only() && !self.shared.read_only_memory {
            return Err(Error::Unsupported {
                what: format!("read-only guest memory at {new}"),
                backend: NAME,
                fix: "the kernel has no KVM_CAP_READONLY_MEM; map it writable".into(),
            });
        }
        let mut slots = self.shared.slots();
        if let Some(existing) = slots.get(&slot.0) {
            return Err(Error::Conflict {
                kind: "memory slot",
                new: format!("{} for {new}", slot.0),
                existing: format!("the same slot for {}", existing.range()),
            });
        }
        if let Some(existing) = slots.values().map(|r| r.range()).find(|r| r.overlaps(&new)) {
            return Err(MemoryError::Overlap { new, existing }.into());
        }
        let mut flags = 0;
        if region.is_read_only() {
            flags |= KVM_MEM_READONLY;
        }
        if region.tracks_dirty() {
            flags |= KVM_MEM_LOG_DIRTY_PAGES;
        }
        self.set_slot(slot.0, flags, &region, region.len())?;
        slots.insert(slot.0, region);
        Ok(())
    }

    fn unmap(&self, slot: Slot) -> Result<()> {
        let mut slots = self.shared.slots();
        let region = slots.get(&slot.0).ok_or_else(|| Self::no_slot(slot, &slots))?;
        self.set_slot(slot.0, 0, region, 0)?;
        slots.remove(&slot.0);
        Ok(())
    }

    fn take_dirty(&self, slot: Slot) -> Result<DirtyBitmap> {
        // The lock is kept so that the slot cannot become another region's meanwhile.
        let slots = self.shared.slots();
        let region = slots.get(&slot.0).ok_or_else(|| Self::no_slot(slot, &slots))?;
        if !region.tracks_dirty() {
            return Err(Error::Config {
                what: "dirty log",
                value: format!("of slot {}, {}, which does not record writes", slot.0, region.range()),
                fix: "make the region with RegionBuilder::track_dirty".into(),
            });
        }
        let size = usize::try_from(region.len())
            .map_err(|_| Error::os("KVM_GET_DIRTY_LOG", region.range(), io::ErrorKind::FileTooLarge))?;
        let words = self
            .shared
            .fd
            .get_dirty_log(slot.0, size)
            .map_err(|e| Error::os("KVM_GET_DIRTY_LOG", format_args!("slot {}", slot.0), e))?;
        Ok(DirtyBitmap::from_words(words, region.len() / PAGE_SIZE))
    }

    fn doorbell_on(&self, config: DoorbellConfig, event: Arc<EventFd>) -> Result<Registration> {
        super::irq::doorbell(&self.shared, config, event)
    }

    fn set_level_triggered(&self, irqs: u16) -> Result<()> {
        self.need_irqchip("level-triggered interrupts")?;
        let mut state = self.irqchip_state()?;
        for (pic, levels) in state.pics.iter_mut().zip(irqs.to_le_bytes()) {
            pic.elcr |= levels & pic.elcr_mask;
        }
        self.set_irqchip_state(&state)
    }

    fn irq_event(&self, route: IrqRoute) -> Result<Registration> {
        self.need_irqchip("interrupt events")?;
        super::irq::irq_event(&self.shared, route)
    }

    fn create_vcpu(&self, id: u32) -> Result<Box<dyn BackendVcpu>> {
        // KVM gives a LAPIC to the vCPUs that are made after the other controllers.
        self.make_irqchip()?;
        Ok(Box::new(KvmVcpu::new(self.shared.clone(), id)?))
    }

    fn backend_stats(&self) -> Vec<(String, u64)> {
        super::stats::read(&self.shared.fd)
    }

    fn save(&self) -> Result<MachineState> {
        self.make_irqchip()?;
        let irqchip = if self.shared.irqchip { Some(self.irqchip_state()?) } else { None };
        let clock = self.shared.fd.get_clock().map_err(|e| Error::os("KVM_GET_CLOCK", "", e))?;
        Ok(MachineState { irqchip, clock_ns: clock.clock })
    }

    fn restore(&self, state: &MachineState) -> Result<()> {
        self.make_irqchip()?;
        match (&state.irqchip, self.shared.irqchip) {
            (Some(irqchip), true) => self.set_irqchip_state(irqchip)?,
            (None, false) => {}
            (saved, _) => {
                let name = |has| if has { "a VM with interrupt controllers" } else { "a VM without" };
                return Err(Error::State {
                    what: "the machine",
                    expected: name(self.shared.irqchip).into(),
                    found: name(saved.is_some()).into(),
                });
            }
        }
        self.shared.tsc_restored.store(false, Ordering::SeqCst);
        // Without KVM_CLOCK_REALTIME the guest's time goes on from where it was saved.
        let clock = kvm_clock_data { clock: state.clock_ns, ..Default::default() };
        self.shared
            .fd
            .set_clock(&clock)
            .map_err(|e| Error::os("KVM_SET_CLOCK", format_args!("{} ns", state.clock_ns), e))
    }
}
