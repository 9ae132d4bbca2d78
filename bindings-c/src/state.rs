//! Saved states.

use std::mem::MaybeUninit;

use serde::{Deserialize, Serialize};
use vmcore::state::VcpuState;
use vmcore::{Error, VmState};

use crate::bytes::{bytes, vmcore_bytes};
use crate::error::{Result, give, guard, need, vmcore_error};

/// The state of a vCPU, or of the vCPUs and machine of a VM, without memory and devices.
#[derive(Debug)]
pub struct vmcore_state {
    state: State,
}

#[derive(Debug, Serialize, Deserialize)]
enum State {
    Vcpu(Box<VcpuState>),
    Vm(Box<VmState>),
}

/// What the bytes begin with: a name, and the version of what follows.
const MAGIC: &[u8] = b"vmcore-state\x01";

impl vmcore_state {
    pub(crate) fn of_vcpu(state: VcpuState) -> Self {
        Self { state: State::Vcpu(Box::new(state)) }
    }

    pub(crate) fn of_vm(state: VmState) -> Self {
        Self { state: State::Vm(Box::new(state)) }
    }

    fn other(what: &'static str, expected: &str, found: &str) -> Box<vmcore_error> {
        Error::State { what, expected: expected.into(), found: found.into() }.into()
    }

    pub(crate) fn vcpu(&self) -> Result<&VcpuState> {
        match &self.state {
            State::Vcpu(state) => Ok(state),
            State::Vm(_) => Err(Self::other("a vCPU", "the state of a vCPU", "that of a VM")),
        }
    }

    pub(crate) fn vm(&self) -> Result<&VmState> {
        match &self.state {
            State::Vm(state) => Ok(state),
            State::Vcpu(_) => Err(Self::other("a VM", "the state of a VM", "that of a vCPU")),
        }
    }
}

/// The state as bytes, to be kept or sent.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_state_to_bytes(
    state: Option<&vmcore_state>,
    out: Option<&mut MaybeUninit<*mut vmcore_bytes>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let state = &need(state, "state")?.state;
        let bytes =
            postcard::to_extend(state, MAGIC.to_vec()).map_err(|error| Error::device("state", error))?;
        give(out, vmcore_bytes::new(bytes))
    })
}

/// The state that `len` bytes from vmcore_state_to_bytes are.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_state_from_bytes(
    data: *const u8,
    len: usize,
    out: Option<&mut MaybeUninit<*mut vmcore_state>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let bytes = bytes!(data, len);
        let what = "a saved state";
        let body = bytes
            .strip_prefix(MAGIC)
            .ok_or_else(|| vmcore_state::other(what, "bytes of vmcore_state_to_bytes", "others"))?;
        let state = postcard::from_bytes(body)
            .map_err(|error| vmcore_state::other(what, "a whole one", &error.to_string()))?;
        give(out, vmcore_state { state })
    })
}

/// Frees it.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_state_delete(state: Option<Box<vmcore_state>>) {
    drop(state);
}
