"""Built VMs: runs, signals, threads, the end."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import EXIT_7, HI, LOOP, SERIAL

import vmcore


@pytest.fixture
def make(accel: str, vm_factory: Callable[..., vmcore.Vm]) -> Callable[..., vmcore.Vm]:
    def make(code: bytes, **keywords: Any) -> vmcore.Vm:
        settings: dict[str, Any] = {"entry": "raw16", "memory": "1M", "exit_port": 0xF4, "irqchip": False}
        return vm_factory(kernel=code, accel=accel, **(settings | keywords))

    return make


def test_a_run_says_how_it_ended(make: Callable[..., vmcore.Vm]) -> None:
    vm = make(EXIT_7)
    outcome = vm.run()
    assert outcome == vmcore.Outcome.exit(7) and (outcome.kind, outcome.code, str(outcome)) == ("exit", 7, "Exit(7)")
    with pytest.raises(vmcore.WrongStateError, match="exit port"):
        vm.run()
    assert make(HI).run() == vmcore.Outcome.HALTED
    assert make(b"\xb0\xfe\xe6\x64\xf4").run().cause == "keyboard"


def test_a_time_limit_ends_a_run_that_can_go_on(make: Callable[..., vmcore.Vm]) -> None:
    vm = make(LOOP)
    begin = time.monotonic()
    assert vm.run(0.2) == vmcore.Outcome.TIME_LIMIT
    assert 0.2 <= time.monotonic() - begin < 10
    assert vm.run(timeout=0.01) == vmcore.Outcome.TIME_LIMIT
    with pytest.raises(vmcore.ConfigError):
        vm.run(float("inf"))


def test_control_c_stops_the_vm_and_raises(make: Callable[..., vmcore.Vm]) -> None:
    vm = make(LOOP)
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        vm.run()
    timer.join()
    assert not vm.running
    # Nothing has its signals but Python.
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert vm.run(0.01) == vmcore.Outcome.TIME_LIMIT


def test_other_threads_of_python_run_meanwhile(make: Callable[..., vmcore.Vm]) -> None:
    vm = make(LOOP)
    turns = 0
    threading.Timer(0.3, vm.stop).start()
    thread = threading.Thread(target=vm.run)
    thread.start()
    while thread.is_alive():
        turns += 1
        time.sleep(0.01)
    assert turns > 5


def test_a_run_in_the_background_is_waited_for(make: Callable[..., vmcore.Vm]) -> None:
    vm = make(LOOP)
    vm.start()
    assert vm.running and repr(vm).startswith("<Vm running")
    with pytest.raises(vmcore.WrongStateError, match="running"):
        vm.run()
    with pytest.raises(TimeoutError):
        vm.wait(0.05)
    ended = threading.Event()
    vm.when_ended(ended.set)
    vm.stop()
    assert vm.wait(30) == vmcore.Outcome.STOPPED == vm.wait(0)
    assert ended.wait(10) and not vm.running


def test_progress_is_told_and_may_end_the_run(make: Callable[..., vmcore.Vm]) -> None:
    told: list[vmcore.Stats] = []

    def progress(stats: vmcore.Stats) -> None:
        told.append(stats)
        if len(told) == 3:
            raise StopIteration

    vm = make(LOOP)
    with pytest.raises(StopIteration):
        vm.run(progress=progress, interval=0.05)
    assert len(told) == 3 and len(told[0].vcpus) == 1 and not vm.running


def test_a_pause_holds_the_guest_and_has_its_state(make: Callable[..., vmcore.Vm]) -> None:
    # next: inc dword [0x600]; jmp next
    vm = make(b"\x66\xff\x06\x00\x06\xeb\xf9")
    vm.start()
    with vm.pause() as paused:
        state = paused.save()
        count = vm.memory[0x600:0x604]
        time.sleep(0.05)
        assert vm.memory[0x600:0x604] == count
        assert vmcore.VmState.from_bytes(state.to_bytes()) == state
        assert '"rip"' in state.to_json()
        paused.restore(state)
    with pytest.raises(vmcore.WrongStateError):
        paused.save()
    time.sleep(0.1)
    vm.stop()
    vm.wait(30)


def test_a_deterministic_vm_does_the_same_again(vm_factory: Callable[..., vmcore.Vm]) -> None:
    def once() -> tuple[int | None, str]:
        with vm_factory(kernel=LOOP, entry="raw16", memory="1M", accel="soft", deterministic=7) as vm:
            assert vm.run_instructions(1000) == vmcore.Outcome.INSTRUCTION_LIMIT
            with vm.pause() as paused:
                return vm.instructions, paused.state_hash()

    assert once() == once()
    assert once()[0] == 1000


def test_a_hundred_vms_run_in_threads(make: Callable[..., vmcore.Vm]) -> None:
    def one(number: int) -> int | None:
        # mov al, number; out 0xf4, al; hlt
        with make(bytes([0xB0, number, 0xE6, 0xF4, 0xF4])) as vm:
            return vm.run().code

    with ThreadPoolExecutor(25) as pool:
        assert list(pool.map(one, range(100))) == list(range(100))


def test_closing_is_idempotent_and_ends_a_run(make: Callable[..., vmcore.Vm]) -> None:
    vm = make(LOOP)
    vm.start()
    vm.close()
    vm.close()
    assert vm.closed and not vm.running and repr(vm).startswith("<Vm closed")
    for call in (vm.run, vm.start, vm.stop, vm.stats, vm.wait, vm.pause, vm.__enter__):
        with pytest.raises(vmcore.ClosedError):
            call()


def test_a_vm_that_is_leaked_is_warned_of(accel: str) -> None:
    with pytest.warns(ResourceWarning, match="was not closed"):
        vm = vmcore.Vm(kernel=LOOP, entry="raw16", memory="1M", accel=accel)
        vm.start()
        del vm
        gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with vmcore.Vm(kernel=LOOP, entry="raw16", memory="1M", accel=accel) as vm:
            pass
        del vm
        gc.collect()


EXIT_SCRIPT = """
import threading, vmcore
def forever():
    class Port(vmcore.PortDevice):
        def write(self, offset, data): pass
    vm = vmcore.Vm(kernel=b"\\xe6\\x10\\xeb\\xfc", entry="raw16", memory="1M", accel={accel!r}, devices=[Port(0x10)])
    vm.start()
    vm.console.rearm()
    return vm
kept = forever()
bare = vmcore.Vm.bare(accel={accel!r})
bare.map(0, 0x10000)
bare.memory.write(0x1000, b"\\xe6\\x10\\xeb\\xfc")
vcpu = bare.create_vcpu()
vcpu.enter_real_mode(0x1000)
threading.Thread(target=vcpu.run, kwargs=dict(port_write=lambda port, data: None), daemon=True).start()
threading.Thread(target=kept.wait, daemon=True).start()
import time; time.sleep(0.3)
print("end", flush=True)
"""


def test_vms_that_run_when_the_interpreter_ends_end_with_it(accel: str) -> None:
    script = EXIT_SCRIPT.format(accel=accel)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr


def test_what_it_is_is_shown_in_a_notebook(make: Callable[..., vmcore.Vm]) -> None:
    vm = make(SERIAL)
    vm.run()
    for html in (vm._repr_html_(), vm.stats()._repr_html_(), vmcore.check()._repr_html_()):
        assert html.startswith("<table>") and html.endswith("</table>")
    assert "Exit(7)" in vm._repr_html_() and vm.backend in vm._repr_html_()
    assert vm.stats().total["port"] > 0


def test_only_keywords_are_taken() -> None:
    with pytest.raises(TypeError):
        vmcore.Vm("vmlinuz")  # type: ignore[call-arg]
