//! What CPUID tells the guest: the table, the named CPU models it is made of, and the topology.

mod feature;
mod model;
mod topology;

pub use model::{CpuConfig, CpuModel};
pub use topology::Topology;

use serde::{Deserialize, Serialize};

/// One answer of CPUID (SDM vol. 2A, "CPUID").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CpuidEntry {
    /// Leaf: EAX on input.
    pub leaf: u32,
    /// Subleaf: ECX on input, where the leaf has any.
    pub subleaf: Option<u32>,
    /// EAX on output.
    pub eax: u32,
    /// EBX on output.
    pub ebx: u32,
    /// ECX on output.
    pub ecx: u32,
    /// EDX on output.
    pub edx: u32,
}

/// All answers of CPUID for one vCPU, sorted by leaf and subleaf.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpuid {
    entries: Vec<CpuidEntry>,
}

impl Cpuid {
    /// A table of `entries`; of two with the same leaf and subleaf the later counts.
    pub fn new(entries: impl IntoIterator<Item = CpuidEntry>) -> Self {
        let mut table = Self::default();
        for entry in entries {
            table.set(entry);
        }
        table
    }

    /// The entries, sorted by leaf and subleaf.
    pub fn entries(&self) -> &[CpuidEntry] {
        &self.entries
    }

    /// The answer for `leaf` and `subleaf`; leaves without subleaves ignore the latter.
    pub fn get(&self, leaf: u32, subleaf: u32) -> Option<&CpuidEntry> {
        self.entries.iter().find(|e| e.leaf == leaf && e.subleaf.is_none_or(|s| s == subleaf))
    }

    /// The answer for `leaf` and `subleaf`, to be changed.
    pub fn get_mut(&mut self, leaf: u32, subleaf: u32) -> Option<&mut CpuidEntry> {
        self.entries.iter_mut().find(|e| e.leaf == leaf && e.subleaf.is_none_or(|s| s == subleaf))
    }

    /// Adds `entry`, or replaces the one with its leaf and subleaf.
    pub fn set(&mut self, entry: CpuidEntry) {
        let key = |e: &CpuidEntry| (e.leaf, e.subleaf);
        match self.entries.binary_search_by_key(&key(&entry), key) {
            Ok(at) => self.entries[at] = entry,
            Err(at) => self.entries.insert(at, entry),
        }
    }

    /// Whether the vendor is AMD, or Hygon, which took over AMD's leaves.
    fn is_amd(&self) -> bool {
        let vendor = self.get(0, 0).map(|leaf| leaf.ebx.to_le_bytes());
        matches!(vendor.as_ref(), Some(b"Auth" | b"Hygo"))
    }

    /// Drops every entry that `keep` refuses.
    pub fn retain(&mut self, keep: impl FnMut(&CpuidEntry) -> bool) {
        self.entries.retain(keep);
    }
}
