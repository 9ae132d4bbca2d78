/* Network cards and the NAT: their settings, and a packet of a guest's that is counted and recorded. */

#define _GNU_SOURCE
#include "driver.h"

#include <sys/stat.h>
#include <unistd.h>

static const uint8_t HLT[] = {0xf4};

static void a_packet(void) {
    enum { HEADER = 12, FRAME = 60 };
    char path[] = "/tmp/vmcore-c-XXXXXX";
    int fd = mkstemp(path);
    CHECK(fd >= 0);
    vmcore_nat *nat = NULL;
    vmcore_net *net = NULL;
    vmcore_vm *vm = NULL;
    vmcore_outcome outcome;
    vmcore_net_stats stats;
    driver driver;
    const piece packet = {DRIVER_DATA, HEADER + FRAME, false};
    const uint8_t broadcast[6] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff};

    OK(vmcore_nat_new(&nat));
    OK(vmcore_net_nat(nat, &net));
    FAILS(VMCORE_ERROR_OS, vmcore_net_record(net, "/no/such/directory/file"));
    OK(vmcore_net_record(net, path));
    vmcore_builder *builder = driver_builder(&driver);
    OK(vmcore_builder_add_net(builder, net));
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_net_record(net, path));
    OK(vmcore_builder_build(builder, &vm));
    driver_begin(&driver, vm, 2);
    OK(vmcore_memory_write(driver.memory, DRIVER_DATA + HEADER, broadcast, sizeof broadcast));
    driver_offer(&driver, 1, &packet, 1);
    driver_notify(&driver, 1);
    driver_await(&driver, 1);
    driver_end(&driver, 7);
    OK(vmcore_net_get_stats(net, &stats));
    CHECK(stats.sent_packets == 0 && stats.sent_bytes == 0);
    OK(vmcore_vm_run(vm, &outcome));
    CHECK(outcome.kind == VMCORE_OUTCOME_EXIT && outcome.value == 7);
    OK(vmcore_net_get_stats(net, &stats));
    CHECK(stats.sent_packets == 1 && stats.sent_bytes == FRAME && stats.sent_dropped == 0);
    CHECK(stats.received_packets == 0 && stats.received_filtered == 0);
    /* The file's header, and one packet with its own. */
    struct stat recorded;
    CHECK(fstat(fd, &recorded) == 0 && recorded.st_size == 24 + 16 + FRAME);
    vmcore_memory_delete(driver.memory);
    vmcore_vm_delete(vm);
    vmcore_net_delete(net);
    vmcore_nat_delete(nat);
    close(fd);
    unlink(path);
}

int main(void) {
    a_packet();
    vmcore_nat *nat = NULL;
    vmcore_net *net = NULL, *second = NULL;
    vmcore_vm *vm = NULL;
    const uint8_t mac[6] = {2, 0, 0, 0, 0, 1}, group[6] = {1, 0, 0, 0, 0, 1};

    OK(vmcore_nat_new(&nat));
    OK(vmcore_nat_deny(nat, "tcp:any:25"));
    OK(vmcore_nat_allow(nat, "10.0.0.0/8"));
    OK(vmcore_nat_otherwise(nat, false));
    FAILS(VMCORE_ERROR_DEVICE, vmcore_nat_deny(nat, "nonsense"));
    FAILS(VMCORE_ERROR_DEVICE, vmcore_nat_forward(nat, "tcp:80"));
    OK(vmcore_net_nat(nat, &net));
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_net_nat(nat, &second));
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_nat_deny(nat, "any"));
    OK(vmcore_net_set_mac(net, &mac));
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_net_set_mac(net, &group));
    vmcore_builder *builder = built(HLT, sizeof HLT);
    OK(vmcore_builder_add_net(builder, net));
    OK(vmcore_builder_build(builder, &vm));
    vmcore_net_set_link(net, false);
    vmcore_vm_delete(vm);
    vmcore_net_delete(net);
    vmcore_nat_delete(nat);
    vmcore_error *error = vmcore_net_unix("/no/such/socket", &net);
    CHECK(error != NULL);
    vmcore_error_delete(error);
    vmcore_net_delete(NULL);
    return 0;
}
