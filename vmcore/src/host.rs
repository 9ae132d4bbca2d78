//! What this host offers: which backends can be used, why not, and what to do about it.
//!
//! [`check`] looks at everything and takes a few milliseconds; [`choose`] takes the shortest way to
//! a backend. That `/dev/kvm` opens says little: some sandboxes have a *software KVM*, which
//! emulates the guest's kernel mode at a thousandth of the speed and does not know every
//! instruction. It is told by a CPU without VMX and SVM, and [`check`] makes sure by the time that a
//! short guest loop takes.

use std::arch::x86_64::__cpuid;
use std::fmt;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::backend::{Backend, BackendConfig, Slot, VcpuExit, VcpuIo};
use crate::error::{Error, Result};
use crate::kvm::{Kvm, OpenFailure};
use crate::memory::{GuestAddress, MemoryRegion};

/// Where the KVM device is.
const KVM_PATH: &str = "/dev/kvm";

/// Above this a guest instruction in kernel mode is emulated: hardware takes well below 1 ns,
/// emulators several hundred.
const EMULATED_NS: f64 = 100.0;

/// How far a backend can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Status {
    /// For every guest.
    Usable,
    /// For guests of some thousand instructions, not for kernels.
    SmallGuestsOnly,
    /// Not at all.
    NotUsable,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Status::Usable => "usable",
            Status::SmallGuestsOnly => "usable for small guests only",
            Status::NotUsable => "not usable",
        })
    }
}

/// What is known about one backend on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendReport {
    /// Name of the backend.
    pub name: &'static str,
    /// How far it can be used.
    pub status: Status,
    /// Why, in one sentence.
    pub reason: String,
    /// What the user should do; empty where there is nothing to do.
    pub advice: String,
    /// The facts behind it, as name and value.
    pub details: Vec<(&'static str, String)>,
}

/// Every backend on this host, in the order in which [`Accel::Auto`] prefers them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// One entry a backend.
    pub backends: Vec<BackendReport>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for backend in &self.backends {
            writeln!(f, "{}: {}", backend.name, backend.status)?;
            writeln!(f, "  why:  {}", backend.reason)?;
            if !backend.advice.is_empty() {
                writeln!(f, "  do:   {}", backend.advice)?;
            }
            for (name, value) in &backend.details {
                writeln!(f, "  {name}: {value}")?;
            }
        }
        Ok(())
    }
}

/// Which backend to take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Accel {
    /// The best that can be used.
    #[default]
    Auto,
    /// KVM, whatever [`check`] thinks of it.
    Kvm,
    /// The software CPU.
    Soft,
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Accel::Auto => "auto",
            Accel::Kvm => "kvm",
            Accel::Soft => "soft",
        })
    }
}

impl FromStr for Accel {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "auto" => Ok(Accel::Auto),
            "kvm" => Ok(Accel::Kvm),
            "soft" => Ok(Accel::Soft),
            other => Err(Error::Config {
                what: "accelerator",
                value: other.into(),
                fix: "auto, kvm and soft are known".into(),
            }),
        }
    }
}

/// Looks at every backend. Where the CPU has no hardware virtualization but KVM opens, this runs a
/// loop of some hundred instructions in a VM a few times, which takes two milliseconds.
pub fn check() -> Report {
    let mut backends = vec![judge(&Facts::gather(Path::new(KVM_PATH))), soft_report()];
    // What can be used for everything comes first.
    backends.sort_by_key(|report| report.status != Status::Usable);
    Report { backends }
}

#[cfg(feature = "soft")]
fn soft_report() -> BackendReport {
    BackendReport {
        name: "soft",
        status: Status::Usable,
        reason: "the software CPU runs in this process and needs nothing of the host".into(),
        advice: String::new(),
        details: vec![],
    }
}

#[cfg(not(feature = "soft"))]
fn soft_report() -> BackendReport {
    BackendReport {
        name: "soft",
        status: Status::NotUsable,
        reason: "this program was built without the software CPU".into(),
        advice: "build vmcore with its feature \"soft\"".into(),
        details: vec![],
    }
}

/// The backend for `accel`, and in a few words why it was taken. [`Accel::Auto`] takes KVM where it
/// is real, the software CPU elsewhere, and says so to the log.
///
/// # Errors
/// [`Error::BackendUnusable`] where the backend asked for, or every backend, cannot be used.
pub fn choose(accel: Accel) -> Result<(Arc<dyn Backend>, String)> {
    let chosen: (Arc<dyn Backend>, String) = match accel {
        Accel::Kvm => (Arc::new(Kvm::open()?), "as asked for".into()),
        Accel::Soft => (soft()?, "as asked for".into()),
        Accel::Auto => automatic()?,
    };
    log::info!("backend {}: {}", chosen.0.name(), chosen.1);
    Ok(chosen)
}

/// KVM where it is real, else the software CPU, else whatever KVM there is.
fn automatic() -> Result<(Arc<dyn Backend>, String)> {
    let kvm = Kvm::open();
    if cpu_has_virtualization()
        && let Ok(kvm) = kvm
    {
        return Ok((Arc::new(kvm), "the CPU has hardware virtualization".into()));
    }
    if let Ok(soft) = soft() {
        let why = match kvm {
            Ok(_) => "the CPU offers no hardware virtualization, and KVM here is a software one".into(),
            Err(error) => error.to_string(),
        };
        return Ok((soft, why));
    }
    let kvm = kvm?;
    // Not probed: there is nothing else to take instead, and the CPU has said enough.
    let report = judge(&Facts::of_cpu(Path::new(KVM_PATH)));
    log::warn!("kvm: {}; {}", report.reason, report.advice);
    Ok((Arc::new(kvm), format!("the only backend: {}", report.reason)))
}

#[cfg(feature = "soft")]
#[expect(clippy::unnecessary_wraps, reason = "without the feature there is an error")]
fn soft() -> Result<Arc<dyn Backend>> {
    Ok(Arc::new(crate::soft::Soft::new()))
}

#[cfg(not(feature = "soft"))]
fn soft() -> Result<Arc<dyn Backend>> {
    Err(unusable(soft_report()))
}

fn unusable(report: BackendReport) -> Error {
    Error::BackendUnusable { backend: report.name, reason: report.reason, fix: report.advice }
}

/// Whether the CPU offers hardware virtualization: VMX (SDM vol. 3C, 24.6) or SVM (APM vol. 2, 15.4).
pub(crate) fn cpu_has_virtualization() -> bool {
    const VMX: u32 = 1 << 5;
    const SVM: u32 = 1 << 2;
    let extended = __cpuid(0x8000_0000).eax >= 0x8000_0001 && __cpuid(0x8000_0001).ecx & SVM != 0;
    __cpuid(1).ecx & VMX != 0 || extended
}

/// The error of an attempt to open the KVM device at `path`.
pub(crate) fn explain_open_failure(path: &Path, failure: OpenFailure) -> Error {
    let facts = Facts { device: Device::from_failure(path, failure), ..Facts::of_cpu(path) };
    unusable(judge(&facts))
}

/// The hypervisor that this host itself runs under, by its signature (CPUID 0x4000_0000).
fn hypervisor() -> Option<String> {
    const HYPERVISOR: u32 = 1 << 31;
    if __cpuid(1).ecx & HYPERVISOR == 0 {
        return None;
    }
    let leaf = __cpuid(0x4000_0000);
    let bytes: Vec<u8> = [leaf.ebx, leaf.ecx, leaf.edx].into_iter().flat_map(u32::to_le_bytes).collect();
    let name = String::from_utf8_lossy(&bytes).trim_matches('\0').to_owned();
    Some(if name.is_empty() { "one that does not say its name".into() } else { name })
}

/// The kernel module that would make `/dev/kvm` on this CPU.
fn module() -> &'static str {
    let vendor = __cpuid(0);
    // "AuthenticAMD" and "HygonGenuine" have SVM, everything else VMX.
    if vendor.ebx == u32::from_le_bytes(*b"Auth") || vendor.ebx == u32::from_le_bytes(*b"Hygo") {
        "kvm_amd"
    } else {
        "kvm_intel"
    }
}

/// What was found at the device's path.
#[derive(Debug)]
enum Device {
    /// Nothing.
    Absent,
    /// It may not be opened by this user.
    Forbidden {
        /// Permission bits.
        mode: u32,
        /// Name of the group, or its number.
        group: String,
    },
    /// It is no character device.
    OtherFile,
    /// `open` failed for another reason.
    OpenFailed(io::Error),
    /// Another interface than KVM's of version 12.
    ApiVersion(i32),
    /// Capabilities are missing.
    Missing(Vec<&'static str>),
    /// A question to the open device failed.
    Query(String),
    /// It works as far as was looked; where a probe was run, the time of an instruction.
    Open { probe_ns: Option<Result<f64, String>> },
}

impl Device {
    fn from_failure(path: &Path, failure: OpenFailure) -> Self {
        let error = match failure {
            OpenFailure::Open(error) => error,
            OpenFailure::ApiVersion(version) => return Device::ApiVersion(version),
            OpenFailure::Missing(capabilities) => return Device::Missing(capabilities),
            OpenFailure::Query(error) => return Device::Query(error.to_string()),
        };
        let metadata = std::fs::metadata(path);
        match (error.kind(), metadata) {
            (io::ErrorKind::NotFound, _) => Device::Absent,
            (_, Ok(metadata)) if !metadata.file_type().is_char_device() => Device::OtherFile,
            // By the node's own permissions; EPERM comes from a container's device rules.
            (_, Ok(metadata)) if error.raw_os_error() == Some(libc::EACCES) => {
                Device::Forbidden { mode: metadata.mode() & 0o777, group: group_name(metadata.gid()) }
            }
            _ => Device::OpenFailed(error),
        }
    }
}

fn group_name(gid: u32) -> String {
    let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
    let number = gid.to_string();
    groups
        .lines()
        .find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            (fields.nth(1)? == number).then(|| name.to_owned())
        })
        .unwrap_or(number)
}

/// Everything that the verdict on KVM depends on.
#[derive(Debug)]
struct Facts {
    path: PathBuf,
    device: Device,
    /// VMX or SVM.
    virtualization: bool,
    /// The hypervisor below, if there is one.
    hypervisor: Option<String>,
    /// The module that would make the device.
    module: &'static str,
}

impl Facts {
    fn of_cpu(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            device: Device::Open { probe_ns: None },
            virtualization: cpu_has_virtualization(),
            hypervisor: hypervisor(),
            module: module(),
        }
    }

    fn gather(path: &Path) -> Self {
        let mut facts = Self::of_cpu(path);
        facts.device = match Kvm::try_open(path) {
            Ok(kvm) => {
                let needed = !facts.virtualization;
                Device::Open { probe_ns: needed.then(|| probe(&kvm).map_err(|e| e.to_string())) }
            }
            Err(failure) => Device::from_failure(path, failure),
        };
        facts
    }
}

/// What to do on a machine whose CPU offers no virtualization.
fn without_hardware(facts: &Facts) -> String {
    match &facts.hypervisor {
        Some(name) => format!(
            "this machine is itself a guest (of {name}): have nested virtualization enabled for it, or use \
             another machine"
        ),
        None => {
            "enable virtualization (VT-x, AMD-V, SVM mode) in the machine's firmware setup, if its CPU has \
                 it"
            .into()
        }
    }
}

/// The verdict on KVM. Looks at nothing but `facts`.
fn judge(facts: &Facts) -> BackendReport {
    let path = facts.path.display();
    let module = facts.module;
    let mut details = vec![
        ("hardware virtualization", if facts.virtualization { "yes" } else { "no" }.to_owned()),
        ("this host runs under", facts.hypervisor.clone().unwrap_or_else(|| "no hypervisor".into())),
    ];
    let no = |reason: String, advice: String| (Status::NotUsable, reason, advice);
    let (status, reason, advice) = match &facts.device {
        Device::Absent if facts.virtualization => no(
            format!("{path} does not exist, though the CPU has hardware virtualization"),
            format!(
                "load the kernel's module (sudo modprobe {module}), or, in a container, pass the device in \
                 (--device {path})"
            ),
        ),
        Device::Absent => no(
            format!("{path} does not exist, and the CPU offers no hardware virtualization"),
            without_hardware(facts),
        ),
        Device::Forbidden { mode, group } => {
            details.push(("permissions", format!("{mode:03o}, group {group}")));
            let advice = if mode & 0o060 == 0o060 {
                format!(
                    "become a member of the group {group} (sudo usermod -aG {group} $USER) and log in again"
                )
            } else {
                format!(
                    "give yourself access (sudo setfacl -m u:$USER:rw {path}), or have its udev rule changed"
                )
            };
            no(format!("this user may not open {path}"), advice)
        }
        Device::OtherFile => no(
            format!("{path} is not a character device"),
            format!("remove it and load the kernel's module (sudo modprobe {module})"),
        ),
        Device::OpenFailed(error) => {
            let advice = match error.raw_os_error() {
                Some(libc::ENODEV | libc::ENXIO) if facts.virtualization => {
                    format!(
                        "nothing is behind the device node: load the kernel's module (sudo modprobe {module})"
                    )
                }
                Some(libc::ENODEV | libc::ENXIO) => {
                    format!("nothing is behind the device node; {}", without_hardware(facts))
                }
                Some(libc::EBUSY) => {
                    "another hypervisor holds the CPU's virtualization: stop it (VirtualBox, VMware)".into()
                }
                Some(libc::EPERM) => {
                    "the container's device rules forbid it: allow character device 10:232 for it".into()
                }
                Some(libc::EMFILE | libc::ENFILE) => {
                    "raise the limit of open files (ulimit -n), or close some".into()
                }
                _ => "look into the kernel's log (dmesg) for what KVM says".into(),
            };
            no(format!("{path} cannot be opened: {error}"), advice)
        }
        Device::ApiVersion(-1) => no(
            format!("{path} is not a KVM device"),
            format!("have the device node made anew, as character device 10:232, after loading {module}"),
        ),
        Device::ApiVersion(version) => no(
            format!("{path} speaks version {version} of KVM's interface, not 12"),
            "use a kernel of this century: 2.6.22 or later".into(),
        ),
        Device::Missing(capabilities) => no(
            format!("the kernel's KVM is too old or cut down: it lacks {}", capabilities.join(", ")),
            "use a kernel that has them; 4.19 and later do".into(),
        ),
        Device::Query(error) => no(
            format!("{path} opens but does not answer: {error}"),
            "look into the kernel's log (dmesg)".into(),
        ),
        Device::Open { .. } if facts.virtualization => {
            (Status::Usable, "the CPU has hardware virtualization".into(), String::new())
        }
        Device::Open { probe_ns: None } => (
            Status::SmallGuestsOnly,
            format!("{path} opens, but the CPU offers no hardware virtualization: it is a software KVM"),
            without_hardware(facts),
        ),
        Device::Open { probe_ns: Some(Err(error)) } => no(
            format!("the CPU offers no hardware virtualization, and {path} cannot run a guest: {error}"),
            without_hardware(facts),
        ),
        Device::Open { probe_ns: Some(Ok(ns)) } => {
            details.push(("guest kernel mode", format!("{ns:.1} ns an instruction")));
            if *ns < EMULATED_NS {
                let reason = format!(
                    "{path} runs guest kernel mode at hardware speed, though the CPU shows no VMX or SVM"
                );
                (Status::Usable, reason, String::new())
            } else {
                let reason = format!(
                    "{path} is a software KVM: without hardware virtualization it emulates guest kernel mode \
                     ({ns:.0} ns an instruction) and does not know every instruction"
                );
                (Status::SmallGuestsOnly, reason, without_hardware(facts))
            }
        }
    };
    BackendReport { name: "kvm", status, reason, advice, details }
}

/// The guest of the probe makes no I/O.
struct NoIo;

impl VcpuIo for NoIo {
    fn port_read(&mut self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn port_write(&mut self, _: u16, _: &[u8]) {}
    fn mmio_read(&mut self, _: GuestAddress, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&mut self, _: GuestAddress, _: &[u8]) {}
}

/// The time an instruction takes in the guest's most privileged mode, in ns.
fn probe(backend: &dyn Backend) -> Result<f64> {
    /// `again: dec cx; jnz again; hlt`
    const LOOP: [u8; 4] = [0x49, 0x75, 0xfd, 0xf4];
    /// Two instructions each; the difference between both numbers is what counts.
    const FEW: u16 = 1;
    const MANY: u16 = 200;
    const BASE: u16 = 0x1000;

    let vm = backend.create_vm(&BackendConfig::default())?;
    let region = MemoryRegion::anonymous(GuestAddress(BASE.into()), 4096)?;
    region.fill(0, &LOOP)?;
    vm.map(Slot(0), Arc::new(region))?;
    let mut vcpu = vm.create_vcpu(0)?;
    let mut sregs = vcpu.sregs()?;
    sregs.cs.selector = 0;
    sregs.cs.base = 0;
    vcpu.set_sregs(&sregs)?;
    let mut run = |iterations: u16| {
        let mut regs = vcpu.regs()?;
        (regs.rip, regs.rcx, regs.rflags) = (BASE.into(), iterations.into(), 2);
        vcpu.set_regs(&regs)?;
        let begin = Instant::now();
        match vcpu.run(&mut NoIo)? {
            VcpuExit::Halted => Ok(begin.elapsed()),
            other => Err(Error::Unsupported {
                what: format!("a loop that ends in HLT (it ended with {other:?})"),
                backend: backend.name(),
                fix: "this KVM cannot be used".into(),
            }),
        }
    };
    // Of each the shortest time: other programs can only make it longer, and the first run pays for
    // the pages and tables.
    let (mut few, mut many) = (Duration::MAX, Duration::MAX);
    for _ in 0..3 {
        few = few.min(run(FEW)?);
        many = many.min(run(MANY)?);
    }
    Ok(many.saturating_sub(few).as_secs_f64() * 1e9 / (2.0 * f64::from(MANY - FEW)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(virtualization: bool, device: Device) -> Facts {
        Facts { path: "/dev/kvm".into(), device, virtualization, hypervisor: None, module: "kvm_amd" }
    }

    /// Judges, and looks for the status and for words that reason and advice must have.
    fn expect(facts: Facts, status: Status, reason: &str, advice: &str) {
        let report = judge(&facts);
        assert_eq!(report.status, status, "{report:?}");
        assert!(report.reason.contains(reason), "{report:?}");
        assert!(report.advice.contains(advice), "{report:?}");
    }

    #[test]
    fn an_absent_device_is_told_by_the_cpu_and_the_hypervisor() {
        expect(facts(true, Device::Absent), Status::NotUsable, "does not exist", "modprobe kvm_amd");
        expect(facts(false, Device::Absent), Status::NotUsable, "no hardware virt", "firmware");
        let nested = Facts { hypervisor: Some("KVMKVMKVM".into()), ..facts(false, Device::Absent) };
        expect(nested, Status::NotUsable, "no hardware virt", "(of KVMKVMKVM)");
    }

    #[test]
    fn a_missing_permission_names_the_group_that_helps() {
        let forbidden = |mode| facts(true, Device::Forbidden { mode, group: "kvm".into() });
        expect(forbidden(0o660), Status::NotUsable, "may not open", "usermod -aG kvm");
        expect(forbidden(0o600), Status::NotUsable, "may not open", "setfacl");
    }

    #[test]
    fn a_device_that_does_not_open_says_why() {
        let failed = |hw, errno| facts(hw, Device::OpenFailed(io::Error::from_raw_os_error(errno)));
        expect(failed(true, libc::ENODEV), Status::NotUsable, "cannot be opened", "modprobe");
        expect(failed(false, libc::ENXIO), Status::NotUsable, "cannot be opened", "firmware");
        expect(failed(true, libc::EBUSY), Status::NotUsable, "cannot be opened", "another hypervisor");
        expect(failed(true, libc::EPERM), Status::NotUsable, "cannot be opened", "10:232");
        expect(failed(true, libc::EMFILE), Status::NotUsable, "cannot be opened", "ulimit -n");
        expect(failed(true, libc::EIO), Status::NotUsable, "cannot be opened", "dmesg");
        expect(facts(true, Device::OtherFile), Status::NotUsable, "character device", "modprobe");
    }

    #[test]
    fn old_kernels_are_told_what_they_lack() {
        expect(facts(true, Device::ApiVersion(-1)), Status::NotUsable, "not a KVM", "10:232");
        expect(facts(true, Device::ApiVersion(11)), Status::NotUsable, "version 11", "kernel");
        let missing = Device::Missing(vec!["KVM_CAP_A", "KVM_CAP_B"]);
        expect(facts(true, missing), Status::NotUsable, "KVM_CAP_A, KVM_CAP_B", "4.19");
    }

    #[test]
    fn a_software_kvm_is_told_by_its_speed() {
        let probed = |hw, ns| facts(hw, Device::Open { probe_ns: ns });
        expect(probed(true, None), Status::Usable, "hardware", "");
        expect(probed(false, Some(Ok(660.0))), Status::SmallGuestsOnly, "660 ns", "firmware");
        expect(probed(false, Some(Ok(0.4))), Status::Usable, "hardware speed", "");
        expect(probed(false, Some(Err("no".into()))), Status::NotUsable, "cannot run", "firmware");
        expect(probed(false, None), Status::SmallGuestsOnly, "software KVM", "firmware");
    }

    #[test]
    fn paths_that_are_no_kvm_are_refused() {
        let reason = |path: &Path| match Kvm::open_at(path).unwrap_err() {
            Error::BackendUnusable { backend: "kvm", reason, fix } if !fix.is_empty() => reason,
            other => panic!("{other}"),
        };
        let dir = tempfile::tempdir().unwrap();
        assert!(reason(&dir.path().join("none")).contains("does not exist"));
        assert!(reason(dir.path()).contains("not a character device"));
        // A device that opens and is not KVM.
        assert!(reason(Path::new("/dev/null")).contains("not a KVM device"));
    }

    #[test]
    fn failures_to_open_are_told_apart_by_what_is_at_the_path() {
        let of = |path: &Path, errno| {
            Device::from_failure(path, OpenFailure::Open(io::Error::from_raw_os_error(errno)))
        };
        let (null, dir) = (Path::new("/dev/null"), tempfile::tempdir().unwrap());
        // A device of another user's, as /dev/kvm is for who is not in its group.
        let Device::Forbidden { mode, group } = of(null, libc::EACCES) else { panic!("not forbidden") };
        assert_eq!((mode, group), (0o666, group_name(0)));
        // The same error as for the user's own rights would name the wrong culprit.
        expect(facts(true, of(null, libc::EPERM)), Status::NotUsable, "cannot be opened", "10:232");
        expect(facts(false, of(null, libc::ENODEV)), Status::NotUsable, "cannot be opened", "firmware");
        assert!(matches!(of(&dir.path().join("none"), libc::ENOENT), Device::Absent));
        assert!(matches!(of(dir.path(), libc::EACCES), Device::OtherFile));
        let missing = Device::from_failure(null, OpenFailure::Missing(vec!["KVM_CAP_A"]));
        assert!(matches!(missing, Device::Missing(what) if what == ["KVM_CAP_A"]));
        let query = OpenFailure::Query(Error::os("KVM_GET_MSR_INDEX_LIST", "", io::ErrorKind::Other));
        let asked = facts(true, Device::from_failure(null, query));
        expect(asked, Status::NotUsable, "KVM_GET_MSR_INDEX_LIST", "dmesg");
    }

    #[test]
    fn an_unusable_kvm_is_told_with_reason_and_advice() {
        let dir = tempfile::tempdir().unwrap();
        for path in [&dir.path().join("none"), dir.path(), Path::new("/dev/null")] {
            let report = judge(&Facts::gather(path));
            assert_eq!(report.status, Status::NotUsable);
            let text = Report { backends: vec![report.clone()] }.to_string();
            assert!(text.contains(path.to_str().unwrap()), "{text}");
            assert!(!report.advice.is_empty() && text.contains(&report.advice), "{text}");
            let error = unusable(report).to_string();
            assert!(error.contains("kvm backend cannot be used"), "{error}");
        }
    }

    #[test]
    fn the_report_shows_every_part() {
        let report = Report { backends: vec![judge(&facts(true, Device::Absent))] };
        let text = report.to_string();
        for part in ["kvm: not usable", "why:", "do:", "hardware virtualization: yes"] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn accelerators_are_named() {
        for accel in [Accel::Auto, Accel::Kvm, Accel::Soft] {
            assert_eq!(accel.to_string().parse::<Accel>().unwrap(), accel);
        }
        assert!("vmx".parse::<Accel>().unwrap_err().to_string().contains("auto, kvm and soft"));
    }
}
