/* What pointers to const promise: many threads at one VM. */

#include "check.h"

#include <pthread.h>
#include <stdatomic.h>

/* inc ebx; mov [0x2000], ebx; jmp back */
static const uint8_t COUNT[] = {0x66, 0x43, 0x66, 0x89, 0x1e, 0, 0x20, 0xeb, 0xf7};

static atomic_bool over;

static void *hold(void *argument) {
    const vmcore_vm *vm = argument;
    for (int i = 0; i < 20; i++) {
        vmcore_pause *pause = NULL;
        vmcore_state *state = NULL;
        OK(vmcore_vm_pause(vm, &pause));
        OK(vmcore_pause_save(pause, &state));
        vmcore_state_delete(state);
        vmcore_pause_delete(pause);
    }
    return NULL;
}

static void *look(void *argument) {
    vmcore_memory *memory = argument;
    uint8_t bytes[64];
    while (!atomic_load(&over)) {
        OK(vmcore_memory_write(memory, 0x9000, bytes, 0));
        OK(vmcore_memory_read(memory, 0x9000, bytes, sizeof bytes));
    }
    return NULL;
}

static void *one_vm(void *argument) {
    vmcore_vcpu *vcpu = NULL;
    vmcore_exit end;
    static const uint8_t HLT[] = {0xf4};
    (void)argument;
    for (int i = 0; i < 5; i++) {
        vmcore_vm *vm = bare(HLT, sizeof HLT, &vcpu);
        OK(vmcore_vcpu_run(vcpu, &end));
        CHECK(end.kind == VMCORE_EXIT_HALTED);
        vmcore_vm_delete(vm);
        vmcore_vcpu_delete(vcpu);
    }
    return NULL;
}

int main(void) {
    vmcore_vm *vm = NULL;
    vmcore_memory *memory = NULL;
    vmcore_outcome outcome;
    pthread_t threads[4];
    vmcore_builder *builder = built(COUNT, sizeof COUNT);
    OK(vmcore_builder_build(builder, &vm));
    OK(vmcore_vm_memory(vm, &memory));
    for (int i = 0; i < 2; i++) CHECK(pthread_create(&threads[i], NULL, hold, vm) == 0);
    for (int i = 2; i < 4; i++) CHECK(pthread_create(&threads[i], NULL, look, memory) == 0);
    OK(vmcore_vm_run_for(vm, 200, &outcome));
    CHECK(outcome.kind == VMCORE_OUTCOME_TIME_LIMIT);
    atomic_store(&over, true);
    for (int i = 0; i < 4; i++) CHECK(pthread_join(threads[i], NULL) == 0);
    vmcore_memory_delete(memory);
    vmcore_vm_delete(vm);
    for (int i = 0; i < 4; i++) CHECK(pthread_create(&threads[i], NULL, one_vm, NULL) == 0);
    for (int i = 0; i < 4; i++) CHECK(pthread_join(threads[i], NULL) == 0);
    return 0;
}
