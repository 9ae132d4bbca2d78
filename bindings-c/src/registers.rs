//! Registers, in C's words.

use vmcore::state::{DescriptorTable, Regs, Segment, Sregs};

/// General-purpose registers, instruction pointer and flags.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct vmcore_regs {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    /// Bit 1 is always set by the hardware; 2 is the value at reset.
    pub rflags: u64,
}

/// A segment register with its hidden part. Fields of 8 bits but `kind` and `dpl` are 0 or 1.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct vmcore_segment {
    /// Linear base address.
    pub base: u64,
    /// Last valid offset in bytes, with the granularity already applied.
    pub limit: u32,
    /// The visible selector.
    pub selector: u16,
    /// Type field, 4 bits.
    pub kind: u8,
    /// P: present.
    pub present: u8,
    /// S: 1 for code or data, 0 for system.
    pub code_or_data: u8,
    /// DPL: privilege level, 0 to 3.
    pub dpl: u8,
    /// D/B: 32-bit default operand size.
    pub big: u8,
    /// L: 64-bit code.
    pub is_long: u8,
    /// G: limit in 4 KiB units.
    pub granular: u8,
    /// AVL: for software.
    pub available: u8,
    /// The register holds a null selector: any use faults.
    pub unusable: u8,
    /// 0.
    pub reserved: u8,
}

/// GDTR or IDTR.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct vmcore_table {
    /// Linear base address.
    pub base: u64,
    /// Last valid offset in bytes.
    pub limit: u64,
}

/// Segments, descriptor tables, control registers and EFER.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct vmcore_sregs {
    pub cs: vmcore_segment,
    pub ds: vmcore_segment,
    pub es: vmcore_segment,
    pub fs: vmcore_segment,
    pub gs: vmcore_segment,
    pub ss: vmcore_segment,
    pub tr: vmcore_segment,
    pub ldt: vmcore_segment,
    pub gdt: vmcore_table,
    pub idt: vmcore_table,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
    /// IA32_APIC_BASE.
    pub apic_base: u64,
}

/// From one to the other and back, where every field is called the same.
macro_rules! same_fields {
    ($ours:ty, $theirs:ty, $($field:ident),+) => {
        impl From<$theirs> for $ours {
            fn from(from: $theirs) -> Self {
                Self { $($field: from.$field.into()),+ }
            }
        }
        impl From<$ours> for $theirs {
            fn from(from: $ours) -> Self {
                Self { $($field: from.$field.into()),+ }
            }
        }
    };
}

same_fields!(
    vmcore_regs,
    Regs,
    rax,
    rbx,
    rcx,
    rdx,
    rsi,
    rdi,
    rsp,
    rbp,
    r8,
    r9,
    r10,
    r11,
    r12,
    r13,
    r14,
    r15,
    rip,
    rflags
);
same_fields!(
    vmcore_sregs,
    Sregs,
    cs,
    ds,
    es,
    fs,
    gs,
    ss,
    tr,
    ldt,
    gdt,
    idt,
    cr0,
    cr2,
    cr3,
    cr4,
    cr8,
    efer,
    apic_base
);

impl From<DescriptorTable> for vmcore_table {
    fn from(table: DescriptorTable) -> Self {
        Self { base: table.base, limit: table.limit.into() }
    }
}

impl From<vmcore_table> for DescriptorTable {
    fn from(table: vmcore_table) -> Self {
        // The register has 16 bits.
        Self { base: table.base, limit: u16::try_from(table.limit).unwrap_or(u16::MAX) }
    }
}

impl From<Segment> for vmcore_segment {
    fn from(from: Segment) -> Self {
        Self {
            base: from.base,
            limit: from.limit,
            selector: from.selector,
            kind: from.kind,
            present: from.present.into(),
            code_or_data: from.code_or_data.into(),
            dpl: from.dpl,
            big: from.big.into(),
            is_long: from.long.into(),
            granular: from.granular.into(),
            available: from.available.into(),
            unusable: from.unusable.into(),
            reserved: 0,
        }
    }
}

impl From<vmcore_segment> for Segment {
    fn from(from: vmcore_segment) -> Self {
        Self {
            base: from.base,
            limit: from.limit,
            selector: from.selector,
            kind: from.kind,
            present: from.present != 0,
            code_or_data: from.code_or_data != 0,
            dpl: from.dpl,
            big: from.big != 0,
            long: from.is_long != 0,
            granular: from.granular != 0,
            available: from.available != 0,
            unusable: from.unusable != 0,
        }
    }
}

/// A flat 4 GiB segment of privilege level 0: code (1) or data (0).
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_segment_flat(selector: u16, code: bool) -> vmcore_segment {
    Segment::flat(selector, code).into()
}

/// A 64-bit code segment of privilege level 0.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_segment_long_code(selector: u16) -> vmcore_segment {
    Segment::long_code(selector).into()
}
