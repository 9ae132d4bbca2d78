"""Sixteen-bit code on a bare vCPU: no kernel, no device, the guest's I/O goes to a function."""

import vmcore

# mov dx, 0x3f8; mov si, text; next: lodsb; test al, al; jz done; out dx, al; jmp next; done: hlt; text:
CODE = b"\xba\xf8\x03\xbe\x10\x00\xac\x84\xc0\x74\x03\xee\xeb\xf8\xf4\x90Hello from a vCPU!\n\0"


def port_write(port: int, data: bytes) -> None:
    if port == 0x3F8:
        print(chr(data[0]), end="")


with vmcore.Vm.bare() as vm:
    vm.map(0, 0x10000)
    vm.memory.write(0x1000, CODE)

    vcpu = vm.create_vcpu(0)
    vcpu.enter_real_mode(0x1000)
    assert vcpu.run(port_write=port_write) == vmcore.VcpuExit.HALTED
