//! virtio-balloon: memory that the guest gives back (virtio 1.2, section 5.5).

mod handle;
mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Serialize};
use vmcore::{Error, Machine, Result};

use super::device::{Activation, DeviceType, VirtioDevice, Worker, read_config_bytes};
use crate::saved;
use handle::Shared;
pub use handle::{BalloonHandle, BalloonStatistics};
use worker::BalloonWorker;

/// `VIRTIO_BALLOON_F_*` (section 5.5.3).
const F_STATS_VQ: u32 = 1;
const F_DEFLATE_ON_OOM: u32 = 2;
const F_PAGE_POISON: u32 = 4;
const F_REPORTING: u32 = 5;

/// Offsets in the configuration (section 5.5.4).
const ACTUAL: u64 = 4;
const POISON: u64 = 12;

/// The unit of the device, in bytes, whatever the guest's pages are (section 5.5.6).
const PAGE: u64 = 4096;

const WHAT: &str = "a virtio balloon";
const STATE_VERSION: u8 = 1;

/// A balloon in the guest's memory: what it takes up, and what the guest reports as free, goes back to
/// the host, and comes again when the guest touches it.
///
/// Its size is what [`BalloonHandle::set_target`] says last; the guest's driver follows as it can. The
/// guest takes pages out again when it would have to kill a process otherwise, unless told not to
/// ([`Balloon::deflate_on_oom`]). Free pages are reported all the time, without a target
/// ([`Balloon::free_page_reporting`]): 2 MiB blocks and more, by Linux.
///
/// Memory goes back where its region can return it ([`vmcore::MemoryRegion::discard`]): not that of
/// shared files, locked or pinned pages, or a part of a reserved huge page. Free page hinting
/// (`VIRTIO_BALLOON_F_FREE_PAGE_HINT`) is not offered: a guest may use hinted pages again at any moment,
/// so that only a migration can make use of them.
///
/// On a deterministic machine there is none: what the host wishes comes at no certain instruction.
#[derive(Debug)]
pub struct Balloon {
    shared: Arc<Shared>,
    deflate_on_oom: bool,
    reporting: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct State {
    target: u32,
    actual: u32,
    poison: u32,
}

impl Balloon {
    /// A balloon of no size.
    ///
    /// # Errors
    /// [`Error::Os`] where the host is out of descriptors.
    pub fn new() -> Result<Self> {
        let shared = Shared::new().map_err(|error| Error::os("eventfd", "balloon", error))?;
        Ok(Self { shared, deflate_on_oom: true, reporting: true })
    }

    /// Whether the guest may take memory out of the balloon before it kills a process for want of it;
    /// yes, unless said.
    pub fn deflate_on_oom(mut self, yes: bool) -> Self {
        self.deflate_on_oom = yes;
        self
    }

    /// Whether the guest is to report the memory that it does not use; yes, unless said.
    pub fn free_page_reporting(mut self, yes: bool) -> Self {
        self.reporting = yes;
        self
    }

    /// What changes and watches the balloon while the guest runs.
    pub fn handle(&self) -> BalloonHandle {
        self.shared.handle()
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> DeviceType {
        DeviceType::BALLOON
    }

    fn features(&self) -> u64 {
        let reporting = if self.reporting { 1 << F_REPORTING | 1 << F_PAGE_POISON } else { 0 };
        1 << F_STATS_VQ | u64::from(self.deflate_on_oom) << F_DEFLATE_ON_OOM | reporting
    }

    fn queue_sizes(&self) -> Vec<u16> {
        // Inflate, deflate, statistics, hinting (not offered), reporting.
        vec![128, 128, 16, 128, 128]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let load = |value: &AtomicU32| value.load(Ordering::Acquire).to_le_bytes();
        let shared = &self.shared;
        let words = [load(&shared.target), load(&shared.actual), [0; 4], load(&shared.poison)];
        read_config_bytes(&words.concat(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let field = match offset {
            ACTUAL => &self.shared.actual,
            POISON => &self.shared.poison,
            _ => return,
        };
        if let Some(value) = data.first_chunk() {
            field.store(u32::from_le_bytes(*value), Ordering::Release);
        }
    }

    fn attached(&mut self, machine: &mut Machine) -> Result<()> {
        if machine.is_deterministic() {
            return Err(Error::Config {
                what: "balloon",
                value: "on a deterministic VM".into(),
                fix: "leave it out: the host's wishes come at no certain instruction".into(),
            });
        }
        Ok(())
    }

    fn activate(&mut self, activation: Activation) -> Result<Vec<Box<dyn Worker>>> {
        Ok(vec![Box::new(BalloonWorker::new(activation, self.shared.clone()))])
    }

    fn save(&self) -> Result<Vec<u8>> {
        let load = |value: &AtomicU32| value.load(Ordering::Acquire);
        let Shared { target, actual, poison, .. } = &*self.shared;
        let state = State { target: load(target), actual: load(actual), poison: load(poison) };
        saved::save(WHAT, STATE_VERSION, &state)
    }

    fn restore(&mut self, state: &[u8]) -> Result<()> {
        let State { target, actual, poison } = saved::restore(WHAT, STATE_VERSION, state)?;
        self.shared.target.store(target, Ordering::Release);
        self.shared.actual.store(actual, Ordering::Release);
        self.shared.poison.store(poison, Ordering::Release);
        Ok(())
    }
}

impl Drop for Balloon {
    fn drop(&mut self) {
        self.shared.close();
    }
}
