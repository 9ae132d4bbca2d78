/* The layouts that programs were compiled with: what changes here breaks them. Tables grow at their ends only. */

#include <stddef.h>
#include <vmcore.h>

#define IS(what, value) _Static_assert((what) == (value), #what)

IS(sizeof(vmcore_outcome), 8);
IS(offsetof(vmcore_outcome, value), 4);
IS(sizeof(vmcore_exit), 24);
IS(offsetof(vmcore_exit, rip), 8);
IS(offsetof(vmcore_exit, dr6), 16);
IS(sizeof(vmcore_io), 24);
IS(offsetof(vmcore_io, address), 8);
IS(offsetof(vmcore_io, data), 16);
IS(sizeof(vmcore_regs), 144);
IS(offsetof(vmcore_regs, rip), 128);
IS(sizeof(vmcore_segment), 24);
IS(offsetof(vmcore_segment, kind), 14);
IS(offsetof(vmcore_segment, unusable), 22);
IS(sizeof(vmcore_table), 16);
IS(sizeof(vmcore_sregs), 280);
IS(offsetof(vmcore_sregs, gdt), 192);
IS(offsetof(vmcore_sregs, cr0), 224);
IS(offsetof(vmcore_sregs, apic_base), 272);
IS(sizeof(vmcore_vcpu_stats), 56);
IS(sizeof(vmcore_disk_stats), 56);
IS(sizeof(vmcore_net_stats), 56);
IS(sizeof(vmcore_nat_stats), 120);
IS(sizeof(vmcore_cpuid_entry), 28);
IS(offsetof(vmcore_cpuid_entry, eax), 8);
IS(offsetof(vmcore_cpuid_entry, has_subleaf), 24);
IS(offsetof(vmcore_device_ops, read), 8);
IS(offsetof(vmcore_device_ops, drop), 40);
IS(offsetof(vmcore_console_ops, write), 8);
IS(offsetof(vmcore_console_ops, drop), 24);
IS(offsetof(vmcore_virtio_ops, serve), 8);
IS(offsetof(vmcore_virtio_ops, drop), 40);
IS(VMCORE_ERROR_DEVICE, 12);
IS(VMCORE_ERROR_ARGUMENT, 100);
IS(VMCORE_OUTCOME_INSTRUCTION_LIMIT, 7);
IS(VMCORE_OUTCOME_IO_ERROR, 8);
IS(VMCORE_ON_ERROR_IGNORE, 3);
IS(VMCORE_NUMA_INTERLEAVE, 3);
IS(VMCORE_EXIT_DEBUG, 5);
IS(VMCORE_IO_MMIO_WRITE, 3);

int main(void) { return 0; }
