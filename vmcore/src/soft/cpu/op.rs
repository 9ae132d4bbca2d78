//! Decoded instructions.

use std::cell::Cell;

use super::Cpu;

/// Why a handler did not simply come to its end. The details are in the [`Cpu`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::soft) enum Stop {
    /// The instruction is done and has set RIP: the block ends.
    Next,
    /// An exception is in `Cpu::fault`. Nothing of the instruction has taken effect, save what the
    /// architecture lets take effect (the completed part of a string instruction).
    Fault,
    /// The instruction shall be executed again, from where it is now: a string instruction that
    /// lets others have their turn, or code that changed under the block.
    Again,
    /// The instruction is done and has set RIP, and the vCPU must leave the guest or wait: what for
    /// is in `Cpu::leave`.
    Leave,
}

/// What a handler returns.
pub(in crate::soft) type Flow = Result<(), Stop>;

/// Executes one instruction. It must leave the guest's state untouched where it returns
/// [`Stop::Fault`]. RIP is the start of the block while it runs: [`Cpu::next_rip`] is the address of
/// the next instruction. A handler that sets RIP must be marked as one that ends a block
/// ([`Selected::ends`]) and return [`Stop::Next`] (or Leave); one that sets it only sometimes need not
/// be. A handler that need not end a block may, as the last thing it does, go on to the next
/// instruction by [`Cpu::go_on`], instead of returning `Ok`.
pub(in crate::soft) type Handler = fn(&mut Cpu, &Op) -> Flow;

/// Number of a register that is always zero, as base or index of an address.
pub(in crate::soft) const ZERO: u8 = 16;
/// Number under which RIP (of the block's start, while a block runs) stands among the registers.
pub(in crate::soft) const RIP: u8 = 17;
/// Marks AH, CH, DH, BH in [`Op::dst`] and [`Op::src`]; the low bits are 0 to 3.
pub(in crate::soft) const HIGH: u8 = 0x80;
/// Number under which "no segment" stands among the segments: base 0, no limit.
pub(in crate::soft) const NO_SEG: u8 = 6;

/// [`Op::prefix`]: LOCK.
pub(in crate::soft) const LOCK: u8 = 1;
/// [`Op::prefix`]: REP or REPE.
pub(in crate::soft) const REPE: u8 = 2;
/// [`Op::prefix`]: REPNE.
pub(in crate::soft) const REPNE: u8 = 4;
/// [`Op::prefix`]: the code is 64-bit: addresses need no limit check.
pub(in crate::soft) const LONG: u8 = 8;

/// One decoded instruction: what to run and on what.
#[derive(Clone, Debug)]
pub(in crate::soft) struct Op {
    /// Invalidated blocks get another handler while they run: see [`super::super::block`].
    pub(in crate::soft) run: Cell<Handler>,
    /// Immediate operand, sign-extended; of a far pointer the offset in the low 32 bits and the
    /// selector above them; of a near branch the displacement from the next instruction. Of an
    /// instruction that runs in generated code, that code's address.
    pub(in crate::soft) imm: u64,
    /// Displacement of the memory operand, sign-extended; for RIP-relative operands from the block's
    /// start. Handlers of instructions without a memory operand may use it otherwise.
    pub(in crate::soft) disp: u64,
    /// Offset of the next instruction from the block's start.
    pub(in crate::soft) end: u16,
    /// Length of the instruction in bytes.
    pub(in crate::soft) len: u8,
    /// Number of the register that is operand 0 (or the only register operand); see [`HIGH`]. Segment
    /// registers by their number (ES 0, CS, SS, DS, FS, GS), control and debug registers likewise,
    /// XMM, MMX and x87 registers by theirs.
    pub(in crate::soft) dst: u8,
    /// Number of the next register operand after `dst`.
    pub(in crate::soft) src: u8,
    /// Base register of the memory operand, or [`ZERO`] or [`RIP`].
    pub(in crate::soft) base: u8,
    /// Index register of the memory operand, or [`ZERO`].
    pub(in crate::soft) index: u8,
    /// Left shift of the index register: 0 to 3.
    pub(in crate::soft) scale: u8,
    /// Segment of the memory operand (ES 0, CS 1, SS 2, DS 3, FS 4, GS 5), or [`NO_SEG`] where the
    /// segment's base counts as zero: in 64-bit mode ES, CS, SS and DS.
    pub(in crate::soft) seg: u8,
    /// 64 less the width of the address in bits: 0, 32 or 48.
    pub(in crate::soft) ashift: u8,
    /// [`LOCK`], [`REPE`], [`REPNE`], [`LONG`].
    pub(in crate::soft) prefix: u8,
    /// Operand size in bytes: 1, 2, 4, 8, where the handler wants to know.
    pub(in crate::soft) size: u8,
    /// For the handler's own use: a second immediate (ENTER, EXTRQ), a condition code, a thunk.
    pub(in crate::soft) extra: u32,
}

impl Op {
    /// Whether the instruction has a LOCK prefix.
    #[inline(always)]
    pub(in crate::soft) fn locked(&self) -> bool {
        self.prefix & LOCK != 0
    }

    /// Whether the instruction is in 64-bit code.
    #[inline(always)]
    pub(in crate::soft) fn long(&self) -> bool {
        self.prefix & LONG != 0
    }
}

/// What an instruction makes of the arithmetic flags that it finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::soft) enum FlagUse {
    /// They may be seen: it reads them, or may stop before the end of its block.
    Sees,
    /// It reads none, always comes to its end, and leaves all or some of them as they were.
    Ignores,
    /// It reads none, always comes to its end, and sets every one of them.
    Replaces,
}

/// Gives the handler that executes an instruction and, at once, the conditional branch with the
/// condition of this number that follows it in 64-bit code.
pub(in crate::soft) type WithBranch = fn(u8) -> Handler;

/// What a handler was chosen for an instruction.
#[derive(Clone, Copy)]
pub(in crate::soft) struct Selected {
    /// The handler.
    pub(in crate::soft) run: Handler,
    /// It is the last instruction of its block: it sets RIP, or changes what the next instructions
    /// mean (mode, segments, paging), or whether interrupts come.
    pub(in crate::soft) ends: bool,
    /// For [`Op::extra`].
    pub(in crate::soft) extra: u32,
    /// Address of generated code, for [`Op::imm`].
    pub(in crate::soft) target: Option<u64>,
    /// What becomes of the flags before it.
    pub(in crate::soft) flags: FlagUse,
    /// The same without setting flags, for where nobody sees them.
    pub(in crate::soft) quiet: Option<Handler>,
    /// The same with the conditional branch that follows.
    pub(in crate::soft) with_branch: Option<WithBranch>,
    /// It is a conditional branch in 64-bit code, on the condition of this number.
    pub(in crate::soft) condition: Option<u8>,
}

impl Selected {
    /// An instruction like most.
    pub(in crate::soft) fn plain(run: Handler) -> Self {
        Self {
            run,
            ends: false,
            extra: 0,
            target: None,
            flags: FlagUse::Sees,
            quiet: None,
            with_branch: None,
            condition: None,
        }
    }

    /// An instruction that ends its block and sets RIP.
    pub(in crate::soft) fn last(run: Handler) -> Self {
        Self { ends: true, ..Self::plain(run) }
    }

    /// An instruction that does with the flags before it what `flags` says.
    pub(in crate::soft) fn flagged(run: Handler, flags: FlagUse) -> Self {
        Self { flags, ..Self::plain(run) }
    }

    /// The same, and where nobody sees the flags that it sets, `quiet` does.
    pub(in crate::soft) fn or_quiet(self, quiet: Handler) -> Self {
        Self { quiet: Some(quiet), ..self }
    }

    /// The same with `extra` for the handler.
    pub(in crate::soft) fn with(self, extra: u32) -> Self {
        Self { extra, ..self }
    }

    /// The same with generated code at address `target`, which the handler finds in [`Op::imm`].
    pub(in crate::soft) fn with_target(self, target: u64) -> Self {
        Self { target: Some(target), ..self }
    }
}
