//! What the library logs, to a function of the program.

use std::ffi::{CString, c_char, c_void};
use std::sync::{Once, PoisonError, RwLock};

use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::callback::{User, required, vmcore_drop_fn};
use crate::error::{VMCORE_ERROR_WRONG_STATE, guard, vmcore_error};

/// How much is logged: each level has those before it.
pub type vmcore_log_level = u32;
/// Nothing.
pub const VMCORE_LOG_OFF: vmcore_log_level = 0;
/// What failed.
pub const VMCORE_LOG_ERROR: vmcore_log_level = 1;
/// What the user should know.
pub const VMCORE_LOG_WARN: vmcore_log_level = 2;
/// What happens, in few words.
pub const VMCORE_LOG_INFO: vmcore_log_level = 3;
/// What happens, for those who look for a fault.
pub const VMCORE_LOG_DEBUG: vmcore_log_level = 4;
/// Everything.
pub const VMCORE_LOG_TRACE: vmcore_log_level = 5;

/// Gets one message of `level`; `target` names the part of the library. Called on any thread, on several at
/// once, and must not call the library.
pub type vmcore_log_fn = Option<
    unsafe extern "C" fn(
        user: *mut c_void,
        level: vmcore_log_level,
        target: *const c_char,
        message: *const c_char,
    ),
>;

type Function = unsafe extern "C" fn(*mut c_void, vmcore_log_level, *const c_char, *const c_char);

struct Sink {
    function: Function,
    user: User,
}

/// Of the whole process, as the `log` crate's logger is.
static SINK: RwLock<Option<Sink>> = RwLock::new(None);

struct Logger;

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        let sink = SINK.read().unwrap_or_else(PoisonError::into_inner);
        let Some(sink) = sink.as_ref().filter(|_| self.enabled(record.metadata())) else { return };
        let c = |text: String| CString::new(text.replace('\0', "\u{fffd}")).unwrap_or_default();
        let (target, message) = (c(record.target().to_owned()), c(record.args().to_string()));
        let level = match record.level() {
            Level::Error => VMCORE_LOG_ERROR,
            Level::Warn => VMCORE_LOG_WARN,
            Level::Info => VMCORE_LOG_INFO,
            Level::Debug => VMCORE_LOG_DEBUG,
            Level::Trace => VMCORE_LOG_TRACE,
        };
        // SAFETY: the program's function, with the user pointer that came with it, which the lock keeps.
        unsafe { (sink.function)(sink.user.get(), level, target.as_ptr(), message.as_ptr()) }
    }

    fn flush(&self) {}
}

/// Has `function` get what is logged in this process up to `level`, in place of the one before, whose drop
/// function has been called when this returns. VMCORE_LOG_OFF with a NULL function ends logging. `user` is taken.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_log_set(
    level: vmcore_log_level,
    function: vmcore_log_fn,
    user: *mut c_void,
    drop: vmcore_drop_fn,
) -> Option<Box<vmcore_error>> {
    static ONCE: Once = Once::new();
    let user = User::new(user, drop);
    guard(|| {
        let filter = match level {
            VMCORE_LOG_OFF => LevelFilter::Off,
            VMCORE_LOG_ERROR => LevelFilter::Error,
            VMCORE_LOG_WARN => LevelFilter::Warn,
            VMCORE_LOG_INFO => LevelFilter::Info,
            VMCORE_LOG_DEBUG => LevelFilter::Debug,
            VMCORE_LOG_TRACE => LevelFilter::Trace,
            other => return Err(vmcore_error::argument("level", other, "give a VMCORE_LOG_*")),
        };
        let sink = match filter {
            LevelFilter::Off => None,
            _ => Some(Sink { function: required(function, "function")?, user }),
        };
        let mut refused = false;
        ONCE.call_once(|| refused = log::set_logger(&Logger).is_err());
        if refused {
            let fix = "log by that one";
            let message = format!("cannot set a logger: this process has one already; {fix}");
            return Err(vmcore_error::new(VMCORE_ERROR_WRONG_STATE, &message, Some(fix)));
        }
        let before = std::mem::replace(&mut *SINK.write().unwrap_or_else(PoisonError::into_inner), sink);
        log::set_max_level(filter);
        std::mem::drop(before);
        Ok(())
    })
}
