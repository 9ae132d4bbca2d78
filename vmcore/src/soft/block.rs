//! Blocks of decoded instructions and their cache.
//!
//! A block begins anywhere and ends at a branch, at an instruction that changes what the next ones
//! mean, or with its page. It is valid for the guest-physical address it was decoded from and for the
//! mode, whatever the linear address. It belongs to one vCPU.
//!
//! When the guest writes to bytes that a block was made from, the block is *retired*: it leaves the
//! cache, and each of its instructions gets a handler that says "again", so that a block that is being
//! executed ends before its next instruction. Its memory goes when no pointer is left to it: in
//! [`BlockCache::sweep`], between two blocks.
#![expect(clippy::cast_possible_truncation, reason = "the host is a 64-bit one, and low bits are meant")]
#![expect(unsafe_code, reason = "the blocks under execution are referred to by pointers")]

use std::cell::Cell;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::ptr::NonNull;
use std::sync::atomic::Ordering;

use super::cpu::op::{Flow, NO_SEG, Op, Stop};
use super::cpu::{Cpu, Leave, RBP, RSP};
use super::decode;
use super::link::attention;
use super::memory::granules;
use super::peephole::Peephole;
use crate::memory::PAGE_SIZE;

/// Most instructions of a block, without the one that ends it.
const LONGEST: usize = 64;

/// When the blocks of a vCPU take so many bytes, all of them are dropped.
const MOST_BYTES: usize = 16 << 20;

/// What a block takes besides itself and its instructions: its entry in the map of blocks, which is
/// half full on average, its keys in the lists of its pages, and the allocator's overhead.
const BYTES_AROUND: usize = 2 * size_of::<((u64, u8), Box<Block>)>() + 2 * size_of::<(u64, u8)>() + 48;

/// Retired blocks kept before the jump cache is cleared to free them.
const MOST_RETIRED: usize = 512;

/// Entries of the jump cache: a power of two. They take half a MiB.
const JUMPS: usize = 1 << 14;

/// A decoded block. It has at least one instruction, and its last sets RIP.
#[derive(Debug)]
pub(in crate::soft) struct Block {
    pub(in crate::soft) ops: Box<[Op]>,
    /// Where its first byte was.
    gpa: u64,
    mode: u8,
    /// The page of its last instruction's tail, where that is another one.
    second: Option<u64>,
    retired: Cell<bool>,
}

impl Block {
    /// What it takes of the cache, about.
    fn bytes(&self) -> usize {
        size_of_val(&*self.ops) + size_of::<Self>() + BYTES_AROUND
    }
}

/// What a linear address led to last.
#[derive(Clone, Copy)]
struct Jump {
    rip: u64,
    context: u64,
    found: Found,
}

/// A block to be executed.
#[derive(Clone, Copy, Debug)]
pub(in crate::soft) struct Found {
    /// Its instructions.
    ops: *const Op,
    block: NonNull<Block>,
}

impl Found {
    /// The same for a block that the caller keeps.
    pub(in crate::soft) fn new(block: &Block) -> Self {
        Self { ops: block.ops.as_ptr(), block: NonNull::from(block) }
    }

    /// How many instructions it has, at most.
    pub(in crate::soft) fn longest(self) -> u64 {
        // SAFETY: whoever has it may run it, so that the block lives.
        unsafe { self.block.as_ref() }.ops.len() as u64
    }
}

/// An entry for an address that no code has: it is not canonical.
const NOWHERE: Jump =
    Jump { rip: 1 << 63, context: 0, found: Found { ops: std::ptr::null(), block: NonNull::dangling() } };

/// A jump cache that knows nothing, made where it is to stay: it is large for a stack.
fn no_jumps() -> Box<[Jump; JUMPS]> {
    vec![NOWHERE; JUMPS].try_into().unwrap_or_else(|_| Box::new([NOWHERE; JUMPS]))
}

/// Addresses spread well enough by one multiplication.
#[derive(Default)]
pub(in crate::soft) struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(byte.into());
        }
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(5) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
    fn write_u8(&mut self, value: u8) {
        self.write_u64(value.into());
    }
    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 32
    }
}

type Map<K, V> = HashMap<K, V, BuildHasherDefault<AddressHasher>>;

/// The blocks of one vCPU.
pub(in crate::soft) struct BlockCache {
    blocks: Map<(u64, u8), Box<Block>>,
    /// The keys of the blocks with bytes in a page.
    pages: Map<u64, Vec<(u64, u8)>>,
    #[expect(clippy::vec_box, reason = "pointers to the blocks stay valid when they are retired")]
    retired: Vec<Box<Block>>,
    jumps: Box<[Jump; JUMPS]>,
    /// What `blocks` take, about: see [`Block::bytes`].
    bytes: usize,
    /// The block under execution, while there is one.
    current: Option<NonNull<Block>>,
}

// SAFETY: the pointers are to blocks that the cache itself owns and moves along with it.
unsafe impl Send for BlockCache {}

impl BlockCache {
    pub(in crate::soft) fn new() -> Self {
        Self {
            blocks: Map::default(),
            pages: Map::default(),
            retired: Vec::new(),
            jumps: no_jumps(),
            bytes: 0,
            current: None,
        }
    }

    /// Drops every block. Not while one is executed.
    pub(in crate::soft) fn clear(&mut self) {
        *self = Self::new();
    }

    /// Retires the blocks with bytes in the page at guest-physical `page`. Returns whether there were
    /// any.
    pub(in crate::soft) fn retire_page(&mut self, page: u64) -> bool {
        let Some(keys) = self.pages.remove(&(page & !(PAGE_SIZE - 1))) else { return false };
        for key in keys {
            if let Some(block) = self.blocks.remove(&key) {
                block.ops.iter().for_each(|op| op.run.set(again));
                self.retire(block);
            }
        }
        true
    }

    /// Keeps a block that has left the cache until nobody has a pointer to it.
    fn retire(&mut self, block: Box<Block>) {
        block.retired.set(true);
        self.bytes = self.bytes.saturating_sub(block.bytes());
        self.retired.push(block);
    }

    /// Makes the block under execution end after the present instruction.
    pub(in crate::soft) fn interrupt(&mut self) {
        let Some(current) = self.current else { return };
        // SAFETY: `run_block` has set it and has not returned.
        let block = unsafe { current.as_ref() };
        block.ops.iter().for_each(|op| op.run.set(again));
        block.retired.set(true);
        let key = (block.gpa, block.mode);
        if self.blocks.get(&key).is_some_and(|kept| std::ptr::eq(&raw const **kept, current.as_ptr()))
            && let Some(block) = self.blocks.remove(&key)
        {
            self.retire(block);
        }
    }

    /// Frees what has been retired, when it is much. Only to be called between blocks.
    fn sweep(&mut self) {
        if self.bytes > MOST_BYTES {
            self.clear();
        } else if self.retired.len() > MOST_RETIRED {
            self.jumps.fill(NOWHERE);
            self.retired.clear();
        }
    }

    /// What the blocks take, and may take, in bytes.
    #[cfg(test)]
    pub(in crate::soft) fn size(&self) -> (usize, usize) {
        (self.bytes, MOST_BYTES)
    }

    /// Contexts have places of their own: one process does not displace what another one executes of the
    /// kernel.
    #[inline(always)]
    fn jump_index(rip: u64, context: u64) -> usize {
        (rip ^ rip >> 14 ^ context) as usize & (JUMPS - 1)
    }
}

/// What a retired block does.
fn again(cpu: &mut Cpu, _: &Op) -> Flow {
    // RIP is the start of the block.
    let jump = BlockCache::jump_index(cpu.block_address(), cpu.mmu.context());
    cpu.blocks.jumps[jump] = NOWHERE;
    Err(Stop::Again)
}

/// The end of a block whose last instruction does not set RIP.
pub(in crate::soft) fn fall_through(cpu: &mut Cpu, op: &Op) -> Flow {
    let next = cpu.next_rip(op);
    cpu.set_rip(next);
    cpu.follow(op)
}

impl Cpu {
    /// What tells blocks apart in the jump cache: the linear address of the next instruction.
    #[inline(always)]
    fn block_address(&self) -> u64 {
        self.rip().wrapping_add(self.base(super::cpu::CS))
    }

    /// The block at RIP, decoded where it is new. The pointer is valid until [`Cpu::find_block`] is
    /// called again.
    ///
    /// # Errors
    /// The fault that fetching makes; RIP is the instruction's.
    #[inline(always)]
    pub(in crate::soft) fn find_block(&mut self) -> Result<Found, Stop> {
        let rip = self.block_address();
        let context = self.mmu.context();
        let jump = &self.blocks.jumps[BlockCache::jump_index(rip, context)];
        if jump.rip == rip && jump.context == context {
            // It may be retired, and is forgotten then when it is run. It lives until `clear` or
            // `sweep`, which leave no pointers here.
            return Ok(jump.found);
        }
        self.find_block_slow()
    }

    #[cold]
    fn find_block_slow(&mut self) -> Result<Found, Stop> {
        self.blocks.sweep();
        let at = self.fetch_linear(0)?;
        let Some(gpa) = self.fetch_address(at)? else { return Err(self.leave(Leave::Unknown)) };
        let key = (gpa, self.mode.key());
        let known = match self.blocks.blocks.get(&key) {
            Some(block) => match block.second {
                None => Some(NonNull::from(&**block)),
                Some(second) => {
                    let found = NonNull::from(&**block);
                    let tail = (at | (PAGE_SIZE - 1)).wrapping_add(1);
                    (self.fetch_address(tail)? == Some(second)).then_some(found)
                }
            },
            None => None,
        };
        let block = match known {
            Some(block) => block,
            None => self.make_block(at, gpa)?,
        };
        // SAFETY: it is in the cache.
        let found = Found::new(unsafe { block.as_ref() });
        let rip = self.block_address();
        let context = self.mmu.context();
        self.blocks.jumps[BlockCache::jump_index(rip, context)] = Jump { rip, context, found };
        Ok(found)
    }

    /// Bytes of code that `found` was made from, which [`Cpu::find_block`] has just returned.
    pub(in crate::soft) fn code_len(&self, found: Found) -> u64 {
        // SAFETY: the block is in the cache, which nothing has been done to since.
        let block = unsafe { found.block.as_ref() };
        block.ops.last().map_or(0, |op| op.end.into())
    }

    /// Executes `block`, and where they are known up to `more` blocks that come after it, until an
    /// instruction does not simply come to its end. RIP is then that of the next instruction to execute,
    /// or of the one that faulted.
    #[inline(always)]
    pub(in crate::soft) fn run_block(&mut self, found: Found, more: u32) -> Stop {
        // The caller has it from `find_block` and has not called it since, or owns the block.
        self.blocks.current = Some(found.block);
        self.more = more;
        let stop = self.run_ops(found.ops);
        self.blocks.current = None;
        stop
    }

    #[inline(always)]
    fn run_ops(&mut self, ops: *const Op) -> Stop {
        self.at = ops.expose_provenance();
        self.first = self.at;
        loop {
            let op = std::ptr::with_exposed_provenance::<Op>(self.at);
            // SAFETY: the last op of a block never returns `Ok`, nor goes on: handlers that are said to
            // end a block set RIP and stop, and other blocks are given `fall_through`. So `at` stays
            // inside.
            let op = unsafe { &*op };
            match (op.run.get())(self, op) {
                Ok(()) => self.at += size_of::<Op>(),
                Err(stop) => {
                    let op = std::ptr::with_exposed_provenance::<Op>(self.at);
                    // SAFETY: as above.
                    let op = unsafe { &*op };
                    let before = self.before(op);
                    if stop != Stop::Next {
                        return self.stopped(stop, op, before);
                    }
                    self.instructions += before + Self::counts(op);
                    return stop;
                }
            }
        }
    }

    /// Tells a deterministic VM's clock how far the instruction under execution is: to be called before
    /// anything that tells the guest the time.
    #[inline]
    pub(in crate::soft) fn tell_time(&self) {
        if let Some(world) = self.machine.clock.world() {
            // Between blocks it has been told.
            if self.blocks.current.is_none() {
                return;
            }
            let before = (self.at.wrapping_sub(self.first) / size_of::<Op>()) as u64;
            world.set_instructions(self.others.wrapping_add(self.instructions + before));
        }
    }

    /// How many instructions of the block come before `op`.
    #[inline(always)]
    fn before(&self, op: &Op) -> u64 {
        (((&raw const *op).addr() - self.first) / size_of::<Op>()) as u64
    }

    /// How many instructions `op` is: the end of a block that does not end itself is none.
    #[inline(always)]
    fn counts(op: &Op) -> u64 {
        u64::from(op.len != 0)
    }

    /// Goes on to the block at RIP, which `op` has just set: the last act of handlers that end a block
    /// and have changed nothing that others than branches do not change. Where the block is not at
    /// hand, or something else has to be done before it, they return.
    ///
    /// Where the compiler makes no jump of this, calls are nested as deep as [`Cpu::run_block`]'s `more`
    /// blocks have instructions.
    #[inline(always)]
    pub(in crate::soft) fn follow(&mut self, op: &Op) -> Flow {
        self.at = (&raw const *op).addr();
        if self.more == 0 || self.link.wanted() {
            return Err(Stop::Next);
        }
        let rip = self.block_address();
        let context = self.mmu.context();
        let jump = &self.blocks.jumps[BlockCache::jump_index(rip, context)];
        if jump.rip != rip || jump.context != context {
            return Err(Stop::Next);
        }
        let found = jump.found;
        self.more -= 1;
        self.instructions += self.before(op) + Self::counts(op);
        self.blocks.current = Some(found.block);
        self.at = found.ops.expose_provenance();
        self.first = self.at;
        // SAFETY: as in `find_block`: a block in the jump cache is kept.
        let first = unsafe { &*found.ops };
        (first.run.get())(self, first)
    }

    /// The block has stopped at `op`, after `before` instructions, otherwise than to go on.
    #[cold]
    fn stopped(&mut self, stop: Stop, op: &Op, before: u64) -> Stop {
        // An instruction that the embedder stops at, or that is none, has not been executed.
        let done = stop == Stop::Leave && matches!(self.leave, Leave::Halt | Leave::TripleFault);
        self.instructions += before + u64::from(done);
        if before != 0 {
            self.end_shadow();
        }
        if stop == Stop::Fault && matches!(usize::from(op.base), RSP | RBP) && op.seg == NO_SEG {
            self.on_stack(stop);
        }
        if matches!(stop, Stop::Fault | Stop::Again) {
            let at = self.rip().wrapping_add(u64::from(op.end)).wrapping_sub(op.len.into());
            self.set_rip(self.wrap_rip(at));
        }
        stop
    }

    /// Goes on to the instruction after `op`, which is under execution and does not end its block: the
    /// last act of handlers that are run often, which the compiler makes a jump from one to the next.
    /// Where it does not there are as many calls as a block has instructions.
    #[inline(always)]
    pub(in crate::soft) fn go_on(&mut self, op: &Op) -> Flow {
        let next = self.behind(op);
        self.at = (&raw const *next).addr();
        (next.run.get())(self, next)
    }

    /// The instruction after `op`, which is under execution and does not end its block.
    #[inline(always)]
    pub(in crate::soft) fn behind<'a>(&self, op: &'a Op) -> &'a Op {
        let next = std::ptr::with_exposed_provenance::<Op>((&raw const *op).addr() + size_of::<Op>());
        // SAFETY: `run_ops` has exposed the block's ops, and `op` is not the last of them.
        unsafe { &*next }
    }

    /// Linear address of the byte at `offset` from RIP.
    fn fetch_linear(&mut self, offset: u64) -> Result<u64, Stop> {
        let rip = self.rip().wrapping_add(offset);
        if self.mode.long {
            return Ok(rip);
        }
        let segment = *self.segment(super::cpu::CS);
        if rip > u64::from(segment.limit) {
            return Err(self.gp(0));
        }
        Ok(segment.base.wrapping_add(rip) & 0xffff_ffff)
    }

    /// Decodes one instruction at RIP plus `offset` from at most 15 bytes.
    fn decode_at(&mut self, offset: u64) -> Result<decode::Decoded, Stop> {
        let mut bytes = [0; 15];
        let at = self.fetch_linear(offset)?;
        let here = usize::try_from(PAGE_SIZE - at % PAGE_SIZE).unwrap_or(15).min(15);
        let Some(gpa) = self.fetch_address(at)? else { return Err(self.leave(Leave::Unknown)) };
        self.watch_code(gpa, here as u64);
        self.peek_physical(gpa, &mut bytes[..here]);
        let rip = self.rip();
        let decoded = decode::decode(&bytes[..here], rip, offset, self.mode, self.isa, &self.machine.thunks);
        match decoded {
            Ok(decoded) => return self.within_limit(offset, decoded),
            Err(decode::Truncated) if here < 15 => {}
            Err(decode::Truncated) => return Err(self.gp(0)),
        }
        // The instruction goes on in the next page.
        let tail = self.fetch_linear(offset.wrapping_add(here as u64))?;
        let Some(second) = self.fetch_address(tail)? else { return Err(self.leave(Leave::Unknown)) };
        self.watch_code(second, (15 - here) as u64);
        self.peek_physical(second, &mut bytes[here..]);
        match decode::decode(&bytes, rip, offset, self.mode, self.isa, &self.machine.thunks) {
            Ok(decoded) => {
                let decoded = self.within_limit(offset, decoded)?;
                Ok(decode::Decoded { second: Some(second & !(PAGE_SIZE - 1)), ..decoded })
            }
            // Longer than 15 bytes (SDM vol. 3A, 6.15, #GP).
            Err(decode::Truncated) => Err(self.gp(0)),
        }
    }

    /// The last byte must be within the code segment too.
    fn within_limit(&mut self, offset: u64, decoded: decode::Decoded) -> Result<decode::Decoded, Stop> {
        self.fetch_linear(offset.wrapping_add(u64::from(decoded.op.len).max(1) - 1))?;
        Ok(decoded)
    }

    /// Decodes the one instruction at RIP into a block that is not kept: for single steps.
    ///
    /// # Errors
    /// As [`Cpu::find_block`].
    pub(in crate::soft) fn single_block(&mut self) -> Result<Box<Block>, Stop> {
        Ok(Self::block_of(self.decode_at(0)?))
    }

    /// A block of one instruction.
    pub(in crate::soft) fn block_of(decode::Decoded { op, selected, .. }: decode::Decoded) -> Box<Block> {
        let mut ops = vec![op];
        if !selected.ends {
            ops.push(Self::end_op(&ops));
        }
        Box::new(Block { ops: ops.into(), gpa: 0, mode: 0, second: None, retired: Cell::new(false) })
    }

    /// The pseudo-instruction that ends a block after `ops`.
    fn end_op(ops: &[Op]) -> Op {
        let end = ops.last().map_or(0, |op| op.end);
        Op { run: Cell::new(fall_through), end, ..Op::nothing() }
    }

    fn make_block(&mut self, at: u64, gpa: u64) -> Result<NonNull<Block>, Stop> {
        let page_left = PAGE_SIZE - at % PAGE_SIZE;
        let mut ops: Vec<Op> = Vec::with_capacity(16);
        let mut peephole = Peephole::default();
        let mut second = None;
        let mut offset = 0u64;
        let ended = loop {
            let decoded = match self.decode_at(offset) {
                Ok(decoded) => decoded,
                // What faults is executed, and faults, when it is reached.
                Err(stop) if ops.is_empty() => return Err(stop),
                Err(_) => break false,
            };
            // An instruction that leaves the page is a block of its own.
            if decoded.second.is_some() && !ops.is_empty() {
                break false;
            }
            offset += u64::from(decoded.op.len);
            second = decoded.second;
            let ends = decoded.selected.ends;
            peephole.push(&mut ops, decoded);
            if ends {
                break true;
            }
            if ops.len() >= LONGEST || offset >= page_left {
                break false;
            }
        };
        if !ended {
            ops.push(Self::end_op(&ops));
        }
        let key = (gpa, self.mode.key());
        let block = Block { ops: ops.into(), gpa, mode: key.1, second, retired: Cell::new(false) };
        self.blocks.bytes += block.bytes();
        let block = Box::new(block);
        let pointer = NonNull::from(&*block);
        for page in [Some(gpa & !(PAGE_SIZE - 1)), second].into_iter().flatten() {
            let keys = self.blocks.pages.entry(page).or_default();
            if !keys.contains(&key) {
                keys.push(key);
            }
        }
        if let Some(old) = self.blocks.blocks.insert(key, block) {
            // The same code with another second page.
            self.blocks.retire(old);
        }
        Ok(pointer)
    }

    /// Makes writes to `len` bytes at `gpa` known from now on, on every vCPU, before they are decoded.
    fn watch_code(&mut self, gpa: u64, len: u64) {
        let Some(slot) = self.mmu.phys.find(gpa) else { return };
        let Some(word) = slot.code(gpa) else { return };
        let wanted = granules(gpa, len);
        if word.load(Ordering::SeqCst) & wanted == wanted {
            return;
        }
        if word.fetch_or(wanted, Ordering::SeqCst) == 0 {
            // The page becomes code: nobody may write to it unseen any more.
            self.mmu.flush_writes_to(gpa);
            self.others_drop_writes();
        }
    }

    /// Makes the other vCPUs drop their translations for writing, and waits until they have.
    fn others_drop_writes(&mut self) {
        let machine = self.machine.clone();
        let vcpus = machine.links();
        let others = || vcpus.iter().filter(|link| link.id != self.link.id);
        if others().next().is_none() {
            return;
        }
        others().for_each(|link| link.demand(attention::WRITES));
        // While this one waits it does not write: others that wait for it need not.
        self.link.set_in_guest(false);
        others().for_each(|link| link.wait_served(attention::WRITES));
        self.link.set_in_guest(true);
        self.serve_memory();
    }

    /// The guest has written `len` bytes (within a page) at `gpa` to a page that holds code.
    pub(in crate::soft) fn wrote_code(&mut self, gpa: u64, len: u64) {
        let Some(word) = self.mmu.phys.find(gpa).and_then(|slot| slot.code(gpa)) else { return };
        if word.load(Ordering::SeqCst) & granules(gpa, len) == 0 {
            return;
        }
        word.store(0, Ordering::SeqCst);
        let page = gpa & !(PAGE_SIZE - 1);
        self.blocks.retire_page(page);
        let machine = self.machine.clone();
        machine.links().iter().filter(|link| link.id != self.link.id).for_each(|link| link.post_stale(page));
    }

    /// Does what others have asked for that must be done before guest memory is used.
    pub(in crate::soft) fn serve_memory(&mut self) {
        let asked = self.link.asked(attention::BEFORE_MEMORY);
        if asked == 0 {
            return;
        }
        if asked & attention::MEMORY != 0 {
            let phys = self.machine.memory.snapshot();
            self.mmu.set_phys(phys);
            // Blocks of memory that is gone must not be found at the addresses of what came.
            for page in self.blocks.pages.keys().copied().collect::<Vec<_>>() {
                self.blocks.retire_page(page);
            }
        }
        if asked & attention::WRITES != 0 {
            self.mmu.flush_writes();
        }
        self.link.take(asked);
        if asked & attention::CODE != 0 {
            for page in self.link.take_stale() {
                self.blocks.retire_page(page);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instruction_takes_little_memory() {
        assert!(size_of::<Op>() <= 48, "{}", size_of::<Op>());
    }
}
