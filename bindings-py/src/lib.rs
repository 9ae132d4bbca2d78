//! vmcore for Python: the module `vmcore._native`, of which the package `vmcore` makes its own.
//!
//! A thin layer: one file a noun, no logic of its own. What waits does so without the GIL, and looks for
//! signals where Python handles them ([`wait`]). Python that the guest's accesses call runs on the threads
//! of the vCPUs ([`callback`]); what it raises comes out of the run.

mod balloon;
mod boot;
mod callback;
mod console;
mod cpuid;
mod device;
mod disk;
mod error;
mod host;
mod map;
mod memory;
mod net;
mod outcome;
mod plan;
mod registers;
mod runner;
mod state;
mod stats;
mod ticker;
mod vcpu;
mod virtio;
mod vm;
mod vsock;
mod wait;

use pyo3::prelude::*;

/// The engine, as `vmcore/_native.pyi` describes it.
#[pymodule]
mod _native {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::balloon::Balloon;
    #[pymodule_export]
    use crate::console::Console;
    #[pymodule_export]
    use crate::cpuid::of_host;
    #[pymodule_export]
    use crate::device::{Control, IrqLine, Machine};
    #[pymodule_export]
    use crate::disk::Disk;
    #[pymodule_export]
    use crate::host::{BackendReport, Report, check};
    #[pymodule_export]
    use crate::memory::{Memory, Region};
    #[pymodule_export]
    use crate::net::{Hub, Net};
    #[pymodule_export]
    use crate::outcome::{Outcome, VcpuExit};
    #[pymodule_export]
    use crate::registers::{DescriptorTable, Segment};
    #[pymodule_export]
    use crate::state::{Paused, VmState};
    #[pymodule_export]
    use crate::stats::Stats;
    #[pymodule_export]
    use crate::vcpu::Vcpu;
    #[pymodule_export]
    use crate::vm::{Vm, close_all};
    #[pymodule_export]
    use crate::vsock::{Vsock, VsockListener};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        // Threads of a VM that called Python after its end would not come back.
        module.py().import("atexit")?.call_method1("register", (module.getattr("_close_all")?,))?;
        Ok(())
    }
}
