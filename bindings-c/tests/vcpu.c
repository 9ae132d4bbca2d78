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

int main(void) {
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
