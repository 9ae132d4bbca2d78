/* Boots a stock Linux kernel with a disk on this terminal: `boot_linux KERNEL INITRD DISK`. */

#include <stdio.h>
#include <vmcore.h>

int main(int count, char **arguments) {
    if (count != 4) return fprintf(stderr, "usage: boot_linux KERNEL INITRD DISK\n"), 2;
    vmcore_builder *builder = NULL;
    vmcore_console *console = NULL;
    vmcore_disk *disk = NULL;
    vmcore_vm *vm = NULL;
    vmcore_outcome outcome = {0};
    char how[64];

    vmcore_error *error = vmcore_builder_new(&builder);
    vmcore_builder_set_memory(builder, 512 << 20);
    const char *cmdline = "console=ttyS0 root=/dev/vda rw";
    if (!error) error = vmcore_builder_boot_linux(builder, arguments[1], arguments[2], cmdline);
    if (!error) error = vmcore_console_stdio(&console);
    if (!error) error = vmcore_builder_add_serial(builder, console);
    if (!error) error = vmcore_disk_open(arguments[3], &disk);
    if (!error) error = vmcore_builder_add_disk(builder, disk);
    if (error) vmcore_builder_delete(builder);
    else error = vmcore_builder_build(builder, &vm);
    if (!error) error = vmcore_vm_run(vm, &outcome);

    /* The terminal gets its settings back before the last words. */
    vmcore_vm_delete(vm);
    vmcore_disk_delete(disk);
    if (error) return fprintf(stderr, "boot_linux: %s\n", vmcore_error_message(error)), 1;
    vmcore_outcome_format(outcome, how, sizeof how);
    printf("the guest ended: %s\n", how);
    return 0;
}
