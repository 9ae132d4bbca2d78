//! Disks.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;
use vmdevices::block::{DiskError, DiskStats, Format, Image, Limits};
use vmdevices::rate::Rate;
use vmdevices::virtio::{CacheMode, DiskHandle, OnError};

use crate::error::{self, Raise};

/// A disk on an image. It is opened at once, and goes to the VM that is given it.
#[pyclass(frozen, module = "vmcore")]
pub struct Disk {
    disk: Mutex<Option<vmdevices::Disk>>,
    handle: Handle,
    path: PathBuf,
    queues: Option<u16>,
}

/// A disk in use, until its VM is closed: a handle keeps the image open and locked.
#[derive(Clone)]
pub struct Handle(Arc<Mutex<Use>>);

enum Use {
    Open(DiskHandle),
    Closed { len: u64, stats: DiskStats },
}

impl Handle {
    fn of(&self) -> MutexGuard<'_, Use> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the image go, and keeps what it was.
    pub fn close(&self) {
        let mut held = self.of();
        if let Use::Open(handle) = &*held {
            *held = Use::Closed { len: handle.len(), stats: handle.stats() };
        }
    }

    fn len(&self) -> u64 {
        match &*self.of() {
            Use::Open(handle) => handle.len(),
            Use::Closed { len, .. } => *len,
        }
    }
}

impl Disk {
    /// What its VM closes.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    pub fn open(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        Self::new(
            py,
            path,
            None,
            false,
            false,
            Vec::new(),
            Vec::new(),
            "writeback",
            None,
            None,
            "",
            None,
            "report",
            "report",
        )
    }

    /// The disk, for a machine of `cpus` processors.
    pub fn take(&self, cpus: u32) -> PyResult<vmdevices::Disk> {
        let disk = self.disk.lock().unwrap_or_else(PoisonError::into_inner).take();
        let disk =
            disk.ok_or_else(|| error::wrong_state("attach a disk", "using it already", "open it again"))?;
        Ok(disk.queues(self.queues.unwrap_or_else(|| u16::try_from(cpus).unwrap_or(u16::MAX))))
    }
}

/// So many a second, and at once after a pause.
#[derive(FromPyObject)]
enum RateArg {
    Plain(u64),
    WithBurst(u64, u64),
}

impl From<RateArg> for Rate {
    fn from(rate: RateArg) -> Self {
        match rate {
            RateArg::Plain(per_second) => Rate::new(per_second),
            RateArg::WithBurst(per_second, burst) => Rate { per_second, burst },
        }
    }
}

/// What becomes of a request that the host fails, by the names that vmrun has for it.
fn on_error(what: &'static str, name: &str) -> PyResult<OnError> {
    Ok(match name {
        "report" => OnError::Report,
        "stop" => OnError::Stop,
        "enospc" => OnError::StopIfFull,
        "ignore" => OnError::Ignore,
        other => return Err(error::config(what, other, "report, stop, enospc and ignore are known")),
    })
}

#[pymethods]
impl Disk {
    /// Opens `path`. The format is raw unless said, but an image that looks like another is refused.
    /// `on_read_error` and `on_write_error` say what becomes of reads, and of other requests, that the host
    /// fails: the guest is told ("report"), the VM stops with `Outcome.IO_ERROR` and the next run tries again
    /// ("stop", or "enospc" for want of room alone), or nobody is told ("ignore").
    #[new]
    #[pyo3(signature = (path, *, format=None, read_only=false, direct=false, backing=Vec::new(), extents=Vec::new(), cache="writeback", iops=None, bps=None, serial="", queues=None, on_read_error="report", on_write_error="report"))]
    #[expect(clippy::too_many_arguments, reason = "keywords in Python")]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        format: Option<&str>,
        read_only: bool,
        direct: bool,
        backing: Vec<PathBuf>,
        extents: Vec<PathBuf>,
        cache: &str,
        iops: Option<RateArg>,
        bps: Option<RateArg>,
        serial: &str,
        queues: Option<u16>,
        on_read_error: &str,
        on_write_error: &str,
    ) -> PyResult<Self> {
        let invalid = |what, value: &str, fix: String| error::config(what, value, fix);
        let format = format
            .map(|name| name.parse::<Format>().map_err(|why| invalid("format of a disk image", name, why)))
            .transpose()?;
        let cache = match cache {
            "writeback" => CacheMode::WriteBack,
            "writethrough" => CacheMode::WriteThrough,
            "unsafe" => CacheMode::Unsafe,
            other => {
                return Err(invalid("cache", other, "writeback, writethrough and unsafe are known".into()));
            }
        };
        let reads = on_error("on_read_error", on_read_error)?;
        let others = on_error("on_write_error", on_write_error)?;
        let limits = Limits { operations: iops.map(Rate::from), bytes: bps.map(Rate::from) };
        let disk = py.detach(|| -> Result<_, DiskError> {
            let mut image = match format {
                Some(format) => Image::new(&path, format),
                // Raw, unless it looks like something else: a guest may have made it look so.
                None => match Image::probe(&path, true)?.format() {
                    Format::Raw => Image::raw(&path),
                    found => {
                        let path = path.clone();
                        let what =
                            format!("it looks like {found}; say format=\"{found}\", or format=\"raw\"");
                        return Err(DiskError::Image { path, format: Format::Raw, what });
                    }
                },
            };
            let mut below: Option<Image> = None;
            for path in backing.iter().rev() {
                let layer = Image::probe(path, true)?;
                below = Some(match below {
                    Some(below) => layer.backing(below),
                    None => layer,
                });
            }
            if let Some(below) = below {
                image = image.backing(below);
            }
            if read_only {
                image = image.read_only();
            }
            if direct {
                image = image.direct();
            }
            image = extents.iter().fold(image, |image, path| image.extent(path));
            Ok(vmdevices::Disk::image(image)?.id(serial)?.cache(cache).limits(limits).on_error(reads, others))
        });
        let disk = disk.raise()?;
        let handle = Handle(Arc::new(Mutex::new(Use::Open(disk.handle()))));
        Ok(Self { disk: Mutex::new(Some(disk)), handle, path, queues })
    }

    /// The image.
    #[getter]
    fn path(&self) -> PathBuf {
        self.path.clone()
    }

    /// Size in bytes, as the guest sees it.
    #[getter]
    fn size(&self) -> u64 {
        self.handle.len()
    }

    /// Makes it larger, while the guest runs.
    fn resize(&self, py: Python<'_>, size: u64) -> PyResult<()> {
        let handle = match &*self.handle.of() {
            Use::Open(handle) => handle.clone(),
            Use::Closed { .. } => return Err(error::closed("a disk")),
        };
        py.detach(|| handle.resize(size)).raise()
    }

    /// Why the disk stopped its VM, in words, until the VM runs again; None where it did not.
    #[getter]
    fn stopped(&self) -> Option<String> {
        match &*self.handle.of() {
            Use::Open(handle) => handle.stopped().map(|stop| stop.message),
            Use::Closed { .. } => None,
        }
    }

    /// What the guest did with it.
    fn stats(&self) -> BTreeMap<&'static str, u64> {
        let stats = match &*self.handle.of() {
            Use::Open(handle) => handle.stats(),
            Use::Closed { stats, .. } => *stats,
        };
        BTreeMap::from([
            ("reads", stats.reads),
            ("bytes_read", stats.bytes_read),
            ("writes", stats.writes),
            ("bytes_written", stats.bytes_written),
            ("flushes", stats.flushes),
            ("cleared", stats.cleared),
            ("errors", stats.errors),
            ("merged", stats.merged),
            ("throttled", stats.throttled),
        ])
    }

    fn __repr__(&self) -> String {
        format!("<Disk {} of {} bytes>", self.path.display(), self.handle.len())
    }
}
