//! Sockets, cores and threads, as CPUID tells them.

use super::{Cpuid, CpuidEntry};
use crate::error::{Error, Result};

/// How vCPUs are grouped (SDM vol. 3A, 9.9, "Hierarchical mapping of shared resources").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Topology {
    /// Number of packages.
    pub sockets: u32,
    /// Number of cores in a package.
    pub cores: u32,
    /// Number of threads in a core.
    pub threads: u32,
}

/// The level types of leaf 0xB (SDM vol. 2A, table 3-8).
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

impl Topology {
    /// `count` vCPUs as the cores of one package.
    pub fn of_cores(count: u32) -> Self {
        Self { sockets: 1, cores: count, threads: 1 }
    }

    /// How many vCPUs there are; saturates.
    pub fn cpus(&self) -> u32 {
        self.sockets.saturating_mul(self.cores).saturating_mul(self.threads)
    }

    /// The APIC id of vCPU number `index`, counted threads first, then cores. Ids have gaps where
    /// cores or threads are not a power of two.
    pub fn apic_id(&self, index: u32) -> u32 {
        let thread = index % self.threads.max(1);
        let core = index / self.threads.max(1) % self.cores.max(1);
        let socket = index / self.threads.max(1) / self.cores.max(1);
        socket << self.package_shift() | core << self.core_shift() | thread
    }

    /// Bits of the APIC id below the core.
    fn core_shift(&self) -> u32 {
        bits(self.threads)
    }

    /// Bits of the APIC id below the package.
    fn package_shift(&self) -> u32 {
        bits(self.threads) + bits(self.cores)
    }

    /// Refuses a topology without vCPUs, and one whose APIC ids need more than 16 bits.
    pub(super) fn check(&self) -> Result<()> {
        let fits = |n| (1..=1 << 12).contains(&n);
        if fits(self.sockets) && fits(self.cores) && fits(self.threads) && self.cpus() <= 1 << 16 {
            return Ok(());
        }
        Err(Error::Config {
            what: "CPU topology",
            value: format!("{} sockets, {} cores, {} threads", self.sockets, self.cores, self.threads),
            fix: "give at least one of each, at most 4096 of each, and at most 65536 in all".into(),
        })
    }

    /// Writes the topology, as the vCPU with `apic_id` sees it, over what `cpuid` has.
    pub(super) fn apply(&self, cpuid: &mut Cpuid, apic_id: u32) {
        const HTT: u32 = 1 << 28;
        const CMP_LEGACY: u32 = 1 << 1;
        const TOPOEXT: u32 = 1 << 22;

        let amd = cpuid.is_amd();
        let in_package = self.cores.saturating_mul(self.threads);
        let (core_shift, package_shift) = (self.core_shift(), self.package_shift());
        if let Some(leaf) = cpuid.get_mut(1, 0) {
            let addressable = (1u32 << package_shift).min(255);
            leaf.ebx = (apic_id & 0xff) << 24 | addressable << 16 | leaf.ebx & 0xffff;
            set(&mut leaf.edx, HTT, in_package > 1);
        }
        // Deterministic cache parameters: by Intel's leaf and by AMD's.
        for entry in cpuid.entries.iter_mut().filter(|e| matches!(e.leaf, 4 | 0x8000_001d)) {
            let (kind, level) = (entry.eax & 0x1f, entry.eax >> 5 & 7);
            if kind == 0 {
                continue;
            }
            let sharing = if level < 3 { core_shift } else { package_shift };
            entry.eax = entry.eax & 0x3fff | (((1 << sharing) - 1) & 0xfff) << 14;
            if entry.leaf == 4 {
                entry.eax |= (((1 << (package_shift - core_shift)) - 1) & 0x3f) << 26;
            }
        }
        if cpuid.get(0, 0).is_some_and(|leaf| leaf.eax >= 0xb) {
            cpuid.retain(|e| !matches!(e.leaf, 0xb | 0x1f));
            let v2 = cpuid.get(0, 0).is_some_and(|leaf| leaf.eax >= 0x1f);
            for leaf in [0xb, 0x1f].into_iter().take(if v2 { 2 } else { 1 }) {
                let levels = [
                    (core_shift, self.threads, LEVEL_THREAD),
                    (package_shift, in_package, LEVEL_CORE),
                    (0, 0, 0),
                ];
                for ((shift, count, kind), subleaf) in levels.into_iter().zip(0..) {
                    cpuid.set(CpuidEntry {
                        leaf,
                        subleaf: Some(subleaf),
                        eax: shift,
                        ebx: count,
                        ecx: kind << 8 | subleaf,
                        edx: apic_id,
                    });
                }
            }
        }
        if !amd {
            return;
        }
        let mut extended = false;
        if let Some(leaf) = cpuid.get_mut(0x8000_0001, 0) {
            set(&mut leaf.ecx, CMP_LEGACY, in_package > 1);
            extended = leaf.ecx & TOPOEXT != 0;
        }
        if let Some(leaf) = cpuid.get_mut(0x8000_0008, 0) {
            leaf.ecx = package_shift << 12 | (in_package - 1).min(255);
        }
        if extended {
            let core = apic_id >> core_shift & ((1 << (package_shift - core_shift)) - 1);
            let node = apic_id >> package_shift;
            cpuid.set(CpuidEntry {
                leaf: 0x8000_001e,
                eax: apic_id,
                ebx: (self.threads - 1).min(255) << 8 | core & 0xff,
                ecx: node & 0xff,
                ..CpuidEntry::default()
            });
        }
    }
}

fn set(register: &mut u32, bit: u32, on: bool) {
    if on {
        *register |= bit;
    } else {
        *register &= !bit;
    }
}

/// Bits that number `count` things.
fn bits(count: u32) -> u32 {
    count.max(1).next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn apic_ids_leave_room_for_powers_of_two() {
        assert_eq!((0..4).map(|i| Topology::of_cores(4).apic_id(i)).collect::<Vec<_>>(), [0, 1, 2, 3]);
        let uneven = Topology { sockets: 2, cores: 3, threads: 2 };
        assert_eq!(
            (0..12).map(|i| uneven.apic_id(i)).collect::<Vec<_>>(),
            [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]
        );
    }

    #[test]
    fn impossible_topologies_are_refused() {
        for (sockets, cores, threads) in [(0, 1, 1), (1, 0, 1), (1, 1, 0), (u32::MAX, 2, 2), (1, 4096, 4096)]
        {
            assert!(Topology { sockets, cores, threads }.check().is_err());
        }
        Topology { sockets: 4, cores: 60, threads: 1 }.check().unwrap();
    }
}
