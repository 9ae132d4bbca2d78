"""Port-exit callbacks a second from Python: `python benches/callbacks.py [--accel soft] [--count N]`.

A guest writes to a port in a loop, and each write is a call of a Python function; the same with none but
the engine's own bus for comparison, and with a device class on it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import vmcore

# mov ecx, COUNT; next: out 0x10, al; dec ecx; jnz next; hlt
def code(count: int) -> bytes:
    return b"\x66\xb9" + count.to_bytes(4, "little") + b"\xe6\x10\x66\x49\x75\xfa\xf4"


class Port(vmcore.PortDevice):
    def write(self, offset: int, data: bytes) -> None:
        pass


def measure(accel: str, count: int, run: Callable[[vmcore.Vm, vmcore.Vcpu], object]) -> float:
    with vmcore.Vm.bare(accel=accel) as vm:
        vm.map(0, 0x10000)
        vm.memory.write(0x1000, code(count))
        vcpu = vm.create_vcpu()
        vcpu.enter_real_mode(0x1000)
        begin = time.perf_counter()
        run(vm, vcpu)
        return count / (time.perf_counter() - begin)


def callback(vm: vmcore.Vm, vcpu: vmcore.Vcpu) -> None:
    vcpu.run(port_write=lambda port, data: None)


def device(vm: vmcore.Vm, vcpu: vmcore.Vcpu) -> None:
    vm.add_ports(0x10, 1, Port(0x10))
    vcpu.run()


def nothing(vm: vmcore.Vm, vcpu: vmcore.Vcpu) -> None:
    vcpu.run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accel", default="soft", choices=["soft", "kvm"])
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    kinds = {"function": callback, "device": device, "no python": nothing}
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    # Interleaved: the machine may be busy with other things for a while.
    for _ in range(args.rounds):
        for name, run in kinds.items():
            rates[name].append(measure(args.accel, args.count, run))
    for name, rate in rates.items():
        print(f"{args.accel} python {name}: {statistics.median(rate):.0f} port exits a second")


if __name__ == "__main__":
    main()
