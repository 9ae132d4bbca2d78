//! Offsets and bits of a local APIC's registers (SDM vol. 3A, table 11-1).

pub(super) const ID: u32 = 0x20;
pub(super) const VERSION: u32 = 0x30;
pub(super) const TPR: u32 = 0x80;
pub(super) const APR: u32 = 0x90;
pub(super) const PPR: u32 = 0xa0;
pub(super) const EOI: u32 = 0xb0;
pub(super) const RRD: u32 = 0xc0;
pub(super) const LDR: u32 = 0xd0;
pub(super) const DFR: u32 = 0xe0;
pub(super) const SVR: u32 = 0xf0;
/// Eight registers each.
pub(super) const ISR: u32 = 0x100;
pub(super) const ISR_END: u32 = 0x170;
pub(super) const TMR: u32 = 0x180;
pub(super) const TMR_END: u32 = 0x1f0;
pub(super) const IRR: u32 = 0x200;
pub(super) const IRR_END: u32 = 0x270;
pub(super) const ESR: u32 = 0x280;
pub(super) const ICR: u32 = 0x300;
pub(super) const ICR_HIGH: u32 = 0x310;
pub(super) const LVT_TIMER: u32 = 0x320;
pub(super) const LVT_ERROR: u32 = 0x370;
pub(super) const INITIAL_COUNT: u32 = 0x380;
pub(super) const CURRENT_COUNT: u32 = 0x390;
pub(super) const DIVIDE: u32 = 0x3e0;
/// Only in x2APIC mode.
pub(super) const SELF_IPI: u32 = 0x3f0;

/// The version register: an integrated APIC of version 0x14 with 6 LVT registers.
pub(super) const VERSION_VALUE: u32 = 0x5_0014;

/// LVT registers, in the order of their offsets.
pub(super) mod lvt {
    pub(in super::super) const TIMER: usize = 0;
    pub(in super::super) const LINT0: usize = 3;
    pub(in super::super) const ERROR: usize = 5;
    pub(in super::super) const COUNT: usize = 6;
    /// No interrupt comes of this one.
    pub(in super::super) const MASKED: u32 = 1 << 16;
    /// Which bits software can write; delivery status and remote IRR (12, 14) it cannot.
    pub(in super::super) const WRITABLE: [u32; COUNT] = [
        // Timer: vector, mask, mode.
        0x7_00ff, // Thermal sensor and performance counters: vector, delivery mode, mask.
        0x1_07ff, 0x1_07ff, // LINT0 and LINT1: also polarity and trigger mode.
        0x1_a7ff, 0x1_a7ff, // Error: vector, mask.
        0x1_00ff,
    ];
    /// Bits that are not reserved, but only for reading.
    pub(in super::super) const READ_ONLY: [u32; COUNT] = [0x1000, 0x1000, 0x1000, 0x5000, 0x5000, 0x1000];
}

/// Spurious-interrupt vector register.
pub(super) mod svr {
    pub(in super::super) const ENABLED: u32 = 1 << 8;
    /// Vector, enable, and focus processor checking, which nothing follows from.
    pub(in super::super) const WRITABLE: u32 = 0x3ff;
}

/// Interrupt command register.
pub(super) mod icr {
    pub(in super::super) const LOGICAL: u32 = 1 << 11;
    /// Delivery status: never busy.
    pub(in super::super) const BUSY: u32 = 1 << 12;
    pub(in super::super) const ASSERT: u32 = 1 << 14;
    pub(in super::super) const LEVEL: u32 = 1 << 15;
    pub(in super::super) const RESERVED: u32 = 0xfff3_2000;
}

/// Error status register (SDM vol. 3A, 11.5.3).
pub(super) mod esr {
    pub(in super::super) const SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
    pub(in super::super) const RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
    pub(in super::super) const ILLEGAL_REGISTER: u32 = 1 << 7;
}

/// IA32_APIC_BASE (SDM vol. 3A, 11.4.4 and 11.12.1).
pub(super) mod base {
    pub(in super::super) const BOOTSTRAP: u64 = 1 << 8;
    pub(in super::super) const X2APIC: u64 = 1 << 10;
    pub(in super::super) const ENABLED: u64 = 1 << 11;
    /// Where the registers are after reset.
    pub(in super::super) const DEFAULT: u64 = 0xfee0_0000;
}
