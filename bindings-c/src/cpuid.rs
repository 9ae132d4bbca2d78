//! What CPUID tells a guest.

use std::ffi::c_char;
use std::mem::MaybeUninit;

use vmcore::cpuid::{CpuConfig, Cpuid, CpuidEntry, Topology};
use vmcore::host;

use crate::bytes::text;
use crate::error::{give, guard, need, put, vmcore_error};
use crate::host::{accel, vmcore_accel};

/// All answers of CPUID for one vCPU, sorted by leaf and subleaf.
pub struct vmcore_cpuid {
    pub(crate) table: Cpuid,
}

/// One answer of CPUID.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct vmcore_cpuid_entry {
    /// EAX on input.
    pub leaf: u32,
    /// ECX on input, where the leaf has subleaves; else 0.
    pub subleaf: u32,
    /// EAX on output.
    pub eax: u32,
    /// EBX on output.
    pub ebx: u32,
    /// ECX on output.
    pub ecx: u32,
    /// EDX on output.
    pub edx: u32,
    /// Whether the leaf has subleaves.
    pub has_subleaf: bool,
}

impl From<CpuidEntry> for vmcore_cpuid_entry {
    fn from(entry: CpuidEntry) -> Self {
        let CpuidEntry { leaf, subleaf, eax, ebx, ecx, edx } = entry;
        Self { leaf, subleaf: subleaf.unwrap_or(0), eax, ebx, ecx, edx, has_subleaf: subleaf.is_some() }
    }
}

impl From<vmcore_cpuid_entry> for CpuidEntry {
    fn from(entry: vmcore_cpuid_entry) -> Self {
        let vmcore_cpuid_entry { leaf, subleaf, eax, ebx, ecx, edx, has_subleaf } = entry;
        Self { leaf, subleaf: has_subleaf.then_some(subleaf), eax, ebx, ecx, edx }
    }
}

/// Everything that a backend of this host can present.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_cpuid_supported(
    kind: vmcore_accel,
    out: Option<&mut MaybeUninit<*mut vmcore_cpuid>>,
) -> Option<Box<vmcore_error>> {
    guard(|| give(out, vmcore_cpuid { table: host::choose(accel(kind)?)?.0.supported_cpuid()? }))
}

/// What vCPU number `id` of a VM with `cpus` cores of one socket is told, for `model`: "best", "v1" to "v4", "host".
/// `irqchip` is whether the VM has interrupt controllers.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_cpuid_of_model(
    kind: vmcore_accel,
    model: *const c_char,
    cpus: u32,
    id: u32,
    irqchip: bool,
    out: Option<&mut MaybeUninit<*mut vmcore_cpuid>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let topology = Topology::of_cores(cpus);
        let config = CpuConfig { model: text!(model).parse()?, topology, lapic: irqchip, tsc_khz: None };
        let supported = host::choose(accel(kind)?)?.0.supported_cpuid()?;
        give(out, vmcore_cpuid { table: config.cpuid(&supported, topology.apic_id(id))? })
    })
}

/// How many answers there are.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_cpuid_len(cpuid: Option<&vmcore_cpuid>) -> usize {
    cpuid.map_or(0, |cpuid| cpuid.table.entries().len())
}

/// Answer number `index`.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_cpuid_get(
    cpuid: Option<&vmcore_cpuid>,
    index: usize,
    out: Option<&mut MaybeUninit<vmcore_cpuid_entry>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let entries = need(cpuid, "cpuid")?.table.entries();
        let entry = entries.get(index).ok_or_else(|| {
            vmcore_error::argument("index", index, &format!("there are {} answers", entries.len()))
        })?;
        put(out, (*entry).into())
    })
}

/// Adds an answer, or replaces the one for its leaf and subleaf.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_cpuid_set(
    cpuid: Option<&mut vmcore_cpuid>,
    entry: Option<&vmcore_cpuid_entry>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let entry = *need(entry, "entry")?;
        need(cpuid, "cpuid")?.table.set(entry.into());
        Ok(())
    })
}

/// Frees it.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_cpuid_delete(cpuid: Option<Box<vmcore_cpuid>>) {
    drop(cpuid);
}
