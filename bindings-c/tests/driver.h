/* A driver of one virtio-mmio device (virtio 1.2, section 4.2): a guest in 32-bit code that is made step by step. What
 * the device reads and writes in memory the test prepares and looks at. */
#ifndef DRIVER_H
#define DRIVER_H

#include "check.h"

enum {
    DRIVER_CODE = 0x100000,
    /* One after the other for each queue: descriptors, what is available, what is used. */
    DRIVER_RINGS = 0x140000,
    DRIVER_RING = 0x3000,
    DRIVER_DATA = 0x180000,
    DRIVER_MEMORY = 0x200000,
    DRIVER_SIZE = 8,
    DESCRIPTOR_NEXT = 1,
    DESCRIPTOR_WRITE = 2
};

typedef struct driver {
    uint8_t code[2048];
    size_t len;
    uint64_t window;
    vmcore_memory *memory;
    uint16_t offered[4];
} driver;

/* A part of a request: bytes of the guest's memory, for the device to read or to write. */
typedef struct piece {
    uint32_t at, len;
    bool write;
} piece;

/* The device that is attached next has the window behind this one. */
static inline vmcore_error *driver_window(void *user, vmcore_machine *machine) {
    driver *driver = user;
    vmcore_error *error = vmcore_machine_mmio_window(machine, 0x1000, &driver->window);
    driver->window += 0x1000;
    return error;
}

/* A builder of a VM whose guest will be `driver`, for the device that is added next. */
static inline vmcore_builder *driver_builder(driver *driver) {
    static const uint8_t HLT[] = {0xf4};
    vmcore_builder *builder = NULL;
    memset(driver, 0, sizeof *driver);
    OK(vmcore_builder_new(&builder));
    OK(vmcore_builder_set_accel(builder, VMCORE_ACCEL_SOFT));
    vmcore_builder_set_memory(builder, DRIVER_MEMORY);
    vmcore_builder_set_exit_port(builder, 0xf4);
    OK(vmcore_builder_boot_raw(builder, HLT, sizeof HLT, VMCORE_RAW_PROTECTED32));
    OK(vmcore_builder_attach(builder, driver_window, driver, NULL));
    return builder;
}

static inline void driver_emit(driver *driver, const void *code, size_t len) {
    CHECK(driver->len + len <= sizeof driver->code);
    memcpy(driver->code + driver->len, code, len);
    driver->len += len;
}

static inline void driver_word(driver *driver, uint32_t word) { driver_emit(driver, &word, sizeof word); }

/* mov dword [window + offset], value */
static inline void driver_poke(driver *driver, uint32_t offset, uint32_t value) {
    driver_emit(driver, "\xc7\x05", 2);
    driver_word(driver, (uint32_t)driver->window + offset);
    driver_word(driver, value);
}

/* Makes the driver and the device known to each other, with as many queues. */
static inline void driver_begin(driver *driver, vmcore_vm *vm, uint32_t queues) {
    OK(vmcore_vm_memory(vm, &driver->memory));
    const uint32_t status[] = {0, 1, 3};
    for (size_t i = 0; i < 3; i++) driver_poke(driver, 0x70, status[i]);
    /* VIRTIO_F_VERSION_1 and VIRTIO_F_EVENT_IDX, as Linux has them. */
    driver_poke(driver, 0x24, 1), driver_poke(driver, 0x20, 1);
    driver_poke(driver, 0x24, 0), driver_poke(driver, 0x20, 1u << 29);
    driver_poke(driver, 0x70, 11);
    for (uint32_t queue = 0; queue < queues; queue++) {
        const uint32_t ring = DRIVER_RINGS + queue * DRIVER_RING;
        driver_poke(driver, 0x30, queue), driver_poke(driver, 0x38, DRIVER_SIZE);
        driver_poke(driver, 0x80, ring), driver_poke(driver, 0x90, ring + 0x1000);
        driver_poke(driver, 0xa0, ring + 0x2000), driver_poke(driver, 0x44, 1);
    }
    driver_poke(driver, 0x70, 15);
}

/* Puts a request on a queue, to be seen at its next notification; one descriptor for each of its pieces. */
static inline void driver_offer(driver *driver, uint32_t queue, const piece *pieces, uint16_t count) {
    const uint64_t ring = DRIVER_RINGS + queue * DRIVER_RING;
    uint16_t *offered = &driver->offered[queue], first = (uint16_t)(*offered * count);
    CHECK(first + count <= DRIVER_SIZE);
    for (uint16_t i = 0; i < count; i++) {
        struct {
            uint64_t at;
            uint32_t len;
            uint16_t flags, next;
        } descriptor = {pieces[i].at, pieces[i].len, 0, (uint16_t)(first + i + 1)};
        if (pieces[i].write) descriptor.flags |= DESCRIPTOR_WRITE;
        if (i + 1 < count) descriptor.flags |= DESCRIPTOR_NEXT;
        uint64_t at = ring + 16u * (uint64_t)(first + i);
        OK(vmcore_memory_write(driver->memory, at, (const uint8_t *)&descriptor, sizeof descriptor));
    }
    uint64_t available = ring + 0x1000;
    OK(vmcore_memory_write(driver->memory, available + 4 + 2u * *offered, (const uint8_t *)&first, 2));
    ++*offered;
    OK(vmcore_memory_write(driver->memory, available + 2, (const uint8_t *)offered, 2));
}

static inline void driver_notify(driver *driver, uint32_t queue) { driver_poke(driver, 0x50, queue); }

/* Waits until the device has used all that was offered by now. */
static inline void driver_await(driver *driver, uint32_t queue) {
    /* again: pause; cmp word [used + 2], offered; jne again */
    driver_emit(driver, "\xf3\x90\x66\x81\x3d", 5);
    driver_word(driver, DRIVER_RINGS + queue * DRIVER_RING + 0x2002);
    driver_emit(driver, &driver->offered[queue], 2);
    driver_emit(driver, "\x75\xf3", 2);
}

/* mov al, code; out 0xf4, al: the guest is complete, and put where it begins. */
static inline void driver_end(driver *driver, uint8_t code) {
    const uint8_t end[] = {0xb0, code, 0xe6, 0xf4, 0xf4};
    driver_emit(driver, end, sizeof end);
    OK(vmcore_memory_write(driver->memory, DRIVER_CODE, driver->code, driver->len));
}

/* What the device said that it wrote for request number `index` of the queue. */
static inline uint32_t driver_written(const driver *driver, uint32_t queue, uint16_t index) {
    uint32_t len = 0;
    uint64_t used = DRIVER_RINGS + queue * DRIVER_RING + 0x2000;
    OK(vmcore_memory_read(driver->memory, used + 8 + 8u * index, (uint8_t *)&len, sizeof len));
    return len;
}

/* By which request the device wants to be told next; to be looked at when the VM is gone, for it says so last. */
static inline uint16_t driver_wanted(const driver *driver, uint32_t queue) {
    uint16_t index = 0;
    uint64_t used = DRIVER_RINGS + queue * DRIVER_RING + 0x2000;
    OK(vmcore_memory_read(driver->memory, used + 4 + 8u * DRIVER_SIZE, (uint8_t *)&index, sizeof index));
    return index;
}

#endif
