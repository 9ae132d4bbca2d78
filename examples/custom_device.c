/* A device of one's own: a port that adds up what the guest writes, on a machine without any other. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vmcore.h>

/* Write: adds the byte. Read: the sum. Writing 0 ends the VM with the sum as its exit code. */
typedef struct adder {
    uint32_t sum;
    vmcore_control *control;
} adder;

static void adder_read(void *user, uint64_t offset, uint8_t *data, size_t len) {
    (void)offset;
    const adder *self = user;
    memcpy(data, &self->sum, len < sizeof self->sum ? len : sizeof self->sum);
}

static void adder_write(void *user, uint64_t offset, const uint8_t *data, size_t len) {
    (void)offset, (void)len;
    adder *self = user;
    self->sum += data[0];
    vmcore_outcome outcome = {VMCORE_OUTCOME_EXIT, self->sum};
    if (data[0] == 0) vmcore_error_delete(vmcore_control_end(self->control, outcome));
}

static void adder_drop(void *user) {
    adder *self = user;
    vmcore_control_delete(self->control);
    free(self);
}

static vmcore_error *attach(void *user, vmcore_machine *machine) {
    (void)user;
    static const vmcore_device_ops ops = {
        .size = sizeof ops, .read = adder_read, .write = adder_write, .drop = adder_drop};
    vmcore_device *device = NULL;
    adder *self = calloc(1, sizeof *self);
    if (!self) return vmcore_error_new(VMCORE_ERROR_OS, "no memory", NULL);
    vmcore_error *error = vmcore_machine_control(machine, &self->control);
    if (!error) error = vmcore_device_new(&ops, self, &device);
    if (!device) adder_drop(self);
    if (!error) error = vmcore_machine_insert_ports(machine, 0x42, 1, device);
    vmcore_device_delete(device);
    return error;
}

/* mov al, 10; next: out 0x42, al; dec al; jnz next; out 0x42, al; hlt */
static const uint8_t CODE[] = {0xb0, 10, 0xe6, 0x42, 0xfe, 0xc8, 0x75, 0xfa, 0xe6, 0x42, 0xf4};

int main(void) {
    vmcore_builder *builder = NULL;
    vmcore_vm *vm = NULL;
    vmcore_outcome outcome = {0};
    char how[64];

    vmcore_error *error = vmcore_builder_new(&builder);
    vmcore_builder_set_memory(builder, 64 << 10);
    vmcore_builder_set_irqchip(builder, false);
    if (!error) error = vmcore_builder_boot_raw(builder, CODE, sizeof CODE, VMCORE_RAW_REAL16);
    if (!error) error = vmcore_builder_attach(builder, attach, NULL, NULL);
    if (error) vmcore_builder_delete(builder);
    else error = vmcore_builder_build(builder, &vm);
    if (!error) error = vmcore_vm_run(vm, &outcome);
    vmcore_vm_delete(vm);
    if (error) {
        fprintf(stderr, "custom_device: %s\n", vmcore_error_message(error));
        vmcore_error_delete(error);
        return 1;
    }
    vmcore_outcome_format(outcome, how, sizeof how);
    if (outcome.kind == VMCORE_OUTCOME_EXIT) printf("10 + 9 + ... + 1 = %u\n", outcome.value);
    else printf("the guest ended in another way: %s\n", how);
    return 0;
}
