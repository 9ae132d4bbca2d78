//! VMCALL and VMMCALL: those of KVM's hypercalls that let vCPUs wake, interrupt and yield to each
//! other without the detour by the local APIC (Linux, Documentation/virt/kvm/x86/hypercalls.rst).
//! Number in RAX, arguments in RBX, RCX, RDX and RSI, answer in RAX. Each is there where CPUID says so.

use iced_x86::{Instruction, Mnemonic};

use super::next;
use crate::soft::chip::{Destination, Message};
use crate::soft::cpu::op::{Flow, Op, Selected};
use crate::soft::cpu::{Cpu, RAX, RBX, RCX, RDX, RSI};
use crate::soft::link::attention;

/// KVM_HC_KICK_CPU: wakes the vCPU whose APIC id is in RCX from HLT, or from its next HLT.
const KICK_CPU: u64 = 5;
/// KVM_HC_SEND_IPI: the interrupt of the ICR in RSI, to those vCPUs whose bits are set in RBX (the low
/// half) and RCX (the high half); RDX is the APIC id of bit 0.
const SEND_IPI: u64 = 10;
/// KVM_HC_SCHED_YIELD: somebody else shall run.
const SCHED_YIELD: u64 = 11;

/// Logical destinations and shorthands, which the bits replace.
const ICR_ELSEWHERE: u64 = 1 << 11 | 3 << 18;

/// Bits of CPUID 0x4000_0001, EAX, that offer them.
const PV_UNHALT: u32 = 1 << 7;
const PV_SEND_IPI: u32 = 1 << 11;
const PV_SCHED_YIELD: u32 = 1 << 13;

/// -KVM_EPERM: not from user mode.
const NOT_PERMITTED: u64 = (-1i64).cast_unsigned();
/// -KVM_EINVAL.
const INVALID: u64 = (-22i64).cast_unsigned();
/// -KVM_ENOSYS: what KVM answers to a hypercall that it does not know.
const UNKNOWN: u64 = (-1000i64).cast_unsigned();

fn hypercall(cpu: &mut Cpu, op: &Op) -> Flow {
    let mask = if cpu.mode.long { u64::MAX } else { 0xffff_ffff };
    let [number, rbx, rcx, rdx, rsi] = [RAX, RBX, RCX, RDX, RSI].map(|register| cpu.r64(register) & mask);
    let answer = if cpu.mode.cpl != 0 {
        NOT_PERMITTED
    } else {
        match number {
            KICK_CPU if cpu.offers(PV_UNHALT) => cpu.kick_cpu(rcx),
            SEND_IPI if cpu.offers(PV_SEND_IPI) => {
                let half = if cpu.mode.long { 64 } else { 32 };
                cpu.send_ipis(u128::from(rbx) | u128::from(rcx) << half, rdx, rsi)
            }
            SCHED_YIELD if cpu.offers(PV_SCHED_YIELD) => {
                std::thread::yield_now();
                0
            }
            _ => UNKNOWN,
        }
    };
    cpu.set_r64(RAX, answer & mask);
    // An interrupt to itself counts from the next instruction on.
    next(cpu, op)
}

impl Cpu {
    /// Whether CPUID 0x4000_0001 has a bit of `feature` in EAX.
    pub(super) fn offers(&self, feature: u32) -> bool {
        self.cpuid.get(0x4000_0001, 0).is_some_and(|leaf| leaf.eax & feature != 0)
    }

    fn kick_cpu(&self, id: u64) -> u64 {
        let chipset = self.machine.chipset.as_ref();
        // As on KVM, nobody is told that there is no such vCPU.
        if let Some(link) = u32::try_from(id).ok().and_then(|id| chipset?.apics().find(id)) {
            link.demand(attention::UNHALT);
        }
        0
    }

    /// Gives the number of vCPUs that were sent to.
    fn send_ipis(&self, mut to: u128, first: u64, icr: u64) -> u64 {
        let Some(chipset) = &self.machine.chipset else { return UNKNOWN };
        if icr & ICR_ELSEWHERE != 0 {
            return INVALID;
        }
        // Vector and delivery mode are what counts of the ICR.
        let ([vector, ..], mode) = (icr.to_le_bytes(), (icr >> 8 & 7) as u32);
        let mut sent = 0;
        while to != 0 {
            let id = first.checked_add(to.trailing_zeros().into()).and_then(|id| u32::try_from(id).ok());
            let Some(id) = id else { return INVALID };
            to &= to - 1;
            if chipset.apics().find(id).is_some() {
                let to = Destination::wide(id, false);
                chipset.apics().deliver(Message { to, except: None, mode, vector, level: false });
                sent += 1;
            }
        }
        sent
    }
}

pub(super) fn select(i: &Instruction) -> Option<Selected> {
    match i.mnemonic() {
        Mnemonic::Vmcall | Mnemonic::Vmmcall => Some(Selected::last(hypercall)),
        _ => None,
    }
}
