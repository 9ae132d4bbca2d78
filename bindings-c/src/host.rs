//! Preflight: what this host can run.

use std::ffi::{CString, c_char};
use std::mem::MaybeUninit;
use std::ptr;

use vmcore::Accel;
use vmcore::host::{self, Status};

use crate::error::{Result, give, guard, vmcore_error};

/// Which backend runs a guest.
pub type vmcore_accel = u32;
/// The best that this host has.
pub const VMCORE_ACCEL_AUTO: vmcore_accel = 0;
/// KVM.
pub const VMCORE_ACCEL_KVM: vmcore_accel = 1;
/// The software CPU.
pub const VMCORE_ACCEL_SOFT: vmcore_accel = 2;

pub(crate) fn accel(accel: vmcore_accel) -> Result<Accel> {
    match accel {
        VMCORE_ACCEL_AUTO => Ok(Accel::Auto),
        VMCORE_ACCEL_KVM => Ok(Accel::Kvm),
        VMCORE_ACCEL_SOFT => Ok(Accel::Soft),
        other => Err(vmcore_error::argument("accel", other, "give a VMCORE_ACCEL_*")),
    }
}

/// How far a backend can be used on this host.
pub type vmcore_status = u32;
/// For every guest.
pub const VMCORE_STATUS_USABLE: vmcore_status = 0;
/// For guests of some thousand instructions, not for kernels.
pub const VMCORE_STATUS_SMALL_GUESTS_ONLY: vmcore_status = 1;
/// Not at all.
pub const VMCORE_STATUS_NOT_USABLE: vmcore_status = 2;

/// Every backend on this host, in the order in which VMCORE_ACCEL_AUTO prefers them.
#[derive(Debug)]
pub struct vmcore_report {
    text: CString,
    backends: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    name: CString,
    status: vmcore_status,
    reason: CString,
    advice: CString,
}

/// Looks at every backend; takes a few milliseconds.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_host_check(
    out: Option<&mut MaybeUninit<*mut vmcore_report>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let report = host::check();
        let c = |text: &str| CString::new(text).unwrap_or_default();
        let backends = report.backends.iter().map(|backend| Entry {
            name: c(backend.name),
            status: match backend.status {
                Status::Usable => VMCORE_STATUS_USABLE,
                Status::SmallGuestsOnly => VMCORE_STATUS_SMALL_GUESTS_ONLY,
                _ => VMCORE_STATUS_NOT_USABLE,
            },
            reason: c(&backend.reason),
            advice: c(&backend.advice),
        });
        give(out, vmcore_report { text: c(&report.to_string()), backends: backends.collect() })
    })
}

/// All of it for people, in several lines. It lives as long as the report.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_report_text(report: Option<&vmcore_report>) -> *const c_char {
    report.map_or(c"".as_ptr(), |report| report.text.as_ptr())
}

/// How many backends there are.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_report_len(report: Option<&vmcore_report>) -> usize {
    report.map_or(0, |report| report.backends.len())
}

fn entry(report: Option<&vmcore_report>, index: usize) -> Option<&Entry> {
    report?.backends.get(index)
}

/// The name of a backend, or NULL where there is none of that number. It lives as long as the report.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_report_name(report: Option<&vmcore_report>, index: usize) -> *const c_char {
    entry(report, index).map_or(ptr::null(), |entry| entry.name.as_ptr())
}

/// How far it can be used.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_report_status(report: Option<&vmcore_report>, index: usize) -> vmcore_status {
    entry(report, index).map_or(VMCORE_STATUS_NOT_USABLE, |entry| entry.status)
}

/// Why, in one sentence. It lives as long as the report.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_report_reason(report: Option<&vmcore_report>, index: usize) -> *const c_char {
    entry(report, index).map_or(ptr::null(), |entry| entry.reason.as_ptr())
}

/// What the user should do; empty where there is nothing to do. It lives as long as the report.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_report_advice(report: Option<&vmcore_report>, index: usize) -> *const c_char {
    entry(report, index).map_or(ptr::null(), |entry| entry.advice.as_ptr())
}

/// Frees it.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_report_delete(report: Option<Box<vmcore_report>>) {
    drop(report);
}
