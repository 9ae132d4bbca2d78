/* Network cards and the NAT: their settings, and a packet of a guest's that is counted and recorded. */

#define _GNU_SOURCE
#include "driver.h"

#include <netinet/in.h>
#include <sys/socket.h>
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

/* Settings of a NAT, and a forward that a program of the host reaches. */
static void a_nat(void) {
    vmcore_nat *nat = NULL;
    vmcore_net *net = NULL;
    vmcore_bytes *forwards = NULL;
    vmcore_nat_stats stats;
    bool was_there = false;
    char one[64] = {0};

    OK(vmcore_nat_new(&nat));
    OK(vmcore_nat_set_mtu(nat, 9000));
    OK(vmcore_nat_gateway_is_host(nat));
    OK(vmcore_nat_set_resolvers(nat, "192.0.2.53,[::1]:5353"));
    NAMED("nat.text", vmcore_nat_set_resolvers(nat, "192.0.2.53,somebody"));
    OK(vmcore_nat_set_resolvers(nat, ""));
    OK(vmcore_nat_add_name(nat, "box", "192.0.2.1,2001:db8::1"));
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_nat_add_name(nat, "box", "there"));
    OK(vmcore_nat_forward(nat, "tcp:127.0.0.1:0:80"));
    OK(vmcore_nat_forwards(nat, &forwards));
    CHECK(sscanf(vmcore_bytes_text(forwards), "%63s", one) == 1);
    vmcore_bytes_delete(forwards);
    unsigned port = 0;
    CHECK(sscanf(one, "tcp:127.0.0.1:%u:80", &port) == 1 && port != 0);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int client = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(connect(client, (struct sockaddr *)&at, sizeof at) == 0);
    close(client);
    OK(vmcore_nat_remove_forward(nat, one, &was_there));
    CHECK(was_there);
    OK(vmcore_nat_remove_forward(nat, one, &was_there));
    CHECK(!was_there);
    OK(vmcore_nat_get_stats(nat, &stats));
    CHECK(stats.frames_sent == 0 && stats.flows == 0 && stats.dropped == 0);
    OK(vmcore_net_nat(nat, &net));
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_nat_set_mtu(nat, 1500));
    vmcore_net_delete(net);
    vmcore_nat_delete(nat);
}

/* A card on a socket of ours, which lets so many bytes through. */
static void a_socket(void) {
    enum { HEADER = 12, FRAME = 60 };
    vmcore_net *net = NULL;
    vmcore_vm *vm = NULL;
    vmcore_outcome outcome;
    driver driver;
    int ends[2];
    const piece packet = {DRIVER_DATA, HEADER + FRAME, false};
    uint8_t frame[2 * FRAME];

    CHECK(socketpair(AF_UNIX, SOCK_DGRAM, 0, ends) == 0);
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_net_fd(-1, &net));
    OK(vmcore_net_fd(ends[0], &net));
    close(ends[0]);
    OK(vmcore_net_set_mtu(net, 1500));
    FAILS(VMCORE_ERROR_CONFIG, vmcore_net_set_mtu(net, 10));
    OK(vmcore_net_set_limit(net, 1000000));
    vmcore_builder *builder = driver_builder(&driver);
    OK(vmcore_builder_add_net(builder, net));
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_net_set_limit(net, 1));
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_net_set_mtu(net, 1500));
    OK(vmcore_builder_build(builder, &vm));
    driver_begin(&driver, vm, 2);
    driver_offer(&driver, 1, &packet, 1);
    driver_notify(&driver, 1);
    driver_await(&driver, 1);
    driver_end(&driver, 7);
    OK(vmcore_vm_run(vm, &outcome));
    CHECK(outcome.kind == VMCORE_OUTCOME_EXIT && outcome.value == 7);
    CHECK(recv(ends[1], frame, sizeof frame, 0) == FRAME);
    vmcore_memory_delete(driver.memory);
    vmcore_vm_delete(vm);
    vmcore_net_delete(net);
    close(ends[1]);
}

int main(void) {
    a_packet();
    a_nat();
    a_socket();
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
