//! Single steps, breakpoints, and what an instruction that cannot be executed looks like.

use iced_x86::code_asm::*;
use vmcore::Error;
use vmcore::backend::{Backend, Capability, DebugConfig, HardwareBreakpoints, VcpuExit};

use crate::guest::{CODE, Guest, Mode, NO_MEMORY, Recorder, assemble};

crate::contract!(
    single_steps_stop_after_each_instruction,
    software_breakpoints_stop_before_the_guest_sees_them,
    hardware_breakpoints_stop_at_their_address,
    watchpoints_stop_behind_the_access,
    an_instruction_that_cannot_be_executed_is_shown,
    backends_tell_their_own_statistics,
);

fn without_debug(backend: &dyn Backend) -> bool {
    let without = !backend.supports(Capability::Debug);
    if without {
        println!("skipped: {} cannot debug guests", backend.name());
    }
    without
}

/// QEMU's emulation of SVM intercepts neither INT3 nor what the host's debug registers match
/// (target/i386/tcg: both are delivered to the guest), so that the rig's KVM never hears of them.
fn in_rig() -> bool {
    let rig = std::env::var_os("VMCORE_RIG").is_some();
    if rig {
        println!("skipped: the rig's emulated SVM does not intercept #BP and #DB of breakpoints");
    }
    rig
}

fn single_steps_stop_after_each_instruction(backend: &dyn Backend) {
    if without_debug(backend) {
        return;
    }
    for mode in Mode::ALL {
        let code = assemble(mode, |a| {
            a.mov(al, 1).unwrap();
            a.inc(al).unwrap();
            a.nop().unwrap();
            a.nop().unwrap();
            a.hlt().unwrap();
        });
        let mut guest = Guest::new(backend, mode, &code);
        guest.vcpu.set_debug(&DebugConfig { single_step: true, ..Default::default() }).unwrap();
        let begin = guest.vcpu.regs().unwrap().rip;
        for offset in [2, 4, 5, 6] {
            match guest.run(&mut Recorder::default()) {
                VcpuExit::Debug { rip, exception, .. } => {
                    assert_eq!(exception, 1, "{mode:?}");
                    let base = if mode == Mode::Real { CODE } else { 0 };
                    assert_eq!(rip - base, begin + offset, "{mode:?}");
                }
                other => panic!("{mode:?}: {other:?}"),
            }
        }
        assert_eq!(guest.vcpu.regs().unwrap().rax & 0xff, 2);
        guest.vcpu.set_debug(&DebugConfig::default()).unwrap();
        assert_eq!(guest.run(&mut Recorder::default()), VcpuExit::Halted);
        assert_eq!(guest.vcpu.stats().debug, 4);
    }
}

fn software_breakpoints_stop_before_the_guest_sees_them(backend: &dyn Backend) {
    if without_debug(backend) || in_rig() {
        return;
    }
    let code = assemble(Mode::Long, |a| {
        a.nop().unwrap();
        a.int3().unwrap();
        a.hlt().unwrap();
    });
    let mut guest = Guest::new(backend, Mode::Long, &code);
    guest.vcpu.set_debug(&DebugConfig { software_breakpoints: true, ..Default::default() }).unwrap();
    match guest.vcpu.run(&mut Recorder::default()) {
        Ok(VcpuExit::Debug { rip, exception, .. }) => assert_eq!((rip, exception), (CODE + 1, 3)),
        Err(Error::Emulation(failure)) if crate::small_guests_only(backend) => {
            assert_eq!(failure.instruction, "int3");
            println!("skipped: this software KVM does not emulate INT3: {failure}");
        }
        other => panic!("{other:?}"),
    }
}

fn hardware_breakpoints_stop_at_their_address(backend: &dyn Backend) {
    if without_debug(backend) || in_rig() {
        return;
    }
    let code = assemble(Mode::Long, |a| {
        a.nop().unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
        a.hlt().unwrap();
    });
    let mut guest = Guest::new(backend, Mode::Long, &code);
    // DR7: global exact, and breakpoint 0 enabled, on execution.
    let hardware = HardwareBreakpoints { addresses: [CODE + 2, 0, 0, 0], dr7: 0x202 };
    guest.vcpu.set_debug(&DebugConfig { hardware: Some(hardware), ..Default::default() }).unwrap();
    match guest.run(&mut Recorder::default()) {
        VcpuExit::Debug { rip, dr6: status, exception } => {
            assert_eq!((rip, exception, status & 0xf), (CODE + 2, 1, 1));
        }
        VcpuExit::Halted if crate::small_guests_only(backend) => {
            println!("skipped: this software KVM emulates kernel mode past hardware breakpoints");
            return;
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(guest.vcpu.regs().unwrap().rip, CODE + 2);
}

/// Reads do not meet a watchpoint on writes; a wider access meets one that it touches.
fn watchpoints_stop_behind_the_access(backend: &dyn Backend) {
    if without_debug(backend) || in_rig() {
        return;
    }
    let code = assemble(Mode::Long, |a| {
        a.mov(eax, dword_ptr(0x7000)).unwrap();
        a.mov(byte_ptr(0x7003), al).unwrap();
        a.mov(byte_ptr(0x7004), al).unwrap();
        a.mov(qword_ptr(0x7001), rax).unwrap();
        a.mov(ecx, dword_ptr(0x7100)).unwrap();
        a.inc(word_ptr(0x7100)).unwrap();
        a.hlt().unwrap();
    });
    let decoder = iced_x86::Decoder::with_ip(64, &code, CODE, 0);
    let ends: Vec<u64> = decoder.into_iter().map(|i| i.next_ip()).collect();
    let mut guest = Guest::new(backend, Mode::Long, &code);
    // Watchpoint 1 on 4 bytes written, 2 on 2 bytes read or written; global.
    let control = 0x200 | 1 << 3 | 0b1101 << 20 | 1 << 5 | 0b0111 << 24;
    let hardware = HardwareBreakpoints { addresses: [0, 0x7000, 0x7100, 0], dr7: control };
    guest.vcpu.set_debug(&DebugConfig { hardware: Some(hardware), ..Default::default() }).unwrap();
    for (n, bit) in [(1, 2), (3, 2), (4, 4), (5, 4)] {
        match guest.run(&mut Recorder::default()) {
            VcpuExit::Debug { rip, dr6: status, exception } => {
                assert_eq!((rip, exception, status & 0xf), (ends[n], 1, bit), "{ends:x?}");
            }
            VcpuExit::Halted if crate::small_guests_only(backend) && backend.name() == "kvm" => {
                println!("skipped: this software KVM emulates kernel mode past watchpoints");
                return;
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(guest.vcpu.regs().unwrap().rip, ends[n]);
    }
    assert_eq!(guest.run(&mut Recorder::default()), VcpuExit::Halted);
}

/// KVM has to emulate an instruction whose operand has no memory, and does not know all of them.
fn an_instruction_that_cannot_be_executed_is_shown(backend: &dyn Backend) {
    let code = assemble(Mode::Protected, |a| {
        a.mov(edi, u32::try_from(NO_MEMORY).unwrap()).unwrap();
        a.paddb(xmm0, ptr(edi)).unwrap();
        a.hlt().unwrap();
    });
    let mut guest = Guest::new(backend, Mode::Protected, &code);
    let failure = match guest.vcpu.run(&mut Recorder::default()) {
        Err(Error::Emulation(failure)) => failure,
        other => {
            println!("skipped: {} executes PADDB on MMIO: {other:?}", backend.name());
            return;
        }
    };
    assert_eq!(failure.rip, CODE + 5);
    assert_eq!(failure.instruction, "paddb xmm0,[edi]");
    assert_eq!(failure.bytes[..4], code[5..9]);
    let text = failure.to_string();
    assert!(text.contains("66 0f fc 07") && text.contains("0x10005"), "{text}");
    let hint = if crate::small_guests_only(backend) { "software KVM" } else { "emulator" };
    assert!(text.contains(hint), "{text}");
    // The vCPU can still be looked at.
    assert_eq!(guest.vcpu.regs().unwrap().rdi, NO_MEMORY);
    println!("{text}");
}

fn backends_tell_their_own_statistics(backend: &dyn Backend) {
    let code = assemble(Mode::Protected, |a| {
        a.out(0x80, al).unwrap();
        a.hlt().unwrap();
    });
    let mut guest = Guest::new(backend, Mode::Protected, &code);
    guest.run_to_halt();
    let (vm, vcpu) = (guest.vm.backend_stats(), guest.vcpu.backend_stats());
    if vm.is_empty() && vcpu.is_empty() {
        println!("skipped: {} tells no statistics", backend.name());
        return;
    }
    assert!(vm.iter().chain(&vcpu).all(|(name, _)| !name.is_empty()));
    println!("{vm:?}\n{vcpu:?}");
    let exits = vcpu.iter().find(|(name, _)| name == "exits").map(|(_, value)| *value);
    assert!(exits.is_none_or(|exits| exits >= 1), "{vcpu:?}");
}
