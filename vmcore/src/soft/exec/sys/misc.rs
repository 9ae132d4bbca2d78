//! HLT and MWAIT, translations and caches, random numbers.
#![expect(unsafe_code, reason = "the host's random numbers come from a system call")]

use iced_x86::{Code, Instruction, Mnemonic};

use super::next;
use crate::soft::cpu::flags::CF;
use crate::soft::cpu::op::{Flow, Op, Selected};
use crate::soft::cpu::word::Word;
use crate::soft::cpu::{Cpu, Leave, RAX, RCX, Shadow, canonical, cr4};

fn hlt(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.only_kernel()?;
    let rip = cpu.next_rip(op);
    cpu.set_rip(rip);
    // It is the instruction that STI's shadow lasts for.
    cpu.shadow = Shadow::default();
    cpu.events_may_come();
    Err(cpu.leave(Leave::Halt))
}

fn invlpg(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.only_kernel()?;
    let at = cpu.base(op.seg.into()).wrapping_add(cpu.offset(op));
    let at = if cpu.mode.long { at } else { at & 0xffff_ffff };
    cpu.mmu.flush_page(at);
    next(cpu, op)
}

fn invpcid<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.only_kernel()?;
    let kind = cpu.reg::<W>(op.dst).zext();
    let at = cpu.address(op, 16, false)?;
    let process: u64 = cpu.load(at)?;
    let address: u64 = cpu.load(at.wrapping_add(8))?;
    let no_process = process != 0 && cpu.cr4 & cr4::PCIDE == 0;
    let refused = match kind {
        0 => no_process || !canonical(address),
        1 => no_process,
        kind => kind > 3,
    };
    if refused || process >> 12 != 0 {
        return Err(cpu.gp(0));
    }
    match kind {
        0 => cpu.mmu.flush_page(address),
        1 => cpu.mmu.flush_process(process as u16),
        _ => cpu.mmu.flush_all(),
    }
    next(cpu, op)
}

/// INVD, WBINVD, WBNOINVD: there are no caches to be seen.
fn caches(cpu: &mut Cpu, _: &Op) -> Flow {
    cpu.only_kernel()
}

impl Cpu {
    /// #UD where CPUID does not offer MONITOR, or outside of the kernel.
    fn check_monitor(&mut self) -> Flow {
        const MONITOR: u32 = 1 << 3;
        let offered = self.cpuid.get(1, 0).is_some_and(|leaf| leaf.ecx & MONITOR != 0);
        if offered && self.mode.cpl == 0 { Ok(()) } else { Err(self.ud()) }
    }
}

fn monitor(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.check_monitor()?;
    if cpu.r64(RCX) & 0xffff_ffff != 0 {
        return Err(cpu.gp(0));
    }
    let offset = cpu.r64(RAX) & u64::MAX >> (op.ashift & 63);
    let at = cpu.linear(op, op.seg, offset, 1, false)?;
    cpu.load::<u8>(at).map(drop)
}

/// Other vCPUs' stores are not watched: MWAIT may end at any time, and ends soon.
fn mwait(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.check_monitor()?;
    if cpu.r64(RCX) & 0xffff_fffe != 0 {
        return Err(cpu.gp(0));
    }
    std::thread::yield_now();
    next(cpu, op)
}

fn rdpmc(cpu: &mut Cpu, _: &Op) -> Flow {
    Err(cpu.gp(0))
}

/// RDRAND and RDSEED. CF clear says that there is no number now.
fn random<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let number = match cpu.machine.clock.world() {
        Some(world) => Some(world.random()),
        None => host_random(),
    };
    cpu.set_reg(op.dst, W::cut(number.unwrap_or(0)));
    cpu.flags.set_bits(if number.is_some() { CF } else { 0 });
    Ok(())
}

/// A random number of the host's, where it has one now.
fn host_random() -> Option<u64> {
    let mut bytes = [0u8; 8];
    // SAFETY: the buffer is as long as is said.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), libc::GRND_NONBLOCK) };
    (usize::try_from(got) == Ok(bytes.len())).then(|| u64::from_le_bytes(bytes))
}

pub(super) fn select(i: &Instruction) -> Option<Selected> {
    Some(match i.code() {
        Code::Invpcid_r32_m128 => Selected::last(invpcid::<u32>),
        Code::Invpcid_r64_m128 => Selected::last(invpcid::<u64>),
        Code::Rdrand_r16 | Code::Rdseed_r16 => Selected::plain(random::<u16>),
        Code::Rdrand_r32 | Code::Rdseed_r32 => Selected::plain(random::<u32>),
        Code::Rdrand_r64 | Code::Rdseed_r64 => Selected::plain(random::<u64>),
        _ => match i.mnemonic() {
            Mnemonic::Hlt => Selected::last(hlt),
            Mnemonic::Invlpg => Selected::last(invlpg),
            Mnemonic::Invd | Mnemonic::Wbinvd | Mnemonic::Wbnoinvd => Selected::plain(caches),
            Mnemonic::Monitor => Selected::plain(monitor),
            Mnemonic::Mwait => Selected::last(mwait),
            Mnemonic::Rdpmc => Selected::plain(rdpmc),
            _ => return None,
        },
    })
}
