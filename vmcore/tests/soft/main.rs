//! System behaviour of the software CPU: modes, privileges, exceptions, tasks, system registers.
//!
//! The tests are functions of a backend, and run on hardware KVM too where there is one: that is the
//! reference. Expectations are the SDM's.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    reason = "these are tests"
)]

mod alignment;
mod bios;
mod control;
mod debug;
mod fault;
#[path = "../contract/guest.rs"]
#[expect(dead_code, reason = "shared with the contract tests")]
mod guest;
mod isa;
mod machine;
mod mode;
mod port;
mod privilege;
mod task;
mod v86;

use vmcore::backend::{Backend, Capability};

/// Makes tests of functions of a backend, on the software CPU and on hardware KVM.
#[macro_export]
macro_rules! system {
    ($($name:ident),* $(,)?) => {
        mod soft {
            $(
                #[test]
                fn $name() {
                    super::$name(&vmcore::soft::Soft::new());
                }
            )*
        }
        mod kvm {
            $(
                #[test]
                fn $name() {
                    if let Some(backend) = $crate::hardware() {
                        super::$name(&*backend);
                    }
                }
            )*
        }
    };
}

/// KVM, where the host's processor runs the guest.
fn hardware() -> Option<Box<dyn Backend>> {
    match vmcore::kvm::Kvm::open() {
        Ok(kvm) if kvm.supports(Capability::Hardware) => Some(Box::new(kvm)),
        Ok(_) => {
            println!("skipped: this KVM is software");
            None
        }
        Err(e) => {
            println!("skipped: {e}");
            None
        }
    }
}
