//! The contract of `vmcore::backend`, run on every backend that this host has.
//!
//! A test is a function of a backend; `contract!` makes a `#[test]` of it for each. Where a backend
//! cannot be used, the test says `skipped:` and why.
#![expect(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "these are tests")]

mod apic;
mod chips;
mod code;
mod cpuid;
mod debug;
mod guest;
mod hypercall;
mod io;
mod irq;
mod kick;
mod memory;
mod state;

use std::ffi::OsStr;
use std::process::Command;

use vmcore::backend::{Backend, Capability};

/// The backend under test, or why there is none.
fn kvm() -> Result<impl Backend, String> {
    vmcore::kvm::Kvm::open().map_err(|e| e.to_string())
}

#[cfg(feature = "soft")]
fn soft() -> Result<impl Backend, String> {
    Ok::<_, String>(vmcore::soft::Soft::new())
}

#[cfg(not(feature = "soft"))]
fn soft() -> Result<impl Backend, String> {
    Err::<vmcore::kvm::Kvm, _>("this build has no software CPU".into())
}

/// The backends of this host that are not `backend`.
fn others(backend: &dyn Backend) -> Vec<Box<dyn Backend>> {
    let boxed: [Option<Box<dyn Backend>>; 2] =
        [kvm().ok().map(|b| Box::new(b) as _), soft().ok().map(|b| Box::new(b) as _)];
    boxed.into_iter().flatten().filter(|other| other.name() != backend.name()).collect()
}

/// Makes tests of functions of a backend, on every backend.
#[macro_export]
macro_rules! contract {
    ($($name:ident),* $(,)?) => {
        $crate::contract!(@on kvm: $($name),*);
        $crate::contract!(@on soft: $($name),*);
    };
    (@on $backend:ident: $($name:ident),*) => {
        mod $backend {
            $(
                #[test]
                fn $name() {
                    match $crate::$backend() {
                        Ok(backend) => super::$name(&backend),
                        Err(reason) => println!("skipped: {reason}"),
                    }
                }
            )*
        }
    };
}

/// Whether the backend is one that preflight calls usable for small guests only.
fn small_guests_only(backend: &dyn Backend) -> bool {
    !backend.supports(Capability::Hardware)
}

/// Runs one test of this program again, alone in a new process, and returns what it printed.
fn again(module: &str, backend: &str, test: &str, variables: &[(&str, &OsStr)]) -> String {
    let output = Command::new(std::env::current_exe().unwrap())
        .args([&format!("{module}::{backend}::{test}"), "--exact", "--nocapture"])
        .env("VMCORE_TEST_ALONE", "1")
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    let text =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success(), "{text}");
    text
}
