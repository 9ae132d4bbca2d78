"""The command `vmcore`: `vmcore check`, `vmcore run ...`, with the options of vmrun."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import vmcore

_EPILOG = """\
exit status of run: 0 when the guest switches off or resets, (value << 1 | 1) when it writes a value to the
exit port, 124 when the time is over, 3 when it halts for good, 130 when the user stops it, 1 for errors,
2 for a wrong command line. Of check: 0 when a backend runs every guest, 3 when small guests only, 1 when
there is none.
"""


def _parts(text: str) -> list[str]:
    """The parts between single commas; a doubled one is one of the part's own."""
    return [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]


def _number(text: str) -> int:
    """A number with K, M, G or T behind it."""
    shift = {"K": 10, "M": 20, "G": 30, "T": 40}.get(text[-1:].upper(), 0)
    try:
        return int(text[:-1] if shift else text) << shift
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number with K, M, G or T behind it: 512M") from None


def _bits(text: str) -> int:
    """Bits per second with a decimal unit, in bytes."""
    unit = {"K": 1_000, "M": 1_000_000, "G": 1_000_000_000}.get(text[-1:].upper(), 1)
    try:
        bits = int(text[:-1] if unit > 1 else text) * unit
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give bits per second: 100M") from None
    return -(-bits // 8)


def _rate(text: str) -> int | tuple[int, int]:
    rate, slash, burst = text.partition("/")
    return (_number(rate), _number(burst)) if slash else _number(rate)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number of instructions from 1")
    return int(text)


def _port(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give a port from 0 to 65535 or 0xffff") from None


def _disk(text: str) -> dict[str, Any]:
    path, *options = _parts(text)
    if not path:
        raise argparse.ArgumentTypeError("give the path of an image")
    disk: dict[str, Any] = {"path": path, "backing": [], "extents": []}
    for option in options:
        key, equals, value = option.partition("=")
        if option == "ro":
            disk["read_only"] = True
        elif option == "direct":
            disk["direct"] = True
        elif equals and key in ("format", "cache", "serial"):
            disk[key] = value
        elif equals and key in ("rerror", "werror"):
            disk["on_read_error" if key == "rerror" else "on_write_error"] = value
        elif equals and key == "queues" and value.isdigit():
            disk[key] = int(value)
        elif equals and key in ("iops", "bps"):
            disk[key] = _rate(value)
        elif value and key == "backing":
            disk["backing"].append(value)
        elif value and key == "extent":
            disk["extents"].append(value)
        else:
            known = "format= ro backing= extent= cache= direct rerror= werror= iops= bps= queues=N serial="
            raise argparse.ArgumentTypeError(f"no option {option!r}; known are: {known}")
    return disk


def _net(text: str) -> tuple[str, str, dict[str, Any]] | None:
    """Kind, name and keywords of a card."""
    first, *options = _parts(text)
    if first == "none" and not options:
        return None
    kind, equals, name = first.partition("=")
    if not (first == "nat" or (kind in ("tap", "unix", "fd") and name)):
        raise argparse.ArgumentTypeError(f"{text!r}: valid are: none, nat, tap=NAME, fd=N, unix=PATH")
    card: dict[str, Any] = {}
    if kind == "nat":
        card.update(forwards=[], rules=[], dns=[])
    for option in options:
        key, equals, value = option.partition("=")
        if equals and key in ("mac", "pcap"):
            card[key] = value
        elif equals and key == "mtu" and value.isdigit():
            card["mtu"] = int(value)
        elif equals and key == "bps":
            card["bytes_per_second"] = _bits(value)
        elif kind == "tap" and key == "queues" and value.isdigit():
            card["queues"] = int(value)
        elif kind == "nat" and equals and key == "forward":
            card["forwards"].append(value)
        elif kind == "nat" and equals and key in ("allow", "deny"):
            card["rules"].append((key, value))
        elif kind == "nat" and equals and key == "otherwise":
            card["otherwise"] = value
        elif kind == "nat" and equals and key == "dns":
            card["dns"].append(value)
        elif kind == "nat" and option == "host":
            card["gateway_is_host"] = True
        else:
            more = ", forward=, allow=, deny=, otherwise=, dns=, host" if kind == "nat" else ""
            raise argparse.ArgumentTypeError(f"no option {option!r}; known are: mac=, mtu=, pcap=, bps={more}")
    return kind, name, card


def _vsock(text: str) -> tuple[int, str]:
    options: dict[str, str] = {}
    for part in _parts(text):
        key, _, value = part.partition("=")
        options[key] = value
    if set(options) != {"cid", "path"} or not options["cid"].isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}: give both: cid=3,path=vm.vsock")
    return int(options["cid"]), options["path"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vmcore",
        description="Runs virtual machines.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vmcore {vmcore.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="say which backends this host has")
    run = commands.add_parser("run", help="run a kernel or image on this terminal")
    add = run.add_argument
    add("--accel", choices=["auto", "kvm", "soft"], default="auto", help="what runs the guest")
    add("--kernel", metavar="FILE", required=True, help="bzImage, vmlinux, PVH or multiboot kernel, or 16-bit code")
    add("--initrd", metavar="FILE", help="initial RAM disk; a module for multiboot kernels")
    add("--cmdline", metavar="TEXT", default="", help="kernel command line")
    add("--entry", choices=["auto", "bzimage", "realmode", "pvh", "raw"], default="auto", help="how it is entered")
    add("--disk", metavar="FILE[,OPTION...]", type=_disk, action="append", default=[], help="a disk image")
    add("--net", metavar="none|nat|tap=NAME|fd=N|unix=PATH[,OPTION...]", type=_net, help="network card")
    add("--transport", choices=["mmio", "pci"], default="mmio", help="what disks and network card are behind")
    add("--vsock", metavar="cid=N,path=PATH", type=_vsock, help="sockets to the guest")
    add("--balloon", metavar="SIZE", type=_number, nargs="?", const=0, help="give back memory that is not used")
    add("--memory", metavar="SIZE", default="512M", help="size of the guest's memory")
    add("--cpus", metavar="N", type=int, default=1, help="number of virtual CPUs")
    add("--cpu", metavar="best|v1|v2|v3|v4|host", default="best", help="CPU features")
    add("--tsc-khz", metavar="KHZ", type=int, help="frequency of the guest's TSC")
    add("--timeout", metavar="SECONDS", type=float, help="end the guest after this time, with status 124")
    add("--console", metavar="stdio|FILE|unix=PATH", default="stdio", help="where the serial port goes")
    add("--exit-port", metavar="PORT", type=_port, default=0xF4, help="port that ends the guest; 0 for none")
    add("--no-acpi", action="store_true", help="no ACPI tables")
    add("--stats", metavar="FILE", help="write statistics to FILE as JSON")
    add("--deterministic", metavar="SEED", type=int, nargs="?", const=0, help="do the same in every run")
    add("--checkpoint-every", metavar="N", type=_count, help="with --deterministic: tell the state every N instructions")
    add("--no-status", action="store_true", help="no status line on a terminal")
    return parser


def _check() -> int:
    report = vmcore.check()
    print(report, end="")
    if report.usable:
        return 0
    return 3 if any(backend.status == "small_guests_only" for backend in report.backends) else 1


def _console(text: str) -> Any:
    if text.startswith("unix="):
        return "unix:" + text.removeprefix("unix=")
    return text if text == "stdio" else "file:" + text


def _vm(args: argparse.Namespace, disks: list[vmcore.Disk]) -> vmcore.Vm:
    nets: list[vmcore.Net | str] = []
    if args.net is not None:
        kind, name, card = args.net
        if kind == "nat":
            nets.append(vmcore.Net.nat(**card))
        elif kind == "fd":
            nets.append(vmcore.Net.fd(int(name), **card))
        else:
            nets.append((vmcore.Net.tap if kind == "tap" else vmcore.Net.unix)(name, **card))
    return vmcore.Vm(
        kernel=args.kernel,
        initrd=args.initrd,
        cmdline=args.cmdline,
        entry=args.entry,
        memory=args.memory,
        cpus=args.cpus,
        cpu=args.cpu,
        accel=args.accel,
        acpi=not args.no_acpi,
        tsc_khz=args.tsc_khz,
        deterministic=args.deterministic,
        console=_console(args.console),
        exit_port=args.exit_port or None,
        disks=disks,
        nets=nets,
        balloon=None if args.balloon is None else vmcore.Balloon(args.balloon),
        vsock=None if args.vsock is None else vmcore.Vsock(*args.vsock),
        transport=args.transport,
    )


class _Status:
    """A line that says how the guest is doing, where the terminal is not the guest's."""

    def __init__(self, vm: vmcore.Vm) -> None:
        self._vm = vm
        self._begin = time.monotonic()
        self._shown = False

    def __call__(self, stats: vmcore.Stats) -> None:
        self._shown = True
        seconds = time.monotonic() - self._begin
        exits = stats.total["exits"]
        text = f"{self._vm.backend}  {seconds:.0f} s  {self._vm.cpus} vCPUs  {exits} exits"
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _exit_status(outcome: vmcore.Outcome) -> int:
    if outcome.code is not None:
        return (outcome.code << 1 | 1) & 0xFF
    statuses = {"power_off": 0, "reset": 0, "time_limit": 124, "stopped": 130, "halted": 3}
    return statuses.get(outcome.kind, 1)


def _run_with_checkpoints(vm: vmcore.Vm, every: int) -> vmcore.Outcome:
    """Runs to the guest's end, and says every so many instructions and there what state it is in."""
    while True:
        outcome = vm.run_instructions(every)
        with vm.pause() as pause:
            print(f"checkpoint {vm.instructions} {pause.state_hash()}", end="\r\n", file=sys.stderr, flush=True)
        if outcome != vmcore.Outcome.INSTRUCTION_LIMIT:
            return outcome


#: Seconds that the guest waits before what a disk could not do is tried again.
_RETRY = 1.0


def _until_the_host_is_well(disks: list[vmcore.Disk], run: Callable[[], vmcore.Outcome]) -> vmcore.Outcome:
    """Calls `run` again and again while disks stop the guest, and says why they do."""
    told = None
    while (outcome := run()) == vmcore.Outcome.IO_ERROR:
        stopped = next(((disk.path, disk.stopped) for disk in disks if disk.stopped is not None), None)
        if stopped is not None and stopped != told:
            print(f"vmcore: the guest waits for {stopped[0]}: {stopped[1]}", end="\r\n", file=sys.stderr, flush=True)
            told = stopped
        time.sleep(_RETRY)
    return outcome


def _run(args: argparse.Namespace) -> int:
    begin = time.monotonic()
    disks = [vmcore.Disk(disk.pop("path"), **disk) for disk in args.disk]
    with _vm(args, disks) as vm:
        print(f"vmcore: using {vm.backend}: {vm.backend_reason}", end="\r\n", file=sys.stderr, flush=True)
        # On stdio the guest has the terminal.
        alone = args.console != "stdio" and sys.stdout.isatty() and sys.stderr.isatty()
        status = _Status(vm) if alone and not args.no_status else None

        def run() -> vmcore.Outcome:
            if args.checkpoint_every is not None:
                return _run_with_checkpoints(vm, args.checkpoint_every)
            timeout = None if args.timeout is None else max(0.0, args.timeout - (time.monotonic() - begin))
            return vm.run(timeout, progress=status, interval=0.5)

        try:
            outcome = _until_the_host_is_well(disks, run)
        finally:
            if status is not None:
                status.clear()
            if args.stats is not None:
                stats = vm.stats()
                figures = {
                    "backend": vm.backend,
                    "seconds": round(time.monotonic() - begin, 3),
                    "total": stats.total,
                    "vcpus": stats.vcpus,
                    "backend_vm": stats.backend_vm,
                    "backend_vcpus": stats.backend_vcpus,
                }
                with open(args.stats, "w", encoding="utf-8") as file:
                    json.dump(figures, file, indent=2)
    if outcome != vmcore.Outcome.POWER_OFF:
        print(f"vmcore: the guest ended: {outcome}", file=sys.stderr)
    return _exit_status(outcome)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.command == "run" and args.checkpoint_every is not None:
        if args.deterministic is None or args.timeout is not None:
            parser.error("--checkpoint-every wants --deterministic, and no --timeout")
    try:
        return _check() if args.command == "check" else _run(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (vmcore.Error, OSError) as error:
        print(f"vmcore: {error}", file=sys.stderr)
        for note in getattr(error, "__notes__", []):
            print(f"  {note}", file=sys.stderr)
        return 1
