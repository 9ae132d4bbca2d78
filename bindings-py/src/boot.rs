//! What a VM boots, and what its devices are behind.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use pyo3::prelude::*;
use vmcore::boot::{Boot, Elf, ImageSource, Linux, LinuxEntry, Multiboot, Pvh, Raw, RawMode};
use vmcore::{VmBuilder, boot::BootError};
use vmdevices::virtio::{self, VirtioDevice};

use crate::error::{self, Raise};

/// What a virtio device is behind.
#[derive(Clone, Copy)]
pub enum Transport {
    Mmio,
    Pci,
}

impl Transport {
    pub fn named(name: &str) -> PyResult<Self> {
        match name {
            "mmio" => Ok(Self::Mmio),
            "pci" => Ok(Self::Pci),
            other => Err(error::config("transport", other, "mmio and pci are known")),
        }
    }
}

/// Puts a device on a VM that is to be built.
pub type Attachment = Box<dyn FnOnce(VmBuilder, Transport) -> VmBuilder + Send>;

/// The attachment of a virtio device.
pub fn virtio_attachment(device: impl VirtioDevice + 'static) -> Attachment {
    Box::new(move |builder, transport| match transport {
        Transport::Mmio => builder.attach(virtio::mmio(device)),
        Transport::Pci => builder.attach(virtio::pci(device)),
    })
}

/// An image as Python names it: a path, or bytes.
#[derive(Clone, Debug)]
pub enum Image {
    Path(PathBuf),
    Bytes(Vec<u8>),
}

impl FromPyObject<'_, '_> for Image {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        // A str is a path, and bytes are none, though os.fspath takes both.
        if let Ok(bytes) = object.extract::<Vec<u8>>() {
            return Ok(Self::Bytes(bytes));
        }
        Ok(Self::Path(object.extract()?))
    }
}

impl From<Image> for ImageSource {
    fn from(image: Image) -> Self {
        match image {
            Image::Path(path) => path.into(),
            Image::Bytes(bytes) => bytes.into(),
        }
    }
}

/// How `entry=` says a kernel is entered.
pub fn boot(kernel: Image, initrd: Option<Image>, cmdline: &str, entry: &str) -> PyResult<Boot> {
    let linux = |entry| {
        let linux = Linux::new(kernel.clone()).cmdline(cmdline).entry(entry);
        match &initrd {
            Some(initrd) => linux.initrd(initrd.clone()),
            None => linux,
        }
    };
    let multiboot = || {
        let multiboot = Multiboot::new(kernel.clone()).cmdline(cmdline);
        match &initrd {
            Some(module) => multiboot.module(module.clone(), ""),
            None => multiboot,
        }
    };
    let pvh = || {
        let pvh = Pvh::new(kernel.clone()).cmdline(cmdline);
        match &initrd {
            Some(initrd) => pvh.initrd(initrd.clone()),
            None => pvh,
        }
    };
    Ok(match entry {
        "auto" => match kind(&head(&kernel)?) {
            Kind::Linux => linux(LinuxEntry::Auto).into(),
            Kind::Pvh => pvh().into(),
            Kind::Multiboot => multiboot().into(),
        },
        "linux" => linux(LinuxEntry::Auto).into(),
        "bzimage" => linux(LinuxEntry::BzImage).into(),
        "realmode" => linux(LinuxEntry::RealMode).into(),
        "pvh" => pvh().into(),
        "multiboot" => multiboot().into(),
        "elf" => Elf::new(kernel).into(),
        "raw" | "raw16" => Raw::new(kernel, RawMode::Real16).into(),
        "raw32" => Raw::new(kernel, RawMode::Protected32).into(),
        "raw64" => Raw::new(kernel, RawMode::Long64).into(),
        other => {
            let fix = "auto, linux, bzimage, realmode, pvh, multiboot, elf, raw16, raw32 and raw64 are known";
            return Err(error::config("entry", other, fix));
        }
    })
}

enum Kind {
    Linux,
    Pvh,
    Multiboot,
}

fn head(kernel: &Image) -> PyResult<Vec<u8>> {
    let path: &Path = match kernel {
        Image::Bytes(bytes) => return Ok(bytes.iter().take(8192).copied().collect()),
        Image::Path(path) => path,
    };
    let mut head = Vec::with_capacity(8192);
    let read = File::open(path).and_then(|file| file.take(8192).read_to_end(&mut head));
    let image = || format!("kernel {}", path.display());
    read.map_err(|source| BootError::Open { image: image(), source }).raise()?;
    Ok(head)
}

/// Which loader a kernel needs, as vmrun guesses it.
fn kind(head: &[u8]) -> Kind {
    let multiboot = head.chunks_exact(4).any(|word| word == 0x1bad_b002_u32.to_le_bytes());
    match head {
        [0x7f, b'E', b'L', b'F', 1, ..] if !multiboot => Kind::Pvh,
        [0x7f, b'E', b'L', b'F', 2, ..] => Kind::Linux,
        _ if multiboot => Kind::Multiboot,
        _ => Kind::Linux,
    }
}
