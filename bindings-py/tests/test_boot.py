"""A stock Linux on the software CPU."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import guests

import vmcore
import vmcore.aio

EXAMPLE = Path(__file__).parents[2] / "examples" / "boot_linux.py"


def test_linux_with_a_disk_is_talked_to(tmp_path: Path) -> None:
    cloud, root = guests() / "cloud", guests() / "root.ext4"
    shutil.copyfile(root, tmp_path / "root.ext4")
    disk = vmcore.Disk(tmp_path / "root.ext4")
    with vmcore.Vm(
        kernel=cloud / "vmlinuz",
        initrd=cloud / "initrd.img",
        cmdline="console=ttyS0 quiet root=/dev/vda rw vmtest=shell",
        memory="512M",
        accel="soft",
        disks=[disk],
        nets=["nat"],
    ) as vm:
        vm.start()
        console = vm.console
        console.expect("vmcore-guest: root", timeout=240)
        console.sendline("echo $((6 * 7)) from the guest")
        assert console.expect(re.compile("[0-9]+ from the guest"), timeout=60).endswith("42 from the guest")
        assert disk.stats()["reads"] > 0
        assert vm.stats().total["exits"] > 0
        console.sendline("exit")
        assert vm.wait(120) == vmcore.Outcome.POWER_OFF


def test_the_example_says_what_the_one_in_rust_says(tmp_path: Path) -> None:
    cloud, root = guests() / "cloud", guests() / "root.ext4"
    shutil.copyfile(root, tmp_path / "root.ext4")
    command: list[str | Path] = [sys.executable, EXAMPLE, cloud / "vmlinuz", cloud / "initrd.img", tmp_path / "root.ext4"]
    done = subprocess.run(command, input="exit\n", capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.endswith("the guest ended: PowerOff\n"), done.stdout[-2000:] + done.stderr
    assert "vmcore-guest: root" in done.stdout


class Seven(vmcore.VirtioDevice):
    """An entropy source (virtio 1.2, section 5.4) that has no surprises."""

    device_type = 4
    queue_sizes = [8]
    asked = 0

    def handle(self, queue: int, request: bytes, room: int) -> bytes:
        assert (queue, request) == (0, b"")
        self.asked += room
        return b"\x07" * room


def test_linux_uses_a_device_in_python_beside_an_event_loop() -> None:
    cloud = guests() / "cloud"
    device = Seven()

    async def main() -> vmcore.Outcome:
        async with vmcore.aio.Vm(
            kernel=cloud / "vmlinuz",
            initrd=cloud / "initrd.img",
            cmdline="console=ttyS0 quiet vmtest=devices",
            memory="256M",
            accel="soft",
            devices=[device],
        ) as vm:
            vm.start()
            await vm.console.expect("hwrng virtio_rng.0 bytes=32", 240)
            return await vm.wait(120)

    assert asyncio.run(main()) == vmcore.Outcome.POWER_OFF
    assert device.asked >= 32
