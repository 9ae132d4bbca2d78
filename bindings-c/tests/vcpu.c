/* A vCPU in the program's own hands. */

#include "check.h"

/* in al, 0x10; out 0x11, al; mov ax, 0x2000; mov ds, ax; mov [5], al; mov bl, [6]; hlt */
static const uint8_t CODE[] = {0xe4, 0x10, 0xe6, 0x11, 0xb8, 0, 0x20, 0x8e, 0xd8, 0xa2, 5, 0, 0x8a, 0x1e, 6, 0, 0xf4};
/* again: jmp again */
static const uint8_t FOREVER[] = {0xeb, 0xfe};
/* out 0x10, al; jmp back */
static const uint8_t PORTS[] = {0xe6, 0x10, 0xeb, 0xfc};

typedef struct seen {
    unsigned count;
    uint64_t addresses[4];
    uint8_t out;
} seen;

static void io(void *user, const vmcore_io *io) {
    seen *seen = user;
    CHECK(io->len == 1 && seen->count < 4);
    seen->addresses[seen->count++] = io->address;
    if (io->kind == VMCORE_IO_PORT_READ) {
        CHECK(io->data[0] == 0xff);
        io->data[0] = 42;
    }
    if (io->kind == VMCORE_IO_PORT_WRITE) seen->out = io->data[0];
    if (io->kind == VMCORE_IO_MMIO_READ) io->data[0] = 9;
}

typedef struct kicker {
    vmcore_vcpu *vcpu;
    unsigned left;
} kicker;

static void kick(void *user, const vmcore_io *io) {
    kicker *kicker = user;
    vmcore_regs regs;
    (void)io;
    FAILS(VMCORE_ERROR_WRONG_STATE, vmcore_vcpu_regs(kicker->vcpu, &regs));
    if (--kicker->left == 0) vmcore_vcpu_kick(kicker->vcpu);
}

/* So many instructions, and no more. */
static void deterministic(void) {
    vmcore_vm *vm = NULL;
    vmcore_vcpu *vcpu = NULL;
    vmcore_exit end;
    OK(vmcore_vm_bare_deterministic(7, false, &vm));
    equip(vm, FOREVER, sizeof FOREVER, &vcpu);
    for (int n = 0; n < 2; n++) {
        OK(vmcore_vcpu_run_instructions(vcpu, 1000, &end));
        CHECK(end.kind == VMCORE_EXIT_INSTRUCTION_LIMIT);
    }
    vmcore_vcpu_delete(vcpu);
    vmcore_vm_delete(vm);
}

/* mov eax, 0x80000002; cpuid; hlt */
static const uint8_t BRAND[] = {0x66, 0xb8, 2, 0, 0, 0x80, 0x0f, 0xa2, 0xf4};

static void cpuid(void) {
    vmcore_vcpu *vcpu = NULL;
    vmcore_vm *vm = bare(BRAND, sizeof BRAND, &vcpu);
    vmcore_cpuid *supported = NULL, *cpuid = NULL, *again = NULL;
    vmcore_cpuid_entry entry, found = {0};
    vmcore_exit end;
    vmcore_regs regs;
    size_t subleaves = 0;

    OK(vmcore_cpuid_supported(VMCORE_ACCEL_SOFT, &supported));
    FAILS(VMCORE_ERROR_CONFIG, vmcore_cpuid_of_model(VMCORE_ACCEL_SOFT, "v9", 1, 0, false, &cpuid));
    FAILS(VMCORE_ERROR_CONFIG, vmcore_cpuid_of_model(VMCORE_ACCEL_SOFT, "v2", 0, 0, false, &cpuid));
    OK(vmcore_cpuid_of_model(VMCORE_ACCEL_SOFT, "v2", 1, 0, false, &cpuid));
    CHECK(vmcore_cpuid_len(supported) > 10 && vmcore_cpuid_len(cpuid) > 10);
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_cpuid_get(cpuid, vmcore_cpuid_len(cpuid), &entry));
    entry = (vmcore_cpuid_entry){.leaf = 0x80000002, .eax = 0x6d756e61, .ebx = 1, .ecx = 2, .edx = 3};
    OK(vmcore_cpuid_set(cpuid, &entry));
    OK(vmcore_vcpu_set_cpuid(vcpu, cpuid));
    OK(vmcore_vcpu_cpuid(vcpu, &again));
    CHECK(vmcore_cpuid_len(again) == vmcore_cpuid_len(cpuid));
    for (size_t i = 0; i < vmcore_cpuid_len(again); i++) {
        OK(vmcore_cpuid_get(again, i, &entry));
        if (entry.leaf == 0x80000002) found = entry;
        subleaves += entry.has_subleaf;
    }
    CHECK(found.eax == 0x6d756e61 && found.edx == 3 && !found.has_subleaf && subleaves > 0);
    OK(vmcore_vcpu_run(vcpu, &end));
    OK(vmcore_vcpu_regs(vcpu, &regs));
    CHECK(regs.rax == 0x6d756e61 && regs.rbx == 1 && regs.rcx == 2 && regs.rdx == 3);
    vmcore_cpuid_delete(supported);
    vmcore_cpuid_delete(cpuid);
    vmcore_cpuid_delete(again);
    vmcore_cpuid_delete(NULL);
    vmcore_vcpu_delete(vcpu);
    vmcore_vm_delete(vm);
}

/* The 8259A: vectors from 0x20, nothing masked. sti; out 0x98, al; wait: hlt; jmp wait. At 0x40: out 0x99, al; hlt. */
static const uint8_t WAITS[0x44] = {
    0xb0, 0x11, 0xe6, 0x20, 0xb0, 0x20, 0xe6, 0x21, 0xb0, 4, 0xe6, 0x21, 0xb0, 1, 0xe6, 0x21, 0xb0, 0, 0xe6, 0x21,
    0xfb, 0xe6, 0x98, 0xf4, 0xeb, 0xfd, [0x40] = 0xe6, [0x41] = 0x99, [0x42] = 0xf4};

typedef struct wires {
    vmcore_irq *irq;
    vmcore_vcpu *vcpu;
    bool pulse, interrupted;
} wires;

static void on_out(void *user, const vmcore_io *io) {
    wires *wires = user;
    if (io->address == 0x98 && wires->pulse) OK(vmcore_irq_pulse(wires->irq));
    if (io->address == 0x98 && !wires->pulse) OK(vmcore_irq_set(wires->irq, true));
    if (io->address == 0x99) {
        wires->interrupted = true;
        vmcore_vcpu_kick(wires->vcpu);
    }
}

static void irq(bool pulse) {
    const uint16_t vector[] = {0x40, 0x100};
    wires wires = {.pulse = pulse};
    vmcore_vm *vm = NULL;
    vmcore_memory *memory = NULL;
    vmcore_exit end;
    OK(vmcore_vm_bare_with_irqchip(VMCORE_ACCEL_SOFT, &vm));
    OK(vmcore_vm_map(vm, 0, 0x10000));
    OK(vmcore_vm_memory(vm, &memory));
    OK(vmcore_memory_write(memory, 0x1000, WAITS, sizeof WAITS));
    OK(vmcore_memory_write(memory, 4 * 0x25, (const uint8_t *)vector, sizeof vector));
    OK(vmcore_vm_create_vcpu(vm, 0, &wires.vcpu));
    OK(vmcore_vcpu_enter_real_mode(wires.vcpu, 0x1000));
    OK(vmcore_vm_irq(vm, 5, &wires.irq));
    OK(vmcore_vcpu_run_with(wires.vcpu, on_out, &wires, &end));
    CHECK(end.kind == VMCORE_EXIT_KICKED && wires.interrupted);
    CHECK(vmcore_irq_level(wires.irq) == !pulse);
    vmcore_memory_delete(memory);
    vmcore_vcpu_delete(wires.vcpu);
    vmcore_vm_delete(vm);
    vmcore_irq_delete(wires.irq);
    vmcore_irq_delete(NULL);
}

int main(void) {
    deterministic();
    cpuid();
    irq(true);
    irq(false);
    vmcore_vcpu *vcpu = NULL;
    vmcore_vm *vm = bare(CODE, sizeof CODE, &vcpu);
    vmcore_exit end;
    vmcore_regs regs;
    vmcore_sregs sregs;
    vmcore_vcpu_stats stats;
    seen seen = {0};

    OK(vmcore_vcpu_run_with(vcpu, io, &seen, &end));
    CHECK(end.kind == VMCORE_EXIT_HALTED && seen.count == 4 && seen.out == 42);
    CHECK(seen.addresses[0] == 0x10 && seen.addresses[1] == 0x11);
    CHECK(seen.addresses[2] == 0x20005 && seen.addresses[3] == 0x20006);
    OK(vmcore_vcpu_regs(vcpu, &regs));
    CHECK((regs.rbx & 0xff) == 9 && vmcore_vcpu_id(vcpu) == 0);
    OK(vmcore_vcpu_get_stats(vcpu, &stats));
    CHECK(stats.port == 2 && stats.mmio == 2);
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_vcpu_run_with(vcpu, NULL, NULL, &end));

    regs.rbx = 0x1122334455667788;
    OK(vmcore_vcpu_set_regs(vcpu, &regs));
    regs.rbx = 0;
    OK(vmcore_vcpu_regs(vcpu, &regs));
    CHECK(regs.rbx == 0x1122334455667788);
    OK(vmcore_vcpu_sregs(vcpu, &sregs));
    CHECK(sregs.ds.selector == 0x2000 && sregs.ds.base == 0x20000 && sregs.ds.limit == 0xffff);
    sregs.es = vmcore_segment_flat(0x10, false);
    OK(vmcore_vcpu_set_sregs(vcpu, &sregs));
    OK(vmcore_vcpu_sregs(vcpu, &sregs));
    CHECK(sregs.es.limit == 0xffffffff && sregs.es.big && vmcore_segment_long_code(8).is_long);
    uint64_t at = 0;
    bool mapped = false;
    OK(vmcore_vcpu_translate(vcpu, 0x1234, &at, &mapped));
    CHECK(mapped && at == 0x1234);

    OK(vmcore_vcpu_enter_real_mode(vcpu, 0x1000));
    OK(vmcore_vcpu_set_debug(vcpu, true, false, NULL));
    OK(vmcore_vcpu_run(vcpu, &end));
    CHECK(end.kind == VMCORE_EXIT_DEBUG && end.exception == 1);
    vmcore_vcpu_delete(vcpu);
    vmcore_vm_delete(vm);

    vm = bare(PORTS, sizeof PORTS, &vcpu);
    kicker kicker = {vcpu, 5};
    OK(vmcore_vcpu_run_with(vcpu, kick, &kicker, &end));
    CHECK(end.kind == VMCORE_EXIT_KICKED && kicker.left == 0);
    /* The VM goes first: the vCPU keeps what it needs. */
    vmcore_vm_delete(vm);
    vmcore_vcpu_kick(vcpu);
    OK(vmcore_vcpu_run(vcpu, &end));
    CHECK(end.kind == VMCORE_EXIT_KICKED);
    vmcore_kick *handle = NULL;
    OK(vmcore_kick_new(vcpu, &handle));
    vmcore_kick_now(handle);
    OK(vmcore_vcpu_run(vcpu, &end));
    vmcore_vcpu_delete(vcpu);
    vmcore_kick_now(handle);
    vmcore_kick_delete(handle);

    vm = bare(FOREVER, sizeof FOREVER, &vcpu);
    FAILS(VMCORE_ERROR_MEMORY, vmcore_vm_unmap(vm, 0x5000));
    vmcore_vcpu_delete(vcpu);
    vmcore_vcpu_delete(NULL);
    vmcore_vm_delete(vm);
    return 0;
}
