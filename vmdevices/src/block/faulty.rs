//! A disk that fails when it is told to, for tests of those who use disks.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::{BlockBackend, Topology};
use crate::buffers::Buffers;

/// What a fault is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Reading.
    Read,
    /// Writing.
    Write,
    /// Flushing; its range is not looked at.
    Flush,
    /// Discarding and zeroing.
    Clear,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing is done; the error has this number (`libc::EIO`, `libc::ENOSPC`).
    Error(i32),
    /// This many bytes are transferred, and then the error has this number.
    Short(usize, i32),
    /// It takes this long, and then goes on as if nothing had been.
    Delay(Duration),
}

/// Something that goes wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// With what.
    pub operation: Operation,
    /// Where, in bytes: requests that touch this range.
    pub range: Range<u64>,
    /// How.
    pub effect: Effect,
    /// How often; `u32::MAX` for always.
    pub times: u32,
}

/// Another disk, with faults. Threads: any.
pub struct Faulty {
    disk: Arc<dyn BlockBackend>,
    faults: Mutex<Vec<Fault>>,
}

impl std::fmt::Debug for Faulty {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Faulty").field("len", &self.disk.len()).field("faults", &self.faults).finish()
    }
}

impl Faulty {
    /// `disk`, which has no faults yet.
    pub fn new(disk: Arc<dyn BlockBackend>) -> Self {
        Self { disk, faults: Mutex::default() }
    }

    /// Has `fault` happen from now on. Of several that fit the first one does.
    pub fn inject(&self, fault: Fault) {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).push(fault);
    }

    /// All is well again.
    pub fn heal(&self) {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn effect(&self, operation: Operation, offset: u64, len: u64) -> Option<Effect> {
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        let end = offset.saturating_add(len);
        let hit = faults.iter_mut().find(|fault| {
            fault.times > 0
                && fault.operation == operation
                && (operation == Operation::Flush || offset < fault.range.end && fault.range.start < end)
        })?;
        if hit.times != u32::MAX {
            hit.times -= 1;
        }
        Some(hit.effect)
    }

    /// Does `whole`, or less: `part` of it, of so many bytes.
    fn act(
        &self,
        (operation, offset, len): (Operation, u64, u64),
        part: impl FnOnce(usize) -> io::Result<()>,
        whole: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        match self.effect(operation, offset, len) {
            None => whole(),
            Some(Effect::Error(number)) => Err(io::Error::from_raw_os_error(number)),
            Some(Effect::Short(bytes, number)) => {
                part(bytes)?;
                Err(io::Error::from_raw_os_error(number))
            }
            Some(Effect::Delay(time)) => {
                std::thread::sleep(time);
                whole()
            }
        }
    }
}

impl BlockBackend for Faulty {
    fn len(&self) -> u64 {
        self.disk.len()
    }

    fn read_only(&self) -> bool {
        self.disk.read_only()
    }

    fn topology(&self) -> Topology {
        self.disk.topology()
    }

    fn resize(&self, len: u64) -> io::Result<()> {
        self.disk.resize(len)
    }

    fn read_at(&self, into: &mut Buffers<'_>, offset: u64) -> io::Result<()> {
        let into = std::cell::RefCell::new(into);
        let len = into.borrow().len() as u64;
        self.act(
            (Operation::Read, offset, len),
            |bytes| self.disk.read_at(&mut into.borrow_mut().take(bytes), offset),
            || self.disk.read_at(&mut into.borrow_mut(), offset),
        )
    }

    fn write_at(&self, from: &mut Buffers<'_>, offset: u64) -> io::Result<()> {
        let from = std::cell::RefCell::new(from);
        let len = from.borrow().len() as u64;
        self.act(
            (Operation::Write, offset, len),
            |bytes| self.disk.write_at(&mut from.borrow_mut().take(bytes), offset),
            || self.disk.write_at(&mut from.borrow_mut(), offset),
        )
    }

    fn flush(&self) -> io::Result<()> {
        self.act((Operation::Flush, 0, 0), |_| Ok(()), || self.disk.flush())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.act((Operation::Clear, offset, len), |_| Ok(()), || self.disk.discard(offset, len))
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let zero = |len| self.disk.write_zeroes(offset, len, unmap);
        self.act((Operation::Clear, offset, len), |bytes| zero(len.min(bytes as u64)), || zero(len))
    }
}
