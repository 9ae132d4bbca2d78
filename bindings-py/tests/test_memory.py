"""The guest's memory."""

from __future__ import annotations

import ctypes
import gc
import struct

import pytest
from conftest import vcpu_at

import vmcore

numpy = pytest.importorskip("numpy")


def test_bytes_slices_and_numbers(bare: vmcore.Vm) -> None:
    memory = bare.memory
    memory.write(0x100, b"abc")
    assert memory.read(0x100, 3) == b"abc" == memory[0x100:0x103]
    memory[0x101] = 0x42
    memory[0x102:0x104] = bytearray(b"xy")
    assert memory[0x100:0x104] == b"aBxy" and memory[0x101] == 0x42
    memory.zero(0x100, 4)
    assert not any(memory[0x100:0x104])
    assert len(memory) == 0x10000 and 0xFFFF in memory and 0x10000 not in memory


def test_structs_are_read_by_format_and_by_class(bare: vmcore.Vm) -> None:
    class Header(ctypes.LittleEndianStructure):
        _fields_ = [("magic", ctypes.c_uint32), ("size", ctypes.c_uint16)]

    bare.memory.write_struct(0x200, "<IH", 0x12345678, 9)
    assert bare.memory.read_struct(0x200, "<IH") == (0x12345678, 9)
    assert bare.memory.read_struct(0x200, struct.Struct("<H")) == (0x5678,)
    header = bare.memory.read_struct(0x200, Header)
    assert (header.magic, header.size) == (0x12345678, 9)


def test_numpy_sees_the_memory_without_a_copy(bare: vmcore.Vm) -> None:
    view = numpy.frombuffer(bare.memory, dtype="<u2")
    bare.memory.write(0x10, b"\x34\x12")
    assert view[8] == 0x1234
    view[9] = 0x5678
    assert bare.memory[0x12:0x14] == b"\x78\x56"


def test_code_that_is_written_through_a_buffer_is_what_runs(bare: vmcore.Vm) -> None:
    # mov al, 1; hlt
    vcpu = vcpu_at(bare, b"\xb0\x01\xf4")
    vcpu.run()
    with memoryview(bare.memory) as view:
        view[0x1001] = 2
    vcpu.enter_real_mode(0x1000)
    vcpu.run()
    assert vcpu.rax & 0xFF == 2


def test_memory_in_pieces_has_a_buffer_for_each(accel: str) -> None:
    with vmcore.Vm.bare(accel=accel) as vm:
        vm.map(0, 0x1000)
        vm.map(0x8000, 0x2000, read_only=True)
        with pytest.raises(BufferError, match="regions"):
            memoryview(vm.memory)
        first, second = vm.memory.regions
        assert (first.base, len(first), second.base, len(second)) == (0, 0x1000, 0x8000, 0x2000)
        assert not memoryview(first).readonly and memoryview(second).readonly
        with pytest.raises(vmcore.GuestMemoryError, match="read-only") as error:
            vm.memory.write(0x8000, b"x")
        assert error.value.code == "memory.read_only"
        vm.unmap(0x8000)
        assert len(vm.memory.regions) == 1


def test_accesses_beyond_the_memory_are_index_errors(bare: vmcore.Vm) -> None:
    for access in (
        lambda: bare.memory[0x10000],
        lambda: bare.memory.read(0xFFFF, 2),
        lambda: bare.memory.read(0, 1 << 40),
        lambda: bare.memory.write(0xFFFF, b"ab"),
        lambda: bare.memory.read((1 << 64) - 1, 1),
    ):
        with pytest.raises(IndexError) as error:
            access()
        assert isinstance(error.value, vmcore.NotMappedError) and error.value.code == "memory.not_mapped"
    for wrong in (slice(5, 4), slice(None, 4), slice(0, 8, 2)):
        with pytest.raises(vmcore.ConfigError):
            bare.memory[wrong]
    with pytest.raises(vmcore.ConfigError, match="4 bytes|size"):
        bare.memory[0:4] = b"abc"
    with pytest.raises(TypeError):
        bare.memory["a"]  # type: ignore[call-overload]


def test_memory_of_a_closed_vm_is_an_error_and_its_buffers_live_on(accel: str) -> None:
    vm = vmcore.Vm.bare(accel=accel)
    vm.map(0, 0x1000)
    memory, view = vm.memory, memoryview(vm.memory)
    array = numpy.frombuffer(vm.memory.regions[0], dtype="u1")
    view[0] = 7
    vm.close()
    for access in (lambda: memory.read(0, 1), lambda: memory[0], lambda: memoryview(memory), lambda: memory.regions):
        with pytest.raises(vmcore.ClosedError) as error:
            access()
        assert isinstance(error.value, ValueError) and error.value.code == "closed"
    del vm, memory
    gc.collect()
    assert view[0] == 7 and array[0] == 7
    view[0] = 8
    assert array[0] == 8


def test_dirty_pages_are_told(accel: str) -> None:
    with vmcore.Vm.bare(accel=accel) as vm:
        vm.map(0, 0x4000, track_dirty=True)
        vm.take_dirty(0)
        vm.memory.write(0x2000, b"x")
        assert vm.take_dirty(0) == [0x2000]
        assert vm.take_dirty(0) == []
        vm.memory.regions[0].written(0x1000, 1)
        assert vm.take_dirty(0) == [0x1000]
