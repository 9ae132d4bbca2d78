//! A disk from outside the machine, while the guest runs.

use std::sync::{Arc, PoisonError};

use super::{DiskStop, Shared};
use crate::block::{DiskError, DiskStats, Limits, SECTOR};

/// A disk's handle ([`Disk::handle`](super::Disk::handle)): for any thread, before and while the guest
/// runs. Clones mean the same disk.
#[derive(Clone)]
pub struct DiskHandle(Arc<Shared>);

impl std::fmt::Debug for DiskHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DiskHandle").field("len", &self.len()).finish_non_exhaustive()
    }
}

impl DiskHandle {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self(shared)
    }

    /// The disk's size in bytes.
    pub fn len(&self) -> u64 {
        self.0.backend.len()
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.0.backend.is_empty()
    }

    /// What it has done so far.
    pub fn stats(&self) -> DiskStats {
        self.0.counters.get()
    }

    /// Why it stopped the VM, until that runs again; see [`OnError::Stop`](super::OnError::Stop).
    pub fn stopped(&self) -> Option<DiskStop> {
        self.0.stopped()
    }

    /// Holds the guest to other limits from now on.
    pub fn set_limits(&self, limits: Limits) {
        self.0.set_limits(limits);
    }

    /// Makes the disk larger, to `len` bytes, and tells the guest. Waits for the host. For a block device
    /// that has grown on the host, `len` is its new size.
    ///
    /// # Errors
    /// [`DiskError::Resize`]: `len` is less than it was, is no multiple of 512, or the disk cannot grow.
    pub fn resize(&self, len: u64) -> Result<(), DiskError> {
        if len < self.len() {
            let what = "that would cut off data; shrink() does so".into();
            return Err(DiskError::Resize { len: self.len(), to: len, what });
        }
        self.set_len(len)
    }

    /// As [`DiskHandle::resize`], but what is behind `len` bytes is lost. Requests of the guest's that are
    /// under way there fail.
    ///
    /// # Errors
    /// [`DiskError::Resize`]: `len` is 0 or no multiple of 512, or the disk cannot shrink.
    pub fn shrink(&self, len: u64) -> Result<(), DiskError> {
        self.set_len(len)
    }

    fn set_len(&self, to: u64) -> Result<(), DiskError> {
        let refused = |what: String| DiskError::Resize { len: self.len(), to, what };
        if to == 0 || !to.is_multiple_of(SECTOR) {
            return Err(refused("give a multiple of 512 bytes".into()));
        }
        if self.0.backend.read_only() {
            return Err(refused("the disk is read-only".into()));
        }
        self.0.backend.resize(to).map_err(|error| match error.kind() {
            std::io::ErrorKind::Unsupported => refused("disks of this format keep their size".into()),
            _ => refused(error.to_string()),
        })?;
        let transport = self.0.transport.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(transport) = transport {
            transport.config_changed();
        }
        Ok(())
    }
}
