"""What the tests share: guests of a few bytes, and the backends that run them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmcore

# mov al, 'H'; out 0xe9, al; mov al, 'i'; out 0xe9, al; hlt
HI = b"\xb0H\xe6\xe9\xb0i\xe6\xe9\xf4"
# jmp $
LOOP = b"\xeb\xfe"
# mov al, 7; out 0xf4, al; hlt
EXIT_7 = b"\xb0\x07\xe6\xf4\xf4"
# mov dx, 0x3f8; mov al, 'H'; out dx, al; mov al, 'i'; out dx, al; mov al, 10; out dx, al; mov al, 7; out 0xf4, al
SERIAL = b"\xba\xf8\x03\xb0H\xee\xb0i\xee\xb0\x0a\xee\xb0\x07\xe6\xf4\xf4"
# mov dx, 0x3f8; mov al, '?'; out dx, al; next: mov dx, 0x3fd; in al, dx; test al, 1; jz next; mov dx, 0x3f8;
# in al, dx; out dx, al; jmp next
ECHO = b"\xba\xf8\x03\xb0?\xee\xba\xfd\x03\xec\xa8\x01\x74\xf8\xba\xf8\x03\xec\xee\xeb\xf1"


def usable() -> list[str]:
    return [backend.name for backend in vmcore.check().backends if backend.status != "not_usable"]


@pytest.fixture(params=usable())
def accel(request: pytest.FixtureRequest) -> str:
    """Each backend that runs small guests here."""
    return str(request.param)


@pytest.fixture(autouse=True)
def control_c() -> Iterator[None]:
    """Ctrl-C is KeyboardInterrupt, also where a shell started the tests in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def bare(accel: str) -> Iterator[vmcore.Vm]:
    """A bare VM of 64 KiB."""
    with vmcore.Vm.bare(accel=accel) as vm:
        vm.map(0, 0x10000)
        yield vm


def vcpu_at(vm: vmcore.Vm, code: bytes, at: int = 0x1000) -> vmcore.Vcpu:
    """A vCPU about to run `code`."""
    vm.memory.write(at, code)
    vcpu = vm.create_vcpu()
    vcpu.enter_real_mode(at)
    return vcpu


def guests() -> Path:
    """The kernels and disks that examples/guest/build makes."""
    path = Path(os.environ.get("VMCORE_GUESTS", ""))
    if not (path / "cloud" / "vmlinuz").exists():
        if os.environ.get("VMCORE_REQUIRE_BOOT"):
            pytest.fail("no guests: run make guests, and set VMCORE_GUESTS")
        pytest.skip("no guests: run make guests, and set VMCORE_GUESTS")
    return path
