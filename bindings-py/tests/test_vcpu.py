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


def test_a_run_ends_when_its_time_is_over(bare: vmcore.Vm) -> None:
    vcpu = vcpu_at(bare, LOOP)
    for timeout in (0.0, 0.01, 0.3):
        begin = time.monotonic()
        assert vcpu.run(timeout) == vmcore.VcpuExit.KICKED
        assert timeout <= time.monotonic() - begin < timeout + 20
    # On another thread, where nobody looks for signals, and with functions that answer.
    ends: list[vmcore.VcpuExit] = []
    thread = threading.Thread(target=lambda: ends.append(vcpu.run(timeout=0.05, port_read=lambda port, size: 0)))
    thread.start()
    thread.join(20)
    assert ends == [vmcore.VcpuExit.KICKED]
    with pytest.raises(vmcore.ConfigError):
        vcpu.run(timeout=float("inf"))
    # Time that is left does not end another run.
    vcpu = bare.create_vcpu(1)
    bare.memory.write(0x2000, b"\xf4")
    vcpu.enter_real_mode(0x2000)
    assert vcpu.run(timeout=3600) == vmcore.VcpuExit.HALTED


def test_cpuid_is_a_dict(bare: vmcore.Vm, accel: str) -> None:
    # mov eax, 0x80000002; cpuid; hlt
    vcpu = vcpu_at(bare, b"\x66\xb8\x02\x00\x00\x80\x0f\xa2\xf4")
    supported = vmcore.cpuid(accel)
    table = vmcore.cpuid(accel, model="v1", cpus=2, id=1)
    assert len(supported) > 10 and table[1, None][1] >> 24 == 1
    table[0x80000002, None] = (0x6D756E61, 1, 2, 3)
    vcpu.cpuid = table
    assert vcpu.cpuid[0x80000002, None] == (0x6D756E61, 1, 2, 3)
    vcpu.run()
    assert [vcpu.rax, vcpu.rbx, vcpu.rcx, vcpu.rdx] == [0x6D756E61, 1, 2, 3]
    with pytest.raises(vmcore.ConfigError):
        vmcore.cpuid(accel, model="v9")


@pytest.mark.parametrize("pulse", [True, False])
def test_a_wire_interrupts_a_bare_vcpu(pulse: bool) -> None:
    with vmcore.Vm.bare(accel="soft", irqchip=True) as vm:
        vm.map(0, 0x10000)
        line = vm.irq_line(5)
        # The 8259A: vectors from 0x20, nothing masked; sti; out 0x98, al; wait: hlt; jmp wait
        ports = [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0)]
        code = b"".join(bytes([0xB0, value, 0xE6, port]) for port, value in ports) + b"\xfb\xe6\x98\xf4\xeb\xfd"
        vcpu = vcpu_at(vm, code)
        # Interrupt 0x25: out 0x99, al; hlt
        vm.memory.write_struct(4 * 0x25, "<HH", 0x40, 0x100)
        vm.memory.write(0x1040, b"\xe6\x99\xf4")
        seen = []

        def write(port: int, data: bytes) -> None:
            seen.append(port)
            if port == 0x99:
                vcpu.kick()
            elif pulse:
                line.pulse()
            else:
                line.set_level(True)

        assert vcpu.run(port_write=write) == vmcore.VcpuExit.KICKED
        assert (seen, line.level) == ([0x98, 0x99], not pulse)
        # To LAPIC 0, vector 0x40.
        vm.send_msi(0xFEE00000, 0x40)
    with vmcore.Vm.bare(accel="soft") as vm, pytest.raises(vmcore.Error):
        vm.send_msi(0xFEE00000, 0x40)


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
