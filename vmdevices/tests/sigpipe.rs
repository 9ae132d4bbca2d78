//! What a host program gets to feel of a pipe whose reader is gone: an error in a log. Rust programs
//! ignore SIGPIPE; C programs, which this library lives in too, die of it.
#![expect(unsafe_code, clippy::unwrap_used, reason = "a test that calls signal")]

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use vmcore::boot::{Raw, RawMode};
use vmcore::{BusDevice, IoThread, Machine, Outcome, Vm};
use vmdevices::console::{self, Link, Stdio};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal;

/// Which part of a test runs in a process of its own.
const PART: &str = "VMDEVICES_TEST_SIGPIPE";

/// Runs `test` of this program again with [`PART`] set; how that ended.
fn as_c_program(test: &str, part: &str) -> std::process::Output {
    let program = std::env::current_exe().unwrap();
    Command::new(program).args(["--exact", test, "--nocapture"]).env(PART, part).output().unwrap()
}

/// Leaves SIGPIPE at its default.
fn be_a_c_program() {
    // SAFETY: the default action is no handler that could do harm.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// out 0x80, al; hlt
const OUT: &[u8] = &[0xe6, 0x80, 0xf4];

/// A pipe without reader.
fn broken() -> OwnedFd {
    io::pipe().unwrap().1.into()
}

#[test]
fn a_reader_that_goes_kills_no_host_program() {
    let name = "a_reader_that_goes_kills_no_host_program";
    if std::env::var_os(PART).is_none() {
        let output = as_c_program(name, "all");
        let signal = output.status.signal();
        assert!(output.status.success(), "signal {signal:?}: {}", String::from_utf8_lossy(&output.stderr));
        return;
    }
    be_a_c_program();

    // Consoles, on a thread that is not a VM's: as they are when a Vm is dropped.
    let null = File::open("/dev/null").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let fifo = directory.path().join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let reader = std::thread::spawn({
        let fifo = fifo.clone();
        move || File::open(fifo).unwrap()
    });
    let file = console::File::create(&fifo).unwrap();
    drop(reader.join().unwrap());
    let (socket, _) = UnixStream::pair().unwrap();
    for mut link in [
        Link::new(Stdio::on(&null, broken()).unwrap()),
        Link::new(Stdio::on(&null, &socket).unwrap()),
        Link::new(file),
    ] {
        link.write(b"nobody reads this");
        assert_eq!(link.lost(), 17);
    }
    // The thread has its mask back, and nothing waits for it to be unblocked.
    assert!(!signal::get_blocked_signals().unwrap().contains(&libc::SIGPIPE));

    // Whatever a device does on an I/O thread.
    let thread = IoThread::new("test").unwrap();
    let (event, (sender, receiver)) = (Arc::new(EventFd::new(0).unwrap()), mpsc::channel());
    let write = move || sender.send(rustix::io::write(broken(), b"x")).unwrap();
    let _watch = thread.watch_event(&event, write).unwrap();
    event.write(1).unwrap();
    let result = receiver.recv_timeout(Duration::from_secs(10)).unwrap();
    assert_eq!(result, Err(rustix::io::Errno::PIPE));

    // And on a vCPU's.
    struct Port;
    impl BusDevice for Port {
        fn read(&mut self, _: u64, _: &mut [u8]) {}
        fn write(&mut self, _: u64, data: &[u8]) {
            assert_eq!(rustix::io::write(broken(), data), Err(rustix::io::Errno::PIPE));
        }
    }
    let vm = Vm::builder()
        .memory(64 << 10)
        .irqchip(false)
        .boot(Raw::new(OUT, RawMode::Real16))
        .attach(|machine: &mut Machine| machine.ports(0x80, 1, Arc::new(Mutex::new(Port))))
        .build();
    match vm {
        Ok(mut vm) => assert_eq!(vm.run_for(Duration::from_secs(60)).unwrap(), Outcome::Halted),
        Err(error) => println!("without a vCPU: {error}"),
    }
}

/// The test above can fail: a bare write does kill.
#[test]
fn a_bare_write_would() {
    if std::env::var_os(PART).is_none() {
        assert_eq!(as_c_program("a_bare_write_would", "bare").status.signal(), Some(libc::SIGPIPE));
        return;
    }
    be_a_c_program();
    let _ = rustix::io::write(broken(), b"x");
}
