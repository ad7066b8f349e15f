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
        self.forwarded = 0
        """Bytes that went towards the target since the last cut."""
        self._budget: int | None = None
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

    def cut_after(self, amount: int) -> None:
        """Cut every connection when `amount` more bytes have gone towards the target."""
        self._budget = amount

    def cut(self) -> None:
        """End every connection without a word (RST)."""
        self.cuts += 1
        self.forwarded = 0
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
        for source, sink, counted in ((reader, back, True), (there, writer, False)):
            task = asyncio.create_task(self._forward(source, sink, counted))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _forward(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, counted: bool
    ) -> None:
        with suppress(OSError):
            while data := await source.read(1 << 14):
                if counted and self._budget is not None:
                    if len(data) > self._budget:
                        sink.write(data[: self._budget])
                        self._budget = None
                        await sink.drain()
                        self.cut()
                        return
                    self._budget -= len(data)
                if counted:
                    self.forwarded += len(data)
                sink.write(data)
                await sink.drain()
        sink.close()
