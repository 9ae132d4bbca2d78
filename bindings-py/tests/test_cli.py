"""The command, and the examples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EXIT_7, LOOP, SERIAL

import vmcore
from vmcore import cli

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vmcore", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL)


def test_check_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check"]) == 0
    # Not all of it: a speed is measured.
    said = capsys.readouterr().out
    assert said.splitlines()[:2] == str(vmcore.check()).splitlines()[:2] and "soft: usable" in said
    assert run("check").returncode == 0


def test_run_runs_and_has_the_guests_status(tmp_path: Path) -> None:
    (tmp_path / "code").write_bytes(SERIAL)
    code: list[str | Path] = ["run", "--kernel", tmp_path / "code", "--entry", "raw", "--memory", "1M", "--accel", "soft"]
    done = run(*code, "--stats", tmp_path / "stats.json")
    assert (done.returncode, done.stdout) == (15, "Hi\n")
    assert "using soft" in done.stderr and "the guest ended: Exit(7)" in done.stderr
    assert json.loads((tmp_path / "stats.json").read_text())["total"]["port"] > 0
    done = run(*code, "--console", tmp_path / "out")
    assert (done.stdout, (tmp_path / "out").read_text()) == ("", "Hi\n")
    (tmp_path / "code").write_bytes(LOOP)
    assert run(*code, "--timeout", "0.1").returncode == 124


def test_the_status_line_is_for_terminals(tmp_path: Path) -> None:
    (tmp_path / "code").write_bytes(LOOP)
    host, guest = os.openpty()
    command = [sys.executable, "-m", "vmcore", "run", "--kernel", str(tmp_path / "code"), "--entry", "raw"]
    command += ["--accel", "soft", "--memory", "1M", "--console", str(tmp_path / "out"), "--timeout", "1.3"]
    done = subprocess.run(command, stdin=guest, stdout=guest, stderr=guest, timeout=60, check=False)
    os.close(guest)
    assert done.returncode == 124
    text = b""
    while True:
        try:
            part = os.read(host, 4096)
        except OSError:
            break
        text += part
        if not part:
            break
    os.close(host)
    assert b"soft  1 s  1 vCPUs" in text and text.count(b"\x1b[K") >= 2, text


def test_a_deterministic_guest_tells_its_state_every_so_often(tmp_path: Path) -> None:
    # mov cx, 1000; next: loop next; mov al, 7; out 0xf4, al
    (tmp_path / "code").write_bytes(b"\xb9\xe8\x03\xe2\xfe" + EXIT_7)

    def checkpoints(seed: str) -> list[str]:
        options = ["--entry", "raw", "--memory", "1M", "--deterministic", seed, "--checkpoint-every", "400"]
        done = run("run", "--kernel", tmp_path / "code", *options)
        assert done.returncode == 15, done.stderr
        lines = done.stderr.replace("\r", "").splitlines()
        return [line.removeprefix("checkpoint ") for line in lines if line.startswith("checkpoint ")]

    first = checkpoints("7")
    assert len(first) == 3 and first[0].startswith("400 ") and len(first[0]) == 4 + 64, first
    assert first == checkpoints("7") != checkpoints("8")


def test_a_guest_waits_for_its_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "_RETRY", 0.0)
    outcomes = iter([vmcore.Outcome.IO_ERROR, vmcore.Outcome.IO_ERROR, vmcore.Outcome.POWER_OFF])
    (tmp_path / "disk.img").write_bytes(bytes(4096))
    disks = [vmcore.Disk(tmp_path / "disk.img", on_write_error="stop")]
    assert cli._until_the_host_is_well(disks, lambda: next(outcomes)) == vmcore.Outcome.POWER_OFF
    # The disk itself has stopped nothing.
    assert capsys.readouterr().err == ""


def test_errors_are_one_line_and_what_to_do(tmp_path: Path) -> None:
    done = run("run", "--kernel", tmp_path / "none")
    assert done.returncode == 1
    assert "No such file" in done.stderr and "fix: " in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--disk", "a,rw"], "known are: format="),
        (["--disk", ",ro"], "path of an image"),
        (["--net", "bridge"], "tap=NAME"),
        (["--net", "nat,speed=1"], "forward="),
        (["--vsock", "cid=3"], "give both"),
        (["--balloon", "many"], "512M"),
        (["--exit-port", "x"], "0xffff"),
        (["--checkpoint-every", "0", "--deterministic"], "from 1"),
        (["--checkpoint-every", "1000"], "wants --deterministic"),
        (["--checkpoint-every", "1000", "--deterministic", "--timeout", "1"], "no --timeout"),
    ],
)
def test_options_that_cannot_be_are_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["run", "--kernel", "k", *arguments])
    assert caught.value.code == 2 and words in capsys.readouterr().err


def test_options_become_devices(tmp_path: Path) -> None:
    (tmp_path / "a,b.img").write_bytes(bytes(1 << 20))
    (tmp_path / "code").write_bytes(EXIT_7)
    status = cli.main(
        ["run", "--kernel", str(tmp_path / "code"), "--entry", "raw", "--memory", "1M", "--accel", "soft"]
        + ["--console", str(tmp_path / "out"), "--disk", f"{tmp_path}/a,,b.img,ro,iops=500/1K,bps=10M,serial=x,rerror=stop,werror=enospc"]
        + ["--net", "nat,forward=tcp:0:80,deny=tcp:any:25,otherwise=deny,mac=02:00:00:00:00:01,bps=100M"]
        + ["--balloon", "--vsock", f"cid=3,path={tmp_path}/v", "--transport", "pci", "--cpus", "2"]
    )
    assert status == 15


@pytest.mark.parametrize("name", ["hello_vcpu", "custom_device"])
def test_the_examples_print_what_those_in_rust_and_c_print(name: str) -> None:
    output = (EXAMPLES / f"{name}.out").read_text()
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, output, "")
