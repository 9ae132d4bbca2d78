/* Devices of the program's: at ports, at addresses, and virtio. */

#include "check.h"

typedef struct cell {
    uint8_t value;
    int dropped;
} cell;

static void cell_read(void *user, uint64_t offset, uint8_t *data, size_t len) {
    memset(data, ((cell *)user)->value + (int)offset, len);
}
static void cell_write(void *user, uint64_t offset, const uint8_t *data, size_t len) {
    (void)offset, (void)len;
    ((cell *)user)->value = data[0];
}
static vmcore_error *cell_save(void *user, vmcore_bytes **state) {
    *state = vmcore_bytes_new(&((cell *)user)->value, 1);
    return NULL;
}
static void cell_drop(void *user) { ((cell *)user)->dropped++; }

static const vmcore_device_ops OPS = {
    .size = sizeof OPS, .read = cell_read, .write = cell_write, .save = cell_save, .drop = cell_drop};

/* mov al, 5; out 0x40, al; in al, 0x41; mov bl, al; mov ax, 0x2000; mov ds, ax; mov cl, [2]; hlt */
static const uint8_t CODE[] = {0xb0, 5,    0xe6, 0x40, 0xe4, 0x41, 0x88, 0xc3, 0xb8, 0,
                               0x20, 0x8e, 0xd8, 0x8a, 0x0e, 2,    0,    0xf4};

static void bare_vm(void) {
    cell state = {0};
    vmcore_device *device = NULL;
    vmcore_vcpu *vcpu = NULL;
    vmcore_exit end;
    vmcore_regs regs;
    vmcore_vm *vm = bare(CODE, sizeof CODE, &vcpu);
    vmcore_device_ops broken = OPS;
    broken.size = 0;
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_device_new(&broken, &state, &device));
    broken.size = sizeof broken;
    broken.write = NULL;
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_device_new(&broken, &state, &device));
    /* A program of an older version knows less of the table. */
    vmcore_device_ops old = OPS;
    old.size = offsetof(vmcore_device_ops, save);
    OK(vmcore_device_new(&old, &state, &device));
    vmcore_device_delete(device);
    CHECK(state.dropped == 0);
    OK(vmcore_device_new(&OPS, &state, &device));
    OK(vmcore_vm_insert_ports(vm, 0x40, 2, device));
    OK(vmcore_vm_insert_mmio(vm, 0x20000, 0x1000, device));
    FAILS(VMCORE_ERROR_CONFLICT, vmcore_vm_insert_ports(vm, 0x41, 1, device));
    vmcore_device_delete(device);
    OK(vmcore_vcpu_run(vcpu, &end));
    OK(vmcore_vcpu_regs(vcpu, &regs));
    CHECK(end.kind == VMCORE_EXIT_HALTED && (regs.rbx & 0xff) == 6 && (regs.rcx & 0xff) == 7);
    vmcore_vm_delete(vm);
    vmcore_vcpu_delete(vcpu);
    CHECK(state.dropped == 1);
}

static vmcore_error *attach(void *user, vmcore_machine *machine) {
    vmcore_device *device = NULL;
    vmcore_memory *memory = NULL;
    vmcore_irq *irq = NULL;
    uint64_t window = 0;
    uint32_t gsi = 0;
    OK(vmcore_device_new(&OPS, user, &device));
    OK(vmcore_machine_insert_ports(machine, 0x40, 2, device));
    OK(vmcore_machine_mmio_window(machine, 0x1000, &window));
    OK(vmcore_machine_insert_mmio(machine, window, 0x1000, device));
    OK(vmcore_machine_allocate_gsi(machine, &gsi));
    OK(vmcore_machine_irq(machine, gsi, &irq));
    OK(vmcore_irq_set(irq, true));
    vmcore_irq_delete(irq);
    OK(vmcore_machine_memory(machine, &memory));
    CHECK(vmcore_memory_total(memory) == 1 << 20 && window >= 1 << 20);
    vmcore_memory_delete(memory);
    vmcore_device_delete(device);
    return NULL;
}

static vmcore_error *refuse(void *user, vmcore_machine *machine) {
    (void)user, (void)machine;
    return vmcore_error_new(VMCORE_ERROR_CONFIG, "not on this machine", "choose another");
}

static void count(void *user) { ++*(int *)user; }

static void built_vm(void) {
    cell state = {0};
    vmcore_vm *vm = NULL;
    vmcore_pause *pause = NULL;
    vmcore_bytes *hash = NULL;
    int dropped = 0;
    vmcore_builder *builder = built(CODE, sizeof CODE);
    OK(vmcore_builder_attach(builder, attach, &state, NULL));
    OK(vmcore_builder_build(builder, &vm));
    OK(vmcore_vm_pause(vm, &pause));
    OK(vmcore_pause_hash(pause, &hash));
    vmcore_bytes_delete(hash);
    vmcore_vm_delete(vm);
    CHECK(state.dropped == 0);
    vmcore_pause_delete(pause);
    CHECK(state.dropped == 1);

    builder = built(CODE, sizeof CODE);
    OK(vmcore_builder_attach(builder, refuse, &dropped, count));
    vmcore_error *error = vmcore_builder_build(builder, &vm);
    CHECK(strstr(vmcore_error_message(error), "not on this machine") && dropped == 1);
    CHECK(strcmp(vmcore_error_fix(error), "choose another") == 0);
    FAILS(VMCORE_ERROR_DEVICE, error);
}

static vmcore_served serve(void *user, uint16_t queue, vmcore_chain *chain) {
    (void)user, (void)queue, (void)chain;
    return VMCORE_SERVED_DONE;
}

static void virtio(void) {
    int dropped = 0;
    uint16_t sizes[] = {64, 3};
    vmcore_virtio_ops ops = {.size = sizeof ops, .serve = serve, .drop = count};
    vmcore_virtio *device = NULL;
    vmcore_vm *vm = NULL;
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_virtio_new(42, 0, sizes, 2, &ops, &dropped, &device));
    OK(vmcore_virtio_new(42, 0, sizes, 1, &ops, &dropped, &device));
    vmcore_builder *builder = built(CODE, sizeof CODE);
    OK(vmcore_builder_add_virtio(builder, device));
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_builder_add_virtio(builder, device));
    OK(vmcore_builder_build(builder, &vm));
    vmcore_virtio_wake(device);
    vmcore_vm_delete(vm);
    vmcore_virtio_delete(device);
    CHECK(dropped == 1);

    vmcore_balloon *balloon = NULL;
    vmcore_vsock *vsock = NULL;
    OK(vmcore_balloon_new(&balloon));
    OK(vmcore_balloon_set_target(balloon, 4096));
    FAILS(VMCORE_ERROR_CONFIG, vmcore_balloon_set_target(balloon, UINT64_MAX));
    FAILS(VMCORE_ERROR_CONFIG, vmcore_vsock_new(1, &vsock));
    OK(vmcore_vsock_new(3, &vsock));
    builder = built(CODE, sizeof CODE);
    OK(vmcore_builder_set_transport(builder, VMCORE_TRANSPORT_PCI));
    OK(vmcore_builder_add_balloon(builder, balloon));
    OK(vmcore_builder_add_vsock(builder, vsock));
    vmcore_builder_add_rng(builder);
    OK(vmcore_builder_build(builder, &vm));
    CHECK(vmcore_balloon_actual(balloon) == 0);
    vmcore_vm_delete(vm);
    vmcore_balloon_delete(balloon);
    vmcore_vsock_delete(vsock);
}

int main(void) {
    bare_vm();
    built_vm();
    virtio();
    return 0;
}
