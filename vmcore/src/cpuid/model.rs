//! Named CPU models: which features a guest sees.

use std::fmt;
use std::str::FromStr;

use super::feature::{self, Feature, Register};
use super::{Cpuid, CpuidEntry, Topology};
use crate::error::{Error, Result};

/// A CPU model.
///
/// The numbered ones are the levels of the x86-64 psABI with what a virtual machine needs besides:
/// frozen lists of features, cut to what the host has. A guest made with one can be restored on
/// every host that offers it. Vendor, family and model are still the host's under KVM, because a
/// kernel chooses mitigations by them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CpuModel {
    /// The highest of v1 to v3 that the host has every feature of.
    #[default]
    Best,
    /// x86-64-v1: SSE2. Every x86-64 CPU.
    V1,
    /// x86-64-v2: SSE4.2, POPCNT, CMPXCHG16B. CPUs since 2009.
    V2,
    /// x86-64-v3: AVX2, BMI, FMA, XSAVE. CPUs since 2013 (Intel) and 2015 (AMD).
    V3,
    /// x86-64-v4: AVX-512.
    V4,
    /// Everything the backend can present. The guest may not be restorable on any other host.
    Host,
}

/// The levels with names, in ascending order.
const LEVELS: [CpuModel; 4] = [CpuModel::V1, CpuModel::V2, CpuModel::V3, CpuModel::V4];

impl fmt::Display for CpuModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CpuModel::Best => "best",
            CpuModel::V1 => "v1",
            CpuModel::V2 => "v2",
            CpuModel::V3 => "v3",
            CpuModel::V4 => "v4",
            CpuModel::Host => "host",
        })
    }
}

impl FromStr for CpuModel {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let all = [CpuModel::Best, CpuModel::Host].into_iter().chain(LEVELS);
        all.into_iter().find(|model| model.to_string() == name).ok_or_else(|| Error::Config {
            what: "CPU model",
            value: name.into(),
            fix: "best, v1, v2, v3, v4 and host are known".into(),
        })
    }
}

/// What the vCPUs of a VM are like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuConfig {
    /// Which features they have.
    pub model: CpuModel,
    /// How they are grouped.
    pub topology: Topology,
    /// Whether they have local APICs: whether the VM has interrupt controllers.
    pub lapic: bool,
    /// Frequency of the TSC in kHz, to be told to the guest where it is known.
    pub tsc_khz: Option<u32>,
}

impl CpuConfig {
    /// What CPUID tells the vCPU with `apic_id` ([`Topology::apic_id`]), on a backend that can
    /// present `supported` ([`Backend::supported_cpuid`](crate::backend::Backend::supported_cpuid)).
    ///
    /// # Errors
    /// [`Error::Config`] where the model needs features that are not supported, naming them and the
    /// best model there is, and for a topology without vCPUs.
    pub fn cpuid(&self, supported: &Cpuid, apic_id: u32) -> Result<Cpuid> {
        self.topology.check()?;
        let mut cpuid = match self.model.resolve(supported)? {
            CpuModel::Host => supported.clone(),
            level => cut(level, supported),
        };
        // The bits that the guest's kernel switches are the backend's to show.
        cpuid.clear(feature::ASYNC_PF);
        if !self.lapic {
            cpuid.clear(feature::LAPIC);
        }
        tell_frequencies(&mut cpuid, self.tsc_khz);
        self.topology.apply(&mut cpuid, apic_id);
        Ok(cpuid)
    }
}

impl CpuModel {
    /// The model itself, once the host is known to have it; the level that [`CpuModel::Best`] means
    /// there.
    ///
    /// # Errors
    /// [`Error::Config`], naming the features that are missing.
    pub fn resolve(self, supported: &Cpuid) -> Result<CpuModel> {
        let best = || LEVELS.into_iter().take(3).rev().find(|level| level.missing(supported).is_empty());
        let wanted = match self {
            CpuModel::Host => return Ok(self),
            CpuModel::Best => best().unwrap_or(CpuModel::V1),
            level => level,
        };
        let missing = wanted.missing(supported);
        if missing.is_empty() {
            return Ok(wanted);
        }
        let fix = match best() {
            Some(best) => format!("{best} is the best that it has"),
            None => "not even v1 can be had; use host".into(),
        };
        Err(Error::Config {
            what: "CPU model",
            value: self.to_string(),
            fix: format!("this host's backend does not offer {}; {fix}", missing.join(", ")),
        })
    }

    /// Features that the level needs and `supported` lacks.
    fn missing(self, supported: &Cpuid) -> Vec<&'static str> {
        self.required().filter(|f| !f.is_in(supported)).map(|f| f.name).collect()
    }

    /// How many levels the model includes.
    fn levels(self) -> usize {
        LEVELS.iter().position(|level| *level == self).map_or(0, |at| at + 1)
    }

    fn required(self) -> impl Iterator<Item = &'static Feature> {
        [feature::V1, feature::V2, feature::V3, feature::V4].into_iter().take(self.levels()).flatten()
    }

    fn offered(self) -> impl Iterator<Item = &'static Feature> {
        let lists = [feature::OFFERED_V1, feature::OFFERED_V2, feature::OFFERED_V3, feature::OFFERED_V4];
        lists.into_iter().take(self.levels()).flatten()
    }

    /// State components of XSAVE that come with the level (SDM vol. 1, 13.1).
    fn xsave_components(self) -> u32 {
        const X87_SSE_AVX: u32 = 0b111;
        const AVX512: u32 = 0b1110_0000;
        match self {
            CpuModel::V3 => X87_SSE_AVX,
            CpuModel::V4 => X87_SSE_AVX | AVX512,
            _ => 0,
        }
    }
}

impl Cpuid {
    /// Checks that `supported` has what this table shows of instructions and modes: a guest that was
    /// shown them uses them. Other bits only say how the processor behaves.
    ///
    /// # Errors
    /// [`Error::State`], naming the features that are missing.
    pub(crate) fn check_offered_by(&self, supported: &Cpuid) -> Result<()> {
        let used = [&feature::OFFERED_V2, &feature::OFFERED_V3, &feature::OFFERED_V4, &feature::PAGES];
        let all = CpuModel::V4.required().chain(used.into_iter().copied().flatten());
        let missing: Vec<_> = all.filter(|f| f.is_in(self) && !f.is_in(supported)).map(|f| f.name).collect();
        if missing.is_empty() {
            return Ok(());
        }
        Err(Error::State {
            what: "the CPU that the guest was shown",
            expected: "features that this host's backend offers".into(),
            found: format!("also {}", missing.join(", ")),
        })
    }

    /// Checks that KVM on a processor of `host`'s vendor can serve a guest's hypercalls: VMCALL is Intel's
    /// instruction and VMMCALL AMD's, and a kernel has one of them in its code. KVM replaces the wrong one when
    /// it meets it, by a write at the guest's privilege: kernels write-protect their code, so the guest gets
    /// a page fault in the middle of a wake-up.
    ///
    /// # Errors
    /// [`Error::State`], naming the features that make the guest call.
    pub(crate) fn check_hypercalls(&self, host: &Cpuid) -> Result<()> {
        if self.is_amd() == host.is_amd() {
            return Ok(());
        }
        let calls: Vec<_> = feature::HYPERCALLS.iter().filter(|f| f.is_in(self)).map(|f| f.name).collect();
        if calls.is_empty() {
            return Ok(());
        }
        let vendor = |amd| if amd { "AMD" } else { "Intel" };
        Err(Error::State {
            what: "the CPU that the guest was shown",
            expected: format!("{}'s, or none of the features that need hypercalls", vendor(host.is_amd())),
            found: format!("{}'s, with {}", vendor(self.is_amd()), calls.join(", ")),
        })
    }

    /// Clears the bits of `features`.
    fn clear(&mut self, features: &[Feature]) {
        for feature in features {
            if let Some(entry) = self.get_mut(feature.leaf, feature.subleaf) {
                *register(entry, feature.register) &= !(1 << feature.bit);
            }
        }
    }
}

fn register(entry: &mut CpuidEntry, register: Register) -> &mut u32 {
    match register {
        Register::Eax => &mut entry.eax,
        Register::Ebx => &mut entry.ebx,
        Register::Ecx => &mut entry.ecx,
        Register::Edx => &mut entry.edx,
    }
}

/// `supported`, cut to the features and leaves of `level`.
fn cut(level: CpuModel, supported: &Cpuid) -> Cpuid {
    let mut cpuid = Cpuid::default();
    let components = level.xsave_components();
    let last = if components == 0 { 0xb } else { 0xd };
    for entry in supported.entries() {
        let mut entry = *entry;
        match (entry.leaf, entry.subleaf.unwrap_or(0)) {
            (0, _) => entry.eax = entry.eax.min(last),
            // Family, model and stepping; the size of CLFLUSH's line.
            (1, _) => (entry.ebx, entry.ecx, entry.edx) = (entry.ebx & 0xff00, 0, 0),
            (2 | 4, _) => {}
            // No further subleaves.
            (0x6 | 0x7 | 0x8000_0007 | 0x4000_0001, 0) => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
            (0xd, _) if components != 0 => {
                cpuid.set(entry);
                continue;
            }
            (0x8000_0000, _) => entry.eax = entry.eax.min(0x8000_0021),
            (0x8000_0001, _) => (entry.ebx, entry.ecx, entry.edx) = (0, 0, 0),
            // Caches and TLBs.
            (0x8000_0005 | 0x8000_0006 | 0x8000_001d, _) => {}
            // Widths of addresses.
            (0x8000_0008, _) => (entry.ebx, entry.ecx, entry.edx) = (0, 0, 0),
            (0x8000_0021, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            (0x4000_0000, _) => {}
            _ => continue,
        }
        cpuid.set(entry);
    }
    for feature in level.required().chain(level.offered()).filter(|f| f.is_in(supported)) {
        if feature.leaf == 0xd {
            continue;
        }
        if let Some(entry) = cpuid.get_mut(feature.leaf, feature.subleaf) {
            *register(entry, feature.register) |= 1 << feature.bit;
        }
    }
    if components != 0 {
        cut_xsave(&mut cpuid, components, level);
    }
    name(&mut cpuid, level);
    cpuid
}

/// Cuts leaf 0xD to `components`, and makes its sizes fit (SDM vol. 2A, "CPUID", leaf 0DH).
fn cut_xsave(cpuid: &mut Cpuid, components: u32, level: CpuModel) {
    /// The legacy area and the header.
    const BASE_BYTES: u32 = 576;
    let offered = cpuid.get(0xd, 0).map_or(0, |e| e.eax) & components;
    cpuid.retain(|e| match (e.leaf, e.subleaf) {
        (0xd, Some(component @ 2..)) => component < 32 && offered & 1 << component != 0,
        _ => true,
    });
    let end = |e: &CpuidEntry| e.ebx.saturating_add(e.eax);
    let parts = cpuid.entries.iter().filter(|e| e.leaf == 0xd && e.subleaf >= Some(2));
    let size = parts.map(end).max().unwrap_or(0).max(BASE_BYTES);
    if let Some(entry) = cpuid.get_mut(0xd, 0) {
        (entry.eax, entry.ebx, entry.ecx, entry.edx) = (offered, size, size, 0);
    }
    if let Some(entry) = cpuid.get_mut(0xd, 1) {
        let mut instructions = 0;
        for feature in level.offered().filter(|f| f.leaf == 0xd && f.subleaf == 1) {
            instructions |= entry.eax & 1 << feature.bit;
        }
        // No supervisor components.
        (entry.eax, entry.ebx, entry.ecx, entry.edx) = (instructions, size, 0, 0);
    }
}

/// Writes the processor's brand string: 48 bytes in leaves 0x8000_0002 to 4.
fn name(cpuid: &mut Cpuid, level: CpuModel) {
    let mut brand = [0; 48];
    let text = format!("vmcore virtual CPU (x86-64-{level})");
    brand.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = from);
    let (words, _) = brand.as_chunks::<4>();
    for (leaf, words) in (0x8000_0002..).zip(words.chunks_exact(4)) {
        let word = |n: usize| words.get(n).copied().map_or(0, u32::from_le_bytes);
        let (eax, ebx, ecx, edx) = (word(0), word(1), word(2), word(3));
        cpuid.set(CpuidEntry { leaf, subleaf: None, eax, ebx, ecx, edx });
    }
}

/// Leaf 0x4000_0010, an extension of the hypervisor leaves by VMware that other kernels read under
/// KVM too: TSC and APIC bus frequency in kHz.
fn tell_frequencies(cpuid: &mut Cpuid, tsc_khz: Option<u32>) {
    /// The LAPIC timer of KVM, and of every backend here, ticks every nanosecond.
    const APIC_BUS_KHZ: u32 = 1_000_000;
    const LEAF: u32 = 0x4000_0010;
    let Some(tsc_khz) = tsc_khz else { return };
    if let Some(signature) = cpuid.get_mut(0x4000_0000, 0) {
        // KVM of old says 0 for its only other leaf.
        signature.eax = signature.eax.max(LEAF);
        cpuid.set(CpuidEntry { leaf: LEAF, eax: tsc_khz, ebx: APIC_BUS_KHZ, ..CpuidEntry::default() });
    }
    // Ratio and frequency of the crystal, where the processor tells them.
    if let Some(crystal) = cpuid.get_mut(0x15, 0)
        && crystal.ebx != 0
        && crystal.ecx != 0
    {
        let hz = u64::from(tsc_khz) * 1000 * u64::from(crystal.eax) / u64::from(crystal.ebx);
        crystal.ecx = u32::try_from(hz).unwrap_or(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(leaf: u32, subleaf: Option<u32>, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidEntry {
        CpuidEntry { leaf, subleaf, eax, ebx, ecx, edx }
    }

    /// A host with every feature bit there is, of the given vendor.
    fn everything(vendor: &[u8; 12]) -> Cpuid {
        let all = [u32::MAX; 4];
        let word = |n: usize| u32::from_le_bytes(vendor[n..n + 4].try_into().unwrap());
        let mut cpuid = Cpuid::new([
            entry(0, None, [0x20, word(0), word(8), word(4)]),
            entry(1, None, all),
            entry(4, Some(0), [0x121, 0x01c0_003f, 0x3f, 0]),
            entry(4, Some(3), [0x163, 0x03c0_003f, 0x7fff, 0]),
            entry(6, None, all),
            entry(7, Some(0), all),
            entry(7, Some(1), all),
            entry(0xa, None, all),
            entry(0xb, Some(0), all),
            entry(0x14, Some(0), all),
            entry(0x4000_0000, None, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
            entry(0x4000_0001, None, all),
            entry(0x8000_0000, None, [0x8000_0026, 0, 0, 0]),
            entry(0x8000_0001, None, all),
            entry(0x8000_0007, None, all),
            entry(0x8000_0008, None, [0x3030, u32::MAX, u32::MAX, u32::MAX]),
            entry(0x8000_001d, Some(0), [0x121, 0x01c0_003f, 0x3f, 0]),
            entry(0x8000_001e, None, all),
            entry(0x8000_0021, None, all),
        ]);
        for (n, bytes, offset) in
            [(2, 256, 576), (5, 64, 1088), (6, 512, 1152), (7, 1024, 1664), (9, 8, 2688)]
        {
            cpuid.set(entry(0xd, Some(n), [bytes, offset, 0, 0]));
        }
        cpuid.set(entry(0xd, Some(0), [0x2e7, 2696, 2696, 0]));
        cpuid.set(entry(0xd, Some(1), [0xf, 2696, 0x1800, 0]));
        cpuid
    }

    fn config(model: CpuModel) -> CpuConfig {
        CpuConfig { model, topology: Topology::of_cores(1), lapic: true, tsc_khz: None }
    }

    fn has(cpuid: &Cpuid, name: &str) -> bool {
        let lists = [
            feature::V1,
            feature::V2,
            feature::V3,
            feature::V4,
            feature::OFFERED_V1,
            feature::OFFERED_V2,
            feature::OFFERED_V3,
            feature::OFFERED_V4,
            feature::ASYNC_PF,
        ];
        lists.into_iter().flatten().find(|f| f.name == name).unwrap().is_in(cpuid)
    }

    #[test]
    fn levels_hold_what_they_are_named_for_and_no_more() {
        let supported = everything(b"GenuineIntel");
        let ladder = ["sse2", "sse4_2", "avx2", "avx512f"];
        for (n, model) in LEVELS.into_iter().enumerate() {
            let cpuid = config(model).cpuid(&supported, 0).unwrap();
            for (at, name) in ladder.into_iter().enumerate() {
                assert_eq!(has(&cpuid, name), at <= n, "{name} in {model}");
            }
            assert!(has(&cpuid, "hypervisor") && has(&cpuid, "kvmclock") && has(&cpuid, "x2apic"));
            assert!(!has(&cpuid, "async_pf"));
            // VMX, MONITOR, LA57, AMX, PMU: in no named level.
            assert_eq!(cpuid.get(1, 0).unwrap().ecx & (1 << 5 | 1 << 3), 0);
            let leaf7 = cpuid.get(7, 0).unwrap();
            assert_eq!((leaf7.eax, leaf7.ecx & 1 << 16, leaf7.edx & 7 << 22), (0, 0, 0));
            assert!(cpuid.get(0xa, 0).is_none() && cpuid.get(7, 1).is_none());
            assert!(cpuid.get(0, 0).unwrap().eax <= 0xd);
        }
    }

    #[test]
    fn a_missing_feature_is_named_with_the_best_level_there_is() {
        let mut supported = everything(b"GenuineIntel");
        supported.get_mut(7, 0).unwrap().ebx &= !(1 << 5 | 1 << 8);
        let text = config(CpuModel::V3).cpuid(&supported, 0).unwrap_err().to_string();
        assert!(text.contains("avx2, bmi2") && text.contains("v2 is the best"), "{text}");
        assert_eq!(CpuModel::Best.resolve(&supported).unwrap(), CpuModel::V2);
        let all = everything(b"GenuineIntel");
        assert_eq!(CpuModel::Best.resolve(&all).unwrap(), CpuModel::V3);
        assert_eq!(CpuModel::V4.resolve(&all).unwrap(), CpuModel::V4);
        let text = CpuModel::V1.resolve(&Cpuid::default()).unwrap_err().to_string();
        assert!(text.contains("not even v1"), "{text}");
    }

    #[test]
    fn xsave_has_the_components_of_the_level_and_fitting_sizes() {
        let supported = everything(b"GenuineIntel");
        let leaf = |model, subleaf| config(model).cpuid(&supported, 0).unwrap().get(0xd, subleaf).copied();
        assert_eq!(leaf(CpuModel::V2, 0), None);
        let v3 = leaf(CpuModel::V3, 0).unwrap();
        assert_eq!((v3.eax, v3.ebx, v3.ecx), (7, 832, 832));
        assert!(leaf(CpuModel::V3, 2).is_some() && leaf(CpuModel::V3, 5).is_none());
        let v4 = leaf(CpuModel::V4, 0).unwrap();
        assert_eq!((v4.eax, v4.ebx, v4.ecx), (0xe7, 2688, 2688));
        assert!(leaf(CpuModel::V4, 9).is_none(), "protection keys are in no level");
        // XSAVES and its supervisor components are left out.
        assert_eq!(leaf(CpuModel::V4, 1).map(|e| (e.eax, e.ecx)), Some((7, 0)));
    }

    #[test]
    fn a_guest_that_calls_stays_with_its_vendor() {
        let [intel, amd] = [b"GenuineIntel", b"AuthenticAMD"].map(everything);
        for (guest, other) in [(&intel, &amd), (&amd, &intel)] {
            guest.check_hypercalls(guest).unwrap();
            let error = guest.check_hypercalls(other).unwrap_err().to_string();
            assert!(
                ["pv_unhalt", "pv_send_ipi", "pv_sched_yield", "AMD's", "Intel's"]
                    .iter()
                    .all(|w| error.contains(w)),
                "{error}"
            );
            let mut silent = guest.clone();
            silent.clear(feature::HYPERCALLS);
            silent.check_hypercalls(other).unwrap();
        }
    }

    #[test]
    fn topology_is_told_the_way_of_the_vendor() {
        let topology = Topology { sockets: 2, cores: 4, threads: 2 };
        let intel = CpuConfig { topology, ..config(CpuModel::V3) };
        let cpuid = intel.cpuid(&everything(b"GenuineIntel"), topology.apic_id(13)).unwrap();
        assert_eq!(cpuid.get(1, 0).unwrap().ebx >> 16, 13 << 8 | 8);
        assert_ne!(cpuid.get(1, 0).unwrap().edx & 1 << 28, 0);
        let levels: Vec<_> = (0..3).map(|n| *cpuid.get(0xb, n).unwrap()).collect();
        assert_eq!((levels[0].eax, levels[0].ebx, levels[0].ecx, levels[0].edx), (1, 2, 0x100, 13));
        assert_eq!((levels[1].eax, levels[1].ebx, levels[1].ecx, levels[1].edx), (3, 8, 0x201, 13));
        assert_eq!((levels[2].eax, levels[2].ebx, levels[2].ecx), (0, 0, 2));
        // The first cache is a core's, the third the package's; 4 cores in it.
        let (first, third) = (cpuid.get(4, 0).unwrap().eax, cpuid.get(4, 3).unwrap().eax);
        assert_eq!((first >> 14 & 0xfff, third >> 14 & 0xfff, first >> 26), (1, 7, 3));

        let cpuid = intel.cpuid(&everything(b"AuthenticAMD"), topology.apic_id(13)).unwrap();
        assert_eq!(cpuid.get(0x8000_0008, 0).unwrap().ecx, 3 << 12 | 7);
        let leaf = cpuid.get(0x8000_001e, 0).unwrap();
        assert_eq!((leaf.eax, leaf.ebx, leaf.ecx), (13, 1 << 8 | 2, 1));
        assert_eq!(cpuid.get(0x8000_001d, 0).unwrap().eax >> 14 & 0xfff, 1);
        let single = config(CpuModel::V3).cpuid(&everything(b"AuthenticAMD"), 0).unwrap();
        assert_eq!(single.get(1, 0).unwrap().edx & 1 << 28, 0);
        assert_eq!(single.get(0x8000_0001, 0).unwrap().ecx & 2, 0);
    }

    #[test]
    fn the_host_is_passed_through_but_for_topology_and_what_cannot_work() {
        let supported = everything(b"AuthenticAMD");
        let cpuid = config(CpuModel::Host).cpuid(&supported, 0).unwrap();
        assert_eq!(cpuid.get(7, 0), supported.get(7, 0));
        assert_eq!(cpuid.get(0xd, 1), supported.get(0xd, 1));
        assert!(!has(&cpuid, "async_pf"));
        // Linux takes leaf 0x1F before 0xB: both say the same.
        assert_eq!(cpuid.get(0x1f, 1).map(|e| e.ecx), Some(0x201));
    }

    #[test]
    fn without_a_lapic_nothing_that_needs_one_is_shown() {
        let bare = CpuConfig { lapic: false, ..config(CpuModel::V2) };
        let cpuid = bare.cpuid(&everything(b"GenuineIntel"), 0).unwrap();
        assert!(["apic", "x2apic", "tsc_deadline_timer", "pv_eoi"].iter().all(|name| !has(&cpuid, name)));
        assert!(has(&cpuid, "kvmclock"));
    }

    #[test]
    fn brand_and_frequencies_are_told() {
        let config = CpuConfig { tsc_khz: Some(2_400_000), ..config(CpuModel::V2) };
        let cpuid = config.cpuid(&everything(b"GenuineIntel"), 0).unwrap();
        let brand: Vec<u8> = (0x8000_0002..=0x8000_0004)
            .flat_map(|leaf| {
                let e = cpuid.get(leaf, 0).unwrap();
                [e.eax, e.ebx, e.ecx, e.edx]
            })
            .flat_map(u32::to_le_bytes)
            .collect();
        assert!(brand.starts_with(b"vmcore virtual CPU (x86-64-v2)\0"));
        assert_eq!(cpuid.get(0x4000_0000, 0).unwrap().eax, 0x4000_0010);
        let leaf = cpuid.get(0x4000_0010, 0).unwrap();
        assert_eq!((leaf.eax, leaf.ebx), (2_400_000, 1_000_000));
    }

    #[test]
    fn models_are_named() {
        for model in [CpuModel::Best, CpuModel::V1, CpuModel::V2, CpuModel::V3, CpuModel::V4, CpuModel::Host]
        {
            assert_eq!(model.to_string().parse::<CpuModel>().unwrap(), model);
        }
        assert!("skylake".parse::<CpuModel>().unwrap_err().to_string().contains("v1, v2, v3"));
    }
}
