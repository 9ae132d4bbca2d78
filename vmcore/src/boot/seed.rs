//! The seed of the guest's random numbers, handed over as Linux' `setup_data` (Linux
//! `Documentation/arch/x86/boot.rst`, "setup_data"; `SETUP_RNG_SEED` in `asm/setup_data.h`).

use std::fmt;

use super::BootError;
use super::entry::{place, store};
use super::place::Places;
use crate::memory::GuestMemory;

/// Length of a seed in bytes: what the kernel's generator takes for a full one.
const LEN: u8 = 32;
/// The entry's type.
const SETUP_RNG_SEED: u32 = 9;

/// What a Linux guest seeds its random numbers with, so that they are good from its first
/// instruction on. Kernels from 6.0 on use it and wipe it from memory; older ones pass over it.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum RngSeed {
    /// 32 bytes of the host's (`getrandom(2)`), others at each boot.
    #[default]
    Random,
    /// These bytes, for guests that must run the same each time. Who knows them knows the guest's
    /// keys.
    Fixed([u8; LEN as usize]),
    /// None: the guest collects entropy by itself, and may wait for it.
    None,
}

impl fmt::Debug for RngSeed {
    /// Without the bytes, which are a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RngSeed::Random => "Random",
            RngSeed::Fixed(_) => "Fixed(..)",
            RngSeed::None => "None",
        })
    }
}

impl RngSeed {
    fn bytes(self) -> Result<Option<[u8; LEN as usize]>, BootError> {
        let mut seed = match self {
            RngSeed::Random => [0; LEN as usize],
            RngSeed::Fixed(seed) => return Ok(Some(seed)),
            RngSeed::None => return Ok(None),
        };
        // As many bytes as this come at once, or none.
        rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty())
            .map_err(|e| BootError::Seed { source: e.into() })?;
        Ok(Some(seed))
    }

    /// Writes the seed as the only entry of a chain of `setup_data` and returns its address; 0, the end
    /// of the chain, where there is none.
    pub(super) fn write(self, memory: &GuestMemory, places: &mut Places) -> Result<u64, BootError> {
        const WHAT: &str = "the random seed";
        let Some(seed) = self.bytes()? else { return Ok(0) };
        let next = 0u64;
        let entry =
            [&next.to_le_bytes()[..], &SETUP_RNG_SEED.to_le_bytes(), &u32::from(LEN).to_le_bytes(), &seed]
                .concat();
        let at = place(places, WHAT, entry.len() as u64, 8)?;
        store(memory, WHAT, at, &entry)?;
        Ok(at)
    }
}
