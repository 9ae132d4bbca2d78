//! The machine's time and random numbers, as devices see them.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::rand::{GetRandomFlags, getrandom};

use crate::deterministic::World;
use crate::error::{Error, Result};

/// The time that goes by for a machine's devices: the host's, or that of a deterministic VM, which
/// follows from the instructions executed. Clones are the same clock.
#[derive(Clone, Debug)]
pub struct Clock(Source);

#[derive(Clone, Debug)]
enum Source {
    Host(Instant),
    World(Arc<World>),
}

impl Clock {
    pub(super) fn new(world: Option<&Arc<World>>) -> Self {
        Self(world.map_or_else(|| Source::Host(Instant::now()), |world| Source::World(world.clone())))
    }

    /// Time since the machine was made.
    pub fn now(&self) -> Duration {
        match &self.0 {
            Source::Host(begin) => begin.elapsed(),
            Source::World(world) => Duration::from_nanos(world.now()),
        }
    }

    /// The time of day, since 1970 in UTC.
    pub fn time_of_day(&self) -> Duration {
        match &self.0 {
            Source::Host(_) => SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
            Source::World(world) => world.time_of_day(),
        }
    }
}

/// Random numbers for a machine's devices: the host's, or those of a deterministic VM, which follow from
/// its seed. Clones draw from the same source; the default is the host's.
#[derive(Clone, Debug, Default)]
pub struct Entropy(Option<Arc<World>>);

impl Entropy {
    pub(super) fn new(world: Option<&Arc<World>>) -> Self {
        Self(world.cloned())
    }

    /// Fills `bytes`.
    ///
    /// # Errors
    /// [`Error::Os`] where the host has none.
    pub fn fill(&self, mut bytes: &mut [u8]) -> Result<()> {
        if let Some(world) = &self.0 {
            world.fill_random(bytes);
            return Ok(());
        }
        while !bytes.is_empty() {
            match getrandom(&mut *bytes, GetRandomFlags::empty()) {
                Ok(count) => bytes = &mut bytes[count..],
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(Error::os("getrandom", "random numbers of a guest", e)),
            }
        }
        Ok(())
    }
}
