"""An HTTP proxy that speaks CONNECT and nothing else, on loopback; it counts what passes."""

from __future__ import annotations

import asyncio
import base64
from contextlib import suppress


class ConnectProxy:
    """Demands `credentials` ("user:password") where they are given, refuses where `forbidding`."""

    def __init__(self, credentials: str = "", forbidding: bool = False) -> None:
        self._credentials, self._forbidding = credentials, forbidding
        self.connected: list[str] = []
        self.up = self.down = 0
        """Bytes that passed from and to those who dial in."""
        self._lines: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        self._server.close()
        for line in self._lines:
            line.cancel()
        await asyncio.gather(*self._lines, return_exceptions=True)

    def url(self, credentials: str = "") -> str:
        return f"http://{credentials}{'@' if credentials else ''}127.0.0.1:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._lines.add(task)
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await self._answer(reader, writer)
        writer.close()
        self._lines.discard(task)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, target = head.split(" ")[:2]
        wanted = base64.b64encode(self._credentials.encode()).decode()
        if method != "CONNECT" or self._forbidding:
            writer.write(b"HTTP/1.1 403 Forbidden\r\n\r\n")
        elif self._credentials and f"Basic {wanted}" not in head:
            writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
        else:
            host, _, port = target.rpartition(":")
            there = await asyncio.open_connection(host, int(port))
            self.connected.append(target)
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            await asyncio.gather(
                self._copy(reader, there[1], "up"), self._copy(there[0], writer, "down")
            )

    async def _copy(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(65_536):
                setattr(self, way, getattr(self, way) + len(data))
                writer.write(data)
                await writer.drain()
        writer.close()
