/* Guest memory from the host's side. */

#include "check.h"

#include <errno.h>

/* mov byte [0x3000], 7; hlt */
static const uint8_t CODE[] = {0xc6, 0x06, 0, 0x20, 7, 0xf4};

int main(void) {
    vmcore_vcpu *vcpu = NULL;
    vmcore_vm *vm = bare(CODE, sizeof CODE, &vcpu);
    vmcore_memory *memory = NULL;
    vmcore_view *view = NULL;
    vmcore_exit end;
    uint8_t data[8] = {0};
    uint64_t base, len;

    OK(vmcore_vm_memory(vm, &memory));
    CHECK(vmcore_memory_total(memory) == 0x10000 && vmcore_memory_regions(memory) == 1);
    OK(vmcore_memory_region(memory, 0, &base, &len));
    CHECK(base == 0 && len == 0x10000);
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_memory_region(memory, 1, &base, &len));
    CHECK(vmcore_memory_contains(memory, 0xfff8, 8) && !vmcore_memory_contains(memory, 0xfff9, 8));
    OK(vmcore_memory_write(memory, 0x8000, (const uint8_t *)"vmcore!", 8));
    OK(vmcore_memory_read(memory, 0x8000, data, 8));
    CHECK(memcmp(data, "vmcore!", 8) == 0);
    FAILS(VMCORE_ERROR_MEMORY, vmcore_memory_write(memory, 0xfffc, data, 8));
    FAILS(VMCORE_ERROR_MEMORY, vmcore_memory_read(memory, UINT64_MAX, data, 8));
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_memory_read(memory, 0, NULL, 8));
    OK(vmcore_memory_read(memory, 0, NULL, 0));

    OK(vmcore_memory_view(memory, 0x2000, 0x2000, &view));
    FAILS(VMCORE_ERROR_MEMORY, vmcore_memory_view(memory, 0xf000, 0x1001, &view));
    OK(vmcore_vcpu_run(vcpu, &end));
    CHECK(vmcore_view_len(view) == 0x2000 && vmcore_view_data(view)[0x1000] == 7);
    vmcore_view_data(view)[1] = 5;
    OK(vmcore_memory_read(memory, 0x2001, data, 1));
    CHECK(data[0] == 5);
    OK(vmcore_memory_zero(memory, 0x2000, 0x2000));
    CHECK(vmcore_view_data(view)[1] == 0);

    vmcore_region *region = NULL;
    vmcore_bytes *dirty = NULL;
    OK(vmcore_region_new(0x100000, 0x4000, &region));
    vmcore_region_set_track_dirty(region, true);
    vmcore_region_set_memfd(region);
    OK(vmcore_region_set_contents(region, (const uint8_t *)"rom", 3));
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_region_set_huge_pages(region, 99));
    FAILS(VMCORE_ERROR_OS, vmcore_region_set_file(region, 1 << 20, 0, true));
    OK(vmcore_vm_map_region(vm, region));
    OK(vmcore_vm_take_dirty(vm, 0x100000, &dirty));
    vmcore_bytes_delete(dirty);
    OK(vmcore_memory_write(memory, 0x102000, data, 1));
    OK(vmcore_vm_take_dirty(vm, 0x100000, &dirty));
    CHECK(vmcore_bytes_len(dirty) == 1 && vmcore_bytes_data(dirty)[0] == 4);
    vmcore_bytes_delete(dirty);
    OK(vmcore_region_new(0x200000, 0x1000, &region));
    vmcore_region_set_read_only(region, true);
    OK(vmcore_vm_map_region(vm, region));
    FAILS(VMCORE_ERROR_MEMORY, vmcore_memory_write(memory, 0x200000, data, 1));
    OK(vmcore_vm_unmap(vm, 0x200000));

    /* A host without NUMA says so; one with it has node 0. */
    const uint32_t nodes[] = {0, 9999};
    OK(vmcore_region_new(0x300000, 0x1000, &region));
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_region_set_numa(region, 9, nodes, 1));
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_region_set_numa(region, VMCORE_NUMA_PREFERRED, nodes, 2));
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_region_set_numa(region, VMCORE_NUMA_BIND, NULL, 1));
    OK(vmcore_region_set_numa(region, VMCORE_NUMA_INTERLEAVE, nodes, 1));
    OK(vmcore_region_set_numa(region, VMCORE_NUMA_DEFAULT, NULL, 0));
    OK(vmcore_region_set_numa(region, VMCORE_NUMA_BIND, nodes, 1));
    vmcore_error *error = vmcore_vm_map_region(vm, region);
    CHECK(!error || vmcore_error_errno(error) == ENOSYS);
    vmcore_error_delete(error);
    OK(vmcore_region_new(0x400000, 0x1000, &region));
    OK(vmcore_region_set_numa(region, VMCORE_NUMA_BIND, nodes, 2));
    FAILS(VMCORE_ERROR_MEMORY, vmcore_vm_map_region(vm, region));
    /* The memory of a built VM, as a region says. */
    static const uint8_t HLT[] = {0xf4};
    vmcore_vm *made = NULL;
    vmcore_builder *builder = built(HLT, sizeof HLT);
    OK(vmcore_region_new(0, 0, &region));
    OK(vmcore_region_set_contents(region, HLT, sizeof HLT));
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_builder_set_memory_like(builder, region));
    OK(vmcore_region_set_contents(region, NULL, 0));
    vmcore_region_set_memfd(region);
    OK(vmcore_builder_set_memory_like(builder, region));
    OK(vmcore_builder_build(builder, &made));
    vmcore_vm_delete(made);
    builder = built(HLT, sizeof HLT);
    OK(vmcore_region_set_numa(region, VMCORE_NUMA_BIND, nodes, 2));
    OK(vmcore_builder_set_memory_like(builder, region));
    FAILS(VMCORE_ERROR_MEMORY, vmcore_builder_build(builder, &made));
    vmcore_region_delete(region);
    OK(vmcore_region_new(0x300001, 0x1000, &region));
    FAILS(VMCORE_ERROR_MEMORY, vmcore_vm_map_region(vm, region));

    vmcore_vcpu_delete(vcpu);
    vmcore_vm_delete(vm);
    /* The memory stays while somebody looks at it. */
    vmcore_view_data(view)[0] = 1;
    OK(vmcore_memory_read(memory, 0x2000, data, 1));
    CHECK(data[0] == 1);
    vmcore_memory_delete(memory);
    vmcore_view_data(view)[0] = 2;
    vmcore_view_delete(view);
    vmcore_view_delete(NULL);
    vmcore_memory_delete(NULL);
    return 0;
}
