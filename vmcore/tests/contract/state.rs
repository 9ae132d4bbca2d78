//! Saving and restoring vCPUs and machines, in this process and in another.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use iced_x86::code_asm::*;
use vmcore::backend::{Backend, BackendConfig, Capability, Slot, VcpuExit};
use vmcore::memory::Backing;
use vmcore::state::{MachineState, RunState, VcpuState};
use vmcore::{GuestAddress, MemoryRegion};

use crate::guest::{CODE, Guest, MEMORY, Mode, OnOut, Recorder, assemble, assemble_at, cpuid};

crate::contract!(
    registers_come_back_as_they_were_set,
    a_computation_goes_on_in_a_new_vm,
    a_computation_goes_on_in_a_new_process,
    vector_registers_survive,
    a_pending_interrupt_survives,
    the_machine_survives,
    waiting_processors_survive,
    model_specific_registers_survive,
    time_stamp_counters_stay_together,
    the_tsc_has_the_frequency_that_was_set,
    states_that_do_not_fit_are_refused,
);

/// A linear congruential generator, 300 rounds; every 100th writes to a port; the result is in
/// memory and in RAX.
fn generator(backend: &dyn Backend, region: Arc<MemoryRegion>, irqchip: bool) -> Guest {
    let code = assemble(Mode::Long, |a| {
        let mut again = a.create_label();
        let mut next = a.create_label();
        a.mov(eax, 1).unwrap();
        a.mov(ecx, 300).unwrap();
        a.mov(ebx, 100).unwrap();
        a.set_label(&mut again).unwrap();
        a.imul_3(eax, eax, 1_103_515_245).unwrap();
        a.add(eax, 12345).unwrap();
        a.add(ptr(rdi + 0x7000), eax).unwrap();
        a.dec(ebx).unwrap();
        a.jnz(next).unwrap();
        a.mov(ebx, 100).unwrap();
        a.out(0x80, eax).unwrap();
        a.set_label(&mut next).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.out(0x81, eax).unwrap();
        a.hlt().unwrap();
    });
    Guest::with_memory(backend, Mode::Long, &code, BackendConfig { irqchip }, region)
}

/// What [`generator`] must end with: RAX, and the sum in memory.
fn expected() -> (u32, u32) {
    (0..300).fold((1u32, 0u32), |(x, sum), _| {
        let x = x.wrapping_mul(1_103_515_245).wrapping_add(12345);
        (x, sum.wrapping_add(x))
    })
}

/// Runs until the guest has written to `port`.
fn run_to_port(guest: &mut Guest, port: u16) {
    let handle = guest.vcpu.handle();
    let exit = guest.run(&mut OnOut(|at, _: &[u8]| {
        if at == port {
            handle.kick();
        }
    }));
    assert_eq!(exit, VcpuExit::Kicked);
}

fn result(guest: &Guest) -> (u32, u32) {
    let last = guest.vcpu.regs().unwrap().rax;
    (u32::try_from(last).unwrap(), u32::from_le_bytes(guest.load(0x7000)))
}

/// A new VM with `region`, in the state given.
pub fn resumed(
    backend: &dyn Backend,
    region: Arc<MemoryRegion>,
    machine: &MachineState,
    vcpu: &VcpuState,
) -> Guest {
    let memory = vmcore::GuestMemory::new();
    memory.insert(region.clone()).unwrap();
    let config = BackendConfig { irqchip: machine.irqchip.is_some() };
    let vm = backend.create_vm(&config).unwrap();
    vm.map(Slot(0), region).unwrap();
    let mut new = vm.create_vcpu(vcpu.id).unwrap();
    vm.restore(machine).unwrap();
    new.restore(vcpu).unwrap();
    Guest { vm, vcpu: new, memory, mode: Mode::Long }
}

fn anonymous() -> Arc<MemoryRegion> {
    Arc::new(MemoryRegion::anonymous(GuestAddress(0), MEMORY).unwrap())
}

/// The memory of `guest` in a new region.
pub fn copied(guest: &Guest) -> Arc<MemoryRegion> {
    let mut bytes = vec![0; usize::try_from(MEMORY).unwrap()];
    guest.memory.read(GuestAddress(0), &mut bytes).unwrap();
    let region = anonymous();
    region.fill(0, &bytes).unwrap();
    region
}

fn irqchip_or_not(backend: &dyn Backend) -> Vec<bool> {
    if backend.supports(Capability::Irqchip) { vec![false, true] } else { vec![false] }
}

fn registers_come_back_as_they_were_set(backend: &dyn Backend) {
    let code = assemble(Mode::Long, |a| a.hlt().unwrap());
    let mut guest = Guest::new(backend, Mode::Long, &code);
    let mut regs = guest.vcpu.regs().unwrap();
    (regs.rax, regs.r15, regs.rflags) = (0x1234_5678_9abc_def0, 15, 0x246);
    guest.vcpu.set_regs(&regs).unwrap();
    assert_eq!(guest.vcpu.regs().unwrap(), regs);
    let sregs = guest.vcpu.sregs().unwrap();
    assert!(sregs.cs.long && sregs.cs.limit == u32::MAX && sregs.efer & 0x500 == 0x500);
    guest.vcpu.set_sregs(&sregs).unwrap();
    assert_eq!(guest.vcpu.sregs().unwrap(), sregs);
    let state = guest.vcpu.save().unwrap();
    assert_eq!((state.regs, state.sregs, state.id), (regs, sregs, 0));
    assert_eq!(state.cpuid, cpuid(backend));
    // A mapped and an unmapped address.
    assert_eq!(guest.vcpu.translate(CODE + 5).unwrap(), Some(GuestAddress(CODE + 5)));
    assert_eq!(guest.vcpu.translate(1 << 40).unwrap(), None);
}

fn a_computation_goes_on_in_a_new_vm(backend: &dyn Backend) {
    for irqchip in irqchip_or_not(backend) {
        let mut guest = generator(backend, anonymous(), irqchip);
        // At every stop the VM is replaced by a new one.
        for _ in 0..3 {
            run_to_port(&mut guest, 0x80);
            let (machine, vcpu) = (guest.vm.save().unwrap(), guest.vcpu.save().unwrap());
            // The state is data: it survives being written down.
            let bytes = postcard::to_stdvec(&(&machine, &vcpu)).unwrap();
            let (machine, vcpu) = postcard::from_bytes(&bytes).unwrap();
            let memory = copied(&guest);
            drop(guest);
            guest = resumed(backend, memory, &machine, &vcpu);
        }
        run_to_port(&mut guest, 0x81);
        assert_eq!(result(&guest), expected(), "irqchip: {irqchip}");
    }
}

const STATE_VARIABLE: &str = "VMCORE_TEST_STATE";

fn file_region(path: &Path) -> Arc<MemoryRegion> {
    let file = File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap();
    file.set_len(MEMORY).unwrap();
    let backing = Backing::File { file: Arc::new(file), offset: 0, shared: true };
    Arc::new(MemoryRegion::builder(GuestAddress(0), MEMORY).backing(backing).build().unwrap())
}

/// The guest is stopped half-way; this test program is started again to end the computation from
/// the files.
fn a_computation_goes_on_in_a_new_process(backend: &dyn Backend) {
    if let Some(dir) = std::env::var_os(STATE_VARIABLE) {
        let dir = Path::new(&dir);
        let bytes = std::fs::read(dir.join("state")).unwrap();
        let (machine, vcpu): (MachineState, VcpuState) = postcard::from_bytes(&bytes).unwrap();
        let mut guest = resumed(backend, file_region(&dir.join("memory")), &machine, &vcpu);
        run_to_port(&mut guest, 0x81);
        let (last, sum) = result(&guest);
        println!("result {last} {sum} in process {}", std::process::id());
        return;
    }
    for irqchip in irqchip_or_not(backend) {
        let dir = tempfile::tempdir().unwrap();
        let mut guest = generator(backend, file_region(&dir.path().join("memory")), irqchip);
        run_to_port(&mut guest, 0x80);
        assert_ne!(result(&guest), expected());
        let state = (guest.vm.save().unwrap(), guest.vcpu.save().unwrap());
        drop(guest);
        std::fs::write(dir.path().join("state"), postcard::to_stdvec(&state).unwrap()).unwrap();
        let variable = (STATE_VARIABLE, dir.path().as_os_str());
        let output =
            crate::again("state", backend.name(), "a_computation_goes_on_in_a_new_process", &[variable]);
        let (last, sum) = expected();
        assert!(output.contains(&format!("result {last} {sum} in process")), "{output}");
        assert!(!output.contains(&format!("in process {}", std::process::id())), "{output}");
    }
}

fn vector_registers_survive(backend: &dyn Backend) {
    let code = assemble(Mode::Long, |a| {
        a.movups(xmm0, ptr(rdi + 0x7000)).unwrap();
        a.movups(xmm15, ptr(rdi + 0x7010)).unwrap();
        a.out(0x80, al).unwrap();
        a.movups(ptr(rdi + 0x7020), xmm15).unwrap();
        a.movups(ptr(rdi + 0x7030), xmm0).unwrap();
        a.hlt().unwrap();
    });
    let mut guest = Guest::new(backend, Mode::Long, &code);
    let pattern: [u8; 32] = std::array::from_fn(|n| u8::try_from(n * 7 + 1).unwrap());
    guest.store(0x7000, &pattern);
    run_to_port(&mut guest, 0x80);
    let (machine, vcpu) = (guest.vm.save().unwrap(), guest.vcpu.save().unwrap());
    // XMM0 and XMM15 in the legacy area (SDM vol. 1, 13.4.1): at 160 and 400.
    assert_eq!((&vcpu.xsave[160..176], &vcpu.xsave[400..416]), (&pattern[..16], &pattern[16..]));
    let mut guest = resumed(backend, copied(&guest), &machine, &vcpu);
    assert_eq!(guest.run_to_halt(), []);
    assert_eq!(guest.load::<16>(0x7020), pattern[16..]);
    assert_eq!(guest.load::<16>(0x7030), pattern[..16]);
}

/// A message arrives while interrupts are off; the guest, restored elsewhere, takes it after STI.
fn a_pending_interrupt_survives(backend: &dyn Backend) {
    if !backend.supports(Capability::Irqchip) {
        println!("skipped: {} has no interrupt controllers", backend.name());
        return;
    }
    const HANDLER: u64 = CODE + 0x1000;
    let code = assemble(Mode::Long, |a| {
        a.mov(edi, 0xfee0_00f0u32).unwrap();
        a.mov(dword_ptr(rdi), 0x1ff).unwrap();
        a.out(0x80, al).unwrap();
        a.sti().unwrap();
        a.hlt().unwrap();
        a.out(0x82, al).unwrap();
        a.hlt().unwrap();
    });
    let handler = assemble_at(Mode::Long, HANDLER, |a| {
        a.out(0x81, al).unwrap();
        a.iretq().unwrap();
    });
    let mut guest = Guest::with_irqchip(backend, Mode::Long, &code);
    guest.set_handler(0x41, HANDLER, &handler);
    run_to_port(&mut guest, 0x80);
    guest.vm.send_msi(vmcore::Msi { address: 0xfee0_0000, data: 0x41 }).unwrap();
    let (machine, vcpu) = (guest.vm.save().unwrap(), guest.vcpu.save().unwrap());
    // Interrupt request register, vector 0x41: bit 1 of the third of eight words.
    assert_eq!(vcpu.lapic.as_ref().unwrap().registers[0x22], 2);
    let mut guest = resumed(backend, copied(&guest), &machine, &vcpu);
    let handle = guest.vcpu.handle();
    let mut ports = vec![];
    guest.run(&mut OnOut(|port, _: &[u8]| {
        ports.push(port);
        if port == 0x82 {
            handle.kick();
        }
    }));
    assert_eq!(ports, [0x81, 0x82]);
}

fn the_machine_survives(backend: &dyn Backend) {
    if !backend.supports(Capability::Irqchip) {
        println!("skipped: {} has no interrupt controllers", backend.name());
        return;
    }
    let code = assemble(Mode::Protected, |a| {
        for (port, value) in [(0x20, 0x11), (0x21, 0x68), (0x21, 4), (0x21, 1), (0x21, 0xfb), (0x43, 0x34)] {
            a.mov(al, value).unwrap();
            a.out(port, al).unwrap();
        }
        a.mov(al, 0x9c).unwrap();
        a.out(0x40, al).unwrap();
        a.mov(al, 0x2e).unwrap();
        a.out(0x40, al).unwrap();
        a.mov(edi, 0xfec0_0000u32).unwrap();
        a.mov(dword_ptr(edi), 0x10 + 2 * 4).unwrap();
        a.mov(dword_ptr(edi + 0x10), 0x1_0054).unwrap();
        a.out(0x80, al).unwrap();
        a.hlt().unwrap();
    });
    let mut guest = Guest::with_irqchip(backend, Mode::Protected, &code);
    run_to_port(&mut guest, 0x80);
    let state = guest.vm.save().unwrap();
    let irqchip = state.irqchip.as_ref().unwrap();
    assert_eq!((irqchip.pics[0].irq_base, irqchip.pics[0].imr), (0x68, 0xfb));
    assert_eq!(irqchip.ioapic.redirection[4], 0x1_0054);
    assert_eq!(irqchip.ioapic.redirection.len(), 24);
    let counter = irqchip.pit.channels[0];
    assert_eq!((counter.count, counter.mode), (0x2e9c, 2));
    let new = backend.create_vm(&BackendConfig { irqchip: true }).unwrap();
    let _vcpu = new.create_vcpu(0).unwrap();
    new.restore(&state).unwrap();
    let mut again = new.save().unwrap();
    assert!(again.clock_ns >= state.clock_ns && again.clock_ns - state.clock_ns < 1_000_000_000);
    again.clock_ns = state.clock_ns;
    // The counters start anew where they are set.
    for (new, old) in again.irqchip.iter_mut().zip(&state.irqchip) {
        for (new, old) in new.pit.channels.iter_mut().zip(&old.pit.channels) {
            new.count_load_time_ns = old.count_load_time_ns;
        }
    }
    assert_eq!(again, state);
    let plain = backend.create_vm(&BackendConfig::default()).unwrap();
    let text = plain.restore(&state).unwrap_err().to_string();
    assert!(text.contains("a VM without") && text.contains("with interrupt controllers"), "{text}");
}

fn waiting_processors_survive(backend: &dyn Backend) {
    if !backend.supports(Capability::Irqchip) {
        println!("skipped: {} has no interrupt controllers", backend.name());
        return;
    }
    let make = || {
        let vm = backend.create_vm(&BackendConfig { irqchip: true }).unwrap();
        let vcpus = [0, 1].map(|id| vm.create_vcpu(id).unwrap());
        (vm, vcpus)
    };
    let (_vm, [_, waiting]) = make();
    let state = waiting.save().unwrap();
    assert_eq!(state.run_state, RunState::WaitForInit);
    for run_state in [RunState::WaitForInit, RunState::WaitForSipi, RunState::Halted, RunState::Running] {
        let (_vm, [_, mut new]) = make();
        new.restore(&VcpuState { run_state, ..state.clone() }).unwrap();
        assert_eq!(new.run_state().unwrap(), run_state);
    }
}

fn model_specific_registers_survive(backend: &dyn Backend) {
    const LSTAR: u32 = 0xc000_0082;
    const TSC: u32 = 0x10;
    let code = assemble(Mode::Long, |a| a.hlt().unwrap());
    let guest = Guest::new(backend, Mode::Long, &code);
    let mut state = guest.vcpu.save().unwrap();
    let find = |state: &VcpuState, index| {
        state
            .msrs
            .iter()
            .find(|m| m.index == index)
            .map(|m| m.value)
            .unwrap_or_else(|| panic!("no MSR {index:#x}"))
    };
    let lstar = state.msrs.iter_mut().find(|m| m.index == LSTAR).unwrap();
    lstar.value = 0xffff_8000_1234_5678;
    let tsc = find(&state, TSC);
    let new = resumed(backend, copied(&guest), &guest.vm.save().unwrap(), &state);
    let again = new.vcpu.save().unwrap();
    assert_eq!(find(&again, LSTAR), 0xffff_8000_1234_5678);
    assert!(find(&again, TSC) >= tsc, "the TSC went back");
    // Everything but time is the same: TSC, TSC_ADJUST, Hyper-V's run time and reference time.
    let timeless = |state: &VcpuState| {
        state
            .msrs
            .iter()
            .filter(|m| ![TSC, 0x3b, 0x4000_0010, 0x4000_0020].contains(&m.index))
            .copied()
            .collect::<Vec<_>>()
    };
    assert_eq!(timeless(&again), timeless(&state));
}

fn states_that_do_not_fit_are_refused(backend: &dyn Backend) {
    let code = assemble(Mode::Long, |a| a.hlt().unwrap());
    let mut guest = Guest::new(backend, Mode::Long, &code);
    let state = guest.vcpu.save().unwrap();
    let before = guest.vcpu.regs().unwrap();
    let mut refused = |change: &dyn Fn(&mut VcpuState), words: &[&str]| {
        let mut changed = state.clone();
        change(&mut changed);
        let error = guest.vcpu.restore(&changed).unwrap_err();
        assert!(matches!(error, vmcore::Error::State { .. }), "{error}");
        let text = error.to_string();
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    };
    refused(&|s| s.id = 3, &["vCPU 0", "vCPU 3"]);
    refused(&|s| s.lapic = Some(Default::default()), &["no local APIC", "has a local APIC"]);
    refused(&|s| s.run_state = RunState::WaitForSipi, &["running", "WaitForSipi"]);
    refused(&|s| s.xcr0 = 1 << 40 | 1, &["XCR0", "0x10000000001"]);
    refused(&|s| s.msrs.push(vmcore::state::Msr { index: 0x4b56_ff00, value: 7 }), &["0x4b56ff00", "0x7"]);
    const AVX512_F_AND_BW: u32 = 1 << 16 | 1 << 30;
    if backend.supported_cpuid().unwrap().get(7, 0).is_none_or(|leaf| leaf.ebx & AVX512_F_AND_BW == 0) {
        let leaf = vmcore::cpuid::CpuidEntry { leaf: 7, subleaf: Some(0), ..Default::default() };
        let shown = vmcore::cpuid::CpuidEntry { ebx: AVX512_F_AND_BW, ..leaf };
        refused(&|s| s.cpuid.set(shown), &["also avx512f, avx512bw"]);
    } else {
        println!("skipped: {} has every feature there is", backend.name());
    }
    refused(&|s| s.tsc_khz = s.tsc_khz.map(|_| 1), &["1 kHz"]);
    // What was refused by comparison has changed nothing.
    assert_eq!(guest.vcpu.regs().unwrap(), before);
    // And the vCPU still works.
    guest.vcpu.restore(&state).unwrap();
    assert_eq!(guest.run(&mut Recorder::default()), VcpuExit::Halted);
}

/// Two vCPUs saved at different moments have one TSC again after the restore, and it has not gone
/// back.
fn time_stamp_counters_stay_together(backend: &dyn Backend) {
    const TSC: u32 = 0x10;
    if !backend.supports(Capability::Irqchip) {
        println!("skipped: {} has no interrupt controllers", backend.name());
        return;
    }
    let make = || {
        let vm = backend.create_vm(&BackendConfig { irqchip: true }).unwrap();
        let vcpus = [0, 1].map(|id| {
            let mut vcpu = vm.create_vcpu(id).unwrap();
            vcpu.set_cpuid(&cpuid(backend)).unwrap();
            vcpu
        });
        (vm, vcpus)
    };
    let tsc = |state: &VcpuState| state.msrs.iter().find(|m| m.index == TSC).unwrap().value;
    let (vm, vcpus) = make();
    let machine = vm.save().unwrap();
    let saved = vcpus.each_ref().map(|vcpu| {
        std::thread::sleep(std::time::Duration::from_millis(30));
        vcpu.save().unwrap()
    });
    let apart = tsc(&saved[1]) - tsc(&saved[0]);
    let (vm, mut vcpus) = make();
    vm.restore(&machine).unwrap();
    for (vcpu, state) in vcpus.iter_mut().zip(&saved) {
        vcpu.restore(state).unwrap();
    }
    let [first, second, third] = [0, 1, 0].map(|at: usize| tsc(&vcpus[at].save().unwrap()));
    assert!(first >= tsc(&saved[0]), "the TSC went back from {} to {first}", tsc(&saved[0]));
    // The second was read between two looks at the first: it is between them.
    assert!((first..=third).contains(&second), "{first} {second} {third}, saved {apart} apart");
}

/// A vCPU's TSC ticks at the frequency that was set, where the backend can.
fn the_tsc_has_the_frequency_that_was_set(backend: &dyn Backend) {
    let code = assemble(Mode::Long, |a| {
        for port in [0x80, 0x81] {
            a.rdtsc().unwrap();
            a.shl(rdx, 32).unwrap();
            a.or(rax, rdx).unwrap();
            a.mov(ptr(rdi + 0x7000 + (port - 0x80) * 8), rax).unwrap();
            a.out(port, al).unwrap();
        }
        a.hlt().unwrap();
    });
    for khz in [500_000, 3_000_000] {
        let mut guest = Guest::new(backend, Mode::Long, &code);
        match guest.vcpu.set_tsc_khz(khz) {
            Ok(()) => assert_eq!(guest.vcpu.tsc_khz(), Some(khz)),
            Err(vmcore::Error::Unsupported { what, .. }) => {
                println!("skipped: {what}: {} cannot", backend.name());
                continue;
            }
            Err(error) => panic!("{error}"),
        }
        run_to_port(&mut guest, 0x80);
        let start = std::time::Instant::now();
        std::thread::sleep(std::time::Duration::from_millis(100));
        // The first reading was before the clock was, the second is after.
        run_to_port(&mut guest, 0x81);
        let ms = u64::try_from(start.elapsed().as_millis()).unwrap();
        let [first, second] = [0x7000, 0x7008].map(|at| u64::from_le_bytes(guest.load(at)));
        let ticks = second - first;
        let khz = u64::from(khz);
        assert!(ticks >= khz * 100 && ticks <= khz * (ms + 1000), "{ticks} ticks at {khz} kHz in {ms} ms");
    }
    let mut guest = Guest::new(backend, Mode::Long, &code);
    let before = guest.vcpu.tsc_khz();
    let error = guest.vcpu.set_tsc_khz(1).unwrap_err();
    assert!(
        matches!(error, vmcore::Error::Unsupported { .. }) && error.to_string().contains("1 kHz"),
        "{error}"
    );
    assert_eq!(guest.vcpu.tsc_khz(), before);
}

/// The interrupt controllers are the same after reset, and go from one backend to another and back.
#[test]
fn machines_move_between_backends() {
    let (kvm, soft) = match (crate::kvm(), crate::soft()) {
        (Ok(kvm), Ok(soft)) => (kvm, soft),
        (Err(reason), _) | (_, Err(reason)) => return println!("skipped: {reason}"),
    };
    let backends: [&dyn Backend; 2] = [&kvm, &soft];
    if !backends.iter().all(|backend| backend.supports(Capability::Irqchip)) {
        return println!("skipped: a backend has no interrupt controllers");
    }
    // What time makes different is not compared.
    let timeless = |vm: &dyn vmcore::backend::BackendVm| {
        let mut state = vm.save().unwrap();
        state.clock_ns = 0;
        for channel in state.irqchip.iter_mut().flat_map(|irqchip| &mut irqchip.pit.channels) {
            channel.count_load_time_ns = 0;
        }
        state
    };
    let make = |backend: &dyn Backend| {
        let vm = backend.create_vm(&BackendConfig { irqchip: true }).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        (vm, vcpu)
    };
    let (fresh, _vcpu) = make(&kvm);
    let (also_fresh, _vcpu) = make(&soft);
    assert_eq!(timeless(&*fresh), timeless(&*also_fresh));

    // Level-triggered requests and edges wait in both PICs, a masked pin of the IOAPIC is high, a count
    // and a status are latched, half a count is written.
    let code = assemble(Mode::Protected, |a| {
        let writes = [
            (0x20, 0x11),
            (0x21, 0x68),
            (0x21, 4),
            (0x21, 0x1d),
            (0x21, 0xc3),
            (0x20, 0xc1),
            (0x20, 0x0b),
            (0xa0, 0x11),
            (0xa1, 0x70),
            (0xa1, 2),
            (0xa1, 3),
            (0xa1, 0x8f),
            (0xa0, 0x80),
            (0xa0, 0x68),
            (0x43, 0x34),
            (0x40, 0x9c),
            (0x40, 0x2e),
            (0x43, 0x76),
            (0x41, 7),
            (0x43, 0xb3),
            (0x42, 0x34),
            (0x42, 0x12),
            (0x43, 0xc8),
            (0x61, 3),
        ];
        for (port, value) in writes {
            a.mov(al, value).unwrap();
            a.out(port, al).unwrap();
        }
        a.mov(dx, 0x4d1).unwrap();
        a.mov(al, 0x0c).unwrap();
        a.out(dx, al).unwrap();
        a.mov(edi, 0xfec0_0000u32).unwrap();
        for (register, value) in [(0, 5 << 24), (0x18, 0x1_8054), (0x19, 1 << 24), (0x2e, 0x1_a9ff)] {
            a.mov(dword_ptr(edi), register).unwrap();
            a.mov(dword_ptr(edi + 0x10), value).unwrap();
        }
        a.out(0x80, al).unwrap();
        a.hlt().unwrap();
    });
    let states = backends.map(|backend| {
        let mut guest = Guest::with_irqchip(backend, Mode::Protected, &code);
        run_to_port(&mut guest, 0x80);
        for gsi in [4, 10, 13] {
            guest.vm.set_irq(gsi, true).unwrap();
        }
        let mut state = timeless(&*guest.vm);
        // The count goes on while it is being programmed; KVM does not know when it is null.
        for channel in state.irqchip.iter_mut().flat_map(|irqchip| &mut irqchip.pit.channels) {
            (channel.latched_count, channel.status) = (0, channel.status & 0x3f);
        }
        state
    });
    for state in &states {
        for backend in backends {
            let (vm, _vcpu) = make(backend);
            vm.restore(state).unwrap();
            assert_eq!(&timeless(&*vm), state, "on {}", backend.name());
        }
    }
    assert_eq!(states[0], states[1]);
}
