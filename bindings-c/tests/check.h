/* What the tests share. A check that fails says where and ends the test. */
#ifndef CHECK_H
#define CHECK_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vmcore.h>

#define CHECK(what)                                                         \
    do {                                                                    \
        if (!(what)) {                                                      \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #what); \
            exit(1);                                                        \
        }                                                                   \
    } while (0)

/* A call that must not fail. */
#define OK(call) check_ok(__FILE__, __LINE__, call)
/* A call that must fail with this code. */
#define FAILS(code, call) check_fails(__FILE__, __LINE__, code, call)

/* A call that must fail with the error of this name. */
#define NAMED(name, call) check_named(__FILE__, __LINE__, name, call)

static inline void check_ok(const char *file, int line, vmcore_error *error) {
    if (error) {
        fprintf(stderr, "%s:%d: failed: %s\n", file, line, vmcore_error_message(error));
        exit(1);
    }
}

static inline void check_fails(const char *file, int line, vmcore_error_code code, vmcore_error *error) {
    if (vmcore_error_get_code(error) != code) {
        const char *said = error ? vmcore_error_message(error) : "it did not fail";
        fprintf(stderr, "%s:%d: code %u expected, got %u: %s\n", file, line, code, vmcore_error_get_code(error), said);
        exit(1);
    }
    CHECK(strlen(vmcore_error_message(error)) > 10);
    vmcore_error_delete(error);
}

static inline void check_named(const char *file, int line, const char *name, vmcore_error *error) {
    if (strcmp(vmcore_error_name(error), name) != 0) {
        const char *said = error ? vmcore_error_message(error) : "it did not fail";
        fprintf(stderr, "%s:%d: %s expected, got \"%s\": %s\n", file, line, name, vmcore_error_name(error), said);
        exit(1);
    }
    vmcore_error_delete(error);
}

/* Gives a bare VM 64 KiB, and a vCPU at `code`, which is at 0x1000. */
static inline void equip(vmcore_vm *vm, const void *code, size_t len, vmcore_vcpu **vcpu) {
    vmcore_memory *memory = NULL;
    OK(vmcore_vm_map(vm, 0, 0x10000));
    OK(vmcore_vm_memory(vm, &memory));
    OK(vmcore_memory_write(memory, 0x1000, (const uint8_t *)code, len));
    vmcore_memory_delete(memory);
    OK(vmcore_vm_create_vcpu(vm, 0, vcpu));
    OK(vmcore_vcpu_enter_real_mode(*vcpu, 0x1000));
}

/* One that is equipped so, of the software CPU. */
static inline vmcore_vm *bare(const void *code, size_t len, vmcore_vcpu **vcpu) {
    vmcore_vm *vm = NULL;
    OK(vmcore_vm_bare(VMCORE_ACCEL_SOFT, &vm));
    equip(vm, code, len, vcpu);
    return vm;
}

/* A builder of a VM of the software CPU that runs `code` in real mode. */
static inline vmcore_builder *built(const void *code, size_t len) {
    vmcore_builder *builder = NULL;
    OK(vmcore_builder_new(&builder));
    OK(vmcore_builder_set_accel(builder, VMCORE_ACCEL_SOFT));
    vmcore_builder_set_memory(builder, 1 << 20);
    OK(vmcore_builder_boot_raw(builder, (const uint8_t *)code, len, VMCORE_RAW_REAL16));
    return builder;
}

#endif
