"""Every error of the engine as an exception."""

from __future__ import annotations

import bz2
import errno
import gzip
import os
import pickle
import re
import resource
import socket
import struct
import subprocess
import sys
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


def read_only(_: Path) -> None:
    with bare() as vm:
        vm.map(0x20000, 0x1000, read_only=True)
        vm.memory.write(0x20000, b"x")


def file_too_short(tmp: Path) -> None:
    (tmp / "memory").write_bytes(bytes(0x1000))
    with bare() as vm, (tmp / "memory").open("r+b") as file:
        vm.map(0x20000, 0x2000, file=file, shared=True)


def settings_that_exclude_each_other(_: Path) -> None:
    with bare() as vm:
        vm.map(0x20000, 0x1000, memfd=True, mergeable=True)


def numa_nodes(_: Path) -> None:
    with bare() as vm:
        vm.map(0x20000, 0x1000, numa=("bind", [9999]))


def boot(kernel: bytes | Path | str, entry: str, **keywords: Any) -> None:
    vmcore.Vm(**{"kernel": kernel, "entry": entry, "memory": "2M", "accel": "soft", **keywords})


def boot_read(_: Path) -> None:
    # A file of sysfs is shorter than it says.
    boot("/sys/kernel/uevent_seqnum", "raw16")


def boot_truncated(_: Path) -> None:
    boot(b"", "raw16")


def boot_invalid(_: Path) -> None:
    boot(b"\x7fELF\x09" + bytes(60), "elf")


#: A flat multiboot kernel at 1 MiB.
MULTIBOOT = struct.pack("<III5I", 0x1BADB002, 0x10000, -0x1BADB002 - 0x10000 & 0xFFFFFFFF, 0x100000, 0x100000, 0, 0, 0x100020)
MULTIBOOT += bytes(4096)


def boot_unsupported(_: Path) -> None:
    # It wants a video mode.
    boot(struct.pack("<III", 0x1BADB002, 4, -0x1BADB002 - 4 & 0xFFFFFFFF) + bytes(4096), "multiboot")


def boot_decompress(_: Path) -> None:
    boot(gzip.compress(os.urandom(20000))[:10] + b"\xff" * 20000, "elf")


def elf(*segments: tuple[int, int]) -> bytes:
    """An ELF file with a segment of each of these physical addresses and lengths."""
    head = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    head += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, segments[0][0], 64, 0, 0, 64, 56, len(segments), 0, 0, 0)
    programs = [struct.pack("<IIQQQQQQ", 1, 5, 0, at, at, 16, length, 4096) for at, length in segments]
    return head + b"".join(programs) + bytes(64)


def boot_payload_length(_: Path) -> None:
    payload = bz2.compress(elf((0x1000000, 0x1000))) + struct.pack("<I", 12345)
    image = bytearray(0x400)
    image[0x1F1] = 1
    struct.pack_into("<I", image, 0x1F4, -(-len(payload) // 16))
    struct.pack_into("<HHIH", image, 0x1FE, 0xAA55, 0x62EB, 0x53726448, 0x20F)
    image[0x211] = 1
    struct.pack_into("<IBBH", image, 0x230, 0x200000, 1, 21, 1)
    struct.pack_into("<I", image, 0x238, 2047)
    struct.pack_into("<II", image, 0x248, 0, len(payload))
    struct.pack_into("<QII", image, 0x258, 0x1000000, 0x100000, 0)
    boot(bytes(image) + payload + bytes(16), "linux", memory="64M")


def boot_too_large(_: Path) -> None:
    boot("/dev/zero", "raw16")


def boot_not_in_memory(_: Path) -> None:
    boot(bytes(2 << 20), "raw32")


def boot_no_room(_: Path) -> None:
    boot(MULTIBOOT, "multiboot", initrd=bytes(0x180000))


def boot_overlap(_: Path) -> None:
    boot(elf((0x100000, 0x2000), (0x101000, 0x1000)), "elf")


def boot_zero_byte(_: Path) -> None:
    boot(MULTIBOOT, "multiboot", cmdline="a\0b")


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


def disk_kind(_: Path) -> None:
    vmcore.Disk("/dev/null")


def disk_backing(tmp: Path) -> None:
    head = struct.pack(">IIQIIQIIQQIIQ", 0x514649FB, 3, 104, 9, 16, 1 << 20, 0, 1, 0x30000, 0x10000, 1, 0, 0)
    head += struct.pack(">QQQII", 0, 0, 0, 4, 104)
    (tmp / "a.qcow2").write_bytes((head + b"other.img").ljust(0x40000, b"\0"))
    vmcore.Disk(tmp / "a.qcow2", format="qcow2", read_only=True)


VMDK = '# Disk DescriptorFile\nversion=1\ncreateType="monolithicFlat"\nRW 8 FLAT "other.img" 0\n'


def disk_extent(tmp: Path) -> None:
    (tmp / "a.vmdk").write_text(VMDK)
    vmcore.Disk(tmp / "a.vmdk", format="vmdk", read_only=True)


def disk_direct(tmp: Path) -> None:
    (tmp / "a.vmdk").write_text(VMDK)
    vmcore.Disk(tmp / "a.vmdk", format="vmdk", read_only=True, direct=True)


def disk_resize(tmp: Path) -> None:
    (tmp / "disk.img").write_bytes(bytes(4096))
    vmcore.Disk(tmp / "disk.img").resize(512)


def disk_id(tmp: Path) -> None:
    (tmp / "disk.img").write_bytes(bytes(4096))
    vmcore.Disk(tmp / "disk.img", serial="a serial number beyond 20 bytes")


def nat_host(_: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open("/dev/null", os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
    try:
        vmcore.Net.nat()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def tap_name(_: Path) -> None:
    vmcore.Net.tap("a/b")


def tap_queues(_: Path) -> None:
    vmcore.Net.tap("tap0", queues=0)


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
    (read_only, vmcore.GuestMemoryError, ValueError, "memory.read_only"),
    (file_too_short, vmcore.GuestMemoryError, ValueError, "memory.file_too_short"),
    (settings_that_exclude_each_other, vmcore.GuestMemoryError, ValueError, "memory.unsupported"),
    (boot_read, vmcore.BootError, ValueError, "boot.read"),
    (boot_truncated, vmcore.BootError, ValueError, "boot.truncated"),
    (boot_invalid, vmcore.BootError, ValueError, "boot.invalid"),
    (boot_unsupported, vmcore.BootError, ValueError, "boot.unsupported"),
    (boot_decompress, vmcore.BootError, ValueError, "boot.decompress"),
    (boot_payload_length, vmcore.BootError, ValueError, "boot.payload_length"),
    (boot_too_large, vmcore.BootError, ValueError, "boot.too_large"),
    (boot_not_in_memory, vmcore.BootError, ValueError, "boot.not_in_memory"),
    (boot_no_room, vmcore.BootError, ValueError, "boot.no_room"),
    (boot_overlap, vmcore.BootError, ValueError, "boot.overlap"),
    (boot_zero_byte, vmcore.BootError, ValueError, "boot.zero_byte"),
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
    (disk_kind, vmcore.DiskError, ValueError, "disk.kind"),
    (disk_backing, vmcore.DiskError, ValueError, "disk.backing"),
    (disk_extent, vmcore.DiskError, ValueError, "disk.extent"),
    (disk_direct, vmcore.DiskError, ValueError, "disk.direct"),
    (disk_resize, vmcore.DiskError, ValueError, "disk.resize"),
    (disk_id, vmcore.DiskError, ValueError, "disk.id"),
    (nat_host, vmcore.NatHostError, OSError, "nat.host"),
    (tap_name, vmcore.DeviceError, RuntimeError, "tap.name"),
    (tap_queues, vmcore.DeviceError, RuntimeError, "tap.queues"),
    (nat_text, vmcore.NatError, ValueError, "nat.text"),
    (nat_setting, vmcore.NatError, ValueError, "nat.setting"),
    (nat_bind, vmcore.NatHostError, OSError, "nat.bind"),
    (expect_timeout, vmcore.ExpectTimeoutError, TimeoutError, "expect.timeout"),
    (expect_closed, vmcore.ConsoleClosedError, EOFError, "expect.closed"),
    (wait_timeout, vmcore.WaitTimeoutError, TimeoutError, "timeout"),
]


#: What no test provokes, and why.
UNREACHED = {
    "entry_failed": "wants a hardware KVM, and registers that it did not refuse when they were set",
    "memory.no_slots": "takes 32764 regions, which is minutes",
    "boot.seed": "the host always has random numbers",
    "boot.table": "no device that Python can attach is one that no table can describe",
    "boot.memory": "what is loaded goes to memory that has just been found to be there",
    "disk.guess": "the format of an image that is written is never guessed here",
    "tap.host": "what a host refuses that has a tap",
}

#: What a process of its own does first, and the error that it then meets.
APART = {
    "tap.driver": ("os.chroot(tempfile.mkdtemp())", "vmcore.Net.tap('tap0')"),
    "tap.permission": ("without_cap_net_admin()", "vmcore.Net.tap('vmcorenot')"),
    "tap.unsuitable": ("in_a_network_of_its_own()", "vmcore.Net.tap('lo')"),
    "tap.busy": ("in_a_network_of_its_own(); tap = vmcore.Net.tap('tap0')", "vmcore.Net.tap('tap0')"),
}

SCRIPT = """
import ctypes, os, tempfile
import vmcore

libc = ctypes.CDLL(None, use_errno=True)

def check(result):
    if result != 0:
        raise PermissionError(ctypes.get_errno(), "not allowed")

def without_cap_net_admin():
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    check(libc.capget(header, data))
    data[0] &= ~(1 << 12)
    check(libc.capset(header, data))
    has_driver()

def in_a_network_of_its_own():
    if libc.unshare(0x40000000) != 0:
        check(libc.unshare(0x50000000))
    has_driver()

def has_driver():
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        raise PermissionError("there is no /dev/net/tun")

try:
    PREPARE
except PermissionError as error:
    print("unable:", error)
else:
    try:
        CALL
    except vmcore.Error as error:
        print(error.code)
"""

TREE = Path(__file__).parents[2]
#: Where Rust has the errors whose codes begin so.
ENUMS = [
    ("", "Error", "vmcore/src/error.rs"),
    ("memory.", "MemoryError", "vmcore/src/memory/mod.rs"),
    ("boot.", "BootError", "vmcore/src/boot/error.rs"),
    ("disk.", "DiskError", "vmdevices/src/block/error.rs"),
    ("nat.", "NatError", "vmdevices/src/net/nat/error.rs"),
    ("tap.", "TapError", "vmdevices/src/net/tap.rs"),
    ("expect.", "ExpectError", "vmdevices/src/console/memory.rs"),
]


def codes_of(prefix: str, name: str, path: str) -> set[str]:
    """A code for each variant of an enum in Rust."""
    source = (TREE / path).read_text()
    body = source.partition(f"pub enum {name} {{\n")[2].partition("\n}\n")[0]
    variants: list[str] = re.findall(r"^    ([A-Z]\w*)(?: \{|\(|,)", body, re.MULTILINE)
    assert len(variants) >= 2, path
    return {prefix + re.sub(r"(?<!^)([A-Z])", r"_\1", variant).lower() for variant in variants}


def test_each_error_of_rust_is_provoked_or_has_a_reason() -> None:
    # Of these two Python has what is inside.
    codes = {code for enum in ENUMS for code in codes_of(*enum)} - {"memory", "boot"}
    provoked = {code for *_, code in CASES} | set(APART) | {"backend_unusable", "memory.numa_nodes"}
    assert codes - provoked == set(UNREACHED)
    # The rest is Python's own.
    assert provoked - codes == {"closed", "timeout"}


@pytest.mark.parametrize("code", APART)
def test_taps_that_cannot_be_had_say_why(code: str) -> None:
    prepare, call = APART[code]
    script = SCRIPT.replace("PREPARE", prepare).replace("CALL", call)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    if done.stdout.startswith("unable:"):
        pytest.skip(done.stdout)
    assert (done.stdout, done.stderr) == (f"{code}\n", "")


def test_nodes_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(vmcore.GuestMemoryError) as caught:
        numa_nodes(tmp_path)
    # A kernel without NUMA has none of these calls.
    has_numa = Path("/sys/devices/system/node").exists()
    assert caught.value.code == ("memory.numa_nodes" if has_numa else "memory.host")
    with pytest.raises(vmcore.GuestMemoryError) as again:
        boot(EXIT_7, "raw16", numa=("bind", [9999]))
    assert again.value.code == caught.value.code
    with vmcore.Vm(kernel=EXIT_7, entry="raw16", accel="soft", exit_port=0xF4, huge_pages="never") as vm:
        assert vm.run() == vmcore.Outcome.exit(7)


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
        ({"huge_pages": "4M"}, "2M"),
        ({"numa": ("near", [0])}, "bind"),
    ]
    for keywords, known in cases:
        with pytest.raises(vmcore.ConfigError) as caught:
            vmcore.Vm(**{"kernel": EXIT_7, **keywords})
        assert caught.value.fix is not None and known in caught.value.fix
