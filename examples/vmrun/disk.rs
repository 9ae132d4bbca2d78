//! Disks, as the command line asks for them.

use std::num::NonZeroU32;

use vmdevices::Disk;
use vmdevices::block::{Format, Image};

use crate::args::DiskArg;

/// The disk that `arg` describes, for a machine of `cpus` processors.
pub fn open(arg: &DiskArg, cpus: NonZeroU32) -> Result<Disk, Box<dyn std::error::Error>> {
    let mut image = match arg.format {
        Some(format) => Image::new(&arg.path, format),
        // Raw, unless it looks like something else: a guest may have made it look so.
        None => match Image::probe(&arg.path, true)?.format() {
            Format::Raw => Image::raw(&arg.path),
            other => {
                let path = arg.path.display();
                return Err(format!(
                    "disk image {path} looks like {other}: say format={other}, or format=raw"
                )
                .into());
            }
        },
    };
    // From the bottom: each is below the one before it.
    let mut below: Option<Image> = None;
    for path in arg.backing.iter().rev() {
        let layer = Image::probe(path, true)?;
        below = Some(match below {
            Some(below) => layer.backing(below),
            None => layer,
        });
    }
    if let Some(below) = below {
        image = image.backing(below);
    }
    if arg.read_only {
        image = image.read_only();
    }
    if arg.direct {
        image = image.direct();
    }
    image = arg.extents.iter().fold(image, |image, path| image.extent(path));
    let queues = arg.queues.map_or_else(|| u16::try_from(cpus.get()).unwrap_or(u16::MAX), u16::from);
    let [reads, others] = arg.on_error;
    Ok(Disk::image(image)?
        .id(&arg.serial)?
        .cache(arg.cache)
        .on_error(reads, others)
        .limits(arg.limits)
        .queues(queues))
}
