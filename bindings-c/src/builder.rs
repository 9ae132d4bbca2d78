//! Building a VM.

use std::ffi::{c_char, c_void};
use std::mem::MaybeUninit;

use vmcore::boot::{Boot, Elf, Linux, Multiboot, Pvh, Raw, RawMode};
use vmcore::cpuid::Topology;
use vmcore::{Deterministic, Machine, Vm, VmBuilder};
use vmdevices::virtio::{self, VirtioDevice};
use vmdevices::{Pc, Rng};

use crate::bytes::{bytes, text};
use crate::callback::{User, required, vmcore_drop_fn};
use crate::console::vmcore_console;
use crate::disk::vmcore_disk;
use crate::error::{Result, give, guard, need, vmcore_error};
use crate::host::{accel, vmcore_accel};
use crate::machine::{vmcore_attach_fn, vmcore_machine};
use crate::net::vmcore_net;
use crate::region::vmcore_region;
use crate::virtio::{vmcore_balloon, vmcore_virtio, vmcore_virtio_console};
use crate::vm::vmcore_vm;
use crate::vsock::vmcore_vsock;

/// Settings of a VM to be built: unless said otherwise a machine of one vCPU and 128 MiB with interrupt controllers and
/// no devices, on the best backend of this host. What it boots must be said.
pub struct vmcore_builder {
    builder: VmBuilder,
    pc: Option<Pc>,
    serials: usize,
    transport: vmcore_transport,
}

/// What virtio devices are behind.
pub type vmcore_transport = u32;
/// virtio-mmio, which guests find by ACPI.
pub const VMCORE_TRANSPORT_MMIO: vmcore_transport = 0;
/// virtio-pci, which every guest with PCI finds.
pub const VMCORE_TRANSPORT_PCI: vmcore_transport = 1;

/// The mode in which a flat image is entered.
pub type vmcore_raw_mode = u32;
/// 16-bit real mode.
pub const VMCORE_RAW_REAL16: vmcore_raw_mode = 0;
/// 32-bit protected mode, flat segments, no paging.
pub const VMCORE_RAW_PROTECTED32: vmcore_raw_mode = 1;
/// 64-bit mode, the first 4 GiB mapped to themselves.
pub const VMCORE_RAW_LONG64: vmcore_raw_mode = 2;

impl vmcore_builder {
    fn change(&mut self, change: impl FnOnce(VmBuilder) -> VmBuilder) {
        self.builder = change(std::mem::take(&mut self.builder));
    }

    fn change_pc(&mut self, change: impl FnOnce(Pc) -> Pc) {
        self.pc = Some(change(self.pc.take().unwrap_or_default()));
    }

    fn attach(&mut self, device: impl VirtioDevice + 'static) {
        let pci = self.transport == VMCORE_TRANSPORT_PCI;
        self.change(|builder| {
            if pci { builder.attach(virtio::pci(device)) } else { builder.attach(virtio::mmio(device)) }
        });
    }
}

fn change(builder: Option<&mut vmcore_builder>, change: impl FnOnce(VmBuilder) -> VmBuilder) {
    if let Some(builder) = builder {
        builder.change(change);
    }
}

/// Begins a VM.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_builder_new(
    out: Option<&mut MaybeUninit<*mut vmcore_builder>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let transport = VMCORE_TRANSPORT_MMIO;
        give(out, vmcore_builder { builder: Vm::builder(), pc: None, serials: 0, transport })
    })
}

/// Which kind of backend to run on.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_builder_set_accel(
    builder: Option<&mut vmcore_builder>,
    kind: vmcore_accel,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let accel = accel(kind)?;
        need(builder, "builder")?.change(|builder| builder.accel(accel));
        Ok(())
    })
}

/// Size of the guest's memory, a multiple of 4096.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_builder_set_memory(builder: Option<&mut vmcore_builder>, bytes: u64) {
    change(builder, |builder| builder.memory(bytes));
}

/// Has the guest's memory backed as `region` says: by huge pages, on NUMA nodes, in a memfd. Its base and length do
/// not count; it may have no file, no contents, and be written. `region` stays the caller's.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_builder_set_memory_like(
    builder: Option<&mut vmcore_builder>,
    region: Option<&vmcore_region>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let (builder, region) = (need(builder, "builder")?, need(region, "region")?);
        if region.is_particular() {
            let fix = "memory has several regions: leave out its file, its contents, and read-only";
            return Err(vmcore_error::argument("region", "of one place alone", fix));
        }
        builder.change(|builder| builder.configure_memory(region.settings()));
        Ok(())
    })
}

/// How many vCPUs, as cores of one socket.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_builder_set_cpus(builder: Option<&mut vmcore_builder>, count: u32) {
    change(builder, |builder| builder.cpus(count));
}

/// How many vCPUs, as sockets of cores of threads.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_builder_set_topology(
    builder: Option<&mut vmcore_builder>,
    sockets: u32,
    cores: u32,
    threads: u32,
) {
    change(builder, |builder| builder.topology(Topology { sockets, cores, threads }));
}

/// Which CPU the guest sees: "best", "v1" to "v4", "host".
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_builder_set_cpu_model(
    builder: Option<&mut vmcore_builder>,
    model: *const c_char,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let model = text!(model).parse()?;
        need(builder, "builder")?.change(|builder| builder.cpu_model(model));
        Ok(())
    })
}

/// Frequency of the guest's TSC in kHz.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_builder_set_tsc_khz(builder: Option<&mut vmcore_builder>, khz: u32) {
    change(builder, |builder| builder.tsc_khz(khz));
}

/// Whether the machine has interrupt controllers and a PIT. Without, it ends at the first HLT.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_builder_set_irqchip(builder: Option<&mut vmcore_builder>, yes: bool) {
    change(builder, |builder| builder.irqchip(yes));
}

/// Whether the guest gets ACPI tables.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_builder_set_acpi(builder: Option<&mut vmcore_builder>, yes: bool) {
    change(builder, |builder| builder.acpi(yes));
}

/// Has the VM do the same in every run, on the software CPU; `seed` is what all random numbers follow from.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_builder_set_deterministic(builder: Option<&mut vmcore_builder>, seed: u64) {
    change(builder, |builder| builder.deterministic(Deterministic::seeded(seed)));
}

/// What the virtio devices that are attached from now on are behind; VMCORE_TRANSPORT_MMIO unless said.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_builder_set_transport(
    builder: Option<&mut vmcore_builder>,
    transport: vmcore_transport,
) -> Option<Box<vmcore_error>> {
    guard(|| match transport {
        VMCORE_TRANSPORT_MMIO | VMCORE_TRANSPORT_PCI => {
            need(builder, "builder")?.transport = transport;
            Ok(())
        }
        other => Err(vmcore_error::argument("transport", other, "give a VMCORE_TRANSPORT_*")),
    })
}

fn boot(builder: Option<&mut vmcore_builder>, boot: impl Into<Boot>) -> Result<()> {
    need(builder, "builder")?.change(|builder| builder.boot(boot));
    Ok(())
}

/// Boots a Linux kernel: a bzImage or vmlinux at `kernel`, with the initial RAM disk at `initrd`, which may be NULL.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_builder_boot_linux(
    builder: Option<&mut vmcore_builder>,
    kernel: *const c_char,
    initrd: *const c_char,
    cmdline: *const c_char,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let linux = Linux::new(text!(kernel)).cmdline(text!(cmdline));
        boot(builder, if initrd.is_null() { linux } else { linux.initrd(text!(initrd)) })
    })
}

/// Boots an ELF kernel by its PVH entry; `initrd` may be NULL.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_builder_boot_pvh(
    builder: Option<&mut vmcore_builder>,
    kernel: *const c_char,
    initrd: *const c_char,
    cmdline: *const c_char,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let pvh = Pvh::new(text!(kernel)).cmdline(text!(cmdline));
        boot(builder, if initrd.is_null() { pvh } else { pvh.initrd(text!(initrd)) })
    })
}

/// Boots a multiboot 1 kernel with one module, which may be NULL.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_builder_boot_multiboot(
    builder: Option<&mut vmcore_builder>,
    kernel: *const c_char,
    module: *const c_char,
    cmdline: *const c_char,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let multiboot = Multiboot::new(text!(kernel)).cmdline(text!(cmdline));
        boot(builder, if module.is_null() { multiboot } else { multiboot.module(text!(module), "") })
    })
}

/// Runs a plain ELF executable.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_builder_boot_elf(
    builder: Option<&mut vmcore_builder>,
    path: *const c_char,
) -> Option<Box<vmcore_error>> {
    guard(|| boot(builder, Elf::new(text!(path))))
}

/// Runs a copy of the `len` bytes at `data` in `mode`, from 0x7c00 in real mode, else from 1 MiB.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_builder_boot_raw(
    builder: Option<&mut vmcore_builder>,
    data: *const u8,
    len: usize,
    mode: vmcore_raw_mode,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let mode = match mode {
            VMCORE_RAW_REAL16 => RawMode::Real16,
            VMCORE_RAW_PROTECTED32 => RawMode::Protected32,
            VMCORE_RAW_LONG64 => RawMode::Long64,
            other => return Err(vmcore_error::argument("mode", other, "give a VMCORE_RAW_*")),
        };
        boot(builder, Raw::new(bytes!(data, len).to_vec(), mode))
    })
}

/// Adds a PC board: keyboard controller, reset, ACPI power, clock. Serial and exit ports add it too.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_builder_add_pc(builder: Option<&mut vmcore_builder>) {
    if let Some(builder) = builder {
        builder.change_pc(|pc| pc);
    }
}

/// Connects COM1 (ttyS0), by another call COM2, to a console. `console` is taken.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_builder_add_serial(
    builder: Option<&mut vmcore_builder>,
    console: Option<Box<vmcore_console>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let console = need(console, "console")?.console;
        let builder = need(builder, "builder")?;
        match builder.serials {
            0 => builder.change_pc(|pc| pc.serial(console)),
            1 => builder.change_pc(|pc| pc.serial2(console)),
            _ => return Err(vmcore_error::argument("console", "a third", "a PC board has two serial ports")),
        }
        builder.serials += 1;
        Ok(())
    })
}

/// Ends the VM with VMCORE_OUTCOME_EXIT when the guest writes to port `base` or the three behind it.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_builder_set_exit_port(builder: Option<&mut vmcore_builder>, base: u16) {
    if let Some(builder) = builder {
        builder.change_pc(|pc| pc.exit_port(base));
    }
}

/// Attaches a disk. The handle stays the caller's, for statistics and limits; a disk is attached once.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_builder_add_disk(
    builder: Option<&mut vmcore_builder>,
    disk: Option<&mut vmcore_disk>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let builder = need(builder, "builder")?;
        builder.attach(need(disk, "disk")?.take()?);
        Ok(())
    })
}

/// Attaches a network card. The handle stays the caller's; a card is attached once.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_builder_add_net(
    builder: Option<&mut vmcore_builder>,
    net: Option<&mut vmcore_net>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let builder = need(builder, "builder")?;
        builder.attach(need(net, "net")?.take()?);
        Ok(())
    })
}

/// Attaches sockets to the guest. The handle stays the caller's; a device is attached once.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_builder_add_vsock(
    builder: Option<&mut vmcore_builder>,
    vsock: Option<&mut vmcore_vsock>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let builder = need(builder, "builder")?;
        builder.attach(need(vsock, "vsock")?.take()?);
        Ok(())
    })
}

/// Attaches a balloon. The handle stays the caller's; a device is attached once.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_builder_add_balloon(
    builder: Option<&mut vmcore_builder>,
    balloon: Option<&mut vmcore_balloon>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let builder = need(builder, "builder")?;
        builder.attach(need(balloon, "balloon")?.take()?);
        Ok(())
    })
}

/// Attaches a virtio console (hvc0). `console` is taken.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_builder_add_virtio_console(
    builder: Option<&mut vmcore_builder>,
    console: Option<Box<vmcore_virtio_console>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let console = need(console, "console")?;
        need(builder, "builder")?.attach(console.console);
        Ok(())
    })
}

/// Attaches an entropy source.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_builder_add_rng(builder: Option<&mut vmcore_builder>) {
    if let Some(builder) = builder {
        builder.attach(Rng::new());
    }
}

/// Attaches a virtio device of the program's. The handle stays the caller's; a device is attached once.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_builder_add_virtio(
    builder: Option<&mut vmcore_builder>,
    device: Option<&mut vmcore_virtio>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let builder = need(builder, "builder")?;
        builder.attach(need(device, "device")?.take()?);
        Ok(())
    })
}

/// Has `attach` called while the VM is built, in the order of what is attached, to put devices of the program's on the
/// machine. `user` is taken.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_builder_attach(
    builder: Option<&mut vmcore_builder>,
    attach: vmcore_attach_fn,
    user: *mut c_void,
    drop: vmcore_drop_fn,
) -> Option<Box<vmcore_error>> {
    let user = User::new(user, drop);
    guard(|| {
        let function = required(attach, "attach")?;
        let closure = move |machine: &mut Machine| -> vmcore::Result<()> {
            let mut machine = vmcore_machine::new(machine);
            // SAFETY: the program's function with its pointer, and a machine that lives for the call.
            match unsafe { function(user.get(), &raw mut machine) } {
                Some(error) => Err(error.into_device_error("of the program")),
                None => Ok(()),
            }
        };
        need(builder, "builder")?.change(|builder| builder.attach(closure));
        Ok(())
    })
}

/// Makes the VM: memory, devices, vCPUs, and what it boots. `builder` is taken.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_builder_build(
    builder: Option<Box<vmcore_builder>>,
    out: Option<&mut MaybeUninit<*mut vmcore_vm>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let builder = *need(builder, "builder")?;
        let out = need(out, "out")?;
        let button = builder.pc.as_ref().map(Pc::power_button);
        let vm = match builder.pc {
            Some(pc) => builder.builder.attach(pc),
            None => builder.builder,
        };
        give(Some(out), vmcore_vm::new(vm.build()?, button))
    })
}

/// Frees the settings and all that was attached.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_builder_delete(builder: Option<Box<vmcore_builder>>) {
    drop(builder);
}
