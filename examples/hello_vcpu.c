/* Sixteen-bit code on a bare vCPU: no kernel, no device, the guest's I/O goes to a function. */

#include <stdio.h>
#include <vmcore.h>

/* mov dx, 0x3f8; mov si, text; next: lodsb; test al, al; jz done; out dx, al; jmp next; done: hlt; text: */
static const char CODE[] = "\xba\xf8\x03\xbe\x10\x00\xac\x84\xc0\x74\x03\xee\xeb\xf8\xf4\x90Hello from a vCPU!\n";

static void io(void *user, const vmcore_io *io) {
    (void)user;
    if (io->kind == VMCORE_IO_PORT_WRITE && io->address == 0x3f8) putchar(io->data[0]);
}

int main(void) {
    vmcore_vm *vm = NULL;
    vmcore_memory *memory = NULL;
    vmcore_vcpu *vcpu = NULL;
    vmcore_exit exit = {0};
    vmcore_error *error = vmcore_vm_bare(VMCORE_ACCEL_AUTO, &vm);
    if (!error) error = vmcore_vm_map(vm, 0, 0x10000);
    if (!error) error = vmcore_vm_memory(vm, &memory);
    if (!error) error = vmcore_memory_write(memory, 0x1000, (const uint8_t *)CODE, sizeof CODE);
    if (!error) error = vmcore_vm_create_vcpu(vm, 0, &vcpu);
    if (!error) error = vmcore_vcpu_enter_real_mode(vcpu, 0x1000);
    if (!error) error = vmcore_vcpu_run_with(vcpu, io, NULL, &exit);
    int status = error || exit.kind != VMCORE_EXIT_HALTED;
    if (error) fprintf(stderr, "hello_vcpu: %s\n", vmcore_error_message(error));
    vmcore_error_delete(error);
    vmcore_vcpu_delete(vcpu);
    vmcore_memory_delete(memory);
    vmcore_vm_delete(vm);
    return status;
}
