//! Which transport the devices of a booted guest are behind.

use vmcore::{Attach, Machine};
use vmdevices::virtio::{self, VirtioDevice};

/// `device` behind virtio-mmio, or with `VMCORE_TRANSPORT=pci` behind virtio-pci.
pub fn virtio(device: impl VirtioDevice + 'static) -> impl Attach {
    let transport = std::env::var("VMCORE_TRANSPORT").unwrap_or_else(|_| "mmio".into());
    move |machine: &mut Machine| match transport.as_str() {
        "mmio" => Box::new(virtio::mmio(device)).attach(machine),
        "pci" => Box::new(virtio::pci(device)).attach(machine),
        other => panic!("VMCORE_TRANSPORT={other}: give mmio or pci"),
    }
}
