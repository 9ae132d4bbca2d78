//! `--disk`.

use std::num::NonZeroU16;
use std::path::PathBuf;

use vmdevices::block::{Format, Limits};
use vmdevices::rate::Rate;
use vmdevices::virtio::{CacheMode, OnError};

use super::{parts, size};

/// A disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskArg {
    /// The image.
    pub path: PathBuf,
    /// What it is, if that was said.
    pub format: Option<Format>,
    /// The guest cannot write it.
    pub read_only: bool,
    /// Past the page cache.
    pub direct: bool,
    /// What it is on top of, from the top.
    pub backing: Vec<PathBuf>,
    /// Files that it is made of besides.
    pub extents: Vec<PathBuf>,
    /// When writes are stable.
    pub cache: CacheMode,
    /// What becomes of reads and of other requests that the host fails.
    pub on_error: [OnError; 2],
    /// Operations and bytes a second.
    pub limits: Limits,
    /// How many queues, if that was said.
    pub queues: Option<NonZeroU16>,
    /// What the guest sees as its serial number.
    pub serial: String,
}

pub fn parse(text: &str) -> Result<DiskArg, String> {
    let mut parts = parts(text);
    let path = parts.next().unwrap_or_default();
    if path.is_empty() {
        return Err("give the path of an image".into());
    }
    let mut disk = DiskArg { path: path.into(), ..DiskArg::default() };
    for option in parts {
        let (key, value) =
            option.split_once('=').map_or((option.as_str(), None), |(key, value)| (key, Some(value)));
        let wrong = |what: &str| format!("option {option:?}: {what}");
        let path = || value.filter(|value| !value.is_empty()).map(PathBuf::from).ok_or(wrong("give a path"));
        let text = || value.ok_or(wrong("give a value"));
        match key {
            "ro" if value.is_none() => disk.read_only = true,
            "direct" if value.is_none() => disk.direct = true,
            "format" => disk.format = Some(text()?.parse().map_err(|e: String| wrong(&e))?),
            "backing" => disk.backing.push(path()?),
            "extent" => disk.extents.push(path()?),
            "cache" => {
                disk.cache = match text()? {
                    "writeback" => CacheMode::WriteBack,
                    "writethrough" => CacheMode::WriteThrough,
                    "unsafe" => CacheMode::Unsafe,
                    _ => return Err(wrong("valid are: writeback, writethrough, unsafe")),
                }
            }
            "rerror" => disk.on_error[0] = on_error(text()?).map_err(|e| wrong(&e))?,
            "werror" => disk.on_error[1] = on_error(text()?).map_err(|e| wrong(&e))?,
            "iops" => disk.limits.operations = Some(rate(text()?).map_err(|e| wrong(&e))?),
            "bps" => disk.limits.bytes = Some(rate(text()?).map_err(|e| wrong(&e))?),
            "queues" => {
                let count = text()?.parse().map_err(|_| wrong("give a number from 1 to 256"))?;
                disk.queues = Some(count);
            }
            "serial" => disk.serial = text()?.into(),
            _ => {
                return Err(format!(
                    "no option {option:?}; known are: format= ro backing= extent= cache= direct rerror= werror= \
                     iops= bps= queues= serial=. A comma of the name is doubled"
                ));
            }
        }
    }
    Ok(disk)
}

/// As QEMU has it.
fn on_error(text: &str) -> Result<OnError, String> {
    Ok(match text {
        "report" => OnError::Report,
        "stop" => OnError::Stop,
        "enospc" => OnError::StopIfFull,
        "ignore" => OnError::Ignore,
        _ => return Err("valid are: report, stop, enospc, ignore".into()),
    })
}

/// So many a second, and at once after a pause: RATE or RATE/BURST.
fn rate(text: &str) -> Result<Rate, String> {
    match text.split_once('/') {
        None => size(text).map(Rate::new),
        Some((rate, burst)) => Ok(Rate { per_second: size(rate)?, burst: size(burst)? }),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{parse, refused};
    use super::*;

    #[test]
    fn disks_have_options_and_names_with_commas() {
        let args = parse(&["--disk", "a.img,ro", "--disk", "b", "--disk", "x,,y,,,ro"]).unwrap();
        let disks: Vec<_> = args.disks.iter().map(|d| (d.path.to_str().unwrap(), d.read_only)).collect();
        assert_eq!(disks, [("a.img", true), ("b", false), ("x,y,", true)]);
        refused(&["--disk", "a.img,rw"], &["\"rw\"", "known are: format= ro"]);
        refused(&["--disk", "a.img,ro,cache=none"], &["\"cache=none\"", "writeback"]);
        refused(&["--disk", ",ro"], &["path of an image"]);
        refused(&["--disk", "a.img,werror=pause"], &["\"werror=pause\"", "enospc"]);
        let stops = parse(&["--disk", "a.img,rerror=stop,werror=enospc"]).unwrap();
        assert_eq!(stops.disks[0].on_error, [OnError::Stop, OnError::StopIfFull]);

        let line = "top,format=qcow2,backing=mid,backing=a,,b,cache=unsafe,direct,iops=500/1K,bps=10M,queues=4,serial=x";
        let disk = &parse(&["--disk", line]).unwrap().disks[0];
        assert_eq!(disk.backing, ["mid", "a,b"].map(PathBuf::from));
        assert_eq!((disk.format, disk.cache, disk.direct), (Some(Format::Qcow2), CacheMode::Unsafe, true));
        assert_eq!(disk.limits.operations, Some(Rate { per_second: 500, burst: 1024 }));
        assert_eq!(disk.limits.bytes, Some(Rate::new(10 << 20)));
        assert_eq!((disk.queues, disk.serial.as_str()), (NonZeroU16::new(4), "x"));
        for (bad, word) in [
            ("format=qcow", "raw, qcow2"),
            ("format", "value"),
            ("backing=", "path"),
            ("iops=many", "number"),
            ("queues=0", "1 to 256"),
            ("ro=1", "known are"),
        ] {
            refused(&["--disk", &format!("a,{bad}")], &[word]);
        }
    }
}
