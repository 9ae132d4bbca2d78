"""Every error of the engine as an exception."""

from __future__ import annotations

import errno
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import EXIT_7, vcpu_at

import vmcore


def bare() -> vmcore.Vm:
    vm = vmcore.Vm.bare(accel="soft")
    vm.map(0, 0x10000)
    return vm


def overlap(_: Path) -> None:
    with bare() as vm:
        vm.map(0x8000, 0x10000)


def misaligned(_: Path) -> None:
    with bare() as vm:
        vm.map(0x10001, 0x1000)


def empty(_: Path) -> None:
    with bare() as vm:
        vm.map(0x20000, 0)


def overflow(_: Path) -> None:
    with bare() as vm:
        vm.map((1 << 63), 0x1000)


def host_memory(_: Path) -> None:
    with bare() as vm:
        vm.map(1 << 40, 1 << 50)


def not_mapped(_: Path) -> None:
    with bare() as vm:
        vm.memory.read(0x10000, 1)


def no_region(_: Path) -> None:
    with bare() as vm:
        vm.unmap(0x1234000)


def not_tracked(_: Path) -> None:
    with bare() as vm:
        vm.take_dirty(0)


def boot_missing(tmp: Path) -> None:
    vmcore.Vm(kernel=tmp / "none", accel="soft")


def boot_unrecognised(_: Path) -> None:
    vmcore.Vm(kernel=b"no kernel" * 1000, entry="linux", accel="soft")


def system_call(tmp: Path) -> None:
    vmcore.Vm(kernel=EXIT_7, entry="raw16", console=f"file:{tmp}/none/console", accel="soft")


def unsupported(_: Path) -> None:
    with bare() as vm:
        vcpu_at(vm, b"\xf4").run_instructions(1)


def config(_: Path) -> None:
    vmcore.Vm(accel="soft")


def conflict(_: Path) -> None:
    device = vmcore.PortDevice(0x60)
    vmcore.Vm(kernel=EXIT_7, entry="raw16", accel="soft", devices=[device])


def emulation(_: Path) -> None:
    with bare() as vm:
        # Runs on into where there is no memory.
        vcpu = vcpu_at(vm, b"\xf4")
        vcpu.cs = vmcore.Segment.real_mode(0xF000, code=True)
        vcpu.run()


def state(_: Path) -> None:
    vmcore.VmState.from_bytes(b"\xff" * 4)


def wrong_state(_: Path) -> None:
    with bare() as vm:
        vm.run()


def closed(_: Path) -> None:
    vm = bare()
    vm.close()
    vm.create_vcpu()


def device(_: Path) -> None:
    def attach(machine: vmcore.Machine) -> None:
        machine.control.fail("it is broken")

    with vmcore.Vm(kernel=EXIT_7, entry="raw16", accel="soft", devices=[attach]) as vm:
        vm.run()


def disk_missing(tmp: Path) -> None:
    vmcore.Disk(tmp / "none.img")


def disk_empty(tmp: Path) -> None:
    (tmp / "empty.img").touch()
    vmcore.Disk(tmp / "empty.img")


def disk_looks_otherwise(tmp: Path) -> None:
    (tmp / "a.qcow2").write_bytes(b"QFI\xfb\x00\x00\x00\x03" + bytes(4096))
    vmcore.Disk(tmp / "a.qcow2")


def disk_locked(tmp: Path) -> None:
    (tmp / "disk.img").write_bytes(bytes(4096))
    first = vmcore.Disk(tmp / "disk.img")
    vmcore.Disk(tmp / "disk.img")
    del first


def nat_text(_: Path) -> None:
    vmcore.Net.nat(forwards=["80"])


def nat_setting(_: Path) -> None:
    vmcore.Net.nat(mtu=1)


def nat_bind(_: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        vmcore.Net.nat(forwards=[f"tcp:{taken.getsockname()[1]}:80"])


def expect_timeout(_: Path) -> None:
    with vmcore.Vm(kernel=EXIT_7, entry="raw16", accel="soft") as vm:
        vm.console.expect("never", 0.01)


def expect_closed(_: Path) -> None:
    with vmcore.Vm(kernel=EXIT_7, entry="raw16", accel="soft", exit_port=0xF4) as vm:
        vm.run()
        vm.console.expect("never")


def wait_timeout(_: Path) -> None:
    with vmcore.Vm(kernel=b"\xeb\xfe", entry="raw16", accel="soft") as vm:
        vm.start()
        vm.wait(0.01)


CASES: list[tuple[Callable[[Path], None], type[vmcore.Error], type[Exception], str]] = [
    (overlap, vmcore.GuestMemoryError, ValueError, "memory.overlap"),
    (misaligned, vmcore.GuestMemoryError, ValueError, "memory.misaligned"),
    (empty, vmcore.GuestMemoryError, ValueError, "memory.empty"),
    (overflow, vmcore.GuestMemoryError, ValueError, "memory.overflow"),
    (host_memory, vmcore.HostMemoryError, OSError, "memory.host"),
    (not_mapped, vmcore.NotMappedError, IndexError, "memory.not_mapped"),
    (no_region, vmcore.GuestMemoryError, ValueError, "memory.no_region"),
    (not_tracked, vmcore.ConfigError, ValueError, "config"),
    (boot_missing, vmcore.BootFileError, FileNotFoundError, "boot.open"),
    (boot_unrecognised, vmcore.BootError, ValueError, "boot.unrecognised"),
    (system_call, vmcore.SystemCallError, FileNotFoundError, "os"),
    (unsupported, vmcore.UnsupportedError, NotImplementedError, "unsupported"),
    (config, vmcore.ConfigError, ValueError, "config"),
    (conflict, vmcore.ConflictError, ValueError, "conflict"),
    (emulation, vmcore.EmulationError, RuntimeError, "emulation"),
    (state, vmcore.StateError, ValueError, "state"),
    (wrong_state, vmcore.WrongStateError, RuntimeError, "wrong_state"),
    (closed, vmcore.ClosedError, ValueError, "closed"),
    (device, vmcore.DeviceError, RuntimeError, "device"),
    (disk_missing, vmcore.DiskFileError, FileNotFoundError, "disk.open"),
    (disk_empty, vmcore.DiskError, ValueError, "disk.empty"),
    (disk_looks_otherwise, vmcore.DiskError, ValueError, "disk.image"),
    (disk_locked, vmcore.DiskFileError, OSError, "disk.locked"),
    (nat_text, vmcore.NatError, ValueError, "nat.text"),
    (nat_setting, vmcore.NatError, ValueError, "nat.setting"),
    (nat_bind, vmcore.NatHostError, OSError, "nat.bind"),
    (expect_timeout, vmcore.ExpectTimeoutError, TimeoutError, "expect.timeout"),
    (expect_closed, vmcore.ConsoleClosedError, EOFError, "expect.closed"),
    (wait_timeout, vmcore.WaitTimeoutError, TimeoutError, "timeout"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].__name__)
def test_each_error_has_its_class_its_code_and_its_fix(
    case: tuple[Callable[[Path], None], type[vmcore.Error], type[Exception], str], tmp_path: Path
) -> None:
    provoke, kind, builtin, code = case
    with pytest.raises(kind) as caught:
        provoke(tmp_path)
    error = caught.value
    assert isinstance(error, builtin) and isinstance(error, vmcore.Error)
    assert error.code == code
    notes = getattr(error, "__notes__", [])
    assert notes == ([f"fix: {error.fix}"] if error.fix else [])
    assert str(error) and not str(error).endswith((";", " "))
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.code, copy.fix) == (str(error), error.code, error.fix)
    assert isinstance(copy, kind) and isinstance(copy, builtin)


def test_a_failed_instruction_is_described(tmp_path: Path) -> None:
    with pytest.raises(vmcore.EmulationError) as caught:
        emulation(tmp_path)
    assert caught.value.rip >= 0 and isinstance(caught.value.bytes, bytes)


def test_errors_of_the_system_have_its_number(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        boot_missing(tmp_path)
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(OSError) as bound:
        nat_bind(tmp_path)
    assert bound.value.errno == errno.EADDRINUSE


def test_a_backend_that_is_not_there_says_what_to_do() -> None:
    report = {backend.name: backend for backend in vmcore.check().backends}
    if report["kvm"].status != "not_usable":
        pytest.skip("KVM can be used here")
    with pytest.raises(vmcore.BackendUnusableError) as caught:
        vmcore.Vm.bare(accel="kvm")
    assert caught.value.backend == "kvm" and caught.value.fix == report["kvm"].advice


def test_kvm_refuses_what_no_processor_enters() -> None:
    report = {backend.name: backend for backend in vmcore.check().backends}
    if report["kvm"].status != "usable":
        pytest.skip("wants a hardware KVM")
    with vmcore.Vm.bare(accel="kvm") as vm:
        vm.map(0, 0x10000)
        vcpu = vcpu_at(vm, b"\xf4")
        vcpu.rflags = 1 << 17
        with pytest.raises((vmcore.EntryFailedError, vmcore.EmulationError)):
            vcpu.run()


def test_names_that_are_not_known_are_refused_with_those_that_are() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"accel": "hvf"}, "soft"),
        ({"cpu": "v9"}, "v3"),
        ({"entry": "efi"}, "raw16"),
        ({"transport": "ccw"}, "pci"),
        ({"console": "nowhere"}, "stdio"),
        ({"memory": "much"}, "with K, M"),
        ({"nets": ["bridge"]}, "nat"),
    ]
    for keywords, known in cases:
        with pytest.raises(vmcore.ConfigError) as caught:
            vmcore.Vm(**{"kernel": EXIT_7, **keywords})
        assert caught.value.fix is not None and known in caught.value.fix
