/* Errors of memory, images, disks and networks by their names, each as a program meets it. errors.rs sees to it that
 * none is forgotten. What needs a process of its own (without privileges, without files, in another network) has one. */

#define _GNU_SOURCE
#include "check.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static char directory[] = "/tmp/vmcore-c-XXXXXX";

/* A file with these bytes, in the test's directory. */
static const char *file(const char *name, const void *bytes, size_t len) {
    static char path[128];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(fd >= 0 && write(fd, bytes, len) == (ssize_t)len && close(fd) == 0);
    return path;
}

static void little(uint8_t *to, uint64_t value, int bytes) {
    for (int n = 0; n < bytes; n++) to[n] = (uint8_t)(value >> 8 * n);
}

static void big(uint8_t *to, uint64_t value, int bytes) {
    for (int n = 0; n < bytes; n++) to[bytes - 1 - n] = (uint8_t)(value >> 8 * n);
}

static vmcore_region *region(uint64_t base, uint64_t len) {
    vmcore_region *region = NULL;
    OK(vmcore_region_new(base, len, &region));
    return region;
}

static void memory(void) {
    static const uint8_t HLT[] = {0xf4};
    static const uint32_t NODES[] = {9999};
    vmcore_vcpu *vcpu = NULL;
    vmcore_vm *vm = bare(HLT, sizeof HLT, &vcpu);
    vmcore_memory *all = NULL;
    uint8_t byte = 0;

    NAMED("memory.overlap", vmcore_vm_map(vm, 0x8000, 0x10000));
    NAMED("memory.misaligned", vmcore_vm_map(vm, 0x10001, 0x1000));
    NAMED("memory.empty", vmcore_vm_map(vm, 0x20000, 0));
    NAMED("memory.overflow", vmcore_vm_map(vm, 1ULL << 63, 0x1000));
    NAMED("memory.host", vmcore_vm_map(vm, 1ULL << 40, 1ULL << 50));
    NAMED("memory.no_region", vmcore_vm_unmap(vm, 0x1234000));
    vmcore_region *odd = region(0x20000, 0x1000);
    vmcore_region_set_memfd(odd);
    vmcore_region_set_mergeable(odd, true);
    NAMED("memory.unsupported", vmcore_vm_map_region(vm, odd));
    odd = region(0x20000, 0x2000);
    int fd = open(file("memory", &byte, 1), O_RDWR);
    OK(vmcore_region_set_file(odd, fd, 0, true));
    NAMED("memory.file_too_short", vmcore_vm_map_region(vm, odd));
    close(fd);
    odd = region(0x20000, 0x1000);
    OK(vmcore_region_set_numa(odd, VMCORE_NUMA_BIND, NODES, 1));
    /* A kernel without NUMA has none of these calls. */
    if (access("/sys/devices/system/node", F_OK) == 0) NAMED("memory.numa_nodes", vmcore_vm_map_region(vm, odd));
    else NAMED("memory.host", vmcore_vm_map_region(vm, odd));
    odd = region(0x20000, 0x1000);
    vmcore_region_set_read_only(odd, true);
    OK(vmcore_vm_map_region(vm, odd));
    OK(vmcore_vm_memory(vm, &all));
    NAMED("memory.not_mapped", vmcore_memory_read(all, 0x10000, &byte, 1));
    NAMED("memory.read_only", vmcore_memory_write(all, 0x20000, &byte, 1));
    vmcore_memory_delete(all);
    vmcore_vcpu_delete(vcpu);
    vmcore_vm_delete(vm);
}

enum { MIB = 1 << 20 };
static uint8_t zeroes[2 * MIB];

static vmcore_builder *machine(uint64_t memory) {
    vmcore_builder *builder = NULL;
    OK(vmcore_builder_new(&builder));
    OK(vmcore_builder_set_accel(builder, VMCORE_ACCEL_SOFT));
    vmcore_builder_set_memory(builder, memory);
    return builder;
}

/* What comes of building it. */
static vmcore_error *build(vmcore_builder *builder) {
    vmcore_vm *vm = NULL;
    vmcore_error *error = vmcore_builder_build(builder, &vm);
    vmcore_vm_delete(vm);
    return error;
}

static vmcore_error *boot_elf(const char *path) {
    vmcore_builder *builder = machine(2 * MIB);
    OK(vmcore_builder_boot_elf(builder, path));
    return build(builder);
}

static vmcore_error *boot_linux(const char *path, uint64_t memory) {
    vmcore_builder *builder = machine(memory);
    OK(vmcore_builder_boot_linux(builder, path, NULL, ""));
    return build(builder);
}

static vmcore_error *boot_multiboot(const char *path, const char *module) {
    vmcore_builder *builder = machine(2 * MIB);
    OK(vmcore_builder_boot_multiboot(builder, path, module, ""));
    return build(builder);
}

/* An ELF file with segments at two addresses, each of 0x1000 bytes. */
static size_t elf(uint8_t *to, uint64_t first, uint64_t second) {
    memcpy(to, "\x7f" "ELF\x02\x01\x01", 7);
    little(to + 16, 2, 2), little(to + 18, 62, 2), little(to + 20, 1, 4), little(to + 24, first, 8);
    little(to + 32, 64, 8), little(to + 52, 64, 2), little(to + 54, 56, 2), little(to + 56, 2, 2);
    for (int n = 0; n < 2; n++) {
        uint8_t *program = to + 64 + 56 * n;
        uint64_t at = n ? second : first;
        little(program, 1, 4), little(program + 4, 5, 4), little(program + 16, at, 8), little(program + 24, at, 8);
        little(program + 32, 16, 8), little(program + 40, 0x1000, 8), little(program + 48, 0x1000, 8);
    }
    return 64 + 2 * 56 + 64;
}

static void images(void) {
    static uint8_t bytes[8192];
    vmcore_builder *builder;

    NAMED("boot.open", boot_elf("/no/such/file"));
    /* A file of sysfs is shorter than it says. */
    NAMED("boot.read", boot_elf("/sys/kernel/uevent_seqnum"));
    NAMED("boot.too_large", boot_elf("/dev/zero"));
    NAMED("boot.invalid", boot_elf(file("elf", "\x7f" "ELF\x09" "0123456789012345678901234567890123456789012345678901234567890", 64)));
    NAMED("boot.overlap", boot_elf(file("elf", bytes, elf(bytes, 0x100000, 0x100000))));
    memset(bytes, 0, sizeof bytes);
    static const uint8_t GZIP[10] = {0x1f, 0x8b, 8};
    memcpy(bytes, GZIP, sizeof GZIP);
    memset(bytes + sizeof GZIP, 0xff, 4096);
    NAMED("boot.decompress", boot_elf(file("elf", bytes, 4096)));
    NAMED("boot.unrecognised", boot_linux(file("kernel", zeroes, 8192), 64 * MIB));

    builder = machine(2 * MIB);
    OK(vmcore_builder_boot_raw(builder, zeroes, 0, VMCORE_RAW_REAL16));
    NAMED("boot.truncated", build(builder));
    builder = machine(2 * MIB);
    OK(vmcore_builder_boot_raw(builder, zeroes, 2 * MIB, VMCORE_RAW_PROTECTED32));
    NAMED("boot.not_in_memory", build(builder));

    /* One that wants a video mode, and a flat one at 1 MiB. */
    memset(bytes, 0, sizeof bytes);
    little(bytes, 0x1badb002, 4), little(bytes + 4, 4, 4), little(bytes + 8, 0u - 0x1badb002 - 4, 4);
    NAMED("boot.unsupported", boot_multiboot(file("multiboot", bytes, sizeof bytes), NULL));
    little(bytes + 4, 0x10000, 4), little(bytes + 8, 0u - 0x1badb002 - 0x10000, 4);
    static const uint32_t PLACES[] = {0x100000, 0x100000, 0, 0, 0x100020};
    for (int n = 0; n < 5; n++) little(bytes + 12 + 4 * n, PLACES[n], 4);
    char module[128];
    snprintf(module, sizeof module, "%s", file("module", zeroes, 0x180000));
    NAMED("boot.no_room", boot_multiboot(file("multiboot", bytes, sizeof bytes), module));

    /* A bzImage whose payload, an ELF file packed by bzip2, is to have 12345 bytes. */
    static const uint8_t PAYLOAD[] = {
        0x42, 0x5a, 0x68, 0x39, 0x31, 0x41, 0x59, 0x26, 0x53, 0x59, 0x95, 0xec, 0xb0, 0xb9, 0x00, 0x00, 0x29, 0xec,
        0x80, 0x7e, 0x10, 0xc0, 0x00, 0x00, 0x41, 0x53, 0x04, 0x00, 0x00, 0xa0, 0x00, 0x54, 0x42, 0x34, 0xd3, 0x26,
        0x86, 0x68, 0x24, 0x4a, 0x7e, 0xa4, 0xc8, 0xf5, 0x00, 0xd1, 0xa1, 0xef, 0x70, 0x8d, 0x11, 0x88, 0x2e, 0xe8,
        0x46, 0x33, 0x46, 0xaa, 0xb9, 0x79, 0x93, 0x89, 0xe3, 0x02, 0xde, 0x1a, 0xf6, 0x00, 0x02, 0xc5, 0xdc, 0x91,
        0x4e, 0x14, 0x24, 0x25, 0x7b, 0x2c, 0x2e, 0x40, 0x39, 0x30, 0x00, 0x00};
    memset(bytes, 0, sizeof bytes);
    bytes[0x1f1] = 1;
    little(bytes + 0x1f4, (sizeof PAYLOAD + 15) / 16, 4);
    little(bytes + 0x1fe, 0xaa55, 2), little(bytes + 0x200, 0x62eb, 2), memcpy(bytes + 0x202, "HdrS", 4);
    little(bytes + 0x206, 0x20f, 2);
    bytes[0x211] = 1;
    little(bytes + 0x230, 0x200000, 4), bytes[0x234] = 1, bytes[0x235] = 21, little(bytes + 0x236, 1, 2);
    little(bytes + 0x238, 2047, 4);
    little(bytes + 0x24c, sizeof PAYLOAD, 4);
    little(bytes + 0x258, 0x1000000, 8), little(bytes + 0x260, 0x100000, 4);
    memcpy(bytes + 0x400, PAYLOAD, sizeof PAYLOAD);
    NAMED("boot.payload_length", boot_linux(file("bzimage", bytes, 0x400 + (sizeof PAYLOAD + 15) / 16 * 16), 64 * MIB));
}

static vmcore_error *open_disk(const char *path, const char *format, bool direct) {
    vmcore_image *image = NULL;
    vmcore_disk *disk = NULL;
    OK(vmcore_image_new(path, format, &image));
    vmcore_image_set_read_only(image);
    if (direct) vmcore_image_set_direct(image);
    vmcore_error *error = vmcore_disk_open_image(image, &disk);
    vmcore_disk_delete(disk);
    return error;
}

static void disks(void) {
    static const char VMDK[] =
        "# Disk DescriptorFile\nversion=1\ncreateType=\"monolithicFlat\"\nRW 8 FLAT \"other.img\" 0\n";
    static uint8_t qcow2[0x40000];
    static const uint64_t FIELDS[][2] = {
        {0x514649fb, 4}, {3, 4}, {104, 8}, {9, 4}, {16, 4}, {1 << 20, 8}, {0, 4}, {1, 4}, {0x30000, 8}, {0x10000, 8},
        {1, 4}, {0, 4}, {0, 8}, {0, 8}, {0, 8}, {0, 8}, {4, 4}, {104, 4}};
    uint8_t *to = qcow2;
    for (size_t n = 0; n < sizeof FIELDS / sizeof *FIELDS; n++) {
        big(to, FIELDS[n][0], (int)FIELDS[n][1]);
        to += FIELDS[n][1];
    }
    memcpy(to, "other.img", 9);

    NAMED("disk.open", open_disk("/no/such/disk", "raw", false));
    NAMED("disk.kind", open_disk("/dev/null", "raw", false));
    NAMED("disk.empty", open_disk(file("empty", "", 0), "raw", false));
    NAMED("disk.image", open_disk(file("raw", zeroes, 4096), "qcow2", false));
    NAMED("disk.backing", open_disk(file("qcow2", qcow2, sizeof qcow2), "qcow2", false));
    NAMED("disk.extent", open_disk(file("vmdk", VMDK, sizeof VMDK - 1), "vmdk", false));
    NAMED("disk.direct", open_disk(file("vmdk", VMDK, sizeof VMDK - 1), "vmdk", true));
}

static void networks(void) {
    vmcore_nat *nat = NULL;
    vmcore_net *net = NULL;
    OK(vmcore_nat_new(&nat));
    NAMED("nat.text", vmcore_nat_forward(nat, "80"));
    NAMED("nat.setting", vmcore_nat_set_mtu(nat, 1));
    /* A port that this process has already. */
    OK(vmcore_nat_forward(nat, "tcp:0:80"));
    vmcore_bytes *forwards = NULL;
    OK(vmcore_nat_forwards(nat, &forwards));
    char taken[64] = {0};
    CHECK(sscanf(vmcore_bytes_text(forwards), "%63s", taken) == 1 && strncmp(taken, "tcp:", 4) == 0);
    NAMED("nat.bind", vmcore_nat_forward(nat, taken));
    vmcore_bytes_delete(forwards);
    /* As many descriptors as there are. */
    int unused = open("/dev/null", O_RDONLY);
    close(unused);
    struct rlimit limit, none;
    CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    none = limit;
    none.rlim_cur = (rlim_t)unused;
    CHECK(setrlimit(RLIMIT_NOFILE, &none) == 0);
    vmcore_nat *second = NULL;
    vmcore_error *error = vmcore_nat_new(&second);
    CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
    CHECK(vmcore_error_errno(error) == EMFILE);
    NAMED("nat.host", error);
    vmcore_nat_delete(nat);
    NAMED("tap.name", vmcore_net_tap("a/b", &net));
    NAMED("tap.queues", vmcore_net_tap_queues("tap0", 0, &net));
}

static void texts(void) {
    static const uint8_t EXIT[] = {0xb0, 7, 0xe6, 0xf4, 0xeb, 0xfe};
    vmcore_console *console = NULL;
    vmcore_script *script = NULL;
    vmcore_bytes *said = NULL;
    vmcore_vm *vm = NULL;
    vmcore_builder *builder = built(EXIT, sizeof EXIT);
    OK(vmcore_console_script(&script, &console));
    OK(vmcore_builder_add_serial(builder, console));
    OK(vmcore_builder_build(builder, &vm));
    NAMED("expect.timeout", vmcore_script_expect(script, "never", 10, &said));
    vmcore_vm_delete(vm);
    NAMED("expect.closed", vmcore_script_expect(script, "never", 10000, &said));
    vmcore_script_delete(script);
    vmcore_error *ours = vmcore_error_new(VMCORE_ERROR_OTHER, "a message of one's own", NULL);
    NAMED("other", ours);
    CHECK(*vmcore_error_name(NULL) == 0);
}

enum { UNABLE = 77 };

/* Runs `what` in a process of its own, where that can be had. */
static void apart(const char *name, int (*what)(void)) {
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) _exit(what());
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status));
    if (WEXITSTATUS(status) == UNABLE) fprintf(stderr, "names: not checked on this host: %s\n", name);
    else CHECK(WEXITSTATUS(status) == 0);
}

/* The root is an empty directory: no driver. */
static int without_driver(void) {
    vmcore_net *net = NULL;
    if (geteuid() != 0 && unshare(CLONE_NEWUSER) != 0) return UNABLE;
    char empty[] = "/tmp/vmcore-c-XXXXXX";
    if (!mkdtemp(empty)) return 2;
    int jailed = chroot(empty);
    if (jailed != 0) return UNABLE;
    NAMED("tap.driver", vmcore_net_tap("tap0", &net));
    return 0;
}

/* A process that may do nothing in the host's network. */
static int without_permission(void) {
    vmcore_net *net = NULL;
    struct __user_cap_header_struct self = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct may[2];
    if (syscall(SYS_capget, &self, may) != 0) return UNABLE;
    may[0].effective &= ~(1u << CAP_NET_ADMIN);
    if (syscall(SYS_capset, &self, may) != 0) return UNABLE;
    if (access("/dev/net/tun", R_OK | W_OK) != 0) return UNABLE;
    NAMED("tap.permission", vmcore_net_tap("vmcorenot", &net));
    return 0;
}

/* In a network of its own. */
static int taps(void) {
    vmcore_net *net = NULL, *second = NULL;
    if (unshare(CLONE_NEWNET) != 0 && unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0) return UNABLE;
    if (access("/dev/net/tun", R_OK | W_OK) != 0) return UNABLE;
    NAMED("tap.unsuitable", vmcore_net_tap("lo", &net));
    OK(vmcore_net_tap("tap0", &net));
    NAMED("tap.busy", vmcore_net_tap("tap0", &second));
    vmcore_net_delete(net);
    OK(vmcore_net_tap_queues("tap1", 2, &net));
    vmcore_net_delete(net);
    return 0;
}

int main(void) {
    CHECK(mkdtemp(directory));
    /* First: there are no threads yet. */
    apart("tap.driver", without_driver);
    apart("tap.permission", without_permission);
    apart("tap.busy, tap.unsuitable", taps);
    memory();
    images();
    disks();
    networks();
    texts();
    static const char *const MADE[] = {"memory", "elf", "kernel", "module", "multiboot", "bzimage", "empty", "raw", "qcow2", "vmdk"};
    for (size_t n = 0; n < sizeof MADE / sizeof *MADE; n++) {
        char path[128];
        snprintf(path, sizeof path, "%s/%s", directory, MADE[n]);
        CHECK(unlink(path) == 0);
    }
    CHECK(rmdir(directory) == 0);
    return 0;
}
