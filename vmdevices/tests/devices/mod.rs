//! Devices that a stock kernel drives from a shell on the serial port.

mod balloon;
mod console;
mod paravirtual;
mod vsock;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::time::Duration;

use vmcore::boot::Linux;
use vmcore::{Outcome, Vm, VmBuilder};
use vmdevices::Pc;
use vmdevices::console::Script;

use super::accel;

/// Long enough for what one of these tests does.
const LIMIT: Duration = Duration::from_secs(300);

/// A kernel of `guests` with a shell on its serial port; what `cmdline` adds chooses its root.
pub(super) fn machine(guests: &Path, kernel: &str, cmdline: &str, memory_mib: u64) -> (VmBuilder, Script) {
    let (serial, script) = vmdevices::console::memory().unwrap();
    let linux = Linux::new(guests.join(kernel).join("vmlinuz"))
        .initrd(guests.join(kernel).join("initrd.img"))
        .cmdline(format!("console=ttyS0 panic=-1 quiet vmtest=shell {cmdline}"));
    let builder =
        Vm::builder().accel(accel()).memory(memory_mib << 20).boot(linux).attach(Pc::new().serial(serial));
    (builder, script)
}

/// Runs `vm` while `user` works at its shell, which it leaves at the end.
pub(super) fn at_the_shell(mut vm: Vm, script: &Script, user: impl FnOnce() + Send) {
    let handle = vm.handle();
    script.send("stty -echo; PS1=; PS2=; echo re''ady\n").unwrap();
    let (outcome, used) = std::thread::scope(|scope| {
        let user = scope.spawn(|| {
            let used = catch_unwind(AssertUnwindSafe(|| {
                script.expect("ready", LIMIT).unwrap();
                user();
                script.send("exit\n").unwrap();
            }));
            if used.is_err() {
                handle.stop();
            }
            used
        });
        (vm.run_for(LIMIT), user.join().unwrap())
    });
    if let Err(panic) = used {
        println!("{}", script.transcript());
        resume_unwind(panic);
    }
    assert_eq!(outcome.unwrap(), Outcome::PowerOff, "{}", script.transcript());
}

/// Has the shell do `command`, and gives what it puts out.
pub(super) fn shell(script: &Script, command: &str) -> String {
    // A mark is split where it is typed, for shells that echo.
    script.send(format!("{command}; echo END''MARK\n")).unwrap();
    script.expect("ENDMARK", LIMIT).unwrap_or_else(|error| panic!("{command}: {error}"))
}
