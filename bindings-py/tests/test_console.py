"""The console: waiting for what a guest says, and typing."""

from __future__ import annotations

import re
import signal
import threading
from pathlib import Path

import pytest
from conftest import ECHO, SERIAL

import vmcore


def build(accel: str, code: bytes, console: object = None) -> vmcore.Vm:
    return vmcore.Vm(kernel=code, entry="raw16", memory="1M", accel=accel, exit_port=0xF4, console=console)  # type: ignore[arg-type]


def test_a_guest_is_talked_to(accel: str) -> None:
    with build(accel, ECHO) as vm:
        vm.start()
        assert vm.console.expect("?") == "?"
        vm.console.sendline("abc")
        assert vm.console.expect(re.compile(r"b(.)")) == "abc"
        vm.console.send(b"1 2 3 ")
        assert vm.console.expect(re.compile(rb"\d 3")) == "\n1 2 3"
        assert vm.console.transcript.startswith("?abc\n1 2 3")
        assert vm.console.raw_transcript.startswith(b"?abc\n")
        with pytest.raises(TimeoutError, match="never"):
            vm.console.expect("never", timeout=0.05)
        with pytest.raises(TypeError):
            vm.console.expect(3)  # type: ignore[arg-type]


def test_what_is_not_utf8_does_not_shift_a_match(accel: str) -> None:
    with build(accel, ECHO) as vm:
        vm.start()
        vm.console.expect("?")
        vm.console.send(b"\xff\xc3\xa4x\xe2\x82yz")
        assert vm.console.expect(re.compile("x")) == "\ufffd\u00e4x"
        assert vm.console.expect(re.compile(".y")) == "\ufffdy"
        assert vm.console.expect(re.compile("z")) == "z"


def test_lines_come_until_the_guest_ends(accel: str) -> None:
    with build(accel, SERIAL) as vm:
        vm.start()
        assert list(vm.console) == ["Hi"]
        with pytest.raises(EOFError, match="ended"):
            vm.console.expect("more", None)
        assert vm.wait(30).code == 7


def test_control_c_ends_a_wait_and_not_the_guest(accel: str) -> None:
    with build(accel, ECHO) as vm:
        vm.start()
        timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            vm.console.expect("never", None)
        timer.join()
        assert vm.running


def test_a_pattern_that_raises_is_told(accel: str) -> None:
    class Pattern:
        pattern = "x"

        def search(self, text: str) -> object:
            raise ZeroDivisionError

    with build(accel, ECHO) as vm:
        vm.start()
        with pytest.raises(ZeroDivisionError):
            vm.console.expect(Pattern())  # type: ignore[arg-type]


def test_output_goes_where_it_is_wanted(accel: str, tmp_path: Path) -> None:
    said: list[bytes] = []
    with build(accel, SERIAL, said.append) as vm:
        assert vm.run().code == 7
        with pytest.raises(vmcore.WrongStateError, match="console"):
            _ = vm.console
    assert b"".join(said) == b"Hi\n"
    for console in (tmp_path / "a", f"file:{tmp_path}/b"):
        with build(accel, SERIAL, console) as vm:
            vm.run()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == b"Hi\n"


def test_what_a_console_function_raises_comes_out_of_the_run(accel: str) -> None:
    def broken(data: bytes) -> None:
        raise ArithmeticError

    with build(accel, SERIAL, broken) as vm, pytest.raises(ArithmeticError):
        vm.run()


def test_a_closed_console_says_so(accel: str) -> None:
    vm = build(accel, ECHO)
    console = vm.console
    vm.close()
    with pytest.raises(vmcore.ConsoleClosedError):
        console.expect("x", 1)
    with pytest.raises(vmcore.ConsoleClosedError):
        console.send("x")
    assert console.transcript == ""
