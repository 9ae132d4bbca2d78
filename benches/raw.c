/* What the engine is measured against: the least that a C program can do over KVM's ioctls. */
#include "raw.h"

#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

/* The answer takes KVM some hundred CPUID instructions. */
static int set_cpuid(struct raw_vm *v)
{
    static struct {
        struct kvm_cpuid2 head;
        struct kvm_cpuid_entry2 entries[256];
    } table;
    table.head.nent = 256;
    if (ioctl(v->kvm, KVM_GET_SUPPORTED_CPUID, &table) < 0)
        return -1;
    return ioctl(v->vcpu, KVM_SET_CPUID2, &table);
}

/* After memory: the next memory slot would wait for what these leave behind. */
static int create_irqchip(struct raw_vm *v)
{
    struct kvm_pit_config pit = {.flags = KVM_PIT_SPEAKER_DUMMY};
    if (ioctl(v->vm, KVM_SET_TSS_ADDR, 0xfffbd000) < 0 || ioctl(v->vm, KVM_CREATE_IRQCHIP, 0) < 0)
        return -1;
    return ioctl(v->vm, KVM_CREATE_PIT2, &pit);
}

int raw_open(struct raw_vm *v, uint64_t memory_size, const unsigned char *code, uint64_t code_size, int pc)
{
    memset(v, 0, sizeof *v);
    v->memory_size = memory_size;
    if ((v->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC)) < 0)
        return -1;
    if ((v->vm = ioctl(v->kvm, KVM_CREATE_VM, 0)) < 0)
        return -2;
    v->memory = mmap(NULL, memory_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (v->memory == MAP_FAILED)
        return -3;
    memcpy(v->memory, code, code_size);
    struct kvm_userspace_memory_region region = {.memory_size = memory_size, .userspace_addr = (uint64_t)v->memory};
    if (ioctl(v->vm, KVM_SET_USER_MEMORY_REGION, &region) < 0)
        return -4;
    if (pc && create_irqchip(v) < 0)
        return -10;
    if ((v->vcpu = ioctl(v->vm, KVM_CREATE_VCPU, 0)) < 0)
        return -5;
    v->run_size = ioctl(v->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    v->run = mmap(NULL, v->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, v->vcpu, 0);
    if (v->run == MAP_FAILED)
        return -6;
    if (pc && set_cpuid(v) < 0)
        return -11;
    struct kvm_sregs sregs;
    if (ioctl(v->vcpu, KVM_GET_SREGS, &sregs) < 0)
        return -7;
    sregs.cs.base = sregs.cs.selector = 0;
    if (ioctl(v->vcpu, KVM_SET_SREGS, &sregs) < 0)
        return -8;
    struct kvm_regs regs = {.rflags = 2, .rsp = 0x1000};
    return ioctl(v->vcpu, KVM_SET_REGS, &regs) < 0 ? -9 : 0;
}

int raw_run(struct raw_vm *v, uint64_t accesses)
{
    volatile uint64_t sum = 0;
    for (uint64_t seen = 0; seen < accesses || accesses == 0;) {
        if (ioctl(v->vcpu, KVM_RUN, 0) < 0)
            return -1;
        switch (v->run->exit_reason) {
        case KVM_EXIT_IO:
            sum += *((unsigned char *)v->run + v->run->io.data_offset);
            seen++;
            break;
        case KVM_EXIT_MMIO:
            sum += v->run->mmio.data[0];
            seen++;
            break;
        case KVM_EXIT_HLT:
            return 0;
        default:
            return -100 - (int)v->run->exit_reason;
        }
    }
    return 0;
}

void raw_close(struct raw_vm *v)
{
    munmap(v->run, v->run_size);
    close(v->vcpu);
    close(v->vm);
    munmap(v->memory, v->memory_size);
    close(v->kvm);
}
