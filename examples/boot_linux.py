"""Boots a stock Linux kernel with a disk on this terminal: boot_linux.py KERNEL INITRD DISK."""

import sys

import vmcore

if len(sys.argv) != 4:
    sys.exit("usage: boot_linux.py KERNEL INITRD DISK")
kernel, initrd, disk = sys.argv[1:]

cmdline = "console=ttyS0 root=/dev/vda rw"
with vmcore.Vm(
    memory="512M", kernel=kernel, initrd=initrd, cmdline=cmdline, console="stdio", disks=[disk], rng=False
) as vm:
    outcome = vm.run()
print(f"the guest ended: {outcome}")
