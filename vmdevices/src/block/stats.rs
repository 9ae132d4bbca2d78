//! What a disk has done.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counts since the disk was made; bytes are those of requests that succeeded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct DiskStats {
    /// Read requests that succeeded.
    pub reads: u64,
    /// Bytes read.
    pub bytes_read: u64,
    /// Write requests that succeeded.
    pub writes: u64,
    /// Bytes written.
    pub bytes_written: u64,
    /// Flushes that succeeded.
    pub flushes: u64,
    /// Discard and write-zeroes requests that succeeded.
    pub cleared: u64,
    /// Requests that ended in an error of the host's.
    pub errors: u64,
    /// Requests that went to the host together with the one before them.
    pub merged: u64,
    /// How often requests had to wait for a limit.
    pub throttled: u64,
}

/// [`DiskStats`] that several threads count.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) reads: AtomicU64,
    pub(crate) bytes_read: AtomicU64,
    pub(crate) writes: AtomicU64,
    pub(crate) bytes_written: AtomicU64,
    pub(crate) flushes: AtomicU64,
    pub(crate) cleared: AtomicU64,
    pub(crate) errors: AtomicU64,
    pub(crate) merged: AtomicU64,
    pub(crate) throttled: AtomicU64,
}

/// Adds `more` to a count that nothing depends on.
pub(crate) fn count(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

impl Counters {
    pub(crate) fn get(&self) -> DiskStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        DiskStats {
            reads: get(&self.reads),
            bytes_read: get(&self.bytes_read),
            writes: get(&self.writes),
            bytes_written: get(&self.bytes_written),
            flushes: get(&self.flushes),
            cleared: get(&self.cleared),
            errors: get(&self.errors),
            merged: get(&self.merged),
            throttled: get(&self.throttled),
        }
    }
}
