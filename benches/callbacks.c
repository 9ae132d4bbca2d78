/* The C half of callbacks.rs: a port loop whose accesses go to a function, by libvmcore. */

#include <stdint.h>
#include <vmcore.h>

typedef struct loop {
    vmcore_vm *vm;
    vmcore_vcpu *vcpu;
    uint32_t left;
    uint64_t sum;
} loop;

static loop the_loop;

static void io(void *user, const vmcore_io *io) {
    loop *loop = user;
    if (io->kind == VMCORE_IO_PORT_WRITE) loop->sum += io->data[0];
    if (--loop->left == 0) vmcore_vcpu_kick(loop->vcpu);
}

/* Makes it on `accel` with `code` at 0; 0 where that went well. */
int callbacks_begin(uint32_t accel, const uint8_t *code, uint64_t len) {
    vmcore_memory *memory = NULL;
    vmcore_error *error = vmcore_vm_bare(accel, &the_loop.vm);
    if (!error) error = vmcore_vm_map(the_loop.vm, 0, 0x10000);
    if (!error) error = vmcore_vm_memory(the_loop.vm, &memory);
    if (!error) error = vmcore_memory_write(memory, 0, code, len);
    if (!error) error = vmcore_vm_create_vcpu(the_loop.vm, 0, &the_loop.vcpu);
    if (!error) error = vmcore_vcpu_enter_real_mode(the_loop.vcpu, 0);
    vmcore_memory_delete(memory);
    int failed = error != NULL;
    vmcore_error_delete(error);
    return failed;
}

/* Runs `count` accesses. */
int callbacks_run(uint32_t count) {
    vmcore_exit end = {0};
    the_loop.left = count;
    vmcore_error *error = vmcore_vcpu_run_with(the_loop.vcpu, io, &the_loop, &end);
    int failed = error != NULL || end.kind != VMCORE_EXIT_KICKED;
    vmcore_error_delete(error);
    return failed;
}

void callbacks_end(void) {
    vmcore_vcpu_delete(the_loop.vcpu);
    vmcore_vm_delete(the_loop.vm);
}
