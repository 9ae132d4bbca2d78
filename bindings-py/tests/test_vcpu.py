"""A vCPU in Python's hands."""

from __future__ import annotations

import signal
import threading
import time

import pytest
from conftest import HI, LOOP, vcpu_at

import vmcore


def test_a_guest_talks_to_a_function(bare: vmcore.Vm) -> None:
    said = []
    vcpu = vcpu_at(bare, HI)
    assert vcpu.run(port_write=lambda port, data: said.append((port, data))) == vmcore.VcpuExit.HALTED
    assert said == [(0xE9, b"H"), (0xE9, b"i")]
    assert vcpu.stats()["port"] == 2


def test_registers_are_attributes(bare: vmcore.Vm) -> None:
    # add ax, bx; hlt
    vcpu = vcpu_at(bare, b"\x01\xd8\xf4")
    vcpu.rax, vcpu.rbx = 40, 2
    vcpu.run()
    assert (vcpu.rax, vcpu.rbx, vcpu.id) == (42, 2, 0)
    segment = vcpu.ds
    assert (segment.selector, segment.base) == (0x100, 0x1000)
    vcpu.es = vmcore.Segment.real_mode(0x234, code=False)
    assert vcpu.es.base == 0x2340
    vcpu.gdt = vmcore.DescriptorTable(0x800, 0x17)
    assert vcpu.gdt == vmcore.DescriptorTable(0x800, 0x17)
    with pytest.raises(OverflowError):
        vcpu.rax = 1 << 64


def test_reads_are_answered_by_numbers_bytes_or_nothing(bare: vmcore.Vm) -> None:
    # in al, 0x10; mov bl, al; in ax, 0x20; mov cx, ax; in al, 0x30; hlt
    vcpu = vcpu_at(bare, b"\xe4\x10\x88\xc3\xe5\x20\x89\xc1\xe4\x30\xf4")
    answers: dict[int, int | bytes | None] = {0x10: 0x55, 0x20: b"\x34\x12", 0x30: None}
    asked = []

    def read(port: int, size: int) -> int | bytes | None:
        asked.append((port, size))
        return answers[port]

    vcpu.run(port_read=read)
    assert asked == [(0x10, 1), (0x20, 2), (0x30, 1)]
    assert (vcpu.rbx & 0xFF, vcpu.rcx & 0xFFFF, vcpu.rax & 0xFF) == (0x55, 0x1234, 0xFF)


def test_mmio_is_answered_too(bare: vmcore.Vm) -> None:
    # mov ax, 0xa000; mov ds, ax; mov al, [0x10]; mov [0x20], al; hlt
    vcpu = vcpu_at(bare, b"\xb8\x00\xa0\x8e\xd8\xa0\x10\x00\xa2\x20\x00\xf4")
    written = []
    vcpu.run(mmio_read=lambda at, size: at & 0xFF, mmio_write=lambda at, data: written.append((at, data)))
    assert written == [(0xA0020, b"\x10")]


@pytest.mark.parametrize("answer", [256, -1, b"ab", "text", 1.5])
def test_an_answer_that_does_not_fit_comes_out_of_the_run(bare: vmcore.Vm, answer: object) -> None:
    vcpu = vcpu_at(bare, b"\xe4\x10\xf4")
    with pytest.raises((vmcore.ConfigError, TypeError, OverflowError)):
        vcpu.run(port_read=lambda port, size: answer)  # type: ignore[arg-type, return-value]


def test_a_callback_that_raises_ends_the_run_and_is_raised_by_it(bare: vmcore.Vm) -> None:
    class Mine(Exception):
        pass

    def write(port: int, data: bytes) -> None:
        if data == b"H":
            raise Mine(port)

    vcpu = vcpu_at(bare, HI)
    with pytest.raises(Mine) as caught:
        vcpu.run(port_write=write)
    assert caught.value.args == (0xE9,)
    # The instruction is finished, and the guest goes on behind it.
    said: list[bytes] = []
    assert vcpu.run(port_write=lambda port, data: said.append(data)) == vmcore.VcpuExit.HALTED
    assert said == [b"i"]


def test_a_kick_from_another_thread_ends_the_run(bare: vmcore.Vm) -> None:
    vcpu = vcpu_at(bare, LOOP)
    timer = threading.Timer(0.2, vcpu.kick)
    timer.start()
    assert vcpu.run() == vmcore.VcpuExit.KICKED
    timer.join()
    # A kick is not lost.
    vcpu.kick()
    assert vcpu.run() == vmcore.VcpuExit.KICKED


def test_other_threads_run_meanwhile_and_are_told_that_it_runs(bare: vmcore.Vm) -> None:
    vcpu = vcpu_at(bare, LOOP)
    thread = threading.Thread(target=vcpu.run)
    thread.start()
    time.sleep(0.2)
    with pytest.raises(vmcore.WrongStateError, match="running it"):
        _ = vcpu.rax
    vcpu.kick()
    thread.join(10)
    assert not thread.is_alive()
    assert vcpu.rip & 0xFFFF == 0


def test_control_c_ends_the_run(bare: vmcore.Vm) -> None:
    vcpu = vcpu_at(bare, LOOP)
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        vcpu.run()
    timer.join()
    # The guest can go on.
    vcpu.kick()
    assert vcpu.run() == vmcore.VcpuExit.KICKED


def test_single_steps_are_debug_exits(bare: vmcore.Vm) -> None:
    # nop; hlt
    vcpu = vcpu_at(bare, b"\x90\xf4")
    vcpu.set_debug(single_step=True)
    stop = vcpu.run()
    assert stop.kind == "debug" and stop.debug is not None
    assert stop.debug[2] == 1


def test_the_state_of_a_vcpu_goes_to_another(bare: vmcore.Vm, accel: str) -> None:
    vcpu = vcpu_at(bare, HI)
    vcpu.rbx = 0x1234
    state = vcpu.save()
    with vmcore.Vm.bare(accel=accel) as other:
        other.map(0, 0x10000)
        copy = other.create_vcpu()
        copy.restore(state)
        assert (copy.rbx, copy.rip, copy.cs) == (0x1234, vcpu.rip, vcpu.cs)
    with pytest.raises(vmcore.StateError):
        vcpu.restore("{}")


def test_devices_answer_where_no_function_does(bare: vmcore.Vm) -> None:
    class Port(vmcore.PortDevice):
        def read(self, offset: int, size: int) -> int:
            return 0x40 + offset

    bare.add_ports(0x10, 2, Port(0x10))
    # in al, 0x11; hlt
    vcpu = vcpu_at(bare, b"\xe4\x11\xf4")
    vcpu.run()
    assert vcpu.rax & 0xFF == 0x41
    with pytest.raises(vmcore.ConflictError) as conflict:
        bare.add_ports(0x11, 1, Port(0x11))
    assert conflict.value.code == "conflict"
    assert bare.remove_ports(0x10) and not bare.remove_ports(0x10)


def test_a_deterministic_vcpu_runs_as_many_instructions_as_it_is_told() -> None:
    with vmcore.Vm.bare(deterministic=1) as vm:
        vm.map(0, 0x10000)
        # next: inc ax; jmp next
        vcpu = vcpu_at(vm, b"\x40\xeb\xfd")
        assert vcpu.run_instructions(2000) == vmcore.VcpuExit.INSTRUCTION_LIMIT
        assert vcpu.rax == 1000
