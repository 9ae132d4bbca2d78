//! The KVM backend: guests run on the host's CPU through `/dev/kvm`.
//!
//! [`Kvm`] is the open device, made once and shared by any number of VMs. The rest is behind the
//! contract of [`crate::backend`]. The interface is described in the kernel's
//! `Documentation/virt/kvm/api.rst`; ioctls are named here as there.

mod fault;
mod irq;
mod kick;
mod save;
mod state;
mod stats;
mod sys;
mod vcpu;
mod vm;

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::Cap;

use crate::backend::{Backend, BackendConfig, BackendVm, Capability};
use crate::cpuid::Cpuid;
use crate::error::{Error, Result};

pub use kick::KICK_SIGNAL_OFFSET;

/// Name of the backend in messages.
const NAME: &str = "kvm";

/// The KVM API has had this version since 2007, and the manual says to refuse any other.
const API_VERSION: i32 = 12;

/// What the backend cannot work without, with the kernel that brought it.
const REQUIRED: [(Cap, &str); 9] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY (2.6.25)"),
    (Cap::DestroyMemoryRegionWorks, "KVM_CAP_DESTROY_MEMORY_REGION_WORKS (2.6.31)"),
    (Cap::JoinMemoryRegionsWorks, "KVM_CAP_JOIN_MEMORY_REGIONS_WORKS (2.6.32)"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID (2.6.25)"),
    (Cap::MpState, "KVM_CAP_MP_STATE (2.6.26)"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS (2.6.33)"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS (2.6.35)"),
    (Cap::Xcrs, "KVM_CAP_XCRS (2.6.36)"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT (4.11)"),
];

/// The KVM device, opened and checked. Cheap to share: VMs refer to it by what they made of it.
#[derive(Debug)]
pub struct Kvm {
    system: Arc<System>,
}

/// What the VMs of one [`Kvm`] have in common.
#[derive(Debug)]
struct System {
    fd: kvm_ioctls::Kvm,
    /// Numbers of the MSRs that make up a vCPU's state on this host.
    msrs: Vec<u32>,
    /// What KVM supports, asked for once: the answer takes the host some hundred CPUID instructions,
    /// each an exit where it is a guest itself, together 0.3 ms.
    cpuid: Mutex<Option<Cpuid>>,
}

/// What opening and checking the device found, for [`crate::host`].
#[derive(Debug)]
pub(crate) enum OpenFailure {
    /// `open` failed.
    Open(io::Error),
    /// Not a KVM, or one with another interface.
    ApiVersion(i32),
    /// Capabilities that are missing.
    Missing(Vec<&'static str>),
    /// A question was not answered.
    Query(Error),
}

impl Kvm {
    /// Opens `/dev/kvm`.
    ///
    /// # Errors
    /// [`Error::BackendUnusable`], with what to do; [`crate::host::check`] tells more.
    pub fn open() -> Result<Self> {
        Self::open_at(Path::new("/dev/kvm"))
    }

    /// Opens the KVM device at `path`.
    ///
    /// # Errors
    /// As [`Kvm::open`].
    pub fn open_at(path: &Path) -> Result<Self> {
        Self::try_open(path).map_err(|failure| crate::host::explain_open_failure(path, failure))
    }

    pub(crate) fn try_open(path: &Path) -> Result<Self, OpenFailure> {
        let c_path = CString::new(path.as_os_str().as_bytes())
            .map_err(|e| OpenFailure::Open(io::Error::new(io::ErrorKind::InvalidInput, e)))?;
        let fd =
            kvm_ioctls::Kvm::new_with_path(&c_path).map_err(|e| OpenFailure::Open(io::Error::from(e)))?;
        match fd.get_api_version() {
            API_VERSION => {}
            other => return Err(OpenFailure::ApiVersion(other)),
        }
        let missing: Vec<_> =
            REQUIRED.iter().filter(|(cap, _)| !fd.check_extension(*cap)).map(|(_, name)| *name).collect();
        if !missing.is_empty() {
            return Err(OpenFailure::Missing(missing));
        }
        let msrs = fd
            .get_msr_index_list()
            .map_err(|e| OpenFailure::Query(Error::os("KVM_GET_MSR_INDEX_LIST", "", e)))?
            .as_slice()
            .to_vec();
        Ok(Self { system: Arc::new(System { fd, msrs, cpuid: Mutex::default() }) })
    }
}

impl System {
    fn supported_cpuid(&self) -> Result<Cpuid> {
        // Held while it is asked for: who comes meanwhile waits for the same answer.
        let mut known = self.cpuid.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cpuid) = &*known {
            return Ok(cpuid.clone());
        }
        let cpuid = self
            .fd
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|e| Error::os("KVM_GET_SUPPORTED_CPUID", "", e))?;
        let mut cpuid = Cpuid::from(&cpuid);
        if let Some(leaf) = cpuid.get_mut(1, 0) {
            // Before Linux 6.8 KVM left the bit to whoever makes the LAPIC.
            const TSC_DEADLINE: u32 = 1 << 24;
            // KVM leaves it to us; without it a guest does not look for the leaves from 0x4000_0000.
            const HYPERVISOR: u32 = 1 << 31;
            if self.fd.check_extension(Cap::TscDeadlineTimer) {
                leaf.ecx |= TSC_DEADLINE;
            }
            leaf.ecx |= HYPERVISOR;
        }
        Ok(known.insert(cpuid).clone())
    }
}

impl Backend for Kvm {
    fn name(&self) -> &'static str {
        NAME
    }

    fn supports(&self, capability: Capability) -> bool {
        let has = |cap| self.system.fd.check_extension(cap);
        match capability {
            Capability::Irqchip => {
                [Cap::Irqchip, Cap::Pit2, Cap::SignalMsi, Cap::IrqRouting, Cap::Irqfd].into_iter().all(has)
            }
            // The log is older than the capabilities.
            Capability::DirtyLog | Capability::SaveRestore => true,
            Capability::Doorbell => has(Cap::Ioeventfd),
            Capability::ReadOnlyMemory => has(Cap::ReadonlyMem),
            Capability::Debug => has(Cap::SetGuestDebug),
            Capability::Hardware => crate::host::cpu_has_virtualization(),
        }
    }

    fn supported_cpuid(&self) -> Result<Cpuid> {
        self.system.supported_cpuid()
    }

    fn max_vcpus(&self) -> u32 {
        u32::try_from(self.system.fd.get_max_vcpus()).unwrap_or(u32::MAX)
    }

    fn create_vm(&self, config: &BackendConfig) -> Result<Arc<dyn BackendVm>> {
        Ok(Arc::new(vm::KvmVm::new(self, config)?))
    }
}
