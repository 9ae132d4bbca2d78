//! The machine's off and reset switch.

use vmcore::Control;

use crate::error::{guard, need, vmcore_error};
use crate::outcome::vmcore_outcome;

/// A machine's off and reset switch: what devices keep, to end the guest. It may outlive the machine.
pub struct vmcore_control {
    pub(crate) control: Control,
}

/// Ends the run that is under way, or the next one at its begin. From any thread, callbacks included.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_control_end(
    control: Option<&vmcore_control>,
    outcome: vmcore_outcome,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        need(control, "control")?.control.end(outcome.to_rust()?);
        Ok(())
    })
}

/// Ends the run with an error, for a device that cannot go on. `error` is taken.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_control_fail(
    control: Option<&vmcore_control>,
    error: Option<Box<vmcore_error>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let error = need(error, "error")?.into_device_error("of the program");
        need(control, "control")?.control.fail(error);
        Ok(())
    })
}

/// Frees the handle.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_control_delete(control: Option<Box<vmcore_control>>) {
    drop(control);
}
