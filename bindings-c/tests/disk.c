/* Disks, as far as they go without a guest that reads them. */

#define _GNU_SOURCE
#include "check.h"

#include <unistd.h>

static const uint8_t HLT[] = {0xf4};

int main(void) {
    char path[] = "/tmp/vmcore-c-XXXXXX";
    int fd = mkstemp(path);
    CHECK(fd >= 0 && ftruncate(fd, 1 << 20) == 0);
    vmcore_disk *disk = NULL, *second = NULL;
    vmcore_image *image = NULL;
    vmcore_disk_stats stats;
    vmcore_vm *vm = NULL;

    OK(vmcore_disk_open(path, &disk));
    CHECK(vmcore_disk_len(disk) == 1 << 20);
    FAILS(VMCORE_ERROR_DEVICE, vmcore_disk_open(path, &second));
    OK(vmcore_disk_set_serial(disk, "c-disk"));
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_disk_set_serial(disk, "a serial number beyond 20 bytes"));
    OK(vmcore_disk_set_queues(disk, 2));
    OK(vmcore_disk_set_cache(disk, VMCORE_CACHE_WRITETHROUGH));
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_disk_set_cache(disk, 9));
    vmcore_disk_set_limits(disk, 100, 0);
    vmcore_builder *builder = built(HLT, sizeof HLT);
    OK(vmcore_builder_add_disk(builder, disk));
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_builder_add_disk(builder, disk));
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_disk_set_queues(disk, 2));
    OK(vmcore_builder_build(builder, &vm));
    OK(vmcore_disk_resize(disk, 2 << 20));
    CHECK(vmcore_disk_len(disk) == 2 << 20);
    FAILS(VMCORE_ERROR_DEVICE, vmcore_disk_resize(disk, 1 << 20));
    OK(vmcore_disk_get_stats(disk, &stats));
    CHECK(stats.reads == 0 && stats.errors == 0);
    vmcore_vm_delete(vm);
    vmcore_disk_delete(disk);

    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_image_new(path, "floppy", &image));
    OK(vmcore_image_new(path, "qcow2", &image));
    FAILS(VMCORE_ERROR_DEVICE, vmcore_disk_open_image(image, &disk));
    OK(vmcore_image_new(path, "raw", &image));
    vmcore_image_set_read_only(image);
    OK(vmcore_disk_open_image(image, &disk));
    vmcore_disk_delete(disk);
    vmcore_disk_delete(NULL);
    close(fd);
    unlink(path);
    return 0;
}
