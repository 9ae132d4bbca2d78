//! Runs of so many instructions against single steps.

use std::sync::Arc;

use proptest::prelude::*;
use vmcore::backend::{BackendConfig, BackendVcpu, DebugConfig, VcpuExit, VcpuIo};
use vmcore::soft::Soft;
use vmcore::{Deterministic, GuestAddress, MemoryRegion, Vcpu, Vm};

const CODE: u64 = 0x1000;
/// RFLAGS.TF.
const TF: u64 = 1 << 8;

/// A vCPU in real mode at `code`, whose handlers of interrupts 0 to 31 skip a byte.
fn guest(code: &[u8]) -> (Vm, Vcpu) {
    let soft = Arc::new(Soft::new());
    let vm = Vm::bare_deterministic(soft, &BackendConfig::default(), Deterministic::seeded(9)).unwrap();
    // All that real mode can reach.
    vm.map(MemoryRegion::anonymous(GuestAddress(0), 2 << 20).unwrap()).unwrap();
    for vector in 0..32 {
        vm.memory().write(GuestAddress(4 * vector), &[0, 0x05, 0, 0]).unwrap();
    }
    // push bp; mov bp, sp; inc word [bp + 2]; pop bp; iret
    vm.memory().write(GuestAddress(0x500), &[0x55, 0x89, 0xe5, 0xff, 0x46, 2, 0x5d, 0xcf]).unwrap();
    vm.memory().write(GuestAddress(CODE), code).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.enter_real_mode(GuestAddress(CODE)).unwrap();
    let mut sregs = vcpu.sregs().unwrap();
    let mut regs = vcpu.regs().unwrap();
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
        (segment.selector, segment.base) = (0x2000, 0x2_0000);
    }
    (regs.rsp, regs.rcx, regs.rsi, regs.rdi) = (0x8000, 0x123, 0x4000, 0x6000);
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.set_regs(&regs).unwrap();
    (vm, vcpu)
}

/// What the guest could see, and how far it is.
fn state(vm: &Vm, vcpu: &Vcpu) -> (u64, vmcore::state::VcpuState, Vec<u8>) {
    let mut memory = vec![0; 2 << 20];
    vm.memory().read(GuestAddress(0), &mut memory).unwrap();
    (vm.instructions().unwrap(), vcpu.save().unwrap(), memory)
}

/// Instructions that are easily come by at random: moves, arithmetic, branches, strings, faults.
fn instruction() -> impl Strategy<Value = Vec<u8>> {
    let fixed = |bytes: &'static [u8]| Just(bytes.to_vec());
    prop_oneof![
        any::<(u8, u8)>().prop_map(|(op, r)| vec![op & 0x38 | 1, r | 0xc0]),
        any::<(u8, u8)>().prop_map(|(op, at)| vec![op & 0x38 | 3, 0x47 | (at & 0x18), at]),
        any::<u8>().prop_map(|n| vec![0x40 | n & 0xf]),
        any::<u8>().prop_map(|n| vec![0x50 | n & 7]),
        (any::<u8>(), 0u8..9).prop_map(|(cc, to)| vec![0x70 | cc & 0xf, to]),
        any::<u16>().prop_map(|n| vec![0xb9, n.to_le_bytes()[0], n.to_le_bytes()[1] & 3]),
        fixed(&[0xf3, 0xa4]),
        fixed(&[0xf3, 0xab]),
        fixed(&[0xf2, 0xae]),
        fixed(&[0xf3, 0xa6]),
        fixed(&[0x0f, 0x31]),
        fixed(&[0x0f, 0xc7, 0xf0]),
        fixed(&[0xfb]),
        fixed(&[0xfa]),
        fixed(&[0x16, 0x17]),
        fixed(&[0xe4, 0x80]),
        fixed(&[0xf3, 0x6e]),
        fixed(&[0xcc]),
        fixed(&[0x0f, 0x0b]),
        fixed(&[0x31, 0xc9, 0xf7, 0xf1]),
        // Writes to the code that follows.
        any::<u8>().prop_map(|at| vec![0x2e, 0xfe, 0x06, at, 0]),
    ]
}

/// Answers I/O by count.
struct Answers(u8);

impl VcpuIo for Answers {
    fn port_read(&mut self, _: u16, data: &mut [u8]) {
        self.0 = self.0.wrapping_add(1);
        data.fill(self.0);
    }
    fn port_write(&mut self, _: u16, _: &[u8]) {}
    fn mmio_read(&mut self, _: GuestAddress, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&mut self, _: GuestAddress, _: &[u8]) {}
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 300,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]
    #[test]
    fn so_many_instructions_are_so_many_single_steps(
        program in prop::collection::vec(instruction(), 1..60),
        cuts in prop::collection::vec(1u64..120, 1..8),
    ) {
        let mut code = program.concat();
        // hlt
        code.resize(code.len() + 16, 0xf4);
        let (vm, mut whole) = guest(&code);
        let (other, mut single) = guest(&code);
        single.set_debug(&DebugConfig { single_step: true, ..DebugConfig::default() }).unwrap();
        for cut in cuts {
            let before = vm.instructions().unwrap();
            let exit = whole.run_instructions(cut).unwrap();
            let count = vm.instructions().unwrap();
            if exit == VcpuExit::InstructionLimit {
                prop_assert_eq!(count, before + cut);
            }
            let mut last = VcpuExit::InstructionLimit;
            while other.instructions().unwrap() < count {
                let left = count - other.instructions().unwrap();
                last = single.run_instructions(left).unwrap();
                if single.regs().unwrap().rflags & TF != 0 {
                    // The embedder's single steps take the place of the guest's own.
                    return Ok(());
                }
            }
            let (a, b) = (state(&vm, &whole), state(&other, &single));
            prop_assert_eq!((a.0, &a.1.regs, &a.1.events), (b.0, &b.1.regs, &b.1.events));
            prop_assert_eq!(&a.1, &b.1);
            prop_assert!(a.2 == b.2, "memory differs");
            if exit != VcpuExit::InstructionLimit {
                prop_assert!(matches!(exit, VcpuExit::Halted | VcpuExit::TripleFault), "{exit:?}");
                prop_assert_eq!(exit, last);
                break;
            }
        }
    }
}

#[test]
fn a_kick_in_a_long_string_instruction_does_not_end_it() {
    // mov ecx, 40_000_000; a32 rep lodsb; hlt
    let code = [0x66, 0xb9, 0x00, 0x5a, 0x62, 0x02, 0x66, 0x31, 0xf6, 0x67, 0xf3, 0xac, 0xf4];
    let vm = Soft::new();
    let vm = vmcore::backend::Backend::create_deterministic_vm(
        &vm,
        &BackendConfig::default(),
        Deterministic::default(),
    )
    .unwrap();
    let region = Arc::new(MemoryRegion::anonymous(GuestAddress(0), 1 << 20).unwrap());
    region.fill(CODE, &code).unwrap();
    vm.map(vmcore::backend::Slot(0), region).unwrap();
    let mut vcpu: Box<dyn BackendVcpu> = vm.create_vcpu(0).unwrap();
    let mut sregs = vcpu.sregs().unwrap();
    sregs.cs = vmcore::state::Segment::real_mode(0x100, true);
    sregs.ds.limit = u32::MAX;
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.set_regs(&vmcore::state::Regs { rip: 0, rflags: 2, ..Default::default() }).unwrap();
    let world = vm.world().unwrap().clone();
    let kicker = vcpu.handle();
    let done = std::sync::atomic::AtomicBool::new(false);
    let kicked = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::SeqCst) {
                kicker.kick();
                std::thread::sleep(std::time::Duration::from_micros(200));
            }
        });
        let mut kicked = 0;
        loop {
            match vcpu.run_instructions(100, &mut Answers(0)).unwrap() {
                VcpuExit::Kicked => {
                    if vcpu.regs().unwrap().rcx < 40_000_000 && world.instructions() == 2 {
                        kicked += 1;
                    }
                }
                exit => {
                    done.store(true, std::sync::atomic::Ordering::SeqCst);
                    assert_eq!(exit, VcpuExit::Halted);
                    break kicked;
                }
            }
        }
    });
    assert!(kicked > 0, "no kick came inside");
    assert_eq!((world.instructions(), vcpu.regs().unwrap().rcx), (4, 0));
}
