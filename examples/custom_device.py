"""A device of one's own: a port that adds up what the guest writes, on a machine without any other."""

import vmcore

# mov al, 10; next: out 0x42, al; dec al; jnz next; out 0x42, al; hlt
CODE = bytes([0xB0, 10, 0xE6, 0x42, 0xFE, 0xC8, 0x75, 0xFA, 0xE6, 0x42, 0xF4])


class Adder(vmcore.PortDevice):
    """Write: adds the byte. Read: the sum. Writing 0 ends the VM with the sum as its exit code."""

    sum = 0

    def read(self, offset: int, size: int) -> int:
        return self.sum % (1 << 8 * size)

    def write(self, offset: int, data: bytes) -> None:
        if data[0] == 0:
            self.control.end(vmcore.Outcome.exit(self.sum))
        else:
            self.sum += data[0]


with vmcore.Vm(memory=64 << 10, irqchip=False, kernel=CODE, entry="raw16", pc=False, devices=[Adder(0x42)]) as vm:
    outcome = vm.run()
if outcome.code is not None:
    print(f"10 + 9 + ... + 1 = {outcome.code}")
else:
    print(f"the guest ended in another way: {outcome}")
