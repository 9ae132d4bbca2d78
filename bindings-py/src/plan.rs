//! What the keywords of a VM come to, and the build by it.

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::prelude::*;
use vmcore::boot::Boot;
use vmcore::cpuid::CpuModel;
use vmcore::memory::RegionBuilder;
use vmcore::{Accel, Deterministic};
use vmdevices::Pc;

use crate::balloon::Balloon;
use crate::boot::{Attachment, Transport};
use crate::callback::Sink;
use crate::device::Machine;
use crate::disk::Disk;
use crate::error;
use crate::net::Net;

/// A size: bytes, or a text like "512M".
#[derive(FromPyObject)]
pub enum Size {
    Bytes(u64),
    Text(String),
}

impl Size {
    /// In bytes.
    pub fn bytes(self) -> PyResult<u64> {
        let text = match self {
            Size::Bytes(bytes) => return Ok(bytes),
            Size::Text(text) => text,
        };
        let shift = match text.as_bytes().last() {
            Some(b'K' | b'k') => 10,
            Some(b'M' | b'm') => 20,
            Some(b'G' | b'g') => 30,
            Some(b'T' | b't') => 40,
            _ => 0,
        };
        let digits = if shift > 0 { &text[..text.len() - 1] } else { &text };
        let bytes = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
        bytes.ok_or_else(|| {
            error::config("size of memory", text, "give bytes, or a number with K, M, G or T behind it")
        })
    }
}

/// What `disks=` takes.
#[derive(FromPyObject)]
pub enum DiskArg {
    Disk(Py<Disk>),
    Path(PathBuf),
}

/// What `nets=` takes.
#[derive(FromPyObject)]
pub enum NetArg {
    Net(Py<Net>),
    Name(String),
}

/// What `balloon=` takes.
#[derive(FromPyObject)]
pub enum BalloonArg {
    Balloon(Py<Balloon>),
    Wanted(bool),
}

/// All that the build needs, which happens without the GIL.
pub struct Plan {
    pub accel: Accel,
    pub memory: u64,
    pub backed: Box<dyn Fn(RegionBuilder) -> RegionBuilder + Send>,
    pub cpus: u32,
    pub cpu: CpuModel,
    pub irqchip: bool,
    pub acpi: bool,
    pub tsc_khz: Option<u32>,
    pub deterministic: Option<u64>,
    pub boot: Option<Boot>,
    pub pc: Option<Pc>,
    pub attachments: Vec<Attachment>,
    pub transport: Transport,
    pub devices: Vec<Py<PyAny>>,
}

impl Plan {
    /// Makes the VM.
    pub fn build(self, sink: &Arc<Sink>) -> vmcore::Result<vmcore::Vm> {
        let mut builder = vmcore::Vm::builder()
            .accel(self.accel)
            .memory(self.memory)
            .configure_memory(self.backed)
            .cpus(self.cpus)
            .cpu_model(self.cpu)
            .irqchip(self.irqchip)
            .acpi(self.acpi);
        if let Some(khz) = self.tsc_khz {
            builder = builder.tsc_khz(khz);
        }
        if let Some(seed) = self.deterministic {
            builder = builder.deterministic(Deterministic::seeded(seed));
        }
        if let Some(boot) = self.boot {
            builder = builder.boot(boot);
        }
        if let Some(pc) = self.pc {
            builder = builder.attach(pc);
        }
        for attachment in self.attachments {
            builder = attachment(builder, self.transport);
        }
        for device in self.devices {
            let sink = sink.clone();
            builder =
                builder.attach(move |machine: &mut vmcore::Machine| Machine::attach(&device, machine, &sink));
        }
        builder.build()
    }
}
