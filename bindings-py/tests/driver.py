"""A driver of one virtio-mmio device (virtio 1.2, section 4.2): a guest in 32-bit code that is made step by step."""

from __future__ import annotations

import struct
from typing import Any

import vmcore

# One after the other for each queue: descriptors, what is available, what is used.
_RINGS, _RING, _SIZE = 0x140000, 0x3000, 8
DATA = 0x180000
_CODE = 0x100000
_NEXT, _WRITE = 1, 2


class Driver:
    """A guest that drives the one virtio device of its VM."""

    def __init__(self, queues: int, **keywords: Any) -> None:
        """In a VM with the device that the keywords make, of which as many queues are used."""
        self._code = b""
        self._window = 0
        self._offered = [0] * queues
        self.vm = vmcore.Vm(
            kernel=b"\xf4", entry="raw32", memory="2M", accel="soft", exit_port=0xF4, devices=[self._look], **keywords
        )
        self._begin(queues)

    def _look(self, machine: vmcore.Machine) -> None:
        """The device before this one has the window before this one's."""
        self._window = machine.mmio_window(0x1000) - 0x1000

    def _poke(self, register: int, value: int) -> None:
        # mov dword [window + register], value
        self._code += b"\xc7\x05" + struct.pack("<II", self._window + register, value)

    def _begin(self, queues: int) -> None:
        """Makes driver and device known to each other."""
        for status in (0, 1, 3):
            self._poke(0x70, status)
        # VIRTIO_F_VERSION_1, and nothing else.
        self._poke(0x24, 1)
        self._poke(0x20, 1)
        self._poke(0x70, 11)
        for queue in range(queues):
            ring = _RINGS + queue * _RING
            values = [(0x30, queue), (0x38, _SIZE), (0x80, ring), (0x90, ring + 0x1000), (0xA0, ring + 0x2000), (0x44, 1)]
            for register, value in values:
                self._poke(register, value)
        self._poke(0x70, 15)

    def request(self, queue: int, *pieces: tuple[int, int, bool]) -> None:
        """Has a request served: for each piece its address, its length, and whether the device writes it."""
        ring, memory = _RINGS + queue * _RING, self.vm.memory
        first = self._offered[queue] * len(pieces)
        for number, (at, length, write) in enumerate(pieces, first):
            last = number + 1 == first + len(pieces)
            flags = (_WRITE if write else 0) | (0 if last else _NEXT)
            memory.write_struct(ring + 16 * number, "<QIHH", at, length, flags, number + 1)
        memory.write_struct(ring + 0x1004 + 2 * self._offered[queue], "<H", first)
        self._offered[queue] += 1
        memory.write_struct(ring + 0x1002, "<H", self._offered[queue])
        self._poke(0x50, queue)
        # again: pause; cmp word [used + 2], offered; jne again
        self._code += b"\xf3\x90\x66\x81\x3d" + struct.pack("<IH", ring + 0x2002, self._offered[queue]) + b"\x75\xf3"

    def end(self) -> None:
        """mov al, 7; out 0xf4, al: the guest is complete."""
        self.vm.memory.write(_CODE, self._code + b"\xb0\x07\xe6\xf4\xf4")
