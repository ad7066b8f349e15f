"""How a process shows its metrics to a monitor: over HTTP, at an address of its own.

What is shown is said by silo and coordinator each for itself; here is only the door to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import Metric
from prometheus_client.registry import Collector


class Exposition(Collector):
    """Whoever derives from it says in `collect` what there is to see; that is asked at every
    scrape, in a thread of the HTTP server."""

    def __init__(self) -> None:
        self._http: tuple[WSGIServer, Thread] | None = None

    def serve(self, address: str) -> None:
        """Answer at host:port until `close`. Raises OSError where it cannot be bound."""
        host, _, port = address.rpartition(":")
        registry = CollectorRegistry()
        registry.register(self)
        self._http = start_http_server(int(port), host.strip("[]"), registry)

    def close(self) -> None:
        if self._http is not None:
            server, thread = self._http
            server.shutdown()
            server.server_close()
            thread.join()
            self._http = None

    def describe(self) -> Iterable[Metric]:
        return ()  # registering collects nothing
