"""The bytes of a server's answer -> JSON values, or the error that they tell of.

Pure, but for the clock that a Retry-After with a date needs.
"""

from __future__ import annotations

import contextlib
import email.utils
import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .errors import (
    RemoteAccessError,
    RemoteAuthenticationError,
    RemoteError,
    RemoteNotFoundError,
    RemoteRateLimitError,
    RemoteRequestError,
    RemoteResponseError,
    RemoteServerError,
)
from .urls import shown

LONGEST_LINE = 4 << 20
"""Bytes of one line of a stream: more is no token."""

LONGEST_ANSWER = 64 << 20
"""Bytes of an answer that comes whole."""

DONE = "[DONE]"
"""What stands for the end of a stream, in its place among the events."""

_REQUEST_IDS = ("x-request-id", "x-amzn-trace-id", "x-amz-cf-id", "cf-ray")


class Reading:
    """The bytes of an answer -> JSON values. Server-sent events (WHATWG HTML 9.2), or one JSON."""

    def __init__(self, kind: str, url: str) -> None:
        kind = kind.partition(";")[0].strip().lower()
        self._where = shown(url)
        self._stream = kind in ("text/event-stream", "")
        if not self._stream and kind != "application/json" and not kind.endswith("+json"):
            raise RemoteResponseError(
                f"{self._where}: expected JSON or a stream of events, got {kind[:100]}", status=200
            )
        self._rest = bytearray()
        self._event: list[bytes] = []
        self._waiting = 0
        self.done = False

    def feed(self, chunk: bytes) -> Iterator[Any]:
        """The values that these bytes complete."""
        lines = chunk.split(b"\n") if self._stream else [chunk]
        for line in lines[:-1]:
            self._rest += line
            whole, self._rest = bytes(self._rest), bytearray()
            yield from self._line(whole.removesuffix(b"\r"))
        self._rest += lines[-1]
        self._check(len(self._rest))

    def end(self) -> Iterator[Any]:
        """The values left when no byte will come."""
        if not self._stream:
            yield self._parsed(bytes(self._rest))
            return
        if self._rest:
            yield from self._line(bytes(self._rest))
        yield from self._line(b"")

    def _line(self, line: bytes) -> Iterator[Any]:
        self._check(len(line))
        if self.done:
            return
        if not line:
            if self._event:
                value = self._parsed(b"\n".join(self._event))
                self._event, self._waiting = [], 0
                yield value
            return
        name, _, value = line.partition(b":")
        if name.removeprefix(b"\xef\xbb\xbf") == b"data":
            yield from self._data(value.removeprefix(b" "))

    def _data(self, value: bytes) -> Iterator[Any]:
        """An event is over with an empty line; where servers send none, each of one line is."""
        if value.strip() == DONE.encode() and not self._event:
            self.done = True
            yield DONE
            return
        self._event.append(value)
        self._waiting += len(value)
        self._check(self._waiting)
        if len(self._event) > 1:
            return
        with contextlib.suppress(ValueError, RecursionError):
            whole = json.loads(value.decode())
            self._event, self._waiting = [], 0
            yield whole

    def _parsed(self, data: bytes) -> Any:
        try:
            return json.loads(data.decode())
        except (ValueError, RecursionError) as error:
            begin = data[:100].decode("utf-8", "replace")
            raise RemoteResponseError(
                f"{self._where}: what came is no JSON ({error!s:.100}): {begin!r}", status=200
            ) from None

    def _check(self, size: int) -> None:
        limit = LONGEST_LINE if self._stream else LONGEST_ANSWER
        if size > limit:
            what = "a line of the stream" if self._stream else "the answer"
            raise RemoteResponseError(
                f"{self._where}: {what} is longer than {limit >> 20} MiB", status=200
            )


def failure(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    url: str,
    safe: Callable[[str], str] = str,
) -> RemoteError:
    """The error for an answer that is none, with the server's words.

    >>> str(failure(404, {}, b'{"error": "no such model"}', "http://localhost/v1"))
    'http://localhost/v1: 404: no such model'
    """
    words = safe(_words(body) or headers.get("x-error-message", ""))
    about: dict[str, Any] = {
        "status": status,
        "request_id": next((headers[n] for n in _REQUEST_IDS if headers.get(n)), ""),
        "server_message": words,
    }
    if 300 <= status < 400:
        to = shown(headers.get("location", ""))
        return RemoteResponseError(
            f"{shown(url)}: {status}: redirects are not followed, this one goes to {to}", **about
        )
    kind = _kind(status, headers)
    if kind is RemoteRateLimitError or kind is RemoteServerError:
        about["retry_after"] = _retry_after(headers.get("retry-after"))
    said = f": {words}" if words else ""
    return kind(f"{safe(shown(url))}: {status}{_hint(kind)}{said}", **about)


def _kind(status: int, headers: Mapping[str, str]) -> type[RemoteError]:
    if headers.get("x-error-code") == "GatedRepo":
        return RemoteAccessError
    if status >= 500:
        return RemoteServerError
    if status < 400:
        return RemoteResponseError
    return _KINDS.get(status, RemoteRequestError)


_KINDS: dict[int, type[RemoteError]] = {
    401: RemoteAuthenticationError,
    403: RemoteAccessError,
    404: RemoteNotFoundError,
    429: RemoteRateLimitError,
}


def _hint(kind: type[RemoteError]) -> str:
    if kind is RemoteAuthenticationError:
        return " (no token was sent, or the server does not take it)"
    if kind is RemoteAccessError:
        return " (the model is gated, or the token may not use it)"
    return ""


def _words(body: bytes) -> str:
    """What a server says in its error: OpenAI's form, TGI's, FastAPI's, or plain text."""
    text = body.decode("utf-8", "replace").strip()
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return "" if text[:1] == "<" else text[:1000]
    return _said(said)[:1000]


def _said(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "; ".join(filter(None, map(_said, value)))
    if not isinstance(value, Mapping):
        return ""
    if "msg" in value:
        place = value.get("loc")
        where = ".".join(map(str, place)) if isinstance(place, list) else ""
        return f"{where}: {value['msg']}" if where else str(value["msg"])
    names = ("error", "message", "detail", "errors", "error_description")
    return next(filter(None, (_said(value[n]) for n in names if n in value)), "")


def error_event(value: Any, name: str, safe: Callable[[str], str] = str) -> RemoteError | None:
    """The error that an event of a stream carries, if it is one."""
    error = value.get("error") if isinstance(value, Mapping) else None
    if not error:
        return None
    words = safe(_said(error))[:1000]
    code = error.get("code") if isinstance(error, Mapping) else None
    code = code or value.get("code") or value.get("status_code")
    status = code if isinstance(code, int) and 400 <= code < 600 else 0
    kind = _kind(status, {}) if status else RemoteServerError
    return kind(f"{name}: {words}", status=status, server_message=words)


def _retry_after(value: str | None) -> float | None:
    """Seconds, of a Retry-After that holds them or a date."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(seconds, 0.0) if seconds < float("inf") else None
