/* Disks: how they are set up, and what becomes of a guest whose disk the host fails. */

#define _GNU_SOURCE
#include "driver.h"

#include <unistd.h>

static const uint8_t HLT[] = {0xf4};

static void settings(const char *path) {
    vmcore_disk *disk = NULL, *second = NULL;
    vmcore_image *image = NULL;
    vmcore_disk_stats stats;
    vmcore_vm *vm = NULL;
    vmcore_bytes *why = NULL;

    OK(vmcore_disk_open(path, &disk));
    CHECK(vmcore_disk_len(disk) == 1 << 20);
    NAMED("disk.locked", vmcore_disk_open(path, &second));
    OK(vmcore_disk_set_serial(disk, "c-disk"));
    NAMED("disk.id", vmcore_disk_set_serial(disk, "a serial number beyond 20 bytes"));
    OK(vmcore_disk_set_queues(disk, 2));
    OK(vmcore_disk_set_cache(disk, VMCORE_CACHE_WRITETHROUGH));
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_disk_set_cache(disk, 9));
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_disk_set_on_error(disk, VMCORE_ON_ERROR_STOP, 9));
    OK(vmcore_disk_set_on_error(disk, VMCORE_ON_ERROR_IGNORE, VMCORE_ON_ERROR_STOP_IF_FULL));
    vmcore_disk_set_limits(disk, 100, 0);
    vmcore_builder *builder = built(HLT, sizeof HLT);
    OK(vmcore_builder_add_disk(builder, disk));
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_builder_add_disk(builder, disk));
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_disk_set_queues(disk, 2));
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_disk_set_on_error(disk, VMCORE_ON_ERROR_STOP, VMCORE_ON_ERROR_STOP));
    OK(vmcore_builder_build(builder, &vm));
    OK(vmcore_disk_resize(disk, 2 << 20));
    CHECK(vmcore_disk_len(disk) == 2 << 20);
    NAMED("disk.resize", vmcore_disk_resize(disk, 1 << 20));
    OK(vmcore_disk_get_stats(disk, &stats));
    CHECK(stats.reads == 0 && stats.errors == 0);
    OK(vmcore_disk_stopped(disk, &why));
    CHECK(why == NULL);
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
}

/* A guest that reads sector 16 and then ends. */
static vmcore_vm *reader(const char *path, vmcore_on_error reads, driver *driver, vmcore_disk **disk) {
    vmcore_vm *vm = NULL;
    const uint32_t head[] = {0 /* VIRTIO_BLK_T_IN */, 0, 16, 0};
    const uint8_t unanswered = 0xee;
    const piece pieces[] = {{DRIVER_DATA, 16, false}, {DRIVER_DATA + 0x1000, 512, true}, {DRIVER_DATA + 0x2000, 1, true}};
    vmcore_builder *builder = driver_builder(driver);
    OK(vmcore_disk_open(path, disk));
    OK(vmcore_disk_set_on_error(*disk, reads, VMCORE_ON_ERROR_REPORT));
    OK(vmcore_builder_add_disk(builder, *disk));
    OK(vmcore_builder_build(builder, &vm));
    driver_begin(driver, vm, 1);
    OK(vmcore_memory_write(driver->memory, DRIVER_DATA, (const uint8_t *)head, sizeof head));
    OK(vmcore_memory_write(driver->memory, DRIVER_DATA + 0x2000, &unanswered, 1));
    driver_offer(driver, 0, pieces, 3);
    driver_notify(driver, 0);
    driver_await(driver, 0);
    driver_end(driver, 7);
    return vm;
}

/* The status that the guest was given, and the first byte that it read. */
static void read_back(driver *driver, uint8_t *status, uint8_t *first) {
    OK(vmcore_memory_read(driver->memory, DRIVER_DATA + 0x2000, status, 1));
    OK(vmcore_memory_read(driver->memory, DRIVER_DATA + 0x1000, first, 1));
    vmcore_memory_delete(driver->memory);
}

static void errors_of_the_host(int fd, const char *path) {
    const uint8_t byte = 0x5a;
    const vmcore_on_error policies[] = {
        VMCORE_ON_ERROR_STOP, VMCORE_ON_ERROR_REPORT, VMCORE_ON_ERROR_IGNORE, VMCORE_ON_ERROR_STOP_IF_FULL};
    for (size_t i = 0; i < 4; i++) {
        CHECK(ftruncate(fd, 1 << 20) == 0 && pwrite(fd, &byte, 1, 16 * 512) == 1);
        driver driver;
        vmcore_disk *disk = NULL;
        vmcore_disk_stats stats;
        vmcore_bytes *why = NULL;
        vmcore_outcome outcome;
        uint8_t status = 0, first = 0;
        char text[16];
        vmcore_vm *vm = reader(path, policies[i], &driver, &disk);
        /* Behind the VM's back: what the host then says of a read is an error. */
        CHECK(ftruncate(fd, 0) == 0);
        OK(vmcore_vm_run(vm, &outcome));
        if (policies[i] == VMCORE_ON_ERROR_STOP) {
            CHECK(outcome.kind == VMCORE_OUTCOME_IO_ERROR && outcome.value == 0);
            CHECK(vmcore_outcome_format(outcome, text, sizeof text) == 7 && strcmp(text, "IoError") == 0);
            OK(vmcore_disk_stopped(disk, &why));
            CHECK(strstr(vmcore_bytes_text(why), "512 bytes"));
            vmcore_bytes_delete(why);
            /* Nothing is better: it stops again. */
            OK(vmcore_vm_run(vm, &outcome));
            CHECK(outcome.kind == VMCORE_OUTCOME_IO_ERROR);
            CHECK(ftruncate(fd, 1 << 20) == 0 && pwrite(fd, &byte, 1, 16 * 512) == 1);
            OK(vmcore_vm_run(vm, &outcome));
            OK(vmcore_disk_stopped(disk, &why));
            CHECK(why == NULL);
        }
        CHECK(outcome.kind == VMCORE_OUTCOME_EXIT && outcome.value == 7);
        OK(vmcore_disk_get_stats(disk, &stats));
        read_back(&driver, &status, &first);
        switch (policies[i]) {
        case VMCORE_ON_ERROR_STOP: CHECK(status == 0 && first == 0x5a && stats.errors == 2 && stats.reads == 1); break;
        case VMCORE_ON_ERROR_IGNORE: CHECK(status == 0 && first == 0); break;
        /* VIRTIO_BLK_S_IOERR */
        default: CHECK(status == 1 && stats.errors == 1 && stats.reads == 0);
        }
        vmcore_vm_delete(vm);
        vmcore_disk_delete(disk);
    }
}

int main(void) {
    char path[] = "/tmp/vmcore-c-XXXXXX";
    int fd = mkstemp(path);
    CHECK(fd >= 0 && ftruncate(fd, 1 << 20) == 0);
    settings(path);
    errors_of_the_host(fd, path);
    close(fd);
    unlink(path);
    return 0;
}
