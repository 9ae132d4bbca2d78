"""Devices written in Python, and ours from Python."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from conftest import EXIT_7, LOOP

import vmcore


def build(accel: str, code: bytes, **keywords: Any) -> vmcore.Vm:
    return vmcore.Vm(kernel=code, entry="raw16", memory="1M", accel=accel, **keywords)


class Adder(vmcore.PortDevice):
    sum = 0

    def read(self, offset: int, size: int) -> int:
        return self.sum

    def write(self, offset: int, data: bytes) -> None:
        if data[0] == 0:
            self.control.end(vmcore.Outcome.exit(self.sum))
        self.sum += data[0]


ADD = bytes([0xB0, 10, 0xE6, 0x42, 0xFE, 0xC8, 0x75, 0xFA, 0xE6, 0x42, 0xF4])


def test_a_port_device_ends_the_guest(accel: str) -> None:
    with build(accel, ADD, devices=[Adder(0x42)], irqchip=False) as vm:
        assert vm.run() == vmcore.Outcome.exit(55)


def test_what_a_device_raises_comes_out_of_the_run(accel: str) -> None:
    class Broken(vmcore.PortDevice):
        def write(self, offset: int, data: bytes) -> None:
            raise LookupError(data)

    with build(accel, ADD, devices=[Broken(0x42)], irqchip=False) as vm:
        with pytest.raises(LookupError) as caught:
            vm.run()
        assert caught.value.args == (b"\x0a",)
        # The same again for who asks again, and it can go on.
        with pytest.raises(LookupError):
            vm.wait()
        with pytest.raises(LookupError):
            vm.run()


def test_a_device_cannot_wait_for_the_guest_that_waits_for_it(accel: str) -> None:
    refused: list[object] = []

    class Curious(vmcore.PortDevice):
        def write(self, offset: int, data: bytes) -> None:
            for call in (vm.close, vm.run, vm.wait, vm.pause, vm.stats):
                try:
                    call()
                except vmcore.WrongStateError:
                    refused.append(call)
            self.control.end(vmcore.Outcome.POWER_OFF)

    with build(accel, ADD, devices=[Curious(0x42)], irqchip=False) as vm:
        assert vm.run() == vmcore.Outcome.POWER_OFF
    assert len(refused) == 5


def test_a_device_that_does_not_attach_fails_the_build(accel: str) -> None:
    def attach(machine: vmcore.Machine) -> None:
        raise KeyError("no")

    with pytest.raises(KeyError):
        build(accel, EXIT_7, devices=[attach])
    with pytest.raises(vmcore.ConfigError, match="device"):
        build(accel, EXIT_7, devices=[lambda machine: machine.ports(0x42, 1, object())])
    with pytest.raises(vmcore.ConflictError):
        build(accel, EXIT_7, devices=[Adder(0x42), Adder(0x42)])


def test_a_machine_is_of_no_use_once_it_is_built(accel: str) -> None:
    kept: list[vmcore.Machine] = []
    with build(accel, EXIT_7, devices=[kept.append]):
        with pytest.raises(vmcore.WrongStateError, match="built"):
            kept[0].allocate_gsi()


def test_an_mmio_device_has_a_window_and_an_interrupt(accel: str) -> None:
    class Window(vmcore.MmioDevice):
        pass

    window = Window()
    with build(accel, EXIT_7, devices=[window], exit_port=0xF4) as vm:
        assert window.base is not None and window.base >= 0xC000_0000 and 16 <= window.gsi <= 23
        window.irq.set_level(True)
        assert window.irq.level
        window.irq.set_level(False)
        assert vm.run().code == 7


def test_virtio_devices_are_checked_before_they_are_attached(accel: str) -> None:
    class Odd(vmcore.VirtioDevice):
        device_type = 42
        queue_sizes = [3]

    with pytest.raises(vmcore.ConfigError, match="queue sizes"):
        build(accel, EXIT_7, devices=[Odd()])


def test_disks_are_opened_at_once_and_used_once(accel: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    disk = vmcore.Disk(path, serial="abc", iops=(100, 200), cache="unsafe")
    assert disk.size == 1 << 20 and disk.stats()["reads"] == 0
    with build(accel, LOOP, disks=[disk]) as vm:
        vm.start()
        disk.resize(2 << 20)
        assert disk.size == 2 << 20
        with pytest.raises(vmcore.WrongStateError):
            build(accel, LOOP, disks=[disk])
    # The image is free again, and what it was is known.
    with build(accel, LOOP, disks=[path]):
        pass
    assert disk.size == 2 << 20 and disk.stats()["errors"] == 0
    with pytest.raises(vmcore.ClosedError):
        disk.resize(3 << 20)
    with pytest.raises(vmcore.ConfigError):
        vmcore.Disk(path, cache="none")


def test_a_nat_forwards_and_counts(accel: str) -> None:
    net = vmcore.Net.nat(forwards=["tcp:0:80"], rules=[("deny", "tcp:any:25")], otherwise="deny", hosts={"a": ["10.0.0.9"]})
    assert len(net.forwards) == 1 and net.rules[0] == ("deny tcp:any:25", 0)
    with build(accel, LOOP, nets=[net]) as vm:
        vm.start()
        forward = net.forward("udp:0:53")
        assert forward in net.forwards and net.remove_forward(forward)
        assert net.stats()["frames_sent"] == 0
    hub = vmcore.Hub()
    with build(accel, LOOP, nets=[hub.card(mac="02:00:00:00:00:01"), "nat"]):
        pass
    with pytest.raises(vmcore.ConfigError):
        _ = hub.card().forwards


def test_a_balloon_and_a_vsock_answer_when_there_is_no_driver(accel: str, tmp_path: Path) -> None:
    balloon, vsock = vmcore.Balloon(1 << 20), vmcore.Vsock(3, tmp_path / "vm.vsock")
    with build(accel, LOOP, balloon=balloon, vsock=vsock) as vm:
        vm.start()
        balloon.target = 2 << 20
        assert (balloon.target, balloon.actual) == (2 << 20, 0)
        with pytest.raises(TimeoutError):
            balloon.statistics(0.05)
        begin = time.monotonic()
        with pytest.raises(TimeoutError):
            vsock.connect(80, 0.1)
        assert time.monotonic() - begin < 10
        listener = vsock.listen(1000)
        with pytest.raises(OSError):
            vsock.listen(1000)
        with pytest.raises(TimeoutError):
            listener.accept(0.05)
        listener.close()
        with pytest.raises(vmcore.ClosedError):
            listener.accept(0)
    with pytest.raises(vmcore.SystemCallError):
        vsock.connect(80, 1)
