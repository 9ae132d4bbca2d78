//! A guest under vmrun and under QEMU, and what it writes on its console.

use std::error::Error;
use std::ffi::OsString;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use vmcore_benches::{Ended, wait};

pub const MEMORY_MIB: u64 = 512;
/// A guest that takes longer has failed.
const TIMEOUT: Duration = Duration::from_secs(120);

/// Where the guests are that `make guests` has made.
pub fn guests() -> PathBuf {
    std::env::var_os("VMCORE_GUESTS")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guests"), PathBuf::from)
}

/// What a guest is made of, besides one processor and [`MEMORY_MIB`].
pub struct Guest<'a> {
    pub kernel: &'a Path,
    pub initrd: &'a Path,
    pub command_line: &'a str,
    /// A virtio disk.
    pub disk: Option<&'a Path>,
}

impl Guest<'_> {
    fn arguments(&self, fixed: &str, options: [&str; 3]) -> Vec<OsString> {
        let mut args: Vec<OsString> = fixed.split_whitespace().map(OsString::from).collect();
        let values = [self.kernel.as_os_str(), self.initrd.as_os_str(), self.command_line.as_ref()];
        args.extend(
            options.into_iter().zip(values).flat_map(|(option, value)| [option.into(), value.into()]),
        );
        args
    }

    /// vmrun's arguments for it, on the software CPU.
    pub fn for_vmrun(&self) -> Vec<OsString> {
        let fixed = format!("--accel soft --memory {MEMORY_MIB}M");
        let mut args = self.arguments(&fixed, ["--kernel", "--initrd", "--cmdline"]);
        args.extend(self.disk.iter().flat_map(|disk| ["--disk".into(), disk.into()]));
        args
    }

    /// QEMU's arguments for it, on TCG: the machine that starts soonest; and where it has a disk the usual
    /// one, since kernels now and then wait for ever for a timer in a microvm that describes its devices
    /// to them.
    pub fn for_qemu(&self) -> Vec<OsString> {
        let machine = if self.disk.is_some() { "pc" } else { "microvm,acpi=off" };
        let fixed = format!(
            "-M {machine} -accel tcg -cpu max -m {MEMORY_MIB} -nodefaults -no-user-config -display none \
             -serial stdio -no-reboot"
        );
        let mut args = self.arguments(&fixed, ["-kernel", "-initrd", "-append"]);
        if let Some(disk) = self.disk {
            let mut drive = OsString::from("id=disk,if=none,format=raw,file=");
            drive.push(disk);
            args.extend(["-device".into(), "virtio-blk-pci,drive=disk".into(), "-drive".into(), drive]);
        }
        args
    }
}

/// A program that was run until it had written something.
pub struct Ran<S> {
    pub output: String,
    pub wall: Duration,
    pub ended: Ended,
    /// What was looked at then.
    pub seen: S,
}

/// Runs `program` until it has written `last`, and ends it, after `look` at the process of that number.
///
/// # Errors
/// Where it does not come to that.
pub fn run_until<S>(
    program: &Path,
    args: &[OsString],
    last: &str,
    look: impl FnOnce(u32) -> Result<S, Box<dyn Error>>,
) -> Result<Ran<S>, Box<dyn Error>> {
    let begin = Instant::now();
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| format!("{}: {e}", program.display()))?;
    let mut console = child.stdout.take().ok_or("no pipe")?;
    let (sender, parts) = mpsc::channel();
    // It ends with the program.
    let reader = std::thread::spawn(move || {
        let mut part = [0; 4096];
        while let Ok(len @ 1..) = console.read(&mut part) {
            if sender.send(part[..len].to_vec()).is_err() {
                break;
            }
        }
    });
    let mut output = Vec::new();
    let reached = loop {
        let Ok(part) = parts.recv_timeout(TIMEOUT.saturating_sub(begin.elapsed())) else { break false };
        output.extend(&part);
        let from = output.len().saturating_sub(part.len() + last.len());
        if output[from..].windows(last.len()).any(|window| window == last.as_bytes()) {
            break true;
        }
    };
    let wall = begin.elapsed();
    let seen = look(child.id());
    child.kill()?;
    let ended = wait(child.id())?;
    reader.join().map_err(|_| "the console's reader has panicked")?;
    let output = String::from_utf8_lossy(&output).into_owned();
    if !reached {
        let tail: Vec<&str> = output.lines().rev().take(8).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        return Err(format!("{} did not come to {last:?}: ...{}", program.display(), tail.join("\n")).into());
    }
    Ok(Ran { output, wall, ended, seen: seen? })
}
