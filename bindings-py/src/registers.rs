//! Registers: attributes of a vCPU, and the structures that some of them are.

use pyo3::prelude::*;
use vmcore::state;

use crate::error::Raise;
use crate::vcpu::Vcpu;

/// A segment register with its hidden part. A value: assign it back to change the register.
#[pyclass(eq, get_all, set_all, from_py_object, module = "vmcore")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub selector: u16,
    pub base: u64,
    pub limit: u32,
    pub kind: u8,
    pub present: bool,
    pub code_or_data: bool,
    pub dpl: u8,
    pub big: bool,
    pub long: bool,
    pub granular: bool,
    pub available: bool,
    pub unusable: bool,
}

macro_rules! same_fields {
    ($($from:ty => $to:ty { $($field:ident),* })*) => {$(
        impl From<$from> for $to {
            fn from(value: $from) -> Self {
                Self { $($field: value.$field),* }
            }
        }
    )*};
}

same_fields! {
    state::Segment => Segment { selector, base, limit, kind, present, code_or_data, dpl, big, long, granular, available, unusable }
    Segment => state::Segment { selector, base, limit, kind, present, code_or_data, dpl, big, long, granular, available, unusable }
    state::DescriptorTable => DescriptorTable { base, limit }
    DescriptorTable => state::DescriptorTable { base, limit }
}

#[pymethods]
impl Segment {
    /// A real-mode segment: the base is 16 times the selector, the limit 64 KiB.
    #[staticmethod]
    #[pyo3(signature = (selector, *, code))]
    fn real_mode(selector: u16, code: bool) -> Self {
        state::Segment::real_mode(selector, code).into()
    }

    /// A flat 4 GiB segment of privilege level 0.
    #[staticmethod]
    #[pyo3(signature = (selector, *, code))]
    fn flat(selector: u16, code: bool) -> Self {
        state::Segment::flat(selector, code).into()
    }

    /// A 64-bit code segment of privilege level 0.
    #[staticmethod]
    #[pyo3(signature = (selector))]
    fn long_code(selector: u16) -> Self {
        state::Segment::long_code(selector).into()
    }

    fn __repr__(&self) -> String {
        format!("<Segment {:#x} base={:#x} limit={:#x}>", self.selector, self.base, self.limit)
    }
}

/// GDTR or IDTR.
#[pyclass(eq, get_all, set_all, from_py_object, module = "vmcore")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DescriptorTable {
    pub base: u64,
    pub limit: u16,
}

#[pymethods]
impl DescriptorTable {
    #[new]
    fn new(base: u64, limit: u16) -> Self {
        Self { base, limit }
    }

    fn __repr__(&self) -> String {
        format!("<DescriptorTable base={:#x} limit={:#x}>", self.base, self.limit)
    }
}

/// Registers as attributes: each is read from the vCPU and written to it.
macro_rules! attributes {
    ($read:ident, $write:ident: $($name:ident $set:ident $type:ty),* $(,)?) => {
        #[pymethods]
        impl Vcpu {
            $(
                #[getter]
                fn $name(&self) -> PyResult<$type> {
                    Ok(self.lock()?.$read().raise()?.$name.into())
                }

                #[setter]
                fn $set(&self, value: $type) -> PyResult<()> {
                    let mut vcpu = self.lock()?;
                    let mut all = vcpu.$read().raise()?;
                    all.$name = value.into();
                    vcpu.$write(&all).raise()
                }
            )*
        }
    };
}

attributes! { regs, set_regs:
    rax set_rax u64, rbx set_rbx u64, rcx set_rcx u64, rdx set_rdx u64, rsi set_rsi u64, rdi set_rdi u64,
    rsp set_rsp u64, rbp set_rbp u64, r8 set_r8 u64, r9 set_r9 u64, r10 set_r10 u64, r11 set_r11 u64,
    r12 set_r12 u64, r13 set_r13 u64, r14 set_r14 u64, r15 set_r15 u64, rip set_rip u64,
    rflags set_rflags u64,
}

attributes! { sregs, set_sregs:
    cs set_cs Segment, ds set_ds Segment, es set_es Segment, fs set_fs Segment, gs set_gs Segment,
    ss set_ss Segment, tr set_tr Segment, ldt set_ldt Segment, gdt set_gdt DescriptorTable,
    idt set_idt DescriptorTable, cr0 set_cr0 u64, cr2 set_cr2 u64, cr3 set_cr3 u64, cr4 set_cr4 u64,
    cr8 set_cr8 u64, efer set_efer u64, apic_base set_apic_base u64,
}
