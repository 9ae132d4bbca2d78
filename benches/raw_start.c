/* A whole VMM for a tiny guest: one vCPU, 64 MiB, and COM1 is standard output. With the argument "pc"
 * the machine has interrupt controllers, a timer and CPUID. Port 0xf4 ends the guest. */
#include "raw.h"

#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* mov dx, 0x3f8; mov al, '!'; out dx, al; mov dx, 0xf4; out dx, al */
static const unsigned char guest[] = {0xba, 0xf8, 0x03, 0xb0, '!', 0xee, 0xba, 0xf4, 0x00, 0xee};

int main(int argc, char **argv)
{
    struct raw_vm vm;
    if (raw_open(&vm, 64 << 20, guest, sizeof guest, argc > 1 && strcmp(argv[1], "pc") == 0) != 0)
        return 2;
    while (ioctl(vm.vcpu, KVM_RUN, 0) == 0 && vm.run->exit_reason == KVM_EXIT_IO) {
        if (vm.run->io.port == 0xf4)
            return 1;
        if (write(1, (char *)vm.run + vm.run->io.data_offset, 1) != 1)
            return 3;
    }
    return 4;
}
