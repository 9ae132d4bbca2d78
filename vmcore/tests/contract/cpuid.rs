//! The guest sees the CPU model and topology that it was given.

use iced_x86::code_asm::*;
use vmcore::backend::Backend;
use vmcore::cpuid::{CpuConfig, CpuModel, Topology};

use crate::guest::{Guest, Mode, assemble};

crate::contract!(the_guest_sees_its_model, a_model_is_frozen_into_the_state);

fn config(model: CpuModel) -> CpuConfig {
    let topology = Topology { sockets: 2, cores: 2, threads: 2 };
    CpuConfig { model, topology, lapic: false, tsc_khz: Some(2_000_000) }
}

/// The leaves that the guest asks for; none that changes with the guest's control registers.
const LEAVES: [(u32, u32); 6] =
    [(0, 0), (0xb, 1), (0x4000_0000, 0), (0x4000_0010, 0), (0x8000_0001, 0), (0x8000_0002, 0)];

fn the_guest_sees_its_model(backend: &dyn Backend) {
    let supported = backend.supported_cpuid().unwrap();
    for model in [CpuModel::V1, CpuModel::Best, CpuModel::Host] {
        let expected = config(model).cpuid(&supported, 0).unwrap();
        // Else no guest looks for its clock.
        assert!(expected.get(1, 0).unwrap().ecx & 1 << 31 != 0, "no hypervisor bit in {model}");
        let code = assemble(Mode::Protected, |a| {
            a.mov(edi, 0x7000).unwrap();
            for (leaf, subleaf) in LEAVES {
                a.mov(eax, leaf).unwrap();
                a.mov(ecx, subleaf).unwrap();
                a.cpuid().unwrap();
                for (register, at) in [(eax, 0), (ebx, 4), (ecx, 8), (edx, 12)] {
                    a.mov(dword_ptr(edi + at), register).unwrap();
                }
                a.add(edi, 16).unwrap();
            }
            a.hlt().unwrap();
        });
        let mut guest = Guest::new(backend, Mode::Protected, &code);
        guest.vcpu.set_cpuid(&expected).unwrap();
        guest.run_to_halt();
        for ((leaf, subleaf), at) in LEAVES.into_iter().zip((0x7000..).step_by(16)) {
            let Some(entry) = expected.get(leaf, subleaf) else { continue };
            let words: [[u8; 4]; 4] = [0, 4, 8, 12].map(|offset| guest.load(at + offset));
            let seen = words.map(u32::from_le_bytes);
            let told = [entry.eax, entry.ebx, entry.ecx, entry.edx];
            assert_eq!(seen, told, "leaf {leaf:#x}, subleaf {subleaf} of {model}");
        }
    }
}

fn a_model_is_frozen_into_the_state(backend: &dyn Backend) {
    let table = config(CpuModel::V1).cpuid(&backend.supported_cpuid().unwrap(), 0).unwrap();
    let code = assemble(Mode::Protected, |a| a.hlt().unwrap());
    let mut guest = Guest::new(backend, Mode::Protected, &code);
    guest.vcpu.set_cpuid(&table).unwrap();
    guest.run_to_halt();
    let state = guest.vcpu.save().unwrap();
    assert_eq!(state.cpuid, table);
    let mut new = Guest::new(backend, Mode::Protected, &code);
    new.vcpu.restore(&state).unwrap();
    assert_eq!(new.vcpu.save().unwrap().cpuid, table);
}
