/* A stock Linux with a virtio device in C: its kernel's driver has requests served. Wants the guests of `make guests` in
 * VMCORE_GUESTS; without, it does nothing, or fails where VMCORE_REQUIRE_BOOT is set. VMCORE_ACCEL=kvm has it on KVM
 * instead of the software CPU. */

#define _GNU_SOURCE
#include "check.h"

#include <stdatomic.h>
#include <unistd.h>

static atomic_size_t asked;

/* An entropy source (virtio 1.2, section 5.4) that has no surprises. */
static vmcore_served sevens(void *user, uint16_t queue, vmcore_chain *chain) {
    uint8_t bytes[64];
    size_t written = 0;
    (void)user;
    CHECK(queue == 0 && vmcore_chain_readable(chain) == 0);
    memset(bytes, 7, sizeof bytes);
    while (vmcore_chain_writable(chain) > 0) {
        OK(vmcore_chain_write(chain, bytes, sizeof bytes, &written));
        atomic_fetch_add(&asked, written);
    }
    return VMCORE_SERVED_DONE;
}

int main(void) {
    const char *guests = getenv("VMCORE_GUESTS");
    char kernel[4096], initrd[4096];
    snprintf(kernel, sizeof kernel, "%s/cloud/vmlinuz", guests ? guests : "");
    snprintf(initrd, sizeof initrd, "%s/cloud/initrd.img", guests ? guests : "");
    if (access(kernel, R_OK) != 0) {
        fprintf(stderr, "boot: no %s: run make guests, and set VMCORE_GUESTS\n", kernel);
        return getenv("VMCORE_REQUIRE_BOOT") ? 1 : 0;
    }
    static const vmcore_virtio_ops ops = {.size = sizeof ops, .serve = sevens};
    const uint16_t sizes[] = {8};
    vmcore_builder *builder = NULL;
    vmcore_console *console = NULL;
    vmcore_script *script = NULL;
    vmcore_virtio *device = NULL;
    vmcore_vm *vm = NULL;
    vmcore_bytes *text = NULL;
    vmcore_outcome outcome;

    OK(vmcore_builder_new(&builder));
    const char *accel = getenv("VMCORE_ACCEL");
    OK(vmcore_builder_set_accel(builder, accel && !strcmp(accel, "kvm") ? VMCORE_ACCEL_KVM : VMCORE_ACCEL_SOFT));
    vmcore_builder_set_memory(builder, 256 << 20);
    OK(vmcore_builder_boot_linux(builder, kernel, initrd, "console=ttyS0 quiet vmtest=devices"));
    OK(vmcore_console_script(&script, &console));
    OK(vmcore_builder_add_serial(builder, console));
    OK(vmcore_virtio_new(4, 0, sizes, 1, &ops, NULL, &device));
    OK(vmcore_builder_add_virtio(builder, device));
    OK(vmcore_builder_build(builder, &vm));
    OK(vmcore_vm_run_for(vm, 600000, &outcome));
    OK(vmcore_script_transcript(script, &text));
    if (outcome.kind != VMCORE_OUTCOME_POWER_OFF || !strstr(vmcore_bytes_text(text), "hwrng virtio_rng.0 bytes=32")) {
        fprintf(stderr, "%s\n", vmcore_bytes_text(text));
        CHECK(!"the guest finds the device and powers off");
    }
    CHECK(atomic_load(&asked) >= 32);
    vmcore_bytes_delete(text);
    vmcore_vm_delete(vm);
    vmcore_virtio_delete(device);
    vmcore_script_delete(script);
    return 0;
}
