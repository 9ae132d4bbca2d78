//! How a run ended.

use pyo3::prelude::*;
use vmcore::ResetCause;

/// How a run of the guest ended.
#[pyclass(frozen, eq, hash, module = "vmcore")]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Outcome(pub vmcore::Outcome);

#[pymethods]
#[expect(non_snake_case, reason = "Python's style of constants")]
impl Outcome {
    #[classattr]
    fn POWER_OFF() -> Self {
        Self(vmcore::Outcome::PowerOff)
    }
    #[classattr]
    fn PANICKED() -> Self {
        Self(vmcore::Outcome::Panicked)
    }
    #[classattr]
    fn HALTED() -> Self {
        Self(vmcore::Outcome::Halted)
    }
    #[classattr]
    fn STOPPED() -> Self {
        Self(vmcore::Outcome::Stopped)
    }
    #[classattr]
    fn TIME_LIMIT() -> Self {
        Self(vmcore::Outcome::TimeLimit)
    }
    #[classattr]
    fn INSTRUCTION_LIMIT() -> Self {
        Self(vmcore::Outcome::InstructionLimit)
    }
    #[classattr]
    fn IO_ERROR() -> Self {
        Self(vmcore::Outcome::IoError)
    }

    /// The guest wrote `code` to the exit port.
    #[staticmethod]
    #[pyo3(signature = (code, /))]
    fn exit(code: u32) -> Self {
        Self(vmcore::Outcome::Exit(code))
    }

    /// Which of them: "power_off", "reset", "exit", "panicked", "halted", "stopped", "time_limit",
    /// "instruction_limit" or "io_error".
    #[getter]
    fn kind(&self) -> &'static str {
        match self.0 {
            vmcore::Outcome::PowerOff => "power_off",
            vmcore::Outcome::Reset(_) => "reset",
            vmcore::Outcome::Exit(_) => "exit",
            vmcore::Outcome::Panicked => "panicked",
            vmcore::Outcome::Halted => "halted",
            vmcore::Outcome::Stopped => "stopped",
            vmcore::Outcome::TimeLimit => "time_limit",
            vmcore::Outcome::InstructionLimit => "instruction_limit",
            vmcore::Outcome::IoError => "io_error",
            _ => "other",
        }
    }

    /// What the guest wrote to the exit port; None of other ends.
    #[getter]
    fn code(&self) -> Option<u32> {
        match self.0 {
            vmcore::Outcome::Exit(code) => Some(code),
            _ => None,
        }
    }

    /// What made the guest reset: "keyboard", "port", "acpi" or "triple_fault"; None of other ends.
    #[getter]
    fn cause(&self) -> Option<&'static str> {
        match self.0 {
            vmcore::Outcome::Reset(cause) => Some(match cause {
                ResetCause::Keyboard => "keyboard",
                ResetCause::Port => "port",
                ResetCause::Acpi => "acpi",
                ResetCause::TripleFault => "triple_fault",
                _ => "other",
            }),
            _ => None,
        }
    }

    fn __str__(&self) -> String {
        format!("{:?}", self.0)
    }

    fn __repr__(&self) -> String {
        format!("<Outcome {:?}>", self.0)
    }
}

/// Why a vCPU gave control back.
#[pyclass(frozen, eq, hash, module = "vmcore")]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct VcpuExit(pub vmcore::VcpuExit);

#[pymethods]
#[expect(non_snake_case, reason = "Python's style of constants")]
impl VcpuExit {
    #[classattr]
    fn HALTED() -> Self {
        Self(vmcore::VcpuExit::Halted)
    }
    #[classattr]
    fn KICKED() -> Self {
        Self(vmcore::VcpuExit::Kicked)
    }
    #[classattr]
    fn INSTRUCTION_LIMIT() -> Self {
        Self(vmcore::VcpuExit::InstructionLimit)
    }
    #[classattr]
    fn WAITING() -> Self {
        Self(vmcore::VcpuExit::Waiting)
    }
    #[classattr]
    fn TRIPLE_FAULT() -> Self {
        Self(vmcore::VcpuExit::TripleFault)
    }

    /// Which of them: "halted", "kicked", "instruction_limit", "waiting", "triple_fault" or "debug".
    #[getter]
    fn kind(&self) -> &'static str {
        match self.0 {
            vmcore::VcpuExit::Halted => "halted",
            vmcore::VcpuExit::Kicked => "kicked",
            vmcore::VcpuExit::InstructionLimit => "instruction_limit",
            vmcore::VcpuExit::Waiting => "waiting",
            vmcore::VcpuExit::TripleFault => "triple_fault",
            vmcore::VcpuExit::Debug { .. } => "debug",
            _ => "other",
        }
    }

    /// Of a debug stop: the address of the next instruction, DR6, and the exception's vector (1 or 3).
    #[getter]
    fn debug(&self) -> Option<(u64, u64, u8)> {
        match self.0 {
            vmcore::VcpuExit::Debug { rip, dr6, exception } => Some((rip, dr6, exception)),
            _ => None,
        }
    }

    fn __str__(&self) -> String {
        format!("{:?}", self.0)
    }

    fn __repr__(&self) -> String {
        format!("<VcpuExit {:?}>", self.0)
    }
}
