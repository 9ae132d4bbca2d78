//! Building a VM with memory, vCPUs, devices and something to boot.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::thread::ScopedJoinHandle;

use super::attach::{Attach, Machine};
use super::run::{Control, Shared};
use super::turns::Turns;
use super::{Inside, Vm};
use crate::backend::{Backend, BackendConfig};
use crate::boot::acpi::{self, AcpiConfig, AcpiHid};
use crate::boot::{self, Boot, E820Kind, MemoryLayout, layout, mptable};
use crate::cpuid::{CpuConfig, CpuModel, Cpuid, Topology};
use crate::deterministic::Deterministic;
use crate::error::{Error, Result};
use crate::host::{self, Accel};
use crate::memory::{GpaRange, GuestAddress, MemoryError, MemoryRegion, RegionBuilder};
use crate::vcpu::Vcpu;

/// The interrupt of ACPI's fixed hardware.
const ACPI_ISA_IRQ: u8 = 9;

/// Settings of a VM to be built; begin with [`Vm::builder`].
///
/// Every setting has a default; the defaults make a machine of one vCPU and 128 MiB with interrupt
/// controllers, without devices, on the best backend of this host. What it boots must be said.
#[must_use = "a builder does nothing until build()"]
pub struct VmBuilder {
    accel: Accel,
    backend: Option<Arc<dyn Backend>>,
    memory: u64,
    configure_memory: Option<Box<dyn Fn(RegionBuilder) -> RegionBuilder>>,
    topology: Topology,
    cpu_model: CpuModel,
    tsc_khz: Option<u32>,
    irqchip: bool,
    acpi: bool,
    deterministic: Option<Deterministic>,
    boot: Option<Boot>,
    devices: Vec<Box<dyn Attach>>,
}

impl Default for VmBuilder {
    fn default() -> Self {
        Self {
            accel: Accel::Auto,
            backend: None,
            memory: 128 << 20,
            configure_memory: None,
            topology: Topology::of_cores(1),
            cpu_model: CpuModel::default(),
            tsc_khz: None,
            irqchip: true,
            acpi: true,
            deterministic: None,
            boot: None,
            devices: Vec::new(),
        }
    }
}

impl VmBuilder {
    /// Which kind of backend to run on; the best there is unless said.
    pub fn accel(mut self, accel: Accel) -> Self {
        self.accel = accel;
        self
    }

    /// Run on this very backend. A program that makes many VMs opens it once.
    pub fn backend(mut self, backend: Arc<dyn Backend>) -> Self {
        self.backend = Some(backend);
        self
    }

    /// What to boot: a [`Linux`](boot::Linux) kernel or another image.
    pub fn boot(mut self, boot: impl Into<Boot>) -> Self {
        self.boot = Some(boot.into());
        self
    }

    /// Size of the guest's RAM in bytes, a multiple of 4096; 128 MiB unless said. What exceeds 3 GiB
    /// is above 4 GiB in the guest's addresses.
    pub fn memory(mut self, bytes: u64) -> Self {
        self.memory = bytes;
        self
    }

    /// Sets how each region of RAM is backed: `|region| region.huge_pages(HugePages::Size2M)`.
    pub fn configure_memory(mut self, configure: impl Fn(RegionBuilder) -> RegionBuilder + 'static) -> Self {
        self.configure_memory = Some(Box::new(configure));
        self
    }

    /// How many vCPUs, as cores of one socket; 1 unless said.
    pub fn cpus(mut self, count: u32) -> Self {
        self.topology = Topology::of_cores(count);
        self
    }

    /// How many vCPUs there are, in sockets, cores and threads, instead of [`VmBuilder::cpus`].
    pub fn topology(mut self, topology: Topology) -> Self {
        self.topology = topology;
        self
    }

    /// Which CPU the guest sees; [`CpuModel::Best`] unless said.
    pub fn cpu_model(mut self, model: CpuModel) -> Self {
        self.cpu_model = model;
        self
    }

    /// Frequency of the guest's TSC in kHz. Unless said, KVM shows the host's, and the software CPU one of
    /// 1 GHz. A VM that shall move to another host or backend with its state needs one that both can make:
    /// not every KVM can make another than the host's.
    pub fn tsc_khz(mut self, khz: u32) -> Self {
        self.tsc_khz = Some(khz);
        self
    }

    /// Whether the machine has interrupt controllers and a PIT, as it does unless said. Without
    /// them it is made faster, has one vCPU, and ends at the first HLT.
    pub fn irqchip(mut self, irqchip: bool) -> Self {
        self.irqchip = irqchip;
        self
    }

    /// Whether the guest gets ACPI tables, as it does unless said. Without them it finds vCPUs in the
    /// MP table, and no virtio-mmio device.
    pub fn acpi(mut self, acpi: bool) -> Self {
        self.acpi = acpi;
        self
    }

    /// Has the VM do the same in every run, with time and random numbers of its own: see
    /// [`crate::deterministic`]. Only the software CPU can; it is taken where none is asked for.
    pub fn deterministic(mut self, deterministic: Deterministic) -> Self {
        self.deterministic = Some(deterministic);
        self
    }

    /// Puts a device, or a board of devices, on the machine.
    pub fn attach(mut self, device: impl Attach + 'static) -> Self {
        self.devices.push(Box::new(device));
        self
    }

    /// Makes the VM: memory, devices in the order they were attached, vCPUs, and what it boots.
    ///
    /// # Errors
    /// Invalid settings, a backend that cannot be used, a device that fails, an image that cannot be
    /// booted.
    pub fn build(mut self) -> Result<Vm> {
        if let Some(backend) = self.backend.take() {
            return self.build_on(backend, "chosen by the caller".to_owned());
        }
        let accel = match (self.accel, self.deterministic) {
            (Accel::Auto, Some(_)) => Accel::Soft,
            (accel, _) => accel,
        };
        let (backend, why) = host::choose(accel)?;
        let asked = backend.clone();
        std::thread::scope(|scope| {
            // The first answer takes a backend as long as making the VM, which goes on meanwhile; what
            // was learnt stays with the backend. Without the thread it is asked in its turn.
            let ask = move || drop(asked.supported_cpuid());
            let asking = std::thread::Builder::new().name("cpuid".into()).spawn_scoped(scope, ask);
            let vm = self.build_on(backend, why);
            // A scope waits for what its threads do and not for their ends, which would outlast this call.
            drop(asking.map(ScopedJoinHandle::join));
            vm
        })
    }

    fn build_on(mut self, backend: Arc<dyn Backend>, why: String) -> Result<Vm> {
        self.check_cpus(&*backend)?;
        let config = BackendConfig { irqchip: self.irqchip };
        let vm = match self.deterministic {
            Some(deterministic) => backend.create_deterministic_vm(&config, deterministic)?,
            None => backend.create_vm(&config)?,
        };
        if let (Some(world), Some(boot)) = (vm.world(), &mut self.boot) {
            let mut seed = [0; 32];
            world.fill_random(&mut seed);
            boot.fix_seed(seed);
        }
        let shared = Arc::new(Shared::default());
        let mut inside = Inside::new(vm, backend, why);
        let mut layout = MemoryLayout::pc(self.memory);
        self.map_memory(&inside, &layout)?;
        let control = Control(shared.clone());
        let mut machine = Machine::new(
            inside.backend.clone(),
            inside.vm.clone(),
            inside.memory.clone(),
            control,
            self.irqchip,
        );
        machine.ports = inside.ports.clone();
        machine.mmio = inside.mmio.clone();
        let devices = std::mem::take(&mut self.devices);
        let attached = devices.into_iter().try_for_each(|device| device.attach(&mut machine));
        inside.io_threads = std::mem::take(&mut machine.io_threads);
        if let Some(pci) = &machine.pci {
            // Linux trusts what it finds here even before it can read the DSDT.
            layout.reserve(pci.ecam, E820Kind::Reserved, "PCI configuration space");
        }
        if let Some(world) = inside.vm.world() {
            let turns = Turns::new(world.clone(), machine.timers.clone());
            inside.turns = Some(Arc::new(Mutex::new(turns)));
        }
        inside.kept = Mutex::new(std::mem::take(&mut machine.kept));
        let made = attached.and_then(|()| self.make_vcpus(&inside, &machine, &layout));
        let failure = made.map(|vcpus| inside.vcpus = vcpus).err();
        drop(machine);
        // Also after a failure: dropping the VM is what stops the threads that devices were given.
        let vm = Vm::assemble(inside, shared);
        failure.map_or(Ok(vm), Err)
    }

    fn check_cpus(&self, backend: &dyn Backend) -> Result<()> {
        let limit = if self.irqchip { backend.max_vcpus() } else { 1 };
        let cpus = self.topology.cpus();
        if (1..=limit).contains(&cpus) {
            return Ok(());
        }
        let who = if self.irqchip { backend.name() } else { "a VM without interrupt controllers" };
        Err(Error::Config {
            what: "number of vCPUs",
            value: cpus.to_string(),
            fix: format!("{who} has 1 to {limit}"),
        })
    }

    /// The ids of the vCPUs, which are their APICs'.
    fn apic_ids(&self) -> Vec<u32> {
        (0..self.topology.cpus()).map(|index| self.topology.apic_id(index)).collect()
    }

    fn map_memory(&self, inside: &Inside, layout: &MemoryLayout) -> Result<()> {
        if layout.ram().is_empty() {
            return Err(MemoryError::Empty { base: 0 }.into());
        }
        for range in layout.ram() {
            let region = MemoryRegion::builder(GuestAddress(range.base), range.len);
            let region = match &self.configure_memory {
                Some(configure) => configure(region),
                None => region,
            };
            inside.map(Arc::new(region.build()?))?;
        }
        Ok(())
    }

    /// vCPUs in their reset state, number 0 at the entry of what is booted, which is loaded here.
    fn make_vcpus(
        &self,
        inside: &Inside,
        machine: &Machine,
        layout: &MemoryLayout,
    ) -> Result<Vec<Arc<Mutex<Vcpu>>>> {
        let boot = self.boot.as_ref().ok_or_else(|| Error::Config {
            what: "boot image",
            value: "none".into(),
            fix: "say what to boot with VmBuilder::boot, or use Vm::bare".into(),
        })?;
        let supported = inside.backend.supported_cpuid()?;
        check_memory(layout, &supported)?;
        let ids = self.apic_ids().into_iter();
        let mut vcpus = ids.map(|id| inside.create_vcpu(id)).collect::<Result<Vec<_>>>()?;
        if let Some(khz) = self.tsc_khz {
            vcpus.iter_mut().try_for_each(|vcpu| vcpu.set_tsc_khz(khz))?;
        }
        let config = CpuConfig {
            model: self.cpu_model,
            topology: self.topology,
            lapic: self.irqchip,
            tsc_khz: vcpus.first().and_then(Vcpu::tsc_khz),
        };
        for vcpu in &mut vcpus {
            vcpu.set_cpuid(&config.cpuid(&supported, vcpu.id())?)?;
        }
        if let Some(pci) = machine.pci.as_ref().filter(|_| self.irqchip) {
            let irqs = pci.gsis.iter().filter(|&&gsi| gsi < 16).fold(0, |irqs, gsi| irqs | 1 << gsi);
            inside.vm.set_level_triggered(irqs)?;
        }
        let rsdp = self.write_tables(machine)?;
        let loaded = boot::load(boot, &inside.memory, layout, rsdp)?;
        if let Some(first) = vcpus.first_mut() {
            let reset = first.sregs()?;
            first.set_sregs(&loaded.entry.sregs_over(&reset))?;
            first.set_regs(&loaded.entry.regs)?;
        }
        Ok(vcpus.into_iter().map(|vcpu| Arc::new(Mutex::new(vcpu))).collect())
    }

    /// Describes the machine to the guest, where there is room and a reader for it.
    fn write_tables(&self, machine: &Machine) -> Result<Option<GuestAddress>> {
        let area = layout::ACPI_TABLES;
        if !self.irqchip || !machine.memory.contains(GuestAddress(area.base), 2 * area.len) {
            return Ok(None);
        }
        let cpus = self.apic_ids();
        let levels = if machine.power.is_some() { &[ACPI_ISA_IRQ][..] } else { &[] };
        let (pci, at) = (machine.pci.as_ref(), GuestAddress(layout::MP_TABLE.base));
        mptable::build_table(&cpus, levels, pci, at, &machine.memory)?;
        if !self.acpi {
            return Ok(None);
        }
        // A controller that is there for its reset line alone is not worth a guest's looking for it.
        let keyboard = AcpiHid::Eisa("PNP0303".into());
        let config = AcpiConfig {
            cpus: &cpus,
            devices: &machine.acpi,
            aml: &machine.aml,
            power: machine.power.as_ref(),
            pci: machine.pci.as_ref(),
            i8042: machine.acpi.iter().any(|device| device.hid == keyboard),
            rtc: machine.ports.claims(0x70),
            vga: machine.ports.claims(0x3c0),
        };
        Ok(Some(acpi::build_tables(&config, GuestAddress(area.base), &machine.memory)?))
    }
}

/// Refuses memory that the guest's CPU could not address (CPUID 0x8000_0008, SDM vol. 2A).
fn check_memory(layout: &MemoryLayout, supported: &Cpuid) -> Result<()> {
    let bits = supported.get(0x8000_0008, 0).map_or(36, |leaf| leaf.eax & 0xff);
    match layout.ram().last() {
        Some(&GpaRange { base, len }) if base.checked_add(len).is_none_or(|end| end > 1 << bits.min(52)) => {
            Err(MemoryError::Overflow { base, len, bits }.into())
        }
        _ => Ok(()),
    }
}

impl fmt::Debug for VmBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VmBuilder")
            .field("accel", &self.accel)
            .field("memory", &self.memory)
            .field("topology", &self.topology)
            .field("cpu_model", &self.cpu_model)
            .field("irqchip", &self.irqchip)
            .field("acpi", &self.acpi)
            .field("deterministic", &self.deterministic)
            .field("boot", &self.boot)
            .field("devices", &self.devices.len())
            .finish_non_exhaustive()
    }
}
