"""A TCP proxy on loopback whose connections can be cut, at a given byte too, or sent elsewhere."""

from __future__ import annotations

import asyncio
from contextlib import suppress


class Proxy:
    """Forwards `address` to `target`, until it is told otherwise."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.address = ""
        self.cuts = 0
        self.total = self.returned = 0
        """Bytes that went towards the target, and back."""
        self.mute = False
        """Whether what comes back is kept from the caller, until the next cut."""
        self.patience: float | None = None
        """Seconds without a byte after which a connection is cut, as some firewalls do."""
        self.stall = 0.2
        """Seconds for which nothing gets through before connections are cut."""
        self._budgets: dict[bool, int] = {}
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, address: str = "127.0.0.1:0") -> None:
        host, _, port = address.rpartition(":")
        self._server = await asyncio.start_server(self._accept, host, int(port))
        self.address = f"{host}:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut_after(self, amount: int, *, back: bool = False) -> None:
        """Cut every connection when `amount` more bytes have gone towards the target, or back."""
        self._budgets = {back: amount}

    def cut(self) -> None:
        """End every connection without a word (RST)."""
        self.cuts += 1
        self.mute = False
        for writer in list(self._open):
            writer.transport.abort()
        self._open.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self.target.rpartition(":")
        try:
            there, back = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            return
        self._open |= {writer, back}
        for source, sink, is_back in ((reader, back, False), (there, writer, True)):
            task = asyncio.create_task(self._forward(source, sink, is_back))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _read(self, source: asyncio.StreamReader) -> bytes:
        try:
            async with asyncio.timeout(self.patience):
                return await source.read(1 << 14)
        except TimeoutError:
            self.cut()
            return b""

    async def _forward(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, back: bool
    ) -> None:
        with suppress(OSError):
            while data := await self._read(source):
                budget = self._budgets.get(back)
                data = data if budget is None else data[:budget]
                if back and self.mute:
                    continue
                self.returned += len(data) * back
                self.total += len(data) * (not back)
                sink.write(data)
                await sink.drain()
                if budget is not None:
                    self._budgets[back] = budget - len(data)
                    if budget == len(data):
                        del self._budgets[back]
                        # The line is dead before anybody is told.
                        await asyncio.sleep(self.stall)
                        self.cut()
                        return
        sink.close()
