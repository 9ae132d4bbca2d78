//! Disk images made, checked and compared by `qemu-img` (Debian's qemu-utils).

use std::path::{Path, PathBuf};
use std::process::Command;

/// A directory of images, or `None` after saying that there is no `qemu-img`.
pub fn directory() -> Option<tempfile::TempDir> {
    if Command::new("qemu-img").arg("--version").output().is_err() {
        assert!(
            std::env::var_os("VMCORE_REQUIRE_BOOT").is_none(),
            "there is no qemu-img: install qemu-utils"
        );
        println!("skipped: there is no qemu-img: install qemu-utils");
        return None;
    }
    // Not in memory: a file system there may have no O_DIRECT. All the rig has on a disk is the guests.
    let in_rig = std::env::var_os("VMCORE_RIG").and_then(|_| std::env::var_os("VMCORE_GUESTS"));
    let parent = in_rig.unwrap_or_else(|| env!("CARGO_TARGET_TMPDIR").into());
    Some(tempfile::tempdir_in(parent).unwrap())
}

/// `qemu-img ARGUMENTS`; they are split at spaces.
pub fn qemu_img(arguments: &str) -> bool {
    let output = Command::new("qemu-img").args(arguments.split_whitespace()).output().unwrap();
    if !output.status.success() {
        println!("qemu-img {arguments}: {output:?}");
    }
    output.status.success()
}

/// The image `name` of `size` in `directory`, with these `-o` options.
pub fn create(directory: &Path, name: &str, format: &str, options: &str, size: &str) -> PathBuf {
    let path = directory.join(name);
    let options = if options.is_empty() { String::new() } else { format!("-o {options}") };
    assert!(qemu_img(&format!("create -q -f {format} {options} {} {size}", path.display())));
    path
}
