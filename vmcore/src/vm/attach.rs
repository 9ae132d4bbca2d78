//! How devices get onto a machine: ours and the embedder's in the same way.

use std::any::Any;
use std::sync::Arc;

use crate::backend::{Backend, BackendVm, DoorbellConfig, IrqRoute, Registration};
use crate::boot::acpi::{AcpiDevice, AcpiHid, PciHost, PowerPorts};
use crate::boot::layout;
use crate::bus::{Bus, SharedDevice};
use crate::error::{Error, Result};
use crate::irq::{IrqLine, IrqSink};
use crate::memory::{GpaRange, GuestAddress, GuestMemory};

use super::clock::{Clock, Entropy};
use super::io_thread::IoThread;
use super::platform::Platform;
use super::run::Control;
use super::turns::{Timer, Timers};

/// Something that can be put on a machine: a device, or a board of them.
///
/// It asks the [`Machine`] for ports, MMIO windows, interrupts and threads, and says how ACPI should
/// describe what it made.
pub trait Attach: Send {
    /// Puts the device on `machine`. Called once, while the VM is being built.
    ///
    /// # Errors
    /// Whatever kept the device from being made; the build then fails with it.
    fn attach(self: Box<Self>, machine: &mut Machine) -> Result<()>;
}

/// A closure is a device too: `builder.attach(|machine: &mut Machine| ...)`.
impl<F: FnOnce(&mut Machine) -> Result<()> + Send> Attach for F {
    fn attach(self: Box<Self>, machine: &mut Machine) -> Result<()> {
        self(machine)
    }
}

/// Which interrupt inputs are given out, in this order, when a device asks for any; behind the end they are
/// shared. The ISA ones that nothing standard uses are PCI's ([`layout::PCI_GSIS`]).
const IRQ_POOL: [u32; 8] = [16, 17, 18, 19, 20, 21, 22, 23];

/// Most bytes of guest-physical addresses above the memory that are given out, and most address bits that
/// guests of every kind use: a 32-bit Linux has page numbers of 32 bits.
const HIGH_WINDOW: u64 = 1 << 36;
const HIGH_BITS: u32 = 44;

/// The machine while devices are attached to it, on the thread that builds the VM.
#[derive(Debug)]
pub struct Machine {
    backend: Arc<dyn Backend>,
    pub(super) vm: Arc<dyn BackendVm>,
    pub(super) memory: GuestMemory,
    pub(super) ports: Bus,
    pub(super) mmio: Bus,
    pub(super) control: Control,
    window: GpaRange,
    irqchip: bool,
    irqs_given: usize,
    pub(super) acpi: Vec<AcpiDevice>,
    pub(super) aml: Vec<u8>,
    pub(super) power: Option<PowerPorts>,
    pub(super) pci: Option<PciHost>,
    shared: Vec<Shared>,
    pub(super) io_threads: Vec<IoThread>,
    pub(super) kept: Vec<Kept>,
    pub(super) timers: Arc<Timers>,
    clock: Clock,
}

/// Something that lives as long as the VM.
pub(super) struct Kept(#[expect(dead_code, reason = "kept for its Drop")] Box<dyn Any + Send>);

/// What several devices have in common.
struct Shared(Box<dyn Any + Send>);

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Shared")
    }
}

impl std::fmt::Debug for Kept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Kept")
    }
}

impl Machine {
    pub(super) fn new(
        backend: Arc<dyn Backend>,
        vm: Arc<dyn BackendVm>,
        memory: GuestMemory,
        control: Control,
        irqchip: bool,
    ) -> Self {
        let clock = Clock::new(vm.world());
        Self {
            backend,
            vm,
            memory,
            ports: Bus::new("port range"),
            mmio: Bus::new("MMIO window"),
            control,
            window: layout::MMIO_DEVICES,
            irqchip,
            irqs_given: 0,
            acpi: Vec::new(),
            aml: Vec::new(),
            power: None,
            pci: None,
            shared: Vec::new(),
            io_threads: Vec::new(),
            kept: Vec::new(),
            timers: Arc::default(),
            clock,
        }
    }

    /// Puts `device` at `len` I/O ports from `base`.
    ///
    /// # Errors
    /// [`Error::Conflict`] where a device has one of them already.
    pub fn ports(&mut self, base: u16, len: u16, device: SharedDevice) -> Result<()> {
        self.ports.insert(base.into(), len.into(), device)
    }

    /// Puts `device` at `len` bytes of guest-physical addresses from `base`.
    ///
    /// # Errors
    /// [`Error::Conflict`] where a device or memory is there.
    pub fn mmio(&mut self, base: GuestAddress, len: u64, device: SharedDevice) -> Result<()> {
        let new = GpaRange { base: base.0, len };
        if let Some(existing) = self.memory.ranges().into_iter().find(|r| r.overlaps(&new)) {
            return Err(Error::Conflict {
                kind: "MMIO window",
                new: new.to_string(),
                existing: format!("memory {existing}"),
            });
        }
        self.mmio.insert(base.0, len, device)
    }

    /// Sets aside `len` bytes of guest-physical addresses below 4 GiB, aligned to `len` rounded up to
    /// a power of two (at least 4096), that neither memory nor another device uses.
    ///
    /// # Errors
    /// [`Error::Config`] where the space for devices is used up.
    pub fn mmio_window(&mut self, len: u64) -> Result<GuestAddress> {
        let full = |left: u64| Error::Config {
            what: "MMIO window",
            value: format!("{len:#x} bytes"),
            fix: format!("the space for devices below 4 GiB has {left:#x} bytes left; attach fewer devices"),
        };
        let GpaRange { base, len: left } = self.window;
        let align = len.max(4096).checked_next_power_of_two().ok_or_else(|| full(left))?;
        let at = base.next_multiple_of(align);
        let used =
            (at - base).checked_add(len.max(4096)).filter(|&used| used <= left).ok_or_else(|| full(left))?;
        self.window = GpaRange { base: base + used, len: left - used };
        Ok(GuestAddress(at))
    }

    /// Addresses above memory for devices that take more than fits below 4 GiB, as much as the guest's CPU
    /// can address beside its memory, 64 GiB at most; `None` where that is nothing. Not given out for good:
    /// who asks again gets the same.
    ///
    /// # Errors
    /// Where the backend cannot say how many address bits there are.
    pub fn high_window(&self) -> Result<Option<GpaRange>> {
        let supported = self.backend.supported_cpuid()?;
        let bits = supported.get(0x8000_0008, 0).map_or(36, |leaf| leaf.eax & 0xff).min(HIGH_BITS);
        let end = 1u64 << bits;
        let len = HIGH_WINDOW.min(end / 4);
        let window = GpaRange { base: end - len, len };
        let memory = self.memory.ranges().iter().filter_map(GpaRange::end).max().unwrap_or(0);
        Ok((memory.max(layout::HIGH_RAM_BASE) <= window.base).then_some(window))
    }

    /// What the devices of a kind have in common, made by the first of them that asks: a bus, a thread.
    /// `T` names the kind.
    ///
    /// # Errors
    /// As `make` says.
    pub fn share<T: Any + Clone + Send>(
        &mut self,
        make: impl FnOnce(&mut Machine) -> Result<T>,
    ) -> Result<T> {
        if let Some(there) = self.shared.iter().find_map(|shared| shared.0.downcast_ref::<T>()) {
            return Ok(there.clone());
        }
        let made = make(self)?;
        self.shared.push(Shared(Box::new(made.clone())));
        Ok(made)
    }

    /// The machine for devices that move while the guest runs.
    pub fn platform(&self) -> Platform {
        Platform::of(self.memory.clone(), &self.mmio, self.vm.clone(), self.irqchip)
    }

    /// Gives out the number of a global system interrupt that the platform's own devices do not use. When all are
    /// given out they are shared in turn, so say "shared" to ACPI.
    pub fn allocate_gsi(&mut self) -> u32 {
        let gsi = IRQ_POOL[self.irqs_given % IRQ_POOL.len()];
        self.irqs_given += 1;
        gsi
    }

    /// Whether the machine has interrupt controllers.
    pub fn has_irqchip(&self) -> bool {
        self.irqchip
    }

    /// The wire into global system interrupt `gsi`. It leads nowhere on a machine without interrupt
    /// controllers: such a guest polls.
    pub fn irq_line(&self, gsi: u32) -> IrqLine {
        if !self.irqchip {
            return IrqLine::detached();
        }
        let sink: Arc<dyn IrqSink> = self.vm.clone();
        IrqLine::new(sink, gsi)
    }

    /// An event that raises `route` when it is written.
    ///
    /// # Errors
    /// As [`BackendVm::irq_event`].
    pub fn irq_event(&self, route: IrqRoute) -> Result<Registration> {
        self.vm.irq_event(route)
    }

    /// As [`BackendVm::irq_events_pay`].
    pub fn irq_events_pay(&self) -> bool {
        self.vm.irq_events_pay()
    }

    /// An event that a guest's write signals, instead of calling the device on the vCPU's thread.
    ///
    /// # Errors
    /// As [`BackendVm::doorbell`].
    pub fn doorbell(&self, config: DoorbellConfig) -> Result<Registration> {
        self.vm.doorbell(config)
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The machine's off and reset switch, for devices to keep.
    pub fn control(&self) -> Control {
        self.control.clone()
    }

    /// Makes a thread that serves devices: it starts when the VM first runs and stops with it. Ask for
    /// one for each device that may block, and share one among those that do not.
    ///
    /// # Errors
    /// Where the host refuses a descriptor. Where it refuses the thread, the run fails.
    /// [`Error::Unsupported`] on a deterministic machine, where devices work inside the guest's accesses
    /// and by [`Machine::timer`].
    pub fn io_thread(&mut self, name: &str) -> Result<IoThread> {
        if self.is_deterministic() {
            return Err(Error::Unsupported {
                what: format!("the I/O thread {name} of a deterministic VM"),
                backend: self.vm.name(),
                fix: "leave out the device, or let it work inside the guest's accesses".into(),
            });
        }
        let thread = IoThread::unstarted(name)?;
        self.io_threads.push(thread.clone());
        Ok(thread)
    }

    /// Whether all that devices do must follow from what the guest does: see [`crate::deterministic`].
    /// There are no I/O threads, events and doorbells then.
    pub fn is_deterministic(&self) -> bool {
        self.vm.world().is_some()
    }

    /// The machine's time: what devices are to show to the guest.
    pub fn clock(&self) -> Clock {
        self.clock.clone()
    }

    /// Where devices are to get random numbers from.
    pub fn entropy(&self) -> Entropy {
        Entropy::new(self.vm.world())
    }

    /// A timer of the machine's time that calls `callback` on the thread of the vCPUs, between two
    /// instructions. `None` on a machine that goes with the host's time, where devices have I/O threads.
    pub fn timer(&mut self, callback: impl FnMut() + Send + 'static) -> Option<Timer> {
        self.is_deterministic().then(|| self.timers.add(self.control.0.clone(), callback))
    }

    /// Has the guest find `device` in the ACPI DSDT.
    pub fn describe(&mut self, device: AcpiDevice) {
        self.acpi.push(device);
    }

    /// Adds `aml`, terms in ACPI's machine language, to the scope `\_SB` of the DSDT: for devices with
    /// methods and events, which [`Machine::describe`] has no words for. What is no valid AML makes the
    /// guest leave out the table.
    pub fn describe_aml(&mut self, aml: &[u8]) {
        self.aml.extend_from_slice(aml);
    }

    /// How many devices with the textual hardware id `hid` are described so far: the next one's
    /// number.
    pub fn described(&self, hid: &str) -> u32 {
        let same = |device: &&AcpiDevice| matches!(&device.hid, AcpiHid::Text(text) if text == hid);
        u32::try_from(self.acpi.iter().filter(same).count()).unwrap_or(u32::MAX)
    }

    /// Tells the guest where the ACPI power and reset registers are.
    ///
    /// # Errors
    /// [`Error::Conflict`] where another device has said so already.
    pub fn describe_power(&mut self, power: PowerPorts) -> Result<()> {
        if let Some(existing) = &self.power {
            return Err(Error::Conflict {
                kind: "ACPI power block",
                new: format!("port {:#x}", power.pm1_control),
                existing: format!("port {:#x}", existing.pm1_control),
            });
        }
        self.power = Some(power);
        Ok(())
    }

    /// Tells the guest of the PCI host bridge: in the DSDT and the MCFG, and by its interrupts in the MP
    /// table. Those below 16 are level-triggered at the 8259As from the start.
    ///
    /// # Errors
    /// [`Error::Conflict`] where there is one already.
    pub fn describe_pci(&mut self, host: PciHost) -> Result<()> {
        if let Some(existing) = &self.pci {
            return Err(Error::Conflict {
                kind: "PCI host bridge",
                new: format!("ECAM {}", host.ecam),
                existing: format!("ECAM {}", existing.ecam),
            });
        }
        self.pci = Some(host);
        Ok(())
    }

    /// Keeps `resource` (a watch, a registration, a mapping) for as long as the VM lives.
    pub fn keep(&mut self, resource: impl Any + Send) {
        self.kept.push(Kept(Box::new(resource)));
    }
}
