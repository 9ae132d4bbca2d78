"""Fixtures for tests that want virtual machines.

    @pytest.mark.vm(kernel="vmlinuz", initrd="initrd.img", cmdline="console=ttyS0")
    def test_boots(vm):
        vm.start()
        vm.console.expect("login: ", timeout=120)

`vm` is the VM of the marker's keywords, `vm_factory(**keywords)` makes as many as one wants. Each is closed
at the end of the test; where it failed, the report has what their consoles said. `--vmcore-accel` chooses
the backend.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest

import vmcore

_CREATED = pytest.StashKey[list[vmcore.Vm]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option of the command line."""
    group = parser.getgroup("vmcore")
    group.addoption("--vmcore-accel", default="auto", choices=["auto", "kvm", "soft"], help="what runs the guests")


def pytest_configure(config: pytest.Config) -> None:
    """The marker."""
    config.addinivalue_line("markers", "vm(**keywords): the VM that the fixture vm gives")


@pytest.fixture
def vm_factory(request: pytest.FixtureRequest) -> Iterator[Callable[..., vmcore.Vm]]:
    """Makes VMs of the keywords of `vmcore.Vm`, which are closed at the end of the test."""
    made: list[vmcore.Vm] = []
    request.node.stash[_CREATED] = made

    def make(**keywords: Any) -> vmcore.Vm:
        keywords.setdefault("accel", request.config.getoption("--vmcore-accel"))
        vm = vmcore.Vm(**keywords)
        made.append(vm)
        return vm

    yield make
    for vm in made:
        vm.close()


@pytest.fixture
def vm(request: pytest.FixtureRequest, vm_factory: Callable[..., vmcore.Vm]) -> vmcore.Vm:
    """The VM of the marker `vm(**keywords)`."""
    marker = request.node.get_closest_marker("vm")
    if marker is None:
        raise pytest.UsageError('the fixture vm wants a marker: @pytest.mark.vm(kernel="vmlinuz")')
    return vm_factory(**marker.kwargs)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds what the guests said to the report of a test that failed."""
    report = yield
    if report.when != "call" or not report.failed or _CREATED not in item.stash:
        return report
    made = item.stash[_CREATED]
    for number, vm in enumerate(made):
        try:
            transcript = vm.console.transcript
        except vmcore.WrongStateError:
            continue
        if transcript:
            report.sections.append((f"console of VM {number}", transcript[-4096:]))
    return report
