//! Memory slots, the dirty log, read-only memory and doorbells.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use iced_x86::code_asm::*;
use vmcore::backend::{
    Backend, BackendConfig, Capability, DoorbellConfig, IoAddress, Registration, Slot, VcpuExit, VcpuIo,
};
use vmcore::{GuestAddress, MemoryRegion};

use crate::guest::{self, Access, Guest, MEMORY, Mode, NO_MEMORY, Recorder, assemble};

crate::contract!(
    slots_are_checked_and_errors_name_both_sides,
    the_dirty_log_tells_pages_once,
    read_only_memory_sends_writes_to_the_bus,
    sparse_memory_is_reached_at_both_ends,
    memory_comes_and_goes_while_the_guest_runs,
    doorbells_ring_for_their_width_and_value,
    doorbells_end_with_their_registration,
    doorbells_move_and_keep_their_event,
    impossible_doorbells_are_refused,
    a_vm_can_be_dropped_in_any_order,
);

fn slots_are_checked_and_errors_name_both_sides(backend: &dyn Backend) {
    let vm = backend.create_vm(&BackendConfig::default()).unwrap();
    let region = |base, len| Arc::new(MemoryRegion::anonymous(GuestAddress(base), len).unwrap());
    vm.map(Slot(0), region(0x1000, 0x2000)).unwrap();
    let refused = |slot, base, len, words: &[&str]| {
        let text = vm.map(Slot(slot), region(base, len)).unwrap_err().to_string();
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    };
    refused(1, 0x2000, 0x2000, &["[0x2000..=0x3fff]", "[0x1000..=0x2fff]"]);
    refused(0, 0x8000, 0x1000, &["slot 0", "[0x8000..=0x8fff]", "[0x1000..=0x2fff]"]);
    refused(vm.max_slots(), 0x8000, 0x1000, &["slots", &vm.max_slots().to_string()]);
    vm.map(Slot(1), region(0x3000, 0x1000)).unwrap();
    vm.unmap(Slot(0)).unwrap();
    let text = vm.unmap(Slot(0)).unwrap_err().to_string();
    assert!(text.contains("slot") && text.contains("[1]"), "{text}");
    vm.map(Slot(0), region(0x1000, 0x1000)).unwrap();
    assert!(vm.take_dirty(Slot(0)).unwrap_err().to_string().contains("track_dirty"));
    assert!(vm.take_dirty(Slot(9)).unwrap_err().to_string().contains("[0, 1]"));
}

/// Writes a byte to every `step`-th page of a tracked region, from ECX downwards.
fn the_dirty_log_tells_pages_once(backend: &dyn Backend) {
    let code = assemble(Mode::Protected, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.mov(byte_ptr(edi), 1).unwrap();
        a.add(edi, 3 * 4096).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    let mut guest = Guest::new(backend, Mode::Protected, &code);
    let tracked = MemoryRegion::builder(GuestAddress(MEMORY), 200 * 4096).track_dirty().build().unwrap();
    guest.vm.map(Slot(1), Arc::new(tracked)).unwrap();
    let vm = guest.vm.clone();
    assert_eq!(vm.take_dirty(Slot(1)).unwrap().count(), 0);
    let mut write = |first: u64, count: u64| {
        let mut regs = guest.vcpu.regs().unwrap();
        (regs.rip, regs.rdi, regs.rcx) = (crate::guest::CODE, MEMORY + first * 4096, count);
        guest.vcpu.set_regs(&regs).unwrap();
        guest.run_to_halt();
        guest.vm.take_dirty(Slot(1)).unwrap()
    };
    let dirty = write(1, 30);
    assert_eq!(dirty.pages(), 200);
    let expected: Vec<u64> = (0..30).map(|n| (1 + 3 * n) * 4096).collect();
    assert_eq!(dirty.dirty_offsets().collect::<Vec<_>>(), expected);
    // What was taken is clean; pages written again are told again.
    assert_eq!(write(4, 1).dirty_offsets().collect::<Vec<_>>(), [4 * 4096]);
    assert_eq!(vm.take_dirty(Slot(1)).unwrap().count(), 0);
    assert_eq!(write(199, 1).dirty_offsets().collect::<Vec<_>>(), [199 * 4096]);
}

fn read_only_memory_sends_writes_to_the_bus(backend: &dyn Backend) {
    if !backend.supports(Capability::ReadOnlyMemory) {
        println!("skipped: {} has no read-only memory", backend.name());
        return;
    }
    let code = assemble(Mode::Protected, |a| {
        a.mov(edi, 0xf_0000 + u32::try_from(MEMORY).unwrap()).unwrap();
        a.mov(eax, ptr(edi)).unwrap();
        a.mov(dword_ptr(edi), 0x55).unwrap();
        a.mov(ebx, ptr(edi)).unwrap();
        a.hlt().unwrap();
    });
    let mut guest = Guest::new(backend, Mode::Protected, &code);
    let at = 0xf_0000 + MEMORY;
    let rom = MemoryRegion::builder(GuestAddress(at), 0x1_0000).read_only().build().unwrap();
    rom.fill(0, &[1, 2, 3, 4]).unwrap();
    guest.vm.map(Slot(1), Arc::new(rom.clone())).unwrap();
    assert_eq!(guest.run_to_halt(), [Access::Write(at, vec![0x55, 0, 0, 0])]);
    let regs = guest.vcpu.regs().unwrap();
    assert_eq!((regs.rax, regs.rbx), (0x0403_0201, 0x0403_0201));
}

/// A guest in long mode writes the first and the last bytes of 1 TiB above 4 GiB, or of what its CPU
/// addresses. A KVM that shadows page tables allocates 8 bytes a page beforehand: there it is 64 GiB.
fn sparse_memory_is_reached_at_both_ends(backend: &dyn Backend) {
    const FIRST: u64 = 4 << 30;
    /// Room for the page tables of both addresses, behind those of the guest.
    const TABLES: u64 = 0x38_0000;
    let bits = guest::cpuid(backend).get(0x8000_0008, 0).map_or(36, |leaf| leaf.eax & 0xff);
    let most = if crate::small_guests_only(backend) { 1 << 36 } else { 1 << 40 };
    let len = (FIRST + most).min(1 << bits) - FIRST;
    let last = FIRST + len - 8;
    let code = assemble(Mode::Long, |a| {
        for (at, value) in [(FIRST, 0x1122_3344), (last, 0x5566_7788)] {
            a.mov(rdi, at).unwrap();
            a.mov(dword_ptr(rdi), value).unwrap();
        }
        a.hlt().unwrap();
    });
    let mut guest = Guest::new(backend, Mode::Long, &code);
    let tebibyte = MemoryRegion::anonymous(GuestAddress(FIRST), len).unwrap();
    guest.vm.map(Slot(1), Arc::new(tebibyte.clone())).unwrap();
    guest.memory.insert(Arc::new(tebibyte)).unwrap();
    let entry = |table: u64, at: u64, shift: u32| table + (at >> shift & 511) * 8;
    let pml4 = guest.vcpu.sregs().unwrap().cr3;
    for (index, at) in (0u64..).zip([FIRST, last]) {
        let (pdpt, directory) = (TABLES + index * 0x2000, TABLES + index * 0x2000 + 0x1000);
        // The first address is in the same 512 GiB as what is mapped already.
        let pdpt = u64::from_le_bytes(guest.load(entry(pml4, at, 39))).checked_sub(3).unwrap_or(pdpt);
        guest.store(entry(pml4, at, 39), &(pdpt | 3).to_le_bytes());
        guest.store(entry(pdpt, at, 30), &(directory | 3).to_le_bytes());
        guest.store(entry(directory, at, 21), &(at >> 21 << 21 | 0x83).to_le_bytes());
    }
    assert_eq!(guest.run_to_halt(), []);
    assert_eq!(guest.load(FIRST), 0x1122_3344u32.to_le_bytes());
    assert_eq!(guest.load(last), 0x5566_7788u32.to_le_bytes());
}

/// The guest reads one address for ever and tells what it sees. Without memory there, the bus
/// answers 0xffffffff; with memory, what the region holds.
fn memory_comes_and_goes_while_the_guest_runs(backend: &dyn Backend) {
    const ROUNDS: u32 = 50;
    struct Watch {
        sees_bus: Arc<AtomicBool>,
        sees_memory: Arc<AtomicBool>,
    }
    impl VcpuIo for Watch {
        fn port_read(&mut self, _: u16, _: &mut [u8]) {}
        fn port_write(&mut self, _: u16, data: &[u8]) {
            match u32::from_le_bytes(data.try_into().unwrap()) {
                u32::MAX => self.sees_bus.store(true, Ordering::SeqCst),
                0x1234_5678 => self.sees_memory.store(true, Ordering::SeqCst),
                other => panic!("the guest read {other:#x}"),
            }
        }
        fn mmio_read(&mut self, at: GuestAddress, data: &mut [u8]) {
            assert_eq!(at.0, NO_MEMORY);
            data.fill(0xff);
        }
        fn mmio_write(&mut self, at: GuestAddress, _: &[u8]) {
            panic!("write to {at:?}");
        }
    }
    let code = assemble(Mode::Protected, |a| {
        let mut again = a.create_label();
        a.mov(edi, u32::try_from(NO_MEMORY).unwrap()).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(eax, ptr(edi)).unwrap();
        a.out(0x80, eax).unwrap();
        a.jmp(again).unwrap();
    });
    let mut guest = Guest::new(backend, Mode::Protected, &code);
    let vm = guest.vm.clone();
    let handle = guest.vcpu.handle();
    let (sees_bus, sees_memory) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let mut io = Watch { sees_bus: sees_bus.clone(), sees_memory: sees_memory.clone() };
    let changer = thread::spawn(move || {
        let wait_for = |flag: &AtomicBool| {
            flag.store(false, Ordering::SeqCst);
            while !flag.load(Ordering::SeqCst) {
                thread::yield_now();
            }
        };
        for _ in 0..ROUNDS {
            wait_for(&sees_bus);
            let region = MemoryRegion::anonymous(GuestAddress(NO_MEMORY), 4096).unwrap();
            region.fill(0, &0x1234_5678u32.to_le_bytes()).unwrap();
            vm.map(Slot(7), Arc::new(region)).unwrap();
            wait_for(&sees_memory);
            vm.unmap(Slot(7)).unwrap();
        }
        wait_for(&sees_bus);
        handle.kick();
    });
    assert_eq!(guest.run(&mut io), VcpuExit::Kicked);
    changer.join().unwrap();
}

/// How often an event was signalled since the last look.
fn rings(registration: &Registration) -> u64 {
    registration.event().read().unwrap_or(0)
}

fn doorbells_ring_for_their_width_and_value(backend: &dyn Backend) {
    if !backend.supports(Capability::Doorbell) {
        println!("skipped: {} has no doorbells", backend.name());
        return;
    }
    let mmio = u32::try_from(NO_MEMORY).unwrap();
    let code = assemble(Mode::Protected, |a| {
        a.mov(eax, 0x1234).unwrap();
        a.mov(edx, 0x510).unwrap();
        for _ in 0..3 {
            a.out(dx, ax).unwrap();
        }
        a.out(dx, eax).unwrap();
        a.mov(edx, 0x520).unwrap();
        a.out(dx, eax).unwrap();
        a.inc(eax).unwrap();
        a.out(dx, eax).unwrap();
        a.mov(edi, mmio).unwrap();
        a.mov(ptr(edi), al).unwrap();
        a.mov(ptr(edi), eax).unwrap();
        a.mov(ptr(edi + 0x10), eax).unwrap();
        a.dec(eax).unwrap();
        a.mov(ptr(edi + 0x10), eax).unwrap();
        a.hlt().unwrap();
    });
    let mut guest = Guest::new(backend, Mode::Protected, &code);
    let bell = |at, width, value| guest.vm.doorbell(DoorbellConfig { at, width, value }).unwrap();
    let any_port = bell(IoAddress::Port(0x510), 2, None);
    let one_port = bell(IoAddress::Port(0x520), 4, Some(0x1234));
    let any_mmio = bell(IoAddress::Mmio(GuestAddress(NO_MEMORY)), 0, None);
    let one_mmio = bell(IoAddress::Mmio(GuestAddress(NO_MEMORY + 0x10)), 4, Some(0x1235));
    let log = guest.run_to_halt();
    assert_eq!(
        log,
        [
            Access::Out(0x510, vec![0x34, 0x12, 0, 0]),
            Access::Out(0x520, vec![0x35, 0x12, 0, 0]),
            Access::Write(NO_MEMORY + 0x10, vec![0x34, 0x12, 0, 0]),
        ]
    );
    assert_eq!([&any_port, &one_port, &any_mmio, &one_mmio].map(rings), [3, 1, 2, 1]);
}

fn doorbells_end_with_their_registration(backend: &dyn Backend) {
    if !backend.supports(Capability::Doorbell) {
        println!("skipped: {} has no doorbells", backend.name());
        return;
    }
    let code = assemble(Mode::Protected, |a| {
        a.out(0x80, al).unwrap();
        a.hlt().unwrap();
        a.out(0x80, al).unwrap();
        a.hlt().unwrap();
    });
    let mut guest = Guest::new(backend, Mode::Protected, &code);
    let config = DoorbellConfig { at: IoAddress::Port(0x80), width: 1, value: None };
    let bell = guest.vm.doorbell(config).unwrap();
    let text = guest.vm.doorbell(config).unwrap_err().to_string();
    assert!(text.contains("another doorbell"), "{text}");
    assert_eq!(guest.run_to_halt(), []);
    assert_eq!(rings(&bell), 1);
    drop(bell);
    assert_eq!(guest.run_to_halt(), [Access::Out(0x80, vec![0])]);
    // The place is free again, and a registration may outlive the VM.
    let bell = guest.vm.doorbell(config).unwrap();
    drop(guest);
    drop(bell);
}

fn doorbells_move_and_keep_their_event(backend: &dyn Backend) {
    if !backend.supports(Capability::Doorbell) {
        println!("skipped: {} has no doorbells", backend.name());
        return;
    }
    let code = assemble(Mode::Protected, |a| {
        for _ in 0..3 {
            a.out(0x80, al).unwrap();
            a.out(0x90, al).unwrap();
            a.hlt().unwrap();
        }
    });
    let mut guest = Guest::new(backend, Mode::Protected, &code);
    let event = guest.vm.doorbell(DoorbellConfig { at: IoAddress::Port(0xa0), width: 1, value: None });
    let event = event.unwrap().event().clone();
    let bell = |port| {
        let config = DoorbellConfig { at: IoAddress::Port(port), width: 1, value: None };
        guest.vm.doorbell_on(config, event.clone()).unwrap()
    };
    let (first, second) = (bell(0x80), bell(0x90));
    assert_eq!(guest.run_to_halt(), []);
    assert_eq!(event.read().unwrap(), 2);
    // One goes; the other, with the same event, stays.
    drop(first);
    assert_eq!(guest.run_to_halt(), [Access::Out(0x80, vec![0])]);
    assert_eq!(event.read().unwrap(), 1);
    drop(second);
    assert_eq!(guest.run_to_halt(), [Access::Out(0x80, vec![0]), Access::Out(0x90, vec![0])]);
    assert!(event.read().is_err(), "nobody rang");
}

fn impossible_doorbells_are_refused(backend: &dyn Backend) {
    let vm = backend.create_vm(&BackendConfig::default()).unwrap();
    let (port, mmio) = (IoAddress::Port(0x80), IoAddress::Mmio(GuestAddress(NO_MEMORY)));
    for (at, width, value) in [
        (port, 0, None),
        (port, 3, None),
        (port, 8, None),
        (mmio, 16, None),
        (mmio, 0, Some(1)),
        (mmio, 1, Some(256)),
    ] {
        let error = vm.doorbell(DoorbellConfig { at, width, value }).unwrap_err();
        assert!(matches!(error, vmcore::Error::Config { .. }), "{error}");
    }
}

/// Descriptors and mappings of this process.
fn resources() -> (usize, usize) {
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap().count();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    (descriptors, maps.lines().filter(|l| l.contains("kvm")).count())
}

/// VM first, vCPU first, handle last: nothing of them stays. Other tests run meanwhile, so the
/// process that counts is a new one.
fn a_vm_can_be_dropped_in_any_order(backend: &dyn Backend) {
    if std::env::var_os("VMCORE_TEST_ALONE").is_none() {
        let output = crate::again("memory", backend.name(), "a_vm_can_be_dropped_in_any_order", &[]);
        assert!(output.contains("test result: ok. 1 passed"), "{output}");
        return;
    }
    let code = assemble(Mode::Protected, |a| a.hlt().unwrap());
    let make = || Guest::with_irqchip(backend, Mode::Protected, &code);
    let used = |guest: &mut Guest| {
        guest.vcpu.handle().kick();
        guest.run(&mut Recorder::default());
    };
    drop(make());
    let before = resources();
    for _ in 0..20 {
        let mut guest = make();
        used(&mut guest);
        let bell = DoorbellConfig { at: IoAddress::Port(0x80), width: 1, value: None };
        let bell = guest.vm.doorbell(bell).unwrap();
        let handle = guest.vcpu.handle();
        let Guest { vm, mut vcpu, memory, .. } = guest;
        // The vCPU keeps what it needs to run.
        drop((vm, memory));
        vcpu.handle().kick();
        assert_eq!(vcpu.run(&mut Recorder::default()).unwrap(), VcpuExit::Kicked);
        drop(vcpu);
        handle.kick();
        drop(bell);
        assert_eq!(resources(), before, "with the handle of a vCPU that is gone");
    }
    for _ in 0..20 {
        let Guest { vm, vcpu, memory, .. } = make();
        drop(vcpu);
        drop(memory);
        drop(vm);
    }
    assert_eq!(resources(), before);
}
