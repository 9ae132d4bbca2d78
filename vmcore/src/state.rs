//! The state of vCPUs and machines as plain, backend-neutral data.
//!
//! Layouts follow the architecture's manuals, not a backend's interface: what one backend saves
//! another restores. Every type is `serde`-serializable; the file format around it is not this
//! module's.

use serde::{Deserialize, Serialize};

use crate::cpuid::Cpuid;

/// General-purpose registers, instruction pointer and flags (SDM vol. 1, 3.4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the fields are the registers of the same names")]
pub struct Regs {
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

/// A segment register with its hidden part (SDM vol. 3A, 3.4.3 and 3.4.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// The visible selector.
    pub selector: u16,
    /// Linear base address.
    pub base: u64,
    /// Last valid offset in bytes, with the granularity already applied.
    pub limit: u32,
    /// Type field, 4 bits.
    pub kind: u8,
    /// P: present.
    pub present: bool,
    /// S: code or data (`true`), system (`false`).
    pub code_or_data: bool,
    /// DPL: privilege level, 0 to 3.
    pub dpl: u8,
    /// D/B: 32-bit default operand size.
    pub big: bool,
    /// L: 64-bit code.
    pub long: bool,
    /// G: limit in 4 KiB units.
    pub granular: bool,
    /// AVL: for software.
    pub available: bool,
    /// The register holds a null selector: any use faults.
    pub unusable: bool,
}

impl Segment {
    /// A real-mode segment: base is 16 times the selector, limit 64 KiB. `code` makes it executable.
    pub fn real_mode(selector: u16, code: bool) -> Self {
        Self {
            selector,
            base: u64::from(selector) << 4,
            limit: 0xffff,
            kind: if code { 0xb } else { 0x3 },
            present: true,
            code_or_data: true,
            ..Self::default()
        }
    }

    /// A flat 4 GiB segment of privilege level 0: execute/read code or read/write data, accessed.
    pub fn flat(selector: u16, code: bool) -> Self {
        Self {
            selector,
            limit: u32::MAX,
            kind: if code { 0xb } else { 0x3 },
            present: true,
            code_or_data: true,
            big: true,
            granular: true,
            ..Self::default()
        }
    }

    /// A 64-bit code segment of privilege level 0.
    pub fn long_code(selector: u16) -> Self {
        Self { big: false, long: true, ..Self::flat(selector, true) }
    }
}

/// GDTR or IDTR (SDM vol. 3A, 2.4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// Last valid offset in bytes.
    pub limit: u16,
}

/// Segments (SDM vol. 3A, 3.4), descriptor tables (2.4), control registers (2.5) and EFER (2.2.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the fields are the registers of the same names")]
pub struct Sregs {
    pub cs: Segment,
    pub ds: Segment,
    pub es: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ss: Segment,
    pub tr: Segment,
    pub ldt: Segment,
    pub gdt: DescriptorTable,
    pub idt: DescriptorTable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
    /// IA32_APIC_BASE: guest-physical address and flags (SDM vol. 3A, 11.4.4).
    pub apic_base: u64,
}

/// DR0 to DR3, DR6, DR7 (SDM vol. 3B, 18.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DebugRegs {
    /// DR0 to DR3: linear addresses.
    pub addresses: [u64; 4],
    /// DR6: status.
    pub dr6: u64,
    /// DR7: control.
    pub dr7: u64,
}

/// One model-specific register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msr {
    /// Its number (ECX of RDMSR).
    pub index: u32,
    /// Its value.
    pub value: u64,
}

/// Whether an MSR says what the processor is, or belongs to what no model offers (SMM, Hyper-V):
/// another backend, or another host, may keep its own value when a state is restored.
pub(crate) fn describes_processor(index: u32) -> bool {
    matches!(
        index,
        // IA32_FEATURE_CONTROL, microcode revision, platform information, ARCH_CAPABILITIES, MCG_CAP,
        // PERF_CAPABILITIES, what VMX can do.
        0x3a | 0x8b | 0xce | 0x10a | 0x179 | 0x345 | 0x480..=0x492
        // AMD's HWCR, DE_CFG, known errata, and the ratio of a nested guest's TSC.
        | 0xc001_0015 | 0xc001_1029 | 0xc001_0140 | 0xc001_0141 | 0xc000_0104
        // SMBASE.
        | 0x9e
        | 0x4000_0000..=0x4000_0fff
    )
}

/// An exception on its way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExceptionEvent {
    /// Raised, not yet being delivered: side effects (CR2, DR6) are still in `payload`.
    pub pending: bool,
    /// Being delivered: it must reach the guest before anything else.
    pub injected: bool,
    /// Vector, 0 to 31.
    pub vector: u8,
    /// Error code, for the vectors that have one.
    pub error_code: Option<u32>,
    /// CR2 or DR6 still to be written.
    pub payload: Option<u64>,
}

/// An external interrupt that the CPU has accepted and not yet delivered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterruptEvent {
    /// Vector.
    pub vector: u8,
    /// Raised by INT n.
    pub software: bool,
}

/// Events between instructions (SDM vol. 3A, chapter 6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Events {
    /// Exception on its way; all false and zero where there is none.
    pub exception: ExceptionEvent,
    /// Interrupt accepted and not delivered.
    pub interrupt: Option<InterruptEvent>,
    /// Interrupts are held off for one instruction, by STI.
    pub sti_shadow: bool,
    /// Interrupts are held off for one instruction, by MOV SS or POP SS.
    pub mov_ss_shadow: bool,
    /// An NMI is being delivered.
    pub nmi_injected: bool,
    /// An NMI waits.
    pub nmi_pending: bool,
    /// NMIs are blocked until IRET.
    pub nmi_masked: bool,
    /// Vector of the last SIPI: start address / 4096.
    pub sipi_vector: u32,
    /// In system management mode.
    pub smm: bool,
    /// An SMI waits.
    pub smi_pending: bool,
    /// INIT waits until SMM ends.
    pub init_latched: bool,
}

/// What a vCPU is doing (SDM vol. 3A, 9.4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum RunState {
    /// Executing, or ready to.
    #[default]
    Running,
    /// An application processor after reset: waits for INIT.
    WaitForInit,
    /// INIT received: waits for SIPI.
    WaitForSipi,
    /// HLT: waits for an interrupt.
    Halted,
}

/// The registers of a local APIC (SDM vol. 3A, 11.4).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LapicState {
    /// 64 registers in the order of their offsets: register `n` is at `n * 16` from the APIC base.
    pub registers: Vec<u32>,
}

/// All of one vCPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuState {
    /// The vCPU's number, which is its APIC id.
    pub id: u32,
    /// General-purpose registers.
    pub regs: Regs,
    /// Segments and control registers.
    pub sregs: Sregs,
    /// Debug registers.
    pub debug: DebugRegs,
    /// XCR0: which of `xsave` the guest uses.
    pub xcr0: u64,
    /// x87, SSE, AVX... in the standard (not compacted) XSAVE format (SDM vol. 1, 13.4), in bytes.
    pub xsave: Vec<u8>,
    /// Model-specific registers, TSC and TSC deadline included.
    pub msrs: Vec<Msr>,
    /// Exceptions and interrupts between instructions.
    pub events: Events,
    /// Running, halted or waiting.
    pub run_state: RunState,
    /// The local APIC, where the VM has interrupt controllers.
    pub lapic: Option<LapicState>,
    /// What CPUID tells the guest.
    pub cpuid: Cpuid,
    /// Frequency of the guest's TSC in kHz, where the backend knows it.
    pub tsc_khz: Option<u32>,
}

/// One 8259A (Intel 8259A data sheet).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PicState {
    /// Level of the inputs at the last edge detection.
    pub last_irr: u8,
    /// Interrupt request register.
    pub irr: u8,
    /// Interrupt mask register.
    pub imr: u8,
    /// In-service register.
    pub isr: u8,
    /// Number of the input with the highest priority.
    pub priority_add: u8,
    /// Vector of input 0 (ICW2).
    pub irq_base: u8,
    /// A read gives ISR (`true`) or IRR (`false`).
    pub read_isr: bool,
    /// Poll mode (OCW3.P).
    pub poll: bool,
    /// Special mask mode.
    pub special_mask: bool,
    /// Number of the ICW that comes next; 0 when initialised.
    pub init_state: u8,
    /// Automatic end of interrupt (ICW4.AEOI).
    pub auto_eoi: bool,
    /// Rotate priorities on automatic end of interrupt.
    pub rotate_on_auto_eoi: bool,
    /// Special fully nested mode (ICW4.SFNM).
    pub special_fully_nested: bool,
    /// ICW4 is expected.
    pub init4: bool,
    /// Edge/level control register: set bits are level-triggered.
    pub elcr: u8,
    /// Which ELCR bits can be set.
    pub elcr_mask: u8,
}

/// The I/O APIC (Intel 82093AA data sheet).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoapicState {
    /// Guest-physical base address.
    pub base: u64,
    /// The selected register (IOREGSEL).
    pub ioregsel: u32,
    /// IOAPIC id.
    pub id: u32,
    /// Pins that ask for service, one bit a pin.
    pub irr: u32,
    /// One redirection entry of 64 bits a pin, 24 of them.
    pub redirection: Vec<u64>,
}

/// One counter of an 8254 (Intel 8254 data sheet).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PitChannelState {
    /// Reload value; 65536 for a written 0.
    pub count: u32,
    /// Count held for reading.
    pub latched_count: u16,
    /// How many bytes of the latched count are still to be read, in the controller's encoding.
    pub count_latched: u8,
    /// Status byte held for reading.
    pub status: u8,
    /// Whether `status` is held.
    pub status_latched: bool,
    /// Which byte is read next.
    pub read_state: u8,
    /// Which byte is written next.
    pub write_state: u8,
    /// Low byte that waits for its high byte.
    pub write_latch: u8,
    /// Access mode: bits RW1 and RW0 of the control word.
    pub rw_mode: u8,
    /// Counter mode, 0 to 5.
    pub mode: u8,
    /// Counts in BCD.
    pub bcd: bool,
    /// Level of the gate input.
    pub gate: bool,
    /// When the count was loaded, in ns of the machine's clock ([`MachineState::clock_ns`]).
    pub count_load_time_ns: i64,
}

/// The 8254 and its speaker gate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PitState {
    /// Counters 0 (IRQ 0), 1 (refresh) and 2 (speaker).
    pub channels: [PitChannelState; 3],
    /// The speaker data bit (port 0x61, bit 1).
    pub speaker_data_on: bool,
    /// Interrupts of counter 0 are the HPET's (legacy replacement).
    pub hpet_legacy: bool,
}

/// The interrupt controllers and timer of a PC, without the LAPICs, which are the vCPUs'.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IrqchipState {
    /// Master and slave 8259A.
    pub pics: [PicState; 2],
    /// The I/O APIC.
    pub ioapic: IoapicState,
    /// The 8254.
    pub pit: PitState,
}

/// All of a VM but its vCPUs, memory and devices.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineState {
    /// Interrupt controllers, where the VM was made with them.
    pub irqchip: Option<IrqchipState>,
    /// The machine's clock (kvmclock) in ns since it was made.
    pub clock_ns: u64,
}
