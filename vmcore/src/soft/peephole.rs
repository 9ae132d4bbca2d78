//! What handlers an instruction can have because of those that follow it in its block.
//!
//! Most flags are never looked at: the next arithmetic instruction sets them anew. Where everything up
//! to that one goes on in any case and reads no flags, nobody can see them, neither the guest nor
//! an exception handler nor the embedder, and a handler that does not set them is used. (Single steps
//! are blocks of one instruction, and none of this applies to them.)
//!
//! A comparison and the conditional branch behind it are executed by the comparison's handler. The
//! branch stays where it is: for when the comparison has gone the slow way.

use super::cpu::op::{FlagUse, Handler, Op, Selected, WithBranch};
use super::decode::Decoded;

/// Looks at the instructions of a block while they are decoded.
#[derive(Default)]
pub(in crate::soft) struct Peephole {
    /// The instructions whose flags nobody has seen yet, with what to run if nobody ever does.
    unseen: Vec<(usize, Handler)>,
    /// What the last instruction is with a branch behind it.
    with_branch: Option<WithBranch>,
}

impl Peephole {
    /// Adds an instruction to those of its block.
    pub(in crate::soft) fn push(&mut self, ops: &mut Vec<Op>, Decoded { op, selected, .. }: Decoded) {
        let Selected { flags, quiet, with_branch, condition, .. } = selected;
        if let (Some(handler), Some(condition), Some(last)) = (self.with_branch, condition, ops.last()) {
            last.run.set(handler(condition));
        }
        match flags {
            FlagUse::Sees => self.unseen.clear(),
            FlagUse::Ignores => {}
            FlagUse::Replaces => {
                for (n, quiet) in self.unseen.drain(..) {
                    ops[n].run.set(quiet);
                }
            }
        }
        self.unseen.extend(quiet.map(|quiet| (ops.len(), quiet)));
        self.with_branch = with_branch;
        ops.push(op);
    }
}
