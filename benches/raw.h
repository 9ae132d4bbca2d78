/* A VM of the least that a C program can do over KVM's ioctls. */
#include <linux/kvm.h>
#include <stdint.h>

struct raw_vm {
    int kvm, vm, vcpu, run_size;
    uint64_t memory_size;
    unsigned char *memory;
    struct kvm_run *run;
};

/* A VM with one vCPU in real mode at the start of its `memory_size` bytes, which begin with `code`.
 * With `pc` it has what every kernel expects of a PC: interrupt controllers, timer, CPUID. */
int raw_open(struct raw_vm *v, uint64_t memory_size, const unsigned char *code, uint64_t code_size, int pc);

/* Runs until HLT, or until `accesses` ports or MMIO accesses were seen. */
int raw_run(struct raw_vm *v, uint64_t accesses);

void raw_close(struct raw_vm *v);
