//! Breakpoints on execution, data and ports: the guest's, in DR0 to DR3, and the embedder's (SDM
//! vol. 3B, 18.2).
//!
//! While none is armed they cost nothing. A page with a watched address has translations that are never
//! a fast hit: the slow way of an access sees what it touches. Ports are compared at each access. With a
//! breakpoint on execution the run loop looks whether it is in the next block, and steps where it is.
//! What was hit by an instruction waits in [`Breakpoints::hits`] until the instruction is done, which is
//! made the last of its block.

use super::cpu::{Cpu, cr4};
use super::link::attention;
use crate::backend::HardwareBreakpoints;

/// DR6.BS: a single step.
pub(in crate::soft) const DR6_BS: u64 = 1 << 14;

/// Above this in [`Breakpoints::hits`] are the embedder's.
pub(in crate::soft) const EMBEDDER: u32 = 32;

/// What an armed breakpoint watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Execution,
    Write,
    Port,
    Access,
}

#[derive(Clone, Copy, Debug)]
struct Breakpoint {
    kind: Kind,
    /// Linear address or port, a multiple of `len`.
    at: u64,
    /// 1, 2, 4 or 8.
    len: u64,
    /// Its bit in [`Breakpoints::hits`].
    hit: u64,
}

/// The breakpoints of a vCPU that are armed.
#[derive(Clone, Debug, Default)]
pub(in crate::soft) struct Breakpoints {
    armed: Vec<Breakpoint>,
    embedder: Option<HardwareBreakpoints>,
    /// Some are on execution.
    pub(in crate::soft) execution: bool,
    data: bool,
    ports: bool,
    /// Debug conditions that were met and not told of yet: the guest's as in DR6, and the embedder's B0 to
    /// B3 above [`EMBEDDER`].
    pub(in crate::soft) hits: u64,
}

impl Breakpoints {
    /// Those of one set of registers; `ports` where the kind of breakpoints on ports exists.
    fn arm(&mut self, set: &HardwareBreakpoints, ports: bool, shift: u32) {
        for n in 0..4 {
            if set.dr7 >> (2 * n) & 3 == 0 {
                continue;
            }
            let kind = match set.dr7 >> (16 + 4 * n) & 3 {
                0 => Kind::Execution,
                1 => Kind::Write,
                2 if ports => Kind::Port,
                2 => continue,
                _ => Kind::Access,
            };
            let len = if kind == Kind::Execution {
                1
            } else {
                [1, 2, 8, 4][(set.dr7 >> (18 + 4 * n) & 3) as usize]
            };
            let at = set.addresses[n as usize] & !(len - 1);
            self.armed.push(Breakpoint { kind, at, len, hit: 1 << (n + shift) });
        }
    }

    /// Bits of those of a kind in `kinds` that `len` bytes at `at` touch.
    fn touched(&self, kinds: &[Kind], at: u64, len: u64) -> u64 {
        let touches = |b: &&Breakpoint| {
            kinds.contains(&b.kind) && (at.wrapping_sub(b.at) < b.len || b.at.wrapping_sub(at) < len)
        };
        self.armed.iter().filter(touches).fold(0, |hits, b| hits | b.hit)
    }

    /// Bits of those on the execution of an instruction that begins in `len` bytes at `at`.
    pub(in crate::soft) fn in_code(&self, at: u64, len: u64) -> u64 {
        if self.execution { self.touched(&[Kind::Execution], at, len) } else { 0 }
    }
}

impl Cpu {
    /// Takes over the embedder's breakpoints.
    pub(in crate::soft) fn set_breakpoints(&mut self, embedder: Option<HardwareBreakpoints>) {
        self.breakpoints.embedder = embedder;
        self.arm_breakpoints();
    }

    /// To be called when DR0 to DR3, DR7 or CR4.DE has changed.
    pub(in crate::soft) fn arm_breakpoints(&mut self) {
        let guest = HardwareBreakpoints { addresses: self.debug.addresses, dr7: self.debug.dr7 };
        let all = &mut self.breakpoints;
        all.armed.clear();
        all.arm(&guest, self.cr4 & cr4::DE != 0, 0);
        if let Some(embedder) = all.embedder {
            all.arm(&embedder, true, EMBEDDER);
        }
        let has = |kind| all.armed.iter().any(|b| b.kind == kind);
        (all.execution, all.ports) = (has(Kind::Execution), has(Kind::Port));
        all.data = has(Kind::Write) || has(Kind::Access);
        let data = all.armed.iter().filter(|b| matches!(b.kind, Kind::Write | Kind::Access));
        let pages = data.map(|b| b.at & !0xfff).collect();
        self.mmu.watch(pages);
        // The run loop looks again how to go on.
        self.link.demand_own(attention::EVENT);
    }

    /// The instruction under execution reads or writes `size` bytes at linear address `at`.
    #[inline]
    pub(in crate::soft) fn note_access(&mut self, at: u64, size: u64, write: bool) {
        if self.breakpoints.data {
            let kinds = if write { &[Kind::Write, Kind::Access][..] } else { &[Kind::Access] };
            self.note_hits(self.breakpoints.touched(kinds, at, size));
        }
    }

    /// The instruction under execution accesses `size` ports from `port` on.
    #[inline]
    pub(in crate::soft) fn note_port(&mut self, port: u16, size: u64) {
        if self.breakpoints.ports {
            self.note_hits(self.breakpoints.touched(&[Kind::Port], port.into(), size));
        }
    }

    fn note_hits(&mut self, hits: u64) {
        if hits != 0 {
            self.breakpoints.hits |= hits;
            // The trap comes behind this instruction.
            self.blocks.interrupt();
            self.link.demand_own(attention::EVENT);
        }
    }
}
