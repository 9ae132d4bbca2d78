"""Devices of one's own, as classes.

Each is put on a machine by `Vm(devices=[...])`, which calls `attach(machine)`. A function that takes the
machine will do too. `read` and `write` are called on the thread of the vCPU that makes the access, which
waits for the answer; an exception ends the run and comes out of it.
"""

from __future__ import annotations

from typing import Protocol

from vmcore._native import Control, IrqLine, Machine


class Device(Protocol):
    """What `Vm(devices=[...])` takes."""

    def attach(self, machine: Machine, /) -> object:
        """Puts the device on `machine`. Called once, while the VM is being built."""


class _BusDevice:
    control: Control
    """The machine's off switch; there once the device is attached."""

    def read(self, offset: int, size: int) -> int | bytes | None:
        """Answers a read of `size` bytes (1, 2, 4 or 8) at `offset` from the base; None is all ones."""
        return None

    def write(self, offset: int, data: bytes) -> None:
        """Takes a write at `offset` from the base."""


class PortDevice(_BusDevice):
    """A device at `length` I/O ports from `base`: override `read` and `write`."""

    def __init__(self, base: int, length: int = 1) -> None:
        self.base = base
        self.length = length

    def attach(self, machine: Machine, /) -> None:
        """Claims the ports."""
        self.control = machine.control
        machine.ports(self.base, self.length, self)


class MmioDevice(_BusDevice):
    """A device at `length` bytes of addresses from `base`, or where there is room: override `read`, `write`."""

    irq: IrqLine
    """Its interrupt wire; there once the device is attached."""
    gsi: int
    """The number of the interrupt."""

    def __init__(self, length: int = 0x1000, base: int | None = None) -> None:
        self.base = base
        self.length = length

    def attach(self, machine: Machine, /) -> None:
        """Claims the addresses and an interrupt."""
        self.control = machine.control
        if self.base is None:
            self.base = machine.mmio_window(self.length)
        self.gsi = machine.allocate_gsi()
        self.irq = machine.irq_line(self.gsi)
        machine.mmio(self.base, self.length, self)


class VirtioDevice:
    """A virtio device: override `handle`, and set what it is.

    Requests are answered one at a time, on a thread of the device's. A request and an answer have 1 MiB at
    most.
    """

    #: Its type (virtio 1.2, section 5).
    device_type: int = 0
    #: The largest number of entries of each queue.
    queue_sizes: list[int] = [128]
    #: The feature bits of its type that it offers.
    features: int = 0
    #: The bytes of its configuration.
    config: bytes = b""
    #: What it is behind: "mmio" or "pci".
    transport: str = "mmio"

    def attach(self, machine: Machine, /) -> None:
        """Puts the device behind its transport."""
        machine.virtio(self, transport=self.transport)

    def activate(self, features: int) -> None:
        """The driver is ready, and has agreed to `features`."""

    def write_config(self, offset: int, data: bytes) -> None:
        """Takes a write to the configuration; the guest chooses offset and length."""

    def handle(self, queue: int, request: bytes, room: int) -> bytes | None:
        """Answers a request that came in `queue`, with `room` bytes at most."""
        raise NotImplementedError
