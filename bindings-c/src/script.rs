//! A script at a console.

use std::ffi::c_char;
use std::mem::MaybeUninit;
use std::time::Duration;

use vmdevices::console::Script;

use crate::bytes::{bytes, text, vmcore_bytes};
use crate::error::{give, guard, need, vmcore_error};

/// Waits for what the guest puts out, and types. It may outlive the VM.
pub struct vmcore_script {
    pub(crate) script: Script,
}

/// Waits until the guest has put out `pattern`, `milliseconds` at most, and tells all it put out since the last match
/// up to the pattern; `out` may be NULL. Fails with VMCORE_ERROR_TIMEOUT, or VMCORE_ERROR_CLOSED when the VM is gone.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_script_expect(
    script: Option<&vmcore_script>,
    pattern: *const c_char,
    milliseconds: u64,
    out: Option<&mut MaybeUninit<*mut vmcore_bytes>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let limit = Duration::from_millis(milliseconds);
        let text = need(script, "script")?.script.expect(text!(pattern), limit)?;
        out.map_or(Ok(()), |out| give(Some(out), vmcore_bytes::new(text)))
    })
}

/// Types `len` bytes. They wait until the guest reads them.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_script_send(
    script: Option<&vmcore_script>,
    data: *const u8,
    len: usize,
) -> Option<Box<vmcore_error>> {
    guard(|| Ok(need(script, "script")?.script.send(bytes!(data, len))?))
}

/// Ends the input.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_script_close_input(script: Option<&vmcore_script>) {
    if let Some(script) = script {
        script.script.close_input();
    }
}

/// All output so far, as far as it is kept.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_script_transcript(
    script: Option<&vmcore_script>,
    out: Option<&mut MaybeUninit<*mut vmcore_bytes>>,
) -> Option<Box<vmcore_error>> {
    guard(|| give(out, vmcore_bytes::new(need(script, "script")?.script.bytes())))
}

/// Frees it.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_script_delete(script: Option<Box<vmcore_script>>) {
    drop(script);
}
