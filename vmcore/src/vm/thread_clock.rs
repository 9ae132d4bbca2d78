//! How much CPU time another thread has used.
#![expect(unsafe_code, reason = "pthread_getcpuclockid has no safe wrapper")]

use std::os::unix::thread::JoinHandleExt;
use std::thread::JoinHandle;
use std::time::Duration;

/// CPU time of the thread so far, or `None` where it has ended.
pub(super) fn cpu_time(thread: &JoinHandle<()>) -> Option<Duration> {
    if thread.is_finished() {
        return None;
    }
    let mut clock = 0;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pthread_t is valid as long as the thread is not joined, and `thread` is the only
    // handle that can join it; `clock` outlives the call.
    if unsafe { libc::pthread_getcpuclockid(thread.as_pthread_t(), &raw mut clock) } != 0 {
        return None;
    }
    // SAFETY: `time` outlives the call; an invalid clock gives an error.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return None;
    }
    let seconds = u64::try_from(time.tv_sec).ok()?;
    let nanoseconds = u32::try_from(time.tv_nsec).ok()?;
    Some(Duration::new(seconds, nanoseconds))
}
