/* Each kind of error, by its code. CONFLICT is in device.c; ENTRY_FAILED, which takes a KVM with registers that no KVM
 * accepts in the first place, is in src/error.rs. errors.rs sees to it that none is forgotten. */

#define _GNU_SOURCE
#include "check.h"

#include <errno.h>
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

static const uint8_t HLT[] = {0xf4};

/* In a process whose root is an empty directory there is no KVM device. */
static void without_kvm(void) {
    pid_t child = fork();
    if (child == 0) {
        char directory[] = "/tmp/vmcore-c-XXXXXX";
        if (!mkdtemp(directory)) _exit(2);
        if (geteuid() != 0 && unshare(CLONE_NEWUSER) != 0) _exit(77);
        int jailed = chroot(directory);
        if (jailed != 0) _exit(77);
        vmcore_vm *vm = NULL;
        vmcore_error *error = vmcore_vm_bare(VMCORE_ACCEL_KVM, &vm);
        CHECK(vmcore_error_fix(error) && strlen(vmcore_error_fix(error)) > 3);
        FAILS(VMCORE_ERROR_BACKEND_UNUSABLE, error);
        _exit(0);
    }
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status));
    if (WEXITSTATUS(status) == 77) fprintf(stderr, "error: not checked without a right to chroot: BACKEND_UNUSABLE\n");
    else CHECK(WEXITSTATUS(status) == 0);
}

int main(void) {
    /* First: what the parent has is not lost in the child. */
    without_kvm();
    vmcore_vcpu *vcpu = NULL;
    vmcore_vm *vm = bare(HLT, sizeof HLT, &vcpu);
    vmcore_outcome outcome;
    vmcore_exit end;

    FAILS(VMCORE_ERROR_MEMORY, vmcore_vm_map(vm, 0x1000, 0x1000));
    vmcore_builder *builder = NULL;
    OK(vmcore_builder_new(&builder));
    OK(vmcore_builder_set_accel(builder, VMCORE_ACCEL_SOFT));
    OK(vmcore_builder_boot_linux(builder, "/no/such/kernel", NULL, ""));
    vmcore_vm *none = NULL;
    vmcore_error *error = vmcore_builder_build(builder, &none);
    CHECK(vmcore_error_errno(error) == ENOENT && none == NULL);
    CHECK(strstr(vmcore_error_fix(error), "path") && strstr(vmcore_error_message(error), "/no/such/kernel"));
    FAILS(VMCORE_ERROR_BOOT, error);

    vmcore_console *console = NULL;
    error = vmcore_console_file("/no/such/directory/file", false, &console);
    CHECK(vmcore_error_errno(error) == ENOENT);
    FAILS(VMCORE_ERROR_OS, error);
    /* jmp 0x3000:0, where no memory is */
    static const uint8_t AWAY[] = {0xea, 0, 0, 0, 0x30};
    vmcore_vcpu *lost = NULL;
    vmcore_vm *maze = bare(AWAY, sizeof AWAY, &lost);
    FAILS(VMCORE_ERROR_EMULATION, vmcore_vcpu_run(lost, &end));
    vmcore_vm_delete(maze);
    vmcore_vcpu_delete(lost);
    FAILS(VMCORE_ERROR_UNSUPPORTED, vmcore_vcpu_run_instructions(vcpu, 1, &end));
    FAILS(VMCORE_ERROR_CONFIG, vmcore_vcpu_enter_real_mode(vcpu, 0x200000));
    OK(vmcore_builder_new(&builder));
    OK(vmcore_builder_set_accel(builder, VMCORE_ACCEL_SOFT));
    error = vmcore_builder_build(builder, &none);
    FAILS(VMCORE_ERROR_CONFIG, error);
    FAILS(VMCORE_ERROR_WRONG_STATE, vmcore_vm_run(vm, &outcome));
    vmcore_disk *disk = NULL;
    error = vmcore_disk_open("/no/such/disk", &disk);
    CHECK(vmcore_error_errno(error) == ENOENT);
    FAILS(VMCORE_ERROR_DEVICE, error);
    vmcore_state *state = NULL;
    FAILS(VMCORE_ERROR_STATE, vmcore_state_from_bytes((const uint8_t *)"nonsense", 8, &state));

    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_vm_map(NULL, 0, 0x1000));
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_vm_bare(77, &none));
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_vm_bare(VMCORE_ACCEL_SOFT, NULL));
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_disk_open(NULL, &disk));
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_disk_open("\xff\xfe", &disk));

    error = vmcore_error_new(VMCORE_ERROR_OTHER, "a message of one's own", NULL);
    CHECK(vmcore_error_fix(error) == NULL && vmcore_error_errno(error) == 0);
    FAILS(VMCORE_ERROR_OTHER, error);
    vmcore_error_delete(NULL);
    CHECK(vmcore_error_get_code(NULL) == 0 && *vmcore_error_message(NULL) == 0);
    CHECK(strcmp(vmcore_version(), VMCORE_VERSION) == 0);
    vmcore_vcpu_delete(vcpu);
    vmcore_vm_delete(vm);
    return 0;
}
