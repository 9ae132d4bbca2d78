//! KVM_EXIT_INTERNAL_ERROR as an error that can be acted on.

use iced_x86::{Decoder, DecoderOptions, Formatter, NasmFormatter};
use kvm_bindings as k;

use super::NAME;
use super::vcpu::KvmVcpu;
use crate::error::{EmulationFailure, Error};

/// Longest x86 instruction in bytes (SDM vol. 2A, 2.3.11).
const LONGEST_INSTRUCTION: usize = 15;

impl KvmVcpu {
    /// The error of a KVM_EXIT_INTERNAL_ERROR.
    pub(super) fn internal_error(&self) -> Error {
        let exit: k::kvm_run__bindgen_ty_1__bindgen_ty_13 = self.page.exit();
        let kind = match exit.suberror {
            k::KVM_INTERNAL_ERROR_EMULATION => "KVM could not emulate an instruction".to_owned(),
            k::KVM_INTERNAL_ERROR_SIMUL_EX => "KVM met an exception while it delivered another".to_owned(),
            k::KVM_INTERNAL_ERROR_DELIVERY_EV => "KVM could not deliver an event to the guest".to_owned(),
            k::KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => {
                format!("the CPU left the guest for a reason that KVM does not know ({:#x})", exit.data[0])
            }
            other => format!("KVM's internal error {other}"),
        };
        let regs = self.fd.get_regs().unwrap_or_default();
        let sregs = self.fd.get_sregs().unwrap_or_default();
        let told = instruction_bytes(&exit);
        let bytes = if told.is_empty() { self.fetch(sregs.cs.base.wrapping_add(regs.rip)) } else { told };
        let bitness = match (sregs.cs.l, sregs.cs.db) {
            (1, _) if sregs.efer & EFER_LMA != 0 => 64,
            (_, 0) => 16,
            _ => 32,
        };
        Error::Emulation(Box::new(EmulationFailure {
            backend: NAME,
            kind,
            rip: regs.rip,
            instruction: disassemble(bitness, regs.rip, &bytes),
            bytes,
            hint: hint(crate::host::cpu_has_virtualization()).into(),
        }))
    }

    /// The bytes of the guest's memory at linear address `at`, as far as they are mapped.
    fn fetch(&self, at: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < LONGEST_INSTRUCTION {
            let next = at.wrapping_add(bytes.len() as u64);
            let Ok(translation) = self.fd.translate_gva(next) else { break };
            if translation.valid == 0 {
                break;
            }
            let mut byte = [0];
            if self.vm.peek(translation.physical_address, &mut byte) == 0 {
                break;
            }
            bytes.push(byte[0]);
        }
        bytes
    }
}

/// EFER.LMA: long mode is active (SDM vol. 3A, 2.2.1).
const EFER_LMA: u64 = 1 << 10;

/// The instruction's bytes where KVM tells them (since 5.15): behind the flags, in `data[0]`, come
/// their number and up to 15 of them.
fn instruction_bytes(exit: &k::kvm_run__bindgen_ty_1__bindgen_ty_13) -> Vec<u8> {
    let flag = u64::from(k::KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES);
    if exit.suberror != k::KVM_INTERNAL_ERROR_EMULATION || exit.ndata < 3 || exit.data[0] & flag == 0 {
        return Vec::new();
    }
    let [low, high] = [exit.data[1], exit.data[2]].map(u64::to_le_bytes);
    let count = usize::from(low[0]).min(LONGEST_INSTRUCTION);
    low[1..].iter().chain(&high).copied().take(count).collect()
}

fn disassemble(bitness: u32, rip: u64, bytes: &[u8]) -> String {
    let mut text = String::new();
    let mut decoder = Decoder::with_ip(bitness, bytes, rip, DecoderOptions::NONE);
    if decoder.can_decode() {
        NasmFormatter::new().format(&decoder.decode(), &mut text);
    }
    text
}

/// What the failure means on a host whose CPU has, or does not have, VMX or SVM.
fn hint(hardware: bool) -> &'static str {
    if hardware {
        "the guest used an instruction on memory that is not RAM, or in a mode, that KVM's emulator does not \
         cover; if the guest is not at fault, report it to KVM with these bytes"
    } else {
        "this host's /dev/kvm has no VMX or SVM below it: it is a software KVM, which emulates the guest's kernel \
         mode and does not know every instruction; run this guest on a host with hardware virtualization (bare \
         metal, or a virtual machine with nesting enabled)"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_kvm_tells_are_taken_and_bounded() {
        let mut exit = k::kvm_run__bindgen_ty_1__bindgen_ty_13 {
            suberror: k::KVM_INTERNAL_ERROR_EMULATION,
            ndata: 3,
            ..Default::default()
        };
        exit.data[0] = 1;
        exit.data[1] = u64::from_le_bytes([3, 0x48, 0x0f, 0xc7, 0, 0, 0, 0]);
        assert_eq!(instruction_bytes(&exit), [0x48, 0x0f, 0xc7]);
        exit.data[1] |= 0xff;
        assert_eq!(instruction_bytes(&exit).len(), 15);
        exit.data[0] = 0;
        assert!(instruction_bytes(&exit).is_empty());
    }

    #[test]
    fn the_mode_decides_how_bytes_are_decoded() {
        let bytes = [0x48, 0x0f, 0xc7, 0x0f];
        assert_eq!(disassemble(64, 0, &bytes), "cmpxchg16b [rdi]");
        assert_eq!(disassemble(32, 0, &bytes), "dec eax");
        assert_eq!(disassemble(64, 0, &[]), "");
    }
}
