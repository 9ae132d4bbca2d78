//! What becomes of a request that the host fails.

use std::io;
use std::sync::PoisonError;

use vmcore::Outcome;

use super::Shared;
use super::request::{Job, Op};
use crate::block::count;

/// What becomes of a request that the host fails: QEMU's `rerror` and `werror`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnError {
    /// The guest gets an I/O error (`report`).
    #[default]
    Report,
    /// The VM stops with [`Outcome::IoError`], and the request is kept. The next run tries it again (`stop`).
    Stop,
    /// As [`OnError::Stop`] where the host has no room left, as [`OnError::Report`] otherwise (`enospc`).
    StopIfFull,
    /// The guest is told that all went well; what it reads is zero. What it wrote is lost (`ignore`).
    Ignore,
}

/// Why a disk stopped its VM.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DiskStop {
    /// Whether it was about to write, flush, discard or zero, and not to read.
    pub writing: bool,
    /// What the host said.
    pub kind: io::ErrorKind,
    /// All of it, in words.
    pub message: String,
}

impl Op {
    fn writes(&self) -> bool {
        !matches!(self, Op::Read(_))
    }
}

/// No room on the host's file system, or none for this user.
fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

impl Shared {
    /// What is to become of `job`, which the host failed with `error`. Where that is [`OnError::Stop`] the VM
    /// is on its way to stop.
    pub(super) fn judge(&self, job: &Job, error: &io::Error) -> OnError {
        let [read, write] = *self.on_error.lock().unwrap_or_else(PoisonError::into_inner);
        let verdict = match if job.op.writes() { write } else { read } {
            OnError::StopIfFull if is_full(error) => OnError::Stop,
            OnError::StopIfFull => OnError::Report,
            other => other,
        };
        if verdict != OnError::Stop {
            return verdict;
        }
        let control = self.control.lock().unwrap_or_else(PoisonError::into_inner).clone();
        // Without a VM nobody would let it go on.
        let Some(control) = control else { return OnError::Report };
        count(&self.counters.errors, job.parts.len() as u64);
        let message = format!("{}, {} bytes: {error}", job.op.describe(), job.len());
        self.complaints.warn("virtio-blk", format_args!("{message}; the VM stops"));
        let mut stop = self.stop.lock().unwrap_or_else(PoisonError::into_inner);
        // The first counts: the others come of it.
        if stop.is_none() {
            *stop = Some(DiskStop { writing: job.op.writes(), kind: error.kind(), message });
            drop(stop);
            control.end(Outcome::IoError);
        }
        verdict
    }

    /// Why the VM was stopped and was not run again.
    pub(super) fn stopped(&self) -> Option<DiskStop> {
        self.stop.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Lets requests be taken again.
    pub(super) fn go_on(&self) {
        *self.stop.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
