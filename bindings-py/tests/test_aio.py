"""The same for asyncio."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from conftest import ECHO, EXIT_7, LOOP, SERIAL

import vmcore
import vmcore.aio


def build(accel: str, code: bytes, **keywords: Any) -> vmcore.aio.Vm:
    return vmcore.aio.Vm(kernel=code, entry="raw16", memory="1M", accel=accel, exit_port=0xF4, **keywords)


def test_a_run_is_awaited(accel: str) -> None:
    async def main() -> None:
        async with build(accel, EXIT_7) as vm:
            assert (await vm.run()).code == 7
        async with build(accel, LOOP) as vm:
            assert await vm.run(0.05) == vmcore.Outcome.TIME_LIMIT

    asyncio.run(main())


def test_a_guest_is_talked_to(accel: str) -> None:
    async def main() -> None:
        async with build(accel, ECHO) as vm:
            vm.start()
            assert await vm.console.expect("?") == "?"
            waiting = asyncio.create_task(vm.console.expect("xyz\n"))
            await asyncio.sleep(0.05)
            for letter in "xyz\n":
                vm.console.send(letter)
                await asyncio.sleep(0.01)
            assert await waiting == "xyz\n"
            with pytest.raises(TimeoutError, match="never"):
                await vm.console.expect("never", 0.05)
            assert (await vm.stats()).total["exits"] >= 0
            with await vm.pause() as paused:
                assert paused.save()

    asyncio.run(main())


def test_lines_come_until_the_guest_ends(accel: str) -> None:
    async def main() -> list[str]:
        async with build(accel, SERIAL) as vm:
            vm.start()
            return [line async for line in vm.console]

    assert asyncio.run(main()) == ["Hi"]


def test_cancelling_a_run_stops_the_guest_and_cancelling_a_wait_does_not(accel: str) -> None:
    async def main() -> None:
        async with build(accel, LOOP) as vm:
            run = asyncio.create_task(vm.run())
            await asyncio.sleep(0.1)
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run
            assert not vm.running
            vm.start()
            with pytest.raises(TimeoutError):
                await vm.wait(0.05)
            assert vm.running
            vm.stop()
            assert await vm.wait() == vmcore.Outcome.STOPPED

    asyncio.run(main())


def test_many_run_at_once(accel: str) -> None:
    async def one(number: int) -> int | None:
        async with build(accel, bytes([0xB0, number, 0xE6, 0xF4, 0xF4])) as vm:
            return (await vm.run()).code

    async def main() -> list[int | None]:
        return list(await asyncio.gather(*(one(number) for number in range(50))))

    assert asyncio.run(main()) == list(range(50))
