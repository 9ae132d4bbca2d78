"""Devices under a driver: what the host fails, what goes over a card."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from driver import DATA, Driver

import vmcore

STATUS = DATA + 0x2000


def reader(disk: vmcore.Disk) -> vmcore.Vm:
    """A guest that reads sector 16 and then ends."""
    driver = Driver(1, disks=[disk], rng=False)
    driver.vm.memory.write_struct(DATA, "<IIQ", 0, 0, 16)
    driver.vm.memory[STATUS] = 0xEE
    driver.request(0, (DATA, 16, False), (DATA + 0x1000, 512, True), (STATUS, 1, True))
    driver.end()
    return driver.vm


def fill(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(1 << 20)
        os.pwrite(file.fileno(), b"\x5a", 16 * 512)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.touch()
    fill(path)
    return path


def test_a_vm_stops_for_its_disk_and_goes_on(image: Path) -> None:
    disk = vmcore.Disk(image, on_read_error="stop")
    with reader(disk) as vm:
        # Behind the VM's back: what the host then says of a read is an error.
        os.truncate(image, 0)
        assert disk.stopped is None
        outcome = vm.run()
        assert (outcome, outcome.kind, str(outcome)) == (vmcore.Outcome.IO_ERROR, "io_error", "IoError")
        assert disk.stopped is not None and "512 bytes" in disk.stopped
        assert vm.run() == vmcore.Outcome.IO_ERROR
        fill(image)
        assert vm.run() == vmcore.Outcome.exit(7)
        assert disk.stopped is None
        assert (vm.memory[STATUS], vm.memory[DATA + 0x1000], disk.stats()["errors"]) == (0, 0x5A, 2)


@pytest.mark.parametrize(("policy", "status"), [("report", 1), ("enospc", 1), ("ignore", 0)])
def test_other_policies_go_on_at_once(image: Path, policy: str, status: int) -> None:
    with reader(vmcore.Disk(image, on_read_error=policy)) as vm:
        os.truncate(image, 0)
        assert vm.run() == vmcore.Outcome.exit(7)
        assert (vm.memory[STATUS], vm.memory[DATA + 0x1000]) == (status, 0)


@pytest.mark.parametrize("keyword", ["on_read_error", "on_write_error"])
def test_a_policy_that_is_not_known_is_refused(image: Path, keyword: str) -> None:
    with pytest.raises(vmcore.ConfigError, match=keyword) as caught:
        vmcore.Disk(image, **{keyword: "panic"})  # type: ignore[arg-type]
    assert caught.value.fix is not None and "enospc" in caught.value.fix


def test_a_packet_is_counted_and_recorded(tmp_path: Path) -> None:
    net = vmcore.Net.nat(pcap=tmp_path / "packets")
    driver = Driver(2, nets=[net])
    with driver.vm as vm:
        vm.memory.write(DATA + 12, b"\xff" * 6)
        driver.request(1, (DATA, 12 + 60, False))
        driver.end()
        assert net.counters()["sent_packets"] == 0 and net.link
        assert vm.run() == vmcore.Outcome.exit(7)
        counters = net.counters()
        assert (counters["sent_packets"], counters["sent_bytes"], counters["sent_dropped"]) == (1, 60, 0)
        net.link = False
        assert not net.link
    assert (tmp_path / "packets").stat().st_size == 24 + 16 + 60


def test_the_guest_connects_to_a_port_of_the_host() -> None:
    vsock = vmcore.Vsock(3)
    driver = Driver(3, vsock=vsock)
    with driver.vm as vm:
        listener = vsock.listen(5)
        # A request for a stream (virtio 1.2, section 5.10.6).
        packet = struct.pack("<QQIIIHHIII", 3, 2, 1000, 5, 0, 1, 1, 0, 65536, 0)
        vm.memory.write(DATA, packet)
        driver.request(1, (DATA, len(packet), False))
        driver.end()
        assert vm.run() == vmcore.Outcome.exit(7)
        with listener.accept(10) as stream:
            assert stream.fileno() >= 0
        with pytest.raises(TimeoutError):
            listener.accept(0.01)
        listener.close()
