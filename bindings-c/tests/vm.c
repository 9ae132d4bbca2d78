/* Built VMs: run, stop, pause, save, restore; the same in every run. */

#include "check.h"

/* mov al, 7; out 0xf4, al; hlt */
static const uint8_t EXIT7[] = {0xb0, 7, 0xe6, 0xf4, 0xf4};
/* inc ebx; jmp back */
static const uint8_t COUNT[] = {0x66, 0x43, 0xeb, 0xfc};

static vmcore_vm *counting(bool deterministic) {
    vmcore_vm *vm = NULL;
    vmcore_builder *builder = built(COUNT, sizeof COUNT);
    if (deterministic) vmcore_builder_set_deterministic(builder, 7);
    OK(vmcore_builder_build(builder, &vm));
    return vm;
}

int main(void) {
    vmcore_vm *vm = NULL, *other = NULL;
    vmcore_outcome outcome;
    vmcore_vcpu_stats stats;
    char text[16];

    vmcore_builder *builder = built(EXIT7, sizeof EXIT7);
    vmcore_builder_set_exit_port(builder, 0xf4);
    vmcore_builder_set_cpus(builder, 2);
    OK(vmcore_builder_set_cpu_model(builder, "v2"));
    FAILS(VMCORE_ERROR_CONFIG, vmcore_builder_set_cpu_model(builder, "v9"));
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_builder_set_transport(builder, 9));
    OK(vmcore_builder_build(builder, &vm));
    CHECK(strcmp(vmcore_vm_backend(vm), "soft") == 0);
    OK(vmcore_vm_run(vm, &outcome));
    CHECK(outcome.kind == VMCORE_OUTCOME_EXIT && outcome.value == 7);
    CHECK(vmcore_outcome_format(outcome, text, sizeof text) == 7 && strcmp(text, "Exit(7)") == 0);
    CHECK(vmcore_outcome_format(outcome, text, 4) == 7 && strcmp(text, "Exi") == 0);
    CHECK(vmcore_outcome_format(outcome, NULL, 0) == 7);
    OK(vmcore_vm_get_stats(vm, &stats));
    CHECK(stats.port >= 1);
    FAILS(VMCORE_ERROR_WRONG_STATE, vmcore_vm_run(vm, &outcome));
    vmcore_vm_delete(vm);

    builder = built(EXIT7, sizeof EXIT7);
    vmcore_builder_set_cpus(builder, 9999);
    FAILS(VMCORE_ERROR_CONFIG, vmcore_builder_build(builder, &vm));

    vm = counting(false);
    OK(vmcore_vm_run_for(vm, 20, &outcome));
    CHECK(outcome.kind == VMCORE_OUTCOME_TIME_LIMIT);
    vmcore_vm_stop(vm);
    OK(vmcore_vm_run(vm, &outcome));
    CHECK(outcome.kind == VMCORE_OUTCOME_STOPPED);
    FAILS(VMCORE_ERROR_WRONG_STATE, vmcore_vm_run_instructions(vm, 1, &outcome));

    /* Its state, through bytes, into another that was built alike. */
    vmcore_pause *pause = NULL;
    vmcore_state *state = NULL, *again = NULL;
    vmcore_bytes *bytes = NULL, *more = NULL;
    OK(vmcore_vm_pause(vm, &pause));
    OK(vmcore_pause_save(pause, &state));
    OK(vmcore_state_to_bytes(state, &bytes));
    vmcore_pause_delete(pause);
    vmcore_vm_delete(vm);
    OK(vmcore_state_from_bytes(vmcore_bytes_data(bytes), vmcore_bytes_len(bytes), &again));
    FAILS(VMCORE_ERROR_STATE,
          vmcore_state_from_bytes(vmcore_bytes_data(bytes), vmcore_bytes_len(bytes) / 2, &state));
    other = counting(false);
    OK(vmcore_vm_pause(other, &pause));
    OK(vmcore_pause_restore(pause, again));
    vmcore_state_delete(state);
    OK(vmcore_pause_save(pause, &state));
    OK(vmcore_state_to_bytes(state, &more));
    vmcore_pause_delete(pause);
    CHECK(vmcore_bytes_len(bytes) > 1000 && vmcore_bytes_len(more) > 1000);
    OK(vmcore_vm_run_for(other, 20, &outcome));
    CHECK(outcome.kind == VMCORE_OUTCOME_TIME_LIMIT);
    vmcore_bytes_delete(bytes);
    vmcore_bytes_delete(more);
    vmcore_state_delete(again);

    /* The state of a VM is none of a vCPU's. */
    vmcore_vcpu *vcpu = NULL;
    vmcore_vm *alone = bare(COUNT, sizeof COUNT, &vcpu);
    FAILS(VMCORE_ERROR_STATE, vmcore_vcpu_restore(vcpu, state));
    vmcore_state_delete(state);
    OK(vmcore_vcpu_save(vcpu, &state));
    OK(vmcore_vcpu_restore(vcpu, state));
    vmcore_state_delete(state);
    vmcore_vcpu_delete(vcpu);
    vmcore_vm_delete(alone);
    vmcore_vm_delete(other);

    /* Two runs of a deterministic one are equal. */
    vmcore_bytes *hashes[2];
    for (int run = 0; run < 2; run++) {
        uint64_t count = 0;
        vm = counting(true);
        OK(vmcore_vm_run_instructions(vm, 100000, &outcome));
        CHECK(outcome.kind == VMCORE_OUTCOME_INSTRUCTION_LIMIT);
        OK(vmcore_vm_instructions(vm, &count));
        CHECK(count == 100000);
        OK(vmcore_vm_pause(vm, &pause));
        OK(vmcore_pause_hash(pause, &hashes[run]));
        vmcore_pause_delete(pause);
        vmcore_vm_delete(vm);
    }
    CHECK(vmcore_bytes_len(hashes[0]) == 64);
    CHECK(strcmp(vmcore_bytes_text(hashes[0]), vmcore_bytes_text(hashes[1])) == 0);
    vmcore_bytes_delete(hashes[0]);
    vmcore_bytes_delete(hashes[1]);
    vmcore_vm_delete(NULL);
    vmcore_builder_delete(NULL);
    vmcore_pause_delete(NULL);
    return 0;
}
