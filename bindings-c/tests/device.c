/* Devices of the program's: at ports, at addresses, and virtio. */

#define _GNU_SOURCE
#include "driver.h"

#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

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
    /* By its base, once; then nobody answers there, and the other place goes on. */
    bool there = true;
    OK(vmcore_vm_remove_ports(vm, 0x41, &there));
    CHECK(!there);
    OK(vmcore_vm_remove_ports(vm, 0x40, &there));
    CHECK(there);
    OK(vmcore_vm_remove_ports(vm, 0x40, &there));
    CHECK(!there && state.dropped == 0);
    OK(vmcore_vcpu_enter_real_mode(vcpu, 0x1000));
    OK(vmcore_vcpu_run(vcpu, &end));
    OK(vmcore_vcpu_regs(vcpu, &regs));
    CHECK((regs.rbx & 0xff) == 0xff && (regs.rcx & 0xff) == 7);
    OK(vmcore_vm_remove_mmio(vm, 0x20000, &there));
    CHECK(there);
    OK(vmcore_vm_remove_mmio(vm, 0x20000, &there));
    CHECK(!there);
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

/* A device that gives the request back in capitals; its first requests it is not ready for. */
typedef struct capitals {
    atomic_uint served;
    unsigned early, dropped;
    uint64_t features;
    vmcore_virtio *device;
} capitals;

static vmcore_served capitals_serve(void *user, uint16_t queue, vmcore_chain *chain) {
    capitals *self = user;
    uint8_t text[16];
    size_t len = 0, written = 0;
    CHECK(queue == 1);
    CHECK(vmcore_chain_readable(chain) == 6 && vmcore_chain_writable(chain) == 8);
    if (self->early > 0) {
        self->early--;
        return VMCORE_SERVED_LATER;
    }
    OK(vmcore_chain_read(chain, text, 4, &len));
    CHECK(len == 4 && vmcore_chain_readable(chain) == 2);
    OK(vmcore_chain_read(chain, text + 4, sizeof text - 4, &len));
    CHECK(len == 2);
    for (size_t i = 0; i < 6; i++) text[i] = (uint8_t)(text[i] - 'a' + 'A');
    OK(vmcore_chain_write(chain, text, 6, &written));
    CHECK(written == 6 && vmcore_chain_writable(chain) == 2);
    atomic_fetch_add(&self->served, 1);
    return VMCORE_SERVED_DONE;
}

static vmcore_error *capitals_activate(void *user, uint64_t features) {
    ((capitals *)user)->features = features;
    return NULL;
}

static void capitals_config(void *user, uint64_t offset, uint8_t *data, size_t len) {
    (void)user;
    for (size_t i = 0; i < len; i++) data[i] = (uint8_t)(offset + i + 1);
}

static void capitals_drop(void *user) { ((capitals *)user)->dropped++; }

static void *waker(void *user) {
    capitals *self = user;
    while (atomic_load(&self->served) < 2) {
        vmcore_virtio_wake(self->device);
        usleep(1000);
    }
    return NULL;
}

/* A driver puts two requests on the second queue of a device in C, and reads its configuration. */
static void served(void) {
    static const vmcore_virtio_ops ops = {
        .size = sizeof ops, .serve = capitals_serve, .read_config = capitals_config, .activate = capitals_activate,
        .drop = capitals_drop};
    const uint16_t sizes[] = {8, 64};
    const char words[] = "vmcoredevice";
    capitals self = {.early = 3};
    driver driver;
    vmcore_vm *vm = NULL;
    vmcore_outcome outcome;
    pthread_t thread;
    uint8_t answers[16];
    uint32_t config = 0;

    OK(vmcore_virtio_new(42, 1ull << 32 | 1, sizes, 2, &ops, &self, &self.device));
    vmcore_builder *builder = driver_builder(&driver);
    OK(vmcore_builder_add_virtio(builder, self.device));
    OK(vmcore_builder_build(builder, &vm));
    driver_begin(&driver, vm, 2);
    OK(vmcore_memory_write(driver.memory, DRIVER_DATA, (const uint8_t *)words, 12));
    for (uint32_t i = 0; i < 2; i++) {
        const piece pieces[] = {{DRIVER_DATA + 6 * i, 6, false}, {DRIVER_DATA + 0x100 + 8 * i, 8, true}};
        driver_offer(&driver, 1, pieces, 2);
    }
    driver_notify(&driver, 1);
    driver_await(&driver, 1);
    /* mov eax, [window + 0x104]; mov [DRIVER_DATA + 0x200], eax */
    driver_emit(&driver, "\xa1", 1), driver_word(&driver, (uint32_t)driver.window + 0x104);
    driver_emit(&driver, "\xa3", 1), driver_word(&driver, DRIVER_DATA + 0x200);
    driver_end(&driver, 7);
    CHECK(pthread_create(&thread, NULL, waker, &self) == 0);
    OK(vmcore_vm_run(vm, &outcome));
    CHECK(outcome.kind == VMCORE_OUTCOME_EXIT && outcome.value == 7);
    CHECK(pthread_join(thread, NULL) == 0);
    OK(vmcore_memory_read(driver.memory, DRIVER_DATA + 0x100, answers, sizeof answers));
    CHECK(memcmp(answers, "VMCORE\0\0DEVICE\0\0", 16) == 0);
    CHECK(driver_written(&driver, 1, 0) == 6 && driver_written(&driver, 1, 1) == 6);
    OK(vmcore_memory_read(driver.memory, DRIVER_DATA + 0x200, (uint8_t *)&config, sizeof config));
    CHECK(config == 0x08070605);
    vmcore_vm_delete(vm);
    CHECK(driver_wanted(&driver, 1) == 2);
    vmcore_memory_delete(driver.memory);
    CHECK(atomic_load(&self.served) == 2 && self.early == 0 && self.features == (1ull << 32 | 1ull << 29));
    vmcore_virtio_delete(self.device);
    CHECK(self.dropped == 1);
}

/* The guest connects to a port of the host (virtio 1.2, section 5.10). */
static void vsock(void) {
    const struct {
        uint64_t from, to;
        uint32_t from_port, to_port, len;
        uint16_t type, op;
        uint32_t flags, room, taken;
    } request = {3, 2, 1000, 5, 0, 1 /* stream */, 1 /* VIRTIO_VSOCK_OP_REQUEST */, 0, 65536, 0};
    enum { PACKET = 44 };
    const piece packet = {DRIVER_DATA, PACKET, false};
    vmcore_vsock *vsock = NULL;
    vmcore_vsock_listener *listener = NULL, *second = NULL;
    vmcore_vm *vm = NULL;
    vmcore_outcome outcome;
    driver driver;
    int stream = -1;

    OK(vmcore_vsock_new(3, &vsock));
    vmcore_builder *builder = driver_builder(&driver);
    OK(vmcore_builder_add_vsock(builder, vsock));
    OK(vmcore_builder_build(builder, &vm));
    OK(vmcore_vsock_listen(vsock, 5, &listener));
    FAILS(VMCORE_ERROR_OS, vmcore_vsock_listen(vsock, 5, &second));
    FAILS(VMCORE_ERROR_OS, vmcore_vsock_listener_accept(listener, 1, &stream));
    driver_begin(&driver, vm, 3);
    OK(vmcore_memory_write(driver.memory, DRIVER_DATA, (const uint8_t *)&request, PACKET));
    driver_offer(&driver, 1, &packet, 1);
    driver_notify(&driver, 1);
    driver_await(&driver, 1);
    driver_end(&driver, 7);
    OK(vmcore_vm_run(vm, &outcome));
    CHECK(outcome.kind == VMCORE_OUTCOME_EXIT && outcome.value == 7);
    OK(vmcore_vsock_listener_accept(listener, 10000, &stream));
    CHECK(stream >= 0 && close(stream) == 0);
    vmcore_vsock_listener_delete(listener);
    OK(vmcore_vsock_listen(vsock, 5, &listener));
    vmcore_memory_delete(driver.memory);
    vmcore_vm_delete(vm);
    vmcore_vsock_listener_delete(listener);
    vmcore_vsock_listener_delete(NULL);
    vmcore_vsock_delete(vsock);
}

int main(void) {
    bare_vm();
    built_vm();
    virtio();
    served();
    vsock();
    return 0;
}
