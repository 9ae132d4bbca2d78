"""vmcore for asyncio: the same names, with `await` where the others wait.

    async with vmcore.aio.Vm(kernel="vmlinuz", cmdline="console=ttyS0") as vm:
        vm.start()
        await vm.console.expect("login: ")

A run that is cancelled stops the guest, a wait that is cancelled ends alone. Nothing needs a thread of
asyncio's, so as many VMs can run as the host has room for.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import vmcore
from vmcore._errors import ConsoleClosedError, ExpectTimeoutError

__all__ = ["Console", "Vm"]

_T = TypeVar("_T")


class Console:
    """The guest's console; see `vmcore.Console`."""

    def __init__(self, console: vmcore.Console) -> None:
        self._console = console
        self._changed: list[asyncio.Future[None]] = []

    def _ring(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.remove_reader(self._console.fileno())
        waiting, self._changed = self._changed, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def _output(self) -> None:
        """Waits for new output, or for the end of the guest, since the descriptor was armed."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._changed.append(future)
        loop.add_reader(self._console.fileno(), self._ring, loop)
        try:
            await future
        finally:
            if future in self._changed:
                self._changed.remove(future)
                if not self._changed:
                    loop.remove_reader(self._console.fileno())

    async def expect(self, pattern: str | re.Pattern[str] | re.Pattern[bytes], timeout: float | None = 30.0) -> str:
        """Waits until the guest has put out `pattern`, and returns all since the last match, with it."""
        try:
            async with asyncio.timeout(timeout):
                while True:
                    # Armed before the look, so that output that comes between the two is not missed.
                    self._console.rearm()
                    try:
                        return self._console.expect(pattern, 0)
                    except ExpectTimeoutError:
                        await self._output()
        except TimeoutError:
            # The same text as without asyncio; it looks once more for what came last.
            return self._console.expect(pattern, 0)

    def send(self, text: str | bytes) -> None:
        """Types `text`."""
        self._console.send(text)

    def sendline(self, text: str = "") -> None:
        """Types `text` and a line feed."""
        self._console.sendline(text)

    @property
    def transcript(self) -> str:
        """All output so far."""
        return self._console.transcript

    def __aiter__(self) -> Console:
        return self

    async def __anext__(self) -> str:
        try:
            line = await self.expect("\n", None)
        except ConsoleClosedError:
            rest = next(self._console, None)
            if rest is None:
                raise StopAsyncIteration from None
            return rest
        return line.rstrip("\r\n")


class Vm:
    """A virtual machine; takes the keywords of `vmcore.Vm`, whose other members it passes on."""

    def __init__(self, **settings: Any) -> None:
        self._vm = vmcore.Vm(**settings)
        self._console: Console | None = None

    @property
    def vm(self) -> vmcore.Vm:
        """The VM that this one stands for."""
        return self._vm

    @property
    def console(self) -> Console:
        """The guest's serial console, which is to be in memory."""
        if self._console is None:
            self._console = Console(self._vm.console)
        return self._console

    @property
    def memory(self) -> vmcore.Memory:
        """The guest's memory."""
        return self._vm.memory

    @property
    def running(self) -> bool:
        """Whether a run is under way."""
        return self._vm.running

    def start(self, timeout: float | None = None) -> None:
        """Begins a run."""
        self._vm.start(timeout)

    def stop(self) -> None:
        """Ends the run that is under way, or the next one at its begin."""
        self._vm.stop()

    async def wait(self, timeout: float | None = None) -> vmcore.Outcome:
        """Waits for the end of the run, and says how it ended."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()

        def tell() -> None:
            # A loop that is gone wants to know nothing.
            if not loop.is_closed():
                loop.call_soon_threadsafe(ended.set)

        if self._vm.running:
            self._vm.when_ended(tell)
            try:
                async with asyncio.timeout(timeout):
                    await ended.wait()
            except TimeoutError:
                # Says so in the words of the VM.
                return self._vm.wait(0)
        return self._vm.wait(0)

    async def run(self, timeout: float | None = None) -> vmcore.Outcome:
        """Runs the guest until it ends, or for `timeout` seconds; stops it when it is cancelled."""
        self._vm.start(timeout)
        try:
            return await self.wait()
        except asyncio.CancelledError:
            self._vm.stop()
            await asyncio.shield(self._settle())
            raise

    async def _settle(self) -> None:
        try:
            await self.wait()
        except vmcore.Error:
            pass

    async def stats(self) -> vmcore.Stats:
        """What the VM did so far."""
        return await self._aside(self._vm.stats)

    async def pause(self) -> vmcore.Paused:
        """Holds the VM until the pause is resumed."""
        return await self._aside(self._vm.pause)

    async def close(self) -> None:
        """Stops the guest and frees everything. More than once does nothing."""
        await self._aside(self._vm.close)

    async def _aside(self, call: Callable[[], _T]) -> _T:
        return await asyncio.to_thread(call)

    async def __aenter__(self) -> Vm:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
