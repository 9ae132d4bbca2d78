//! The fingerprint of a VM's state.

use std::sync::PoisonError;

use super::Inside;
use super::run::VmState;
use crate::deterministic::StateHash;
use crate::error::{Error, Result};

/// How much of memory is looked at in one go, in bytes.
const PIECE: usize = 1 << 20;

/// Hash of `state` with the memory, the devices and the turns of `inside`, which stands still.
///
/// # Errors
/// Where a device refuses to give its state.
pub(super) fn of(inside: &Inside, state: &VmState) -> Result<StateHash> {
    let mut hasher = blake3::Hasher::new();
    postcard::to_io(state, &mut hasher).map_err(|e| Error::device("state", e))?;
    if let Some(turns) = &inside.turns {
        let turns = turns.lock().unwrap_or_else(PoisonError::into_inner).state();
        turns.into_iter().for_each(|word| number(&mut hasher, word));
    }
    if let Some(world) = inside.vm.world() {
        world.state().into_iter().for_each(|word| number(&mut hasher, word));
    }
    for bus in [&inside.ports, &inside.mmio] {
        for (base, device) in bus.devices() {
            let state = device.lock().unwrap_or_else(PoisonError::into_inner).save()?;
            number(&mut hasher, base);
            number(&mut hasher, state.len() as u64);
            hasher.update(&state);
        }
    }
    let mut bytes = vec![0; PIECE];
    for region in inside.memory.snapshot().regions() {
        number(&mut hasher, region.base().0);
        number(&mut hasher, region.len());
        for offset in (0..region.len()).step_by(PIECE) {
            let here = usize::try_from(region.len() - offset).unwrap_or(PIECE).min(PIECE);
            region.read(offset, &mut bytes[..here])?;
            hasher.update(&bytes[..here]);
        }
    }
    Ok(StateHash::new(*hasher.finalize().as_bytes()))
}

fn number(hasher: &mut blake3::Hasher, value: u64) {
    hasher.update(&value.to_le_bytes());
}
