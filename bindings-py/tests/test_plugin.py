"""The pytest plugin."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]

TESTS = """
import pytest, vmcore

CODE = {code!r}

@pytest.mark.vm(kernel=CODE, entry="raw16", memory="1M", exit_port=0xf4)
def test_vm(vm):
    assert vm.backend == "soft"
    assert vm.run().code == 7

def test_factory(vm_factory):
    vms = [vm_factory(kernel=CODE, entry="raw16", memory="1M", exit_port=0xf4) for _ in range(3)]
    assert [vm.run().code for vm in vms] == [7, 7, 7]

def test_fails(vm_factory):
    vm = vm_factory(kernel=CODE, entry="raw16", memory="1M", exit_port=0xf4)
    vm.run()
    assert False

def test_without_marker(vm):
    pass
"""


def test_the_fixtures_make_vms_and_close_them(pytester: pytest.Pytester) -> None:
    from conftest import SERIAL

    pytester.makepyfile(TESTS.format(code=SERIAL))
    result = pytester.runpytest_subprocess("--vmcore-accel=soft", "-W", "error")
    result.assert_outcomes(passed=2, failed=1, errors=1)
    result.stdout.fnmatch_lines(["*console of VM 0*", "Hi"])
    result.stdout.fnmatch_lines(["*wants a marker*"])
    assert "ResourceWarning" not in result.stdout.str()
