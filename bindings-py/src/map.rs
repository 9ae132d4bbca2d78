//! Guest memory that comes and goes: what backs it, by keywords.

use std::fs::File;
use std::sync::Arc;

use pyo3::prelude::*;
use vmcore::memory::{Backing, HugePages, NumaPolicy, RegionBuilder};
use vmcore::{GuestAddress, MemoryRegion};

use crate::error;
use crate::net::duplicate;
use crate::vm::Vm;

/// How all of a built VM's memory is backed.
pub fn settings(
    huge_pages: &str,
    numa: Option<(String, Vec<u32>)>,
) -> PyResult<impl Fn(RegionBuilder) -> RegionBuilder + Send + use<>> {
    let huge_pages = self::huge_pages(huge_pages)?;
    let numa = numa.map(|(policy, nodes)| numa_policy(&policy, nodes)).transpose()?.unwrap_or_default();
    Ok(move |region: RegionBuilder| region.huge_pages(huge_pages).numa(numa.clone()))
}

fn huge_pages(name: &str) -> PyResult<HugePages> {
    Ok(match name {
        "default" => HugePages::Default,
        "transparent" => HugePages::Transparent,
        "never" => HugePages::Never,
        "2M" => HugePages::Size2M,
        "1G" => HugePages::Size1G,
        other => {
            return Err(error::config(
                "huge_pages",
                other,
                "default, transparent, never, 2M and 1G are known",
            ));
        }
    })
}

fn numa_policy(policy: &str, nodes: Vec<u32>) -> PyResult<NumaPolicy> {
    match (policy, nodes.as_slice()) {
        ("bind", _) => Ok(NumaPolicy::Bind(nodes)),
        ("interleave", _) => Ok(NumaPolicy::Interleave(nodes)),
        ("preferred", &[node]) => Ok(NumaPolicy::Preferred(node)),
        _ => {
            let fix = "give (\"bind\", nodes), (\"interleave\", nodes) or (\"preferred\", [node])";
            Err(error::config("numa", format!("({policy:?}, {nodes:?})"), fix))
        }
    }
}

#[pymethods]
impl Vm {
    /// Makes `length` bytes from `base` guest memory: anonymous, unless `memfd` or a `file` is to back it, from
    /// `offset`; writes reach the file where it is `shared`. `numa` places the pages on nodes of the host: ("bind",
    /// [0, 1]), ("preferred", [0]) or ("interleave", [0, 1]).
    #[pyo3(signature = (
        base, length, *, read_only=false, track_dirty=false, mergeable=false, prefault=false, huge_pages="default",
        numa=None, memfd=false, file=None, offset=0, shared=false
    ))]
    #[expect(clippy::too_many_arguments, reason = "keywords in Python")]
    #[expect(clippy::fn_params_excessive_bools, reason = "keywords in Python")]
    fn map(
        &self,
        py: Python<'_>,
        base: u64,
        length: u64,
        read_only: bool,
        track_dirty: bool,
        mergeable: bool,
        prefault: bool,
        huge_pages: &str,
        numa: Option<(String, Vec<u32>)>,
        memfd: bool,
        file: Option<Bound<'_, PyAny>>,
        offset: u64,
        shared: bool,
    ) -> PyResult<()> {
        let backing = match file {
            Some(file) => Backing::File { file: Arc::new(File::from(duplicate(&file)?)), offset, shared },
            None if memfd => Backing::Memfd,
            None => Backing::Anonymous,
        };
        let region = MemoryRegion::builder(GuestAddress(base), length).backing(backing);
        let mut region = settings(huge_pages, numa)?(region);
        if read_only {
            region = region.read_only();
        }
        if track_dirty {
            region = region.track_dirty();
        }
        if mergeable {
            region = region.mergeable();
        }
        if prefault {
            region = region.prefault();
        }
        self.with(py, "map memory", |vm| vm.map(region.build()?))
    }

    /// Takes the memory that begins at `base` away from the guest.
    fn unmap(&self, py: Python<'_>, base: u64) -> PyResult<()> {
        self.with(py, "unmap memory", |vm| vm.unmap(GuestAddress(base)).map(drop))
    }

    /// Offsets of the pages of the region at `base` that were written since the last call.
    fn take_dirty(&self, py: Python<'_>, base: u64) -> PyResult<Vec<u64>> {
        self.with(py, "take dirty pages", |vm| {
            Ok(vm.take_dirty(GuestAddress(base))?.dirty_offsets().collect())
        })
    }
}
