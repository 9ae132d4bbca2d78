//! How a run ended.

use std::ffi::c_char;

use vmcore::{Outcome, ResetCause};

use crate::error::{Result, vmcore_error};

/// Kinds of ends.
pub type vmcore_outcome_kind = u32;
/// The guest switched itself off.
pub const VMCORE_OUTCOME_POWER_OFF: vmcore_outcome_kind = 0;
/// The guest reset itself; the value is a VMCORE_RESET_*.
pub const VMCORE_OUTCOME_RESET: vmcore_outcome_kind = 1;
/// The guest wrote the value to the exit port.
pub const VMCORE_OUTCOME_EXIT: vmcore_outcome_kind = 2;
/// The guest's kernel panicked, and told so.
pub const VMCORE_OUTCOME_PANICKED: vmcore_outcome_kind = 3;
/// Nothing can wake the guest.
pub const VMCORE_OUTCOME_HALTED: vmcore_outcome_kind = 4;
/// The host stopped the run; it can go on.
pub const VMCORE_OUTCOME_STOPPED: vmcore_outcome_kind = 5;
/// The time given to the run is over; it can go on.
pub const VMCORE_OUTCOME_TIME_LIMIT: vmcore_outcome_kind = 6;
/// The instructions given to the run are executed; it can go on.
pub const VMCORE_OUTCOME_INSTRUCTION_LIMIT: vmcore_outcome_kind = 7;
/// The host failed a disk that stops the VM then: see vmcore_disk_stopped. It can go on, and the disk tries again.
pub const VMCORE_OUTCOME_IO_ERROR: vmcore_outcome_kind = 8;
/// In a way that this version of the bindings has no number for.
pub const VMCORE_OUTCOME_OTHER: vmcore_outcome_kind = 99;

/// By the keyboard controller.
pub const VMCORE_RESET_KEYBOARD: u32 = 0;
/// By port 0xCF9.
pub const VMCORE_RESET_PORT: u32 = 1;
/// By the ACPI reset register, where it is not port 0xCF9.
pub const VMCORE_RESET_ACPI: u32 = 2;
/// By a triple fault.
pub const VMCORE_RESET_TRIPLE_FAULT: u32 = 3;
/// In a way that this version of the bindings has no number for.
pub const VMCORE_RESET_OTHER: u32 = 99;

/// How a run of the guest ended.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct vmcore_outcome {
    /// In which way.
    pub kind: vmcore_outcome_kind,
    /// The exit value, or the cause of the reset; else 0.
    pub value: u32,
}

impl From<Outcome> for vmcore_outcome {
    fn from(outcome: Outcome) -> Self {
        let (kind, value) = match outcome {
            Outcome::PowerOff => (VMCORE_OUTCOME_POWER_OFF, 0),
            Outcome::Reset(cause) => (
                VMCORE_OUTCOME_RESET,
                match cause {
                    ResetCause::Keyboard => VMCORE_RESET_KEYBOARD,
                    ResetCause::Port => VMCORE_RESET_PORT,
                    ResetCause::Acpi => VMCORE_RESET_ACPI,
                    ResetCause::TripleFault => VMCORE_RESET_TRIPLE_FAULT,
                    _ => VMCORE_RESET_OTHER,
                },
            ),
            Outcome::Exit(value) => (VMCORE_OUTCOME_EXIT, value),
            Outcome::Panicked => (VMCORE_OUTCOME_PANICKED, 0),
            Outcome::Halted => (VMCORE_OUTCOME_HALTED, 0),
            Outcome::Stopped => (VMCORE_OUTCOME_STOPPED, 0),
            Outcome::TimeLimit => (VMCORE_OUTCOME_TIME_LIMIT, 0),
            Outcome::InstructionLimit => (VMCORE_OUTCOME_INSTRUCTION_LIMIT, 0),
            Outcome::IoError => (VMCORE_OUTCOME_IO_ERROR, 0),
            _ => (VMCORE_OUTCOME_OTHER, 0),
        };
        Self { kind, value }
    }
}

impl vmcore_outcome {
    pub(crate) fn to_rust(self) -> Result<Outcome> {
        Ok(match self.kind {
            VMCORE_OUTCOME_POWER_OFF => Outcome::PowerOff,
            VMCORE_OUTCOME_RESET => Outcome::Reset(match self.value {
                VMCORE_RESET_KEYBOARD => ResetCause::Keyboard,
                VMCORE_RESET_PORT => ResetCause::Port,
                VMCORE_RESET_ACPI => ResetCause::Acpi,
                VMCORE_RESET_TRIPLE_FAULT => ResetCause::TripleFault,
                other => {
                    return Err(vmcore_error::argument("outcome.value", other, "give a VMCORE_RESET_*"));
                }
            }),
            VMCORE_OUTCOME_EXIT => Outcome::Exit(self.value),
            VMCORE_OUTCOME_PANICKED => Outcome::Panicked,
            VMCORE_OUTCOME_HALTED => Outcome::Halted,
            VMCORE_OUTCOME_STOPPED => Outcome::Stopped,
            VMCORE_OUTCOME_TIME_LIMIT => Outcome::TimeLimit,
            VMCORE_OUTCOME_INSTRUCTION_LIMIT => Outcome::InstructionLimit,
            VMCORE_OUTCOME_IO_ERROR => Outcome::IoError,
            other => return Err(vmcore_error::argument("outcome.kind", other, "give a VMCORE_OUTCOME_*")),
        })
    }
}

/// Writes what happened in a word or two ("PowerOff", "Exit(7)") to the `len` bytes at `buffer`, as snprintf does:
/// cut where it does not fit, with a zero byte at its end. Returns the length of the whole.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmcore_outcome_format(
    outcome: vmcore_outcome,
    buffer: *mut c_char,
    len: usize,
) -> usize {
    let text = match outcome.to_rust() {
        Ok(outcome) => format!("{outcome:?}"),
        Err(_) => "Other".into(),
    };
    // SAFETY: the caller gives that many bytes.
    unsafe { crate::bytes::format_into(buffer, len, &text) }
}
