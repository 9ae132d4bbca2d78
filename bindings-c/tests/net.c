/* Network cards and the NAT, as far as they go without a guest. */

#include "check.h"

static const uint8_t HLT[] = {0xf4};

int main(void) {
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
