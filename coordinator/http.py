"""`coordinator run --http`: the status document for a browser, a script or a reverse proxy. Read only.

Owns: three paths, and a bound on the number of visitors. Must not know: how the document comes about; the app
hands in one that is read once a second at most. It has threads of its own beside the event loop, so that no
visitor slows the coordinator down.

    /               what `swarm status` prints
    /status.json    what `swarm status --json` prints
    /health         "ok" while the coordinator runs

There is no TLS and no password here; beyond one machine, put a web server in front of it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import BoundedSemaphore, Thread
from typing import Any

import structlog

from coordinator.monitor.render import render
from coordinator.status import Document, envelope
from protocol.errors import ConfigError, PortError, SwarmError

log = structlog.get_logger()

MAX_VISITORS = 16
VISIT_S = 5.0  # a visitor that says nothing for so long is shown the door


@contextmanager
def serving_status(address: str, document: Callable[[], Document]) -> Iterator[int]:
    """Serve what `document` returns at `HOST:PORT` while the block runs; yields the port (0 asks for any).

    Raises `ConfigError` for what is no address, `PortError` if it cannot be listened on.
    """
    host, port = _parse(address)
    try:
        server = _Server((host, port), document)
    except OSError as error:
        raise PortError(f"cannot listen on {address}: {error.strerror or error}.") from None
    thread = Thread(target=server.serve_forever, name="http", daemon=True)
    thread.start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _parse(address: str) -> tuple[str, int]:
    host, separator, port = address.rpartition(":")
    if not (separator and host and port.isascii() and port.isdecimal() and int(port) < 65_536):
        raise ConfigError(f"'{address[:100]}' is no address to serve at.", hint="Write it like --http 127.0.0.1:8080.")
    return host.strip("[]"), int(port)


class _Server(ThreadingHTTPServer):
    """A server that turns visitors away when it is full."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], document: Callable[[], Document]) -> None:
        self.document = document
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._seats = BoundedSemaphore(MAX_VISITORS)
        super().__init__(address, _Visit)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._seats.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._seats.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("http.failed", visitor=client_address[0], exc_info=True)  # a visitor that hung up, mostly


class _Visit(BaseHTTPRequestHandler):
    server: _Server
    timeout = VISIT_S
    server_version, sys_version = "handcar", ""

    def do_GET(self) -> None:
        """Answer one of the three paths."""
        try:
            match self.path.partition("?")[0]:
                case "/":
                    self._answer(HTTPStatus.OK, "text/plain", "\n".join(render(self.server.document())) + "\n")
                case "/status.json":
                    self._answer(HTTPStatus.OK, "application/json", envelope(self.server.document()) + "\n")
                case "/health":
                    self._answer(HTTPStatus.OK, "text/plain", "ok\n")
                case _:
                    self._answer(HTTPStatus.NOT_FOUND, "text/plain", "there are / and /status.json and /health\n")
        except SwarmError as error:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", error.one_line() + "\n")

    def log_message(self, format: str, *arguments: object) -> None:
        log.debug("http.visit", visitor=self.client_address[0], line=format % arguments)

    def _answer(self, status: HTTPStatus, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)
