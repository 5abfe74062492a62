"""An HTTP/1.1 server on 127.0.0.1: a thread for each connection, and none left after `close`.

What it answers is not its business: `Loopback.handle`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

JSON = "application/json"
EVENTS = "text/event-stream"


class Gone(Exception):  # noqa: N818  # no error of the server
    """The client has left."""


@dataclass(frozen=True)
class Request:
    """What a client sent. Names of headers are lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    at: float = field(default_factory=time.monotonic)

    @property
    def json(self) -> Any:
        """The body, read as JSON; None when it is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    @property
    def token(self) -> str | None:
        """What stands behind Bearer in the header Authorization."""
        return self.headers.get("authorization", "").removeprefix("Bearer ") or None

    def holds(self, secret: str) -> bool:
        """Whether a text stands anywhere in the request."""
        sent = (self.path, *self.headers.values(), self.body.decode("utf-8", "replace"))
        return any(secret in part for part in sent)


class Exchange:
    """One request, and the means to answer it: whole, in pieces, or badly."""

    def __init__(self, handler: BaseHTTPRequestHandler, request: Request, closing: threading.Event):
        self.request = request
        self._handler = handler
        self._closing = closing

    def reply(
        self, status: int, body: bytes = b"", kind: str = JSON, headers: Mapping[str, str] = {}
    ) -> None:
        """A whole answer."""
        self._head(status, {"Content-Type": kind, "Content-Length": str(len(body)), **headers})
        self._send(body)

    def reply_json(self, status: int, value: Any, headers: Mapping[str, str] = {}) -> None:
        """A whole answer in JSON; text stays as it is, not escaped."""
        self.reply(status, json.dumps(value, ensure_ascii=False).encode(), JSON, headers)

    def begin(self, status: int = 200, kind: str = EVENTS, headers: Mapping[str, str] = {}) -> None:
        """The head of an answer that comes in pieces."""
        self._head(status, {"Content-Type": kind, "Transfer-Encoding": "chunked", **headers})

    def piece(self, data: bytes) -> None:
        """A piece, as one chunk."""
        if data:
            self._send(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def event(self, value: Any) -> None:
        """A server-sent event: JSON, or the text as it is."""
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        self.piece(f"data: {text}\n\n".encode())

    def end(self) -> None:
        """The end of an answer in pieces."""
        self._send(b"0\r\n\r\n")

    def hang_up(self) -> None:
        """Close the connection, whatever was said so far."""
        self._handler.close_connection = True

    def reset(self) -> None:
        """Break the connection: the client sees "connection reset by peer"."""
        self._handler.close_connection = True
        connection = self._handler.connection
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(connection.detach())

    def wait(self, seconds: float) -> None:
        """Say nothing for so long. Raises Gone when the client leaves, or the server closes."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends and not self._closing.is_set():
            readable, _, _ = select.select([self._handler.connection], [], [], 0.02)
            if readable:
                with contextlib.suppress(OSError):
                    if self._handler.connection.recv(1, socket.MSG_PEEK):
                        time.sleep(0.02)  # the next request waits already
                        continue
                raise Gone
        if self._closing.is_set():
            raise Gone

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self._handler.send_response(status)
        for name, value in headers.items():
            self._handler.send_header(name, value)
        with _leaving():
            self._handler.end_headers()

    def _send(self, data: bytes) -> None:
        with _leaving():
            self._handler.wfile.write(data)


class Loopback:
    """A server of 127.0.0.1, running from `with` to its end.

    `requests` are all that came. `gone` counts clients that left before their answer was whole.
    A defect of the server itself is raised by `close`.
    """

    host = "127.0.0.1"

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.gone = 0
        self._defects: list[Exception] = []
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._server = _Server((self.host, 0), self._handler())
        self._acceptor = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), name="loopback", daemon=True
        )

    def handle(self, exchange: Exchange) -> None:
        """Answer."""
        raise NotImplementedError

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """The address, without a path."""
        return f"http://{self.host}:{self.port}"

    @property
    def bodies(self) -> list[Any]:
        """The JSON of all requests."""
        return [request.json for request in self.requests]

    @property
    def last(self) -> Request:
        """The latest request."""
        return self.requests[-1]

    def start(self) -> None:
        """Listen."""
        self._acceptor.start()

    def close(self) -> None:
        """End, and leave no thread behind."""
        self._closing.set()
        self._server.shutdown()
        self._acceptor.join(10)
        self._server.disconnect()
        self._server.server_close()
        left = [t for t in (self._acceptor, *self._server.threads) if t.is_alive()]
        assert not left, f"{len(left)} threads of the server outlived it"
        if self._defects:
            raise self._defects[0]

    def __enter__(self) -> Any:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def _answer(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                headers = {name.lower(): value for name, value in self.headers.items()}
                request = Request(self.command, self.path, headers, self.rfile.read(size))
                with server._lock:
                    server.requests.append(request)
                try:
                    server.handle(Exchange(self, request, server._closing))
                except Gone:
                    self.close_connection = True
                    with server._lock:
                        server.gone += 1
                except Exception as error:
                    self.close_connection = True
                    server._defects.append(error)

            do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _answer  # noqa: N815  # http.server's

            def log_message(self, *_: Any) -> None:
                """Nothing: tests look at `requests`."""

        return Handler


class _Server(socketserver.TCPServer):
    """A thread for each connection, all of them known."""

    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(address, handler)
        self.threads: list[threading.Thread] = []
        self._open: set[Any] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        thread = threading.Thread(
            target=self._serve, args=(request, client_address), name="loopback", daemon=True
        )
        self.threads = [t for t in self.threads if t.is_alive()] + [thread]
        thread.start()

    def disconnect(self) -> None:
        """Close every connection and wait for its thread."""
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(10)

    def _serve(self, request: Any, client_address: Any) -> None:
        try:
            with contextlib.suppress(OSError):  # the client is gone
                self.finish_request(request, client_address)
        finally:
            self._open.discard(request)
            self.shutdown_request(request)


@contextlib.contextmanager
def _leaving() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Gone from error
